"""The analysis of a scaling experiment's folder: made runs whose law is known, and every hazard."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.scaling_laws import analyze, demo
from tasks.scaling_laws.analysis import Analysis, analyse
from tasks.scaling_laws.power import multiplier
from tasks.scaling_laws.runs import TRAIN, Run, read_experiment
from tasks.scaling_laws.verdicts import section
from trainer import job
from trainer.job import UserError

DEFAULTS = job.default_settings(TRAIN)
GRID = [(width, steps) for width in (16, 32, 64, 128) for steps in (100, 400, 1600)]


def law(n: int, d: int, floor: float = 1.0) -> float:
    return floor + 30 / n**0.35 + 60 / d**0.3


def write(folder: Path, name: str, loss: float | None = None, times: float = 1.0, **config: Any) -> Path:
    """A finished run as the trainer leaves it, with the law's loss unless another is given."""
    run = folder / "runs" / name
    run.mkdir(parents=True)
    config = {**DEFAULTS, "batch_size": 16, "seq_len": 64, "max_steps": 100, **config}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    n, d = 30 * config["width"] ** 2, config["max_steps"] * 1024
    loss = law(n, int(d * times)) if loss is None else loss
    start = {"event": "start", "n_params": n, "flops_per_token": 6.0 * n, "val_sha256": "v"}
    step = {"event": "step", "step": config["max_steps"], "loss": 2.0}
    validation = {"event": "validation", "step": config["max_steps"], "loss": loss}
    end = {"event": "end", "step": config["max_steps"], "diverged": None}
    lines(run, start, step, validation, end)
    return run


