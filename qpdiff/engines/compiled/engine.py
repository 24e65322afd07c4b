"""The arrays that a call passes to C++: operands, results, and factors that are stored for the derivative.

The method is in C++ (src/): threads claim work items as long as there are any, and solve small problems in lane groups.
"""

from __future__ import annotations

import importlib
import math
import platform
from collections.abc import Collection
from contextlib import nullcontext, suppress
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np

from ...backend import NumPyBackend, single_threaded_blas
from ...problem import OPERANDS, PRICES, Problem
from ...validation import check_values
from ..base import Linearization, Outcome, Settings, StartingPoint
from ..parameters import DOUBLE, SINGLE
from ..reduction import preferred_form
from .memory import SMALLEST, empty


def _load_core():
    """Import the extension module for the widest vectors that the processor has, and name its instruction set."""
    # `_level` finds out which this processor can run; on processors that are no x86 there is only one module.
    _level = importlib.import_module("._level", __package__)
    for level in range(_level.highest(), 1, -1):
        with suppress(ModuleNotFoundError):
            return importlib.import_module(f"._core_v{level}", __package__), f"x86-64-v{level}"
    return importlib.import_module("._core", __package__), platform.machine()


_core: Any
_core, INSTRUCTIONS = _load_core()
SMALL, ENOUGH = 32, 6
"""Number of variables and of rows of A and G up to which problems are solved in lane groups; and number of problems for
each thread from which on they are, as a lane group takes as long as two to five problems one by one."""
THREAD_OPERATIONS = 1e6
"""Operations that take about as long as it takes to start a thread."""
SOLVE_COST, DERIVATIVE_COST = 10, 1
"""Rough cost of a call for each problem, in steps of the iteration."""
BLAS_BUFFER, THREAD_BYTES, MATRICES_BYTES = 33 * 2**20, 75 * 2**20, 64
"""Bytes of the buffer that OpenBLAS allocates for each thread that calls it, of the stack and the heap of a thread, and
of its workspace for each entry of a matrix."""
FEW = 2**10
"""Number of entries of x in a batch up to which recycling of memory takes longer than it saves."""
STORED_BYTES = 2**26, 2**29
"""Bytes of factors that are stored for the derivative in any case, and at most where the operands take as many."""
SCALARS = (np.int32, np.int32, np.float64, np.float64, np.float64, np.float64)
"""The types of `Outcome` from the status on."""
DECIDING = frozenset({"Q", "G", "A", "lb", "ub"})
"""Operands that the balanced scaling of the matrices and the reduced form depend on."""
PARAMETERS = {np.dtype(np.float64): _core.Parameters(DOUBLE), np.dtype(np.float32): _core.Parameters(SINGLE)}


class Stored(NamedTuple):
    """Factors and scaling of every problem, stored for the derivative; src/method/problem.hpp has their layout.

    The first axis is the batch, of length 1 where one entry is for all problems and 0 where nothing is stored; None
    there is as good.
    """

    constant: Any
    """The constants of the reduced KKT system."""
    last: Any
    """Its last factor, and the weights of the constraints in it."""
    scaling: Any
    """D and E."""
    form: Any
    """The reduced form that each problem has been solved with."""
    factor_ok: Any
    """Mask of the problems whose last factor can be used."""


class Factors(NamedTuple):
    """Factors that solve the KKT system at the solutions of a batch."""

    form: int
    """The reduced form chosen by the shapes."""
    stored: Stored

    def solve(self, lin: Linearization, r_x, r_v, fill: float, names: Collection[str]):
        """Solve the KKT system, as `engines.base.Factors` says; the gradients of all but prices come along."""
        lin = lin.at_solved() if names else lin
        problem, dtype = lin.problem, r_x.dtype
        count, allocate = problem.batch, np.empty if lin.x.size < FEW else empty
        u_x, u_v = allocate(lin.x.shape, dtype), allocate(lin.v.shape, dtype)
        operands = problem.operands
        gradients = {name: allocate(operands[name].shape, dtype) for name in names if name in OPERANDS}
        _core.solve_kkt(
            arrays_of(problem), self.stored,
            (lin.x, lin.v, lin.s, r_x, r_v, lin.status),
            (u_x, u_v, *map(gradients.get, OPERANDS)), PARAMETERS[dtype], self.form, fill,
            problem.fixed is not None, workers_with_memory(problem, workers_for(problem, count, DERIVATIVE_COST)),
        )  # fmt: skip
        if "Q" in gradients and problem.Q.shape[0] < count:
            gradients["Q"] = gradients["Q"] + gradients["Q"].mT
        return u_x, u_v, gradients

    def scaling(self, problem: Problem):
        """Return D and E of every problem, as `engines.base.Factors` says."""
        return self.stored.scaling


