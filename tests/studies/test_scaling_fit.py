"""The fitter of scaling laws: its known answers, when it says that a law is not known, and the tables that it reads."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.scaling_laws import fit, law
from tasks.scaling_laws.table import Points, read_points
from trainer.job import UserError

ROOT = Path(__file__).resolve().parents[2]
TRUE = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
# Read off a figure of arXiv:2203.15556 by Epoch AI (arXiv:2404.10102); not in this repo, whose licence is another.
PUBLISHED = ROOT.parent / "shared" / "measurements" / "chinchilla_points.csv"


def made(noise: float = 0.0, seed: int = 0) -> Points:
    """The law TRUE at 8 budgets of 1e17 to 1e22 FLOPs, 16 points each, with log-normal noise."""
    c, ratio = np.meshgrid(np.geomspace(1e17, 1e22, 8), np.geomspace(1, 400, 16))
    n = np.sqrt(c.ravel() / 6 / ratio.ravel())
    d = c.ravel() / 6 / n
    loss = TRUE["E"] + TRUE["A"] / n ** TRUE["alpha"] + TRUE["B"] / d ** TRUE["beta"]
    loss = loss * np.exp(noise * np.random.default_rng(seed).standard_normal(len(n)))
    return Points(n, d, loss, [str(i) for i in range(len(n))])


def table(file: Path, rows: list[dict[str, Any]]) -> Path:
    lines = [",".join(rows[0])] + [",".join(str(value) for value in row.values()) for row in rows]
    file.write_text("\n".join(lines) + "\n")
    return file


def rows_of(points: Points) -> list[dict[str, Any]]:
    return [{"N": n, "D": d, "loss": x} for n, d, x in zip(points.n, points.d, points.loss, strict=True)]


def test_a_law_without_noise_is_recovered_to_a_millionth():
    points = made()
    found = law.fit(points.n, points.d, points.loss).law
    assert found == pytest.approx(TRUE, rel=1e-6)


def test_the_bootstrap_brackets_the_law_that_the_points_were_made_from():
    found = fit.fit_law(made(noise=0.01), bootstrap=300, seed=0)
    assert found["identifiable"], found["why"]
    for name, value in TRUE.items():
        low, high = found["ci"][name]
        assert low < value < high and low < found[name] < high, name


def test_no_law_nearby_does_better_than_the_one_that_was_found():
    points = made(noise=0.02, seed=1)
    found = law.fit(points.n, points.d, points.loss)
    steps = np.random.default_rng(0).normal(0, 1, (50, 5)) * np.geomspace(1e-6, 0.3, 50)[:, None]
    others = law.objective(found.theta + steps, points.n, points.d, points.loss)
    assert (others >= found.objective).all()


def test_the_profile_of_e_is_lowest_at_the_e_that_was_found():
    points = made(noise=0.01)
    found = law.fit(points.n, points.d, points.loss)
    profile = fit.profile(points, found)
    assert min(profile["objective"]) >= found.objective
    best = profile["E"][int(np.argmin(profile["objective"]))]
    assert abs(best - found.law["E"]) <= profile["E"][1] - profile["E"][0]


def test_points_on_one_line_of_tokens_per_parameter_are_not_identifiable():
    points = made()
    line = np.geomspace(1e7, 1e10, 20)
    loss = law.predicted(
        np.log([TRUE["E"], TRUE["A"], TRUE["B"], 1, 1]) + np.array([0, 0, 0, 0.34, 0.28]), line, 20 * line
    )
    found = fit.fit_law(Points(line, 20 * line, loss, [str(i) for i in range(20)]), 20, 0)
    assert not found["identifiable"] and "needs at least two token ratios" in found["why"]
    assert fit.fit_law(points, 20, 0)["identifiable"]


def test_points_from_the_middle_of_a_run_are_not_identifiable(tmp_path: Path):
    rows = [row | {"decayed": int(i > 0)} for i, row in enumerate(rows_of(made()))]
    found = fit.fit_law(read_points(table(tmp_path / "t.csv", rows)), 20, 0)
    assert not found["identifiable"] and "1 points were taken before the learning rate had decayed" in found["why"]


def test_points_of_one_run_are_drawn_together(tmp_path: Path):
    points = made(noise=0.01)
    together = [row | {"run": i // 8} for i, row in enumerate(rows_of(points))]
    found = read_points(table(tmp_path / "t.csv", together))
    assert len(set(found.run)) == len(points.n) // 8
    answer = fit.fit_law(found, 20, 0)
    assert (answer["n"], answer["n_runs"]) == (128, 16)


def test_rows_that_are_not_to_be_used_are_left_out_and_counted_unless_all_are_asked_for(tmp_path: Path):
    rows = [row | {"used_in_fit": int(i >= 3)} for i, row in enumerate(rows_of(made()))]
    rows[5]["loss"] = "nan"
    file = table(tmp_path / "t.csv", rows)
    some, everything = read_points(file), read_points(file, use_all=True)
    assert (len(some.loss), some.left_out) == (124, {"used_in_fit is 0": 3, "no loss": 1})
    assert (len(everything.loss), everything.left_out) == (127, {"no loss": 1})
    fewer = read_points(file, drop_largest=2)
    assert len(fewer.loss) == 122 and fewer.loss.max() == sorted(some.loss)[-3]


def test_compute_may_stand_for_tokens(tmp_path: Path):
    points = made()
    rows = [{"N": row["N"], "C_flops": 6 * row["N"] * row["D"], "loss": row["loss"]} for row in rows_of(points)]
    assert read_points(table(tmp_path / "t.csv", rows)).d == pytest.approx(points.d)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("N,D,loss\n", "has no rows below its header"),
        ("", "has no rows below its header"),
        ("N,D,loss\n1,2,3\n\0\0\0", "holds NUL bytes"),
        ("N,loss\n1,2\n", "D is missing"),
        ("D,loss\n1,2\n", "N is missing"),
        ("N,D,loss\n1,2,3\n1,2,-3\n", "line 3: loss is '-3'; give a number above 0"),
        ("N,D,loss\n1,0,3\n", "line 2: D is '0'; give a number above 0"),
        ("N,D,loss\nmany,2,3\n", "line 2: N is 'many'; give a number above 0"),
        ("N,C_flops,loss\n1e-300,1e300,3\n", "line 2: C_flops is '1e300'; D = C_flops / 6N is inf there"),
        ("N,C_flops,loss\n1e300,1e-300,3\n", "line 2: C_flops is '1e-300'; D = C_flops / 6N is 0.0 there"),
        ("N,D,loss\n" + "1,2,3\n" * 5, "leaves 5 points"),
        ("N,D,C_flops,loss\n1e200,1e200,1e20,3\n", "leaves 1 points"),
        ("N,D,loss\n" + "1,2,nan\n" * 9, "leaves 0 points"),
    ],
)
def test_a_table_that_cannot_be_fitted_is_an_error_in_words(text: str, words: str, tmp_path: Path):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        read_points(tmp_path / "t.csv")


def line_of(ratio: np.ndarray, noise: float = 0.01, seed: int = 0) -> Points:
    """The law TRUE at 30 sizes with these tokens per parameter."""
    n = np.geomspace(1e6, 1e9, 30)
    d = n * ratio
    loss = TRUE["E"] + TRUE["A"] / n ** TRUE["alpha"] + TRUE["B"] / d ** TRUE["beta"]
    loss = loss * np.exp(noise * np.random.default_rng(seed).standard_normal(30))
    return Points(n, d, loss, [str(i) for i in range(30)])


@pytest.mark.parametrize("seed", range(4))
def test_a_line_with_jitter_or_a_stray_point_is_still_one_line(seed: int):
    jitter = 20 * np.exp(0.05 * np.random.default_rng(100 + seed).standard_normal(30))
    stray = np.where(np.arange(30) == 7 * seed, 100, 20)
    for ratio, words in (
        (jitter, r"The 30 points have .* lie on one line.* needs at least two token ratios"),
        (stray, "All but 1 of the 30 points lie on one line.* needs more points at other token ratios"),
    ):
        found = fit.fit_law(line_of(ratio, seed=seed), 0, 0)
        assert not found["identifiable"] and re.search(words, found["why"]), found["why"]
    two = fit.fit_law(line_of(np.where(np.arange(30) % 2, 100.0, 5.0), 0.001, seed), 0, 0)
    assert "token ratios" not in two["why"]


def test_what_rests_on_nothing_is_not_identified():
    points = made()
    few = np.array([0, 15, 40, 70, 100, 127])
    cut = Points(points.n[few], points.d[few], points.loss[few], list("abcdef"))
    again = Points(*(np.tile(each, 8) for each in (cut.n, cut.d, cut.loss)), [str(i) for i in range(48)])  # pyright: ignore
    for case, words in (
        (cut, "There are 6 different points; 9 are needed"),
        (again, "There are 6 different points; 9 are needed"),
        (dataclasses.replace(points, run=["one"] * 128), "The points are of 1 runs"),
        (dataclasses.replace(points, loss=np.full(128, 2.0)), "All losses are the same"),
    ):
        found = fit.fit_law(case, 0, 0)
        assert not found["identifiable"] and words in found["why"], found["why"]
        json.dumps(found, allow_nan=False)
    noise = np.random.default_rng(0).uniform(2, 3, 128)
    assert not fit.fit_law(dataclasses.replace(points, loss=noise), 0, 0)["identifiable"]


def of_grid(loss: Any) -> Points:
    """What `loss` gives for 6 sizes of 5 token ratios each."""
    n = np.repeat(np.geomspace(1e7, 1e10, 6), 5)
    d = n * np.tile([2.0, 8, 20, 60, 200], 6)
    return Points(n, d, loss(n, d), [str(i) for i in range(30)])


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda n, d: 1.69 + 406.4 / n**0.34, ["The losses do not fall with D over these points"]),
        (lambda n, d: 1.69 + 410.7 / d**0.28, ["The losses do not fall with N over these points"]),
        (lambda n, d: 1.69 + 406.4 / n**0.34 + 0.01 * d**0.1, ["The losses do not fall with D over these points"]),
    ],
)
def test_a_term_that_does_not_fall_is_open_and_gives_no_best_size(loss: Any, words: list[str]):
    found = fit.fit_law(of_grid(loss), 40, 0)
    assert not found["identifiable"] and [word for word in words if word in found["why"]] == words, found["why"]
    assert (found["optimal_n_exponent"], found["optimal_n_exponent_ci"]) == (None, None)
    assert "between -" not in found["why"]


def test_the_points_of_one_budget_are_not_said_to_grow_together():
    n = np.geomspace(1e6, 1e11, 20)
    d = 1e20 / 6 / n
    loss = TRUE["E"] + TRUE["A"] / n ** TRUE["alpha"] + TRUE["B"] / d ** TRUE["beta"]
    noise = np.exp(0.003 * np.random.default_rng(0).standard_normal(20))
    found = fit.fit_law(Points(n, d, loss * noise, [str(i) for i in range(20)]), 200, 0)
    assert found["identifiable"], found["why"]
    assert all(low < TRUE[name] < high for name, (low, high) in found["ci"].items())


@pytest.mark.parametrize("units", [1e200, 1e-200])
def test_a_law_is_found_whatever_units_n_and_d_are_counted_in(units: float):
    points = made()
    found = law.fit(points.n * units, points.d * units, points.loss).law
    expected = TRUE | {"A": TRUE["A"] * units ** TRUE["alpha"], "B": TRUE["B"] * units ** TRUE["beta"]}
    assert found == pytest.approx(expected, rel=1e-6)


def test_too_few_draws_give_no_intervals():
    points = made(noise=0.01)
    few, enough = (fit.fit_law(points, draws, 0) for draws in (39, 40))
    assert (few["ci"], few["standard_errors"], few["optimal_n_exponent_ci"], few["bootstrap"]) == ({}, {}, None, 0)
    assert few["identifiable"] and few["optimal_n_exponent"] and enough["ci"].keys() == TRUE.keys()


def test_rows_that_are_pasted_again_make_no_interval_narrower(tmp_path: Path):
    rows = rows_of(made(noise=0.01))[::8]
    once, again = (read_points(table(tmp_path / "t.csv", rows * times)) for times in (1, 4))
    assert again.notes == ["48 rows repeat others: each counts once in the intervals."] and not once.notes
    assert len(set(again.run)) == 16
    first, second = (fit.fit_law(points, 200, 0)["ci"]["E"] for points in (once, again))
    assert np.ptp(second) > 0.8 * np.ptp(first)


@pytest.mark.parametrize("option", ["--bootstrap", "--seed", "--drop-largest"])
@pytest.mark.parametrize("value", ["-1", "1.5"])
def test_an_option_that_is_no_count_is_an_error_in_words(option: str, value: str, tmp_path: Path):
    file = table(tmp_path / "t.csv", rows_of(made()))
    command = [sys.executable, str(ROOT / "tasks" / "scaling_laws" / "fit.py"), str(file), option, value]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        1, f"error: an option is {value!r}: give a whole number of at least 0\n"
    )  # fmt: skip


@pytest.mark.parametrize("seed", [1, 2])
def test_lengths_that_hardly_matter_leave_their_exponent_open(seed: int):
    n, d = (each.ravel() for each in np.meshgrid(np.geomspace(1e6, 1e9, 8), np.geomspace(1e11, 1e13, 5)))
    loss = TRUE["E"] + TRUE["A"] / n ** TRUE["alpha"] + TRUE["B"] / d ** TRUE["beta"]
    loss = loss * np.exp(0.01 * np.random.default_rng(seed).standard_normal(40))
    found = fit.fit_law(Points(n, d, loss, [str(i) for i in range(40)]), 0, 0)
    assert not found["identifiable"] and found["why"].startswith("The draws leave beta anywhere between 0.1")


def test_draws_whose_minimum_is_far_from_the_fits_are_found(monkeypatch: pytest.MonkeyPatch):
    n, d = (each.ravel() for each in np.meshgrid(np.geomspace(1e5, 1e7, 5), np.geomspace(1e7, 1e9, 4)))
    loss = TRUE["E"] + TRUE["A"] / n ** TRUE["alpha"] + TRUE["B"] / d ** TRUE["beta"]
    loss = loss * np.exp(0.05 * np.random.default_rng(4).standard_normal(20))
    points = Points(n, d, loss, [f"{i:02d}" for i in range(20)])
    found = law.fit(n, d, loss)
    assert found.law["E"] < 1e-3  # a corner, in which Newton's steps are short
    everywhere = fit._bootstrap(points, found, 200, 0)
    monkeypatch.setattr(fit, "CORNERS", np.array([]))
    near = fit._bootstrap(points, found, 200, 0)
    weights = np.random.default_rng(0).multinomial(20, np.full(20, 1 / 20), 200).astype(float)
    gain = law.objective(near, n, d, loss, weights) / law.objective(everywhere, n, d, loss, weights) - 1
    assert (gain > 1e-6).mean() > 0.1 and gain.min() > -1e-5


def test_a_table_of_many_points_is_fitted_from_a_part_of_them_and_then_to_all(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    n, d = np.exp(rng.uniform([[17], [20]], [[23], [26]], (2, 5000)))
    loss = TRUE["E"] + TRUE["A"] / n ** TRUE["alpha"] + TRUE["B"] / d ** TRUE["beta"]
    assert law.fit(n, d, loss).law == pytest.approx(TRUE, rel=1e-6)
    loss = loss * np.exp(0.01 * rng.standard_normal(5000))
    found = law.fit(n, d, loss)
    beside, _ = law.refit(found.theta[None] + 0.1, n, d, loss, np.ones((1, 5000)))
    assert found.objective == pytest.approx(float(law.objective(beside, n, d, loss)[0]), rel=1e-9)
    monkeypatch.setattr(fit, "TESTED", 10)
    points = Points(n, d, loss, [str(i // 10) for i in range(len(n))])
    assert fit.fit_law(points, 10, 0)["identifiable"]


def test_a_law_without_a_floor_is_known_to_have_none():
    points = made()
    loss = points.loss - TRUE["E"]
    found = fit.fit_law(dataclasses.replace(points, loss=loss), 0, 0)
    assert found["E"] == pytest.approx(0, abs=1e-6) and found["identifiable"], found["why"]


HEADER, ROWS = "N,D,loss,used_in_fit,run,decayed", [f"{10**k},{10 ** (9 - k)},{2 + k / 9}" for k in range(1, 9)]


@pytest.mark.parametrize("no", ["0", "0.0", "False", "false", " 0", "no", "F"])
@pytest.mark.parametrize("header", [HEADER, "n , d , Loss , Used_In_Fit , RUN , Decayed", HEADER.replace(",", ", ")])
def test_flags_and_names_are_read_as_people_write_them(no: str, header: str, tmp_path: Path):
    rows = [f"{row},{no if i == 3 else ''},,{no if i == 5 else 'True'}" for i, row in enumerate(ROWS)]
    text = "\ufeff# a remark, with commas\n\n" + "\n".join([header, *rows]) + "\n"
    for separator in ",;\t":
        (tmp_path / "t.csv").write_text(text.replace(",", separator))
        points = read_points(tmp_path / "t.csv")
        assert (len(points.loss), points.left_out, points.undecayed) == (7, {"used_in_fit is 0": 1}, 1)
        assert points.run[0] == "4"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("N,D,loss\n\n\n1,2,3\n1,0,3\n", r"line 5: D is '0'"),
        ("N,D,loss,used_in_fit\n1,2,3,perhaps\n", r"line 2: used_in_fit is 'perhaps'; give 1 or 0"),
        ('N,D,loss\n1,2,"3\n', r"line 2 is not CSV: unexpected end of data"),
        ("N,D,loss\n1,2,3,4\n", r"line 2 has 4 cells, and the header 3"),
        ("N,D,loss,loss\n1,2,3,4\n", r"has two columns loss: remove one"),
        ("n,N,Loss,LOSS,D\n1,2,3,4,5\n", r"has two columns loss: remove one"),
    ],
)
def test_a_table_that_is_ambiguous_or_broken_is_an_error_in_words(text: str, words: str, tmp_path: Path):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        read_points(tmp_path / "t.csv")


def test_compute_that_contradicts_the_tokens_is_said(tmp_path: Path):
    rows = [row | {"C_flops": (9 if i < 5 else 6.1) * row["N"] * row["D"]} for i, row in enumerate(rows_of(made()))]
    found = fit.fit_law(read_points(table(tmp_path / "t.csv", rows)), 0, 0)
    assert found["why"].endswith("In 5 rows C_flops is not 6ND; D was used there.")


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="the published points are not beside the checkout")
def test_the_published_points_give_the_published_optimum():
    found = fit.fit_law(read_points(PUBLISHED), 400, 0)
    assert found["objective"] <= 1.018274e-3 * (1 + 1e-6)
    assert (found["n"], found["left_out"], found["identifiable"]) == (240, {"used_in_fit is 0": 5}, True)
    best = {"E": 1.8172, "alpha": 0.34731, "beta": 0.36717}
    assert {name: found[name] for name in best} == pytest.approx(best, abs=1e-4)
    assert (found["A"], found["B"]) == pytest.approx((477.8, 2143.4), abs=0.1)
    errors = [found["standard_errors"][name] for name in ("alpha", "beta", "E")]
    assert errors == pytest.approx([0.0154, 0.0206, 0.0257], rel=0.15)
    printed = np.array([np.log(1.69), np.log(406.4), np.log(410.7), 0.34, 0.28])
    points = read_points(PUBLISHED)
    assert float(law.objective(printed, points.n, points.d, points.loss)) == pytest.approx(4.12e-3, abs=5e-6)
