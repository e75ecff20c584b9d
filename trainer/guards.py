"""Validity guards of one run: whether what was trained could be trained, did train, and was as much as planned.

torch and the standard library only, so that recipes of any framework can use it:

    guards = Guards(model, optimizer, out, steps_done)
    with guards.step(n):  # around each optimizer.step(), the gradients still there
        optimizer.step()
    guards.finish(budget_met(...))

Each outcome says what it looked at; one that looked at nothing has failed. They go into guards.json, which the
collector reads: a failed guard turns a conclusion into "not shown".
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from trainer import job

STEPS = 5  # after which gradients and weights are judged
MOVED = 0.01  # share of entries with a gradient that must have changed by then
FALLS = 0.05  # share by which the loss on one batch must fall
LRS = (1e-3, 1e-2, 1e-1)  # of Adam, at one of which it must
SAMPLE = 1 << 16  # entries of a tensor that are looked at
NAMED = 5
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Outcome:
    """What one guard saw."""

    guard: str
    ok: bool
    examined: int  # tensors, steps or tokens: what it looked at
    found: str  # in words; with `ok` what was measured, else what is wrong


def outcome(guard: str, examined: int, wrong: Iterable[str], fine: str, what: str) -> Outcome:
    """An outcome that failed where something is wrong, or where nothing was examined."""
    wrong = list(wrong)
    if not examined:
        return Outcome(guard, False, 0, "it examined nothing, so it shows nothing")
    if not wrong:
        return Outcome(guard, True, examined, fine)
    more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
    return Outcome(guard, False, examined, f"{what}: {', '.join(wrong[:NAMED])}{more}")


def write(folder: Path, outcomes: Iterable[Outcome]) -> None:
    """Writes `guards.json`: a list of outcomes, those of an earlier start kept where no new one has their name."""
    file = folder / "guards.json"
    found = {one["guard"]: one for one in read(folder)} | {one.guard: asdict(one) for one in outcomes}
    job.write_json(file, list(found.values()))


def read(folder: Path) -> list[dict]:
    """What `guards.json` holds; nothing where it is not there."""
    file = folder / "guards.json"
    return job.read_json(file) if file.is_file() else []


def optimizer_coverage(model: nn.Module, optimizer: torch.optim.Optimizer) -> Outcome:
    """Whether every trainable parameter is in exactly one group of the optimizer."""
    times: dict[int, int] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            times[id(p)] = times.get(id(p), 0) + 1
    trainable = {name: times.get(id(p), 0) for name, p in model.named_parameters() if p.requires_grad}
    wrong = [f"{name} in {n}" for name, n in trainable.items() if n != 1]
    return outcome(
        "optimizer coverage", len(trainable), wrong, f"{len(trainable)} parameters, each in one group",
        "parameters that are not in exactly one group",
    )  # fmt: skip


class Watch:
    """Looks at gradients and weights in the first steps, and at frozen parameters from the first to the last.

    It changes nothing, keeps what it compares in host memory, and of parameters that processes divide looks at this
    process's part. `settle`: steps of a warm-up, which the weights are given beside `steps` before they are judged,
    since bf16 cannot hold the first of its steps. `frozen_sample`: entries of a frozen tensor that are looked at; null:
    all, which is minutes for a model of billions.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, steps: int = STEPS, settle: int = 0,
        frozen_sample: int | None = None,
    ):  # fmt: skip
        self.model, self.optimizer, self.steps, self.seen = model, optimizer, steps, 0
        self.judged_after, self.frozen_sample = steps + settle, frozen_sample
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad} if steps else {}
        self.frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad} if steps else {}
        self.reached: set[str] = set()
        self.before = {name: _sample(p).cpu().clone() for name, p in self.trained.items()}
        self.with_gradient = {name: torch.zeros_like(kept, dtype=torch.bool) for name, kept in self.before.items()}
        self.frozen_before = {name: _digest(p, frozen_sample) for name, p in self.frozen.items()}
        self.moved: dict[str, tuple[float, float]] = {}

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the optimizer's step `number`, from 0, with the gradients that it will use."""
        if number >= self.judged_after or not self.trained:
            yield
            return
        if number < self.steps:
            for name, p in self.trained.items():
                if p.grad is not None and bool((gradient := _sample(p.grad)).any() or p.grad.any()):
                    self.reached.add(name)
                    self.with_gradient[name] |= (gradient != 0).cpu()
        yield
        self.seen += 1
        if self.judged:
            self._judge()

    @property
    def judged(self) -> bool:
        """Whether gradients and weights were looked at for as many steps as they are given."""
        return bool(self.trained) and self.seen >= self.judged_after

    def _judge(self) -> None:
        self.moved = {name: self._moved(name) for name in self.trained}
        self.before.clear()

    def _moved(self, name: str) -> tuple[float, float]:
        """The share of entries with a gradient that changed, and the change by the norm before, which may be 0."""
        kept, now, had = self.before[name], _sample(self.trained[name]).cpu(), self.with_gradient[name]
        changed = (now != kept) & had
        share = changed.sum().item() / max(int(had.sum().item()), 1)
        norm = kept.float().norm().item()
        return share, (now.float() - kept.float()).norm().item() / norm if norm else math.inf

    def of_the_trained(self) -> list[Outcome]:
        """Gradient reach and weights move; of a run that ended before they were to be judged, after its last step."""
        if self.before and self.seen:
            self._judge()
        looked = min(self.seen, self.steps)
        never = [name for name in self.trained if name not in self.reached]
        stuck = [f"{name} ({share:.2%})" for name, (share, _) in self.moved.items() if share < MOVED]
        least = min((share for share, _ in self.moved.values()), default=0.0)
        change = sorted(change for _, change in self.moved.values() if math.isfinite(change))
        middle = change[len(change) // 2] if change else 0.0
        return [
            outcome(
                "gradient reach", len(self.trained) if self.seen else 0, never,
                f"every parameter had a gradient within {looked} steps", f"no gradient in {looked} steps",
            ),
            outcome(
                "weights move", len(self.moved), stuck,
                f"{least:.0%} or more of each tensor's entries changed in {self.seen} steps, by {middle:.2g} (median) "
                "of its norm",
                f"fewer than {MOVED:.0%} of the entries that had a gradient changed in {self.seen} steps",
            ),
        ]  # fmt: skip

    def of_the_frozen(self) -> Outcome:
        """Frozen stays frozen, since the watch began."""
        n = self.frozen_sample
        changed = [name for name, p in self.frozen.items() if _digest(p, n) != self.frozen_before[name]]
        looked = sum(len(part) for p in self.frozen.values() for part in _parts(p, n))
        entries = sum(part.numel() for p in self.frozen.values() for part in _parts(p, 0))
        share = "" if looked >= entries else f" in the {looked:,} of {entries:,} entries that were looked at"
        fine = f"{len(self.frozen)} frozen parameters are as they were, bit for bit{share}"
        return outcome("frozen stays frozen", len(self.frozen), changed, fine, "frozen parameters changed")


class Guards:
    """A Watch over one start of a run that has made `done` steps before, and what it leaves in guards.json.

    What an earlier start judged stands: a later one may have too few steps, or too small ones, to judge by. `steps` 0:
    it looks at nothing, as where another process looks. The other settings are those of Watch.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, out: Path, done: int, *, steps: int = STEPS,
        settle: int = 0, frozen_sample: int | None = None,
    ):  # fmt: skip
        self.out, self.began_at = out, done
        self.known = bool(done) and any(one["guard"] == "weights move" for one in read(out))
        self.watch = Watch(model, optimizer, steps=steps, settle=settle, frozen_sample=frozen_sample)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the optimizer's step `number`, from 0 of the whole run."""
        judged = self.watch.judged
        with self.watch.step(number - self.began_at):
            yield
        if self.watch.judged and not (judged or self.known):
            write(self.out, self.watch.of_the_trained())  # now: a kill takes what only this start has seen

    def finish(self, *more: Outcome) -> None:
        """Writes what was seen by the end, and `more`."""
        write(self.out, [*self._seen(), *more])

    def _seen(self) -> list[Outcome]:
        watch = self.watch
        if not watch.steps:
            return []
        trained = watch.of_the_trained() if not self.known and (watch.judged or not self.began_at) else []
        frozen = [watch.of_the_frozen()] if watch.frozen else []
        return [optimizer_coverage(watch.model, watch.optimizer), *trained, *frozen]


def one_batch_overfit(
    model: Model, loss: Callable[[Model], Tensor], *, steps: int = 20, lrs: Sequence[float] = LRS
) -> Outcome:
    """Whether a copy of the model learns one batch: `loss(copy)` must fall by FALLS in `steps` steps of Adam.

    At one of `lrs`, tried in turn: what is too small for one parametrisation is too large for another. Where the copy
    has no room it has failed; the training itself may have.
    """
    tries = []
    for lr in lrs:
        try:
            losses = _overfit(copy.deepcopy(model), loss, steps, lr)
        except (RuntimeError, MemoryError) as error:
            if not job.is_out_of_memory(error):
                raise
            why = "memory ran out for a copy of the model and its optimizer: overfit_steps 0 leaves this guard out"
            return Outcome("one-batch overfit", False, 0, why)
        first, least = losses[0], min(losses)
        tries.append(f"from {first:.4g} to {least:.4g} in {steps} steps at lr {lr:g}")
        if least <= first * (1 - FALLS):
            return outcome("one-batch overfit", steps, [], f"the loss on one batch went {tries[-1]}", "")
    return outcome("one-batch overfit", steps, tries, "", f"the loss on one batch should fall by {FALLS:.0%}, and went")


def _overfit(model: Model, loss: Callable[[Model], Tensor], steps: int, lr: float) -> list[float]:
    """The losses before each step, and after the last."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses: list[float] = []
    for _ in range(steps + 1):
        value = loss(model)
        losses.append(value.item())
        optimizer.zero_grad(set_to_none=True)
        if value.requires_grad:
            value.backward()
            optimizer.step()
    return losses


def budget_met(done: int, planned: int, epochs: float, max_epochs: float, what: str = "tokens") -> Outcome:
    """Whether as many tokens (or `what`) were trained on as planned, the corpus not repeated more than planned."""
    wrong = [f"{done:,} {what} instead of {planned:,}"] if done != planned else []
    if epochs > max_epochs + 1e-9:
        wrong.append(f"the corpus was read {epochs:.2f} times, and {max_epochs:g} are planned")
    fine = f"{done:,} {what}, {epochs:.2f} times the corpus"
    return outcome("budget met", done, wrong, fine, "otherwise than planned")


@torch.no_grad()
def _sample(tensor: Tensor, n: int | None = SAMPLE) -> Tensor:
    """`n` evenly spaced entries or a few more; all where it is null or 0."""
    flat = tensor.detach().flatten()
    return flat[:: max(1, flat.numel() // n)] if n else flat


def _parts(tensor: Tensor, n: int | None) -> Iterator[Tensor]:
    """Entries of the plain tensors in it: this process's part of a divided one, the packed ones of 4-bit weights."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(inner := getattr(tensor, name), Tensor):  # some name their mesh too
                yield from _parts(inner, n)
    else:
        yield _sample(tensor, n)


def _digest(tensor: Tensor, n: int | None = None) -> bytes:
    found = hashlib.sha256()
    for part in _parts(tensor, n):
        # A clone, since a single entry counts as contiguous whatever its stride.
        plain = part.cpu().clone(memory_format=torch.contiguous_format)
        found.update(plain.view(torch.uint8).numpy().tobytes())
    return found.digest()
