"""Any other training log: a bar, or lines that name a step and a loss in whatever words."""

from __future__ import annotations

from chiplog.ledger.bars import bars
from chiplog.ledger.draft import Draft
from chiplog.ledger.ending import TRACEBACK
from chiplog.ledger.lines import COST, EPOCH, METRIC, NAMED_TRAIN, Line, counted_lines, pace, so_far, training_lines
from chiplog.ledger.reader import BLOCK, Found, LogReader, Span, pattern
from chiplog.ledger.runs import take_bars, take_speed, training_bars, trains
from chiplog.ledger.units import COUNTS, duration, number, whole

VALIDATION = pattern(
    rb"(?i:\b(?:val(?:id(?:ation)?)?|eval|dev|test)[_/ ]?loss)[\"']?(?: *[=:]+ *| +)"
    rb"(?P<loss>\d[\d.]*(?:[eE][-+]?\d+)?|nan)",
    b"val", b"dev", b"test",
)  # fmt: skip
OVERALL = pattern(
    rb"Overall training speed: (?P<steps>\d+) iterations in (?P<time>(?:\d+ days?, )?\d+:\d\d:\d\d)",
    b"Overall training",
)
PLANNED = pattern(
    rb"(?i:(?<!per )(?:total|max|train|num|training)[_ ](?:(?:train(?:ing)?|optimization)[_ ])?"
    rb"(?:steps|iter(?:ation)?s)(?:[^\n:=\d(]{0,20}(?=:))?)[\"']?[ ,=:]+[\"']?(?P<total>\d[\d,]*+)(?![.\w])",
    b"steps", b"iters", b"iterations",
)  # fmt: skip
TIME = pattern(
    rb"(?i:train(?:ing)?(?:[ _](?:time|took|(?:done|finished|completed?) in|runtime|duration"
    rb"|seconds(?=:)))+)[^\d\n]{0,12}"
    rb"(?P<time>(?:\d+ days?, *)?\d+:\d\d:\d\d(?:\.\d+)?|[\d.]+ ?(?:s|sec|secs|seconds|min|mins|minutes|h|hrs?|hours)\b"
    rb"|\d+\.\d+$)(?: \((?P<step_s>[\d.]+) ?s / it\))?"
    rb"|(?i:took) (?P<took>[\d.]+ (?:sec(?:ond)?s?|min(?:ute)?s?|hours?)) to train"
    rb"|(?i:(?:completed|finished|done) training in) (?P<in>[\d.]+ ?s)\b"
    rb"|(?i:training complete)[^\n]{0,100}, (?P<all>\d+s)$"
    rb"|(?i:^the training code [^\n]{0,200} ran for )(?P<ran>[\d.]+m)$"
    rb"|(?i:\btrain(?:ing)? (?:finished|done|completed?) \(took )(?P<of>[\d.]+ ?s)\b",
    b"train time", b"train_time", b"training time", b"training_time", b"train took", b"training took", b"ing done",
    b"ing finished", b"ing complete", b"runtime", b"duration", b"training seconds", b"training_seconds", b"to train",
    b"training in", b"ran for", b"train finished", b"train done",
)  # fmt: skip
TIMES = ("time", "took", "in", "all", "ran", "of")
ELAPSED = pattern(
    rb"(?i:^[\W\d]{0,40}time[_ ]elapsed)[\"']? *[|:=]+ *(?P<time>[\d.:]+)"
    rb"|(?<![\d.])(?P<took>[\d.]{1,20} seconds) elapsed, finished|^[ \t]{4,60}Total time: (?P<all>[\d.]+s)$",
    b"elapsed", b"total time: ",
)  # fmt: skip
RESUMED = pattern(
    rb"(?i:\b(?:resum|restor|recover|continu)\w*\b[^\n]{0,200}?\b(?:step|iter(?:ation)?|global_step))[ =:_]*"
    rb"(?P<step>\d+)",
    b"resum", b"restor", b"recover", b"continu",
)  # fmt: skip
STEPS_PER_S = pattern(rb"global_step/sec: (?P<rate>[\d.]+)", b"global_step/sec: ")
SAVED = pattern(rb"(?i:^sav(?:ed|ing)\b[^\n]{0,200}?\b(?:global_)?step)[=: ]+(?P<step>\d+)\b", b"saved", b"saving")
NAMED_MEMORY = pattern(
    rb"(?:max_mem(?:ory)?_(?P<kind>allocated|reserved)|peak_(?:v?ram|mem(?:ory)?))_(?P<unit>[mg]i?b)[\"']?[:= ]+"
    rb"(?P<size>[\d.]+)",
    b"max_mem",
    b"peak_",
)
MEMORY = pattern(rb"(?i:(?:peak|max(?:imum)?)[_ ](?:gpu[_ ])?(?:mem(?:ory)?)(?:[_ ](?P<kind>alloc"
                 rb"(?:ated)?|reserved|active))?(?:[_ ]usage)?)"
                 rb"[^\d\n]{0,25}(?P<size>[\d.]+) ?(?P<unit>[MG]i?B)", b"mem")  # fmt: skip
