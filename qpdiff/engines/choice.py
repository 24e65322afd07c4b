"""The choice of the engine: the compiled one where it can solve the problems, else the array engine."""

from __future__ import annotations

import importlib
import logging
import os
from contextlib import suppress
from functools import cache

from ..problem import Problem
from .array import engine as array
from .base import CompiledEngine, Engine
from .densified import Densified
from .hosted import Hosted

ENGINES = ("auto", "array", "compiled")
GPU_SWITCH = "QPDIFF_GPU_ENGINE"
"""The variable of the environment that is 1 where "auto" is to take the kernels for GPUs, which none has run yet."""
_BUILD = "pip install --no-binary qpdiff qpdiff builds it, with a C++20 compiler"
DENSE_BYTES = 2**31
"""Memory up to which sparse matrices are made dense."""
_log = logging.getLogger(__name__)
with suppress(ImportError):  # now, or the first solve would take 6 ms more; if it is missing, that one says so
    importlib.import_module(".compiled.sparse_engine", __package__)


@cache
def compiled_engine() -> tuple[CompiledEngine | None, str]:
    """Return the module of the compiled engine for NumPy arrays, or None, and the reason."""
    try:
        compiled = importlib.import_module(".compiled.engine", __package__)
    except ImportError as error:
        reason = f"it was not built for this machine ({_BUILD}): {error}"
        _log.warning("the array engine solves, and not the compiled one, which is many times faster: %s", reason)
        return None, reason
    return compiled, f"built ahead of time for {compiled.INSTRUCTIONS}"


def sparse_engine() -> tuple[CompiledEngine | None, str]:
    """Return the module of the compiled engine for sparse NumPy arrays, or None, and the reason."""
    compiled, reason = compiled_engine()
    return (_sparse_module() if compiled else None), reason


@cache
def _sparse_module():
    return importlib.import_module(".compiled.sparse_engine", __package__)


def gpu_engine() -> tuple[CompiledEngine | None, str]:
    """Return the module of the compiled engine for arrays on an NVIDIA GPU, or None, and the reason."""
    try:
        gpu = importlib.import_module(".compiled.gpu", __package__)
    except ImportError as error:  # the extension has the sizes of what the kernels store
        return None, f"it was not built for this machine ({_BUILD}): {error}"
    missing = gpu.missing()
    return (None, missing) if missing else (gpu, "its kernels are compiled at first use")


def check_engine(name) -> None:
    """Raise a ValueError for an unknown name."""
    if name not in ENGINES:
        raise ValueError(f"engine is {name!r}; expected one of {', '.join(map(repr, ENGINES))}")


def choose_engine(name: str, problem: Problem, verbose: bool) -> Engine:
    """Find the engine that solves these problems.

    Raises
    ------
    ValueError, ImportError
        For an unknown name, and where the compiled engine is asked for but cannot be had.
    """
    check_engine(name)
    return _for_sparse(name, problem, verbose) if problem.sparse else _for_dense(name, problem, verbose)


def _for_dense(name: str, problem: Problem, verbose: bool) -> Engine:
    on_gpu = problem.backend.gpu is not None
    if name == "array":
        return array
    if name == "auto":
        compiled, _ = automatic_engine(on_gpu)
        if compiled and compiled.refusal(problem, verbose) is None and compiled.suits(problem):
            return compiled
        return array
    compiled, reason = gpu_engine() if on_gpu else compiled_engine()
    if compiled is None:
        raise ImportError(f"engine='compiled' cannot run: {reason}")
    if (refusal := compiled.refusal(problem, verbose)) is not None:
        raise ValueError(f"engine is 'compiled', which {refusal}")
    return compiled


def _for_sparse(name: str, problem: Problem, verbose: bool) -> Engine:
    """Find the engine of sparse problems: the compiled one for sparse matrices, or one for dense ones.

    That is where it takes fewer operations, as the factor fills up, and where there is no other.
    """
    compiled, missing = sparse_engine()
    if compiled and problem.backend.to_host(problem.q) is not None:
        compiled = Hosted(compiled)
    reason: str | None = missing
    if name == "array":
        reason = "engine='array' was asked for"
    elif compiled:
        refusal = compiled.refusal(problem, verbose)
        reason = refusal and f"it {refusal}"
    if compiled and reason is None:
        if compiled.suits(problem) or problem.dense_bytes > DENSE_BYTES:
            return compiled
    elif problem.dense_bytes > DENSE_BYTES:
        raise MemoryError(
            f"the sparse matrices would take {problem.dense_bytes / 2**30:.1f} GiB as dense ones; the compiled engine "
            f"takes them as they are, but {reason}"
        )
    engine = _for_dense(name, problem, verbose)
    if reason is not None and name != "array":
        _say_dense_once(reason)
    return Densified(engine)


@cache
def _say_dense_once(reason: str) -> None:
    _log.warning("sparse matrices are made dense; the compiled engine takes them as they are, but %s", reason)


def automatic_engine(on_gpu: bool) -> tuple[CompiledEngine | None, str]:
    """Return the module of the compiled engine that "auto" takes where it suits, and the reason.

    Where "auto" takes none, None, and what is to be said of the compiled one.
    """
    compiled, reason = gpu_engine() if on_gpu else compiled_engine()
    if compiled is None:
        return None, f"does not run: {reason}"
    if on_gpu and os.environ.get(GPU_SWITCH) != "1":
        return None, f"is off, as no GPU has run its kernels yet; {GPU_SWITCH}=1 switches it on"
    return compiled, reason


def explain_choice(name: str, problem: Problem, verbose: bool = False, device=None) -> str:
    """Say which engine solves these problems, on which device, and why, or why not the compiled one.

    By default the device is that of the operands.
    """
    chosen = choose_engine(name, problem, verbose)
    on_gpu = problem.backend.gpu is not None
    made_dense = ", matrices made dense" if isinstance(chosen, Densified) else ""
    if isinstance(chosen, Densified):
        chosen = chosen.engine
    if name == "array":
        reason = "engine='array'"
    elif chosen is array:
        compiled, reason = automatic_engine(on_gpu)
        if compiled is not None:
            reason = compiled.refusal(problem, verbose) or "is slower for so many problems of this size"
        reason = f"the compiled one {reason}"
    else:
        _, reason = gpu_engine() if on_gpu else compiled_engine()
    if device is None:
        device = getattr(problem.q, "device", "cpu")  # JAX's backend leaves the device to JAX
    return f"{'array' if chosen is array else 'compiled'} engine on {device}{made_dense}: {reason}"
