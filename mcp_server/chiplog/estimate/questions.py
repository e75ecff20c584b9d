"""Answers about one job: what it needs, why, what would change that; and what is the largest that fits, and where.

"Fits" is said with its certainty: the share of such jobs that would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from chiplog.errors import PlanError
from chiplog.estimate import memory, speed
from chiplog.estimate.case import Case, CaseEstimate, Explanation, Fits, WhatIf
from chiplog.estimate.estimator import FITS, Place, divisors, estimate_job, guess
from chiplog.estimate.gpus import Gpu
from chiplog.estimate.job import Job
from chiplog.estimate.jobs import TARGETS, job_of_config
from chiplog.estimate.model import Workload
from chiplog.estimate.shapes import catalogue

FAR = 4  # times a card, from which the physics alone say that it does not hold a model
MOST = {"micro_batch": 4096, "seq_len": 1 << 20, "rank": 4096}


def job_of(case: Case, card: Gpu) -> Job:
    """The job of a case.

    Raises NotFoundError for a model that is not known, PlanError for a batch that cannot be split as asked.
    """
    if case.batch_size % case.gpus:
        raise PlanError(
            f"batch_size {case.batch_size} cannot be split over {case.gpus} GPUs: take a multiple of {case.gpus}"
        )
    each = case.batch_size // case.gpus
    micro = case.micro_batch_size or each
    if each % micro:
        sizes = ", ".join(map(str, divisors(each)))
        raise PlanError(
            f"micro_batch_size {micro} does not divide the {each} samples of each GPU: take one of {sizes}, "
            "or the effective batch would change"
        )
    if unknown := [name for name in case.lora_targets or [] if name not in TARGETS]:
        raise PlanError(f"lora_targets has {', '.join(unknown)}: choose from {', '.join(TARGETS)}")
    mean = min(case.mean_len or case.seq_len, case.seq_len)
    job = job_of_config(
        case.model_dump(), model=case.model, framework=case.framework, method=case.method, card=card, gpus=case.gpus,
        micro_batch=micro, grad_accum=each // micro, seq_len=case.seq_len,
        mean_len=case.seq_len if case.packed else mean,
    )  # fmt: skip
    return job.model_copy(update={"optimizer": case.optimizer, "sharding": case.sharding if case.gpus > 1 else ""})


def estimate_case(case: Case, place: Place, cards: Sequence[Gpu], *, inverse: bool = True) -> CaseEstimate:
    """What it would need on a card; with `inverse`, also what would fit there or on others of `cards`."""
    job = job_of(case, place.card)
    if case.samples and case.samples < case.batch_size and not case.steps:
        raise PlanError(f"{case.samples} samples fill no batch of {case.batch_size}: lower batch_size")
    steps = case.steps or (case.samples or case.batch_size) // case.batch_size * case.epochs
    validation = -(-case.validation_samples // (job.micro_batch * case.gpus)) * case.validations
    work = Workload(
        steps=steps, tokens=None, eval_samples=case.eval_samples, eval_batch_size=case.eval_batch_size,
        new_tokens=case.max_new_tokens, prompt_tokens=job.mean_tokens / job.micro_batch,
        validations=case.validations, validation_passes=validation,
    )  # fmt: skip
    found = estimate_job(job, work, place, trains=True, gpus=case.gpus)
    step = guess("pass", job, place.known).times(job.grad_accum)
    in_budget = None
    if case.budget_gpu_hours:
        rest = (found.elapsed.value if found.elapsed else 0.0) - step.value * steps
        in_budget = max(0, int((case.budget_gpu_hours * 3600 / case.gpus - rest) / step.value))
    return CaseEstimate(
        case=case,
        steps=steps,
        step_s=step.value,
        tokens_per_s=job.mean_tokens * job.grad_accum / step.value,
        estimate=found,
        explanation=explain(job, place),
        fits=[fits(job, place, cards, share) for share in (FITS, 0.5)] if inverse else [],
        steps_in_budget=in_budget,
    )


def fits(job: Job, place: Place, cards: Iterable[Gpu], share: float = FITS) -> Fits:
    """What would fit where, of a share of such jobs; `cards` are those that may be had."""
    has_adapters = job.method in ("lora", "qlora")
    return Fits(
        share=share,
        micro_batch=largest(job, place, "micro_batch", share),
        seq_len=largest(job, place, "seq_len", share),
        rank=largest(job, place, "rank", share) if has_adapters else None,
        model=largest_model(job, place, share),
        gpu=smallest_card(job, place, cards, share),
    )


def largest(job: Job, place: Place, what: Literal["micro_batch", "seq_len", "rank"], share: float = FITS) -> int | None:
    """The largest value of a setting with which the job would fit, up to MOST of it; None: not one."""
    return _last(MOST[what], lambda value: _holds(job.model_copy(update={what: value}), place, share))


def largest_model(job: Job, place: Place, share: float = FITS) -> str | None:
    """The published model of most parameters, of those in the job's family if one of them would, that would fit."""
    by_size = sorted(catalogue().items(), key=lambda entry: -entry[1].n_params)
    for kin in (True, False):
        for name, shape in by_size:
            if (shape.family == job.shape.family) != kin:
                continue
            wanted = job.model_copy(update={"shape": shape, "model": name})
            if memory.peak(wanted).total < FAR * place.card.memory_bytes and _holds(wanted, place, share):
                return name
    return None


