"""The scaling-law study: the law of learning rates, and the generator of its plans."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.scaling_laws import generate, isoflop, options
from tasks.scaling_laws.analysis import law_of
from tasks.scaling_laws.learning_rates import best_lr, lr_law
from tasks.scaling_laws.runs import Run
from trainer import job
from trainer.job import UserError
from trainer.shape import ShapeError, make_shape

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "tasks" / "scaling_laws"
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
        "lr": options.log_spaced("1e-3:1e-1:3"),
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
        ({"flops": [1e9], "within": (100.0, 200.0)}, "no budget gives a width 100 to 200 tokens a parameter"),
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


def test_a_width_that_suits_no_budget_and_two_ways_to_say_how_long_are_said():
    made = generate.experiment(asked(widths=[32, 512], flops=[1e11]))
    assert "width 512 gets 1 to 500 tokens a parameter of no budget" in made.notes
    both = generate.parser().parse_args(["--widths", "32", "--tokens", "1000", "--flops", "1e11"])
    with pytest.raises(UserError, match="both say how long a run is"):
        generate.asked_of(both)


def test_a_budget_that_no_width_suits_is_said():
    notes = generate.experiment(asked(widths=[32], flops=[1e11, 1e15])).notes
    assert notes == ["a budget of 1e+15 FLOPs gives no width 1 to 500 tokens a parameter"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--set max_steps=7", "max_steps cannot be given as a setting: use --tokens, --ratios or --flops"),
        ("--set batch_size=8", "batch_size cannot be given as a setting: use --batch-size"),
        ("--set width=32", "width cannot be given as a setting: use --widths"),
        ("--sweep width=32,64", "width cannot be given as a setting: use --widths"),
        ("--ladder max_steps=5,7", "max_steps cannot be given as a setting"),
        ("--sweep lr=0.1,0.2 --lrs 0.3", "lr is given by two options: keep one"),
        ("--set norm=rmsnorm --sweep norm=rmsnorm,layernorm", "norm is given by two options"),
        ("--set seed=3 --seeds 0,1", "seed is given by two options"),
        ("--ratios nan", "--ratios holds nan: give a finite number above 0"),
        ("--ratios 20,inf", "--ratios holds inf"),
        ("--ratios -5", "--ratios holds -5.0"),
        ("--flops 0", "--flops holds 0.0"),
        ("--tokens 0", "--tokens holds 0"),
        ("--depth 0", "--depth holds 0"),
        ("--vocab-size 0", "--vocab-size holds 0"),
        ("--head-size 1", "--head-size holds 1: give a finite number above 1"),
        ("--corpus-tokens -1", "--corpus-tokens holds -1"),
        ("--cpus 0", "--cpus holds 0"),
        ("--gpus -1", "--gpus holds -1: give 0 or more"),
        ("--seeds 0,-1", "--seeds holds -1: give 0 or more"),
        ("--seeds 0,0", "--seeds holds a seed twice"),
        ("--lrs 0.1,nan", "--lrs holds nan"),
        ("--lrs 1e-3:1e-1:0", "--lrs is 1e-3:1e-1:0: give LOW:HIGH:N, numbers above 0"),
        ("--lrs 0:1e-1:3", "--lrs is 0:1e-1:3: give LOW:HIGH:N, numbers above 0"),
    ],
)
def test_an_option_that_would_not_be_followed_is_refused_in_words(options: str, words: str):
    arguments = generate.parser().parse_args(["--widths", "32", *options.split()])
    with pytest.raises(UserError, match=words):
        generate.asked_of(arguments)


@pytest.mark.parametrize("to", ["no/such/e.yaml", "."])
def test_a_file_that_cannot_be_written_to_is_refused_in_words(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["generate.py", "--widths", "16", "--to", str(tmp_path / to)])
    with pytest.raises(UserError, match="give a file in a folder that is there"):
        generate.main()


def test_each_plan_is_what_its_generate_line_prints():
    text = (STUDY / "experiments.yaml").read_text()
    plans = [one for plan in yaml.safe_load(text).values() for one in plan["experiments"]]
    lines = [line.split("generate: ")[1] for line in text.splitlines() if line.startswith("  # generate: ")]
    assert len(lines) == len(plans) > 4
    for line, plan in zip(lines, plans, strict=True):
        made = generate.experiment(generate.asked_of(generate.parser().parse_args(line.split())))
        assert yaml.safe_load(generate.dumped(made.values)) == [plan], line


@pytest.mark.parametrize("plan", ["transformer_grid", "lstm_grid", "reduced"])
def test_each_grid_tells_a_law_and_how_its_best_size_grows(plan: str):
    """With losses of a known law: what the plan's runs could show if there were no noise."""
    experiment = yaml.safe_load((STUDY / "experiments.yaml").read_text())[plan]["experiments"][0]
    defaults = job.default_settings(generate.TRAIN)
    arms: dict[int, list[Run]] = defaultdict(list)
    for changes in experiment["runs"]:
        config = {**defaults, **experiment["controls"], **changes}
        shape, d = (
            make_shape(SimpleNamespace(**config), 257),
            config["max_steps"] * config["batch_size"] * config["seq_len"],
        )
        flops, loss = shape.train_flops(config["seq_len"]) * d, 1 + 30 / shape.n_params**0.35 + 60 / d**0.3
        arm = config["depth"] if config["architecture"] == "lstm" else 0
        arms[arm].append(Run(str(changes), config, shape.n_params, d, flops, loss))
    for runs in arms.values():
        found, grown = law_of(runs, 50, 0), isoflop.growth(runs)
        assert isinstance(found, dict) and found["identifiable"] and found["alpha"] == pytest.approx(0.35, abs=1e-3)
        assert grown and grown["exponent"] == pytest.approx(0.3 / 0.65, abs=0.01)
        assert grown["ci"][1] - grown["ci"][0] < 0.1


def test_budgets_of_flops_are_met_within_half_a_step_by_the_widths_that_suit_them():
    made = generate.experiment(asked(widths=[32, 64, 96], flops=[1e11, 1e12], within=(1.0, 100.0)))
    found = []
    for config in configs(made):
        shape = make_shape(SimpleNamespace(**config), 257)
        step = shape.train_flops(config["seq_len"]) * config["batch_size"] * config["seq_len"]
        budget = min((1e11, 1e12), key=lambda flops: abs(flops - config["max_steps"] * step))
        assert abs(config["max_steps"] * step - budget) <= step / 2
        assert 1 <= config["max_steps"] * config["batch_size"] * config["seq_len"] / shape.n_params <= 100
        found.append((config["width"], budget))
    assert found == [(32, 1e11), (64, 1e11), (64, 1e12), (96, 1e12)]


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
