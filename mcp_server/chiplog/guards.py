"""Validity guards over the runs of an experiment: whether its arms may be compared, and what their own guards saw.

Pure functions of the plan's runs and their records. A guard that had nothing to look at is "not checked", never
"passed"; one that fired says which conclusions it concerns: all about some runs, or only those against some others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pydantic import Field

from chiplog.plan import Run
from chiplog.record import Record, State
from chiplog.schema import Frozen

# Settings that change no loss but by rounding: arms that differ in them alone may have the same.
UNSEEN = {
    "eval_split", "eval_limit", "scorer", "eval_batch_size", "max_new_tokens", "val_split", "val_tokens",
    "run_val_every_n_steps", "log_every_n_steps", "save_every_n_steps", "keep_checkpoints", "guard_steps",
    "overfit_steps", "max_epochs", "micro_batch_size", "activation_checkpointing", "chunked_loss", "shard_model",
    "compile", "deterministic", "device",
}  # fmt: skip
# Settings that leave the model and what is trained of it as they are. Any other may decide how many parameters that is.
OF_THE_WAY = UNSEEN | {
    "seed", "epochs", "max_steps", "batch_size", "lr", "lr_schedule", "warmup_steps", "final_lr",
    "weight_decay", "clip_grad_norm", "optimizer", "beta1", "beta2", "eps", "momentum", "nesterov", "dropout",
    "lora_alpha", "lora_dropout", "packed", "system_prompt", "prompt", "dtype", "parametrization", "base_width",
    "base_depth", "base_heads", "init", "init_std", "zero_readout", "zero_query", "forget_bias",
}  # fmt: skip
LENGTHS = {"dataset", "model", "batch_size", "seq_len", "max_seq_len", "packed", "system_prompt", "prompt"}
# What arms must have in common where they have in common all that decides it.
DECIDES: dict[str, set[str]] = {
    "val_sha256": {"dataset", "val_split", "val_tokens"},
    "train_sha256": {"dataset"},
    "n_samples": LENGTHS | {"architecture"},
    "steps": LENGTHS | {"epochs", "max_steps"},
    "tokens": LENGTHS | {"epochs", "max_steps", "seed", "log_every_n_steps"},
    "batch_size": {"batch_size"},
}
CALLED = {
    "val_sha256": "validation set", "train_sha256": "training data", "n_samples": "data order (samples of an epoch)",
    "steps": "steps", "tokens": "tokens", "batch_size": "effective batch", "n_trainable": "trainable parameters",
}  # fmt: skip

# What to do where a guard fired; of a run's own guards, what `found` says leads there.
REMEDIES = {
    "arms differ": "find out why the setting that varies does not reach the training: compare the config.yaml of these "
    "runs with what the recipe reads",
    "arms are comparable": "plan what differs as a variable, or mend the data so that it is the same, under a new name",
    "nothing dropped": "diagnose_run says why a run ended; submit_experiment repeats what did not end well",
    "seeds are seeds": "see that the recipe uses its seed, and that nothing changed between the replicates",
    "control present": "submit_experiment repeats a control that did not end well",
    "budget met": "compare steps_planned with steps of the record: more data, more epochs, or a smaller max_steps",
    "weights move": "raise lr, or keep the weights that are trained in fp32",
    "one-batch overfit": "look for what keeps the model from learning at all: a loss that ignores it, a cut gradient",
    "gradient reach": "the named parameters are cut off from the loss: look at how the model uses them",
    "optimizer coverage": "give the optimizer each parameter that is trained, once",
    "frozen stays frozen": "something writes to parameters that should be frozen: look at the optimizer's groups",
    "finite loss": "lower lr, clip gradients, or use fp32, and submit the run again under a new name",
}

# Guards that every job which writes guards.json should have; its settings may switch one off.
OF_A_JOB = ("gradient reach", "weights move", "optimizer coverage", "budget met")


class Failure(Frozen):
    """Why a guard fired, and which conclusions that concerns."""

    words: str = Field(description="What is wrong.")
    runs: list[str] = Field(description="Runs that it is about.")
    against: list[str] | None = Field(
        default=None, description="It concerns only what is concluded of those against these; null: all of them."
    )

    def concerns(self, first: Sequence[str], second: Sequence[str]) -> bool:
        """Whether a conclusion about the runs of two arms rests on what is wrong."""
        return any(
            set(one) & set(self.runs) and (self.against is None or set(other) & set(self.against))
            for one, other in ((first, second), (second, first))
        )


class Verdict(Frozen):
    """What one guard says of an experiment."""

    guard: str = Field(description="Name of the guard.")
    ok: bool | None = Field(description="Whether it passed; null: not checked.")
    runs: dict[str, bool | None] = Field(description="The same of each run that it is about.")
    failures: list[Failure] = Field(default=[], description="Why it fired.")
    found: str = Field(description="The outcome in a line.")

    def cut_to(self, most: int) -> Verdict:
        """The same with that many runs and failures, those that failed first."""
        runs = sorted(self.runs.items(), key=lambda item: item[1] is not False)[:most]
        return self.model_copy(update={"runs": dict(runs), "failures": self.failures[:most]})


def verdicts(runs: Sequence[Run], records: Mapping[str, Record]) -> list[Verdict]:
    """Every guard of an experiment, those that fired first; `records` has the last attempt at each run."""
    trained = [run for run in runs if run.kind != "control"]
    done = {run.name: records[run.name] for run in trained if _completed(records.get(run.name))}
    found = [
        _arms_differ(trained, done),
        _arms_are_comparable(trained, done),
        _nothing_dropped(runs, records),
        _seeds_are_seeds(trained, done),
        _control_present(runs, records),
        *_of_runs(trained, records, _steps_of_budget(done)),
    ]
    return sorted(found, key=lambda one: {False: 0, None: 1, True: 2}[one.ok])


def next_steps(found: Sequence[Verdict]) -> list[str]:
    """What to do about the guards that fired."""
    return [
        f"{one.guard}: {REMEDIES.get(one.guard, 'look at guards.json in the folder of these runs')}"
        for one in found
        if one.ok is False
    ]


def counted(found: Sequence[Verdict]) -> str:
    """How many passed, in words."""
    passed, open_ = sum(one.ok is True for one in found), sum(one.ok is None for one in found)
    return f"{passed} of {len(found)} guards passed" + (f", {open_} not checked" if open_ else "")


def arm_name(run: Run) -> str:
    """The name of a run without its seed: replicates are one arm."""
    return run.name.removesuffix(f"_seed{run.seed}") if "seed" in run.varied else run.name


def control_of(runs: Iterable[Run], run: Run) -> Run | None:
    """The control of a run: its base model, evaluated as it is."""
    for other in runs:
        same = all(run.config.get(key) == value for key, value in other.config.items() if key != "seed")
        if other.kind == "control" and same:
            return other
    return None


def _completed(record: Record | None) -> bool:
    return record is not None and record.state is State.COMPLETED


def _arms_differ(trained: Sequence[Run], done: Mapping[str, Record]) -> Verdict:
    """No two arms have the same configuration, nor the same losses though a setting differs that training reads."""
    failures = [
        Failure(words=f"{_listed(group)} have the same configuration", runs=_names(group), against=_names(group))
        for group in _grouped(trained, lambda run: _key(run, set()))
        if len({arm_name(run) for run in group}) > 1
    ]
    hashed = [run for run in trained if run.name in done and done[run.name].trace.losses_sha256]
    for group in _grouped(hashed, lambda run: done[run.name].trace.losses_sha256):
        if len({arm_name(run) for run in group}) > 1 and len({_key(run, UNSEEN | {"seed"}) for run in group}) > 1:
            words = f"{_listed(group)} have the same losses, step for step"
            failures.append(Failure(words=words, runs=_names(group), against=_names(group)))
    looked = hashed if len({arm_name(run) for run in hashed}) > 1 else []
    return _verdict("arms differ", trained, looked, failures, "no two arms of which the losses are known")


def _arms_are_comparable(trained: Sequence[Run], done: Mapping[str, Record]) -> Verdict:
    """Runs that have in common all settings that decide something have that in common too."""
    failures, looked = [], {}
    for trait, called in CALLED.items():
        known = [run for run in trained if run.name in done and getattr(done[run.name].trace, trait) is not None]
        for group in _grouped(known, lambda run, trait=trait: _decided(run, trait)):
            looked |= {run.name: run for run in group} if len({arm_name(run) for run in group}) > 1 else {}
            values = {run.name: getattr(done[run.name].trace, trait) for run in group}
            if len({arm_name(run) for run in group}) > 1:
                failures += _sides(values, f"{called} differ, and no setting that varies decides that")
    why = "no two arms of which it is known and which agree in what decides it"
    return _verdict("arms are comparable", trained, list(looked.values()), failures, why)


def _sides(values: Mapping[str, Any], words: str) -> list[Failure]:
    """A failure for each value beside the first run's, against all runs that have another."""
    sides: dict[Any, list[str]] = {}
    for name, value in values.items():
        sides.setdefault(value, []).append(name)
    said = [f"{names[0]} {value[:12] if isinstance(value, str) else f'{value:,}'}" for value, names in sides.items()]
    return [
        Failure(words=f"{words}: {said[0]}, {told}", runs=names, against=[name for name in values if name not in names])
        for told, names in list(zip(said, sides.values(), strict=True))[1:]
    ]


