"""The solver: a proximal primal-dual interior-point method on a batch of quadratic programs.

Each step is a predictor-corrector step of Mehrotra's on the KKT system with proximal terms around the iterate: ρ on the
variables and δ on the multipliers, which shrink with the complementarity. The step is one function from named state to
named state; `_run` and, where arrays are traced, `_run_traced` decide how to iterate.

References
----------
R. Schwan, Y. Jiang, D. Kuhn, C. N. Jones, "PIQP: a proximal interior-point quadratic programming solver", CDC 2023.
J. Nocedal, S. J. Wright, "Numerical optimization", 2nd ed., 2006, section 16.6.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from . import kkt
from .engine import choose_engine
from .problem import INFINITE, Layout, Problem, broadcasts, check_values, make_problem
from .solution import Solution, Status

MAX_ITERATIONS = 200
RUNNING = -1
STEP_FRACTION = 0.99
"""Share of the step to the boundary of s > 0, z > 0 that is taken."""
CENTERING_LIMIT = 50
"""Newton steps towards a point of the central path."""
IMPATIENCE = 3
"""Iterations without progress after which variables and multipliers move by the same step length."""
PATIENCE = 30
"""Iterations without progress after which a problem counts as stalled."""
LUCK = 1e-4
"""Share of the rounding error of the duality gap that counts towards the gap."""


class Settings(NamedTuple):
    """The numbers of the method for one floating point type."""

    tol: float
    rtol: float
    max_iterations: int
    rho: float
    delta: float
    smallest: float
    """Lower limit of ρ and δ."""
    certificate: float
    """How large |kᵀv| must be against ‖Kᵀv‖∞ to prove infeasibility (likewise for unboundedness); 1% of it is enough
    where the iteration ends without a solution."""
    tiny: float


class State(NamedTuple):
    """The iterate of every problem; scalars have shape (B, 1). Residuals have the type of `Part.exact`."""

    x: Any
    v: Any
    """Multipliers of all rows."""
    s: Any
    """Slack of all rows, 0 where the row is no inequality."""
    mu: Any
    rho: Any
    delta: Any
    r_x: Any
    """−(Qx + q + Kᵀv)."""
    r_v: Any
    """k − Kx − s."""
    Qx: Any
    Kx: Any
    objective: Any
    primal: Any
    dual: Any
    gap: Any
    near: Any
    """Whether the iterate is within the tolerance."""
    worst: Any
    """Largest of the three residuals."""
    best: Any
    """Smallest `worst` so far."""
    inexact: Any
    """Whether the last step was not accurate enough to go without refinement."""
    proof: Any
    """How near to a certificate of infeasibility or unboundedness the iterates have come."""
    waiting: Any
    """Iterations since `best` or `proof` last improved."""
    iterations: Any
    limit: Any
    """Iterations after which to give up."""
    status: Any


class Sizes(NamedTuple):
    """Numbers of each problem's data, (B or 1, 1)."""

    inequalities: Any
    """How many there are, at least 1."""
    k: Any
    """The largest |k|."""
    q: Any
    scaled_k: Any
    """The largest |k| in the scaled problem, at least 1."""
    scaled_q: Any


class Part(NamedTuple):
    """Problems that are iterated on together, with what does not change on the way."""

    form: Any
    metric: kkt.Metric
    sizes: Sizes
    exact: Problem
    """The problems in float64, in which residuals are computed: in float32 rounding would hide what is left."""

    @property
    def problem(self) -> Problem:
        return self.form.problem

    def select(self, index) -> Part:
        problem = self.problem.select(index)
        exact = problem if self.exact is self.problem else self.exact.select(index)
        xp = problem.backend.xp
        metric = kkt.Metric(*kkt.take(xp, tuple(self.metric), index))
        sizes = Sizes(*kkt.take(xp, tuple(self.sizes), index))
        return Part(self.form.select(problem, index), metric, sizes, exact)


