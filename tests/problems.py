"""Random quadratic programs for the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

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


def rounded_product(dtype):
    """Two products of a factor with its transpose as they come out in a type: of rank 3, and neither symmetric."""
    R = np.random.default_rng(0).normal(size=(2, 6, 3))
    Q = (R @ R.mT).astype(dtype)
    upper = np.triu(np.ones((6, 6), bool), 1)
    return np.where(upper, Q * (1 + np.finfo(dtype).eps), Q).astype(dtype)


def random_problem(rng, parts, *, batch=(4,), shared=(), cost="pd", n=6, m=5, p=2, infinite=0.0, fixed=0):
    """A feasible and bounded problem with the operands in `parts`.

    `cost` is "pd", "psd" (rank n/2), "diagonal" or "lp"; a cost that is not strictly convex is made bounded by taking
    q from dual feasible multipliers. A share `infinite` of the entries of h, lb and ub is infinite; the first `fixed`
    variables have lb = ub.
    """
    parts = parts.split()

    def finite(bound, multiplier, sign):
        absent = rng.uniform(size=bound.shape) < infinite if infinite else np.zeros(bound.shape, bool)
        return np.where(absent, sign * np.inf, bound), np.where(absent, 0.0, multiplier)

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
        h = apply(operands["G"], point) + rng.uniform(0.1, 1.0, size=m)
        operands["h"], z = finite(h, np.abs(draw("z", m)), 1)
        dual = dual - apply(operands["G"].mT, z)
    if "lb" in parts:
        operands["lb"], z = finite(point - rng.uniform(0.1, 1.0, size=n), np.abs(draw("z_lb", n)), -1)
        dual = dual + z
    if "ub" in parts:
        operands["ub"], z = finite(point + rng.uniform(0.1, 1.0, size=n), np.abs(draw("z_ub", n)), 1)
        dual = dual - z
    if fixed:
        for name in ("lb", "ub"):
            operands[name][..., :fixed] = point[..., :fixed]
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


def kkt_residuals(operands, x, y, z, z_lb, z_ub, *, signs=True):
    """Primal residual, dual residual and duality gap from their definitions, the largest of the batch.

    `signs`: those of the multipliers count as part of the dual residual.
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
    wrong = [float(np.max(-v, initial=0.0)) for v in (z, z_lb, z_ub)] if signs else []
    largest.append(max(float(np.max(np.abs(dual), initial=0.0)), *wrong, 0.0))
    return *largest, float(np.max(gap, initial=0.0))


def gap_rounding(operands, x, y, z):
    """Bound on the rounding error of the duality gap of problems without bounds, the largest of the batch.

    Higham, "Accuracy and stability of numerical algorithms", 2nd ed., section 3.1: n ε times the sum of all terms.
    """
    d = {name: np.abs(value) for name, value in complete(operands).items()}
    x, y, z = np.abs(x), np.abs(y), np.abs(z)
    terms = [x * apply(d["Q"], x), d["q"] * x, d["h"] * z, d["b"] * y]
    return x.shape[-1] * np.finfo(float).eps * float(np.max(sum(np.sum(term, axis=-1) for term in terms)))


def stacked(operands):
    """Q, q, K, k and p in float64: all constraints as rows K x ≤ k, the first p equalities, 0 ≤ 0 for infinite ones."""
    d = {name: np.asarray(value, np.float64) for name, value in complete(operands).items()}
    eye = np.eye(d["q"].shape[-1])
    batch = np.broadcast_shapes(*(v.shape[: v.ndim - (2 if name in "QGA" else 1)] for name, v in d.items()))

    def joined(parts, core):
        return np.concat([np.broadcast_to(part, batch + part.shape[part.ndim - core :]) for part in parts], axis=-core)

    K, k = joined([d["A"], d["G"], -eye, eye], 2), joined([d["b"], d["h"], -d["lb"], d["ub"]], 1)
    exists = np.isfinite(k)
    return d["Q"], d["q"], np.where(exists[..., None], K, 0.0), np.where(exists, k, 0.0), d["b"].shape[-1]