def _nothing_dropped(runs: Sequence[Run], records: Mapping[str, Record]) -> Verdict:
    """Every run of the plan ended well, with steps and losses that are numbers."""
    failures = [
        Failure(words=f"{run.name} {words}", runs=[run.name])
        for run in runs
        if (words := _dropped(run, records.get(run.name)))
    ]
    return _verdict("nothing dropped", runs, runs, failures, "no runs")


def _dropped(run: Run, record: Record | None) -> str | None:
    if record is None:
        return "was never submitted"
    if record.state is not State.COMPLETED:
        return f"is {record.state}"
    if run.kind != "control" and record.trace.steps == 0:
        return "logged no step"
    if record.trace.finite is False:
        return "has losses that are no numbers"
    return None


def _seeds_are_seeds(trained: Sequence[Run], done: Mapping[str, Record]) -> Verdict:
    """Replicates have losses of their own, and differ in nothing but the seed."""
    failures, looked = [], []
    for group in _grouped([run for run in trained if run.name in done], arm_name):
        traces = {run.name: done[run.name].trace for run in group}
        hashes = [trace.losses_sha256 for trace in traces.values() if trace.losses_sha256]
        if len(hashes) < 2:
            continue
        looked += group
        differ = [
            called
            for trait, called in CALLED.items()
            if trait != "tokens" and len({getattr(trace, trait) for trace in traces.values()} - {None}) > 1
        ]
        if len({_key(run, {"seed"}) for run in group}) > 1:
            differ.append("settings")
        if len(set(hashes)) < len(hashes):
            words = f"{_listed(group)} are replicates with the same losses, step for step"
            failures.append(Failure(words=words, runs=_names(group)))
        if differ:
            words = f"{_listed(group)} are replicates that differ in more than the seed: {', '.join(differ)}"
            failures.append(Failure(words=words, runs=_names(group)))
    return _verdict("seeds are seeds", trained, looked, failures, "no arm has two trainings whose losses are known")


