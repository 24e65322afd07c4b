"""Small problems in the lanes of registers: the arithmetic against NumPy's, and what becomes of a group's problems."""

import numpy as np
import pytest

pytest.importorskip("numba")
from numba import njit

import qpdiff
from qpdiff import compiled
from qpdiff.compiled import stacks
from qpdiff.compiled.compiler import OPTIONS, finite
from qpdiff.compiled.lanes import (
    LANES,
    every,
    first_lanes,
    larger,
    no,
    of_lane,
    put,
    root,
    select,
    smaller,
    some,
    stacked,
    take,
    zero,
)  # fmt: skip

from .problems import equality_beyond_bounds, infeasible, optnet, random_problem

ORDERS = np.arange(24), np.arange(24)[::-1]
SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 16, 17]


def rng(seed=0):
    return np.random.default_rng(seed)


# ---- arithmetic


@njit(**OPTIONS)
def arithmetic(a, b, out, truths):
    a, b, out = stacked(a), stacked(b), stacked(out)
    total = 0.0
    for i in range(a.shape[0]):
        total += a[i]
    x, y = a[0], b[0]
    out[0], out[1], out[2], out[3] = x + y, x - y, x * y, x / y
    out[4], out[5], out[6], out[7] = -x, abs(x), root(abs(x)), 2 * x - 1.0
    out[8], out[9] = larger(x, y), smaller(x, 0.5)
    out[10] = select(x < y, x, 7)
    out[11], out[12], out[13] = total, 3.0, zero(a)
    condition = True
    for i in range(a.shape[0]):
        condition &= finite(a[i])
    for lane in range(LANES):
        truths[0, lane], truths[1, lane] = of_lane(x < y, lane), of_lane(x <= y, lane)
        truths[2, lane], truths[3, lane] = of_lane(x > y, lane), of_lane(x >= y, lane)
        truths[4, lane], truths[5, lane] = of_lane(x == y, lane), of_lane(no(x < y), lane)
        truths[6, lane], truths[7, lane] = of_lane((x < y) | (x > 1.0), lane), of_lane((x < y) & (x > 0.0), lane)
        truths[8, lane], truths[9, lane] = of_lane(condition, lane), of_lane(first_lanes(3), lane)
        put(out, 14, lane, of_lane(x, lane) + lane)
        put(out, (15,), lane, take(b, 1, lane))
    return some(x < y), every(x < y), some(condition), every(first_lanes(LANES))


@pytest.mark.parametrize("special", [False, True])
def test_arithmetic(special):
    a, b = rng().normal(size=(2, 5, LANES))
    if special:
        a[0, :5], b[0, :5] = [np.nan, np.inf, -np.inf, 0.0, 1.0], [1.0, 2.0, np.nan, 0.0, 1.0]
    out, truths = np.empty((16, LANES)), np.zeros((10, LANES), np.bool_)
    answers = arithmetic(a, b, out, truths)
    x, y = a[0], b[0]
    with np.errstate(all="ignore"):
        expected = [
            x + y, x - y, x * y, x / y, -x, abs(x), np.sqrt(abs(x)), 2 * x - 1, np.maximum(x, y), np.minimum(x, 0.5),
            np.where(x < y, x, 7), a.sum(axis=0), np.full(LANES, 3.0), np.zeros(LANES), x + np.arange(LANES), b[1],
        ]  # fmt: skip
    np.testing.assert_allclose(out, expected, rtol=1e-14, atol=1e-14)
    is_finite = np.isfinite(a).all(axis=0)
    np.testing.assert_array_equal(
        truths,
        [
            x < y, x <= y, x > y, x >= y, x == y, ~(x < y), (x < y) | (x > 1), (x < y) & (x > 0), is_finite,
            np.arange(LANES) < 3,
        ],
    )  # fmt: skip
    assert answers == (np.any(x < y), np.all(x < y), np.any(is_finite), True)


@njit(**OPTIONS)
def parts(a, M):
    a, M = stacked(a), stacked(M)
    part = a[1:4]
    part[0] = 1.0
    part[2:] = 2.0
    a[-1:] = 3.0
    row = M[1]
    row[2] = part.shape[0]
    M[2, 1] = row.shape[0]
    return M.shape[0], M.shape[1]


