"""The evaluation: the adapter it applies, the answers it takes and the scores it writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.recipes.helpers import finetune, load, make_llama, start
from trainer.chat import ChatError, ChatTokenizer
from trainer.job import UserError

EVERY_TARGET = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def evaluation():
    return load("recipes/evaluate.py")


def score(evaluation: Any, settings: dict, out: Path, adapter: Path | None = None) -> tuple[dict, list[dict]]:
    """The scores and the predictions."""
    scores = evaluation.evaluate(evaluation.checked(SimpleNamespace(**settings)), adapter, out)
    assert json.loads((out / "scores.json").read_text()) == scores
    return scores, [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("targets", [EVERY_TARGET, ["k_proj"]], ids=["every target", "k_proj alone"])
def test_the_merged_adapter_computes_what_the_trained_model_does(
    evaluation: Any, targets: list[str], settings: dict, llama: Path, tmp_path: Path
):
    run = finetune(settings | {"lora_targets": targets, "lora_alpha": 5}, tmp_path)
    tokens = torch.randint(0, 250, (2, 40), generator=torch.Generator().manual_seed(1))
    model = evaluation.load_model(llama, torch.float32)
    with torch.no_grad():
        base = model(tokens).logits
        evaluation.merge_adapter(model, tmp_path / "adapter")
        merged = model(tokens).logits
        trained = torch.cat(run.model(tokens), dim=1)
    torch.testing.assert_close(merged, trained, atol=1e-4, rtol=1e-4)
    assert (merged - base).abs().max() > 0.01


def test_training_and_evaluation_give_the_model_the_same_prompt(evaluation: Any, settings: dict, tmp_path: Path):
    settings |= {"system_prompt": "Be brief.", "prompt": "Say {input}!"}
    trained = finetune(settings | {"max_steps": 1}, tmp_path).samples
    rows = json.loads(Path(settings["dataset"]).read_text())["train"]
    tokenizer = ChatTokenizer(settings["model"])
    asked = [evaluation.make_item(0, row, tokenizer, SimpleNamespace(**settings)) for row in rows]
    assert [item.prompt_ids for item in asked] == [sample.ids[: sample.n_prompt] for sample in trained]


def test_answers_in_batches_are_those_of_one_prompt_at_a_time(evaluation: Any, settings: dict, llama: Path):
    tokenizer, model = ChatTokenizer(llama), evaluation.load_model(llama, torch.float32)
    prompts = [tokenizer.prompt_ids([{"role": "user", "content": "ab" * n}]) for n in (3, 1, 7, 2)]
    many, one = (SimpleNamespace(max_new_tokens=6, eval_batch_size=size) for size in (3, 1))
    together = evaluation.answer(model, tokenizer, prompts, many)
    assert together == evaluation.answer(model, tokenizer, prompts, one)
    # By hand, without a cache: the most likely token after all that was written.
    for prompt, answer in zip(prompts, together, strict=True):
        written = list(prompt)
        for token in answer:
            with torch.no_grad():
                assert model(torch.tensor([written])).logits[0, -1].argmax().item() == token
            written.append(token)


def test_predictions_keep_the_order_of_the_rows_and_scores_count_them(evaluation: Any, settings: dict, tmp_path: Path):
    settings |= {"max_new_tokens": 4, "eval_batch_size": 3, "prompt": "Say {input}"}
    scores, predictions = score(evaluation, settings, tmp_path / "eval")
    rows = json.loads(Path(settings["dataset"]).read_text())["test"]
    assert [line["index"] for line in predictions] == list(range(8))
    assert [line["prompt"] for line in predictions] == [f"Say {row['input']}" for row in rows]
    assert [line["target"] for line in predictions] == [row["output"] for row in rows]
    for name in ("exact_match", "includes"):
        assert scores["scores"][name] == {"count": sum(line["scores"][name] for line in predictions), "n": 8}
    assert (scores["split"], scores["n"], scores["adapter"]) == ("test", 8, False)
    assert scores["prompt_tokens"] == sum(len(line["prompt"]) + 4 for line in predictions)
    assert 0 < scores["generated_tokens"] <= 32

    # A second evaluation takes the place of the first; fewer rows are other items.
    limited, first = score(evaluation, settings | {"eval_limit": 3}, tmp_path / "eval")
    assert first == predictions[:3]
    assert limited["dataset_sha256_of_items"] != scores["dataset_sha256_of_items"]


def test_the_models_own_sampling_settings_do_not_reach_the_answers(
    evaluation: Any, settings: dict, llama: Path, tmp_path: Path
):
    folder = shutil.copytree(llama, tmp_path / "model")
    about = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0, "max_new_tokens": 1, "eos_token_id": 258}
    (folder / "generation_config.json").write_text(json.dumps(about))
    settings |= {"max_new_tokens": 5}
    plain = score(evaluation, settings, tmp_path / "plain")[1]
    assert score(evaluation, settings | {"model": str(folder)}, tmp_path / "own")[1] == plain


def test_a_scorer_of_ones_own_marks_the_answers(evaluation: Any, settings: dict, tmp_path: Path):
    scorer = tmp_path / "mine.py"
    scorer.write_text("def score(output, target):\n    return {'short': len(target) < 5}\n")
    settings |= {"scorer": str(scorer), "max_new_tokens": 1}
    scores, predictions = score(evaluation, settings, tmp_path / "eval")
    short = sum(len(line["target"]) < 5 for line in predictions)
    assert scores["scores"] == {"short": {"count": short, "n": 8}}
    settings |= {"scorer": "tasks/capitalization/evaluate.py"}
    assert list(score(evaluation, settings, tmp_path / "eval")[0]["scores"]) == ["exact_match", "includes"]


def test_the_job_writes_scores_of_a_trained_adapter(settings: dict, tmp_path: Path):
    finetune(settings | {"max_steps": 2}, tmp_path)
    job = start("recipes/evaluate.py", settings, tmp_path / "eval", "--adapter", str(tmp_path / "adapter"))
    said, log = job.communicate(timeout=120)
    assert job.returncode == 0, log
    scores = json.loads((tmp_path / "eval" / "scores.json").read_text())
    assert (scores["n"], scores["adapter"]) == (8, True)
    assert said == "".join(f"{name}: {each['count']} of 8\n" for name, each in scores["scores"].items())
    assert "Traceback" not in log and len(log) < 2_000


def test_what_cannot_be_evaluated_is_refused_in_words(evaluation: Any, settings: dict, tmp_path: Path):
    def refused(error: type[Exception], words: str, adapter: Path | None = None, **changes: Any) -> None:
        with pytest.raises(error, match=words):
            score(evaluation, settings | changes, tmp_path / "eval", adapter)
        assert not (tmp_path / "eval" / "scores.json").exists()

    refused(ValueError, "has no split validation", eval_split="validation")
    refused(UserError, "eval_limit is 0: give a whole number", eval_limit=0)
    refused(UserError, "scorer .* is not there", scorer="tasks/none.py")
    refused(UserError, r"adapter_config\.json is missing: train first", tmp_path / "none")

    unanswered = tmp_path / "chats.json"
    asked = {"messages": [{"role": "user", "content": "a"}]}
    unanswered.write_text(json.dumps({"test": [asked]}))
    refused(ChatError, "test row 0: there is no assistant message", dataset=str(unanswered))


def test_an_adapter_of_another_model_or_kind_is_refused(evaluation: Any, settings: dict, llama: Path, tmp_path: Path):
    finetune(settings | {"max_steps": 1}, tmp_path)
    other = make_llama(tmp_path / "wide", hidden_size=64)
    with pytest.raises(UserError, match=r"adapts model\.layers\.0\.\S+ as \(.*\), the model has"):
        evaluation.merge_adapter(evaluation.load_model(other, torch.float32), tmp_path / "adapter")
    about = tmp_path / "adapter" / "adapter_config.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"use_rslora": True}))
    with pytest.raises(UserError, match="is no plain LoRA adapter"):
        evaluation.merge_adapter(evaluation.load_model(llama, torch.float32), tmp_path / "adapter")
