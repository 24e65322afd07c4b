"""A picture of a solve: how fast each problem converges and, in two variables, the way through the feasible set.

The iterates are the states that the array engine's step takes a problem through: it is a function from state to state,
so the history is the list of them.
"""

from __future__ import annotations

import numpy as np

from .engines.array.loop import forms
from .engines.array.start import begin_closer
from .engines.array.state import RUNNING, State, make_sub_batch
from .engines.array.step import step
from .engines.base import make_settings
from .problem import OPERANDS, Problem
from .solution import Status
from .validation import check_values, make_problem, symmetrized

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError("qpdiff.show needs Matplotlib: pip install 'qpdiff[plot]'") from error

CURVES, PLANES = 8, 4
"""Numbers of problems of a batch that are drawn: as curves of convergence, and in the plane."""
QUANTITIES = {"primal": "primal residual", "dual": "dual residual", "gap": "duality gap", "mu": "complementarity μ"}
"""The fields of a state that are drawn, and their names."""
DECADES = 6
"""About the number of ticks above the one for zero, at powers of ten."""


def draw(operands: dict[str, np.ndarray]) -> Figure:
    """Draw how the first problems of a batch are solved.

    Parameters
    ----------
    operands : dict
        Those of `qpdiff.solve_qp` by name, of NumPy or sparse.

    Returns
    -------
    matplotlib.figure.Figure
        Primal residual, dual residual and duality gap at each iterate of the first 8 problems, in the units of the
        default tolerance (see `qpdiff.solve_qp`), which is a line, and the mean complementarity. Of problems in two
        variables also, for the first 4, the feasible set, lines of equal cost, the iterates and where they end.

    Raises
    ------
    TypeError, ValueError
        For operands that `qpdiff.solve_qp` refuses.

    Examples
    --------
    >>> import numpy as np
    >>> figure = draw({"Q": np.eye(2), "q": [-2.0, -1.0], "ub": [1.0, 1.0]})
    >>> [axes.get_title() for axes in figure.axes]
    ['primal residual', 'dual residual', 'duality gap', 'complementarity μ', 'problem 0: SOLVED']
    """
    problem = symmetrized(make_problem({name: operands.get(name) for name in OPERANDS}, backend="numpy")).made_dense()
    check_values(problem)
    if not problem.batch:
        raise ValueError(f"the batch has shape {problem.batch_shape}, so there is no problem to draw")
    shown = [problem.select(slice(i, i + 1)) for i in range(min(problem.batch, CURVES))]
    indices = zip(np.ndindex(problem.batch_shape), shown, strict=False)
    names = [", ".join(map(str, index)) or "0" for index, _ in indices]
    histories = [history(one) for one in shown]
    planes = list(zip(shown, histories, strict=True))[:PLANES] if problem.n == 2 else []
    figure = Figure(figsize=(13, 3.6 + 4.2 * bool(planes)), layout="constrained")
    rows = figure.subfigures(1 + bool(planes), 1, squeeze=False, height_ratios=[3.6, 4.2][: 1 + bool(planes)])[:, 0]
    rows[0].suptitle(f"Convergence, {how_many(len(shown), problem.batch)}")
    for axes, (field, title) in zip(rows[0].subplots(1, len(QUANTITIES)), QUANTITIES.items(), strict=True):
        curves = [np.array([getattr(state, field).item() for state in states]) for states in histories]
        tolerance = None if field == "mu" else make_settings(problem).tol
        draw_convergence(axes, dict(zip(names, curves, strict=True)), tolerance)
        axes.set_title(title)
    handles = rows[0].axes[0].get_legend_handles_labels()
    rows[0].legend(*handles, loc="outside lower center", ncols=min(len(histories), 5) + 1)
    if planes:
        rows[1].suptitle(f"The iterates, {how_many(len(planes), problem.batch)}")
        places = rows[1].subplots(1, len(planes), squeeze=False)[0]
        for name, axes, (one, states) in zip(names, places, planes, strict=False):
            draw_plane(axes, one, path(states))
            axes.set_title(f"problem {name}: {Status(states[-1].status.item()).name}")
        rows[1].legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def how_many(drawn: int, batch: int) -> str:
    """Return how many of the problems of a batch are drawn, in words."""
    if drawn < batch:
        return f"first {drawn} of {batch} problems"
    return f"{batch} problems" if batch > 1 else "1 problem"


