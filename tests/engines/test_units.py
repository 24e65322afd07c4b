"""SOLVED means solved in any units: of the cost, of the variables, of each constraint; in float32 arithmetic too."""

import itertools

import numpy as np
import pytest
from problems import components, optnet, random_problem
from sparse_problems import as_sparse

import qpdiff
from qpdiff import Status

pytestmark = pytest.mark.usefixtures("each_engine")

quadprog = pytest.importorskip("quadprog")
KINDS = {"cost": ("Q", "q"), "size": ("q", "h", "b", "lb", "ub"), "rows": ("G", "h", "A", "b")}
"""What is multiplied by a number in other units; in those of the size, x is too."""
RANGE = {"float64": {"cost": 12, "size": 8, "rows": 8}, "float32": {"cost": 6, "size": 4, "rows": 4}}
ACCURACY = {"float64": (1e-6, 1e-4), "float32": (2e-3, 3e-2)}
"""Of x and of its derivative, relative to their largest entries."""


def portfolio(rng):
    returns = rng.normal(size=(250, 2)) @ rng.normal(size=(2, 8)) + rng.normal(size=(250, 8))
    simplex = {"A": np.ones((1, 8)), "b": np.ones(1), "lb": np.zeros(8), "ub": np.full(8, 0.4)}
    return {"Q": np.cov(returns.T), "q": -0.3 * rng.normal(size=8), **simplex}


def inverse_kinematics(rng):
    J = rng.normal(size=(6, 7))
    box = {"lb": np.full(7, -0.5), "ub": np.full(7, 0.5)}
    return {"Q": J.T @ J + 1e-3 * np.eye(7), "q": -J.T @ rng.normal(size=6), **box}


def isotonic(rng):
    return {
        "Q": np.eye(12),
        "q": -np.arange(12.0) - 3 * rng.normal(size=12),
        "G": -np.diff(np.eye(12), axis=0),
        "h": np.zeros(11),
    }


def least_squares(rng):
    M = rng.normal(size=(20, 15))
    return {"Q": M.T @ M, "q": -M.T @ rng.normal(size=20)}


def box(rng):
    return {"Q": np.eye(5), "q": 2 * rng.normal(size=5), "lb": np.zeros(5), "ub": np.ones(5)}


def everything(rng):
    return random_problem(rng, "A G lb ub", batch=(), n=12, m=8, p=3)


FAMILIES = [
    portfolio, inverse_kinematics, isotonic, least_squares, box, everything, lambda rng: optnet(rng, (), 10, 10, 3),
    lambda rng: optnet(rng, (), 30, 10, 0),
]  # fmt: skip


def reference(d, cotangent):
    """The x of quadprog, the gradient of cotangentᵀx with respect to q on its active set, and how far a change is."""
    n, p = len(d["q"]), len(d.get("b", ()))
    parts = [(d[K], d[k]) for K, k in (("A", "b"), ("G", "h")) if K in d]
    parts += [(sign * np.eye(n), sign * d[k]) for k, sign in (("ub", 1.0), ("lb", -1.0)) if k in d]
    if not parts:
        return np.linalg.solve(d["Q"], -d["q"]), -np.linalg.solve(d["Q"], cotangent), np.inf
    K, k = (np.concatenate(column) for column in zip(*parts, strict=True))
    K, k = K[np.isfinite(k)], k[np.isfinite(k)]
    x, _, _, _, z, _ = quadprog.solve_qp(d["Q"], -d["q"], -K.T.copy(), -k, p)
    active = (np.arange(len(k)) < p) | (z > 1e-10)
    margin = min(np.min(z[active][p:], initial=np.inf), np.min((k - K @ x)[~active], initial=np.inf))
    M = np.block([[d["Q"], K[active].T], [K[active], np.zeros((active.sum(), active.sum()))]])
    return x, -np.linalg.solve(M, np.concatenate([cotangent, np.zeros(active.sum())]))[:n], margin


def drawn(family, seed):
    """A problem of a family whose solution has no kink nearby, with its solution and derivative."""
    rng = np.random.default_rng(seed)
    while True:
        d = family(rng)
        cotangent = np.arange(1.0, len(d["q"]) + 1)
        x, gradient, margin = reference(d, cotangent)
        if margin > 0.02:
            return d, cotangent, x, gradient


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_units_do_not_matter(family, kind, dtype):
    d, cotangent, x, gradient = drawn(family, 0)
    most, (of_x, of_gradient) = RANGE[dtype][kind], ACCURACY[dtype]
    for by in np.geomspace(10.0**-most, 10.0**most, 9):
        scaled = {name: (value * by if name in KINDS[kind] else value).astype(dtype) for name, value in d.items()}
        sol = qpdiff.solve_qp(**scaled, dtype=dtype)
        assert sol.status == Status.SOLVED, by
        found = sol.x / (by if kind == "size" else 1.0)
        assert np.max(np.abs(found - x)) <= of_x * np.max(np.abs(x)), by
        found = qpdiff.vjp(sol, x=cotangent).q * (by if kind == "cost" else 1.0)
        assert np.max(np.abs(found - gradient)) <= of_gradient * np.max(np.abs(gradient)), by


