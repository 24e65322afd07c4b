"""Solvers of sparse problems one by one: PIQP, Clarabel, OSQP and ProxSuite's sparse solver.

Each `with_...(d, tolerance)` takes all eight operands of one problem and sets a solver up for its pattern, with which
the analysis of the pattern is done, and is not timed. It gives a function that makes new values of that pattern ready,
which is not timed either, and one that passes them to the solver and solves, and returns x, y, z, z_lb and z_ub.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.sparse as sp
from operands import problem

from .one_by_one import split

INFINITE = 1e20
"""What ProxSuite takes for no bound."""


def with_piqp(d, tol):
    import piqp

    solver = piqp.SparseSolver()
    settings = solver.settings
    settings.eps_abs, settings.eps_rel = tol, 0.0
    settings.check_duality_gap, settings.eps_duality_gap_abs, settings.eps_duality_gap_rel = True, tol, 0.0

    def convert(d):
        Q, A, G = (sp.csc_matrix(d[name]) for name in "QAG")
        return Q, d["q"], A, d["b"], G, np.full(len(d["h"]), -np.inf), d["h"], d["lb"], d["ub"]

    def solve(arguments):
        solver.update(*arguments)
        solver.solve()
        r = solver.result
        return [np.array(part) for part in (r.x, r.y, r.z_u, r.z_bl, r.z_bu)]

    solver.setup(*convert(d))
    return convert, solve


def with_clarabel(d, tol):
    import clarabel

    p, finite = len(d["b"]), _rows(d)[2]
    settings = clarabel.DefaultSettings()
    settings.verbose, settings.presolve_enable = False, False  # presolve leaves nothing to update
    settings.tol_feas, settings.tol_gap_abs, settings.tol_gap_rel = tol, tol, 0.0

    def convert(d):
        K, k, _ = _rows(d)
        return {"P": sp.csc_matrix(sp.triu(d["Q"])), "q": d["q"], "A": sp.csc_matrix(K), "b": k}

    def solve(values):
        solver.update(**values)
        sol = solver.solve()
        return np.array(sol.x), *split(d, finite, np.array(sol.z))

    first = convert(d)
    cones = [clarabel.ZeroConeT(p), clarabel.NonnegativeConeT(len(first["b"]) - p)]
    solver = clarabel.DefaultSolver(*first.values(), cones, settings)
    return convert, solve


def with_osqp(d, tol):
    import osqp

    p, finite = len(d["b"]), _rows(d)[2]
    solver = osqp.OSQP()

    def convert(d):
        K, k, _ = _rows(d)
        lower = np.append(k[:p], np.full(len(k) - p, -np.inf))
        return sp.csc_matrix(sp.triu(d["Q"])), d["q"], sp.csc_matrix(K), lower, k

    def solve(arguments):
        Q, q, K, lower, k = arguments
        solver.update(q=q, l=lower, u=k, Px=Q.data, Ax=K.data)
        result = solver.solve()
        return result.x, *split(d, finite, result.y)

    # Without a warm start, since a pass solves the problems of the pass before again.
    options = {"eps_abs": tol, "eps_rel": 0.0, "max_iter": 100_000, "warm_starting": False, "verbose": False}
    solver.setup(*convert(d), **options)
    return convert, solve


def with_proxsuite(d, tol):
    import proxsuite

    n, p, m = len(d["q"]), len(d["b"]), len(d["h"])
    bounded = np.isfinite(d["lb"]) | np.isfinite(d["ub"])
    solver = proxsuite.proxqp.sparse.QP(n, p, m + int(np.sum(bounded)))
    settings = solver.settings
    settings.eps_abs, settings.eps_rel = tol, 0.0
    settings.check_duality_gap, settings.eps_duality_gap_abs, settings.eps_duality_gap_rel = True, tol, 0.0

    def convert(d):
        rows = sp.csc_matrix(sp.vstack([d["G"], sp.csr_array(sp.eye_array(n))[bounded]]))
        lower = np.append(np.full(m, -INFINITE), np.maximum(d["lb"][bounded], -INFINITE))
        upper = np.append(d["h"], np.minimum(d["ub"][bounded], INFINITE))
        return sp.csc_matrix(d["Q"]), d["q"], sp.csc_matrix(d["A"]), d["b"], rows, lower, upper

    def solve(arguments):
        solver.update(*arguments)
        solver.solve()
        v = solver.results.z
        z_lb, z_ub = np.zeros((2, n))
        z_lb[bounded], z_ub[bounded] = np.maximum(-v[m:], 0.0), np.maximum(v[m:], 0.0)
        return np.array(solver.results.x), np.array(solver.results.y), np.array(v[:m]), z_lb, z_ub

    solver.init(*convert(d))
    return convert, solve


def _rows(d):
    """Return all finite constraints as K x ≤ k, the first p of them equalities, and their positions among all."""
    eye = sp.eye_array(len(d["q"]))
    K, k = sp.vstack([d["A"], d["G"], -eye, eye]), np.concatenate([d["b"], d["h"], -d["lb"], d["ub"]])
    finite = np.isfinite(k)
    return sp.csr_array(K)[finite], k[finite], finite


SOLVERS: dict[str, Callable] = {
    "piqp": with_piqp,
    "clarabel": with_clarabel,
    "osqp": with_osqp,
    "proxsuite": with_proxsuite,
}


class OneByOne:
    """A batch solved in a loop; the update with the values of each problem and its solve are timed."""

    def __init__(self, operands, tolerance, solver):
        problems = [problem(operands, b) for b in range(len(operands["q"]))]
        convert, self.solve = SOLVERS[solver](problems[0], tolerance)
        self.problems = [convert(d) for d in problems]

    def forward(self):
        self.points = [self.solve(arguments) for arguments in self.problems]

    def answer(self):
        names = ("x", "y", "z", "z_lb", "z_ub")
        return {name: np.array(values) for name, values in zip(names, zip(*self.points, strict=True), strict=True)}
