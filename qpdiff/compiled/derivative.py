"""The KKT system at the solutions of a batch, solved with the factors of their last iterations."""

from __future__ import annotations

import numpy as np

from .ahead import fetch_rows, fetch_vectors
from .blas import add_product_tn
from .compiler import entry, jit, literal
from .lanes import larger
from .method import (
    ABSENT,
    DENSE_DUAL,
    DIAGONAL_DUAL,
    EQUALITY,
    INEQUALITY,
    PRIMAL,
    One,
    adjoint,
    constraints,
    copy,
    eliminate,
    factor,
    invert_diagonal,
    make_work,
    residual,
    solve,
    solve_variables,
    whiten,
)
from .operands import at, fill_rows, in_primal_form, own_rows, reduced_at, stack
from .stacks import cholesky, solve_cholesky
from .threads import following, next_sum

STRIP = 16
"""Rows of a gradient that a thread sums up at a time."""
FETCHED = 32
"""Variables from which on what is kept of a problem is more than the processor fetches by itself in time."""


@jit
def size(heavy, x_scale, v_scale, a_x, a_v):
    """The largest entry of a scaled vector, rows that are not heavy left out."""
    top = 0.0
    for i in range(a_x.shape[0]):
        top = larger(abs(a_x[i] * x_scale[i]), top)
    for i in range(a_v.shape[0]):
        if heavy[i]:
            top = larger(abs(a_v[i] * v_scale[i]), top)
    return top


@jit
def ratio(a, b):
    return a / (b if b > 0.0 else 1.0)


@jit
def correction(form, one, reduced, heavy, weights, e_x, e_v, c_x, c_v, work):
    """Solve with the light rows eliminated by their own weights; the size of what was asked."""
    rows, linear = e_v.shape[0], one.K.shape[0]
    b_x, b_v = work.b_x, work.shifted
    first = linear
    for i in range(rows):
        if heavy[i]:
            b_v[i] = 0.0
        else:
            b_v[i] = weights[i] * e_v[i]
            first = min(first, i)
    # Equalities come first and are heavy: often there is no light row but bounds.
    K = one.K[first:]
    adjoint(K, one.lower, one.upper, b_v[first:], b_x)
    for i in range(e_x.shape[0]):
        b_x[i] += e_x[i]
    for i in range(rows):
        b_v[i] = e_v[i] if heavy[i] else 0.0
    asked = size(heavy, one.D, one.E, b_x, b_v)
    eliminate(form, reduced, b_x, work)
    solve(form, one, reduced, b_x, b_v, c_x, c_v, work)
    light = work.complementarity
    constraints(K, one.lower, one.upper, c_x, light[first:])
    for i in range(first, rows):
        c_v[i] = c_v[i] if heavy[i] else weights[i] * (light[i] - e_v[i])
    return asked


@jit
def solve_nearby(form, one, reduced, theta, heavy, r_x, r_v, u_x, u_v, refinements, work):
    """Solve a KKT system with the factor of another one, `kkt.solve_nearby`; the residual and the next correction."""
    n, rows = u_x.shape[0], u_v.shape[0]
    weights, zero_x, zero_v = work.ds, work.rho, work.delta
    D_inverse, E_inverse = work.x, work.v
    zero_x[:] = 0.0
    zero_v[:] = 0.0
    for i in range(n):
        D_inverse[i] = 1.0 / one.D[i]
    for i in range(rows):
        weights[i] = 1.0 / theta[i]
        E_inverse[i] = 1.0 / one.E[i]
    accuracy = np.finfo(u_x.dtype).eps ** 0.625
    asked = correction(form, one, reduced, heavy, weights, r_x, r_v, u_x, u_v, work)
    residual(form, one, theta, zero_x, zero_v, r_x, r_v, u_x, u_v, work.e_x, work.e_v, work)
    left, moved, last = ratio(size(heavy, one.D, one.E, work.e_x, work.e_v), asked), 1.0, 1.0
    c_x, c_v, d_x, d_v = work.cx, work.cv, work.dx, work.dv
    for _ in range(refinements):
        if left <= accuracy and moved <= 10.0 * accuracy:
            break
        correction(form, one, reduced, heavy, weights, work.e_x, work.e_v, c_x, c_v, work)
        now = ratio(size(heavy, D_inverse, E_inverse, c_x, c_v), size(heavy, D_inverse, E_inverse, u_x, u_v))
        # What is left is the difference of the two systems times the solution, and so shrinks as the corrections do.
        expected, moved, last = left * ratio(now, last), ratio(now * now, last), now
        for i in range(n):
            c_x[i] += u_x[i]
        for i in range(rows):
            c_v[i] += u_v[i]
        if left <= 1e-5 and expected <= 0.1 * accuracy and moved <= accuracy:
            # Sure enough without the products that it takes to know.
            copy(c_x, u_x)
            copy(c_v, u_v)
            return expected, moved
        residual(form, one, theta, zero_x, zero_v, r_x, r_v, c_x, c_v, d_x, d_v, work)
        after = ratio(size(heavy, one.D, one.E, d_x, d_v), asked)
        if after < left:
            # A factor too far off makes it worse from round to round; the best is kept.
            copy(c_x, u_x)
            copy(c_v, u_v)
            copy(d_x, work.e_x)
            copy(d_v, work.e_v)
            left = after
    return left, moved


