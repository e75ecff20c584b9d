"""Where a job ran: its id, its GPUs, how many processes, since when and how long."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from datetime import datetime

from chiplog.ledger.draft import Draft
from chiplog.ledger.reader import BLOCK, Found, Span, pattern
from chiplog.ledger.units import number, seconds

JOB_ID = [
    pattern(rb"\*\*\* (?:JOB|STEP) (?P<job>\d+)(?:[._]\w+)? (?:STEPD TERMINATED )?ON ", b"*** "),
    pattern(rb"StepId=(?P<job>\d+)", b"StepId="),
    pattern(rb"(?i:slurm[_ ]?job[_ ]?id)[\"']?[ :=]+[\"']?(?P<job>\d+(?:_\d+)?)\b", b"slurm"),
    pattern(rb"(?i:^[^\n]{0,20}\bjob[ _]?id)[\"']?[ :=]+[\"']?(?P<job>\d{3,}(?:_\d+)?)\b", b"job"),
    pattern(rb"/slurm[\w/]{0,40}/job(?P<job>\d+)/slurm_script", b"/slurm_script"),
    pattern(rb"^Job: (?P<job>\d{4,})\b", b"Job: "),
    pattern(rb"^Subject: Job (?P<job>\d+): <", b"Subject: Job "),
    pattern(rb"^srun: (?:Terminating (?:job )?step|job) (?P<job>\d+)\b", b"srun: "),
]
VENDORS = (b"NVIDIA", b"Tesla", b"GeForce", b"Quadro", b"AMD ")
GPU = [
    # A row of nvidia-smi's table, then its lists and CSV, then torch's and a library's own words.
    pattern(rb"^\| +\d+ +(?P<gpu>(?:NVIDIA |Tesla |GeForce |Quadro |AMD )[\w .-]+?) +(?:On|Off|N/A) +\|", *VENDORS),
    pattern(rb"^GPU \d+: (?P<gpu>[^\n(]+?) \(UUID", b"(UUID"),
    pattern(
        rb"(?P<gpu>(?:(?:NVIDIA|Tesla|GeForce|Quadro|AMD Instinct) ){1,3}(?:RTX |GTX |TITAN )?"
        rb"(?:(?:GH|GB|RTX|MI|[AHLVPTKB])-?\d{1,4}\w*|(?<=GTX )\d{3,4}|(?<=TITAN )\w+)"
        rb"(?:[ -](?:SXM\d?|PCIe|PCIE|NVL|Ti|SUPER|Ada Generation|HBM\d\w?|\d{2,3} ?GB|MIG \d\w\.\d+gb))*)",
        *VENDORS),
    pattern(rb"(?P<gpu>(?:TITAN (?:Xp|X|V|RTX)\b|GTX ?\d{3,4}|RTX ?A?\d{4}(?: ?Ti| SUPER| Ada(?: Generation)?)?"
            rb"|[AHV]\d00-(?:SXM\d?|PCI[Ee]|NVL)(?:-\d+GB)?))\b", b"RTX", b"GTX", b"TITAN", b"-SXM", b"-PCI", b"-NVL"),
    pattern(rb"\bdevice: \d+, name: (?P<gpu>[\w -]+), pci bus id", b"pci bus id"),
    pattern(rb"\bgres/gpu:(?P<gpu>[a-z]\w+)[:=]\d", b"gres/gpu:"),
]  # fmt: skip
N_GPUS = [
    pattern(rb"(?i:world[_ ]size)[\"']?(?:[:=]| \.+|(?= \d))[ :=.]*[\"']?(?P<n>\d{1,5})\b", b"world"),
    pattern(rb"\bNum GPUs(?: used| Available)?(?: =|:) +(?P<n>\d+)", b"Num GPUs"),
    pattern(rb"\bdist_world_size=(?P<n>\d+)", b"dist_world_size="),
    pattern(rb"(?i:num(?:ber)?[_ ](?:of[_ ])?(?:gpus|devices)|gpus?[_ ]count)[\"']?[ :=]+"
            rb"[\"']?(?P<n>\d{1,4})\b", b"gpus", b"devices", b"gpu_count",
            b"gpu count"),
    pattern(rb"\bWORLD_SIZE[ :=]+(?P<n>\d{1,5})\b", b"WORLD_SIZE"),
    pattern(rb"device mesh with \[[^\]\n]{1,100}\], \[(?P<n>\d+(?:, \d+)*)\]", b"device mesh with "),
    pattern(rb"\bnproc_per_node[= ]+(?P<n>\d{1,3})\b", b"nproc_per_node"),
    pattern(rb"\bgres/gpu(?::[a-z]\w+)?[:=](?P<n>\d+)", b"gres/gpu"),
    pattern(rb"^[^\n]{0,40}\bGPUs: (?P<n>\d{1,2})$|^Using +(?P<other>\d{1,2}) GPUs?\b", b"GPUs: ", b"Using "),
    pattern(rb"\bNGPUs Requested: +(?P<n>[1-9]\d*)", b"NGPUs Requested"),
    pattern(rb"^#BSUB -gpu [\"']?num=(?P<n>\d+)", b"#BSUB -gpu"),
]  # fmt: skip
LSF_RUN = pattern(rb"^ *Run time : +(?P<s>\d+) sec\.", b"Run time : ")
PBS_RUN = pattern(
    rb"(?:Walltime Used: +|resources_used\.walltime ?= ?|\bRunTime=)(?P<time>(?:\d+[:-])?\d+:\d\d:\d\d)",
    b"alltime", b"RunTime=",
)  # fmt: skip
STARTED = pattern(
    rb"(?i:^[# ]*(?:job[ _]?(?:started|start time|start)|start(?:ing|ed)?(?: the)? job)(?: at| on)?) *(?:: *\n?|\n)"
    rb"(?P<at>[^\n#]+)",
    b"job start", b"job_start", b"jobstart", b"start job", b"starting job", b"started job", b"the job",
)  # fmt: skip
ENDED = pattern(
    rb"(?i:^[# ]*job[ _]?(?:ended|finished|completed?|end time|end)(?: at| on)?) *(?:: *\n?|\n)(?P<at>[^\n#]+)",
    b"job end", b"job_end", b"jobend", b"job finished", b"job complete",
)  # fmt: skip
STAMP = pattern(rb"^[^\n]{0,40}?\b(?P<at>20\d\d-\d\d-\d\d[ T]\d\d:\d\d:\d\d)", b"-- ::", b"--T::")
CANCELLED = pattern(rb"CANCELLED AT (?P<at>[\dT:-]{19})", b" CANCELLED AT ")
SMI_MEMORY = pattern(rb"\| +(?P<used>\d+)MiB / +\d+MiB +\|", b"MiB / ")
WORKED = 100  # MiB on a card that stand for a job
SMI_ROW = pattern(rb"^\| +(?P<id>\d+) +(?:NVIDIA|Tesla|GeForce|Quadro|AMD)[\w .-]+? +(?:On|Off|N/A) +\|", *VENDORS)
TF_DEVICE = pattern(
    rb"Created (?:TensorFlow )?device \(?/job:[^\n]{0,1500}?/device:GPU:(?P<id>\d+) "
    rb"|Creating TensorFlow device \(/(?:device:)?gpu:(?P<other>\d+)\)",
    b"device:GPU:", b"Creating TensorFlow device",
)  # fmt: skip
JAX_DEVICE = pattern(rb"\b(?:Gpu|Cuda)Device\(id=(?P<id>\d+)", b"Device(id=")
RANK = pattern(
    rb"\bProcess rank: (?P<id>\d+), device: cuda|^Using GPU\d+ [^\n]{0,80}\(Rank (?P<other>\d+)\)",
    b"Process rank: ", b"Using GPU",
)  # fmt: skip
SMI_LIST = pattern(rb"^GPU (?P<id>\d+): [^\n]+\(UUID", b"(UUID")


def place(draft: Draft, span: Span) -> None:
    """Notes what the log says of where it ran."""
    whole_log = span.log.whole
    outside = len(whole_log) > len(span)  # what stands before the first of several runs is true of all
    for wanted in JOB_ID:
        if draft.get("job_id") is None and (found := whole_log.last(wanted) or whole_log.any(wanted)):
            draft.set("job_id", found["job"], found)
    for wanted in GPU:
        if draft.get("device") is None and (
            found := span.any(wanted) or (whole_log.first(wanted) if outside else None)
        ):
            draft.set("device", " ".join(found["gpu"].split()), found)
    _count(draft, span)
    _times(draft, span)
    if draft.get("peak_mem_bytes") is None:
        for found in span.near(SMI_MEMORY):
            if int(found["used"]) > WORKED:
                draft.peak(f"{found['used']} MiB", "whole_card", found)


def _times(draft: Draft, span: Span) -> None:
    """When it started and ended, and how long it was: as a prologue and an epilogue say, or the scheduler itself.

    Where none of them says when, the first and the last stamp do; they are not the job's start and end to the second,
    and no duration is made of them.
    """
    log = span.log.whole
    start, end = log.first(STARTED), log.last(ENDED)
    told, cancelled = log.last(LSF_RUN) or log.last(PBS_RUN), end or log.last(CANCELLED)
    if told:
        draft.set("elapsed_s", number(told.get("s")) or seconds(told.get("time")), told)
    elif (began := _date(start)) and (stopped := _date(cancelled)) and stopped >= began:
        draft.set("elapsed_s", (stopped - began).total_seconds(), cancelled)
    first = start or span.before(span.start + BLOCK).first(STAMP)
    last = end or span.after(span.stop - BLOCK).last(STAMP)
    for name, found in (("started", first), ("ended", last)):
        if at := _date(found):
            draft.default(name, at.isoformat(), found)


def _date(found: Found | None) -> datetime | None:
    return date(found["at"]) if found else None


def date(text: str) -> datetime | None:
    """A date as `date` prints it in an English or C locale, or ISO 8601; the zone is left out."""
    words = re.sub(r"\b(?:[A-Z]{3,4}T?|[+-]\d{4})(?= \d{4}$)", "", " ".join(text.split()))
    for form in ("%a %b %d %I:%M:%S %p %Y", "%a %b %d %H:%M:%S %Y", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M:%S"):
        with suppress(ValueError):
            return datetime.strptime(" ".join(words.split()), form)
    return None


def _count(draft: Draft, span: Span) -> None:
    """How many GPUs: what the framework says, else the processes, else the cards that are listed."""
    if draft.get("gpus") is not None:
        return
    for wanted in N_GPUS:
        if (found := span.first(wanted)) and (
            n := math.prod(int(part) for part in (found.get("n") or found["other"]).split(","))
        ):
            draft.set("gpus", n, found)
            return
    for wanted in (SMI_ROW, SMI_LIST, TF_DEVICE, JAX_DEVICE, RANK):
        rows = [found for found in span.near(wanted)]
        n = len({found.get("id") or found.get("other") for found in rows})
        if n > 1 or (rows and wanted is not RANK):  # one rank alone may be all that logs
            draft.set("gpus", n, rows[0])
            return
