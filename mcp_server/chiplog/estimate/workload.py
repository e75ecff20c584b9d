"""How much work a run is: steps and tokens as its recipe counts them, samples as the evaluation does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from chiplog.estimate.model import Workload
from chiplog.estimate.tokens import Steps, steps
from chiplog.plan import Config, Run


class SplitTokens(NamedTuple):
    """A split as a model's tokenizer counts it."""

    lengths: Sequence[int]  # tokens of its samples, in their order, of all or of some
    rows: int  # all of them
    longest: int  # of all
    label: int  # tokens to be learnt, of all


def training_steps(config: Config, lengths: Sequence[int], n_rows: int, longest: int) -> Steps:
    """Of a run with these settings, from the tokens of its training samples, in their order.

    `n_rows` and `longest` are of all samples, where `lengths` are of some. A recipe drops the last incomplete batch of
    an epoch, as ours and torchtune's do; one whose YAML has no `packed` pads.
    """
    return steps(
        lengths,
        batch_size=config["batch_size"],
        micro_batch_size=config.get("micro_batch_size"),
        epochs=config["epochs"],
        max_seq_len=config.get("max_seq_len"),
        packed=config.get("packed", False),
        max_steps=config["max_steps"],
        n_rows=n_rows,
        longest=longest,
    )


def validations(config: Config, total: int) -> int:
    """How often a run of so many steps validates: every run_val_every_n_steps, and at its end.

    A recipe with a setting val_tokens always does, since that is its result.
    """
    if not config.get("val_split") and "val_tokens" not in config:
        return 0
    every = config.get("run_val_every_n_steps")
    return -(-total // every) if every else min(total, 1)


def validating(run: Run, trained: Steps, counts: SplitTokens) -> dict[str, Any]:
    """The fields of a Workload that say how much the validations of a run are, from the tokens of its split.

    Each process takes one micro-batch after another, of the size that it trains with.
    """
    config, processes = run.config, run.resources.processes
    micro = min(trained.micro_batch, max(1, config["batch_size"] // processes))
    once = steps(
        counts.lengths, batch_size=micro, micro_batch_size=micro, epochs=1, max_seq_len=config.get("max_seq_len"),
        packed=config.get("packed", False), drop_last=False, n_rows=counts.rows, longest=counts.longest,
    )  # fmt: skip
    times = validations(config, trained.total)
    return {
        "validations": times,
        "validation_passes": times * -(-once.per_epoch // processes),
        "validation_mean_len": once.tokens_per_step_mean / (1 - once.padding_share) / micro,
        "val_samples": counts.rows,
        "val_label_tokens": counts.label,
    }


def workload(
    run: Run,
    trained: Steps | None,
    n_eval: int,
    prompt_tokens: float = 0.0,
    validated: SplitTokens | None = None,
) -> Workload:
    """From its steps, null for a control, and the rows of the split that is scored with their mean prompt's tokens.

    `validated` is the split that it validates on; null: it does not.
    """
    config = run.config
    n_eval = min(n_eval, config["eval_limit"] or n_eval)
    return Workload(
        steps=trained.total if trained else 0,
        tokens=trained.tokens if trained else 0,
        eval_samples=n_eval,
        eval_batch_size=config.get("eval_batch_size") or 1,
        new_tokens=config.get("max_new_tokens") or 0,
        prompt_tokens=prompt_tokens,
        **(validating(run, trained, validated) if trained and validated else {}),
    )
