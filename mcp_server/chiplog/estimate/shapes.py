"""How large a language model is, from its config.json alone: no weights, no torch, no network.

Counts follow the classes of transformers (`...ForCausalLM`, and `...ForConditionalGeneration` for T5) parameter by
parameter, with two exceptions where those know less than the published weights: an MPT may have biases and learned
positions, as in llm-foundry, and a T5 has an output matrix of its own where its config.json says so.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from chiplog.errors import NotFoundError, PlanError
from chiplog.schema import Frozen

MODELS = Path(__file__).parent / "data" / "models.toml"
TEXT_PART = {"gemma3": "gemma3_text", "llama4": "llama4_text"}  # what a text_config that names no type is


class Shape(Frozen):
    """The sizes of a language model; of one that also sees or hears, those of its text part."""

    family: str = Field(description="model_type of config.json.")
    layers: int = Field(description="Layers of the decoder.")
    width: int = Field(description="Size of a hidden state.")
    heads: int = Field(description="Query heads of a layer.")
    kv_heads: int = Field(description="Key and value heads of a layer.")
    head_dim: int = Field(description="Size of a head.")
    ffn: int = Field(description="Width of the MLP of a dense layer; 0 where all layers are mixtures.")
    gated: bool = Field(description="Whether an MLP has three matrices (gate, up, down) instead of two.")
    vocab: int = Field(description="Rows of the embedding.")
    tied: bool = Field(description="Whether the output shares the embedding's weights.")
    experts: int = Field(default=0, description="Routed experts of a mixture layer.")
    experts_per_token: int = Field(default=0, description="Routed experts that a token goes through.")
    expert_ffn: int = Field(default=0, description="Width of the MLP of one expert.")
    shared_ffn: int = Field(default=0, description="Width of the always active MLP of a mixture layer.")
    mixture_layers: int = Field(default=0, description="How many of the layers are mixtures.")
    parallel: bool = Field(default=False, description="Whether attention and MLP read the same normed input.")
    encoder_layers: int = Field(default=0, description="Layers of the encoder; 0 where there is none.")
    window: int | None = Field(
        default=None, description="Tokens that a layer with local attention (sliding or in chunks) sees at most."
    )
    window_layers: int = Field(default=0, description="How many of the layers attend in that window only.")
    n_params: int = Field(description="All parameters; shared weights once.")
    n_embedding: int = Field(description="Parameters of the input embedding and of learned positions.")
    n_head: int = Field(description="Parameters of the output matrix where it is not tied, else 0.")
    n_active: int = Field(description="Parameters that a token goes through: all but the experts not chosen.")


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The shape that a parsed config.json describes; what it leaves out is as transformers has it.

    Raises NotFoundError for an architecture that is not known here, PlanError for sizes that are missing or wrong.
    """
    part = config.get("text_config")
    nested = isinstance(part, Mapping)
    values: dict[str, Any] = dict(part) if isinstance(part, Mapping) else dict(config)
    name = values.get("model_type") or TEXT_PART.get(str(config.get("model_type")))
    if nested and "tie_word_embeddings" in config:
        values.setdefault("tie_word_embeddings", config["tie_word_embeddings"])
    if not isinstance(name, str):
        raise PlanError("config.json names no model_type: download it again, or add that line")
    if (family := _families().get(name)) is None:
        raise NotFoundError(f"the architecture {name!r:.60} is not known here: there are {', '.join(_families())}")
    sizes = _Sizes(values, {**family.defaults, **(family.text_part if nested else {})})
    return _measure(name, family, sizes)


@cache
def catalogue() -> dict[str, Shape]:
    """Published models by name, the shape of each."""
    return {name: shape_of(entry["config"]) for name, entry in _facts()["models"].items()}


def find(name: str) -> Shape | None:
    """The shape of a published model by its name as people write it; None for one that is not in the catalogue."""
    key = known_as(name)
    return None if key is None else catalogue()[key]


def known_as(name: str) -> str | None:
    """The entry of the catalogue that a name as people write it means; None for none."""
    path, known = re.sub(r"^models--", "", name.strip().rstrip("/").lower()).replace("--", "/"), _names()
    for written in ("/".join(path.split("/")[-2:]), path.rsplit("/", 1)[-1]):
        bare = written
        while bare:
            for reading in (bare, UNDERSCORE.sub(".", bare)):
                if (plain := _plain(reading)) in known:
                    return known[plain]
            bare = SUFFIX.sub("", bare) if SUFFIX.search(bare) else ""
    return None


