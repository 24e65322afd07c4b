"""The choice of the engine: the compiled one where it can solve the problems, else the array engine."""

from __future__ import annotations

import importlib
import logging
from functools import cache

from ..problem import Problem
from .array import engine as array
from .base import Engine

ENGINES = ("auto", "array", "compiled")


_BUILD = "pip install --no-binary qpdiff qpdiff builds it, with a C++20 compiler"
_log = logging.getLogger(__name__)


@cache
def compiled_engine():
    """Return the module of the compiled engine, or None, and the reason."""
    try:
        compiled = importlib.import_module(".compiled", __package__)
    except ImportError as error:
        reason = f"it was not built for this machine ({_BUILD}): {error}"
        _log.warning("the array engine solves, and not the compiled one, which is many times faster: %s", reason)
        return None, reason
    return compiled, f"built ahead of time for {compiled.INSTRUCTIONS}"


def choose_engine(name: str, problem: Problem, verbose: bool) -> Engine:
    """Find the engine that solves these problems.

    Raises
    ------
    ValueError, ImportError
        For an unknown name, and where the compiled engine is asked for but cannot be had.
    """
    if name not in ENGINES:
        raise ValueError(f"engine is {name!r}; expected one of {', '.join(map(repr, ENGINES))}")
    if name == "array":
        return array
    compiled, reason = compiled_engine()
    refusal = compiled.refusal(problem, verbose) if compiled else None
    if name == "auto":
        return compiled if compiled and refusal is None else array
    if compiled is None:
        raise ImportError(f"engine='compiled' cannot run: {reason}")
    if refusal is not None:
        raise ValueError(f"engine is 'compiled', which {refusal}")
    return compiled
