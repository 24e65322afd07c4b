"""Constraints that may be violated at a price: the conditions of optimality, the slack form, limits of the price."""

import copy
import pickle

import clarabel
import numpy as np
import pytest
from elastic_problems import contradictory, optimality, random_prices, slack_form, with_zeros
from problems import apply, optnet, random_problem
from scipy import sparse

import qpdiff
from qpdiff import Status

pytestmark = pytest.mark.usefixtures("each_engine")


def prices(rng, problem, *, quadratic=False):
    """Prices of all rows between 1e-2 and 1e2, or σ between 1e-3 and 10."""
    low, high = (-3, 1) if quadratic else (-2, 2)
    rows = {"G": "h", "A": "b"}
    return {of: 10 ** rng.uniform(low, high, problem[k].shape) for of, k in rows.items() if k in problem}


@pytest.mark.parametrize("cost", ["pd", "psd", "diagonal", "lp"])
@pytest.mark.parametrize("parts", ["G h", "A b", "G h A b", "G h A b lb ub", "A b lb", "G h lb ub"])
@pytest.mark.parametrize("quadratic", [False, True], ids=["linear", "both"])
def test_solutions_satisfy_the_conditions_of_optimality(cost, parts, quadratic):
    if cost in ("psd", "lp") and "ub" not in parts:
        pytest.skip("the prices need not bound the cost")
    rng = np.random.default_rng(0)
    problem = contradictory(rng, parts, cost=cost, batch=(40,))
    elastic = prices(rng, problem)
    sigma = prices(rng, problem, quadratic=True) if quadratic else None
    sol = qpdiff.solve_qp(**problem, elastic=elastic, elastic_quadratic=sigma)
    assert np.all(sol.status == Status.SOLVED)
    assert max(optimality(problem, sol, elastic, sigma)) < 1e-8
    for of, v in (("G", sol.z), ("A", sol.y)):
        if of in problem:
            assert np.all(np.abs(v) <= elastic[of])
            violated = getattr(sol.violation, of)
            expected = apply(problem[of], sol.x) - problem["h" if of == "G" else "b"]
            np.testing.assert_allclose(violated, np.abs(expected) if of == "A" else np.maximum(expected, 0), atol=1e-12)
            assert np.any(violated > 0.1)


def test_a_thousand_infeasible_problems_are_solved():
    rng, solved, hard = np.random.default_rng(1), 0, []
    for _ in range(40):
        n, m, p = int(rng.integers(1, 9)), int(rng.integers(2, 12)), int(rng.integers(0, 4))
        parts = "G h" + (" A b" if p else "") + (" lb ub" if rng.uniform() < 0.5 else "")
        problem = contradictory(rng, parts, batch=(25,), n=n, m=m, p=p)
        elastic = prices(rng, problem)
        sol = qpdiff.solve_qp(**problem, elastic=elastic)
        hard.append(np.mean(qpdiff.solve_qp(**problem).status != Status.SOLVED))
        solved += np.sum(sol.status == Status.SOLVED)
        assert max(optimality(problem, sol, elastic)) < 1e-8
    assert solved == 1000
    assert np.mean(hard) > 0.99


@pytest.mark.parametrize("cost", ["pd", "diagonal"])
@pytest.mark.parametrize("parts", ["G h", "A b", "G h A b", "G h A b lb ub"])
@pytest.mark.parametrize("quadratic", [False, True], ids=["linear", "both"])
def test_is_the_slack_form(cost, parts, quadratic):
    rng = np.random.default_rng(2)
    problem = contradictory(rng, parts, cost=cost, batch=(5,))
    elastic = prices(rng, problem)
    sigma = prices(rng, problem, quadratic=True) if quadratic else None
    sol = qpdiff.solve_qp(**problem, elastic=elastic, elastic_quadratic=sigma)
    extended = slack_form(problem, elastic, sigma)
    written = qpdiff.solve_qp(**extended)
    assert np.all(written.status == Status.SOLVED)
    n = sol.x.shape[-1]
    np.testing.assert_allclose(sol.x, written.x[:, :n], atol=1e-6)
    np.testing.assert_allclose(sol.y, written.y, atol=1e-6)
    np.testing.assert_allclose(sol.z, written.z, atol=1e-6)
    np.testing.assert_allclose(sol.objective, written.objective, rtol=1e-7, atol=1e-6)
    for i in range(len(sol.x)):
        x, value = by_clarabel({name: each[i] for name, each in extended.items()})
        np.testing.assert_allclose(sol.x[i], x[:n], atol=1e-4)
        np.testing.assert_allclose(sol.objective[i], value, rtol=1e-6, atol=1e-6)


