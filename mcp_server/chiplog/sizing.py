"""What the runs of a plan will need, each from the records of the device that it will run on, and all together."""

from __future__ import annotations

import heapq
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from chiplog.checks import Check, Report, warning
from chiplog.checks.dataset import DatasetReport, check_dataset
from chiplog.engines.local import available_gpus, gpu_name
from chiplog.errors import ChiplogError, NotFoundError, PlanError
from chiplog.estimate import NAMED, Estimate, RunEstimate, Workload, workload
from chiplog.estimate.gpus import Gpu, gpu, gpus
from chiplog.estimate.job import Job
from chiplog.estimate.jobs import control_job, measured_run, planned_job
from chiplog.estimate.model import BASES
from chiplog.estimate.shapes import known_as
from chiplog.estimate.tokens import Steps
from chiplog.estimate.workload import training_steps
from chiplog.ledger import Ledger
from chiplog.machine import available_cpus
from chiplog.plan import Plan, Run
from chiplog.record import Record, State
from chiplog.render import find_gpu
from chiplog.schema import Frozen
from chiplog.settings import Settings
from chiplog.text import size

if TYPE_CHECKING:
    from chiplog.estimate.estimator import Known, Place

OWN_RUNS, OTHER_RUNS = 100, 50  # of a model on a device, and of any model there, the newest: what estimates rest on
UNSURE = 0.05  # chance of running out of memory, or share of what is free on disk, from which it is said


class PlannedRun(Frozen):
    """One row of the plan's table."""

    run: Run = Field(description="The run.")
    steps: int = Field(description="Optimiser steps that it will take; 0 for a control.")
    trained: Steps | None = Field(description="How its recipe makes them of the samples; null for a control.")
    estimate: RunEstimate = Field(description="What it will need.")


class Totals(Frozen):
    """What all runs will need together; runs without evidence are counted, not guessed."""

    runs: int = Field(description="Jobs in all.")
    controls: int = Field(description="Of these, evaluations of a base model.")
    unknown: int = Field(description="Runs whose time nothing tells yet.")
    in_sequence_s: Estimate | None = Field(description="Seconds one after another; null if a run is unknown.")
    in_parallel_s: float | None = Field(
        description="Seconds with as many at once as jobs_at_once, CPUs and GPUs allow; null: not known."
    )
    gpu_hours: float | None = Field(description="GPU hours; null if a run is unknown.")
    cost: float | None = Field(default=None, description="Price of these; null if a GPU has none in chiplog.toml.")
    disk_bytes: int | None = Field(default=None, description="Bytes that they leave on disk; null: not known.")
    disk_free_bytes: int | None = Field(default=None, description="Bytes that are free there.")


class DatasetReports:
    """What was found of each data set, with the tokenizer and the prompts of the runs that read it."""

    def __init__(self, progress=None) -> None:
        self.progress = progress
        self.found: dict[tuple[str, ...], DatasetReport] = {}

    def of(self, run: Run) -> DatasetReport:
        """Raises PlanError if the data set cannot be used so."""
        config = run.config
        prompts = {name: config[name] for name in ("system_prompt", "prompt")}
        key = (config["dataset"], config["model"], *(str(text) for text in prompts.values()))
        if key not in self.found:
            report = check_dataset(Path(key[0]), model=Path(key[1]), **prompts, progress=self.progress)
            stop_on(report, f"data set {run.dataset}", key[0])
            self.found[key] = report
        return self.found[key]


def stop_on(report: Report, what: str, path: str) -> None:
    """Raises PlanError with every check that failed."""
    if not report.ok:
        lines = [f"  {check.subject}: {check.found}. {check.mend}" for check in report.problems if not check.ok]
        raise PlanError(f"the {what} ({path}) cannot be used:\n" + "\n".join(lines))


