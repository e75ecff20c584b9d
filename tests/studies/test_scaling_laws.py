"""The scaling-law study: the fitter's known answers, the law of learning rates, the generator, hazards of a folder."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.scaling_laws import fit, generate, law
from tasks.scaling_laws.learning_rates import best_lr, lr_law
from trainer import job
from trainer.job import UserError
from trainer.shape import ShapeError, make_shape

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "tasks" / "scaling_laws"
TRUE = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
# Read off a figure of arXiv:2203.15556 by Epoch AI (arXiv:2404.10102); not in this repo, whose licence is another.
PUBLISHED = ROOT.parent / "shared" / "measurements" / "chinchilla_points.csv"


def made(noise: float = 0.0, seed: int = 0) -> fit.Points:
    """The law TRUE at 8 budgets of 1e17 to 1e22 FLOPs, 16 points each, with log-normal noise."""
    c, ratio = np.meshgrid(np.geomspace(1e17, 1e22, 8), np.geomspace(1, 400, 16))
    n = np.sqrt(c.ravel() / 6 / ratio.ravel())
    d = c.ravel() / 6 / n
    loss = TRUE["E"] + TRUE["A"] / n ** TRUE["alpha"] + TRUE["B"] / d ** TRUE["beta"]
    loss = loss * np.exp(noise * np.random.default_rng(seed).standard_normal(len(n)))
    return fit.Points(n, d, loss, [str(i) for i in range(len(n))])


def table(file: Path, rows: list[dict[str, Any]]) -> Path:
    lines = [",".join(rows[0])] + [",".join(str(value) for value in row.values()) for row in rows]
    file.write_text("\n".join(lines) + "\n")
    return file


def rows_of(points: fit.Points) -> list[dict[str, Any]]:
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
    found = fit.fit_law(fit.Points(line, 20 * line, loss, [str(i) for i in range(20)]), 20, 0)
    assert not found["identifiable"] and "needs at least two token ratios" in found["why"]
    assert fit.fit_law(points, 20, 0)["identifiable"]


def test_points_from_the_middle_of_a_run_are_not_identifiable(tmp_path: Path):
    rows = [row | {"decayed": int(i > 0)} for i, row in enumerate(rows_of(made()))]
    found = fit.fit_law(fit.read_points(table(tmp_path / "t.csv", rows)), 20, 0)
    assert not found["identifiable"] and "1 points were taken before the learning rate had decayed" in found["why"]


def test_points_of_one_run_are_drawn_together(tmp_path: Path):
    points = made(noise=0.01)
    together = [row | {"run": i // 8} for i, row in enumerate(rows_of(points))]
    found = fit.read_points(table(tmp_path / "t.csv", together))
    assert len(set(found.run)) == len(points.n) // 8
    answer = fit.fit_law(found, 20, 0)
    assert (answer["n"], answer["n_runs"]) == (128, 16)


def test_rows_that_are_not_to_be_used_are_left_out_and_counted_unless_all_are_asked_for(tmp_path: Path):
    rows = [row | {"used_in_fit": int(i >= 3)} for i, row in enumerate(rows_of(made()))]
    rows[5]["loss"] = "nan"
    file = table(tmp_path / "t.csv", rows)
    some, everything = fit.read_points(file), fit.read_points(file, use_all=True)
    assert (len(some.loss), some.left_out) == (124, {"used_in_fit is 0": 3, "no loss": 1})
    assert (len(everything.loss), everything.left_out) == (127, {"no loss": 1})
    fewer = fit.read_points(file, drop_largest=2)
    assert len(fewer.loss) == 122 and fewer.loss.max() == sorted(some.loss)[-3]


def test_compute_may_stand_for_tokens(tmp_path: Path):
    points = made()
    rows = [{"N": row["N"], "C_flops": 6 * row["N"] * row["D"], "loss": row["loss"]} for row in rows_of(points)]
    assert fit.read_points(table(tmp_path / "t.csv", rows)).d == pytest.approx(points.d)


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
        ("N,D,loss\n" + "1,2,3\n" * 5, "leaves 5 points"),
        ("N,D,loss\n" + "1,2,nan\n" * 9, "leaves 0 points"),
    ],
)
def test_a_table_that_cannot_be_fitted_is_an_error_in_words(text: str, words: str, tmp_path: Path):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        fit.read_points(tmp_path / "t.csv")


def line_of(ratio: np.ndarray, noise: float = 0.01, seed: int = 0) -> fit.Points:
    """The law TRUE at 30 sizes with these tokens per parameter."""
    n = np.geomspace(1e6, 1e9, 30)
    d = n * ratio
    loss = TRUE["E"] + TRUE["A"] / n ** TRUE["alpha"] + TRUE["B"] / d ** TRUE["beta"]
    loss = loss * np.exp(noise * np.random.default_rng(seed).standard_normal(30))
    return fit.Points(n, d, loss, [str(i) for i in range(30)])


@pytest.mark.parametrize("seed", range(4))
def test_a_line_with_jitter_or_a_stray_point_is_still_one_line(seed: int):
    jitter = 20 * np.exp(0.05 * np.random.default_rng(seed).standard_normal(30))
    stray = np.where(np.arange(30) == 7 * seed, 100, 20)
    for ratio in (jitter, stray):
        found = fit.fit_law(line_of(ratio, seed=seed), 0, 0)
        assert not found["identifiable"] and "needs at least two token ratios" in found["why"]
    two = fit.fit_law(line_of(np.where(np.arange(30) % 2, 100.0, 5.0), 0.001, seed), 0, 0)
    assert "token ratios" not in two["why"]


def test_what_rests_on_nothing_is_not_identified():
    points = made()
    few = np.array([0, 15, 40, 70, 100, 127])
    cut = fit.Points(points.n[few], points.d[few], points.loss[few], list("abcdef"))
    again = fit.Points(*(np.tile(each, 8) for each in (cut.n, cut.d, cut.loss)), [str(i) for i in range(48)])  # pyright: ignore
    for case, words in (
        (cut, "There are 6 different points; 7 are needed"),
        (again, "There are 6 different points; 7 are needed"),
        (dataclasses.replace(points, run=["one"] * 128), "The points are of 1 runs"),
        (dataclasses.replace(points, loss=np.full(128, 2.0)), "All losses are the same"),
    ):
        found = fit.fit_law(case, 0, 0)
        assert not found["identifiable"] and words in found["why"], found["why"]
        json.dumps(found, allow_nan=False)
    noise = np.random.default_rng(0).uniform(2, 3, 128)
    assert not fit.fit_law(dataclasses.replace(points, loss=noise), 0, 0)["identifiable"]


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
        points = fit.read_points(tmp_path / "t.csv")
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
        fit.read_points(tmp_path / "t.csv")


def test_compute_that_contradicts_the_tokens_is_said(tmp_path: Path):
    rows = [row | {"C_flops": (9 if i < 5 else 6.1) * row["N"] * row["D"]} for i, row in enumerate(rows_of(made()))]
    found = fit.fit_law(fit.read_points(table(tmp_path / "t.csv", rows)), 0, 0)
    assert found["why"].endswith("In 5 rows C_flops is not 6ND; D was used there.")


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="the published points are not beside the checkout")
def test_the_published_points_give_the_published_optimum():
    found = fit.fit_law(fit.read_points(PUBLISHED), 400, 0)
    assert found["objective"] <= 1.018274e-3 * (1 + 1e-6)
    assert (found["n"], found["left_out"], found["identifiable"]) == (240, {"used_in_fit is 0": 5}, True)
    best = {"E": 1.8172, "alpha": 0.34731, "beta": 0.36717}
    assert {name: found[name] for name in best} == pytest.approx(best, abs=1e-4)
    assert (found["A"], found["B"]) == pytest.approx((477.8, 2143.4), abs=0.1)
    errors = [found["standard_errors"][name] for name in ("alpha", "beta", "E")]
    assert errors == pytest.approx([0.0154, 0.0206, 0.0257], rel=0.15)
    printed = np.array([np.log(1.69), np.log(406.4), np.log(410.7), 0.34, 0.28])
    points = fit.read_points(PUBLISHED)
    assert float(law.objective(printed, points.n, points.d, points.loss)) == pytest.approx(4.12e-3, abs=5e-6)


LRS = np.geomspace(1e-3, 1e-1, 9)


def bowl(vertex: float, curve: float = 0.1) -> np.ndarray:
    return 2.0 + curve * (np.log(LRS) - math.log(vertex)) ** 2


# It falls up to where training diverges: where the parabola would have its vertex, there is no training.
FALLING_THEN_NONE = np.where(LRS > 0.011, math.nan, bowl(0.03))


def test_the_vertex_of_a_parabola_is_the_best_learning_rate():
    best = best_lr(LRS, bowl(0.0123))
    assert best and (best.how, best.lr, best.at_edge) == ("vertex", pytest.approx(0.0123), False)
    assert best.r2 == pytest.approx(1.0) and best.parabola and best.parabola[0] == pytest.approx(0.1)


def test_points_that_diverged_or_lie_a_nat_above_the_lowest_do_not_bend_the_parabola():
    losses = bowl(0.0123)
    losses[-1], losses[-2], losses[0] = math.nan, math.inf, 9.0
    best = best_lr(LRS, losses)
    assert best and (best.how, best.n, best.n_diverged) == ("vertex", 6, 2) and best.lr == pytest.approx(0.0123)


@pytest.mark.parametrize(
    ("losses", "lr", "why", "at_edge"),
    [
        (bowl(0.0009), 1e-3, "not inside the swept range", True),
        (bowl(0.095), 1e-1, "not inside the swept range", True),
        (FALLING_THEN_NONE, LRS[4], "0.03, is beyond what trained", False),
        (4 - bowl(0.01), 1e-3, "opens downward", True),
        (2 + 0.1 * np.array([0, 1, 0, 1, -0.1, 1, 0, 1, 0.5]), LRS[4], "R\\^2 is|opens downward", False),
    ],
)
def test_without_a_vertex_that_counts_the_best_that_was_tried_is_taken(losses: Any, lr: float, why: str, at_edge: bool):
    best = best_lr(LRS, losses)
    assert best and best.how == "grid minimum" and best.lr == pytest.approx(lr) and best.at_edge is at_edge
    assert re.search(why, best.why)


def test_two_learning_rates_make_no_parabola_and_none_that_is_finite_no_best():
    best = best_lr([0.1, 0.2], [2.0, 3.0])
    assert best and (best.how, best.parabola, best.lr) == ("grid minimum", None, pytest.approx(0.1))
    assert best_lr([0.1, 0.2], [math.nan, math.inf]) is None


def test_the_law_of_learning_rates_is_a_line_in_logarithms():
    widths = [64, 128, 256, 512]
    found = lr_law(widths, [3.2 / width for width in widths])
    assert (found["exponent"], found["constant"]) == (pytest.approx(-1.0), pytest.approx(3.2))
    assert found["ci"] == pytest.approx([-1.0, -1.0])
    assert (found["drift_octaves"], found["growth"]) == (pytest.approx(-3.0), pytest.approx(8.0))
    assert lr_law(widths[:2], [0.1, 0.1])["ci"] is None and lr_law(widths[:1], [0.1])["exponent"] is None


@settings(deadline=None)
@given(st.integers(1, 4096), st.integers(1, 256), st.integers(1, 64))
def test_the_effective_batch_is_met_exactly_or_what_is_nearest_is_said(target: int, micro: int, world: int):
    batch = generate.exact_batch(target, micro, world)
    assert batch.micro_batch_size * batch.grad_accum * batch.world == batch.size and batch.world == world
    assert abs(batch.size - target) <= min(world / 2, abs(max(world, target // world * world) - target))
    exact = batch.size == target and batch.micro_batch_size == micro
    assert bool(batch.notes) is not exact
    each = batch.size // world
    nearer = [n for n in range(1, each + 1) if each % n == 0 and abs(n - micro) < abs(batch.micro_batch_size - micro)]
    assert not nearer


@settings(deadline=None)
@given(st.integers(1, 512).map(lambda half: 2 * half), st.integers(2, 128))
def test_heads_divide_the_width_and_are_even_in_size(width: int, largest: int):
    heads = generate.heads_of(width, largest)
    assert width % heads == 0 and (width // heads) % 2 == 0 and width // heads <= largest


def asked(**changes: Any) -> generate.Asked:
    given = {"architecture": "transformer", "widths": [32], "ratios": [20.0], "vocab_size": 257, "batch_size": 8,
             "micro_batch_size": 8, "world": 1, "fixed": {}, "sweeps": {}, "ladder": {}}  # fmt: skip
    return generate.Asked(**given | changes)


def configs(made: generate.Made) -> list[dict[str, Any]]:
    """Every setting of each run."""
    defaults = job.default_settings(generate.TRAIN)
    return [{**defaults, **made.values["controls"], **run} for run in made.values["runs"]]


@settings(deadline=None, max_examples=30)
@given(st.integers(8, 256).map(lambda half: 2 * half), st.floats(5, 200), st.sampled_from(["transformer", "lstm"]))
def test_tokens_per_parameter_are_as_asked_within_half_a_step(width: int, ratio: float, architecture: str):
    (config,) = configs(generate.experiment(asked(architecture=architecture, widths=[width], ratios=[ratio])))
    n_params = make_shape(SimpleNamespace(**config), 257).n_params
    step = config["batch_size"] * config["seq_len"]
    assert abs(config["max_steps"] * step - ratio * n_params) <= step / 2 + 1e-6 or config["max_steps"] == 1
    assert config["warmup_steps"] == round(0.1 * config["max_steps"])


def test_a_ladder_changes_one_thing_at_a_time_and_trains_on_the_tokens_of_its_control():
    ladder = {"activation": ["swiglu"], "norm": ["rmsnorm"], "position": ["learned"]}
    made = generate.experiment(asked(ladder=ladder))
    assert made.values["runs"][0] == {"activation": "gelu"}  # what is the default is not told, so names stay short
    runs = configs(made)
    keys = ("activation", "norm", "position")
    chosen = [tuple(run[key] for key in keys) for run in runs]
    assert chosen == [("gelu", "layernorm", "rotary"), ("swiglu", "layernorm", "rotary"),
                      ("gelu", "rmsnorm", "rotary"), ("gelu", "layernorm", "learned")]  # fmt: skip
    assert len({run["max_steps"] for run in runs}) == 1
    sizes = [make_shape(SimpleNamespace(**run), 257).n_params for run in runs[:2]]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)


def test_sweeps_are_all_products_with_learning_rates_evenly_spaced_in_the_logarithm():
    sweeps = {
        "parametrization": ["standard", "mup"],
        "optimizer": ["adamw", "sgd"],
        "lr": generate.log_spaced("1e-3:1e-1:3"),
    }
    runs = configs(generate.experiment(asked(sweeps=sweeps, widths=[32, 64])))
    assert len(runs) == 2 * 2 * 2 * 3 and sorted({run["lr"] for run in runs}) == [0.001, 0.01, 0.1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"widths": [33]}, "no even divisor"),
        ({"fixed": {"widht": 3}}, "no setting widht"),
        ({"sweeps": {"norm": ["batchnorm"]}}, "norm is 'batchnorm'"),
        ({"widths": [32, 32]}, "would be run twice"),
        ({"batch_size": 0}, "batch size is 0"),
        ({"world": 2, "gpus": 4}, "a process for each GPU"),
    ],
)
def test_runs_that_cannot_be_are_refused_in_words(changes: dict, words: str):
    with pytest.raises((ShapeError, UserError), match=words):
        generate.experiment(asked(**changes))


def test_a_corpus_that_is_too_small_and_heads_that_grow_under_mup_are_said():
    made = generate.experiment(asked(corpus_tokens=1000, widths=[32, 64], fixed={"parametrization": "mup"}))
    assert any("reads the corpus" in note for note in made.notes) and any("--head-size" in note for note in made.notes)
    assert not generate.experiment(asked(corpus_tokens=10**9)).notes


def test_each_plan_is_what_its_generate_line_prints():
    text = (STUDY / "experiments.yaml").read_text()
    plans = [one for plan in yaml.safe_load(text).values() for one in plan["experiments"]]
    lines = [line.split("generate: ")[1] for line in text.splitlines() if line.startswith("  # generate: ")]
    assert len(lines) == len(plans) > 4
    for line, plan in zip(lines, plans, strict=True):
        made = generate.experiment(generate.asked_of(generate.parser().parse_args(line.split())))
        assert yaml.safe_load(generate.dumped(made.values)) == [plan], line


def test_the_grids_have_three_token_ratios_and_three_sizes():
    plans = yaml.safe_load((STUDY / "experiments.yaml").read_text())
    defaults = job.default_settings(generate.TRAIN)
    for name in ("transformer_grid", "lstm_grid", "reduced"):
        experiment = plans[name]["experiments"][0]
        ratios, sizes = set(), set()
        for run in experiment["runs"]:
            config = {**defaults, **experiment["controls"], **run}
            n = make_shape(SimpleNamespace(**config), 257).n_params
            sizes.add(n)
            ratios.add(round(math.log(config["max_steps"] * config["batch_size"] * config["seq_len"] / n), 1))
        assert len(sizes) >= 3 and len(ratios) >= 3, name


def test_the_generator_prints_yaml_with_what_it_chose_otherwise(tmp_path: Path):
    command = [
        sys.executable,
        str(STUDY / "generate.py"),
        "--widths",
        "16",
        "--batch-size",
        "16",
        "--micro-batch",
        "12",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("# micro batch 8 instead of 12")
    (experiment,) = yaml.safe_load(done.stdout)
    assert (experiment["recipe"], experiment["framework"], experiment["control"]) == ("train", "trainer", "none")
    assert experiment["controls"]["micro_batch_size"] == 8 and experiment["runs"] == [{"width": 16}]
    to = tmp_path / "e.yaml"
    subprocess.run([*command, "--to", str(to)], check=True)
    assert to.read_text() == done.stdout


def test_the_text_is_the_librarys_own_and_never_replaced(tmp_path: Path):
    command = [sys.executable, str(STUDY / "data.py"), "--files", "6", "--out", str(tmp_path)]
    made = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    again = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert made == again and set(made["rows"]) == {"train", "validation"}
    assert [file.name for file in tmp_path.iterdir()] == ["stdlib_bytes_6files"]
    other = subprocess.run([*command, "--seed", "1"], capture_output=True, text=True, check=False)
    assert other.returncode == 1 and "is there with other content" in other.stderr
