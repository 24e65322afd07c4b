"""Which engine solves: the array-namespace solver everywhere, or compiled code for NumPy arrays."""

from __future__ import annotations

import importlib
from functools import cache

from .backend import NumPyBackend
from .problem import Problem

ENGINES = ("auto", "array", "compiled")


@cache
def compiled_engine():
    """The module `qpdiff.engines.compiled`, or None, and why."""
    try:
        return importlib.import_module(".engines.compiled", __package__), "it is built"
    except ImportError as error:
        return None, f"it was not built: {error}"


def choose_engine(name: str, problem: Problem, verbose: bool):
    """The compiled engine's module, or None for the array engine.

    Raises
    ------
    ValueError, ImportError
        For an unknown name, and where the compiled engine is asked for but cannot be had.
    """
    if name not in ENGINES:
        raise ValueError(f"engine is {name!r}; expected one of {', '.join(map(repr, ENGINES))}")
    if name == "array":
        return None
    numpy = isinstance(problem.backend, NumPyBackend)
    if name == "auto":
        # Lines on the progress of all problems at once need an engine that takes them in lock step.
        return compiled_engine()[0] if numpy and not verbose else None
    if not numpy:
        raise ValueError("engine is 'compiled', which takes NumPy arrays only; pass backend='numpy', or engine='auto'")
    if verbose:
        raise ValueError("engine is 'compiled', which takes one problem after the other; verbose needs engine='array'")
    module, reason = compiled_engine()
    if module is None:
        raise ImportError(f"engine='compiled' cannot run: {reason}")
    return module
