"""`solve_qp` for JAX."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import solver
from ..backend import Backend, read_dtype
from ..backend.jax import BufferBackend
from ..differentiation import check_smoothing
from ..engines.array import engine as array
from ..engines.choice import choose_engine, compiled_engine, explain_choice
from ..engines.densified import Densified, OfDense
from ..prices import with_prices
from ..problem import Problem
from ..solution import Solution, check_unsolved, raise_if_unsolved
from ..sparse import apply, stored
from ..validation import check_values, make_problem, symmetrized
from .callbacks import HOST, REFUSED, Compiled, raise_refusal
from .derivative import Method, solve
from .kernels import Kernels
from .traced import Traced


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
    unsolved: str = "raise",
    smoothing: float | None = None,
    dtype=None,
    tol=None,
    rtol=None,
    max_iterations: int = solver.MAX_ITERATIONS,
    warm_start: Solution | None = None,
    check: bool = True,
    engine: str = "auto",
) -> Solution:
    """Solve a batch of convex quadratic programs; `qpdiff.solve_qp` for JAX.

    Parameters
    ----------
    Q, q, G, h, A, b, lb, ub : array
        As for `qpdiff.solve_qp`, concrete or traced. Of a BCSR or BCOO array the data may be traced, but not the
        indices; a `qpdiff.Sparse` is a pytree whose values differentiate, to any order.
    elastic, elastic_quadratic : number or dict, optional
        As for `qpdiff.solve_qp`, concrete or traced.
    unsolved : {"raise", "nan", "zero"}
        What to do about problems that are not SOLVED: raise, or give them NaN or zero gradients. Inside `jit` or `vmap`
        no status is known yet and nothing can raise: "raise" acts as "nan" there.
    smoothing : float, optional
        κ > 0: differentiate the solution of the relaxed conditions s ∘ z = κ, to any order, see `qpdiff.vjp`. The
        values stay those of the solution.
    dtype, tol, rtol, max_iterations, warm_start, check
        As for `qpdiff.solve_qp`; `check` checks numbers where there are any, outside `jit` and `vmap`. Without
        ``jax.config.update("jax_enable_x64", True)`` the results are float32, residuals too; the array engine computes
        in float32 then.
    engine : {"auto", "array", "compiled"}
        "compiled" solves on the CPU or, in kernels, on an NVIDIA GPU, called from the compiled program; "array" is the
        solver in JAX's own operations, which compiles for any device and which `jax.export` takes. "auto" is the first
        where JAX works on the CPU, and as in `qpdiff.solve_qp` on a GPU.

    Returns
    -------
    Solution
        A pytree, whose x, y, z, z_lb, z_ub, objective and violation differentiate. The other fields are constants.
        Outside of JAX's transformations `qpdiff.vjp` and `qpdiff.jvp` take it too.

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
    >>> jacobian = jax.jit(jax.jacrev(project))(jnp.array([2.0, -3.0]))
    >>> jnp.round(jacobian, 3).tolist()
    [[1.0, 0.0], [0.0, 0.0]]
    """
    check_unsolved(unsolved)
    check_smoothing(smoothing)
    operands = {"Q": Q, "q": q, "G": G, "h": h, "A": A, "b": b, "lb": lb, "ub": ub}
    operands, _ = with_prices(operands, elastic, elastic_quadratic)
    problem = make_problem({name: _joined(value) for name, value in operands.items()}, backend="jax", dtype=dtype)
    problem = symmetrized(problem)
    dtype, given = np.dtype(read_dtype(dtype) or "float64"), problem
    device = _device(map(stored, problem.operands.values()))
    in_callbacks = problem.with_layout(backend=_inside_callbacks(device), dtype=dtype)
    chosen = _choose_engine(engine, in_callbacks, device)
    solver.log_choice(problem, lambda: _explain_choice(engine, in_callbacks, device))
    if isinstance(chosen, Densified):
        chosen, problem = chosen.engine, problem.made_dense()
    working = problem.layout if chosen is array else problem.layout._replace(dtype=dtype)
    settings = solver.read_settings(problem.with_layout(dtype=working.dtype), tol, rtol, max_iterations)
    start = jax.lax.stop_gradient(solver.warm_point(problem, warm_start))
    numbers = jax.lax.stop_gradient(problem.operands)
    check = bool(check and problem.batch and not any(map(problem.backend.is_tracer, map(stored, numbers.values()))))
    on_host = problem.sparse or chosen is compiled_engine()[0]
    if check and not on_host:
        check_values(problem.with_operands(**numbers))
    method: Method = Traced(problem.layout, settings)
    if on_host:
        method = Compiled(problem.layout, working._replace(backend=HOST), settings, check)
    elif chosen is not array:
        method = Kernels(problem.layout, working, settings, device.local_hardware_id)
    sol, outcome, extra, relaxed = solve(method, unsolved, smoothing, problem.operands, start)
    if not problem.backend.is_tracer(outcome.status):
        status = np.asarray(outcome.status)
        if isinstance(method, Compiled) and np.any(status == REFUSED):
            numbers = {name: apply(np.asarray, value) for name, value in numbers.items()}
            raise_refusal(symmetrized(method.problem(numbers, ())), settings)
        if unsolved == "raise":
            raise_if_unsolved(status.reshape(problem.batch_shape))
            raise_if_unsolved(np.asarray(relaxed).reshape(problem.batch_shape), relaxed=True)
    lin = method.linearization(problem, outcome, extra)
    if given.sparse and not problem.sparse:
        lin = lin._replace(problem=given, factors=OfDense(lin.factors))
    return replace(sol, linearization=lin)


def _joined(value):
    """Return a list with arrays in it as one array."""
    listed = isinstance(value, (list, tuple)) and any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value))
    return jnp.asarray(value) if listed else value


def _choose_engine(name: str, problem: Problem, device) -> Any:
    """Choose the engine for a problem with what callbacks get of it on a device."""
    chosen = choose_engine(name, problem, False)
    if device.platform == "cpu" or problem.backend.gpu is not None or chosen is array:
        return chosen
    if name == "compiled":
        raise ValueError(
            f"engine is 'compiled', which works on the CPU and on NVIDIA's GPUs, but JAX on {device.platform}; pass "
            "engine='auto'"
        )
    return array


def _explain_choice(name: str, problem: Problem, device) -> str:
    """Say which engine solves a problem on a device, and why."""
    if device.platform == "cpu" or problem.backend.gpu is not None or name == "array":
        return explain_choice(name, problem, device=device)
    return f"array engine on {device}: the compiled one works on the CPU and on NVIDIA's GPUs"


def _inside_callbacks(device) -> Backend:
    """Return the backend of what callbacks get on a device."""
    on_gpu = device.platform == "gpu" and "cuda" in device.client.platform_version  # else AMD's ROCm
    return BufferBackend(device.local_hardware_id) if on_gpu else HOST


def _device(operands) -> Any:
    """Return where JAX works: on the device of arrays that are concrete, else on the one that new arrays go to."""
    for value in operands:
        if not isinstance(value, jax.core.Tracer):
            return next(iter(value.devices()))
    config: Any = jax.config
    device = config.jax_default_device
    return device if hasattr(device, "platform") else jax.local_devices(backend=device)[0]
