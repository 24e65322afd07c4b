"""The compiled engine: the method of `qpdiff.method` and its derivative for NumPy arrays, by Numba.

A thread for each processor takes problems as long as there are any, small ones in groups, and BLAS gets one thread
while several are at work. A batch that takes much memory on the way goes through in ranges.
"""

from __future__ import annotations

import math
from contextlib import suppress
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np

from .. import kkt
from ..backend import NumPyBackend, single_threaded_blas
from ..engines.base import Linearization, Outcome, Settings, StartingPoint
from ..problem import OPERANDS, Problem, check_values
from ..solution import Status
from . import derivative, one_by_one
from .groups import make_group_room, solve_groups
from .lanes import LANES
from .memory import empty, kept_by_thread
from .method import DENSE_DUAL, DIAGONAL_DUAL, PRIMAL, Batch, Reduced, Room, make_room
from .threads import SOLVE, SWEEP, new_turn, work_on, workers_for
from .tiles import padded

SMALL, ENOUGH = 32, 6
"""Up to so many variables and rows of A and G, problems are solved in groups; and from so many for each thread, as a
group takes as long as two to five problems one by one."""
KEPT_ENTRIES = 2**20
"""A thread keeps its working memory where the matrices of a problem are not larger."""
_DECIDING = {"Q", "G", "A", "lb", "ub"}
"""Operands that the metric and the reduced form are made of."""
KEPT_BYTES = 2**26, 2**29
"""Factors are kept for the derivative where they take no more than the first, or than the data and the second."""


class Factors(NamedTuple):
    """What `solve_kkt` needs of the last iteration of every problem."""

    form: int
    """The reduced form that was to be taken."""
    store: Reduced
    metric: tuple
    forms: Any
    """The one that was."""
    factored: Any

    def solve(self, lin: Linearization, r_x, r_v, fill: float, of_matrices: bool):
        """Solve the KKT system, as `engines.base.Factors` says."""
        solved, x = lin.status[:, 0] == int(Status.SOLVED), lin.x if of_matrices else None
        return solve_kkt(lin.problem, self, lin.v, lin.s, solved, r_x, r_v, fill, x)

    def __reduce__(self):
        return _restore, tuple(self)


def _restore(form, store, metric, forms, factored) -> Factors:
    """From another process, where arrays may come out unaligned or read-only: other types to Numba, compiled anew."""

    def own(array):
        return np.require(array, requirements=["C", "A", "W"])

    return Factors(form, Reduced(*map(own, store)), tuple(map(own, metric)), own(forms), own(factored))


def cache_folder() -> str:
    """Where Numba keeps the compiled functions for later processes."""
    return one_by_one.solve_batch.stats.cache_path


class _Refused(Exception):
    """An operand may break a rule of `problem.check_values`."""


def refusal(problem: Problem, verbose: bool) -> str | None:
    """Say why it cannot take these problems; None: it can."""
    if not isinstance(problem.backend, NumPyBackend):
        return "takes NumPy arrays only; pass backend='numpy', or engine='auto'"
    if verbose:
        return "takes one problem after the other; verbose needs engine='array'"
    return None


def solve(
    problem: Problem, settings: Settings, near: StartingPoint | None, *, check: bool, verbose: bool, progress
) -> tuple[Outcome, Factors]:
    """The outcome of every problem of a batch, and what the derivative needs.

    With `check`, operands that break a rule of `problem.check_values` are a ValueError.
    """
    with suppress(_Refused):
        return _solve(problem, settings, near, progress, check)
    check_values(problem)  # says what is wrong, or that nothing is: what refuses on the way is stricter
    return _solve(problem, settings, near, progress, False)


