"""The picture and the table at the top of the README: time per problem, beside every solver that a reader might use."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib
from measure import BOTH, FORWARD
from report import digits, table
from rows import Row, SparseRow
from solvers import Solver, counterpart
from verdicts import SparseTable, Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DENSE, SPARSE = Row(128, 50, 50, 0), SparseRow(64, "mpc", 1)
BEGIN, END = "<!-- made by benchmarks/bench.py -->", "<!-- end -->"


class Panel(NamedTuple):
    """Times of solvers that are called the same way."""

    title: str
    milliseconds: dict[str, float]
    """Of a problem of the batch, by the name of the solver, qpdiff first, the others from fast to slow."""
    inaccurate: frozenset[str] = frozenset()
    """Solvers whose answers are less accurate than what is asked for."""


def panels(rows: Table, solvers: list[Solver], sparse: SparseTable, sparse_solvers: list[Solver]) -> list[Panel]:
    """Return a panel for each way of calling; solvers without an answer are left out."""
    alone = [solver for solver in solvers if solver.framework == "NumPy" and solver.name != "qpdiff array"]
    return [
        *[
            _panel(f"solve and gradients in {framework}", rows, DENSE, BOTH, _of(solvers, framework))
            for framework in ("torch", "JAX")
        ],
        _panel("solve, on NumPy", rows, DENSE, FORWARD, alone),
        _panel("sparse: solve", sparse, SPARSE, FORWARD, sparse_solvers),
        _panel("sparse: solve and gradients", sparse, SPARSE, BOTH, [s for s in sparse_solvers if s.differentiable]),
    ]


def _of(solvers: list[Solver], framework: str) -> list[Solver]:
    """Return the solvers of a framework, qpdiff first."""
    chosen = [solver for solver in solvers if solver.framework == framework and solver.differentiable]
    own = {counterpart(solver, solvers) for solver in chosen}
    return sorted(chosen, key=lambda solver: solver.name not in own)


def _panel(
    title: str, results: Table | SparseTable, row: Row | SparseRow, measure: str, solvers: list[Solver]
) -> Panel:
    times = {}
    for solver in solvers:
        seconds = results[row][solver.name].seconds(measure)
        if seconds is not None:
            times[solver.name] = 1000 * seconds / row.batch
    own, *others = times.items()
    inaccurate = frozenset(name for name in times if not results[row][name].accurate)
    return Panel(title, dict([own, *sorted(others, key=lambda item: item[1])]), inaccurate)


def draw(parts: list[Panel], path: Path) -> None:
    """Draw a bar for each solver, on a logarithmic scale that all panels share."""
    sizes = [len(part.milliseconds) for part in parts]
    figure, axes = plt.subplots(
        len(parts), 1, figsize=(8, 0.24 * sum(sizes) + 1.2), sharex=True, height_ratios=sizes, layout="constrained"
    )
    every = [value for part in parts for value in part.milliseconds.values()]
    least, largest = min(every), max(every)
    for axis, part in zip(axes, parts, strict=True):
        names = [name + ("*" if name in part.inaccurate else "") for name in part.milliseconds]
        values = list(part.milliseconds.values())
        bars = axis.barh(names, values, color=["black", *["tab:blue"] * (len(names) - 1)], height=0.7)
        times = [f"{digits(v, 2)} ms" + (f"  ({digits(v / values[0])} ×)" if k else "") for k, v in enumerate(values)]
        axis.bar_label(bars, times, padding=3, fontsize=8)
        axis.set_title(part.title, loc="left", fontsize=9, fontweight="bold")
        axis.set(xscale="log", xlim=(least / 2, 10 * largest))
        axis.tick_params(labelsize=8)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("time per problem [ms]", fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write(parts: list[Panel]) -> str:
    """Return a table of how many times as long the other solvers take as qpdiff."""
    lines = []
    for part in parts:
        (_, own), *others = part.milliseconds.items()
        others = [f"{name} {digits(ms / own)} ×{'*' if name in part.inaccurate else ''}" for name, ms in others]
        lines.append([part.title, f"{digits(own, 2)} ms", ", ".join(others)])
    return table(["", "qpdiff, per problem", "the others take"], lines)


def insert(page: Path, text: str) -> None:
    """Put a text between the two marks in a page, in place of what stands there."""
    before, mark, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if mark and end:
        page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
