"""Brings a trained Transformer into Hugging Face format, and a model in that format back.

    python -m trainer.export --run DIR --out MODEL_DIR        a finished training as a model folder
    python -m trainer.export --model MODEL_DIR --out DIR      a model folder as what train.py leaves in model/

Two shapes have a counterpart: GPT-2 (learned positions, LayerNorm before each block, gelu) and Llama (rotary positions,
RMSNorm before each block, swiglu, no biases). What a parametrisation multiplies is written into the weights.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from trainer import job

# isort: split
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.checkpoints import save_model
from trainer.job import UserError
from trainer.models import build
from trainer.sample import load_run
from trainer.shape import Shape
from trainer.transformer import ROTARY_BASE, Transformer

Weights = dict[str, Tensor]
# Ours: theirs.
GPT2 = {
    "embedding": "transformer.wte", "positions": "transformer.wpe", "norm": "transformer.ln_f", "readout": "lm_head",
    "norm1": "ln_1", "norm2": "ln_2", "attention.qkv": "attn.c_attn", "attention.out": "attn.c_proj",
    "feed_forward.up": "mlp.c_fc", "feed_forward.down": "mlp.c_proj",
}  # fmt: skip
LLAMA = {
    "embedding": "model.embed_tokens", "norm": "model.norm", "readout": "lm_head",
    "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
    "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj", "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj", "feed_forward.gate": "mlp.gate_proj", "feed_forward.value": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}  # fmt: skip
SPLIT = {
    "attention.qkv": ("attention.q", "attention.k", "attention.v"),
    "feed_forward.up": ("feed_forward.gate", "feed_forward.value"),
}


def main() -> int:
    """Exit code 0, when the folder is there."""
    parser = argparse.ArgumentParser(description="Models to and from Hugging Face format.", allow_abbrev=False)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="folder of a finished training")
    source.add_argument("--model", type=Path, help="folder of a model in Hugging Face format")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to; must not be there")
    arguments = parser.parse_args()
    if arguments.out.exists():
        raise UserError(f"{arguments.out} is there already: remove it, or give another --out")
    if arguments.run:
        export(arguments.run, arguments.out)
    else:
        bring_back(arguments.model, arguments.out)
    print(arguments.out)
    return 0


def family(shape: Shape) -> str:
    """gpt2 or llama. Raises UserError for a shape that neither has."""
    kind = (shape.position, shape.norm, shape.norm_position, shape.activation)
    if shape.architecture == "transformer" and kind == ("learned", "layernorm", "pre", "gelu"):
        return "gpt2"
    if shape.architecture == "transformer" and kind == ("rotary", "rmsnorm", "pre", "swiglu") and not shape.bias:
        return "llama"
    raise UserError(
        f"a {shape.architecture} of {', '.join(kind)}, bias {str(shape.bias).lower()}, has no counterpart: GPT-2 is "
        "learned, layernorm, pre, gelu; Llama is rotary, rmsnorm, pre, swiglu without bias"
    )


def export(run: Path, out: Path) -> None:
    """Writes the model folder, whole or not at all, with the tokenizer of its token files where that is there."""
    model, config = load_run(run)
    kind = family(model.shape)
    assert isinstance(model, Transformer)
    weights = folded(model)
    with job.whole_folder(out) as folder:
        save_file(_theirs(weights, model.shape, kind), folder / "model.safetensors", metadata={"format": "pt"})
        job.write_json(folder / "config.json", _config(model.shape, kind))
        tokenizer = Path(config.dataset) / "tokenizer.json"
        if tokenizer.is_file():
            shutil.copyfile(tokenizer, folder / "tokenizer.json")


def bring_back(model_dir: Path, out: Path) -> None:
    """Writes what a training leaves in `model/`: weights, and the shape among the defaults of all other settings.

    Raises UserError for a model that cannot be read, or that the trainer would compute otherwise.
    """
    if missing := [name for name in ("config.json", "model.safetensors") if not (model_dir / name).is_file()]:
        raise UserError(f"{model_dir} has no {missing[0]}: give the folder of a model in Hugging Face format")
    theirs = job.read_json(model_dir / "config.json")
    try:
        shape = _shape(theirs, model_dir)
        weights = _ours(load_file(model_dir / "model.safetensors"), shape, theirs["model_type"])
    except (KeyError, TypeError, AttributeError, ValueError, SafetensorError) as error:
        raise UserError(f"{model_dir} is no whole model ({type(error).__name__}: {error}): fetch it anew") from error
    settings = job.default_settings(Path(__file__).with_name("train.yaml"))
    names = {name: value for name, value in shape.as_dict().items() if name in settings}
    about = {**settings, **names, "ffn_ratio": shape.ffn_width / shape.width, "dataset": str(model_dir)}
    with torch.device("meta"):
        ours = {name: p.shape for name, p in build(SimpleNamespace(**about), shape.vocab_size).named_parameters()}
    found = {name: weight.shape for name, weight in weights.items()}
    if wrong := sorted(name for name in ours.keys() | found.keys() if ours.get(name) != found.get(name)):
        raise UserError(f"{model_dir} has other weights than its config.json says, such as {wrong[0]}: fetch it anew")
    with job.whole_folder(out) as folder:
        save_model(folder / "model", weights, about | {"shape": shape.as_dict()})


def folded(model: Transformer) -> Weights:
    """The weights of the same model without multipliers. Raises UserError where a tied matrix forbids it."""
    rules, shape = model.rules, model.shape
    if shape.tied and rules.output_multiplier != 1.0:
        raise UserError("the logits are multiplied and their matrix is the embedding too: train with tied set to false")
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, weight in weights.items():
        if "attention.qkv" in name:
            block = model.blocks[0]
            weight[: shape.width] *= block.attention.scale * math.sqrt(shape.head_dim)  # pyright: ignore
        elif name.endswith((".out.weight", ".out.bias", ".down.weight", ".down.bias")):
            weight.mul_(rules.residual_multiplier)
        elif name.startswith("readout"):
            weight.mul_(rules.output_multiplier)
    return weights


def _theirs(weights: Weights, shape: Shape, kind: str) -> Weights:
    """By their names; GPT-2 keeps matrices "in out" and has biases everywhere."""
    found: Weights = {}
    for name, weight in weights.items():
        block, module, part = _parts(name)
        pieces = {module: weight}
        if kind == "llama" and module in SPLIT:
            pieces = dict(zip(SPLIT[module], weight.chunk(len(SPLIT[module])), strict=True))
        for piece, value in pieces.items():
            turned = kind == "gpt2" and block is not None and value.dim() == 2
            found[_name(block, piece, part, kind)] = (value.T if turned else value).contiguous()
    if kind == "gpt2":
        found |= {name: torch.zeros(size) for name, size in _biases(shape).items() if name not in found}
    return found


def _ours(theirs: Weights, shape: Shape, kind: str) -> Weights:
    """By our names."""
    names = GPT2 if kind == "gpt2" else LLAMA
    back = {value: key for key, value in names.items()}
    start = "transformer.h." if kind == "gpt2" else "model.layers."
    found: Weights = {}
    pieces: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, weight in theirs.items():
        if name.endswith(".attn.bias") or (name == "lm_head.weight" and shape.tied):
            continue
        module, _, part = name.rpartition(".")
        number, _, inner = module.removeprefix(start).partition(".") if module.startswith(start) else ("", "", module)
        ours, prefix = back[inner], f"blocks.{number}." if number else ""
        turned = kind == "gpt2" and number and weight.dim() == 2
        value = (weight.T if turned else weight).float().contiguous()
        whole = next((whole for whole, each in SPLIT.items() if ours in each), None)
        if whole:
            pieces.setdefault((f"{prefix}{whole}.{part}", whole), {})[ours] = value
        else:
            found[f"{prefix}{ours}.{part}"] = value
    return found | {name: torch.cat([few[piece] for piece in SPLIT[whole]]) for (name, whole), few in pieces.items()}


def _parts(name: str) -> tuple[str | None, str, str]:
    """Of `blocks.3.attention.qkv.weight`: the block's number, the module in it, and weight or bias."""
    module, _, part = name.rpartition(".")
    if not module.startswith("blocks."):
        return None, module, part
    _, number, inner = module.split(".", 2)
    return number, inner, part