def make_part(form) -> Part:
    """The problems of a reduced form, ready to iterate on."""
    problem, xp = form.problem, form.problem.backend.xp
    metric, exact = kkt.equilibrate(problem), problem.astype(problem.backend.exact)
    D, E = metric
    k, q = xp.abs(exact.k), xp.abs(exact.q)
    sizes = Sizes(
        inequalities=xp.maximum(_sum(xp, xp.astype(problem.inequality, problem.dtype)), 1.0),
        k=_max(xp, k), q=_max(xp, q),
        scaled_k=xp.maximum(_max(xp, E * k), 1.0), scaled_q=xp.maximum(_max(xp, D * q), 1.0),
    )  # fmt: skip
    return Part(form, metric, sizes, exact)


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
    without batch axes is shared by all problems and never copied.

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
        By default float32 if every floating point operand is, else float64.
    tol : float, optional
        Absolute tolerance; 1e-8 in float64, 1e-4 in float32.
    rtol : float, optional
        Relative tolerance; the same defaults. With r the primal residual, the dual residual and the duality gap (see
        `Solution`), and scale the largest of the terms that each is a sum of (‖Kx‖∞, ‖k‖∞ for the primal residual;
        ‖Qx‖∞, ‖q‖∞, ‖Kᵀv‖∞ for the dual; |xᵀQx|, |qᵀx|, |kᵀv| for the gap; K, k, v all constraints together), a
        problem is SOLVED when all three r ≤ tol + rtol·scale. The iteration goes on from such a point while a step
        still halves the largest r, down to tol / 10, so that rtol decides only where rounding or bad conditioning is in
        the way of tol. ``rtol=0`` insists on tol. Norms are infinity norms, in the caller's units and freshly computed.
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
    if problem.backend.traced:
        _refuse_traced(problem, verbose)
    settings = read_settings(problem, tol, rtol, max_iterations)
    if progress is not None and not callable(progress):
        raise TypeError(f"progress is a {type(progress).__name__}; expected a function of two numbers")
    compiled = choose_engine(engine, problem, verbose)
    with problem.backend.quietly():
        near = warm_point(problem, warm_start)
        if compiled:
            solved = compiled.solve(problem, settings, near, progress, check)
        else:
            if check and problem.batch:
                check_values(problem)
            solved = _solve(problem, settings, near, verbose, progress)
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


class Point(NamedTuple):
    """Where to start: variables and multipliers of all rows, and which problems they are fit for; (B or 1, ·)."""

    x: Any
    v: Any
    usable: Any


class Ended(NamedTuple):
    """Problems of a chunk that ended together."""

    index: Any
    """Their positions in the whole batch."""
    outcome: Outcome | None
    form: type | None
    """The class of the reduced form that solved them; None where the factor is not kept."""
    factor: Any
    """The last factor of the reduced KKT matrix, or None."""
    metric: kkt.Metric


class Linearization(NamedTuple):
    """What `qpdiff.differentiation` finds in a solution."""

    problem: Problem
    factors: Any
    """A list of `Ended`, or what the compiled engine has kept."""
    x: Any
    v: Any
    s: Any
    status: Any


def _solve(problem: Problem, settings: Settings, near: Point | None, verbose: bool, progress):
    xp, backend = problem.backend.xp, problem.backend
    if backend.traced:
        outcome, factor, metric = solve_traced(problem, settings, near)
        if progress is not None:
            progress(problem.batch, problem.batch)
        return outcome, [_whole(problem, factor, metric)]
    keep = _keeps_factor(problem)

    def solve_chunk(chunk: slice) -> list[Ended]:
        index = backend.arange(chunk.stop)[chunk.start :]
        parts = [(make_part(form), _rows_at(xp, index, where)) for form, where in forms(problem.select(chunk))]
        pieces = []
        while parts:
            pieces += _run(parts, near, settings, keep, verbose)
        return pieces

    chunks = problem.chunks()
    pieces, done = [], 0
    for chunk, solved in zip(chunks, backend.map(solve_chunk, chunks, 1 if verbose else problem.workers), strict=True):
        pieces += solved
        done += chunk.stop - chunk.start
        if progress is not None:
            progress(done, problem.batch)
    return _join(problem, pieces), pieces


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
    finite = [xp.all(xp.isfinite(a), axis=-1, keepdims=True) for a in (parts["x"], v)]
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


def forms(problem: Problem):
    """Split a chunk by the reduced form that suits each of its problems."""
    xp = problem.backend.xp
    if problem.backend.traced:
        return [(kkt.PrimalForm(problem), None)]
    form, safe = kkt.choose_form(problem)
    if safe is None:
        return [(form, None)]
    count = int(xp.sum(xp.astype(safe, xp.int32)))  # one value to the host for each chunk
    if count == safe.shape[0]:
        return [(form, None)]
    if count == 0:
        return [(kkt.PrimalForm(problem), None)]
    order = xp.argsort(xp.astype(~safe, xp.int8), stable=True)
    parts = []
    for make, where in ((form.select, order[:count]), (lambda part, _: kkt.PrimalForm(part), order[count:])):
        parts.append((make(problem.select(where), where), where))
    return parts


