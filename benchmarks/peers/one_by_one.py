"""Solvers of one problem at a time: PIQP (dense), Clarabel, DAQP, quadprog, OSQP and ElastiQP.

Each `with_...(d, tolerance)` takes all eight operands of one problem, and gives a function that sets up and solves,
which is timed, and one that reads what it returns.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.append(str(Path(__file__).parents[2] / "tests"))
from problems import complete

PENALTY = 1e6
"""ElastiQP's, of the violation of inequalities: above all multipliers, so that its solution is that of the QP."""


class Answer(NamedTuple):
    """A solution and its multipliers, as a solver returns them."""

    claimed: bool
    """Whether it says that it solved the problem."""
    point: tuple
    """x, y, z, z_lb, z_ub."""


def with_piqp(d, tol):
    import piqp

    Q, A, G = (np.asfortranarray(d[name]) for name in "QAG")
    solver = piqp.DenseSolver()
    settings = solver.settings
    settings.eps_abs, settings.eps_rel = tol, 0.0
    settings.check_duality_gap, settings.eps_duality_gap_abs, settings.eps_duality_gap_rel = True, tol, 0.0

    def run():
        solver.setup(Q, d["q"], A, d["b"], G, np.full(len(d["h"]), -np.inf), d["h"], d["lb"], d["ub"])
        return solver.solve()

    def read(status):
        r = solver.result
        return Answer(status == piqp.PIQP_SOLVED, (r.x, r.y, r.z_u, r.z_bl, r.z_bu))

    return run, read


def with_clarabel(d, tol):
    import clarabel
    from scipy.sparse import csc_matrix

    K, k, finite = rows(d)
    p = len(d["b"])
    Q, K = csc_matrix(np.triu(d["Q"])), csc_matrix(K)
    cones = [clarabel.ZeroConeT(p), clarabel.NonnegativeConeT(len(k) - p)]
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_feas, settings.tol_gap_abs, settings.tol_gap_rel = tol, tol, 0.0

    def run():
        return clarabel.DefaultSolver(Q, d["q"], K, k, cones, settings).solve()

    def read(sol):
        return Answer(sol.status == clarabel.SolverStatus.Solved, (np.array(sol.x), *split(d, finite, sol.z)))

    return run, read


def with_daqp(d, tol):
    import daqp

    # The bounds on x come first, and are as good as none where all are infinite.
    n = len(d["q"]) if np.any(np.isfinite([d["lb"], d["ub"]])) else 0
    rows = np.concatenate([d["G"], d["A"]])
    upper = np.concatenate([d["ub"][:n], d["h"], d["b"]])
    lower = np.concatenate([d["lb"][:n], np.full(len(d["h"]), -np.inf), d["b"]])
    sense = np.where(lower == upper, 5, 0).astype(np.intc)

    def run():
        return daqp.solve(d["Q"], d["q"], rows, upper, lower, sense, primal_tol=tol, dual_tol=tol)

    def read(result):
        x, _, flag, info = result
        v_x, z, y = np.split(info["lam"], [n, n + len(d["h"])])
        v_x = v_x if n else np.zeros_like(x)
        return Answer(flag == 1, (x, y, z, np.maximum(-v_x, 0.0), np.maximum(v_x, 0.0)))

    return run, read


def with_quadprog(d, tol):
    import quadprog

    K, k, finite = rows(d)
    p = len(d["b"])
    columns = np.ascontiguousarray(-K.T)

    def run():
        return quadprog.solve_qp(d["Q"], -d["q"], columns, -k, p)

    def read(result):
        x, *_, multipliers, _ = result
        return Answer(True, (x, *split(d, finite, multipliers)))

    return run, read


def with_osqp(d, tol):
    import osqp
    from scipy.sparse import csc_matrix

    K, k, finite = rows(d)
    p = len(d["b"])
    Q, K = csc_matrix(np.triu(d["Q"])), csc_matrix(K)
    lower = np.append(k[:p], np.full(len(k) - p, -np.inf))

    def run():
        solver = osqp.OSQP()
        solver.setup(Q, d["q"], K, lower, k, eps_abs=tol, eps_rel=0.0, max_iter=100_000, verbose=False)
        return solver.solve()

    def read(result):
        claimed = result.info.status_val == osqp.SolverStatus.OSQP_SOLVED
        return Answer(claimed, (result.x, *split(d, finite, result.y)))

    return run, read


def with_elastiqp(d, tol):
    import elastiqp

    K, k, finite = rows(d)
    p = len(d["b"])
    Q, A, G = map(np.asfortranarray, (d["Q"], K[:p], K[p:]))
    equalities = {"A": A, "b": k[:p]} if p else {}

    def run():
        return elastiqp.solve(Q, d["q"], G, k[p:], PENALTY, eps_abs=tol, **equalities)

    def read(sol):
        y = sol.y if p else np.empty(0)
        return Answer(sol.status == elastiqp.Status.Solved, (sol.x, *split(d, finite, np.append(y, sol.z))))

    return run, read


def rows(d):
    """Return all finite constraints as K x ≤ k, the first p of them equalities, and their positions among all."""
    eye = np.eye(len(d["q"]))
    K, k = np.concatenate([d["A"], d["G"], -eye, eye]), np.concatenate([d["b"], d["h"], -d["lb"], d["ub"]])
    finite = np.isfinite(k)
    return K[finite], k[finite], finite


def split(d, finite, multipliers):
    """Return y, z, z_lb and z_ub from the multipliers of `rows`."""
    v = np.zeros(len(finite))
    v[finite] = multipliers
    return np.split(v, np.cumsum([len(d["b"]), len(d["h"]), len(d["q"])]))


SOLVERS: dict[str, Callable] = {
    "piqp": with_piqp,
    "clarabel": with_clarabel,
    "daqp": with_daqp,
    "quadprog": with_quadprog,
    "osqp": with_osqp,
    "elastiqp": with_elastiqp,
}


class OneByOne:
    """A batch solved in a loop; set-up and solve of each problem are timed."""

    def __init__(self, operands, tolerance, solver):
        batch = len(operands["q"])
        self.operands = operands
        each = {name: np.broadcast_to(v, (batch, *v.shape[-1 - (name in "QGA") :])) for name, v in operands.items()}
        # Copies, since some solvers refuse memory that is not theirs to write to.
        problems = [{name: value[i].copy() for name, value in each.items()} for i in range(batch)]
        pairs = [SOLVERS[solver](complete(d), tolerance) for d in problems]
        self.runs, self.readers = zip(*pairs, strict=True)

    def forward(self):
        self.results = [run() for run in self.runs]

    def answer(self):
        points = [read(result).point for read, result in zip(self.readers, self.results, strict=True)]
        names = ("x", "y", "z", "z_lb")
        return {name: np.array(values) for name, values in zip(names, list(zip(*points, strict=True))[:4], strict=True)}