# What a name may end with that changes no size: how the model was tuned, stored or dated.
SUFFIX = re.compile(
    r"[-_. :](?:instruct|chat|base|hf|it|pt|sft|dpo|thinking|preview|unsloth|bnb|gguf|gptq|awq|fp8|bf16|fp16|latest"
    r"|[48]bit|int[48]|w[48]a16|q\d\w*|\d{4}|\d{6}|\d{8})$"
)
UNDERSCORE = re.compile(r"(?<=[a-z-]\d)_(?=\d)")  # that stands for a point, as in llama3_2_1b and phi-1_5
# A number with its unit, a bare number, or a word.
TOKEN = re.compile(r"\d+(?:\.\d+)*(?:[bmk](?![a-z]))?|[a-z]+|/")


def _plain(name: str) -> str:
    """A name without what people write differently: `Meta-Llama3.2 1B` and `llama-3.2-1b` are one."""
    return "-".join(TOKEN.findall(name.lower().removeprefix("meta-")))


@cache
def _facts() -> dict[str, Any]:
    return tomllib.loads(MODELS.read_text(encoding="utf-8"))


@cache
def _names() -> dict[str, str]:
    """Entry of the catalogue by each of its names."""
    return {_plain(name): key for key, entry in _facts()["models"].items() for name in (key, *entry.get("names", ()))}


@cache
def _families() -> dict[str, Family]:
    return {name: Family(**facts) for name, facts in _facts()["families"].items()}


Flag = bool | tuple[str, bool]  # what is always so; or a field of config.json, and its default


class Family(Frozen):
    """What sets an architecture apart, as `models.toml` lists them."""

    gated: bool = Field(default=True, description="Three matrices in an MLP (gate, up, down) instead of two.")
    tied: bool = Field(
        default=False, description="Whether the output shares the embedding where config.json is silent."
    )
    qkv_bias: Flag = Field(default=False, description="Biases of query, key and value.")
    out_bias: Flag = Field(default=False, description="Bias of the attention's output.")
    mlp_bias: Flag = Field(default=False, description="Biases of the MLP.")
    norms: int = Field(default=2, description="Norms of a layer.")
    norm_vectors: int = Field(default=1, description="Vectors of a norm: weight; weight and bias; or none.")
    qk_norm: Literal["", "head", "whole"] = Field(default="", description="What a norm of query and key goes over.")
    window: str = Field(default="", description="The field that gives the window of local attention.")
    full_every: int = Field(default=0, description="Every n-th layer attends to all; 0: none does.")
    defaults: dict[str, int] = Field(default={}, description="Sizes that transformers fills in.")
    text_part: dict[str, int] = Field(default={}, description="Sizes that it fills in for a text_config only.")