def documented_test(operands, x, y, z, z_lb, z_ub, tol, rtol):
    """The test of `solve_qp` in float64: each problem's residuals over what it allows, so at most 1."""
    Q, q, K, k, p = stacked(operands)
    x, v = np.float64(x), np.concat([y, z, z_lb, z_ub], axis=-1, dtype=np.float64)
    Qx, Kx, Kv = apply(Q, x), apply(K, x), apply(K.mT, v)
    products = [np.sum(x * Qx, -1), np.sum(q * x, -1), np.sum(k * v, -1)]
    over = Kx - k
    over[..., p:] = np.clip(over[..., p:], 0.0, None)
    terms = [(over, Kx, k), (Qx + q + Kv, Qx, q, Kv), (sum(products)[..., None], *(t[..., None] for t in products))]

    def largest(values):
        return np.max(np.abs(values), axis=-1, initial=0.0)

    ratios = [largest(r) / (tol + rtol * np.max(np.broadcast_arrays(*map(largest, scale)), 0)) for r, *scale in terms]
    wrong_sign = np.where(np.any(v[..., p:] < 0, axis=-1), np.inf, 0.0)
    return np.max(np.broadcast_arrays(*ratios, wrong_sign), axis=0)


# ---- problems without a feasible point


def parallel_rows(rng, d):
    """Two rows g x ≤ h and −g x ≤ −h − a."""
    d["G"][:, 1] = -d["G"][:, 0]
    d["h"][:, 1] = -d["h"][:, 0] - rng.uniform(0.1, 2.0, size=len(d["q"]))


def combined_rows(rng, d):
    """A row of G that a positive combination of all the others, and any combination of A, contradicts."""
    weights, y = rng.uniform(0.1, 1.0, size=(len(d["q"]), d["G"].shape[1] - 1)), rng.normal(size=d["b"].shape)
    d["G"][:, -1] = -apply(d["G"][:, :-1].mT, weights) - apply(d["A"].mT, y)
    d["h"][:, -1] = (
        -np.sum(weights * d["h"][:, :-1], -1) - np.sum(y * d["b"], -1) - rng.uniform(0.1, 2.0, size=len(d["q"]))
    )


def dependent_equalities(rng, d):
    """The same left-hand side twice."""
    scale = rng.uniform(0.5, 2.0, size=(len(d["q"]), 1))
    d["A"] = np.concat([d["A"], scale[:, :, None] * d["A"][:, :1]], axis=1)
    d["b"] = np.concat([d["b"], scale * d["b"][:, :1] + rng.uniform(0.1, 2.0, size=(len(d["q"]), 1))], axis=1)


def equality_beyond_bounds(rng, d):
    """An equality that the box does not reach."""
    a = d["A"][:, 0]
    reach = np.sum(np.where(a > 0, a * d["ub"], a * d["lb"]), -1)
    d["b"][:, 0] = reach + rng.uniform(0.1, 2.0, size=len(d["q"]))


def row_beyond_bounds(rng, d):
    """An inequality that the box does not reach."""
    g = d["G"][:, 0]
    reach = np.sum(np.where(g < 0, g * d["ub"], g * d["lb"]), -1)
    d["h"][:, 0] = reach - rng.uniform(0.1, 2.0, size=len(d["q"]))


INFEASIBLE = {
    parallel_rows: "A G",
    combined_rows: "A G",
    dependent_equalities: "A G",
    equality_beyond_bounds: "A G lb ub",
    row_beyond_bounds: "G lb ub",
}


def infeasible(rng, change, cost, shape, batch=25):
    """A batch without a feasible point for the reason `change`, with shape n, m, p."""
    n, m, p = shape
    d = random_problem(rng, INFEASIBLE[change], cost=cost, batch=(batch,), n=n, m=m, p=p)
    change(rng, d)
    return d


# ---- problems without a lowest point


def unbounded(rng, parts, cost, shape, batch=25):
    """Feasible, with a ray that is flat in Q, stays within the constraints and goes down."""
    n, m, p = shape
    d = random_problem(rng, parts, cost=cost, batch=(batch,), n=n, m=m, p=p)
    ray = rng.normal(size=(batch, n))
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
        d["h"] = apply(d["G"], point) + rng.uniform(0.1, 1.0, size=(batch, m))
    fall = np.sum(d["q"] * flat, -1, keepdims=True)
    d["q"] = d["q"] - flat * (fall + rng.uniform(0.1, 2.0, size=(batch, 1)))
    return d


