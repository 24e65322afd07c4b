"""Random quadratic programs for the tests."""

from __future__ import annotations

import numpy as np


def apply(M, x):
    """M x with batch axes."""
    return np.einsum("...ij,...j->...i", M, x)


def optnet(rng, batch, n, m, p):
    """The family of OptNet's timing experiment."""
    L = np.tril(rng.uniform(size=(*batch, n, n))) + np.eye(n)
    G, A, point = (rng.normal(size=(*batch, *core)) for core in ((m, n), (p, n), (n,)))
    operands = {"Q": L @ L.mT + 1e-3 * np.eye(n), "q": rng.normal(size=(*batch, n)), "G": G, "h": apply(G, point) + 1}
    return operands | ({"A": A, "b": apply(A, point)} if p else {})


def random_problem(rng, parts, *, batch=(4,), shared=(), cost="pd", n=6, m=5, p=2):
    """A feasible and bounded problem with the operands in `parts`.

    `cost` is "pd", "psd" (rank n/2), "diagonal" or "lp"; a cost that is not strictly convex is made bounded by taking
    q from dual feasible multipliers.
    """
    parts = parts.split()

    def draw(name, *core):
        return rng.normal(size=core if name in shared else (*batch, *core))

    point = draw("point", n)
    if cost == "diagonal":
        Q = np.eye(n) * np.abs(draw("Q", 1, n))
    else:
        L = draw("Q", n, {"pd": n, "psd": n // 2, "lp": 0}[cost])
        Q = L @ L.mT + (0.1 * np.eye(n) if cost == "pd" else 0.0)
    operands = {"Q": Q}
    dual = -apply(Q, draw("center", n))
    if "A" in parts:
        operands["A"] = draw("A", p, n)
        operands["b"] = apply(operands["A"], point)
        dual = dual - apply(operands["A"].mT, draw("y", p))
    if "G" in parts:
        operands["G"] = draw("G", m, n)
        operands["h"] = apply(operands["G"], point) + rng.uniform(0.1, 1.0, size=m)
        dual = dual - apply(operands["G"].mT, np.abs(draw("z", m)))
    if "lb" in parts:
        operands["lb"] = point - rng.uniform(0.1, 1.0, size=n)
        dual = dual + np.abs(draw("z_lb", n))
    if "ub" in parts:
        operands["ub"] = point + rng.uniform(0.1, 1.0, size=n)
        dual = dual - np.abs(draw("z_ub", n))
    operands["q"] = dual if "q" not in shared else dual[(0,) * (dual.ndim - 1)]
    return operands


def complete(operands):
    """All eight operands of one problem or batch, with no rows and infinite bounds for what is absent."""
    n = operands["Q"].shape[-1]
    absent = {
        "G": np.zeros((0, n)), "h": np.zeros(0), "A": np.zeros((0, n)), "b": np.zeros(0),
        "lb": np.full(n, -np.inf), "ub": np.full(n, np.inf),
    }  # fmt: skip
    return absent | operands


def kkt_residuals(operands, x, y, z, z_lb, z_ub):
    """Primal residual, dual residual and duality gap from their definitions, the largest of the batch.

    Signs of multipliers count as part of the dual residual.
    """
    d = complete(operands)
    below, above = np.isfinite(d["lb"]), np.isfinite(d["ub"])
    with np.errstate(invalid="ignore"):
        primal = [
            apply(d["G"], x) - d["h"],
            np.abs(apply(d["A"], x) - d["b"]),
            np.where(below, d["lb"] - x, 0.0),
            np.where(above, x - d["ub"], 0.0),
        ]
        dual = apply(d["Q"], x) + d["q"] + apply(d["G"].mT, z) + apply(d["A"].mT, y) - z_lb + z_ub
        terms = [
            x * apply(d["Q"], x), d["q"] * x, np.where(np.isfinite(d["h"]), d["h"] * z, 0.0), d["b"] * y,
            np.where(above, d["ub"] * z_ub, 0.0), np.where(below, -d["lb"] * z_lb, 0.0),
        ]  # fmt: skip
    gap = np.abs(sum(np.sum(term, axis=-1) for term in terms))
    largest = [max((float(np.max(part, initial=0.0)) for part in primal), default=0.0)]
    largest.append(
        max(float(np.max(np.abs(dual), initial=0.0)), *(float(np.max(-v, initial=0.0)) for v in (z, z_lb, z_ub)))
    )
    return *largest, float(np.max(gap, initial=0.0))
