"""The command line: solve the problems of a file, draw that, check their gradients, tell what is installed.

A file is a NumPy ``.npz`` with the arrays Q, q and any of G, h, A, b, lb, ub, with or without batch axes, or an MPS,
QPS or LP file. The objective is printed and saved as the file states it: with its constant term, and maximised where it
says so. All else of a solution is that of the problem that is minimised, see `qpdiff.files.read_problem`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import qpdiff

from .engines.choice import compiled_engine
from .files import read_problem
from .problem import OPERANDS
from .solution import FIELDS

app = typer.Typer(help=qpdiff.__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console, errors = Console(), Console(stderr=True)

ROWS_SHOWN = 20
BLOCK = 256
"""Problems solved between two moves of the progress bar."""
FileArgument = Annotated[
    Path, typer.Argument(help="a .npz with Q, q and any of G, h, A, b, lb, ub; or .mps, .qps, .lp")
]
BackendOption = Annotated[str | None, typer.Option(help="numpy, cupy, torch or jax")]


@app.command()
def solve(
    file: FileArgument,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="write the solution to this .npz file")] = None,
    backend: BackendOption = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or float64, to compute in and to write")] = None,
    tol: Annotated[float | None, typer.Option(help="absolute tolerance")] = None,
    rtol: Annotated[float | None, typer.Option(help="relative tolerance")] = None,
    max_iterations: Annotated[int | None, typer.Option(help="limit on the iterations")] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="refuse bad numbers in the operands, such as an indefinite Q")
    ] = True,
) -> None:
    """Solve the problems of FILE; exit code 1 if one is not solved, 2 for bad input."""
    options = {
        "backend": backend, "dtype": dtype, "tol": tol, "rtol": rtol, "max_iterations": max_iterations, "check": check
    }  # fmt: skip
    options = {name: value for name, value in options.items() if value is not None}
    in_double_precision(backend)
    with bad_input_exits(file):
        problem = read_problem(file)
        result = solve_in_blocks(problem.operands, options)
        result["objective"] = problem.objective(result["objective"])
        if output is not None:
            np.savez(output, allow_pickle=False, **result)
    console.print(problem_table(result) if result["status"].size <= ROWS_SHOWN else summary_table(result))
    if np.any(result["status"] != qpdiff.Status.SOLVED):
        raise typer.Exit(1)


@app.command()
def check(
    file: FileArgument,
    backend: BackendOption = None,
    step: Annotated[float, typer.Option(help="step of the differences")] = 1e-5,
    directions: Annotated[int, typer.Option(help="random directions for each operand", min=1)] = 5,
    threshold: Annotated[float, typer.Option(help="largest relative error that passes")] = 1e-4,
    seed: int = 0,
) -> None:
    """Compare the gradients of the problems of FILE with finite differences; exit code 1 where they differ.

    The differences are central ones. Q has to stay positive semidefinite: where it is singular, as in a linear program,
    it moves along positive semidefinite directions, and only forward.
    """
    rng = np.random.default_rng(seed)
    tight = {"backend": backend, "dtype": "float64", "tol": 1e-12, "rtol": 1e-12}
    in_double_precision(backend)
    with bad_input_exits(file):
        operands = read_problem(file).operands
        sol = qpdiff.solve_qp(**operands, **tight)
        if {"lb", "ub"} <= set(operands):  # of one shape, because they move together where they are equal
            operands["lb"], operands["ub"] = np.broadcast_arrays(operands["lb"], operands["ub"])
            sol = qpdiff.solve_qp(**operands, **tight)
    status = np.atleast_1d(to_numpy(sol.status))
    if np.any(status != qpdiff.Status.SOLVED):
        errors.print(f"{file}: {np.sum(status != qpdiff.Status.SOLVED)} of {status.size} problems are not solved")
        raise typer.Exit(1)
    cotangent = rng.normal(size=sol.x.shape)
    gradients = {name: to_numpy(value) for name, value in qpdiff.vjp(sol, x=cotangent)._asdict().items()}

    def loss(changed):
        moved = qpdiff.solve_qp(**(operands | changed), **tight)
        solved = np.all(to_numpy(moved.status) == qpdiff.Status.SOLVED)
        return float(np.sum(cotangent * to_numpy(moved.x))) if solved else np.nan

    here, failed = loss({}), False
    if jumps(loss, here, operands["q"], step * rng.normal(size=operands["q"].shape)):
        console.print(f"{file}: the solution of a problem is not unique, so it has no derivative to compare with")
        return
    table = Table("operand", "largest relative error", "verdict", title=f"gradients of sum(c·x), {file.name}")
    with progress_bar("differences", len(operands) * directions) as advance:
        for name in operands:
            worst, kinks = 0.0, 0
            for _ in range(directions):
                tangents = direction(rng, name, operands, step)
                slope, right, left = slopes(loss, here, tangents, operands, to_numpy(sol.x), step)
                pulled = float(sum(np.sum(gradients[other] * tangent) for other, tangent in tangents.items()))
                size = max(abs(pulled), abs(slope), 1e-2 * float(np.linalg.norm(cotangent)))
                advance()
                if abs(right - left) <= 0.01 * size and np.isfinite(slope):
                    worst = max(worst, abs(slope - pulled) / size)
                else:
                    kinks += 1
            failed |= worst > threshold
            verdict = "[red]differs[/red]" if worst > threshold else "[green]agrees[/green]"
            if kinks == directions:
                verdict = "not differentiable here"
            elif kinks:
                verdict += f" ({kinks} of {directions} directions left out: a weakly active constraint, or no solution)"
            table.add_row(name, f"{worst:.1e}", verdict)
    console.print(table)
    if failed:
        raise typer.Exit(1)


@app.command()
def show(
    file: FileArgument,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="the picture, .png or .svg; by default FILE's name with .png")
    ] = None,
) -> None:
    """Draw how the problems of FILE are solved: their convergence and, in two variables, the way to the solution."""
    output = output or Path(file.stem).with_suffix(".png")
    with bad_input_exits(file):
        from .show import draw  # only here: Matplotlib is not needed for the rest

        draw(read_problem(file).operands).savefig(output, dpi=150)
    console.print(f"{output} written")


@app.command()
def info() -> None:
    """Tell what is installed, which backends and engine run, and the threads and GPU they have."""
    table = Table("what", "version", "note", title="qpdiff")
    table.add_row("qpdiff", qpdiff.__version__, "")
    table.add_row("Python", platform.python_version(), platform.platform())
    table.add_row("processors", str(os.cpu_count()), blas_threads())
    operands = {"Q": np.eye(2), "q": np.ones(2), "lb": np.zeros(2)}
    for name, package in (("numpy", "numpy"), ("cupy", "cupy"), ("torch", "torch"), ("jax", "jax")):
        table.add_row(
            f"backend {name}", version(package), runs(name, operands) if importlib_has(package) else "not installed"
        )
    table.add_row("engine", *engine())
    for package in ("scipy", "array-api-compat", "threadpoolctl", "autograd", "dask", "cvxpy", "highspy"):
        table.add_row(package, version(package), "")
    console.print(table)


# ---- numbers


def to_numpy(value) -> np.ndarray:
    """Return an array of any library on the host."""
    if hasattr(value, "get"):
        return value.get()
    return np.asarray(value.cpu() if hasattr(value, "cpu") else value)


def solve_in_blocks(operands: dict[str, np.ndarray], options: dict) -> dict[str, np.ndarray]:
    """Solve along the first batch axis in blocks, with a progress bar where there are many."""
    leading = {name: value.shape[: value.ndim - len(OPERANDS[name])] for name, value in operands.items()}
    batch = np.broadcast_shapes(*leading.values())
    if not batch or int(np.prod(batch)) <= BLOCK:
        sol = qpdiff.solve_qp(**operands, **options)
        return {name: to_numpy(getattr(sol, name)) for name in FIELDS}
    rows = max(1, BLOCK // int(np.prod(batch[1:])))
    batched = {name for name, shape in leading.items() if len(shape) == len(batch) and shape[0] != 1}
    parts = []
    with progress_bar("problems", int(np.prod(batch))) as advance:
        for start in range(0, batch[0], rows):
            block = {k: v[start : start + rows] if k in batched else v for k, v in operands.items()}
            sol = qpdiff.solve_qp(**block, **options)
            parts.append({name: to_numpy(getattr(sol, name)) for name in FIELDS})
            advance(parts[-1]["status"].size)
    return {name: np.concatenate([part[name] for part in parts]) for name in FIELDS}


def direction(rng: np.random.Generator, name: str, operands, step: float) -> dict[str, np.ndarray]:
    """Draw a random tangent of an operand, and of the bound that it moves, along which the problem keeps its kind.

    That of Q is symmetric, and positive semidefinite where Q is too close to singular for a step the other way. That of
    a bound is 0 where it is infinite. A fixed variable stays fixed, and a bound does not pass the other one.
    """
    value = operands[name]
    tangent = rng.normal(size=value.shape)
    if name == "Q":
        both_ways = (tangent + np.swapaxes(tangent, -1, -2)) / 2
        if keeps_definite(value, step * both_ways):
            return {name: both_ways}
        return {name: tangent @ np.swapaxes(tangent, -1, -2) / value.shape[-1]}
    tangent = np.where(np.isfinite(value), tangent, 0.0)
    if name not in ("lb", "ub") or not {"lb", "ub"} <= set(operands):
        return {name: tangent}
    gap = operands["ub"] - operands["lb"]
    limit = np.where(gap > 0, gap / (2 * step), np.inf)
    tangent = np.clip(tangent, -limit, limit)
    return {name: tangent, "ub" if name == "lb" else "lb": np.where(gap > 0, 0.0, tangent)}


def jumps(loss, here: float, q: np.ndarray, change: np.ndarray) -> bool:
    """Return whether a loss jumps: a hundredth of a change of q changes it as much as all of it, or leaves no value.

    So it is where x is not unique: the smallest change of q leaves few of the solutions, or none.
    """
    once, little = (abs(loss({"q": q + size * change}) - here) for size in (1.0, 0.01))
    return not little <= 0.1 * once + 1e-5 * (1.0 + abs(here))


def slopes(loss, here: float, tangents, operands, x, step: float) -> tuple[float, float, float]:
    """Estimate the slope of a loss along tangents, to second or third order, and those to the right and the left.

    The last two differ where there is a kink. A change of Q moves the solution as one of q by (change of Q) x does, to
    first order: that tells a kink where Q cannot move to the left.
    """

    def differences(tangents):
        above, below = (
            loss({name: operands[name] + size * tangent for name, tangent in tangents.items()})
            for size in (step, -step)
        )
        return (above - below) / (2 * step), (above - here) / step, (here - below) / step

    Q = tangents.get("Q")
    if Q is None or keeps_definite(operands["Q"], step * Q):
        return differences(tangents)
    once, twice, thrice = (loss({"Q": operands["Q"] + count * step * Q}) for count in (1, 2, 3))
    _, right, left = differences({"q": (Q @ x[..., None])[..., 0]})
    return (18 * once - 9 * twice + 2 * thrice - 11 * here) / (6 * step), right, left


def keeps_definite(Q: np.ndarray, change: np.ndarray) -> bool:
    """Return whether Q minus the change is positive definite, with as much left as the change takes."""
    return bool(np.min(np.linalg.eigvalsh(Q)) > 2 * np.max(np.linalg.norm(change, 2, axis=(-2, -1))))


# ---- what is printed


def problem_table(result: dict[str, np.ndarray]) -> Table:
    """Make a table with a row for each problem."""
    table = Table("problem", title="primal and dual residual, duality gap")
    for heading in ("status", "iterations", "objective", "primal", "dual", "gap"):
        table.add_column(heading, no_wrap=True)
    for index in np.ndindex(result["status"].shape):
        status = qpdiff.Status(int(result["status"][index]))
        color = "green" if status is qpdiff.Status.SOLVED else "red"
        table.add_row(
            ", ".join(map(str, index)) or "0",
            f"[{color}]{status.name}[/{color}]",
            str(result["iterations"][index]),
            f"{result['objective'][index]:.8g}",
            *(f"{result[name][index]:.1e}" for name in ("primal_residual", "dual_residual", "duality_gap")),
        )
    return table


def summary_table(result: dict[str, np.ndarray]) -> Table:
    """Make a table with a row for each status, and the first few problems that have it where it is not SOLVED."""
    table = Table(
        "status", "problems", "iterations (min, median, max)", "worst primal", "worst dual", "worst gap", "first"
    )
    for status in qpdiff.Status:
        chosen = result["status"] == status
        if not np.any(chosen):
            continue
        iterations = result["iterations"][chosen]
        first = (
            ""
            if status is qpdiff.Status.SOLVED
            else "; ".join(", ".join(map(str, index)) for index in np.argwhere(chosen)[:3].tolist())
        )
        table.add_row(
            status.name,
            str(int(np.sum(chosen))),
            f"{iterations.min()}, {np.median(iterations):g}, {iterations.max()}",
            *(f"{result[name][chosen].max():.1e}" for name in ("primal_residual", "dual_residual", "duality_gap")),
            first,
        )
    return table


@contextmanager
def progress_bar(what: str, total: int) -> Iterator:
    """Show a progress bar on standard error where that is a terminal; the value is the function that moves it."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, disable=not errors.is_terminal, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count=1: progress.advance(task, count)