def by_clarabel(problem):
    """The minimiser and the least cost of one problem by Clarabel."""
    n = len(problem["q"])
    rows = [(problem[K], problem[k]) for K, k in (("A", "b"), ("G", "h")) if K in problem]
    rows.append((np.concatenate([-np.eye(n), np.eye(n)]), np.concatenate([-problem["lb"], problem["ub"]])))
    K, k = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    finite = k < 1e20
    p = len(problem["b"]) if "b" in problem else 0
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    cones = [clarabel.ZeroConeT(p)] * (p > 0) + [clarabel.NonnegativeConeT(int(finite.sum()) - p)]
    Q = sparse.csc_matrix(np.triu(problem["Q"]))
    found = clarabel.DefaultSolver(Q, problem["q"], sparse.csc_matrix(K[finite]), k[finite], cones, settings).solve()
    return np.array(found.x), found.obj_val


@pytest.mark.parametrize("parts", ["G h", "A b", "G h A b", "G h A b lb ub"])
def test_prices_above_the_multipliers_give_the_problem_without_prices(parts):
    problem = random_problem(np.random.default_rng(3), parts, batch=(30,))
    hard = qpdiff.solve_qp(**problem)
    largest = max(np.max(np.abs(v), initial=0.0) for v in (hard.y, hard.z))
    for w in (1.1 * largest, 1e3 * largest, 1e9):
        sol = qpdiff.solve_qp(**problem, elastic=w)
        assert np.all(sol.status == Status.SOLVED)
        for name in ("x", "y", "z", "objective"):
            np.testing.assert_allclose(getattr(sol, name), getattr(hard, name), atol=1e-6)
        assert all(np.max(part, initial=0.0) < 1e-7 for part in sol.violation if part is not None)
    assert np.mean(sol.iterations) <= np.mean(hard.iterations) + 0.5


@pytest.mark.parametrize("parts", ["G h", "G h A b", "G h lb ub", "G h A b lb ub"])
def test_large_prices_do_not_move_the_solution(parts):
    """Nor does the tolerance grow with them: 1e-8 of the objective is more than all of the cost here."""
    problem = contradictory(np.random.default_rng(0), parts, batch=(100,))
    expected = qpdiff.solve_qp(**problem, elastic=1e4, tol=1e-10)
    sol = qpdiff.solve_qp(**problem, elastic=1e8)
    assert np.all(sol.status == Status.SOLVED)
    np.testing.assert_allclose(sol.x, expected.x, atol=1e-4)


def test_large_prices_of_single_problems():
    """Where x is a function of the multipliers, their rounding is all in the constraints."""
    problem = contradictory(np.random.default_rng(0), "G h", batch=(60,))
    for i in range(60):
        sol = qpdiff.solve_qp(**{name: value[i] for name, value in problem.items()}, elastic=1e8)
        assert sol.status == Status.SOLVED


def test_infinite_prices_are_none():
    problem = optnet(np.random.default_rng(4), (8,), 6, 5, 2)
    hard = qpdiff.solve_qp(**problem)
    sol = qpdiff.solve_qp(**problem, elastic=np.inf, elastic_quadratic=0.0)
    for name in ("x", "y", "z", "s"):
        np.testing.assert_allclose(getattr(sol, name), getattr(hard, name), atol=1e-9)
    np.testing.assert_array_equal(sol.iterations, hard.iterations)


def test_a_batch_has_rows_with_and_without_prices():
    rng = np.random.default_rng(5)
    problem = random_problem(rng, "G h A b", batch=(6,))
    w = np.where(np.arange(5) % 2, np.inf, 10 ** rng.uniform(-2, 0, (6, 5)))
    w[3:] = np.inf
    sol = qpdiff.solve_qp(**problem, elastic={"G": w})
    assert max(optimality(problem, sol, {"G": w})) < 1e-8
    assert np.all(sol.violation.G[np.isinf(w)] < 1e-7)
    assert np.any(sol.violation.G > 1e-2)
    np.testing.assert_allclose(sol.x[3:], qpdiff.solve_qp(**problem).x[3:], atol=1e-7)


