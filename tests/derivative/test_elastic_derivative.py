"""Derivatives of problems whose constraints may be violated at a price: finite differences and the slack form."""

import numpy as np
import pytest
from elastic_problems import contradictory, random_prices, slack_form, with_zeros
from problems import random_problem

import qpdiff
from qpdiff import Status
from qpdiff.differentiation import smoothed

pytestmark = pytest.mark.usefixtures("each_engine")
OUTPUTS = ("x", "y", "z")


def draw(rng, parts, quadratic, batch=(4,), **options):
    """A problem with prices, some rows of which are violated, some active and some inactive."""
    problem = contradictory(rng, parts, batch=batch, **options)
    rows = {of: problem[k].shape for of, k in (("G", "h"), ("A", "b")) if of in problem}
    elastic = {of: 10 ** rng.uniform(-1, 1, shape) for of, shape in rows.items()}
    sigma = {of: 10 ** rng.uniform(-2, 0, shape) for of, shape in rows.items()} if quadratic else None
    return problem, elastic, sigma


def cotangents(rng, sol, parts):
    names = [name for name in OUTPUTS if {"x": "x", "y": "A", "z": "G"}[name] in f"x {parts}"]
    return {name: rng.normal(size=getattr(sol, name).shape) for name in names}


CASES = ["G h", "A b", "G h A b", "G h A b lb ub"]


@pytest.mark.parametrize(
    ("parts", "cost"),
    [*((parts, cost) for parts in CASES for cost in ("pd", "diagonal")), (CASES[-1], "psd"), (CASES[-1], "lp")],
)
@pytest.mark.parametrize("quadratic", [False, True], ids=["linear", "both"])
@pytest.mark.parametrize("smoothing", [None, 0.05])
def test_vjp_is_that_of_the_slack_form(parts, cost, quadratic, smoothing):
    rng = np.random.default_rng(0)
    problem, elastic, sigma = draw(rng, parts, quadratic, cost=cost)
    sol = qpdiff.solve_qp(**problem, elastic=elastic, elastic_quadratic=sigma, tol=1e-11)
    written = qpdiff.solve_qp(**slack_form(problem, elastic, sigma), tol=1e-11)
    given = cotangents(rng, sol, parts)
    n, g = sol.x.shape[-1], rng.normal(size=sol.objective.shape)
    grads = qpdiff.vjp(sol, **given, objective=g, smoothing=smoothing)
    more = written.x.shape[-1] - n
    given["x"] = np.concatenate([given["x"], np.zeros((*g.shape, more))], axis=-1)
    others = qpdiff.vjp(written, **given, objective=g, smoothing=smoothing)
    for name in problem:
        expected = getattr(others, name)
        expected = expected[..., :n, :n] if name == "Q" else expected[..., :n] if name not in ("h", "b") else expected
        close(getattr(grads, name), expected)
    at = n
    for of in elastic:
        m = elastic[of].shape[-1]
        w_bar = others.q[..., at : at + m]
        at += m
        if of == "A":
            w_bar = w_bar + others.q[..., at : at + m]
            at += m
        close(grads.elastic[of], w_bar)
        if sigma:
            curvature = np.linalg.diagonal(others.Q)[..., at : at + m]
            close(grads.elastic_quadratic[of], -curvature / sigma[of] ** 2)
            at += m
    if not sigma:
        assert grads.elastic_quadratic is None


def close(value, expected, tolerance=1e-6):
    np.testing.assert_allclose(value, expected, atol=tolerance * max(1.0, float(np.max(np.abs(expected), initial=0.0))))


@pytest.mark.parametrize("parts", CASES)
@pytest.mark.parametrize("quadratic", [False, True], ids=["linear", "both"])
def test_derivatives_are_finite_differences(parts, quadratic):
    rng = np.random.default_rng(1)
    problem, elastic, sigma = draw(rng, parts, quadratic, batch=(6,))
    moving = problem | {("elastic", of): w for of, w in elastic.items()}
    moving |= {("elastic_quadratic", of): s for of, s in (sigma or {}).items()}
    directions = {name: rng.normal(size=value.shape) * np.abs(value) for name, value in moving.items()}
    directions["Q"] = directions["Q"] + directions["Q"].mT

    def arguments(values):
        out = {name: value for name, value in values.items() if isinstance(name, str)}
        for option in ("elastic", "elastic_quadratic"):
            given = {name[1]: value for name, value in values.items() if name[0] == option}
            out |= {option: given} if given else {}
        return out

    def solve(step):
        moved = {name: value + step * directions[name] for name, value in moving.items()}
        sol = qpdiff.solve_qp(**arguments(moved), tol=1e-12)
        assert np.all(sol.status == Status.SOLVED)
        return sol

    sol, step = solve(0.0), 1e-6
    before, after = solve(-step), solve(step)
    tangents = qpdiff.jvp(sol, **arguments(directions))
    for name in OUTPUTS:
        slope = (getattr(after, name) - getattr(before, name)) / (2 * step)
        close(getattr(tangents, name), slope, 1e-4)
    given = cotangents(rng, sol, parts)
    g = rng.normal(size=sol.objective.shape)
    pushed = sum(np.sum(given[name] * getattr(tangents, name)) for name in given)
    close(along(qpdiff.vjp(sol, **given), arguments(directions)), pushed)
    value = np.sum(g * (after.objective - before.objective) / (2 * step))
    close(along(qpdiff.vjp(sol, objective=g), arguments(directions)), value, 1e-5)