LARGEST = 2**31  # of any size
_KV = "num_key_value_heads"
# Other names of the same field.
ALSO: dict[str, Sequence[str]] = {
    "hidden_size": ("n_embd", "n_embed", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "intermediate_size": ("ffn_hidden_size", "ffn_dim", "n_inner", "d_ff"),
    _KV: ("num_kv_heads",),
    "head_dim": ("kv_channels", "d_kv"),
    "max_position_embeddings": ("n_positions", "max_seq_len"),
    "num_local_experts": ("num_experts",),
}


@dataclass(frozen=True)
class _Sizes:
    """The fields of a config.json, checked as they are read."""

    values: Mapping[str, Any]
    defaults: Mapping[str, int]

    def maybe(self, name: str) -> int | None:
        """A size; None where it is null, or where neither config.json nor the family gives one."""
        key = next((key for key in (name, *ALSO.get(name, ())) if key in self.values), None)
        value = self.defaults.get(name) if key is None else self.values[key]
        right = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST
        if value is not None and not right:
            raise PlanError(
                f"config.json: {key} is {value!r:.40}, no whole number from 0 to {LARGEST:,}: mend that line"
            )
        return value

    def size(self, name: str) -> int:
        """A size above 0 that must be there."""
        if not (value := self.maybe(name)):
            what = "has no" if value is None else "gives 0 as"
            others = f" (or {', '.join(ALSO[name])})" if name in ALSO else ""
            raise PlanError(f"config.json {what} {name}{others}: add the right number, or download it again")
        return value

    def flag(self, flag: Flag) -> bool:
        """Whether it is so; a null is a no."""
        if isinstance(flag, bool):
            return flag
        value = self.values.get(*flag)
        if value not in (True, False, None):
            raise PlanError(f"config.json: {flag[0]} is {value!r:.40}, neither true nor false: mend that line")
        return bool(value)

    def each(self, name: str) -> list[Any] | None:
        """A list; None where there is none."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, list):
            raise PlanError(f"config.json: {name} is {value!r:.40}, no list: mend that line")
        return value

    def head_dim(self, width: int, heads: int) -> int:
        """Size of a head."""
        if given := self.maybe("head_dim"):
            return given
        if width % heads:
            raise PlanError(f"config.json: {heads} heads do not divide a width of {width}: add head_dim, or mend one")
        return width // heads


def _measure(name: str, family: Family, sizes: _Sizes) -> Shape:
    layers, width, heads = (sizes.size(key) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    head_dim, vocab, ffn = sizes.head_dim(width, heads), sizes.size("vocab_size"), _ffn(name, sizes)
    kv_heads = _kv_heads(name, sizes) or heads
    if heads % kv_heads and any(key in sizes.values for key in (_KV, *ALSO[_KV])):
        raise PlanError(f"config.json: {kv_heads} key and value heads do not divide {heads} heads: mend one")
    tied = sizes.flag(("tie_word_embeddings", family.tied))
    gated, vectors = family.gated, family.norm_vectors
    if name in ("t5", "mt5"):
        default = "relu" if name == "t5" else "gated-gelu"
        gated = str(sizes.values.get("feed_forward_proj", default)).startswith("gated-")
    elif name == "opt" and not sizes.flag(("layer_norm_elementwise_affine", True)):
        vectors = 0
    biased = name in ("mpt", "qwen") and not sizes.flag(("no_bias", True))
    if biased and name == "mpt":
        vectors = 2
    shares_norm = _shares_norm(name, sizes)
    norms = 1 if shares_norm else family.norms

    def mlp(inner: int) -> int:
        matrices = 3 if gated else 2
        bias = biased or sizes.flag(family.mlp_bias)
        return matrices * width * inner + bias * ((matrices - 1) * inner + width)

    attention = _attention(name, family, sizes, width, heads * head_dim, kv_heads * head_dim, biased)
    mixture = _mixture(name, layers, sizes)
    expert = mlp(mixture.ffn) if mixture.layers else 0
    beside = (width + (name == "gpt_oss")) * mixture.experts  # the router
    beside += (mlp(mixture.shared_ffn) if mixture.shared_ffn else 0) + width * (name == "qwen2_moe")  # its gate
    dense = mlp(ffn) + 2 * (name == "apertus") if mixture.layers < layers else 0  # 2: of its activation, xIELU
    blocks = (
        layers * (attention + norms * vectors * width) + mixture.layers * beside + (layers - mixture.layers) * dense
    )

    embedded = (sizes.maybe("word_embed_proj_dim") if name == "opt" else None) or width
    embedding = vocab * embedded + _positions(name, sizes) * width
    head = 0 if tied else vocab * embedded
    outside = vectors * width * _final_norms(name, sizes) + vocab * (name == "phi")
    outside += 2 * width * embedded if embedded != width else 0  # OPT 350m projects in and out
    encoder = 0
    if name in ("t5", "mt5"):  # the encoder, and the cross-attention of the decoder
        encoder, layers = layers, sizes.maybe("num_decoder_layers") or layers
        buckets = sizes.maybe("relative_attention_num_buckets") or 32
        blocks += (layers - encoder) * (attention + dense + 2 * width)
        blocks += encoder * (attention + dense + 2 * width) + width + layers * (attention + width) + 2 * buckets * heads
    common = embedding + head + outside + blocks
    window, window_layers = _window(name, family, sizes, layers)
    return Shape(
        family=name,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=ffn if mixture.layers < layers else 0,
        gated=gated,
        vocab=vocab,
        tied=tied,
        experts=mixture.experts,
        experts_per_token=mixture.per_token,
        expert_ffn=mixture.ffn,
        shared_ffn=mixture.shared_ffn,
        mixture_layers=mixture.layers,
        parallel=shares_norm,
        encoder_layers=encoder,
        window=window,
        window_layers=window_layers,
        n_params=common + mixture.layers * mixture.experts * expert,
        n_embedding=embedding,
        n_head=head,
        n_active=common + mixture.layers * mixture.per_token * expert,
    )


def _attention(name: str, family: Family, sizes: _Sizes, width: int, query: int, key: int, biased: bool) -> int:
    """Parameters of one attention whose queries are `query` wide, and keys and values `key` wide."""
    heads = sizes.size("num_attention_heads")
    count = 2 * width * (query + key)
    count += (query + 2 * key) * (biased or sizes.flag(family.qkv_bias))
    count += width * (biased or sizes.flag(family.out_bias))
    count += {"": 0, "head": 2 * query // heads, "whole": query + key}[family.qk_norm]
    if sizes.flag(("qk_layernorm", False)):
        count += {"phi": 4 * query // heads, "stablelm": query + key}.get(name, 0)
    return count + (heads if name == "gpt_oss" else 0)  # its attention sinks


def _kv_heads(name: str, sizes: _Sizes) -> int | None:
    """Key and value heads; None: as many as query heads."""
    multi_query = name == "gpt_bigcode" or (name == "falcon" and not sizes.flag(("new_decoder_architecture", False)))
    if multi_query:
        return 1 if sizes.flag(("multi_query", True)) else None
    return None if name in ("gpt2", "gpt_neox", "bloom", "opt", "mpt", "qwen", "t5", "mt5") else sizes.maybe(_KV)


def _ffn(name: str, sizes: _Sizes) -> int:
    """Width of the MLP of a dense layer."""
    if name == "mpt":
        return (sizes.maybe("expansion_ratio") or 4) * sizes.size("hidden_size")
    if name in ("gpt2", "gpt_bigcode", "falcon", "bloom"):
        return sizes.maybe("intermediate_size") or 4 * sizes.size("hidden_size")
    if name == "qwen":  # its file counts gate and up together
        return sizes.size("intermediate_size") // 2
    return sizes.size("intermediate_size_mlp" if name.startswith("llama4") else "intermediate_size")


def _shares_norm(name: str, sizes: _Sizes) -> bool:
    """Whether attention and MLP read what one norm leaves."""
    if name == "falcon":
        norms = sizes.maybe("num_ln_in_parallel_attn") or 1 + sizes.flag(("new_decoder_architecture", False))
        return norms == 1 and sizes.flag(("parallel_attn", True))
    return name == "phi" or (name == "stablelm" and sizes.flag(("use_parallel_residual", False)))


def _positions(name: str, sizes: _Sizes) -> int:
    """Learned positions."""
    attention = sizes.values.get("attn_config")
    alibi = not isinstance(attention, Mapping) or attention.get("alibi", True)
    if name in ("gpt2", "gpt_bigcode") or (name == "mpt" and not alibi and sizes.flag(("learned_pos_emb", True))):
        return sizes.size("max_position_embeddings")
    return sizes.size("max_position_embeddings") + 2 if name == "opt" else 0  # its ids begin at 2


def _final_norms(name: str, sizes: _Sizes) -> int:
    """Norms outside the layers."""
    if name == "opt":
        return int(sizes.flag(("do_layer_norm_before", True)) and not sizes.flag(("_remove_final_layer_norm", False)))
    return 2 if name == "bloom" else 1


@dataclass(frozen=True)
class _Mixture:
    layers: int = 0
    experts: int = 0
    per_token: int = 0
    ffn: int = 0
    shared_ffn: int = 0


def _mixture(name: str, layers: int, sizes: _Sizes) -> _Mixture:
    """The mixture layers; none in a dense model."""
    count, ffn, shared = layers, "intermediate_size", 0
    if name in ("qwen2_moe", "qwen3_moe"):
        step, dense = sizes.maybe("decoder_sparse_step") or 1, sizes.each("mlp_only_layers") or []
        count = sum(i not in dense and (i + 1) % step == 0 for i in range(layers))
        ffn = "moe_intermediate_size"
        shared = sizes.size("shared_expert_intermediate_size") if name == "qwen2_moe" else 0
    elif name.startswith("llama4"):
        chosen, shared = sizes.each("moe_layers"), sizes.size(ffn)
        every = layers // (sizes.maybe("interleave_moe_layer_step") or 1)
        count = every if chosen is None else sum(i in chosen for i in range(layers))
    elif name == "granitemoeshared":
        shared = sizes.maybe("shared_intermediate_size") or 0
    elif name not in ("mixtral", "granitemoe", "gpt_oss", "olmoe"):
        return _Mixture()
    experts, per_token = sizes.size("num_local_experts"), sizes.size("num_experts_per_tok")
    if per_token > experts:
        raise PlanError(f"config.json: a token cannot go through {per_token} of {experts} experts: mend one of the two")
    return _Mixture(count, experts, per_token, sizes.size(ffn), shared) if count else _Mixture()


def _window(name: str, family: Family, sizes: _Sizes, layers: int) -> tuple[int | None, int]:
    """Tokens of local attention, and how many layers have it."""
    window = sizes.maybe(family.window) if family.window else None
    switched = name.startswith("qwen") or name == "smollm3"
    if not window or (switched and not sizes.flag(("use_sliding_window", False))):
        return None, 0
    first = min(sizes.maybe("max_window_layers") or 0, layers)
    every = (sizes.maybe("sliding_window_pattern") if name.startswith("gemma3") else None) or family.full_every
    if (types := sizes.each("layer_types")) and name not in ("mistral", "mixtral", "phi3", "starcoder2", "ministral3"):
        count = sum(kind in ("sliding_attention", "chunked_attention") for kind in types)
    elif rope := sizes.each("no_rope_layers"):  # 1 where positions are turned
        count = sum(bool(turned) == (name != "smollm3") for turned in rope)
    elif name == "smollm3":
        count = layers // 4
    elif name == "qwen2_moe":
        count = (first + 1) // 2
    elif name.startswith("qwen"):
        count = layers - first
    else:
        count = layers - layers // every if every else layers
    return (window, count) if count else (None, 0)