@pytest.mark.parametrize("moved", [copy.copy, copy.deepcopy, lambda sol: pickle.loads(pickle.dumps(sol))])
def test_a_copy_has_the_violation_that_was_not_asked_for(moved):
    rng = np.random.default_rng(13)
    problem = contradictory(rng, "G h A b lb ub", batch=(3,))
    sol = qpdiff.solve_qp(**problem, elastic=0.5)
    other = moved(sol)
    for one, expected in zip(other.violation, sol.violation, strict=True):
        np.testing.assert_array_equal(one, expected)
    qpdiff.vjp(other, x=sol.x, smoothing=0.1)  # at a point of its own
    np.testing.assert_allclose(other.violation.G, np.maximum(apply(problem["G"], sol.x) - problem["h"], 0), atol=1e-12)


def test_what_costs_nothing_is_no_constraint():
    problem = random_problem(np.random.default_rng(6), "G h", batch=(4,))
    w = np.array([0.0, np.inf, 0.0, np.inf, np.inf])
    sol = qpdiff.solve_qp(**problem, elastic={"G": w})
    without = qpdiff.solve_qp(problem["Q"], problem["q"], problem["G"][:, 1::2], problem["h"][:, 1::2])
    rest = qpdiff.solve_qp(problem["Q"], problem["q"], problem["G"][:, w > 0], problem["h"][:, w > 0])
    np.testing.assert_allclose(sol.x, rest.x, atol=1e-7)
    assert np.all(sol.z[:, w == 0] == 0)
    assert without.x.shape == sol.x.shape


def test_bounds_with_a_price_are_rows_with_that_price():
    rng = np.random.default_rng(7)
    problem = random_problem(rng, "A b", batch=(10,), n=4)
    lb, ub = rng.normal(size=(2, 10, 4))
    lb[:, 0] = ub[:, 0]
    lb[:, 1] = -np.inf
    w = 10 ** rng.uniform(-1, 1, 4)
    sol = qpdiff.solve_qp(**problem, lb=lb, ub=ub, elastic={"bounds": w})  # half of them cross
    assert np.all(sol.status == Status.SOLVED)
    rows = np.concatenate([-np.eye(4), np.eye(4)])
    h = np.concatenate([-lb, ub], axis=-1)
    other = qpdiff.solve_qp(**problem, G=rows, h=h, elastic={"G": np.tile(w, 2)})
    np.testing.assert_allclose(sol.x, other.x, atol=1e-6)
    np.testing.assert_allclose(sol.z_ub[:, 1:] - sol.z_lb[:, 1:], other.z[:, 5:] - other.z[:, 1:4], atol=1e-6)
    np.testing.assert_allclose(sol.violation.ub, np.maximum(sol.x - ub, 0))


def test_a_quadratic_price_alone_gives_the_least_squares():
    rng = np.random.default_rng(8)
    A, b = rng.normal(size=(9, 4)), rng.normal(size=9)
    sol = qpdiff.solve_qp(np.zeros((4, 4)), np.zeros(4), A=A, b=b, elastic_quadratic=0.3)
    expected = np.linalg.lstsq(A, b)[0]
    np.testing.assert_allclose(sol.x, expected, atol=1e-7)
    np.testing.assert_allclose(sol.y, (A @ expected - b) / 0.3, atol=1e-6)
    np.testing.assert_allclose(sol.objective, np.sum((A @ expected - b) ** 2) / 0.6, rtol=1e-7)


def test_a_linear_price_alone_gives_the_least_absolute_deviations():
    sol = qpdiff.solve_qp(np.zeros((1, 1)), [0.0], A=np.ones((5, 1)), b=[1.0, 2.0, 7.0, 9.0, 30.0], elastic=1.0)
    np.testing.assert_allclose(sol.x, [7.0], atol=1e-6)  # the median
    np.testing.assert_allclose(sol.objective, 6 + 5 + 2 + 23, rtol=1e-7)


def test_what_contradicts_itself_without_a_price_is_infeasible():
    G, h = np.array([[1.0], [-1.0], [1.0], [-1.0]]), np.array([0.0, -1.0, 5.0, -7.0])
    w = np.array([np.inf, np.inf, 1.0, 1.0])
    sol = qpdiff.solve_qp(np.eye(1), [0.0], G, h, elastic={"G": w})
    assert sol.status == Status.PRIMAL_INFEASIBLE
    np.testing.assert_allclose(sol.z, [1.0, 1.0, 0.0, 0.0], atol=1e-6)
    other = qpdiff.solve_qp(np.eye(1), [0.0], G, h, elastic={"G": w[::-1]})
    assert other.status == Status.PRIMAL_INFEASIBLE  # 5 < 7