def _control_present(runs: Sequence[Run], records: Mapping[str, Record]) -> Verdict:
    """The controls that the plan has, base models and runs that it names, ended well."""
    arms: dict[str, list[str]] = {run.name: [] for run in runs if run.kind == "control"}
    for run in runs:
        base = control_of(runs, run) if run.kind != "control" else None
        for name in filter(None, (run.control, base and base.name)):
            arms.setdefault(name, []).append(run.name)
    controls = [run for run in runs if run.name in arms]
    failures = []
    for control in controls:
        if not _completed(record := records.get(control.name)):
            state = record.state if record else "not run"
            words = f"{control.name}, the control of {_some(arms[control.name])}, is {state}"
            failures.append(Failure(words=words, runs=[control.name]))
    return _verdict("control present", controls, controls, failures, "the plan has no control")


def _steps_of_budget(done: Mapping[str, Record]) -> dict[str, str | None]:
    """Of each run whose steps are known: why the budget was not met, null where it was."""
    found = {}
    for name, record in done.items():
        steps, planned, most = record.trace.steps, record.trace.steps_planned, record.config.get("max_steps")
        if steps and planned is not None:
            found[name] = f"{steps} steps instead of {planned}" if steps != planned else None
            if isinstance(most, int) and steps > most:
                found[name] = f"{steps} steps, and max_steps is {most}"
    return found


