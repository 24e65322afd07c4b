"""The commands, their arguments and options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

import qpdiff

from ..files import LARGEST, printable, read_problem
from ..solution import FIELDS
from .arrays import to_json, to_numpy, violations
from .bad_input import OneLineErrors, bad_input_exits
from .gradients import compare
from .installed import in_double_precision, versions_table
from .output import prepared
from .tables import comparison_table, console, errors, problem_table, progress_bar, summary_table, variable_lines

app = typer.Typer(
    cls=OneLineErrors, help=qpdiff.__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)

ROWS_SHOWN = 20
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
    with progress_bar("differences") as report:
        comparisons = compare(operands, sol, tight, step, directions, rng, report)
    if comparisons is None:
        console.print(
            f"{printable(file)}: the solution of a problem is not unique, so it has no derivative to compare with",
            markup=False,
        )
        return
    console.print(comparison_table(file, comparisons, threshold, directions))
    if any(error > threshold for _, error, _ in comparisons):
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
        from ..show import draw  # only here: Matplotlib is not needed for the rest

        figure = draw(read_problem(file, in_bytes(max_size)).dense_operands(in_bytes(max_size)))
        write(lambda target: figure.savefig(target, dpi=150, format=output.suffix[1:].lower()))
    console.print(f"{printable(output)} written", markup=False, highlight=False, soft_wrap=True)


@app.command(epilog="Example: qpdiff info")
def info() -> None:
    """Tell what is installed, which backends and engine run, and the threads and GPU they have."""
    console.print(versions_table())


def in_bytes(size: float) -> int:
    """Return a size in GiB in bytes."""
    if not 0 < size < 2**30:
        raise ValueError(f"--max-size is {size}; expected a number of GiB > 0")
    return int(size * 2**30)
