"""Pretends to train a model of its own: keeps the contract of trainer/train.py, and diverges above an lr of 1."""

import argparse
import json
import math
import random
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import yaml

BEGAN = time.perf_counter()
parser = argparse.ArgumentParser()
parser.add_argument("--config", type=Path)
config = yaml.safe_load(parser.parse_args().config.read_text())
if Path("DONE").exists():
    sys.exit()
meta = json.loads((Path(config["dataset"]) / "meta.json").read_text())
metrics = Path("metrics.jsonl").open("a", buffering=1)  # noqa: SIM115
memory = {"peak_mem_bytes": 1_000_000, "mem_kind": "host_rss"}
tokens, step, diverged = config["batch_size"] * config["seq_len"], 0, None


def say(event: str, **values: object) -> None:
    metrics.write(json.dumps({"event": event, **values}) + "\n")


say(
    "start",
    started=datetime.now(UTC).isoformat(timespec="seconds"),
    device="cpu",
    n_params=1000 * config["width"],
    flops_per_token=6000.0 * config["width"],
    total_steps=config["max_steps"],
    setup_s=time.perf_counter() - BEGAN,
    packages={"yaml": "1"},
)
own = random.Random(f"{config['lr']} {config['seed']} {config['width']}").uniform(0, 0.001)  # no two arms are alike
for step in range(1, config["max_steps"] + 1):
    began = time.perf_counter()
    time.sleep(config["seconds_a_step"])
    if step == config["fail_at_step"]:
        raise RuntimeError("the disk is gone")
    if config["lr"] > 1:
        diverged = f"the loss is nan at step {step}"
        break
    seconds = time.perf_counter() - began
    say(
        "step",
        step=step,
        loss=3 / step + own,
        lr=config["lr"],
        tokens=tokens,
        padded_tokens=tokens,
        seconds=seconds,
        **memory,
    )
if not diverged:
    loss = 2 + (math.log10(config["lr"]) + 2) ** 2 + random.Random(config["seed"]).uniform(0, 0.01)
    targets = config["val_tokens"] or meta["tokens"]["validation"] - 1
    say("validation", step=step, loss=loss, label_tokens=targets, samples=1, seconds=0.001)
say("checkpoint", step=step, seconds=0.001)
say("end", step=step, diverged=diverged)
Path("model").mkdir(exist_ok=True)
Path("DONE").write_text(json.dumps({"step": step, "diverged": diverged is not None}))
