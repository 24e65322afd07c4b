"""Random sparse problems for the tests."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
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


def flows_on_a_grid(N):
    """Q, q, A and b of a flow on the edges of a grid with one unit into each of N × N nodes, free at the boundary."""
    D = sp.diags_array([-np.ones(N), np.ones(N)], offsets=[0, 1], shape=(N, N + 1))
    A = sp.hstack([sp.kron(sp.eye_array(N), D), sp.kron(D, sp.eye_array(N))]).tocsr()
    inside = np.r_[0.0, np.ones(N - 1), 0.0]
    inside = np.r_[np.tile(inside, N), np.repeat(inside, N)]
    return sp.diags_array(inside), -inside, A, np.ones(N * N)