RATE = pattern(
    rb"(?i:(?:tok(?:en)?s?(?:/s(?:ec(?:ond)?)?|_per_sec(?:ond)?| per second)|\btps)(?P<scope>/(?:device|gpu))?)"
    rb"[\"']?[=: ]+"
    rb"(?P<rate>[\d.,]+)(?P<scale>[kKM]?)\b|(?<![\d.,/])(?P<before>[\d.,]{1,20})(?P<factor>[kKM]?) tok(?:ens)?/s",
    b"tok", b"tps",
)  # fmt: skip
KIND = {"reserved": "reserved", "active": "active"}


def sniff(head: bytes, tail: bytes) -> float:
    return 0.1


def parse(log: LogReader) -> list[Draft]:
    return [run(log.whole, Draft(log.whole, None))]


def run(span: Span, draft: Draft) -> Draft:
    """Everything that is named in the usual words."""
    lines = training_lines(span)
    losses(draft, span, lines)
    lines = lines or training_lines(span, COST) or training_lines(span, NAMED_TRAIN)
    take_loss(draft, lines)
    lines = lines or training_lines(span, METRIC) or counted_lines(span)
    epochs(draft, span)
    take_bars(draft, training_bars(bars(span, trains)))
    steps(draft, span, lines)
    memory(draft, span, lines)
    times(draft, span, lines)
    if found := span.last(STEPS_PER_S):
        draft.default("steps_per_s", number(found["rate"]), found)
    if step_s := pace(lines):
        draft.default("steps_per_s", 1 / step_s, lines[-1].found)
    if draft.get("steps") is not None and (found := span.last(RATE)):
        rate = number(found.get("rate") or found.get("before"))
        scale = COUNTS[found.get("scale") or found.get("factor") or ""]
        if rate is not None and draft.default("tokens_per_s", rate * scale, found):
            draft.default("tokens_scope", "per_gpu" if found.get("scope") else "unknown")
    return draft


def times(draft: Draft, span: Span, lines: list[Line]) -> None:
    """Seconds of training, and with them the mean speed."""
    total, counted = _total(span) or span.last(ELAPSED), so_far(lines)
    if total and any(one.found.line_offset == total.line_offset for one in lines):
        total = None  # of a step
    step_s, done = pace(lines), draft.get("steps")
    if counted and step_s and done and done * step_s < counted / 2:
        counted = None  # of more than training
    said = counted and draft.default("train_s", counted, lines[-1].found)
    if total:
        said = draft.set("train_s", _seconds(total), total)
        if not lines or total.offset > lines[-1].found.offset:
            _done(draft, span, total)
        if step_s := number(total.get("step_s")):
            draft.set("mean_steps_per_s", 1 / step_s, total)
    if said and draft.get("steps"):
        take_speed(draft, draft.get("steps") - (draft.get("resumed_from") or 0), draft.get("train_s"))


def _done(draft: Draft, span: Span, found: Found) -> None:
    """Notes the end of training, unless an error stands before: some loops print their time then too."""
    if not span.before(found.offset).after(found.offset - BLOCK).last(TRACEBACK):
        draft.done = found