@pytest.mark.parametrize("family", FAMILIES)
def test_units_of_each_variable_and_constraint(family):
    for seed in range(5):
        d, _, x, _ = drawn(family, seed)
        rng = np.random.default_rng(seed)
        u = 10 ** rng.uniform(-2.0, 2.0, len(d["q"]))
        scaled = {"Q": d["Q"] * u * u[:, None], "q": d["q"] * u}
        scaled |= {name: d[name] / u for name in ("lb", "ub") if name in d}
        for K, k in (("A", "b"), ("G", "h")):
            if K in d:
                rows = 10 ** rng.uniform(-3.0, 3.0, len(d[k]))
                scaled |= {K: d[K] * u * rows[:, None], k: d[k] * rows}
        sol = qpdiff.solve_qp(**scaled)
        assert sol.status == Status.SOLVED
        assert np.max(np.abs(sol.x * u - x)) <= 1e-6 * np.max(np.abs(x))


@pytest.mark.parametrize("by", [1e-6, 1.0, 1e6])
def test_tol_is_absolute_in_the_units_of_the_caller(by):
    d, *_ = drawn(box, 0)
    d = {name: value * by if name in KINDS["size"] else value for name, value in d.items()}
    for tol in (1e-3 * by, 1e-6 * by):
        sol = qpdiff.solve_qp(**d, tol=tol, rtol=0.0)
        assert sol.status == Status.SOLVED
        residuals = np.max(np.abs(sol.x + d["q"] - sol.z_lb + sol.z_ub)), np.max(np.maximum(-sol.x, sol.x - d["ub"]))
        assert max(residuals) <= tol
    assert qpdiff.solve_qp(**d, tol=1e3 * max(by, by * by)).iterations <= 1  # the gap has the square of their size


# ---- what users met


def test_curvature_of_1e_minus_10():
    k = 1.25e-5
    q = 2 * k * np.array([-0.1, -0.05, 0.0, -0.15])
    box = {"lb": np.zeros(4), "ub": np.full(4, 2e4)}
    sol = qpdiff.solve_qp(2 * k * k * np.eye(4), q, A=np.ones((1, 4)), b=[3e4], **box)
    assert sol.status == Status.SOLVED
    np.testing.assert_allclose(sol.x, [9500.0, 5500.0, 1500.0, 13500.0], rtol=1e-6)


@pytest.mark.parametrize("by", [2e5, 1e7, 1e9])
def test_isotonic_regression_of_a_mean(by):
    sklearn = pytest.importorskip("sklearn.isotonic")
    y = np.linspace(0.0, 5.0, 100) + np.random.default_rng(0).normal(size=100)
    sol = qpdiff.solve_qp(np.eye(100) / by, -y / by, -np.diff(np.eye(100), axis=0), np.zeros(99))
    assert sol.status == Status.SOLVED
    np.testing.assert_allclose(sol.x, sklearn.isotonic_regression(y), atol=1e-5)


def unstable_plant(seed, horizon, n=8, m=2):
    """The next x is A x + B u, with the states kept as variables, feasible for any inputs in [−1, 1]."""
    rng = np.random.default_rng(seed)
    A, B, x = np.eye(n) + 0.2 * rng.normal(size=(n, n)), rng.normal(size=(n, m)), 5 * rng.normal(size=n)
    rows, b = np.zeros((n * horizon, (n + m) * horizon)), np.zeros(n * horizon)
    for t in range(horizon):
        here = slice(n * t, n * (t + 1))
        rows[here, here] = np.eye(n)
        if t:
            rows[here, n * (t - 1) : n * t] = -A
        rows[here, n * horizon + m * t : n * horizon + m * (t + 1)] = -B
    b[:n] = A @ x
    ub = np.concatenate([np.full(n * horizon, np.inf), np.ones(m * horizon)])
    return {"Q": 2 * np.eye(len(ub)), "q": np.zeros(len(ub)), "A": rows, "b": b, "lb": -ub, "ub": ub}


