"""The wheel plans without a clone: it carries templates, recipes, trainer, studies and skills."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_wheel_plans_and_sets_up_without_a_clone(lab: Path, tmp_path: Path):
    (lab / "recipes").unlink()
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "wheel")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    bundled = tmp_path / "site" / "chiplog" / "_bundle"
    assert {file.name for file in bundled.iterdir()} == {"templates", "recipes", "trainer", "tasks", "skills"}
    assert not [file for file in bundled.rglob("*") if file.name in ("__pycache__", "input")]

    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    where = [sys.executable, "-c", "import chiplog; print(chiplog.__file__)"]
    done = subprocess.run(where, env=environment, capture_output=True, text=True, check=True)
    assert str(tmp_path / "site") in done.stdout
    ask = ["--question", "Which rank?", "--models", "S=small", "--dataset", "words", "--variables", "lora_rank=[4, 8]"]
    for command in (["plan-experiment", *ask, "--name", "ranks"], ["setup-experiment-dirs", "ranks"], ["list-studies"]):
        done = subprocess.run(
            [sys.executable, "-m", "chiplog.cli", *command],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert "capitalization" in done.stdout
    rendered = (lab / "experiments" / "ranks" / "code" / "recipes" / "evaluate.py").read_bytes()
    assert rendered == (ROOT / "recipes" / "evaluate.py").read_bytes()
