"""What the recipes rest on in other packages. A test that fails here says which package changed, and in what."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch import nn

TINY = {"vocab_size": 40, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "embed_dim": 16}
TINY |= {"intermediate_dim": 24, "max_seq_len": 32}
LORA = {"lora_attn_modules": ["q_proj"], "apply_lora_to_mlp": True, "lora_rank": 2, "lora_alpha": 4.0}


def builder(family: str) -> Callable[..., Any]:
    from torchtune.models.gemma2._component_builders import lora_gemma2
    from torchtune.models.llama3_2._component_builders import lora_llama3_2
    from torchtune.models.mistral._component_builders import lora_mistral
    from torchtune.models.qwen2._component_builders import lora_qwen2

    return {"llama": lora_llama3_2, "qwen2": lora_qwen2, "mistral": lora_mistral, "gemma2": lora_gemma2}[family]


def built(family: str, **changes: Any) -> Any:
    return builder(family)(**TINY, **LORA, **({"head_dim": 8} if family == "gemma2" else {}), **changes)


def test_torchtune_is_the_version_that_was_read():
    """Line numbers, names and bugs in comments are those of 0.6.1; torchtune is no longer maintained."""
    assert version("torchtune") == "0.6.1"


def test_torchao_is_one_that_torchtune_imports():
    assert (0, 13) <= tuple(map(int, version("torchao").split(".")[:2])) < (0, 16)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma2"])
def test_torchtunes_builders_take_the_arguments_that_we_give(family: str):
    own = {
        "llama": {"scale_factor", "tie_word_embeddings"},
        "qwen2": {"tie_word_embeddings"},
        "mistral": set(),
        "gemma2": {"head_dim", "hidden_capping_value", "sliding_window_size", "query_pre_attn_scalar"},
    }
    needed = TINY.keys() | LORA.keys() | {"norm_eps", "rope_base", "lora_dropout", "use_dora", "quantize_base"}
    assert needed | own[family] <= inspect.signature(builder(family)).parameters.keys()


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma2"])
def test_torchtunes_parameters_have_the_names_that_we_map(family: str):
    names = {name for name, _ in built(family).named_parameters()}
    norms = {"sa_norm", "mlp_norm"} | ({"sa_scale", "mlp_scale"} if family == "gemma2" else set())
    last = "norm.rms_norm.scale" if family == "gemma2" else "norm.scale"
    linear = {"attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.output_proj", "mlp.w1", "mlp.w2", "mlp.w3"}
    adapted = {"attn.q_proj", "mlp.w1", "mlp.w2", "mlp.w3"}
    expected = {"tok_embeddings.weight", last} | {f"layers.0.{norm}.scale" for norm in norms}
    expected |= {f"layers.0.{layer}.weight" for layer in linear}
    expected |= {f"layers.0.{layer}.{part}.weight" for layer in adapted for part in ("lora_a", "lora_b")}
    if family == "qwen2":
        expected |= {f"layers.0.attn.{each}_proj.bias" for each in "qkv"}
    if family in ("qwen2", "mistral"):  # untied unless told, or always
        expected |= {"output.weight"}
    assert names == expected


def test_torchtunes_gemma2_still_caps_the_hidden_state_and_not_the_logits():
    """Why lora_models.py takes the cap off the norm and puts it on the output; if this fails, it need not."""
    from torchtune.models.gemma2._component_builders import Gemma2FinalNorm

    norm = built("gemma2", final_capping_value=0.5).norm
    assert isinstance(norm, Gemma2FinalNorm)
    assert norm(torch.full((1, 1, 16), 9.0)).abs().max() <= 0.5


def test_torchtunes_peft_names_still_forget_the_order_of_doras_magnitudes():
    """Why lora_models.py names PEFT's weights itself; if this fails, torchtune's own function can be used."""
    from torchtune.models.convert_weights import tune_to_peft_adapter_weights

    magnitude = torch.arange(16.0)
    made = tune_to_peft_adapter_weights({"layers.0.attn.q_proj.magnitude": magnitude}, 2, 1, 16)
    [(name, weight)] = made.items()
    assert name == "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    assert weight.equal(magnitude)


def test_torchtunes_dora_still_scales_the_bias():
    """Why lora_models.py adds biases after DoRA; if this fails, it need not."""
    from torchtune.modules.peft import DoRALinear

    layer = DoRALinear(4, 4, rank=1, alpha=1.0, use_bias=True)
    nn.init.ones_(layer.bias)  # pyright: ignore[reportArgumentType]
    layer.initialize_dora_magnitude()
    before = layer(torch.zeros(1, 4))
    with torch.no_grad():
        layer.magnitude.mul_(3)
    assert before.allclose(torch.ones(1, 4)) and layer(torch.zeros(1, 4)).allclose(torch.full((1, 4), 3.0))


def test_torchtunes_adapter_parameters_are_those_of_lora_and_dora():
    from torchtune.modules.peft import get_adapter_params, set_trainable_params

    model = built("llama", use_dora=True)
    adapter = get_adapter_params(model)
    ends = {name.split(".", 4)[-1] for name in adapter if ".attn." in name}
    assert ends == {"lora_a.weight", "lora_b.weight", "magnitude"}
    set_trainable_params(model, adapter)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == adapter.keys()


def test_torchtunes_model_takes_a_mask_and_positions_and_gives_logits_in_chunks():
    model = built("llama")
    tokens, mask = torch.zeros(2, 16, dtype=torch.int64), torch.ones(16, 16).tril().bool().expand(2, -1, -1)
    whole = model(tokens, mask=mask, input_pos=torch.arange(16).expand(2, -1))
    assert whole.dtype == torch.float32 and whole.shape == (2, 16, 40)
    torch.testing.assert_close(whole, model(tokens))
    model.set_num_output_chunks(8)
    torch.testing.assert_close(torch.cat(model(tokens), dim=1), whole)


def test_torchtunes_chunked_loss_is_the_mean_over_label_tokens():
    from torchtune.modules.loss import CEWithChunkedOutputLoss

    loss = CEWithChunkedOutputLoss(ignore_index=-100)
    logits, labels = torch.randn(2, 16, 7), torch.randint(0, 7, (2, 16))
    labels[0, :9] = -100
    chunks = list(logits.chunk(loss.num_output_chunks, dim=1))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(loss(chunks, labels), expected)


def test_torchtunes_activation_checkpointing_keeps_parameters_and_the_state_of_dropout():
    from torchtune import training
    from torchtune.modules import TransformerSelfAttentionLayer

    model, tokens = built("llama", lora_dropout=0.5), torch.arange(16)[None]
    parameters, gradients = list(model.parameters()), []
    for wrapped in (False, True):
        if wrapped:
            training.set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
        for name, weight in model.named_parameters():
            if "lora_b" in name:
                nn.init.ones_(weight)
        torch.manual_seed(0)
        model(tokens).square().sum().backward()
        gradients.append([p.grad.clone() for p in parameters])
        model.zero_grad()
    assert all(kept is p for kept, p in zip(parameters, model.parameters(), strict=True))
    assert all(plain.equal(spared) for plain, spared in zip(*gradients, strict=True))


def test_torchtunes_norm_with_a_float32_scale_gives_back_the_dtype_of_its_input():
    from torchtune.modules import RMSNorm

    assert RMSNorm(8)(torch.ones(1, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_torchtunes_cosine_goes_on_from_any_step():
    from torchtune.training.lr_schedulers import get_cosine_schedule_with_warmup

    def rates(first: int, n: int) -> list[float]:
        optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))], "initial_lr": 1.0}], lr=1.0)
        schedule = get_cosine_schedule_with_warmup(optimizer, 3, 10, last_epoch=first - 1)
        made = []
        for _ in range(n):
            made.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        return made

    whole = rates(0, 10)
    assert whole[:4] == [0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1]
    assert rates(4, 6) == whole[4:]


def test_torchaos_4_bit_weights_take_what_is_loaded_and_give_it_back():
    from torchao.dtypes.nf4tensor import NF4Tensor
    from torchtune.modules.peft import LoRALinear

    layer = LoRALinear(128, 128, rank=2, alpha=4.0, quantize_base=True)
    weight = torch.randn(128, 128)
    layer.load_state_dict({"weight": weight}, strict=False)
    assert isinstance(layer.weight, NF4Tensor)
    read = layer.weight.to(torch.float32)
    assert 0 < (read - weight).abs().max() < 0.162 * weight.abs().max()
    torch.testing.assert_close(layer(torch.eye(128)), read.T, atol=1e-5, rtol=1e-5)


def test_torchao_refuses_weights_too_small_for_its_blocks():
    from torchao.dtypes.nf4tensor import to_nf4

    with pytest.raises(AssertionError, match="divisible by scaler block size"):
        to_nf4(torch.randn(32, 32))


def test_torchs_cpu_allocator_fails_with_the_words_that_we_know():
    from trainer.job import is_out_of_memory

    with pytest.raises(RuntimeError) as failed:
        torch.empty(1 << 50)
    assert is_out_of_memory(failed.value)
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


def test_torchs_generator_on_the_cpu_reads_32_bits_of_a_seed():
    """Why batches.py makes seeds by a hash; if this fails, it is a matter of taste."""
    numbers = [torch.rand(3, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1 + 2**32)]
    assert numbers[0].equal(numbers[1])


def test_transformers_writes_the_keys_of_config_json_that_we_read():
    from transformers import AutoConfig

    needed = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"}
    needed |= {"vocab_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters"}
    own = {
        "llama": {"hidden_act", "attention_bias", "mlp_bias", "head_dim"},
        "qwen2": {"hidden_act", "use_sliding_window"},
        "mistral": {"hidden_act", "sliding_window"},
        "gemma2": {"hidden_activation", "head_dim", "query_pre_attn_scalar", "sliding_window", "layer_types"}
        | {"attn_logit_softcapping", "final_logit_softcapping"},
    }
    for family, keys in own.items():
        written = AutoConfig.for_model(family).to_dict()
        assert (needed | keys) <= written.keys(), family
        assert "rope_theta" in written["rope_parameters"], family


def test_transformers_layers_have_the_names_that_adapters_name():
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    for family in ("llama", "qwen2", "mistral", "gemma2"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **small, vocab_size=40))
        names = {name for name, _ in model.named_parameters()}
        layers = [f"self_attn.{each}_proj" for each in "qkvo"] + [f"mlp.{each}_proj" for each in ("gate", "up", "down")]
        assert {f"model.layers.0.{layer}.weight" for layer in layers} <= names, family
