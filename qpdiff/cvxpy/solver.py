"""The solver among CVXPY's own: ``problem.solve(solver=qpdiff.CVXPYSolver())``."""

from __future__ import annotations

import time

import cvxpy.settings as s
import numpy as np
import scipy.sparse as sp
from cvxpy.reductions.solution import Solution, failure_solution
from cvxpy.reductions.solvers import utilities
from cvxpy.reductions.solvers.qp_solvers.qp_solver import QpSolver
from cvxpy.utilities.citations import CITATION_DICT

from ..solution import Status
from ..solver import solve_qp

STATUS = {
    Status.SOLVED: s.OPTIMAL,
    Status.MAX_ITERATIONS: s.USER_LIMIT,
    Status.PRIMAL_INFEASIBLE: s.INFEASIBLE,
    Status.DUAL_INFEASIBLE: s.UNBOUNDED,
    Status.STALLED: s.SOLVER_ERROR,
}
INACCURATE = 1e-4
"""The relative residuals up to which the last iterate of a stalled problem counts as an inaccurate solution."""


class CVXPYSolver(QpSolver):
    """`qpdiff.solve_qp` as a solver of CVXPY's.

    For the quadratic and linear programs that CVXPY makes of problems, in sparse matrices. Options of ``problem.solve``
    that CVXPY does not take for itself go to `qpdiff.solve_qp`: `tol`, `rtol`, `max_iterations`, `dtype` and `engine`.
    With ``warm_start=True``, CVXPY's default, a problem that was solved before starts from its last solution.

    What became of the problem is CVXPY's "optimal", "infeasible", "unbounded" or, at the limit on iterations,
    "user_limit"; where there was no further progress it is "optimal_inaccurate" if the residuals are below 1e-4
    relative to the data, else CVXPY raises a SolverError. `problem.solver_stats` has the iterations, the time and, as
    `extra_stats`, the `qpdiff.Solution`.

    References
    ----------
    R. Schwan, Y. Jiang, D. Kuhn, C. N. Jones, "PIQP: a proximal interior-point quadratic programming solver", CDC 2023.

    Examples
    --------
    >>> import cvxpy as cp
    >>> import qpdiff
    >>> x = cp.Variable(2)
    >>> budget = cp.sum(x) == 1
    >>> problem = cp.Problem(cp.Minimize(cp.sum_squares(x)), [budget])
    >>> round(problem.solve(solver=qpdiff.CVXPYSolver()), 6)
    0.5
    >>> problem.status, round(float(budget.dual_value), 6)
    ('optimal', -1.0)
    """

    BOUNDED_VARIABLES = True

    def __eq__(self, other):
        return type(other) is type(self)  # CVXPY compiles a problem anew for a solver that differs from the last

    def __hash__(self):
        return hash(type(self))

    def name(self) -> str:
        return "QPDIFF"

    def import_solver(self) -> None:
        """Nothing more to import."""

    def cite(self, data) -> str:
        return CITATION_DICT["PIQP"]

    def solve_via_data(self, data, warm_start, verbose, solver_opts, solver_cache=None):
        options = {name: value for name, value in solver_opts.items() if name != "use_quad_obj"}  # CVXPY's own
        last = solver_cache.get(self.name()) if warm_start and solver_cache is not None else None
        start = time.perf_counter()
        P = sp.csr_array(data[s.P] + data[s.P].T) / 2  # where an entry is stored, the one across the diagonal is too
        solution = solve_qp(
            P, data[s.Q], sp.csr_array(data[s.F]), data[s.G], sp.csr_array(data[s.A]), data[s.B],
            data[s.LOWER_BOUNDS], data[s.UPPER_BOUNDS], warm_start=last, verbose=verbose, **options,
        )  # fmt: skip
        if solver_cache is not None:
            solver_cache[self.name()] = solution
        return {"solution": solution, "time": time.perf_counter() - start, "data": data}

    def invert(self, solution, inverse_data):
        sol = solution["solution"]
        status = STATUS[Status(int(sol.status))]
        if status == s.SOLVER_ERROR and _nearly_solved(sol, solution["data"]):
            status = s.OPTIMAL_INACCURATE
        attributes = {s.SOLVE_TIME: solution["time"], s.NUM_ITERS: int(sol.iterations), s.EXTRA_STATS: sol}
        duals = {}
        # Copies: CVXPY's variables refer to these arrays, and `sol`, the next warm start, has read-only ones.
        for constraints, values in ((self.EQ_CONSTR, sol.y.copy()), (self.NEQ_CONSTR, sol.z.copy())):
            duals |= utilities.get_dual_values(values, utilities.extract_dual_value, inverse_data[constraints])
        if status in s.SOLUTION_PRESENT:
            value = float(sol.objective) + inverse_data[s.OFFSET]
            return Solution(status, value, {inverse_data[self.VAR_ID]: sol.x.copy()}, duals, attributes)
        return failure_solution(status, attributes, duals if status == s.INFEASIBLE else None)


def _nearly_solved(sol, data) -> bool:
    """Return whether the residuals are small relative to the data."""
    bounds = [data[name] for name in (s.B, s.G, s.LOWER_BOUNDS, s.UPPER_BOUNDS) if data[name] is not None]
    finite = np.concat([np.abs(bound[np.isfinite(bound)]) for bound in bounds])
    return bool(
        sol.primal_residual <= INACCURATE * (1 + np.max(finite, initial=0.0))
        and sol.dual_residual <= INACCURATE * (1 + np.max(np.abs(data[s.Q]), initial=0.0))
        and sol.duality_gap <= INACCURATE * (1 + np.abs(sol.objective))
    )
