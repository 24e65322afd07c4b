"""JAX: `solve_qp` under jit, vmap, grad, jacfwd, jacrev and hessian.

On the CPU the compiled engine solves: two callbacks, the solution of the operands and the solve with the KKT matrix at
it, get NumPy's views of JAX's buffers and write into them. On a GPU such callbacks launch its kernels, on the stream of
JAX's program and with the addresses of its buffers. Elsewhere the array engine is traced, its iterations are one
`lax.while_loop`, so that it compiles for any device of JAX's and nothing goes to the host.

With either engine the derivative is that of the KKT conditions: the tangent of a solution is a
`lax.custom_linear_solve` with the KKT matrix at it, which JAX transposes and differentiates again.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from . import solver
from .adjoint import complementarity, filled, masked, objective_jvp, relaxed_price, right_hand_sides
from .backend import Backend, choose_backend, read_dtype
from .differentiation import FILL, check_smoothing, solve_kkt
from .engines import choice
from .engines.array import engine as array
from .engines.array.central_path import relax
from .engines.array.derivative import pack, saved_together
from .engines.array.traced import solve_traced
from .engines.base import Linearization, Outcome, Settings, StartingPoint
from .engines.choice import choose_engine, compiled_engine, explain_choice
from .engines.densified import Densified, OfDense
from .prices import with_prices
from .problem import MATRICES, OPERANDS, Layout, Problem, make_layout
from .solution import FIELDS, Solution, Status, check_unsolved, raise_if_unsolved
from .sparse import Sparse, apply, stored
from .validation import check_values, make_problem, symmetrized

try:
    import jax
    import jax.numpy as jnp
    from jax.custom_batching import custom_vmap
    from jax.experimental.buffer_callback import buffer_callback

    from .backend.jax import BufferBackend
except ImportError as error:
    raise ImportError("qpdiff.jax needs JAX: pip install 'qpdiff[jax]'") from error

jax.tree_util.register_dataclass(
    Solution, data_fields=[*FIELDS, "violation"], meta_fields=[], drop_fields=["linearization"]
)
jax.tree_util.register_pytree_node(
    Sparse,
    lambda matrix: ((matrix.values,), matrix.pattern),
    lambda pattern, leaves: Sparse.of_pattern(leaves[0], pattern),
)


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
        As for `qpdiff.solve_qp`, concrete or traced. The array engine solves such problems.
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
    method: _Method = _Traced(problem.layout, settings)
    if on_host:
        method = _Compiled(problem.layout, working._replace(backend=_HOST), settings, check)
    elif chosen is not array:
        method = _Kernels(problem.layout, working, settings, device.local_hardware_id)
    sol, outcome, extra, relaxed = _solve(method, unsolved, smoothing, problem.operands, start)
    if not problem.backend.is_tracer(outcome.status):
        status = np.asarray(outcome.status)
        if isinstance(method, _Compiled) and np.any(status == REFUSED):
            numbers = {name: apply(np.asarray, value) for name, value in numbers.items()}
            _raise_refusal(symmetrized(method.problem(numbers, ())), settings)
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
    return BufferBackend(device.local_hardware_id) if on_gpu else _HOST


def _device(operands) -> Any:
    """Return where JAX works: on the device of arrays that are concrete, else on the one that new arrays go to."""
    for value in operands:
        if not isinstance(value, jax.core.Tracer):
            return next(iter(value.devices()))
    config: Any = jax.config
    device = config.jax_default_device
    return device if hasattr(device, "platform") else jax.local_devices(backend=device)[0]


# ---- the array engine, traced


class _Traced(NamedTuple):
    """The array engine: all but the arrays of a call, hashable."""

    layout: Layout
    settings: Settings

    def solve(self, operands, start):
        """Return the outcome, and the last factor and the scaling, for `linearization`."""
        outcome, *extra = solve_traced(self.layout.problem(operands), self.settings, start)
        return outcome, tuple(extra)

    def relax(self, problem: Problem, outcome: Outcome, extra, kappa: float):
        """Return the outcome at the relaxed points, and their factor and scaling."""
        (_, factor, scaling, x, v, s, status), _ = pack(relax(self.linearization(problem, outcome, extra), kappa))
        return outcome._replace(x=x, v=v, s=s, status=status), (factor, scaling)

    def linearization(self, problem: Problem, outcome: Outcome, extra) -> Linearization:
        return Linearization(problem, saved_together(problem, *extra), outcome.x, outcome.v, outcome.s, outcome.status)


# ---- the compiled engine, called from JAX's program
#
# Under vmap every argument has leading axes, of length 1 where it is not mapped. The callbacks make one batch of them.


def _engine(problem: Problem) -> Any:
    """Return the module of the compiled engine that solves on the host."""
    return choice.sparse_engine()[0] if problem.sparse else compiled_engine()[0]


def _raise_refusal(problem: Problem, settings: Settings) -> None:
    """Raise the error about an operand that breaks a rule, which a callback has found."""
    if problem.sparse:
        _engine(problem).solve(
            problem, settings._replace(max_iterations=0), None, check=True, verbose=False, progress=None
        )
    else:
        check_values(problem)


_HOST = choose_backend({})[0]
REFUSED = -1
"""The status of all problems where an operand breaks a rule of `check_values`."""


class _Stored(NamedTuple):
    """What the compiled engine stores of every problem; None where it does not (`engines.compiled.engine.Stored`)."""

    constant: Any = None
    last: Any = None
    scaling: Any = None
    factor_ok: Any = None


class _Compiled(NamedTuple):
    """The compiled engine: all but the arrays of a call, hashable."""

    layout: Layout
    on_host: Layout
    """The same with NumPy and the type that the engine computes in."""
    settings: Settings
    check: bool
    stores: bool = False
    """Store factors for the derivative, too: memory of JAX's, which a solve alone need not take."""

    def solve(self, operands, start):
        """Return the outcome, and what is stored of each problem, for `linearization`."""
        exact, working = self.layout.backend.widest_float, self.layout.dtype
        problem = self.layout.problem(operands)
        in_place = not problem.sparse and working == self.on_host.dtype and exact == np.float64
        batch, n, rows = problem.batch, problem.n, problem.rows

        def shaped(width: int, kind=working):
            return jax.ShapeDtypeStruct((batch, width), kind)

        outcome = Outcome(shaped(n), shaped(rows), shaped(rows), *[shaped(1, jnp.int32)] * 2, *[shaped(1, exact)] * 4)
        constant = last = None
        if in_place and self.stores:
            constant, last = (
                jax.ShapeDtypeStruct(shape, working) if math.prod(shape) else None
                for shape in _engine(problem).shapes_of_factors(problem, np.dtype(working).itemsize)
            )
        any_factor = constant is not None or last is not None
        stored = _Stored(constant, last, shaped(n + rows), shaped(1, jnp.bool_) if any_factor else None)
        return buffer_callback(_Solve(self, in_place), (outcome, stored), vmap_method="expand_dims")(operands, start)

    def relax(self, problem: Problem, outcome: Outcome, stored, kappa: float):
        """Return the outcome at the relaxed points, and what is stored: no factor is known there."""
        point = outcome.x, outcome.v, outcome.s, outcome.status
        shapes = [jax.ShapeDtypeStruct(part.shape, part.dtype) for part in point]
        callback: Any = _Relax(self, kappa)
        call = buffer_callback(callback, shapes, vmap_method="expand_dims")
        x, v, s, status = call(problem.operands, (*point, stored.scaling))
        return outcome._replace(x=x, v=v, s=s, status=status), _Stored(scaling=stored.scaling)

    def linearization(self, problem: Problem, outcome: Outcome, stored) -> Linearization:
        return Linearization(problem, _Factors(self, stored), outcome.x, outcome.v, outcome.s, outcome.status)

    def problem(self, operands, axes) -> Problem:
        """Make NumPy's problem of operands with leading axes, which are to be `axes`."""
        dtype = self.on_host.dtype
        _HOST.reuse_freed_memory()  # for copies in another type
        if not axes:
            operands = {k: apply(lambda a: a.astype(dtype, copy=False), value) for k, value in operands.items()}
            return self.on_host.problem(operands)
        batch_shape = *axes, *self._batch
        flat = {
            name: value.with_values(_flat(value.values, batch_shape, 1, dtype))
            if isinstance(value, Sparse)
            else _flat(value, batch_shape, len(OPERANDS[name]), dtype)
            for name, value in operands.items()
        }
        layout = make_layout(_HOST, (math.prod(batch_shape),), flat, rounding=self.on_host.rounding)
        return layout.problem(flat)

    @property
    def _batch(self):
        return (math.prod(self.layout.batch_shape),)