class Sizing:
    """Estimates of runs, from what the ledger holds now; each device's records are read once."""

    def __init__(self, datasets: DatasetReports, ledger: Ledger, settings: Settings) -> None:
        self.datasets, self.ledger, self.settings = datasets, ledger, settings
        self._records: dict[tuple[str, str], list[Record]] = {}

    def row(self, run: Run) -> PlannedRun:
        """A run with its estimate."""
        from chiplog.estimate.estimator import estimate_run  # numpy and scipy take a while to import

        trained, work = _work(run, self.datasets.of(run))
        device, model = _device(run, self.settings), run.config["model"]
        place = self.place(device, model)
        found = estimate_run(run, work, self._on(device, model), _job(run, trained, place), place)
        return PlannedRun(run=run, steps=work.steps, trained=trained, estimate=found)

    def place(self, device: str, model: str) -> Place | None:
        """The card of a device and all that is known of it; null for a CPU, and for a card that is not known."""
        from chiplog.estimate.estimator import Place

        found = self._learnt(device, model)
        return found and Place(*found, price=self._price(device, found[0]))

    def card_warning(self, device: str) -> Check | None:
        """That a GPU is not known, and so nothing but its own runs can tell of it; null for one that is."""
        if device in ("", "cpu") or self._card(device):
            return None
        try:
            gpu(device)
        except NotFoundError as error:
            mend = 'Name its card in chiplog.toml: card = "..." under its [[gpus]]'
            return warning("gpu", f"nothing but own runs tells of {device}, since {error}"[:400], mend)
        return None

    def _learnt(self, device: str, model: str) -> tuple[Gpu, Known] | None:
        card = self._card(device)
        if card is None:
            return None
        named = next((gpu for gpu in self.settings.gpus if gpu.name == device), None)
        is_only = named is not None and len(self.settings.gpus) == 1
        return _learnt(
            self.ledger.file, self.ledger.stamp(), card.key, tuple(_devices(self.ledger, card)), model, is_only
        )

    def _card(self, device: str) -> Gpu | None:
        """The card that a device is, as chiplog.toml says, by its name, or by the runs of the ledger on such a one."""
        named = next((gpu for gpu in self.settings.gpus if gpu.name == device), None)
        card = card_of((named and named.card) or device)
        if card and re.search(r"sxm|pcie|nvl", device):
            return card
        like = [name for name in self.ledger.distinct("device") if _kind(device) in re.split(r"[-_ ]", name.lower())]
        seen = [(name, each) for name in like if (each := card_of(name)) and (card is None or same_card(card, each))]
        if not seen:
            return card
        counts = Counter({each.key: self.ledger.search({"device": name}, limit=1)[1] for name, each in seen})
        return gpus()[counts.most_common(1)[0][0]] if card or len({each.nominal_gb for _, each in seen}) == 1 else None

    def _price(self, device: str, card: Gpu) -> float | None:
        """Of an hour, as chiplog.toml says of that name or of another name of that card."""
        priced = [gpu for gpu in self.settings.gpus if gpu.price_per_hour is not None]
        found = [gpu for gpu in priced if gpu.name == device] or [
            gpu for gpu in priced if (other := card_of(gpu.card or gpu.name)) and same_card(other, card)
        ]
        return found[0].price_per_hour if found else None

    def refuse_too_large(self, row: PlannedRun) -> None:
        """Raises PlanError for a run that its card would rather not hold, with what would fit."""
        found = row.estimate
        if not found.reserved_mem or not found.capacity_bytes or (found.out_of_memory or 0.0) <= 0.5:
            return
        place = self.place(_device(row.run, self.settings), row.run.config["model"])
        job = _job(row.run, row.trained, place)
        assert place and job, "a run without them has no capacity"
        needs = f"{size(found.reserved_mem.value)} ({size(found.reserved_mem.low)} to {size(found.reserved_mem.high)})"
        raise PlanError(
            f"{row.run.name} needs about {needs} of GPU memory and {place.card.name} has {size(found.capacity_bytes)}: "
            f"{self._instead(row, job, place)}, or set allow_oversize to plan it all the same"
        )

    def _instead(self, row: PlannedRun, job: Job, place: Place) -> str:
        """What would fit, the effective batch as it is."""
        from chiplog.estimate.questions import largest, smallest_card

        batch = row.run.config.get("batch_size")
        if micro := row.estimate.micro_batch_size:
            return f"set micro_batch_size to {micro}; batch_size stays {batch}, in {row.estimate.grad_accum} passes"
        single = job.model_copy(update={"micro_batch": 1})
        length = largest(single, place, "seq_len")
        cards = [card for each in self.settings.gpus if (card := card_of(each.card or each.name))]
        card = smallest_card(single, place, cards) or smallest_card(single, place, gpus().values())
        ways = [f"max_seq_len {length} with micro_batch_size 1"] if length else []
        ways += [f"a GPU such as {card} with micro_batch_size 1"] if card else []
        return f"take {' or '.join(ways)}" if ways else "take a smaller model, or shard it over several GPUs"

    def _on(self, device: str, model: str) -> list[Record]:
        """The newest records of a model on a device."""
        if (device, model) not in self._records:
            card = self._card(device)
            names = (
                ["cpu"] if device == "cpu" else _devices(self.ledger, card) if card else _called(self.ledger, device)
            )
            self._records[device, model] = self.ledger.search({"device": names, "model": model}, limit=OWN_RUNS)[0]
        return self._records[device, model]


