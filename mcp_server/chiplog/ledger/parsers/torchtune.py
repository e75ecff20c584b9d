"""torchtune 0.2 to 0.6, its forks, and this project's own recipes, which log alike.

A resolved configuration at the top; a bar `epoch|step|Loss: x: 12%|...` that starts anew each epoch and takes in the
save at its end; memory after init, which is no peak; `Step n | key:value` lines of the disk and stdout loggers; the
summary that wandb prints at the end.
"""

from __future__ import annotations

import re

import yaml

from chiplog.ledger.bars import Bar, bars
from chiplog.ledger.draft import Draft
from chiplog.ledger.reader import Found, LogReader, Span, pattern
from chiplog.ledger.runs import steady, take_speed
from chiplog.ledger.units import number, whole

CONFIG_START = pattern(rb"[Rr]unning (?P<recipe>\w+) with resolved config:", b"with resolved config:")
LABEL = re.compile(r"(?P<epoch>\d+)\|(?P<step>\d+)\|Loss: (?P<loss>-?[\w.+-]+)")
MEMORY = pattern(
    rb"[GNX]PU peak memory (?P<kind>allocation|alloc|active|reserved): (?P<size>[\d.]+ \w+)", b"PU peak memory"
)
LOGGED = pattern(rb"^\W{0,3}Step (?P<step>\d+) \| (?P<pairs>(?:[\w./-]+:\S+ ?)+)", b"Step ")
SAVED = pattern(
    rb"(?:Checkpoint saved in|[Ss]aving checkpoint took) (?P<seconds>[\d.]+) (?:seconds|secs)", b"heckpoint"
)
WANDB = pattern(rb"^wandb: +(?P<key>[\w/.]+) +(?P<value>-?[\d.e+-]+|nan|inf)$", b"wandb: ")
KIND = {"allocation": "allocated", "alloc": "allocated", "active": "active", "reserved": "reserved"}
SETTINGS = {  # of the resolved configuration; torchtune's batch_size is one forward pass
    "epochs": "epochs", "max_steps_per_epoch": "max_steps_per_epoch", "gradient_accumulation_steps": "grad_accum",
    "dtype": "dtype", "seed": "seed", "compile": "compile",
    "enable_activation_checkpointing": "activation_checkpointing", "optimizer_in_bwd": "optimizer_in_bwd",
}  # fmt: skip


def sniff(head: bytes, tail: bytes) -> float:
    if b"torchtune" in head or (b"with resolved config:" in head and b"_component_" in head):
        return 0.95
    if b"PU peak memory alloc" in head + tail or re.search(rb"\|Loss: (?<=\d\|Loss: )", head + tail):
        return 0.9
    return 0.0


def parse(log: LogReader) -> list[Draft]:
    starts = [found.offset for found in log.whole.some(CONFIG_START)]
    return [_run(span) for span in log.whole.cut(starts)]


def _run(span: Span) -> Draft:
    draft = Draft(span, "torchtune")
    _config(draft, span)
    shown = bars(span, lambda one: LABEL.search(one.label) is not None)
    steps = [(one, match) for one in shown if (match := LABEL.search(one.label))]
    if steps:
        _bars(draft, steps)
    _logged(draft, span)
    _memory(draft, span)
    saved = span.some(SAVED)
    if saved:
        draft.set("checkpoint_s", sum(number(found["seconds"]) or 0.0 for found in saved), saved[-1])
        draft.worked(saved[-1])
    for found in span.after(span.stop - 20_000).all(WANDB):
        key = found["key"].rpartition("/")[2]
        if key in ("global_step",):
            draft.default("steps", whole(found["value"]), found)
            draft.done = found
        elif key == "loss":
            draft.default("loss_last", number(found["value"]), found)
        elif key.startswith("peak_memory_") and draft.get("mem_kind") in (None, "after_init"):
            draft.peak(f"{found['value']} GiB", KIND.get(key.removeprefix("peak_memory_"), "allocated"), found)
    return draft


def _bars(draft: Draft, steps: list[tuple[Bar, re.Match[str]]]) -> None:
    """Steps are counted over all epochs; an epoch's last state before its save gives its time."""
    first, last = steps[0], steps[-1]
    if (length := last[0].total) is None:
        return
    draft.set("loss_first", number(first[1]["loss"]), first[0].found)
    draft.set("loss_last", number(last[1]["loss"]), last[0].found)
    step, epoch = int(last[1]["step"]), int(last[1]["epoch"])
    draft.set("steps", step, last[0].found)
    draft.worked(last[0].found)
    if last[0].done == length:
        draft.set("epoch", float(epoch), last[0].found)
    draft.set("steps_planned", length * (draft.get("epochs") or epoch), last[0].found)
    before_bar = max(0, int(first[1]["step"]) - first[0].done)  # steps of earlier epochs, and of an earlier attempt
    draft.set("resumed_from", before_bar if before_bar % length or (before_bar and first[0].done <= 3 < length) else 0)
    seconds, before = 0.0, {}
    for one, match in steps:  # the first time that an epoch shows a step is before it saves
        key = int(match["epoch"])
        if one.elapsed_s is not None and (key not in before or one.done > before[key].done):
            before[key] = one
    seconds = sum(one.elapsed_s or 0.0 for one in before.values())
    done = sum(one.done for one in before.values())
    if len(before) == epoch or draft.get("resumed_from"):
        draft.set("train_s", seconds, last[0].found)
        take_speed(draft, done, seconds)
    elif before:  # epochs in the middle were not read: their speed is that of those that were
        take_speed(draft, done, seconds)
    steady(draft, [one for one, _ in steps])


