"""Settings of train.yaml that cannot stand together.

Needs the standard library only: the planner loads it by its path, and refuses what the job would refuse.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BELOW_1 = ("dropout", "beta1", "beta2", "momentum")
READS = {
    *BELOW_1, "zero_readout", "tied", "parametrization", "optimizer", "architecture", "nesterov", "base_heads",
    "base_width", "width",
}  # fmt: skip
SEEN_AFTER = 3  # steps: of queries that begin at 0 behind a readout that does


def conflict(config: Mapping[str, Any]) -> str | None:
    """What is wrong with settings of which each is allowed, and what to do; null: nothing."""
    for key in BELOW_1:
        if config[key] >= 1:
            return f"{key} is {config[key]}: give a number of at least 0 and below 1"
    if config["zero_readout"] and config["tied"]:
        return "zero_readout would make the embedding 0, which is the readout too: set tied to false"
    looked = config.get("guard_steps") or 0
    if (config["zero_readout"] or config.get("zero_query")) and 0 < looked < SEEN_AFTER:
        return (
            f"guard_steps is {looked}, and behind what begins at 0 the first gradients are 0: give 0 or "
            f"at least {SEEN_AFTER}"
        )
    is_sgd, is_lstm = config["optimizer"] == "sgd", config["architecture"] == "lstm"
    if config["parametrization"] == "completep" and (is_sgd or is_lstm):
        return "completep is known for Transformers under Adam only: take mup"
    if is_sgd and config["nesterov"] and not config["momentum"]:
        return "nesterov needs a momentum above 0"
    if is_lstm and config.get("dtype") == "fp16" and config.get("device") == "cpu":
        return "an LSTM cannot be trained in fp16 on a CPU: take bf16 or fp32"
    base_width = config["base_width"] or config["width"]
    if not is_lstm and config["base_heads"] and base_width % config["base_heads"]:
        return f"base_heads {config['base_heads']} does not divide base_width {base_width}"
    return None
