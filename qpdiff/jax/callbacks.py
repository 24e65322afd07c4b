"""The compiled engine on the CPU, called from JAX's program.

Three callbacks get NumPy's views of JAX's buffers and write into them: the solution of the operands, the relaxed points
of it, and the solve with the KKT matrix at either. Under vmap every argument has leading axes, of length 1 where it is
not mapped.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.buffer_callback import buffer_callback

from ..backend import choose_backend
from ..differentiation import solve_kkt
from ..engines import choice
from ..engines.array.central_path import relax
from ..engines.base import Linearization, Outcome, Settings, StartingPoint
from ..engines.choice import compiled_engine
from ..problem import CORES, Layout, Problem, make_layout
from ..sparse import Sparse, apply
from ..validation import check_values, symmetrized
from .mapped import in_one_batch, mapped_axes, of_each, repeated


def _engine(problem: Problem) -> Any:
    """Return the module of the compiled engine that solves on the host."""
    return choice.sparse_engine()[0] if problem.sparse else compiled_engine()[0]


def raise_refusal(problem: Problem, settings: Settings) -> None:
    """Raise the error about an operand that breaks a rule, which a callback has found."""
    if problem.sparse:
        _engine(problem).solve(
            problem, settings._replace(max_iterations=0), None, check=True, verbose=False, progress=None
        )
    else:
        check_values(problem)


HOST = choose_backend({})[0]
REFUSED = -1
"""The status of all problems where an operand breaks a rule of `check_values`."""


class Stored(NamedTuple):
    """What the compiled engine stores of every problem; None where it does not (`engines.compiled.engine.Stored`)."""

    constant: Any = None
    last: Any = None
    scaling: Any = None
    factor_ok: Any = None


class Compiled(NamedTuple):
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
        stored = Stored(constant, last, shaped(n + rows), shaped(1, jnp.bool_) if any_factor else None)
        return buffer_callback(_Solve(self, in_place), (outcome, stored), vmap_method="expand_dims")(operands, start)

    def relax(self, problem: Problem, outcome: Outcome, stored, kappa: float):
        """Return the outcome at the relaxed points, and what is stored: no factor is known there."""
        point = outcome.x, outcome.v, outcome.s, outcome.status
        shapes = [jax.ShapeDtypeStruct(part.shape, part.dtype) for part in point]
        callback: Any = _Relax(self, kappa)
        call = buffer_callback(callback, shapes, vmap_method="expand_dims")
        x, v, s, status = call(problem.operands, (*point, stored.scaling))
        return outcome._replace(x=x, v=v, s=s, status=status), Stored(scaling=stored.scaling)

    def linearization(self, problem: Problem, outcome: Outcome, stored) -> Linearization:
        return Linearization(problem, _Factors(self, stored), outcome.x, outcome.v, outcome.s, outcome.status)

    def problem(self, operands, axes) -> Problem:
        """Make NumPy's problem of operands with leading axes, which are to be `axes`."""
        dtype = self.on_host.dtype
        HOST.reuse_freed_memory()  # for copies in another type
        if not axes:
            operands = {k: apply(lambda a: a.astype(dtype, copy=False), value) for k, value in operands.items()}
            return self.on_host.problem(operands)
        batch_shape = *axes, *self._batch
        flat = {
            name: value.with_values(in_one_batch(value.values, batch_shape, 1, dtype))
            if isinstance(value, Sparse)
            else in_one_batch(value, batch_shape, len(CORES[name]), dtype)
            for name, value in operands.items()
        }
        layout = make_layout(HOST, (math.prod(batch_shape),), flat, rounding=self.on_host.rounding)
        return layout.problem(flat)

    @property
    def _batch(self):
        return (math.prod(self.layout.batch_shape),)


class _Solve(NamedTuple):
    """The callback that solves."""

    method: Compiled
    in_place: bool
    """Let the engine write into JAX's buffers, which have the types that it writes."""

    def __call__(self, context, out, operands, start) -> None:
        operands, start, outcome, stored = _arrays(operands), start and _arrays(start), *map(_arrays, out)
        axes = mapped_axes(operands, start or ())
        problem = symmetrized(self.method.problem(operands, axes))
        if start is not None:
            batch_shape, kinds = (*axes, *self.method._batch), (problem.dtype, problem.dtype, np.bool_)
            parts = (in_one_batch(part, batch_shape, 1, kind) for part, kind in zip(start, kinds, strict=True))
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
        stored = Stored(*stored)
        if not self.in_place:
            for to, value in zip((*outcome, stored.scaling), (*solved, factors.scaling(problem)), strict=True):
                to[...] = value.reshape(to.shape)
        elif stored.factor_ok is not None and not _all_written(stored, factors.stored):
            stored.factor_ok[...] = False


