"""DeepSpeed's engine: `step=10, skipped=0, lr=[...]`, and the speed of its throughput timer."""

from __future__ import annotations

import re
import statistics

from chiplog.ledger.bars import bars
from chiplog.ledger.draft import Draft
from chiplog.ledger.parsers import generic, transformers
from chiplog.ledger.reader import LogReader, Span, pattern
from chiplog.ledger.runs import take_bars, take_losses, training_bars, trains
from chiplog.ledger.units import number, stamp, whole

STEP = pattern(rb"\[Rank \d+\] step=(?P<step>\d+), skipped=\d+, lr=", b"] step=")
SPEED = pattern(
    rb"epoch=(?P<epoch>\d+)/micro_step=(?P<micro>\d+)/global_step=(?P<step>\d+), RunningAvgSamplesPerSec="
    rb"(?P<rate>[\d.]+)"
    rb"(?:, CurrSamplesPerSec=[\d.]+)?(?:, MemAllocated=[\d.]+\w+, MaxMemAllocated=(?P<mem>[\d.]+\w+))?",
    b"RunningAvgSamplesPerSec=",
)
OLD_SPEED = pattern(
    rb"\] \d+/(?P<step>\d+), SamplesPerSec=(?P<rate>[\d.]+)"
    rb"(?:, MemAllocated=[\d.]+\w+, MaxMemAllocated=(?P<mem>[\d.]+\w+))?",
    b", SamplesPerSec=",
)
STEPS = pattern(
    rb"^steps: (?P<step>\d+) loss: (?P<loss>[\w.+-]+) iter time \(s\): (?P<seconds>[\d.]+)", b"iter time (s): "
)
SETTING = pattern(rb"\[config\.py:\d+:print\] +(?P<key>train_batch_size|train_micro_batch_size_per_gpu"
                  rb"|gradient_accumulation_steps|"
                  rb"world_size|zero_optimization_stage|bfloat16_enabled|fp16_enabled|steps_per_print) \.* ?"
                  rb"(?P<value>\w+)", b":print]")  # fmt: skip
NAMES = {
    "train_batch_size": "batch_size", "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "grad_accum", "zero_optimization_stage": "zero_stage", "steps_per_print": None,
}  # fmt: skip
WORLD = pattern(rb"world_size[:=] ?(?P<n>\d+)|dist_world_size=(?P<m>\d+)", b"world_size")
LOSS = pattern(
    rb"(?i:\b(?:train(?:ing)?[_ ])?loss)[\"']?(?: is)?[=: ]+(?:tensor\()?(?P<loss>-?\d[\w.+-]*|nan|inf)", b"oss"
)
MEMORY = pattern(
    rb"memory \((?P<unit>MB|GB)\) \|[^\n]{0,1500}?\bm(?:ax allocated|em-max-allocated-gigabytes): (?P<size>[\d.]+)",
    b"max allocated: ", b"mem-max-allocated",
)  # fmt: skip
VISIBLE = pattern(rb"Setting CUDA_VISIBLE_DEVICES=(?P<ids>[\d,]+)", b"Setting CUDA_VISIBLE_DEVICES=")
EPOCHS = pattern(
    rb"Beginning of Epoch (?P<epoch>\d+)/(?P<epochs>\d+), Total Micro Batches (?P<n>\d+)", b"Beginning of Epoch"
)


def sniff(head: bytes, tail: bytes) -> float:
    both = head + tail
    if b"SamplesPerSec=" in both or re.search(rb"\[Rank \d+\] step=\d+, skipped=", both):
        return 0.8
    return 0.5 if b"[deepspeed" in both.lower() or b"DeepSpeedEngine" in both else 0.0


def parse(log: LogReader) -> list[Draft]:
    if transformers.sniff(log.head, log.tail) >= 0.85:
        drafts = transformers.parse(log, "transformers")
    else:
        drafts = [_run(log.whole)]
    for draft in drafts:
        _engine(draft, log.whole)
    return drafts


def _run(span: Span) -> Draft:
    draft = Draft(span, "deepspeed")
    take_losses(draft, span, LOSS)
    take_steps(draft, span)
    marks = span.near(STEP) or span.near(OLD_SPEED)
    stamped = [(found, when) for found in marks if (when := stamp(found.line))]
    if len(stamped) > 1:
        (one, start), (other, stop) = stamped[len(stamped) // 10], stamped[-1]
        passed = (stop - start).total_seconds()
        draft.default("steps_per_s", (int(other["step"]) - int(one["step"])) / passed if passed > 1 else None)
    for wanted in (STEP, SPEED, OLD_SPEED):
        if found := span.last(wanted):
            draft.default("steps", whole(found["step"]), found)
            draft.worked(found)
    if found := span.last(EPOCHS):
        draft.set("epochs", whole(found["epochs"]), found)
    take_bars(draft, training_bars(bars(span, trains)))
    return generic.run(span, draft)


def take_steps(draft: Draft, span: Span) -> None:
    """`steps: 50 loss: 9.1 iter time (s): 25.5` of its pipeline."""
    found = span.near(STEPS)
    if found:
        last = found[-1]
        draft.set("steps", whole(last["step"]), last)
        draft.set("loss_first", number(found[0]["loss"]), found[0])
        draft.set("loss_last", number(last["loss"]), last)
        draft.worked(last)
        times = [time for one in found[len(found) // 10 :] if (time := number(one["seconds"]))]
        draft.set("mean_steps_per_s", 1 / statistics.fmean(times) if times else None, last)


def _engine(draft: Draft, span: Span) -> None:
    for found in span.near(SETTING):
        name, value = NAMES.get(found["key"]), found["value"]
        if found["key"] == "world_size":
            draft.default("gpus", whole(value), found)
        elif found["key"] in ("bfloat16_enabled", "fp16_enabled"):
            if value == "True":
                draft.set("dtype", "bf16" if found["key"] == "bfloat16_enabled" else "fp16", found)
        elif name:
            draft.default(name, whole(value), found)
    if found := span.first(VISIBLE):
        draft.default("gpus", len(found["ids"].split(",")), found)
    if found := span.first(WORLD):
        draft.default("gpus", whole(found.get("n") or found.get("m")), found)
    if found := span.last(SPEED) or span.last(OLD_SPEED):
        draft.default("samples_per_s", number(found["rate"]), found)
        if found.get("mem"):
            draft.peak(re.sub(r"(?<=\d)(?=[A-Z])", " ", found["mem"]), "allocated", found)
    if draft.get("peak_mem_bytes") is None:
        for found in span.near(MEMORY):
            draft.peak(f"{found['size']} {found['unit']}", "allocated", found)
    if (rate := draft.get("samples_per_s")) and (batch := draft.get("batch_size")):
        draft.default("steps_per_s", rate / batch)
