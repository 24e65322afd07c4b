"""Infeasible and unbounded problems get their status with a certificate, and leave their batch mates alone."""

from __future__ import annotations

import numpy as np
import pytest
from problems import apply, complete, random_problem

import qpdiff
from qpdiff import Status

BATCH = 25
COSTS = ["pd", "psd", "lp", "diagonal"]
SHAPES = [(1, 2, 1), (2, 4, 1), (3, 3, 1), (6, 5, 2), (10, 25, 3), (20, 10, 5)]  # n, m, p


# ---- problems without a feasible point


def parallel_rows(rng, d):
    """g x ≤ h and −g x ≤ −h − a."""
    d["G"][:, 1] = -d["G"][:, 0]
    d["h"][:, 1] = -d["h"][:, 0] - rng.uniform(0.1, 2.0, size=BATCH)


def combined_rows(rng, d):
    """A row of G that a positive combination of all the others, and any combination of A, contradicts."""
    weights, y = rng.uniform(0.1, 1.0, size=(BATCH, d["G"].shape[1] - 1)), rng.normal(size=d["b"].shape)
    d["G"][:, -1] = -apply(d["G"][:, :-1].mT, weights) - apply(d["A"].mT, y)
    d["h"][:, -1] = -np.sum(weights * d["h"][:, :-1], -1) - np.sum(y * d["b"], -1) - rng.uniform(0.1, 2.0, size=BATCH)


def dependent_equalities(rng, d):
    """The same left-hand side twice."""
    scale = rng.uniform(0.5, 2.0, size=(BATCH, 1))
    d["A"] = np.concat([d["A"], scale[:, :, None] * d["A"][:, :1]], axis=1)
    d["b"] = np.concat([d["b"], scale * d["b"][:, :1] + rng.uniform(0.1, 2.0, size=(BATCH, 1))], axis=1)


def equality_beyond_bounds(rng, d):
    """An equality that the box does not reach."""
    a = d["A"][:, 0]
    reach = np.sum(np.where(a > 0, a * d["ub"], a * d["lb"]), -1)
    d["b"][:, 0] = reach + rng.uniform(0.1, 2.0, size=BATCH)


def row_beyond_bounds(rng, d):
    """An inequality that the box does not reach."""
    g = d["G"][:, 0]
    reach = np.sum(np.where(g < 0, g * d["ub"], g * d["lb"]), -1)
    d["h"][:, 0] = reach - rng.uniform(0.1, 2.0, size=BATCH)


INFEASIBLE = {
    parallel_rows: "A G",
    combined_rows: "A G",
    dependent_equalities: "A G",
    equality_beyond_bounds: "A G lb ub",
    row_beyond_bounds: "G lb ub",
}


def infeasible(rng, change, cost, shape):
    n, m, p = shape
    d = random_problem(rng, INFEASIBLE[change], cost=cost, batch=(BATCH,), n=n, m=m, p=p)
    change(rng, d)
    return d


# ---- problems without a lowest point


def unbounded(rng, parts, cost, shape):
    """Feasible, with a ray that is flat in Q, stays within the constraints and goes down."""
    n, m, p = shape
    d = random_problem(rng, parts, cost=cost, batch=(BATCH,), n=n, m=m, p=p)
    ray = rng.normal(size=(BATCH, n))
    if "lb" in d:  # the ray leaves along the open sides
        ray[:, ::2] = np.abs(ray[:, ::2])
        ray[:, 1::2] = 0 if n > 1 else ray[:, 1::2]
        d["ub"] = np.where(ray > 0, np.inf, d.get("ub", np.inf))
        d["lb"] = np.where(ray < 0, -np.inf, d["lb"])
    flat = ray / np.linalg.norm(ray, axis=-1, keepdims=True)
    reflect = np.eye(n) - flat[:, :, None] * flat[:, None, :]
    d["Q"] = reflect @ d["Q"] @ reflect
    d["Q"] = (d["Q"] + d["Q"].mT) / 2
    point = solve_for_point(d)
    if "A" in d:
        d["A"] = d["A"] @ reflect
        d["b"] = apply(d["A"], point)
    if "G" in d:
        slope = apply(d["G"], ray)
        d["G"] = np.where((slope > 0)[:, :, None], -d["G"], d["G"])
        d["h"] = apply(d["G"], point) + rng.uniform(0.1, 1.0, size=(BATCH, m))
    fall = np.sum(d["q"] * flat, -1, keepdims=True)
    d["q"] = d["q"] - flat * (fall + rng.uniform(0.1, 2.0, size=(BATCH, 1)))
    return d


def solve_for_point(d):
    """A point within the bounds."""
    if "lb" not in d:
        return np.ones_like(d["q"])
    lower, upper = d["lb"], d["ub"]
    return np.where(np.isfinite(lower) & np.isfinite(upper), (lower + upper) / 2, np.where(np.isfinite(lower), lower + 0.5, upper - 0.5))