def _devices(ledger: Ledger, card: Gpu) -> list[str]:
    """The names under which a card stands in the ledger."""
    return [name for name in ledger.distinct("device") if (other := card_of(name)) and same_card(card, other)]


def _called(ledger: Ledger, device: str) -> list[str]:
    """The names in the ledger that hold that of a card which nobody knows."""
    return [name for name in ledger.distinct("device") if name != "cpu" and device and _kind(device) in name.lower()]


@lru_cache(maxsize=64)
def _learnt(
    file: Path, _: tuple[int, int], key: str, devices: tuple[str, ...], model: str, is_only: bool
) -> tuple[Gpu, Known]:
    """A card with what is known of it; once for each state of the ledger.

    From the newest runs of the model there, and of any model. Of the only kind of GPU there is, runs tell too whose
    log names none.
    """
    from chiplog.estimate.estimator import learn

    ledger, where, card = Ledger(file), list(devices), gpus()[key]
    names = [name for name in ledger.distinct("model") if same_model(name, model)]
    found = ledger.search({"device": where, "model": names}, limit=OWN_RUNS)[0]
    found += ledger.search({"device": where}, limit=OTHER_RUNS)[0]
    if is_only:
        found += ledger.search({"device": None, "model": names}, limit=OWN_RUNS)[0]
        found += ledger.search({"device": None}, limit=OTHER_RUNS)[0]
    return card, learn({record.key: record for record in found}.values(), card)


def fitting_batch(record: Record, ledger: Ledger, settings: Settings) -> int | None:
    """Of a run that ran out of a GPU's memory, the largest divisor of its micro-batch that would fit; null: unknown."""
    if record.state is not State.OUT_OF_MEMORY or not record.usage.device:
        return None
    from chiplog.estimate.estimator import largest_micro_batch

    place = Sizing(DatasetReports(), ledger, settings).place(record.usage.device, record.model or "")
    run = place and measured_run(record, place.card)
    if not (place and run):
        return None
    micro = run.job.micro_batch
    smaller = [size for size in range(1, micro) if micro % size == 0]
    return largest_micro_batch(run.job, place, smaller)


@lru_cache(maxsize=1024)
def card_of(device: str) -> Gpu | None:
    """The GPU in the catalogue; null for a CPU, and for one that is not there, whose runs speak alone."""
    if device in ("", "cpu"):
        return None
    with suppress(NotFoundError):
        return gpu(device)
    return None


