"""The command-line face: tool `plan_experiment` is the command `chiplog plan-experiment`.

Exit codes: 0 done; 1 done, and the answer is no (a check failed, a run failed); 2 bad input, nothing was done;
130 interrupted, 143 ended from outside, 129 its terminal was closed.
"""

from __future__ import annotations

import functools
import inspect
import signal
import sys
import types
import typing
from collections.abc import Callable
from json import dumps
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

import typer
import yaml
from pydantic import Field, ValidationError, validate_call
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from typer.core import TyperGroup

from chiplog.answers import Answer, LawAnswer
from chiplog.errors import ChiplogError, ConfirmationNeeded, in_words
from chiplog.estimate.case import Case
from chiplog.schema import plain_errors
from chiplog.studies import run_command
from chiplog.tables import law_words
from chiplog.tools import TOOLS, calibration_report, estimate_resources

INTERRUPTED = {
    "submit-experiment": ": all of it was submitted or nothing; experiment-status says which",
    "experiment-status": ": jobs that were submitted go on",
}


class Commands(TyperGroup):
    """Ctrl-C ends each with exit code 130, and so does the end of the input at a question."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, typer.Abort) as key:
            err.print(f"interrupted{INTERRUPTED.get(str(ctx.invoked_subcommand), '')}", style="red")
            raise typer.Exit(130) from key


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Plans machine-learning experiments from what your jobs actually did.",
)
# What is not read on a terminal is not cut to the width of one.
out, err = Console(width=None if sys.stdout.isatty() else 160), Console(stderr=True)


def main() -> None:
    """Runs the command line; a ChiplogError is its words and exit code 2."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, _end)
    try:
        app()
    except (ChiplogError, OSError, UnicodeDecodeError) as error:
        err.print(f"error: {in_words(error)}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


def _end(number: int, _: types.FrameType | None) -> NoReturn:
    """Ends the process as Ctrl-C does, with its clearing up, which a second signal does not interrupt."""
    for other in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, lambda *_: None)  # not SIG_IGN: children would inherit it
    raise SystemExit(128 + number)


@app.command()
def serve() -> None:
    """Serves the tools to an MCP client over stdio."""
    from chiplog.server import serve

    serve()


@app.command()
def init(json: Annotated[bool, typer.Option("--json", help="Answer in JSON.")] = False) -> None:
    """Writes chiplog.toml into this folder if there is none, and checks it."""
    from chiplog.init import init_workspace

    _show(init_workspace(), json)


@app.command()
def parse_log(
    files: Annotated[list[Path], typer.Argument(help="Logs, of any framework and scheduler.")],
    job: Annotated[bool, typer.Option("--job", help="They are all of one job.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One object a line.")] = False,
) -> None:
    """Shows what a log says of its run: one record for each file, or for all together."""
    from chiplog.ledger.parse import parse_job
    from chiplog.ledger.row import row

    for group in [files] if job else [[file] for file in files]:
        found = row(parse_job(group))
        if json:
            print(dumps(found))
        else:
            lines = [f"| {key} | {'–' if value is None else value} |" for key, value in found.items()]
            _print_text("\n".join([f"{', '.join(map(str, group))}:", "| figure | value |", "| --- | --- |", *lines]))


@app.command()
def backtest(
    measurements: Annotated[Path | None, typer.Argument(help="A JSON list of measured runs; none: the ledger.")] = None,
    protocol: Annotated[str | None, typer.Option(
        help="Of a table. cold, unless given: its own rows are not known; history: the earlier are."
    )] = None,
    sweeps: Annotated[Path | None, typer.Option(help="Of a table: a JSON list of batches and the memory they held.")]
    = None,
    json: Annotated[bool, typer.Option("--json", help="Answer in JSON.")] = False,
) -> None:  # fmt: skip
    """Says how good predictions were: of the ledger's own runs, or of each measured run of a table from the others."""
    if measurements is None:
        if protocol or sweeps:
            raise ChiplogError("--protocol and --sweeps are for a table: name its file too, or leave them out")
        return _show(calibration_report(limit=1000), json)

    from chiplog.estimate import backtest as back
    from chiplog.estimate.table import read_table

    given = {"rows": read_table(measurements), "sweeps": read_table(sweeps) if sweeps else None}
    found = _with_progress(back.backtest, **given, protocol=protocol or "cold")
    if json:
        print(dumps(found))
    else:
        _print_text(back.in_words(found))


