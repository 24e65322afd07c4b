"""Small problems in the lanes of registers: what becomes of those of a group."""

import numpy as np
import pytest
from problems import equality_beyond_bounds, infeasible, optnet, random_problem

import qpdiff

engine = pytest.importorskip("qpdiff.engines.compiled.engine", exc_type=ImportError)
ORDERS = np.arange(24), np.arange(24)[::-1]


def rng(seed=0):
    return np.random.default_rng(seed)


def in_both_ways(monkeypatch, operands, **options):
    """Solutions in groups and one by one."""
    solutions = []
    for small in (engine.SMALL, 0):
        monkeypatch.setattr(engine, "SMALL", small)
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
def test_ordinary_problems(monkeypatch, batch, shape):
    operands = optnet(rng(), (batch,), *shape)
    grouped, single = in_both_ways(monkeypatch, operands)
    assert np.all(grouped.status == qpdiff.Status.SOLVED)
    assert_same(grouped, single)


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
