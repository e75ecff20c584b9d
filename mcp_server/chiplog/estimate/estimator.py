"""What a run will need: its time by terms, its peak against the card, and what follows for the job that asks for it.

Where runs of the same configuration are on record, they alone speak. Else the training takes what runs with the same
steps took, or the physics shifted by all that is on record (forecast.py), as its peak does; start-up, checkpoints and
evaluation are those of the model's other runs. What nothing is known of is named and not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from statistics import NormalDist
from typing import NamedTuple

from chiplog.errors import ChiplogError
from chiplog.estimate import forecast, memory, speed
from chiplog.estimate.batch import largest_batch
from chiplog.estimate.effects import Effects
from chiplog.estimate.evidence import measured, shipped
from chiplog.estimate.forecast import Quantity
from chiplog.estimate.gpus import Gpu
from chiplog.estimate.guess import Guess, spread_about, total
from chiplog.estimate.history import TIME_SPREAD, History
from chiplog.estimate.job import Job, Measured
from chiplog.estimate.jobs import HERE, measured_run
from chiplog.estimate.model import RISK, RunEstimate, Term, TermName, Workload
from chiplog.estimate.scratch import history_of
from chiplog.plan import Run
from chiplog.record import Record
from chiplog.text import duration

FITS = 0.95  # share of such runs that must fit for a micro-batch to be recommended
FORWARD = {"full": 1 / 3}  # of a pass; 1 / 2 where what is frozen has no gradient
ANSWERS_SPREAD = 0.7  # of the log of an evaluation's seconds: no public run tells of one; 9 of 10 within a factor of 3
SLACK_S = 300  # a time limit's allowance for each term that nothing is known of
PEAK_SPREAD = 0.25  # of the log of an evaluation's peak, of which no public run tells either
HOST_BYTES = 4 * 2**30  # of Python, torch and CUDA in a process
GROWS: dict[TermName, str] = {
    "start-up": "the model's size and the disk",
    "training": "passes, tokens and layers",
    "validation": "its passes, forward only",
    "checkpoints": "how many, and what is trained",
    "evaluation start-up": "the model's size and the disk",
    "evaluation": "samples, tokens of an answer and layers",
}


class Known(NamedTuple):
    """All that is on record of peaks and of the time of passes."""

    memory: Effects
    passes: Effects
    own: tuple[Measured, ...]  # of the ledger

    def of(self, quantity: Quantity) -> Effects:
        return self.memory if quantity == "memory" else self.passes


class Place(NamedTuple):
    """A card to run on, and what an hour of it costs."""

    card: Gpu
    known: Known
    price: float | None = None


@cache
def background() -> tuple[Measured, ...]:
    """The shipped runs."""
    found = []
    for row in shipped():
        try:
            found.append(measured(row))
        except ChiplogError:
            continue
    return tuple(found)


def learn(records: Iterable[Record], only: Gpu | None = None) -> Known:
    """What the shipped runs and those of a ledger show; `only` is the one card there is, for logs that name none."""
    own = tuple(run for record in records if (run := measured_run(record, only)))
    known = {quantity: of_shipped(quantity) for quantity in ("memory", "pass")}
    for quantity in ("memory", "pass"):
        for run in own:
            known[quantity] = forecast.learnt(quantity, known[quantity], run)
    return Known(known["memory"], known["pass"], own)


@cache
def of_shipped(quantity: Quantity) -> Effects:
    """What the shipped runs show."""
    return forecast.effects(quantity, background())


def guess(quantity: Quantity, job: Job, known: Known) -> Guess:
    """Bytes of the peak, or seconds of a pass: the physics, shifted by what is known."""
    told, fit = forecast.forecast(quantity, job, HERE, known.of(quantity)), forecast.fitted(quantity)

    def score(share: float) -> float:
        low, high = forecast.scores(fit, told.near, abs(2 * share - 1))
        return low if share < 0.5 else high

    spread = math.hypot(told.scale, TIME_SPREAD) if quantity == "pass" else told.scale
    is_own = not {run.source for run in known.own}.isdisjoint(told.evidence)
    return Guess(
        value=told.value,
        quantile=spread_about(told.value, spread, score),
        basis="scaled" if is_own else "physics",
        evidence=tuple(dict.fromkeys(told.evidence)),
        coverage=forecast.COVERAGE,
    )


def estimate_run(
    run: Run, work: Workload, records: Sequence[Record], job: Job | None = None, place: Place | None = None
) -> RunEstimate:
    """Of `run`, from the records of the device that it will run on; `job` is its training, `place` its card.

    Without them, records alone speak, and what they do not hold is null.
    """
    history = history_of(run, work, records)
    found = estimate_job(job, work, place, history, trains=run.kind != "control", gpus=run.resources.all_gpus)
    if found.out_of_memory is not None and history.same:  # they did not run out, as often as it was tried
        return found.model_copy(update={"out_of_memory": 0.5 / (len(history.same) + 1)})
    return found


def estimate_job(
    job: Job | None, work: Workload, place: Place | None, history: History | None = None, *, trains: bool, gpus: int
) -> RunEstimate:
    """Of a job on a card, or from the history of runs like it. One that does not train only evaluates."""
    terms = _terms(job, work, place, history, trains)
    whole = history and history.elapsed()
    elapsed = whole or _sum(terms)
    if elapsed and not whole and history and (least := history.at_least()):
        elapsed = elapsed.above(least, f"a run of the same configuration was stopped after {duration(least)}")
    missing = [name for name, part in terms.items() if part is None] if elapsed and not whole else []
    peak, kind = history.peak() if history else (None, None)
    if peak is None and place and job:
        peak = guess("memory", job, place.known) if trains else answering_peak(job, work)
        kind = job.memory_kind
    hours = elapsed.value * gpus / 3600 if elapsed and gpus else None
    found = RunEstimate(
        elapsed=elapsed and elapsed.estimate(),
        peak_mem=peak and peak.estimate(),
        mem_kind=kind,
        terms=[] if whole or not elapsed else [_term(name, part) for name, part in terms.items()],
        time_limit_s=elapsed and time_limit(elapsed, len(missing)),
        eval_time_limit_s=_evaluation_limit(terms) if trains else None,
        gpu_hours=hours,
        cost=hours * place.price if hours is not None and place and place.price is not None else None,
        host_mem_bytes=host_memory(job) if job else None,
        disk_bytes=disk(job) if job and trains else 0 if job else None,
        notes=[f"not counted, since no run on record tells of it: {', '.join(missing)}"] if missing else [],
    )
    return found.model_copy(update=_on_card(job, place)) if place and job and trains else found


def time_limit(elapsed: Guess, unknown: int = 0) -> int:
    """Seconds, in full minutes, that a share RISK of such runs would exceed; more for terms that are not counted."""
    return 60 * math.ceil((elapsed.quantile(1 - RISK) + unknown * SLACK_S) / 60)


def _evaluation_limit(terms: Mapping[TermName, Guess | None]) -> int | None:
    """The same of the evaluation alone; None where nothing is known of it."""
    parts = [terms.get(name) for name in ("evaluation start-up", "evaluation")]
    known = [part for part in parts if part]
    return time_limit(total(known), len(parts) - len(known)) if terms.get("evaluation") else None


def host_memory(job: Job) -> int:
    """Bytes of host memory to ask for: the weights as they are read, and a process for each card."""
    return round((4 if job.dtype == "fp32" else 2) * job.shape.n_params) + HOST_BYTES * job.gpus


def disk(job: Job) -> int:
    """Bytes that a run leaves: its last checkpoint, and what it trained."""
    size = memory.adapter_bytes(job) if job.method != "full" else 4 if job.dtype == "fp32" else 2
    states = {"adamw": 2, "adamw8bit": 1, "paged": 1, "sgd": 0}[job.optimizer]
    return round(memory.trained_params(job) * size * (2 + states))


def largest_micro_batch(job: Job, place: Place, choices: Iterable[int]) -> int | None:
    """The largest of these micro-batches of which a share FITS would fit the card; None: not one.

    Where two or more are on record, all else alike, they speak alone; one that ran out of memory is never asked for.
    """
    capacity = place.card.memory_bytes
    alike = [run for run in place.known.own if _but_batch(run.job) == _but_batch(job)]
    ran_out = min((run.job.micro_batch for run in alike if run.above_bytes), default=math.inf)
    sizes = sorted((size for size in choices if size < ran_out), reverse=True)
    held = [(run.job.micro_batch, run.peak_bytes * _reserved_by(run.job)) for run in alike if run.peak_bytes]
    if len({batch for batch, _ in held}) > 1 and (most := largest_batch(held, capacity)):
        return next((size for size in sizes if size <= most), None)
    for size in sizes:
        passes = math.ceil(job.micro_batch * job.grad_accum / size)
        wanted = job.model_copy(update={"micro_batch": size, "grad_accum": passes, "memory_kind": "reserved"})
        if guess("memory", wanted, place.known).quantile(FITS) <= capacity:
            return size
    return None


def divisors(number: int) -> list[int]:
    """All of them, in order."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def evaluation(job: Job, work: Workload) -> Guess:
    """Seconds of generating answers, from the physics: a forward pass over prompts, then one for every new token."""
    rounds = math.ceil(work.eval_samples / work.eval_batch_size)
    one = _answering(job, work.eval_batch_size, 1)
    prompts = _answering(job, work.eval_batch_size, max(1, round(work.prompt_tokens)))
    seconds = rounds * (_forward_s(prompts) + work.new_tokens * _forward_s(one))
    spread = math.hypot(ANSWERS_SPREAD, TIME_SPREAD)
    return Guess(
        value=seconds,
        quantile=spread_about(seconds, spread, _normal),
        basis="physics",
        assumed=(f"every answer has {work.new_tokens} tokens",),
    )