class _Solve(NamedTuple):
    """The callback that solves."""

    method: _Compiled
    in_place: bool
    """Let the engine write into JAX's buffers, which have the types that it writes."""

    def __call__(self, context, out, operands, start) -> None:
        operands, start, outcome, stored = _arrays(operands), start and _arrays(start), *map(_arrays, out)
        axes = _mapped_axes(operands, start or ())
        problem = symmetrized(self.method.problem(operands, axes))
        if start is not None:
            batch_shape, kinds = (*axes, *self.method._batch), (problem.dtype, problem.dtype, np.bool_)
            parts = (_flat(part, batch_shape, 1, kind) for part, kind in zip(start, kinds, strict=True))
            start = StartingPoint(*parts)
        in_place = {"out": _joined_batches(outcome, stored, axes)} if self.in_place else {}
        try:
            solved, factors = _engine(problem).solve(
                problem, self.method.settings, start, check=self.method.check, verbose=False, progress=None, **in_place
            )
        except ValueError:
            if not self.method.check:
                raise
            for to in outcome:
                to[...] = REFUSED
            return
        stored = _Stored(*stored)
        if not self.in_place:
            for to, value in zip((*outcome, stored.scaling), (*solved, factors.scaling(problem)), strict=True):
                to[...] = value.reshape(to.shape)
        elif stored.factor_ok is not None and not _all_written(stored, factors.stored):
            stored.factor_ok[...] = False