def along(grads, directions):
    """The derivative along some directions."""
    total = 0.0
    for name, direction in directions.items():
        parts = direction if isinstance(direction, dict) else {None: direction}
        for of, part in parts.items():
            gradient = getattr(grads, name) if of is None else getattr(grads, name)[of]
            total += np.sum(gradient * part)
    return total


def test_prices_above_the_multipliers_leave_the_gradients():
    rng = np.random.default_rng(2)
    problem = random_problem(rng, "G h A b lb ub", batch=(5,))
    hard, sol = qpdiff.solve_qp(**problem), qpdiff.solve_qp(**problem, elastic=1e4)
    given = {name: rng.normal(size=getattr(sol, name).shape) for name in ("x", "y", "z", "z_lb")}
    grads, expected = qpdiff.vjp(sol, **given), qpdiff.vjp(hard, **given)
    for name in problem:
        close(getattr(grads, name), getattr(expected, name), 1e-5)
    assert grads.elastic.shape == ()
    assert abs(grads.elastic) < 1e-6


def test_gradients_have_the_shapes_of_the_prices():
    rng = np.random.default_rng(3)
    problem, *_ = draw(rng, "G h A b", False, batch=(3,))
    w = rng.uniform(0.5, 1.0, 5)
    sol = qpdiff.solve_qp(**problem, lb=-np.ones(6), elastic={"G": w, "A": 2.0, "bounds": np.ones((3, 6))})
    grads = qpdiff.vjp(sol, x=np.ones(6))
    assert {of: np.shape(value) for of, value in grads.elastic.items()} == {"G": (5,), "A": (), "bounds": (3, 6)}
    sol = qpdiff.solve_qp(**problem, elastic=np.float64(0.7), elastic_quadratic=0.1)
    number = qpdiff.vjp(sol, x=np.ones(6))
    sol = qpdiff.solve_qp(**problem, elastic={"G": 0.7, "A": 0.7}, elastic_quadratic={"G": 0.1, "A": 0.1})
    parts = qpdiff.vjp(sol, x=np.ones(6))
    close(number.elastic, sum(parts.elastic.values()))
    close(number.elastic_quadratic, sum(parts.elastic_quadratic.values()))
    tangents = [qpdiff.jvp(sol, elastic=value).x for value in (1.0, {"G": 1.0, "A": 1.0})]
    np.testing.assert_array_equal(*tangents)
    with pytest.raises(ValueError, match=r"tangent of elastic\['bounds'\] was given, but the problem has no bounds"):
        qpdiff.jvp(sol, elastic={"bounds": 1.0})


def test_a_violated_constraint_pulls_towards_the_feasible_set():
    """X ≤ h and x ≥ 1: the gradient of the violation closes the gap, where the hard problem has none."""
    Q, q, G = np.eye(1), np.zeros(1), np.array([[1.0], [-1.0]])
    h = np.array([0.0, -1.0])
    assert qpdiff.solve_qp(Q, q, G, h).status == Status.PRIMAL_INFEASIBLE
    sol = qpdiff.solve_qp(Q, q, G, h, elastic={"G": [1.0, 10.0]})
    np.testing.assert_allclose(sol.x, 1.0, atol=1e-7)
    np.testing.assert_allclose(sol.violation.G, [1.0, 0.0], atol=1e-7)
    grads = qpdiff.vjp(sol, objective=1.0)
    np.testing.assert_allclose(grads.h, [-1.0, -2.0], atol=1e-6)  # both sides should give way
    np.testing.assert_allclose(grads.elastic["G"], [1.0, 0.0], atol=1e-6)


def test_bounds_with_a_price():
    rng = np.random.default_rng(4)
    problem = random_problem(rng, "A b", batch=(5,), n=4)
    lb, ub = rng.normal(size=(2, 5, 4))
    lb[:, 0] = ub[:, 0]
    w = rng.uniform(0.2, 2.0, (5, 4))
    sol = qpdiff.solve_qp(**problem, lb=lb, ub=ub, elastic={"bounds": w}, tol=1e-11)
    rows, h = np.concatenate([-np.eye(4), np.eye(4)]), np.concatenate([-lb, ub], axis=-1)
    prices = {"G": np.concatenate([w, w], axis=-1)}
    other = qpdiff.solve_qp(**problem, G=rows, h=h, elastic=prices, tol=1e-11)
    x_bar = rng.normal(size=sol.x.shape)
    grads, expected = qpdiff.vjp(sol, x=x_bar), qpdiff.vjp(other, x=x_bar)
    close(grads.b, expected.b, 1e-5)
    close(grads.lb + grads.ub, expected.h[:, 4:] - expected.h[:, :4], 1e-5)
    close(grads.elastic["bounds"], expected.elastic["G"][:, :4] + expected.elastic["G"][:, 4:], 1e-5)