def smallest_card(job: Job, place: Place, cards: Iterable[Gpu], share: float = FITS) -> str | None:
    """The card of least memory, of the same maker, that would hold the job."""
    reserved = guess("memory", job.model_copy(update={"memory_kind": "reserved"}), place.known)
    needed = reserved.value if share == 0.5 else reserved.quantile(share)
    enough = [card for card in cards if card.memory_bytes >= needed and _maker(card) == _maker(place.card)]
    return min(enough, key=lambda card: (card.memory_bytes, card.key)).key if enough else None


def explain(job: Job, place: Place) -> Explanation:
    """Where the numbers come from."""
    reserved = job.model_copy(update={"memory_kind": "reserved"})
    moments = memory.moments(reserved)
    moment = max(moments, key=lambda name: moments[name].total)
    held, passing = moments[moment], speed.one_pass(job)
    told, taken = guess("memory", reserved, place.known).value, guess("pass", job, place.known).value
    shares = dict(zip(speed.PARTS, passing.shares(), strict=True))
    return Explanation(
        moment=moment,
        memory_bytes={name: part * told / held.total for name, part in held._asdict().items() if part},
        memory_factor=told / held.total,
        pass_s={name: share * taken for name, share in shares.items() if share},
        pass_factor=taken / passing.total,
        step_s=taken * job.grad_accum,
        what_if=[_what_if(words, changed, place) for words, changed in _changes(job)],
    )


def _changes(job: Job) -> list[tuple[str, Job]]:
    changes: list[tuple[str, Mapping[str, object]]] = []
    if job.micro_batch % 2 == 0:
        half = {"micro_batch": job.micro_batch // 2, "grad_accum": job.grad_accum * 2}
        changes.append((f"micro-batch {job.micro_batch // 2}, accumulation {job.grad_accum * 2}", half))
    if job.grad_accum % 2 == 0:
        double = {"micro_batch": job.micro_batch * 2, "grad_accum": job.grad_accum // 2}
        changes.append((f"micro-batch {job.micro_batch * 2}, accumulation {job.grad_accum // 2}", double))
    if job.checkpointing == "full":
        changes.append(("activations kept", {"checkpointing": "none"}))
    else:
        changes.append(("activation checkpointing", {"checkpointing": "full"}))
    if job.seq_len > 1:
        mean = None if job.mean_len is None else min(job.mean_len, job.seq_len // 2)
        changes.append(
            (f"samples of at most {job.seq_len // 2} tokens", {"seq_len": job.seq_len // 2, "mean_len": mean})
        )
    if job.method == "lora":
        changes.append(("4-bit weights (QLoRA)", {"method": "qlora", "weight_bits": 4}))
    if job.method in ("lora", "qlora"):
        changes.append((f"rank {job.rank * 2}", {"rank": job.rank * 2}))
    return [(words, job.model_copy(update=change)) for words, change in changes]


def _what_if(words: str, job: Job, place: Place) -> WhatIf:
    reserved = guess("memory", job.model_copy(update={"memory_kind": "reserved"}), place.known)
    step_s = guess("pass", job, place.known).value * job.grad_accum
    return WhatIf(change=words, reserved_bytes=reserved.value, step_s=step_s)


def _maker(card: Gpu) -> bool:
    """Whether AMD made it: programs of one maker's cards do not run on the other's as they are."""
    return "AMD" in card.name


def _holds(job: Job, place: Place, share: float) -> bool:
    reserved = guess("memory", job.model_copy(update={"memory_kind": "reserved"}), place.known)
    needed = reserved.value if share == 0.5 else reserved.quantile(share)
    return needed <= place.card.memory_bytes


def _last(most: int, holds: Callable[[int], bool]) -> int | None:
    """The largest number up to `most` for which something holds; None: for no power of two.

    What holds of more holds of less, though an estimate of less may be the less sure.
    """
    powers = [1 << n for n in range(most.bit_length())]
    low = next((power for power in reversed(powers) if holds(power)), None)
    if low is None:
        return None
    high = min(2 * low, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
