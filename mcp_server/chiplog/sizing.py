"""What each run of a plan will need, from the records of the device that it will run on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from chiplog.checks import Check, Report, warning
from chiplog.checks.dataset import DatasetReport, check_dataset
from chiplog.checks.lookup import resolve_model
from chiplog.checks.tokens import TokensReport, check_tokens, is_token_folder
from chiplog.engines.local import gpu_name
from chiplog.errors import ChiplogError, NotFoundError, PlanError, SettingsError
from chiplog.estimate import RunEstimate, Workload, workload
from chiplog.estimate.gpus import Gpu, gpu, gpus
from chiplog.estimate.job import Job
from chiplog.estimate.jobs import called, control_job, measured_run, planned_job
from chiplog.estimate.tokens import Steps
from chiplog.estimate.workload import SplitTokens, training_steps
from chiplog.ledger import Ledger
from chiplog.plan import Config, Run
from chiplog.recipes import manual
from chiplog.record import Record, State
from chiplog.render import find_gpu
from chiplog.schema import Frozen
from chiplog.settings import Settings
from chiplog.text import size
from chiplog.trainings import model_of, work_of

if TYPE_CHECKING:
    from chiplog.estimate.estimator import Known, Place

OWN_RUNS, OTHER_RUNS = 100, 50  # of a model on a device, and of any model there, the newest: what estimates rest on


class PlannedRun(Frozen):
    """One row of the plan's table."""

    run: Run = Field(description="The run.")
    steps: int = Field(description="Optimiser steps that it will take; 0 for a control.")
    trained: Steps | None = Field(description="How its recipe makes them of the samples; null where none are.")
    estimate: RunEstimate = Field(description="What it will need.")
    tokens: int | None = Field(default=None, description="Tokens that it will train on; null: not counted.")
    n_params: int | None = Field(default=None, description="Parameters of the model that it makes; null: not known.")
    flops: float | None = Field(default=None, description="FLOPs of its training; null: not computed.")


class DatasetReports:
    """What was found of each data set, with the tokenizer and the prompts of the runs that read it."""

    def __init__(self, progress=None) -> None:
        self.progress = progress
        self.found: dict[tuple[str, ...], DatasetReport] = {}
        self.token_files: dict[str, TokensReport] = {}

    @property
    def all(self) -> list[Report]:
        """Every report that was made."""
        return [*self.found.values(), *self.token_files.values()]

    def tokens_of(self, run: Run) -> TokensReport:
        """Of a run that trains on token files. Raises PlanError if they cannot be used."""
        path = run.config["dataset"]
        if path not in self.token_files:
            report = check_tokens(Path(path), self.progress)
            stop_on(report, f"data set {run.dataset}", path)
            self.token_files[path] = report
        return self.token_files[path]

    def sha256_of(self, run: Run) -> str | None:
        """The hash of the data that a run reads."""
        return (self.tokens_of(run) if run.kind == "train" else self.of(run)).sha256

    def of(self, run: Run) -> DatasetReport:
        """Raises PlanError if the data set cannot be used so."""
        config = run.config
        prompts = {name: config[name] for name in ("system_prompt", "prompt")}
        key = (config["dataset"], config["model"], *(str(text) for text in prompts.values()))
        if key not in self.found:
            if is_token_folder(Path(key[0])):
                raise PlanError(
                    f"the data set {run.dataset} ({key[0]}) holds token files, which nothing is fine-tuned on: plan "
                    "with the recipe train, or give rows"
                )
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
        self._records: dict[tuple[str, str, str], list[Record]] = {}

    def row(self, run: Run) -> PlannedRun:
        """A run with its estimate."""
        from chiplog.estimate.estimator import estimate_run  # numpy and scipy take a while to import

        if run.kind == "train":
            return self._training(run)
        trained, work = _work(run, self.datasets.of(run))
        device, model = device_of(run, self.settings), run.config["model"]
        place = self.place(device, model)
        found = estimate_run(run, work, self._on(device, "model", model), _job(run, trained, place), place)
        return PlannedRun(run=run, steps=work.steps, trained=trained, estimate=found, tokens=work.tokens)

    def _training(self, run: Run) -> PlannedRun:
        """A run that makes its own model: past runs of its recipe speak alone, since the physics knows none of it."""
        from chiplog.estimate.estimator import estimate_run

        report, device = self.datasets.tokens_of(run), device_of(run, self.settings)
        work, model = work_of(run, report), model_of(run, report.vocab_size or 1)
        records = self._on(device, "recipe", run.recipe or "")
        found = estimate_run(run, work, records, None, self.place(device, ""))
        return PlannedRun(
            run=run, steps=work.steps, trained=None, estimate=found, tokens=work.tokens,
            n_params=model and model.n_params, flops=work.flops,
        )  # fmt: skip

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
        card = _named_card(named.card, device) if named and named.card else card_of(device)
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
        place = self.place(device_of(row.run, self.settings), row.run.config.get("model") or "")
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
        card = smallest_card(single, place, own_cards(self.settings)) or smallest_card(single, place, gpus().values())
        ways = [f"max_seq_len {length} with micro_batch_size 1"] if length else []
        ways += [f"a GPU such as {card} with micro_batch_size 1"] if card else []
        return f"take {' or '.join(ways)}" if ways else "take a smaller model, or shard it over several GPUs"

    def _on(self, device: str, column: str, value: str) -> list[Record]:
        """The newest records of a model, or of a recipe, on a device."""
        if (device, column, value) not in self._records:
            card = self._card(device)
            names = (
                ["cpu"] if device == "cpu" else _devices(self.ledger, card) if card else _called(self.ledger, device)
            )
            found = self.ledger.search({"device": names, column: value}, limit=OWN_RUNS)[0]
            defaults = {r.recipe: _defaults(r.recipe or "evaluate") for r in found if r.experiment}
            self._records[device, column, value] = [
                _filled(r, defaults[r.recipe]) if r.experiment else r for r in found
            ]
        return self._records[device, column, value]


