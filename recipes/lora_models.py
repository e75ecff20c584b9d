"""A model in Hugging Face format as a torchtune model with LoRA, and its adapter as PEFT stores it.

Everything that knows how torchtune builds and names models is here; recipes import it as their neighbour. What a
family of models has of its own stands in FAMILIES and in its function of `read_shape`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from sharding import shard
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torchtune import training
from torchtune.models.gemma2._component_builders import lora_gemma2
from torchtune.models.llama3_2._component_builders import lora_llama3_2
from torchtune.models.mistral._component_builders import lora_mistral
from torchtune.models.qwen2._component_builders import lora_qwen2
from torchtune.modules import RMSNorm, TransformerDecoder
from torchtune.modules.peft import LORA_ATTN_MODULES, DoRALinear, LoRALinear, get_adapter_params, set_trainable_params
from weights import Weights, fill

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
# Modules of a layer, Hugging Face's names: torchtune's.
LINEAR = {
    **{f"self_attn.{theirs}": f"attn.{ours}" for theirs, ours in ATTENTION.items()},
    "mlp.gate_proj": "mlp.w1",
    "mlp.up_proj": "mlp.w3",
    "mlp.down_proj": "mlp.w2",
}
NORMS = {"input_layernorm": "sa_norm", "post_attention_layernorm": "mlp_norm"}
GEMMA2_NORMS = {
    "input_layernorm": "sa_norm",
    "post_attention_layernorm": "sa_scale",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_scale",
}
AROUND = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
# PEFT's endings: torchtune's
ADAPTER = {"lora_A.weight": "lora_a.weight", "lora_B.weight": "lora_b.weight", "lora_magnitude_vector": "magnitude"}
# torchtune/models/llama3_1/_position_embeddings.py; every Llama 3.1, 3.2 and 3.3 has these.
ROPE = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Family:
    """Models of one model_type."""

    name: str
    build: Callable[..., TransformerDecoder]
    norms: dict[str, str] = field(default_factory=lambda: NORMS)
    # Rotary embedding: torchtune turns neighbours, Hugging Face the halves of a head; for Qwen both turn halves.
    neighbours: bool = True


FAMILIES = {
    "llama": Family("Llama", lora_llama3_2),
    "qwen2": Family("Qwen 2", lora_qwen2, neighbours=False),
    "mistral": Family("Mistral", lora_mistral),
    "gemma2": Family("Gemma 2", lora_gemma2, norms=GEMMA2_NORMS),
}


@dataclass(frozen=True)
class Shape:
    """What `config.json` says, in the words of torchtune's builder."""

    family: Family
    head_dim: int
    tied: bool  # whether the embedding is the output too
    logit_cap: float | None  # largest logit, Gemma 2's
    builds: dict[str, Any]  # arguments of the family's builder

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.builds["vocab_size"]


class CappedOutput:
    """Logits drawn into ±cap, as Gemma 2 does (arXiv:2408.00118, section 2); torchtune 0.6.1 draws the hidden state."""

    def __init__(self, output: Callable[[Tensor], Tensor], cap: float):
        self.output, self.cap = output, cap

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.cap * torch.tanh(self.output(hidden) / self.cap)


def check_targets(targets: list[str]) -> None:
    """Raises UserError for a choice of `lora_targets` that torchtune's builders cannot make."""
    if unknown := [target for target in targets if target not in [*ATTENTION, *MLP]]:
        raise UserError(f"lora_targets has {', '.join(unknown)}: choose from {', '.join([*ATTENTION, *MLP])}")
    if not set(targets) & set(ATTENTION):
        raise UserError(f"lora_targets needs at least one of {', '.join(ATTENTION)}")
    if 0 < len(set(targets) & set(MLP)) < len(MLP):
        raise UserError(f"lora_targets has some of {', '.join(MLP)}: give all three or none")


