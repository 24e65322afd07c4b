"""Parts of a batch: where their problems are in it, what is kept of them, how they are put together again."""

from __future__ import annotations

from typing import Any, NamedTuple

from ...problem import Problem, take
from ..base import Outcome
from .equilibration import Metric
from .state import Part, Residuals, State


class Ended(NamedTuple):
    """Problems of a chunk that ended together."""

    index: Any
    """Their positions in the whole batch, or a slice of it."""
    outcome: Outcome


class Kept(NamedTuple):
    """What the derivative needs of problems that were solved by one form: all of them, or those that ended together."""

    index: Any
    """Their positions in the whole batch, or a slice of it."""
    form: type | None
    """The class of the reduced form that solved them; None where nothing of it is kept."""
    constants: Any
    """Those of that form."""
    factor: Any
    """The last factor of the reduced KKT matrix, or None."""
    metric: Metric


def outcome_of(state: State) -> Outcome:
    """What remains of the state of problems that have ended."""
    rest = {name: getattr(state, name) for name in Outcome._fields if name not in Residuals._fields}
    return Outcome(**state.found._asdict(), **rest)


def keeps_factor(problem: Problem) -> bool:
    """Whether a factor a problem is in proportion to the data, which it is not where the matrices are shared."""
    return problem.n**2 * problem.batch <= min(2**26, problem.entries)


def keeps_constants(problem: Problem) -> bool:
    """The same for the constants of a dense dual form, which are as few as the matrices."""
    if all(M is None or M.shape[0] == 1 for M in (problem.Q, problem.A, problem.G)):
        return True
    linear = problem.m + problem.p
    return (problem.n**2 + linear * (problem.n + linear)) * problem.batch <= min(2**26, 2 * problem.entries)


def keep(problem: Problem, part: Part, index, factor, where=None) -> Kept:
    """What the derivative needs of a part, which is at `index` of the batch, or of the problems at `where` in it."""
    form, xp = part.form, part.problem.backend.xp
    index, metric = in_batch(part.problem.backend, index, where), rows_at(xp, part.metric, where)
    if not (keeps_constants if form.definite else keeps_factor)(problem):
        return Kept(index, None, None, None, metric)
    constants = form.constants and rows_at(xp, form.constants, where)
    return Kept(index, type(form), constants, None if form.definite else rows_at(xp, factor, where), metric)


def in_batch(backend, index, where):
    """Where in the batch those problems are that are at `where` among the ones at `index`; None: all of them."""
    return index if where is None else backend.xp.take(positions(backend, index), where, axis=0)


def positions(backend, index):
    """A slice of the batch, or positions in it, as positions."""
    return backend.arange(index.stop)[index.start :] if isinstance(index, slice) else index


def batch_order(backend, pieces):
    """What brings the problems of all pieces into the order of the batch; None where they are in it."""
    if all(isinstance(piece.index, slice) for piece in pieces):  # chunks, one after the other
        return None
    return backend.xp.argsort(backend.xp.concat([positions(backend, piece.index) for piece in pieces]))


def rows_at(xp, tree, where):
    """Take the problems at `where` of arrays; None: all of them."""
    return tree if where is None else take(xp, tree, where)


def join(problem: Problem, pieces: list[Ended]) -> Outcome:
    """The outcomes of the pieces, which the list loses, in the order of the batch."""
    xp, backend = problem.backend.xp, problem.backend
    names = Outcome._fields
    if not pieces:
        kinds = {"status": xp.int32, "iterations": xp.int32}
        kinds |= dict.fromkeys(("objective", "primal", "dual", "gap"), backend.widest_float)
        widths = {"x": problem.n, "v": problem.rows, "s": problem.rows}
        return Outcome(*(backend.full((0, widths.get(k, 1)), 0, kinds.get(k, problem.dtype)) for k in names))
    columns = [[getattr(piece.outcome, name) for piece in pieces] for name in names]
    order = batch_order(backend, pieces)
    pieces.clear()  # each column is free once it is joined
    whole = {}
    for name in reversed(names):
        joined = xp.concat(columns.pop(), axis=0)
        whole[name] = joined if order is None else xp.take(joined, order, axis=0)
    return Outcome(**whole)
