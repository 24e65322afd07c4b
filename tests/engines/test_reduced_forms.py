"""Each reduced KKT system of the array engine against a dense solve of the whole one."""

import numpy as np
import pytest
from problems import random_problem

from qpdiff.engines.array.kkt import Diagonals, residual, solve_refined
from qpdiff.engines.array.reduced_forms import DenseDualForm, DiagonalDualForm, PrimalForm
from qpdiff.problem import OPERANDS
from qpdiff.validation import make_problem

CASES = [(PrimalForm, parts, cost) for parts in ("", "A G", "lb", "A G lb ub") for cost in ("pd", "lp")]
CASES += [(DenseDualForm, parts, "pd") for parts in ("A", "G", "A G")]
CASES += [(DiagonalDualForm, parts, "diagonal") for parts in ("A lb", "G lb", "A G ub", "A G lb ub")]
SHAPES = [(1, 1, 1), (3, 8, 1), (6, 5, 2), (12, 3, 4), (25, 30, 5)]  # n, m, p


def make(operands, xp=None):
    to = xp.asarray if xp else np.asarray
    return make_problem({name: to(operands[name]) if name in operands else None for name in OPERANDS})


def parts_of(form):
    """Constraints that the form takes."""
    return "A lb" if form is DiagonalDualForm else "A"


def constraint_matrix(operands):
    """K: the rows of A, of G, of −I for lb, and of I for ub, where they are given; and which of them exist."""
    batch, n = operands["q"].shape
    eye = np.broadcast_to(np.eye(n), (batch, n, n))
    given = {"b": operands.get("A"), "h": operands.get("G"), "lb": -eye, "ub": eye}
    given = {name: matrix for name, matrix in given.items() if name in operands}
    rows = [np.broadcast_to(matrix, (batch, *matrix.shape[-2:])) for matrix in given.values()]
    exist = [np.isfinite(np.broadcast_to(operands[name], (batch, operands[name].shape[-1]))) for name in given]
    return np.concat([np.zeros((batch, 0, n)), *rows], axis=1), np.concat([np.zeros((batch, 0), bool), *exist], axis=1)


def draw_system(rng, form, operands):
    """Draw diagonals θ, ρ, δ, where θ is infinite for constraints that do not exist, and right-hand sides."""
    (batch, n), (K, exists) = operands["q"].shape, constraint_matrix(operands)
    theta = np.where(exists, 10.0 ** rng.uniform(-4, 4, size=exists.shape), np.inf)
    theta[:, : operands["b"].shape[-1] if "b" in operands else 0] = 0.0
    rho = 10.0 ** rng.uniform(-6, -3, size=(batch, n)) * (form is PrimalForm)  # a definite Q needs none
    delta = 10.0 ** rng.uniform(-6, -3, size=exists.shape)
    return K, (theta, rho, delta), rng.normal(size=(batch, n)), rng.normal(size=exists.shape)


def dense_solution(Q, K, diagonals, r_x, r_v):
    """Solve [Q + diag(ρ), Kᵀ; K, −diag(θ + δ)] without the constraints that do not exist, whose multipliers are 0."""
    dx, dv = np.zeros_like(r_x), np.zeros_like(r_v)
    Q = np.broadcast_to(Q, (len(r_x), *Q.shape[-2:]))
    for i, (theta, rho, delta) in enumerate(zip(*diagonals, strict=True)):
        rows = np.isfinite(theta)
        M = np.block([[Q[i] + np.diag(rho), K[i][rows].T], [K[i][rows], -np.diag((theta + delta)[rows])]])
        dx[i], dv[i, rows] = np.split(np.linalg.solve(M, np.concat([r_x[i], r_v[i][rows]])), [len(rho)])
    return dx, dv


def assert_close(found, expected, accuracy):
    """Compare entry by entry, relative to the largest entry of each problem."""
    scale = np.max(np.abs(expected), axis=-1, keepdims=True, initial=1e-12)
    assert np.max(np.abs(found - expected) / scale, initial=0.0) <= accuracy


@pytest.mark.parametrize(("form", "parts", "cost"), CASES)
@pytest.mark.parametrize("shared", [(), ("Q", "G", "A")], ids=["own", "shared"])
def test_solves_the_whole_system(xp, form, parts, cost, shared):
    rng = np.random.default_rng(0)
    operands = random_problem(rng, parts, cost=cost, batch=(30,), shared=shared, infinite=0.3)
    check(rng, form, operands, xp)