def answering_peak(job: Job, work: Workload) -> Guess:
    """Bytes allocated while answers are generated: weights, keys and values, the last logits, and a layer's prompts."""
    shape, batch = job.shape, work.eval_batch_size
    weights = memory.moments(_answering(job, 1, 1))["step"].weights
    cache = 2 * 2 * shape.layers * shape.kv_heads * shape.head_dim * batch * (work.prompt_tokens + work.new_tokens)
    logits = batch * shape.vocab * (2 + 4)
    prompts = batch * work.prompt_tokens * (4 * shape.width + 4 * max(shape.ffn, shape.expert_ffn)) * 2
    total = weights + cache + max(logits, prompts)
    return Guess(total, spread_about(total, PEAK_SPREAD, _normal), "physics")


def _normal(share: float) -> float:
    return NormalDist().inv_cdf(min(max(share, 1e-12), 1 - 1e-12))


def _answering(job: Job, micro_batch: int, seq_len: int) -> Job:
    """The model as it answers: on one card, nothing trained."""
    return job.model_copy(
        update={
            "method": "lora", "rank": 1, "dora": False, "gpus": 1, "sharding": "", "checkpointing": "none",
            "compile": False, "micro_batch": micro_batch, "grad_accum": 1, "seq_len": seq_len, "mean_len": None,
        }
    )  # fmt: skip