def test_a_cost_that_outweighs_the_prices_is_unbounded():
    rng = np.random.default_rng(9)
    G, q = rng.normal(size=(4, 3)), rng.normal(size=3)
    for w, status in ((0.01, Status.DUAL_INFEASIBLE), (1e3, Status.SOLVED)):
        sol = qpdiff.solve_qp(np.zeros((3, 3)), q, np.concatenate([G, -G]), np.ones(8), elastic=w)
        assert sol.status == status
        if status == Status.DUAL_INFEASIBLE:
            np.testing.assert_allclose(q @ sol.x + w * np.sum(np.abs(G @ sol.x)), -1.0, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_every_library_gives_the_same(xp, dtype):
    rng = np.random.default_rng(10)
    problem = contradictory(rng, "G h A b lb ub", batch=(3,))
    elastic = prices(rng, problem)
    expected = qpdiff.solve_qp(**problem, elastic=elastic)
    sol = qpdiff.solve_qp(
        **{name: xp.asarray(value.astype(dtype)) for name, value in problem.items()},
        elastic={of: xp.asarray(value.astype(dtype)) for of, value in elastic.items()},
    )  # fmt: skip
    tolerance = 1e-6 if dtype == np.float64 else 1e-3
    for name in ("x", "y", "z", "z_lb"):
        np.testing.assert_allclose(xp.to_numpy(getattr(sol, name)), getattr(expected, name), atol=tolerance)
    np.testing.assert_allclose(xp.to_numpy(sol.violation.G), expected.violation.G, atol=tolerance)


def test_computes_in_float32():
    rng = np.random.default_rng(11)
    problem = contradictory(rng, "G h A b", batch=(50,))
    elastic = prices(rng, problem)
    sol = qpdiff.solve_qp(**problem, elastic=elastic, dtype="float32")
    exact = qpdiff.solve_qp(**problem, elastic=elastic)
    assert np.mean(sol.status == Status.SOLVED) > 0.97
    np.testing.assert_allclose(sol.objective, exact.objective, rtol=1e-2, atol=1e-2)


def test_warm_start():
    rng = np.random.default_rng(12)
    problem = contradictory(rng, "G h A b", batch=(20,))
    elastic = prices(rng, problem)
    first = qpdiff.solve_qp(**problem, elastic=elastic)
    problem["q"] = problem["q"] + 1e-3 * rng.normal(size=problem["q"].shape)
    cold, warm = (qpdiff.solve_qp(**problem, elastic=elastic, warm_start=start) for start in (None, first))
    assert np.all(warm.status == Status.SOLVED)
    np.testing.assert_allclose(warm.x, cold.x, atol=1e-6)
    assert np.mean(warm.iterations) < np.mean(cold.iterations)


def test_bounds_may_cross_at_a_price_alone():
    lb, ub = np.array([[1.0, 0.0], [0.0, 1.0]]), np.zeros(2)
    operands = {"Q": np.eye(2), "q": -0.5 * np.ones(2), "lb": lb, "ub": ub}
    for options in ({"elastic": {"bounds": [1.0, np.inf]}}, {"elastic_quadratic": {"bounds": [1.0, 0.0]}}, {}):
        with pytest.raises(ValueError, match=r"lb is greater than ub for a variable.*lb.*= 1\.0, ub.*= 0\.0"):
            qpdiff.solve_qp(**operands, **options)
    shared = operands | {"lb": lb[0]}
    with pytest.raises(ValueError, match=r"lb\[0\] = 1\.0, ub\[0\] = 0\.0 \(problem 1 of the batch\)"):
        qpdiff.solve_qp(**shared, elastic={"bounds": [[1.0, 1.0], [np.inf, 1.0]]})
    sol = qpdiff.solve_qp(**operands, elastic={"bounds": np.where(lb > ub, 4.0, np.inf)})
    np.testing.assert_allclose(sol.x, lb / 2, atol=1e-6)  # both sides cost the same
    np.testing.assert_allclose(sol.violation.lb, lb / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"elastic": {"G": np.ones(3)}}, r"elastic\['G'\] has shape \(3,\); expected \(..., m\) with m = 2"),
        ({"elastic": {"A": 1.0}}, r"elastic\['A'\] was given, but the problem has no A"),
        ({"elastic": {"bounds": 1.0}}, r"elastic\['bounds'\] was given, but the problem has no bounds"),
        ({"elastic": {"h": 1.0}}, "elastic has 'h'; expected some of"),
        ({"elastic": np.ones(2)}, "elastic is a ndarray; expected a number"),
        ({"elastic": True}, "elastic is a bool; expected a number"),
        ({"elastic": -1.0}, r"elastic\['G'\] has NaN or negative entries; a price is"),
        ({"elastic": {"G": [1.0, np.nan]}}, r"elastic\['G'\]\[1\] = nan"),
        ({"elastic_quadratic": np.inf}, r"elastic_quadratic\['G'\] has NaN, negative or infinite entries"),
    ],
)
def test_bad_prices(options, error):
    with pytest.raises((TypeError, ValueError), match=error):
        qpdiff.solve_qp(np.eye(2), np.zeros(2), np.ones((2, 2)), np.zeros(2), **options)


