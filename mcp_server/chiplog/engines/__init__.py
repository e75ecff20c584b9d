"""Where jobs run: this machine (the embedded default), or a cluster."""

from chiplog.engines.job import After, Batch, Engine, Job, Queue, followed, withdrawn
from chiplog.engines.local import LocalEngine
from chiplog.engines.slurm import SlurmEngine
from chiplog.errors import EngineError

__all__ = [
    "After",
    "Batch",
    "Engine",
    "Job",
    "LocalEngine",
    "Queue",
    "SlurmEngine",
    "engine_for",
    "followed",
    "withdrawn",
]


def engine_for(name: str = "local") -> Engine:
    """The engine of that name. Raises EngineError if there is none."""
    engines: dict[str, type[Engine]] = {LocalEngine.name: LocalEngine, SlurmEngine.name: SlurmEngine}
    if name not in engines:
        raise EngineError(
            f"there is no engine {name!r}: there is {', '.join(engines)}. If jobs.jsonl names it, mend that line, "
            "or use the chiplog that submitted the job"
        )
    return engines[name]()