def read_shape(model_dir: Path, max_seq_len: int) -> Shape:
    """The shape in a model folder's `config.json`. Raises UserError for a model that torchtune cannot build."""
    file = model_dir / "config.json"
    if not file.is_file():
        raise UserError(f"{file} is missing: model must be a folder in Hugging Face format")
    hf = json.loads(file.read_text(encoding="utf-8"))
    family = FAMILIES.get(hf.get("model_type"))
    if family is None:
        known = ", ".join(f"{each.name} ({key})" for key, each in FAMILIES.items())
        raise UserError(f"{file}: model_type is {hf.get('model_type')!r}; this recipe trains {known}")
    if max_seq_len > (longest := hf["max_position_embeddings"]):
        raise UserError(f"max_seq_len is {max_seq_len}, but the model reads {longest} tokens: lower max_seq_len")
    # transformers 5 writes rope_parameters, before it wrote rope_theta and rope_scaling.
    rope = hf.get("rope_parameters") or {"rope_theta": hf.get("rope_theta", 10_000.0), **(hf.get("rope_scaling") or {})}
    gemma = family.build is lora_gemma2
    heads, width = hf["num_attention_heads"], hf["hidden_size"]
    head_dim = hf.get("head_dim") or width // heads
    # Where config.json says nothing, transformers ties Gemma's embedding and no other.
    tied = hf.get("tie_word_embeddings", gemma)
    _refuse_unbuildable(hf, family, head_dim, tied, max_seq_len, file)
    builds = {
        "vocab_size": hf["vocab_size"],
        "num_layers": hf["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": hf.get("num_key_value_heads") or heads,
        "embed_dim": width,
        "intermediate_dim": hf["intermediate_size"],
        "max_seq_len": max_seq_len,
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "rope_base": rope["rope_theta"],
    }
    factor = _scale_factor(rope, family, file)
    if family.build is lora_llama3_2:
        builds |= {"scale_factor": factor, "tie_word_embeddings": tied}
    elif family.build is lora_qwen2:
        builds |= {"tie_word_embeddings": tied}
    elif gemma:
        builds |= {
            "head_dim": head_dim,
            "hidden_capping_value": hf.get("attn_logit_softcapping", 50.0),
            "sliding_window_size": hf.get("sliding_window", 4096),
            "query_pre_attn_scalar": hf.get("query_pre_attn_scalar", 256),
        }
    return Shape(family, head_dim, tied, hf.get("final_logit_softcapping", 30.0) if gemma else None, builds)


def load_model(
    model_dir: Path, shape: Shape, config: SimpleNamespace, device: torch.device, mesh: DeviceMesh | None = None
) -> TransformerDecoder:
    """The frozen model with a new adapter, all but the norms in `config.dtype`; only the adapter is trainable.

    The processes of a `mesh` divide the frozen weights, each layer's as soon as it is loaded: none ever holds more than
    the shares and one layer. The adapter's first values follow from `config.seed` alone. Raises UserError when a weight
    is missing, or the hardware lacks the dtype or cannot hold weights in 4 bits.
    """
    try:
        dtype = training.get_dtype(config.dtype, device=device)
    except RuntimeError as error:
        raise UserError(f"{device} cannot compute in {config.dtype}: set dtype to fp32") from error
    with training.set_default_dtype(dtype), torch.device("meta"):
        model = _build(shape, config)
    if shape.family.build is lora_gemma2:
        model.norm = model.norm.rms_norm  # pyright: ignore[reportAttributeAccessIssue] - without the cap on its output
        if shape.logit_cap is not None:
            model.output = CappedOutput(model.output, shape.logit_cap)  # pyright: ignore[reportAttributeAccessIssue]
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.float()  # torchtune normalises in float32, and torch fuses that only with a float32 scale
    set_trainable_params(model, get_adapter_params(model))
    weights = Weights(model_dir, lambda name, file: _torchtune_name(name, shape, file), _turned(shape))
    if missing := {name for name, p in model.named_parameters() if not p.requires_grad} - set(weights):
        raise UserError(f"{model_dir} lacks the weights of {', '.join(sorted(missing)[:3])}...: download it again")
    torch.manual_seed(config.seed)
    for i, layer in enumerate(model.layers):
        fill(layer, f"layers.{i}.", weights, device)
        _begin_adapter(layer)
        if mesh:
            shard(layer, mesh)
    fill(model, "", weights, device)  # what is around the layers
    if mesh:
        shard(model, mesh)
    with device:
        for module in model.modules():
            if hasattr(module, "rope_init"):  # its table is no weight: nothing has filled it
                module.rope_init()  # pyright: ignore[reportCallIssue]
    return model


def save_adapter(folder: Path, adapter: Mapping[str, Tensor], shape: Shape, config: SimpleNamespace) -> None:
    """Writes `adapter_model.safetensors` and `adapter_config.json` as PEFT reads them, into a folder that is there."""
    save_file(dict(_peft_weights(adapter, shape)), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.model,
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_dora": config.use_dora,
        "target_modules": config.lora_targets,
        "bias": "none",
        "inference_mode": True,
    }
    job.write_json(folder / "adapter_config.json", about)


def _build(shape: Shape, config: SimpleNamespace) -> TransformerDecoder:
    """The model with weights of no meaning."""
    try:
        return shape.family.build(
            lora_attn_modules=[ATTENTION[target] for target in config.lora_targets if target in ATTENTION],
            apply_lora_to_mlp=MLP[0] in config.lora_targets,
            lora_rank=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            use_dora=config.use_dora,
            quantize_base=config.quantize_base,
            **shape.builds,
        )
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        if not config.quantize_base or job.is_out_of_memory(error):
            raise
        raise UserError(
            f"torchao cannot hold this model's weights in 4 bits here ({error}): set quantize_base to false"
        ) from error


def _keep_bias_as_it_is(layer: DoRALinear) -> None:
    """DoRA scales the weights alone, in its paper and in PEFT; torchtune 0.6.1 scales the bias too."""
    bias = layer.bias
    if isinstance(bias, nn.Parameter):
        layer.use_bias = False
        layer.register_parameter("bias", None)
        layer.register_parameter("unscaled_bias", bias)
        layer.register_forward_hook(lambda layer, _inputs, output: output + layer.unscaled_bias)  # pyright: ignore


def _torchtune_name(name: str, shape: Shape, file: Path) -> str | None:
    """What torchtune calls a weight of a file; None for one that it makes itself.

    Raises UserError for a weight that torchtune's model does not have.
    """
    if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and shape.tied):
        return None
    module, kind = name.rsplit(".", 1)
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    ours = (LINEAR | shape.family.norms).get(layer[2]) if layer else AROUND.get(module)
    if ours is None:
        raise UserError(f"{file} has {name}, which torchtune's {shape.family.name} lacks: choose another model")
    if "norm" in module:
        kind = "scale"
    return f"layers.{layer[1]}.{ours}.{kind}" if layer else f"{ours}.{kind}"