def test_a_number_needs_rows():
    with pytest.raises(ValueError, match=r"elastic is a number, .* but the problem has neither"):
        qpdiff.solve_qp(np.eye(2), np.zeros(2), lb=np.zeros(2), elastic=1.0)


@pytest.mark.parametrize("prices", [1.0, {"G": np.ones((0, 2)), "bounds": 1.0}], ids=["number", "of each problem"])
def test_no_problems(prices):
    """Of some rows each problem has its own, and all share the others."""
    problem = {"Q": np.eye(3), "q": np.ones((0, 3)), "G": np.ones((0, 2, 3)), "h": np.ones((0, 2)), "lb": np.zeros(3)}
    sol = qpdiff.solve_qp(**problem, elastic=prices)
    assert (sol.x.shape, sol.violation.G.shape, sol.violation.lb.shape) == ((0, 3), (0, 2), (0, 3))
    gradients, tangents = qpdiff.vjp(sol, x=sol.x, objective=np.ones(0)), qpdiff.jvp(sol, q=sol.x, elastic=1.0)
    np.testing.assert_array_equal(gradients.Q, np.zeros((3, 3)))
    assert tangents.x.shape == (0, 3)


@pytest.mark.parametrize("quadratic", [False, True], ids=["linear", "both"])
@pytest.mark.parametrize("batch", [3, 24], ids=["one by one", "in groups"])
@pytest.mark.parametrize("parts", ["G h", "A b", "G h A b lb ub"])
def test_sparse_matrices(parts, batch, quadratic, monkeypatch):
    monkeypatch.setattr("qpdiff.engines.compiled.sparse_engine.suits", lambda problem: True, raising=False)
    rng = np.random.default_rng(13)
    dense, sparse_one = with_zeros(rng, contradictory(rng, parts, batch=(batch,), n=6, m=7, p=4))
    elastic = random_prices(rng, dense)
    sigma = random_prices(rng, dense, quadratic=True) if quadratic else None
    sol = qpdiff.solve_qp(**sparse_one, elastic=elastic, elastic_quadratic=sigma)
    assert np.all(sol.status == Status.SOLVED)
    assert max(optimality(dense, sol, elastic, sigma)) < 1e-8
    expected = qpdiff.solve_qp(**dense, elastic=elastic, elastic_quadratic=sigma)
    for name in ("x", "y", "z", "z_lb", "z_ub", "objective"):
        np.testing.assert_allclose(getattr(sol, name), getattr(expected, name), atol=1e-6)
    for one, other in zip(sol.violation, expected.violation, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_allclose(one, other, atol=1e-6)


def test_sparse_problems_that_prices_do_not_help(monkeypatch):
    monkeypatch.setattr("qpdiff.engines.compiled.sparse_engine.suits", lambda problem: True, raising=False)
    G, h = sparse.csr_array([[1.0], [-1.0], [1.0], [-1.0]]), np.array([0.0, -1.0, 5.0, -7.0])
    sol = qpdiff.solve_qp(np.eye(1), [0.0], G, h, elastic={"G": [np.inf, np.inf, 1.0, 1.0]})
    assert sol.status == Status.PRIMAL_INFEASIBLE
    np.testing.assert_allclose(sol.z, [1.0, 1.0, 0.0, 0.0], atol=1e-6)
    rng = np.random.default_rng(9)
    G, q = rng.normal(size=(4, 3)), rng.normal(size=3)
    for w, status in ((0.01, Status.DUAL_INFEASIBLE), (1e3, Status.SOLVED)):
        matrices = sparse.csr_array((3, 3)), q, sparse.csr_array(np.concatenate([G, -G]))
        assert qpdiff.solve_qp(*matrices, np.ones(8), elastic=w).status == status