def same_card(one: Gpu, other: Gpu) -> bool:
    """Whether they are the same card with the same memory, whatever its form."""
    form = re.compile(r"-(?:sxm|pcie|nvl)\d*")
    return form.sub("", one.key) == form.sub("", other.key)


def same_model(one: str, other: str) -> bool:
    """Whether two names or folders are of the same published model, or called alike."""
    names = [known_as(re.sub(r"^q?lora_", "", name)) or Path(name).name.lower() for name in (one, other)]
    return one == other or names[0] == names[1]


def _kind(device: str) -> str:
    """The word that all names of a card have: the a100 of `a100-80gb-sxm`, the 4090 of `rtx-4090`."""
    words = (card.key if (card := card_of(device)) else device).lower().split("-")
    return next((word for word in words if re.search(r"\d", word) and not word.endswith("gb")), words[0])


def make_totals(rows: Sequence[PlannedRun], settings: Settings) -> Totals:
    """Sums over the runs. The ends of the interval add up too, which is wider than it need be."""
    times = [(row.run, row.estimate.elapsed) for row in rows]
    known = [time for _, time in times if time]
    complete = len(known) == len(rows)
    together = None
    names = sorted({name for time in known for name in time.evidence})
    if complete and known:
        together = Estimate(
            value=sum(time.value for time in known),
            low=sum(time.low for time in known),
            high=sum(time.high for time in known),
            coverage=None,
            basis=BASES[max(BASES.index(time.basis) for time in known)],
            evidence=names[:NAMED],
            n_evidence=len(names),
        )
    costs = [row.estimate.cost for row in rows]
    disks = [row.estimate.disk_bytes for row in rows]
    return Totals(
        runs=len(rows),
        controls=sum(row.run.kind == "control" for row in rows),
        unknown=len(rows) - len(known),
        in_sequence_s=together,
        in_parallel_s=_parallel([(run, time.value) for run, time in times if time], settings) if complete else None,
        gpu_hours=sum(time.value * run.resources.gpus for run, time in times if time) / 3600 if complete else None,
        cost=sum(cost for cost in costs if cost is not None) if None not in costs else None,
        disk_bytes=sum(disk for disk in disks if disk is not None) if None not in disks else None,
        disk_free_bytes=_free(settings.experiments),
    )


def refuse_over_budget(plan: Plan, rows: Sequence[PlannedRun], settings: Settings) -> None:
    """Raises PlanError for a plan that needs more GPU hours, or costs more, than it may, with how much would fit."""
    limits = [
        ("GPU hours", "gpu_hours", plan.gpu_hours or settings.budget.gpu_hours),
        ("in cost", "cost", settings.budget.cost),
    ]
    for words, field, limit in limits:
        needs = [getattr(row.estimate, field) or 0.0 for row in rows]
        if limit and sum(needs) > limit:
            within, total = 0, 0.0
            for need in sorted(needs):
                total += need
                within += total <= limit
            raise PlanError(
                f"the plan needs about {sum(needs):.1f} {words} and the budget is {limit:g}: within it are the "
                f"{within} shortest of its {len(rows)} runs, or {limit / sum(needs):.0%} of the training; "
                "take fewer values, fewer seeds or fewer epochs, or raise the budget"
            )