def lines(run: Path, *events: dict[str, Any]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def change(run: Path, event: str, **values: Any) -> None:
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines(run, *(one | values if one["event"] == event else one for one in events))


def grid(folder: Path) -> Path:
    for width, steps in GRID:
        write(folder, f"w{width}_s{steps}", width=width, max_steps=steps)
    return folder


def analysed(folder: Path) -> Analysis:
    return analyse(read_experiment(folder), bootstrap=40, seed=0)


def lines_of(text: str, words: str) -> list[str]:
    return [line for line in text.splitlines() if words in line]


def test_the_law_that_the_runs_were_made_from_is_found_and_said_with_what_it_rests_on(tmp_path: Path):
    found = analysed(grid(tmp_path))
    law_of = found.laws[found.control or ""]
    assert isinstance(law_of, dict) and law_of["identifiable"]
    expected = {"E": 1.0, "A": 30.0, "B": 60.0, "alpha": 0.35, "beta": 0.3}
    assert {name: law_of[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert "12 of 12 runs ended with a loss." in section(found)
    (said,) = lines_of(section(found), "Shown: transformer, 12 runs: L = 1 + 30 / N^0.35")
    assert "tokens per parameter" in said


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
    record = {"run": "never_began", "state": "FAILED", "reason": "node failure", "config": {"width": 24}}
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


def test_a_folder_without_runs_is_an_error(tmp_path: Path):
    with pytest.raises(UserError, match="holds no runs"):
        read_experiment(tmp_path)


def test_a_failed_guard_turns_the_law_into_not_shown(tmp_path: Path):
    grid(tmp_path)
    failed = [{"guard": "weights move", "ok": False, "examined": 3, "found": "stuck"}]
    (tmp_path / "runs" / "w16_s100" / "guards.json").write_text(json.dumps(failed))
    (said,) = lines_of(section(analysed(tmp_path)), "transformer, 12 runs: L =")
    assert said.startswith("- Not shown: ") and "Guards failed in 1 runs: in w16_s100, weights move." in said


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


def test_an_arm_whose_losses_the_control_never_reached_has_no_multiplier():
    def runs(losses: Iterable[float]) -> list[Run]:
        return [Run(str(i), DEFAULTS, 1000, 10**i, 10.0**i, loss) for i, loss in enumerate(losses, 10)]

    words = multiplier(runs((4, 3.5, 3.2, 3.0)), runs((2.0, 1.5)), None, 10, 0)
    assert words == "no run of it has a loss between 3 and 4, which is what the control reaches"


def sweep(folder: Path, kind: str, best: dict[int, float], seeds: int = 2, apart: float = 0.001) -> None:
    for width, vertex in best.items():
        for seed in range(seeds):
            for lr in (0.001, 0.003, 0.01, 0.03, 0.1):
                loss = 2 + 0.05 * math.log(lr / vertex) ** 2 + apart * seed
                write(folder, f"{kind}{width}_{lr}_{seed}", loss, width=width, lr=lr, seed=seed, parametrization=kind)


def test_learning_rates_that_stay_transfer_and_those_that_move_do_not(tmp_path: Path):
    sweep(tmp_path, "mup", {16: 0.01, 32: 0.0105, 64: 0.0095})
    sweep(tmp_path, "standard", {16: 0.02, 32: 0.01, 64: 0.005})
    found = analysed(tmp_path)
    assert not found.grid  # points of a sweep are no points of a law
    text = section(found)
    assert "60 of them belong to sweeps of learning rates and are no points of laws." in text
    (mup,), (standard,) = lines_of(text, "transformer, mup: best"), lines_of(text, "transformer, standard: best")
    assert mup.startswith("- Shown: ") and mup.endswith("by at most 0.5 octaves in every seed.")
    assert standard.startswith("- Shown: ") and standard.endswith("so it does not transfer.")
    assert "-2.00 octaves over 4x width" in standard


def test_seeds_that_lie_apart_leave_the_vertex_where_it_is(tmp_path: Path):
    sweep(tmp_path, "mup", {16: 0.01, 32: 0.0105}, apart=0.5)
    (said,) = lines_of(section(analysed(tmp_path)), "transformer: best learning rate 0.01 at 16 (vertex)")
    assert said.startswith("- Shown: ") and "0.0105 at 32 (vertex)" in said


def test_a_sweep_whose_best_is_at_its_edge_or_of_one_seed_shows_nothing(tmp_path: Path):
    sweep(tmp_path / "a", "mup", {16: 0.01, 32: 0.9})
    (edge,) = lines_of(section(analysed(tmp_path / "a")), "transformer: best")
    assert edge.startswith("- Not shown: ") and edge.endswith("the best is the last that was tried: sweep further.")
    sweep(tmp_path / "b", "mup", {16: 0.01, 32: 0.01}, seeds=1)
    (single,) = lines_of(section(analysed(tmp_path / "b")), "transformer: best")
    assert single.startswith("- Not shown: ") and single.endswith("It is one seed: add another.")


def test_a_best_learning_rate_without_a_vertex_is_known_only_as_finely_as_was_swept(tmp_path: Path):
    for width in (16, 32):
        for seed in (0, 1):
            for lr, loss in ((0.001, 2.5), (0.01, 2.0), (0.02, 2.45), (0.1, 2.5)):  # no parabola
                write(tmp_path, f"{width}_{lr}_{seed}", loss, width=width, lr=lr, seed=seed)
    (said,) = lines_of(section(analysed(tmp_path)), "transformer: best")
    assert said.startswith("- Not shown: ") and "+0.00 octaves over 2x width" in said
    assert said.endswith("Without a vertex the best is known to 3.32 octaves only: sweep more finely.")


def test_a_diverged_run_of_a_sweep_counts_as_tried(tmp_path: Path):
    sweep(tmp_path, "mup", {16: 0.01, 32: 0.01})
    for seed in (0, 1):
        change(tmp_path / "runs" / f"mup16_0.1_{seed}", "end", step=3, diverged="the loss is nan")
    (said,) = lines_of(section(analysed(tmp_path)), "transformer: best")
    assert "; 2 runs diverged;" in said and "Left out: mup16_0.1_0, it diverged" in section(analysed(tmp_path))


def test_the_ladder_compares_equal_seeds_and_says_what_is_shown(tmp_path: Path):
    for seed, noise in enumerate((0.0, 0.05, -0.03)):
        write(tmp_path, f"c{seed}", 2.0 + noise, width=32, seed=seed)
        write(tmp_path, f"swiglu{seed}", 1.9 + noise + 0.001 * seed, width=32, seed=seed, activation="swiglu")
        write(tmp_path, f"rms{seed}", 2.0 - noise, width=32, seed=seed, norm="rmsnorm")
    found = analysed(tmp_path)
    assert {rung.change: rung.shown for rung in found.rungs} == {
        "activation swiglu for gelu": True,
        "norm rmsnorm for layernorm": False,
    }
    text = section(found)
    assert "activation swiglu for gelu (width 32, 100 steps): 0.0990 nats lower loss" in text
    assert "The control is transformer." in text


def test_isoflop_curves_find_the_size_that_the_law_says_is_best(tmp_path: Path):
    for width in (16, 24, 32, 48, 64, 96):
        for steps in (100, 200, 400, 800, 1600, 3200, 6400):
            write(tmp_path, f"w{width}_s{steps}", width=width, max_steps=steps)
    found = analysed(tmp_path)
    known = [curve for curve in found.isoflop if curve["best_n"]]
    assert known
    for curve in known:
        share = (0.35 * 30 / (0.3 * 60)) ** (1 / 0.65)
        best = share * (curve["flops"] / 6) ** (0.3 / 0.65)
        assert curve["best_n"] == pytest.approx(best, rel=0.3)


def test_the_command_writes_words_figures_and_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    grid(tmp_path)
    sweep(tmp_path, "mup", {16: 0.01, 32: 0.01}, seeds=1)
    found = analysed(tmp_path)
    found.coordinates["mup"] = {"widths": [8, 16], "slopes": {"step 1 logits": 0.02}, "logits": [[0, 0], [1, 1]]}
    answer = analyze.write(found, tmp_path)
    assert sorted(file.name for file in (tmp_path / "figures").iterdir()) == [
        "coordinate_check.png", "isoflop.png", "learning_rates.png", "loss_and_compute.png", "residuals.png"
    ]  # fmt: skip
    text = (tmp_path / "analysis.md").read_text()
    assert all(f"(figures/{Path(name).name})" in text for name in answer["figures"])
    assert json.loads((tmp_path / "analysis.json").read_text())["runs"] == 22
    page = (tmp_path / "figures.html").read_text()
    assert "(figures.html)" in text and page.count('class="plotly-graph-div"') == 5
    assert all(f"w{width}_s{steps}" in page for width, steps in GRID)
    law, coordinates = answer["shown"]
    assert law.startswith("transformer, standard, 12 runs: L = ") and coordinates.startswith("mup: the steepest")
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


def test_the_demo_fails_for_a_lost_run_and_for_a_check_that_tells_nothing(tmp_path: Path):
    def problems(mup: float, standard: float, **left_out: str) -> list[str]:
        slopes = {"mup": {"slopes": {"a": mup}}, "standard": {"slopes": {"a": standard}}}
        (tmp_path / "analysis.json").write_text(json.dumps({"left_out": left_out, "coordinates": slopes}))
        return demo.check(tmp_path)

    assert problems(0.05, 1.2, r1="it diverged, the loss being no number after step 4") == []
    assert problems(0.05, 1.2, r1="it wrote no metrics") == ["r1: it wrote no metrics"]
    assert "does not tell muP from" in problems(0.2, 1.2)[0] and "does not tell muP from" in problems(0.0, 0.05)[0]