def _run(parts, near: Point | None, settings: Settings, keep: bool, verbose: bool) -> list[Ended]:
    """Iterate on one part until every problem has ended; problems that have ended are dropped by halves.

    The part is taken off the list, lest the caller keep what dropping has freed.
    """
    part, index = parts.pop()
    xp = part.problem.backend.xp
    state, factor = initialize(part, settings)
    cold = None
    if near is not None:
        start = Point(*kkt.take(xp, tuple(near), index))
        cold, state = state, start_near(part, settings, start, state)
    pieces = []
    while True:
        running = state.status[:, 0] == RUNNING
        inexact = xp.any(running & state.inexact[:, 0])
        # How many are running and whether a step needs refinement: the one value an iteration that goes to the host.
        count, refine = divmod(int(2 * xp.sum(xp.astype(running, xp.int32)) + xp.astype(inexact, xp.int32)), 2)
        if verbose:
            _report(xp, state)
        if 2 * count <= running.shape[0]:
            order = xp.argsort(xp.astype(~running, xp.int8), stable=True)
            done, rest = (order[count:], order[:count]) if count else (None, None)
            outcome = Outcome(*(_rows_at(xp, getattr(state, name), done) for name in Outcome._fields))
            form, factor = (type(part.form), _rows_at(xp, factor, done)) if keep else (None, None)
            metric = kkt.Metric(*_rows_at(xp, tuple(part.metric), done))
            pieces.append(Ended(_rows_at(xp, index, done), outcome, form, factor, metric))
            if count == 0:
                return pieces
            part, index = part.select(rest), _rows_at(xp, index, rest)
            state = State(*_rows_at(xp, tuple(state), rest))
            cold = cold and State(*_rows_at(xp, tuple(cold), rest))
        state, factor = step(part, settings, state, refine=bool(refine))
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
        part = make_part(form)
        state, factor = initialize(part, settings)
        cold = None
        if near is not None:
            cold, state = state, start_near(part, settings, near, state)

        def unfinished(state, factor):
            return xp.any(state.status == RUNNING)

        def body(state, factor):
            state, factor = step(part, settings, state, refine=True)
            state = state if cold is None else _restart(xp, settings, state, cold)
            return state, factor if keep else None

        start = state, factor if keep else None
        state, factor = backend.while_loop(unfinished, body, start, 2 * settings.max_iterations + 2)
        return Outcome(*(getattr(state, name) for name in Outcome._fields)), factor, part.metric

    form, safe = kkt.choose_traced_form(problem)
    if safe is None:
        return run(form)
    outcome = backend.cond(safe, lambda: run(form)[0], lambda: run(kkt.PrimalForm(problem))[0])
    return outcome, None, kkt.equilibrate(problem)


def _whole(problem: Problem, factor, metric: kkt.Metric) -> Ended:
    """The batch in one piece."""
    return Ended(problem.backend.arange(problem.batch), None, factor and kkt.PrimalForm, factor, metric)


def pack(lin: Linearization):
    """The arrays of a linearization whose factors are in one piece, and its layout, for a compiled function."""
    (piece,) = lin.factors
    return (lin.problem.operands, piece.factor, piece.metric, lin.x, lin.v, lin.s, lin.status), lin.problem.layout


def unpack(arrays, layout: Layout) -> Linearization:
    operands, factor, metric, x, v, s, status = arrays
    problem = layout.problem(operands)
    return Linearization(problem, [_whole(problem, factor, metric)], x, v, s, status)


def _rows_at(xp, tree, where):
    return tree if where is None else kkt.take(xp, tree, where)


def _restart(xp, settings: Settings, state: State, cold: State) -> State:
    """Begin again from the ordinary start, once, where a start near another solution has led nowhere."""
    first = state.limit == settings.max_iterations
    failed = first & (state.status != RUNNING) & (state.status != int(Status.SOLVED)) & (state.iterations > 0)
    again = cold._replace(iterations=state.iterations, limit=state.iterations + settings.max_iterations)
    return _choose(xp, failed, again, state)


def _report(xp, state: State) -> None:
    running = state.status == RUNNING
    worst = (xp.max(xp.where(running, value, 0.0)) for value in (state.primal, state.dual, state.gap, state.mu))
    primal, dual, gap, mu = map(float, worst)
    print(
        f"{int(xp.max(state.iterations)):4d}  running {int(xp.sum(xp.astype(running, xp.int32))):6d}  "
        f"primal {primal:.1e}  dual {dual:.1e}  gap {gap:.1e}  mu {mu:.1e}"
    )


# ---- the method


