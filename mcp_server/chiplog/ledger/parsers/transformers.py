"""Hugging Face Trainer, and what is built on it: TRL, PEFT scripts, LLaMA-Factory, LLaVA.

`***** Running training *****` with its counts; a bar of optimiser steps; dictionaries of metrics a line, whose values
are quoted from version 5 on; `train_runtime` at the end, and the table `***** train metrics *****`.
"""

from __future__ import annotations

import re

from chiplog.ledger.bars import BAR, Bar, bars
from chiplog.ledger.draft import Draft
from chiplog.ledger.reader import Found, LogReader, Span, pattern
from chiplog.ledger.runs import distinct, steady, take_bars, training_bars, trains
from chiplog.ledger.units import number, seconds, whole

RUNNING = pattern(rb"\*\*\*\*\* Running training \*\*\*\*\* *\n[^\n]{0,200}Num examples", b"***** Running training")
COUNT = pattern(
    rb"(?P<key>Num examples|Num Epochs|Instantaneous batch size per (?:device|GPU)|Total train batch size[^=\n]*|"
    rb"Gradient Accumulation steps|Total optimization steps|Number of trainable parameters) *= *(?P<value>[\d,]+)",
    b"Num ", b"nstantaneous batch", b"otal ", b"Gradient Acc", b"Number of",
)  # fmt: skip
NAMES = {
    "Num examples": "n_samples", "Num Epochs": "epochs", "Instantaneous batch size per device": "micro_batch_size",
    "Instantaneous batch size per GPU": "micro_batch_size", "Gradient Accumulation steps": "grad_accum",
    "Total optimization steps": "steps_planned", "Number of trainable parameters": "n_trainable",
}  # fmt: skip
LOSS = pattern(  # JSON where a script writes the metrics down itself
    rb"\{[\"']loss[\"']: [\"']?(?P<loss>-?[\w.+-]+)[\"']?, [^}\n]{0,4000}\}", b"{'loss': ", b'{"loss": '
)
ENDED = pattern(
    rb"(?P<all>\{(?![\"']loss[\"'])[^{}]{0,600}[\"']train_runtime[\"']: '?(?P<seconds>[\d.e+]+)'?[^{}]{0,600}\}?)",
    b"'train_runtime': ",
    b'"train_runtime": ',
)
EVAL = pattern(rb"\{[^{}\n]*[\"']eval_loss[\"']: '?(?P<loss>[\w.+-]+)'?[^{}\n]*\}", b"'eval_loss': ", b'"eval_loss": ')
TABLE = pattern(rb"^ *(?P<key>epoch|train_loss|train_runtime|train_samples_per_second|train_steps_per_second"
                rb"|train_samples)"
                rb" *= *(?P<value>[\d:.,]+)", b" = ")  # fmt: skip
