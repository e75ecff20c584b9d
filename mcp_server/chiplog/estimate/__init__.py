"""What a run will need, from what past runs did; and the evidence for it."""

from chiplog.estimate.model import NAMED, Estimate, RunEstimate, Term, Workload
from chiplog.estimate.workload import workload

__all__ = ["NAMED", "Estimate", "RunEstimate", "Term", "Workload", "workload"]