def refusal(problem: Problem, verbose: bool) -> str | None:
    """Say why it cannot take these problems; None: it can."""
    if not isinstance(problem.backend, NumPyBackend):
        return "takes NumPy arrays only; pass backend='numpy'"
    if verbose:
        return "takes one problem after the other; verbose needs engine='array'"
    return None


def suits(problem: Problem) -> bool:
    """Return whether it is likely to take less time than the array engine: it is, for all problems."""
    return True


def solve(
    problem: Problem, settings: Settings, start: StartingPoint | None, *, check: bool, verbose: bool, progress, out=None
) -> tuple[Outcome, Factors]:
    """Solve every problem of a batch, as `engines.base.Engine` says; `out` is that of `arrays_of_solve`."""
    outcome, factors = arrays_of_solve(problem, out)
    if not _solve(problem, settings, start, progress, check, outcome, factors):
        check_values(problem)  # raises the error, if there is one: the checks in C++ are stricter
        _solve(problem, settings, start, progress, False, outcome, factors)
    return outcome, factors


def arrays_of_solve(problem: Problem, out: tuple[Outcome, Stored] | None = None) -> tuple[Outcome, Factors]:
    """Make the arrays that a solve fills.

    `out` has those that the caller wants filled, contiguous; of factors, which may be None, those are taken whose size
    is that of what is stored.
    """
    count, dtype = problem.batch, np.dtype(problem.dtype)
    form = int(preferred_form(problem))
    plan = _plan(problem, form, dtype.itemsize)
    if out is None:
        x, v, s, constant, last, scaling = [make(shape, dtype) for make, shape in plan]
        outcome = Outcome(x, v, s, *[np.empty((count, 1), kind) for kind in SCALARS])
        factor_ok = np.empty(count, np.bool_)
    else:
        outcome, stored = out
        scaling, factor_ok = stored.scaling, np.empty(count, np.bool_) if stored.factor_ok is None else stored.factor_ok
        constant, last = (
            to.reshape(shape) if to is not None and to.size == math.prod(shape) else make(shape, dtype)
            for to, (make, shape) in zip((stored.constant, stored.last), plan[3:5], strict=True)
        )
    return outcome, Factors(form, Stored(constant, last, scaling, np.empty(count, np.int32), factor_ok))


def shapes_of_factors(problem: Problem, itemsize: int) -> list[tuple[int, int]]:
    """Return the shapes of the first two fields of `Stored` after a solve, by the shapes of the operands alone.

    For problems whose numbers decide on the form they are those of the primal one.
    """
    plan = _plan(problem, int(preferred_form(problem, diagonal=False)), itemsize)
    return [shape for _, shape in plan[3:5]]


def _solve(
    problem: Problem, settings: Settings, start: StartingPoint | None, progress, check: bool, outcome, factors
) -> bool:
    """Fill the arrays of `arrays_of_solve`; return False where an operand may break a rule."""
    count, dtype = problem.batch, outcome.x.dtype
    form, stored = factors
    if count == 0:
        return True
    workers = workers_with_memory(problem, workers_for(problem, count, SOLVE_COST))
    longest = max(problem.n, problem.m + problem.p)
    in_lanes = start is None and longest <= SMALL and count >= ENOUGH * workers and dtype.itemsize == 8
    call = (
        arrays_of(problem), outcome, stored,
        (None, None, None) if start is None else tuple([np.ascontiguousarray(a) for a in start]), settings,
        PARAMETERS[dtype], form, check, problem.rounding, in_lanes, workers, progress,
    )  # fmt: skip
    if longest <= _core.BLOCK:
        return _core.solve(*call)
    _set_blas()
    with single_threaded_blas() if workers > 1 else nullcontext():
        return _core.solve(*call)


def arrays_of(problem: Problem) -> tuple:
    """Return the operands in the order of C++: with those of prices, where there are any."""
    return tuple(map(problem.operands.get, (*OPERANDS, *PRICES) if problem.is_elastic else OPERANDS))


@cache
def _set_blas() -> None:
    """Pass SciPy's BLAS to C++; it is imported with the first large problem."""
    from scipy.linalg import cython_blas

    _core.set_blas(cython_blas.__pyx_capi__)