def _total(span: Span) -> Found | None:
    """Where the seconds of all training are named: a time that is named anew each epoch is not of all."""
    named = span.after(span.stop - BLOCK).near(TIME)
    totals = [found for found in named if found.before.lower().endswith("total ")] or named
    seconds = [value for found in totals if (value := _seconds(found))]
    return totals[-1] if seconds and max(seconds) <= 1.01 * min(seconds) else None


def _seconds(found: Found) -> float | None:
    return duration(next((value for name in TIMES if (value := found.get(name))), None))


def losses(draft: Draft, span: Span, lines: list[Line] | None = None) -> None:
    """First, last and validation losses."""
    lines = training_lines(span) if lines is None else lines
    take_loss(draft, lines)
    found = [value for f in span.near(VALIDATION) if (value := number(f["loss"])) is not None]
    draft.default("val_losses", found or None)


def take_loss(draft: Draft, lines: list[Line]) -> None:
    """First and last loss of these lines."""
    if lines:
        draft.default("loss_first", lines[0].loss, lines[0].found)
        draft.default("loss_last", lines[-1].loss, lines[-1].found)
        draft.worked(lines[-1].found)


def epochs(draft: Draft, span: Span) -> None:
    """The last epoch that is named, and how many are planned."""
    last = span.last(EPOCH)
    if not last:
        return
    line = span.after(last.line_offset).before(last.end)
    found = line.first(EPOCH) or last  # the line's first: other figures of the epoch may follow
    draft.default("epoch", number(found.get("epoch") or found.get("before")), found)
    draft.default("epochs", whole(found.get("epochs")), found)


def steps(draft: Draft, span: Span, lines: list[Line]) -> None:
    """The last step that a line names, and how many are planned."""
    counted = [one for one in lines if one.step is not None]
    if counted and counted[-1].step is not None:
        last = counted[-1]
        done, planned = _over_epochs(last, counted[0])
        if draft.default("steps", done, last.found):
            draft.worked(last.found)
        draft.default("steps_planned", planned, last.found)
    later = span.after(lines[-1].found.offset).last(SAVED) if counted else None
    if later and (draft.get("steps") or 0) < int(later["step"]) <= (draft.get("steps_planned") or int(later["step"])):
        draft.set("steps", int(later["step"]), later)
    if found := span.last(OVERALL):
        draft.default("steps", whole(found["steps"]), found)
        _done(draft, span, found)
        draft.default("train_s", duration(found["time"]), found)
        take_speed(draft, int(found["steps"]), duration(found["time"]))
    found = span.first(PLANNED)
    if found and not (lines and found.offset > lines[-1].found.offset):
        draft.default("steps_planned", whole(found["total"]), found)
    first = next((one.step for one in counted), None)
    if (found := span.first(RESUMED)) and first is not None:
        before = whole(found["step"]) or 0
        if before <= first <= 1.2 * before + 1000:
            draft.default("resumed_from", before, found)


def _over_epochs(last: Line, first: Line) -> tuple[int, int | None]:
    """Steps done and planned, of a counter that begins anew each of so many epochs."""
    done, total = last.step or 0, last.total
    if not total or done > total or last.epoch is None or not last.epochs:
        return done, total
    before = int(last.epoch) - (0 if first.epoch == 0 else 1)
    return max(0, before) * total + done, last.epochs * total


def memory(draft: Draft, span: Span, lines: list[Line]) -> None:
    """The largest peak that is named."""
    if draft.get("peak_mem_bytes") is None:
        named = span.near(NAMED_MEMORY)
        named = [found for found in named if found.get("kind") == "allocated"] or named
        for found in [*span.near(MEMORY), *named]:
            if "Platform" in found.line:  # what a card has, in Unsloth's banner
                continue
            kind = (found.get("kind") or "allocated").lower()
            draft.peak(f"{found['size']} {found['unit'].upper().replace('I', 'i')}", KIND.get(kind, "allocated"), found)
    if draft.get("peak_mem_bytes") is None:
        for one in lines:
            if one.memory:
                draft.peak(one.memory, "allocated", one.found)
