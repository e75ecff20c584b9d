"""What this ledger's own runs say of one like them: the same configuration, or the terms of its time, scaled.

Nothing here is a constant of a model or a machine.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TypeGuard

from chiplog.estimate.guess import Guess, spread_about
from chiplog.estimate.model import Basis, TermName, Workload
from chiplog.plan import Config, Run
from chiplog.record import Record, State

# Spread of the log of repeated measurements, before any is made here. Time: two runs that differed only in LoRA rank
# took 22:34 and 15:46, one draw of a difference. Memory: fits of measured peaks err by 2.3-3.3 %.
TIME_SPREAD = math.log(22.57 / 15.77) / math.sqrt(2)
MEMORY_SPREAD = 0.033
PRIOR_WEIGHT = 4  # measurements that the spread above counts as
SCALED_SPREAD = 2.0  # a scaled estimate is taken to spread this much more
# Settings that change neither the time nor the memory of a step.
NEUTRAL = {"seed", "lr", "lr_schedule", "warmup_steps", "weight_decay", "scorer", "guard_steps"}
# Settings that change how many steps there are, and nothing in them.
COUNT = {"epochs", "max_steps", "eval_split", "eval_limit"}
# Settings that only say on what a training validates, and when: nothing of a step.
VALIDATING = {"val_split", "run_val_every_n_steps"}
# Of the samples: how long they are, and so the memory.
LENGTH = {"dataset", "system_prompt", "prompt"}
# Settings that move time and memory little enough to scale across, with a wider interval.
NEAR = {"lora_rank", "lora_alpha", "save_every_n_steps", "log_every_n_steps", "max_new_tokens"}
# Settings that an evaluation's pace depends on, and its start and that of a training.
ANSWERING, LOADING = {"model", "dtype", "device", "eval_batch_size", "max_new_tokens"}, {"model", "dtype", "device"}
PACED = 20  # steps from which a run tells its pace
BY_TOKENS = "training time grows with tokens, evaluation time with samples"


class History:
    """The runs of the same model and resources: the same, near ones, and what each term of one tells.

    They must be of the device that it will run on: those of other devices must not be given. What did not complete
    tells the pace of its steps, and, where its time limit ended it, that more than that was needed.
    """

    def __init__(self, run: Run, work: Workload, records: Sequence[Record]) -> None:
        self.run, self.work = run, work
        model = run.config.get("model")
        resources = (run.resources.all_cpus, run.resources.all_gpus, run.resources.nodes)
        every = [r for r in records if r.config.get("model") == model]
        self._class([r for r in every if (r.usage.cpus, r.usage.gpus, r.usage.nodes or 1) == resources])

    def _class(self, every: Sequence[Record]) -> None:
        """Finds the runs that tell of each part, by the settings in which they differ."""
        run, work = self.run, self.work
        alike = [r for r in every if r.state is State.COMPLETED]
        self.loaded = [r for r in alike if not differs(run.config, r.config) & LOADING]
        self.answered = [r for r in alike if r.kind == run.kind and not differs(run.config, r.config) & ANSWERING]
        every = [r for r in every if r.kind == run.kind and r.recipe == run.recipe]
        apart = {r.key: differs(run.config, r.config) - NEUTRAL for r in every}
        alike = [r for r in every if r.state is State.COMPLETED]
        self.same = [r for r in alike if not apart[r.key] and _same_work(r, work)]
        self.paced = [r for r in every if apart[r.key] <= COUNT | VALIDATING and (r.usage.steps or 0) >= PACED]
        self.stopped = [r for r in every if not apart[r.key] and r.state is State.TIMEOUT and not r.usage.resumed]
        close = [r for r in every if apart[r.key] <= COUNT | LENGTH | NEAR | VALIDATING]
        near = [r for r in close if r.state is State.COMPLETED]
        self.near = _nearest(near, apart)
        # A validation passes samples of its own, which may be longer.
        self.alike_in_length = _nearest([r for r in near if not apart[r.key] & {*LENGTH, "val_split"}], apart)
        validated = [r for r in close if is_amount(r.usage.val_s) and r.usage.val_losses]
        self.validated = _nearest(validated, {key: names - COUNT - VALIDATING for key, names in apart.items()})
        self.other_samples = {key for key, names in apart.items() if names & LENGTH}

    def elapsed(self) -> Guess | None:
        """Seconds of the job, from runs of the same configuration; null where none completed.

        One that its time limit ended counts with what it would have needed at its pace.
        """
        whole = [r for r in self.same if r.usage.elapsed_s and not r.usage.resumed]
        if not whole:
            return None
        times = [r.usage.elapsed_s or 0.0 for r in whole] + [self._needed(r) for r in self.stopped]
        return guess_of(times, TIME_SPREAD, "same-configuration", [*whole, *self.stopped])

    def at_least(self) -> float:
        """Seconds that runs of the same configuration had taken when their time limit ended them."""
        return max((r.usage.elapsed_s for r in self.stopped if is_amount(r.usage.elapsed_s)), default=0.0)

    def _needed(self, record: Record) -> float:
        """Seconds that a run which was stopped would have taken at its pace; without one, a spread more than it had."""
        usage = record.usage
        if is_amount(usage.train_s) and usage.steps:
            left = usage.train_s * max(0.0, self.work.steps / usage.steps - 1)
            if usage.val_s and usage.val_losses:
                left += usage.val_s * max(0.0, self.work.validations / len(usage.val_losses) - 1)
            return (usage.elapsed_s or 0.0) + left
        return (usage.elapsed_s or 0.0) * math.exp(TIME_SPREAD)

    def pace(self) -> Guess | None:
        """Seconds of training, by the steps of runs whose steps are the same."""
        paced = [r for r in self.paced if r.usage.train_s and r.usage.steps]
        times = [(r.usage.train_s or 0.0) * self.work.steps / (r.usage.steps or 1) for r in paced]
        return guess_of(times, TIME_SPREAD, "scaled", paced)

    def terms(self) -> dict[TermName, Guess]:
        """The parts of its time that are on record, each scaled by what it grows with."""
        found: dict[TermName, Guess | None] = {
            "evaluation start-up": self._term("eval_setup_s", self.loaded),
            "evaluation": self._evaluation(),
        }
        if self.run.kind != "control":
            found |= {
                "start-up": self._term("setup_s", [r for r in self.loaded if not r.usage.resumed] or self.loaded),
                "training": self.pace() or self._training(),
                "validation": self._validation() if self.work.validations else None,
                "checkpoints": self._checkpoints(),
            }
        return {name: guess for name, guess in found.items() if guess}

    def peak(self) -> tuple[Guess | None, str | None]:
        """Peak memory of runs with the same batch and lengths, and what it counts; it is never scaled by hand."""
        choices: list[tuple[Sequence[Record], Basis, float]] = [
            (self.same, "same-configuration", MEMORY_SPREAD),
            (self.alike_in_length, "scaled", MEMORY_SPREAD * SCALED_SPREAD),
        ]
        for records, basis, spread in choices:
            for kind in sorted({r.usage.mem_kind for r in records if r.usage.mem_kind} - {"after_init"}):
                used = [r for r in records if r.usage.mem_kind == kind and r.usage.peak_mem_bytes]
                if used:
                    return guess_of([float(r.usage.peak_mem_bytes or 0) for r in used], spread, basis, used), kind
        return None, None

    def _term(self, field: str, records: Sequence[Record]) -> Guess | None:
        used = [r for r in records if getattr(r.usage, field)]
        return guess_of([getattr(r.usage, field) for r in used], *SCALED, used)

    def _evaluation(self) -> Guess | None:
        done = [r for r in self.answered if r.usage.eval_s and r.usage.eval_samples]
        times = [(r.usage.eval_s or 0.0) * self.work.eval_samples / (r.usage.eval_samples or 1) for r in done]
        return guess_of(times, *SCALED, done)

    def _validation(self) -> Guess | None:
        """By the validations of runs whose passes are alike, and by what their splits hold."""
        times = [
            (r.usage.val_s or 0.0) / len(r.usage.val_losses) * self.work.validations * self._larger(r)
            for r in self.validated
        ]
        return guess_of(times, *SCALED, self.validated)

    def _larger(self, record: Record) -> float:
        """How many times as large as that run's split this one's is: in samples, or where these differ in tokens.

        The tokens are those to be learnt, and the plan's those before any are cut off: so they are the second choice.
        """
        usage, work = record.usage, self.work
        if record.key in self.other_samples and usage.val_label_tokens and work.val_label_tokens:
            return work.val_label_tokens / usage.val_label_tokens
        return work.val_samples / usage.val_samples if usage.val_samples and work.val_samples else 1.0

    def _checkpoints(self) -> Guess | None:
        done = [r for r in self.near if r.usage.checkpoint_s and r.usage.steps]
        saves = _saves(self.run.config, self.work.steps)
        times = [(r.usage.checkpoint_s or 0.0) * saves / _saves(r.config, r.usage.steps or 1) for r in done]
        return guess_of(times, *SCALED, done)

    def _training(self) -> Guess | None:
        """By tokens. A small model is bound by its steps, a large one by its tokens: the truth lies between the two."""
        near = [r for r in self.near if r.usage.train_s and r.usage.steps and r.usage.tokens]
        tokens = self.work.tokens or 0
        guess = guess_of([(r.usage.train_s or 0.0) * tokens / (r.usage.tokens or 1) for r in near], *SCALED, near)
        by_steps = [(r.usage.train_s or 0.0) * self.work.steps / (r.usage.steps or 1) for r in near]
        if guess is None:
            return None

        def quantile(share: float) -> float:
            value = guess.quantile(share)
            return min([value, *by_steps]) if share < 0.5 else max([value, *by_steps])

        return guess._replace(quantile=quantile, assumed=(BY_TOKENS,))


SCALED: tuple[float, Basis] = (TIME_SPREAD * SCALED_SPREAD, "scaled")


def is_amount(value: float | None) -> TypeGuard[float]:
    """Whether a figure of a log can be reckoned with."""
    return value is not None and math.isfinite(value) and value > 0


def differs(one: Config, other: Config) -> set[str]:
    return {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}


def _same_work(record: Record, work: Workload) -> bool:
    """Whether it did as much: a file may hold other rows than it did."""
    did = (record.usage.steps or 0, record.usage.eval_samples, record.usage.val_samples)
    return did == (work.steps, work.eval_samples, work.val_samples)


def _saves(config: Config, steps: int) -> int:
    """Checkpoints that a run writes: one an epoch, and those between."""
    every = config.get("save_every_n_steps")
    return max(1, config.get("epochs") or 1) + (steps // every if every else 0)


def _nearest(records: Sequence[Record], differs: Mapping[str, set[str]]) -> list[Record]:
    """The records that differ in the fewest settings."""
    fewest = min((len(differs[r.key]) for r in records), default=0)
    return [r for r in records if len(differs[r.key]) == fewest]


def guess_of(values: Sequence[float], spread: float, basis: Basis, records: Sequence[Record]) -> Guess | None:
    """Of one more such value, on the log scale: Student's t, the spread pooled with the one before."""
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    sound = [(value, r) for value, r in zip(values, records, strict=True) if is_amount(value)]
    if not sound:
        return None
    logs = [math.log(value) for value, _ in sound]
    n, centre = len(logs), statistics.fmean(logs)
    freedom = n - 1 + PRIOR_WEIGHT
    pooled = math.sqrt((sum((x - centre) ** 2 for x in logs) + PRIOR_WEIGHT * spread**2) / freedom)
    return Guess(
        value=math.exp(centre),
        quantile=spread_about(math.exp(centre), pooled * math.sqrt(1 + 1 / n), lambda share: stdtrit(freedom, share)),
        basis=basis,
        evidence=tuple(sorted({name_of(r) for _, r in sound})),
    )


def name_of(record: Record) -> str:
    """How evidence names a run."""
    return f"{record.experiment}/{record.run}" if record.run else record.key
