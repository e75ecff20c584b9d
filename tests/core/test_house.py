"""The rules of the house, held by the code's own imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "mcp_server" / "chiplog"

# Each module of the package imports only what stands before it (docs/architecture.md).
ORDER = [
    "errors",
    "schema",
    "files",
    "home",
    "machine",
    "text",
    "settings",
    "bundle",
    "values",
    "plan",
    "expand",
    "record",
    "provenance",
    "recipes",
    "ledger",
    "estimate",
    "trainer_files",
    "checks",
    "trainings",
    "render",
    "engines",
    "folder",
    "chain",
    "deviation",
    "collect",
    "compare",
    "losses",
    "guards",
    "scores",
    "summary",
    "figure",
    "studies",
    "sizing",
    "totals",
    "host_memory",
    "planning",
    "progress",
    "running",
    "submitting",
    "tables",
    "calibration",
    "report",
    "answers",
    "inputs",
    "diagnosis",
    "past_runs",
    "jobs",
    "tools",
    "init",
    "server",
    "cli",
    "__main__",
]
# The planner never imports what a job needs.
HEAVY = {"torch", "transformers", "torchtune", "datasets", "pandas", "trainer", "tasks", "recipes"}


def imports(file: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def part(file: Path) -> str:
    """The module or subpackage of chiplog that a file belongs to."""
    first = file.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


MODULES = [file for file in sorted(PACKAGE.rglob("*.py")) if "_bundle" not in file.parts and part(file) != "__init__"]


def test_every_module_has_its_place_in_the_order():
    assert {part(file) for file in MODULES} == set(ORDER)


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_module_imports_only_what_stands_before_it(file: Path):
    place = ORDER.index(part(file))
    for name in imports(file):
        if name.startswith("chiplog.") and name != "chiplog.__version__":
            other = name.split(".")[1]
            assert other == part(file) or ORDER.index(other) < place, f"{file.name} imports {name}"


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_the_planner_imports_nothing_that_a_job_needs(file: Path):
    tops = {name.split(".")[0] for name in imports(file)}
    assert not tops & HEAVY
    assert "mcp" not in tops or part(file) == "server"
    assert "typer" not in tops or part(file) == "cli"
    asks = part(file) in {"engines", "provenance", "studies"} or file.name == "sacct.py"
    assert asks or "subprocess" not in tops


@pytest.mark.parametrize(
    "file", sorted(f for d in ("trainer", "recipes", "tasks") for f in (ROOT / d).rglob("*.py")), ids=str
)
def test_what_a_job_runs_never_imports_the_planner_nor_another_study(file: Path):
    names = imports(file)
    tops = {name.split(".")[0] for name in names}
    assert "chiplog" not in tops
    study = file.relative_to(ROOT).parts[1] if file.is_relative_to(ROOT / "tasks") else None
    for name in names:
        parts = name.split(".")
        assert parts[0] != "tasks" or parts[1:2] in ([study], ["demo"])
        assert parts[0] != "recipes"
        assert parts[0] != "torchtune" or file.is_relative_to(ROOT / "recipes")


def test_server_and_help_load_neither_torch_nor_transformers_nor_pandas():
    code = (
        "import sys; import chiplog.server as s, chiplog.cli; s.build_server()\n"
        f"print(sorted({HEAVY | {'pyarrow', 'matplotlib.pyplot'}!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_skills_name_only_tools_that_exist():
    import re

    from chiplog.tools import TOOLS

    tools = {tool.function.__name__ for tool in TOOLS}
    skills = sorted((ROOT / "skills").glob("*/SKILL.md"))
    assert {file.parent.name for file in skills} >= {"plan-experiment", "run-experiment"}
    for file in skills:
        text = file.read_text()
        assert re.search(r"^name: " + file.parent.name + "$", text, re.MULTILINE)
        assert "Use when" in text
        called = set(re.findall(r"`(\w+)\(", text)) | set(
            re.findall(r"`((?:\w+_)+(?:experiment|dirs|records|resources|dataset|model|studies|status))`", text)
        )
        assert called and called <= tools, f"{file}: {called - tools}"
