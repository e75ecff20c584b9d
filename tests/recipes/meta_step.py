"""What one training step on meta tensors holds, beside what the closed form of estimate/memory.py says.

The models are torchtune's and transformers' own, of published shapes; nothing is computed and no weight is loaded.
Flash attention stands in as a function that keeps what the kernel keeps, and adapters do what PEFT's do.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import re
import tomllib
import weakref
from contextlib import ExitStack
from typing import Any, NamedTuple, cast
from unittest import mock

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchtune import training
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.modules.peft import get_adapter_params, set_trainable_params
from transformers.pytorch_utils import Conv1D

from chiplog.estimate import memory
from chiplog.estimate.job import Job, style
from chiplog.estimate.shapes import MODELS, shape_of

BLOCK = 512  # bytes to which CUDA's allocator rounds
PUBLISHED: dict[str, dict[str, Any]] = {
    name: entry["config"] for name, entry in tomllib.loads(MODELS.read_text(encoding="utf-8"))["models"].items()
}
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")
# What a linear layer of an attention is called, by the target that it is; all others belong to an MLP or a router.
ATTENTION = {
    **dict.fromkeys(("q_proj", "q", "query_key_value", "Wqkv", "c_attn", "qkv_proj"), "q"),
    **dict.fromkeys(("k_proj", "k"), "k"),
    **dict.fromkeys(("v_proj", "v"), "v"),
    **dict.fromkeys(("o_proj", "out_proj", "dense", "c_proj", "o"), "o"),
}
LINEAR = F.linear
LAST_NORM = re.compile(r"(\w+\.){0,2}(norm|final_layer_?norm|ln_f|norm_f)")
BESIDE = ("lm_head", "embed_out", "shared_expert_gate", "gate", "router", "layer", "project_in", "project_out")


class Held(NamedTuple):
    """Bytes of one step."""

    start: int  # weights and optimiser states
    kept: int  # what the forward pass leaves
    head: int  # most from there until the gradient of the last norm is known
    peak: int  # most in the whole step, weights and states included
    trained: int  # weights that require a gradient


class Sizes(NamedTuple):
    """What the closed form gives."""

    layer: float  # bytes a token and layer
    head: float  # bytes a token
    peak: float  # bytes
    trained: int  # parameters


class Live(TorchDispatchMode):
    """Counts the bytes of storages that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}

    def track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // BLOCK) * BLOCK
        if key in self.sizes:
            return
        self.sizes[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type == "meta":
                self.track(leaf)
        return out


class Flash(torch.autograd.Function):
    """What FlashAttention-2 keeps and makes: its backward pass adds up the queries' gradient in fp32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)  # in the layout of the queries: what follows makes no copy
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        q, k, v, _, _ = ctx.saved_tensors
        sums = torch.empty_like(q, dtype=torch.float32)
        made = tuple(torch.empty_like(x) for x in (q, k, v))
        del sums
        return made


def flash(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    return cast(Tensor, Flash.apply(*(x.to(torch.bfloat16) for x in (q, k, v))))


def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """As CUDA does it: what is kept is a mask of a byte a value, where other devices keep one in the type of `x`."""
    return torch.native_dropout(x, p, True)[0] if training and p else x


def autocast(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer under autocast; one of 16-bit weights stands for a 4-bit layer, which gives the type it gets."""
    low = torch.bfloat16
    out = LINEAR(x.to(low), weight.to(low), None if bias is None else bias.to(low))
    return out.to(x.dtype) if weight.dtype == low else out


class Adapted(nn.Module):
    """A linear layer with a LoRA adapter, as PEFT computes it."""

    def __init__(self, base: nn.Module, rank: int, dtype: torch.dtype, dropout: float) -> None:
        super().__init__()
        weight = cast(Tensor, base.weight)
        outs, ins = weight.shape[::-1] if isinstance(base, Conv1D) else weight.shape
        self.base = base
        self.a = nn.Linear(ins, rank, bias=False, dtype=dtype)
        self.b = nn.Linear(rank, outs, bias=False, dtype=dtype)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, self.base.weight)

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)
        more = self.b(self.a(self.dropout(x.to(cast(Tensor, self.a.weight).dtype)))) * 2.0
        return (result + more).to(result.dtype)


def job_of(framework: str, model: str, layers: int = 0, **fields: Any) -> Job:
    """A job on a published model, of which `layers` are kept (0: all)."""
    given = {"micro_batch": 4, "seq_len": 256, "method": "lora", **fields}
    return Job(framework=framework, model=model, shape=shape_of(_config(model, layers)), **given)


def computed(job: Job) -> Sizes:
    layer = memory.layer_bytes(job) if job.checkpointing == "none" else memory.stream_bytes(job)
    return Sizes(
        layer, memory.head_bytes(job), memory.peak(job).total - memory.CONTEXT["allocated"], memory.trained_params(job)
    )


def traced(job: Job) -> Sizes:
    """The same by steps of two and three layers, at the batch and at twice the batch, and by one of all layers."""
    twice = job.model_copy(update={"micro_batch": 2 * job.micro_batch})
    two, three, two_twice, three_twice = (step(one, layers) for one in (job, twice) for layers in (2, 3))
    added = 2 if job.shape.encoder_layers else 1
    layer = (three_twice.kept - two_twice.kept - three.kept + two.kept) / job.tokens / added
    head = (two_twice.head - two.head) / job.tokens - 2 * added * layer
    whole = three if job.shape.layers == 3 else step(job, job.shape.layers)
    return Sizes(layer, head, whole.peak, whole.trained)


