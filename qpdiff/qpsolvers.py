"""qpsolvers: `qpsolvers.solve_qp(..., solver="qpdiff")`, and its problems and solutions as ours and back."""

from __future__ import annotations

import time

import numpy as np
import scipy.sparse as sp

from .problem import OPERANDS
from .solution import Solution, Status
from .solver import solve_qp
from .sparse import is_sparse, read_sparse
from .validation import make_problem

try:
    import qpsolvers
except ImportError as error:
    raise ImportError("qpdiff.qpsolvers needs qpsolvers: pip install 'qpdiff[qpsolvers]'") from error


def register() -> None:
    """Make "qpdiff" one of the solvers of qpsolvers, for `qpsolvers.solve_qp` and `qpsolvers.solve_problem`.

    qpsolvers lists its solvers at its import and has no entry point for others, so this adds to its public tables. To
    call it again changes nothing.

    Examples
    --------
    >>> import numpy as np
    >>> import qpsolvers
    >>> register()
    >>> P, q, ub = np.eye(2), -np.ones(2), np.array([0.5, 2.0])
    >>> x = qpsolvers.solve_qp(P, q, ub=ub, solver="qpdiff")
    >>> np.round(x, 6).tolist()
    [0.5, 1.0]
    """
    qpsolvers.solvers.solve_function["qpdiff"] = solve_problem
    for names in (qpsolvers.available_solvers, qpsolvers.dense_solvers, qpsolvers.sparse_solvers):
        if "qpdiff" not in names:
            names.append("qpdiff")


def solve_problem(problem, initvals=None, verbose: bool = False, **options):
    """Solve a problem of qpsolvers'.

    Parameters
    ----------
    problem : qpsolvers.Problem
        With dense or sparse matrices.
    initvals : array, optional
        Not used: a warm start needs multipliers too, and is the option `warm_start`.
    verbose : bool
        As for `qpdiff.solve_qp`.
    **options
        Further options of `qpdiff.solve_qp`.

    Returns
    -------
    qpsolvers.Solution
        See `to_solution`.

    Raises
    ------
    qpsolvers.ProblemError
        For bad operands, with the message of `qpdiff.solve_qp`.
    """
    start = time.perf_counter()
    operands = from_problem(problem)
    built = time.perf_counter()
    try:
        sol = solve_qp(**operands, verbose=verbose, **options)
    except ValueError as error:
        raise qpsolvers.ProblemError(str(error)) from error
    solution = to_solution(problem, sol)
    solution.build_time, solution.solve_time = built - start, time.perf_counter() - built
    return solution


def from_problem(problem) -> dict[str, np.ndarray]:
    """Return the operands of `qpdiff.solve_qp` that state a problem of qpsolvers'.

    Parameters
    ----------
    problem : qpsolvers.Problem
        With dense or sparse matrices.

    Returns
    -------
    dict
        Arrays by name: Q (n, n), its P; q (n); and G (m, n), h (m), A (p, n), b (p), lb (n), ub (n) where it has them.
        Sparse matrices stay sparse.

    Examples
    --------
    >>> import numpy as np
    >>> import qpsolvers
    >>> problem = qpsolvers.Problem(np.eye(2), np.ones(2), lb=np.zeros(2))
    >>> sorted(from_problem(problem))
    ['Q', 'lb', 'q']
    """
    values = dict(zip(OPERANDS, problem.unpack(), strict=True))
    given = {name: sp.csr_array(value) if sp.issparse(value) else value for name, value in values.items()}
    for matrix, name in (("G", "h"), ("A", "b")):  # a constraint of one row may be a vector, and its side a number
        if given[matrix] is not None:
            given[name] = np.atleast_1d(given[name])
            if not sp.issparse(given[matrix]):
                given[matrix] = np.atleast_2d(given[matrix])
    return {name: value for name, value in given.items() if value is not None}


