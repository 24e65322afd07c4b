"""The HIPS autograd adapter against autograd's own numerical checker, to second order."""

import numpy as np
import pytest
import scipy.sparse as sp

pytest.importorskip("autograd")
import autograd.numpy as anp
from autograd import grad, jacobian
from autograd.test_util import check_grads
from problems import mostly_active, relaxed, strictly_feasible
from sparse_problems import as_sparse, smooth_sparse

import qpdiff
import qpdiff.autograd

TIGHT = {"tol": 1e-12, "rtol": 1e-13}


@pytest.fixture(autouse=True)
def directions():
    """The checker draws directions from NumPy's global generator; for one in 150 its own differences are too coarse."""
    np.random.seed(0)  # noqa: NPY002


@pytest.mark.parametrize("parts", ["", "A", "G", "A G", "lb", "ub", "lb ub", "A lb ub", "A G lb ub"])
@pytest.mark.parametrize("seed", [0, 1])
def test_first_and_second_derivatives(parts, seed):
    operands = mostly_active(np.random.default_rng(seed), parts.split())
    names = tuple(operands)

    def loss(*values):
        given = dict(zip(names, values, strict=True))
        given["Q"] = (given["Q"] + anp.swapaxes(given["Q"], -1, -2)) / 2
        sol = qpdiff.autograd.solve_qp(**given, **TIGHT)
        return (
            anp.sum(anp.sin(sol.x))
            + anp.sum(sol.y**2)
            + anp.sum(sol.z**2)
            + 2 * anp.sum(sol.z_lb)
            - anp.sum(sol.z_ub**2)
        )

    check_grads(loss, modes=["rev"], order=2)(*operands.values())


@pytest.mark.parametrize("parts", ["", "A G", "A G lb ub"])
def test_derivatives_of_the_optimal_value(parts):
    operands = mostly_active(np.random.default_rng(5), parts.split())
    names = tuple(operands)

    def loss(*values):
        given = dict(zip(names, values, strict=True))
        given["Q"] = (given["Q"] + anp.swapaxes(given["Q"], -1, -2)) / 2
        return anp.sum(anp.sin(qpdiff.autograd.solve_qp(**given, **TIGHT).objective))

    check_grads(loss, modes=["rev"], order=2)(*operands.values())


def test_optimal_value_of_unsolved_problems():
    h = np.array([1.0, -2.0])[:, None] * np.ones((1, 2))

    def loss(q, unsolved):
        G = np.array([[1.0], [-1.0]])
        return anp.sum(qpdiff.autograd.solve_qp([[1.0]], q, G, h, unsolved=unsolved).objective)

    assert np.isnan(grad(loss)(np.full((2, 1), -0.5), "nan")[:, 0]).tolist() == [False, True]
    np.testing.assert_allclose(grad(loss)(np.full((2, 1), -0.5), "zero")[:, 0], [0.5, 0.0], atol=1e-6)


def test_fixed_and_infinite_bounds():
    lb, ub = np.array([0.3, -np.inf, -1.0]), np.array([0.3, 1.0, np.inf])

    def loss(q, A):
        sol = qpdiff.autograd.solve_qp(np.diag([1.0, 2.0, 3.0]), q, A=A, b=[0.5], lb=lb, ub=ub, **TIGHT)
        return anp.sum(sol.x**3) + sol.z_lb[0] ** 2 + sol.z_ub[0] ** 2

    check_grads(loss, modes=["rev"], order=2)(np.array([1.0, -2.0, 0.3]), np.array([[1.0, 1.0, -1.0]]))


def test_numbers_as_bounds():
    Q, q = np.diag([1.0, 2.0, 3.0]), np.array([[3.0, -2.0, 0.1], [-4.0, 2.0, 6.0]])

    def loss(q, lb, ub):
        sol = qpdiff.autograd.solve_qp(Q, q, lb=lb, ub=ub, **TIGHT)
        return anp.sum(anp.sin(sol.x)) + anp.sum(sol.z_lb**2) - anp.sum(sol.z_ub**2)

    check_grads(loss, modes=["rev"], order=2)(q, -0.9, 0.7)
    check_grads(loss, modes=["rev"], order=2)(q, np.array(-0.9), np.full(3, 0.7))
    x = jacobian(lambda ub: anp.sum(qpdiff.autograd.solve_qp(Q, q, lb=-0.9, ub=ub, **TIGHT).x))(np.array(0.7))
    np.testing.assert_allclose(x, 2.0)  # the variables at the bound
    assert np.shape(x) == ()