def step(job: Job, layers: int) -> Held:
    """One step of a job on a model of which `layers` are kept, after the optimiser has made its states."""
    tune, config = style(job.framework) == "torchtune", _config(job.model, layers)
    head: list[int] = []
    with Live() as live, torch.device("meta"), ExitStack() as stack:
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", flash))
        stack.enter_context(mock.patch.object(F, "dropout", dropout))
        stack.enter_context(mock.patch.object(F, "linear", autocast if job.upcast or job.master else LINEAR))
        stack.enter_context(mock.patch("transformers.masking_utils.find_packed_sequence_indices", lambda _: None))
        model = (_torchtune if tune else _transformers)(job, config).train()
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            live.track(tensor)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(trained, foreach=not tune)  # torchtune's is fused: it needs no scratch
        for weight in trained:
            weight.grad = torch.empty_like(weight)
        optimizer.step()
        optimizer.zero_grad()
        start = live.peak = live.now
        last_norm = [module for name, module in model.named_modules() if LAST_NORM.fullmatch(name)][-1]
        last_norm.register_forward_hook(lambda *call: call[-1].register_hook(lambda _: head.append(live.peak)) and None)
        tokens, labels = (torch.empty(job.micro_batch, job.seq_len, dtype=torch.long) for _ in range(2))
        loss = _torchtune_loss(job, model, tokens, labels) if tune else model(input_ids=tokens, labels=labels).loss
        kept = live.now - start
        loss.backward()
        if not tune:
            optimizer.step()
        n_trained = sum(weight.numel() for weight in trained)
        return Held(start, kept, head[0] - start, live.peak, n_trained)


def _config(model: str, layers: int) -> dict[str, Any]:
    config = PUBLISHED[model]
    return {**config, **{key: layers for key in LAYERS if layers and key in config}}


def _transformers(job: Job, config: dict[str, Any]) -> Any:
    family, seq2seq = config["model_type"], bool(job.shape.encoder_layers)
    ids = {"pad_token_id": 0 if seq2seq else None, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0}
    settings = {**ids, "use_cache": False, **config}
    del settings["model_type"]
    eager = memory.score_bytes(job)
    maker = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    model: Any = maker.from_config(
        transformers.AutoConfig.for_model(family, **settings),
        dtype=torch.float32 if job.master else torch.bfloat16,
        attn_implementation="eager" if eager else "sdpa",
    )
    if job.upcast:
        for name, weight in model.named_parameters():
            if weight.ndim == 1 or "emb" in name or "head" in name:
                weight.data = weight.data.float()
    if job.method != "full":
        model.requires_grad_(False)
        dtype = torch.float32 if memory.adapter_bytes(job) == 4 else torch.bfloat16
        for name, module in list(model.named_modules()):
            parent, _, child = name.rpartition(".")
            if isinstance(module, nn.Linear | Conv1D) and _target(name) in job.targets:
                setattr(model.get_submodule(parent), child, Adapted(module, job.rank, dtype, 0.05 * job.dropout))
        model.get_input_embeddings().requires_grad_("embedding" in job.targets)
    if job.checkpointing == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def _target(name: str) -> str:
    *path, child = name.split(".")
    if child in BESIDE:
        return ""
    return "mlp" if "mlp" in path else ATTENTION.get(child, "mlp")


def _torchtune(job: Job, config: dict[str, Any]) -> Any:
    shape = job.shape
    family = {"llama": "llama3_2" if shape.tied else "llama3_1"}.get(shape.family, shape.family)
    builders = importlib.import_module(f"torchtune.models.{family}._component_builders")
    sizes = {
        "vocab_size": shape.vocab, "num_layers": shape_of(config).layers, "num_heads": shape.heads,
        "num_kv_heads": shape.kv_heads, "embed_dim": shape.width, "intermediate_dim": shape.ffn,
        "max_seq_len": job.seq_len, "head_dim": shape.head_dim, "tie_word_embeddings": shape.tied,
    }  # fmt: skip
    lora = {"lora_rank": job.rank, "lora_alpha": 16.0, "lora_dropout": 0.05 * job.dropout}
    build = getattr(builders, family if job.method == "full" else f"lora_{family}")
    takes = inspect.signature(build).parameters
    sizes = {key: size for key, size in sizes.items() if key in takes}
    with training.set_default_dtype(torch.bfloat16):
        if job.method == "full":
            model = build(**sizes)
        else:
            adapted = [f"{'output' if key == 'o' else key}_proj" for key in job.targets - {"mlp"}]
            model = build(adapted, "mlp" in job.targets, **sizes, **lora)
            set_trainable_params(model, get_adapter_params(model))
    for module in model.modules():
        if getattr(module, "is_cache_built", True) is False:  # Llama's positions, which are not built on meta
            module.register_buffer("cache", torch.empty(131072, shape.head_dim // 2, 2), persistent=False)
            module.is_cache_built = True
    if job.checkpointing == "full":
        training.set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
    if job.loss == "chunked":
        model.set_num_output_chunks(8)
    return model


def _torchtune_loss(job: Job, model: Any, tokens: Tensor, labels: Tensor) -> Tensor:
    logits = model(tokens)
    if job.loss == "chunked":
        return CEWithChunkedOutputLoss()(logits, labels)
    return F.cross_entropy(logits.reshape(-1, job.shape.vocab), labels.reshape(-1))