def initialize(part: Part, settings: Settings):
    """Starting point: the solution with θ = 1 in the scaled rows, moved onto s ∘ z = μ with s − z kept (PIQP)."""
    problem, E = part.problem, part.metric.rows
    xp, backend = problem.backend.xp, problem.backend
    batch, dtype, exact = problem.batch, problem.dtype, part.exact.dtype
    zero, one = backend.full((batch, problem.rows), 0.0, dtype), backend.full((batch, 1), 1.0, dtype)
    inequality = problem.inequality
    rho, delta = (0.0 if part.form.definite else settings.rho) * one, settings.delta * one
    system = _system(part, xp.where(inequality, 1.0 / E**2 + zero, zero), rho, delta)
    factor, positive = part.form.factor(system)
    r_x, r_v = xp.broadcast_to(-problem.q, (batch, problem.n)), problem.k + zero
    x, v = part.form.solve(factor, part.form.eliminate(factor, r_x), r_v)
    x, v = kkt.refined(part.form, system, factor, r_x, r_v, x, v, one > 0)
    sound = positive & xp.all(xp.isfinite(x), axis=-1, keepdims=True) & xp.all(xp.isfinite(v), axis=-1, keepdims=True)
    x, v = xp.where(sound, x, xp.zeros_like(x)), xp.where(sound, v, xp.zeros_like(v))
    z = xp.where(inequality, v / E, zero)
    mu = _mean(part, xp.where(inequality, z + _max(xp, -z), zero), _max(xp, z) - z)
    mu = xp.maximum(mu, settings.smallest)
    infinite = backend.full((batch, 1), float("inf"), exact)
    count = backend.full((batch, 1), 0, xp.int32)
    state = State(
        x=x, v=v, s=v, mu=mu, rho=rho, delta=delta, r_x=x, r_v=v,
        Qx=backend.full((batch, problem.n), 0.0, exact), Kx=backend.full((batch, problem.rows), 0.0, exact),
        objective=infinite, primal=infinite, dual=infinite, gap=infinite, near=infinite < 0,
        worst=infinite, best=infinite, inexact=infinite > 0, proof=backend.full((batch, 1), 0.0, exact),
        waiting=count, iterations=count, limit=count + settings.max_iterations, status=count + RUNNING,
    )  # fmt: skip
    v, s = _onto_path(part, v, z, mu)
    state = state._replace(v=v, s=s, mu=_mean(part, s, v))
    return assess(part, settings, state, state._replace(x=0 * x, v=0 * v)), factor


def start_near(part: Part, settings: Settings, near: Point, cold: State) -> State:
    """Start at another problem's solution, moved onto s ∘ z = μ with s − z kept.

    μ grows with what that solution leaves of the residuals here, so that the slacks have room for the steps that make
    up for it, up to the μ of the ordinary start.
    """
    problem, (D, E) = part.problem, part.metric
    xp = problem.backend.xp
    inequality, equality = problem.inequality, problem.equality
    x, v = near.x + xp.zeros_like(cold.x), near.v + xp.zeros_like(cold.v)
    slack = E * (problem.k - problem.constraints(x))
    zero = xp.zeros_like(slack)
    amiss = xp.where(equality, xp.abs(slack), xp.where(inequality, _positive(xp, -slack), zero))
    error = xp.maximum(_max(xp, amiss), _max(xp, xp.abs(D * (problem.hessian(x) + problem.q + problem.adjoint(v)))))
    difference = xp.where(inequality, v / E - slack, zero)
    mu = xp.minimum(0.1 * error, cold.mu)
    mu = xp.maximum(mu, max(settings.tol, settings.smallest))
    v, s = _onto_path(part, v, difference, mu)
    state = cold._replace(x=x, v=v, s=s, mu=_mean(part, s, v))
    state = assess(part, settings, state, state)
    usable = near.usable & ((state.status == RUNNING) | (state.status == int(Status.SOLVED)))
    # Also from a solution one step is taken: the derivative needs its factor.
    return _choose(xp, usable, state._replace(status=xp.full_like(state.status, RUNNING)), cold)


def _onto_path(part: Part, v, difference, mu):
    """Multipliers and slacks on s ∘ z = μ with the difference z − s in the scaled rows kept; other multipliers stay."""
    problem, E = part.problem, part.metric.rows
    xp = problem.backend.xp
    large = (xp.abs(difference) + xp.sqrt(difference * difference + 4.0 * mu)) / 2.0
    small = mu / large
    zero = xp.zeros_like(v)
    s = xp.where(problem.inequality, xp.where(difference > 0, small, large) / E, zero)
    z = xp.where(difference > 0, large, small) * E
    return xp.where(problem.inequality, z, xp.where(problem.equality, v, zero)), s