def _defaults(recipe: str) -> Config:
    """Every setting of a recipe as it stands now; none where it is gone."""
    with suppress(ChiplogError):
        return manual(recipe).defaults
    return {}


def _filled(record: Record, defaults: Config) -> Record:
    """The record of a run of ours; settings that its recipe had not yet are as they are by default."""
    return record.model_copy(update={"config": {**defaults, **record.config}})


def estimated(runs: Sequence[Run], settings: Settings) -> list[PlannedRun]:
    """Runs of a plan that stands, with estimates as of now."""
    sizing = Sizing(DatasetReports(), Ledger(), settings)
    return [sizing.row(run) for run in runs]


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
    from chiplog.estimate.estimator import divisors, largest_micro_batch

    place = Sizing(DatasetReports(), ledger, settings).place(record.usage.device, record.model or "")
    run = place and measured_run(record, place.card)
    if not (place and run):
        return None
    return largest_micro_batch(run.job, place, divisors(run.job.micro_batch)[:-1])


@lru_cache(maxsize=1024)
def card_of(device: str) -> Gpu | None:
    """The GPU in the catalogue; null for a CPU, and for one that is not there, whose runs speak alone."""
    if device in ("", "cpu"):
        return None
    with suppress(NotFoundError):
        return gpu(device)
    return None


def _named_card(card: str, device: str) -> Gpu:
    """The card that chiplog.toml says a GPU is. Raises SettingsError for one that the catalogue lacks."""
    try:
        return gpu(card)
    except NotFoundError as error:
        raise SettingsError(f"chiplog.toml, card of the GPU {device}: {error}") from error


def find_shape(model: str, settings: Settings) -> str:
    """Where the shape of a model is read: its folder, if it is one of ours, else its name in the catalogue.

    Raises OutsideRootsError for a path that chiplog may not read.
    """
    if Path(model).suffix == ".json":
        return str(settings.allowed(model))
    with suppress(NotFoundError):
        return str(settings.allowed(resolve_model(model, settings.model_roots, settings.workspace)))
    return model


def own_cards(settings: Settings) -> list[Gpu]:
    """The cards that chiplog.toml names and the catalogue has."""
    return [card for each in settings.gpus if (card := card_of(each.card or each.name))]


def same_card(one: Gpu, other: Gpu) -> bool:
    """Whether they are the same card with the same memory, whatever its form."""
    form = re.compile(r"-(?:sxm|pcie|nvl)\d*")
    return form.sub("", one.key) == form.sub("", other.key)


def same_model(one: str, other: str) -> bool:
    """Whether two names or folders are of the same published model, or called alike."""
    return called(one) == called(other)


def _kind(device: str) -> str:
    """The word that all names of a card have: the a100 of `a100-80gb-sxm`, the 4090 of `rtx-4090`."""
    words = (card.key if (card := card_of(device)) else device).lower().split("-")
    return next((word for word in words if re.search(r"\d", word) and not word.endswith("gb")), words[0])


def _work(run: Run, report: DatasetReport) -> tuple[Steps | None, Workload]:
    """Its steps, null for a control, and all that it does."""
    trained = None
    if run.kind != "control":
        train = report.splits["train"]
        assert train.tokens, "a report without failed checks has counted the tokens"
        trained = training_steps(run.config, train.tokens.lengths, train.rows, train.tokens.max)
    scored = report.splits[run.config["eval_split"]]
    prompts = (scored.tokens.total - scored.tokens.label) / scored.rows if scored.tokens else 0.0
    return trained, workload(run, trained, scored.rows, prompts, _validated(run, report))


def _validated(run: Run, report: DatasetReport) -> SplitTokens | None:
    """The split that it validates on; null where it does not."""
    split = report.splits.get(run.config.get("val_split") or "") if run.kind != "control" else None
    if split is None or split.tokens is None or not split.rows:
        return None
    return SplitTokens(split.tokens.lengths, split.rows, split.tokens.max, split.tokens.label)


def devices(runs: Sequence[Run], settings: Settings) -> list[str]:
    """What the runs will run on, each once."""
    return list(dict.fromkeys(device_of(run, settings) for run in runs))


def device_of(run: Run, settings: Settings) -> str:
    """What it will run on: cpu, or the name of a GPU; of one that no file names, what this machine has."""
    if not run.resources.gpus:
        return "cpu"
    named = find_gpu(run.resources, settings)
    return named.name if named else gpu_name()


def _job(run: Run, trained: Steps | None, place: Place | None) -> Job | None:
    """Its training on a card, or of a control the model alone; null without a card, or for a shape not known."""
    if place is None:
        return None
    with suppress(ChiplogError):
        if trained is None:
            return control_job(run.config, place.card)
        return planned_job(run.config, trained, card=place.card, gpus=run.resources.all_gpus)
    return None
