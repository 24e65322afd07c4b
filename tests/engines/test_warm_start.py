"""Starting from a neighbour's solution saves iterations and never costs a solution."""

from dataclasses import replace

import numpy as np
import pytest
from problems import INFEASIBLE, infeasible, kkt_residuals, random_problem, unbounded

import qpdiff
from qpdiff import Status

pytestmark = pytest.mark.usefixtures("each_engine")

OUTPUTS = ("x", "y", "z", "z_lb", "z_ub")


def sequence(rng, parts, cost, change, count=100):
    """A problem whose vectors drift and tremble by a share `change` of their size."""
    d = random_problem(rng, parts, cost=cost, batch=(), n=20, m=25, p=4)
    vectors = [name for name in ("q", "h", "b", "lb", "ub") if name in d]
    size = {name: change * np.mean(np.abs(d[name])) for name in vectors}
    drift = {name: size[name] * rng.normal(size=d[name].shape) for name in vectors}
    for i in range(count):
        moved = {
            name: d[name] + np.sin(i / 10) * drift[name] + 0.1 * size[name] * rng.normal(size=d[name].shape)
            for name in vectors
        }
        yield d | moved


@pytest.mark.parametrize("parts", ["G", "lb ub", "A G", "A G lb ub"])
@pytest.mark.parametrize("cost", ["pd", "psd", "lp"])
def test_a_hundred_slowly_changing_problems(parts, cost):
    cold = warm = 0
    previous = None
    for d in sequence(np.random.default_rng(len(parts)), parts, cost, 1e-2):
        alone = qpdiff.solve_qp(**d)
        previous = qpdiff.solve_qp(**d, warm_start=previous)
        assert previous.status == alone.status == Status.SOLVED
        residuals = kkt_residuals(d, *(getattr(previous, name) for name in OUTPUTS))
        assert max(residuals) <= 1e-6
        cold, warm = cold + int(alone.iterations), warm + int(previous.iterations)
    assert warm <= 0.75 * cold


@pytest.mark.parametrize("parts", ["", "A", "G", "lb", "ub", "A G lb ub"])
def test_a_start_far_away_costs_no_solution(xp, parts):
    rng = np.random.default_rng(1)
    near, far = (random_problem(rng, parts, batch=(20,)) for _ in range(2))
    start = qpdiff.solve_qp(**{name: xp.asarray(value) for name, value in far.items()})
    sol = qpdiff.solve_qp(**{name: xp.asarray(value) for name, value in near.items()}, warm_start=start)
    assert np.all(xp.to_numpy(sol.status) == Status.SOLVED)
    alone = qpdiff.solve_qp(**near)
    np.testing.assert_allclose(xp.to_numpy(sol.x), alone.x, atol=1e-5)


def test_a_start_that_leads_nowhere_is_followed_by_the_ordinary_one():
    rng = np.random.default_rng(2)
    d = random_problem(rng, "A G lb ub", batch=(20,))
    start = qpdiff.solve_qp(**d)
    start = replace(start, **{name: rng.normal(size=getattr(start, name).shape) * 1e8 for name in OUTPUTS})
    sol = qpdiff.solve_qp(**d, warm_start=start)
    assert np.all(sol.status == Status.SOLVED)
    limited = qpdiff.solve_qp(**d, warm_start=start, max_iterations=25)
    assert np.all(limited.status == Status.SOLVED)
    assert limited.iterations.max() <= 50


def test_a_limit_beyond_the_integers_of_the_engines():
    rng = np.random.default_rng(4)
    d = infeasible(rng, next(iter(INFEASIBLE)), "pd", (6, 5, 2))
    start = qpdiff.solve_qp(**random_problem(rng, "A G", batch=d["q"].shape[:-1], n=6, m=5, p=2))
    for limit in (2**31 - 1, 10**20):
        sol = qpdiff.solve_qp(**d, warm_start=start, max_iterations=limit)
        assert np.all(sol.status == Status.PRIMAL_INFEASIBLE)


def test_infeasible_and_unbounded_neighbours_are_no_start():
    rng = np.random.default_rng(3)
    without_point = infeasible(rng, next(iter(INFEASIBLE)), "pd", (6, 5, 2))
    start = qpdiff.solve_qp(**without_point)
    assert np.all(start.status == Status.PRIMAL_INFEASIBLE)
    good = random_problem(rng, "A G", batch=(25,), n=6, m=5, p=2)
    warm, cold = qpdiff.solve_qp(**good, warm_start=start), qpdiff.solve_qp(**good)
    np.testing.assert_allclose(warm.x, cold.x, rtol=1e-9, atol=1e-9)  # near a start, no group is made: rounding
    again = qpdiff.solve_qp(**without_point, warm_start=cold)
    assert np.all(again.status == Status.PRIMAL_INFEASIBLE)
    d = unbounded(rng, "A G", "lp", (6, 5, 2))
    assert not np.any(qpdiff.solve_qp(**d, warm_start=cold).status == Status.SOLVED)


def test_one_solution_starts_a_whole_batch():
    d = random_problem(np.random.default_rng(4), "A G lb ub", batch=(), shared=("Q", "G", "A"))
    start = qpdiff.solve_qp(**d)
    batch = d | {"q": d["q"] + 1e-3 * np.random.default_rng(5).normal(size=(3, 4, 6))}
    sol = qpdiff.solve_qp(**batch, warm_start=start)
    np.testing.assert_allclose(sol.x, qpdiff.solve_qp(**batch).x, atol=1e-6)


def test_a_solution_in_float32_is_a_start():
    d = {k: v.astype(np.float32) for k, v in random_problem(np.random.default_rng(4), "A G lb ub", fixed=1).items()}
    start = qpdiff.solve_qp(**d)
    assert start.x.dtype == np.float32
    sol = qpdiff.solve_qp(**d, warm_start=start)
    assert np.all(sol.status == Status.SOLVED)
    assert sol.iterations.sum() < 0.7 * start.iterations.sum()
    np.testing.assert_allclose(sol.x, start.x, rtol=1e-6, atol=1e-6)


def test_fixed_variables():
    d = random_problem(np.random.default_rng(6), "G lb ub", batch=(5,), fixed=2)
    start = qpdiff.solve_qp(**d)
    sol = qpdiff.solve_qp(**d, warm_start=start)
    assert np.all(sol.status == Status.SOLVED)
    assert sol.iterations.sum() < start.iterations.sum()


def test_bad_warm_starts():
    d = random_problem(np.random.default_rng(7), "A G", batch=(4,))
    sol = qpdiff.solve_qp(**d)
    with pytest.raises(TypeError, match=r"warm_start is a ndarray; expected a qpdiff\.Solution"):
        qpdiff.solve_qp(**d, warm_start=sol.x)
    with pytest.raises(ValueError, match=r"warm_start\.x has shape \(4, 6\); expected one that broadcasts to \(3, 6\)"):
        qpdiff.solve_qp(**{name: value[:3] for name, value in d.items()}, warm_start=sol)
    with pytest.raises(ValueError, match=r"warm_start\.z has shape \(4, 5\)"):
        qpdiff.solve_qp(d["Q"], d["q"], A=d["A"], b=d["b"], warm_start=sol)