@jit
def pivots_count(U, squares):
    """Whether the pivots are more than rounding; where x is not unique, weights of the last iteration may drown ρ."""
    limit = np.finfo(U.dtype).eps
    squares[:] = 0.0
    for i in range(squares.shape[0]):
        pivot = 1.0 / (U[i, i] * U[i, i])
        if not pivot > limit * (squares[i] + pivot):
            return False
        for j in range(i + 1, squares.shape[0]):
            squares[j] += U[i, j] * U[i, j]
    return True


@jit
def solve_afresh(one, reduced, theta, heavy, r_x, r_v, u_x, u_v, work):
    """`differentiation._solve_afresh`: with a factor made for the purpose, where the last one does not do."""
    n, rows = u_x.shape[0], u_v.shape[0]
    single = u_x.itemsize == 4
    smallest, largest = (1e-4, 1e-2) if single else (1e-6, 1e-3)
    equal, start = (1e-5, 1e-5) if single else (1e-11, 1e-9)
    top = 0.0
    for i in range(rows):
        scaled = theta[i] * one.E[i] ** 2
        if one.kind[i] == INEQUALITY and scaled < largest:
            top = larger(scaled, top)
    lift = largest / (top if top > 0.0 else 1.0)
    form, diagonal, rho = np.int64(PRIMAL), work.theta, start
    for i in range(rows):
        scaled = theta[i] * one.E[i] ** 2
        if one.kind[i] == EQUALITY:
            scaled = equal
        elif one.kind[i] == INEQUALITY and scaled < largest:
            scaled = min(max(scaled * lift, smallest), largest)
        diagonal[i] = scaled / one.E[i] ** 2
        work.delta[i] = 0.0
    for _ in range(4):
        for i in range(n):
            work.rho[i] = rho / one.D[i] ** 2
        if factor(form, one, reduced, diagonal, work.rho, work.delta, work) and pivots_count(reduced.U, work.columns):
            break
        rho *= 100.0
    solve_nearby(form, one, reduced, theta, heavy, r_x, r_v, u_x, u_v, np.int64(12), work)


@jit
def solve_in_rows(store, ahead, reduced, kind, E, theta, r_x, r_v, u_x, u_v, work):
    """Solve with a dense dual form, whose matrix of the rows is made for the purpose; whether that is accurate.

    Meanwhile what is kept of problem `ahead` is fetched, the one that comes next.
    """
    right = work.shifted
    whiten(reduced, r_x, work)
    for i in range(right.shape[0]):
        right[i] = 0.0 if kind[i] == ABSENT else work.Vt[i] - r_v[i]
    light = 1e4 if u_x.itemsize == 4 else 1e8
    accurate = solve_heavy_rows(store, ahead, reduced, kind, E, theta, light, right, u_v, work)
    if not accurate:
        accurate = solve_heavy_rows(store, ahead, reduced, kind, E, theta, np.inf, right, u_v, work)
    solve_variables(reduced, 1.0, u_v, u_x, work)
    return accurate


