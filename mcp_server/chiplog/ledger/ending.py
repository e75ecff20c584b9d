"""How a run ended, from what Slurm, CUDA, Python and launchers write when something ends.

A sign counts only if no work was done after it: an error that was caught and trained past ended nothing.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from chiplog.ledger.draft import Draft
from chiplog.ledger.reader import Found, Pattern, Span, pattern
from chiplog.ledger.units import size, whole
from chiplog.record import OutOfMemory, State

LATE = 20_000  # bytes of work after an error that show that it was caught; other ranks still print a little
LATE_BARS = 2000  # bytes of output that was on its way when Slurm ended the job

SLURM = pattern(
    rb"\*\*\* (?P<what>JOB|STEP) (?P<job>\d+)(?:[._][\w.+]+)? (?:STEPD TERMINATED )?ON (?P<node>\S+) "
    rb"CANCELLED AT (?P<at>[\dT:.-]+)(?: DUE (?:TO|to) (?P<why>[A-Za-z ]+?)(?:,[^*\n]*)?)? \*\*\*",
    b" CANCELLED AT ",
)
WHY = {
    "TIME LIMIT": State.TIMEOUT,
    "PREEMPTION": State.PREEMPTED,
    "JOB REQUEUE": State.PREEMPTED,
    "NODE FAILURE": State.NODE_FAIL,
}
HOST_OOM = [
    pattern(rb"oom[-_]kill(?:ed)?(?: event\(?s?\)?)?(?: in (?:StepId=|step )(?P<job>\d+))?", b"oom"),
    pattern(rb"Exceeded (?:job|step) memory limit", b" memory limit"),
    pattern(rb"error: \S+: tasks? [\d,-]+: Out Of Memory", b"Out Of Memory"),
    pattern(rb"TERM_MEMLIMIT|job killed: v?mem \d+\w* exceeded", b"TERM_MEM", b"job killed: "),
    pattern(rb"^(?:\S*(?<!OutOf)MemoryError)\b[^\n]*", b"MemoryError"),
    pattern(rb"DefaultCPUAllocator: (?:can't|not enough memory)[^\n]*", b"DefaultCPUAllocator"),
    pattern(rb"OOM when allocating tensor[^\n]*device:CPU:[^\n]*", b"device:CPU:"),
]
TIME_OVER = [pattern(rb"PBS: job killed: walltime \d+ exceeded|TERM_RUNLIMIT", b"PBS: ", b"TERM_RUN")]
NODE_LOST = [
    pattern(
        rb"slurmstepd: error: \*\*\* \w+ \d+[^\n]{0,300}NODE_FAIL|launch failed requeued held"
        rb"|^srun: error: Node failure on ",
        b"NODE_FAIL",
        b"launch failed",
        b"Node failure",
    )
]
RAN_OUT = pattern(rb"ran out of memory trying to allocate [^\n]*", b"ran out of memory")
GPU_OOM = [
    pattern(rb"^(?:torch\.)?(?:cuda\.)?OutOfMemoryError +Traceback[^\n]*", b"OutOfMemoryError "),
    pattern(rb"CUDA out of memory\b[^\n]*", b"CUDA out of memory"),
    pattern(rb"(?:HIP|XPU|NPU|MPS backend) out of memory\b[^\n]*", b" out of memory"),
    pattern(rb"CUDA error: out of memory[^\n]*|CUBLAS_STATUS_ALLOC_FAILED[^\n]*", b"CUDA error: ", b"CUBLAS_"),
    pattern(rb"RESOURCE_EXHAUSTED: (?:Out of memory|Failed to allocate)[^\n]*", b"RESOURCE_EXHAUSTED"),
    pattern(rb"OOM when allocating tensor(?![^\n]*device:CPU)[^\n]*", b"OOM when"),
    RAN_OUT,
    pattern(rb"Out of memory error on GPU \d+\.[^\n]*", b"Out of memory error on GPU"),
]
TRIED = [
    re.compile(
        r"(?:[Tt]ried to allocate|[Cc]annot allocate|[Uu]nable to allocate|allocating|trying to allocate|"
        r"allocate request for) ([\d.]+ ?[KMGT]?i?(?:B|bytes))"
    )
]
CAPACITY = [
    re.compile(r"total capac\w*ty of ([\d.]+ ?[KMGT]i?B)"),
    re.compile(r"; ([\d.]+ ?[KMGT]i?B) total capacity"),
]
IN_USE = [
    re.compile(r"this process has ([\d.]+ ?[KMGT]i?B) memory in use"),
    re.compile(r"([\d.]+ ?[KMGT]i?B) reserved in total by PyTorch"),
]
# The last line of a traceback, which may stand behind a rank or a time.
ERROR = pattern(
    rb"^ {0,8}(?:\[?(?:rank)?\d+\]?[: ]+|\S*\]:? ?)?(?P<words>(?P<name>(?:\w+\.)*[A-Z]\w*"
    rb"(?:Error|Exception|Interrupt|Exit|Failure|Timeout|OutOfMemory))(?:: [^\n]*)?)$"
)
LAST_LINE = pattern(rb"^[ \t]*\S[^\n]*$")
LEVEL = re.compile(r"^.{0,80}?(?:^|[\[\s|-])(?:ERROR|FATAL)(?:[\]\s|:]|$)")
OTHER_ERROR = pattern(  # of any name, behind the last frame
    rb"^ {0,8}File \"[^\n]{1,300}\n(?: {4,}[^\n]{0,300}\n){0,3}"
    rb"(?P<words>[A-Za-z_][\w.]{2,100}(?:\(\w+\))?(?:: [^\n]*)?)$",
    b'File "',
)
CANCEL = re.compile(
    r"KeyboardInterrupt|^[\d :.-]{8,40}Terminated$|got signal: (?:2|15)\b|: line \d+: +\d+ Terminated\b"
)
TRACEBACK = pattern(rb"Traceback \(most recent call last\):", b"Traceback (most")
FATAL = [
    pattern(
        rb"(?:Segmentation fault|Bus error|Aborted|Illegal instruction|Floating point exception) \(core dumped\)[^\n]*"
        rb"|(?:^|: )(?:Segmentation fault|Bus error)\b[^\n]*|Fatal Python error[^\n]*"
        rb"|\xe6\xae\xb5\xe9\x94\x99\xe8\xaf\xaf",
        b"Segmentation fault",
        b"Bus error",
        b"(core dumped)",
        b"Fatal Python error",
        b"\xe6\xae\xb5",
    ),
    pattern(
        rb"(?:^\W{0,3}|: line \d+: +\d+ )(?:Killed|Terminated)\b[^\n]*|^[\d :.-]{8,40}(?:Killed|Terminated)$"
        rb"|^\xe5\xb7\xb2\xe6\x9d\x80\xe6\xad\xbb"
        rb"|^slurmstepd: error: [^\n]*(?:Killed|SIGKILL)[^\n]*",
        b"Killed",
        b"Terminated",
        b"SIGKILL",
        b"\xe5\xb7\xb2",
    ),
    pattern(
        rb"Watchdog caught collective operation timeout[^\n]*|we are taking the entire process down[^\n]*",
        b"Watchdog caught",
        b"taking the entire process down",
    ),
    pattern(
        rb"^\S*: (?:line \d+: )?\S+: (?:command not found|Permission denied|No such file or directory)$"
        rb"|: can't open file [^\n]+",
        b"command not found",
        b"Permission denied",
        b"No such file",
    ),
    pattern(
        rb"^Error executing job with overrides[^\n]*|^ERROR conda\.cli\.main_run[^\n]*",
        b"Error executing job",
        b"ERROR conda",
    ),
    pattern(rb"^\S*: line \d+: syntax error [^\n]*", b": syntax error "),
    pattern(rb"^ *Exit (?:[Cc]ode|[Ss]tatus): +(?P<code>-?[1-9]\d*)\b", b"Exit code", b"Exit status", b"Exit Status"),
    pattern(rb"^\S+\.py: error: [^\n]+|^error: [^\n]+", b"error: "),
    pattern(
        rb"\bsrun: error: [^\n]{0,300}(?:[Ee]xited with exit code (?P<code>[1-9]\d*)|: Killed|: Aborted)[^\n]*",
        b"srun: ",
    ),
    pattern(rb"terminate called after throwing an instance of [^\n]*", b"terminate called"),
    pattern(rb"^make: \*\*\* [^\n]{0,200} Error (?P<code>\d+)", b"make: *** "),
    pattern(rb"^Command exited with non-zero status (?P<code>\d+)", b"Command exited with non-zero"),
    pattern(rb"^Command '[^\n]*' returned non-zero exit status (?P<code>\d+)", b"returned non-zero exit status"),
    pattern(rb"DataLoader worker [^\n]{0,100} is killed by signal: [^\n]*", b"is killed by signal"),
    pattern(rb"exits with return code = (?P<code>-?[1-9]\d*)", b"exits with return code"),
    pattern(rb"exitcode *: (?P<code>-?[1-9]\d*) \(pid", b"exitcode"),
    pattern(rb"^Exited with exit code (?P<code>[1-9]\d*)\.", b"Exited with exit code"),
    pattern(rb"^sbatch: error: [^\n]+|^slurmstepd: error: (?!\*\*\*|_get|[^\n]{0,200}oom)[^\n]+", b"error: "),
]
TRAINED = [
    pattern(rb"(?i:(?:training|fine-?tuning) (?:is |has (?:been )?)?(?:complete|finish|done|ended)(?:d|ed)?\b)",
            b"training ", b"tuning "),
    pattern(rb"(?i:(?:finished|done|end(?: of)?) training\b)",
            b"finished training", b"done training", b"end of training", b"end training"),
]  # fmt: skip
GOOD = [
    pattern(rb"^Saved final weights to ", b"Saved final weights to "),
    pattern(rb"(?i:exit[ _]?(?:code|status))[\"']? ?[=:] *0\b", b"exit"),
    pattern(
        rb"^(?:\S+ )?Saved pipeline to output directory|^\[LightGBM\] \[Info\] Finish train",
        b"Saved pipeline",
        b"Finish",
    ),
    pattern(rb"exits successfully", b"exits successfully"),
    pattern(rb"\] Optimization Done\.", b"Optimization Done."),
    pattern(rb"^Successfully completed\.", b"Successfully completed."),
    *TRAINED,
]
SAID = pattern(  # a last line that says no more
    rb"^[\W_]{0,40}(?i:(?:all )?(?:done|finished|completed?))[\W_]{0,40}\Z", b"done", b"finished", b"complete"
)


class Ending(NamedTuple):
    """How it ended, why, and where that stands."""

    state: State
    reason: str | None
    found: Found | None
    exit_code: int | None = None


def end(draft: Draft, span: Span) -> None:
    """Notes the state, why, the exit code and what was said when memory ran out."""
    if memory := _out_of_memory(span, draft.progress):
        draft.set("oom", memory[0], memory[1])
    ending = _ending(draft, span)
    if ending.state is State.OUT_OF_MEMORY and draft.get("oom") is None:
        draft.set("oom", OutOfMemory(kind="host", tried_bytes=_size_of(TRIED, ending.reason or "")), ending.found)
    draft.set("state", ending.state, ending.found)
    draft.set("reason", ending.reason)
    draft.set("exit_code", ending.exit_code)


def _ending(draft: Draft, span: Span) -> Ending:
    worked = draft.progress
    tail = span.after(max(span.start, worked - LATE))
    failed = _failure(tail, worked)
    if slurm := _cancelled(span, worked):
        why = (slurm.get("why") or "").strip().upper()
        state = next((state for words, state in WHY.items() if why.startswith(words)), State.CANCELLED)
        # srun cancels the step of a task that failed: what failed stands before it.
        fault = (failed and failed.offset < slurm.offset) or draft.get("oom") is not None
        own_fault = slurm["what"] == "STEP" and not why and fault
        if not own_fault:
            if state is State.CANCELLED and (host := _last(HOST_OOM, tail)):
                return Ending(State.OUT_OF_MEMORY, host.line, host)
            return Ending(state, slurm.line, slurm)
    for patterns, state in ((TIME_OVER, State.TIMEOUT), (HOST_OOM, State.OUT_OF_MEMORY), (NODE_LOST, State.NODE_FAIL)):
        if found := _last(patterns, tail):
            return Ending(state, found.line, found)
    good = max((found for p in GOOD if (found := tail.last(p))), key=_offset, default=None)
    done = max((found for found in (draft.done, good) if found), key=_offset, default=None)
    found = _last(GPU_OOM, span) if draft.get("oom") is not None else None
    if found and found.offset > _offset(done):
        return Ending(State.OUT_OF_MEMORY, found.line, found)
    if failed and failed.offset > _offset(done):
        cancelled = CANCEL.search(failed.line)
        words = failed.get("words") or failed.line
        return Ending(State.CANCELLED if cancelled else State.FAILED, words, failed, _code(tail))
    if done or (not failed and (done := tail.last(SAID))):
        return Ending(State.COMPLETED, None, done, None)
    steps, planned = draft.get("steps"), draft.get("steps_planned")
    if steps and planned and steps >= planned and not draft.per_epoch:
        return Ending(State.COMPLETED, None, None)
    if not draft.usage and not draft.config and len(span) == 0:
        return Ending(State.UNKNOWN, "the log is empty", None)
    return Ending(State.INCOMPLETE, "the log stops without saying why", None)


def _cancelled(span: Span, worked: int) -> Found | None:
    """Slurm's word that it ended the job; null if work was done after it, as by a next job with the same log."""
    found = span.last(SLURM)
    if not found or worked >= found.offset + LATE_BARS:
        return None
    done = _last(TRAINED, span.after(found.offset))
    return None if done and done.offset < worked + LATE_BARS and worked > found.offset else found