def test_jacobian_of_a_projection_onto_the_simplex():
    def project(point):
        return qpdiff.autograd.solve_qp(np.eye(3), -point, A=np.ones((1, 3)), b=[1.0], lb=np.zeros(3)).x

    # Where all of the simplex's coordinates are positive the projection is onto its plane.
    np.testing.assert_allclose(jacobian(project)(np.array([0.4, 0.5, 0.3])), np.eye(3) - 1 / 3, atol=1e-6)


@pytest.mark.parametrize("shared", [(), ("Q", "G", "A", "q")], ids=["batch", "shared"])
@pytest.mark.parametrize("output", ["solution", "objective", "relaxed"])
def test_sparse_operands(shared, output):
    operands, masks = smooth_sparse(6, "G A lb", shared=shared, batch=(2,), n=4, m=3, p=1)
    sparse = {name: as_sparse(operands[name], mask) for name, mask in masks.items()}
    names = tuple(operands)
    values = {name: sparse[name].values if name in sparse else value for name, value in operands.items()}

    def loss(*values):
        given = dict(zip(names, values, strict=True))
        given["Q"] = (given["Q"] + given["Q"][..., sparse["Q"].pattern.mirror]) / 2
        given |= {name: qpdiff.Sparse.like(matrix, given[name]) for name, matrix in sparse.items()}
        sol = qpdiff.autograd.solve_qp(**given, **TIGHT, smoothing=1e-2 if output == "relaxed" else None)
        if output == "objective":
            return anp.sum(anp.sin(sol.objective))
        return anp.sum(anp.sin(sol.x)) + anp.sum(sol.y**2) + anp.sum(sol.z**2) + 2 * anp.sum(sol.z_lb)

    if output != "relaxed":
        check_grads(loss, modes=["rev"], order=2)(*values.values())
        return
    sol = qpdiff.solve_qp(**(operands | sparse), **TIGHT)
    expected = qpdiff.vjp(sol, x=np.cos(sol.x), y=2 * sol.y, z=2 * sol.z, z_lb=2 + 0 * sol.z_lb, smoothing=1e-2)
    for i, name in enumerate(names):
        gradient = getattr(expected, name)
        gradient = gradient.values if name in sparse else gradient
        np.testing.assert_allclose(grad(loss, i)(*values.values()), gradient, rtol=1e-6, atol=1e-6)


def test_sparse_matrices_beside_what_is_differentiated():
    G, h, point = sp.csc_array([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]), np.array([0.5, 3.0]), np.array([1.0, 2.0, 1.0])
    project = lambda point, G: qpdiff.autograd.solve_qp(sp.eye_array(3).tocsr(), -point, G, h).x  # noqa: E731
    expected = jacobian(project)(point, G.toarray())
    np.testing.assert_allclose(jacobian(project)(point, G), expected, atol=1e-7)
    loss = lambda values: anp.sum(project(point, qpdiff.Sparse.like(G, values)))  # noqa: E731
    with pytest.raises(TypeError, match=r"^the matrix has values of the type autograd.*; give the entries by rows"):
        grad(loss)(G.data)


def test_matches_vjp():
    operands = mostly_active(np.random.default_rng(2), ["A", "G"])
    cotangent = np.random.default_rng(3).normal(size=(2, 4))
    by_hand = qpdiff.vjp(qpdiff.solve_qp(**operands), x=cotangent)
    for name in operands:
        fun = lambda value, name=name: anp.sum(  # noqa: E731
            cotangent * qpdiff.autograd.solve_qp(**(operands | {name: value})).x
        )
        np.testing.assert_allclose(grad(fun)(operands[name]), getattr(by_hand, name), rtol=1e-9, atol=1e-12)


def test_float32_operands_are_solved_in_float64():
    operands = mostly_active(np.random.default_rng(4), ["A", "G", "lb"])
    single = {name: value.astype(np.float32) for name, value in operands.items()}
    precise = {name: value.astype(np.float64) for name, value in single.items()}

    def loss(q, operands):
        sol = qpdiff.autograd.solve_qp(**(operands | {"q": q}))
        return anp.sum(sol.x**3) + anp.sum(sol.z_lb**2) + anp.sum(sol.y * sol.z[:, :1])

    sol, exact = (qpdiff.autograd.solve_qp(**o) for o in (single, precise))
    assert {getattr(sol, name).dtype for name in ("x", "y", "z", "z_lb", "z_ub", "s")} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(sol.z, exact.z.astype(np.float32))
    for derivative in (grad(loss), jacobian(grad(loss))):
        one, other = (derivative(o["q"], o) for o in (single, precise))
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_unsolved():
    q, h = np.ones((3, 1)), np.array([[1.0, 1.0], [1.0, -2.0], [1.0, -2.0]])
    G = np.array([[1.0], [-1.0]])

    def loss(q, unsolved):
        return anp.sum(qpdiff.autograd.solve_qp([[1.0]], q, G, h, unsolved=unsolved).x)

    with pytest.raises(RuntimeError, match="2 of 3 problems not solved; the first is problem 1: PRIMAL_INFEASIBLE"):
        loss(q, "raise")
    assert np.isnan(grad(loss)(q, "nan")[1:]).all()
    np.testing.assert_array_equal(grad(loss)(q, "zero")[1:], 0.0)
    with pytest.raises(ValueError, match="unsolved"):
        loss(q, "ignore")


