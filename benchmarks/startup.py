"""How long the faces take to their first answer, as ratios to an empty Python in the same run.

python benchmarks/startup.py
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import anyio
from mcp import Client, StdioServerParameters

REPEATS = 7


def main() -> None:
    """Prints a table in Markdown."""
    argparse.ArgumentParser(description="How long the faces take to their first answer.").parse_args()
    cases: dict[str, Callable[[], object]] = {
        "python -c pass": lambda: subprocess.run([sys.executable, "-c", "pass"], check=True),
        "chiplog --help": lambda: command("--help"),
        "chiplog list-studies": lambda: command("list-studies"),
        "chiplog serve, to the list of tools": lambda: anyio.run(first_answer),
    }
    seconds = {name: statistics.median(timed(call) for _ in range(REPEATS)) for name, call in cases.items()}
    empty = seconds["python -c pass"]
    print("| case | seconds (median) | times an empty Python |\n|---|---|---|")
    for name, taken in seconds.items():
        print(f"| {name} | {taken:.2f} | {taken / empty:.0f} |")


def command(*arguments: str) -> None:
    subprocess.run([Path(sys.executable).with_name("chiplog"), *arguments], check=True, capture_output=True)


async def first_answer() -> None:
    server = StdioServerParameters(command=str(Path(sys.executable).with_name("chiplog")), args=["serve"])
    async with Client(server) as client:
        await client.list_tools()


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