def _config(draft: Draft, span: Span) -> None:
    start = span.first(CONFIG_START)
    if not start:
        return
    draft.set("recipe", start["recipe"], start)
    text = span.log.text(start.offset, start.offset + 30_000).partition(b"\n")[2]
    values = _yaml(text)
    for key, name in SETTINGS.items():
        draft.set(name, values.get(key))
    micro, accum = values.get("batch_size"), values.get("gradient_accumulation_steps") or 1
    if "micro_batch_size" in values:  # this project's own recipes
        draft.set("batch_size", micro)
        draft.set("micro_batch_size", values.get("micro_batch_size"))
    elif isinstance(micro, int):
        draft.set("micro_batch_size", micro)
        draft.set("batch_size", micro * accum if isinstance(accum, int) else None)
    model = values.get("model")
    component = model.get("_component_", "") if isinstance(model, dict) else model
    if isinstance(component, str) and component:
        draft.set("model", component.rpartition(".")[2] if isinstance(model, dict) else component)
    name = str(component)
    rank = model.get("lora_rank") if isinstance(model, dict) else values.get("lora_rank")
    draft.set("lora_rank", rank)
    if isinstance(model, dict) and model.get("use_dora"):
        draft.set("method", "dora")
    elif "qlora" in name:
        draft.set("method", "qlora")
    elif "lora" in name.lower() or rank:
        draft.set("method", "lora")
    elif isinstance(model, dict):
        draft.set("method", "full")
    optimizer = values.get("optimizer")
    if isinstance(optimizer, dict):
        draft.set("optimizer", str(optimizer.get("_component_", "")).rpartition(".")[2])
    draft.set("lora_targets", _targets(model if isinstance(model, dict) else values))
    dataset, tokenizer = values.get("dataset"), values.get("tokenizer")
    if isinstance(dataset, dict):
        draft.set("packed", dataset.get("packed"))
    if isinstance(tokenizer, dict):
        draft.set("max_seq_len", tokenizer.get("max_seq_len"))
    draft.default("max_seq_len", values.get("max_seq_len"))


def _targets(values: dict) -> list[str] | None:
    """The matrices that have adapters, in this project's names; null where that is not said."""
    if isinstance(values.get("lora_targets"), list):
        return values["lora_targets"]
    if not isinstance(values.get("lora_attn_modules"), list):
        return None
    mlp = ["gate_proj", "up_proj", "down_proj"] if values.get("apply_lora_to_mlp") else []
    return [str(name).replace("output_proj", "o_proj") for name in values["lora_attn_modules"]] + mlp


def _yaml(text: bytes) -> dict:
    """The configuration, as far as its lines are YAML."""
    lines = []
    for line in text.decode(errors="replace").split("\n"):
        if lines and line.strip() and not re.match(r"^(\s*-|\s+\S|[\w.]+:)", line):
            break
        if re.match(r"^(INFO|DEBUG|WARNING|ERROR|\d{4}-\d\d)", line):
            break
        lines.append(line)
    while lines:
        try:
            values = yaml.safe_load("\n".join(lines))
            return values if isinstance(values, dict) else {}
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            lines = lines[: mark.line if mark and mark.line < len(lines) else -1]
        except (ValueError, RecursionError):
            return {}
    return {}


def _logged(draft: Draft, span: Span) -> None:
    first, last = span.first(LOGGED, far=True), span.last(LOGGED)
    if not first or not last:
        return
    early, late = _pairs(first), _pairs(last)
    draft.default("loss_first", number(early.get("loss")), first)
    draft.default("loss_last", number(late.get("loss")), last)
    draft.default("steps", whole(last["step"]), last)
    draft.set("tokens_per_s", number(late.get("tokens_per_second_per_gpu")), last)
    if draft.get("tokens_per_s"):
        draft.set("tokens_scope", "unmasked")
    peaks = {}
    for found in span.near(LOGGED):
        for key, value in _pairs(found).items():
            if key.startswith("peak_memory_") and (amount := number(value)) is not None:
                peaks[key] = max(peaks.get(key, (0.0, found)), (amount, found), key=lambda pair: pair[0])
    for kind in ("alloc", "active", "reserved"):
        if entry := peaks.get(f"peak_memory_{kind}"):
            draft.peak(f"{entry[0]} GiB", KIND[kind], entry[1])
            break
    draft.worked(last)


def _pairs(found: Found) -> dict[str, str]:
    return dict(part.split(":", 1) for part in found["pairs"].split() if ":" in part)


def _memory(draft: Draft, span: Span) -> None:
    """The blocks of memory lines: the one after model init is no peak of the run."""
    for found in span.near(MEMORY):
        before = span.log.text(max(span.start, found.offset - 400), found.offset)
        after_init = b"after model init" in before.lower() or draft.get("steps") is None or found.offset < 0
        kind = KIND[found["kind"]]
        if after_init:
            if kind == "allocated" or draft.get("mem_kind") is None:
                draft.peak(found["size"], "after_init", found)
        elif kind == "allocated" or draft.get("mem_kind") in (None, "after_init"):
            draft.peak(found["size"], kind, found)
