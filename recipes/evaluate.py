"""Asks a model, with or without a LoRA adapter, the prompts of a data set and scores its answers.

    python evaluate.py --config config.yaml [--adapter adapter] [--out eval]

evaluate.yaml explains the settings; config.yaml gives all of them and may hold the recipe's too. Into --out go
    predictions.jsonl  a row of the split a line: index, prompt, target, output, scores
    scores.json        how many answers are right, of how many; written last
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from trainer import job

# isort: split
import torch
from adapters import DTYPES, load_model, merge_adapter
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel

from trainer.chat import ChatError, ChatTokenizer, answer_of, messages_of
from trainer.job import UserError
from trainer.rows import read_rows

Score = Callable[[str, str], dict[str, bool]]


@dataclass(frozen=True)
class Item:
    """One question: its row number, the tokens the model is given, what was asked and what should be answered."""

    index: int
    prompt_ids: list[int]
    prompt: str
    target: str


def main() -> int:
    """Exit code 0, when predictions and scores are written."""
    parser = argparse.ArgumentParser(description="Answers the prompts of a data set and scores the answers.")
    parser.add_argument("--config", type=Path, required=True, help="YAML file with every setting")
    parser.add_argument("--adapter", type=Path, help="LoRA adapter as PEFT stores it; without: the model as it is")
    parser.add_argument("--out", type=Path, default=Path("eval"), help="folder to write to")
    arguments = parser.parse_args()
    config = checked(job.read_config(arguments.config, Path(__file__).with_suffix(".yaml")))
    evaluate(config, arguments.adapter, arguments.out)
    return 0


def evaluate(config: SimpleNamespace, adapter: Path | None, out: Path) -> dict[str, Any]:
    """Writes predictions and scores to `out` and returns the scores. Raises UserError, ChatError and RowsError."""
    started, device = job.started(), job.pick_device(config.device)
    model_dir, dataset = job.folder_of(config, "model"), job.folder_of(config, "dataset")
    score = load_scorer(config.scorer)
    tokenizer = ChatTokenizer(model_dir)
    rows = list(islice(read_rows(dataset, config.eval_split), config.eval_limit))
    items = [make_item(i, row, tokenizer, config) for i, row in enumerate(rows)]
    model = load_model(model_dir, DTYPES[config.dtype])
    if adapter is not None:
        merge_adapter(model, adapter)
    model.to(device)  # pyright: ignore[reportArgumentType]

    setup_s, began = job.age_s(), time.perf_counter()
    answers = answer(model, tokenizer, [item.prompt_ids for item in items], config)
    outputs = [tokenizer.decode(ids) for ids in answers]
    scores = [score(output, item.target) for output, item in zip(outputs, items, strict=True)]
    out.mkdir(parents=True, exist_ok=True)
    (out / "scores.json").unlink(missing_ok=True)  # an earlier evaluation's, of other predictions
    with (out / "predictions.jsonl").open("w", encoding="utf-8") as file:
        for item, output, marks in zip(items, outputs, scores, strict=True):
            asked = {"index": item.index, "prompt": item.prompt, "target": item.target}
            file.write(json.dumps({**asked, "output": output, "scores": marks}, ensure_ascii=False) + "\n")
    result = {
        "split": config.eval_split,
        "n": len(items),
        "scores": {name: {"count": sum(s[name] for s in scores), "n": len(items)} for name in scores[0]},
        "adapter": adapter is not None,
        "started": started,
        "ended": job.now(),
        "setup_s": setup_s,
        "seconds": time.perf_counter() - began,
        "generated_tokens": sum(map(len, answers)),
        "prompt_tokens": sum(len(item.prompt_ids) for item in items),
        **job.peak_memory(device),
        "device": job.describe_device(device)["device"],
        # Two evaluations with the same hash answered the same rows, so they can be compared pairwise.
        "dataset_sha256_of_items": hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest(),
    }
    job.write_json(out / "scores.json", result)
    for name, counted in result["scores"].items():
        print(f"{name}: {counted['count']} of {counted['n']}")
    return result


def checked(config: SimpleNamespace) -> SimpleNamespace:
    """The settings, if they can be used. Raises UserError."""
    job.check_choice(config, "dtype", DTYPES)
    job.check_numbers(config, ["eval_batch_size", "max_new_tokens", "eval_limit"], int, 1)
    return config


def make_item(index: int, row: dict[str, Any], tokenizer: ChatTokenizer, config: SimpleNamespace) -> Item:
    """The question of one row. Raises ChatError that names the row, as for one without an answer."""
    try:
        messages = messages_of(row, config.system_prompt, config.prompt)
        target = answer_of(messages)
        if target is None:
            raise ChatError("there is no assistant message to score the output against")
        asked = [message["content"] for message in messages if message["role"] == "user"]
        return Item(index, tokenizer.prompt_ids(messages), asked[-1] if asked else "", target)
    except ChatError as error:
        raise ChatError(f"{config.dataset}, {config.eval_split} row {index}: {error}") from error


def load_scorer(file: str | None) -> Score:
    """`score` of a Python file, whose path starts at the code's root unless absolute; null: the built-in one."""
    if file is None:
        return built_in_score
    path = Path(__file__).resolve().parents[1] / file
    if not path.is_file():
        raise UserError(f"scorer {path} is not there: give the path of a Python file with score(output, target)")
    spec = importlib.util.spec_from_file_location("scorer", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "score", None)):
        raise UserError(f"scorer {path} has no function score(output, target)")
    return module.score


def built_in_score(output: str, target: str) -> dict[str, bool]:
    """Whether the output is the target, and whether it contains it; upper and lower case differ."""
    output, target = output.strip(), target.strip()
    return {"exact_match": output == target, "includes": target in output}


@torch.inference_mode()
def answer(
    model: PreTrainedModel, tokenizer: ChatTokenizer, prompts: list[list[int]], config: SimpleNamespace
) -> list[list[int]]:
    """The greedy answer to each prompt, in the order of the prompts, without its end token and what follows."""
    # All that a model's own generation_config.json sets (temperature, penalties) is left behind.
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=config.max_new_tokens,
        eos_token_id=tokenizer.eos_ids,
        pad_token_id=tokenizer.pad_id,
    )
    answers: list[list[int]] = [[] for _ in prompts]
    # Prompts of like length together: less padding, and the longest first, so that memory runs out at once if at all.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    interval = 0.1 if sys.stderr.isatty() else 10.0
    with tqdm(total=len(prompts), desc="Answering", mininterval=interval) as bar:
        for first in range(0, len(order), config.eval_batch_size):
            chosen = order[first : first + config.eval_batch_size]
            width = len(prompts[chosen[0]])
            ids = [[tokenizer.pad_id] * (width - len(prompts[i])) + prompts[i] for i in chosen]
            mask = [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen]
            written = model.generate(  # pyright: ignore[reportCallIssue]
                torch.tensor(ids, device=model.device), attention_mask=torch.tensor(mask, device=model.device)
            )
            for i, new in zip(chosen, written[:, width:].tolist(), strict=True):
                ends = [at for at, token in enumerate(new) if token in tokenizer.eos_ids]
                answers[i] = new[: ends[0]] if ends else new
            bar.update(len(chosen))
    return answers


if __name__ == "__main__":
    job.run(main)
