"""Pretends to train: keeps the contract of a recipe (metrics.jsonl, adapter/, DONE), needs nothing but PyYAML.

`guards` is what guards.json is to hold, as JSON; `pretend` is what else goes wrong.
"""

import argparse
import hashlib
import json
import math
import signal
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
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
deviation = Path("deviation.json")
micro = json.loads(deviation.read_text())["micro_batch_size"] if deviation.exists() else config["batch_size"]
if config["out_of_memory_above"] and micro > config["out_of_memory_above"]:
    sys.exit(
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB"
    )
rows = json.loads(Path(config["dataset"]).read_text())["train"]
total = len(rows) // config["batch_size"] * config["epochs"]
metrics = Path("metrics.jsonl").open("a", buffering=1)  # noqa: SIM115


def say(event: str, **values: object) -> None:
    metrics.write(json.dumps({"event": event, **values}) + "\n")


pretend = config["pretend"]
reached = {key: config[key] for key in ("model", "dataset", "seed", "lora_rank", "batch_size", "lr", "right_up_to")}
own = 0 if pretend == "same-losses" else int(hashlib.sha256(repr(reached).encode()).hexdigest()[:6], 16) / 2**40
memory = {"peak_mem_bytes": 1_000_000 * config["batch_size"], "mem_kind": "host_rss"}
say(
    "start",
    started=datetime.now(UTC).isoformat(timespec="seconds"),
    device="cpu",
    n_params=1000,
    total_steps=total,
    n_trainable=10 * config["lora_rank"],
    n_samples=len(rows),
    batch_size=config["batch_size"],
    train_sha256="train",
    val_sha256="of others" if pretend == "other-validation" else "validation",
    setup_s=time.perf_counter() - BEGAN,
    packages={"yaml": "1"},
)
for step in range(1, 1 + {"short": total - 1, "nothing": 0}.get(pretend, total)):
    began = time.perf_counter()
    time.sleep(config["seconds_a_step"])
    if step == config["fail_at_step"]:
        raise RuntimeError("the loss is no number")
    seconds = time.perf_counter() - began
    tokens = 10 * config["batch_size"]
    loss = math.nan if pretend == "nan" and step == total else 1 / step + own
    say("step", step=step, epoch=0, loss=loss, lr=config["lr"], tokens=tokens, seconds=seconds, **memory)
    print(f"1|{step}|Loss: {1 / step}", flush=True)
say("end", step=total)
if config["guards"]:
    Path("guards.json").write_text(config["guards"])
Path("adapter").mkdir(exist_ok=True)
Path("DONE").write_text("{}")
