"""When a problem counts as SOLVED, and when one step more is accepted."""

import numpy as np
import pytest
from problems import apply, documented_test, optnet, random_problem, weakly_active

import qpdiff
from qpdiff import Status
from qpdiff.backend import NumPyBackend

pytestmark = pytest.mark.usefixtures("each_engine")

FAMILIES = {
    "inequalities": lambda rng: random_problem(rng, "G", batch=(200,)),
    "everything": lambda rng: random_problem(rng, "A G lb ub", batch=(200,), cost="psd"),
    "linear programs": lambda rng: random_problem(rng, "A G lb ub", batch=(200,), cost="lp"),
    "in the dual space": lambda rng: optnet(rng, (100,), 30, 20, 0),
    "weakly active": lambda rng: weakly_active(rng, (200,), 6).operands,
}


def with_large_vectors(operands, factor):
    """The problem whose solution is so many times as large."""
    return operands | {name: factor * operands[name] for name in ("q", "h", "b", "lb", "ub") if name in operands}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gap_that_is_rounding_is_not_below_the_tolerance(family):
    """Terms of 1e12 and more sum to 0 only up to 1e-4, though what is computed may be 0 by chance."""
    operands = with_large_vectors(FAMILIES[family](np.random.default_rng(1)), 1e7)
    sol = qpdiff.solve_qp(**operands, tol=1e-8, rtol=0.0)
    assert not np.any(sol.status == Status.SOLVED)
    assert np.all(qpdiff.solve_qp(**operands, tol=1e-8, rtol=1e-8).status == Status.SOLVED)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_residual_is_compared_with_its_own_terms(family):
    """Those of the gap are the product of those of the other two, 1e8 and more, and allow neither of them more."""
    operands = with_large_vectors(FAMILIES[family](np.random.default_rng(1)), 1e4)
    solved = 0
    for k in range(30):  # with few iterations, where the limit ends them at whatever point passes
        sol = qpdiff.solve_qp(**operands, tol=1e-8, rtol=1e-8, max_iterations=k)
        point = (getattr(sol, name) for name in ("x", "y", "z", "z_lb", "z_ub"))
        ratios = documented_test(operands, *point, 1e-8, 1e-8)[sol.status == Status.SOLVED]
        assert np.all(ratios <= 1.01)
        solved += len(ratios)
    assert solved >= 1000


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_from_within_the_tolerance_is_accepted_if_it_halves_the_residuals(family):
    """Else the point before it is the solution, as rounding is all that is left to gain."""
    operands = with_large_vectors(FAMILIES[family](np.random.default_rng(1)), 1e4)
    before = accepted = reverted = 0
    for k in range(30):
        sol = qpdiff.solve_qp(**operands, tol=1e-10, rtol=1e-4, max_iterations=k)
        worst = np.maximum(np.maximum(sol.primal_residual, sol.dual_residual), sol.duality_gap)
        solved = sol.status == Status.SOLVED
        if k:
            within, same, halved = before[1], worst == before[0], worst <= 0.5 * before[0]
            assert np.all((same | halved)[within])
            accepted += np.sum(within & halved)
            reverted += np.sum(within & same)
        before = worst, solved
    assert np.all(solved)
    assert min(accepted, reverted) >= 50


@pytest.mark.parametrize("parts", ["A lb ub", "A lb", "A G ub"])
def test_variables_with_neither_curvature_nor_bounds(parts):
    """A diagonal Q with zeros, for whose variables the reduced system of the constraints has no inverse."""
    operands = random_problem(np.random.default_rng(1), parts, cost="lp", batch=(100,), n=12, m=2, p=3, infinite=0.3)
    for curvature in (0.0, 1e-14):
        Q = np.diag(np.where(np.arange(12) % 2, 1.0, curvature))
        sol = qpdiff.solve_qp(**operands | {"Q": np.tile(Q, (100, 1, 1))}, tol=1e-8)
        assert np.all(sol.status == Status.SOLVED)
        assert np.max(sol.iterations) <= 12


def test_residuals_of_float32_are_in_float64_to_the_end(monkeypatch):
    """Also of problems that the array engine iterates on after it has dropped others."""
    monkeypatch.setattr(NumPyBackend, "launch_bound_bytes", 0)
    operands = random_problem(np.random.default_rng(1), "A G", batch=(200,), cost="psd")
    sol = qpdiff.solve_qp(**operands, dtype="float32")
    assert len(set(sol.iterations.tolist())) >= 4
    Q, q, G, h, A, b = (np.float64(np.float32(operands[name])) for name in ("Q", "q", "G", "h", "A", "b"))
    x, y, z = (np.float64(part) for part in (sol.x, sol.y, sol.z))
    primal = [np.maximum(apply(G, x) - h, 0.0), np.abs(apply(A, x) - b)]
    np.testing.assert_allclose(sol.primal_residual, np.max(np.concatenate(primal, axis=-1), axis=-1), atol=1e-13)
    dual = np.max(np.abs(apply(Q, x) + q + apply(G.mT, z) + apply(A.mT, y)), axis=-1)
    np.testing.assert_allclose(sol.dual_residual, dual, atol=1e-12)
