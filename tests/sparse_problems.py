"""Random sparse problems for the tests."""

from __future__ import annotations

import numpy as np
from problems import apply, random_problem, solve_for_point

import qpdiff


def random_sparse(rng, parts, *, density=0.2, **options):
    """A `random_problem` of matrices with a random pattern each, and the patterns: masks by name.

    Right-hand sides are those of another point, at which the problem is feasible with some margin.
    """
    operands = random_problem(rng, parts, **options)
    n, masks = operands["Q"].shape[-1], {}
    L = np.eye(n, dtype=bool) | (rng.uniform(size=(n, n)) < density)
    masks["Q"] = L.astype(int) @ L.T > 0
    F = np.where(L, rng.normal(size=operands["Q"].shape), 0.0)
    operands["Q"] = F @ F.mT + (0.0 if options.get("cost") == "psd" else 0.1) * np.eye(n)
    point = solve_for_point(operands) if "lb" in operands and "ub" in operands else operands.get("lb", 0.0) + 1.0
    if "lb" not in operands and "ub" in operands:
        point = operands["ub"] - 1.0
    point = np.where(np.isfinite(point), point, 0.0) + np.zeros(n)
    for matrix, vector in (("A", "b"), ("G", "h")):
        if matrix in operands:
            masks[matrix] = rng.uniform(size=operands[matrix].shape[-2:]) < density
            masks[matrix][np.arange(len(masks[matrix])), rng.permutation(n)[: len(masks[matrix])]] = True
            operands[matrix] = np.where(masks[matrix], operands[matrix], 0.0)
            operands[vector] = apply(operands[matrix], point) + (0.3 if vector == "h" else 0.0)
    return operands, masks


def smooth_sparse(seed, parts, **options):
    """A `random_sparse` whose solutions are differentiable, with every inequality clearly active or clearly not."""
    rng = np.random.default_rng(seed)
    while True:
        operands, masks = random_sparse(rng, parts, **options)
        lin = qpdiff.solve_qp(**operands, tol=1e-11, rtol=1e-13).linearization
        if np.all((np.maximum(lin.v, lin.s) > 2e-2) | ~lin.problem.inequality):
            return operands, masks


def as_sparse(value, mask):
    """A dense array of matrices as `qpdiff.Sparse` with the entries in a mask."""
    rows, columns = np.nonzero(mask)
    indptr = np.searchsorted(rows, np.arange(len(mask) + 1))
    return qpdiff.Sparse(value[..., rows, columns], columns, indptr, mask.shape)
