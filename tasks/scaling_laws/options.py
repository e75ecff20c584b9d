"""The options of generate.py: what an experiment is asked to hold, read and checked."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trainer.job import UserError

HEAD = 64  # largest head size, as of GPT-2
RATIO = 20.0  # tokens a parameter, about what arXiv:2203.15556 finds best
WITHIN = (1.0, 500.0)  # tokens a parameter that a size must get of a budget of FLOPs to be trained with it
OPTION_OF = {"max_steps": "--tokens, --ratios or --flops", "batch_size": "--batch-size", "width": "--widths",
             "micro_batch_size": "--micro-batch", "architecture": "--architecture"}  # fmt: skip
Settings = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """What a call asks for."""

    architecture: str
    widths: list[int]
    ratios: list[float]
    vocab_size: int
    batch_size: int
    micro_batch_size: int
    world: int
    fixed: Settings  # the same in all runs
    sweeps: dict[str, list[Any]]  # settings of train.yaml and their values; all combinations are made
    ladder: dict[str, list[Any]]  # settings that are changed one at a time, each value against the run without
    head_size: int = HEAD
    depth: int | None = None
    seeds: list[int] | None = None
    tokens: int | None = None  # the same for all runs, instead of ratios
    flops: list[float] | None = None  # of a run, instead of ratios: budgets that sizes share, for isoFLOP curves
    within: tuple[float, float] = WITHIN
    corpus_tokens: int | None = None
    cpus: int = 1
    gpus: int = 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description="Makes the runs of a scaling experiment.", allow_abbrev=False)
    made.add_argument("--architecture", choices=("transformer", "lstm"), default="transformer")
    made.add_argument("--widths", required=True, help="such as 32,64,128")
    made.add_argument("--ratios", default=f"{RATIO:g}", help="tokens a parameter, such as 5,20,80")
    made.add_argument("--tokens", type=int, help="of every run, instead of --ratios")
    made.add_argument("--flops", help="of a run, instead of --ratios, such as 1e13,1e14: each width at each")
    made.add_argument(
        "--within",
        default="{:g},{:g}".format(*WITHIN),
        help="with --flops: least and most tokens a parameter; other widths are left out of a budget",
    )
    made.add_argument("--depth", type=int, help="the same for all; none: width / 64, at least 2; of an LSTM 1")
    made.add_argument("--vocab-size", type=int, default=257, help="of the token files: 257 for bytes")
    made.add_argument("--batch-size", type=int, default=32, help="sequences per optimizer step, over all processes")
    made.add_argument("--micro-batch", type=int, default=32, help="sequences at once, of one process")
    made.add_argument("--world", type=int, default=1, help="processes")
    made.add_argument("--lrs", help="1e-4:1e-1:7 (log-spaced) or 1e-3,3e-3")
    made.add_argument("--seeds", help="such as 0,1,2")
    made.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of all runs")
    made.add_argument("--sweep", nargs="*", default=[], metavar="KEY=V1,V2", help="settings that vary: all products")
    made.add_argument("--ladder", nargs="*", default=[], metavar="KEY=V1,V2", help="settings changed one at a time")
    made.add_argument("--head-size", type=int, default=HEAD, help="largest size of a head")
    made.add_argument("--corpus-tokens", type=int, help="of the training text: says where it would be repeated")
    made.add_argument("--cpus", type=int, default=1, help="of each run")
    made.add_argument("--gpus", type=int, default=0, help="of each run, a process each")
    made.add_argument("--to", type=Path, help="file to write to instead of printing")
    return made


def asked_of(arguments: argparse.Namespace) -> Asked:
    """The options as values. Raises UserError for one that cannot be read."""
    try:
        sweeps, ladder = (
            {key: [yaml.safe_load(value) for value in text.split(",")] for key, text in pairs(texts)}
            for texts in (arguments.sweep, arguments.ladder)
        )
        if arguments.flops and arguments.tokens:
            raise UserError("--tokens and --flops both say how long a run is: give one")
        low, high = (float(ratio) for ratio in arguments.within.split(","))
        fixed = {key: yaml.safe_load(text) for key, text in pairs(arguments.set)}
        given = {"lr": arguments.lrs, "seed": arguments.seeds, "depth": arguments.depth}
        check_settings(fixed, sweeps, ladder, {key for key, value in given.items() if value})
        sweeps |= {"lr": log_spaced(arguments.lrs)} if arguments.lrs else {}
        made = Asked(
            architecture=arguments.architecture,
            widths=[int(width) for width in arguments.widths.split(",")],
            ratios=[float(ratio) for ratio in arguments.ratios.split(",")],
            vocab_size=arguments.vocab_size,
            batch_size=arguments.batch_size,
            micro_batch_size=arguments.micro_batch,
            world=arguments.world,
            fixed=fixed,
            sweeps=sweeps,
            ladder=ladder,
            head_size=arguments.head_size,
            depth=arguments.depth,
            seeds=[int(seed) for seed in arguments.seeds.split(",")] if arguments.seeds else None,
            tokens=arguments.tokens,
            flops=[float(each) for each in arguments.flops.split(",")] if arguments.flops else None,
            within=(low, high),
            corpus_tokens=arguments.corpus_tokens,
            cpus=arguments.cpus,
            gpus=arguments.gpus,
        )
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"an option cannot be read: {error}; see --help") from error
    check_numbers(made, sweeps["lr"] if arguments.lrs else [])
    return made


def check_settings(fixed: Settings, sweeps: Settings, ladder: Settings, given: set[str]) -> None:
    """Raises UserError for a setting that an option of its own decides, or that is given twice."""
    for key in [*fixed, *sweeps, *ladder]:
        if key in OPTION_OF:
            raise UserError(f"{key} cannot be given as a setting: use {OPTION_OF[key]}")
    if twice := fixed.keys() & sweeps.keys() | (fixed.keys() | sweeps.keys() | ladder.keys()) & given:
        raise UserError(f"{', '.join(sorted(twice))} is given by two options: keep one of them")


def check_numbers(asked: Asked, lrs: list[float]) -> None:
    """Raises UserError for a number that is not finite or too low, and for seeds that are the same."""
    for name, values, low in (
        ("widths", asked.widths, 0), ("ratios", asked.ratios, 0), ("tokens", [asked.tokens], 0),
        ("flops", asked.flops or [], 0), ("depth", [asked.depth], 0), ("vocab-size", [asked.vocab_size], 0),
        ("lrs", lrs, 0), ("head-size", [asked.head_size], 1), ("corpus-tokens", [asked.corpus_tokens], 0),
        ("cpus", [asked.cpus], 0), ("gpus", [asked.gpus], -1), ("seeds", asked.seeds or [], -1),
    ):  # fmt: skip
        for value in values:
            if value is not None and not low < value < math.inf:
                raise UserError(
                    f"--{name} holds {value}: give {f'a finite number above {low}' if low >= 0 else '0 or more'}"
                )
    if len(set(asked.seeds or [])) < len(asked.seeds or []):
        raise UserError("--seeds holds a seed twice: give each once")


def pairs(texts: list[str]) -> list[tuple[str, str]]:
    """`key=value` texts in two. Raises UserError for one that is none."""
    for text in texts:
        if "=" not in text:
            raise UserError(f"{text!r} is not KEY=VALUE")
    return [(key, value) for key, _, value in (text.partition("=") for text in texts)]


def log_spaced(text: str) -> list[float]:
    """`1e-4:1e-2:5` as five values with equal steps of the logarithm, to four digits; or a list with commas."""
    if ":" not in text:
        return [float(part) for part in text.split(",")]
    low, high, n = text.split(":")
    if int(n) < 1 or not (0 < float(low) < math.inf and 0 < float(high) < math.inf):
        raise UserError(f"--lrs is {text}: give LOW:HIGH:N, numbers above 0")
    first, last = math.log(float(low)), math.log(float(high))
    places = [i / max(int(n) - 1, 1) for i in range(int(n))]
    return [float(f"{math.exp(first + place * (last - first)):.4g}") for place in places]