def test_parts_of_stacks_are_views():
    a, M = np.zeros((6, LANES)), np.zeros((3, 4, LANES))
    assert parts(a, M) == (3, 4)
    np.testing.assert_array_equal(a[:, 0], [0, 1, 0, 2, 0, 3])
    assert (a == a[:, :1]).all()
    assert (M[1, 2] == 3).all()
    assert (M[2, 1] == 4).all()
    assert np.count_nonzero(M) == 2 * LANES


@njit(**OPTIONS)
def products(M, x, v, of_x, of_v, turned):
    M, x, v, of_x, of_v = stacked(M), stacked(x), stacked(v), stacked(of_x), stacked(of_v)
    stacks.product(M, x, of_x)
    stacks.add_product_transposed(M, v, of_v)
    stacks.transpose(M, stacked(turned))
    return of_lane(stacks.dot(x, x), 0)


@pytest.mark.parametrize("rows", [0, *SIZES])
@pytest.mark.parametrize("columns", SIZES)
def test_products(rows, columns):
    M, x, v = (rng().normal(size=shape) for shape in ((rows, columns, LANES), (columns, LANES), (rows, LANES)))
    of_x, of_v = np.full((rows, LANES), np.nan), rng(1).normal(size=(columns, LANES))
    expected, turned = of_v + np.einsum("ijl,il->jl", M, v), np.empty((columns, rows, LANES))
    square = products(M, x, v, of_x, of_v, turned)
    np.testing.assert_allclose(of_x, np.einsum("ijl,jl->il", M, x), atol=1e-13)
    np.testing.assert_allclose(of_v, expected, atol=1e-13)
    np.testing.assert_array_equal(turned, M.transpose(1, 0, 2))
    assert square == pytest.approx(x[:, 0] @ x[:, 0])


@njit(**OPTIONS)
def factored(M, U, r, K, V, gram):
    M, U, r, K, V = stacked(M), stacked(U), stacked(r), stacked(K), stacked(V)
    n = M.shape[0]
    stacks.copy_upper(M, U, n)
    sound = stacks.cholesky(U, n)
    stacks.solve_cholesky(U, r)
    stacks.transpose(K, V)
    stacks.solve_rows_above(U, n, V, K.shape[0])
    stacks.add_gram(V, n, stacked(gram), K.shape[0])
    return some(sound), every(sound)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("rows", SIZES)
def test_factor(n, rows):
    root_of_M, r, K = (rng().normal(size=(*shape, LANES)) for shape in ((n, n), (n,), (rows, n)))
    M = np.einsum("kil,kjl->ijl", root_of_M, root_of_M) + n * np.eye(n)[:, :, None]
    before = rng(1).normal(size=(rows, rows, LANES))
    x, V, gram = r.copy(), np.empty((n, rows, LANES)), before.copy()
    assert factored(M, np.full_like(M, np.nan), x, K, V, gram) == (True, True)
    for lane in range(LANES):
        np.testing.assert_allclose(M[..., lane] @ x[:, lane], r[:, lane], atol=1e-12)
        inverse = K[..., lane] @ np.linalg.solve(M[..., lane], K[..., lane].T)
        np.testing.assert_allclose(np.triu(gram[..., lane] - before[..., lane]), np.triu(inverse), atol=1e-12)
    M[n - 1, n - 1, 2] = -1.0
    assert factored(M, np.empty_like(M), x, K, V, gram) == (True, False)


# ---- the problems of a group


def in_both_ways(monkeypatch, operands, **options):
    """Solutions in groups and one by one."""
    solutions = []
    for small in (compiled.SMALL, 0):
        monkeypatch.setattr(compiled, "SMALL", small)
        solutions.append(qpdiff.solve_qp(**operands, engine="compiled", **options))
    monkeypatch.undo()
    return solutions


