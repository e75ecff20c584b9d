"""Pretends to evaluate: with an adapter the first `right_up_to` items are right, without one none is."""

import argparse
import json
import time
from datetime import UTC, datetime
from pathlib import Path

import yaml

parser = argparse.ArgumentParser()
parser.add_argument("--config", type=Path)
parser.add_argument("--adapter", type=Path)
arguments = parser.parse_args()
config = yaml.safe_load(arguments.config.read_text())
began = time.perf_counter()
rows = json.loads(Path(config["dataset"]).read_text())[config["eval_split"]][: config["eval_limit"]]
right = config["right_up_to"] if arguments.adapter else 0
Path("eval").mkdir(exist_ok=True)
with Path("eval/predictions.jsonl").open("w") as file:
    for index, row in enumerate(rows):
        item = {"index": index, "prompt": row["input"], "target": row["output"], "output": "?"}
        file.write(json.dumps({**item, "scores": {"exact_match": index < right}}) + "\n")
scores = {
    "n": len(rows),
    "scores": {"exact_match": {"count": min(right, len(rows)), "n": len(rows)}},
    "ended": datetime.now(UTC).isoformat(),
    "setup_s": 0.01,
    "seconds": max(time.perf_counter() - began, 0.001),
    "peak_mem_bytes": 500_000,
    "mem_kind": "host_rss",
    "device": "cpu",
}
Path("eval/scores.json").write_text(json.dumps(scores))