@pytest.mark.parametrize(("form", "parts", "cost"), CASES)
@pytest.mark.parametrize(("n", "m", "p"), SHAPES)
def test_shapes(form, parts, cost, n, m, p):
    rng = np.random.default_rng(n)
    check(rng, form, random_problem(rng, parts, cost=cost, batch=(100,), n=n, m=m, p=p, infinite=0.1))


def check(rng, form, operands, xp=None):
    to, back = (xp.asarray, xp.to_numpy) if xp else (np.asarray, np.asarray)
    K, diagonals, r_x, r_v = draw_system(rng, form, operands)
    expected = dense_solution(operands["Q"], K, diagonals, r_x, r_v)
    problem = make(operands, xp)
    given, r_x, r_v = Diagonals(*map(to, diagonals)), to(r_x), to(r_v)
    with np.errstate(all="ignore"):
        reduced, safe = form.prepare(problem)
        factor, factor_ok = reduced.factor(given)
        eliminated = reduced.eliminate(factor, r_x)
        solution = reduced.solve(factor, eliminated, r_v)
        multipliers = reduced.solve_multipliers(factor, eliminated, r_v)
        once_more = solve_refined(
            reduced, given, factor, (r_x, eliminated, r_v), to(np.ones((len(expected[0]), 1), bool))
        )
        left = residual(problem, given, r_x, r_v, *once_more)
    assert np.all(back(factor_ok))
    assert safe is None or np.all(back(safe)) or cost_is_ill_conditioned(form, operands)
    for one, other in zip(solution, expected, strict=True):
        assert_close(back(one), other, 1e-3)
    np.testing.assert_array_equal(back(multipliers), back(solution[1]))
    for one, other in zip(once_more, expected, strict=True):
        assert_close(back(one), other, 1e-7)
    size = max(1.0, *(float(np.max(np.abs(part), initial=0.0)) for part in expected))
    assert all(np.max(np.abs(back(part)), initial=0.0) <= 1e-7 * size for part in left)


def cost_is_ill_conditioned(form, operands):
    """Some of many random Q are too ill-conditioned for a dual form."""
    return form is not PrimalForm and np.max(np.linalg.cond(operands["Q"])) > 1e4


@pytest.mark.parametrize(("form", "parts", "cost"), [case for case in CASES if case[1]])
def test_some_problems_of_a_batch(form, parts, cost):
    rng = np.random.default_rng(1)
    operands = random_problem(rng, parts, cost=cost, batch=(9,))
    _, diagonals, r_x, r_v = draw_system(rng, form, operands)
    index = np.asarray([7, 2, 3])
    problem = make(operands)
    whole, _ = form.prepare(problem)
    some = whole.select(problem.select(index), index)
    solutions = []
    for reduced, rows in ((whole, slice(None)), (some, index)):
        factor, _ = reduced.factor(Diagonals(*(d[rows] for d in diagonals)))
        solutions.append(reduced.solve(factor, reduced.eliminate(factor, r_x[rows]), r_v[rows]))
    for of_all, of_some in zip(*solutions, strict=True):
        np.testing.assert_allclose(of_some, of_all[index], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", [PrimalForm, DenseDualForm, DiagonalDualForm])
def test_a_matrix_that_is_not_definite_is_reported_for_its_problem_alone(form):
    rng = np.random.default_rng(2)
    operands = random_problem(rng, parts_of(form), cost="diagonal", batch=(5,))
    _, (theta, rho, delta), r_x, r_v = draw_system(rng, form, operands)
    reduced, _ = form.prepare(make(operands))
    rho[3] = -100.0
    if form is not PrimalForm:
        theta[3] = -1e6
    with np.errstate(all="ignore"):
        factor, factor_ok = reduced.factor(Diagonals(theta, rho, delta))
        reduced.solve(factor, reduced.eliminate(factor, r_x), r_v)
    assert np.flatnonzero(~factor_ok[:, 0]).tolist() == [3]


@pytest.mark.parametrize("form", [DenseDualForm, DiagonalDualForm])
def test_a_cost_without_curvature_is_not_safe(form):
    rng = np.random.default_rng(3)
    operands = random_problem(rng, parts_of(form), cost="diagonal", batch=(5,))
    operands["Q"][2, 4, 4] = 0.0
    _, safe = form.prepare(make(operands))
    assert np.flatnonzero(~safe).tolist() == [2]
