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
    return list(yaml.safe_load_all((ROOT / "recipes" / f"{recipe}.yaml").read_text()))[-1]


def make_llama(folder: Path, **shape: Any) -> Path:
    """A Llama of two layers and width 32 with random weights, its tokenizer and chat template, and nothing learnt."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

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
    LlamaForCausalLM(LlamaConfig(**about | shape)).save_pretrained(folder, max_shard_size=shards)
    return folder


def finetune(settings: dict[str, Any], out: Path, stop: Any = Never) -> Any:
    """Runs the recipe in this process as far as `stop` lets it; returns its `Finetuning`."""
    recipe = load("recipes/lora_finetune_single_device.py")
    out.mkdir(parents=True, exist_ok=True)
    run = recipe.Finetuning(recipe.checked(SimpleNamespace(**settings)), out)
    run.train(stop)
    return run


def start(script: str, settings: dict[str, Any], out: Path, *arguments: str) -> subprocess.Popen[str]:
    """Runs a script as a job does, with a config.yaml in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, str(ROOT / script), "--config", str(out / "config.yaml"), "--out", str(out), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=out, env=environment, text=True, stdout=pipe, stderr=pipe)


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind in metrics.jsonl."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def adapter(out: Path) -> dict[str, Any]:
    """The tensors of the adapter that a run wrote."""
    from safetensors.torch import load_file

    return load_file(out / "adapter" / "adapter_model.safetensors")
