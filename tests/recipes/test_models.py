"""Every family of models and kind of adapter: torchtune computes what transformers does, before and after training."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torchao.dtypes.nf4tensor import NF4Tensor

from tests.recipes.helpers import Never, adapter, begin, events, finetune, load, make_model
from trainer.chat import ChatTokenizer
from trainer.job import UserError

EVERY_TARGET = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Each family as its published models are, made small; Gemma's window and caps are reached by 60 tokens.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2 tied": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2 untied": ("qwen2", {"tie_word_embeddings": False}),
    "mistral": ("mistral", {"tie_word_embeddings": False, "sliding_window": None}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 12,
            "query_pre_attn_scalar": 20,
            "sliding_window": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, shape = FAMILIES[request.param]
    return make_model(tmp_path_factory.mktemp("families") / request.param.replace(" ", "_"), family, **shape)


def theirs(model_dir: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")


def some_tokens() -> torch.Tensor:
    return torch.randint(0, 250, (2, 60), generator=torch.Generator().manual_seed(1))


def logits_of(run: Any, tokens: torch.Tensor) -> torch.Tensor:
    run.model.eval()
    with torch.no_grad():
        return torch.cat(run.model(tokens), dim=1)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_a_family_computes_what_transformers_does_before_training_and_after_merging(
    use_dora: bool, model_dir: Path, settings: dict, tmp_path: Path
):
    changes = {"model": str(model_dir), "lora_targets": EVERY_TARGET, "use_dora": use_dora, "max_steps": 6}
    settings |= changes | {"lora_alpha": 5, "warmup_steps": 0, "lr": 0.02, "weight_decay": 0.5}
    model, tokens = theirs(model_dir), some_tokens()
    with torch.no_grad():
        base = model(tokens).logits
    assert base.std() > 0.3
    torch.testing.assert_close(logits_of(begin(settings, tmp_path / "new"), tokens), base, atol=1e-4, rtol=1e-4)

    run = finetune(settings, tmp_path / "run")
    load("recipes/adapters.py").merge_adapter(model, tmp_path / "run" / "adapter")
    with torch.no_grad():
        merged = model(tokens).logits
    torch.testing.assert_close(merged, logits_of(run, tokens), atol=2e-4, rtol=1e-4)
    assert (merged - base).abs().max() > 0.05


def test_the_adapter_has_the_names_and_shapes_that_peft_gives_it(model_dir: Path, settings: dict, tmp_path: Path):
    settings |= {"model": str(model_dir), "lora_targets": EVERY_TARGET, "use_dora": True, "max_steps": 1}
    finetune(settings, tmp_path)
    expected = {}
    for name, weight in theirs(model_dir).named_parameters():
        if name.split(".")[-2] in EVERY_TARGET and name.endswith("weight"):
            layer, (rows, columns) = f"base_model.model.{name.removesuffix('.weight')}", weight.shape
            expected |= {
                f"{layer}.lora_A.weight": (4, columns),
                f"{layer}.lora_B.weight": (rows, 4),
                f"{layer}.lora_magnitude_vector": (rows,),
            }
    assert {name: tuple(weight.shape) for name, weight in adapter(tmp_path).items()} == expected
    about = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (about["use_dora"], about["r"], about["target_modules"]) == (True, 4, EVERY_TARGET)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_merged_folder_answers_as_model_and_adapter_do(dtype: str, settings: dict, llama: Path, tmp_path: Path):
    finetune(settings | {"use_dora": True, "dtype": dtype}, tmp_path / "run")
    merge = load("recipes/merge_adapter.py")
    merge.merge(llama, tmp_path / "run" / "adapter", tmp_path / "merged", dtype)
    with pytest.raises(UserError, match="is there already: remove it"):
        merge.merge(llama, tmp_path / "run" / "adapter", tmp_path / "merged", dtype)
    assert {file.name for file in (tmp_path / "merged").iterdir()} == {file.name for file in llama.iterdir()}
    evaluation = load("recipes/evaluate.py")
    config = evaluation.checked(SimpleNamespace(**settings | {"max_new_tokens": 8, "dtype": dtype}))
    evaluation.evaluate(config, tmp_path / "run" / "adapter", tmp_path / "adapted")
    config.model = str(tmp_path / "merged")
    evaluation.evaluate(config, None, tmp_path / "alone")
    adapted, alone = ((tmp_path / name / "predictions.jsonl").read_bytes() for name in ("adapted", "alone"))
    assert adapted == alone
    models = load("recipes/adapters.py")
    kind = models.DTYPES[dtype]
    in_memory, on_disk = models.load_model(llama, kind), models.load_model(tmp_path / "merged", kind)
    models.merge_adapter(in_memory, tmp_path / "run" / "adapter")
    for (name, one), (_, other) in zip(in_memory.named_parameters(), on_disk.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    ids = ChatTokenizer(tmp_path / "merged").prompt_ids([{"role": "user", "content": "ab"}])
    assert ids == ChatTokenizer(llama).prompt_ids([{"role": "user", "content": "ab"}])


@pytest.mark.parametrize("use_dora", [False, True], ids=["qlora", "qdora"])
def test_weights_in_4_bits_are_near_the_models_and_it_computes_with_them(
    use_dora: bool, settings: dict, tmp_path: Path
):
    wide = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4}
    settings |= {"model": str(make_model(tmp_path / "model", "llama", **wide)), "lora_targets": EVERY_TARGET}
    plain = begin(settings | {"use_dora": use_dora}, tmp_path / "plain")
    quantized = begin(settings | {"use_dora": use_dora, "quantize_base": True}, tmp_path / "quantized")
    n_quantized = 0
    for (name, weight), (_, other) in zip(
        quantized.model.named_parameters(), plain.model.named_parameters(), strict=True
    ):
        if isinstance(weight, NF4Tensor):
            n_quantized += 1
            read = weight.to(torch.float32)
            # Half of the widest gap between NF4's 16 values, which is 0.304 (arXiv:2305.14314, appendix E), of the
            # largest weight; 0.01 more for the scales, which are quantised too.
            assert (read - other).abs().max() < (0.152 + 0.01) * other.abs().max(), name
            other.data.copy_(read)
    assert n_quantized == 14
    for module in plain.model.modules():
        if use_dora and hasattr(module, "initialize_dora_magnitude"):
            module.initialize_dora_magnitude()
    tokens = some_tokens()
    torch.testing.assert_close(logits_of(quantized, tokens), logits_of(plain, tokens), atol=1e-4, rtol=1e-4)

    quantized.train(Never)
    steps = events(tmp_path / "quantized", "step")
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"]


def test_a_model_too_small_for_4_bits_is_refused_in_words(settings: dict, tmp_path: Path):
    with pytest.raises(UserError, match=r"cannot hold this model's weights in 4 bits here .*: set quantize_base to fa"):
        begin(settings | {"quantize_base": True}, tmp_path)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("mistral", {"sliding_window": 32}, "sliding_window 32, which torchtune's Mistral does not have: lower max_se"),
        ("mistral", {"tie_word_embeddings": True}, "tie_word_embeddings True"),
        ("mistral", {"head_dim": 16}, "head_dim 16"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16}, "sliding_window 16"),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}, "no rope of type yarn"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation 'gelu'"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "layer_types"),
        ("gemma2", {"tie_word_embeddings": False}, "tie_word_embeddings False"),
    ],
)
def test_what_a_familys_builder_cannot_do_is_refused_in_words(family: str, changes: dict, words: str, tmp_path: Path):
    from transformers import AutoConfig

    shape = dict(FAMILIES[{"qwen2": "qwen2 tied"}.get(family, family)][1])
    small = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 300}
    AutoConfig.for_model(family, **small | shape).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    load("recipes/lora_models.py").read_shape(tmp_path, 64)
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=words):
        load("recipes/lora_models.py").read_shape(tmp_path, 64)
