"""Axolotl: a Hugging Face Trainer with its own configuration and memory figures in the metrics."""

from __future__ import annotations

from chiplog.ledger.draft import Draft
from chiplog.ledger.parsers import transformers
from chiplog.ledger.reader import LogReader, pattern
from chiplog.ledger.units import number

ACTIVE = pattern(
    rb"'memory/max_(?:mem_)?(?P<kind>active|allocated|reserved)\s?\((?P<unit>(?i:gib|gb))\)': '?(?P<size>[\d.]+)",
    b"'memory/max_",
)
MODEL = pattern(rb"^\W*base_model[\"']?: [\"']?(?P<model>[\w./-]+)", b"base_model")
ADAPTER = pattern(rb"^\W*adapter[\"']?: [\"']?(?P<method>lora|qlora)", b"adapter")
SETTING = pattern(rb"^\W*(?P<key>sequence_len|micro_batch_size|gradient_accumulation_steps|lora_r|num_epochs"
                  rb"|sample_packing)"
                  rb"[\"']?: [\"']?(?P<value>[\w.]+)", b": ")  # fmt: skip
NAMES = {
    "sequence_len": "max_seq_len", "micro_batch_size": "micro_batch_size", "gradient_accumulation_steps": "grad_accum",
    "lora_r": "lora_rank", "num_epochs": "epochs",
}  # fmt: skip


def sniff(head: bytes, tail: bytes) -> float:
    return 0.97 if b"axolotl" in head + tail and transformers.sniff(head, tail) > 0 else 0.0


def parse(log: LogReader) -> list[Draft]:
    drafts = transformers.parse(log, "axolotl")
    whole = log.whole
    for draft in drafts:
        if found := whole.first(MODEL):
            draft.set("model", found["model"], found)
        if found := whole.first(ADAPTER):
            draft.set("method", found["method"], found)
        for found in whole.near(SETTING):
            if found["key"] == "sample_packing":
                draft.default("packed", found["value"].lower() == "true", found)
            elif (value := number(found["value"])) is not None:
                draft.default(NAMES[found["key"]], int(value) if value % 1 == 0 else value, found)
        for found in whole.near(ACTIVE):
            if found["kind"] == "allocated" or draft.get("mem_kind") != "allocated":
                draft.peak(f"{found['size']} {found['unit']}", found["kind"], found)
    return drafts