def _last_word(tail: Span) -> Found | None:
    """The last line, if it reports an error."""
    last = tail.last(LAST_LINE)
    return last if last and (LEVEL.search(last.line) or ERROR.regex.search(last.text)) else None


def _failure(tail: Span, worked: int) -> Found | None:
    """The last error after the last sign of work: the words of a traceback before those of a launcher."""
    errors: list[Found] = []
    if trace := tail.first(TRACEBACK):
        errors = [found for found in tail.near(ERROR) if found.offset > trace.offset]
    errors = [found for found in errors if not _is_noise(found) and not _ignored(tail, found)]
    if trace and not errors and (found := tail.last(OTHER_ERROR)):
        errors = [found]
    fatal = [found for p in FATAL if (found := tail.last(p))]
    # A launcher reports that its child failed; the child's own words say why.
    own = [found for found in errors if "ChildFailedError" not in found.line and "CalledProcessError" not in found.line]
    chosen = (own or errors or [])[-1:] or sorted(fatal, key=_offset)[-1:]
    if not chosen and (said := _last_word(tail)) and said.offset > worked:
        return said
    if not chosen and trace and trace.offset >= worked and not _ignored(tail, trace):
        return trace  # what it says is cut off
    if not chosen or max(found.offset for found in [*errors, *fatal]) < worked:
        return None
    return chosen[0]