def _of_runs(trained: Sequence[Run], records: Mapping[str, Record], budget: Mapping[str, str | None]) -> list[Verdict]:
    """The guards that the jobs themselves had, with "budget met" of what the planner sees beside them."""
    told = [run for run in trained if run.name in records and records[run.name].guards]
    wrong: dict[str, dict[str, str | None]] = {guard: {} for guard in OF_A_JOB if told}
    for run in told:
        for one in records[run.name].guards:
            words = one.found if not one.ok else None if one.examined else "it examined nothing"
            wrong.setdefault(one.guard, {})[run.name] = words
    for name, words in budget.items():
        of_run = wrong.setdefault("budget met", {})
        of_run[name] = of_run.get(name) or words
    found = []
    for guard, of_run in wrong.items():
        failures = [Failure(words=f"{name}: {words}", runs=[name]) for name, words in of_run.items() if words]
        missing = [run for run in told if run.name not in of_run]
        looked = [run for run in trained if run.name in of_run]
        found.append(_verdict(guard, trained, looked, failures, f"{_listed(missing)} did not look", missing))
    if silent := [run for run in trained if run not in told]:
        found.append(_verdict("guards of the runs", silent, [], [], f"{_listed(silent)} wrote no guards.json"))
    return found


def _verdict(
    guard: str, about: Sequence[Run], looked: Sequence[Run], failures: Sequence[Failure], unchecked: str,
    missing: Sequence[Run] = (),
) -> Verdict:  # fmt: skip
    """The verdict over the runs that it was about, of which it looked at some.

    `unchecked` says why at none, or not at those that are `missing`.
    """
    runs: dict[str, bool | None] = {run.name: None for run in about}
    runs |= {run.name: True for run in looked} | {name: False for one in failures for name in one.runs}
    ok = False if failures else True if looked and not missing else None
    words = "; ".join(one.words for one in failures[:3]) + (f"; and {len(failures) - 3} more" * (len(failures) > 3))
    passed = f"passed by {sum(ok is True for ok in runs.values())} of {len(runs)} runs"
    return Verdict(
        guard=guard, ok=ok, runs=runs, failures=list(failures),
        found=words or (passed if ok else f"not checked: {unchecked}"),
    )  # fmt: skip


def _key(run: Run, without: set[str]) -> str:
    """What a run is configured to do, but for some settings."""
    return json.dumps([run.recipe, {k: v for k, v in run.config.items() if k not in without}], sort_keys=True)


def _decided(run: Run, trait: str) -> str:
    """The settings of a run that decide a trait, and its recipe."""
    if trait == "n_trainable":
        return _key(run, OF_THE_WAY)
    return _key(run, run.config.keys() - DECIDES[trait])


def _grouped(runs: Iterable[Run], key: Callable[[Run], Any]) -> list[list[Run]]:
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return [group for group in groups.values() if len(group) > 1]


def _names(runs: Sequence[Run]) -> list[str]:
    return [run.name for run in runs]


def _listed(runs: Sequence[Run]) -> str:
    return _some(_names(runs))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
