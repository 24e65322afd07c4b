"""The solver: from the operands of a batch of quadratic programs to its solution, by the steps of `qpdiff.method`.

`_run` and, where arrays are traced, `_run_traced` decide how to iterate.
"""

from __future__ import annotations

from contextlib import closing
from typing import Any, NamedTuple

import numpy as np

from . import kkt, rows
from .engine import choose_engine
from .method import (
    MAX_ITERATIONS,
    RUNNING,
    STEP_FRACTION,
    Part,
    Point,
    Residuals,
    Settings,
    State,
    cast,
    choose,
    initialize,
    make_part,
    newton,
    onto_path,
    residuals,
    start_near,
    step,
    step_length,
)
from .problem import INFINITE, Layout, Problem, broadcasts, check_values, indefinite, make_problem, symmetrized, take
from .solution import Solution, Status

CENTERING_LIMIT = 50
"""Newton steps towards a point of the central path."""


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
    ub stands for all of its entries.

    Parameters
    ----------
    Q : array (..., n, n)
        Symmetric positive semidefinite; zeros for a linear program.
    q : array (..., n)
    G, h : array (..., m, n), (..., m), optional
        h may have +inf.
    A, b : array (..., p, n), (..., p), optional
    lb, ub : array (..., n), optional
        May be infinite, and are where they are 1e20 or more away from 0, as h is; lb = ub fixes a variable.
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
        Limit on the interior-point iterations.
    warm_start : Solution, optional
        Of neighbouring problems with the same constraints present, whose batch axes broadcast to those of these
        problems. The iteration starts near it, the nearer the better it fits; where that does not end SOLVED, the
        problem is solved again from the ordinary start, and `iterations` counts both.
    check : bool
        Look at the numbers in the operands (not finite, asymmetric Q, negative curvature, lb > ub) before solving.
    verbose : bool
        Print a line per iteration with the worst residuals of the problems that are still running (array engine).
    engine : {"auto", "array", "compiled"}
        "array" is the solver in the operations of the array library; "compiled" is the same method for NumPy arrays in
        compiled code, one problem after the other, and needs the extra ``cpu``. "auto" takes it where it can.
    progress : callable, optional
        Called as ``progress(done, batch)`` from this thread, whenever a part of the batch has been solved.

    Returns
    -------
    Solution

    Raises
    ------
    TypeError, ValueError
        For bad operands, naming the operand, what it has, what was expected and the problem of the batch.

    Notes
    -----
    A proximal primal-dual interior-point method [1]_ with Mehrotra's predictor and corrector. A problem that cannot be
    solved gets its `Status` and does not disturb the others of its batch.

    The default tolerance measures the primal residual as ‖E(Kx − k)₊‖∞ / X (‖E(Kx − k)‖∞ for equalities), the dual one
    as ‖D(Qx + q + Kᵀv)‖∞ / V, and the gap divided by XV. D and E are the equilibration; X and V are lower estimates of
    how large D⁻¹x and E⁻¹v are: X is the largest entry of Ek that x = 0 does not satisfy; where it satisfies all, the
    smaller of ‖Dq‖∞ / ‖DQD‖ and of the least entry of E|k| that is not 0. V is the geometric mean of ‖Dq‖∞ and
    ‖DQD‖X, where the first is larger, else the second.

    References
    ----------
    .. [1] R. Schwan, Y. Jiang, D. Kuhn, C. N. Jones, "PIQP: a proximal interior-point quadratic programming solver",
       CDC 2023.

    Examples
    --------
    Two projections onto the simplex, of different points:

    >>> import numpy as np
    >>> points = np.array([[0.4, 0.4, 0.2], [2.0, 0.0, 0.0]])
    >>> sol = solve_qp(np.eye(3), -points, A=np.ones((1, 3)), b=[1.0], lb=np.zeros(3))
    >>> np.allclose(sol.x, [[0.4, 0.4, 0.2], [1.0, 0.0, 0.0]], atol=1e-6)
    True
    >>> sol.status.tolist()
    [0, 0]
    """
    operands = {"Q": Q, "q": q, "G": G, "h": h, "A": A, "b": b, "lb": lb, "ub": ub}
    problem = make_problem(operands, backend=backend, dtype=dtype)
    return solve_problem(
        problem, tol=tol, rtol=rtol, max_iterations=max_iterations, warm_start=warm_start, check=check,
        verbose=verbose, engine=engine, progress=progress,
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
) -> Solution:
    """`solve_qp` for operands that are a `Problem` already."""
    if problem.backend.traced:
        _refuse_traced(problem, verbose)
    settings = read_settings(problem, tol, rtol, max_iterations)
    if progress is not None and not callable(progress):
        raise TypeError(f"progress is a {type(progress).__name__}; expected a function of two numbers")
    compiled = choose_engine(engine, problem, verbose)
    with problem.backend.quietly(), problem.reproducibly():
        problem = symmetrized(problem)
        near = warm_point(problem, warm_start)
        if compiled:
            solved = compiled.solve(problem, settings, near, progress, check)
        else:
            later = kkt.prefers_dense(problem) and not problem.backend.traced
            if check and problem.batch:
                check_values(problem, convexity=not later)
            solved = _solve(problem, settings, near, verbose, progress, check and later)
        return make_solution(problem, *solved)


def _refuse_traced(problem: Problem, verbose: bool) -> None:
    for name, value in problem.operands.items():
        if problem.backend.abstract(value):
            raise TypeError(
                f"{name} has no numbers yet, because JAX traces it (in jit, vmap or grad); use qpdiff.jax.solve_qp"
            )
    if verbose:
        raise ValueError("verbose is True, which JAX cannot do: the iterations are one compiled loop")


def read_settings(problem: Problem, tol, rtol, max_iterations) -> Settings:
    single = problem.dtype == problem.backend.xp.float32
    default = 1e-4 if single else 1e-8
    for name, value in (("tol", tol), ("rtol", rtol)):
        number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
        if value is not None and not (number and 0 <= value < float("inf")):
            raise ValueError(f"{name} is {value!r}; expected a number ≥ 0")
    if isinstance(max_iterations, bool) or not isinstance(max_iterations, (int, np.integer)) or max_iterations < 0:
        raise ValueError(f"max_iterations is {max_iterations!r}; expected an integer ≥ 0")
    return Settings(
        tol=default if tol is None else float(tol),
        rtol=default if rtol is None else float(rtol),
        absolute=tol is not None,
        max_iterations=int(max_iterations),
        rho=3e-4 if single else 1e-6,
        delta=1e-3 if single else 1e-4,
        smallest=3e-4 if single else 1e-10,
        certificate=1e5 if single else 1e8,
        tiny=1e-30 if single else 1e-200,
    )


# ---- the loop: chunks of the batch, early stop, dropping of finished problems


class Outcome(NamedTuple):
    """What remains of the `State` of problems that have ended."""

    x: Any
    v: Any
    s: Any
    status: Any
    iterations: Any
    objective: Any
    primal: Any
    dual: Any
    gap: Any


def _outcome(state: State) -> Outcome:
    rest = {name: getattr(state, name) for name in Outcome._fields if name not in Residuals._fields}
    return Outcome(**state.found._asdict(), **rest)


class Ended(NamedTuple):
    """Problems of a chunk that ended together."""

    index: Any
    """Their positions in the whole batch, or a slice of it."""
    outcome: Outcome


class Kept(NamedTuple):
    """What the derivative needs of problems that were solved by one form: all of them, or those that ended together."""

    index: Any
    """Their positions in the whole batch, or a slice of it."""
    form: type | None
    """The class of the reduced form that solved them; None where nothing of it is kept."""
    constants: Any
    """Those of that form."""
    factor: Any
    """The last factor of the reduced KKT matrix, or None."""
    metric: kkt.Metric


class Linearization(NamedTuple):
    """What `qpdiff.differentiation` finds in a solution."""

    problem: Problem
    factors: Any
    """A list of `Kept`, or what the compiled engine has kept."""
    x: Any
    v: Any
    s: Any
    status: Any


def _solve(problem: Problem, settings: Settings, near: Point | None, verbose: bool, progress, check_convexity: bool):
    """The outcome, and what the derivative needs.

    The dense dual form finds out by itself whether Q is definite; `check_convexity` is about the problems that others
    have to take.
    """
    xp, backend = problem.backend.xp, problem.backend
    if backend.traced:
        outcome, factor, metric = solve_traced(problem, settings, near)
        if progress is not None:
            progress(problem.batch, problem.batch)
        return outcome, [_whole(problem, factor, metric)]

    def solve_chunk(chunk: slice) -> tuple[list[Ended], list[Kept]]:
        chosen = forms(problem.select(chunk))
        if check_convexity and any(not form.definite and xp.any(indefinite(form.problem)) for form, _ in chosen):
            check_values(problem)
        parts = [(make_part(form, settings), _in_batch(backend, chunk, where)) for form, where in chosen]
        del chosen  # which would keep what `_run` frees
        ended, kept = [], []
        while parts:
            more = _run(problem, parts, near, settings, verbose)
            ended += more[0]
            kept += more[1]
        return ended, kept

    chunks = problem.chunks()
    ended, kept, done = [], [], 0
    with closing(backend.map(solve_chunk, chunks, 1 if verbose else problem.workers)) as results:
        for chunk, solved in zip(chunks, results, strict=True):
            ended += solved[0]
            kept += solved[1]
            done += chunk.stop - chunk.start
            if progress is not None:
                progress(done, problem.batch)
    return _join(problem, ended), kept


def warm_point(problem: Problem, sol: Solution | None) -> Point | None:
    """The solution to start from, flattened to the batch axis and the rows of `problem`."""
    if sol is None:
        return None
    sizes = check_warm_start(problem, sol)
    xp, backend = problem.backend.xp, problem.backend

    def flat(value, *core):
        value = backend.asarray(value, dtype=problem.dtype)
        if len(value.shape) == len(core) or value.shape[: -len(core) or None] == (1,) * (value.ndim - len(core)):
            return xp.reshape(value, (1, *core))
        return xp.reshape(xp.broadcast_to(value, (*problem.batch_shape, *core)), (problem.batch, *core))

    parts = {name: flat(getattr(sol, name), size) for name, size in sizes.items()}
    z_lb, z_ub = parts["z_lb"], parts["z_ub"]
    if problem.lb is not None and problem.ub is not None:
        z_lb = xp.where(problem.equality[:, problem.blocks["lb"]], z_lb - z_ub, z_lb)
    rows = [parts["y"], parts["z"]]
    rows += [z_lb + 0 * parts["x"]] if problem.lb is not None else []
    rows += [z_ub] if problem.ub is not None else []
    v = xp.concat(rows, axis=-1)
    ended = flat(xp.astype(backend.asarray(sol.status), problem.dtype)[..., None], 1)
    usable = (ended != int(Status.PRIMAL_INFEASIBLE)) & (ended != int(Status.DUAL_INFEASIBLE))
    finite = [backend.all_finite(a) for a in (parts["x"], v)]
    return Point(parts["x"], v, usable & finite[0] & finite[1])


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


def _keeps_factor(problem: Problem) -> bool:
    """Whether a factor a problem is in proportion to the data, which it is not where the matrices are shared."""
    return problem.n**2 * problem.batch <= min(2**26, problem.entries)


def _keeps_constants(problem: Problem) -> bool:
    """The same for the constants of a dense dual form, which are as few as the matrices."""
    if all(M is None or M.shape[0] == 1 for M in (problem.Q, problem.A, problem.G)):
        return True
    linear = problem.m + problem.p
    return (problem.n**2 + linear * (problem.n + linear)) * problem.batch <= min(2**26, 2 * problem.entries)


def _kept(problem: Problem, part: Part, index, factor, where=None) -> Kept:
    """What the derivative needs of a part, which is at `index` of the batch, or of the problems at `where` in it."""
    form, xp = part.form, part.problem.backend.xp
    index, metric = _in_batch(part.problem.backend, index, where), _rows_at(xp, part.metric, where)
    if not (_keeps_constants if form.definite else _keeps_factor)(problem):
        return Kept(index, None, None, None, metric)
    constants = form.constants and _rows_at(xp, form.constants, where)
    return Kept(index, type(form), constants, None if form.definite else _rows_at(xp, factor, where), metric)


def forms(problem: Problem):
    """Split a chunk by the reduced form that suits each of its problems."""
    xp = problem.backend.xp
    if problem.backend.traced:
        return [(kkt.PrimalForm(problem), None)]
    form, safe = kkt.choose_form(problem)
    if safe is None:
        return [(form, None)]
    (count,) = problem.backend.count(safe)
    if count == safe.shape[0]:
        return [(form, None)]
    if count == 0:
        return [(kkt.PrimalForm(problem), None)]
    order = xp.argsort(xp.astype(~safe, xp.int8), stable=True)
    parts = []
    for make, where in ((form.select, order[:count]), (lambda part, _: kkt.PrimalForm(part), order[count:])):
        parts.append((make(problem.select(where), where), where))
    return parts


def _run(
    problem: Problem, parts, near: Point | None, settings: Settings, verbose: bool
) -> tuple[list[Ended], list[Kept]]:
    """Iterate on one part until every problem has ended; where it saves time, those that have are dropped by halves.

    The part is taken off the list, lest the caller keep what dropping has freed.
    """
    part, index = parts.pop()
    xp, backend = part.problem.backend.xp, part.problem.backend
    start = None if near is None else take(xp, near, index)
    start_from, advance = (rows.initialize, rows.step) if rows.pay(part) else (initialize, step)
    part, state, factor = start_from(part, settings)
    cold = None
    if start is not None:
        cold, (state, usable) = state, start_near(part, settings, start, state)
        if cold.seen is not None:
            state = rows.observe(part, state)
        state = choose(xp, usable, state, cold)
    # A definite form keeps its constants, which are there from the beginning.
    ended, kept = [], [_kept(problem, part, index, None)] if part.form.definite else []
    while True:
        running = state.status == RUNNING
        count, inexact, close = backend.count(running, running & state.inexact, running & state.near)
        if verbose:
            _report(xp, state)
        if count == 0 or (2 * count <= part.problem.batch and not part.idle):
            order = xp.argsort(xp.astype(~running[:, 0], xp.int8), stable=True)
            done, rest = (order[count:], order[:count]) if count else (None, None)
            outcome = _rows_at(xp, _outcome(state), done)
            ended.append(Ended(_in_batch(backend, index, done), outcome))
            if not part.form.definite:
                kept.append(_kept(problem, part, index, factor, done))
            if count == 0:
                return ended, kept
            part, index = part.select(rest), _in_batch(backend, index, rest)
            state, cold = _rows_at(xp, (state, cold), rest)
        factor = None  # the next one may take its memory
        state, factor = advance(part, settings, state, refine=inexact, stays=close or count < part.problem.batch)
        if cold is not None:
            state = _restart(xp, settings, state, cold)


def solve_traced(problem: Problem, settings: Settings, near: Point | None):
    """The outcome, the last factor of the primal form or None, and the metric, by one compiled function."""
    backend: Any = problem.backend
    return backend.jit(_run_traced)(problem.operands, near, problem.layout, settings)


def _run_traced(operands, near: Point | None, layout: Layout, settings: Settings):
    """Iterate on the whole batch until every problem has ended.

    Where shapes prefer a dual form, the numbers decide between the two when it runs, and no factor is kept.
    """
    problem, backend, xp = layout.problem(operands), layout.backend, layout.backend.xp
    keep = _keeps_factor(problem)
    _ = problem.k  # kept by the problem, so it has to be made here, where all branches and loops may use it

    def run(form):
        part = make_part(form, settings)
        part, state, factor = initialize(part, settings)
        cold = None
        if near is not None:
            cold, (state, usable) = state, start_near(part, settings, near, state)
            state = choose(xp, usable, state, cold)

        def unfinished(state, factor):
            return xp.any(state.status == RUNNING)

        def body(state, factor):
            state, factor = step(part, settings, state, refine=True, stays=True)
            state = state if cold is None else _restart(xp, settings, state, cold)
            return state, factor if keep else None

        start = state, factor if keep else None
        state, factor = backend.while_loop(unfinished, body, start, 2 * settings.max_iterations + 2)
        return _outcome(state), factor, part.metric

    form, safe = kkt.choose_traced_form(problem)
    if safe is None:
        return run(form)
    outcome = backend.cond(safe, lambda: run(form)[0], lambda: run(kkt.PrimalForm(problem))[0])
    return outcome, None, kkt.equilibrate(problem)


def _whole(problem: Problem, factor, metric: kkt.Metric) -> Kept:
    """The batch in one piece."""
    return Kept(slice(0, problem.batch), factor and kkt.PrimalForm, None, factor, metric)


def pack(lin: Linearization):
    """The arrays of a linearization whose factors are in one piece, and its layout, for a compiled function."""
    (piece,) = lin.factors
    return (lin.problem.operands, piece.factor, piece.metric, lin.x, lin.v, lin.s, lin.status), lin.problem.layout


def unpack(arrays, layout: Layout) -> Linearization:
    operands, factor, metric, x, v, s, status = arrays
    problem = layout.problem(operands)
    return Linearization(problem, [_whole(problem, factor, metric)], x, v, s, status)


def _in_batch(backend, index, where):
    """Where in the batch those problems are that are at `where` among the ones at `index`; None: all of them."""
    return index if where is None else backend.xp.take(_positions(backend, index), where, axis=0)


def _positions(backend, index):
    """A slice of the batch, or positions in it, as positions."""
    return backend.arange(index.stop)[index.start :] if isinstance(index, slice) else index


def batch_order(backend, pieces):
    """What brings the problems of all pieces into the order of the batch; None where they are in it."""
    if all(isinstance(piece.index, slice) for piece in pieces):  # chunks, one after the other
        return None
    return backend.xp.argsort(backend.xp.concat([_positions(backend, piece.index) for piece in pieces]))


def _rows_at(xp, tree, where):
    return tree if where is None else take(xp, tree, where)


def _restart(xp, settings: Settings, state: State, cold: State) -> State:
    """Begin again from the ordinary start, once, where a start near another solution has led nowhere."""
    first = state.limit == settings.max_iterations
    failed = first & (state.status != RUNNING) & (state.status != int(Status.SOLVED)) & (state.iterations > 0)
    again = cold._replace(iterations=state.iterations, limit=state.iterations + settings.max_iterations)
    return choose(xp, failed, again, state)


def _report(xp, state: State) -> None:
    running = state.status == RUNNING
    worst = (xp.max(xp.where(running, value, 0.0)) for value in (state.primal, state.dual, state.gap, state.mu))
    primal, dual, gap, mu = map(float, worst)
    print(
        f"{int(xp.max(state.iterations)):4d}  running {int(xp.sum(xp.astype(running, xp.int32))):6d}  "
        f"primal {primal:.1e}  dual {dual:.1e}  gap {gap:.1e}  mu {mu:.1e}"
    )


# ---- the central path


def relax(lin: Linearization, kappa: float) -> Linearization:
    """The points where s ∘ z = κ instead of 0, found from solutions by Newton's method, with their factors.

    A problem whose point is not found counts as STALLED.
    """
    backend: Any = lin.problem.backend
    if backend.traced:
        arrays, layout = pack(lin)
        return unpack(backend.jit(_relax_traced)(arrays, None, layout, kappa), layout)
    return _relax(lin, kappa)


def _relax_traced(arrays, _, layout: Layout, kappa: float):
    return pack(_relax(unpack(arrays, layout), kappa))[0]


def _relax(lin: Linearization, kappa: float) -> Linearization:
    problem = lin.problem
    xp, backend = problem.backend.xp, problem.backend
    settings = read_settings(problem, None, None, CENTERING_LIMIT)
    pieces, points = [], []
    for chunk in problem.chunks():
        for form, where in forms(problem.select(chunk)):
            at = _in_batch(backend, chunk, where)
            part = make_part(form, settings)
            point, factor = _center(part, settings, kappa, *take(xp, (lin.x, lin.v, lin.s), at))
            pieces.append(_kept(problem, part, at, factor))
            points.append(point)
    if not points:
        return lin
    x, v, s, found = (xp.concat(column, axis=0) for column in zip(*points, strict=True))
    order = batch_order(backend, pieces)
    if order is not None:
        x, v, s, found = (xp.take(a, order, axis=0) for a in (x, v, s, found))
    lost = ~found & (lin.status == int(Status.SOLVED))
    return Linearization(
        problem, pieces, x, v, s, xp.where(lost, xp.full_like(lin.status, int(Status.STALLED)), lin.status)
    )


def _center(part: Part, settings: Settings, kappa: float, x, v, s):
    """Newton's method for the KKT conditions with s ∘ z = κ: the point, whether it was found, and its factor."""
    problem, (D, E, primal, dual, _) = part.problem, part.metric
    backend, xp = problem.backend, problem.backend.xp
    v, s = onto_path(part, v, problem.where_inequality(v / E - E * s, 0.0), kappa)
    smallest = xp.full_like(x[:, :1], settings.smallest)
    accuracy = xp.finfo(problem.dtype).eps ** 0.5

    def move(x, v, s, *_):
        *_, r_x, r_v = residuals(part.exact, *(cast(xp, a, part.exact.dtype) for a in (x, v, s)))
        r_x, r_v = (cast(xp, a, problem.dtype) for a in (r_x, r_v))
        s_, z_ = (problem.where_inequality(a, float("inf")) for a in (s, v))
        _, factor, *_, direction = newton(part, s, z_, r_x, r_v, smallest, smallest)
        excess = problem.where_inequality(s * v - kappa, 0.0)
        found = (
            (backend.norm(D * r_x) <= accuracy * (dual + backend.norm(D * problem.q)))
            & (backend.norm(E * r_v) <= accuracy * (primal + backend.norm(E * problem.k)))
            & (backend.norm(excess) <= accuracy * kappa)
        )
        dx, dv, ds = direction(excess, smallest > 0)
        alpha = xp.minimum(step_length(backend, s_, ds, STEP_FRACTION), step_length(backend, z_, dv, STEP_FRACTION))
        alpha = xp.where(found, 0.0, alpha)
        return x + alpha * dx, v + alpha * dv, s + alpha * ds, found, factor

    def lost(x, v, s, found, factor):
        return ~xp.all(found)

    *point, factor = problem.backend.while_loop(lost, move, move(x, v, s), settings.max_iterations)
    return point, factor


