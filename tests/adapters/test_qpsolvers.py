"""qpsolvers calls this package's solver, and its problems and solutions convert both ways."""

import numpy as np
import pytest
import scipy.sparse as sp

qpsolvers = pytest.importorskip("qpsolvers")

import qpdiff
from qpdiff.qpsolvers import from_problem, from_solution, register, to_problem


@pytest.fixture(autouse=True)
def registered():
    register()


def random_problem(rng, n=5, m=4, p=2, bounds=True):
    """A strictly convex problem with an interior."""
    half, G, A, inside = (rng.normal(size=shape) for shape in ((n, n), (m, n), (p, n), n))
    lb, ub = (inside - rng.uniform(0.1, 1, n), inside + rng.uniform(0.1, 1, n)) if bounds else (None, None)
    constraints = (G, G @ inside + rng.uniform(0.1, 1, m), A, A @ inside)
    return qpsolvers.Problem(half @ half.T + np.eye(n), rng.normal(size=n), *constraints, lb, ub)


def check_optimal(solution, atol=1e-6):
    """Check the KKT conditions by qpsolvers' own residuals and, for the signs, by the definition."""
    assert solution.found
    assert solution.is_optimal(atol)
    P, q, G, h, A, _, lb, ub = solution.problem.unpack_as_dense()
    stationarity = P @ solution.x + q
    for matrix, multipliers in ((G, solution.z), (A, solution.y)):
        stationarity = stationarity + (0 if matrix is None else np.atleast_2d(matrix).T @ multipliers)
    if lb is not None or ub is not None:
        stationarity = stationarity + solution.z_box
    np.testing.assert_allclose(stationarity, 0, atol=atol)
    if h is not None:
        assert np.all(solution.z >= 0)


def test_it_is_among_the_solvers_once():
    register()
    assert qpsolvers.available_solvers.count("qpdiff") == 1
    assert qpsolvers.dense_solvers.count("qpdiff") == 1
    assert qpsolvers.sparse_solvers.count("qpdiff") == 1