@pytest.mark.parametrize("cost", [1.0, 1e-6])
def test_optimal_control_of_an_unstable_plant(cost):
    for seed, horizon in itertools.product(range(4), (20, 30)):
        d = unstable_plant(seed, horizon)
        sol = qpdiff.solve_qp(**d | {"Q": cost * d["Q"]})
        assert sol.status == Status.SOLVED, (seed, horizon)
        bounded = np.isfinite(d["ub"])
        terms = [cost * d["Q"] @ sol.x, d["A"].T @ sol.y, np.where(bounded, sol.z_ub - sol.z_lb, 0.0)]
        assert np.max(np.abs(sum(terms))) <= 1e-6 * max(np.max(np.abs(term)) for term in terms)
        assert np.max(np.abs(d["A"] @ sol.x - d["b"])) <= 1e-6 * np.max(np.abs(sol.x))
        assert np.all(np.abs(sol.x[bounded]) <= 1 + 1e-6)


@pytest.mark.parametrize("far", [1e6, 1e12, 1e16, 1e19])
@pytest.mark.parametrize("bounds", [("lb",), ("ub",), ("lb", "ub"), ("h",)])
def test_bounds_that_mean_none_cost_nothing(far, bounds):
    rng = np.random.default_rng(3)
    d = optnet(rng, (20,), 10, 6, 0) | {"lb": np.full(10, -np.inf)}
    distant = d | {name: np.full(10, -far if name == "lb" else far) for name in bounds if name != "h"}
    if "h" in bounds:
        distant |= {"G": np.concatenate([d["G"], rng.normal(size=(20, 2, 10))], axis=1)}
        distant |= {"h": np.concatenate([d["h"], np.full((20, 2), far)], axis=1)}
    expected, sol = qpdiff.solve_qp(**d), qpdiff.solve_qp(**distant)
    assert np.all(sol.status == Status.SOLVED)
    np.testing.assert_allclose(sol.x, expected.x, atol=1e-6)
    assert np.mean(sol.iterations) <= np.mean(expected.iterations) + 5


def test_as_many_equalities_as_variables():
    """One more inequality, though it never matters, made these STALLED where A is not well conditioned."""
    for seed in range(200):
        rng = np.random.default_rng(seed)
        A, x = rng.normal(size=(33, 33)), rng.normal(size=33)
        g = rng.normal(size=(1, 33))
        sol = qpdiff.solve_qp(np.eye(33), rng.normal(size=33), g, g @ x + 1.0, A, A @ x)
        assert sol.status == Status.SOLVED, (seed, np.linalg.cond(A))
        assert np.max(np.abs(sol.x - x)) <= 1e-9 * np.linalg.cond(A)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_boxes_and_simplices(n, dtype):
    """Random, integer and constant data; where multipliers at the start are all equal, μ there was 0.

    Where they are large, as for costs far from 0, the start for a smaller cost led nowhere in float32.
    """
    rng = np.random.default_rng(n)
    draws = [rng.normal(size=(2000, n)), rng.integers(-3, 4, (2000, n)), np.repeat(rng.integers(-3, 4, (50, 1)), n, 1)]
    draws.append(14 + 3 * rng.normal(size=(2000, n)))
    q = np.concatenate(draws).astype(dtype)
    one, accuracy = np.ones(1, dtype), 1e-3 if dtype == "float64" else 3e-2  # a weakly active bound is left by √μ
    Q, zero = np.eye(n, dtype=dtype), np.zeros(n, dtype)
    sol = qpdiff.solve_qp(Q, q, lb=zero, ub=zero + 1, dtype=dtype)
    assert np.all(sol.status == Status.SOLVED)
    np.testing.assert_allclose(sol.x, np.clip(-q, 0.0, 1.0), atol=accuracy)
    sol = qpdiff.solve_qp(Q, q, A=np.ones((1, n), dtype), b=one, lb=zero, dtype=dtype)
    assert np.all(sol.status == Status.SOLVED)
    order = np.sort(-q, axis=-1)[:, ::-1]
    level = (np.cumsum(order, axis=-1) - 1) / np.arange(1, n + 1)
    count = np.sum(order > level, axis=-1)
    threshold = np.take_along_axis(level, count[:, None] - 1, axis=-1)
    np.testing.assert_allclose(sol.x, np.maximum(-q - threshold, 0.0), atol=accuracy)


