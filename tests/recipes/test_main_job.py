"""The main job with the real recipes, driven by an MCP client over stdio: a tiny Llama is really trained and asked."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest
from mcp import Client, StdioServerParameters

ASK: dict[str, Any] = {
    "question": "Does a higher rank help a model of random weights?",
    "name": "ranks",
    "models": {"T": "tiny"},
    "dataset": "words.json",
    "variables": {"lora_rank": [2, 4]},
    "controls": {
        "dtype": "fp32",
        "max_seq_len": 64,
        "batch_size": 8,
        "epochs": 1,
        "warmup_steps": 1,
        "max_new_tokens": 8,
    },
}


@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_an_agent_over_stdio_trains_a_model_and_gets_the_summary(workspace: Path, llama: Path, words: Path, mode: str):
    shutil.copytree(llama, workspace / "models" / "tiny")
    (workspace / "data").mkdir()
    shutil.copy(words, workspace / "data" / "words.json")
    environment = {**os.environ, "CHIPLOG_WORKSPACE": str(workspace)}
    server = StdioServerParameters(command=sys.executable, args=["-m", "chiplog.cli", "serve"], env=environment)

    async def steps() -> dict[str, Any]:
        async with Client(server, mode=mode) as client:
            answers = {}
            for tool, arguments in (
                ("check_dataset", {"path": "words.json", "model": "tiny"}),
                ("check_model", {"name": "tiny"}),
                ("plan_experiment", ASK),
                ("setup_experiment_dirs", {"experiment": "ranks"}),
                ("submit_experiment", {"experiment": "ranks", "confirm": True}),
                ("experiment_status", {"experiment": "ranks", "wait_s": 240}),
                ("summarize_experiment", {"experiment": "ranks"}),
                ("collect_records", {"experiment": "ranks"}),
            ):
                result = await client.call_tool(tool, arguments)
                assert not result.is_error, (tool, result.content)
                answers[tool] = result.structured_content
            return answers

    answers = anyio.run(steps)
    assert answers["check_dataset"]["report"]["splits"]["train"]["tokens"]["total"] > 0
    assert {run["state"] for run in answers["experiment_status"]["runs"]} == {"COMPLETED"}, answers["experiment_status"]
    records = {record["run"]: record for record in answers["collect_records"]["records"]}
    assert records.keys() == {"rank2", "rank4", "T_base"}
    for record in records.values():
        usage = record["usage"]
        assert usage["device"] == "cpu" and usage["mem_kind"] == "host_rss" and usage["elapsed_s"] > 0
        assert record["metrics"]["exact_match"]["n"] == 8
    assert records["rank4"]["usage"]["steps"] == 5 and records["rank4"]["packages"]["torchtune"] == "0.6.1"
    # The planner counted the tokens that the recipe then trained on.
    counted = answers["check_dataset"]["report"]["splits"]["train"]["tokens"]["total"]
    assert records["rank4"]["usage"]["tokens"] == counted
    assert records["T_base"]["usage"]["steps"] is None and records["T_base"]["steps"] == {"eval": "COMPLETED"}
    summary = answers["summarize_experiment"]
    assert len(summary["comparisons"]) == 3 and summary["ok"]
    run = workspace / "experiments" / "ranks" / "runs" / "rank2"
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["r"] == 2
    log = "".join(file.read_text() for file in run.glob("slurm-*.out"))  # of the training, and of the evaluation
    assert "with resolved config:" in log and "1|5|Loss:" in log