def _joined_batches(outcome, stored, axes) -> tuple[Outcome, _Stored]:
    """Return arrays to write to with one batch axis in place of mapped axes and the batch."""
    if axes:
        outcome = [to.reshape(-1, to.shape[-1]) for to in outcome]
        stored = [None if to is None else to.reshape(-1, to.shape[-1]) for to in stored]
    constant, last, scaling, factor_ok = stored
    return Outcome(*outcome), _Stored(constant, last, scaling, None if factor_ok is None else factor_ok[:, 0])


def _all_written(to: _Stored, stored) -> bool:
    """Write the constants that a batch shares along mapped axes; return whether all that is stored has been written.

    It is not where what is stored depends on the numbers of the operands, or on axes that are mapped.
    """
    if to.constant is not None and stored.constant.shape[0] == to.constant.shape[-2] == 1:
        to.constant[...] = stored.constant
    elif (0 if to.constant is None else to.constant.size) != stored.constant.size:
        return False
    return (0 if to.last is None else to.last.size) == stored.last.size


class _Relax(NamedTuple):
    """The callback that finds relaxed points."""

    method: _Compiled
    kappa: float

    def __call__(self, context, out, operands, point) -> None:
        operands, point, out = map(_arrays, (operands, point, out))
        axes = _mapped_axes(operands, point)
        problem = symmetrized(self.method.problem(operands, axes))
        *numbers, status, scaling = (_of_each(part, problem.batch, axes) for part in point)
        x, v, s, scaling = (part.astype(problem.dtype, copy=False) for part in (*numbers, scaling))
        factors = _engine(problem).without_factor(problem, scaling)
        relaxed = relax(Linearization(problem, factors, x, v, s, status), self.kappa)
        for to, name in zip(out, ("x", "v", "s", "status"), strict=True):
            to[...] = getattr(relaxed, name).reshape(to.shape)


class _Factors(NamedTuple):
    """`engines.base.Factors` of the compiled engine in JAX."""

    method: _Compiled
    stored: _Stored

    def solve(self, lin: Linearization, r_x, r_v, fill: float, matrices):
        """Solve the KKT system, as `engines.base.Factors` says; no gradients of matrices come along."""
        shapes = [jax.ShapeDtypeStruct(r.shape, r.dtype) for r in (r_x, r_v)]
        callback: Any = _KKTSolve(self.method, fill == 0)
        call = buffer_callback(callback, shapes, vmap_method="expand_dims")
        return *call(lin.problem.operands, (lin.x, lin.v, lin.s, lin.status), self.stored, (r_x, r_v)), {}

    def scaling(self, problem: Problem):
        """Return D and E of every problem, as `engines.base.Factors` says."""
        return self.stored.scaling


