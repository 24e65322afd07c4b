"""Small problems, several at a time: the functions of `method` on `lanes`.

A group of problems takes its steps together, and what a problem has come to is put aside when it is solved. A problem
that does not take the ordinary course (a pivot that is not positive, a certificate, no progress) is left to
`one_by_one.solve_batch`, which begins it anew.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..method import IMPATIENCE, LARGE_MULTIPLIERS
from .compiler import entry, hot, jit
from .lanes import LANES, each, every, first_lanes, larger, no, of_lane, put, select, some, stacked, take
from .memory import aligned, kept_by_thread
from .method import (
    CURVATURE,
    DENSE_DUAL,
    DIAGONAL_DUAL,
    INEQUALITY,
    MAX_ITERATIONS,
    OF_ROWS,
    OF_VARIABLES,
    PRIMAL,
    RUNNING,
    SIZES,
    SOLVED,
    One,
    Reduced,
    Room,
    Verdict,
    assess,
    balance,
    begin,
    equilibrate,
    first_rho,
    later_delta,
    later_rho,
    make_iterates,
    make_work,
    positive,
    prepare_dense,
    prepare_diagonal,
    revised,
    rows_after,
    step,
    variables_are_exact,
)
from .operands import at, convex, fill_rows, plausible
from .stacks import transpose
from .threads import next_piece
from .tiles import invert_blocks, mirror


class GroupRoom(NamedTuple):
    """Memory for a group: arrays whose last axis are the lanes."""

    room: Room
    reduced: Reduced
    Q: Any
    q: Any
    bounds: Any
    """Lower and upper bounds, or of length 0."""
    D: Any
    E: Any
    k: Any
    """The rows of one problem, and what they are."""
    kind: Any


@kept_by_thread
def make_group_room(n: int, linear: int, rows: int, lower: int, upper: int, form: int) -> GroupRoom:
    def lanes(*shape):
        return aligned((*shape, LANES))

    size = n if form == PRIMAL else linear
    room = Room(
        lanes(OF_VARIABLES, n), lanes(OF_ROWS, rows), lanes(5, n), lanes(5, rows), np.zeros((2, rows), np.int8),
        np.zeros(rows, np.int64), lanes(SIZES), lanes(linear, n), lanes(0, 0), lanes(linear, n), lanes(n, linear),
        lanes(n, n),
    )  # fmt: skip
    reduced = Reduced(
        lanes(n if form == DENSE_DUAL else 1, n), lanes(n, linear), lanes(linear, linear), lanes(n), lanes(size, size),
        lanes(rows),
    )  # fmt: skip
    return GroupRoom(
        room, reduced, lanes(n, n), lanes(n), (lanes(lower), lanes(upper)), lanes(n), lanes(rows), np.zeros(rows),
        np.zeros(rows, np.int8),
    )  # fmt: skip


@jit
def put_vector(stack, lane, a):
    for i in range(a.shape[0]):
        put(stack, i, lane, a[i])


@jit
def put_matrix(stack, first, lane, M):
    """Put a matrix into the rows of a stack from the first on."""
    for i in range(M.shape[0]):
        row = stack[first + i]
        for j in range(M.shape[1]):
            put(row, j, lane, M[i, j])


@jit
def take_vector(stack, lane, out):
    for i in range(stack.shape[0]):
        out[i] = take(stack, i, lane)


@jit
def take_matrix(stack, lane, out, rows, columns):
    for i in range(rows):
        take_vector(stack[i][:columns], lane, out[i])


@jit
def load_matrices(batch, i, size, one, lower, upper):
    """Put what the reduced form is made of into the lanes, of so many problems from i on."""
    for lane in range(LANES):
        j = i + min(lane, size - 1)
        put_matrix(one.Q, 0, lane, at(batch.Q, j))
        put_matrix(one.K, 0, lane, at(batch.A, j))
        put_matrix(one.K, one.equalities, lane, at(batch.G, j))
        put_vector(lower, lane, at(batch.lb, j))
        put_vector(upper, lane, at(batch.ub, j))


@jit
def load(batch, i, size, one, k, kind):
    """Put the rest into the lanes; whether the rows of all problems are of the same kinds."""
    alike = True
    for lane in range(LANES):
        j = i + min(lane, size - 1)
        put_vector(one.q, lane, at(batch.q, j))
        fill_rows(at(batch.b, j), at(batch.h, j), at(batch.lb, j), at(batch.ub, j), k, kind)
        put_vector(one.k, lane, k)
        for row in range(kind.shape[0]):
            if lane == 0:
                one.kind[row] = kind[row]
            alike &= one.kind[row] == kind[row]
    return alike


@jit
def exchange(where, a, b):
    for i in range(a.shape[0]):
        first, second = a[i], b[i]
        a[i], b[i] = select(where, second, first), select(where, first, second)


@jit
def chosen(where, one, other):
    """One verdict for the problems of a mask, and another for the rest."""
    return Verdict(
        select(where, one.status, other.status), select(where, one.objective, other.objective),
        select(where, one.found_primal, other.found_primal), select(where, one.found_dual, other.found_dual),
        select(where, one.found_gap, other.found_gap), select(where, one.primal, other.primal),
        select(where, one.dual, other.dual), select(where, one.gap, other.gap), select(where, one.near, other.near),
        select(where, one.worst, other.worst), select(where, one.best_primal, other.best_primal),
        select(where, one.best_dual, other.best_dual), select(where, one.best_gap, other.best_gap),
        select(where, one.proof, other.proof), select(where, one.waiting, other.waiting),
    )  # fmt: skip


@jit
def keep(i, lane, form, shared, one, reduced, now, verdict, iterations, store, metric, outcome, forms, factored):
    """Put aside what problem i has come to, and what its derivative needs."""
    take_vector(now.x, lane, outcome.x[i])
    take_vector(now.v, lane, outcome.v[i])
    take_vector(now.s, lane, outcome.s[i])
    outcome.status[i, 0], outcome.iterations[i, 0] = of_lane(verdict.status, lane), iterations
    outcome.objective[i, 0], outcome.gap[i, 0] = of_lane(verdict.objective, lane), of_lane(verdict.found_gap, lane)
    outcome.primal[i, 0], outcome.dual[i, 0] = of_lane(verdict.found_primal, lane), of_lane(verdict.found_dual, lane)
    take_vector(one.D, lane, metric[0][i])
    take_vector(one.E, lane, metric[1][i])
    if i == 0 or not shared:
        n, linear = one.K.shape[1], one.K.shape[0]
        if form == DENSE_DUAL:
            take_matrix(reduced.hessian, lane, at(store.hessian, i), n, n)
            invert_blocks(at(store.hessian, i), n)
            take_matrix(reduced.V, lane, at(store.V, i), n, linear)
            take_matrix(reduced.S, lane, at(store.S, i), linear, linear)
            mirror(at(store.S, i), linear)
        if form == DIAGONAL_DUAL:
            take_vector(reduced.diagonal, lane, at(store.diagonal, i))
    if form != DENSE_DUAL:
        size = reduced.U.shape[0]
        take_matrix(reduced.U, lane, at(store.U, i), size, size)
        invert_blocks(at(store.U, i), size)
        take_vector(reduced.weights, lane, at(store.weights, i))
    forms[i], factored[i] = form, True


@hot
def solve_group(
    i, size, form, shared, one, reduced, settings, first, second, store, metric, outcome, forms, factored, wanted, work
):
    """Carry the problems in the lanes to their ends, or leave them."""
    limit = settings.max_iterations
    inequalities = False
    for row in range(one.kind.shape[0]):
        inequalities |= one.kind[row] == INEQUALITY
    now, before = first, second
    mu, verdict, sound, ratio = begin(form, one, reduced, settings, now, before, work)
    active = first_lanes(size) & sound & (verdict.status == RUNNING) & no(ratio > LARGE_MULTIPLIERS)
    for lane in range(size):
        wanted[i + lane] = not of_lane(active, lane)
    rho, delta = each(mu, first_rho(form, settings)), each(mu, settings.delta)
    refine, iterations = first_lanes(LANES), 0
    while some(active):
        now, before, past = before, now, verdict
        sound, _, alpha_s, alpha_z, new_mu = step(
            form, one, reduced, settings, mu, rho, delta, refine, past.waiting, before, now, work
        )
        iterations += 1
        verdict = assess(form, one, settings, now, before, past, iterations, limit, work)
        exact, limiting = rows_after(one, settings, alpha_s, before, now, work)
        exact &= variables_are_exact(settings, alpha_s, alpha_z, before, now, past, work)
        # From a point within the tolerance one more step is worth it only if it halves the residuals.
        back = active & past.near & no(verdict.worst <= 0.5 * past.worst)
        again = back & (past.worst > settings.tol) & (past.waiting < IMPATIENCE) & (iterations < limit)
        if some(back):
            status, waiting = select(again, RUNNING, SOLVED), select(again, IMPATIENCE, past.waiting)
            verdict = chosen(back, revised(past, status, waiting), verdict)
            for a, b in (
                (now.x, before.x), (now.v, before.v), (now.s, before.s), (now.r_x, before.r_x), (now.r_v, before.r_v),
                (now.Qx, before.Qx), (now.Kx, before.Kx),
            ):  # fmt: skip
                exchange(back, a, b)
        sound |= back
        ended = active & sound & ((verdict.status == SOLVED) | (verdict.status == MAX_ITERATIONS))
        going_on = active & sound & (verdict.status == RUNNING)
        for lane in range(size):
            if of_lane(ended, lane):
                keep(
                    i + lane, lane, form, shared, one, reduced, now, verdict, iterations - of_lane(back, lane), store,
                    metric, outcome, forms, factored,
                )  # fmt: skip
            elif of_lane(active, lane) and not of_lane(going_on, lane):
                wanted[i + lane] = True
        active = going_on
        rate = positive((mu - new_mu) / (mu + settings.tiny)) if inequalities else each(mu, 0.9)
        rate = select(limiting, larger(rate, 0.9), rate)
        rho = select(again, rho, later_rho(form, settings, rho, rate))
        delta = select(again, delta, later_delta(settings, delta, rate, limiting))
        mu = select(again, mu, new_mu)
        refine = select(again, refine, no(exact))


@jit
def prepare(check, form, one, reduced, work):
    """Fill what the metric is made of and what does not change of the reduced form; whether that is safe, Q convex."""
    balance(one, work)
    if form == DENSE_DUAL:
        return every(prepare_dense(one, reduced, False)), True
    if form == DIAGONAL_DUAL:
        transpose(one.K, work.turned)
        return every(prepare_diagonal(one, reduced, False, work)), True
    return True, not check or every(convex(one.Q, work.square))


@entry
def solve_groups(
    batch, check, all_shared, shared, settings, form, store, metric, outcome, forms, factored, wanted, turn, edges,
    memory,
):  # fmt: skip
    """Solve problems in groups as long as there are any; False if `check` refused one, which ends it.

    The parameters are those of `one_by_one.solve_batch`, and `shared` is whether all problems have the same matrices
    and bounds. `wanted` is set to which problems are yet to be solved.
    """
    arrays, parts = memory.room, memory.reduced
    room = Room(
        stacked(arrays.x), stacked(arrays.v), stacked(arrays.x64), stacked(arrays.v64), arrays.flags,
        arrays.order, stacked(arrays.sizes), stacked(arrays.stacked), stacked(arrays.stacked64), stacked(arrays.scaled),
        stacked(arrays.turned), stacked(arrays.square),
    )  # fmt: skip
    reduced = Reduced(
        stacked(parts.hessian), stacked(parts.V), stacked(parts.S), stacked(parts.diagonal), stacked(parts.U),
        stacked(parts.weights),
    )  # fmt: skip
    work = make_work(room)
    first, second = make_iterates(room)
    Q, q, K, k = stacked(memory.Q), stacked(memory.q), work.stacked, work.k
    lower, upper = stacked(memory.bounds[0]), stacked(memory.bounds[1])
    one = One(
        Q, q, K, k, work.kind, batch.b.shape[1], lower.shape[0], upper.shape[0], stacked(memory.D), stacked(memory.E),
        work.sizes, Q, q, K, k,
    )  # fmt: skip
    ready = safe = False
    stop = np.int64(0)
    while True:
        start, stop = next_piece(stop, turn, edges)
        if start == stop:
            return True
        for i in range(start, stop, LANES):
            size = min(LANES, stop - i)
            if check:
                for j in range(i, i + size):
                    if not plausible(batch, j, all_shared and j == 0):
                        turn[0] = edges.shape[0]
                        return False
            alike = load(batch, i, size, one, memory.k, memory.kind)
            if not (ready and shared):
                load_matrices(batch, i, size, one, lower, upper)
                safe, definite = prepare(check, form, one, reduced, work)
                if not definite:
                    turn[0] = edges.shape[0]
                    return False
                ready = True
            slope = equilibrate(one, settings, lower, upper, work)
            # Problems without curvature have a scale of the cost, which `one_by_one` finds.
            curved = every((one.sizes[CURVATURE] > 0.0) | no(slope > 0.0))
            if alike and safe and curved:
                solve_group(
                    i, size, form, shared, one, reduced, settings, first, second, store, metric, outcome, forms,
                    factored, wanted, work,
                )  # fmt: skip
            else:
                wanted[i : i + size] = True
