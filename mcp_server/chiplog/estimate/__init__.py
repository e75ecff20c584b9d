"""What a run will need, from what past runs did; and the evidence for it."""

from chiplog.estimate.history import estimate_run
from chiplog.estimate.model import NAMED, Estimate, RunEstimate, Workload
from chiplog.estimate.workload import workload

__all__ = ["NAMED", "Estimate", "RunEstimate", "Workload", "estimate_run", "workload"]
