"""Draw time against the batch and against the variables, a line for each solver."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from measure import BOTH, FORWARD
from rows import Growth
from solvers import Solver
from verdicts import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = plt.get_cmap("tab10").colors


def plot(growth: Growth, table: Table, solvers: list[Solver], path: Path) -> None:
    """Draw the solve at the left, solve and gradients at the right; a line ends where its solver ran out of time."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), layout="constrained", sharey=True)
    handles = {}
    for axis, measure, title in zip(axes, (FORWARD, BOTH), ("solve", "solve and gradients"), strict=True):
        for number, solver in enumerate(solvers):
            points = [
                (getattr(row, growth.axis), 1000 * seconds)
                for row, results in table.items()
                if solver.name in results and (seconds := results[solver.name].seconds(measure)) is not None
            ]
            if points:
                (handles[solver.name],) = axis.loglog(*zip(*points, strict=True), label=solver.name, **style(number))
        axis.set(xlabel=growth.title, title=title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("time [ms]")
    figure.legend(handles.values(), handles, loc="outside right upper")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def style(number: int) -> dict:
    """Return the style of a solver's line; the first is qpdiff's."""
    if number == 0:
        return {"color": "black", "linewidth": 2.5, "marker": "o"}
    again, colour = divmod(number - 1, len(COLOURS))
    line = {"color": COLOURS[colour], "linewidth": 1.3, "linestyle": "--" if again else "-"}
    return line | {"marker": "o^sDvPX"[number % 7], "markersize": 4}
