"""Draw the documentation's pictures next to this file: python docs/pictures.py (extra plot; a minute)."""

from __future__ import annotations

import time
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

import qpdiff
from qpdiff import show
from qpdiff.engines.array.central_path import relax
from qpdiff.problem import OPERANDS
from qpdiff.validation import make_problem

HERE = Path(__file__).parent
matplotlib.rcParams["svg.hashsalt"] = (
    "qpdiff"  # the same picture is the same file
)
matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text, and files small


def save(figure: Figure, name: str) -> None:
    """Write a figure without what differs from run to run."""
    figure.savefig(
        HERE / name,
        dpi=80,
        metadata={"Date": None} if name.endswith(".svg") else None,
    )


def random_problems(rng, batch: int, n: int, m: int) -> dict[str, np.ndarray]:
    """Draw problems with matrices of their own and a feasible point."""
    L, G = rng.normal(size=(batch, n, n)), rng.normal(size=(batch, m, n))
    inside = rng.normal(size=(batch, n, 1))
    h = (G @ inside)[..., 0] + rng.uniform(size=(batch, m))
    return {
        "Q": L @ L.mT / n + 1e-2 * np.eye(n),
        "q": rng.normal(size=(batch, n)),
        "G": G,
        "h": h,
    }


def convergence() -> None:
    """Draw the largest of the three residuals of each problem of a batch, against the iteration."""
    problems = random_problems(np.random.default_rng(0), 64, 20, 30)
    whole = make_problem({name: problems.get(name) for name in OPERANDS})
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for i in range(64):
        states = show.history(whole.select(slice(i, i + 1)))
        axes.semilogy(
            [state.worst.item() for state in states],
            color="tab:blue",
            alpha=0.35,
            linewidth=1,
        )
    axes.axhline(1e-8, color="tab:red", linewidth=1)
    axes.annotate(
        "tol",
        (0, 1e-8),
        xytext=(2, 3),
        textcoords="offset points",
        color="tab:red",
    )
    axes.set(
        xlabel="iteration",
        ylabel="largest residual",
        title="64 problems, n = 20, m = 30",
    )
    axes.grid(alpha=0.3)
    save(figure, "convergence.svg")


POLYGON = {
    "G": np.array(
        [[1.0, 0.3], [0.2, 1.0], [-1.0, 0.6], [-0.5, -1.0], [0.8, -1.0]]
    ),
    "h": np.array([1.5, 1.2, 1.3, 1.2, 1.4]),
}


def central_path() -> None:
    """Draw the central path of one problem, and the gradients of projections onto the same set."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    window = np.array([[-2.6, -2.3], [2.6, 2.3]])

    problem = {"Q": np.diag([1.0, 0.4]), "q": np.array([-2.5, -1.2]), **POLYGON}
    one = make_problem({name: problem.get(name) for name in OPERANDS})
    sol = qpdiff.solve_qp(**problem, engine="array")
    curve = np.concat(
        [relax(sol.linearization, kappa).x for kappa in np.logspace(2, -8, 60)]
    )
    grid = np.stack(
        np.meshgrid(*(np.linspace(low, high, 200) for low, high in window.T)),
        axis=-1,
    )
    cost = np.sum(grid * (grid @ problem["Q"] / 2 + problem["q"]), axis=-1)
    left.contour(
        grid[..., 0],
        grid[..., 1],
        cost,
        14,
        colors="0.8",
        linewidths=0.7,
        linestyles="solid",
    )
    left.plot(*curve.T, color="tab:green", linewidth=2, label="central path")
    left.plot(
        *show.path(show.history(one)).T,
        "o",
        color="black",
        markersize=3,
        label="iterates",
    )
    left.plot(*sol.x, "*", color="tab:red", markersize=13, label="solution")

    points = np.stack(
        np.meshgrid(np.linspace(-2.4, 2.4, 17), np.linspace(-2.1, 2.1, 15)),
        axis=-1,
    )
    projections = qpdiff.solve_qp(np.eye(2), -points, **POLYGON)
    gradients = -qpdiff.vjp(
        projections, x=projections.x
    ).q  # of ½‖x‖² by the point, which is −q
    right.quiver(
        *np.moveaxis(points, -1, 0),
        *np.moveaxis(-gradients, -1, 0),
        angles="xy",
        color="0.2",
        width=0.004,
    )

    corners = show.feasible_polygon(one, window)
    for axes in (left, right):
        axes.fill(
            *corners.T, facecolor="tab:blue", edgecolor="tab:blue", alpha=0.25
        )
        axes.set(xlim=window[:, 0], ylim=window[:, 1], aspect="equal")
    left.set(xlabel="x₁", ylabel="x₂")
    right.set(xlabel="c₁", ylabel="c₂")
    left.legend(loc="lower left", fontsize="small")
    save(figure, "central-path.svg")


def cost() -> None:
    """Measure and draw the time of a problem against n: the fastest of twenty passes over a batch."""
    rng, sizes = np.random.default_rng(0), [5, 10, 20, 40, 80, 160]
    seconds: dict[str, list[float]] = {"solve": [], "vjp": []}
    for n in sizes:
        batch = max(8, 4000 // n)
        problems = random_problems(rng, batch, n, n)
        solves, pulls = [], []
        for _ in range(20):
            start = time.perf_counter()
            sol = qpdiff.solve_qp(**problems)
            between = time.perf_counter()
            qpdiff.vjp(sol, x=np.ones((batch, n)))
            solves.append((between - start) / batch)
            pulls.append((time.perf_counter() - between) / batch)
        seconds["solve"].append(min(solves))
        seconds["vjp"].append(min(pulls))
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, values in seconds.items():
        axes.loglog(sizes, 1e6 * np.array(values), "o-", label=name)
    axes.set(
        xlabel="n = m", ylabel="µs a problem", xticks=sizes, xticklabels=sizes
    )
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, "cost.svg")
    for name, values in seconds.items():
        print(name, [f"{1e6 * value:.1f} µs" for value in values])


def shown() -> None:
    """Draw what `qpdiff show` writes for the file of docs/reference/cli.md."""
    rng = np.random.default_rng(0)
    problem = {
        "Q": np.eye(2),
        "q": rng.normal(size=(3, 2)),
        "G": rng.normal(size=(4, 2)),
        "h": np.ones(4),
    }
    save(show.draw(problem), "show.png")


if __name__ == "__main__":
    convergence()
    central_path()
    shown()
    cost()
