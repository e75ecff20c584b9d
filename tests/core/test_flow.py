"""From a question to a summary through the MCP server, with recipes that only pretend to train."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from mcp import Client

from chiplog.server import build_server
from tests.killed import kill_workers

ASK: dict[str, Any] = {
    "question": "Which rank?",
    "name": "ranks",
    "models": {"S": "small", "L": "large"},
    "dataset": "words",
    "variables": {"model": ["S", "L"], "lora_rank": [4, 16]},
}


def calls(steps: Callable[[Client], Any], mode: str = "auto", **client: Any) -> Any:
    """Runs `steps` against a server in memory."""

    async def run() -> Any:
        async with Client(build_server(), mode=mode, **client) as connected:
            return await steps(connected)

    return anyio.run(run)


async def answer(client: Client, tool: str, **arguments: Any) -> dict[str, Any]:
    """The structured answer of a tool that must succeed."""
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content
    assert result.structured_content is not None
    return result.structured_content


async def refusal(client: Client, tool: str, **arguments: Any) -> str:
    """The words of a tool that must refuse."""
    result = await client.call_tool(tool, arguments)
    assert result.is_error, result.structured_content
    return result.content[0].text  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_an_agent_gets_from_a_question_to_a_summary(lab: Path, mode: str):
    async def steps(client: Client) -> None:
        planned = await answer(client, "plan_experiment", **ASK)
        assert [row["run"] for row in planned["rows"]] == [
            "S_rank4", "S_rank16", "L_rank4", "L_rank16", "S_base", "L_base",
        ]  # fmt: skip
        assert planned["totals"]["unknown"] == 6 and planned["totals"]["in_sequence_s"] is None
        assert all(row["estimate"]["elapsed"] is None for row in planned["rows"])
        assert "plan a probe with max_steps 20" in planned["summary"]
        await answer(client, "setup_experiment_dirs", experiment="ranks")
        assert "confirm=true" in await refusal(client, "submit_experiment", experiment="ranks")
        submitted = await answer(client, "submit_experiment", experiment="ranks", confirm=True)
        assert set(submitted["jobs"]) == {row["run"] for row in planned["rows"]}
        status = await answer(client, "experiment_status", experiment="ranks", wait_s=60, log_of="S_rank4")
        assert {run["state"] for run in status["runs"]} == {"COMPLETED"}
        assert status["log_tail"][-1].startswith("1|5|Loss")
        summary = await answer(client, "summarize_experiment", experiment="ranks")
        assert summary["ok"] and {row["run"] for row in summary["rows"]} == set(submitted["jobs"])
        verdicts = {(c["first"], c["second"]): c["shown"] for c in summary["comparisons"]}
        assert verdicts["S_rank4", "S_base"] and verdicts["L_rank16", "L_base"]
        assert not verdicts["S_rank4", "S_rank16"]
        assert any("trained once" in words for words in summary["not_shown"])
        again = await answer(client, "submit_experiment", experiment="ranks", confirm=True)
        assert again["jobs"] == {}

    calls(steps, mode)
    assert (lab / "experiments/ranks/figures/scores.png").read_bytes().startswith(b"\x89PNG")
    assert "not shown" in (lab / "experiments/ranks/summary.md").read_text()


def test_a_second_plan_is_estimated_from_the_first_and_its_error_recorded(lab: Path):
    async def steps(client: Client) -> tuple[dict[str, Any], dict[str, Any]]:
        for name, more in (("first", {}), ("second", {"controls": {"epochs": 2, "seconds_a_step": 0.01}})):
            planned = await answer(client, "plan_experiment", **{**ASK, **more, "name": name})
            await answer(client, "setup_experiment_dirs", experiment=name)
            await answer(client, "submit_experiment", experiment=name, confirm=True)
            await answer(client, "experiment_status", experiment=name, wait_s=60)
        return planned, await answer(client, "collect_records", experiment="second")

    planned, collected = calls(steps)
    basis = {row["run"]: row["estimate"]["elapsed"]["basis"] for row in planned["rows"]}
    assert basis["S_rank4"] == "scaled" and basis["S_base"] == "same-configuration"
    for row in planned["rows"]:
        estimate = row["estimate"]["elapsed"]
        assert estimate["low"] < estimate["value"] < estimate["high"]
        assert all(name.startswith("first/") for name in estimate["evidence"])
    assert all(record["predicted"]["elapsed_s"] and record["usage"]["elapsed_s"] for record in collected["records"])


def test_a_run_that_dies_is_shown_and_only_it_is_submitted_again(lab: Path):
    async def steps(client: Client) -> None:
        runs = [{"lora_rank": 4, "fail_at_step": 3}, {"lora_rank": 16}]
        ask = {**ASK, "models": {"S": "small"}, "variables": None, "runs": runs, "control": "none"}
        planned = await answer(client, "plan_experiment", **ask)
        failing = planned["rows"][0]["run"]
        await answer(client, "setup_experiment_dirs", experiment="ranks")
        await answer(client, "submit_experiment", experiment="ranks", confirm=True)
        status = await answer(client, "experiment_status", experiment="ranks", wait_s=60)
        assert not status["ok"] and failing in status["summary"]
        summary = await answer(client, "summarize_experiment", experiment="ranks")
        row = next(row for row in summary["rows"] if row["run"] == failing)
        assert row["state"] == "FAILED" and "the loss is no number" in row["reason"] and not summary["ok"]
        assert any(words.startswith(f"{failing}: nothing") for words in summary["not_shown"])
        again = await answer(client, "submit_experiment", experiment="ranks", confirm=True)
        assert list(again["jobs"]) == [failing]
        await answer(client, "experiment_status", experiment="ranks", wait_s=60)
        records = (await answer(client, "collect_records", experiment="ranks"))["records"]
        assert {record["run"]: record["attempt"] for record in records}[failing] == 2

    calls(steps)


def test_a_plan_does_not_change_under_its_jobs(lab: Path):
    async def steps(client: Client) -> None:
        await answer(client, "plan_experiment", **ASK)
        await answer(client, "setup_experiment_dirs", experiment="ranks")
        await answer(client, "submit_experiment", experiment="ranks", confirm=True)
        changed = {**ASK, "controls": {"epochs": 3}, "confirm": True}
        assert "another name" in await refusal(client, "plan_experiment", **changed)
        (lab / "recipes").unlink()
        words = await refusal(client, "setup_experiment_dirs", experiment="ranks", confirm=True)
        assert "another name" in words
        status = await answer(client, "experiment_status", experiment="ranks", wait_s=60)
        assert {run["state"] for run in status["runs"]} == {"COMPLETED"}

    calls(steps)


def test_a_metric_that_nothing_scored_is_named_and_not_taken_for_zero(lab: Path):
    async def steps(client: Client) -> None:
        await answer(client, "plan_experiment", **{**ASK, "metrics": ["exactmatch"]})
        await answer(client, "setup_experiment_dirs", experiment="ranks")
        await answer(client, "submit_experiment", experiment="ranks", confirm=True)
        await answer(client, "experiment_status", experiment="ranks", wait_s=60)
        summary = await answer(client, "summarize_experiment", experiment="ranks")
        assert summary["not_shown"][0].startswith("exactmatch: nothing scored it, there are exact_match")
        assert {c["metric"] for c in summary["comparisons"]} == {"exact_match"}

    calls(steps)


@pytest.mark.parametrize("name", ["scores.json", "predictions.jsonl"])
def test_a_result_that_is_not_whole_is_named_with_what_to_do(lab: Path, name: str):
    async def steps(client: Client) -> None:
        await answer(client, "plan_experiment", **ASK)
        await answer(client, "setup_experiment_dirs", experiment="ranks")
        await answer(client, "submit_experiment", experiment="ranks", confirm=True)
        await answer(client, "experiment_status", experiment="ranks", wait_s=60)
        run = lab / "experiments" / "ranks" / "runs" / "S_rank4"
        trained = run / "DONE"
        before = trained.stat().st_mtime_ns
        (run / "eval" / name).write_text('{"half": ')
        # The other runs have their summary.
        summary = await answer(client, "summarize_experiment", experiment="ranks")
        words = summary["not_shown"][0]
        assert words.startswith("S_rank4: ") and name in words and "submit the run again" in words
        assert ("L_rank4", "L_base") in {(c["first"], c["second"]) for c in summary["comparisons"]}
        shutil.rmtree(run / "eval")  # as it says
        assert list((await answer(client, "submit_experiment", experiment="ranks", confirm=True))["jobs"]) == [
            "S_rank4"
        ]
        await answer(client, "experiment_status", experiment="ranks", wait_s=60)
        summary = await answer(client, "summarize_experiment", experiment="ranks")
        assert summary["ok"] and not any(words.startswith("S_rank4: ") for words in summary["not_shown"])
        assert trained.stat().st_mtime_ns == before  # it was only evaluated

    calls(steps)


def test_a_run_whose_settings_are_not_the_plans_is_not_submitted(lab: Path):
    async def steps(client: Client) -> None:
        await answer(client, "plan_experiment", **ASK)
        await answer(client, "setup_experiment_dirs", experiment="ranks")
        await answer(client, "plan_experiment", **{**ASK, "controls": {"epochs": 3}, "confirm": True})
        words = await refusal(client, "submit_experiment", experiment="ranks", confirm=True)
        assert "config.yaml is not what plan.yaml says: set ranks up again" in words
        assert not (lab / "experiments" / "ranks" / "jobs.jsonl").exists()

    calls(steps)


def test_a_link_under_experiments_does_not_lead_out(lab: Path, tmp_path: Path):
    async def steps(client: Client) -> None:
        assert "outside the folders" in await refusal(client, "plan_experiment", **{**ASK, "name": "link"})

    (tmp_path / "outside").mkdir()
    (lab / "experiments").mkdir()
    (lab / "experiments" / "link").symlink_to(tmp_path / "outside")
    calls(steps)
    assert not list((tmp_path / "outside").iterdir())


def test_a_generators_options_cannot_choose_where_it_writes(lab: Path):
    async def steps(client: Client) -> None:
        options = {"words_len": 5, "train_percent": 80, "n": 10}
        for key in ("out", "ou", "out=/x --seed", "--out", "x\0"):
            words = await refusal(client, "create_dataset", study="capitalization", options={**options, key: "/tmp"})
            assert "is no option of a generator" in words
        for study in ("../x", "nothere", ""):
            assert "there is no study" in await refusal(client, "create_dataset", study=study, options=options)

    calls(steps)


def test_a_running_experiment_can_be_watched_and_cancelled(lab: Path):
    async def steps(client: Client) -> None:
        ask = {**ASK, "models": {"S": "small"}, "variables": {"lora_rank": [4, 8, 16]}, "control": "none"}
        await answer(client, "plan_experiment", **{**ask, "controls": {"seconds_a_step": 5}})
        await answer(client, "setup_experiment_dirs", experiment="ranks")
        await answer(client, "submit_experiment", experiment="ranks", confirm=True)
        for _ in range(100):
            status = await answer(client, "experiment_status", experiment="ranks")
            if any(run["state"] == "RUNNING" for run in status["runs"]):
                break
            await anyio.sleep(0.1)
        assert "confirm=true" in await refusal(client, "cancel_experiment", experiment="ranks")
        cancelled = await answer(client, "cancel_experiment", experiment="ranks", confirm=True)
        assert len(cancelled["cancelled"]) == 3
        status = await answer(client, "experiment_status", experiment="ranks", wait_s=60)
        assert {run["state"] for run in status["runs"]} == {"CANCELLED"}
        assert "nothing to cancel" in await refusal(client, "cancel_experiment", experiment="ranks", confirm=True)

    calls(steps)


def test_jobs_go_on_when_the_command_and_the_queue_worker_are_killed(lab: Path):
    async def steps(client: Client) -> None:
        ask = {**ASK, "models": {"S": "small"}, "variables": {"lora_rank": [4]}, "controls": {"seconds_a_step": 0.4}}
        await answer(client, "plan_experiment", **ask)
        await answer(client, "setup_experiment_dirs", experiment="ranks")
        await answer(client, "submit_experiment", experiment="ranks", confirm=True)
        for _ in range(100):
            status = await answer(client, "experiment_status", experiment="ranks")
            if status["runs"][0]["step"]:
                break
            await anyio.sleep(0.1)
        kill_workers(lab.parent / "home" / "local")
        status = await answer(client, "experiment_status", experiment="ranks", wait_s=60)
        assert {run["state"] for run in status["runs"]} == {"COMPLETED"}
        records = (await answer(client, "collect_records", experiment="ranks"))["records"]
        assert [record["attempt"] for record in records] == [1, 1]

    calls(steps)


def test_one_gpu_is_the_default_where_there_are_any(lab: Path):
    async def steps(client: Client) -> None:
        await answer(client, "plan_experiment", **ASK)

    (lab / "chiplog.toml").write_text("[slurm]\n[[gpus]]\nname = 'a100-80gb'\ngres = 'gpu:a100:1'\n")
    calls(steps)
    assert "gpus: 1" in (lab / "experiments" / "ranks" / "plan.yaml").read_text()


def test_a_data_set_that_is_not_there_can_be_made_where_a_study_has_a_generator(lab: Path):
    async def steps(client: Client) -> None:
        words = await refusal(client, "check_dataset", path="words_7L")
        assert "create_dataset makes data sets of the study capitalization" in words

    calls(steps)
