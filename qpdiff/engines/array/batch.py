"""Sub-batches: where their problems are in the batch, what is saved of them, how they are joined again."""

from __future__ import annotations

from typing import Any, NamedTuple

from ...problem import Problem, take
from ..base import Outcome
from .equilibration import Scaling
from .state import Residuals, State, SubBatch


class Ended(NamedTuple):
    """Problems of a chunk that ended together."""

    index: Any
    """Their positions in the whole batch, or a slice of it."""
    outcome: Outcome


class SavedFactor(NamedTuple):
    """Factor and scaling of problems that were solved by one form: of all of them, or of those that ended together."""

    index: Any
    """Their positions in the whole batch, or a slice of it."""
    form: type | None
    """The class of the reduced form that solved them; None where nothing of it is saved."""
    constants: Any
    """The constants of that form."""
    factor: Any
    """The last factor of the reduced KKT matrix, or None."""
    scaling: Scaling


def outcome_of(state: State) -> Outcome:
    """Return the outcome of problems that have ended."""
    rest = {name: getattr(state, name) for name in Outcome._fields if name not in Residuals._fields}
    return Outcome(**state.absolute._asdict(), **rest)


def saves_factor(problem: Problem) -> bool:
    """Return whether a factor a problem is in proportion to the data, which it is not where matrices are shared."""
    return problem.n**2 * problem.batch <= min(2**26, problem.entries)


def saves_constants(problem: Problem) -> bool:
    """Return the same for the constants of a dense dual form, which are as few as the matrices."""
    if all(M is None or M.shape[0] == 1 for M in (problem.Q, problem.A, problem.G)):
        return True
    linear = problem.m + problem.p
    return (problem.n**2 + linear * (problem.n + linear)) * problem.batch <= min(2**26, 2 * problem.entries)


def save_factor(problem: Problem, sub: SubBatch, index, factor, where=None) -> SavedFactor:
    """Save factor and scaling of a sub-batch, which is at `index` of the batch, or of the problems at `where` in it."""
    form, xp = sub.form, sub.problem.backend.xp
    index, scaling = in_batch(sub.problem.backend, index, where), take_all(xp, sub.scaling, where)
    if not (saves_constants if form.skips_rho else saves_factor)(problem):
        return SavedFactor(index, None, None, None, scaling)
    constants = form.constants and take_all(xp, form.constants, where)
    return SavedFactor(index, type(form), constants, None if form.skips_rho else take_all(xp, factor, where), scaling)


def in_batch(backend, index, where):
    """Return where in the batch the problems are that are at `where` among those at `index`; None: all of them."""
    return index if where is None else backend.xp.take(positions(backend, index), where, axis=0)


def positions(backend, index):
    """Return positions for a slice of the batch, or for positions."""
    return backend.arange(index.stop)[index.start :] if isinstance(index, slice) else index


def batch_order(backend, groups):
    """Return what brings the problems of some groups into the order of the batch; None where they are in it."""
    if all(isinstance(group.index, slice) for group in groups):  # chunks, one after the other
        return None
    return backend.xp.argsort(backend.xp.concat([positions(backend, group.index) for group in groups]))


def take_all(xp, tree, where):
    """Take the problems at `where` of every array in nested tuples; None: all of them."""
    return tree if where is None else take(xp, tree, where)


def join(problem: Problem, ended: list[Ended]) -> Outcome:
    """Join outcomes in the order of the batch; the list is emptied."""
    xp, backend = problem.backend.xp, problem.backend
    names = Outcome._fields
    if not ended:
        kinds = {"status": xp.int32, "iterations": xp.int32}
        kinds |= dict.fromkeys(("objective", "primal", "dual", "gap"), backend.widest_float)
        widths = {"x": problem.n, "v": problem.rows, "s": problem.rows}
        return Outcome(*(backend.full((0, widths.get(k, 1)), 0, kinds.get(k, problem.dtype)) for k in names))
    columns = [[getattr(each.outcome, name) for each in ended] for name in names]
    order = batch_order(backend, ended)
    ended.clear()  # each column is free once it is joined
    joined = {}
    for name in reversed(names):
        column = xp.concat(columns.pop(), axis=0)
        joined[name] = column if order is None else xp.take(column, order, axis=0)
    return Outcome(**joined)