@jit
def solve_heavy_rows(store, ahead, reduced, kind, E, theta, light, right, u_v, work):
    """Solve (S + θ) u = right; whether that is accurate.

    Rows whose θ is so many times their entry of S, such as those of inactive constraints, are light: they hardly move
    the others and each other not at all, so that theirs of S are not read. The matrix of the heavy rows is factored,
    and refinement brings in the light ones.
    """
    U, S, heavy, left, c, of_light = reduced.U, reduced.S, work.order, work.cv, work.dv, work.ds
    rows, count = u_v.shape[0], 0
    least, enough = (1e-5, 1e-3) if u_v.itemsize == 4 else (1e-10, 1e-5)
    for i in range(rows):
        if kind[i] == ABSENT or theta[i] > light * S[i, i]:
            u_v[i] = 0.0 if kind[i] == ABSENT else right[i] / theta[i]
            of_light[i] = u_v[i]
        else:
            of_light[i] = 0.0
            heavy[count] = i
            count += 1
    c = c[:count]
    for a in range(count):
        fetch_rows(store.hessian, ahead, a, count, True)
        i, row, out = heavy[a], S[heavy[a]], U[a]
        for b in range(a, count):
            out[b] = row[heavy[b]]
        out[a] += larger(theta[i], least / (E[i] * E[i]))
        c[a] = right[i]
    if count > 0 and not cholesky(U, count):
        return False
    solve_cholesky(U, c)
    for a in range(count):
        u_v[heavy[a]] = c[a]
    for _ in range(3):
        for i in range(rows):
            left[i] = 0.0 if kind[i] == ABSENT else right[i] - theta[i] * u_v[i]
        for a in range(count):
            fetch_rows(store.S, ahead, a, count, True)
            row, entry, total = S[heavy[a]], u_v[heavy[a]], 0.0
            for j in range(rows):
                left[j] -= entry * row[j]
                total += row[j] * of_light[j]
            c[a] = total
        for a in range(count):
            c[a] = left[heavy[a]] - c[a]
        solve_cholesky(U, c)
        for i in range(rows):
            left[i] = left[i] / theta[i]
            of_light[i] += left[i]
        for a in range(count):
            left[heavy[a]] = c[a]
            of_light[heavy[a]] = 0.0
        correction = solution = 0.0
        for i in range(rows):
            per_E = 1.0 / E[i]
            correction, solution = larger(abs(left[i]) * per_E, correction), larger(abs(u_v[i]) * per_E, solution)
            u_v[i] += left[i]
        if correction <= enough * solution:
            return True
    return False


@jit
def solve_kkt(batch, own, store, metric, form, factored, v, s, i, ahead, r_x, r_v, u_x, u_v, work):
    """Solve the KKT system at the solution of problem i, before that of `ahead`; `own`: it has rows of its own."""
    k, kind, theta, heavy, rounds = work.k, work.kind, work.theta_exact, work.heavy, np.int64(3)
    accuracy = np.sqrt(np.finfo(u_x.dtype).eps)
    lb, ub = at(batch.lb, i), at(batch.ub, i)
    fill_rows(at(batch.b, i), at(batch.h, i), lb, ub, k, kind)
    D, E, reduced = at(metric[0], i), at(metric[1], i), reduced_at(store, i)
    for j in range(v.shape[0]):
        theta[j] = s[j] / v[j] if kind[j] == INEQUALITY else (0.0 if kind[j] == EQUALITY else np.inf)
        heavy[j] = kind[j] == EQUALITY or (kind[j] == INEQUALITY and theta[j] * E[j] ** 2 < 1.0)
    in_rows = form == DENSE_DUAL and factored
    if in_rows and solve_in_rows(store, ahead, reduced, kind, E, theta, r_x, r_v, u_x, u_v, work):
        return
    Q, q, K = at(batch.Q, i), at(batch.q, i), stack(at(batch.A, i), at(batch.G, i), work.stacked, own)
    one = One(Q, q, K, k, kind, batch.b.shape[1], lb.shape[0], ub.shape[0], D, E, work.sizes, Q, q, K, k)
    if form != DENSE_DUAL and factored and (form != PRIMAL or pivots_count(reduced.U, work.columns)):
        if form == DIAGONAL_DUAL:
            invert_diagonal(one, reduced)
        left, moved = solve_nearby(form, one, reduced, theta, heavy, r_x, r_v, u_x, u_v, rounds, work)
        if left <= 0.1 * accuracy and moved <= accuracy:
            return
    solve_afresh(one, in_primal_form(reduced, work), theta, heavy, r_x, r_v, u_x, u_v, work)


