"""Why a run ended as it did, and what to change, from its record and the lines of its log."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from chiplog.estimate.batch import micro_batches
from chiplog.estimate.jobs import batch_of
from chiplog.record import Record, State
from chiplog.text import clock, duration, size


class Advice(NamedTuple):
    """What is said of one cause."""

    cause: str
    change: str


def diagnose(record: Record, fits: int | None = None) -> Advice | None:
    """The cause and what to change; null for a run that completed and shows nothing to mend.

    `fits` is the largest micro-batch that the card is estimated to hold, if that is known.
    """
    for rule in RULES:
        if advice := rule(record):
            return _with_what_fits(advice, record, fits)
    if record.state is State.COMPLETED:
        return None
    return Advice(record.reason or "the log does not say why", "look at the end of the log, or submit it again")


def _out_of_memory(record: Record) -> Advice | None:
    if record.state is not State.OUT_OF_MEMORY:
        return None
    if record.steps.get("train") is State.COMPLETED:
        return Advice(
            "memory ran out while it was evaluated, after training", "lower eval_batch_size, and submit it again"
        )
    oom = record.oom
    if oom is None or oom.kind == "host":
        return Advice(
            "the host's memory ran out",
            "ask for more memory (mem_gib of a plan, --mem), or use fewer data loader workers",
        )
    asked = f", {size(oom.tried_bytes)} more were asked for" if oom.tried_bytes else ""
    held = f", {size(oom.in_use_bytes)} were held" if oom.in_use_bytes else ""
    capacity = f" of {size(oom.capacity_bytes)}" if oom.capacity_bytes else ""
    return Advice(f"the GPU's memory{capacity} ran out{held}{asked}", _smaller_batch(record))


def _with_what_fits(advice: Advice, record: Record, fits: int | None) -> Advice:
    stated = batch_of(record.config, record.usage.gpus or 1)
    trained = record.steps.get("train") is State.COMPLETED
    if record.state is not State.OUT_OF_MEMORY or trained or fits is None or not stated:
        return advice
    micro, accum = stated
    return advice._replace(
        change=f"micro_batch_size {fits} with grad_accum {accum * micro // fits} in place of {micro} and {accum}: the "
        f"effective batch stays {micro * accum} a device; 95 % of such runs are estimated to fit"
    )


def _smaller_batch(record: Record) -> str:
    """Half the micro-batch and twice the accumulation: the same effective batch."""
    stated = batch_of(record.config, record.usage.gpus or 1)
    micro, accum = stated or (None, 1)
    if micro and micro > 1:
        half, passes = micro_batches(micro, micro // 2)
        return (
            f"micro_batch_size {half} with grad_accum {accum * passes} in place of {micro} and {accum}: the "
            f"effective batch stays {micro * accum} a device; what fits is not measured here, halve again if need be"
        )
    if micro == 1:
        return (
            "shorten the sequences (max_seq_len), checkpoint activations, or take a larger GPU: the batch is 1 already"
        )
    return "halve the micro-batch and double the gradient accumulation, so that the effective batch stays as it is"


def _time_out(record: Record) -> Advice | None:
    if record.state is not State.TIMEOUT:
        return None
    usage = record.usage
    done = (usage.steps or 0) - (usage.resumed_from or 0)
    rate = usage.mean_steps_per_s or usage.steps_per_s
    train_s = usage.train_s or (done / rate if rate else None)
    if not usage.steps_planned or done <= 0 or not train_s:
        return Advice("its time limit was reached", "give it more time; its log does not say how much was left to do")
    left = usage.steps_planned - (usage.steps or 0)
    needed = train_s + left * train_s / done
    overhead = max(0.0, (usage.elapsed_s or train_s) - train_s)
    limit = 60 * -(-int((needed + overhead) * 1.2) // 60)
    return Advice(
        f"its time limit was reached at step {usage.steps} of {usage.steps_planned}",
        f"a limit of {clock(limit)} would do: {duration(train_s)} for {done} steps, {left} left, a fifth more; "
        "or resume it from its last checkpoint",
    )


def _by_words(words: str, cause: str, change: str) -> Callable[[Record], Advice | None]:
    def rule(record: Record) -> Advice | None:
        text = " ".join(
            [record.reason or "", *(entry.line for entry in record.evidence if entry.of in ("state", "reason"))]
        )
        match = re.search(words, text)
        if record.state is State.COMPLETED or not match:
            return None
        found = match.groupdict(default="")
        return Advice(cause.format(**found), change.format(**found))

    return rule


def _not_a_number(record: Record) -> Advice | None:
    loss = record.usage.loss_last
    if loss is not None and loss != loss:
        return Advice(
            f"the loss is no number since step {record.usage.steps or '?'} or before",
            "lower lr, warm up longer, clip gradients (clip_grad_norm), or train in bf16 or fp32 in place of fp16",
        )
    return None


RULES: list[Callable[[Record], Advice | None]] = [
    _out_of_memory,
    _time_out,
    _by_words(
        r"No module named '(?P<name>[\w.]+)'",
        "the module {name} is not installed where the job ran",
        "install it in the environment that the job activates, or add its set-up line to [slurm] setup",
    ),
    _by_words(
        r"[Dd]isk quota exceeded|No space left on device|QuotaExceeded",
        "the disk or its quota is full",
        "free some, keep fewer checkpoints, or write to another file system",
    ),
    _by_words(
        r"[Ii]nvalid account or account/partition|Invalid account",
        "Slurm does not know that account on that partition",
        "set [slurm] account in chiplog.toml to one that `sacctmgr show assoc user=$USER` lists",
    ),
    _by_words(
        r"(?P<name>[\w./-]+): No such file or directory|No such file or directory: '(?P<other>[^']+)'",
        "a file is missing: {name}{other}",
        "mend the path, or make the file where the job runs",
    ),
    _by_words(
        r"(?P<name>\S+): command not found",
        "the command {name} is not there",
        "load its module or activate its environment in [slurm] setup",
    ),
    _by_words(
        r"gated repo|401 Client Error|Repository Not Found",
        "the hub refuses the model",
        "accept its licence there and log in, or download it to a model folder first",
    ),
    _not_a_number,
    lambda record: (
        Advice("it was preempted", "submit it again: it resumes from its last checkpoint")
        if record.state is State.PREEMPTED
        else None
    ),
    lambda record: (
        Advice("its node failed", "submit it again, and exclude that node if it fails there twice")
        if record.state is State.NODE_FAIL
        else None
    ),
    lambda record: (
        Advice(record.reason or "it was cancelled", "submit it again if it should go on")
        if record.state is State.CANCELLED
        else None
    ),
]