def _solve(
    problem: Problem, settings: Settings, near: StartingPoint | None, progress, check: bool
) -> tuple[Outcome, Factors]:
    n, rows, count, dtype = problem.n, problem.rows, problem.batch, np.dtype(problem.dtype)
    form = _form(problem)
    shared = all(distinct(problem, name).shape[0] == 1 for name in problem.operands if name in _DECIDING)
    store = _store(problem, form, shared)
    metric = empty((count, n), dtype), empty((count, rows), dtype)
    outcome = Outcome(
        empty((count, n), dtype), empty((count, rows), dtype), empty((count, rows), dtype),
        np.empty((count, 1), np.int32), np.empty((count, 1), np.int32), *np.empty((4, count, 1)),
    )  # fmt: skip
    forms, factored = np.empty(count, np.int64), np.empty(count, np.bool_)
    points = (metric[0][:1], metric[1][:1], factored[:1]) if near is None else (near.x, near.v, near.usable[:, 0])

    def results(where: slice):
        """Where the outcome of a range goes, and what is kept of it."""
        metric_there = tuple(_part(a, where) for a in metric)
        return metric_there, Outcome(*(a[where] for a in outcome)), forms[where], factored[where]

    def in_groups(where: slice):
        batch = _operands(problem, where, dtype)
        first, results_there = where.start == 0, results(where)

        def run(turn, edges) -> None:
            room = make_group_room(n, problem.m + problem.p, rows, batch.lb.shape[1], batch.ub.shape[1], form)
            if not solve_groups(
                batch, check, first, shared, settings, form, _stored(problem, store, form, where), *results_there,
                wanted[where], turn, edges, room,
            ):  # fmt: skip
                raise _Refused

        return run

    def in_turn(where: slice, prepared: bool):
        batch = _operands(problem, where, dtype)
        exact = _operands(problem, where, np.dtype(np.float64)) if dtype == np.float32 else None
        start = tuple(_frozen(_part(a, where)) for a in points)
        first, results_there = where.start == 0, results(where)

        def run(turn, edges) -> None:
            if not one_by_one.solve_batch(
                batch, exact, check, first, settings, form, prepared, near is not None, start,
                _stored(problem, store, form, where), *results_there, wanted[where], turn, edges, _room(problem),
            ):  # fmt: skip
                raise _Refused

        return run

    wanted, done = np.ones(count, np.bool_), (outcome, Factors(form, store, metric, forms, factored))
    if near is None and _small(problem):
        work_on(problem, 0, in_groups, SOLVE, progress, LANES)
        if not wanted.any():
            return done
        progress = None  # of the few that are left
    prepared = shared and count > 1
    if prepared:
        wanted[0] = True
        with single_threaded_blas():
            in_turn(slice(0, 1), False)(new_turn(), np.array([0, 1, 1]))
        forms[wanted] = forms[0]
    work_on(problem, int(prepared), lambda where: in_turn(where, prepared), SOLVE, progress)
    return done


def solve_kkt(problem: Problem, factors: Factors, v, s, solved, r_x, r_v, fill: float, x=None):
    """Solve the KKT system at the solutions; problems that are not solved get the number `fill`.

    With x, also the gradients of the matrices, by name.
    """
    n, count, dtype = problem.n, problem.batch, r_x.dtype
    u_x, u_v = empty(r_x.shape, dtype), empty(r_v.shape, dtype)
    gradients, sums = {}, {}
    for name, height in (("Q", n), ("A", problem.p), ("G", problem.m)):
        wanted = x is not None and name in problem.operands
        shared = wanted and len(getattr(problem, name)) < count
        gradients[name] = empty((count if wanted and not shared else 0, height, n), dtype)
        sums[name] = np.zeros((height if shared else 0, n), dtype)

    def prepare(where: slice):
        batch = _operands(problem, where, np.dtype(problem.dtype))
        metric = tuple(_part(a, where) for a in factors.metric)
        given = tuple(_frozen(a[where]) for a in (r_x if x is None else x, v, s, solved, r_x, r_v))
        there = tuple(a[where] for a in (u_x, u_v, *gradients.values()))
        forms, factored = factors.forms[where], factors.factored[where]

        def run(turn, edges) -> None:
            derivative.solve_kkt_batch(
                batch, _stored(problem, factors.store, factors.form, where), metric, forms, factored, *given, fill,
                *there, *sums.values(), turn, edges, _room(problem),
            )  # fmt: skip

        return run

    work_on(problem, 0, prepare, SWEEP, sums=sum(derivative.strips.py_func(a) for a in sums.values()))
    if len(sums["Q"]):
        sums["Q"] = sums["Q"] + sums["Q"].T
    return u_x, u_v, {k: a for k, a in gradients.items() if len(a)} | {k: a[None] for k, a in sums.items() if len(a)}


# ---- the arrays that the compiled functions take


def distinct(problem: Problem, name: str):
    """An operand without the copies that broadcasting only pretends to have made."""
    value = getattr(problem, name)
    return value[:1] if value.strides[0] == 0 else value


def _operands(problem: Problem, where: slice, dtype) -> Batch:
    given = {
        name: _frozen(_part(distinct(problem, name), where).astype(dtype, copy=False)) for name in problem.operands
    }
    return Batch(**_absent(problem.n, dtype) | given)