class _KKTSolve(NamedTuple):
    """The callback that solves with the KKT matrix at the solutions."""

    method: _Compiled
    zero: bool
    """Give problems that are not SOLVED zeros, else NaN."""

    def __call__(self, context, out, operands, point, stored, right) -> None:
        operands, point, stored, right, out = map(_arrays, (operands, point, stored, right, out))
        axes = _mapped_axes(operands, point)
        problem = self.method.problem(operands, axes)
        *numbers, status = (_of_each(part, problem.batch, axes) for part in point)
        x, v, s = (part.astype(problem.dtype, copy=False) for part in numbers)
        lin = Linearization(problem, self._factors(problem, _Stored(*stored), axes), x, v, s, status)
        right, places = _repeated(right, axes) if axes else (right, [()])
        for at in places:
            r_x, r_v = (_of_each(r[at], problem.batch, axes).astype(problem.dtype, copy=False) for r in right)
            u = solve_kkt(lin, r_x, r_v, unsolved="zero" if self.zero else "nan")
            for to, part in zip(out, u, strict=True):
                to[at] = part.reshape(to[at].shape)

    def _factors(self, problem: Problem, stored: _Stored, axes) -> Any:
        """Return the engine's factors of what JAX has stored."""
        scaling = _of_each(stored.scaling, problem.batch, axes).astype(problem.dtype, copy=False)
        if stored.factor_ok is None:
            return _engine(problem).without_factor(problem, scaling)
        constant, last = (self._factor(value, problem.batch, axes) for value in (stored.constant, stored.last))
        factor_ok = _of_each(stored.factor_ok, problem.batch, axes)[:, 0]
        return _engine(problem).factors_of(problem, constant, last, scaling, factor_ok)

    def _factor(self, value, batch: int, axes):
        """Return an array of `_Stored` for so many problems; one that a batch shares has one entry, for all axes."""
        if value is None or not axes:
            return value
        shared = value.shape[-2] < math.prod(self.method.layout.batch_shape)
        return value.reshape(-1, value.shape[-1])[:1] if shared else _of_each(value, batch, axes)


def _arrays(buffers):
    """Return NumPy's views of buffers, or None: of operands by name, or in a row."""
    if isinstance(buffers, dict):
        return {name: apply(np.asarray, buffer) for name, buffer in buffers.items()}
    return [None if buffer is None else np.asarray(buffer) for buffer in buffers]


def _mapped_axes(operands, vectors):
    """Return the leading axes that the arguments of a callback broadcast to: operands, and vectors (..., B or 1, ·)."""
    if operands["q"].ndim == 2:
        return ()
    of_operands = (value.shape[: -1 - len(OPERANDS[name])] for name, value in operands.items())
    return np.broadcast_shapes(*of_operands, *(vector.shape[:-2] for vector in vectors))


def _flat(value, batch_shape, core: int, dtype):
    """Return an array with one batch axis for its leading ones, of length 1 where all problems share it."""
    leading, last = value.shape[:-core], value.shape[-core:]
    if math.prod(leading) == 1:
        value = value.reshape(1, *last)
    else:
        value = _broadcast(value, (*batch_shape, *last)).reshape(-1, *last)
    return value.astype(dtype, copy=False)


def _repeated(right, axes):
    """Return right-hand sides that are broadcast along mapped axes, and the index of each that a solve takes.

    Along the axes that only right-hand sides are mapped over, one is solved for after the other with the same matrices.
    """
    mapped = np.broadcast_shapes(*(r.shape[:-2] for r in right))
    repeated = [a if b == 1 else 1 for a, b in zip(mapped, axes, strict=True)]
    places = (
        tuple([slice(None) if size == 1 else slice(i, i + 1) for i, size in zip(index, repeated, strict=True)])
        for index in product(*map(range, repeated))
    )
    return [_broadcast(r, (*mapped, *r.shape[-2:])) for r in right], places


def _of_each(value, batch: int, axes):
    """Return vectors with one batch axis, for each problem its own."""
    if not axes:
        return value
    value = _broadcast(value, (*axes, *value.shape[-2:]))
    return np.ascontiguousarray(value.reshape(batch, value.shape[-1]))