TABLE_NAMES = {
    "epoch": "epoch", "train_loss": "loss_mean", "train_runtime": "train_s", "train_samples": "n_samples",
    "train_samples_per_second": "samples_per_s", "train_steps_per_second": "mean_steps_per_s",
}  # fmt: skip
TRAINED = pattern(rb"\*{5} train metrics \*{5}", b"***** train metrics")
OUTPUT = pattern(rb"TrainOutput\(global_step=(?P<step>\d+), training_loss=(?P<loss>[\w.+-]+)", b"TrainOutput(")
NOTEBOOK = pattern(  # the table that a notebook shows
    rb"Step\s+Training Loss(?P<rows>(?:[\s\\|]+\d+[\s|]+\d+\.\d+)+)", b"Training Loss"
)
BAR_LOSS = re.compile(r"(?:^|[ ,])(?:step_|avg_|train_)?loss=(?P<loss>[\w.+-]+)")
SHOWN = pattern(  # a notebook's bar
    rb"\[ *(?P<done>\d+)/(?P<total>\d+) [\d:]+(?: ?< ?[\d:]+)?(?:, [\d.]+ it/s)?, Epoch (?P<epoch>[\d.]+)/\d+\]",
    b", Epoch ",
)
RESUMED = pattern(rb"Continuing training from global step (?P<step>\d+)", b"Continuing training from global step")
ARGUMENT = pattern(
    rb"^ *(?P<key>per_device_train_batch_size|gradient_accumulation_steps|num_train_epochs|max_steps|model_max_length|"
    rb"max_seq_length|bf16|fp16|lora_r|lora_rank|seed)[\"']?[=:] ?(?P<value>[\w.+-]+),?$",
    b"per_device", b"gradient_acc", b"num_train", b"max_", b"model_max", b"bf16", b"fp16", b"lora_r", b"seed",
)  # fmt: skip
ARGUMENT_NAMES = {
    "per_device_train_batch_size": "micro_batch_size", "gradient_accumulation_steps": "grad_accum",
    "num_train_epochs": "epochs", "model_max_length": "max_seq_len", "max_seq_length": "max_seq_len",
    "lora_r": "lora_rank", "lora_rank": "lora_rank", "seed": "seed",
}  # fmt: skip
STEP_OF = pattern(rb"'global_step/max_steps': '(?P<step>\d+)/(?P<total>\d+)'", b"'global_step/max_steps'")
UNSLOTH_MEMORY = pattern(rb"^Peak reserved memory = (?P<size>[\d.]+ GB)\.", b"Peak reserved memory = ")
SWIFT_MEMORY = pattern(rb"'memory\((?P<unit>[GM]iB)\)': '?(?P<size>[\d.]+)", b"'memory(")
MEMORY = pattern(
    rb"'(?:total_)?(?:peak|max)_mem(?:ory)?_(?P<kind>allocated|reserved)_(?P<unit>[MG]i?B)': (?P<size>[\d.]+)", b"_mem"
)
STOPPED = pattern(rb"Training completed\. Do not forget to share your model", b"Training completed. Do not forget")
WANDB = pattern(
    rb"^wandb: +train/(?P<key>epoch|global_step|loss|train_loss|train_runtime|train_steps_per_second) +"
    rb"(?P<value>[\w.+-]+)$",
    b"wandb: ",
)
WANDB_NAMES = {
    "epoch": "epoch", "global_step": "steps", "loss": "loss_last", "train_loss": "loss_mean",
    "train_runtime": "train_s", "train_steps_per_second": "mean_steps_per_s",
}  # fmt: skip
CHECKPOINT = pattern(rb"\b(?:checkpoint-|global_step)(?P<step>\d+)\b")


def sniff(head: bytes, tail: bytes) -> float:
    both = head + tail
    if re.search(rb"[\"']train_runtime[\"']", both) or b"***** train metrics" in both or RUNNING.regex.search(both):
        return 0.9
    if re.search(rb"\{'loss': '?[\d.naif]", both) or b"train_samples_per_second" in both:
        return 0.85
    if b"transformers" in both and b"%|" in both:
        return 0.3
    return 0.0


def parse(log: LogReader, framework: str = "transformers") -> list[Draft]:
    spans = log.whole.cut(_starts(log.whole))
    return [_run(span, framework) for span in spans]


def _starts(span: Span) -> list[int]:
    """Where runs begin: each announcement after which work was done; without any, after each end but the last."""
    announced = [found.offset for found in span.some(RUNNING)]
    if announced:
        return distinct(span, announced)
    ends = [_after(span, found) for found in span.some(ENDED) if not found.before.endswith("metrics=")]
    return [span.start, *ends[:-1]] if len(ends) > 1 else []


def _after(span: Span, end: Found) -> int:
    """The byte after a run's last words: its bar is drawn once more after its metrics."""
    start = end.end + 1
    last = Span(span.log, start, min(span.stop, start + 600)).first(BAR)
    return last.offset + 1 if last else start


def _run(span: Span, framework: str) -> Draft:
    draft = Draft(span, framework)
    for found in span.near(COUNT):
        key = found["key"]
        name = "batch_size" if key.startswith("Total train batch size") else NAMES[key]
        draft.default(name, whole(found["value"]), found)
    for found in span.near(ARGUMENT):
        _argument(draft, found)
    if draft.get("lora_rank"):
        draft.set("method", "lora")
    if found := span.first(RESUMED):
        draft.set("resumed_from", whole(found["step"]), found)
    _metrics(draft, span)
    planned = draft.get("steps_planned")
    train = training_bars(bars(span, lambda one: one.total == planned if planned else trains(one)), planned)
    take_bars(draft, train)
    steady(draft, train)
    for found in span.after(span.stop - 50_000).all(WANDB):
        draft.set(
            WANDB_NAMES[found["key"]], (whole if found["key"] == "global_step" else number)(found["value"]), found
        )
    if draft.get("loss_last") is None:
        _loss_of_bar(draft, train)
    if draft.get("steps") is None:
        _count(draft, span)
    if (first := draft.get("resumed_from")) and draft.get("train_s"):  # what it prints counts the steps before too
        draft.set("mean_steps_per_s", (draft.get("steps") - first) / draft.get("train_s"))
    return draft