@cache
def _absent(n: int, dtype) -> dict[str, Any]:
    """What stands for operands that a problem does not have: no rows, no bounds."""
    shapes = {name: (0,) if len(core) == 1 else (0, n) for name, core in OPERANDS.items()}
    return {name: _frozen(np.empty((1, *shape), dtype)) for name, shape in shapes.items()}


def _room(problem: Problem) -> Room:
    size = problem.n * (problem.n + problem.m + problem.p)
    make = _own_room if size <= KEPT_ENTRIES else make_room
    return make(problem.n, problem.m + problem.p, problem.rows, np.dtype(problem.dtype))


_own_room = kept_by_thread(make_room)


def _part(array, where: slice):
    return array if array.shape[0] == 1 else array[where]


def _frozen(array):
    """A contiguous array that counts as read-only, as the caller's may be: one type for the compiled functions."""
    flags = array.flags
    array = array.view() if flags.c_contiguous and flags.aligned else array.copy("C")
    array.setflags(write=False)
    return array


def _small(problem: Problem) -> bool:
    """Whether to take problems several at a time, which should leave no thread without work."""
    if max(problem.n, problem.m + problem.p) > SMALL or problem.dtype != np.float64 or problem.batch < ENOUGH:
        return False
    return problem.batch >= ENOUGH * workers_for(problem, problem.batch, SOLVE)


def _form(problem: Problem) -> int:
    kind = kkt.preferred_form(problem)
    return {kkt.PrimalForm: PRIMAL, kkt.DenseDualForm: DENSE_DUAL, kkt.DiagonalDualForm: DIAGONAL_DUAL}[kind]


@cache
def _core_shapes(form: int, n: int, linear: int, rows: int, itemsize: int) -> Reduced:
    """Shapes of what one problem keeps of its reduced form."""
    square, wide, small = (padded(*shape, itemsize) for shape in ((n, n), (n, linear), (linear, linear)))
    if form == PRIMAL:
        return Reduced((0, 0), (0, 0), (0, 0), (0,), square, (rows,))
    if form == DENSE_DUAL:
        return Reduced(square, wide, small, (0,), small, (0,))
    return Reduced((1, n), wide, (0, 0), (n,), small, (rows,))


def _shapes(problem: Problem, form: int) -> Reduced:
    itemsize = np.dtype(problem.dtype).itemsize
    return _core_shapes(form, problem.n, problem.m + problem.p, problem.rows, itemsize)


_CONSTANT = {PRIMAL: set(), DENSE_DUAL: {"hessian", "V", "S"}, DIAGONAL_DUAL: {"diagonal"}}
"""What does not change in an iteration."""
_NEEDED = {PRIMAL: {"U", "weights"}, DENSE_DUAL: {"hessian", "V", "S"}, DIAGONAL_DUAL: {"diagonal", "U", "weights"}}
"""What the derivative needs."""


def _store(problem: Problem, form: int, shared: bool) -> Reduced:
    """Room for what is kept of every problem, or once for all that share it; empty where nothing is kept."""
    cores = _shapes(problem, form)
    shapes, size = _store_shapes(form, cores, problem.batch, shared, True)
    few, many = (limit // np.dtype(problem.dtype).itemsize for limit in KEPT_BYTES)
    if size > few and size > min(many, sum(distinct(problem, name).size for name in problem.operands)):
        shapes, _ = _store_shapes(form, cores, problem.batch, shared, False)
    return Reduced(*(empty(shape, problem.dtype) for shape in shapes))


@lru_cache(maxsize=256)
def _store_shapes(form: int, cores: Reduced, batch: int, shared: bool, keep: bool) -> tuple[Reduced, int]:
    """Shapes of the store, with or without what is kept of every problem, and how many numbers that is."""
    once = _CONSTANT[form] if shared else set()
    kept = _NEEDED[form] - once if keep else set()
    counts = {name: batch if name in kept else int(name in once) for name in Reduced._fields}
    shapes = Reduced(*((counts[name], *core) for name, core in zip(counts, cores, strict=True)))
    return shapes, sum(math.prod(getattr(shapes, name)) for name in kept)


def _stored(problem: Problem, store: Reduced, form: int, where: slice) -> Reduced:
    """The part of the store for a range of problems, and room for one problem in place of what is not kept."""
    shapes = _shapes(problem, form)
    return Reduced(
        *(
            _part(a, where) if a.shape[0] else empty((1, *shape), a.dtype)
            for a, shape in zip(store, shapes, strict=True)
        )
    )
