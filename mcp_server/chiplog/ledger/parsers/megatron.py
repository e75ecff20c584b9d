"""Megatron-LM and Megatron-DeepSpeed: `iteration 100/ 5000 | ... | lm loss: 6.5E+00 |` lines."""

from __future__ import annotations

import re
import statistics

from chiplog.ledger.draft import Draft
from chiplog.ledger.parsers.deepspeed import MEMORY, SPEED, take_steps
from chiplog.ledger.reader import BLOCK, LogReader, Span, pattern
from chiplog.ledger.runs import take_losses
from chiplog.ledger.units import number, whole

ITERATION = pattern(rb"iteration +(?P<step>\d+)/ *(?P<total>\d+) \|(?P<rest>[^\n]*)", b"iteration ")
ELAPSED = pattern(
    rb"iteration +(?P<step>\d+)/ *(?P<total>\d+) \|[^\n]{0,1500}?elapsed time per iteration \((?P<unit>ms|s)\): "
    rb"(?P<time>[\d.]+)",
    b"elapsed time per iteration",
)
LOSS = pattern(
    rb"iteration +\d+/ *\d+ \|[^\n]{0,1500}?\b(?:lm|train(?:ing)?|total)[ _]loss: (?P<loss>[\w.+-]+)", b"loss: "
)
BATCH = pattern(rb"iteration +\d+/[^\n]{0,1500}?global batch size: +(?P<n>\d+)", b"global batch size: ")
VALIDATION = pattern(
    rb"valid(?:ation)? loss at (?:iteration (?P<step>\d+))?[^|\n]{0,200}\| lm loss value: (?P<loss>[\w.+-]+)",
    b"lm loss value: ",
)
ARGUMENT = pattern(
    rb"^ *(?:\[\w+\]: ?)?(?P<key>train_iters|micro_batch_size|global_batch_size|seq_length|world_size|num_layers|"
    rb"hidden_size|bf16|fp16|seed) \.+ (?P<value>\w+)$",
    b"train_iters", b"batch_size", b"seq_length", b"world_size", b"hidden_size",
)  # fmt: skip
NAMES = {
    "train_iters": "steps_planned", "micro_batch_size": "micro_batch_size", "global_batch_size": "batch_size",
    "seq_length": "max_seq_len", "world_size": "gpus", "num_layers": "num_layers", "hidden_size": "hidden_size",
    "seed": "seed",
}  # fmt: skip
WORLD = pattern(rb"using world size: (?P<n>\d+)", b"using world size: ")
RESUMED = pattern(
    rb"successfully loaded checkpoint [^\n]{0,600}? at iteration +(?P<step>\d+)", b"successfully loaded checkpoint"
)
DONE = pattern(rb"\[after training is done\]", b"[after training is done]")


def sniff(head: bytes, tail: bytes) -> float:
    both = head + tail
    if b"elapsed time per iteration" in both and b"iteration " in both:
        return 0.95
    return (
        0.7
        if b"using world size: " in both and (b"megatron" in both.lower() or b"model-parallel size" in both)
        else 0.0
    )


def parse(log: LogReader) -> list[Draft]:
    return [_run(log.whole)]


def _run(span: Span) -> Draft:
    draft = Draft(span, "megatron")
    if found := span.first(WORLD):
        draft.set("gpus", whole(found["n"]), found)
    for found in span.near(ARGUMENT):
        key, value = found["key"], found["value"]
        if key in ("bf16", "fp16"):
            if value == "True":
                draft.set("dtype", key, found)
        else:
            draft.default(NAMES[key], whole(value), found)
    if last := span.last(ITERATION):
        draft.set("steps", whole(last["step"]), last)
        draft.set("steps_planned", whole(last["total"]), last)
        draft.worked(last)
    else:
        take_steps(draft, span)
    if found := span.first(RESUMED):
        draft.set("resumed_from", whole(found["step"]), found)
    take_losses(draft, span, LOSS)
    if found := span.last(BATCH):
        draft.set("batch_size", whole(found["n"]), found)
    times = [(number(f["time"]) or 0.0) / (1000 if f["unit"] == "ms" else 1) for f in span.near(ELAPSED, BLOCK)]
    times = [time for time in times if time > 0]
    if times:
        draft.set("steps_per_s", 1 / statistics.median(times[-max(1, len(times) // 4) :]))  # batches may ramp up
    validations = span.some(VALIDATION)
    draft.set("val_losses", [value for f in validations if (value := number(f["loss"])) is not None] or None)
    at = [step for f in validations if (step := whole(f.get("step")))]
    if at and max(at) > (draft.get("steps") or 0):
        draft.set("steps", max(at), validations[-1])
    if (found := span.last(SPEED)) and found.get("mem"):
        draft.peak(re.sub(r"(?<=\d)(?=[A-Z])", " ", found["mem"]), "allocated", found)
    for found in span.near(MEMORY):
        draft.peak(f"{found['size']} {found['unit']}", "allocated", found)
    if found := span.last(DONE):
        draft.done = found
    return draft
