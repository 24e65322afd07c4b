"""What is installed, and what of it runs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform

import numpy as np
from rich.markup import escape
from rich.table import Table

import qpdiff

from ..engines.choice import automatic_engine, explain_choice
from .arrays import to_numpy


def versions_table() -> Table:
    """Make a table of what is installed, which backends and engine run, and the threads and GPU they have."""
    table = Table("what", "version", "note", title="Versions, backends and engines")

    def row(*cells: str) -> None:
        table.add_row(*map(escape, cells))

    row("qpdiff", qpdiff.__version__, "")
    row("Python", platform.python_version(), platform.platform())
    row("processors", str(os.cpu_count()), blas_threads())
    operands = {"Q": np.eye(2), "q": np.ones(2), "lb": np.zeros(2)}
    for name, package in (("numpy", "numpy"), ("cupy", "cupy"), ("torch", "torch"), ("jax", "jax")):
        row(f"backend {name}", version(package), runs(name, operands) if importlib_has(package) else "not installed")
    row("engine", *engine(on_gpu=False))
    row("engine on a GPU", *engine(on_gpu=True))
    for package in ("scipy", "array-api-compat", "threadpoolctl", "autograd", "dask", "cvxpy", "highspy"):
        row(package, version(package), "")
    return table


def in_double_precision(backend: str | None) -> None:
    """Let JAX preserve the float64 of a file, which it would not by itself."""
    if backend == "jax" and importlib_has("jax"):
        import jax

        jax.config.update("jax_enable_x64", True)


def importlib_has(package: str) -> bool:
    """Return whether a package can be imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def version(package: str) -> str:
    """Return the version of an installed distribution; CuPy's has a name for each CUDA."""
    names = ("cupy-cuda13x", "cupy-cuda12x", "cupy") if package == "cupy" else (package,)
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "-"


def runs(name: str, operands) -> str:
    """Return whether a small problem can be solved with this backend, and by which engine and where."""
    try:
        sol = qpdiff.solve_qp(**operands, backend=name)
        np.testing.assert_allclose(to_numpy(sol.x), 0.0, atol=1e-3)
    except Exception as error:  # whatever a broken installation or a missing driver raises is the answer
        return f"does not run: {type(error).__name__}: {error}".splitlines()[0]
    chosen = explain_choice("auto", sol.linearization.problem)
    if name == "cupy":
        import cupy

        return f"runs on {cupy.cuda.runtime.getDeviceProperties(0)['name'].decode()}, {chosen}"
    return f"runs, {chosen}"


def engine(on_gpu: bool) -> tuple[str, str]:
    """Return which engine solves arrays in main memory, or on an NVIDIA GPU, and why."""
    compiled, reason = automatic_engine(on_gpu)
    return ("array", f"the compiled one {reason}") if compiled is None else ("compiled", reason)


def blas_threads() -> str:
    """Return the threads of the linear algebra libraries, where threadpoolctl can tell."""
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return "threads unknown (pip install 'qpdiff[threads]')"
    import scipy.linalg  # noqa: F401  whose BLAS is found only once it is loaded

    pools = [f"{pool['internal_api']}: {pool['num_threads']} threads" for pool in threadpool_info()]
    return ", ".join(pools)