@app.command()
def fit_scaling_law(
    file: Annotated[Path, typer.Argument(help="CSV with the columns N (parameters), D (tokens) or C_flops, and loss.")],
    use_all: Annotated[bool, typer.Option("--all", help="Rows with used_in_fit = 0 too.")] = False,
    drop_largest: Annotated[int, typer.Option(min=0, help="Leave out so many of the largest losses.")] = 0,
    bootstrap: Annotated[int, typer.Option(min=0, help="Fits to draws; fewer than 40: no intervals.")] = 4000,
    json: Annotated[bool, typer.Option("--json", help="Answer in JSON.")] = False,
) -> None:
    """Fits L = E + A / N^alpha + B / D^beta to runs, and says whether they can tell its parts."""
    options = {"all": use_all, "drop_largest": drop_largest, "bootstrap": bootstrap}
    found = run_command("scaling_laws", "fit.py", options, str(file.absolute()))
    more = [] if found["identifiable"] else ["chiplog plan-experiment --study scaling_laws --plan transformer_grid"]
    _show(LawAnswer(**found, summary=law_words(found), next=more), json)


def _of_case(model: type[Case]) -> Callable[..., Answer]:
    """`chiplog estimate`: estimate_resources for one case, its fields as options."""

    def estimate(**given: Any) -> Answer:
        return estimate_resources(case={name: value for name, value in given.items() if value is not None})

    kinds = {
        name: Annotated[field.annotation, Field(description=field.description)]
        for name, field in model.model_fields.items()
    }
    parameters = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, annotation=kinds[name],
            default=inspect.Parameter.empty if field.is_required() else field.default,
        )
        for name, field in model.model_fields.items()
    ]  # fmt: skip
    estimate.__doc__, estimate.__annotations__ = model.__doc__, {**kinds, "return": Answer}
    estimate.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    return estimate


