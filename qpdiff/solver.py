"""The solver: from the operands of a batch of quadratic programs to its solution, by one of the engines."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from .engines.base import MAX_ITERATIONS, Linearization, Outcome, Settings, StartingPoint, make_settings
from .engines.choice import check_engine, choose_engine, explain_choice
from .prices import with_prices
from .problem import INFINITE, Problem, cached, join_rows, slack, split_rows
from .solution import FIELDS, Solution, Status, whole_solution
from .validation import broadcasts, make_problem, symmetrized

_log = logging.getLogger("qpdiff")
MOST_ITERATIONS = 2**30 - 2
"""The engines count in 32 bits, and up to twice as many."""


def solve_qp(
    Q,
    q,
    G=None,
    h=None,
    A=None,
    b=None,
    lb=None,
    ub=None,
    *,
    elastic=None,
    elastic_quadratic=None,
    backend=None,
    dtype=None,
    tol=None,
    rtol=None,
    max_iterations=MAX_ITERATIONS,
    warm_start=None,
    check=True,
    verbose=False,
    engine="auto",
    progress=None,
):
    """Solve a batch of convex quadratic programs.

    ::

        minimise    ½ xᵀQx + qᵀx
        subject to  A x = b        multipliers y
                    G x ≤ h        multipliers z ≥ 0
                    lb ≤ x ≤ ub    multipliers z_lb, z_ub ≥ 0

    Each operand is its core shape with any leading batch axes, and these broadcast together as in NumPy. An operand
    without batch axes is shared by all problems and never copied. A number, or an array without axes, for h, b, lb or
    ub stands for all of its entries. Any of Q, G and A may be sparse: a `Sparse`, or a matrix
    of scipy.sparse, torch or JAX. Then the compiled engine solves by a sparse factorisation.

    Parameters
    ----------
    Q : array (..., n, n)
        Symmetric positive semidefinite; zeros for a linear program.
    q : array (..., n)
        Linear term of the cost.
    G, h : array (..., m, n), (..., m), optional
        Inequalities; a row whose h is +inf is absent.
    A, b : array (..., p, n), (..., p), optional
        Equalities.
    lb, ub : array (..., n), optional
        May be infinite, and are where they are 1e20 or more away from 0, as h is; lb = ub fixes a variable.
    elastic : number or dict, optional
        Price w ≥ 0 of violating a constraint by one unit, so that problems whose constraints contradict each other are
        SOLVED too, where they are violated least in that sense: a number for all rows of A and G, or a dict with some
        of "A", "G" and "bounds", each a number or an array of the shape of b, h or lb; inf, or 1e20 or more, where a
        constraint is hard, 0 where it does not count. The multipliers of these constraints end in [0, w], those of A in
        [−w, w]; where those of the problem without prices are below w, its solution is the solution [2]_. What is not
        named is hard.
    elastic_quadratic : number or dict, optional
        σ ≥ 0 of a quadratic price, ½(violation)²/σ, in the same form; 0 where there is none. With a price w too, it
        holds up to a violation of σw, from where on each further unit costs w (the Huber function).
    backend : {"numpy", "cupy", "torch", "jax"}, optional
        Move the operands there first. By default they stay in their library; lists mean NumPy.
    dtype : {"float32", "float64"}, optional
        The type to compute in and to return. By default all is computed in float64, where the library has it, and
        returned in float32 if every floating point operand is float32. "float32" computes in that: for speed, with a
        solution to 1e-4 and gradients that may be wrong beside a nearly active constraint.
    tol : float, optional
        Absolute tolerance on the primal residual, the dual residual and the duality gap, in the caller's units (see
        `Solution`). By default they are measured in units of the problem's own, which do not change with those of the
        cost, of the variables or of the constraints, and the tolerance is 1e-8 where it is computed in float64, 1e-4 in
        float32: see Notes.
    rtol : float, optional
        Relative tolerance; 1e-8 in float64, 1e-4 in float32. With r one of the three residuals, and scale the largest
        of the terms that it is a sum of (‖Kx‖∞ for the primal residual; ‖Qx‖∞, ‖q‖∞, ‖Kᵀv‖∞ for the dual; |xᵀQx|,
        |qᵀx|, |kᵀv| for the gap; K, k, v all constraints together), a problem is SOLVED when all three r ≤ tol +
        rtol·scale. The iteration goes on from such a point while a step still halves the largest r, down to tol / 10,
        so that rtol decides only where rounding or bad conditioning is in the way of tol. ``rtol=0`` insists on tol.
        Norms are infinity norms, freshly computed.
    max_iterations : int
        Limit on the interior-point iterations, 200 by default.
    warm_start : Solution, optional
        Of neighbouring problems with the same constraints present, whose batch axes broadcast to those of these
        problems. The iteration starts close to it, the closer the better it fits; where that does not end SOLVED, the
        problem is solved again from the ordinary start, and `iterations` counts both.
    check : bool
        Check the numbers in the operands (not finite, asymmetric Q, negative curvature, lb > ub) before solving.
    verbose : bool
        Print a line per iteration with the worst residuals of the problems that are still running (array engine).
    engine : {"auto", "array", "compiled"}
        "array" is the solver in the operations of the array library; "compiled" is the same method in C++, for NumPy
        arrays one problem after the other, for CuPy's and torch's on an NVIDIA GPU in kernels. "auto" takes it where it
        can; the kernels, which no GPU has run yet, only where the environment has QPDIFF_GPU_ENGINE=1.
    progress : callable, optional
        Called as ``progress(done, batch)`` from this thread, whenever a part of the batch has been solved.

    Returns
    -------
    Solution
        Of all problems, with a status for each.

    Raises
    ------
    TypeError, ValueError
        For bad operands, naming the operand, what it has, what was expected and the problem of the batch.

    Notes
    -----
    A proximal primal-dual interior-point method [1]_ with Mehrotra's predictor and corrector. A problem that cannot be
    solved gets its `Status` and does not disturb the others of its batch.

    The logger "qpdiff" says at level DEBUG which engine solves, on which device, and why not the compiled one.

    The operands are not copied where they have the right type: they must stay as they are as long as `vjp` and `jvp`
    are called with the solution, and until its `violation` was asked for. So must the solution's arrays, which are
    read-only where the library has that (NumPy).

    The default tolerance measures the primal residual as ‖E(Kx − k)₊‖∞ / X (‖E(Kx − k)‖∞ for equalities), the dual one
    as ‖D(Qx + q + Kᵀv)‖∞ / V, and the gap divided by XV. D and E are the equilibration; X and V are lower estimates of
    how large D⁻¹x and E⁻¹v are: X is the largest entry of Ek that x = 0 does not satisfy; where it satisfies all, the
    smaller of ‖Dq‖∞ / ‖DQD‖, with the q of variables with curvature, and of the least entry of E|k| that is not 0; 1e-8
    of the former with all of q where neither is there. V is the geometric mean of ‖Dq‖∞ and ‖DQD‖X, where the first is
    larger, else the larger of the first and of the least length of a row of DQD times X (‖DQD‖X for q = 0). Variables
    in no entry of Q, A and G do not count unless they have the whole cost. 1e-13 ‖D⁻¹x‖∞ (5e-7 in float32) of the
    primal residual counts as rounding.

    References
    ----------
    .. [1] R. Schwan, Y. Jiang, D. Kuhn, C. N. Jones, "PIQP: a proximal interior-point quadratic programming solver",
       CDC 2023.
    .. [2] R. Fletcher, "Practical methods of optimization", 2nd ed., 1987, section 14.3: the exact ℓ1 penalty.

    Examples
    --------
    Two projections onto the simplex, of different points:

    >>> import numpy as np
    >>> points = np.array([[0.4, 0.4, 0.2], [2.0, 0.0, 0.0]])
    >>> sol = solve_qp(np.eye(3), -points, A=np.ones((1, 3)), b=[1.0], lb=0.0)
    >>> np.allclose(sol.x, [[0.4, 0.4, 0.2], [1.0, 0.0, 0.0]], atol=1e-6)
    True
    >>> sol.status.tolist()
    [0, 0]

    No x satisfies x ≥ 1 and x ≤ 0. With prices of 2 and 1 the second gives way:

    >>> G, h = [[-1.0], [1.0]], [-1.0, 0.0]
    >>> sol = solve_qp([[0.0]], [0.0], G, h, elastic={"G": [2.0, 1.0]})
    >>> np.round(sol.x, 6).tolist(), np.round(sol.violation.G, 6).tolist()
    ([1.0], [0.0, 1.0])
    """
    operands = {"Q": Q, "q": q, "G": G, "h": h, "A": A, "b": b, "lb": lb, "ub": ub}
    operands, numbers = with_prices(operands, elastic, elastic_quadratic)
    problem = make_problem(operands, backend=backend, dtype=dtype, price_numbers=numbers)
    problem.backend.warn_of_gradients(operands)
    return solve_problem(
        problem, tol=tol, rtol=rtol, max_iterations=max_iterations, warm_start=warm_start, check=check,
        verbose=verbose, engine=engine, progress=progress, read_only=True,
    )  # fmt: skip


def solve_problem(
    problem: Problem,
    *,
    tol=None,
    rtol=None,
    max_iterations=MAX_ITERATIONS,
    warm_start=None,
    check=True,
    verbose=False,
    engine="auto",
    progress=None,
    read_only=False,
    finish=None,
):
    """`solve_qp` for operands that are a `Problem` already.

    `finish` makes what is returned of the problem, the outcome and the factors; by default that is `make_solution`.
    With `read_only`, what the derivative reads of the solution cannot be changed, where the library has that. An
    adapter whose framework sees to that by itself, or takes no such arrays, leaves it out.
    """
    if problem.backend.traced:
        _refuse_traced(problem, verbose)
    settings = read_settings(problem, tol, rtol, max_iterations)
    _check_progress(progress)
    chosen = choose_engine(engine, problem, verbose)
    log_choice(problem, lambda: explain_choice(engine, problem, verbose))
    with problem.backend.no_grad(), problem.reproducibly():
        problem = symmetrized(problem)
        start = warm_point(problem, warm_start)
        options = {"check": bool(check), "verbose": bool(verbose)}  # which NumPy may have made
        outcome, factors = chosen.solve(problem, settings, start, progress=progress, **options)
        if read_only:
            problem.backend.make_read_only(outcome[:4])  # x, v, s and status: copies would take longer in small solves
        return (finish or make_solution)(problem, outcome, factors)


def log_choice(problem: Problem, explain: Callable[[], str]) -> None:
    """Log the sizes of the problems, and which engine solves them."""
    if _log.isEnabledFor(logging.DEBUG):
        sizes = problem.batch_shape, problem.n, problem.m, problem.p
        _log.debug("batch %s, n = %d, m = %d, p = %d: %s", *sizes, explain())


OPTIONS = frozenset(inspect.signature(solve_problem).parameters) - {"problem", "read_only", "finish"}
"""The options of `solve_problem` that users may pass through an adapter."""


def check_names(function: str, options: Collection[str]) -> None:
    """Raise a TypeError for an option that is unknown, in Python's words for the function that the user has called."""
    for name in options:
        if name not in OPTIONS:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")


