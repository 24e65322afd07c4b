"""Families of sparse problems whose gradients people use; the problems of a batch have one pattern.

Control, portfolios and support vector machines are like those of B. Stellato et al., "OSQP" (2020), appendix A; the
power flow is the DC model of R. D. Zimmerman et al., "MATPOWER" (2011); Sudoku is that of B. Amos, J. Z. Kolter,
"OptNet" (2017); the denoising is the fused lasso of R. Tibshirani et al. (2005).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.linalg
import scipy.sparse as sp
from operands import pattern_of


def mpc(rng, batch: int, horizon: int, states: int, inputs: int) -> dict:
    """Draw tracking MPC: dynamics, weights, first state and target vary; boxes on states and inputs.

    The variables are u₀, x₁, u₁, x₂, ...
    """
    problems = []
    block = states + inputs
    for _ in range(batch):
        F = np.eye(states) + 0.1 * rng.normal(size=(states, states)) / np.sqrt(states)
        F *= 0.98 / max(0.98, np.max(np.abs(np.linalg.eigvals(F))))
        H = rng.normal(size=(states, inputs)) / np.sqrt(states)
        weights = rng.uniform(0.5, 2, states)
        own = sp.kron(sp.eye_array(horizon), sp.csr_array(np.hstack([-H, np.eye(states)])))
        before = sp.kron(sp.eye_array(horizon, k=-1), sp.csr_array(np.hstack([np.zeros((states, inputs)), -F])))
        b = np.zeros(horizon * states)
        b[:states] = F @ rng.uniform(-1, 1, states)
        target = 0.5 * rng.normal(size=states)
        cost = np.concatenate([np.zeros(inputs), -weights * target])
        limit = np.tile(np.concatenate([np.full(inputs, 0.3), np.full(states, 4.0)]), horizon)
        diagonal = np.tile(np.concatenate([np.full(inputs, 0.1), weights]), horizon)
        problems.append(
            {"Q": sp.diags_array(diagonal), "q": np.tile(cost, horizon), "A": own + before, "b": b,
             "lb": -limit, "ub": limit}
        )  # fmt: skip
    assert problems[0]["Q"].shape == (horizon * block,) * 2
    return _batch(problems)


def portfolio(rng, batch: int, assets: int, factors: int) -> dict:
    """Draw factor-model portfolios: returns, variances and loadings vary; half of the loadings are zero.

    The variables are the holdings and their exposures to the factors.
    """
    loaded = rng.random((factors, assets)) < 0.5
    problems = []
    for _ in range(batch):
        loadings = np.where(loaded, rng.normal(size=(factors, assets)), 0.0)
        variances = rng.uniform(0, np.sqrt(factors), assets)
        ones = sp.csr_array(np.concatenate([np.ones(assets), np.zeros(factors)])[None])
        A = sp.vstack([sp.hstack([sp.csr_array(loadings), -sp.eye_array(factors)]), ones])
        lb = np.concatenate([np.zeros(assets), np.full(factors, -np.inf)])
        problems.append(
            {"Q": sp.diags_array(np.concatenate([variances, np.ones(factors)])),
             "q": np.concatenate([-rng.normal(size=assets), np.zeros(factors)]),
             "A": A, "b": np.append(np.zeros(factors), 1.0), "lb": lb}
        )  # fmt: skip
    return _batch(problems)


def opf(rng, batch: int, buses: int) -> dict:
    """Draw DC optimal power flow on one grid: demand, susceptances and costs vary; lines have limits both ways.

    The variables are the angles, the power of the generators, and the demand that is not met.
    """
    edges = _grid(rng.random((buses, 2)))
    lines, generators = len(edges), buses // 3
    places = rng.choice(buses, generators, replace=False)
    ends = sp.csr_array(
        (np.tile([1.0, -1.0], lines), (np.repeat(np.arange(lines), 2), edges.ravel())), shape=(lines, buses)
    )
    supply = sp.csr_array((np.ones(generators), (places, np.arange(generators))), shape=(buses, generators))
    reference = sp.csr_array(([1.0], ([0], [0])), shape=(1, 2 * buses + generators))
    no_power = sp.csr_array((lines, generators + buses))
    problems = []
    for _ in range(batch):
        flows = sp.diags_array(rng.uniform(5, 20, lines)) @ ends
        demand = rng.uniform(0.2, 1.0, buses)
        balance = sp.hstack([-(ends.T @ flows), supply, sp.eye_array(buses)])
        limits = sp.hstack([flows, no_power])
        quadratic = np.concatenate([np.full(buses, 1e-4), rng.uniform(0.1, 1, generators), np.full(buses, 0.1)])
        linear = np.concatenate([np.zeros(buses), rng.uniform(1, 3, generators), np.full(buses, 20.0)])
        problems.append(
            {"Q": sp.diags_array(quadratic), "q": linear, "G": sp.vstack([limits, -limits]),
             "h": np.full(2 * lines, 3.0), "A": sp.vstack([balance, reference]), "b": np.append(demand, 0.0),
             "lb": np.concatenate([np.full(buses, -np.inf), np.zeros(generators + buses)]),
             "ub": np.concatenate([np.full(buses, np.inf), np.full(generators, 6.0), demand])}
        )  # fmt: skip
    return _batch(problems)


def _grid(positions) -> np.ndarray:
    """Join each bus to its two nearest ones, and to the nearest before it, so that all are connected."""
    edges = set()
    for i, position in enumerate(positions):
        distances = np.sum((positions - position) ** 2, axis=1)
        distances[i] = np.inf
        nearest = list(np.argsort(distances)[:2]) + ([int(np.argmin(distances[:i]))] if i else [])
        edges |= {(min(i, j), max(i, j)) for j in nearest}
    return np.array(sorted(edges))


def tv(rng, batch: int, points: int) -> dict:
    """Draw total-variation denoising of a signal, ½‖x − y‖² + λ Σ t, |xᵢ₊₁ − xᵢ| ≤ tᵢ: the signal and λ vary."""
    steps = points - 1
    difference = sp.diags_array([-np.ones(steps), np.ones(steps)], offsets=[0, 1], shape=(steps, points))
    minus = -sp.eye_array(steps)
    G = sp.vstack([sp.hstack([difference, minus]), sp.hstack([-difference, minus])])
    Q = sp.csr_array((np.ones(points), (np.arange(points), np.arange(points))), shape=(points + steps,) * 2)
    problems = []
    for _ in range(batch):
        signal = np.repeat(rng.normal(size=points // 10 + 1), 10)[:points] + 0.2 * rng.normal(size=points)
        q = np.concatenate([-signal, np.full(steps, rng.uniform(0.2, 1))])
        problems.append({"Q": Q, "q": q, "G": G, "h": np.zeros(2 * steps)})
    return _batch(problems)


def sudoku(rng, batch: int, height: int, width: int) -> dict:
    """Draw Sudoku as OptNet's layer solves it, with the true rules: boxes of height × width, only the clues vary."""
    side = height * width
    cells = np.arange(side**3).reshape(side, side, side)
    groups = []
    for i in range(side):
        down, right = height * (i // height), width * (i % height)
        for v in range(side):
            box = cells[down : down + height, right : right + width, v].ravel()
            groups += [cells[i, :, v], cells[:, i, v], cells[i, v, :], box]
    A = np.zeros((len(groups), side**3))
    for row, group in zip(A, groups, strict=True):
        row[group] = 1.0
    factor, pivots = scipy.linalg.qr(A.T, mode="r", pivoting=True)
    rank = int(np.sum(np.abs(np.diagonal(factor)) > 1e-9))
    A = sp.csr_array(A[np.sort(pivots[:rank])])
    base = (width * (np.arange(side)[:, None] % height) + np.arange(side)[:, None] // height + np.arange(side)) % side
    problems = []
    for _ in range(batch):
        solution = np.eye(side)[rng.permutation(side)[base]]
        clues = solution * (rng.random((side, side, 1)) < 0.4)
        q = -clues.ravel() - 0.05 * rng.random(side**3)
        problems.append({"Q": 0.1 * sp.eye_array(side**3), "q": q, "A": A, "b": np.ones(rank), "lb": np.zeros(side**3)})
    return _batch(problems)


def svm(rng, batch: int, examples: int, features: int) -> dict:
    """Draw support vector machines with slacks, on sparse features, which vary: 15 % of them are not zero."""
    mask = sp.random_array((examples, features), density=0.15, rng=rng, format="csr")
    labels = np.where(np.arange(examples) < examples // 2, 1.0, -1.0)
    of_entry = np.repeat(labels, np.diff(mask.indptr))
    diagonal = np.arange(features)
    Q = sp.csr_array((np.ones(features), (diagonal, diagonal)), shape=(features + examples,) * 2)
    lb = np.concatenate([np.full(features, -np.inf), np.zeros(examples)])
    problems = []
    for _ in range(batch):
        values = rng.normal(size=mask.nnz) + of_entry / np.sqrt(features)
        margins = sp.csr_array((-of_entry * values, mask.indices, mask.indptr), shape=mask.shape)
        problems.append(
            {"Q": Q, "q": np.concatenate([np.zeros(features), np.ones(examples)]),
             "G": sp.hstack([margins, -sp.eye_array(examples)]), "h": -np.ones(examples), "lb": lb}
        )  # fmt: skip
    return _batch(problems)


def _batch(problems: list[dict]) -> dict:
    """Stack the operands of problems; those that are the same in all are shared, (1, ·)."""
    operands = {}
    for name in problems[0]:
        values = [problem[name] for problem in problems]
        if sp.issparse(values[0]):
            operands[name] = pattern_of(values)
        else:
            stacked = np.stack(values)
            operands[name] = stacked if name == "q" or not np.all(stacked == stacked[0]) else stacked[:1]
    return operands


FAMILIES: dict[str, tuple[Callable, list[tuple[int, ...]]]] = {
    "mpc": (mpc, [(10, 8, 3), (30, 12, 4), (100, 12, 4)]),
    "portfolio": (portfolio, [(100, 5), (400, 15), (1500, 40)]),
    "opf": (opf, [(30,), (118,), (600,)]),
    "tv": (tv, [(50,), (250,), (1000,)]),
    "sudoku": (sudoku, [(2, 2), (2, 3), (3, 3)]),
    "svm": (svm, [(100, 10), (500, 30), (2000, 60)]),
}
"""The function and the arguments of a small, a medium and a large size of each."""
