"""Shapes of models: which name means which model, what a config.json must say, and totals that are published."""

from __future__ import annotations

import datetime
import tomllib
from typing import Any

import pytest

from chiplog.errors import NotFoundError, PlanError
from chiplog.estimate.shapes import MODELS, _plain, catalogue, find, shape_of

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 100,
}
# As papers, model cards and `sum(p.numel() for p in model.parameters())` on the published weights give them.
TOTALS = {
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "codellama-34b": 33_743_970_304,
    "tinyllama-1.1b": 1_100_048_384,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "qwen-1.8b": 1_836_828_672,
    "qwen-7b": 7_721_324_544,
    "qwen2.5-7b": 7_615_616_512,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma-2-9b": 9_241_705_984,
    "phi-3-mini": 3_821_079_552,
    "stablelm-2-1.6b": 1_644_515_328,
    "pythia-6.9b": 6_857_302_016,
    "gpt2-xl": 1_557_611_200,
    "bloom-7b1": 7_069_016_064,
    "opt-350m": 331_196_416,
    "santacoder": 1_124_886_528,
    "flan-t5-xl": 2_849_757_184,
    "mt5-xxl": 12_921_057_280,
    "mpt-125m": 125_311_488,
    "mpt-7b": 6_658_859_008,
    "mpt-30b": 29_975_214_080,
    "mpt-70b": 64_862_437_376,
    "mosaicml/mpt-7b": 6_649_286_656,
    "gpt-oss-20b": 20_914_757_184,
}


@pytest.mark.parametrize(("name", "total"), TOTALS.items())
def test_a_published_model_has_its_published_number_of_parameters(name: str, total: int):
    assert catalogue()[name].n_params == total