@pytest.mark.parametrize("bounds", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_solutions_equal_those_of_quadprog(seed, bounds):
    pytest.importorskip("quadprog")
    problem = random_problem(np.random.default_rng(seed), bounds=bounds)
    ours, theirs = (qpsolvers.solve_problem(problem, name) for name in ("qpdiff", "quadprog"))
    check_optimal(ours)
    for name in ("x", "y", "z", "z_box"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=1e-6)
    assert ours.obj == pytest.approx(theirs.obj, abs=1e-6)


@pytest.mark.parametrize("sparse", [sp.csc_matrix, sp.csc_array], ids=["matrix", "array"])
def test_sparse_matrices(sparse):
    dense = random_problem(np.random.default_rng(0))
    P, q, G, h, A, b, lb, ub = dense.unpack()
    x = qpsolvers.solve_qp(sparse(P), q, sparse(G), h, sparse(A), b, lb, ub, solver="qpdiff")
    np.testing.assert_allclose(x, qpsolvers.solve_qp(*dense.unpack(), solver="qpdiff"), atol=1e-9)


def test_one_constraint_as_a_vector():
    # minimise ½‖x‖² − x₁ − x₂ with x₁ + x₂ ≤ 1: x = (½, ½), z = ½
    row, side = np.ones(2), np.ones(1)
    solution = qpsolvers.solve_problem(qpsolvers.Problem(np.eye(2), -np.ones(2), row, side), "qpdiff")
    np.testing.assert_allclose(solution.x, [0.5, 0.5], atol=1e-7)
    np.testing.assert_allclose(solution.z, [0.5], atol=1e-7)
    assert solution.y.shape == solution.z_box.shape == (0,)


def test_lower_and_upper_bounds_alone():
    for bounds, expected in (({"lb": np.ones(1)}, 1.0), ({"ub": -np.ones(1)}, -1.0)):
        solution = qpsolvers.solve_problem(qpsolvers.Problem(np.eye(1), np.zeros(1), **bounds), "qpdiff")
        check_optimal(solution)
        np.testing.assert_allclose(solution.x, expected, atol=1e-7)
        assert np.sign(solution.z_box) == -expected  # negative at a lower bound


def test_infeasible_is_not_found():
    impossible = np.array([[1.0], [-1.0]]), np.array([-1.0, -1.0])
    problem = qpsolvers.Problem(np.eye(1), np.zeros(1), *impossible)
    solution = qpsolvers.solve_problem(problem, "qpdiff")
    assert solution.found is False
    assert solution.x is None
    assert solution.extras["status"] == qpdiff.Status.PRIMAL_INFEASIBLE
    assert qpsolvers.solve_qp(*problem.unpack(), solver="qpdiff") is None
    with pytest.raises(ValueError, match="not found"):
        from_solution(solution)


def test_bad_operands_raise_an_error_of_qpsolvers():
    with pytest.raises(qpsolvers.ProblemError, match="Q"):
        qpsolvers.solve_qp(-np.eye(2), np.ones(2), solver="qpdiff")


def test_options_reach_the_solver():
    problem = random_problem(np.random.default_rng(1))
    solution = qpsolvers.solve_problem(problem, "qpdiff", max_iterations=1)
    assert solution.extras["status"] == qpdiff.Status.MAX_ITERATIONS


@pytest.mark.parametrize("bounds", [True, False])
def test_problems_convert_both_ways(bounds):
    problem = random_problem(np.random.default_rng(2), bounds=bounds)
    back = to_problem(**from_problem(problem))
    for ours, theirs in zip(back.unpack(), problem.unpack(), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            np.testing.assert_array_equal(ours, theirs)


def test_numbers_stand_for_all_entries():
    problem = to_problem(np.eye(2), np.zeros(2), G=np.eye(2), h=1.0, A=np.ones((1, 2)), b=1.0, lb=0.0, ub=3.0)
    np.testing.assert_allclose(qpsolvers.solve_problem(problem, "qpdiff").x, [0.5, 0.5], atol=1e-7)


def test_what_solve_qp_refuses_is_no_problem_of_theirs():
    with pytest.raises(ValueError, match="h was given without G"):
        qpdiff.qpsolvers.to_problem(np.eye(2), np.ones(2), h=np.ones(1))
    with pytest.raises(ValueError, match=r"b has shape \(2,\)"):
        qpdiff.qpsolvers.to_problem(np.eye(2), np.ones(2), A=np.ones((1, 2)), b=np.ones(2))


def test_a_batch_is_no_problem_of_theirs():
    with pytest.raises(ValueError, match=r"q has shape \(3, 2\)"):
        to_problem(np.eye(2), np.zeros((3, 2)))


@pytest.mark.parametrize("bounds", [True, False])
def test_their_solution_is_a_warm_start(bounds):
    pytest.importorskip("quadprog")
    problem = random_problem(np.random.default_rng(3), bounds=bounds)
    start = from_solution(qpsolvers.solve_problem(problem, "quadprog"))
    assert max(start.primal_residual, start.dual_residual, start.duality_gap) < 1e-8
    cold, warm = (qpdiff.solve_qp(**from_problem(problem), warm_start=point) for point in (None, start))
    np.testing.assert_allclose(warm.x, cold.x, atol=1e-6)
    assert warm.iterations < cold.iterations


def test_a_solution_with_lists_is_a_warm_start():
    pytest.importorskip("clarabel")
    problem = qpsolvers.Problem(np.eye(2), -np.ones(2), A=np.ones((1, 2)), b=np.ones(1))
    start = from_solution(qpsolvers.solve_problem(problem, "clarabel"))
    np.testing.assert_allclose(qpdiff.solve_qp(**from_problem(problem), warm_start=start).x, [0.5, 0.5], atol=1e-7)


def test_the_solution_differentiates():
    problem = random_problem(np.random.default_rng(4))
    sol = qpsolvers.solve_problem(problem, "qpdiff").extras["solution"]
    of_q, step = qpdiff.vjp(sol, x=np.ones(5)).q, 1e-5
    for i in range(5):
        change = step * np.eye(5)[i]
        P, q, *rest = problem.unpack()
        ahead, behind = (
            qpsolvers.solve_qp(P, q + sign * change, *rest, solver="qpdiff", tol=1e-11).sum() for sign in (1, -1)
        )
        assert (ahead - behind) / (2 * step) == pytest.approx(of_q[i], abs=1e-4)


def test_sparse_matrices_stay_sparse():
    n = 300
    D = sp.diags_array([-np.ones(n - 1), np.ones(n - 1)], offsets=[0, 1], shape=(n - 1, n))
    q = -np.cumsum(np.random.default_rng(0).normal(size=n))
    problem = qpsolvers.Problem(sp.eye(n).tobsr(), q, sp.vstack([D, -D]).todia(), np.full(2 * (n - 1), 0.3))
    operands = qpdiff.qpsolvers.from_problem(problem)
    assert operands["Q"].format == operands["G"].format == "csr"
    solution = qpdiff.qpsolvers.solve_problem(problem, tol=1e-8)
    assert solution.is_optimal(1e-6)
    back = qpdiff.qpsolvers.to_problem(**operands | {"Q": qpdiff.Sparse.like(operands["Q"], operands["Q"].data)})
    assert (back.P != problem.P).nnz == (back.G != problem.G).nnz == 0
    with pytest.raises(ValueError, match=r"^Q has shape \(2, 300, 300\); qpsolvers states one problem"):
        qpdiff.qpsolvers.to_problem(qpdiff.Sparse.like(operands["Q"], np.ones((2, n))), q)