def newton(part: Part, s, z, r_x, r_v, rho, delta):
    """Factor the KKT matrix at s, z > 0 (0 and infinite where the row is no inequality); the step as two functions.

    They take what s ∘ z is to be diminished by, and take all other residuals to 0. The first is for the rows alone.
    """
    form = part.form
    system = _system(part, s / z, rho, delta)
    factor, positive = form.factor(system)
    eliminated = form.eliminate(factor, r_x)

    def shifted(complementarity):
        return r_v + complementarity / z

    def slack(complementarity, dv):
        return -(complementarity + s * dv) / z

    def rows_direction(complementarity):
        dv = form.solve_rows(factor, eliminated, shifted(complementarity))
        return dv, slack(complementarity, dv)

    def direction(complementarity, refine=None):
        right = shifted(complementarity)
        dx, dv = form.solve(factor, eliminated, right)
        if refine is not None:
            dx, dv = kkt.refined(form, system, factor, r_x, right, dx, dv, refine)
        return dx, dv, slack(complementarity, dv)

    return factor, positive, rows_direction, direction


def step(part: Part, settings: Settings, state: State, *, refine: bool):
    """One predictor-corrector step for every running problem; also the factor it used.

    `refine` is whether any problem is inexact; only those that are get refined, so that no problem depends on another.
    """
    problem, backend = part.problem, part.problem.backend
    xp, inequality = backend.xp, problem.inequality
    # What is divided by an infinite s or z is 0 where the row is no inequality.
    s, z = (xp.where(inequality, a, float("inf")) for a in (state.s, state.v))
    factor, positive, rows_direction, direction = newton(part, state.s, z, state.r_x, state.r_v, state.rho, state.delta)

    # Predictor: how far towards s ∘ z = 0 the step gets decides the centering (Nocedal & Wright, 16.62 to 16.66).
    sz = state.s * state.v
    dv, ds = rows_direction(sz)
    alpha_s, alpha_z = _step_length(xp, s, ds, 1.0), _step_length(xp, z, dv, 1.0)
    reached = _mean(part, state.s + alpha_s * ds, state.v + alpha_z * dv)
    sigma = xp.minimum(_positive(xp, reached / (state.mu + settings.tiny)), 1.0) ** 3
    dx, dv, ds = direction(sz + ds * dv - sigma * state.mu, state.inexact if refine else None)
    alpha_s, alpha_z = _step_length(xp, s, ds, STEP_FRACTION), _step_length(xp, z, dv, STEP_FRACTION)
    # Unequal steps leave Qx + Kᵀv behind, which now and then goes round in circles.
    together, circling = xp.minimum(alpha_s, alpha_z), state.waiting >= IMPATIENCE
    alpha_s, alpha_z = xp.where(circling, together, alpha_s), xp.where(circling, together, alpha_z)

    x = state.x + alpha_s * dx
    s = xp.where(inequality, xp.maximum(state.s + alpha_s * ds, settings.tiny), 0.0)
    v = state.v + alpha_z * dv
    v = xp.where(inequality, xp.maximum(v, settings.tiny), xp.where(problem.equality, v, 0.0))
    mu = _mean(part, s, v)

    # A step that cannot be computed is not taken; stronger proximal terms come instead.
    sound = (
        positive
        & xp.all(xp.isfinite(x), axis=-1, keepdims=True)
        & xp.all(xp.isfinite(v), axis=-1, keepdims=True)
        & xp.all(xp.isfinite(s), axis=-1, keepdims=True)
    )
    moved = state._replace(x=x, v=v, s=s, mu=mu)
    if not backend.none(~sound):
        moved = _choose(xp, sound, moved, state)
    moved = assess(part, settings, moved._replace(iterations=state.iterations + 1), state)

    # What the linear solve has left of its system shows in the products before and after the step.
    D, E = part.metric
    Q_dx = moved.Qx - state.Qx
    Kt_dv = state.r_x - moved.r_x - Q_dx
    left_x = state.r_x - Q_dx / alpha_s - Kt_dv / alpha_z - state.rho / D**2 * dx
    left_v = moved.r_v - (1.0 - alpha_s) * state.r_v + alpha_s * state.delta / E**2 * dv
    least = 0.01 * settings.tol
    inexact = (
        ~(_max(xp, xp.abs(left_x)) <= xp.maximum(1e-6 * state.dual, least))
        | ~(_max(xp, xp.abs(left_v)) <= xp.maximum(1e-6 * _max(xp, xp.abs(state.r_v)), least))
        | ~sound
    )

    rate = _positive(xp, (state.mu - moved.mu) / (state.mu + settings.tiny))
    rate = xp.where(xp.any(inequality, axis=-1, keepdims=True), rate, 0.9)
    rho = xp.maximum((1.0 - rate) * state.rho, settings.smallest)
    delta = xp.maximum((1.0 - rate) * state.delta, settings.smallest)
    rho = xp.where(sound, rho, 100.0 * state.rho)
    delta = xp.where(sound, delta, 100.0 * state.delta)
    moved = moved._replace(rho=rho, delta=delta, inexact=inexact)
    # From a point within the tolerance one more step is worth it only if it halves the residuals; else it was the last.
    # Where the residuals are above tol it gets a second chance, with step lengths that are the same.
    running = state.status == RUNNING
    settled = running & state.near & ~(moved.worst <= 0.5 * state.worst)
    stays = settled | ~running
    if backend.none(stays):
        return moved, factor
    again = settled & (state.worst > settings.tol) & (state.waiting < IMPATIENCE) & (moved.iterations < state.limit)
    stayed = state._replace(
        status=xp.where(settled & ~again, int(Status.SOLVED), state.status),
        waiting=xp.where(again, IMPATIENCE, state.waiting),
        iterations=state.iterations + xp.astype(again, state.iterations.dtype),
    )
    return _choose(xp, stays, stayed, moved), factor


