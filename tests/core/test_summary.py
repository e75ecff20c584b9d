"""From records and predictions to the summary: numbers against scipy, results that are not whole, words and figure."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from scipy import stats

from chiplog import tools
from chiplog.errors import RenderError
from chiplog.expand import expand
from chiplog.figure import scores_figure
from chiplog.folder import ExperimentFolder
from chiplog.plan import Experiment, Plan, Resources
from chiplog.recipes import manual
from chiplog.record import Record, Score, State, Usage
from chiplog.render import render, write_experiment
from chiplog.report import write_summary
from chiplog.settings import Settings
from chiplog.summary import Row, summarize
from chiplog.tables import summary_table

N = 20  # items


@pytest.fixture
def folder(lab: Path) -> ExperimentFolder:
    """An experiment that was set up: two ranks with three seeds each, and their control."""
    return set_up(lab, [0, 1, 2])


def set_up(
    lab: Path, seeds: list[int], question: str = "Which rank?", gpus: int = 0, study: str | None = None
) -> ExperimentFolder:
    plan = Plan(
        name="ranks",
        study=study,
        question=question,
        models={"S": str(lab / "models" / "small")},
        datasets={"words": str(lab / "data" / "words.json")},
        experiments=[
            Experiment(
                recipe="lora_finetune_single_device",
                variables={"lora_rank": [4, 16]},
                seeds=seeds,
                resources=Resources(gpus=gpus),
            ),
        ],
    )
    path = lab / "experiments" / "ranks"
    write_experiment(path, render(plan, expand(plan, manual), Settings(workspace=lab)))
    return ExperimentFolder(path)


def ended(folder: ExperimentFolder, run: str, right: Sequence[bool], state: State = State.COMPLETED) -> Record:
    """The record of a run, whose predictions are put into its folder."""
    answers(folder, run, [item(index, mark) for index, mark in enumerate(right)])
    return Record(
        key=f"local:{run}",
        experiment="ranks",
        run=run,
        kind="control" if run.endswith("base") else "finetune",
        state=state,
        reason=None if state is State.COMPLETED else "the loss is no number",
        config={},
        metrics={"exact_match": Score(count=sum(right), n=len(right))} if state is State.COMPLETED else {},
        usage=Usage(elapsed_s=60.0, peak_mem_bytes=2**30, mem_kind="host_rss"),
    )


def item(index: int, mark: bool) -> dict[str, object]:
    asked = {"index": index, "prompt": f"word {index}", "target": f"Word {index}"}
    return {**asked, "output": "?", "scores": {"exact_match": mark, "includes": True}}


def answers(folder: ExperimentFolder, run: str, items: Sequence[object]) -> Path:
    file = folder.path / "runs" / run / "eval" / "predictions.jsonl"
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in items))
    return file


def first(count: int, n: int = N) -> list[bool]:
    """That many right answers, then wrong ones."""
    return [index < count for index in range(n)]


def larger_doubt(items: np.ndarray, seeds: Any) -> tuple[float, float, float]:
    """The larger p and the wider interval of: the sign test with the interval of Bonett and Price, which adds an item
    to either side; and a t test over seeds.
    """
    p = stats.binomtest(int((items > 0).sum()), int((items != 0).sum())).pvalue
    padded = np.append(items, [1, -1])
    mean, half = float(padded.mean()), 1.959964 * float(padded.std()) / math.sqrt(len(padded))
    ends = seeds.confidence_interval()
    return max(p, seeds.pvalue), min(mean - half, ends.low), min(1.0, max(mean + half, ends.high))


def text_of(folder: ExperimentFolder, records: Sequence[Record]) -> str:
    return write_summary(folder, summarize(folder, records))[0].read_text()


def test_replicates_are_summarised_with_the_numbers_of_scipy_and_without_what_failed(folder: ExperimentFolder):
    counts = {"rank4": [18, 19, 17], "rank16": [12, 15]}
    records = [ended(folder, f"rank4_seed{seed}", first(count)) for seed, count in enumerate(counts["rank4"])]
    records += [ended(folder, f"rank16_seed{seed}", first(count)) for seed, count in enumerate(counts["rank16"])]
    records += [ended(folder, "rank16_seed2", first(N), State.FAILED), ended(folder, "S_base", first(1))]
    summary = summarize(folder, records)

    items = {arm: np.mean([first(count) for count in counts[arm]], axis=0) for arm in counts}
    shares = {arm: np.array(counts[arm]) / N for arm in counts}
    expected = {
        ("rank4", "S_base"): larger_doubt(items["rank4"] - first(1), stats.ttest_1samp(shares["rank4"] - 1 / N, 0)),
        ("rank16", "S_base"): larger_doubt(items["rank16"] - first(1), stats.ttest_1samp(shares["rank16"] - 1 / N, 0)),
        ("rank4", "rank16"): larger_doubt(
            items["rank4"] - items["rank16"], stats.ttest_ind(shares["rank4"], shares["rank16"], equal_var=False)
        ),
    }
    found = {(c.first, c.second): c for c in summary.comparisons}
    assert found.keys() == expected.keys()
    for pair, comparison in found.items():
        difference = comparison.difference
        assert difference is not None
        assert (difference.p, difference.interval.low, difference.interval.high) == pytest.approx(expected[pair])
    # Holm by hand: the smallest p times 3, the next times 2, none smaller than the one before.
    small, middle, large = sorted(p for p, _, _ in expected.values())
    by_hand = [3 * small, max(3 * small, 2 * middle), max(3 * small, 2 * middle, large)]
    assert sorted(c.p_adjusted or 0 for c in summary.comparisons) == pytest.approx(by_hand)
    assert found["rank4", "S_base"].words == (
        "rank4 against S_base: exact_match +85.0 points "
        f"({100 * expected['rank4', 'S_base'][1]:+.1f} to {100 * expected['rank4', 'S_base'][2]:+.1f}), shown"
    )
    assert {pair for pair, c in found.items() if c.shown} == {("rank4", "S_base")}

    rows = {row.run: row for row in summary.rows}
    exact = stats.binomtest(19, N).proportion_ci(method="exact")
    assert rows["rank4_seed1"].scores["exact_match"].low == pytest.approx(exact.low)
    assert (rows["rank16_seed2"].state, rows["rank16_seed2"].scores) == (State.FAILED, {})
    text = text_of(folder, records)
    assert "- rank16_seed2: nothing, since it is FAILED (the loss is no number)\n" in text
    assert "| 2 | rank4_seed1 | S | finetune | 4 | 1 | 4 | no evidence | – | 60 s |" in text
    assert "95.0 (75.1-99.9)" in text and "7 runs, 7:00 min one after another" in text
    assert "p values are adjusted for 3 comparisons (Holm)" in text


def test_a_run_costs_what_all_its_attempts_took(lab: Path):
    folder = set_up(lab, [0], gpus=1)
    whole = [ended(folder, name, first(N)) for name in ("rank4", "rank16", "S_base")]
    assert "3 runs, 3:00 min one after another, 0.05 GPU hours" in text_of(folder, whole)
    killed = ended(folder, "rank4", first(N), State.TIMEOUT)
    usage = killed.usage.model_copy(update={"elapsed_s": 3000.0})
    again = whole[0].model_copy(update={"attempt": 2, "key": "local:again"})
    records = [killed.model_copy(update={"usage": usage}), again, *whole[1:]]
    summary = summarize(folder, records)
    assert (summary.attempts, summary.run_s, summary.gpu_hours) == (4, 3180.0, pytest.approx(3180 / 3600))
    assert {row.elapsed_s for row in summary.rows} == {60.0}
    assert "3 runs in 4 attempts, 53:00 min one after another, 0.88 GPU hours" in text_of(folder, records)


def test_an_arm_with_one_training_left_is_not_taken_to_be_free_of_chance(folder: ExperimentFolder):
    counts = [12, 15, 18]
    records = [ended(folder, f"rank4_seed{seed}", first(count)) for seed, count in enumerate(counts)]
    records.append(ended(folder, "rank16_seed0", first(4)))
    records.append(ended(folder, "rank16_seed1", first(19), State.TIMEOUT))  # seed 2 was never submitted
    summary = summarize(folder, records)
    (comparison,) = summary.comparisons
    _, p = stats.ttest_ind(np.array(counts) / N, [4 / N], equal_var=True)
    assert comparison.p_adjusted == pytest.approx(p) and not comparison.shown
    text = text_of(folder, records)
    assert "- rank16_seed2: nothing, since it is not run (never submitted)\n" in text
    assert "adjusted for 1 comparison (Holm)" in text


def test_runs_of_other_items_are_not_compared_and_not_counted(lab: Path):
    folder = set_up(lab, [0])
    records = [ended(folder, "rank4", first(18)), ended(folder, "rank16", first(9, 10)), ended(folder, "S_base", [])]
    text = text_of(folder, records)
    words = "cannot be compared, since rank4 answered 20 items and rank16 10, 10 of them only one of the two"
    assert f"- rank4 against rank16: {words}\n" in text
    assert "- S_base: cannot be compared, since it has no answers (eval/predictions.jsonl)\n" in text
    assert "adjusted for 0 comparisons" in text
    records = [ended(folder, "rank4", first(18)), ended(folder, "rank16", first(9)), ended(folder, "S_base", first(0))]
    answers(folder, "S_base", [item(index, False) for index in range(5, 5 + N)])
    text = text_of(folder, records)
    assert "since rank4 answered 20 items and S_base 20, 10 of them only one of the two" in text
    assert "- rank4 against rank16: exact_match +45.0 points" in text and "adjusted for 1 comparison (" in text


@pytest.mark.parametrize(
    "line",
    [
        "[1, 2]",
        "null",
        "7",
        "{}",
        '{"index": 0, "prompt": "a", "target": "A"}',
        '{"index": 0, "prompt": "a", "target": "A", "scores": [true]}',
        '{"index": 0, "prompt": "a", "target": "A", "scores": {"exact_match": 0.5}}',
        '{"index": 0, "prompt": "a", "target": "A", "scores": {"exact_match": tr',
        '{"prompt": "a", "target": "A", "scores": {"exact_match": true}}',
        "\udcff",
    ],
)
def test_a_line_that_is_no_scored_answer_is_named_with_what_to_do(lab: Path, line: str):
    folder = set_up(lab, [0])
    records = [ended(folder, "rank4", first(18)), ended(folder, "S_base", first(1))]
    file = answers(folder, "S_base", [item(0, True)])
    file.write_bytes(file.read_bytes() + line.encode(errors="surrogateescape"))
    (words,) = [words for words in summarize(folder, records).not_shown if words.startswith("S_base: ")]
    assert f"{file}, line 2 is no scored answer" in words and "submit the run again" in words
    failed = records[1].model_copy(update={"state": State.FAILED})
    assert summarize(folder, [records[0], failed]).comparisons == []  # of a failed run nothing is read


def test_answers_with_line_separators_in_their_texts_are_whole(lab: Path):
    folder = set_up(lab, [0])
    records = [ended(folder, "rank4", first(18)), ended(folder, "S_base", first(1))]
    for run, mark in (("rank4", True), ("S_base", False)):
        file = answers(folder, run, [{**item(index, mark), "prompt": "a\u2028b\x85c"} for index in range(N)])
        file.write_text(file.read_text() + "\n")
    (comparison,) = summarize(folder, records).comparisons
    assert comparison.difference and comparison.difference.interval.value == 1.0


def test_a_link_does_not_lead_the_figure_out_of_the_folder(lab: Path, tmp_path: Path):
    folder = set_up(lab, [0])
    (tmp_path / "outside").mkdir()
    (folder.path / "figures").symlink_to(tmp_path / "outside")
    with pytest.raises(RenderError, match="by a link"):
        text_of(folder, [ended(folder, "rank4", first(18))])
    assert not list((tmp_path / "outside").iterdir()) and not (folder.path / "summary.md").exists()


@pytest.mark.parametrize(
    ("question", "title"),
    [
        ("Which costs $5 or $6?", "Which costs $5 or $6?"),
        ("a_b^c \\frac{ $x$ %", "a_b^c \\frac{ $x$ %"),
        ("Größe?\n что лучше?", "Größe? что лучше?"),
        ("哪个秩更好？", "ranks"),
        ("Does M need W? " * 40, None),
        ("x" * 2000, None),
    ],
)
def test_any_question_is_a_title_as_it_was_asked(
    lab: Path, monkeypatch: pytest.MonkeyPatch, question: str, title: str | None
):
    drawn: list[Figure] = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **kw: (drawn.append(self), savefig(self, *a, **kw))[1])
    folder = set_up(lab, [0], question)
    summary = summarize(folder, [ended(folder, "rank4", first(18)), ended(folder, "S_base", first(1))])
    assert scores_figure(summary, "exact_match").startswith(b"\x89PNG")
    (figure,) = drawn
    assert not any(text.get_parse_math() for text in figure.findobj(Text) if isinstance(text, Text))
    shown = figure.get_suptitle()
    assert shown == title if title else shown.endswith("...") and question.startswith(shown[:50])
    for text in figure.texts:  # nothing is cut off at the edge
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1


def analysing(workspace: Path, code: str) -> None:
    """A study of the workspace's own whose analyze.py is this code."""
    study = workspace / "tasks" / "mine"
    study.mkdir(parents=True)
    (study / "README.md").write_text("# Mine\n\nAsks.\n")
    (study / "analyze.py").write_text(
        f"import json, sys\nfrom pathlib import Path\nfolder = Path(sys.argv[1])\n{code}\n"
    )


