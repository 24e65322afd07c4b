"""The operands of a batch: those of one problem, and whether they are by the rules."""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload

from ..problem import INFINITE
from .compiler import OPTIONS, finite, inline, jit
from .lanes import larger
from .method import ABSENT, EQUALITY, INEQUALITY, SMALLEST, SMALLEST_SINGLE, Reduced, copy_matrix
from .stacks import cholesky


@jit
def within(a, below, above):
    """Whether all entries lie strictly between two numbers, which NaN does not."""
    result = True
    for i in range(a.shape[0]):
        result &= below < a[i] < above
    return result


@jit
def plausible(batch, i, all_shared):
    """Whether the operands of a problem pass the rules of `problem` but that of definiteness.

    The rules themselves find out what is wrong. `all_shared` is whether to look at what the problems share, too.
    """
    if not (within(at(batch.q, i), -np.inf, np.inf) and within(at(batch.b, i), -np.inf, np.inf)):
        return False
    if all_shared or batch.h.shape[0] > 1:
        h = at(batch.h, i)
        for j in range(h.shape[0]):
            if not h[j] > -np.inf:
                return False
    if all_shared or batch.lb.shape[0] > 1 or batch.ub.shape[0] > 1:
        lb, ub = at(batch.lb, i), at(batch.ub, i)
        for j in range(lb.shape[0]):
            if not lb[j] < np.inf or (ub.shape[0] and lb[j] > ub[j]):
                return False
        for j in range(ub.shape[0]):
            if not ub[j] > -np.inf:
                return False
    for operand in (batch.A, batch.G):
        if all_shared or operand.shape[0] > 1:
            M = at(operand, i)
            for j in range(M.shape[0]):
                if not within(M[j], -np.inf, np.inf):
                    return False
    if all_shared or batch.Q.shape[0] > 1:
        Q = at(batch.Q, i)
        limit = (1e-4 if Q.itemsize == 4 else 1e-8) * largest_on_diagonal(Q)
        return limit < np.inf and symmetric(Q, limit)
    return True


@jit
def largest_on_diagonal(Q):
    """The largest entry, of a matrix that is positive semidefinite."""
    largest = SMALLEST_SINGLE if Q.itemsize == 4 else SMALLEST
    for i in range(Q.shape[0]):
        largest = larger(abs(Q[i, i]), largest)
    return largest


@jit
def symmetric(Q, limit):
    """Whether the differences from the transpose are within a limit, and all entries numbers."""
    n, result = Q.shape[0], True
    whole = n - n % 8
    # In blocks, of which every line of the cache that is read has a row.
    for i in range(0, whole, 8):
        for j in range(0, i, 8):
            for r in range(8):
                row, column = Q[i + r, j : j + 8], Q[j : j + 8, i + r]
                for k in range(8):
                    result &= abs(row[k] - column[k]) <= limit
    for i in range(n):
        for j in range(i - i % 8 if i < whole else 0, i):
            result &= abs(Q[i, j] - Q[j, i]) <= limit
    return result


@jit
def convex(Q, M):
    """Whether Q is positive semidefinite as far as `problem` wants it."""
    n, scale, margin = Q.shape[0], 1.0 / largest_on_diagonal(Q), 1e-4 if Q.itemsize == 4 else 1e-8
    for j in range(n):
        row, out = Q[j], M[j]
        for k in range(j, n):
            out[k] = row[k] * scale
        out[j] += margin
    return cholesky(M, n)


@inline
def at(operand, i):
    """The entry of problem i, or the one that is shared."""
    return operand[i if operand.shape[0] > 1 else 0]


@jit
def fill_rows(b, h, lb, ub, k, kind):
    """The right-hand side of every row, and what it is."""
    row = 0
    for i in range(b.shape[0]):
        k[row], kind[row] = b[i], EQUALITY
        row += 1
    for i in range(h.shape[0]):
        k[row], kind[row] = limit(h[i])
        row += 1
    both = lb.shape[0] > 0 and ub.shape[0] > 0
    for i in range(lb.shape[0]):
        k[row], kind[row] = limit(-lb[i])
        if both and lb[i] == ub[i] and finite(lb[i]):
            k[row], kind[row] = -lb[i], EQUALITY
        row += 1
    for i in range(ub.shape[0]):
        k[row], kind[row] = limit(ub[i])
        if both and lb[i] == ub[i] and finite(lb[i]):
            k[row], kind[row] = 0.0, ABSENT
        row += 1


@jit
def limit(value):
    """An upper limit as a row; one that no number satisfies, if it came unchecked, must not pass for none."""
    if value >= INFINITE:
        return 0.0, ABSENT
    return value if finite(value) else np.nan, INEQUALITY


@inline
def stack(A, G, room, own):
    """The rows of A and G as one matrix, in `room` where there are both: already, if they are not a problem's own."""
    p, m = A.shape[0], G.shape[0]
    if p == 0:
        return G
    if m == 0:
        return A
    if own:
        copy_matrix(A, room[:p])
        copy_matrix(G, room[p:])
    return room


@jit
def own_rows(batch, work):
    """Whether every problem has rows of its own; else they are put where `stack` looks for them."""
    own = batch.A.shape[0] > 1 or batch.G.shape[0] > 1
    if not own:
        stack(at(batch.A, 0), at(batch.G, 0), work.stacked, True)
    return own


def in_double(batch, exact, i, K, room):
    """Q, q and K of problem i in float64."""
    raise NotImplementedError("for compiled code")


@overload(in_double, inline="always", jit_options=OPTIONS)
def _in_double(batch, exact, i, K, room):
    if isinstance(exact, types.NoneType):
        return lambda batch, exact, i, K, room: (at(batch.Q, i), at(batch.q, i), K)
    return lambda batch, exact, i, K, room: (
        at(exact.Q, i),
        at(exact.q, i),
        stack(at(exact.A, i), at(exact.G, i), room, True),
    )


@jit
def reduced_at(store, i):
    """What problem i keeps, or the room for one problem."""
    return Reduced(
        at(store.hessian, i), at(store.V, i), at(store.S, i), at(store.diagonal, i), at(store.U, i),
        at(store.weights, i),
    )  # fmt: skip


@jit
def in_primal_form(reduced, work):
    """With room for the factor of the primal form, which is not kept."""
    return Reduced(reduced.hessian, reduced.V, reduced.S, reduced.diagonal, work.square, work.weights)