def _command(function: Callable[..., Any]) -> Callable[..., None]:
    """The function as a command: simple types become options, mappings `--option key=value`, `confirm` a prompt."""
    signature = inspect.signature(function, eval_str=True)
    parsers: dict[str, Callable[[Any], Any]] = {}
    parameters = []
    for name, parameter in signature.parameters.items():
        if name == "progress":
            continue
        help_text, inner = _described(parameter.annotation)
        kind, parsers[name] = _option_type(inner)
        required = parameter.default is inspect.Parameter.empty
        positional = required and kind is str
        marker = (
            typer.Argument(help=help_text) if positional else typer.Option(help=help_text, show_default=not required)
        )
        default = parameter.default if not required else inspect.Parameter.empty
        parameters.append(parameter.replace(annotation=Annotated[kind, marker], default=default))
    flag = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]
    parameters.append(inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=flag))

    def run(*, json: bool, **given: Any) -> None:
        arguments = {name: parsers[name](value) for name, value in given.items()}
        _show(_call(function, arguments, "progress" in signature.parameters), json)

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    run.__signature__ = inspect.Signature(  # pyright: ignore[reportFunctionMemberAccess]
        [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    )
    return run


def _described(annotation: Any) -> tuple[str | None, Any]:
    if get_origin(annotation) is not Annotated:
        return None, annotation
    inner, *extras = get_args(annotation)
    return next((extra.description for extra in extras if getattr(extra, "description", None)), None), inner


def _option_type(annotation: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The type that typer reads for an annotation, and how to make the function's value of what it read."""
    arms = get_args(annotation) if get_origin(annotation) in (typing.Union, types.UnionType) else (annotation,)
    kind = next(arm for arm in arms if arm is not types.NoneType)
    optional = len(arms) > 1
    origin = get_origin(kind)
    if origin is Literal and any(get_origin(arm) is dict for arm in arms):
        return str | None, lambda value: value and _yaml(value)
    if origin is dict:
        return (list[str] | None if optional else list[str]), _pairs
    if origin is list:
        (item,) = get_args(kind)
        if item in (str, int):
            return list[item] | None, lambda values: values or None
        return list[str] | None, lambda values: [_mapping(value) for value in values] if values else None
    return (kind | None if optional and origin is None else annotation), lambda value: value


def _pairs(values: list[str] | None) -> dict[str, Any] | None:
    """`["lora_rank=[4,64]", "lr=1e-4"]` as a mapping; values are YAML."""
    if not values:
        return None
    found: dict[str, Any] = {}
    for text in values:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"{text!r} is not key=value")
        if key.strip() in found:
            raise typer.BadParameter(
                f"{key.strip()} is given twice: give it once, with several values as in lora_rank=[4, 64]"
            )
        found[key.strip()] = _yaml(value)
    return found


def _mapping(text: str) -> dict[str, Any]:
    value = _yaml(text)
    if not isinstance(value, dict):
        raise typer.BadParameter(f"{text!r} is not a mapping such as '{{model: 1B, lora_rank: 4}}'")
    return value


def _yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise typer.BadParameter(f"{text!r} is not YAML: {error}") from error


def _call(function: Callable[..., Any], arguments: dict[str, Any], reports: bool) -> Answer:
    checked = validate_call(function)
    call = functools.partial(_with_progress, checked) if reports else checked
    try:
        try:
            return call(**arguments)
        except ConfirmationNeeded as question:
            err.print(str(question), markup=False, highlight=False, soft_wrap=True)
            if not sys.stdin.isatty():
                raise ChiplogError("nobody is here to answer: call again with --confirm to do it") from question
            if not typer.confirm("Go on?", err=True):
                raise typer.Exit(2) from question
            return call(**{**arguments, "confirm": True})
    except ValidationError as error:
        if error.title != function.__name__:  # not of the call: a fault of ours
            raise
        raise ChiplogError(f"wrong arguments:\n{plain_errors(error)}\nMend these; --help explains them.") from error


def _with_progress(function: Callable[..., Any], **arguments: Any) -> Any:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("", total=None)
        return function(
            **arguments,
            progress=lambda done, total, words: bar.update(task, completed=done, total=total, description=words),
        )


def _show(answer: Answer, as_json: bool) -> None:
    """The answer as JSON, or as text with its tables drawn; exit code 1 if it is a no."""
    if as_json:
        print(answer.model_dump_json(indent=1))
    else:
        _print_text(answer.summary)
        for step in answer.next:
            out.print(f"next: {step}", style="dim", markup=False, highlight=False, soft_wrap=True)
    if not answer.ok:
        raise typer.Exit(1)


def _print_text(text: str) -> None:
    rows: list[list[str]] = []
    for line in [*text.splitlines(), None]:
        if line is not None and line.startswith("| "):
            rows.append([cell.strip() for cell in line.strip().strip("|").split(" | ")])
            continue
        if rows:
            _print_table(rows)
            rows = []
        if line is not None:
            out.print(line, markup=False, highlight=False, soft_wrap=True)


def _print_table(rows: list[list[str]]) -> None:
    """Draws a table; columns that say the same in every row become one line below it."""
    headings, cells = rows[0], rows[2:]
    same = {place for place in range(len(headings)) if len(cells) > 1 and len({row[place] for row in cells}) == 1}
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for place, heading in enumerate(headings):
        if place not in same:
            table.add_column(heading, overflow="fold", no_wrap=heading == "run")
    for row in cells:
        table.add_row(*(cell for place, cell in enumerate(row) if place not in same))
    out.print(table)
    if same:
        words = ", ".join(f"{headings[place]} {cells[0][place]}" for place in sorted(same))
        out.print(f"The same in all: {words}.\n", style="dim", markup=False, highlight=False, soft_wrap=True)


for _tool in TOOLS:
    if _tool.function is calibration_report:  # it is `chiplog backtest`
        continue
    app.command(name=_tool.function.__name__.replace("_", "-"))(_command(_tool.function))

app.command(name="estimate")(_command(_of_case(Case)))

if __name__ == "__main__":
    main()
