"""Layers of cvxpylayers on this package's solver: values and gradients."""

import numpy as np
import pytest

cp = pytest.importorskip("cvxpy")
torch = pytest.importorskip("torch")
pytest.importorskip("cvxpylayers.torch", exc_type=ImportError)

from cvxpylayers.torch import CvxpyLayer

from qpdiff.cvxpylayers import LayerSolver


def least_squares():
    A, b, x = cp.Parameter((6, 3)), cp.Parameter(6), cp.Variable(3)
    return cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b) + cp.sum_squares(x))), [A, b], [x]


def relu():
    point, x = cp.Parameter(4), cp.Variable(4)
    return cp.Problem(cp.Minimize(cp.sum_squares(x - point)), [x >= 0]), [point], [x]


def optnet():
    """The problem of the OptNet paper, with the multipliers."""
    root, q, A, b, G, h = (cp.Parameter(shape) for shape in ((4, 4), 4, (1, 4), 1, (3, 4), 3))
    x = cp.Variable(4)
    constraints = [A @ x == b, G @ x <= h]
    cost = cp.Minimize(cp.sum_squares(root @ x) / 2 + cp.sum_squares(x) / 2 + q @ x)
    duals = [constraint.dual_variables[0] for constraint in constraints]
    return cp.Problem(cost, constraints), [root, q, A, b, G, h], [x, *duals]


def lasso():
    A, b, weight, x = cp.Parameter((6, 3)), cp.Parameter(6), cp.Parameter(nonneg=True), cp.Variable(3)
    cost = cp.Minimize(cp.sum_squares(A @ x - b) + weight * cp.norm1(x))
    return cp.Problem(cost, [cp.sum(x) == 1]), [A, b, weight], [x]


def linear_program():
    cost, side, x = cp.Parameter(3), cp.Parameter(), cp.Variable(3)
    return cp.Problem(cp.Minimize(cost @ x), [cp.sum(x) == side, x >= 0]), [cost, side], [x]


def matrix_variable():
    point, X = cp.Parameter((2, 3)), cp.Variable((2, 3))
    return cp.Problem(cp.Minimize(cp.sum_squares(X - point)), [cp.sum(X, axis=0) == 1, X <= 0.7]), [point], [X]


def parametric_hessian():
    P, q, x = cp.Parameter((3, 3), PSD=True), cp.Parameter(3), cp.Variable(3)
    return cp.Problem(cp.Minimize(cp.quad_form(x, P) + q @ x), [x <= 0.1]), [P, q], [x]


PROBLEMS = [least_squares, relu, optnet, lasso, linear_program, matrix_variable]
EXACT = {"eps": 1e-10, "max_iters": 100000}
"""For the default solver, SCS, whose solutions are otherwise good to some 1e-4."""


def values_of(parameters, rng, batch):
    """Values of the parameters; the last one, where there are several, is without batch axis."""
    shared = parameters[-1] if len(parameters) > 1 else None
    for parameter in parameters:
        value = rng.uniform(0.2, 1.0, (*(() if parameter is shared else batch), *parameter.shape))
        yield value + 2 * rng.uniform(-1, 0, value.shape) * (parameter.ndim == 2)


def weighted(outputs):
    """A sum in which every entry of every output has a weight of its own."""
    weights = (torch.cos(torch.arange(float(value.numel()))).reshape(value.shape) for value in outputs)
    return sum((weight * value).sum() for weight, value in zip(weights, outputs, strict=True))


def in_torch(make, values, solver, **options):
    problem, parameters, variables = make()
    layer = CvxpyLayer(problem, parameters=parameters, variables=variables, solver=solver)
    tensors = [torch.tensor(value, requires_grad=True) for value in values]
    outputs = layer(*tensors, solver_args=options)
    weighted(outputs).backward()
    return [value.detach().numpy() for value in outputs], [tensor.grad.numpy() for tensor in tensors]


@pytest.fixture(params=["dense", "sparse"])
def matrices(request, monkeypatch):
    """Arrays, as the matrices of small problems are, or sparse ones."""
    if request.param == "sparse":
        monkeypatch.setattr("qpdiff.cvxpylayers.keeps_sparse", lambda numbers, entries: True)


@pytest.mark.usefixtures("matrices")
@pytest.mark.parametrize("batch", [(), (4,)], ids=["one", "batch"])
@pytest.mark.parametrize("make", PROBLEMS)
def test_values_and_gradients_equal_those_of_the_default_solver(make, batch):
    values = list(values_of(make()[1], np.random.default_rng(0), batch))
    ours = in_torch(make, values, LayerSolver())
    default = in_torch(make, values, None, **EXACT)
    for mine, theirs in zip(ours, default, strict=True):
        for value, expected in zip(mine, theirs, strict=True):
            np.testing.assert_allclose(value, expected, atol=1e-5 * (1 + np.max(np.abs(expected))))


@pytest.mark.usefixtures("matrices")
def test_gradients_of_a_parametric_hessian_equal_differences():
    rng = np.random.default_rng(1)
    half, direction = rng.normal(size=(2, 4, 3, 3))
    P, direction = half @ half.mT + np.eye(3), direction + direction.mT
    q, step = rng.normal(size=(4, 3)), 1e-5

    def solved(P):
        return in_torch(parametric_hessian, [P, q], LayerSolver(), tol=1e-11)

    (x,), (of_P, _) = solved(P)
    (ahead,), _ = solved(P + step * direction)
    (behind,), _ = solved(P - step * direction)
    change = (ahead - behind) / (2 * step) * np.cos(np.arange(12.0).reshape(x.shape))
    assert change.sum() == pytest.approx(np.sum(of_P * direction), rel=1e-4)


def test_types_are_those_of_the_default_solver():
    point = np.array([0.5, -1.0, 2.0, 0.1], dtype=np.float32)
    ours, default = (in_torch(relu, [point], solver) for solver in (LayerSolver(), None))
    for (mine,), (theirs,) in zip(ours, default, strict=True):
        assert mine.dtype == theirs.dtype
    np.testing.assert_allclose(ours[0][0], np.maximum(point, 0), atol=1e-6)


@pytest.mark.parametrize(
    ("cost", "cone"),
    [(cp.norm2, "second-order cone"), (lambda x: cp.sum(cp.exp(x)), "exponential cone"),
     (lambda x: cp.lambda_max(cp.diag(x)), "cone of positive semidefinite matrices"),
     (lambda x: cp.sum(cp.power(x, 2.7, approx=False)), "power cone")],
)  # fmt: skip
def test_other_cones_are_named(cost, cone):
    x, point = cp.Variable(3), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cost(x)), [x >= point])
    with pytest.raises(ValueError, match=f"not a QP, it needs the {cone}"):
        CvxpyLayer(problem, parameters=[point], variables=[x], solver=LayerSolver())


def test_a_solver_serves_one_layer():
    solver = LayerSolver()
    in_torch(relu, [np.ones(4)], solver)
    with pytest.raises(ValueError, match="one for each layer"):
        in_torch(relu, [np.ones(4)], solver)


def test_an_infeasible_problem_raises():
    message = (
        r"1 of 2 problems not solved; the first is problem 1: PRIMAL_INFEASIBLE\. The function of qpdiff\.from_cvxpy"
    )
    with pytest.raises(RuntimeError, match=message):
        in_torch(linear_program, [np.ones((2, 3)), np.array([1.0, -1.0])], LayerSolver())