def check_options(function: str, options: dict[str, Any]) -> None:
    """Refuse options that a solve with them would refuse, whatever the problem."""
    check_names(function, options)
    _check_limits(options.get("tol"), options.get("rtol"), options.get("max_iterations", MAX_ITERATIONS))
    _check_progress(options.get("progress"))
    check_engine(options.get("engine", "auto"))


def _check_progress(progress) -> None:
    if progress is not None and not callable(progress):
        raise TypeError(f"progress is a {type(progress).__name__}; expected a function of two numbers")


def _refuse_traced(problem: Problem, verbose: bool) -> None:
    for name, value in problem.operands.items():
        if problem.backend.is_tracer(value):
            raise TypeError(
                f"{name} has no numbers yet, because JAX traces it (in jit, vmap or grad); use qpdiff.jax.solve_qp"
            )
    if verbose:
        raise ValueError("verbose is True, which JAX cannot do: the iterations are one compiled loop")


def read_settings(problem: Problem, tol, rtol, max_iterations) -> Settings:
    """Check the caller's tolerances and limit, and make the settings of them."""
    _check_limits(tol, rtol, max_iterations)
    return make_settings(problem, tol, rtol, min(int(max_iterations), MOST_ITERATIONS))


@cached
def _check_limits(tol, rtol, max_iterations) -> None:
    for name, value in (("tol", tol), ("rtol", rtol)):
        if value is None:
            continue
        number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
        if not (number and 0 <= value < float("inf")):
            raise ValueError(f"{name} is {value!r}; expected a number ≥ 0")
    if isinstance(max_iterations, bool) or not isinstance(max_iterations, (int, np.integer)) or max_iterations < 0:
        raise ValueError(f"max_iterations is {max_iterations!r}; expected an integer ≥ 0")


