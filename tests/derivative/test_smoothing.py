"""Smoothed derivatives against differences of the relaxed solution, found by a barrier method of the test's own."""

import numpy as np
import pytest
from problems import relaxed, strictly_feasible

import qpdiff

pytestmark = pytest.mark.usefixtures("each_engine")

KINDS = ["", "A", "G", "lb", "ub", "A G", "A lb", "lb ub", "A G lb ub"]


def difference(operands, tangents, kappa, step=1e-6):
    """Central difference of the relaxed solutions of a batch."""
    sides = []
    for sign in (1, -1):
        moved = {name: value + sign * step * tangents[name] for name, value in operands.items()}
        alone = ({name: value[i] for name, value in moved.items()} for i in range(len(operands["q"])))
        sides.append([np.stack(column) for column in zip(*(relaxed(d, kappa) for d in alone), strict=True)])
    return [(a - b) / (2 * step) for a, b in zip(*sides, strict=True)]


@pytest.mark.parametrize("parts", KINDS)
@pytest.mark.parametrize("cost", ["pd", "psd", "lp"])
@pytest.mark.parametrize("kappa", [1e-3, 0.1, 1.0])
def test_against_differences_of_the_relaxed_solution(parts, cost, kappa):
    if cost != "pd" and parts not in ("lb ub", "A G lb ub"):
        pytest.skip("unbounded")
    rng = np.random.default_rng(len(parts) + len(cost))
    operands = strictly_feasible(rng, parts, cost=cost)
    tangents = {name: rng.normal(size=value.shape) for name, value in operands.items()}
    tangents["Q"] = tangents["Q"] + tangents["Q"].mT
    expected = difference(operands, tangents, kappa)
    sol = qpdiff.solve_qp(**operands)
    pushed = qpdiff.jvp(sol, **tangents, smoothing=kappa)
    for actual, wanted in zip(pushed, expected, strict=True):
        np.testing.assert_allclose(actual, wanted, atol=2e-5 * max(1.0, np.max(np.abs(wanted), initial=0.0)))

    cotangents = {name: rng.normal(size=getattr(sol, name).shape) for name in ("x", "y", "z", "z_lb", "z_ub")}
    gradients = qpdiff.vjp(sol, **cotangents, smoothing=kappa)
    pulled = sum(np.sum(getattr(gradients, name) * tangent) for name, tangent in tangents.items())
    along = sum(np.sum(cotangents[name] * value) for name, value in zip(cotangents, expected, strict=True))
    np.testing.assert_allclose(pulled, along, rtol=1e-4, atol=1e-4)


