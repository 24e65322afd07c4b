"""HIPS autograd: `solve_qp` whose solution differentiates, to any order.

Two primitives: the solution as a function of the operands, and the solve with its KKT matrix as a function of the
operands, the solution and the right-hand side. The derivative of each is made of the second and of autograd's own
operations, which is what closes the loop for higher derivatives.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from . import solver
from .differentiation import fixed_variables, solve_kkt
from .problem import OPERANDS, Problem
from .solution import Solution, Status

try:
    import autograd.numpy as anp
    from autograd.extend import defvjp_argnums, primitive
    from autograd.tracer import getval, isbox
except ImportError as error:
    raise ImportError("qpdiff.autograd needs HIPS autograd: pip install 'qpdiff[autograd]'") from error


def solve_qp(Q, q, G=None, h=None, A=None, b=None, lb=None, ub=None, *, unsolved: str = "raise", **options) -> Solution:
    """Solve a batch of convex quadratic programs; `qpdiff.solve_qp` on NumPy for HIPS autograd.

    Parameters
    ----------
    Q, q, G, h, A, b, lb, ub : array
        As for `qpdiff.solve_qp`; any of them may be what autograd differentiates by.
    unsolved : {"raise", "nan", "zero"}
        What to do about problems that are not SOLVED: raise, or give them NaN or zero gradients.
    **options
        Further options of `qpdiff.solve_qp`, but for `backend`.

    Returns
    -------
    Solution
        Whose x, y, z, z_lb and z_ub differentiate. The other fields are constants.

    Raises
    ------
    RuntimeError
        With ``unsolved="raise"``, when a problem is not SOLVED; the error counts them and names the first.

    Examples
    --------
    >>> import autograd.numpy as np
    >>> from autograd import grad
    >>> import qpdiff.autograd
    >>> def squared_distance(point):
    ...     projection = qpdiff.autograd.solve_qp(np.eye(2), -point, lb=np.zeros(2)).x
    ...     return np.sum((projection - point) ** 2)
    >>> np.abs(np.round(grad(squared_distance)(np.array([2.0, -3.0])), 6)).tolist()
    [0.0, 6.0]
    """
    if unsolved not in ("raise", "nan", "zero"):
        raise ValueError(f"unsolved is {unsolved!r}; expected 'raise', 'nan' or 'zero'")
    operands = {"Q": Q, "q": q, "G": G, "h": h, "A": A, "b": b, "lb": lb, "ub": ub}
    given = {
        name: anp.array(value) if isinstance(value, (list, tuple)) else value
        for name, value in operands.items()
        if value is not None
    }
    sol = solver.solve_qp(**{name: _plain(value) for name, value in given.items()}, backend="numpy", **options)
    problem = sol.linearization.problem
    if unsolved == "raise":
        _raise_if_unsolved(sol)
    layer = _Layer(sol, tuple(given), "zero" if unsolved == "raise" else unsolved)
    flat = _solution(layer, *(_one_batch_axis(problem, name, value) for name, value in given.items()))

    x, v = flat[:, : problem.n], flat[:, problem.n :]
    zero = np.zeros((problem.batch, problem.n), dtype=problem.dtype)
    z_lb = v[:, problem.blocks["lb"]] if lb is not None else zero
    z_ub = v[:, problem.blocks["ub"]] if ub is not None else zero
    if lb is not None and ub is not None:
        fixed, at_lower = fixed_variables(problem, sol.linearization.v)
        z_ub = anp.where(fixed, anp.where(at_lower, zero, -z_lb), z_ub)
        z_lb = anp.where(fixed & ~at_lower, zero, z_lb)
    parts = {"x": x, "y": v[:, problem.blocks["A"]], "z": v[:, problem.blocks["G"]], "z_lb": z_lb, "z_ub": z_ub}
    return replace(sol, **{k: anp.reshape(part, (*problem.batch_shape, part.shape[-1])) for k, part in parts.items()})


def _raise_if_unsolved(sol: Solution) -> None:
    bad = np.argwhere(np.atleast_1d(sol.status) != Status.SOLVED)
    if len(bad):
        first = tuple(bad[0].tolist())
        status = Status(int(np.atleast_1d(sol.status)[first])).name
        where = (
            f"; the first is problem {first[0] if len(first) == 1 else first}: {status}"
            if sol.status.ndim
            else f": {status}"
        )
        raise RuntimeError(
            f"{len(bad)} of {sol.status.size} problems not solved{where}. Pass unsolved='nan' or 'zero' to go "
            "on without their gradients"
        )


def _plain(value):
    """The number or array inside autograd's boxes, however deep."""
    while isbox(value):
        value = getval(value)
    return value


def _one_batch_axis(problem: Problem, name: str, value):
    """An operand with its batch axes flattened to one, by operations that autograd differentiates."""
    core = problem.shapes[name][-len(OPERANDS[name]) :]
    leading = problem.shapes[name][: -len(OPERANDS[name])]
    size = getattr(problem, name).shape[0]
    if size != 1 and leading != problem.batch_shape:
        value = value * np.ones(problem.batch_shape + core, dtype=problem.dtype)
    return anp.reshape(value, (size, *core))


# ---- the two primitives; operands have one batch axis, of length 1 where shared


class _Layer(NamedTuple):
    sol: Solution
    names: tuple[str, ...]
    unsolved: str


@primitive
def _solution(layer, *operands):
    """The variables and all rows' multipliers, (B, n + rows)."""
    return np.concatenate([layer.sol.linearization.x, layer.sol.linearization.v], axis=-1)


