"""From widths to complete runs: shapes, tokens, steps and batches, as an experiment for experiments.yaml.

    python generate.py --widths 32,64,128 --ratios 5,20,80 [--lrs 1e-3:1e-1:5] [--sweep norm=layernorm,rmsnorm]
    python generate.py --widths 32,48,64,96 --flops 1e11,1e12,1e13

Prints YAML: settings that all runs share as `controls`, those that differ as an explicit list of `runs`. What was
chosen otherwise than asked is said in comments above it.
"""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tasks.scaling_laws.options import HEAD, Asked, Settings, asked_of, parser
from trainer import job
from trainer.job import UserError
from trainer.shape import GATED, Shape, ShapeError, make_shape

TRAIN = Path(__file__).resolve().parents[2] / "trainer" / "train.yaml"
ASPECT = 64  # width over depth, as of GPT-2 small (768 wide, 12 deep)
WARMUP = 0.1  # of the steps
GATED_RATIO = 2.6667  # feed-forward ratio that gives three matrices the parameters of two at 4 (arXiv:2002.05202)


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


if __name__ == "__main__":
    job.run(main)
