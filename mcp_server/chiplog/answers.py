"""What the tools answer: a summary first, then what to do next, then the detail."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from chiplog.calibration import Calibration
from chiplog.checks.dataset import DatasetReport
from chiplog.checks.model import ModelReport
from chiplog.checks.tokens import TokensReport
from chiplog.compare import Comparison
from chiplog.estimate import RunEstimate
from chiplog.estimate.case import CaseEstimate
from chiplog.guards import Verdict
from chiplog.ledger.scan import Scanned
from chiplog.plan import Value
from chiplog.progress import RunStatus
from chiplog.record import Evidence, Record, State
from chiplog.schema import Frozen
from chiplog.studies import Study
from chiplog.summary import Row
from chiplog.totals import Totals

# What several tools take.
Name = Annotated[str, Field(description="Name of the experiment (its date may be left out), or its folder.")]
Confirm = Annotated[bool, Field(description="Set once the user has agreed.")]
Limit = Annotated[int, Field(ge=1, le=1000, description="Rows to answer with at most.")]
Runs = Annotated[list[str] | None, Field(description="Only these runs; null: all.")]


class Answer(Frozen):
    """What every answer begins with."""

    summary: str = Field(description="The answer in a few lines, fit to be shown.")
    next: list[str] = Field(default=[], description="What to do next.")
    ok: bool = Field(default=True, description="False where the answer is no: a check failed, a run failed.")


class StudiesAnswer(Answer):
    studies: list[Study] = Field(description="Every study that is there.")


class DatasetAnswer(Answer):
    report: DatasetReport | TokensReport = Field(description="What was found: of rows, or of token files.")


class ModelAnswer(Answer):
    report: ModelReport = Field(description="What was found.")


class CreatedAnswer(Answer):
    path: str = Field(description="File or folder that was made.")
    rows: dict[str, int] = Field(description="Rows of each split, or tokens.")
    sha256: str = Field(description="Hash of the data: the same options give the same.")


class LawAnswer(Answer):
    """A scaling law L = E + A / N^alpha + B / D^beta, fitted to a table of runs."""

    E: float = Field(description="Loss that no size and no text would go below.")
    A: float = Field(description="Of the term of parameters.")
    B: float = Field(description="Of the term of tokens.")
    alpha: float = Field(description="Exponent of parameters.")
    beta: float = Field(description="Exponent of tokens.")
    objective: float = Field(description="Sum over points of the Huber loss of log residuals, delta 0.001.")
    ci: dict[str, list[float]] = Field(description="Interval of each, from draws of the runs; empty without draws.")
    ci_level: float = Field(description="Level of the intervals.")
    standard_errors: dict[str, float | None] = Field(description="Spread of each over the draws; null: without bound.")
    identifiable: bool = Field(description="Whether these runs can tell the law's parts.")
    why: str = Field(description="Why, or what is missing.")
    optimal_n_exponent: float | None = Field(
        description="The best N for compute C = 6ND grows as C to this power; null where a term does not fall."
    )
    optimal_n_exponent_ci: list[float] | None = Field(description="Its interval; null without draws.")
    profile_of_E: dict[str, list[float]] = Field(description="Values of E, and the least objective at each.")
    n: int = Field(description="Points that were fitted.")
    n_runs: int = Field(description="Runs that they are of, which are drawn whole.")
    bootstrap: int = Field(description="Draws.")
    left_out: dict[str, int] = Field(description="Rows that were not fitted, by reason.")


class PlanRow(Frozen):
    """One run in the plan's table."""

    run: str = Field(description="Name of the run.")
    kind: str = Field(description="finetune, train or control.")
    varied: dict[str, Value] = Field(description="The settings that differ between runs.")
    batch_size: int | None = Field(description="Samples per optimiser step; null for a control.")
    n_params: int | None = Field(
        description="Parameters of the model that it makes; null: it makes none, or not known."
    )
    tokens: int | None = Field(description="Tokens that it trains on; null: not counted.")
    flops: float | None = Field(description="FLOPs of its training; null: not computed.")
    time_limit_s: int | None = Field(description="Time limit in seconds; null: none.")
    mem_gib: int | None = Field(description="Host memory asked of Slurm in GiB; null: the partition's default.")
    estimate: RunEstimate = Field(description="What it will need, and what that rests on.")


class PlanAnswer(Answer):
    plan_file: str | None = Field(description="The plan that was written; null where nothing was written.")
    experiment: str = Field(description="Name of the experiment.")
    rows: list[PlanRow] = Field(description="One for each run.")
    totals: Totals = Field(description="What all runs need together.")
    warnings: list[str] = Field(description="What was found and does not stop the plan.")


class EstimateAnswer(Answer):
    experiment: str | None = Field(description="Name of the experiment; null for a case.")
    rows: list[PlanRow] = Field(description="One for each run of the experiment.")
    totals: Totals | None = Field(description="What all its runs need together.")
    case: CaseEstimate | None = Field(description="What the case would need.")


class SetupAnswer(Answer):
    folder: str = Field(description="The experiment folder.")
    written: list[str] = Field(description="Files that are new or changed, the first ones if there are many.")
    n_written: int = Field(description="How many were written.")


class SubmitAnswer(Answer):
    jobs: dict[str, str] = Field(description="Job id of each run that was submitted now.")


class StatusAnswer(Answer):
    runs: list[RunStatus] = Field(description="How each run stands.")
    log_tail: list[str] = Field(description="The last lines of the log that was asked for.")


class CancelAnswer(Answer):
    cancelled: list[str] = Field(description="Runs whose jobs were ended.")


class PruneAnswer(Answer):
    pruned: list[str] = Field(description="Runs whose checkpoints were removed.")
    freed_bytes: int = Field(description="Bytes that this freed.")


class RecordsAnswer(Answer):
    file: str = Field(description="The records that were written.")
    records: list[Record] = Field(description="The last attempt at each run.")


class SummaryAnswer(Answer):
    files: list[str] = Field(description="What was written.")
    rows: list[Row] = Field(description="One for each run of the plan.")
    comparisons: list[Comparison] = Field(description="Which differences are shown and which are not.")
    not_shown: list[str] = Field(description="What the experiment does not show.")


class VerifyAnswer(Answer):
    guards: list[Verdict] = Field(description="Every guard with its outcome, those that failed first.")


class ScanAnswer(Answer):
    scanned: Scanned = Field(description="What was found and read.")


class RunsAnswer(Answer):
    total: int = Field(description="Runs that match.")
    runs: list[Record] = Field(description="Those of this page.")


class RunAnswer(Answer):
    run: Record = Field(description="The run.")


class DiagnosisAnswer(Answer):
    state: State = Field(description="How it ended.")
    cause: str | None = Field(description="Why; null for a run that completed well.")
    change: str | None = Field(description="What to change.")
    evidence: list[Evidence] = Field(description="The lines that say so.")


class CalibrationAnswer(Answer):
    report: Calibration = Field(description="How good the predictions were.")


class ForgetAnswer(Answer):
    key: str = Field(description="The run that was removed.")


class ExportAnswer(Answer):
    file: str = Field(description="The file.")
    runs: int = Field(description="Records in it.")