def _loss_of_bar(draft: Draft, train: list[Bar]) -> None:
    """The loss behind the bar, as loops of one's own show it."""
    shown = [(one, match) for one in train if (match := BAR_LOSS.search(one.after))]
    if shown:
        draft.set("loss_first", number(shown[0][1]["loss"]), shown[0][0].found)
        draft.set("loss_last", number(shown[-1][1]["loss"]), shown[-1][0].found)


def _count(draft: Draft, span: Span) -> None:
    """Without a bar: the steps that were planned, or as many as there are loss lines, if the stated speed agrees."""
    seconds, rate = draft.get("train_s"), draft.get("mean_steps_per_s")
    off = 0.0005 * (seconds or 0.0) + 1  # the rate is printed to three decimals
    planned = draft.get("steps_planned")
    if planned and seconds and rate and abs(planned - seconds * rate) <= off:
        draft.set("steps", planned, draft.done)
        return
    n = sum(1 for _ in span.all(LOSS)) if seconds and rate else 0
    if n and abs(n - seconds * rate) <= off:
        draft.set("steps", n, span.last(LOSS))
    elif saved := span.last(CHECKPOINT):
        draft.set("steps", whole(saved["step"]), saved)


def _metrics(draft: Draft, span: Span) -> None:
    if first := span.first(LOSS, far=True):
        draft.set("loss_first", number(first["loss"]), first)
    if last := span.last(LOSS):
        draft.set("loss_last", number(last["loss"]), last)
        draft.set("epoch", number(_dictionary(last).get("epoch")), last)
        draft.set("steps", whole(_dictionary(last).get("step")), last)
        draft.worked(last)
    losses = [value for found in span.some(EVAL) if (value := number(found["loss"])) is not None]
    draft.set("val_losses", losses or None)
    if found := span.last(STOPPED):
        draft.done = found
    for found in span.near(MEMORY):
        if found["kind"] == "allocated" or draft.get("mem_kind") != "allocated":
            draft.peak(f"{found['size']} {found['unit']}", found["kind"], found)
    for found in span.near(UNSLOTH_MEMORY):
        draft.peak(found["size"], "reserved", found)
    for found in span.near(SWIFT_MEMORY):
        draft.peak(f"{found['size']} {found['unit']}", "allocated", found)
    if found := span.last(STEP_OF):
        draft.set("steps", whole(found["step"]), found)
        draft.set("steps_planned", whole(found["total"]), found)
    if end := span.last(ENDED):
        values = _dictionary(end)
        _ended(draft, values, end)
    if found := span.last(OUTPUT):
        draft.set("steps", whole(found["step"]), found)
        draft.default("loss_mean", number(found["loss"]), found)
    if found := span.last(NOTEBOOK):
        rows = re.findall(r"(\d+)\s+([\d.]+)", found["rows"])
        draft.default("loss_first", number(rows[0][1]), found)
        draft.default("loss_last", number(rows[-1][1]), found)
    if found := span.last(SHOWN):
        draft.default("steps", whole(found["done"]), found)
        draft.default("steps_planned", whole(found["total"]), found)
        draft.default("epoch", number(found["epoch"]), found)
    if found := span.last(TRAINED):
        draft.done = found
    for found in span.near(TABLE):
        value = seconds(found["value"]) if ":" in found["value"] else number(found["value"])
        draft.default(TABLE_NAMES[found["key"]], value, found)


def _ended(draft: Draft, values: dict[str, str], end: Found) -> None:
    draft.set("train_s", number(values.get("train_runtime")), end)
    draft.set("loss_mean", number(values.get("train_loss")), end)
    draft.set("samples_per_s", number(values.get("train_samples_per_second")), end)
    draft.set("mean_steps_per_s", number(values.get("train_steps_per_second")), end)
    draft.set("epoch", number(values.get("epoch")), end)
    draft.worked(end)
    draft.done = end


def _argument(draft: Draft, found: Found) -> None:
    key, value = found["key"], found["value"]
    if key in ("bf16", "fp16"):
        if value in ("True", "true"):
            draft.set("dtype", key, found)
    elif key == "max_steps":
        if (steps := whole(value)) and steps > 0:
            draft.default("steps_planned", steps, found)
    elif (amount := number(value)) is not None:
        draft.default(ARGUMENT_NAMES[key], amount if amount % 1 else int(amount), found)


def _dictionary(found: Found) -> dict[str, str]:
    """The values of a printed dictionary, as text; of a line cut in two, as many as are whole."""
    return {
        key: value
        for key, value in re.findall(
            r"[\"'](\w+)[\"']: [\"']?([\w.+-]+)[\"']?", found.get("all") or found.text.decode(errors="replace")
        )
    }
