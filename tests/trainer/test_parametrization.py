"""muP: acceptance tests 1, 2 and 5 of the study; 3 and 4 are slow, in test_transfer.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.trainer.helpers import config
from tests.trainer.test_models import LSTMS, made
from trainer.coordinates import Sizes, sizes, slopes
from trainer.layers import tagged
from trainer.optimizer import make_optimizer
from trainer.settings import checked

UPDATES = {
    "adam": {"optimizer": "adamw", "lr": 2.0**-7, "weight_decay": 0.1},
    "sgd": {"optimizer": "sgd", "lr": 0.25, "momentum": 0.9, "weight_decay": 0.001},
}
TRANSFORMERS: list[dict] = [{}, {"tied": False, "position": "learned"}]
LEVEL = 0.10
UNTIED = {"tied": False, "zero_readout": True, "base_width": 64, "seq_len": 32}


def batch(seed: int) -> torch.Tensor:
    """ "row seq+1" tokens that follow from one another: what random ones teach is noise, which width averages out."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(0, 64, (8, 1), generator=generator)]
    for _ in range(32):
        tokens.append((tokens[-1] * 7 + torch.randint(1, 4, (8, 1), generator=generator)) % 64)
    return torch.cat(tokens, 1)


def grown(widths: tuple[int, ...] = (64, 128, 256, 512, 1024), seeds: int = 2, **changes: Any) -> dict:
    """The slopes of all modules at steps 1 to 4."""
    measured: dict[int, list[Sizes]] = {
        width: [
            sizes(checked(config(width=width, seed=seed, **UNTIED | changes)), 128, batch(seed))
            for seed in range(seeds)
        ]
        for width in widths
    }
    return {key: slope for key, slope in slopes(measured).items() if 1 <= key[0] <= 4}


@pytest.mark.parametrize(
    ("kind", "update", "changes"),
    [
        *(("mup", update, changes) for update in UPDATES for changes in (*TRANSFORMERS, LSTMS[1])),
        *(("completep", "adam", changes) for changes in TRANSFORMERS),
    ],
    ids=str,
)
def test_at_the_base_shape_all_parametrisations_are_the_same_bit_for_bit(kind: str, update: str, changes: dict):
    trained = []
    for parametrization in ("standard", kind):
        settings = {
            "width": 32,
            "depth": 2,
            "seq_len": 32,
            "parametrization": parametrization,
            **UPDATES[update],
            **changes,
        }
        model = made(128, **settings, base_width=32, base_depth=2)
        optimizer = make_optimizer(model, config(**settings, base_width=32, base_depth=2))
        for step in range(5):
            hidden, _ = model(batch(step)[:, :-1])
            optimizer.zero_grad()
            (model.loss(hidden, batch(step)[:, 1:]) / 256).backward()
            optimizer.step()
        trained.append(dict(model.named_parameters()))
    assert all(trained[0][name].equal(trained[1][name]) for name in trained[0])


@pytest.mark.parametrize("update", UPDATES)
def test_under_mup_no_output_of_a_transformer_grows_with_width(update: str):
    found = grown(parametrization="mup", **UPDATES[update])
    assert len(found) > 40
    assert {key: slope for key, slope in found.items() if abs(slope) > LEVEL} == {}


@pytest.mark.parametrize(("update", "low", "high"), [("adam", 0.8, 1.2), ("sgd", 0.8, 1.2)], ids=["adam", "sgd"])
def test_the_coordinate_check_sees_that_the_standard_parametrisation_grows(update: str, low: float, high: float):
    """The logits double with the width after the first step."""
    found = grown(parametrization="standard", **UPDATES[update])
    assert low < found[1, "logits"] < high


def test_the_coordinate_check_sees_adams_rule_under_sgd(monkeypatch: pytest.MonkeyPatch):
    """Hidden matrices move too little by a whole power of the width."""
    from trainer.parametrization import Parametrization

    rule = Parametrization.lr
    monkeypatch.setattr(Parametrization, "lr", lambda self, role, update: rule(self, role, "adam"))
    assert grown(parametrization="mup", **UPDATES["sgd"])[1, "logits"] < -0.8


