"""A model as transformers loads it, and a LoRA or DoRA adapter added to its weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from trainer.job import UserError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load_model(model_dir: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder, never of the network. Raises UserError when it cannot be read."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{model_dir} cannot be read: {error}") from error


@torch.no_grad()
def merge_adapter(model: PreTrainedModel, folder: Path) -> None:
    """W' = W + (alpha / r) B A in float32, for every adapted layer: the LoRA of https://arxiv.org/abs/2106.09685.

    With DoRA each row of W' is then brought to the length that was learnt: https://arxiv.org/abs/2402.09353, eq. 5.
    Raises UserError for an adapter that is not there, does not fit the model or is of another kind.
    """
    files = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if gone := [file for file in files if not file.is_file()]:
        raise UserError(f"{gone[0]} is missing: train first, or leave out --adapter")
    about = json.loads(files[0].read_text(encoding="utf-8"))
    kinds = ("use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")
    if about.get("peft_type") != "LORA" or any(about.get(kind) for kind in kinds):
        raise UserError(f"{files[0]} is no plain LoRA adapter ({', '.join(kinds)} must be off)")
    parts = ["lora_A.weight", "lora_B.weight", *["lora_magnitude_vector"] * bool(about.get("use_dora"))]
    weights = load_file(files[1])
    layers = [name.removesuffix(".lora_A.weight") for name in weights if name.endswith(".lora_A.weight")]
    if {f"{layer}.{part}" for layer in layers for part in parts} != set(weights):
        raise UserError(f"{files[1]} holds other weights than {', '.join(parts)} of each layer that it adapts")
    for layer in layers:
        down, up, *length = (weights[f"{layer}.{part}"].float() for part in parts)
        change = about["lora_alpha"] / about["r"] * (up @ down)
        name = layer.removeprefix("base_model.model.")
        try:
            weight = model.get_parameter(f"{name}.weight")
        except AttributeError as error:
            raise UserError(f"{folder} adapts {name}, which the model does not have: it is another model's") from error
        if weight.shape != change.shape:
            raise UserError(f"{folder} adapts {name} as {tuple(change.shape)}, the model has {tuple(weight.shape)}")
        merged = weight.float() + change
        if length:
            merged *= (length[0] / merged.norm(dim=1))[:, None]
        weight.copy_(merged.to(weight.dtype))