def residuals(problem: Problem, x, v, s):
    """Qx, Kx, Kᵀv, and what Qx + q + Kᵀv = 0 and Kx + s = k leave, with the sign of a right-hand side."""
    xp, exists = problem.backend.xp, problem.inequality | problem.equality
    Qx, Kx, Kv = problem.hessian(x), problem.constraints(x), problem.adjoint(v)
    Kx = xp.where(exists, Kx, 0.0)
    return Qx, Kx, Kv, -(Qx + problem.q + Kv), problem.k - Kx - s


def assess(part: Part, settings: Settings, state: State, previous: State) -> State:
    """Compute the residuals afresh and decide how each problem stands; a certificate takes the place of x or v."""
    problem, (D, E), sizes = part.exact, part.metric, part.sizes
    xp, backend = problem.backend.xp, problem.backend
    x, v, s = (xp.astype(a, problem.dtype, copy=False) for a in (state.x, state.v, state.s))
    k, equality, inequality = problem.k, problem.equality, problem.inequality
    Qx, Kx, Kv, r_x, r_v = residuals(problem, x, v, s)
    violation = xp.where(equality, xp.abs(r_v), xp.where(inequality, _positive(xp, Kx - k), 0.0))
    xQx, qx = _dot(xp, x, Qx), _dot(xp, x, problem.q)
    blocks = (problem.blocks[name] for name in ("G", "A", "ub", "lb"))
    by_block = [_dot(xp, k[:, rows], v[:, rows]) for rows in blocks if rows.stop > rows.start]
    kv = sum(by_block, 0.0 * qx)
    primal, dual, gap = _max(xp, violation), _max(xp, xp.abs(r_x)), xp.abs(sum(by_block, xQx + qx))

    # Not `<=` on a maximum alone: NaN must never pass, nor an infinity that is compared with its own size.
    worst = xp.maximum(xp.maximum(primal, dual), gap)
    tol, rtol = settings.tol, settings.rtol
    scales = (
        xp.maximum(_max(xp, xp.abs(Kx)), sizes.k),
        xp.maximum(xp.maximum(_max(xp, xp.abs(Qx)), sizes.q), _max(xp, xp.abs(Kv))),
        xp.maximum(xp.maximum(xp.abs(xQx), xp.abs(qx)), xp.abs(kv)),
    )
    # The terms of the gap may cancel to 0 by luck: what their rounding hides must not be far beyond the tolerance.
    terms = _dot(xp, xp.abs(x), xp.abs(Qx) + xp.abs(problem.q)) + _dot(xp, xp.abs(v), xp.abs(k))
    near = (
        (primal <= tol + rtol * scales[0])
        & (dual <= tol + rtol * scales[1])
        & (gap + LUCK * xp.finfo(problem.dtype).eps * terms <= tol + rtol * scales[2])
        & (worst < float("inf"))
    )
    best = xp.where(worst < state.best, worst, state.best)

    # Farkas: Kᵀv = 0, z ≥ 0, kᵀv < 0 leaves no x; Qx = 0, Kx ≤ 0 (= 0), qᵀx < 0 is a way down without end. Iterates
    # without a limit go off along such a direction, so it shows in their last step long before it does in them.
    ray, farkas = x - xp.astype(previous.x, x.dtype, copy=False), v - xp.astype(previous.v, x.dtype, copy=False)
    farkas = xp.where(inequality, _positive(xp, farkas), farkas)
    no_bottom = no_point = 0.0 * dual
    falls, fall = _falls(xp, problem.q * ray, (dual > tol) & (not part.form.definite))
    if not backend.none(falls):
        slope = Kx - previous.Kx
        climb = xp.where(equality, xp.abs(slope), _positive(xp, slope))
        uphill = xp.maximum(_max(xp, xp.abs(D * (Qx - previous.Qx))), _max(xp, E * climb))
        hidden = xp.maximum(_max(xp, xp.abs(D * Qx)), _max(xp, xp.abs(E * Kx)))  # by the rounding of these differences
        uphill = xp.maximum(uphill, xp.finfo(problem.dtype).eps * hidden)
        no_bottom = xp.where(falls, fall / (uphill * sizes.scaled_q), no_bottom)
    gains, gain = _falls(xp, k * farkas, primal > tol)
    if not backend.none(gains):
        left = _max(xp, xp.abs(D * problem.adjoint(farkas)))
        no_point = xp.where(gains, gain / (left * sizes.scaled_k), no_point)
    proof = xp.maximum(no_point, no_bottom)

    improved = (worst < 0.9 * state.best) | (proof > 1.1 * state.proof)
    waiting = xp.where(improved, 0, state.waiting + 1)
    limit, patient = state.iterations >= state.limit, waiting < PATIENCE
    last = limit | ~patient
    solved = near & ((worst <= 0.1 * tol) | last)
    enough = settings.certificate * xp.where(last, 0.01, xp.ones_like(worst))
    feasible = last | (_max(xp, E * violation) <= 1e-4 * sizes.scaled_k)
    unbounded, infeasible = (no_bottom > enough) & feasible, no_point > enough
    status = xp.where(limit, int(Status.MAX_ITERATIONS), xp.full_like(state.status, RUNNING))
    status = xp.where(patient, status, int(Status.STALLED))
    status = xp.where(unbounded, int(Status.DUAL_INFEASIBLE), status)
    status = xp.where(infeasible, int(Status.PRIMAL_INFEASIBLE), status)
    status = xp.where(solved, int(Status.SOLVED), status)
    if not backend.none(unbounded | infeasible):
        x = xp.where(status == int(Status.DUAL_INFEASIBLE), ray / fall, x)
        v = xp.where(status == int(Status.PRIMAL_INFEASIBLE), farkas / gain, v)

    def narrow(a):
        return xp.astype(a, part.problem.dtype, copy=False)

    return state._replace(
        x=narrow(x), v=narrow(v), r_x=narrow(r_x), r_v=narrow(r_v), Qx=Qx, Kx=Kx, objective=0.5 * xQx + qx,
        primal=primal, dual=dual, gap=gap, near=near, worst=worst, best=best, proof=xp.maximum(proof, state.proof),
        waiting=waiting, status=status,
    )  # fmt: skip


