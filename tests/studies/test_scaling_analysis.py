"""The analysis of a scaling experiment's folder: made runs whose law is known, and every hazard."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tasks.scaling_laws import analyze, demo
from tasks.scaling_laws.power import multiplier, power_law
from tasks.scaling_laws.runs import Run, read_experiment
from tasks.scaling_laws.verdicts import section
from tests.studies.made_runs import DEFAULTS, GRID, analysed, change, grid, law, lines, lines_of, sweep, write
from trainer.job import UserError


def test_the_law_that_the_runs_were_made_from_is_found_and_said_with_what_it_rests_on(tmp_path: Path):
    found = analysed(grid(tmp_path))
    law_of = found.laws[found.control or ""]
    assert isinstance(law_of, dict) and law_of["identifiable"]
    expected = {"E": 1.0, "A": 30.0, "B": 60.0, "alpha": 0.35, "beta": 0.3}
    assert {name: law_of[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert "12 of 12 runs ended with a loss." in section(found)
    (said,) = lines_of(section(found), "Shown: transformer, 12 runs: L = 1 + 30 / N^0.35")
    assert "tokens per parameter" in said


def test_a_law_of_few_runs_is_said_without_its_numbers(tmp_path: Path):
    for width, steps in GRID[:6]:
        write(tmp_path, f"w{width}_s{steps}", width=width, max_steps=steps)
    text = section(analysed(tmp_path))
    (said,) = lines_of(text, "Not shown: a law of transformer, 6 runs. There are 6 different points; 9 are needed")
    assert "L = " not in said


def test_every_hazard_is_counted_and_named_and_none_is_dropped(tmp_path: Path):
    grid(tmp_path)
    lines(write(tmp_path, "only_header", width=24), {"event": "start", "n_params": 5})
    (write(tmp_path, "empty", width=24) / "metrics.jsonl").write_text("")
    (write(tmp_path, "no_metrics", width=24) / "metrics.jsonl").unlink()
    change(write(tmp_path, "nan_validation", width=24), "validation", loss=math.nan)
    change(write(tmp_path, "diverged", width=24), "end", step=40, diverged="the loss is nan at step 41")
    change(write(tmp_path, "nan_step", width=24), "step", loss=math.nan)
    change(write(tmp_path, "unfinished", width=24, max_steps=200), "end", step=120)
    change(write(tmp_path, "unvalidated", width=24), "validation", step=50)
    nul = write(tmp_path, "nul", width=24, max_steps=300) / "metrics.jsonl"
    nul.write_bytes(nul.read_bytes() + b"\0" * 100 + b"\n" + b'{"event": "st')
    config = {**DEFAULTS, "width": 24, "dataset": "/data/text"}
    record = {"run": "never_began", "state": "FAILED", "reason": "node failure", "config": config}
    (tmp_path / "records.jsonl").write_text(json.dumps(record) + "\n")

    found = read_experiment(tmp_path)
    why = {one.name: one.why for one in found.lost}
    assert why == {
        "only_header": "its metrics hold only the header",
        "empty": "its metrics hold no event",
        "no_metrics": "it wrote no metrics",
        "never_began": "it wrote no metrics (FAILED: node failure)",
        "nan_validation": "its validation loss is nan",
        "diverged": "it diverged, the loss being no number after step 40",
        "nan_step": "it diverged, the loss being no number after step 100",
        "unfinished": "it ended after 200 of 200 steps, before its learning rate had decayed",
        "unvalidated": "it was not validated after its last step",
    } | {"unfinished": why["unfinished"]}
    assert "of 200 steps, before its learning rate had decayed" in why["unfinished"]
    assert {one.name for one in found.lost if one.diverged} == {"nan_validation", "diverged", "nan_step"}
    assert found.notes == ["In nul, 1 lines with NUL bytes and 1 lines that are no events were passed over."]
    assert len(found.runs) == len(GRID) + 1 and "nul" in {run.name for run in found.runs}
    text = section(analysed(tmp_path))
    assert "13 of 22 runs ended with a loss." in text
    assert all(f"Left out: {name}, {words}." in text for name, words in why.items())


def test_settings_that_a_cut_off_file_lacks_are_the_records_or_the_run_is_lost(tmp_path: Path):
    run = write(tmp_path, "cut", width=24, max_steps=300, dataset="/data/text")
    (whole,) = read_experiment(tmp_path).runs
    lines_of_it = (run / "config.yaml").read_text().splitlines(keepends=True)
    cut = next(i for i, line in enumerate(lines_of_it) if line.startswith("max_steps"))
    (run / "config.yaml").write_text("".join(lines_of_it[:cut]))
    found = read_experiment(tmp_path)
    assert [(one.name, one.why) for one in found.lost] == [
        ("cut", "its files cannot be read: neither config.yaml nor its record says max_steps, seq_len, width, seed")
    ]
    record = {"run": "cut", "state": "COMPLETED", "config": {**whole.config, "norm": "rmsnorm", "momentum": None}}
    (tmp_path / "records.jsonl").write_text(json.dumps(record) + "\n")
    (again,) = read_experiment(tmp_path).runs
    assert again.config == whole.config | {"norm": "rmsnorm"} and again.d == whole.d


ODD_SETTINGS = [("max_steps", None), ("max_steps", "100"), ("batch_size", None), ("width", None), ("lr", "1e-3"),
                ("lr", None), ("dataset", 7), ("norm", {"a": 1}), ("heads", ["a"]), ("tied", 1)]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), ODD_SETTINGS)
def test_a_run_with_an_odd_setting_is_lost_alone(key: str, value: Any, tmp_path: Path):
    grid(tmp_path)
    write(tmp_path, "odd", 2.0, width=24)
    (tmp_path / "runs" / "odd" / "config.yaml").write_text(yaml.safe_dump({**DEFAULTS, "width": 24, key: value}))
    text = section(analysed(tmp_path))
    (said,) = lines_of(text, "Left out: odd, its files cannot be read: ")
    assert f"{key} is {value!r}" in said and "12 of 13 runs ended with a loss." in text


@pytest.mark.parametrize(
    ("event", "values", "words"),
    [
        ("step", {"step": None}, "step is None in the event step"),
        ("validation", {"step": "100"}, "step is '100' in the event validation"),
        ("end", {"step": None}, "step is None in the event end"),
        ("start", {"n_params": "1e5"}, "n_params is '1e5' in the event start"),
        ("start", {"n_params": -5}, "n_params is -5 in the event start"),
        ("start", {"flops_per_token": None}, "flops_per_token is None in the event start"),
        ("start", {"flops_per_token": 0}, "flops_per_token is 0 in the event start"),
    ],
)
def test_a_run_with_an_odd_event_is_lost_alone(event: str, values: dict[str, Any], words: str, tmp_path: Path):
    change(grid(tmp_path) / "runs" / "w16_s100", event, **values)
    text = section(analysed(tmp_path))
    assert f"Left out: w16_s100, its files cannot be read: {words}." in text
    assert "11 of 12 runs ended with a loss." in text


@pytest.mark.parametrize("text", ["hello", "- 1\n- 2\n", ""])
@pytest.mark.parametrize("record", ["5", '{"run": 5}', '{"run": ["a"]}', '{"run": "w16_s100", "config": "abc"}'])
def test_files_that_hold_no_settings_cost_their_run_alone(text: str, record: str, tmp_path: Path):
    (grid(tmp_path) / "runs" / "w16_s100" / "config.yaml").write_text(text)
    (tmp_path / "records.jsonl").write_text(record + "\n")
    found = read_experiment(tmp_path)
    assert len(found.runs) == 11 and [one.name for one in found.lost] == ["w16_s100"]
    assert found.lost[0].why.startswith("its files cannot be read: neither config.yaml nor its record says max_steps")


def test_an_event_whose_kind_is_no_word_is_passed_over(tmp_path: Path):
    file = grid(tmp_path) / "runs" / "w16_s100" / "metrics.jsonl"
    file.write_text(file.read_text() + '{"event": ["step"]}\n')
    found = read_experiment(tmp_path)
    assert len(found.runs) == 12 and found.notes == ["In w16_s100, 1 lines that are no events were passed over."]


def test_a_folder_without_runs_is_an_error(tmp_path: Path):
    with pytest.raises(UserError, match="holds no runs"):
        read_experiment(tmp_path)


def test_a_failed_guard_turns_the_law_into_not_shown(tmp_path: Path):
    grid(tmp_path)
    failed = [{"guard": "weights move", "ok": False, "examined": 3, "found": "stuck"}]
    (tmp_path / "runs" / "w16_s100" / "guards.json").write_text(json.dumps(failed))
    (said,) = lines_of(section(analysed(tmp_path)), "transformer, 12 runs: L =")
    assert said.startswith("- Not shown: ") and "Guards failed in 1 runs: in w16_s100, weights move." in said


def test_runs_with_the_same_losses_step_for_step_show_nothing(tmp_path: Path):
    grid(tmp_path)
    for name in ("w16_s100", "w32_s100"):
        change(tmp_path / "runs" / name, "step", loss=2.5)
    (said,) = lines_of(section(analysed(tmp_path)), "transformer, 12 runs: L =")
    assert said.startswith("- Not shown: ") and "w16_s100, w32_s100 have the same losses, step for step" in said


def test_runs_that_were_validated_on_different_tokens_show_no_law(tmp_path: Path):
    change(grid(tmp_path) / "runs" / "w16_s100", "start", val_sha256="another")
    (said,) = lines_of(section(analysed(tmp_path)), "transformer, 12 runs: L =")
    assert said.startswith("- Not shown: ") and "2 different sets of tokens" in said


def test_an_arm_that_learns_from_each_token_as_from_two_saves_compute(tmp_path: Path):
    grid(tmp_path)
    for width, steps in GRID:
        write(tmp_path, f"rms{width}_{steps}", times=2, width=width, max_steps=steps, norm="rmsnorm")
    found = analysed(tmp_path)
    one = found.multipliers["transformer, rmsnorm"]
    assert isinstance(one, dict) and 1.2 < one["multiplier"] < 2.2 and one["ci"][0] > 1
    assert any(line.startswith("- Shown: transformer against") for line in section(found).splitlines())


def test_sizes_that_were_trained_with_two_learning_rates_are_no_points_of_one_law(tmp_path: Path):
    grid(tmp_path)
    for width, steps in GRID:
        write(tmp_path, f"rms{width}_{steps}", width=width, max_steps=steps, norm="rmsnorm")
        write(tmp_path, f"hot{width}_{steps}", times=0.3, width=width, max_steps=steps, lr=0.1)
    text = section(analysed(tmp_path))
    for words in ("transformer, 24 runs: L = ", "transformer: lowest loss", "transformer against transformer, rmsnorm"):
        (said,) = lines_of(text, words)
        assert (
            said.startswith("- Not shown: ") and "12 sizes and lengths were trained with several learning rates" in said
        )
    assert "Not shown: that 0.001 or 0.1 is the best learning rate" in text


def test_a_budget_that_a_run_of_is_lost_has_no_point_there(tmp_path: Path):
    for width in (16, 24, 32, 48, 64):
        for steps in (100, 400, 1600, 6400):
            write(tmp_path, f"w{width}_s{steps}", width=width, max_steps=steps * 32**2 // width**2)
    whole, budget = analysed(tmp_path).isoflop, 2
    assert [len(one["points"]) for one in whole] == [5] * 4 and all(one["are_runs"] for one in whole)
    (tmp_path / "runs" / "w32_s1600" / "metrics.jsonl").unlink()
    less = analysed(tmp_path).isoflop
    assert [len(one["points"]) for one in less] == [5, 5, 4, 5]
    assert less[budget]["best_n"] == pytest.approx(whole[budget]["best_n"], rel=0.05)


def test_a_growth_that_may_be_none_is_not_shown(tmp_path: Path):
    random = np.random.default_rng(0)
    for width in (16, 24, 32, 48, 64):
        for steps in (steps * 32**2 // width**2 for steps in (100, 400, 1600, 6400)):
            loss = law(30 * width**2, steps * 1024) + random.normal(0, 0.03)
            write(tmp_path, f"w{width}_s{steps}", loss, width=width, max_steps=steps)
    found = analysed(tmp_path)
    assert found.isoflop_growth and found.isoflop_growth["ci"][0] < 0
    (said,) = lines_of(section(found), "isoFLOP: ")
    assert said.startswith("- Not shown: ") and "The interval holds 0" in said


def test_an_arm_whose_losses_the_control_never_reached_has_no_multiplier():
    def runs(losses: Iterable[float]) -> list[Run]:
        return [Run(str(i), DEFAULTS, 1000, 10**i, 10.0**i, loss) for i, loss in enumerate(losses, 10)]

    words = multiplier(runs((4, 3.5, 3.2, 3.0)), runs((2.0, 1.5)), None, 10, 0)
    assert words == "no run of it has a loss between 3 and 4, which is what the control reaches"


def test_isoflop_curves_find_the_size_that_the_law_says_is_best(tmp_path: Path):
    for width in (16, 24, 32, 48, 64, 96):
        for steps in (100, 200, 400, 800, 1600, 3200, 6400):
            write(tmp_path, f"w{width}_s{steps}", width=width, max_steps=steps)
    found = analysed(tmp_path)
    known = [curve for curve in found.isoflop if curve["best_n"]]
    assert len(known) >= 3 and found.isoflop_growth
    low, high = found.isoflop_growth["ci"]
    assert low < 0.3 / 0.65 < high and high - low < 0.3
    (said,) = lines_of(section(found), "isoFLOP: ")
    assert said.startswith("- Shown: ") and "leaves out a size at a time. The law says 0.46." in said
    for curve in known:
        share = (0.35 * 30 / (0.3 * 60)) ** (1 / 0.65)
        best = share * (curve["flops"] / 6) ** (0.3 / 0.65)
        assert curve["best_n"] == pytest.approx(best, rel=0.3)


def coordinates(**slopes: float) -> dict[str, Any]:
    return {kind: {"widths": [8, 16], "slopes": {"step 1 logits": slope}, "logits": [[0, 0], [1, 1]]}
            for kind, slope in slopes.items()}  # fmt: skip


def test_a_flat_parametrisation_counts_only_where_the_standard_one_was_caught(tmp_path: Path):
    found = analysed(grid(tmp_path))
    found.coordinates.update(coordinates(mup=0.02, standard=0.05))
    (said,) = lines_of(section(found), "mup: the steepest")
    assert said.startswith("- Not shown: ") and "The standard parametrisation was not caught" in said
    found.coordinates["mup"]["slopes"] = {}
    (said,) = lines_of(section(found), "mup: the steepest")
    assert said.startswith("- Not shown: ") and "Every output is 0 at some width." in said


@pytest.mark.parametrize("setting", [{"lr_schedule": "constant"}, {"lr_schedule": "inverse_sqrt"}, {"final_lr": 1.0}])
def test_runs_whose_learning_rate_has_not_decayed_show_no_law(tmp_path: Path, setting: dict[str, Any]):
    for width, steps in GRID:
        write(tmp_path, f"w{width}_s{steps}", width=width, max_steps=steps, **setting)
    text = section(analysed(tmp_path))
    for words in ("12 runs: L = ", "lowest loss = "):
        (said,) = lines_of(text, words)
        assert said.startswith("- Not shown: ") and "The learning rate of 12 runs had not decayed" in said


def test_a_power_of_compute_is_shown_only_where_its_floor_is_known(tmp_path: Path):
    (said,) = lines_of(section(analysed(grid(tmp_path))), "lowest loss = ")
    assert said.startswith("- Shown: ") and "E from the joint law" in said
    for width, steps in GRID:
        write(tmp_path, f"rms{width}_{steps}", width=width, max_steps=steps, norm="rmsnorm")
    (said,) = lines_of(section(analysed(tmp_path)), "transformer, rmsnorm: lowest loss = ")
    assert said.startswith("- Not shown: ") and "The exponent hangs on E" in said


def test_the_interval_of_a_power_holds_what_the_ends_of_its_floors_own_would_give(tmp_path: Path):
    runs = read_experiment(grid(tmp_path)).runs
    exact, low, high = (power_law(runs, e, (), 50, 0) for e in (1.0, 0.8, 1.2))
    known = power_law(runs, 1.0, (0.8, 1.2), 50, 0)
    assert exact and low and high and known and known["alpha"] == exact["alpha"]
    assert low["alpha"] < exact["alpha_ci"][0] < exact["alpha_ci"][1] < high["alpha"]
    assert known["alpha_ci"] == [low["alpha_ci"][0], high["alpha_ci"][1]]


def test_arms_that_differ_hardly_have_names_of_their_own(tmp_path: Path):
    for place, decay in enumerate((0.1, 0.10000001)):
        write(tmp_path, f"decay{place}", width=16, weight_decay=decay)
    write(tmp_path, "plain", width=16)
    write(tmp_path, "norm", width=16, norm="rmsnorm")
    write(tmp_path, "data", width=16, dataset="/data/rmsnorm")
    assert len(analysed(tmp_path).grid) == 5


def test_the_command_writes_words_figures_and_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    grid(tmp_path)
    sweep(tmp_path, "mup", {16: 0.01, 32: 0.01}, seeds=1)
    found = analysed(tmp_path)
    found.coordinates.update(coordinates(mup=0.02, standard=0.98))
    answer = analyze.write(found, tmp_path)
    assert sorted(file.name for file in (tmp_path / "figures").iterdir()) == [
        "coordinate_check.png", "isoflop.png", "learning_rates.png", "loss_and_compute.png", "residuals.png"
    ]  # fmt: skip
    text = (tmp_path / "analysis.md").read_text()
    assert all(f"(figures/{Path(name).name})" in text for name in answer["figures"])
    assert json.loads((tmp_path / "analysis.json").read_text())["runs"] == 22
    page = (tmp_path / "figures.html").read_text()
    assert "(figures.html)" in text and page.count('class="plotly-graph-div"') == 6
    assert all(f"w{width}_s{steps}" in page for width, steps in GRID)
    law, power, mup, standard = answer["shown"]
    assert law.startswith("transformer, standard, 12 runs: L = ") and "E from the joint law" in power
    assert standard.startswith("standard: the steepest") and mup.startswith("mup: the steepest")
    assert any("what another seed would change: 12 of 12 sizes" in words for words in answer["not_shown"])


def test_the_coordinate_check_is_made_once_for_the_same_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    grid(tmp_path)
    made = []

    def check(config: dict[str, Any]) -> dict[str, Any]:
        made.append(config["width"])
        return {"mup": {"widths": [8, 16], "slopes": {"step 1 logits": 0.02}, "logits": [[0, 0], [1, 1]]}}

    monkeypatch.setattr("tasks.scaling_laws.coordinate_check.check", check)
    found = [analyze.coordinates_of(analysed(tmp_path), tmp_path) for _ in range(2)]
    assert found[0] == found[1] == check({"width": 0}) and len(made) == 2
    write(tmp_path, "another_seed", width=8, seed=5)  # the first run by name is another one now
    analyze.coordinates_of(analysed(tmp_path), tmp_path)
    assert len(made) == 3


@pytest.mark.parametrize("cut", ['{"config": ', "[1]", "whole, without what was found"])
def test_a_coordinate_check_that_was_half_written_is_made_again(
    cut: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    found = analysed(grid(tmp_path))
    of_it = json.dumps({"config": found.found.runs[0].config})
    (tmp_path / "coordinates.json").write_text(of_it if cut.startswith("whole") else cut)
    monkeypatch.setattr("tasks.scaling_laws.coordinate_check.check", lambda config: {"mup": {"widths": [8]}})
    assert analyze.coordinates_of(found, tmp_path) == {"mup": {"widths": [8]}}


@pytest.mark.parametrize("option", ["--bootstrap", "--seed"])
def test_an_analysis_of_fewer_than_no_draws_is_refused(option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["analyze.py", str(tmp_path), option, "-1"])
    with pytest.raises(UserError, match="an option is '-1': give a whole number of at least 0"):
        analyze.main()


def test_the_demo_fails_for_a_lost_run_and_for_a_check_that_tells_nothing(tmp_path: Path):
    def problems(mup: float, standard: float, **left_out: str) -> list[str]:
        slopes = {"mup": {"slopes": {"a": mup}}, "standard": {"slopes": {"a": standard}}}
        (tmp_path / "analysis.json").write_text(json.dumps({"left_out": left_out, "coordinates": slopes}))
        return demo.check(tmp_path)

    assert problems(0.05, 1.2, r1="it diverged, the loss being no number after step 4") == []
    assert problems(0.05, 1.2, r1="it wrote no metrics") == ["r1: it wrote no metrics"]
    assert "does not tell muP from" in problems(0.2, 1.2)[0] and "does not tell muP from" in problems(0.0, 0.05)[0]