def warm_point(problem: Problem, sol: Solution | None) -> StartingPoint | None:
    """Flatten the solution to start from to the batch axis and the rows of `problem`."""
    if sol is None:
        return None
    sizes = check_warm_start(problem, sol)
    xp, backend = problem.backend.xp, problem.backend

    def flat(value, size):
        value = backend.asarray(value, dtype=problem.dtype)
        if math.prod(value.shape[:-1]) == 1:
            return xp.reshape(value, (1, size))
        return xp.reshape(xp.broadcast_to(value, (*problem.batch_shape, size)), (problem.batch, size))

    x, *multipliers = (flat(getattr(sol, name), size) for name, size in sizes.items())
    v = join_rows(problem, *multipliers)
    ended = flat(xp.astype(backend.asarray(sol.status), problem.dtype)[..., None], 1)
    usable = (ended != int(Status.PRIMAL_INFEASIBLE)) & (ended != int(Status.DUAL_INFEASIBLE))
    return StartingPoint(x, v, usable & backend.all_finite(x) & backend.all_finite(v))


def check_warm_start(problem: Problem, sol) -> dict[str, int]:
    """Refuse what is no solution of such problems; the sizes of its parts, by name."""
    if not isinstance(sol, Solution):
        raise TypeError(f"warm_start is a {type(sol).__name__}; expected a qpdiff.Solution")
    sizes = {"x": problem.n, "y": problem.p, "z": problem.m, "z_lb": problem.n, "z_ub": problem.n}
    fits = broadcasts(tuple(sol.status.shape), problem.batch_shape)
    for name, size in sizes.items():
        shape = tuple(getattr(sol, name).shape)
        if not fits or shape[-1] != size:
            expected = (*problem.batch_shape, size)
            raise ValueError(f"warm_start.{name} has shape {shape}; expected one that broadcasts to {expected}")
    return sizes


# ---- the result


def make_solution(problem: Problem, outcome: Outcome, factors) -> Solution:
    """Put the outcome of an engine into the caller's shapes and type."""
    xp, batch_shape = problem.backend.xp, problem.batch_shape
    y, z, z_lb, z_ub = split_rows(problem, outcome.v, outcome.v)
    s = outcome.s[:, problem.blocks["G"]]
    if problem.m and not problem.backend.known_all_false(problem.h >= INFINITE):
        s = slack(xp, s, problem.h)

    point = [outcome.x, y, z, z_lb, z_ub, s]
    if problem.result != problem.dtype:
        point = [problem.returned(value) for value in point]
    if len(batch_shape) == 1:
        scalars = [value[:, 0] for value in outcome[3:]]
    elif batch_shape:
        point = [xp.reshape(value, (*batch_shape, value.shape[-1])) for value in point]
        scalars = [xp.reshape(value, batch_shape) for value in outcome[3:]]
    else:
        point, scalars = [value[0, ...] for value in point], [value[0, 0, ...] for value in outcome[3:]]
    values = dict(zip(FIELDS, point + scalars, strict=True))
    values["linearization"] = Linearization(problem, factors, *outcome[:4])
    return whole_solution(values)
