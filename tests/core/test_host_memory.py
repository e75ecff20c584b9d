"""Host memory: when a plan asks Slurm for it, how much, and when it only says that it may be too little."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chiplog.estimate.estimator import HOST_BYTES, host_memory
from chiplog.expand import expand
from chiplog.ledger import Ledger
from chiplog.plan import Experiment, Plan, Resources
from chiplog.planning import Planned
from chiplog.recipes import manual
from chiplog.render import render
from chiplog.settings import Settings
from tests.core.test_forecast import job
from tests.core.test_planning import done, plan

GIB = 2**30


def measured(lab: Path, run: str, kind: str, gib: float, **usage: Any) -> None:
    """Puts a completed run on the CPU into the ledger, which held that much."""
    peak = {"peak_mem_bytes": round(gib * GIB), "mem_kind": "host_rss"}
    Ledger().put([done(lab, run, kind, "cpu", 100.0, **{**peak, **usage})])


def on_slurm(lab: Path, gpu: str = "", **change: Any) -> Planned:
    (lab / "chiplog.toml").write_text("[slurm]\n" + (f"[[gpus]]\nname = '{gpu}'\n" if gpu else ""))
    return plan(**change)


def asked(planned: Planned) -> set[int | None]:
    return {row.run.resources.mem_gib for row in planned.rows}


def lacking(planned: Planned) -> list[str]:
    return [f"{check.found}. {check.mend}" for check in planned.warnings if check.subject == "host memory"]


def test_jobs_ask_for_half_more_than_the_largest_of_their_runs_was_measured_to_hold_at_most(lab: Path):
    measured(lab, "S", "finetune", 10.0)
    measured(lab, "S_base", "control", 4.0)
    planned = on_slurm(lab)
    high = planned.rows[0].estimate.peak_mem
    assert high and 10 < high.high / GIB < 12
    (gib,) = asked(planned)  # one number, so that the jobs can be one array
    assert gib == 17 and gib - 1 < 1.5 * high.high / GIB <= gib
    assert not lacking(planned)
    assert asked(on_slurm(lab, seeds=[0, 1, 2])) == {17}


def test_jobs_ask_for_four_gib_at_least(lab: Path):
    measured(lab, "S", "finetune", 0.5)
    assert asked(on_slurm(lab, control="none")) == {4}


def test_where_a_run_of_the_experiment_was_never_measured_none_is_asked_for(lab: Path):
    measured(lab, "S", "finetune", 10.0)
    assert asked(on_slurm(lab)) == {None}  # the control
    measured(lab, "S_base", "control", 4.0)
    assert asked(on_slurm(lab, variables={"lora_rank": [64, 256]})) == {None}  # a larger rank may need more


def test_without_slurm_and_where_the_plan_says_it_nothing_is_estimated(lab: Path):
    measured(lab, "S", "finetune", 10.0)
    assert asked(plan(control="none")) == {None}
    said = on_slurm(lab, control="none", mem_gib=64)
    assert asked(said) == {64} and not lacking(said)
    assert lacking(on_slurm(lab, control="none", mem_gib=8)) == [
        "S needs about 11 GiB of host memory (as measured) and mem_gib asks for 8 GiB. Raise mem_gib"
    ]


def test_of_a_run_on_a_gpu_it_is_only_said_that_the_default_may_be_too_little(lab: Path):
    small = on_slurm(lab, "h200", gpus=1)
    assert asked(small) == {None} and not lacking(small)
    config = lab / "models" / "small" / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 4', f'"intermediate_size": {2**29}'))
    ask: dict[str, Any] = {"gpus": 1, "allow_oversize": True}
    large = on_slurm(lab, "h200", **ask)
    assert asked(large) == {None}
    (words,) = lacking(large)
    assert words.startswith("S") and "of host memory (computed from its weights, not measured) and asks for" in words
    assert "Set mem_gib, unless DefMemPerCPU" in words
    assert not lacking(on_slurm(lab, "h200", mem_gib=64, **ask)) and not lacking(on_slurm(lab, "h200", cpus=8, **ask))


@pytest.mark.parametrize(("dtype", "each"), [("bf16", 2), ("fp32", 4)])
def test_weights_pass_through_host_memory_in_their_type(dtype: str, each: int):
    one = job(dtype=dtype)
    assert host_memory(one) == each * one.shape.n_params + HOST_BYTES


def test_the_memory_of_a_plan_is_asked_of_slurm_for_its_runs_and_not_for_the_job_that_closes_it(lab: Path):
    plan = Plan(
        name="p", question="q", models={"S": "/m"}, datasets={"d": "/d"},
        experiments=[Experiment(recipe="lora_finetune_single_device", resources=Resources(mem_gib=17))],
    )  # fmt: skip
    files = render(plan, expand(plan, manual), Settings.model_validate({"workspace": lab, "slurm": {}}))
    scripts = {name: b"\n#SBATCH --mem=17G\n" in text for name, text in files.items() if name.endswith(".sbatch")}
    assert scripts == {
        "runs/S/run.sbatch": True, "runs/S/eval.sbatch": True, "runs/S_base/run.sbatch": True, "close.sbatch": False,
    }  # fmt: skip
    assert b"mem_gib: 17" in files["plan.yaml"]