@contextmanager
def bad_input_exits(file: Path) -> Iterator[None]:
    """Report an error in the user's input as one line, with exit code 2."""
    try:
        yield
    except (OSError, ValueError, TypeError, ImportError) as error:
        text = str(error) if str(file) in str(error) else f"{file}: {error}"
        errors.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error


# ---- what is installed


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
    """Return whether a small problem can be solved with this backend, and where."""
    try:
        sol = qpdiff.solve_qp(**operands, backend=name)
        np.testing.assert_allclose(to_numpy(sol.x), 0.0, atol=1e-3)
    except Exception as error:  # whatever a broken installation or a missing driver raises is the answer
        return f"does not run: {type(error).__name__}: {error}".splitlines()[0]
    if name == "cupy":
        import cupy

        return f"runs on {cupy.cuda.runtime.getDeviceProperties(0)['name'].decode()}"
    return "runs"


def engine() -> tuple[str, str]:
    """Return which engine solves NumPy arrays, and why."""
    module, reason = compiled_engine()
    return "compiled" if module else "array", reason


def blas_threads() -> str:
    """Return the threads of the linear algebra libraries, where threadpoolctl can tell."""
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return "threads unknown (pip install 'qpdiff[threads]')"
    pools = [f"{pool['internal_api']}: {pool['num_threads']} threads" for pool in threadpool_info()]
    return ", ".join(pools)