def _falls(xp, terms, possible):
    """Where a direction that is possible goes down beyond rounding, and how far; `terms` sum to the change of cost.

    The fall against what the direction leaves is a ratio r that proves that there is no solution of norm less than r in
    the scaled problem, whose own size is that of its cost.
    """
    fall = -_sum(xp, terms)
    return possible & (fall > 1e-8 * _sum(xp, xp.abs(terms))), fall


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
        index = backend.arange(chunk.stop)[chunk.start :]
        for form, where in forms(problem.select(chunk)):
            at = _rows_at(xp, index, where)
            part = make_part(form)
            point, factor = _center(part, settings, kappa, *kkt.take(xp, (lin.x, lin.v, lin.s), at))
            made_by, factor = (type(form), factor) if _keeps_factor(problem) else (None, None)
            pieces.append(Ended(at, None, made_by, factor, part.metric))
            points.append(point)
    if not points:
        return lin
    order = xp.argsort(xp.concat([piece.index for piece in pieces]))
    x, v, s, found = (xp.take(xp.concat(column, axis=0), order, axis=0) for column in zip(*points, strict=True))
    lost = ~found & (lin.status == int(Status.SOLVED))
    return Linearization(
        problem, pieces, x, v, s, xp.where(lost, xp.full_like(lin.status, int(Status.STALLED)), lin.status)
    )


