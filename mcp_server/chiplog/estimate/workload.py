"""How much work a run is: steps and tokens as its recipe counts them, samples as the evaluation does."""

from __future__ import annotations

from collections.abc import Sequence

from chiplog.estimate.model import Workload
from chiplog.estimate.tokens import Steps, steps
from chiplog.plan import Config, Run


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


def workload(run: Run, trained: Steps | None, n_eval: int, prompt_tokens: float = 0.0) -> Workload:
    """From its steps, null for a control, and the rows of the split that is scored with their mean prompt's tokens."""
    config = run.config
    n_eval = min(n_eval, config["eval_limit"] or n_eval)
    return Workload(
        steps=trained.total if trained else 0,
        tokens=trained.tokens if trained else 0,
        eval_samples=n_eval,
        eval_batch_size=config.get("eval_batch_size") or 1,
        new_tokens=config.get("max_new_tokens") or 0,
        prompt_tokens=prompt_tokens,
    )
