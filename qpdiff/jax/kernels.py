"""The compiled engine's kernels on a GPU, launched from JAX's program.

The addresses of buffers are all that the kernels get, so JAX's own operations make one batch of the axes of vmap and
convert to the type that the kernels compute in. All that a launch writes comes from JAX as outputs of its callback.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.experimental.buffer_callback import buffer_callback

from ..backend.jax import BufferBackend
from ..engines import choice
from ..engines.array.central_path import relax
from ..engines.base import Linearization, Outcome, Settings, StartingPoint
from ..problem import MATRICES, Layout, Problem, make_layout
from ..validation import symmetrized


def _kernels() -> Any:
    """Return the module that launches the kernels, which was chosen."""
    return choice.gpu_engine()[0]


class Kernels(NamedTuple):
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

    method: Kernels
    stored: Any

    def solve(self, lin: Linearization, r_x, r_v, fill: float, names):
        """Solve the KKT system, as `engines.base.Factors` says; no gradients come along."""
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