def _joined_batches(outcome, stored, axes) -> tuple[Outcome, Stored]:
    """Return arrays to write to with one batch axis in place of mapped axes and the batch."""
    if axes:
        outcome = [to.reshape(-1, to.shape[-1]) for to in outcome]
        stored = [None if to is None else to.reshape(-1, to.shape[-1]) for to in stored]
    constant, last, scaling, factor_ok = stored
    return Outcome(*outcome), Stored(constant, last, scaling, None if factor_ok is None else factor_ok[:, 0])


def _all_written(to: Stored, stored) -> bool:
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

    method: Compiled
    kappa: float

    def __call__(self, context, out, operands, point) -> None:
        operands, point, out = map(_arrays, (operands, point, out))
        axes = mapped_axes(operands, point)
        problem = symmetrized(self.method.problem(operands, axes))
        *numbers, status, scaling = (of_each(part, problem.batch, axes) for part in point)
        x, v, s, scaling = (part.astype(problem.dtype, copy=False) for part in (*numbers, scaling))
        factors = _engine(problem).without_factor(problem, scaling)
        relaxed = relax(Linearization(problem, factors, x, v, s, status), self.kappa)
        for to, name in zip(out, ("x", "v", "s", "status"), strict=True):
            to[...] = getattr(relaxed, name).reshape(to.shape)


class _Factors(NamedTuple):
    """`engines.base.Factors` of the compiled engine in JAX."""

    method: Compiled
    stored: Stored

    def solve(self, lin: Linearization, r_x, r_v, fill: float, names):
        """Solve the KKT system, as `engines.base.Factors` says; no gradients come along."""
        shapes = [jax.ShapeDtypeStruct(r.shape, r.dtype) for r in (r_x, r_v)]
        callback: Any = _KKTSolve(self.method, fill == 0)
        call = buffer_callback(callback, shapes, vmap_method="expand_dims")
        return *call(lin.problem.operands, (lin.x, lin.v, lin.s, lin.status), self.stored, (r_x, r_v)), {}

    def scaling(self, problem: Problem):
        """Return D and E of every problem, as `engines.base.Factors` says."""
        return self.stored.scaling


class _KKTSolve(NamedTuple):
    """The callback that solves with the KKT matrix at the solutions."""

    method: Compiled
    zero: bool
    """Give problems that are not SOLVED zeros, else NaN."""

    def __call__(self, context, out, operands, point, stored, right) -> None:
        operands, point, stored, right, out = map(_arrays, (operands, point, stored, right, out))
        axes = mapped_axes(operands, point)
        problem = self.method.problem(operands, axes)
        *numbers, status = (of_each(part, problem.batch, axes) for part in point)
        x, v, s = (part.astype(problem.dtype, copy=False) for part in numbers)
        lin = Linearization(problem, self._factors(problem, Stored(*stored), axes), x, v, s, status)
        right, places = repeated(right, axes) if axes else (right, [()])
        for at in places:
            r_x, r_v = (of_each(r[at], problem.batch, axes).astype(problem.dtype, copy=False) for r in right)
            u = solve_kkt(lin, r_x, r_v, unsolved="zero" if self.zero else "nan")
            for to, part in zip(out, u, strict=True):
                to[at] = part.reshape(to[at].shape)

    def _factors(self, problem: Problem, stored: Stored, axes) -> Any:
        """Return the engine's factors of what JAX has stored."""
        scaling = of_each(stored.scaling, problem.batch, axes).astype(problem.dtype, copy=False)
        if stored.factor_ok is None:
            return _engine(problem).without_factor(problem, scaling)
        constant, last = (self._factor(value, problem.batch, axes) for value in (stored.constant, stored.last))
        factor_ok = of_each(stored.factor_ok, problem.batch, axes)[:, 0]
        return _engine(problem).factors_of(problem, constant, last, scaling, factor_ok)

    def _factor(self, value, batch: int, axes):
        """Return an array of `Stored` for so many problems; one that a batch shares has one entry, for all axes."""
        if value is None or not axes:
            return value
        shared = value.shape[-2] < math.prod(self.method.layout.batch_shape)
        return value.reshape(-1, value.shape[-1])[:1] if shared else of_each(value, batch, axes)


def _arrays(buffers):
    """Return NumPy's views of buffers, or None: of operands by name, or in a row."""
    if isinstance(buffers, dict):
        return {name: apply(np.asarray, buffer) for name, buffer in buffers.items()}
    return [None if buffer is None else np.asarray(buffer) for buffer in buffers]
