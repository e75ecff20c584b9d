"""How much work a run is: steps and tokens as its recipe counts them, samples as the evaluation does."""

from __future__ import annotations

from chiplog.estimate.model import Workload
from chiplog.plan import Run


def workload(run: Run, n_train: int, tokens_train: int | None, n_eval: int) -> Workload:
    """From the rows and tokens of the training split and the rows that are scored.

    The recipe drops the last incomplete batch of an epoch, and stops at max_steps.
    """
    config = run.config
    n_eval = min(n_eval, config["eval_limit"] or n_eval)
    if run.kind == "control":
        return Workload(steps=0, tokens=0, eval_samples=n_eval)
    batch = config["batch_size"]
    steps = n_train // batch * config["epochs"]
    steps = min(steps, config["max_steps"] or steps)
    tokens = None if tokens_train is None else round(tokens_train / n_train * steps * batch)
    return Workload(steps=steps, tokens=tokens, eval_samples=n_eval)
