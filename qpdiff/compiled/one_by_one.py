"""Problems one after the other, each from its start to its end."""

from __future__ import annotations

import numpy as np

from ..method import IMPATIENCE
from .compiler import entry, jit
from .method import (
    DENSE_DUAL,
    DIAGONAL_DUAL,
    INEQUALITY,
    PRIMAL,
    RUNNING,
    SOLVED,
    One,
    assess,
    balance,
    balance_cost,
    begin_anywhere,
    copy,
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
    start_near,
    step,
    variables_are_exact,
)
from .operands import at, convex, fill_rows, in_double, in_primal_form, own_rows, plausible, reduced_at, stack
from .rows import Glimpse, begin_in_rows, follow, judge, observe, step_in_rows
from .threads import following
from .tiles import mirror, transpose


@jit
def iterate(form, one, reduced, settings, warm, near_x, near_v, usable, now, before, work):
    """Carry one problem to its end: the iterate there, how it stands, its iterations, whether its factor is of use."""
    iterations, limit = np.int64(0), settings.max_iterations
    inequalities = False
    for i in range(one.kind.shape[0]):
        inequalities |= one.kind[i] == INEQUALITY
    # float32 wants residuals in float64, which the rows alone do not give.
    in_rows = form == DENSE_DUAL and one.q.itemsize == 8
    mu, verdict, factored, glimpse, known = start(form, in_rows, one, reduced, settings, now, before, work)
    if warm and usable:
        copy(near_x, before.x)
        copy(near_v, before.v)
        near_mu = start_near(one, settings, mu, before, work)
        near_verdict = assess(form, one, settings, before, before, verdict, iterations, limit, work)
        if near_verdict.status in (RUNNING, SOLVED):
            # Also from a solution one step is taken: the derivative needs its factor.
            now, before, mu, verdict = before, now, near_mu, revised(near_verdict, RUNNING, near_verdict.waiting)
            known = True
    while True:
        rho, delta, refine = first_rho(form, settings), settings.delta, np.bool_(True)
        while verdict.status == RUNNING:
            now, before, past = before, now, verdict
            if in_rows:
                if known:
                    glimpse = observe(one, reduced, before, glimpse.column, work)
                sound, factored, alpha_s, alpha_z, new_mu = step_in_rows(
                    one, reduced, settings, mu, rho, delta, refine, past.waiting, before, now, work
                )
            else:
                sound, factored, alpha_s, alpha_z, new_mu = step(
                    form, one, reduced, settings, mu, rho, delta, refine, past.waiting, before, now, work
                )
            if not sound:
                # A step that cannot be computed is not taken; stronger proximal terms come instead.
                copy(before.x, now.x)
                copy(before.v, now.v)
                copy(before.s, now.s)
            iterations += 1
            if in_rows:
                if sound:
                    glimpse = follow(one, glimpse, alpha_s, alpha_z, before, now, work)
                verdict, known = judge(
                    one, reduced, settings, glimpse, not sound, now, before, past, iterations, limit, work
                )
            else:
                verdict = assess(form, one, settings, now, before, past, iterations, limit, work)
            if past.near and not verdict.worst <= 0.5 * past.worst:
                # From a point within the tolerance one more step is worth it only if it halves the residuals.
                now, before = before, now
                if past.worst > settings.tol and past.waiting < IMPATIENCE and iterations < limit:
                    verdict = revised(past, RUNNING, IMPATIENCE)
                    continue
                verdict = revised(past, SOLVED, past.waiting)
                iterations -= 1
                break
            if verdict.status != RUNNING:
                break
            if sound:
                exact, limiting = rows_after(one, settings, alpha_s, before, now, work)
                if not in_rows:
                    exact &= variables_are_exact(settings, alpha_s, alpha_z, before, now, past, work)
                refine = not exact
                rate = positive((mu - new_mu) / (mu + settings.tiny)) if inequalities else 0.9
                rate = max(rate, 0.9) if limiting else rate
                rho = later_rho(form, settings, rho, rate)
                delta = later_delta(settings, delta, rate, limiting)
                mu = new_mu
            else:
                refine = True
                rho, delta = 100.0 * rho, 100.0 * delta
        if not warm or verdict.status == SOLVED or iterations == 0:
            return now, verdict, iterations, factored
        # Begin again from the ordinary start, once, where a start near another solution has led nowhere.
        warm, limit = False, iterations + settings.max_iterations
        mu, verdict, factored, glimpse, known = start(form, in_rows, one, reduced, settings, now, before, work)