@entry
def solve_kkt_batch(
    batch, store, metric, forms, factored, x, v, s, solved, r_x, r_v, fill, u_x, u_v, of_Q, of_A, of_G, half_Q, sum_A,
    sum_G, turn, edges, room,
):  # fmt: skip
    """Solve the KKT system at the solutions of a batch, one problem after the other as long as there are any.

    `batch`, `store`, `metric`, `forms`, `factored`, `turn` and `edges` are those of `solve_batch`. Problems that are
    not solved get the number `fill`. `of_Q`, `of_A` and `of_G` are for the gradients of the matrices, or empty.
    """
    work = make_work(room)
    p, own = of_A.shape[1], own_rows(batch, work)
    last, n = u_x.shape[0] - 1, x.shape[1]
    k = end = np.int64(0)
    while True:
        k, end = following(k, end, turn, edges)
        if k > last:
            break
        # Backwards: what the solve has left in the cache is what it came to last.
        i = last - k
        ahead = i - 1 if n >= FETCHED else -1
        if solved[i]:
            copy(r_x[i], work.right_x)
            copy(r_v[i], work.right_v)
            solve_kkt(
                batch, own, store, metric, forms[i], factored[i], v[i], s[i], i, ahead, work.right_x, work.right_v,
                u_x[i], u_v[i], work,
            )  # fmt: skip
        else:
            u_x[i] = fill
            u_v[i] = fill
        if forms[i] == DENSE_DUAL:
            fetch_vectors((x, v, s, r_x, r_v, batch.h), ahead)
        if of_Q.shape[0]:
            parts = n if ahead >= 0 else 1
            for part in range(parts):
                fetch_rows(store.V, ahead, part, parts, False)
                symmetric_product(u_x[i], x[i], of_Q[i], n * part // parts, n * (part + 1) // parts)
        if of_A.shape[0]:
            product_of_rows(v[i, :p], u_v[i, :p], x[i], u_x[i], of_A[i])
        if of_G.shape[0]:
            product_of_rows(v[i, p:], u_v[i, p:], x[i], u_x[i], of_G[i])
    if half_Q.shape[0] + sum_A.shape[0] + sum_G.shape[0] > 0:
        sum_gradients(p, x, v, u_x, u_v, half_Q, sum_A, sum_G, turn, edges)


@jit
def sum_gradients(p, x, v, u_x, u_v, half_Q, sum_A, sum_G, turn, edges):
    """Add up the gradients of shared matrices, strip by strip as long as there are any."""
    of_Q, of_A, of_G = strips(half_Q), strips(sum_A), strips(sum_G)
    number = np.int64(-1)
    while True:
        number = next_sum(number, turn, edges)
        if number < of_Q:
            add_products(-0.5, u_x, x, half_Q, number)
        elif number < of_Q + of_A:
            add_products(-1.0, v[:, :p], u_x, sum_A, number - of_Q)
            add_products(-1.0, u_v[:, :p], x, sum_A, number - of_Q)
        elif number < of_Q + of_A + of_G:
            add_products(-1.0, v[:, p:], u_x, sum_G, number - of_Q - of_A)
            add_products(-1.0, u_v[:, p:], x, sum_G, number - of_Q - of_A)
        else:
            return


@jit
def strips(a):
    """In how many strips of rows the threads take a matrix."""
    return (a.shape[0] + STRIP - 1) // STRIP


@jit
def add_products(factor, a, b, out, strip):
    """Add to a strip of `out` the products a bᵀ of all problems, in portions for which BLAS does not wake threads."""
    start, stop = strip * STRIP, min((strip + 1) * STRIP, out.shape[0])
    portion = max(1, 2**18 // (STRIP * out.shape[1]))
    for i in range(0, a.shape[0], portion):
        add_product_tn(factor, a[i : i + portion, start:stop], b[i : i + portion], out[start:stop])


@literal
def symmetric_product(u, x, out, start, stop):
    """Some rows of −½ (u xᵀ + x uᵀ), the gradient of Q."""
    for j in range(start, stop):
        u_j, x_j, row = -0.5 * u[j], -0.5 * x[j], out[j]
        for k in range(x.shape[0]):
            row[k] = u_j * x[k] + x_j * u[k]


@jit
def product_of_rows(v, u_v, x, u_x, out):
    """−(v u_xᵀ + u_v xᵀ), the gradient of A or G."""
    for j in range(out.shape[0]):
        v_j, u_j, row = v[j], u_v[j], out[j]
        for k in range(x.shape[0]):
            row[k] = -(v_j * u_x[k] + u_j * x[k])
