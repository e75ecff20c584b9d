"""How many fields of real logs are read right, and how many are invented, by the parser that read them.

    python benchmarks/parsers.py FOLDER

FOLDER holds index.json (each entry: id, files, truth) and score_logs.py, whose `score(index, rows)` compares.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections import defaultdict
from pathlib import Path

from chiplog.ledger.parse import parse_job
from chiplog.ledger.row import row


def main() -> None:
    parser = argparse.ArgumentParser(description="How many fields of real logs are read right.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    spec = importlib.util.spec_from_file_location("score_logs", folder / "score_logs.py")
    assert spec and spec.loader, f"{folder} holds no score_logs.py"
    scorer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scorer)
    entries = json.loads((folder / "index.json").read_text())["entries"]
    groups: dict[str, list[dict]] = defaultdict(list)
    rows = {}
    for entry in entries:
        records = parse_job([folder / file["file"] for file in entry["files"]])
        rows[entry["id"]] = row(records)
        groups[records[-1].framework or "generic"].append(entry)
    print("| parser | logs | fields | right, % | invented |\n|---|---|---|---|---|")
    for name, group in [*sorted(groups.items()), ("all", entries)]:
        result, _ = scorer.score({"entries": group}, rows)
        invented = sum(field["false"] for field in result["fields"].values())
        right = 100 * result["micro_recall"]
        print(f"| {name} | {len(group)} | {result['n_scored']} | {right:.1f} | {invented} |")


if __name__ == "__main__":
    main()
