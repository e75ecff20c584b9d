"""Sweeps of learning rates and the ladder of changes: what they show, and what takes that from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.scaling_laws.verdicts import section
from tests.studies.made_runs import analysed, change, lines_of, sweep, write


def test_learning_rates_that_stay_transfer_and_those_that_move_do_not(tmp_path: Path):
    sweep(tmp_path, "mup", {16: 0.01, 32: 0.0105, 64: 0.0095})
    sweep(tmp_path, "standard", {16: 0.02, 32: 0.01, 64: 0.005})
    found = analysed(tmp_path)
    assert not found.grid  # points of a sweep are no points of a law
    text = section(found)
    assert "60 of them belong to sweeps of learning rates and are no points of laws." in text
    (mup,), (standard,) = lines_of(text, "transformer, mup: best"), lines_of(text, "transformer, standard: best")
    assert mup.startswith("- Shown: ") and mup.endswith("of all seeds between any two widths.")
    assert standard.startswith("- Shown: ") and standard.endswith("so it does not transfer.")
    assert "-2.00 octaves over 4x width" in standard


def test_seeds_that_lie_apart_leave_the_vertex_where_it_is(tmp_path: Path):
    sweep(tmp_path, "mup", {16: 0.01, 64: 0.0105}, apart=0.5)
    (said,) = lines_of(section(analysed(tmp_path)), "transformer: best learning rate 0.01 at 16 (vertex)")
    assert said.startswith("- Shown: ") and "0.0105 at 64 (vertex)" in said


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


def test_what_moves_between_two_widths_and_comes_back_does_not_stay(tmp_path: Path):
    sweep(tmp_path, "mup", {16: 0.01, 32: 0.016, 64: 0.0102})
    (said,) = lines_of(section(analysed(tmp_path)), "transformer: best")
    assert said.startswith("- Not shown: ") and said.endswith("Between widths 16 and 32 it moves by +0.68.")


STAYS = "It stays within 0.5 octaves over 4x width"


@pytest.mark.parametrize(
    ("widest", "at", "verdict", "ending"),
    [
        (32, 0.01, "Not shown", STAYS),
        (64, 0.01, "Shown", STAYS),
        (256, 0.019, "Shown", STAYS),  # 0.93 octaves over 16x, where 1 is allowed
        (256, 0.021, "Shown", "so it does not transfer."),
    ],
)
def test_how_far_it_may_move_goes_with_how_much_wider_the_widest_is(
    tmp_path: Path, widest: int, at: float, verdict: str, ending: str
):
    sweep(tmp_path, "mup", {16: 0.01, widest: at})
    (said,) = lines_of(section(analysed(tmp_path)), "transformer: best")
    assert said.startswith(f"- {verdict}: ") and ending in said
    assert ("The widest is only 2x as wide." in said) == (widest == 32)


def lose(folder: Path, name: str) -> None:
    (folder / "runs" / name / "metrics.jsonl").unlink()


def test_a_width_that_a_seed_has_no_loss_at_is_named(tmp_path: Path):
    sweep(tmp_path, "mup", {16: 0.01, 64: 0.01})
    for lr in (0.001, 0.003, 0.01, 0.03, 0.1):
        lose(tmp_path, f"mup64_{lr}_1")
    (said,) = lines_of(section(analysed(tmp_path)), "transformer: best")
    assert said.startswith("- Not shown: ") and "; 5 runs were lost, such as mup64_0.001_1" in said
    assert "No run has a loss at width 64 with seed 1, and 1 such are missing." in said


def test_a_width_at_which_all_diverged_is_named(tmp_path: Path):
    sweep(tmp_path, "mup", {16: 0.01, 32: 0.01, 64: 0.01})
    for run in (tmp_path / "runs").glob("mup64_*"):
        change(run, "end", step=3, diverged="the loss is nan")
    (said,) = lines_of(section(analysed(tmp_path)), "transformer: best")
    assert said.startswith("- Not shown: ") and "No run has a loss at width 64 with seed 0" in said
    assert "; 10 runs diverged" in said


def test_the_neighbours_of_a_run_that_failed_stay_in_their_sweep(tmp_path: Path):
    for lr in (0.01, 0.02, 0.04):
        write(tmp_path, f"lr{lr}", width=16, lr=lr)
    lose(tmp_path, "lr0.02")
    found = analysed(tmp_path)
    assert not found.grid and found.sweeps["transformer"]["lost"] == ["lr0.02"]


def test_a_width_that_was_swept_at_two_lengths_has_no_one_best(tmp_path: Path):
    sweep(tmp_path, "mup", {16: 0.01, 64: 0.01})
    for lr in (0.001, 0.01, 0.1):
        write(tmp_path, f"longer{lr}", width=16, lr=lr, max_steps=200, parametrization="mup")
    (said,) = lines_of(section(analysed(tmp_path)), "transformer: best")
    assert said.startswith("- Not shown: ") and "Width 16 was swept in 2 depths, batches or lengths" in said


FAILED = json.dumps([{"guard": "weights move", "ok": False, "examined": 3, "found": "stuck"}])


@pytest.mark.parametrize("text", [FAILED, "", "[1]", "{}", "[]", None])
def test_a_failed_guard_and_one_that_nothing_is_known_of_count_against_sweeps_and_ladders(
    tmp_path: Path, text: str | None
):
    sweep(tmp_path, "mup", {16: 0.01, 64: 0.01})
    for seed in range(3):
        write(tmp_path, f"c{seed}", 2.0 + 0.01 * seed, width=24, seed=seed)
        write(tmp_path, f"rms{seed}", 1.9 + 0.011 * seed, width=24, seed=seed, norm="rmsnorm")
    before = section(analysed(tmp_path))
    for name in ("mup16_0.01_0", "rms1"):
        guards = tmp_path / "runs" / name / "guards.json"
        guards.write_text(text) if text is not None else guards.unlink()
    after = section(analysed(tmp_path))
    for words, name in (("mup: best learning rate", "mup16_0.01_0"), ("norm rmsnorm for layernorm", "rms1")):
        (was,), (said,) = lines_of(before, words), lines_of(after, words)
        assert was.startswith("- Shown: ") and said.startswith("- Not shown: ")
        assert f"Guards failed in 1 runs: in {name}, " in said


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
    assert "- Shown: activation swiglu for gelu (width 32, 100 steps): 0.0990 nats lower loss" in text
    assert "The control is transformer." in text


def ladder(folder: Path, *, seeds: int = 3, **change: Any) -> None:
    for seed in range(seeds):
        write(folder, f"c{seed}", 2.0 + 0.01 * seed, width=32, seed=seed)
        write(folder, f"arm{seed}", 1.9 + 0.01 * seed + 0.001 * (seed % 2), width=32, seed=seed, **change)


def test_the_ladder_compares_at_equal_learning_rates(tmp_path: Path):
    ladder(tmp_path, norm="rmsnorm")
    for seed in range(3):
        write(tmp_path, f"better{seed}", 1.5, width=32, seed=seed, lr=0.05)
    (rung,) = analysed(tmp_path).rungs
    assert rung.shown and rung.difference == pytest.approx(-0.1, abs=2e-3) and rung.n_pairs == 3


def test_pairs_that_were_lost_are_counted_and_a_diverged_one_leaves_the_rest_no_fair_sample(tmp_path: Path):
    ladder(tmp_path, seeds=4, norm="rmsnorm")
    lose(tmp_path, "arm3")
    (said,) = lines_of(section(analysed(tmp_path)), "norm rmsnorm for layernorm")
    assert said.startswith("- Shown: ") and "3 of 4 pairs" in said
    change(tmp_path / "runs" / "arm2", "end", step=3, diverged="the loss is nan")
    (said,) = lines_of(section(analysed(tmp_path)), "norm rmsnorm for layernorm")
    assert said.startswith("- Not shown: ") and "2 of 4 pairs" in said and "arm2 diverged, and those" in said


def test_an_arm_of_which_no_run_is_left_is_named(tmp_path: Path):
    ladder(tmp_path, norm="rmsnorm")
    for seed in range(3):
        write(tmp_path, f"post{seed}", width=32, seed=seed, norm_position="post")
        lose(tmp_path, f"post{seed}")
    (said,) = lines_of(section(analysed(tmp_path)), "norm_position post for pre")
    assert said.startswith("- Not shown: ") and "There are 0 of 3 pairs of equal seeds" in said


def test_a_seed_that_was_trained_twice_shows_nothing(tmp_path: Path):
    ladder(tmp_path, norm="rmsnorm")
    write(tmp_path, "again", 2.5, width=32, seed=1, micro_batch_size=4)  # on another machine, perhaps
    (said,) = lines_of(section(analysed(tmp_path)), "norm rmsnorm for layernorm")
    assert said.startswith("- Not shown: ") and "A seed was trained twice" in said


@pytest.mark.parametrize(
    ("setting", "value", "name"),
    [
        ("weight_decay", 0.1, "weight_decay 0.1"), ("dropout", 0.2, "dropout 0.2"), ("zero_query", True, "zero_query"),
        ("tied", False, "untied"), ("beta2", 0.99, "beta2 0.99"), ("clip_grad_norm", 0.0, "clip_grad_norm 0.0"),
        ("final_lr", 0.0, "final_lr 0.0"), ("seq_len", 128, "seq_len 64"), ("dtype", "bf16", "bf16"),
        ("dataset", "/x/other", "on other"), ("init_std", 0.1, "init_std 0.1"), ("bias", True, "bias"),
    ],
)  # fmt: skip
def test_whatever_reaches_the_loss_makes_an_arm(tmp_path: Path, setting: str, value: Any, name: str):
    ladder(tmp_path, **{setting: value})
    found = analysed(tmp_path)
    assert set(found.grid) == {"transformer", f"transformer, {name}"} and len(found.rungs) == 1


@pytest.mark.parametrize("setting", ["device", "log_every_n_steps", "overfit_steps", "base_width", "micro_batch_size"])
def test_what_does_not_reach_the_loss_makes_none(tmp_path: Path, setting: str):
    ladder(tmp_path, **{setting: 3})
    assert set(analysed(tmp_path).grid) == {"transformer"}


@pytest.mark.parametrize(("ratio", "compared"), [(2.6667, True), (4.0, True), (3.5, False)])
def test_a_gated_activation_is_one_change_where_its_ratio_is_the_same_or_keeps_the_parameters(
    tmp_path: Path, ratio: float, compared: bool
):
    ladder(tmp_path, activation="swiglu", ffn_ratio=ratio)
    assert [rung.change for rung in analysed(tmp_path).rungs] == ["activation swiglu for gelu"] * compared


def test_seeds_that_all_have_the_same_loss_are_none(tmp_path: Path):
    for seed in range(3):
        write(tmp_path, f"c{seed}", 2.0, width=32, seed=seed)
        write(tmp_path, f"arm{seed}", 1.9 + 0.01 * seed, width=32, seed=seed, norm="rmsnorm")
    (said,) = lines_of(section(analysed(tmp_path)), "norm rmsnorm for layernorm")
    assert said.startswith("- Not shown: ") and "All seeds have the same loss" in said


def test_a_parametrisation_with_its_base_shape_is_one_change(tmp_path: Path):
    ladder(tmp_path, parametrization="mup", base_width=16)
    (rung,) = analysed(tmp_path).rungs
    assert rung.change == "parametrization mup for standard" and rung.shown


def test_a_control_that_was_swept_too_stays_the_control(tmp_path: Path):
    ladder(tmp_path, norm="rmsnorm")
    for seed in range(3):
        write(tmp_path, f"swiglu{seed}", 1.8 + 0.012 * seed, width=32, seed=seed, activation="swiglu")
        for lr in (0.01, 0.1):
            write(tmp_path, f"swept{lr}_{seed}", 2.2 + 0.013 * seed, width=32, seed=seed, lr=lr)
    found = analysed(tmp_path)
    assert found.ladder_control == "transformer" and len(found.grid) == 2
    assert {rung.change for rung in found.rungs} == {"norm rmsnorm for layernorm", "activation swiglu for gelu"}


def test_the_control_that_the_plan_names_is_the_ladders(tmp_path: Path):
    ladder(tmp_path, activation="silu")
    assert [rung.change for rung in analysed(tmp_path).rungs] == ["activation silu for gelu"]
    (tmp_path / "plan.yaml").write_text("experiments: [{control: {activation: silu}}, {control: none}, {}]")
    assert [rung.change for rung in analysed(tmp_path).rungs] == ["activation gelu for silu"]
    (tmp_path / "plan.yaml").write_text("experiments: {")
    assert [rung.change for rung in analysed(tmp_path).rungs] == ["activation silu for gelu"]


def test_three_learning_rates_make_no_vertex(tmp_path: Path):
    for width, last in ((16, 2.3), (64, 2.9)):
        for seed in (0, 1):
            for lr, loss in ((0.001, 2.3), (0.01, 2.0), (0.1, last)):
                write(tmp_path, f"{width}_{lr}_{seed}", loss + seed / 100, width=width, lr=lr, seed=seed)
    (said,) = lines_of(section(analysed(tmp_path)), "transformer: best learning rate 0.01 at 16 (grid minimum)")
    assert said.startswith("- Not shown: ") and "sweep more finely" in said


def test_a_learning_rate_that_was_trained_twice_is_said(tmp_path: Path):
    sweep(tmp_path, "mup", {16: 0.01, 64: 0.01})
    write(tmp_path, "again", 1.5, width=64, lr=0.1, seed=1, parametrization="mup", micro_batch_size=4)
    (said,) = lines_of(section(analysed(tmp_path)), "transformer: best")
    assert said.startswith("- Not shown: ") and "was trained twice with one seed" in said