def to_problem(Q, q, G=None, h=None, A=None, b=None, lb=None, ub=None):
    """Return the `qpsolvers.Problem` of the operands of one problem of `qpdiff.solve_qp`.

    Parameters
    ----------
    Q, q, G, h, A, b, lb, ub : array
        As for `qpdiff.solve_qp`, without batch axes. A number for h, b, lb or ub stands for all of its entries. Sparse
        matrices become those of scipy.sparse in columns (CSC), as qpsolvers wants them.

    Raises
    ------
    TypeError, ValueError
        For operands that `qpdiff.solve_qp` refuses, and for batch axes.

    Examples
    --------
    >>> import numpy as np
    >>> to_problem(np.eye(2), np.ones(2), lb=0.0).lb.tolist()
    [0.0, 0.0]
    """
    given = {"Q": Q, "q": q, "G": G, "h": h, "A": A, "b": b, "lb": lb, "ub": ub}
    arrays = {name: _of_qpsolvers(name, value) for name, value in given.items()}
    make_problem(arrays)  # for its errors
    for name, value in arrays.items():
        if value is not None and value.ndim > len(OPERANDS[name]):
            raise ValueError(f"{name} has shape {value.shape}; qpsolvers states one problem, without batch axes")
    n = len(arrays["q"])
    sizes = {"lb": n, "ub": n}
    sizes |= {side: arrays[m].shape[0] for m, side in (("G", "h"), ("A", "b")) if given[m] is not None}
    for name, size in sizes.items():
        if arrays[name] is not None and arrays[name].ndim == 0:
            arrays[name] = np.full(size, arrays[name])
    return qpsolvers.Problem(*arrays.values())


def _of_qpsolvers(name: str, value):
    """Return an operand as an array or a matrix of scipy.sparse."""
    if value is None:
        return None
    if not is_sparse(value):
        return np.asarray(value, dtype=float)
    matrix = read_sparse(name, value)
    if matrix.values.ndim > 1:
        return matrix  # with batch axes, for the caller to refuse
    csr = sp.csr_matrix((np.asarray(matrix.values, dtype=float), matrix.indices, matrix.indptr), matrix.pattern.shape)
    return csr.tocsc()


def to_solution(problem, sol: Solution):
    """Return the solution of one problem as qpsolvers has it.

    Parameters
    ----------
    problem : qpsolvers.Problem
        The one that was solved.
    sol : Solution
        Of `qpdiff.solve_qp` with the operands `from_problem(problem)`.

    Returns
    -------
    qpsolvers.Solution
        With z_box = z_ub − z_lb. Where the problem is not SOLVED, `found` is False and x and the multipliers are None.
        ``extras["solution"]`` is `sol`, which `qpdiff.vjp` differentiates; ``extras["status"]`` is its `Status`.
    """
    status = Status(int(sol.status))
    solution = qpsolvers.Solution(problem, extras={"solution": sol, "status": status}, found=status == Status.SOLVED)
    if solution.found:
        bounded = problem.lb is not None or problem.ub is not None
        solution.obj = float(sol.objective)
        solution.x, solution.y, solution.z = sol.x.copy(), sol.y.copy(), sol.z.copy()  # those of `sol` are read-only
        solution.z_box = sol.z_ub - sol.z_lb if bounded else np.empty(0)
    return solution


def from_solution(solution) -> Solution:
    """Return a solution of qpsolvers', by any of its solvers, as one that `qpdiff.solve_qp` takes as a warm start.

    Parameters
    ----------
    solution : qpsolvers.Solution
        That was found.

    Returns
    -------
    Solution
        Without batch axes, `iterations` 0. `qpdiff.vjp` does not take it: solve with it as a warm start first.

    Raises
    ------
    ValueError
        For a solution that was not found.
    """
    if not solution.found:
        raise ValueError("the solution was not found, so it has no point to start from")
    given = from_problem(solution.problem)
    # A solver of theirs may give multipliers as a list.
    parts = (solution.x, solution.y, solution.z, solution.z_box)
    x, y, z, box = (np.asarray([] if part is None else part, dtype=float) for part in parts)
    box = box if box.size else np.zeros(len(x))
    return Solution(
        x=x, y=y, z=z, z_lb=np.maximum(-box, 0), z_ub=np.maximum(box, 0),
        s=given["h"] - given["G"] @ x if "G" in given else np.empty(0),
        status=np.asarray(Status.SOLVED), iterations=np.asarray(0),
        objective=np.asarray(x @ given["Q"] @ x / 2 + given["q"] @ x),
        primal_residual=np.asarray(solution.primal_residual()), dual_residual=np.asarray(solution.dual_residual()),
        duality_gap=np.asarray(solution.duality_gap()),
    )  # fmt: skip
