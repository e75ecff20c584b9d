"""The LoRA recipe: what it computes, what it leaves behind, and how it goes on after an interruption."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.recipes.helpers import Never, adapter, defaults, events, finetune, load, make_llama, same, start
from trainer.batches import collate, data_order
from trainer.chat import Example
from trainer.job import UserError

SCRIPT = "recipes/lora_finetune_single_device.py"
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
EVERY_TARGET = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class AfterStep:
    """A stop that is asked for during step `n`."""

    def __init__(self, n: int):
        self.n, self.looked = n, 0

    @property
    def asked(self) -> bool:
        self.looked += 1
        return self.looked >= self.n


def torchtune_logits(model_dir: Path, tokens: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    models = load("recipes/lora_models.py")
    shape = models.read_shape(model_dir, settings["max_seq_len"])
    config = SimpleNamespace(**settings | {"lora_alpha": 8})
    with torch.no_grad():
        return models.load_model(model_dir, shape, config, torch.device("cpu"))(tokens)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"tie_word_embeddings": False, "num_key_value_heads": 4, "rms_norm_eps": 1e-3, "max_shard_size": "20KB"},
        # A base of 1e5 puts some frequencies of these short heads into each of llama3's three bands.
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e5, "factor": 32.0, **LLAMA3_ROPE}},
    ],
    ids=["tied", "untied in shards", "llama3 rope"],
)
def test_the_torchtune_model_computes_what_transformers_does(shape: dict, settings: dict, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    folder = make_llama(tmp_path / "model", **shape)
    tokens = torch.randint(0, 250, (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    assert theirs.std() > 0.5
    torch.testing.assert_close(torchtune_logits(folder, tokens, settings), theirs, atol=1e-4, rtol=1e-4)


def test_rope_written_by_older_and_newer_transformers_is_read_alike(llama: Path, tmp_path: Path):
    read_shape = load("recipes/lora_models.py").read_shape
    config = json.loads((llama / "config.json").read_text())
    rope = {"rope_type": "llama3", "factor": 8.0, **LLAMA3_ROPE}
    shapes = []
    for i, ways in enumerate(
        [
            {"rope_parameters": {**rope, "rope_theta": 5e5}},
            {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": rope},
        ]
    ):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "config.json").write_text(json.dumps(config | ways))
        shapes.append(read_shape(tmp_path / str(i), 64))
    assert shapes[0] == shapes[1]
    assert (shapes[0].builds["rope_base"], shapes[0].builds["scale_factor"]) == (5e5, 8.0)


def test_a_run_learns_and_leaves_what_its_contract_says(settings: dict, llama: Path, tmp_path: Path):
    finetune(settings, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "metrics.jsonl",
        "checkpoints",
        "adapter",
        "guards.json",
        "DONE",
    }
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_20"]
    assert json.loads((tmp_path / "DONE").read_text()) == {"step": 20}

    [first] = events(tmp_path, "start")
    expected = {"n_samples": 40, "n_truncated": 0, "steps_per_epoch": 10, "total_steps": 20, "step": 0, "device": "cpu"}
    assert expected.items() <= first.items()
    weights = [load_file(file) for file in llama.glob("*.safetensors")]
    assert first["n_params"] == sum(weight.numel() for file in weights for weight in file.values())
    assert first["n_trainable"] == sum(p.numel() for p in adapter(tmp_path).values())

    steps = events(tmp_path, "step")
    assert [(line["step"], line["epoch"]) for line in steps] == [(i + 1, i // 10 + 1) for i in range(20)]
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"]
    assert [round(line["lr"], 6) for line in steps[:3]] == [0, 0.005, 0.01]
    assert all(0 < line["label_tokens"] < line["tokens"] <= line["padded_tokens"] for line in steps)
    # A word's letters and its end token are learnt, so over an epoch: letters + samples.
    words = json.loads(Path(settings["dataset"]).read_text())["train"]
    assert sum(line["label_tokens"] for line in steps[:10]) == sum(len(row["output"]) + 1 for row in words)

    [end] = events(tmp_path, "end")
    assert end["step"] == 20
    assert end["train_s"] == pytest.approx(sum(line["seconds"] for line in steps))
    assert end["peak_mem_bytes"] >= steps[0]["peak_mem_bytes"] > 2**20

    about = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"], about["target_modules"]) == (4, 8, settings["lora_targets"])
    assert about["base_model_name_or_path"] == str(llama)
    assert adapter(tmp_path)["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"].shape == (48, 4)


def test_the_base_weights_stay_as_they_are(settings: dict, llama: Path, tmp_path: Path):
    models = load("recipes/lora_models.py")
    run = finetune(settings, tmp_path)
    fresh = models.load_model(llama, run.shape, run.config, torch.device("cpu")).state_dict()
    trained = run.model.state_dict()
    base = [name for name in trained if name not in run.adapter]
    assert base and all(torch.equal(trained[name], fresh[name]) for name in base)
    assert all(trained[name].any() for name in run.adapter)


@pytest.mark.parametrize("changes", [{}, {"lora_dropout": 0.3, "lr_schedule": "constant"}, {"dtype": "bf16"}], ids=str)
def test_a_run_stopped_at_any_step_and_started_again_ends_with_the_same_bits(
    changes: dict, settings: dict, tmp_path: Path
):
    settings |= changes
    finetune(settings, tmp_path / "whole")
    for step in (3, 10, 17):  # within an epoch, at its end, within the next
        finetune(settings, tmp_path / "parts", AfterStep(step - sum_steps(tmp_path / "parts")))
        assert [path.name for path in (tmp_path / "parts" / "checkpoints").iterdir()] == [f"step_{step}"]
        assert not (tmp_path / "parts" / "DONE").exists()
    finetune(settings, tmp_path / "parts")
    assert same(adapter(tmp_path / "whole"), adapter(tmp_path / "parts"))
    losses = [[line["loss"] for line in events(tmp_path / name, "step")] for name in ("whole", "parts")]
    assert losses[0] == losses[1]
    assert [line["step"] for line in events(tmp_path / "parts", "start")] == [0, 3, 10, 17]


def sum_steps(out: Path) -> int:
    return len(events(out, "step")) if (out / "metrics.jsonl").exists() else 0


def test_a_signal_ends_the_job_with_75_and_the_next_start_finishes_it_with_the_same_bits(
    settings: dict, tmp_path: Path
):
    settings |= {"epochs": 30}
    finetune(settings, tmp_path / "whole")
    out = tmp_path / "killed"
    job = start(SCRIPT, settings, out)
    while job.poll() is None and not (out / "metrics.jsonl").exists():
        time.sleep(0.01)
    while job.poll() is None and sum_steps(out) < 5:
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    _, log = job.communicate(timeout=120)
    assert job.returncode == 75, log
    stopped = sum_steps(out)
    assert 5 <= stopped < 300
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step_{stopped}"]

    again = start(SCRIPT, settings, out)
    _, log = again.communicate(timeout=120)
    assert again.returncode == 0, log
    assert f"Going on after step {stopped}." in log
    assert same(adapter(tmp_path / "whole"), adapter(out))

    # The log is one that reads like torchtune's.
    assert log.startswith(
        "Running lora_finetune_single_device with resolved config:\n\nactivation_checkpointing: false\n"
    )
    assert "Starting checkpoint save...\nCheckpoint saved in 0.0" in log
    assert "30|300|Loss: " in log
    assert len(log) < 20_000


def test_a_run_that_is_done_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    (tmp_path / "DONE").write_text('{"step": 3}')
    monkeypatch.setattr("sys.argv", [SCRIPT, "--config", "none.yaml", "--out", str(tmp_path)])
    assert load("recipes/finetuning.py").main(Path(SCRIPT), Never) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'DONE'} is there: nothing to do\n"
    assert [path.name for path in tmp_path.iterdir()] == ["DONE"]


def test_checkpoints_come_every_n_steps_and_only_the_last_is_kept(settings: dict, tmp_path: Path):
    finetune(settings | {"save_every_n_steps": 3, "max_steps": 11}, tmp_path)
    assert [line["step"] for line in events(tmp_path, "checkpoint")] == [3, 6, 9, 10]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_10"]
    assert json.loads((tmp_path / "DONE").read_text()) == {"step": 11}


def test_a_checkpoint_of_other_settings_is_not_gone_on_from(settings: dict, tmp_path: Path):
    finetune(settings, tmp_path, AfterStep(3))
    with pytest.raises(UserError, match=r"step_3 was made with another seed, lr: put it back, or take another --out"):
        finetune(settings | {"lr": 0.02, "seed": 1, "log_every_n_steps": 5}, tmp_path)


def test_micro_batches_change_neither_the_loss_nor_the_adapter(settings: dict, tmp_path: Path):
    finetune(settings | {"batch_size": 8, "clip_grad_norm": 0.5}, tmp_path / "whole")
    finetune(settings | {"batch_size": 8, "clip_grad_norm": 0.5, "micro_batch_size": 2}, tmp_path / "micro")
    whole, micro = (adapter(tmp_path / name) for name in ("whole", "micro"))
    for name in whole:
        torch.testing.assert_close(micro[name], whole[name], atol=1e-5, rtol=0)
    for one, other in zip(*(events(tmp_path / name, "step") for name in ("whole", "micro")), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert (one["tokens"], one["label_tokens"]) == (other["tokens"], other["label_tokens"])
        assert one["padded_tokens"] >= other["padded_tokens"]


def test_every_seed_and_epoch_has_an_order_of_its_own():
    orders = [data_order(40, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert data_order(40, 1, 1) == orders[3]


def test_labels_are_the_answer_shifted_by_one():
    batch = collate([Example([5, 6, 7, 8], 2), Example([5, 9], 0)], pad_id=0)
    assert batch.tokens.tolist() == [[5, 6, 7, 8], [5, 9, 0, 0]]
    assert batch.labels.tolist() == [[-100, 7, 8, -100], [9, -100, -100, -100]]
    assert batch.label_tokens == 3


def test_the_seed_changes_the_adapter(settings: dict, tmp_path: Path):
    for seed in (0, 1):
        finetune(settings | {"seed": seed, "max_steps": 2}, tmp_path / str(seed))
    losses = [events(tmp_path / str(seed), "step")[0]["loss"] for seed in (0, 1)]
    assert losses[0] != losses[1]
    assert not same(adapter(tmp_path / "0"), adapter(tmp_path / "1"))


def test_long_samples_are_cut_and_counted(settings: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    finetune(settings | {"max_seq_len": 12, "max_steps": 1}, tmp_path)
    lengths = [2 * len(row["input"]) + 5 for row in json.loads(Path(settings["dataset"]).read_text())["train"]]
    [first] = events(tmp_path, "start")
    assert first["n_truncated"] == sum(length > 12 for length in lengths) > 0
    assert f"{first['n_truncated']} of 40 samples are cut to max_seq_len 12" in caplog.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "fp16"}, "dtype is 'fp16': choose bf16 or fp32"),
        ({"lora_rank": 0}, "lora_rank is 0: give a whole number of at least 1"),
        ({"max_steps": 2.5}, "max_steps is 2.5: give a whole number"),
        ({"lora_alpha": "16"}, "lora_alpha is '16': give a number"),
        ({"micro_batch_size": 3}, "micro_batch_size 3 does not divide batch_size 4: take 1, 2, 4"),
        ({"batch_size": 41}, "batch_size 41 is more than the 40 samples: lower it"),
        ({"lora_targets": ["q_proj", "up_proj"]}, "some of gate_proj, up_proj, down_proj: give all three or none"),
        ({"lora_targets": ["wq"]}, "lora_targets has wq: choose from q_proj"),
        ({"model": "/nowhere"}, "model is '/nowhere', which is not there"),
        ({"dataset": None}, "dataset is None, which is not there"),
        ({"device": "tpu"}, "device 'tpu' does not exist"),
        ({"max_seq_len": 600}, "max_seq_len is 600, but the model reads 512 tokens"),
        ({"max_seq_len": 6}, r"the prompt of training row 1 has 6 tokens, max_seq_len is 6"),
        ({"lr": 1e30, "warmup_steps": 0}, "the loss is nan at step 2: lower lr"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_work_are_refused_in_words(changes: dict, words: str, settings: dict, tmp_path: Path):
    with pytest.raises(UserError, match=words):
        finetune(settings | changes, tmp_path)
    assert not (tmp_path / "DONE").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "phi3"}, "model_type is 'phi3'; this recipe trains Llama"),
        ({"attention_bias": True}, "has attention_bias True, which torchtune's Llama does not have"),
        ({"head_dim": 16}, "has head_dim 16"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2}}, "no rope of type yarn"),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, **LLAMA3_ROPE, "low_freq_factor": 2}},
            "no rope of type llama3 with {'low_freq_factor': 2}",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_model_that_torchtune_cannot_build_is_refused_in_words(
    changes: dict, words: str, llama: Path, tmp_path: Path
):
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=words):
        load("recipes/lora_models.py").read_shape(tmp_path, 64)


def test_a_missing_shard_or_weight_is_named(settings: dict, tmp_path: Path):
    folder = make_llama(tmp_path / "model", max_shard_size="20KB")
    shard = sorted(folder.glob("model-0*.safetensors"))[1]
    weights = load_file(shard)
    gone = weights.pop(next(name for name in weights if "layers" in name))
    save_file(weights, shard)
    assert gone.numel()
    with pytest.raises(UserError, match=r"lacks the weights of layers\."):
        finetune(settings | {"model": str(folder)}, tmp_path / "run")
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is missing: download"):
        finetune(settings | {"model": str(folder)}, tmp_path / "run")


def test_a_users_mistake_ends_the_job_with_one_line_and_exit_code_1(settings: dict, tmp_path: Path):
    settings.pop("lr")
    job = start(SCRIPT, settings, tmp_path)
    _, log = job.communicate(timeout=120)
    assert job.returncode == 1
    last = f"error: {tmp_path / 'config.yaml'} lacks lr: give every setting of lora_finetune_single_device.yaml\n"
    assert log.endswith(last)
    assert "Traceback" not in log


def test_settings_that_recipe_and_evaluation_share_have_the_same_defaults():
    recipe, evaluation = defaults("lora_finetune_single_device"), defaults("evaluate")
    shared = recipe.keys() & evaluation.keys()
    assert shared == {"model", "dataset", "system_prompt", "prompt", "dtype", "device"}
    assert all(recipe[key] == evaluation[key] for key in shared)