# ---- the result


def _join(problem: Problem, pieces: list[Ended]) -> Outcome:
    """The outcomes of the pieces, which the list loses, in the order of the batch."""
    xp, backend = problem.backend.xp, problem.backend
    names = Outcome._fields
    if not pieces:
        kinds = {"status": xp.int32, "iterations": xp.int32}
        kinds |= dict.fromkeys(("objective", "primal", "dual", "gap"), backend.exact)
        widths = {"x": problem.n, "v": problem.rows, "s": problem.rows}
        return Outcome(*(backend.full((0, widths.get(k, 1)), 0, kinds.get(k, problem.dtype)) for k in names))
    columns = [[getattr(piece.outcome, name) for piece in pieces] for name in names]
    order = batch_order(backend, pieces)
    pieces.clear()  # each column is free once it is joined
    whole = {}
    for name in reversed(names):
        joined = xp.concat(columns.pop(), axis=0)
        whole[name] = joined if order is None else xp.take(joined, order, axis=0)
    return Outcome(**whole)


def make_solution(problem: Problem, outcome: Outcome, factors) -> Solution:
    xp = problem.backend.xp
    x, v, s = outcome.x, outcome.v, outcome.s
    y, z, z_lb, z_ub = multipliers(problem, v)
    slack = s[:, problem.blocks["G"]]
    if problem.m and not problem.backend.none(absent := problem.h >= INFINITE):
        slack = xp.where(absent, float("inf"), slack)

    def shaped(value):
        value = problem.returned(value)
        return value if len(problem.batch_shape) == 1 else xp.reshape(value, (*problem.batch_shape, value.shape[-1]))

    def scalar(name):
        value = getattr(outcome, name)
        return value[:, 0] if len(problem.batch_shape) == 1 else xp.reshape(value, problem.batch_shape)

    return Solution(
        x=shaped(x),
        y=shaped(y),
        z=shaped(z),
        z_lb=shaped(z_lb),
        z_ub=shaped(z_ub),
        s=shaped(slack),
        status=scalar("status"),
        iterations=scalar("iterations"),
        objective=scalar("objective"),
        primal_residual=scalar("primal"),
        dual_residual=scalar("dual"),
        duality_gap=scalar("gap"),
        linearization=Linearization(problem, factors, x, v, s, outcome.status),
    )


def multipliers(problem: Problem, v):
    """The multipliers y, z, z_lb, z_ub in those of all rows; a fixed variable's goes to one bound by its sign."""
    xp, blocks = problem.backend.xp, problem.blocks
    zero: Any = None
    if problem.lb is None or problem.ub is None:
        zero = problem.backend.zeros_of_all(v.shape[0], problem.n, problem.dtype)
    z_lb = v[:, blocks["lb"]] if problem.lb is not None else zero
    z_ub = v[:, blocks["ub"]] if problem.ub is not None else zero
    if problem.lb is not None and problem.ub is not None:
        fixed, at_lower = fixed_variables(problem, v)
        zero = xp.zeros_like(z_lb)
        z_ub = xp.where(fixed, xp.where(at_lower, zero, -z_lb), z_ub)
        z_lb = xp.where(fixed & ~at_lower, zero, z_lb)
    return v[:, blocks["A"]], v[:, blocks["G"]], z_lb, z_ub


def fixed_variables(problem: Problem, v):
    """Which variables are fixed by lb = ub, and at which of them lb holds the variable against the cost."""
    return problem.equality[:, problem.blocks["lb"]], v[:, problem.blocks["lb"]] >= 0