@jit
def start(form, in_rows, one, reduced, settings, now, before, work):
    """The ordinary start in `now`, in the rows alone or not; also what is known of x, and whether that is all."""
    if in_rows:
        return begin_in_rows(one, reduced, settings, now, before, work)
    mu, verdict, factored = begin_anywhere(form, one, reduced, settings, now, before, work)
    return mu, verdict, factored, Glimpse(0.0, 0.0, 0.0, 0.0, 0.0, 0.0), True


@entry
def solve_batch(
    batch, exact, check, all_shared, settings, preferred, prepared, warm, near, store, metric, outcome, forms, factored,
    wanted, turn, edges, room,
):  # fmt: skip
    """Solve problems one after the other as long as there are any; False if `check` refused one, which ends it.

    Parameters
    ----------
    batch, exact : Batch
        The operands, and the same in float64 (None where they are).
    check, all_shared : bool
        Whether to look for operands that are against the rules, and for that also at those that the problems share.
    settings : Settings
    preferred : int
        The reduced form to take where it is safe.
    prepared : bool
        Whether `store` and `metric` have what does not change, for matrices that are shared.
    warm : bool
    near : tuple of x, v, usable
        Where to start if `warm`.
    store : Reduced
        What each problem keeps of its reduced form, or room for one of them where the first axis is 1.
    metric : tuple of D, E
    outcome : Outcome
    forms : int array
        The form that each problem has been solved with.
    factored : boolean array
        Whether its factor in `store` is of use.
    wanted : boolean array
        Which problems to solve.
    turn, edges : int array
        As `following` takes them.
    room : Room
    """
    count = outcome.x.shape[0]
    work = make_work(room)
    first, second = make_iterates(room)
    k, k64, kind = work.k, work.k64, work.kind
    single = batch.q.itemsize == 4
    own, turned, balanced = own_rows(batch, work), False, False
    i = end = np.int64(0)
    while True:
        i, end = following(i, end, turn, edges)
        if i >= count:
            return True
        if not wanted[i]:
            continue
        whole = all_shared and i == 0
        if check and not plausible(batch, i, whole):
            turn[0] = edges.shape[0]
            return False
        lb, ub = at(batch.lb, i), at(batch.ub, i)
        fill_rows(at(batch.b, i), at(batch.h, i), lb, ub, k, kind)
        copy(k, k64)
        K = stack(at(batch.A, i), at(batch.G, i), work.stacked, own)
        Q64, q64, K64 = in_double(batch, exact, i, K, work.stacked64)
        one = One(
            at(batch.Q, i), at(batch.q, i), K, k, kind,
            batch.b.shape[1], lb.shape[0], ub.shape[0], metric[0][i], metric[1][i], work.sizes,
            Q64, q64, K64, k64,
        )  # fmt: skip
        reduced = reduced_at(store, i)
        form = preferred
        if not (prepared and balanced):
            balance(one, work)
            balanced = True
        slope = equilibrate(one, settings, lb, ub, work)
        balance_cost(one, slope, work)
        if prepared:
            form = forms[i]
        else:
            if form == DENSE_DUAL:
                if prepare_dense(one, reduced, single):
                    mirror(reduced.S, K.shape[0])
                else:
                    form = PRIMAL
            if form == DIAGONAL_DUAL and not prepare_diagonal(one, reduced, single, work):
                form = PRIMAL
            # The other forms exist only for a Q that is positive definite.
            if check and form == PRIMAL and (whole or batch.Q.shape[0] > 1) and not convex(one.Q, work.square):
                turn[0] = edges.shape[0]
                return False
        if form != preferred:
            reduced = in_primal_form(reduced, work)
        if form == DIAGONAL_DUAL and (own or not turned):
            transpose(K, work.turned)
            turned = True
        now, verdict, iterations, useful = iterate(
            form, one, reduced, settings, warm, at(near[0], i), at(near[1], i), at(near[2], i), first, second, work
        )
        copy(now.x, outcome.x[i])
        copy(now.v, outcome.v[i])
        copy(now.s, outcome.s[i])
        outcome.status[i, 0] = verdict.status
        outcome.iterations[i, 0] = iterations
        outcome.objective[i, 0] = verdict.objective
        outcome.primal[i, 0], outcome.dual[i, 0] = verdict.found_primal, verdict.found_dual
        outcome.gap[i, 0] = verdict.found_gap
        forms[i] = form
        factored[i] = useful and form == preferred