def _name(block: str | None, module: str, part: str, kind: str) -> str:
    names, start = (GPT2, "transformer.h") if kind == "gpt2" else (LLAMA, "model.layers")
    return f"{names[module]}.{part}" if block is None else f"{start}.{block}.{names[module]}.{part}"


def _biases(shape: Shape) -> dict[str, int]:
    """GPT-2's biases and their sizes."""
    width, inner = shape.width, shape.ffn_width
    sizes = {"norm1": width, "norm2": width, "attention.qkv": 3 * width, "attention.out": width}
    sizes |= {"feed_forward.up": inner, "feed_forward.down": width}
    inside = {_name(str(i), module, "bias", "gpt2"): n for i in range(shape.depth) for module, n in sizes.items()}
    return inside | {"transformer.ln_f.bias": width}


def _config(shape: Shape, kind: str) -> dict[str, Any]:
    common: dict[str, Any] = {"vocab_size": shape.vocab_size, "tie_word_embeddings": shape.tied, "dtype": "float32"}
    if kind == "gpt2":
        return common | {
            "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": shape.width, "n_layer": shape.depth,
            "n_head": shape.heads, "n_inner": shape.ffn_width, "n_positions": shape.seq_len,
            "activation_function": "gelu", "layer_norm_epsilon": 1e-5,
        }  # fmt: skip
    return common | {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": shape.width,
        "num_hidden_layers": shape.depth, "num_attention_heads": shape.heads, "num_key_value_heads": shape.heads,
        "intermediate_size": shape.ffn_width, "max_position_embeddings": shape.seq_len, "rms_norm_eps": 1e-6,
        "rope_theta": ROTARY_BASE, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip


# What a counterpart must have besides: the layers here have no other.
SAME = {
    "gpt2": {
        "activation_function": "gelu", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    },
    "llama": {
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "attention_bias": False, "mlp_bias": False,
        "rope_theta": ROTARY_BASE, "rope_type": "default",
        "head_dim": None,  # width / heads
    },
}  # fmt: skip


def _shape(theirs: dict[str, Any], model_dir: Path) -> Shape:
    kind = theirs.get("model_type")
    same = SAME.get(str(kind), {})
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    had = {
        "activation_function": "gelu_new",
        **theirs,
        "rope_type": rope.get("type", "default"),
        **rope,
    }  # "type" is its older name
    if (had.get("head_dim") or 0) * theirs.get("num_attention_heads", 0) == theirs.get("hidden_size"):
        had["head_dim"] = None
    others = {name: had[name] for name, value in same.items() if had.get(name, value) != value}
    if others:
        ours = {name: same[name] for name in others}
        raise UserError(f"{model_dir} has {others}, and the trainer {ours}: train anew")
    if kind == "gpt2":
        width = theirs["n_embd"]
        return Shape(
            "transformer", theirs["vocab_size"], width, theirs["n_layer"], theirs["n_head"],
            theirs.get("n_inner") or 4 * width, "gelu", "layernorm", "pre", "learned", theirs["n_positions"],
            bias=True, tied=theirs.get("tie_word_embeddings", True),
        )  # fmt: skip
    heads = theirs.get("num_attention_heads", 0)
    if kind == "llama" and theirs.get("num_key_value_heads", heads) == heads:
        return Shape(
            "transformer", theirs["vocab_size"], theirs["hidden_size"], theirs["num_hidden_layers"], heads,
            theirs["intermediate_size"], "swiglu", "rmsnorm", "pre", "rotary", theirs["max_position_embeddings"],
            bias=False, tied=theirs.get("tie_word_embeddings", False),
        )  # fmt: skip
    raise UserError(
        f"{model_dir} is a {kind}: GPT-2, and Llama with as many key-value heads as heads, can be brought back"
    )


if __name__ == "__main__":
    job.run(main)