def _center(part: Part, settings: Settings, kappa: float, x, v, s):
    """Newton's method for the KKT conditions with s ∘ z = κ: the point, whether it was found, and its factor."""
    problem, (D, E) = part.problem, part.metric
    xp, inequality = problem.backend.xp, problem.inequality
    v, s = _onto_path(part, v, xp.where(inequality, v / E - E * s, 0.0), kappa)
    smallest = xp.full_like(x[:, :1], settings.smallest)
    accuracy = xp.finfo(problem.dtype).eps ** 0.5

    def move(x, v, s, *_):
        *_, r_x, r_v = residuals(part.exact, *(xp.astype(a, part.exact.dtype, copy=False) for a in (x, v, s)))
        r_x, r_v = (xp.astype(a, problem.dtype, copy=False) for a in (r_x, r_v))
        s_, z_ = (xp.where(inequality, a, float("inf")) for a in (s, v))
        factor, *_, direction = newton(part, s, z_, r_x, r_v, smallest, smallest)
        excess = xp.where(inequality, s * v - kappa, 0.0)
        found = (
            (_max(xp, xp.abs(D * r_x)) <= accuracy * (1.0 + _max(xp, xp.abs(D * problem.q))))
            & (_max(xp, xp.abs(E * r_v)) <= accuracy * (1.0 + _max(xp, xp.abs(E * problem.k))))
            & (_max(xp, xp.abs(excess)) <= accuracy * kappa)
        )
        dx, dv, ds = direction(excess, smallest > 0)
        alpha = xp.minimum(_step_length(xp, s_, ds, STEP_FRACTION), _step_length(xp, z_, dv, STEP_FRACTION))
        alpha = xp.where(found, 0.0, alpha)
        return x + alpha * dx, v + alpha * dv, s + alpha * ds, found, factor

    def lost(x, v, s, found, factor):
        return ~xp.all(found)

    *point, factor = problem.backend.while_loop(lost, move, move(x, v, s), settings.max_iterations)
    return point, factor


def _system(part: Part, theta, rho, delta) -> kkt.System:
    xp = part.problem.backend.xp
    exists = part.problem.inequality | part.problem.equality
    theta = xp.where(exists, theta, float("inf"))
    return kkt.System(theta, rho / part.metric.variables**2, delta / part.metric.rows**2)


def _choose(xp, condition, new: State, old: State) -> State:
    return State(*(a if a is b else xp.where(condition, a, b) for a, b in zip(new, old, strict=True)))


def _step_length(xp, value, direction, fraction):
    """Largest step in [0, 1] that keeps value + step·direction ≥ (1 − fraction)·value, for positive values."""
    return 1.0 / xp.maximum(_max(xp, -direction / value) / fraction, 1.0)


def _max(xp, a):
    """Largest entry a problem, at least 0, (B, 1)."""
    if a.shape[-1] == 0:
        return xp.sum(a, axis=-1, keepdims=True)
    return _positive(xp, xp.max(a, axis=-1, keepdims=True))


def _positive(xp, a):
    """The positive part. (array-api-compat's clip takes ten times as long on a small array.)"""
    return xp.maximum(a, 0.0)


def _sum(xp, a):
    return xp.sum(a, axis=-1, keepdims=True)


def _dot(xp, a, b):
    return xp.vecdot(a, b, axis=-1)[:, None]


def _mean(part: Part, s, z):
    """Mean of s ∘ z over the inequalities, where s is 0 in the other rows, (B, 1)."""
    return _sum(part.problem.backend.xp, s * z) / part.sizes.inequalities


# ---- the result


def _join(problem: Problem, pieces: list[Ended]) -> Outcome:
    """The outcomes of the pieces in the order of the batch; the pieces lose theirs."""
    xp, backend = problem.backend.xp, problem.backend
    names = Outcome._fields
    if not pieces:
        kinds = {"status": xp.int32, "iterations": xp.int32}
        kinds |= dict.fromkeys(("objective", "primal", "dual", "gap"), backend.exact)
        widths = {"x": problem.n, "v": problem.rows, "s": problem.rows}
        return Outcome(*(backend.full((0, widths.get(k, 1)), 0, kinds.get(k, problem.dtype)) for k in names))
    columns = [[getattr(piece.outcome, name) for piece in pieces] for name in names]
    pieces[:] = [piece._replace(outcome=None) for piece in pieces]  # each column is free once it is joined
    order = xp.argsort(xp.concat([piece.index for piece in pieces])) if len(pieces) > 1 else None
    whole = {}
    for name in reversed(names):
        joined = xp.concat(columns.pop(), axis=0)
        whole[name] = joined if order is None else xp.take(joined, order, axis=0)
    return Outcome(**whole)


def make_solution(problem: Problem, outcome: Outcome, factors) -> Solution:
    xp = problem.backend.xp
    x, v, s = outcome.x, outcome.v, outcome.s
    y, z, z_lb, z_ub = multipliers(problem, v)
    if problem.m:
        slack = s[:, problem.blocks["G"]]
        slack = xp.where(problem.h >= INFINITE, problem.backend.full((1, 1), float("inf"), problem.dtype), slack)
    else:
        slack = s[:, :0]

    def shaped(value):
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
        zero = xp.broadcast_to(problem.backend.full((1, problem.n), 0.0, problem.dtype), (v.shape[0], problem.n))
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