def _broadcast(value, shape):
    return value if value.shape == shape else np.broadcast_to(value, shape)  # which takes long for what it does


# ---- the compiled engine's kernels on a GPU, launched from JAX's program
#
# The addresses of buffers are all that the kernels get, so JAX's own operations make one batch of the axes of vmap and
# convert to the type that the kernels compute in. All that a launch writes comes from JAX as outputs of its callback.


def _kernels() -> Any:
    """Return the module that launches the kernels, which was chosen."""
    return choice.gpu_engine()[0]


class _Kernels(NamedTuple):
    """The compiled engine on a GPU: all but the arrays of a call, hashable."""

    layout: Layout
    working: Layout
    """The same with the type that the kernels compute in."""
    settings: Settings
    gpu: int
    """The number of the GPU for which sizes are computed; a program may run on another one like it."""

    def solve(self, operands, start):
        """Return the outcome, and what is stored for the derivative."""
        exact, working = self.layout.backend.widest_float, self.layout.dtype

        def solve(batch: int, operands, start):
            with jax.enable_x64(True):
                problem = symmetrized(self.problem(batch, operands))
                if start is not None:
                    x, v, usable = (_each(batch, part) for part in start)
                    start = StartingPoint(x.astype(problem.dtype), v.astype(problem.dtype), usable)
                kernels = _kernels()
                shapes = kernels.arrays_of_solve(
                    problem, kernels.cuda.device(self.gpu), jax.ShapeDtypeStruct, store=False
                )
                launch: Any = _SolveLaunch(problem.layout, self.settings)
                outcome, stored, *_ = buffer_callback(launch, shapes)(problem.operands, start)
                kinds = [working] * 3 + [jnp.int32] * 2 + [exact] * 4
                outcome = Outcome(*(part.astype(kind) for part, kind in zip(outcome, kinds, strict=True)))
                return outcome, stored._replace(scaling=stored.scaling.astype(working))

        return _over_batches(solve, math.prod(self.layout.batch_shape))(operands, start)

    def relax(self, problem: Problem, outcome: Outcome, stored, kappa: float):
        """Return the outcome at the relaxed points, which the array engine finds, and what is stored."""
        relaxed = relax(self.linearization(problem, outcome, stored), kappa)
        return outcome._replace(x=relaxed.x, v=relaxed.v, s=relaxed.s, status=relaxed.status), stored

    def linearization(self, problem: Problem, outcome: Outcome, stored) -> Linearization:
        return Linearization(problem, _KernelFactors(self, stored), outcome.x, outcome.v, outcome.s, outcome.status)

    def problem(self, batch: int, operands) -> Problem:
        """Make the problem that the kernels solve of operands with one batch axis."""
        operands = {name: value.astype(self.working.dtype) for name, value in operands.items()}
        return make_layout(self.working.backend, (batch,), operands, rounding=self.working.rounding).problem(operands)


class _SolveLaunch(NamedTuple):
    """The callback that launches the kernels that solve."""

    layout: Layout
    settings: Settings

    def __call__(self, context, out, operands, start) -> None:
        layout = self.layout._replace(backend=BufferBackend.of(operands["q"], context))
        _kernels().launch_solve(layout.problem(operands), self.settings, start, out)


class _KernelFactors(NamedTuple):
    """`engines.base.Factors` of the kernels in JAX: they factor the KKT matrix at the solution in each solve."""

    method: _Kernels
    stored: Any

    def solve(self, lin: Linearization, r_x, r_v, fill: float, matrices):
        """Solve the KKT system, as `engines.base.Factors` says; no gradients of matrices come along."""
        method, result = self.method, lin.x.dtype

        def solve(batch: int, operands, point, right):
            with jax.enable_x64(True):
                problem = method.problem(batch, operands)
                point, right = jax.tree.map(partial(_each, batch), (point, right))
                (*numbers, status, stored), kind = point, problem.dtype
                *numbers, scaling = (part.astype(kind) for part in (*numbers, stored.scaling))
                point, right = (*numbers, status, stored._replace(scaling=scaling)), [r.astype(kind) for r in right]
                kernels, form = _kernels(), _kernels().form_of(problem)
                needed = kernels.derivative_bytes(problem, kernels.cuda.device(method.gpu), form)
                shapes = [jax.ShapeDtypeStruct(r.shape, r.dtype) for r in right]
                shapes.append(jax.ShapeDtypeStruct((needed,), np.uint8))
                launch: Any = _DerivativeLaunch(problem.layout, int(form), fill)
                u_x, u_v, _ = buffer_callback(launch, shapes)(problem.operands, point, right)
                return u_x.astype(result), u_v.astype(result)

        point = lin.x, lin.v, lin.s, lin.status, self.stored
        return *_over_batches(solve, lin.problem.batch)(lin.problem.operands, point, (r_x, r_v)), {}

    def scaling(self, problem: Problem):
        """Return D and E of every problem, as `engines.base.Factors` says."""
        return self.stored.scaling