def draw_convergence(axes, curves: dict[str, np.ndarray], tolerance: float | None) -> None:
    """Draw a quantity at each iterate of some problems, by name, on a logarithmic axis with a tick for zero."""
    values = np.concat([*curves.values(), [] if tolerance is None else [tolerance]])
    values = values[np.isfinite(values)]
    positive, zero = values[values > 0], None
    if np.any(values <= 0):
        exponents = np.log10(positive) if len(positive) else np.zeros(1)
        low, high = int(np.floor(exponents.min())), int(np.ceil(exponents.max()))
        powers = range(high, low - 1, -(1 + (high - low) // DECADES)) if len(positive) else ()
        below = max(1, (high - low) / DECADES)
        zero = 10.0 ** (low - below)
    for name, curve in curves.items():
        axes.semilogy(curve if zero is None else np.where(curve <= 0, zero, curve), ".-", label=f"problem {name}")
    if tolerance is not None:
        axes.axhline(tolerance, color="tab:red", linestyle="--", linewidth=1, label="tolerance")
    if zero is not None:
        labels = [f"$10^{{{power}}}$" for power in powers]
        axes.set_yticks([zero, *(10.0**power for power in powers)], ["zero", *labels])
        axes.minorticks_off()
        axes.set_ylim(bottom=10.0 ** (low - 1.5 * below))
    last = max(map(len, curves.values())) - 1
    axes.set(xlabel="iteration", xlim=(-0.05 * last - 0.1, 1.05 * last + 0.1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)


def history(problem: Problem) -> list[State]:
    """Return the states of one problem, from the starting point to the last; none is the same as the one before."""
    settings = make_settings(problem)
    with problem.backend.no_grad():
        ((form, _),) = forms(problem)
        sub, state, _ = begin_closer(make_sub_batch(form, settings))
        states = [state]
        while state.status.item() == RUNNING:
            state, _ = step(sub, state, refine=state.refine.item(), may_revert=state.within_tolerance.item())
            if state.iterations.item() == states[-1].iterations.item():  # the last step was not worth taking
                states.pop()
            states.append(state)
    return states


def path(states: list[State]) -> np.ndarray:
    """Return the iterates x (·, n), without the ray that is in place of the last where the cost is unbounded."""
    ends_in_ray = states[-1].status.item() == Status.DUAL_INFEASIBLE
    return np.concat([state.x for state in states])[: len(states) - ends_in_ray]


def draw_plane(axes, problem: Problem, points: np.ndarray) -> None:
    """Draw the feasible set, lines of equal cost and the iterates (·, 2) of a problem in two variables."""
    window = around(points)
    corners = feasible_polygon(problem, window)
    grid = np.stack(np.meshgrid(*(np.linspace(low, high, 100) for low, high in window.T)), axis=-1)
    Qx = grid @ problem.Q[0]
    cost = np.sum(grid * (Qx / 2 + problem.q[0]), axis=-1)
    axes.contour(grid[..., 0], grid[..., 1], cost, 12, colors="0.75", linewidths=0.7, linestyles="solid")
    axes.fill(*corners.T, facecolor="tab:blue", edgecolor="tab:blue", alpha=0.25, label="feasible")
    axes.plot(*points.T, "o-", color="black", markersize=3, linewidth=1, label="iterates")
    axes.plot(*points[-1:].T, "*", color="tab:red", markersize=12, label="last")
    axes.set(xlim=window[:, 0], ylim=window[:, 1], xlabel="x₁", ylabel="x₂", aspect="equal")


def around(points: np.ndarray) -> np.ndarray:
    """Return the lower and upper corner, (2, 2), of a square with all points in its middle; around 0 without points."""
    if not len(points):
        return np.array([[-1.0, -1.0], [1.0, 1.0]])
    middle = (points.min(axis=0) + points.max(axis=0)) / 2
    radius = max(0.9 * float(np.max(np.ptp(points, axis=0))), 1.0)
    return np.stack([middle - radius, middle + radius])


def feasible_polygon(problem: Problem, window: np.ndarray) -> np.ndarray:
    """Return the corners (·, 2) of what is feasible in a window, in order; none where nothing is.

    The window is cut by one half-plane after the other (Sutherland & Hodgman, 1974), and by two for an equality, which
    leaves a polygon without area.
    """
    (x0, y0), (x1, y1) = window
    corners = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    normals, k = problem.constraints(np.eye(2)).T, problem.k[0]
    for normal, limit, equality, inequality in zip(normals, k, problem.equality[0], problem.inequality[0], strict=True):
        if equality or inequality:
            corners = cut(corners, normal, limit)
        if equality:
            corners = cut(corners, -normal, -limit)
    return corners


def cut(corners: np.ndarray, normal: np.ndarray, limit: float) -> np.ndarray:
    """Cut a convex polygon to its part with normalᵀx ≤ limit, to within rounding."""
    if not len(corners):
        return corners
    excess = corners @ normal - limit
    inside = excess <= 1e-12 * (np.abs(corners) @ np.abs(normal) + np.abs(limit))
    corners_left = []
    for i in range(len(corners)):
        j = (i + 1) % len(corners)
        if inside[i]:
            corners_left.append(corners[i])
        if inside[i] != inside[j] and excess[i] != excess[j]:
            share = np.clip(excess[i] / (excess[i] - excess[j]), 0.0, 1.0)
            corners_left.append(corners[i] + share * (corners[j] - corners[i]))
    return np.array(corners_left).reshape(-1, 2)
