"""What the tests of the recipes do again and again: make a tiny Llama, run a recipe, read what it wrote."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import yaml

from trainer import job

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "recipes"))  # as when Python runs a recipe by its path


class Never:
    """A stop that nobody asks for."""

    asked = False


def load(path: str) -> ModuleType:
    """A file of the repository as a module, from its path as a job has it."""
    parent, name = Path(path).parent, Path(path).stem
    if parent == Path("recipes"):
        return import_module(name)
    spec = importlib.util.spec_from_file_location(f"tested_{name}", ROOT / path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def defaults(recipe: str) -> dict[str, Any]:
    """Every setting of a recipe with its default."""
    return job.default_settings(ROOT / "recipes" / f"{recipe}.yaml")


def make_llama(folder: Path, **shape: Any) -> Path:
    """A Llama of two layers and width 32 with random weights, its tokenizer and chat template, and nothing learnt."""
    return make_model(folder, "llama", **shape)


def make_model(folder: Path, family: str, **shape: Any) -> Path:
    """The same of any model_type that transformers knows."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shards = shape.pop("max_shard_size", "1GB")
    folder.mkdir(parents=True)
    ids = load("tasks/capitalization/make_base_models.py").write_tokenizer(folder)
    about = {
        "vocab_size": len(ids),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,  # far from uniform answers
        "eos_token_id": ids["<|end|>"],
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **about | shape))
    for name, weight in model.named_parameters():  # transformers begins biases with 0 and norms with their identity
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(weight, mean=weight.detach().mean().item(), std=0.2)
    model.save_pretrained(folder, max_shard_size=shards)
    return folder


def finetune(settings: dict[str, Any], out: Path, stop: Any = Never) -> Any:
    """Runs a recipe on one device in this process as far as `stop` lets it; returns its `Finetuning`."""
    run = begin(settings, out)
    run.train(stop)
    return run


def begin(settings: dict[str, Any], out: Path) -> Any:
    """A `Finetuning` that has made no step yet."""
    recipe, ranks = load("recipes/finetuning.py"), import_module("trainer.ranks")
    out.mkdir(parents=True, exist_ok=True)
    config = recipe.checked(SimpleNamespace(**settings))
    return recipe.Finetuning(config, out, ranks.Ranks(job.pick_device(config.device)), "lora_finetune_single_device")


def start(
    script: str | Path, settings: dict[str, Any], out: Path, *arguments: str, **environment: str
) -> subprocess.Popen[str]:
    """Runs a script as a job does, with a config.yaml in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, str(ROOT / script), "--config", str(out / "config.yaml"), "--out", str(out), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=out, env=environment, text=True, stdout=pipe, stderr=pipe)


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind in metrics.jsonl."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def adapter(out: Path, folder: str = "adapter") -> dict[str, Any]:
    """The tensors of the adapter that a run wrote."""
    from safetensors.torch import load_file

    return load_file(out / folder / "adapter_model.safetensors")


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two adapters are equal bit for bit."""
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def write_splits(file: Path) -> Path:
    """A data set of 40 words to train on, 10 to validate and 8 to test on."""
    words = [("abcdefgh" * 2)[i % 8 : i % 8 + 2 + i % 5] + "xyz"[i % 3] for i in range(58)]
    rows = [{"input": word, "output": word.capitalize()} for word in words]
    file.write_text(json.dumps({"train": rows[:40], "validation": rows[40:50], "test": rows[50:]}))
    return file