@primitive
def _kkt_solve(layer, r, solution, *operands):
    """K⁻¹ r with the KKT matrix at the solution, (B, n + rows)."""
    n = layer.sol.linearization.problem.n
    with np.errstate(all="ignore"):
        return np.concatenate(solve_kkt(layer.sol, r[:, :n], r[:, n:], unsolved=layer.unsolved), axis=-1)


def _solution_vjp(argnums, solution, args, kwargs):
    layer, *operands = args

    def vjp(g):
        n = layer.sol.linearization.problem.n
        u = _kkt_solve(layer, g, solution, *operands)
        u_x, u_v, x, v = u[:, :n], u[:, n:], solution[:, :n], solution[:, n:]
        gradients = _gradients(layer, q=-u_x, k=u_v, Q=[(-u_x, x)], K=[(-v, u_x), (-u_v, x)])
        return [gradients[layer.names[i - 1]] for i in argnums]

    return vjp


def _kkt_solve_vjp(argnums, u, args, kwargs):
    """The vjp of u = K⁻¹ r, which moves with r, with the matrices, and with θ = (k − Kx)/v at the inequalities."""
    layer, _, solution, *operands = args

    def vjp(g):
        lin = layer.sol.linearization
        problem, n = lin.problem, lin.problem.n
        t = _kkt_solve(layer, g, solution, *operands)
        t_x, t_v, u_x, u_v, x, v = t[:, :n], t[:, n:], u[:, :n], u[:, n:], solution[:, :n], solution[:, n:]
        inequality = np.broadcast_to(problem.inequality, lin.v.shape)
        safe_v = anp.where(inequality, v, 1.0)
        theta_bar = anp.where(inequality, t_v * u_v, 0.0)
        k_bar = theta_bar / safe_v
        matrices = dict(zip(layer.names, operands, strict=True))
        theta = anp.where(inequality, (_right_hand_side(problem, matrices) - _rows(problem, matrices, x)) / safe_v, 0.0)
        gradients = _gradients(layer, q=0.0 * u_x, k=k_bar, Q=[(-t_x, u_x)], K=[(-u_v, t_x), (-t_v, u_x), (-k_bar, x)])
        solution_bar = anp.concatenate([-_rows_adjoint(problem, matrices, k_bar), -k_bar * theta], axis=-1)
        by_argument = [None, t, solution_bar, *(gradients[name] for name in layer.names)]
        return [by_argument[i] for i in argnums]

    return vjp


defvjp_argnums(_solution, _solution_vjp)
defvjp_argnums(_kkt_solve, _kkt_solve_vjp)


# ---- the rows of all constraints, in autograd's operations


def _product(M, x):
    return anp.dot(x, M[0].T) if M.shape[0] == 1 else anp.einsum("bkn,bn->bk", M, x)


def _rows(problem: Problem, operands, x):
    parts = [_product(operands[name], x) for name in ("A", "G") if name in operands]
    parts += [sign * x for name, sign in (("lb", -1.0), ("ub", 1.0)) if name in operands]
    return anp.concatenate(parts, axis=-1) if parts else x[:, :0]


def _rows_adjoint(problem: Problem, operands, v):
    out = np.zeros((problem.batch, problem.n), dtype=problem.dtype)
    for name in ("A", "G"):
        if name in operands:
            out = out + _product(anp.swapaxes(operands[name], 1, 2), v[:, problem.blocks[name]])
    for name, sign in (("lb", -1.0), ("ub", 1.0)):
        if name in operands:
            out = out + sign * v[:, problem.blocks[name]]
    return out


def _right_hand_side(problem: Problem, operands):
    parts = []
    for name, sign in (("b", 1.0), ("h", 1.0), ("lb", -1.0), ("ub", 1.0)):
        if name in operands:
            finite = np.isfinite(getattr(problem, name))
            value = sign * anp.where(finite, operands[name], 0.0)
            parts.append(value * np.ones((problem.batch, 1), dtype=problem.dtype))
    return anp.concatenate(parts, axis=-1) if parts else np.zeros((problem.batch, 0), dtype=problem.dtype)


def _gradients(layer: _Layer, *, q, k, Q, K):
    """Gradients of the operands from those of q and k, and from the outer products that make up those of Q and K."""
    lin = layer.sol.linearization
    problem = lin.problem
    out = {}
    for name in layer.names:
        shared = getattr(problem, name).shape[0] == 1 and problem.batch != 1
        if name in ("Q", "A", "G"):
            block = problem.blocks.get(name, slice(None))
            pairs = Q if name == "Q" else [(a[:, block], b) for a, b in K]
            value = sum(_outer(a, b, shared) for a, b in pairs)
            out[name] = (value + anp.swapaxes(value, 1, 2)) / 2 if name == "Q" else value
            continue
        if name == "q":
            value = q
        elif name in ("b", "h"):
            value = k[:, problem.blocks["A" if name == "b" else "G"]]
        else:
            value = _bound_gradient(problem, lin.v, name, k)
        out[name] = anp.sum(value, axis=0, keepdims=True) if shared else value
    return out


def _outer(a, b, shared: bool):
    return anp.dot(a.T, b)[None] if shared else a[:, :, None] * b[:, None, :]


def _bound_gradient(problem: Problem, v, name: str, k):
    lower = -k[:, problem.blocks["lb"]] if problem.lb is not None else None
    if problem.lb is None or problem.ub is None:
        return lower if name == "lb" else k[:, problem.blocks["ub"]]
    fixed, at_lower = fixed_variables(problem, v)
    if name == "lb":
        return anp.where(fixed & ~at_lower, 0.0, lower)
    return anp.where(fixed, anp.where(at_lower, 0.0, lower), k[:, problem.blocks["ub"]])