@pytest.mark.parametrize("curvature", [1e-8, 1e-4, 1.0, 1e4, 1e6, 1e8, 1e12])
def test_a_linear_cost_beside_curvature(curvature):
    """A penalty on one variable, and a linear program in the others: with 1e6 SOLVED was wrong by up to 2."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        A = np.abs(rng.normal(size=(2, 6)))
        A[:, 0] = rng.normal(size=2)
        q = np.concatenate([[0.0], rng.random(5)])
        d = {"Q": np.diag([curvature, 0, 0, 0, 0, 0]), "q": q, "A": A, "b": A @ rng.random(6)}
        lb = np.concatenate([[-np.inf], np.zeros(5)])
        sol = qpdiff.solve_qp(**d, lb=lb)
        assert sol.status == Status.SOLVED
        # In units in which the curvature is 1: KKT conditions from their definition.
        terms = [d["Q"] @ sol.x, q, A.T @ sol.y, -sol.z_lb]
        unit = np.array([min(1.0, curvature**-0.5), 1, 1, 1, 1, 1])
        size = max(np.max(np.abs(term)) for term in terms)  # what is forced on the penalty makes large multipliers
        assert np.max(np.abs(unit * sum(terms))) <= 1e-6 + 1e-14 * size
        assert np.max(np.abs(A @ sol.x - d["b"])) <= 1e-6
        assert np.all(sol.x[1:] >= -1e-6)
        assert np.all(sol.z_lb >= 0)
        assert abs(sol.z_lb @ np.where(np.isfinite(lb), sol.x, 0.0)) <= 1e-5 + 1e-9 * size


@pytest.mark.parametrize("noise", [0.0, 1e-17, 1e-14])
def test_right_hand_sides_of_rounding(noise):
    rng = np.random.default_rng(0)
    for _ in range(20):
        A, q = rng.normal(size=(3, 8)), rng.normal(size=8)
        A = np.concatenate([A, A[:1] + A[1:2]])  # the last row says nothing, up to rounding
        sol = qpdiff.solve_qp(np.eye(8), q, A=A, b=noise * rng.normal(size=4))
        assert sol.status == Status.SOLVED
        expected = -(q - np.linalg.pinv(A[:3]) @ (A[:3] @ q))
        np.testing.assert_allclose(sol.x, expected, atol=1e-6)


@pytest.mark.parametrize("unit", [1e-9, 1e-4, 1.0, 1e4, 1e9])
@pytest.mark.parametrize("curved", [0, 2])
def test_variables_that_only_have_bounds(unit, curved):
    """Each is at the bound that its cost leads to; those with curvature are clipped."""
    rng = np.random.default_rng(6)
    lower, span = rng.normal(size=(20, 8)), rng.uniform(0.1, 2.0, size=(20, 8))
    lower[:, 2:4], q = 0.0, rng.uniform(0.5, 2.0, size=(20, 8)) * rng.choice([-1.0, 1.0], size=(20, 8))
    upper = lower + span
    lower[:, 4:6], upper[:, 6:] = -np.inf, np.inf
    q[:, 4:6], q[:, 6:] = -np.abs(q[:, 4:6]), np.abs(q[:, 6:])
    x = np.where(q > 0, lower, upper)
    x[:, :curved] = np.clip(-q, lower, upper)[:, :curved]
    Q = np.diag(np.arange(8) < curved) / unit**2
    sol = qpdiff.solve_qp(Q, q / unit, lb=unit * lower, ub=unit * upper)
    assert np.all(sol.status == Status.SOLVED)
    np.testing.assert_allclose(sol.x / unit, x, atol=1e-6)


@pytest.mark.parametrize("cost", [-1.0, 0.0])
@pytest.mark.parametrize("weight", [1e2, 1e4, 1e6, 1e8])
@pytest.mark.parametrize("kind", ["G", "A"])
def test_a_penalty_says_nothing_of_how_far_the_others_go(kind, weight, cost):
    """Minimise ½x² − x + wt, or ½x² + wt, with x ≤ t or x = t and t ≥ 0: x = t = 0, not near where w would move x."""
    row = {"G": {"G": [[1.0, -1.0]], "h": [0.0]}, "A": {"A": [[1.0, -1.0]], "b": [0.0]}}[kind]
    sol = qpdiff.solve_qp(np.diag([1.0, 0.0]), [cost, weight], **row, lb=[-np.inf, 0.0])
    assert sol.status == Status.SOLVED
    np.testing.assert_allclose(sol.x, 0.0, atol=1e-6 if cost else 1e-9 * weight)


@pytest.mark.parametrize("curved", [(True, False), (False, False), (True, False, False)])
@pytest.mark.parametrize("orders", [0, 3, 8])
@pytest.mark.parametrize("sparse", [False, True])
def test_components_without_curvature_have_units_of_their_own(sparse, orders, curved):
    """Two linear programs side by side with x in units of 1e3 and more ended SOLVED with any cost, or STALLED."""
    d, cost, size = components(np.random.default_rng(7), (60,), orders, curved)
    if sparse:
        d |= {name: as_sparse(d[name], np.any(d[name] != 0, axis=0)) for name in ("Q", "A", "G")}
    sol = qpdiff.solve_qp(**d)
    assert np.all(sol.status == Status.SOLVED)
    assert np.max(np.abs(sol.objective - cost) / size) <= 1e-6
