"""Every count of a shape equals what transformers builds from the same config.json, on the meta device."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from chiplog.estimate.shapes import MODELS, Shape, shape_of

ENTRIES: dict[str, dict[str, Any]] = tomllib.loads(MODELS.read_text())["models"]
BOOL = st.booleans()
RANDOM = settings(
    max_examples=12, deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


def built(config: Mapping[str, Any]) -> torch.nn.Module:
    """The model of a config.json, without memory for its weights."""
    family = config["model_type"]
    # Ids of special tokens that are within any vocabulary.
    values = {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0, **config}
    del values["model_type"]
    maker = AutoModelForSeq2SeqLM if family in ("t5", "mt5") else AutoModelForCausalLM
    with torch.device("meta"):
        return maker.from_config(AutoConfig.for_model(family, **values))


def check(shape: Shape, model: Any, more: int = 0, more_embedding: int = 0, more_head: int = 0) -> None:
    """Compares all counts; `more` is what the published weights have and the class does not."""
    read, written = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    positions = [p for name, p in model.named_parameters() if name.endswith(("wpe.weight", "embed_positions.weight"))]
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    idle = experts * (shape.experts - shape.experts_per_token) // shape.experts if shape.experts else 0
    total = sum(p.numel() for p in model.parameters()) + more
    types = getattr(model.config, "layer_types", None) or []
    local = sum(kind in ("sliding_attention", "chunked_attention") for kind in types)
    assert shape.n_params == total
    assert shape.n_active == total - idle
    assert shape.n_embedding == read.numel() + sum(p.numel() for p in positions) + more_embedding
    assert shape.n_head == (0 if written is read else written.numel()) + more_head
    assert shape.vocab == read.shape[0]
    if types and shape.family not in ("mistral", "ministral3"):
        assert shape.window_layers == (local if shape.window else 0)


# Fields that are always there, by the names that each family gives them.
LLAMA = {
    "hidden_size": st.sampled_from([32, 48, 64, 112]),
    "num_hidden_layers": st.integers(1, 9),
    "num_attention_heads": st.sampled_from([2, 4, 8]),
    "intermediate_size": st.integers(1, 99),
    "vocab_size": st.integers(300, 999),
}
TIE = {"tie_word_embeddings": BOOL}
KV = {"num_key_value_heads": st.sampled_from([1, 2]), "head_dim": st.sampled_from([8, 10, 16]), **TIE}
BIAS = {**KV, "attention_bias": BOOL}
SLIDE = {"sliding_window": st.one_of(st.none(), st.integers(2, 50))}
SWITCH = {"sliding_window": st.integers(2, 50), "use_sliding_window": BOOL, "max_window_layers": st.integers(0, 9)}
EXPERTS = {"num_local_experts": st.integers(4, 7), "num_experts_per_tok": st.integers(1, 4)}
QWEN_MOE = {
    "num_experts": st.integers(8, 11),
    "num_experts_per_tok": st.integers(1, 8),
    "moe_intermediate_size": st.integers(1, 50),
    "decoder_sparse_step": st.integers(1, 3),
    "mlp_only_layers": st.lists(st.integers(0, 9), max_size=3),
}
GPT2 = {
    "n_embd": st.sampled_from([32, 48]),
    "n_layer": st.integers(1, 4),
    "n_head": st.sampled_from([2, 4]),
    "vocab_size": st.integers(300, 999),
}
T5 = {
    "d_model": st.integers(8, 40),
    "num_layers": st.integers(1, 4),
    "num_heads": st.integers(1, 4),
    "d_ff": st.integers(1, 99),
    "vocab_size": st.integers(300, 999),
}
T5_MAY = {
    "d_kv": st.integers(4, 20),
    "num_decoder_layers": st.integers(1, 5),
    "feed_forward_proj": st.sampled_from(["relu", "gated-gelu", "gated-silu"]),
    "relative_attention_num_buckets": st.integers(4, 40),
    "tie_word_embeddings": st.just(True),
}
NO_KV = {key: field for key, field in LLAMA.items() if key != "intermediate_size"}
TEXT = {**LLAMA, "head_dim": st.sampled_from([8, 16])}
# By family: the fields that are always there, and those that may be left out.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "apertus": (LLAMA, BIAS),
    "arcee": (LLAMA, {**BIAS, "mlp_bias": BOOL}),
    "nemotron": (  # its class needs both
        LLAMA | {name: KV[name] for name in ("head_dim", "num_key_value_heads")},
        {**TIE, "attention_bias": BOOL, "mlp_bias": BOOL},
    ),
    "bloom": ({**GPT2, "hidden_size": GPT2["n_embd"]}, TIE),
    "falcon": (
        NO_KV,
        {
            **TIE,
            "multi_query": BOOL,
            "new_decoder_architecture": BOOL,
            "num_kv_heads": st.sampled_from([1, 2]),
            "num_ln_in_parallel_attn": st.sampled_from([None, 1, 2]),
            "parallel_attn": BOOL,
            "bias": BOOL,
            "ffn_hidden_size": st.integers(1, 99),
        },
    ),
    "gemma": (LLAMA, BIAS),
    "gemma2": (LLAMA, {**BIAS, "sliding_window": st.integers(2, 50)}),
    "gemma3_text": (LLAMA, {**BIAS, "sliding_window": st.integers(2, 50), "sliding_window_pattern": st.integers(2, 7)}),
    "gpt2": (GPT2, {**TIE, "n_inner": st.one_of(st.none(), st.integers(1, 99)), "n_positions": st.integers(1, 99)}),
    "gpt_bigcode": (GPT2, {**TIE, "n_positions": st.integers(1, 99), "multi_query": BOOL}),
    "gpt_neox": (LLAMA, {**TIE, "attention_bias": BOOL, "use_parallel_residual": BOOL}),
    "gpt_oss": (LLAMA, {**KV, **EXPERTS, "sliding_window": st.integers(2, 50)}),
    "granite": (LLAMA, {**BIAS, "mlp_bias": BOOL}),
    "granitemoe": (LLAMA, {**BIAS, **EXPERTS}),
    "granitemoeshared": (LLAMA, {**BIAS, **EXPERTS, "shared_intermediate_size": st.integers(0, 50)}),
    "llama": (LLAMA, {**BIAS, "mlp_bias": BOOL}),
    "llama4_text": (
        LLAMA,
        {
            **BIAS,
            **EXPERTS,
            "intermediate_size_mlp": st.integers(1, 99),
            "interleave_moe_layer_step": st.integers(1, 3),
            "attention_chunk_size": st.integers(2, 50),
        },
    ),
    "ministral": (TEXT, {**TIE, "num_key_value_heads": st.sampled_from([1, 2]), **SLIDE}),
    "ministral3": (LLAMA, {**KV, **SLIDE}),
    "mistral": (LLAMA, {**KV, **SLIDE}),
    "mixtral": (LLAMA, {**KV, **EXPERTS, **SLIDE}),
    "mpt": (
        {
            "d_model": st.sampled_from([32, 64]),
            "n_layers": st.integers(1, 4),
            "n_heads": st.sampled_from([2, 4]),
            "vocab_size": st.integers(300, 999),
        },
        {**TIE, "max_seq_len": st.integers(1, 99)},
    ),
    "mt5": (T5, T5_MAY),
    "olmo": (LLAMA, {**TIE, "num_key_value_heads": st.sampled_from([1, 2]), "attention_bias": BOOL}),
    "olmo2": (LLAMA, BIAS),
    "olmo3": (LLAMA, {**BIAS, "sliding_window": st.integers(2, 50)}),
    "olmoe": (
        LLAMA,
        {
            **TIE,
            "num_key_value_heads": st.sampled_from([1, 2]),
            "attention_bias": BOOL,
            "num_experts": st.integers(8, 11),
        },
    ),
    "opt": (
        {**NO_KV, "ffn_dim": st.integers(1, 99)},
        {
            **TIE,
            "word_embed_proj_dim": st.sampled_from([None, 16, 24]),
            "do_layer_norm_before": BOOL,
            "enable_bias": BOOL,
            "layer_norm_elementwise_affine": BOOL,
            "max_position_embeddings": st.integers(1, 99),
        },
    ),
    "phi": (LLAMA, {**TIE, "num_key_value_heads": st.sampled_from([1, 2]), "qk_layernorm": BOOL}),
    "phi3": (LLAMA, {**TIE, "num_key_value_heads": st.sampled_from([1, 2]), **SLIDE}),
    "qwen2": (LLAMA, {**KV, **SWITCH}),
    "qwen2_moe": (
        LLAMA,
        {**KV, **SWITCH, **QWEN_MOE, "shared_expert_intermediate_size": st.integers(1, 50), "qkv_bias": BOOL},
    ),
    "qwen3": (LLAMA, {**BIAS, **SWITCH}),
    "qwen3_moe": (LLAMA, {**BIAS, **QWEN_MOE}),
    "seed_oss": (LLAMA, {**BIAS, "attention_out_bias": BOOL, "mlp_bias": BOOL}),
    "smollm3": (LLAMA, {**BIAS, "mlp_bias": BOOL, "sliding_window": st.integers(2, 50), "use_sliding_window": BOOL}),
    "stablelm": (
        LLAMA,
        {
            **TIE,
            "num_key_value_heads": st.sampled_from([1, 2]),
            "use_qkv_bias": BOOL,
            "qk_layernorm": BOOL,
            "use_parallel_residual": BOOL,
        },
    ),
    "starcoder2": (LLAMA, {**TIE, "num_key_value_heads": st.sampled_from([1, 2]), "use_bias": BOOL, **SLIDE}),
    "t5": (T5, T5_MAY),
}


# Which layers are which, said layer by layer.
LISTED: dict[str, dict[str, Any]] = {
    "gemma2": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "gpt_oss": {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    "llama4_text": {"moe_layers": [0, 2], "no_rope_layers": [1, 0, 0]},
    "ministral": {"head_dim": 8, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "olmo3": {"layer_types": ["full_attention"] * 3},
    "qwen2": {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "use_sliding_window": True},
    "qwen3_moe": {"mlp_only_layers": [1]},
    "smollm3": {"no_rope_layers": [0, 1, 0], "use_sliding_window": True, "sliding_window": 7},
}


def test_every_family_is_compared():
    known = set(tomllib.loads(MODELS.read_text())["families"])
    assert known == FAMILIES.keys() | {
        "qwen",
        "gemma3",
        "llama4",
    }  # no class of transformers; and two that wrap a text_config


@pytest.mark.parametrize("family", FAMILIES)
def test_any_config_of_a_family_is_counted_as_transformers_counts_it(family: str):
    always, may = FAMILIES[family]

    @RANDOM
    @given(st.fixed_dictionaries(always, optional=may))
    def compare(fields: dict[str, Any]) -> None:
        config = {"model_type": family, **fields}
        check(shape_of(json.loads(json.dumps(config))), built(config))

    compare()


@pytest.mark.parametrize("family", LISTED)
def test_layers_may_be_told_apart_one_by_one(family: str):
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24}
    config = {"model_type": family, "vocab_size": 300, **sizes, **LISTED[family]}
    check(shape_of(config), built(config))


@pytest.mark.parametrize("family", ["gemma3_text", "gemma2", "llama", "mistral", "qwen2", "qwen3", "granite", "gemma"])
def test_a_text_config_may_leave_out_what_transformers_fills_in(family: str):
    model = built({"model_type": family, "num_hidden_layers": 3})
    check(shape_of({"model_type": "any", "text_config": {"model_type": family, "num_hidden_layers": 3}}), model)


def test_the_text_part_of_llama_4_and_of_gemma_3_is_known_by_the_type_that_wraps_it():
    for outer, inner in (("llama4", "llama4_text"), ("gemma3", "gemma3_text")):
        shape = shape_of({"model_type": outer, "text_config": {"num_hidden_layers": 4}})
        check(shape, built({"model_type": inner, "num_hidden_layers": 4}))


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry["config"]["model_type"] != "qwen"])
def test_a_published_model_is_counted_as_transformers_counts_it(name: str):
    config = ENTRIES[name]["config"]
    shape = shape_of(config)
    more, positions, head = 0, 0, 0
    if shape.family in ("t5", "mt5") and not config["tie_word_embeddings"]:
        head = config["vocab_size"] * config["d_model"]  # from_config ties what from_pretrained leaves apart
    if shape.family == "mpt" and not config["no_bias"]:  # transformers has the variant with neither only
        positions = config["max_seq_len"] * config["d_model"]
        more = (config["n_layers"] * 11 + 1) * config["d_model"]
    model = built({key: None if key == "sliding_window" and not value else value for key, value in config.items()})
    check(shape, model, more + positions + head, positions, head)


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry["config"]["model_type"] == "qwen"])
def test_the_first_qwen_counts_as_the_same_sizes_of_qwen_2(name: str):
    config = ENTRIES[name]["config"]
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "tie_word_embeddings")
    same = {key: config[key] for key in sizes} | {
        "num_key_value_heads": config["num_attention_heads"],
        "intermediate_size": config["intermediate_size"] // 2,
    }
    check(shape_of(config), built({"model_type": "qwen2", **same}))
