"""The MCP face: schemas, words for wrong arguments, questions to the user, progress, answers within a budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mcp import Client

from tests.core.test_flow import ASK, answer, calls, refusal


def test_every_tool_has_an_output_schema_annotations_and_refuses_a_misspelt_argument(lab: Path):
    async def steps(client: Client) -> None:
        tools = (await client.list_tools()).tools
        assert len(tools) == 22
        for tool in tools:
            assert tool.output_schema and tool.output_schema["type"] == "object"
            assert {"summary", "next", "ok"} <= tool.output_schema["properties"].keys()
            assert tool.annotations and tool.annotations.read_only_hint is not None
            assert tool.description and "progress" not in tool.input_schema["properties"]
            words = await refusal(client, tool.name, experimnet="x")
            assert "experimnet" in words and "not permitted" in words

    calls(steps)


def test_a_wrong_argument_comes_back_as_words_that_say_how_to_mend_it(lab: Path):
    async def steps(client: Client) -> None:
        asks = {
            "did you mean 'lora_rank'": {"controls": {"lora_rnak": 4}},
            "cannot be a folder and a job name": {"name": 'a"; rm -rf $(x)\n'},
            "There are": {"models": {"S": "smal"}},
            "no data set": {"dataset": "wrods"},
            "two runs are called": {"variables": {"lora_rank": [4, 4]}},
            "does not divide batch_size": {"controls": {"batch_size": 16, "micro_batch_size": 3}},
            "outside the folders": {"dataset": "/etc/passwd"},
            "chiplog.toml has no GPU": {"gpus": 1, "gpu": "h900"},
            "asks for 2 GPUs and this machine has 0": {"gpus": 2},
            "no split 'tset'": {"controls": {"eval_split": "tset"}},
            "lora_rank is 'four'": {"controls": {"lora_rank": "four"}, "variables": {"lr": [1e-4]}},
        }
        for words, change in asks.items():
            ask = {**ASK, "models": {"S": "small"}, "variables": {"lora_rank": [4, 8]}, **change}
            assert words in await refusal(client, "plan_experiment", **ask)
        assert "no experiment 'nothere'" in await refusal(client, "experiment_status", experiment="nothere")

    calls(steps)
    assert not (lab / "experiments").exists()


def test_the_user_is_asked_where_the_client_can_ask(lab: Path):
    asked: list[str] = []

    def answering(agreed: bool) -> Any:
        from mcp_types import ElicitResult

        async def ask(context: Any, params: Any) -> ElicitResult:
            asked.append(params.message)
            return ElicitResult(action="accept", content={"agreed": agreed})

        return ask

    async def prepare(client: Client) -> None:
        await answer(client, "plan_experiment", **{**ASK, "models": {"S": "small"}, "variables": {"lora_rank": [4]}})
        await answer(client, "setup_experiment_dirs", experiment="ranks")

    async def refused(client: Client) -> str:
        return await refusal(client, "submit_experiment", experiment="ranks")

    async def accepted(client: Client) -> dict[str, Any]:
        return await answer(client, "submit_experiment", experiment="ranks")

    calls(prepare)
    for mode in ("auto", "legacy"):
        assert "did not agree" in calls(refused, mode, elicitation_callback=answering(False))
    assert len(calls(accepted, "auto", elicitation_callback=answering(True))["jobs"]) == 2
    assert len(asked) == 3 and all(message.startswith("Submit 2 runs") for message in asked)


@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_a_changed_plan_and_folder_are_written_over_after_a_yes_to_the_diff(lab: Path, mode: str):
    asked: list[str] = []
    agreed = False

    async def ask(context: Any, params: Any) -> Any:
        from mcp_types import ElicitResult

        asked.append(params.message)
        return ElicitResult(action="accept", content={"agreed": agreed})

    changed = {**ASK, "controls": {"epochs": 3}}
    config = lab / "experiments" / "ranks" / "runs" / "S_rank4" / "config.yaml"

    async def prepare(client: Client) -> None:
        await answer(client, "plan_experiment", **ASK)
        await answer(client, "setup_experiment_dirs", experiment="ranks")

    async def refused(client: Client) -> None:
        assert "did not agree" in await refusal(client, "plan_experiment", **changed)

    async def accepted(client: Client) -> None:
        await answer(client, "plan_experiment", **changed)
        await answer(client, "setup_experiment_dirs", experiment="ranks")

    calls(prepare)
    before = (lab / "experiments" / "ranks" / "plan.yaml").read_bytes()
    calls(refused, mode, elicitation_callback=ask)
    assert (lab / "experiments" / "ranks" / "plan.yaml").read_bytes() == before and "epochs: 1" in config.read_text()
    agreed = True
    calls(accepted, mode, elicitation_callback=ask)
    assert "epochs: 3" in config.read_text()
    assert len(asked) == 3 and "+" in asked[0] and "epochs: 3" in asked[0] and "Overwrite them?" in asked[2]


def test_a_long_tool_reports_progress(lab: Path):
    seen: list[tuple[float, float | None, str | None]] = []

    async def note(progress: float, total: float | None, message: str | None) -> None:
        seen.append((progress, total, message))

    async def steps(client: Client) -> None:
        await answer(client, "plan_experiment", **{**ASK, "models": {"S": "small"}, "variables": {"lora_rank": [4]}})
        await answer(client, "setup_experiment_dirs", experiment="ranks")
        await answer(client, "submit_experiment", experiment="ranks", confirm=True)
        arguments = {"experiment": "ranks", "wait_s": 60}
        await client.call_tool("experiment_status", arguments, progress_callback=note)

    calls(steps)
    assert seen[-1][:2] == (2.0, 2.0) and len(seen) > 1


def test_an_answer_stays_within_its_budget(lab: Path):
    async def steps(client: Client) -> tuple[dict[str, Any], str, dict[str, Any]]:
        many = {**ASK, "variables": {"model": ["S", "L"], "lora_rank": list(range(1, 251))}}
        result = await client.call_tool("plan_experiment", many)
        few = await answer(client, "plan_experiment", **{**ASK, "limit": 2, "name": "few"})
        return result.structured_content, result.content[0].text, few  # pyright: ignore

    planned, text, few = calls(steps)
    assert planned["totals"]["runs"] == 502 and len(planned["rows"]) == 50
    assert "and 452 more" in text and text.startswith(planned["summary"])
    assert len(text) < 10_000 and len(json.dumps(planned)) < 60_000
    assert len(few["rows"]) == 2 and "and 4 more" in few["summary"] and few["totals"]["runs"] == 6