@pytest.mark.parametrize("changes", [{"tied": True, "zero_readout": False}, {"zero_readout": False}], ids=str)
def test_with_a_readout_that_is_not_zero_the_logits_of_mup_do_not_grow(changes: dict):
    found = grown(widths=(64, 128, 256, 512), parametrization="mup", **UPDATES["adam"] | changes)
    assert max(found[step, "logits"] for step in range(1, 5)) <= LEVEL
    hidden = {key: slope for key, slope in found.items() if key[1] != "logits"}
    assert {key: slope for key, slope in hidden.items() if slope > LEVEL} == {}


@pytest.mark.parametrize("changes", [{}, {"tied": False, "bias": True, "position": "learned"}, LSTMS[3]], ids=str)
@pytest.mark.parametrize("update", UPDATES)
def test_every_parameter_is_in_exactly_one_group_with_what_its_role_says(update: str, changes: dict):
    settings = {"width": 64, "base_width": 16, "depth": 2, "parametrization": "mup", **UPDATES[update], **changes}
    model = made(128, **settings)
    optimizer = make_optimizer(model, config(**settings))
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(groups)
    lr, m = UPDATES[update]["lr"], 4
    expected = {"adam": {"hidden": lr / m, "else": lr}, "sgd": {"hidden": lr, "else": lr * m}}[update]
    for _, p, tag in tagged(model):
        assert groups[p]["lr"] == expected.get(tag.role, expected["else"])
        decays = {"adam": {"hidden": 0.1 * m, "else": 0.1}, "sgd": {"hidden": 0.001, "else": 0.001 / m}}[update]
        decay = 0.0 if tag.role == "vector" else decays.get(tag.role, decays["else"])
        assert groups[p]["weight_decay"] == pytest.approx(decay)
    assert set(groups) == set(model.parameters())


def test_first_values_have_the_size_that_the_table_says():
    wide = made(4096, width=512, base_width=64, parametrization="mup", tied=False, bias=True)
    for name, p, tag in tagged(wide):
        if p.dim() == 2:
            fan_in = p.shape[1]
            expected = {"hidden": fan_in**-0.5, "embedding": 0.02, "readout": 64**-0.5}[tag.role]
            assert p.std().item() == pytest.approx(expected, rel=0.03), name
    assert wide.rules.output_multiplier == 1 / 8


def test_completep_keeps_the_stream_of_a_deep_model_as_it_is():
    """Its learning rate stays and each block adds 1 / depth of what it did."""
    deep = made(width=32, depth=16, base_depth=2, parametrization="completep", lr=0.01)
    assert deep.rules.residual_multiplier == 1 / 8
    groups = make_optimizer(
        deep, config(width=32, depth=16, base_depth=2, parametrization="completep", lr=0.01)
    ).param_groups
    assert {group["lr"] for group in groups} == {0.01}
    assert {round(group["eps"] / 1e-8, 6) for group in groups} == {1.0, 0.125}


def test_sinusoidal_positions_grow_with_the_width_as_the_embedding_does():
    sizes_ = [
        made(position="sinusoidal", width=width, base_width=64, parametrization="mup").angles.abs().mean().item()  # pyright: ignore
        for width in (64, 1024)
    ]
    assert sizes_[1] == pytest.approx(sizes_[0], rel=0.02)


@pytest.mark.parametrize(("heads", "base"), [(None, 32), (1, 64), (2, 32)])
def test_attention_under_mup_scales_from_the_head_size_at_the_base_width(heads: int | None, base: int):
    """With heads left open the base model of width 32 has one of 32; with heads given, heads of the same size."""
    model = made(width=64, base_width=32, parametrization="mup", heads=heads)
    head = 64 // (heads or 1)
    assert model.blocks[0].attention.scale == pytest.approx(base**0.5 / head)  # pyright: ignore


def test_a_first_step_that_overflows_leaves_no_momentum_behind():
    chosen = checked(config(optimizer="sgd", momentum=0.9, dtype="fp16", width=64, depth=1, seq_len=8))
    model = made(width=64, depth=1, seq_len=8)
    optimizer, scaler = make_optimizer(model, chosen), torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    del [[torch.full_like(p, torch.nan) for p in model.parameters()] for _ in range(3)][:]  # what new memory may hold
    for value in (torch.inf, 1.0):
        before = [p.detach().clone() for p in model.parameters()]
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        scaler.step(optimizer)
        scaler.update()
    for p, kept in zip(model.parameters(), before, strict=True):
        moved = (kept - p.detach()) / chosen.lr
        torch.testing.assert_close(moved, moved.flatten()[0].expand_as(moved), atol=1e-3, rtol=1e-3)
        assert moved.abs().sum() > 0