def _code(tail: Span) -> int | None:
    """The exit status that a launcher reports."""
    return next((whole(found["code"]) for p in FATAL if (found := tail.last(p)) and found.get("code")), None)


def _is_noise(found: Found) -> bool:
    return found.get("name") in ("SystemExit",) or "Warning" in found.line[:40]


def _ignored(tail: Span, error: Found) -> bool:
    """Whether the traceback that this error ends was ignored by the interpreter, as at its shutdown."""
    text = tail.log.text(max(tail.start, error.offset - 3000), error.offset)
    at = text.rfind(b"Traceback (most")
    return at >= 0 and b"Exception ignored in" in text[max(0, at - 300) : at]


def _out_of_memory(span: Span, worked: int) -> tuple[OutOfMemory, Found] | None:
    found = _last(GPU_OOM, span)
    if not found or found.offset < worked - LATE:
        return None
    line = span.log.text(found.offset, found.offset + 2000).partition(b"\n")[0].decode(errors="replace")
    before = span.last(RAN_OUT)  # where TensorFlow says how much
    return OutOfMemory(
        kind="gpu",
        tried_bytes=_size_of(TRIED, line) or (_size_of(TRIED, before.line) if before else None),
        capacity_bytes=_size_of(CAPACITY, line),
        in_use_bytes=_size_of(IN_USE, line),
    ), found


def _size_of(patterns: list[re.Pattern[str]], line: str) -> float | None:
    return next((size(match.group(1), binary=True) for p in patterns if (match := p.search(line))), None)


def _last(patterns: list[Pattern], span: Span) -> Found | None:
    return max((found for p in patterns if (found := span.last(p))), key=_offset, default=None)


def _offset(found: Found | None) -> int:
    return found.offset if found else -1
