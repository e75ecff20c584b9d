"""The guards of one run: each fires where it should, and is silent where it should be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import nn

from tests.trainer.helpers import made, quiet
from trainer import guards
from trainer.guards import Guards, Outcome, budget_met, one_batch_overfit, optimizer_coverage, outcome


class Net(nn.Module):
    """Two layers, the second of which may be reached or not."""

    def __init__(self, *, reached: bool = True, dtype: torch.dtype = torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8, dtype=dtype), nn.Linear(8, 8, dtype=dtype)
        self.reached = reached

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)) if self.reached else self.first(x)


def watched(
    net: Net, make: Callable[[Net], torch.optim.Optimizer], meddle: Callable[[Net], object] = lambda net: None
) -> dict[str, Outcome]:
    """The outcomes of six steps."""
    optimizer = make(net)
    with TemporaryDirectory() as out:
        guarding = Guards(net, optimizer, Path(out), 0)
        train(net, optimizer, guarding, meddle)
        guarding.finish()
        return {one["guard"]: Outcome(**one) for one in guards.read(Path(out))}


def train(net: Net, optimizer: torch.optim.Optimizer, guarding: Guards, meddle: Callable[[Net], object]) -> None:
    """Six steps."""
    inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(1)).to(net.first.weight.dtype)
    for number in range(6):
        optimizer.zero_grad()
        (net(inputs) - 1).float().square().mean().backward()
        with guarding.step(number):
            optimizer.step()
        meddle(net)


def adam(net: Net) -> torch.optim.Optimizer:
    return torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.01)


def test_a_sound_training_passes_all_guards():
    net = Net()
    net.first.weight.requires_grad_(False)
    found = watched(net, adam)
    assert found.keys() == {"optimizer coverage", "gradient reach", "weights move", "frozen stays frozen"}
    assert all(one.ok and one.examined for one in found.values()), found


def test_a_parameter_without_a_gradient_is_named():
    found = watched(Net(reached=False), adam)["gradient reach"]
    assert not found.ok and "second.weight, second.bias" in found.found


def test_a_gradient_of_zeros_is_none():
    net = Net()
    net.second.weight.register_hook(torch.zeros_like)
    found = watched(net, adam)["gradient reach"]
    assert not found.ok and found.found == "no gradient in 5 steps: second.weight"


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        (lambda net: [net.first.weight, net.first.bias, net.second.weight], "second.bias in 0"),
        (lambda net: [*net.parameters(), net.first.bias], "first.bias in 2"),
    ],
)
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_in_no_group_or_in_two_is_named(groups: Callable, words: str):
    net = Net()
    found = optimizer_coverage(net, torch.optim.SGD(groups(net), lr=0.1))
    assert not found.ok and words in found.found
    assert optimizer_coverage(net, torch.optim.SGD(net.parameters(), lr=0.1)).ok


def test_weights_that_bf16_cannot_move_are_seen():
    """A step of 1e-5 is lost on weights of about 0.3, whose neighbours in bf16 are 1e-3 away."""
    net = Net(dtype=torch.bfloat16)
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(0.3)
    found = watched(net, lambda net: torch.optim.SGD(net.parameters(), lr=1e-7))["weights move"]
    assert not found.ok and "fewer than 1% of the entries" in found.found
    assert watched(Net(dtype=torch.bfloat16), adam)["weights move"].ok


def test_weights_have_the_warm_up_to_move_in(settings: dict, tmp_path: Path):
    """Gains of 1 cannot hold steps of less than 3e-8 in fp32, as are the first of a long warm-up to a small rate."""
    steps = {"lr": 1e-5, "lr_schedule": "constant", "warmup_steps": 2000, "max_steps": 30, "overfit_steps": 0}
    assert made(settings | steps, tmp_path).train(quiet())
    (moved,) = (one for one in json.loads((tmp_path / "guards.json").read_text()) if one["guard"] == "weights move")
    assert moved["ok"] and "in 30 steps" in moved["found"]


def test_a_frozen_parameter_that_changes_by_one_bit_is_seen():
    net = Net()
    net.first.bias.requires_grad_(False)

    def meddle(net: Net) -> None:
        net.first.bias.data.view(torch.int32)[3] ^= 1

    done = []
    found = watched(net, adam, lambda net: done or done.append(meddle(net)))["frozen stays frozen"]
    assert not found.ok and found.found == "frozen parameters changed: first.bias"


def test_a_model_that_cannot_learn_one_batch_is_seen():
    inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    target = torch.randn(16, 8, generator=torch.Generator().manual_seed(2))
    net = Net()
    before = {name: p.clone() for name, p in net.named_parameters()}
    assert one_batch_overfit(net, lambda net: (net(inputs) - target).square().mean(), steps=50, lrs=[0.01]).ok
    assert all(p.equal(before[name]) for name, p in net.named_parameters())  # a copy learnt
    cut = one_batch_overfit(net, lambda net: (net(inputs).detach() - target).square().mean())
    assert not cut.ok and "the loss on one batch should fall by 5%, and went: from" in cut.found
    slow = one_batch_overfit(net, lambda net: (0.01 * net(inputs) - target).square().mean())
    assert slow.ok and "at lr 0.1" in slow.found  # whatever a multiplier asks for


def test_a_check_that_examined_nothing_has_failed():
    found = outcome("structure", 0, [], "all are positive", "negative")
    assert not found.ok and found.found == "it examined nothing, so it shows nothing"
    assert outcome("structure", 2, [], "all are positive", "negative").ok
    frozen = Net().requires_grad_(False)
    spare = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    assert not optimizer_coverage(frozen, spare).ok


@pytest.mark.parametrize(
    ("tokens", "epochs", "words"),
    [(90, 0.9, "90 tokens instead of 100"), (100, 1.5, "the corpus was read 1.50 times, and 1 are planned")],
)
def test_a_budget_that_was_not_met_is_said(tokens: int, epochs: float, words: str):
    assert words in budget_met(tokens, 100, epochs, 1.0).found and not budget_met(tokens, 100, epochs, 1.0).ok
    assert budget_met(100, 100, 1.0, 1.0).ok


def test_outcomes_are_written_beside_those_of_an_earlier_start(tmp_path):
    guards.write(tmp_path, [Outcome("a", True, 1, "fine"), Outcome("b", True, 1, "fine")])
    guards.write(tmp_path, [Outcome("b", False, 1, "wrong")])
    assert [(one["guard"], one["ok"]) for one in guards.read(tmp_path)] == [("a", True), ("b", False)]