def _turned(shape: Shape) -> Callable[[str, Tensor], Tensor]:
    """Brings a weight, by its name in torchtune, into the order of torchtune's rotary embedding."""

    def turn(name: str, weight: Tensor) -> Tensor:
        if not shape.family.neighbours or not re.search(r"attn\.[qk]_proj\.", name):
            return weight
        halves = weight.unflatten(0, (-1, 2, shape.head_dim // 2))
        return halves.transpose(1, 2).flatten(0, 2)

    return turn


def _begin_adapter(layer: nn.Module) -> None:
    """The first values of a layer's adapters, whose frozen weights are there."""
    for module in layer.modules():
        if isinstance(module, LoRALinear | DoRALinear):
            module.initialize_parameters()
        if isinstance(module, DoRALinear):
            module.initialize_dora_magnitude()
            _keep_bias_as_it_is(module)


def _peft_weights(adapter: Mapping[str, Tensor], shape: Shape) -> Iterator[tuple[str, Tensor]]:
    """The adapter by PEFT's names, on the CPU. torchtune's own function forgets the order of DoRA's magnitudes."""
    modules = {ours: theirs for theirs, ours in LINEAR.items()}
    endings = {ours: theirs for theirs, ours in ADAPTER.items()}
    for name, weight in adapter.items():
        found = re.fullmatch(r"layers\.(\d+)\.(\w+\.\w+)\.(.+)", name)
        assert found, name
        rows = found[3] != "lora_a.weight"  # one for each output of the layer
        kept = weight.detach().cpu()
        if rows and found[2] in ("attn.q_proj", "attn.k_proj") and shape.family.neighbours:
            kept = kept.unflatten(0, (-1, shape.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
        yield f"base_model.model.model.layers.{found[1]}.{modules[found[2]]}.{endings[found[3]]}", kept.contiguous()


def _refuse_unbuildable(
    hf: dict[str, Any], family: Family, head_dim: int, tied: bool, max_seq_len: int, file: Path
) -> None:
    """Raises UserError for what `config.json` asks and torchtune's builder of the family does not have."""
    gemma, heads, width = family.build is lora_gemma2, hf["num_attention_heads"], hf["hidden_size"]
    act = "hidden_activation" if gemma else "hidden_act"
    layers = hf.get("layer_types") or []
    alternating = [("sliding_attention", "full_attention")[i % 2] for i in range(len(layers))]
    slides = family.build is lora_mistral or hf.get("use_sliding_window", False)
    unbuildable = {
        "attention_bias": hf.get("attention_bias", False),
        "mlp_bias": hf.get("mlp_bias", False),
        act: (hf.get(act) or "silu") != "silu" if not gemma else hf.get(act) not in (None, "gelu_pytorch_tanh"),
        "head_dim": not gemma and head_dim * heads != width,
        "tie_word_embeddings": (gemma and not tied) or (family.build is lora_mistral and tied),
        "sliding_window": slides and (hf.get("sliding_window") or max_seq_len) < max_seq_len,
        "layer_types": gemma and layers != alternating,
    }
    if wrong := [f"{name} {hf.get(name)!r}" for name, is_wrong in unbuildable.items() if is_wrong]:
        mend = "lower max_seq_len to it" if wrong[0].startswith("sliding_window") else "choose another model"
        raise UserError(f"{file} has {', '.join(wrong)}, which torchtune's {family.name} does not have: {mend}")


def _scale_factor(rope: dict[str, Any], family: Family, file: Path) -> float:
    """How far the rotary embedding is stretched; 1 is not at all. Raises UserError for a kind torchtune lacks."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return 1
    llama = family.build is lora_llama3_2
    others = {name: rope.get(name) for name, value in ROPE.items() if rope.get(name) != value}
    if not llama or kind != "llama3" or others:
        has = f"default, and llama3 with {ROPE}" if llama else "default"
        raise UserError(
            f"{file}: torchtune's {family.name} has no rope of type {kind}"
            f"{f' with {others}' if kind == 'llama3' and others else ''}; it has {has}: choose another model"
        )
    return rope["factor"]
