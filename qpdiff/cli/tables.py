"""What is printed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import qpdiff

from ..files import printable

console, errors = Console(), Console(stderr=True)
VARIABLES_SHOWN = 10


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


def comparison_table(file: Path, comparisons, threshold: float, directions: int) -> Table:
    """Make a table with a row for each operand's gradient beside differences in so many directions."""
    table = Table(
        "operand", "largest relative error", "verdict",
        title=f"Gradients of c·x and finite differences, {escape(printable(file.name))}",
    )  # fmt: skip
    for operand, error, left_out in comparisons:
        verdict = "[red]differs[/red]" if error > threshold else "[green]agrees[/green]"
        if left_out == directions:
            verdict = "not differentiable here"
        elif left_out:
            verdict += f" ({left_out} of {directions} directions left out: a weakly active constraint, or no solution)"
        table.add_row(operand, f"{error:.1e}", verdict)
    return table


@contextmanager
def progress_bar(what: str) -> Iterator:
    """Show a progress bar on standard error where that is a terminal; the value moves it to (done, total)."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, disable=not errors.is_terminal, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
