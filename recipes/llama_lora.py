"""A Llama in Hugging Face format as a torchtune model with LoRA, and its adapter as PEFT stores it.

Everything that knows how torchtune builds and names a Llama is here; recipes import it as their neighbour.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchtune import training
from torchtune.models.convert_weights import hf_to_tune, tune_to_peft_adapter_weights
from torchtune.models.llama3_2._component_builders import lora_llama3_2
from torchtune.modules import RMSNorm, TransformerDecoder
from torchtune.modules.peft import LORA_ATTN_MODULES, get_adapter_params, set_trainable_params

from trainer import job
from trainer.job import UserError

MLP = ["gate_proj", "up_proj", "down_proj"]
# PEFT's names: torchtune's
ATTENTION: dict[str, LORA_ATTN_MODULES] = {
    "q_proj": "q_proj",
    "k_proj": "k_proj",
    "v_proj": "v_proj",
    "o_proj": "output_proj",
}
# torchtune/models/llama3_1/_position_embeddings.py; every Llama 3.1, 3.2 and 3.3 has these.
ROPE = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}


def check_targets(targets: list[str]) -> None:
    """Raises UserError for a choice of `lora_targets` that torchtune's builder cannot make."""
    if unknown := [target for target in targets if target not in [*ATTENTION, *MLP]]:
        raise UserError(f"lora_targets has {', '.join(unknown)}: choose from {', '.join([*ATTENTION, *MLP])}")
    if not set(targets) & set(ATTENTION):
        raise UserError(f"lora_targets needs at least one of {', '.join(ATTENTION)}")
    if 0 < len(set(targets) & set(MLP)) < len(MLP):
        raise UserError(f"lora_targets has some of {', '.join(MLP)}: give all three or none")


def llama_shape(model_dir: Path, max_seq_len: int) -> dict[str, Any]:
    """torchtune's names for the shape in `config.json`. Raises UserError for a model that torchtune cannot build."""
    file = model_dir / "config.json"
    if not file.is_file():
        raise UserError(f"{file} is missing: model must be a folder in Hugging Face format")
    hf = json.loads(file.read_text(encoding="utf-8"))
    if hf.get("model_type") != "llama":
        raise UserError(f"{file}: model_type is {hf.get('model_type')!r}; this recipe trains Llama 2 and 3 (llama)")
    heads, width = hf["num_attention_heads"], hf["hidden_size"]
    unbuildable = {
        "attention_bias": hf.get("attention_bias", False),
        "mlp_bias": hf.get("mlp_bias", False),
        "hidden_act": hf.get("hidden_act", "silu") != "silu",
        "head_dim": (hf.get("head_dim") or width // heads) * heads != width,
    }
    if wrong := [f"{name} {hf[name]!r}" for name, is_wrong in unbuildable.items() if is_wrong]:
        raise UserError(f"{file} has {', '.join(wrong)}, which torchtune's Llama does not have: choose another model")
    if max_seq_len > (longest := hf["max_position_embeddings"]):
        raise UserError(f"max_seq_len is {max_seq_len}, but the model reads {longest} tokens: lower max_seq_len")
    # transformers 5 writes rope_parameters, before it wrote rope_theta and rope_scaling.
    rope = hf.get("rope_parameters") or {"rope_theta": hf.get("rope_theta", 10_000.0), **(hf.get("rope_scaling") or {})}
    return {
        "vocab_size": hf["vocab_size"],
        "num_layers": hf["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": hf.get("num_key_value_heads") or heads,
        "embed_dim": width,
        "intermediate_dim": hf["intermediate_size"],
        "max_seq_len": max_seq_len,
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "rope_base": rope["rope_theta"],
        "scale_factor": _scale_factor(rope, file),
        "tie_word_embeddings": hf.get("tie_word_embeddings", False),
    }


def load_model(
    model_dir: Path, shape: dict[str, Any], config: SimpleNamespace, device: torch.device
) -> TransformerDecoder:
    """The frozen model with a new adapter, all but the norms in `config.dtype`; only the adapter is trainable.

    Raises UserError when a weight is missing or the hardware lacks the dtype.
    """
    try:
        dtype = training.get_dtype(config.dtype, device=device)
    except RuntimeError as error:
        raise UserError(f"{device} cannot compute in {config.dtype}: set dtype to fp32") from error
    with training.set_default_dtype(dtype), device:
        model = lora_llama3_2(
            lora_attn_modules=[ATTENTION[target] for target in config.lora_targets if target in ATTENTION],
            apply_lora_to_mlp=MLP[0] in config.lora_targets,
            lora_rank=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            **shape,
        )
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.float()  # torchtune normalises in float32, and torch fuses that only with a float32 scale
    adapter = get_adapter_params(model)
    set_trainable_params(model, adapter)
    missing = set(model.state_dict()) - set(adapter)
    for file in weight_files(model_dir):
        weights = hf_to_tune(load_file(file), **_dims(shape))
        if shape["tie_word_embeddings"]:
            weights.pop("output.weight", None)
        model.load_state_dict(weights, strict=False)
        missing -= set(weights)
    if missing:
        raise UserError(f"{model_dir} lacks the weights of {', '.join(sorted(missing)[:3])}...: download it again")
    return model


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files of a model folder, shard by shard. Raises UserError when one is missing."""
    index = model_dir / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    files = [model_dir / name for name in sorted(names)]
    if gone := [file for file in files if not file.is_file()]:
        raise UserError(f"{gone[0]} is missing: download the model's safetensors files")
    return files


def save_adapter(folder: Path, adapter: Mapping[str, Tensor], shape: dict[str, Any], config: SimpleNamespace) -> None:
    """Writes `adapter_model.safetensors` and `adapter_config.json` as PEFT reads them, both or neither."""
    weights = {name: weight.detach().cpu() for name, weight in adapter.items()}
    peft = {name: w.contiguous() for name, w in tune_to_peft_adapter_weights(weights, **_dims(shape)).items()}
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.model,
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": config.lora_targets,
        "bias": "none",
        "inference_mode": True,
    }
    with job.whole_folder(folder) as beside:
        save_file(peft, beside / "adapter_model.safetensors", metadata={"format": "pt"})
        job.write_json(beside / "adapter_config.json", about)


def _scale_factor(rope: dict[str, Any], file: Path) -> float:
    """How far the rotary embedding is stretched; 1 is not at all. Raises UserError for a kind torchtune lacks."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return 1
    others = {name: rope.get(name) for name, value in ROPE.items() if rope.get(name) != value}
    if kind != "llama3" or others:
        raise UserError(
            f"{file}: torchtune's Llama has no rope of type {kind}{f' with {others}' if others else ''}; "
            f"it has default, and llama3 with {ROPE}: choose another model"
        )
    return rope["factor"]


def _dims(shape: dict[str, Any]) -> dict[str, int]:
    return {"num_heads": shape["num_heads"], "num_kv_heads": shape["num_kv_heads"], "dim": shape["embed_dim"]}