def workers_for(problem: Problem, count: int, cost: int) -> int:
    """Return how many threads to start for a number of problems; `cost` is that of each in steps of the iteration."""
    if count <= 1:  # counting operations takes time that matters in a small solve
        return 1
    return as_many_as_pay(problem.backend.workers, count, cost * _operations(problem))


def as_many_as_pay(workers: int, count: int, operations: float) -> int:
    """Return up to so many threads for a number of problems of so many operations each."""
    return max(1, min(workers, count, int(count * operations / THREAD_OPERATIONS)))


def workers_with_memory(problem: Problem, workers: int) -> int:
    """Return for how many of these threads there is memory where they call BLAS; raise a MemoryError where for none.

    OpenBLAS does not report that there is none: it tries again without end, or ends the process. Memory that is not
    written to costs nothing but address space, which `ulimit -v` limits.
    """
    longest = max(problem.n, problem.m + problem.p)
    if longest <= _core.BLOCK:
        return workers
    each = BLAS_BUFFER + MATRICES_BYTES * longest**2
    with suppress(MemoryError):
        np.empty(workers * each + (workers - 1) * THREAD_BYTES, np.uint8)
        return workers
    np.empty(each, np.uint8)
    return 1


def _operations(problem: Problem) -> float:
    """Estimate the operations of a step of one problem."""
    n, linear = problem.n, problem.m + problem.p
    return min(n, linear or n) ** 3 / 3 + 8 * n * (n + linear) + 100 * (n + problem.rows)


# ---- storage


def without_factor(problem: Problem, scaling) -> Factors:
    """Return factors that store the scaling D and E alone, (B, n + rows): each solve factors the KKT matrix again."""
    return factors_of(problem, None, None, scaling, np.zeros(problem.batch, np.bool_))


def factors_of(problem: Problem, constant, last, scaling, factor_ok) -> Factors:
    """Return factors made of fields of `Stored`; of those that are None nothing is stored."""
    form = int(preferred_form(problem))
    return Factors(form, Stored(constant, last, scaling, np.full(problem.batch, form, np.int32), factor_ok))


def is_shared(value) -> bool:
    """Return whether an operand is the same for all problems: one entry, or one broadcast with a stride of 0."""
    return value.shape[0] == 1 or getattr(value, "strides", (1,))[0] == 0  # traced arrays have none


def _plan(problem: Problem, form: int, itemsize: int):
    """Return a function that makes each of x, v, s and of the first three fields of `Stored`, and their shapes.

    Factors are stored where `stores` says so.
    """
    count, operands, sizes = problem.batch, problem.operands, _sizes(problem, form, itemsize)
    shared = count == 1 or all(is_shared(value) for name, value in operands.items() if name in DECIDING)
    plan, stored = _plan_of(sizes, count, shared, True)
    if stored > STORED_BYTES[0]:
        data = itemsize * sum(math.prod(v.shape[is_shared(v) :]) for v in operands.values())
        if not stores(stored, data):
            plan, _ = _plan_of(sizes, count, shared, False)
    return plan


def stores(stored: int, data: int) -> bool:
    """Return whether factors of so many bytes are stored for the derivative, of problems of so many."""
    few, many = STORED_BYTES
    return stored <= max(few, min(many, data))


def _sizes(problem: Problem, form: int, itemsize: int):
    """Return what the size of a problem's storage depends on, in the order of `_core.stored_numbers`."""
    layout = problem.layout
    return form, layout.n, layout.m + layout.p, layout.lower, layout.upper, itemsize


@lru_cache(maxsize=256)
def _plan_of(sizes: tuple, count: int, shared: bool, store: bool):
    """Return that plan with or without factors of every problem, and the bytes of these."""
    _, n, linear, lower, upper, itemsize = sizes
    rows = linear + n * (lower + upper)
    constant, last = _core.stored_numbers(*sizes)
    counts = 1 if shared else count if store and constant else 0, count if store and last else 0
    stored = itemsize * ((0 if shared else counts[0] * constant) + counts[1] * last)
    shapes = [(count, n), (count, rows), (count, rows), (counts[0], constant), (counts[1], last), (count, n + rows)]
    return [(_maker(itemsize * math.prod(shape)), shape) for shape in shapes], stored


def _maker(size: int):
    """Return the function that makes an array of so many bytes."""
    return nothing if size == 0 else np.empty if size < SMALLEST else empty


@cache
def nothing(shape, dtype) -> np.ndarray:
    """Return an array without entries, the same for all calls."""
    return np.empty(shape, dtype)
