"""From widths to complete runs: shapes, tokens, steps and batches, as an experiment for experiments.yaml.

    python generate.py --widths 32,64,128 --ratios 5,20,80 [--lrs 1e-3:1e-1:5] [--sweep norm=layernorm,rmsnorm]
    python generate.py --widths 32,48,64,96 --flops 1e11,1e12,1e13

Prints YAML: settings that all runs share as `controls`, those that differ as an explicit list of `runs`. What was
chosen otherwise than asked is said in comments above it.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from trainer import job
from trainer.job import UserError
from trainer.shape import GATED, Shape, ShapeError, make_shape

TRAIN = Path(__file__).resolve().parents[2] / "trainer" / "train.yaml"
ASPECT = 64  # width over depth, as of GPT-2 small (768 wide, 12 deep)
HEAD = 64  # largest head size, as of GPT-2
RATIO = 20.0  # tokens a parameter, about what arXiv:2203.15556 finds best
WITHIN = (1.0, 500.0)  # tokens a parameter that a size must get of a budget of FLOPs to be trained with it
WARMUP = 0.1  # of the steps
GATED_RATIO = 2.6667  # feed-forward ratio that gives three matrices the parameters of two at 4 (arXiv:2002.05202)
OPTION_OF = {"max_steps": "--tokens, --ratios or --flops", "batch_size": "--batch-size", "width": "--widths",
             "micro_batch_size": "--micro-batch", "architecture": "--architecture"}  # fmt: skip
Settings = dict[str, Any]


def main() -> int:
    """Exit code 0, when the experiment is printed or written."""
    arguments = parser().parse_args()
    try:
        made = experiment(asked_of(arguments))
    except ShapeError as error:
        raise UserError(str(error)) from error
    text = "".join(f"# {note}\n" for note in made.notes) + dumped(made.values)
    if arguments.to:
        if arguments.to.is_dir() or not arguments.to.parent.is_dir():
            raise UserError(f"--to is {arguments.to}: give a file in a folder that is there")
        job.write_text(arguments.to, text)
    else:
        print(text, end="")
    return 0


@dataclass(frozen=True)
class Batch:
    """How an effective batch is made up: micro_batch x grad_accum x world sequences, exactly."""

    micro_batch_size: int
    grad_accum: int
    world: int
    notes: list[str]

    @property
    def size(self) -> int:
        """Sequences per optimizer step over all processes."""
        return self.micro_batch_size * self.grad_accum * self.world


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


@dataclass(frozen=True)
class Made:
    """An experiment in the words of experiments.yaml, and what was chosen otherwise than asked."""

    values: Settings
    notes: list[str]


def experiment(asked: Asked) -> Made:
    """The runs asked for, smallest first. Raises ShapeError or UserError for what cannot be."""
    defaults = job.default_settings(TRAIN)
    given = {*asked.fixed, *asked.sweeps, *asked.ladder}
    if unknown := given - set(defaults):
        raise UserError(f"the trainer has no setting {', '.join(sorted(unknown))}: {TRAIN.name} names all")
    batch = exact_batch(asked.batch_size, asked.micro_batch_size, max(asked.world, asked.gpus))
    budgets = [None] if asked.tokens else asked.flops or asked.ratios
    cells = list(itertools.product(asked.widths, budgets, changes_of(asked)))
    each = [run_settings(asked, width, budget, changes, batch, defaults) for width, budget, changes in cells]
    runs = [run for run in each if run]
    low, high = asked.within
    if not runs:
        raise UserError(f"no budget gives a width {low:g} to {high:g} tokens a parameter: change --flops or --within")
    keys = list(dict.fromkeys(key for run in runs for key in run))
    runs = [{key: run.get(key, defaults[key]) for key in keys} for run in runs]
    if twice := next((run for place, run in enumerate(runs) if run in runs[:place]), None):
        raise UserError(f"width {twice['width']}, {twice['max_steps']} steps would be run twice: remove a value")
    left_out = [width for width in asked.widths if width not in {run["width"] for run in runs}]
    notes = [f"width {width} gets {low:g} to {high:g} tokens a parameter of no budget" for width in left_out]
    used = {budget for (_, budget, _), run in zip(cells, each, strict=True) if run}
    notes += [f"a budget of {budget:g} FLOPs gives no width {low:g} to {high:g} tokens a parameter"
              for budget in asked.flops or [] if budget not in used]  # fmt: skip
    notes += batch.notes + [note for run in runs for note in (*corpus_notes(asked, run), *head_notes(run, runs))]
    return Made(as_experiment(asked, runs, batch, defaults), list(dict.fromkeys(notes)))


def changes_of(asked: Asked) -> list[tuple[Settings, Settings]]:
    """All products of the sweeps, each with every step of the ladder, of which the first changes nothing."""
    products = [dict(zip(asked.sweeps, values, strict=True)) for values in itertools.product(*asked.sweeps.values())]
    steps = [{}] + [{key: value} for key, values in asked.ladder.items() for value in values]
    return list(itertools.product(products, steps))


def as_experiment(asked: Asked, runs: list[Settings], batch: Batch, defaults: Settings) -> Settings:
    """What all runs share and was not swept as controls, the rest as a list of runs; one run is named by its width."""
    shared = {key: value for key, value in runs[0].items()
              if key not in asked.sweeps and all(run[key] == value for run in runs)}  # fmt: skip
    if len(runs) == 1:
        del shared["width"]
    may_be_silent = {"ffn_ratio", *list(asked.ladder)[1:]}  # the first setting of a ladder names its control

    def silent(run: Settings) -> Settings:
        """What need not be told, so that names stay short: a run's part of a ladder that is the trainer's default."""
        return {key: run[key] for key in may_be_silent & run.keys() if run[key] == defaults[key]}

    controls = shared | {"micro_batch_size": batch.micro_batch_size}
    values: Settings = {
        "framework": "trainer",
        "recipe": "train",
        "control": {key: runs[0][key] for key in asked.ladder} or "none",
        "controls": {key: value for key, value in controls.items() if value != defaults[key]},
        "runs": [{key: value for key, value in run.items() if key not in shared | silent(run)} for run in runs],
        "resources": resources(asked),
    }
    return values | ({"seeds": asked.seeds} if asked.seeds else {})


def resources(asked: Asked) -> Settings:
    """What a run asks for: its processes on the GPUs of one node, or on as many nodes without."""
    if asked.gpus and asked.world not in (1, asked.gpus):
        raise UserError(f"--world is {asked.world} and --gpus {asked.gpus}: a process for each GPU")
    nodes = {"nodes": asked.world} if asked.world > 1 and not asked.gpus else {}
    return {**nodes, **({"gpus": asked.gpus} if asked.gpus else {}), "cpus": asked.cpus}


def run_settings(
    asked: Asked, width: int, budget: float | None, changes: tuple[Settings, Settings], batch: Batch, defaults: Settings
) -> Settings | None:
    """What decides one run, beside the defaults; null where a budget of FLOPs does not suit the width.

    All steps of a ladder train on the tokens of its control.
    """
    settings, control = (
        shaped({"architecture": asked.architecture, **asked.fixed, **change, "width": width}, asked)
        for change in (changes[0] | changes[1], changes[0])
    )
    settings["batch_size"] = batch.size
    seq_len, shape = {**defaults, **settings}["seq_len"], shape_of(control, asked.vocab_size, defaults)
    tokens = tokens_for(asked, shape, seq_len, budget)
    if asked.flops and not asked.within[0] <= tokens / shape.n_params <= asked.within[1]:
        return None
    settings["max_steps"] = steps_for(tokens, batch.size, seq_len)
    settings.setdefault("warmup_steps", round(WARMUP * settings["max_steps"]))
    return settings


def tokens_for(asked: Asked, shape: Shape, seq_len: int, budget: float | None) -> float:
    """The tokens of a run: those asked for, those that a budget of FLOPs buys, or a ratio to the parameters."""
    if asked.tokens or budget is None:
        return asked.tokens or 0
    return budget / shape.train_flops(seq_len) if asked.flops else budget * shape.n_params


def shaped(settings: Settings, asked: Asked) -> Settings:
    """The settings with the depth, heads and feed-forward ratio that they leave open."""
    found = {"depth": asked.depth or depth_of(settings["width"], asked.architecture), **settings}
    if asked.architecture == "transformer":
        found.setdefault("heads", heads_of(settings["width"], asked.head_size))
        if found.get("activation") in GATED:
            found.setdefault("ffn_ratio", GATED_RATIO)
    return found


def shape_of(settings: Settings, vocab_size: int, defaults: Settings | None = None) -> Shape:
    """The shape of a run, for its parameters and FLOPs. Raises ShapeError."""
    defaults = defaults or job.default_settings(TRAIN)
    return make_shape(SimpleNamespace(**{**defaults, **settings}), vocab_size)


def depth_of(width: int, architecture: str) -> int:
    """Blocks of a Transformer of this width, at least 2; an LSTM has one layer unless more are asked for."""
    return 1 if architecture == "lstm" else max(2, round(width / ASPECT))


def heads_of(width: int, largest: int = HEAD) -> int:
    """Heads that divide the width and are even in size, as rotary positions need, and at most so large.

    Raises ShapeError for an odd width, which has none.
    """
    sizes = [size for size in range(2, min(width, largest) + 1, 2) if width % size == 0]
    if not sizes:
        raise ShapeError(f"width {width} has no even divisor for a head: take an even width")
    return width // max(sizes)


def exact_batch(target: int, micro: int, world: int) -> Batch:
    """A batch of `target` sequences, or of the nearest number that `world` processes can divide, which is said."""
    for name, value in (("batch size", target), ("micro batch", micro), ("number of processes", world)):
        if value < 1:
            raise UserError(f"the {name} is {value}: give a whole number of at least 1")
    notes: list[str] = []
    size = max(1, round(target / world)) * world
    if size != target:
        notes.append(f"batch size {size} instead of {target}, which {world} processes cannot divide")
    each = size // world
    divisors = [n for n in range(1, each + 1) if each % n == 0]
    chosen = min(divisors, key=lambda n: (abs(n - micro), n))
    if chosen != micro:
        notes.append(f"micro batch {chosen} instead of {micro}, which does not divide the {each} of a process")
    return Batch(chosen, each // chosen, world, notes)


def steps_for(tokens: float, batch_size: int, seq_len: int) -> int:
    """Optimizer steps that come nearest to `tokens`."""
    return max(1, round(tokens / (batch_size * seq_len)))


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


def corpus_notes(asked: Asked, run: Settings) -> list[str]:
    """What is to be said where a run reads the corpus more often than is planned."""
    whole = {**job.default_settings(TRAIN), **run}
    epochs = whole["max_steps"] * whole["batch_size"] * whole["seq_len"] / (asked.corpus_tokens or math.inf)
    if epochs <= whole["max_epochs"]:
        return []
    words = f"width {run['width']}, {run['max_steps']} steps: reads the corpus {epochs:.2f} times"
    return [f"{words}, and max_epochs is {whole['max_epochs']:g}: take more text, or the guard fires"]


def head_notes(run: Settings, runs: list[Settings]) -> list[str]:
    """What is to be said where heads grow in size under a parametrisation that is to transfer."""
    sizes = {other["width"] // other["heads"] for other in runs if other.get("heads")}
    if run.get("parametrization", "standard") == "standard" or len(sizes) < 2 or run.get("base_heads"):
        return []
    return [f"heads of {min(sizes)} to {max(sizes)}: give --head-size to keep one size, or set base_heads"]


def dumped(values: Settings) -> str:
    """The experiment as an item of a plan's list `experiments`, a run a line."""
    head = {key: value for key, value in values.items() if key != "runs"}
    text = yaml.safe_dump([head], sort_keys=False, default_flow_style=None, width=118)
    runs = "".join("  - " + yaml.safe_dump(run, sort_keys=False, default_flow_style=True, width=1000) for run in
                   values["runs"])  # fmt: skip
    return f"{text}  runs:\n{runs}"


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


if __name__ == "__main__":
    job.run(main)
