"""How fast the trainer is: ratios to what else would train the same model, measured in one run, and where time goes.

    python -m benchmarks.trainer [--steps 12] [--profile]

Every pair takes turns, so that a busy machine slows both. Tokens a second count forward, backward and AdamW.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from trainer import job
from trainer.models import make
from trainer.settings import checked

ROOT = Path(__file__).resolve().parents[1]
VOCAB = 50_257
SHAPES = {  # GPT-2's own smallest is 768 x 12; these fit a benchmark on a CPU
    "384 x 6": {"width": 384, "depth": 6, "heads": 6},
    "768 x 4": {"width": 768, "depth": 4, "heads": 12},
}
GPT2 = {"position": "learned", "bias": True, "seq_len": 256, "batch_size": 4}
LSTM = {"architecture": "lstm", "width": 256, "depth": 2, "seq_len": 64, "batch_size": 16}
SWEPT = {"width": 64, "depth": 2, "seq_len": 64, "batch_size": 8, "max_steps": 60, "overfit_steps": 0}


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=12, help="steps of each of a pair")
    parser.add_argument("--profile", action="store_true", help="also where the time of a Transformer's step goes")
    arguments = parser.parse_args()
    print("| model | trainer, tokens/s | other, tokens/s | times as fast |\n|---|---|---|---|")
    for name, shape in SHAPES.items():
        ours, theirs = trainer_step(GPT2 | shape, VOCAB), gpt2_step(GPT2 | shape)
        print_row(f"Transformer {name} against transformers' GPT-2", ours, theirs, 4 * 256, arguments.steps)
    ours, theirs = trainer_step(LSTM, VOCAB), lstm_step(LSTM)
    print_row("LSTM 256 x 2 against a loop over torch.nn.LSTM", ours, theirs, 16 * 64, arguments.steps)
    print()
    print_sweep(8)
    if arguments.profile:
        print_profile(trainer_step(GPT2 | SHAPES["384 x 6"], VOCAB))


def settings(changes: dict[str, Any]) -> SimpleNamespace:
    """All settings, these changed."""
    return checked(SimpleNamespace(**job.default_settings(ROOT / "trainer" / "train.yaml") | changes))


def batch(changes: dict[str, Any]) -> Tensor:
    """ "row seq+1" tokens."""
    shape = changes["batch_size"], changes["seq_len"] + 1
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(0))


def trainer_step(changes: dict[str, Any], vocab_size: int) -> Callable[[], float]:
    """A training step of the trainer's model."""
    config, lines = settings(changes), batch(changes)
    model = make(config, vocab_size)

    def loss() -> Tensor:
        hidden, _ = model(lines[:, :-1])
        return model.loss(hidden, lines[:, 1:]) / lines[:, 1:].numel()

    return _stepper(model, loss)


def gpt2_step(changes: dict[str, Any]) -> Callable[[], float]:
    """The same of Hugging Face's GPT-2 of the same shape, without dropout and with torch's own attention."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB, n_embd=changes["width"], n_layer=changes["depth"], n_head=changes["heads"],
        n_positions=changes["seq_len"], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    model, lines = GPT2LMHeadModel(config), batch(changes)
    # `labels` are shifted inside, so it sees one token less than ours and is asked as many.
    return _stepper(model, lambda: model(input_ids=lines[:, :-1], labels=lines[:, :-1]).loss)


class PlainLSTM(nn.Module):
    """Embedding, nn.LSTM and a tied readout, as one would write them."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(VOCAB, width), nn.LSTM(width, width, depth, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """ "batch seq" to logits "batch seq vocab"."""
        return F.linear(self.lstm(self.embedding(tokens))[0], self.embedding.weight)


def lstm_step(changes: dict[str, Any]) -> Callable[[], float]:
    """A training step of that."""
    model, lines = PlainLSTM(changes["width"], changes["depth"]), batch(changes)
    return _stepper(model, lambda: F.cross_entropy(model(lines[:, :-1]).flatten(0, 1), lines[:, 1:].flatten()))


def _stepper(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        began = time.perf_counter()
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - began

    return step


def print_row(name: str, ours: Callable[[], float], theirs: Callable[[], float], tokens: int, steps: int) -> None:
    """Both in turn, after two steps each to warm up; the medians."""
    seconds = [(ours(), theirs()) for _ in range(steps + 2)][2:]
    one, other = (statistics.median(each) for each in zip(*seconds, strict=True))
    print(f"| {name} | {tokens / one:,.0f} | {tokens / other:,.0f} | {other / one:.2f} |")


def print_sweep(n: int) -> None:
    """`n` runs at once, one thread each, against the same in sequence on all threads."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        make_tokens(out / "tokens")
        (out / "base.yaml").write_text(yaml.safe_dump(vars(settings(SWEPT | {"dataset": str(out / "tokens")}))))
        vary = "seed=" + ",".join(map(str, range(n)))
        began = time.perf_counter()
        command("sweep", "--config", out / "base.yaml", "--out", out / "at-once", "--vary", vary)
        at_once = time.perf_counter() - began
        began = time.perf_counter()
        for seed in range(n):
            (out / f"{seed}.yaml").write_text((out / "at-once" / f"seed{seed}" / "config.yaml").read_text())
            command("train", "--config", out / f"{seed}.yaml", "--out", out / "one-by-one" / str(seed))
        in_sequence = time.perf_counter() - began
    print("| runs | at once, s | in sequence, s | times as fast |\n|---|---|---|---|")
    print(f"| {n} of width 64 | {at_once:.1f} | {in_sequence:.1f} | {in_sequence / at_once:.2f} |")


def command(name: str, *arguments: str | Path) -> None:
    """One of the trainer's commands."""
    subprocess.run([sys.executable, "-m", f"trainer.{name}", *arguments], cwd=ROOT, check=True, capture_output=True)


def make_tokens(folder: Path) -> None:
    """Token files of this project's own text."""
    from trainer.prepare import from_files, prepare

    prepare(from_files([ROOT / "trainer", ROOT / "mcp_server"], ".py"), folder, "bytes", 0.1, 0)


def print_profile(step: Callable[[], float]) -> None:
    """The kernels that most of a step's time goes to."""
    for _ in range(2):
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            step()
    found = sorted(profiler.key_averages(), key=lambda one: -one.self_cpu_time_total)
    whole = sum(one.self_cpu_time_total for one in found)
    print("\n| kernel | share of the step, % |\n|---|---|")
    for one in found[:10]:
        print(f"| {one.key} | {100 * one.self_cpu_time_total / whole:.1f} |")


if __name__ == "__main__":
    main()
