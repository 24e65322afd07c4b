"""The command line: solve the problems of a file, draw that, check their gradients, tell what is installed.

A file is a NumPy ``.npz`` with the arrays Q, q and any of G, h, A, b, lb, ub, with or without batch axes, or an MPS,
QPS or LP file. The objective is printed and saved as the file states it: with its constant term, and maximised where it
says so. All else of a solution is that of the problem that is minimised, see `qpdiff.files.read_problem`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from typer.core import TyperGroup

import qpdiff

from .engines.choice import automatic_engine, explain_choice
from .files import LARGEST, printable, read_problem
from .solution import FIELDS

console, errors = Console(), Console(stderr=True)
UsageError: Any = typer.BadParameter.__base__  # of click, or of the copy of it that newer releases of typer have


class OneLineErrors(TyperGroup):
    """The commands, which report arguments and options that typer refuses as one line, as all other bad input."""

    def parse_args(self, ctx, args):
        """Read the options before the command."""
        if not args:
            return super().parse_args(ctx, args)  # prints the help
        with usage_errors_exit():
            return super().parse_args(ctx, args)

    def invoke(self, ctx):
        """Find the command, read its options, and run it."""
        with usage_errors_exit():
            return super().invoke(ctx)


@contextmanager
def usage_errors_exit() -> Iterator[None]:
    """Report an argument or option that typer refuses as one line, with exit code 2."""
    try:
        yield
    except UsageError as error:
        path = error.ctx.command_path if error.ctx else "qpdiff"
        message = " ".join(error.format_message().split()).rstrip(".")
        text = f"{path}: {message}; see {path} --help"
        errors.print(printable(text), style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error


app = typer.Typer(
    cls=OneLineErrors, help=qpdiff.__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)

ROWS_SHOWN, VARIABLES_SHOWN = 20, 10
FileArgument = Annotated[
    Path, typer.Argument(help="a .npz with Q, q and any of G, h, A, b, lb, ub; or .mps, .qps, .lp")
]
SizeOption = Annotated[float, typer.Option("--max-size", help="largest size of the unpacked file, in GiB")]
BackendOption = Annotated[str | None, typer.Option(help="numpy, cupy, torch or jax")]


def print_version(asked: bool) -> None:
    """Print the version and end, where that is asked for."""
    if asked:
        print(qpdiff.__version__)
        raise typer.Exit


@app.callback(help=qpdiff.__doc__)
def command(
    version: Annotated[
        bool, typer.Option("--version", help="print the version", is_eager=True, callback=print_version)
    ] = False,
) -> None:
    """Take the options that stand before a command."""


@app.command(epilog="Example: qpdiff solve problem.npz -o solution.npz")
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
    elastic: Annotated[
        float | None, typer.Option(help="price of violating a row of A or G by one unit; without it none may be", min=0)
    ] = None,
    elastic_quadratic: Annotated[
        float | None, typer.Option(help="σ of the price ½(violation)²/σ of each row of A and G", min=0)
    ] = None,
    max_size: SizeOption = LARGEST / 2**30,
    as_json: Annotated[bool, typer.Option("--json", help="print the solutions as JSON")] = False,
) -> None:
    """Solve the problems of FILE; exit code 1 if one is not solved, 2 for bad input."""
    options: dict[str, Any] = {
        "backend": backend, "dtype": dtype, "tol": tol, "rtol": rtol, "max_iterations": max_iterations, "check": check
    }  # fmt: skip
    options = {name: value for name, value in options.items() if value is not None}
    given: dict[str, Any] = {"elastic": elastic, "elastic_quadratic": elastic_quadratic}
    prices = {name: value for name, value in given.items() if value is not None}
    in_double_precision(backend)
    with bad_input_exits(file), prepared(file, output, (".npz",)) as write:
        problem = read_problem(file, in_bytes(max_size))
        with progress_bar("problems") as report:
            sol = qpdiff.solve_qp(**problem.operands, **prices, **options, progress=report)
        result = {name: to_numpy(getattr(sol, name)) for name in FIELDS} | violations(sol)
        result["objective"] = problem.objective(result["objective"])
        write(lambda target: np.savez(target, allow_pickle=False, **result))
    if as_json:
        print(to_json(result))
    else:
        if result["status"].size <= ROWS_SHOWN:
            console.print(problem_table(file, result))
            for line in variable_lines(result):
                console.print(line, soft_wrap=True)
        else:
            console.print(summary_table(file, result))
        if output is not None:
            console.print(f"{printable(output)} written", markup=False, highlight=False, soft_wrap=True)
    if np.any(result["status"] != qpdiff.Status.SOLVED):
        raise typer.Exit(1)


@app.command(epilog="Example: qpdiff check problem.npz --directions 10")
def check(
    file: FileArgument,
    backend: BackendOption = None,
    step: Annotated[float, typer.Option(help="step of the differences")] = 1e-5,
    directions: Annotated[int, typer.Option(help="random directions for each operand", min=1)] = 5,
    threshold: Annotated[float, typer.Option(help="largest relative error that passes")] = 1e-4,
    seed: Annotated[int, typer.Option(help="of the directions")] = 0,
    max_size: SizeOption = LARGEST / 2**30,
) -> None:
    """Compare the gradients of the problems of FILE with finite differences; exit code 1 where they differ.

    The differences are central ones. Q has to stay positive semidefinite: where it is singular, as in a linear program,
    it moves along positive semidefinite directions, and only forward.
    """
    with bad_input_exits(file):
        for option, value in (("--step", step), ("--threshold", threshold)):
            if not 0 < value < np.inf:
                raise ValueError(f"{option} is {value}; expected a number > 0")
        if seed < 0:
            raise ValueError(f"--seed is {seed}; expected an integer ≥ 0")
    rng = np.random.default_rng(seed)
    tight = {"backend": backend, "dtype": "float64", "tol": 1e-12, "rtol": 1e-12}
    in_double_precision(backend)
    with bad_input_exits(file):
        operands = read_problem(file, in_bytes(max_size)).dense_operands(in_bytes(max_size))
        sol = qpdiff.solve_qp(**operands, **tight)
        if {"lb", "ub"} <= set(operands):  # of one shape, because they move together where they are equal
            operands["lb"], operands["ub"] = np.broadcast_arrays(operands["lb"], operands["ub"])
            sol = qpdiff.solve_qp(**operands, **tight)
    status = np.atleast_1d(to_numpy(sol.status))
    if np.any(status != qpdiff.Status.SOLVED):
        unsolved = np.sum(status != qpdiff.Status.SOLVED)
        errors.print(f"{printable(file)}: {unsolved} of {status.size} problems are not solved", markup=False)
        raise typer.Exit(1)
    cotangent = rng.normal(size=sol.x.shape)
    gradients = {name: to_numpy(value) for name, value in qpdiff.vjp(sol, x=cotangent)._asdict().items()}

    def loss(changed):
        moved = qpdiff.solve_qp(**(operands | changed), **tight)
        solved = np.all(to_numpy(moved.status) == qpdiff.Status.SOLVED)
        return float(np.sum(cotangent * to_numpy(moved.x))) if solved else np.nan

    here, failed = loss({}), False
    if jumps(loss, here, operands["q"], step * rng.normal(size=operands["q"].shape)):
        console.print(
            f"{printable(file)}: the solution of a problem is not unique, so it has no derivative to compare with",
            markup=False,
        )
        return
    table = Table(
        "operand", "largest relative error", "verdict",
        title=f"Gradients of c·x and finite differences, {escape(printable(file.name))}",
    )  # fmt: skip
    with progress_bar("differences") as report:
        for position, name in enumerate(operands):
            worst, kinks = 0.0, 0
            for count in range(directions):
                tangents = direction(rng, name, operands, step)
                slope, right, left = slopes(loss, here, tangents, operands, to_numpy(sol.x), step)
                pulled = float(sum(np.sum(gradients[other] * tangent) for other, tangent in tangents.items()))
                size = max(abs(pulled), abs(slope), 1e-2 * float(np.linalg.norm(cotangent)))
                report(position * directions + count + 1, len(operands) * directions)
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


@app.command(epilog="Example: qpdiff show problem.npz -o problem.svg")
def show(
    file: FileArgument,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="the picture, .png or .svg; by default FILE's name with .png")
    ] = None,
    max_size: SizeOption = LARGEST / 2**30,
) -> None:
    """Draw how the problems of FILE are solved: their convergence and, in two variables, the way to the solution."""
    output = output or Path(f"{file.stem}.png")
    with bad_input_exits(file), prepared(file, output, (".png", ".svg")) as write:
        from .show import draw  # only here: Matplotlib is not needed for the rest

        figure = draw(read_problem(file, in_bytes(max_size)).dense_operands(in_bytes(max_size)))
        write(lambda target: figure.savefig(target, dpi=150, format=output.suffix[1:].lower()))
    console.print(f"{printable(output)} written", markup=False, highlight=False, soft_wrap=True)


@app.command(epilog="Example: qpdiff info")
def info() -> None:
    """Tell what is installed, which backends and engine run, and the threads and GPU they have."""
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
    console.print(table)


# ---- numbers


def to_numpy(value) -> np.ndarray:
    """Return an array of any library on the host."""
    if hasattr(value, "get"):
        return value.get()
    return np.asarray(value.cpu() if hasattr(value, "cpu") else value)


def violations(sol: qpdiff.Solution) -> dict[str, np.ndarray]:
    """Return how far x violates the constraints: `violation`, the largest of a problem, and that of A, G, lb and ub.

    Without prices of violations there is nothing to return.
    """
    if sol.violation is None:
        return {}
    parts = {name: to_numpy(part) for name, part in sol.violation._asdict().items() if part is not None}
    largest = np.max(np.concat([*parts.values()], axis=-1), axis=-1, initial=0.0)
    return {"violation": largest} | {f"violation_{name}": part for name, part in parts.items()}


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


def problem_table(file: Path, result: dict[str, np.ndarray]) -> Table:
    """Make a table with a row for each problem."""
    # So narrow that 80 columns, as a pipe has, hold the longest of every column; beside violations, a short status.
    title = f"Solutions of {escape(printable(file.name))}, their residuals and gaps"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0)
    shown = shown_measures(result)
    for heading in ("problem", "status", "iterations", "objective", *shown.values()):
        table.add_column(heading, no_wrap=True)
    for index in np.ndindex(result["status"].shape):
        status = qpdiff.Status(int(result["status"][index]))
        color = "green" if status is qpdiff.Status.SOLVED else "red"
        table.add_row(
            number(index),
            f"[{color}]{status.name}[/{color}]",
            str(result["iterations"][index]),
            f"{result['objective'][index]:.8g}",
            *(f"{result[name][index]:.1e}" for name in shown),
        )
    return table


def shown_measures(result: dict[str, np.ndarray]) -> dict[str, str]:
    """Return the headings of the numbers that tell how exact a solution is, by field, and of the violation if any."""
    shown = {"primal_residual": "primal", "dual_residual": "dual", "duality_gap": "gap"}
    return shown | ({"violation": "violation"} if "violation" in result else {})


def number(index: tuple[int, ...]) -> str:
    """Return the number of a problem: its index along each batch axis."""
    return ", ".join(map(str, index)) or "0"


def variable_lines(result: dict[str, np.ndarray]) -> Iterator[str]:
    """Return a line with x for each problem, where there are few variables."""
    if result["x"].shape[-1] <= VARIABLES_SHOWN:
        for index in np.ndindex(result["status"].shape):
            yield f"x of problem {number(index)}: " + " ".join(f"{value:.5g}" for value in result["x"][index])


def to_json(result: dict[str, np.ndarray]) -> str:
    """Return a solution as one line of JSON: a list for each field, statuses by name, null for what is not finite."""
    fields = {
        name: np.where(np.isfinite(value), value.astype(object), np.array(None)).tolist()
        for name, value in result.items()
    }
    names = np.array([status.name for status in qpdiff.Status], dtype=object)
    return json.dumps(fields | {"status": np.asarray(names[result["status"]]).tolist()})


def summary_table(file: Path, result: dict[str, np.ndarray]) -> Table:
    """Make a table with a row for each status, and the first few problems that have it where it is not SOLVED."""
    shown = shown_measures(result)
    table = Table(
        "status", "problems", "iterations (min, median, max)", *shown.values(), "first problems",
        title=f"Statuses of {escape(printable(file.name))}, with the largest residuals and gap",
    )  # fmt: skip
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
            *(f"{result[name][chosen].max():.1e}" for name in shown),
            first,
        )
    return table


@contextmanager
def progress_bar(what: str) -> Iterator:
    """Show a progress bar on standard error where that is a terminal; the value moves it to (done, total)."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, disable=not errors.is_terminal, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def bad_input_exits(file: Path) -> Iterator[None]:
    """Report an error in the user's input as one line, with exit code 2, and each warning as one."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            yield
    except (OSError, ValueError, TypeError, ImportError, MemoryError, OverflowError) as error:
        text = str(error) or type(error).__name__
        text = re.sub(r"^(backend|dtype|tol|rtol|max_iterations|elastic|elastic_quadratic) is ", option_name, text)
        text = re.sub(r"; pass elastic\w*={'bounds'.*", "", text)  # which no option does
        text = text.replace("check=False", "--no-check")
        text = text if str(file) in text else f"{file}: {text}"
        errors.print(printable(text), style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error


def show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """Print a warning as one line, without the place in the source that it comes from."""
    errors.print(printable(message), style="yellow", markup=False, highlight=False, soft_wrap=True)


def option_name(found: re.Match) -> str:
    """Return the beginning of a message about an argument of `solve_qp` with the name of the option."""
    return f"--{found[1].replace('_', '-')} is "


def in_bytes(size: float) -> int:
    """Return a size in GiB in bytes."""
    if not 0 < size < 2**30:
        raise ValueError(f"--max-size is {size}; expected a number of GiB > 0")
    return int(size * 2**30)


@contextmanager
def prepared(file: Path, output: Path | None, suffixes: tuple[str, ...]) -> Iterator:
    """Open a temporary file beside `output`; the value is a function that has it written and renamed to `output`.

    The function takes what writes to an open file, and without output does nothing. A place that cannot be written to
    is found before the solve, and a file is never left half written.
    """
    if output is None:
        yield lambda save: None
        return
    if output.suffix.lower() not in suffixes:
        raise ValueError(f"{output} does not end in {' or '.join(suffixes)}")
    output = output.resolve()
    if output.exists() and (not output.is_file() or (file.exists() and output.samefile(file))):
        raise ValueError(f"{output} is {'the problem itself' if output.is_file() else 'no file'}; choose another name")
    temporary = output.with_name(f".qpdiff-{os.getpid()}{output.suffix}")
    try:
        target = temporary.open("xb")
    except OSError as error:
        raise unwritable(output, error) from error

    def write(save) -> None:
        try:
            with target:  # closed here, as a full disk may show only then
                save(target)
            temporary.replace(output)
        except OSError as error:
            raise unwritable(output, error) from error

    try:
        yield write
    finally:
        with suppress(OSError):
            target.close()
        temporary.unlink(missing_ok=True)


def unwritable(output: Path, error: OSError) -> OSError:
    """Return an error that names the file that the user asked for, and not the temporary one."""
    return OSError(f"{output} cannot be written: {error.strerror or error}")


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
    pools = [f"{pool['internal_api']}: {pool['num_threads']} threads" for pool in threadpool_info()]
    return ", ".join(pools)
