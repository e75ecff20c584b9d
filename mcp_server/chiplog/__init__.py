"""chiplog plans machine-learning experiments from what your jobs actually did."""

__version__ = "0.1.0"