@pytest.mark.parametrize("smoothing", [None, 0.1])
def test_a_problem_without_numbers_leaves_derivatives_by_shared_operands_alone(smoothing):
    shared = {name: value[0] for name, value in strictly_feasible(np.random.default_rng(3), "A G").items()}
    q = np.random.default_rng(4).normal(size=(3, 5))
    directions = {name: np.random.default_rng(5).normal(size=shared[name].shape) for name in ("Q", "G", "A")}
    directions["Q"] = directions["Q"] + directions["Q"].mT

    def derivatives(h):
        def loss(t):
            moved = {name: shared[name] + t * direction for name, direction in directions.items()}
            operands = shared | moved | {"q": q, "h": h}
            sol = qpdiff.autograd.solve_qp(**operands, unsolved="zero", smoothing=smoothing, check=False, **TIGHT)
            return sum(anp.sum(anp.sin(value[[0, 2]])) for value in (sol.x, sol.z, sol.objective)) + 0 * anp.sum(sol.x)

        return grad(loss)(0.0), grad(grad(loss))(0.0)

    h = np.ones((3, 4))
    expected = derivatives(h)
    h[1] = np.nan
    np.testing.assert_allclose(derivatives(h), expected, rtol=1e-6)


@pytest.mark.parametrize("parts", ["G", "A G lb ub"])
@pytest.mark.parametrize("kappa", [0.01, 1.0])
def test_smoothing_against_differences_of_the_relaxed_solution(parts, kappa):
    rng = np.random.default_rng(6)
    operands = strictly_feasible(rng, parts)
    directions = {name: rng.normal(size=value.shape) for name, value in operands.items()}
    directions["Q"] = directions["Q"] + directions["Q"].mT
    weights = rng.normal(size=operands["q"].shape)

    def along(t):
        return {name: value + t * directions[name] for name, value in operands.items()}

    def loss(t):
        sol = qpdiff.autograd.solve_qp(**along(t), smoothing=kappa, **TIGHT)
        return anp.sum(weights * sol.x) + anp.sum(sol.objective)

    def relaxed_loss(t):
        d, total = along(t), 0.0
        for i, weight in enumerate(weights):
            one = {name: value[i] for name, value in d.items()}
            x = relaxed(one, kappa)[0]
            total += weight @ x + 0.5 * x @ one["Q"] @ x + one["q"] @ x
        return total

    exact = qpdiff.solve_qp(**operands, **TIGHT)
    np.testing.assert_allclose(loss(0.0), np.sum(weights * exact.x) + np.sum(exact.objective), rtol=1e-12)
    step = 1e-4
    below, at, above = (relaxed_loss(t) for t in (-step, 0.0, step))
    np.testing.assert_allclose(grad(loss)(0.0), (above - below) / (2 * step), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(grad(grad(loss))(0.0), (above - 2 * at + below) / step**2, rtol=1e-3, atol=1e-3)


def test_unsolved_problems_add_nothing_to_the_gradient_of_a_smoothed_value():
    """Where q < 0, Q = 0 and x ≤ 0, the relaxed x is κ / q; where q > 0 the problem is unbounded."""

    def loss(Q, q, unsolved):
        sol = qpdiff.autograd.solve_qp(Q, q, ub=anp.zeros(2), unsolved=unsolved, smoothing=0.1)
        return anp.sum(sol.objective)

    q = anp.array([[1.0, 1.0], [-1.0, -1.0]])
    of_Q = grad
    np.testing.assert_allclose(of_Q(loss)(anp.zeros((2, 2)), q, "zero"), np.full((2, 2), -0.005), atol=1e-6)
    assert np.all(np.isnan(of_Q(loss)(anp.zeros((2, 2)), q, "nan")))