def assert_same(one, other):
    np.testing.assert_array_equal(one.status, other.status)
    np.testing.assert_allclose(one.x, other.x, atol=1e-6)
    np.testing.assert_allclose(one.objective, other.objective, rtol=1e-7, atol=1e-7)
    seed = np.ones_like(one.x)
    for a, b in zip(qpdiff.vjp(one, x=seed), qpdiff.vjp(other, x=seed), strict=True):
        if a is not None:
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [6, 7, 8, 9, 16, 21, 100])
@pytest.mark.parametrize("shape", [(10, 5, 3), (5, 12, 0), (12, 4, 0), (1, 1, 0)])
def test_ordinary_problems_never_leave_their_group(monkeypatch, batch, shape):
    operands = optnet(rng(), (batch,), *shape)
    grouped, single = in_both_ways(monkeypatch, operands)
    assert np.all(grouped.status == qpdiff.Status.SOLVED)
    assert_same(grouped, single)

    def refuse(*arguments):
        raise AssertionError("a problem was begun anew")

    monkeypatch.setattr(compiled.one_by_one, "solve_batch", refuse)
    np.testing.assert_array_equal(qpdiff.solve_qp(**operands).x, grouped.x)


@pytest.mark.parametrize("kinds", ["A G", "G lb ub", "A lb", "A G lb ub"])
@pytest.mark.parametrize("cost", ["pd", "diagonal", "psd"])
@pytest.mark.parametrize("shared", [(), ("Q", "A", "G"), ("q", "h"), ("Q", "q", "A", "G", "lb", "ub")])
def test_groups_of_every_kind(monkeypatch, kinds, cost, shared):
    names = set(kinds.split()) | {"Q", "q", "h", "b"}
    operands = random_problem(rng(), kinds, batch=(20,), cost=cost, shared=tuple(k for k in shared if k in names))
    grouped, single = in_both_ways(monkeypatch, operands, tol=1e-10)
    np.testing.assert_array_equal(grouped.status, single.status)
    np.testing.assert_allclose(grouped.objective, single.objective, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("shared", [False, True])
def test_rows_of_other_kinds(monkeypatch, shared):
    """Where h is infinite, a row does not exist for one problem and does for its neighbour."""
    operands = optnet(rng(), (30,), 10, 8, 2)
    operands["h"][::17, 3] = np.inf
    if shared:
        operands |= {name: operands[name][0] for name in ("Q", "A", "G")}
    assert_same(*in_both_ways(monkeypatch, operands))


def test_one_infeasible_problem_does_not_disturb_its_group(monkeypatch):
    operands = infeasible(rng(), equality_beyond_bounds, "pd", (6, 5, 2))
    for name, value in random_problem(rng(1), "A G lb ub", batch=(25,)).items():
        operands[name][::2] = value[::2]
    grouped, single = in_both_ways(monkeypatch, operands)
    np.testing.assert_array_equal(grouped.status, single.status)
    assert {*grouped.status} >= {qpdiff.Status.SOLVED, qpdiff.Status.PRIMAL_INFEASIBLE}
    solved = grouped.status == qpdiff.Status.SOLVED
    np.testing.assert_allclose(grouped.x[solved], single.x[solved], atol=1e-6)


def test_a_bad_operand_of_a_group_is_named():
    operands = optnet(rng(), (16,), 6, 4, 2)
    operands["Q"][11] *= -1.0
    with pytest.raises(ValueError, match=r"Q.*11"):
        qpdiff.solve_qp(**operands)


def test_progress_of_groups_counts_up_to_the_batch():
    seen = []
    qpdiff.solve_qp(**optnet(rng(), (50,), 6, 4, 2), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (50, 50)


def test_the_mates_in_a_group_do_not_matter():
    operands = optnet(rng(), (24,), 10, 8, 2)
    operands["h"][5] *= 1e6  # a mate on another scale
    sol, turned = (qpdiff.solve_qp(**{k: value[order] for k, value in operands.items()}) for order in ORDERS)
    for name in ("x", "y", "z", "iterations", "duality_gap"):
        np.testing.assert_array_equal(getattr(sol, name), getattr(turned, name)[ORDERS[1]])
