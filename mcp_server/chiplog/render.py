"""From a plan to its folder: `render` makes every file as text, `write_experiment` puts them on disk.

The folder is complete: it carries the code that will run, each run's whole configuration and the commit. Rendering
the same plan twice gives the same bytes, and nothing that exists is overwritten without a diff and a yes.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import shlex
import shutil
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from chiplog.bundle import bundle, study_folder
from chiplog.errors import ConfirmationNeeded, NotFoundError, RenderError
from chiplog.files import write_atomic
from chiplog.plan import Plan, Resources, Run, columns, dump_plan
from chiplog.provenance import packages, revision, revision_text
from chiplog.recipes import load_recipe
from chiplog.settings import Gpu, Settings, Slurm
from chiplog.text import clock

# What a credential looks like: Hugging Face, OpenAI and Anthropic (in `sk-learn-experiments`, words are short), GitHub,
# AWS; then, in what is rendered, any NAME_TOKEN=value but a NAME_TOKEN_PATH or TOKENIZERS_CACHE, and in code, where
# `tokens = encode(...)` is none, only a quoted value with a digit in it.
SK = r"sk-(?:(?:ant|proj|svcacct|admin|or)-(?=[\w-]*\d)[\w-]{20,}|[A-Za-z0-9]{20,})"
KEY = rf"\b(?:hf_[A-Za-z0-9]{{20,}}|{SK}|gh[pousr]_[A-Za-z0-9]{{20,}}|A[KS]IA[A-Z0-9]{{16}})"
NAMED = r"(?:TOKEN(?!IZ)|SECRET|PASSWORD|API_KEY)"
NO_PLACE = r"(?<!PATH)(?<!FILE)(?<!DIR)(?<!CACHE)"
SECRET = re.compile(rf"{KEY}|{NAMED}\w*{NO_PLACE}\s*=\s*[\"']?[A-Za-z0-9+/_-]{{8,}}", re.IGNORECASE)
CODE_SECRET = re.compile(rf"{KEY}|{NAMED}[\"'\]]*\s*[=:]\s*([\"'])(?=[A-Z+/_-]*\d)[A-Z0-9+/_-]{{8,}}\1", re.IGNORECASE)
DIFF_LINES = 60
WARNED_S = 120  # before its time limit, a training is told to save its state and stop
# Held while what belongs together is written: who ends the process from another thread waits for it.
WRITING = threading.RLock()


def template_environment() -> Environment:
    """Jinja as all templates here use it: an undefined name is an error."""
    environment = Environment(
        loader=FileSystemLoader(bundle() / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["quote"] = shlex.quote
    environment.filters["one_line"] = lambda text: " ".join(str(text).split())
    return environment


def render(plan: Plan, runs: Sequence[Run], settings: Settings) -> dict[str, bytes]:
    """Every file of the experiment folder, by its path in it.

    Raises RenderError if a file would hold a credential.
    """
    jinja = template_environment()
    files = {"plan.yaml": dump_plan(plan).encode()}
    for run in runs:
        folder = f"runs/{run.name}"
        files[f"{folder}/config.yaml"] = _config_text(run).encode()
        files[f"{folder}/run.sbatch"] = _script(jinja, plan, run, settings, train=run.kind != "control")
        if run.kind == "finetune":
            files[f"{folder}/eval.sbatch"] = _script(jinja, plan, run, settings, train=False)
    trained, alone = ([r.name for r in runs if (r.kind == "finetune") == which] for which in (True, False))
    submit = jinja.get_template("submit.sh.j2").render(plan=plan, trained=trained, alone=alone)
    files["submit.sh"] = submit.encode()
    files["close.sbatch"] = _closing(jinja, plan, settings)
    files["README.md"] = _readme(jinja, plan, runs)
    refuse_credentials(files)
    return files | _code(plan)


def refuse_credentials(files: Mapping[str, bytes]) -> None:
    """Raises RenderError if one of these rendered files holds what looks like a credential."""
    for name, content in files.items():
        _refuse_credential(content, SECRET, name, "the plan and of chiplog.toml")


def _refuse_credential(content: bytes, looks: re.Pattern[str], name: str, source: str) -> None:
    for number, line in enumerate(content.decode(errors="replace").split("\n"), start=1):
        if found := looks.search(line):
            start = found.group()[:6]
            raise RenderError(
                f"{name}, line {number}, holds what looks like a credential ({start}...): export it in your shell or "
                f"in the job's environment, and take it out of {source}"
            )


def _config_text(run: Run) -> str:
    manuals = f"{load_recipe(run.recipe).place}/{run.recipe}" if run.recipe and run.kind == "train" else "recipes/*"
    head = f"# Everything that the job {run.name} reads. The settings are explained in code/{manuals}.yaml.\n"
    return head + yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True, width=100, default_flow_style=None)


def _script(jinja: Environment, plan: Plan, run: Run, settings: Settings, *, train: bool) -> bytes:
    """`run.sbatch` (trains; of a control evaluates) or `eval.sbatch` (evaluates what was trained)."""
    command, what = "python ../../code/recipes/evaluate.py --config config.yaml", "evaluates the base model"
    result = "eval/scores.json"
    if train and run.recipe:
        file = f"../../code/{load_recipe(run.recipe).place}/{run.recipe}.py"
        command = f"python {shlex.quote(file)} --config config.yaml"
        what = "trains a model" if run.kind == "train" else "fine-tunes"
        result = "DONE"
    elif run.kind != "control":
        command, what = f"{command} --adapter adapter", "evaluates what was fine-tuned"
    resources = run.resources if train or run.kind == "control" else _evaluating(run.resources)
    text = jinja.get_template("run.sbatch.j2").render(
        job_name=run.name if train or run.kind == "control" else f"{run.name}_eval",
        purpose=f"{run.name} of {plan.name}: {what}.",
        resources=resources,
        sbatch_options=sbatch_options(resources, settings) + _warned(resources, train),
        setup=settings.slurm.setup_lines if settings.slurm else [],
        to_workspace=os.path.relpath(settings.workspace, settings.experiments / plan.name / "runs" / run.name),
        command=command,
        result=result,
    )
    return text.encode()


def _evaluating(resources: Resources) -> Resources:
    """What the evaluation of a run asks for: one process, and its own time."""
    limit = resources.eval_time_limit_s or resources.time_limit_s
    return resources.alone.model_copy(update={"time_limit_s": limit})


def _warned(resources: Resources, train: bool) -> list[str]:
    """The option by which a training is told that its time is nearly over, early enough to save its state."""
    limit = resources.time_limit_s
    return [f"--signal=B:USR1@{min(WARNED_S, limit // 4) if limit else WARNED_S}"] if train else []


def _closing(jinja: Environment, plan: Plan, settings: Settings) -> bytes:
    text = jinja.get_template("close.sbatch.j2").render(
        plan=plan,
        sbatch_options=sbatch_options(Resources(), settings),
        setup=settings.slurm.setup_lines if settings.slurm else [],
        to_workspace=os.path.relpath(settings.workspace, settings.experiments / plan.name),
    )
    return text.encode()


def sbatch_options(resources: Resources, settings: Settings) -> list[str]:
    """The options that depend on the cluster and on what a job asks for."""
    gpu = find_gpu(resources, settings)
    slurm = settings.slurm or Slurm()
    partition = slurm.partition if resources.gpus else slurm.cpu_partition or slurm.partition
    options = [
        f"--{name}={value}"
        for name, value in {
            "account": slurm.account,
            "partition": (gpu and gpu.partition) or partition,
            "qos": slurm.qos,
            "reservation": slurm.reservation,
        }.items()
        if value
    ]
    if resources.gpus:
        kind = gpu.gres.split(":")[1] if gpu and gpu.gres and gpu.gres.count(":") == 2 else None
        options.append("--gres=" + ":".join(filter(None, ["gpu", kind, str(resources.gpus)])))
    if gpu and gpu.constraint:
        options.append(f"--constraint={gpu.constraint}")
    if resources.mem_gib:
        options.append(f"--mem={resources.mem_gib}G")
    if resources.time_limit_s:
        options.append(f"--time={clock(resources.time_limit_s)}")
    return options


def find_gpu(resources: Resources, settings: Settings) -> Gpu | None:
    """The GPU that a job asks for by name, or the only one there is; null for a job on the CPU."""
    if not resources.gpus:
        return None
    if resources.gpu is None:
        return settings.gpus[0] if len(settings.gpus) == 1 else None
    for gpu in settings.gpus:
        if gpu.name == resources.gpu:
            return gpu
    named = ", ".join(gpu.name for gpu in settings.gpus) or "none"
    raise NotFoundError(f"chiplog.toml has no GPU {resources.gpu!r}: it has {named}; add it under [[gpus]]")


def _readme(jinja: Environment, plan: Plan, runs: Sequence[Run]) -> bytes:
    varied = columns(run.varied for run in runs)
    heads = ["run", *(["model"] if plan.models else []), "type", *varied]
    rows = [
        [run.name, *([run.model] if plan.models else []), run.kind, *(str(run.varied.get(key, "–")) for key in varied)]
        for run in runs
    ]
    has_control = any(run.kind == "control" for run in runs)
    text = jinja.get_template("README.md.j2").render(plan=plan, heads=heads, rows=rows, has_control=has_control)
    return text.encode()


def code_files(plan: Plan) -> dict[str, Path]:
    """The code that the jobs run, by its name under `code/`: their recipes, the trainer, the study."""
    root = bundle()
    names = [*(e.recipe for e in plan.experiments), *(["evaluate"] if plan.framework == "torchtune" else [])]
    recipes = [load_recipe(name) for name in names]
    folders = {recipe.file.parent: None for recipe in recipes if recipe.place == "recipes"}
    found = {f"recipes/{file.name}": file for folder in reversed(folders) for file in sorted(folder.iterdir())}
    found = {name: file for name, file in found.items() if file.suffix in (".py", ".yaml")}
    found |= {f"trainer/{file.name}": file for file in sorted((root / "trainer").glob("*.py"))}
    manuals = [recipe.file.with_suffix(".yaml") for recipe in recipes if recipe.place == "trainer"]
    found |= {f"trainer/{file.name}": file for file in manuals}
    if plan.study:
        folder = study_folder(plan.study)
        found["tasks/__init__.py"] = root / "tasks" / "__init__.py"
        found |= {f"tasks/{plan.study}/{file.name}": file for file in sorted(folder.glob("*.py"))}
    return found


def _code(plan: Plan) -> dict[str, bytes]:
    """That code, and where it all came from."""
    files = {f"code/{name}": file.read_bytes() for name, file in code_files(plan).items()}
    for name, file in code_files(plan).items():
        _refuse_credential(files[f"code/{name}"], CODE_SECRET, str(file), "that file")
    files["code/job.sh"] = (bundle() / "templates" / "job.sh").read_bytes()
    files["code/REVISION"] = revision_text(revision(bundle())).encode()
    files["code/environment.txt"] = "".join(f"{name}=={version}\n" for name, version in packages().items()).encode()
    return files


def write_experiment(folder: Path, files: Mapping[str, bytes], *, confirm: bool = False) -> list[str]:
    """Writes what is new or has changed, and returns those paths; an interruption leaves the folder as it was.

    Raises ConfirmationNeeded, with the diff, if a file that exists would change and `confirm` is not set;
    RenderError if the disk is full or refuses, or if a link leads out of the folder.
    """
    refuse_links(folder, [*files, ".staging", ".staging.old"])
    changed = [name for name, content in files.items() if _read(folder / name) != content]
    replaced = [name for name in changed if (folder / name).exists()]
    if replaced and not confirm:
        raise ConfirmationNeeded(
            f"{len(replaced)} of the files in {folder} would change:\n{_diff(folder, files, replaced)}\nOverwrite them?"
        )
    with WRITING:
        _write(folder, {name: files[name] for name in changed}, replaced)
    return changed


def _write(folder: Path, files: Mapping[str, bytes], replaced: Sequence[str]) -> None:
    """Writes all of these files or none."""
    needed = 2 * sum(map(len, files.values()))  # once more while they stand in .staging
    staging, old = folder / ".staging", folder / ".staging.old"
    moved: list[str] = []
    was_there = folder.exists()
    try:
        if not was_there:
            folder.mkdir(parents=True)
        if (free := shutil.disk_usage(folder).free) < needed:
            raise RenderError(f"{folder} needs {needed} bytes and its disk has {free} free: free some and try again")
        for name, content in files.items():
            write_atomic(staging / name, content)
        for name in replaced:
            write_atomic(old / name, (folder / name).read_bytes())
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            moved.append(name)
            (staging / name).replace(folder / name)
    except BaseException as error:
        for name in moved:
            if name in replaced:
                (old / name).replace(folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        _remove_empty(folder, {Path(name).parts[0] for name in files} - {Path(name).parts[0] for name in replaced})
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            why = "the disk is full" if full else error.strerror
            raise RenderError(f"{folder} cannot be written: {why}. It is as it was; mend that and try again") from error
        raise
    finally:
        _remove([staging, old])
        if not was_there and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Raises RenderError if one of these files would be written outside `folder`, since a link leads there."""
    root = os.path.realpath(folder)
    for name in names:
        real = os.path.realpath(folder / name)
        if not Path(real).is_relative_to(root):
            raise RenderError(f"{name} in {folder} is led to {real} by a link: remove the link and try again")


def _read(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def _diff(folder: Path, files: Mapping[str, bytes], names: Sequence[str]) -> str:
    lines: list[str] = []
    for name in names:
        old, new = (folder / name).read_text(errors="replace"), files[name].decode(errors="replace")
        lines += difflib.unified_diff(
            old.splitlines(), new.splitlines(), f"{name} (there)", f"{name} (new)", "", "", 1, ""
        )
    cut = [f"... and {len(lines) - DIFF_LINES} more lines"] if len(lines) > DIFF_LINES else []
    return "\n".join(lines[:DIFF_LINES] + cut)


def _remove(folders: Sequence[Path]) -> None:
    """Removes the folders, though Ctrl-C or a signal comes meanwhile."""
    try:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _remove_empty(folder: Path, names: set[str]) -> None:
    """Removes folders under these names in which nothing is left."""
    for top in (folder / name for name in names):
        for inner in sorted((p for p in (top, *top.rglob("*")) if p.is_dir()), reverse=True):
            if not any(inner.iterdir()):
                inner.rmdir()
