"""A model that two processes divide, on the CPU with gloo: every family and setting computes what one process does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torchao.dtypes.nf4tensor import NF4Tensor

from tests.recipes.helpers import adapter, defaults, events, finetune, make_model, write_splits
from tests.recipes.test_distributed import driver, ended, start_two
from trainer import guards

GEMMA = {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 24, "final_logit_softcapping": 3.0}
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_key_value_heads": 4}
SMALL = {"hidden_size": 128, "intermediate_size": 128, "num_key_value_heads": 4}
# The family, its shape, settings, and what share of the frozen weights one of two processes holds at most.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], float]] = {
    "untied, odd vocabulary": ("llama", {"tie_word_embeddings": False, "vocab_size": 331}, {}, 0.52),
    "gemma2": ("gemma2", GEMMA, {"use_dora": True}, 0.52),
    "qwen2": ("qwen2", {}, {"use_dora": True, "lora_dropout": 0.0, "chunked_loss": False}, 0.52),
    "recomputed": ("llama", {}, {"activation_checkpointing": True, "micro_batch_size": 1}, 0.52),
    "packed": ("llama", {}, {"packed": True, "batch_size": 2, "use_dora": True}, 0.52),
    "compiled": ("llama", {}, {"compile": True, "activation_checkpointing": True}, 0.52),
    "in 4 bits": ("llama", WIDE, {"quantize_base": True}, 0.56),
    "in 4 bits, too small to cut": ("llama", SMALL, {"quantize_base": True, "max_steps": 2}, 0.9),
}
SEEN = ["optimizer coverage", "gradient reach", "weights move", "frozen stays frozen", "budget met"]
EACH = """
import json, os
from tests.recipes.test_sharding import held_bytes
os.environ["TORCH_COMPILE_BACKEND"] = "aot_eager"
from types import SimpleNamespace
from trainer.job import Stop
import yaml
config = yaml.safe_load(Path(sys.argv[2]).read_text())
ranks = finetuning.join("cpu")
for name, settings in config.items():
    out = Path(sys.argv[4]) / name
    out.mkdir(exist_ok=True)
    run = finetuning.Finetuning(finetuning.checked(SimpleNamespace(**settings)), out, ranks, "driver")
    (out / f"held-{ranks.rank}.json").write_text(json.dumps(held_bytes(run.model)))
    assert run.train(stop)
ranks.leave()
sys.exit(0)
"""


def held_bytes(model: torch.nn.Module) -> int:
    """Bytes of the frozen weights that this process holds."""
    local: list[Any] = [getattr(p, "_local_tensor", p) for p in model.parameters() if not p.requires_grad]
    inner = [getattr(p, name) for p in local if isinstance(p, NF4Tensor) for name in p.__tensor_flatten__()[0]]
    plain = [p for p in local if not isinstance(p, NF4Tensor)]
    return sum(each.numel() * each.element_size() for each in inner + plain)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], Path]]:
    """The settings of every case, and the folder in which two processes ran it one after the other."""
    folder = tmp_path_factory.mktemp("sharded")
    data = str(write_splits(folder / "words.json"))
    chosen: dict[str, Any] = {"dataset": data, "val_split": "validation", "dtype": "fp32", "device": "cpu"}
    chosen |= {"max_seq_len": 64, "batch_size": 4, "lora_rank": 4, "lr": 0.002, "warmup_steps": 2, "max_steps": 5}
    settings = {}
    for name, (family, shape, changes, _) in CASES.items():
        model = make_model(folder / "models" / name, family, **shape)
        settings[name] = {**defaults("lora_finetune_distributed"), **chosen, "model": str(model), **changes}
    assert ended(start_two(settings, folder / "two", script=driver(folder, EACH))) == [0, 0]
    return {name: (settings[name], folder / "two" / name) for name in CASES}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch.compile
@pytest.mark.parametrize("name", CASES)
def test_a_divided_model_computes_what_a_whole_one_does_and_each_process_holds_about_half(
    name: str, runs: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "aot_eager")  # no C++ compiler is needed then
    (settings, out), most = runs[name], CASES[name][3]
    run = finetune(settings, tmp_path)
    for kind in ("step", "validation"):
        one, two = ([e["loss"] for e in events(folder, kind)] for folder in (tmp_path, out))
        assert two == pytest.approx(one, abs=1e-5)
    for name_, weight in adapter(tmp_path).items():
        torch.testing.assert_close(adapter(out)[name_], weight, atol=1e-4, rtol=0)
    one, two = (events(folder, "start")[0] for folder in (tmp_path, out))
    assert (two["n_params"], two["n_trainable"]) == (one["n_params"], one["n_trainable"])
    for rank in (0, 1):
        share = json.loads((out / f"held-{rank}.json").read_text()) / held_bytes(run.model)
        assert 0.4 < share < most, share


@pytest.mark.parametrize("name", CASES)
def test_guards_look_at_weights_that_are_divided_and_in_4_bits(name: str, runs: dict):
    found = {one["guard"]: one for one in guards.read(runs[name][1])}
    # Two steps of a warm-up that begins at 0 move no B, so that no A gets a gradient.
    fired = {"gradient reach", "weights move"} if runs[name][0]["max_steps"] == 2 else set()
    assert list(found) == SEEN and {name for name, one in found.items() if not one["ok"]} == fired, found