SAYS = """(folder / "analysis.md").write_text("all of it")
print(json.dumps({"analysis": str(folder / "analysis.md"), "figures": [], "shown": ["it grows"], "not_shown": ["why"],
                  "more": 1}))"""


def test_what_a_studys_own_analysis_shows_stands_first_in_the_summary(lab: Path):
    analysing(lab, SAYS)
    set_up(lab, [0], study="mine")
    answer = tools.summarize_experiment("ranks")
    text = (lab / "experiments" / "ranks" / "summary.md").read_text()
    assert "## Shown\n\n- it grows\n\n## Not shown\n\n- why\n- rank4: nothing, since it is not run" in text
    assert "[analysis.md](analysis.md) says what these rest on" in text
    assert "Shown:\n- it grows\n" in answer.summary and answer.not_shown[0] == "why"


@pytest.mark.parametrize(
    ("code", "words"),
    [("sys.exit('no loss law')", "no loss law"), ("print('[1]')", "printed what is no analysis")],
)
def test_an_analysis_that_fails_does_not_keep_the_summary_from_being_written(lab: Path, code: str, words: str):
    analysing(lab, code)
    set_up(lab, [0], study="mine")
    answer = tools.summarize_experiment("ranks")
    assert words in answer.not_shown[0] and "analyze.py of mine" in answer.not_shown[0]
    assert words in (lab / "experiments" / "ranks" / "summary.md").read_text()


@pytest.mark.parametrize(("n", "has_columns"), [(4, True), (5, False)])
def test_a_table_of_many_settings_leaves_them_to_the_names_of_its_runs(n: int, has_columns: bool):
    settings = dict(list({"lr": 0.1, "width": 8, "depth": 2, "heads": 1, "seed": 0}.items())[:n])
    row = summarized(settings)
    assert ("| width | depth |" in summary_table([row], ["val_loss"])) is has_columns


def summarized(varied: dict[str, Any]) -> Row:
    empty = dict.fromkeys(name for name, field in Row.model_fields.items() if field.is_required())
    return Row(**{**empty, "run": "r", "kind": "train", "varied": varied, "attempts": 1, "scores": {}})