def check_room(rows: Sequence[PlannedRun], totals: Totals, settings: Settings) -> list[Check]:
    """Runs that may run out of memory, a disk that may not hold what they leave, a budget that cannot be checked."""
    found = []
    if settings.budget.gpu_hours and totals.unknown:
        words = f"nothing tells the time of {totals.unknown} runs, so the plan may need more GPU hours than it may"
        found.append(warning("budget", words, "Probe them with max_steps 20 first"))
    if settings.budget.cost and totals.cost is None:
        words = "nothing tells what the plan costs: a run's time is not known, or a GPU has no price_per_hour"
        found.append(warning("budget", words, "Give the price in chiplog.toml, and probe the runs"))
    for row in rows:
        if (chance := row.estimate.out_of_memory) and chance > UNSURE:
            micro = row.estimate.micro_batch_size
            mend = f"micro_batch_size {micro} fits 95 % of such runs" if micro else "Probe it with max_steps 20 first"
            found.append(
                warning("memory", f"{row.run.name} runs out of GPU memory with a chance of {chance:.0%}", mend)
            )
    if totals.disk_bytes and totals.disk_free_bytes is not None and totals.disk_bytes > totals.disk_free_bytes:
        words = f"the runs leave up to {size(totals.disk_bytes)} and {size(totals.disk_free_bytes)} are free"
        found.append(warning("disk", words, "Free some, or set [paths] experiments to another disk"))
    return found


def _work(run: Run, report: DatasetReport) -> tuple[Steps | None, Workload]:
    """Its steps, null for a control, and all that it does."""
    trained = None
    if run.kind != "control":
        train = report.splits["train"]
        assert train.tokens, "a report without failed checks has counted the tokens"
        trained = training_steps(run.config, train.tokens.lengths, train.rows, train.tokens.max)
    scored = report.splits[run.config["eval_split"]]
    prompts = (scored.tokens.total - scored.tokens.label) / scored.rows if scored.tokens else 0.0
    return trained, workload(run, trained, scored.rows, prompts)


def devices(runs: Sequence[Run], settings: Settings) -> list[str]:
    """What the runs will run on, each once."""
    return list(dict.fromkeys(_device(run, settings) for run in runs))


def _device(run: Run, settings: Settings) -> str:
    """What it will run on: cpu, or the name of a GPU; of one that no file names, what this machine has."""
    if not run.resources.gpus:
        return "cpu"
    named = find_gpu(run, settings)
    return named.name if named else gpu_name()


def _job(run: Run, trained: Steps | None, place: Place | None) -> Job | None:
    """Its training on a card, or of a control the model alone; null without a card, or for a shape not known."""
    if place is None:
        return None
    with suppress(ChiplogError):
        if trained is None:
            return control_job(run.config, place.card)
        return planned_job(run.config, trained, card=place.card, gpus=run.resources.gpus)
    return None


def _parallel(jobs: Sequence[tuple[Run, float]], settings: Settings) -> float | None:
    """Seconds until the last job ends if each starts, in order, as soon as what it needs is free; null: not known."""
    have: dict[str, int] = {}
    for run, _ in jobs:
        device, asked = _device(run, settings), run.resources
        if device == "cpu" and not settings.slurm:
            have[device] = available_cpus()
        elif device != "cpu":
            named = next((g for g in settings.gpus if g.name == device), None)
            count = named.count if named else len(available_gpus()) if not settings.slurm else None
            have[device] = count or settings.budget.jobs_at_once or 0
        elif settings.budget.jobs_at_once:
            have[device] = settings.budget.jobs_at_once * asked.cpus
        if have.get(device, 0) < (asked.cpus if device == "cpu" else asked.gpus):
            return None
    free = {device: [0.0] * count for device, count in have.items()}
    slots = [0.0] * (settings.budget.jobs_at_once or len(jobs))
    last = 0.0
    for run, seconds in jobs:
        device = _device(run, settings)
        n = run.resources.cpus if device == "cpu" else run.resources.gpus
        taken = [heapq.heappop(free[device]) for _ in range(n)]
        end = max(*taken, heapq.heappop(slots)) + seconds
        for _ in taken:
            heapq.heappush(free[device], end)
        heapq.heappush(slots, end)
        last = max(last, end)
    return last


def _free(folder: Path) -> int | None:
    """Bytes free on the disk that a folder is or will be on."""
    there = next((place for place in (folder, *folder.parents) if place.exists()), None)
    with suppress(OSError):
        return shutil.disk_usage(there).free if there else None
    return None
