"""What the settings of the bundled recipes mean to the estimator."""

from __future__ import annotations

from typing import Any

import pytest

from chiplog.estimate.gpus import gpu
from chiplog.estimate.job import Job
from chiplog.estimate.jobs import planned_job
from chiplog.estimate.memory import ROPE, at_start, trained_params
from chiplog.estimate.tokens import steps
from chiplog.recipes import load_recipe


def planned(gpus: int = 1, recipe: str = "lora_finetune_distributed", **changes: Any) -> Job:
    config = load_recipe(recipe).settings | {"model": "meta-llama/Llama-3.2-1B", "max_seq_len": 512, **changes}
    counted = steps(
        [100] * 400, batch_size=16, micro_batch_size=config["micro_batch_size"], epochs=1, max_seq_len=512,
        packed=config["packed"],
    )  # fmt: skip
    return planned_job(config, counted, card=gpu("h100-80gb-sxm"), gpus=gpus)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"method": "lora", "dora": False, "loss": "chunked", "packed": False, "checkpointing": "none"}),
        ({"use_dora": True}, {"method": "lora", "dora": True}),
        ({"quantize_base": True}, {"method": "qlora", "dora": False, "weight_bits": 4}),
        ({"quantize_base": True, "use_dora": True}, {"method": "qlora", "dora": True}),
        ({"chunked_loss": False}, {"loss": "plain"}),
        ({"packed": True, "micro_batch_size": 2}, {"packed": True, "seq_len": 512, "micro_batch": 2}),
        ({"activation_checkpointing": True, "compile": True}, {"checkpointing": "full", "compile": True}),
    ],
    ids="-".join,
)
def test_a_setting_reaches_the_job_that_is_estimated(changes: dict[str, Any], expected: dict[str, Any]):
    job = planned(**changes)
    assert {name: getattr(job, name) for name in expected} == expected


def test_the_gpus_of_our_distributed_recipe_hold_the_whole_model_or_divide_it_as_it_says():
    one, whole, divided = planned(), planned(gpus=4, shard_model=False), planned(gpus=4)
    assert (whole.gpus, whole.sharding, whole.micro_batch) == (4, "DDP", 4)
    assert at_start(whole) == pytest.approx(at_start(one))
    assert (divided.gpus, divided.sharding, divided.micro_batch) == (4, "FSDP of frozen weights", 4)
    whole_on_each = 2 * trained_params(one) + 4 * ROPE * one.shape.head_dim  # what is trained, and a table
    assert at_start(divided) - whole_on_each == pytest.approx((at_start(one) - whole_on_each) / 4)
    assert planned(gpus=4, recipe="lora_finetune_single_device").sharding == "DDP"