@pytest.mark.parametrize(
    ("written", "entry"),
    [
        ("meta-llama/Llama-3.2-1B-Instruct", "llama-3.2-1b"),
        ("llama-3.2-1b", "llama-3.2-1b"),
        ("Llama3.2-1B", "llama-3.2-1b"),
        ("llama3_2_1b", "llama-3.2-1b"),
        ("llama3.2:1b-instruct-q4_K_M", "llama-3.2-1b"),
        ("models--meta-llama--Llama-3.2-1B", "llama-3.2-1b"),
        ("/data/models/Llama-3.2-1B-Instruct/", "llama-3.2-1b"),
        ("unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit", "llama-3.2-1b"),
        ("meta-llama/Meta-Llama-3-8B", "llama-3-8b"),
        ("unsloth/llama-3-8b-bnb-4bit", "llama-3-8b"),
        ("llama3_8b", "llama-3-8b"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-7b"),
        ("TheBloke/Llama-2-13B-chat-GPTQ", "llama-2-13b"),
        ("huggyllama/llama-7b", "llama-7b"),
        ("openlm-research/open_llama_3b_v2", "open-llama-3b"),
        ("lmsys/vicuna-7b-v1.5", "llama-2-7b"),
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", "llama-4-scout"),
        ("llama-4-scout-17b-16e", "llama-4-scout"),
        ("codellama/CodeLlama-34b-Instruct-hf", "codellama-34b"),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "tinyllama-1.1b"),
        ("tiny-llama", "tinyllama-1.1b"),
        ("mistral-7b", "mistral-7b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b-v0.3"),
        ("HuggingFaceH4/zephyr-7b-beta", "mistral-7b"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral-8x7b"),
        ("mistralai/Mistral-Small-Instruct-2409", "mistral-small-22b"),
        ("mistralai/Ministral-8B-Instruct-2410", "ministral-8b"),
        ("qwen-7b", "qwen-7b"),
        ("Qwen/Qwen-1_8B-Chat", "qwen-1.8b"),
        ("Qwen/Qwen1.5-0.5B", "qwen1.5-0.5b"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("Qwen/Qwen2.5-Coder-0.5B-Instruct-AWQ", "qwen2.5-0.5b"),
        ("Qwen/Qwen3-4B-Instruct-2507", "qwen3-4b"),
        ("Qwen/Qwen3-30B-A3B-FP8", "qwen3-30b-a3b"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "deepseek-r1-distill-qwen-1.5b"),
        ("google/gemma-2b-it", "gemma-2b"),
        ("google/gemma-2-2b-it", "gemma-2-2b"),
        ("google/gemma-3-1b-pt", "gemma-3-1b"),
        ("microsoft/phi-1_5", "phi-1.5"),
        ("microsoft/Phi-3-mini-4k-instruct", "phi-3-mini"),
        ("microsoft/Phi-3.5-mini-instruct", "phi-3-mini-128k"),
        ("EleutherAI/pythia-1b-deduped", "pythia-1b"),
        ("openai-community/gpt2", "gpt2"),
        ("mpt-7b", "mpt-7b"),
        ("mosaicml/mpt-7b", "mosaicml/mpt-7b"),
        ("mosaicml/mpt-7b-instruct", "mosaicml/mpt-7b"),
        ("stabilityai/stablelm-2-1_6b", "stablelm-2-1.6b"),
        ("ibm-granite/granite-3.0-3b-a800m-instruct", "granite-3.0-3b-a800m"),
        ("santacoder-1.1b", "santacoder"),
        ("allenai/OLMo-2-1124-7B-Instruct", "olmo-2-7b"),
        ("allenai/OLMo-7B-0724-hf", "olmo-7b"),
        ("olmo3-7b", "olmo-3-7b"),
        ("bigscience/bloomz-7b1", "bloom-7b1"),
        ("google/flan-t5-base", "flan-t5-base"),
        ("bigscience/T0_3B", "flan-t5-xl"),
        ("bigscience/mt0-xxl", "mt5-xxl"),
    ],
)
def test_a_model_is_found_however_its_name_is_written(written: str, entry: str):
    assert find(written) == catalogue()[entry]


@pytest.mark.parametrize(
    "written",
    [
        "",
        "/",
        "llama",
        "llama-3",
        "llama-3.2",
        "llama-3.2-11b",
        "llama-3.2-8b",
        "llama-3.1-1b",
        "llama-3-1b",
        "llama-3.21b",
        "llama-2.7b",
        "llama-11b",
        "qwen-1-8b",
        "qwen2-3b",
        "qwen2.5-1b",
        "qwen2.5-vl-7b-instruct",
        "qwen3-0.5b",
        "gemma-9b",
        "gemma-2-7b",
        "mistral-8b",
        "mistral-7b-v0.4",
        "mixtral-8x8b",
        "phi-3",
        "phi-3.5-moe-instruct",
        "pythia-14b",
        "opt-3b",
        "t5",
        "bert-base-uncased",
        "my-own-model",
    ],
)
def test_a_name_that_is_none_of_them_resolves_to_nothing(written: str):
    assert find(written) is None


def test_each_name_means_one_model_and_each_entry_says_where_it_is_from():
    file = tomllib.loads(MODELS.read_text())
    assert isinstance(file["date"], datetime.date)
    names = [name for key, entry in file["models"].items() for name in (key, *entry.get("names", ()))]
    assert len({_plain(name) for name in names}) == len(names) > 300
    assert all(
        set(entry) <= {"names", "source", "config"} and "/" in entry["source"] for entry in file["models"].values()
    )
    assert len(catalogue()) == len(file["models"]) > 110


@pytest.mark.parametrize("name", catalogue())
def test_a_model_is_found_by_the_name_of_its_entry(name: str):
    assert find(name) is catalogue()[name]


def test_a_config_says_the_whole_shape():
    shape = shape_of(LLAMA)
    assert shape.model_dump() == {
        "family": "llama",
        "layers": 2,
        "width": 64,
        "heads": 4,
        "kv_heads": 4,
        "head_dim": 16,
        "ffn": 96,
        "gated": True,
        "vocab": 100,
        "tied": False,
        "experts": 0,
        "experts_per_token": 0,
        "expert_ffn": 0,
        "shared_ffn": 0,
        "mixture_layers": 0,
        "parallel": False,
        "encoder_layers": 0,
        "window": None,
        "window_layers": 0,
        "n_params": 2 * (4 * 64 * 64 + 3 * 64 * 96 + 2 * 64) + 64 + 2 * 6400,
        "n_embedding": 6400,
        "n_head": 6400,
        "n_active": 2 * (4 * 64 * 64 + 3 * 64 * 96 + 2 * 64) + 64 + 2 * 6400,
    }


def test_a_mixture_counts_the_experts_that_a_token_goes_through():
    shape = catalogue()["mixtral-8x7b"]
    assert (shape.ffn, shape.experts, shape.experts_per_token, shape.mixture_layers) == (0, 8, 2, 32)
    assert shape.n_params - shape.n_active == 32 * 6 * 3 * 4096 * 14336
    interleaved = catalogue()["llama-4-maverick"]
    assert (interleaved.mixture_layers, interleaved.ffn, interleaved.shared_ffn) == (24, 16384, 8192)


def test_only_blocks_with_one_norm_for_both_are_parallel():
    parallel = {name for name, shape in catalogue().items() if shape.parallel}
    assert parallel == {"phi-1", "phi-1.5", "phi-2", "falcon-7b", "stablelm-2-12b"}


@pytest.mark.parametrize(
    ("name", "window", "window_layers"),
    [
        ("mistral-7b", 4096, 32),
        ("mistral-7b-v0.3", None, 0),
        ("qwen2.5-7b", None, 0),
        ("gemma-2-2b", 4096, 13),
        ("gemma-3-27b", 1024, 52),
        ("gpt-oss-20b", 128, 12),
        ("olmo-3-7b", 4096, 24),
        ("llama-4-scout", 8192, 36),
    ],
)
def test_a_model_says_which_layers_see_a_window_only(name: str, window: int | None, window_layers: int):
    shape = catalogue()[name]
    assert (shape.window, shape.window_layers) == (window, window_layers)


def test_the_text_part_of_a_multimodal_model_is_measured():
    text = {key: value for key, value in LLAMA.items() if key != "num_hidden_layers"}
    shape = shape_of({"model_type": "llava", "tie_word_embeddings": True, "text_config": text, "vision_config": {}})
    assert (shape.family, shape.layers, shape.tied) == ("llama", 32, True)  # 32: Llama's, which transformers leaves out


@pytest.mark.parametrize("name", ["jamba", "granitemoehybrid", "lfm2"])
def test_an_architecture_that_is_not_known_is_named_with_those_that_are(name: str):
    with pytest.raises(NotFoundError, match=rf"'{name}' is not known here: there are .*llama.*qwen2"):
        shape_of(LLAMA | {"model_type": name})


@pytest.mark.parametrize("field", sorted(LLAMA.keys() - {"model_type"}))
@pytest.mark.parametrize("value", [None, 0, -1, 2.5, "64", True, [64]])
def test_a_size_that_is_missing_or_none_is_named(field: str, value: Any):
    with pytest.raises(PlanError, match=field):
        shape_of(LLAMA | {field: value})
    with pytest.raises(PlanError, match=f"has no {field}"):
        shape_of({key: given for key, given in LLAMA.items() if key != field})


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model_type": None}, "names no model_type"),
        ({"model_type": ["llama"]}, "names no model_type"),
        ({"hidden_size": 66}, "4 heads do not divide a width of 66"),
        ({"num_key_value_heads": -2}, "num_key_value_heads is -2"),
        (
            {"model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 6},
            "cannot go through 6 of 4 experts",
        ),
        ({"num_key_value_heads": 3}, "3 key and value heads do not divide 4 heads"),
        ({"num_hidden_layers": 10**400}, "num_hidden_layers is 1000"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', neither true nor false"),
        ({"model_type": "gemma2", "layer_types": "full"}, "layer_types is 'full', no list"),
    ],
)
def test_a_config_that_no_model_can_have_is_refused_in_words(changed: dict[str, Any], words: str):
    with pytest.raises(PlanError, match=words):
        shape_of(LLAMA | changed)
