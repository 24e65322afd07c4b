"""Problems whose constraints contradict each other, and what the solution with prices of violations satisfies."""

import numpy as np
from problems import apply, random_problem
from sparse_problems import as_sparse

PRICED = (("A", "b", "y"), ("G", "h", "z"))
"""Rows with prices, their right-hand sides and multipliers."""


def contradictory(rng, parts, **options):
    """A problem of `random_problem` whose rows contradict each other, or the bounds, each pair by about 1."""
    problem = random_problem(rng, parts, **options)
    for matrix, vector, _ in PRICED:
        if matrix in problem:
            half = problem[matrix].shape[-2] // 2
            if half:
                sign = -1 if matrix == "G" else 1
                problem[matrix][..., -half:, :] = sign * problem[matrix][..., :half, :]
                gap = rng.uniform(0.5, 1.5, problem[vector][..., :half].shape)
                problem[vector][..., -half:] = sign * problem[vector][..., :half] - gap
    return problem


def with_zeros(rng, problem):
    """Set most entries of A and G of a `contradictory` problem to 0; return it, also with `qpdiff.Sparse` matrices."""
    problem = dict(problem)
    masks = {"Q": np.ones(problem["Q"].shape[-2:], bool)}
    for matrix in {"A", "G"} & problem.keys():
        rows, n = problem[matrix].shape[-2:]
        mask, half = rng.uniform(size=(rows, n)) < 0.4, rows // 2
        mask[np.arange(rows), np.arange(rows) % n] = True
        if half:
            mask[-half:] = mask[:half]  # the rows that contradict each other
        masks[matrix], problem[matrix] = mask, np.where(mask, problem[matrix], 0.0)
    return problem, problem | {name: as_sparse(problem[name], mask) for name, mask in masks.items()}


def random_prices(rng, problem, quadratic=False):
    """Prices of all rows and bounds between 1e-2 and 1e2, or σ between 1e-3 and 10."""
    low, high = (-3, 1) if quadratic else (-2, 2)
    rows = {"G": "h", "A": "b", "bounds": "lb"}
    return {of: 10 ** rng.uniform(low, high, problem[k].shape) for of, k in rows.items() if k in problem}


def optimality(problem, sol, elastic, sigma=None):
    """How far x and the multipliers are from optimal, by the definition: the largest of the batch.

    Returns
    -------
    primal, dual, gap : float
        Violations without a price, and of the limits of multipliers; Qx + q + Kᵀv; the cost, with the prices of the
        violations at x, less the dual cost −½xᵀQx − kᵀv − ½σv². All against the largest of their terms, at least 1.
    """
    x, batch = sol.x, sol.x.shape[:-1]
    bounds = {"lb": (-np.eye(x.shape[-1]), -1, sol.z_lb), "ub": (np.eye(x.shape[-1]), 1, sol.z_ub)}
    rows = [(problem[K], problem[k], getattr(sol, v), K) for K, k, v in PRICED if K in problem]
    rows += [(K, sign * problem[k], v, "bounds") for k, (K, sign, v) in bounds.items() if k in problem]
    Qx = apply(problem["Q"], x)
    primal, slopes = [np.zeros((*batch, 1))], [Qx, problem["q"] + 0 * x]
    values = [np.sum(x * Qx, -1), np.sum(x * problem["q"], -1)]
    sizes = [np.ones((*batch, 1)), x]
    for K, k, v, of in rows:
        w, s = np.broadcast_to(elastic.get(of, np.inf), v.shape), np.broadcast_to((sigma or {}).get(of, 0.0), v.shape)
        finite = np.isfinite(k)
        excess = np.where(finite, apply(K, x) - np.where(finite, k, 0.0), 0.0)
        excess = np.abs(excess) if of == "A" else np.maximum(excess, 0.0)
        hard = np.isinf(w) & (s == 0)
        primal += [np.where(hard, excess, 0.0), np.maximum(np.abs(v) - w, 0.0)]
        if of != "A":
            primal.append(np.minimum(v, 0.0))
        slopes.append(apply(np.swapaxes(K, -1, -2), v))
        quadratic = np.minimum(excess, np.where(np.isinf(w), np.inf, s * np.where(np.isinf(w), 1.0, w))) * (s > 0)
        linear = np.where(np.isinf(w), 0.0, np.where(np.isinf(w), 0.0, w) * (excess - quadratic))
        price = quadratic**2 / np.where(s > 0, 2 * s, 1.0) + linear
        values += [np.sum(np.where(finite, k, 0.0) * v, -1), np.sum(price, -1), np.sum(s * v * v / 2, -1)]
        sizes.append(apply(K, x))
    gap = np.abs(sum(values)) / np.maximum(1.0, np.max(np.abs(values), axis=0))
    dual = _largest([sum(slopes)]) / np.maximum(1.0, _largest(slopes))
    return tuple(float(np.max(each)) for each in (_largest(primal) / _largest(sizes), dual, gap))


def _largest(parts):
    return np.max(np.abs(np.concatenate(parts, axis=-1)), axis=-1)


def slack_form(problem, elastic, sigma=None):
    """The same problem with variables for the violations: t ≥ 0, with −t for equalities too, and u with u²/2σ."""
    sigma, batch = sigma or {}, problem["q"].shape[:-1]
    n, columns, cost, curvature, free = problem["q"].shape[-1], {"A": [], "G": []}, [], [], []

    def add(matrix, sign, linear, quadratic, lowest):
        rows = problem[matrix].shape[-2]
        for other in columns:
            if other in problem:
                block = np.zeros((problem[other].shape[-2], rows)) if other != matrix else sign * np.eye(rows)
                columns[other].append(np.broadcast_to(block, (*batch, *block.shape)))
        cost.append(np.broadcast_to(linear, (*batch, rows)))
        curvature.append(np.broadcast_to(quadratic, (*batch, rows)))
        free.append(np.full((*batch, rows), lowest))

    for matrix, w in elastic.items():
        add(matrix, -1.0, w, 0.0, 0.0)
        if matrix == "A":
            add(matrix, 1.0, w, 0.0, 0.0)
        if matrix in sigma:
            add(matrix, -1.0, 0.0, 1.0 / sigma[matrix], -np.inf)
    curvature = np.concatenate(curvature, axis=-1)
    more = curvature.shape[-1]
    Q = np.zeros((*batch, n + more, n + more))
    Q[..., :n, :n] = problem["Q"]
    Q[..., range(n, n + more), range(n, n + more)] = curvature
    out = {"Q": Q, "q": np.concatenate([problem["q"], *cost], axis=-1)}
    for matrix, vector, _ in PRICED:
        if matrix in problem:
            out |= {matrix: np.concatenate([problem[matrix], *columns[matrix]], axis=-1), vector: problem[vector]}
    infinite = np.full((*batch, n), np.inf)
    out["lb"] = np.concatenate([problem.get("lb", -infinite), *free], axis=-1)
    out["ub"] = np.concatenate([problem.get("ub", infinite), np.full((*batch, more), np.inf)], axis=-1)
    return out