def solve_for_point(d):
    """A point within the bounds."""
    if "lb" not in d:
        return np.ones_like(d["q"])
    lower, upper = d["lb"], d["ub"]
    return np.where(
        np.isfinite(lower) & np.isfinite(upper),
        (lower + upper) / 2,
        np.where(np.isfinite(lower), lower + 0.5, upper - 0.5),
    )


# ---- degenerate problems


class Degenerate(NamedTuple):
    """A batch of degenerate problems made of problems that are not.

    `lift` is affine, so it maps tangents of the base's operands too, and the derivative of the degenerate problem along
    a lifted tangent is that of the base.
    """

    base: dict
    lift: Callable[[dict], dict]
    back: np.ndarray
    """Matrix that takes x of the degenerate problem to x of the base."""

    @property
    def operands(self):
        return self.lift(self.base)

    def lift_tangents(self, tangents):
        here, there = self.operands, self.lift({name: v + tangents[name] for name, v in self.base.items()})
        with np.errstate(invalid="ignore"):
            return {name: np.where(np.isfinite(v), there[name] - v, 0.0) for name, v in here.items()}


def _lifted(base, lift, back=None):
    return Degenerate(base, lift, np.eye(base["q"].shape[-1]) if back is None else back)


def _base(rng, batch, n, parts="A G", **options):
    return random_problem(rng, parts, batch=batch, n=n, m=n + 2, p=max(1, n // 3), **options)


def _append(d, matrix, vector, rows, bounds):
    return d | {matrix: np.concat([d[matrix], rows], -2), vector: np.concat([d[vector], bounds], -1)}


def repeated_equalities(rng, batch, n):
    """Every equality twice, the second time scaled."""
    d = _base(rng, batch, n)
    c = rng.uniform(0.5, 2.0, size=d["b"].shape) * rng.choice([-1.0, 1.0], size=d["b"].shape)
    return _lifted(d, lambda d: _append(d, "A", "b", c[..., None] * d["A"], c * d["b"]))


def combined_equalities(rng, batch, n):
    """Equalities that are combinations of the others; more of them than variables."""
    d = _base(rng, batch, n)
    W = rng.normal(size=(*batch, n, d["b"].shape[-1]))
    return _lifted(d, lambda d: _append(d, "A", "b", W @ d["A"], apply(W, d["b"])))


def repeated_inequalities(rng, batch, n):
    """Every inequality twice, the second time scaled."""
    d = _base(rng, batch, n)
    c = rng.uniform(0.5, 2.0, size=d["h"].shape)
    return _lifted(d, lambda d: _append(d, "G", "h", c[..., None] * d["G"], c * d["h"]))


def combined_inequalities(rng, batch, n):
    """Inequalities that follow from two others, half of them with room to spare."""
    d = _base(rng, batch, n)
    m = d["h"].shape[-1]
    W = rng.uniform(0.5, 1.5, size=(*batch, n, m)) * (rng.uniform(size=(*batch, n, m)).argsort(-1) < 2)
    room = rng.choice([0.0, 0.5], size=(*batch, n))
    return _lifted(d, lambda d: _append(d, "G", "h", W @ d["G"], apply(W, d["h"]) + room))


def zero_equalities(rng, batch, n):
    """0 = 0."""
    zero = np.zeros((*batch, 2, n))
    return _lifted(_base(rng, batch, n), lambda d: _append(d, "A", "b", zero, zero[..., 0]))


def zero_inequalities(rng, batch, n):
    """0 ≤ 0 and 0 ≤ 1."""
    zero, h = np.zeros((*batch, 2, n)), np.broadcast_to([0.0, 1.0], (*batch, 2))
    return _lifted(_base(rng, batch, n), lambda d: _append(d, "G", "h", zero, h))


def empty_interior(rng, batch, n):
    """Every equality as a pair of inequalities."""

    def lift(d):
        pairs = _append(d, "G", "h", np.concat([d["A"], -d["A"]], -2), np.concat([d["b"], -d["b"]], -1))
        return {name: value for name, value in pairs.items() if name not in ("A", "b")}

    return _lifted(_base(rng, batch, n), lift)


def fixed_variables(rng, batch, n):
    """A third of the variables have lb = ub."""
    d = _base(rng, batch, n, "A G lb ub" if n > 1 else "G lb ub", fixed=max(1, n // 3))
    fixed = d["lb"] == d["ub"]
    return _lifted(d, lambda d: d | {"ub": np.where(fixed, d["lb"], d["ub"])})


def duplicated_variables(rng, batch, n):
    """Half of the variables twice: only their sum enters, so that Q is singular and x is not unique."""
    d = _base(rng, batch, n)
    E = np.concat([np.eye(n), np.eye(n)[:, : (n + 1) // 2]], axis=1)
    columns = {"Q": lambda M: E.T @ M @ E, "q": lambda v: v @ E, "G": lambda M: M @ E, "A": lambda M: M @ E}
    return _lifted(d, lambda d: {name: columns.get(name, lambda v: v)(v) for name, v in d.items()}, E)


def duplicated_variables_in_a_box(rng, batch, n):
    """The same with bounds far away, so that the set of solutions is bounded."""
    free = duplicated_variables(rng, batch, n)
    box = np.full(free.back.shape[-1], 100.0) + np.zeros((*batch, 1))
    return free._replace(lift=lambda d: free.lift(d) | {"lb": -box, "ub": box})


def from_solution(rng, batch, n, *, active=0, weak=0, inactive=2, cost="pd"):
    """A problem made around its solution, which meets the first `active` + `weak` rows of G, the latter with z = 0.

    Going down in the first variable leaves all constraints, so the multipliers are bounded.
    """
    m, p = active + weak + inactive, min(1, n - 1)
    L = rng.normal(size=(*batch, n, n))
    Q = L @ L.mT / n + 0.5 * np.eye(n) if cost == "pd" else np.zeros((*batch, n, n))
    x, y = rng.normal(size=(*batch, n)), rng.normal(size=(*batch, p))
    A, G = rng.normal(size=(*batch, p, n)), rng.normal(size=(*batch, m, n))
    G[..., 0], A[..., 0] = np.abs(G[..., 0]) + 0.5, 0.0
    z, s = rng.uniform(0.5, 2.0, size=(*batch, m)), rng.uniform(0.5, 2.0, size=(*batch, m))
    z[..., active:], s[..., : active + weak] = 0.0, 0.0
    q = -apply(Q, x) - apply(A.mT, y) - apply(G.mT, z)
    return {"Q": Q, "q": q, "G": G, "h": apply(G, x) + s, "A": A, "b": apply(A, x)}


def weakly_active(rng, batch, n):
    """Rows with s = 0 and z = 0 beside active and inactive ones."""
    weak = max(1, (n - 1) // 2)
    return _lifted(from_solution(rng, batch, n, active=(n - 1) // 3, weak=weak), lambda d: d)


def dependent_active(rng, batch, n):
    """More active rows than variables."""
    return _lifted(from_solution(rng, batch, n, active=n + 1), lambda d: d)


def unique_vertex(rng, batch, n):
    """A linear program whose solution is a vertex with as many active rows as variables, all with z > 0."""
    return _lifted(from_solution(rng, batch, n, active=max(1, n - 1), cost="lp"), lambda d: d)


def degenerate_vertex(rng, batch, n):
    """A linear program whose solution is a vertex with more active rows than variables."""
    return _lifted(from_solution(rng, batch, n, active=n + 1, cost="lp"), lambda d: d)


def optimal_face(rng, batch, n):
    """A linear program whose solutions fill a face inside a box."""
    d = from_solution(rng, batch, n, active=max(0, n - 3), cost="lp")
    box = 10 + np.zeros((*batch, n))
    return _lifted(d | {"lb": -box, "ub": box}, lambda d: d)


def rescaled(operands, D, E):
    """The problem in other units: variables x / D and rows times E, a dict of scales by "h" and "b"."""
    out = {"Q": D[..., None] * operands["Q"] * D[..., None, :], "q": D * operands["q"]}
    out |= {name: operands[name] / D for name in ("lb", "ub") if name in operands}
    for matrix, vector in (("G", "h"), ("A", "b")):
        if matrix in operands:
            out[matrix] = E[vector][..., None] * operands[matrix] * D[..., None, :]
            out[vector] = E[vector] * operands[vector]
    return out


def random_units(rng, operands, rows, columns):
    """Scales for `rescaled` between 10^−`rows` and 10^`rows`, and 10^∓`columns`."""
    E = {name: 10.0 ** rng.uniform(-rows, rows, size=operands[name].shape) for name in ("h", "b") if name in operands}
    return 10.0 ** rng.uniform(-columns, columns, size=operands["q"].shape), E


def _scaled(rng, batch, n, rows, columns):
    """Rows and variables in units of 10^±`rows` and 10^±`columns`; x is the base's in these units."""
    d = _base(rng, batch, n, "A G lb ub")
    D, E = random_units(rng, d, rows, columns)
    return _lifted(d, lambda d: rescaled(d, D, E), D[..., None] * np.eye(n))


def scaled_rows(rng, batch, n):
    """Rows in units from 1e-6 to 1e6."""
    return _scaled(rng, batch, n, 6, 0)


def scaled_columns(rng, batch, n):
    """Variables in units from 1e-6 to 1e6."""
    return _scaled(rng, batch, n, 0, 6)


def scaled_both(rng, batch, n):
    """Rows and variables in units from 1e-3 to 1e3, so that entries of G span 1e-6 to 1e6."""
    return _scaled(rng, batch, n, 3, 3)


DEGENERATE = [
    repeated_equalities, combined_equalities, repeated_inequalities, combined_inequalities, zero_equalities,
    zero_inequalities, empty_interior, fixed_variables, duplicated_variables, duplicated_variables_in_a_box,
    weakly_active, dependent_active, unique_vertex, degenerate_vertex, optimal_face,
]  # fmt: skip
SCALED = [scaled_rows, scaled_columns, scaled_both]


def components(rng, batch, orders, curved=(True, False, False), n=4, p=1, m=3):
    """Problems that fall apart into some with curvature and linear programs, x of each in units of its own.

    Units of x are 10 to the power of up to ±orders. Also return the least cost and the largest of the terms it is a sum
    of, by construction.
    """
    parts = []
    for has_curvature in curved:
        x, y, z, z_lb = (rng.normal(size=(*batch, size)) for size in (n, p, m, n))
        A, G, F = (rng.normal(size=(*batch, rows, n)) for rows in (p, m, n))
        Q = F @ F.mT if has_curvature else 0.0 * F
        z, z_lb = np.maximum(z, 0.0), np.maximum(z_lb, 0.0)
        slack, slack_lb = (np.where(a > 0, 0.0, rng.uniform(0.1, 1.0, a.shape)) for a in (z, z_lb))
        q = -(apply(Q, x) + apply(A.mT, y) + apply(G.mT, z) - z_lb)
        terms = np.stack([np.vecdot(x, apply(Q, x)), np.vecdot(q, x)])
        u = 10 ** rng.uniform(-orders, orders, (*batch, 1))
        right = {"q": q / u, "b": apply(A, x), "h": apply(G, x) + slack, "lb": (x - slack_lb) * u}
        u = u[..., None]
        parts.append(({"Q": Q / u**2, "A": A / u, "G": G / u} | right, terms))
    operands, order = {}, {size: rng.permutation(size * len(parts)) for size in {n, p, m}}
    for name in ("Q", "A", "G"):
        blocks = [[a[name] if a is b else 0.0 * a[name] for a, _ in parts] for b, _ in parts]
        M = np.block(blocks)[..., order[{"Q": n, "A": p, "G": m}[name]], :][..., order[n]]
        operands[name] = np.ascontiguousarray(M)
    for name, size in {"q": n, "b": p, "h": m, "lb": n}.items():
        operands[name] = np.ascontiguousarray(np.concat([d[name] for d, _ in parts], axis=-1)[..., order[size]])
    terms = np.stack([terms for _, terms in parts])
    return operands, np.sum(0.5 * terms[:, 0] + terms[:, 1], axis=0), np.max(np.abs(terms), axis=(0, 1))


def mostly_active(rng, parts, n=4, batch=2):
    """Operands with those of A, G, lb, ub that `parts` names; most constraints are active in some problem of the batch.

    Some operands are shared.
    """
    L = rng.normal(size=(batch, n, n))
    operands = {"Q": L @ L.mT / n + np.eye(n), "q": 2 * rng.normal(size=(batch, n))}
    if "A" in parts:
        operands |= {"A": rng.normal(size=(1, n)), "b": 0.1 * rng.normal(size=(batch, 1))}
    if "G" in parts:
        operands |= {"G": rng.normal(size=(batch, 3, n)), "h": rng.uniform(0.5, 1.0, size=3)}
    if "lb" in parts:
        operands["lb"] = rng.uniform(-1.0, -0.5, size=(batch, n))
    if "ub" in parts:
        operands["ub"] = rng.uniform(0.5, 1.0, size=n)
    return operands


def strictly_feasible(rng, parts, *, cost="pd", batch=3, n=5, m=4, p=2):
    """A batch around the strictly feasible point 0, bounded, its matrices distinct."""
    L = rng.normal(size=(batch, n, {"pd": n, "psd": 2, "lp": 0}[cost]))
    operands = {"Q": L @ L.mT + (0.1 * np.eye(n) if cost == "pd" else 0.0), "q": rng.normal(size=(batch, n))}
    if "A" in parts:
        operands |= {"A": rng.normal(size=(batch, p, n)), "b": np.zeros((batch, p))}
    if "G" in parts:
        operands |= {"G": rng.normal(size=(batch, m, n)), "h": rng.uniform(0.1, 1.0, size=(batch, m))}
    if "lb" in parts:
        operands["lb"] = -rng.uniform(0.1, 1.0, size=(batch, n))
    if "ub" in parts:
        operands["ub"] = rng.uniform(0.1, 1.0, size=(batch, n))
    return operands


def relaxed(d, kappa):
    """x, y, z, z_lb, z_ub of one problem with s ∘ z = κ: Newton with backtracking on ½ xᵀQx + qᵀx − κ Σ log s."""
    n = len(d["q"])
    A, b = d.get("A", np.zeros((0, n))), d.get("b", np.zeros(0))
    rows = [(d[name], d[right]) for name, right in (("G", "h"),) if name in d]
    rows += [(-np.eye(n), -d["lb"])] if "lb" in d else []
    rows += [(np.eye(n), d["ub"])] if "ub" in d else []
    K = np.concat([row for row, _ in rows] or [np.zeros((0, n))])
    k = np.concat([right for _, right in rows] or [np.zeros(0)])
    x = np.linalg.lstsq(A, b)[0] if len(b) else np.zeros(n)
    assert np.all(k - K @ x > 0)

    def value(x):
        s = k - K @ x
        return 0.5 * x @ d["Q"] @ x + d["q"] @ x - kappa * np.sum(np.log(s)) if np.all(s > 0) else np.inf

    for _ in range(200):
        s = k - K @ x
        H = d["Q"] + K.T @ (kappa / s**2 * K.T).T
        gradient = d["Q"] @ x + d["q"] + K.T @ (kappa / s)
        M = np.block([[H, A.T], [A, np.zeros((len(b), len(b)))]])
        step, y = np.split(np.linalg.solve(M, np.concat([-gradient, b - A @ x])), [n])
        t = 1.0
        near = np.all(np.abs(K @ step) < 1e-3 * s)  # quadratic convergence, and differences of values are rounding
        while not near and value(x + t * step) > value(x) + 1e-4 * t * gradient @ step and t > 1e-10:
            t /= 2
        x = x + t * step
        if np.max(np.abs(step)) < 1e-13:
            break
    z = kappa / (k - K @ x)
    m = len(d.get("h", ()))
    z_lb = z[m : m + n] if "lb" in d else np.zeros(n)
    return x, y, z[:m], z_lb, z[-n:] if "ub" in d else np.zeros(n)