def test_it_tends_to_the_derivative():
    rng = np.random.default_rng(0)
    operands = strictly_feasible(rng, "A G lb ub")
    sol = qpdiff.solve_qp(**operands, tol=1e-10)
    exact = qpdiff.vjp(sol, x=np.ones_like(sol.x))
    errors = [
        np.max(np.abs(qpdiff.vjp(sol, x=np.ones_like(sol.x), smoothing=kappa).q - exact.q))
        for kappa in (1e-2, 1e-4, 1e-6)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3


def test_a_linear_program_gets_an_informative_gradient(xp):
    operands = strictly_feasible(np.random.default_rng(1), "lb ub", cost="lp")
    sol = qpdiff.solve_qp(**{name: xp.asarray(value) for name, value in operands.items()})
    one = xp.asarray(np.ones(operands["q"].shape))
    assert np.max(np.abs(xp.to_numpy(qpdiff.vjp(sol, x=one).q))) <= 1e-6
    smoothed = xp.to_numpy(qpdiff.vjp(sol, x=one, smoothing=0.1).q)
    assert np.max(smoothed) < -1e-3  # a dearer variable is used less


def test_shared_matrices_and_batch_mates():
    rng = np.random.default_rng(2)
    operands = strictly_feasible(rng, "A G lb ub", batch=1)
    operands["q"] = rng.normal(size=(6, 5))
    tangent = rng.normal(size=(6, 5))
    together = qpdiff.jvp(qpdiff.solve_qp(**operands), q=tangent, smoothing=0.05).x
    for i in range(6):
        sol = qpdiff.solve_qp(**(operands | {"q": operands["q"][i : i + 1]}))
        alone = qpdiff.jvp(sol, q=tangent[i : i + 1], smoothing=0.05).x
        np.testing.assert_allclose(together[i], alone[0], rtol=1e-7, atol=1e-9)


def test_an_unsolved_mate_stays_unsolved():
    operands = strictly_feasible(np.random.default_rng(3), "lb ub")
    operands |= {"A": np.ones((3, 1, 5)), "b": np.zeros((3, 1))}
    operands["b"][1] = 100.0  # beyond the bounds
    sol = qpdiff.solve_qp(**operands)
    gradients = qpdiff.vjp(sol, x=np.ones((3, 5)), smoothing=0.1)
    assert np.isnan(gradients.q[1]).all()
    assert np.isfinite(gradients.q[[0, 2]]).all()


def test_float32():
    operands = strictly_feasible(np.random.default_rng(4), "A G lb ub")
    exact = qpdiff.vjp(qpdiff.solve_qp(**operands), x=np.ones((3, 5)), smoothing=0.1)
    single = {name: value.astype(np.float32) for name, value in operands.items()}
    for dtype, atol in ((None, 1e-5), ("float32", 1e-2)):
        actual = qpdiff.vjp(qpdiff.solve_qp(**single, dtype=dtype), x=np.ones((3, 5), dtype=np.float32), smoothing=0.1)
        assert actual.q.dtype == np.float32
        np.testing.assert_allclose(actual.q, exact.q, atol=atol)


@pytest.mark.parametrize("smoothing", [0.0, -1.0, np.nan, np.inf, "much", True])
def test_bad_smoothing(smoothing):
    sol = qpdiff.solve_qp(np.eye(2), np.ones(2))
    for call in (
        lambda: qpdiff.vjp(sol, x=np.ones(2), smoothing=smoothing),
        lambda: qpdiff.jvp(sol, smoothing=smoothing),
    ):
        with pytest.raises(ValueError, match="smoothing is"):
            call()


@pytest.mark.parametrize("parts", ["", "A G lb ub"])
def test_optimal_value_of_the_relaxed_solution(parts):
    rng = np.random.default_rng(8)
    operands, kappa = strictly_feasible(rng, parts), 0.1
    values = []
    g, cotangent = rng.normal(size=3), rng.normal(size=operands["q"].shape)
    sol = qpdiff.solve_qp(**operands)
    tangents = {name: rng.normal(size=value.shape) for name, value in operands.items()}
    tangents["Q"] = tangents["Q"] + tangents["Q"].mT
    sides = []
    for sign in (1, -1):
        total, moved = 0.0, {name: value + sign * 1e-6 * tangents[name] for name, value in operands.items()}
        for i in range(3):
            d = {name: value[i] for name, value in moved.items()}
            x = relaxed(d, kappa)[0]
            values.append(0.5 * x @ d["Q"] @ x + d["q"] @ x)
            total += g[i] * values[-1] + cotangent[i] @ x
        sides.append(total)
    difference = (sides[0] - sides[1]) / 2e-6
    gradients = qpdiff.vjp(sol, x=cotangent, objective=g, smoothing=kappa)
    pulled = sum(np.sum(getattr(gradients, name) * tangents[name]) for name in operands)
    assert abs(pulled - difference) <= 1e-5 * (1 + abs(difference))
    pushed = qpdiff.jvp(sol, **tangents, smoothing=kappa).objective
    slopes = np.subtract(values[:3], values[3:]) / 2e-6
    np.testing.assert_allclose(pushed, slopes, rtol=1e-5, atol=1e-5)
