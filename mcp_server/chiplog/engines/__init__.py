"""Where jobs run: this machine (the embedded default), or a cluster."""

from chiplog.engines.job import Engine, Job
from chiplog.engines.local import LocalEngine

__all__ = ["Engine", "Job", "LocalEngine", "engine_for"]


def engine_for(name: str = "local") -> Engine:
    """The engine of that name."""
    engines: dict[str, type[Engine]] = {LocalEngine.name: LocalEngine}
    return engines[name]()