class _DerivativeLaunch(NamedTuple):
    """The callback that launches the kernel that solves with the KKT matrix at the solutions."""

    layout: Layout
    form: int
    fill: float

    def __call__(self, context, out, operands, point, right) -> None:
        layout = self.layout._replace(backend=BufferBackend.of(operands["q"], context))
        x, v, s, status, stored = point
        factors = _kernels().Factors(self.form, stored)
        lin = Linearization(layout.problem(operands), factors, x, v, s, status)
        *u, workspace = out
        if lin.problem.batch:
            factors.launch(lin, right, self.fill, u, {}, workspace)


def _over_batches(function, batch: int):
    """Return ``function(batch, operands, *args)`` of arrays (B or 1, ...), for which axes of vmap join the batch axis.

    Where only the last argument is mapped and problems have matrices of their own, it is called for one entry of the
    axis after the other, so that no matrix is copied.
    """
    mapped = custom_vmap(partial(function, batch))

    @mapped.def_vmap
    def _(size: int, is_mapped, *args):
        *others, last = args
        own = any(name in MATRICES and value.shape[0] > 1 for name, value in args[0].items())
        if own and not any(jax.tree.leaves(is_mapped[:-1])):
            every = jax.tree.map(lambda a, here: a if here else jnp.stack([a] * size), last, is_mapped[-1])
            out = jax.lax.map(lambda one: mapped(*others, one), every)
            return out, jax.tree.map(lambda _: True, out)

        def joined(value, is_mapped):
            if not is_mapped:
                if value.shape[0] == 1:
                    return value
                value = value[None]
            shape = size, batch, *value.shape[2:]
            return jnp.broadcast_to(value, shape).reshape(size * batch, *shape[2:])

        out = _over_batches(function, size * batch)(*jax.tree.map(joined, args, tuple(is_mapped)))
        out = jax.tree.map(lambda part: part.reshape(size, batch, *part.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return mapped


def _each(batch: int, value):
    """Return vectors (B or 1, ·) for each problem of a batch."""
    return jnp.broadcast_to(value, (batch, *value.shape[1:]))


_Method: TypeAlias = _Traced | _Compiled | _Kernels

# ---- the derivative


@partial(jax.jit, static_argnums=(0, 1, 2))
def _solve(method: _Method, unsolved: str, kappa: float | None, operands, start):
    outcome, extra = _iterate(method, unsolved, operands, start)
    problem, moving, shown = method.layout.problem(operands), outcome, outcome
    if kappa is not None:
        moving, _ = _relaxed(method, unsolved, kappa, operands, *jax.lax.stop_gradient((outcome, extra)))
        solved = _solved(moving)
        x, v = masked(jnp, solved, moving.x, moving.v)
        value = jnp.sum(x * (problem.hessian(x) / 2 + problem.q), axis=-1, keepdims=True)
        if problem.is_elastic:
            value = value + relaxed_price(problem, x, v, kappa)
        value = filled(jnp, solved, value, FILL[_fill(unsolved)])
        moves = {"x": moving.x, "v": moving.v, "objective": value.astype(outcome.objective.dtype)}
        shown = outcome._replace(**{name: _with_value(getattr(outcome, name), part) for name, part in moves.items()})
    return solver.make_solution(problem, shown, None), outcome, extra, moving.status


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _iterate(method: _Method, unsolved: str, operands, start):
    return method.solve(operands, start)


@_iterate.defjvp
def _iterate_jvp(method, unsolved, primals, tangents):
    storing = method._replace(stores=True) if isinstance(method, _Compiled) else method
    result = _iterate(storing, unsolved, *primals)
    moved = _tangent(storing, unsolved, 0.0, primals[0], tangents[0], *result)
    if storing == method:
        return result, moved
    (outcome, stored), (of_outcome, of_stored) = result, moved
    return (outcome, _Stored(scaling=stored.scaling)), (of_outcome, _Stored(scaling=of_stored.scaling))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _relaxed(method: _Method, unsolved: str, kappa: float, operands, outcome: Outcome, extra):
    return method.relax(method.layout.problem(operands), outcome, extra, kappa)


@_relaxed.defjvp
def _relaxed_jvp(method, unsolved, kappa, primals, tangents):
    result = _relaxed(method, unsolved, kappa, *primals)
    return result, _tangent(method, unsolved, kappa, primals[0], tangents[0], *result)


@jax.custom_jvp
def _with_value(value, moving):
    """Return a value that differentiates as another one does."""
    return value


@_with_value.defjvp
def _with_value_jvp(primals, tangents):
    return _with_value(*primals), tangents[1]


def _tangent(method: _Method, unsolved: str, kappa: float, operands, tangents, outcome: Outcome, extra):
    """Return the tangents of the outcome at a solution, or at its relaxed point for κ, and of what comes with it."""
    problem, solved = method.layout.problem(operands), _solved(outcome)
    x, v = masked(jnp, solved, outcome.x, outcome.v)
    exists = problem.exists
    parts = [(r_x, jnp.where(exists, r_v, 0.0)) for r_x, r_v in right_hand_sides(problem, x, v, tangents, kappa)]
    right = [sum(r[1:], r[0]) for r in zip(*parts, strict=True)]
    dx, dv = _solve_kkt(problem, outcome, method.linearization(problem, outcome, extra), unsolved, kappa, *right)
    still, others = jax.tree.map(_zero_tangent, (outcome, extra))
    value = objective_jvp(problem, x, jnp.where(exists, v, 0.0), tangents, *parts)
    value = filled(jnp, solved, value, FILL[_fill(unsolved)])
    return still._replace(x=dx, v=dv, objective=value.astype(outcome.objective.dtype)), others


def _solved(outcome: Outcome):
    """Return the mask (B, 1) of the problems that are SOLVED."""
    return outcome.status == int(Status.SOLVED)


def _fill(unsolved: str) -> str:
    """Return what problems that are not SOLVED contribute; under `jit` "raise" cannot raise."""
    return "zero" if unsolved == "zero" else "nan"


def _solve_kkt(problem: Problem, outcome: Outcome, lin: Linearization, unsolved: str, kappa: float, r_x, r_v):
    """K⁻¹ r as an operation that JAX transposes, since K is symmetric, and differentiates by what K is made of."""
    solved, exists, inequality = _solved(outcome), problem.exists, problem.inequality
    x, v = masked(jnp, solved, outcome.x, outcome.v)
    if problem.is_elastic:
        theta = complementarity(problem, x, v, kappa).theta
    else:  # s is known better than k − Kx, but it moves as that does
        slack = problem.k - problem.constraints(x)
        s = outcome.s + (slack - jax.lax.stop_gradient(slack))
        theta = jnp.where(inequality, s / jnp.where(inequality & solved, v, 1.0), 0.0)

    def split(u):
        return u[:, : problem.n], u[:, problem.n :]

    def matvec(u):
        u_x, u_v = split(u)
        u_rows = jnp.where(exists, u_v, 0.0)
        right_v = jnp.where(exists, problem.constraints(u_x) - theta * u_rows, u_v)
        return jnp.concat([problem.hessian(u_x) + problem.adjoint(u_rows), right_v], axis=-1)

    def solve(_, r):
        return jnp.concat(solve_kkt(lin, *split(r), unsolved=_fill(unsolved)), axis=-1)

    # In one array: JAX transposes a solve whose right-hand sides are all linear in what it transposes for.
    right = jnp.concat([r_x, r_v], axis=-1)
    return split(jax.lax.custom_linear_solve(matvec, right, solve, symmetric=True))


def _zero_tangent(value):
    floating = jnp.issubdtype(value.dtype, jnp.floating)
    return jnp.zeros_like(value) if floating else np.zeros(value.shape, jax.dtypes.float0)
