"""A training that makes a model of its own, as the planner sees it: its shape, its work, and what could never run.

The shape is computed by the trainer's own `shape.py`, and `conflicts.py` says which settings cannot stand together, so
that what is refused here is what the job would refuse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import NamedTuple

from chiplog.checks import Check, warning
from chiplog.checks.tokens import TokensReport
from chiplog.errors import PlanError
from chiplog.estimate.model import Workload
from chiplog.estimate.workload import validations
from chiplog.plan import Config, Run
from chiplog.trainer_files import load_trainer_file

# The settings that `shape.py` reads: a recipe of one's own that lacks some has a shape that nobody here knows.
SHAPED = {
    "architecture", "width", "depth", "heads", "ffn_ratio", "activation", "norm", "norm_position", "position",
    "seq_len", "bias", "tied",
}  # fmt: skip


class Model(NamedTuple):
    """What is computed of a model from its settings."""

    n_params: int
    flops_per_token: float  # of training


def model_of(run: Run, vocab_size: int) -> Model | None:
    """Null for a recipe that has not all settings of a shape. Raises PlanError for a shape that no model can have."""
    if not run.config.keys() >= SHAPED:
        return None
    shapes = load_trainer_file("shape")
    try:
        shape = shapes.make_shape(SimpleNamespace(**run.config), vocab_size)
    except shapes.ShapeError as error:
        raise PlanError(f"{run.name}: {error}") from error
    return Model(shape.n_params, shape.train_flops(run.config["seq_len"]))


def epochs(config: Config, n_tokens: int) -> float | None:
    """Passes over the corpus, as `trainer/tokens.py` counts them; null where it makes not even one batch.

    A Transformer reads windows of seq_len, an LSTM as many streams as the batch has sequences.
    """
    batch, seq_len = config["batch_size"], config["seq_len"]
    if config.get("architecture") == "lstm":
        pieces = (n_tokens - 1) // batch // seq_len
        return config["max_steps"] / pieces if pieces > 0 else None
    windows = (n_tokens - 1) // seq_len
    return config["max_steps"] * batch / windows if windows > 0 else None


def work_of(run: Run, report: TokensReport) -> Workload:
    """How much it trains and validates."""
    config = run.config
    tokens = config["max_steps"] * config["batch_size"] * config["seq_len"]
    model = model_of(run, report.vocab_size or 1)
    times = validations(config, config["max_steps"])
    return Workload(
        steps=config["max_steps"],
        tokens=tokens,
        flops=model and model.flops_per_token * tokens,
        eval_samples=0,
        validations=times,
        validation_passes=times,
        val_samples=1,  # which it counts a split of tokens as
        val_label_tokens=config.get("val_tokens") or report.tokens["validation"] - 1,
    )


def check_training(run: Run, report: TokensReport) -> None:
    """Raises PlanError for what would end on its first step: conflicts, a shape, more tokens than there are."""
    config, n = run.config, report.tokens
    conflicts = load_trainer_file("conflicts")
    if config.keys() >= conflicts.READS and (wrong := conflicts.conflict(config)):
        raise PlanError(f"{run.name}: {wrong}")
    model_of(run, report.vocab_size or 1)
    if epochs(config, n["train"]) is None:
        streams = f" and batch_size {config['batch_size']}" if config.get("architecture") == "lstm" else ""
        raise PlanError(
            f"{run.name}: the {n['train']:,} tokens of train are too few for seq_len {config['seq_len']:,}{streams}: "
            "lower it, or prepare more text"
        )
    asked = config.get("val_tokens")
    if asked and asked > n["validation"] - 1:
        raise PlanError(
            f"{run.name}: val_tokens is {asked:,} and the validation split has {n['validation'] - 1:,} targets: "
            "lower it, or leave it out for all"
        )


def check_epochs(runs: Sequence[Run], reports: Mapping[str, TokensReport]) -> list[Check]:
    """Runs that pass over the corpus more often than they plan to, which their guard would report at the end."""
    over = {}
    for run in runs:
        made = epochs(run.config, reports[run.config["dataset"]].tokens["train"]) or 0.0
        if "max_epochs" in run.config and made > run.config["max_epochs"]:
            over[run.name] = made
    if not over:
        return []
    most = max(over, key=lambda name: over[name])
    found = (
        f"{len(over)} of {len(runs)} runs pass over the corpus more often than max_epochs says, {most} "
        f"{over[most]:.2f} times"
    )
    return [warning("tokens", found, "Prepare more text, train for fewer steps, or raise max_epochs if it is meant")]
