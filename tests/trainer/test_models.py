"""Models: their counts are what arithmetic says, their loss is the plain one, their settings are held to."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.trainer.helpers import config
from trainer.job import UserError
from trainer.language import LanguageModel
from trainer.layers import tagged
from trainer.loss import readout_loss
from trainer.models import make
from trainer.settings import checked
from trainer.shape import CHOICES
from trainer.transformer import Transformer, _turned

TRANSFORMERS = [
    {"activation": activation, "norm": norm, "norm_position": norm_position, "position": position, **more}
    for activation, norm, norm_position, position in itertools.product(
        CHOICES["activation"], CHOICES["norm"], CHOICES["norm_position"], CHOICES["position"]
    )
    for more in ({"tied": True, "bias": False}, {"tied": False, "bias": True})
]
LSTMS = [{"architecture": "lstm", "tied": tied, "depth": depth} for tied in (True, False) for depth in (1, 2)]
SMALL = {"width": 24, "heads": 3, "depth": 2, "seq_len": 8, "ffn_ratio": 2.5}


def made(vocab_size: int = 50, **changes: Any) -> LanguageModel:
    """A model with its first values."""
    return make(checked(config(**changes)), vocab_size)


@pytest.mark.parametrize("changes", [*TRANSFORMERS, *LSTMS], ids=str)
def test_every_kind_of_model_has_as_many_parameters_as_arithmetic_says(changes: dict):
    model = made(**SMALL | changes)
    assert sum(p.numel() for p in model.parameters()) == model.shape.n_params == sum(model.shape.parts.values())
    assert {one.name for one in tagged(model)} == {name for name, _ in model.named_parameters()}
    if changes.get("position") == "learned":
        assert model.shape.n_params - model.shape.n_non_embedding > model.shape.parts["embedding"]


@pytest.mark.parametrize("changes", [*TRANSFORMERS[::7], *LSTMS], ids=str)
def test_loss_and_gradients_are_those_of_plain_cross_entropy(changes: dict):
    model = made(**SMALL | changes)
    tokens = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    hidden, _ = model(tokens[:, :-1])
    loss = model.loss(hidden, tokens[:, 1:])
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    plain = F.cross_entropy(
        model.logits(model(tokens[:, :-1])[0]).flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
    )
    plain.backward()
    torch.testing.assert_close(loss, plain)
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(model.loss(model(tokens[:, :-1])[0], tokens[:, 1:]), plain.detach())


@pytest.mark.parametrize(("autocast", "within"), [(False, 1e-6), (True, 1e-2)], ids=["float32", "bfloat16"])
def test_a_loss_in_blocks_is_the_loss_in_one(autocast: bool, within: float, monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(20, 6, generator=generator), torch.randn(11, 6, generator=generator)
    targets = torch.randint(0, 11, (20,), generator=generator)

    def values(loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(h, w)
        (2 * loss).backward()
        assert h.grad is not None and w.grad is not None
        return [loss.detach(), h.grad, w.grad]

    whole = values(lambda h, w: readout_loss(h, w, targets, 0.5))
    plain = values(lambda h, w: F.cross_entropy((0.5 * h @ w.T).float(), targets, reduction="sum"))
    monkeypatch.setattr("trainer.loss.BLOCK", 33)  # three tokens at once
    blocks = values(lambda h, w: readout_loss(h, w, targets, 0.5))
    for one, other, by_torch in zip(whole, blocks, plain, strict=True):
        torch.testing.assert_close(one, other, atol=within, rtol=within)
        torch.testing.assert_close(one, by_torch, atol=3 * within, rtol=3 * within)


def test_a_second_backward_pass_through_the_loss_is_an_error():
    hidden, weight = torch.randn(4, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    loss = readout_loss(hidden, weight, torch.zeros(4, dtype=torch.int64))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        loss.backward()


@pytest.mark.parametrize("changes", [{"activation": "gelu"}, {"activation": "swiglu", "tied": False}], ids=str)
def test_forward_flops_of_a_transformer_are_those_that_torch_counts(changes: dict):
    """But for attention: torch counts every pair of tokens, and a causal model needs half of them and the diagonal."""
    model = made(**SMALL | changes)
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model.logits(model(tokens)[0])
    causal = model.shape.forward_flops(8) * 16
    unseen = model.shape.depth * 4.0 * 24 * (8 - (8 + 1) / 2) * 16
    assert counter.get_total_flops() == causal + unseen
    assert model.shape.train_flops(8) == 3 * model.shape.forward_flops(8)


def test_the_logits_depend_on_no_token_after_them():
    for changes in ({}, {"position": "learned", "norm_position": "post"}, {"architecture": "lstm"}):
        model = made(**{**SMALL, **changes}).eval()
        tokens = torch.arange(8)[None]
        changed = tokens.clone()
        changed[0, 5:] = 40
        one, other = (model(each)[0] for each in (tokens, changed))
        assert one[0, :5].equal(other[0, :5]) and not one[0, 5].equal(other[0, 5])


def test_rotary_positions_know_distances_only():
    model = made(**SMALL).eval()
    assert isinstance(model, Transformer)
    q = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    turned = _turned(q[:, :, :1].expand(-1, -1, 8, -1), model.angles)
    products = turned[0, 0] @ turned[0, 0].T
    for distance in range(4):
        torch.testing.assert_close(products.diagonal(distance), products[0, distance].expand(8 - distance))


def test_an_lstm_carries_its_state_on_as_if_the_text_were_one():
    model = made(architecture="lstm", width=16, depth=2).eval()
    tokens = torch.arange(12)[None]
    whole, after = model(tokens)
    first, state = model(tokens[:, :5])
    second, end = model(tokens[:, 5:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(end, after)
    assert not state[0].requires_grad


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 30, "heads": 4}, "width 30 cannot be divided by 4 heads: take 2 or 3 or 5"),
        ({"width": 30, "heads": 6}, "a head of 5 is odd, and rotary positions turn pairs"),
        ({"width": 15, "heads": 3, "position": "sinusoidal"}, "width 15 is odd"),
        ({"activation": "tanh"}, "activation is 'tanh': choose gelu or"),
        ({"architecture": "rnn"}, "architecture is 'rnn': choose transformer or lstm"),
        ({"zero_readout": True}, "set tied to false"),
        ({"parametrization": "completep", "optimizer": "sgd"}, "take mup"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"width": 0}, "width is 0: give a whole number of at least 1"),
        ({"base_heads": 3, "base_width": 16}, "base_heads 3 does not divide base_width 16"),
        (
            {"zero_query": True, "guard_steps": 2},
            "behind what begins at 0 the first gradients are 0: give 0 or at least 3",
        ),
        ({"architecture": "lstm", "dtype": "fp16", "device": "cpu"}, "an LSTM cannot be trained in fp16 on a CPU"),
        ({"ffn_ratio": 0.0}, "ffn_ratio 0.0 of width 128 leaves no inner width: take a larger one"),
        ({"ffn_ratio": 1e308}, "ffn_ratio 1e.308 of width 128 is too wide: take a smaller one"),
        ({"lr": float("inf")}, "lr is inf: give a number of at least 0"),
    ],
)
def test_a_model_that_cannot_be_is_refused_with_words(changes: dict, words: str):
    with pytest.raises(UserError, match=words):
        make(checked(config(**changes)), 50)
