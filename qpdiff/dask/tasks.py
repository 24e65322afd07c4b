"""What is done in a task, and the bytes that Dask is to expect of its results."""

from __future__ import annotations

import array_api_compat
from dask.sizeof import sizeof

from .. import differentiation, solver
from ..backend import single_threaded
from ..differentiation import Gradients, Tangents
from ..problem import Problem
from ..solution import FIELDS, POINT, Solution, raise_if_unsolved
from ..sparse import stored
from .operands import arguments, by_option, part_of


def solve_block(where, *values, names, patterns, warm, unsolved: str, options) -> Solution:
    """Solve the block at the slices `where`; the values are those of the operands and of a warm start, by name."""
    parts = [_whole(value) for value in values]
    if warm:
        start = dict.fromkeys(FIELDS) | dict(zip(warm, parts[len(names) :], strict=True))
        options = options | {"warm_start": Solution(**start)}
    try:
        with single_threaded():
            sol = solver.solve_qp(**arguments(dict(zip(names, parts, strict=False)), patterns), **options)
        if unsolved == "raise":
            raise_if_unsolved(array_api_compat.to_device(sol.status, "cpu"))
    except (TypeError, ValueError, RuntimeError) as error:
        if where:
            slices = ", ".join(f"{axis.start}:{axis.stop}" for axis in where)
            error.add_note(f"This is about the block [{slices}] of the batch; problems are counted from its start.")
        raise
    return sol


def vjp_block(sol: Solution, *values, names, options) -> Gradients:
    with single_threaded():
        return differentiation.vjp(sol, **dict(zip(names, map(_whole, values), strict=True)), **options)


def jvp_block(sol: Solution, *values, names, options) -> Tangents:
    with single_threaded():
        return differentiation.jvp(sol, **by_option(dict(zip(names, map(_whole, values), strict=True))), **options)


def read_gradient(gradients: Gradients, operand: str, dims: int):
    value = stored(part_of(gradients, operand))
    return value.reshape((1,) * (dims - value.ndim) + value.shape)


def _whole(value):
    """Return the one block along the core axes, of which Dask makes a list for each."""
    while isinstance(value, list):
        (value,) = value
    return value


@sizeof.register(Solution)
def _size_of_solution(sol: Solution) -> int:
    """Estimate the bytes of a block; its variables and multipliers are in its linearization, if of the same type."""
    lin = sol.linearization
    if lin is None:
        return sum(sizeof(getattr(sol, name)) for name in FIELDS)
    own = [name for name in FIELDS if name not in POINT or lin.problem.result != lin.problem.dtype]
    return sizeof(tuple(lin)) + sum(sizeof(getattr(sol, name)) for name in own) + sizeof(vars(sol).get("violation"))


@sizeof.register(Problem)
def _size_of_problem(problem: Problem) -> int:
    return sizeof({name: stored(value) for name, value in problem.operands.items()})