@pytest.mark.parametrize("name", ["elastic", "elastic_quadratic"])
def test_every_library_gives_the_same(xp, name):
    rng = np.random.default_rng(5)
    problem, elastic, sigma = draw(rng, "G h A b lb ub", True)
    x_bar = rng.normal(size=(4, 6))
    sol = qpdiff.solve_qp(**problem, elastic=elastic, elastic_quadratic=sigma)
    expected = getattr(qpdiff.vjp(sol, x=x_bar), name)
    moved = [{of: xp.asarray(value) for of, value in each.items()} for each in (problem, elastic, sigma)]
    sol = qpdiff.solve_qp(**moved[0], elastic=moved[1], elastic_quadratic=moved[2], engine="array")
    grads = getattr(qpdiff.vjp(sol, x=xp.asarray(x_bar)), name)
    for of, value in expected.items():
        close(xp.to_numpy(grads[of]), value, 1e-5)


@pytest.mark.parametrize("batch", [3, 24], ids=["one by one", "in groups"])
@pytest.mark.parametrize("parts", CASES)
@pytest.mark.parametrize("smoothing", [None, 1e-2, 0.5])
def test_of_sparse_matrices(parts, batch, smoothing, sparse_suits):
    rng = np.random.default_rng(5)
    dense, sparse = with_zeros(rng, contradictory(rng, parts, batch=(batch,), n=6, m=7, p=4))
    prices = {"elastic": random_prices(rng, dense), "elastic_quadratic": random_prices(rng, dense, quadratic=True)}
    expected, sol = (qpdiff.solve_qp(**operands, **prices, tol=1e-11) for operands in (dense, sparse))
    given = cotangents(rng, sol, parts) | {"objective": rng.normal(size=batch)}
    others, grads = (qpdiff.vjp(each, **given, smoothing=smoothing) for each in (expected, sol))
    for name in dense:
        one, other = getattr(grads, name), getattr(others, name)
        if isinstance(one, qpdiff.Sparse):
            rows = np.repeat(np.arange(one.shape[-2]), np.diff(one.indptr))
            one, other = one.values, other[..., rows, one.indices]
        close(one, other)
    for option, by_constraint in prices.items():
        for of in by_constraint:
            close(getattr(grads, option)[of], getattr(others, option)[of])
    tangents = {"q": rng.normal(size=dense["q"].shape)}
    for option, by_constraint in prices.items():
        tangents[option] = {of: rng.normal(size=price.shape) for of, price in by_constraint.items()}
    moved, others = (qpdiff.jvp(each, **tangents, smoothing=smoothing) for each in (sol, expected))
    for one, other in zip((*moved, moved.objective), (*others, others.objective), strict=True):
        close(one, other)


@pytest.mark.parametrize("parts", CASES)
@pytest.mark.parametrize("quadratic", [False, True], ids=["linear", "both"])
def test_of_sparse_matrices_is_that_of_the_relaxed_point(parts, quadratic, sparse_suits):
    rng, step, kappa = np.random.default_rng(6), 1e-5, 0.05
    dense, sparse = with_zeros(rng, contradictory(rng, parts, batch=(6,), n=6, m=7, p=4))
    prices = {"elastic": random_prices(rng, dense)}
    if quadratic:
        prices["elastic_quadratic"] = random_prices(rng, dense, quadratic=True)
    tangents = {"q": rng.normal(size=dense["q"].shape)}
    for option, by_constraint in prices.items():
        tangents[option] = {of: rng.normal(size=price.shape) * price for of, price in by_constraint.items()}

    def relaxed(step):
        moved = {"q": dense["q"] + step * tangents["q"]}
        for option, by_constraint in prices.items():
            moved[option] = {of: price + step * tangents[option][of] for of, price in by_constraint.items()}
        sol = smoothed(qpdiff.solve_qp(**sparse | moved, tol=1e-11), kappa)
        assert np.all(sol.linearization.status == Status.SOLVED)
        return sol.linearization.x

    slope = (relaxed(step) - relaxed(-step)) / (2 * step)
    moved = qpdiff.jvp(qpdiff.solve_qp(**sparse, **prices, tol=1e-11), **tangents, smoothing=kappa)
    close(moved.x, slope, 1e-4)


def test_relaxed_points_near_the_limits_of_multipliers(sparse_suits):
    """Multipliers of 1e4 end 1e-6 below that, so that the distance is not their difference."""
    rng = np.random.default_rng(7)
    dense, sparse = with_zeros(rng, contradictory(rng, "G h A b lb ub", batch=(100,), n=6, m=7, p=4))
    expected, sol = (smoothed(qpdiff.solve_qp(**each, elastic=1e4), 1e-6).linearization for each in (dense, sparse))
    assert np.all(sol.status == Status.SOLVED)
    close(sol.x, expected.x)


@pytest.fixture
def sparse_suits(monkeypatch):
    monkeypatch.setattr("qpdiff.engines.compiled.sparse_engine.suits", lambda problem: True, raising=False)