def _forward_s(job: Job) -> float:
    """Seconds of a forward pass alone: no optimiser, no exchange."""
    return speed.one_pass(job)._replace(exchange=0.0, traffic=0.0).total * _forward(job)


def _terms(
    job: Job | None, work: Workload, place: Place | None, history: History | None, trains: bool
) -> dict[TermName, Guess | None]:
    """The parts of its time; None for one that nothing is known of."""
    names: list[TermName] = []
    names.extend(("start-up", "training") if trains else ())
    names.extend(("validation",) if trains and work.validation_passes else ())
    names.extend(("checkpoints",) if trains else ())
    names.extend(("evaluation start-up", "evaluation") if work.eval_samples else ())
    known = history.terms() if history else {}
    found: dict[TermName, Guess | None] = {name: known.get(name) for name in names}
    if place and job:
        if trains:
            passing = guess("pass", job, place.known)
            paced = history and history.pace()
            found["training"] = paced or passing.times(work.steps * job.grad_accum)
            if work.validation_passes and not found["validation"]:
                found["validation"] = _validation(job, work, place)
        if work.eval_samples and found["evaluation"] is None:
            found["evaluation"] = evaluation(job, work)
    return found


def _validation(job: Job, work: Workload, place: Place) -> Guess:
    """Seconds of all validations: the forward share of passes over samples of their length."""
    as_long = {} if work.validation_mean_len is None else {"mean_len": work.validation_mean_len}
    passing = guess("pass", job.model_copy(update=as_long), place.known)
    return passing.times(work.validation_passes * _forward(job))


def _forward(job: Job) -> float:
    """The share of a pass that goes forward."""
    return FORWARD.get(job.method, 1 / 2)


def _term(name: TermName, part: Guess | None) -> Term:
    return Term(name=name, elapsed=part and part.estimate(), grows_with=GROWS[name])


def _sum(terms: Mapping[TermName, Guess | None]) -> Guess | None:
    """Of the terms that are known; None where one is not that may be most of the time."""
    if any(guess is None for name, guess in terms.items() if name in ("training", "validation", "evaluation")):
        return None
    return total([guess for guess in terms.values() if guess])


def _on_card(job: Job, place: Place) -> dict[str, object]:
    """Whether the card holds it, and the largest micro-batch that it would, with the same effective batch."""
    reserved = guess("memory", job.model_copy(update={"memory_kind": "reserved"}), place.known)
    batch = job.micro_batch * job.grad_accum  # of each card
    micro = largest_micro_batch(job, place, divisors(batch))
    return {
        "reserved_mem": reserved.estimate(),
        "capacity_bytes": place.card.memory_bytes,
        "out_of_memory": reserved.risk(place.card.memory_bytes),
        "micro_batch_size": micro,
        "grad_accum": batch // micro if micro else None,
    }


def _but_batch(job: Job) -> Job:
    """The job without what differs between runs of one configuration that differ in their batch."""
    apart = {"micro_batch": 1, "grad_accum": 1, "mean_len": None, "data": "", "gpu": None, "memory_kind": "allocated"}
    return job.model_copy(update=apart)


def _reserved_by(job: Job) -> float:
    """What the allocator takes, as a multiple of the kind of figure that was measured."""
    return memory.peak(job.model_copy(update={"memory_kind": "reserved"})).total / memory.peak(job).total
