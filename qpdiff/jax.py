"""JAX: `solve_qp` under jit, vmap, grad, jacfwd, jacrev and hessian.

The solver itself is traced, its iterations are one `lax.while_loop`, so that it compiles for any device of JAX's and
nothing goes to the host. The derivative is that of the KKT conditions: the tangent of a solution is a
`lax.custom_linear_solve` with the KKT matrix at it, which JAX transposes and differentiates again.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from . import solver
from .adjoint import right_hand_side
from .differentiation import solve_kkt
from .engines.array.derivative import unpack
from .engines.array.traced import solve_traced
from .engines.base import Outcome, Settings
from .problem import Layout, Problem
from .solution import FIELDS, Solution, Status, check_unsolved, raise_if_unsolved
from .validation import check_values, make_problem, symmetrized

try:
    import jax
    import jax.numpy as jnp
except ImportError as error:
    raise ImportError("qpdiff.jax needs JAX: pip install 'qpdiff[jax]'") from error

jax.tree_util.register_dataclass(Solution, data_fields=FIELDS, meta_fields=[], drop_fields=["linearization"])


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
    unsolved: str = "raise",
    dtype=None,
    tol=None,
    rtol=None,
    max_iterations: int = solver.MAX_ITERATIONS,
    warm_start: Solution | None = None,
    check: bool = True,
) -> Solution:
    """Solve a batch of convex quadratic programs; `qpdiff.solve_qp` for JAX.

    Parameters
    ----------
    Q, q, G, h, A, b, lb, ub : array
        As for `qpdiff.solve_qp`, concrete or traced.
    unsolved : {"raise", "nan", "zero"}
        What to do about problems that are not SOLVED: raise, or give them NaN or zero gradients. Inside `jit` or `vmap`
        no status is known yet and nothing can raise: "raise" acts as "nan" there.
    dtype, tol, rtol, max_iterations, warm_start, check
        As for `qpdiff.solve_qp`; `check` checks numbers where there are any, outside `jit` and `vmap`. Without
        ``jax.config.update("jax_enable_x64", True)`` all is float32, residuals too.

    Returns
    -------
    Solution
        A pytree, whose x, y, z, z_lb and z_ub differentiate. The other fields are constants. Outside of JAX's
        transformations `qpdiff.vjp` and `qpdiff.jvp` take it too.

    Raises
    ------
    RuntimeError
        With ``unsolved="raise"``, when a problem is not SOLVED; the error counts them and names the first.

    References
    ----------
    .. [1] M. Blondel et al., "Efficient and modular implicit differentiation", NeurIPS 2022.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> import qpdiff.jax
    >>> def project(point):
    ...     return qpdiff.jax.solve_qp(jnp.eye(2), -point, lb=jnp.zeros(2)).x
    >>> jnp.round(jax.jit(jax.jacrev(project))(jnp.array([2.0, -3.0])), 3).tolist()
    [[1.0, 0.0], [0.0, 0.0]]
    """
    check_unsolved(unsolved)
    operands = {"Q": Q, "q": q, "G": G, "h": h, "A": A, "b": b, "lb": lb, "ub": ub}
    problem = make_problem({name: _joined(value) for name, value in operands.items()}, backend="jax", dtype=dtype)
    problem = symmetrized(problem)
    settings = solver.read_settings(problem, tol, rtol, max_iterations)
    start = jax.lax.stop_gradient(solver.warm_point(problem, warm_start))
    numbers = jax.lax.stop_gradient(problem.operands)
    if check and problem.batch and not any(problem.backend.is_tracer(value) for value in numbers.values()):
        check_values(problem.with_operands(**numbers))
    sol, outcome, *rest = _solve(problem.layout, settings, unsolved, problem.operands, start)
    if unsolved == "raise" and not problem.backend.is_tracer(outcome.status):
        raise_if_unsolved(np.asarray(outcome.status).reshape(problem.batch_shape))
    return replace(sol, linearization=_linearization(problem, outcome, *rest))


def _joined(value):
    """Return a list with arrays in it as one array."""
    listed = isinstance(value, (list, tuple)) and any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value))
    return jnp.asarray(value) if listed else value


# ---- the derivative


@partial(jax.jit, static_argnums=(0, 1, 2))
def _solve(layout: Layout, settings: Settings, unsolved: str, operands, start):
    outcome, factor, metric = _iterate(layout, settings, unsolved, operands, start)
    return solver.make_solution(layout.problem(operands), outcome, None), outcome, factor, metric


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _iterate(layout: Layout, settings: Settings, unsolved: str, operands, start):
    return solve_traced(layout.problem(operands), settings, start)


@_iterate.defjvp
def _iterate_jvp(layout, settings, unsolved, primals, tangents):
    outcome, *rest = _iterate(layout, settings, unsolved, *primals)
    problem = layout.problem(primals[0])
    right = right_hand_side(problem, outcome.x, outcome.v, tangents[0])
    dx, dv = _solve_kkt(problem, outcome, rest, unsolved, *right)
    out = (outcome, *rest)
    still, *others = jax.tree.map(_zero_tangent, out)
    return out, (still._replace(x=dx, v=dv), *others)


def _solve_kkt(problem: Problem, outcome: Outcome, rest, unsolved: str, r_x, r_v):
    """K⁻¹ r as an operation that JAX transposes, since K is symmetric, and differentiates by what K is made of."""
    x, v, inequality = outcome.x, outcome.v, problem.inequality
    exists = problem.exists
    # s is known better than k − Kx, but it moves as that does.
    slack = problem.k - problem.constraints(x)
    s = outcome.s + (slack - jax.lax.stop_gradient(slack))
    theta = jnp.where(inequality, s / jnp.where(inequality, v, 1.0), 0.0)

    def split(u):
        return u[:, : problem.n], u[:, problem.n :]

    def matvec(u):
        u_x, u_v = split(u)
        u_rows = jnp.where(exists, u_v, 0.0)
        right_v = jnp.where(exists, problem.constraints(u_x) - theta * u_rows, u_v)
        return jnp.concat([problem.hessian(u_x) + problem.adjoint(u_rows), right_v], axis=-1)

    def solve(_, r):
        u = solve_kkt(_linearization(problem, outcome, *rest), *split(r), unsolved="zero")
        return jnp.concat(u, axis=-1)

    fill = jnp.where(outcome.status == Status.SOLVED, 1.0, 0.0 if unsolved == "zero" else jnp.nan).astype(x.dtype)
    r = fill * jnp.concat([r_x, jnp.where(exists, r_v, 0.0)], axis=-1)
    u = jax.lax.custom_linear_solve(matvec, r, solve, symmetric=True)
    return split(fill * u)  # before and after, so that NaN comes out in either direction


def _linearization(problem: Problem, outcome: Outcome, factor, metric):
    arrays = problem.operands, factor, metric, outcome.x, outcome.v, outcome.s, outcome.status
    return unpack(arrays, problem.layout)


def _zero_tangent(value):
    floating = jnp.issubdtype(value.dtype, jnp.floating)
    return jnp.zeros_like(value) if floating else np.zeros(value.shape, jax.dtypes.float0)
