"""CVXPY problems as functions of their parameters, and the solver among CVXPY's own."""

import copy
import pickle
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest

pytest.importorskip("cvxpy")
import cvxpy as cp
from problems import relaxed, rounded_product

import qpdiff
from qpdiff import Status
from qpdiff.problem import OPERANDS

TIGHT = {"tol": 1e-12, "rtol": 1e-13}
CLARABEL = {"solver": "CLARABEL", "tol_gap_abs": 1e-11, "tol_gap_rel": 1e-11, "tol_feas": 1e-11}
BATCH = 3


class Case(NamedTuple):
    """A problem, the values of its parameters with or without a batch axis, and its variables that are unique."""

    problem: object
    values: dict
    variables: list


# ---- problems: CVXPY's parameters wherever its rules allow them, and nearly all of its attributes


def absolute_deviations(rng):
    """The example of the README of cvxpylayers: a linear program once it is canonical."""
    x, A, b = cp.Variable(2), cp.Parameter((4, 2)), cp.Parameter(4)
    problem = cp.Problem(cp.Minimize(0.5 * cp.pnorm(A @ x - b, p=1)), [x >= 0])
    return Case(problem, {A: rng.normal(size=(BATCH, 4, 2)), b: rng.normal(size=(BATCH, 4))}, [x])


def least_squares(rng):
    x, A, b = cp.Variable(3, nonneg=True), cp.Parameter((5, 3)), cp.Parameter(5)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b)))
    return Case(problem, {A: rng.normal(size=(5, 3)), b: rng.normal(size=(BATCH, 5))}, [x])


def optnet(rng):
    """Every matrix and vector a parameter, the cost matrix too."""
    x = cp.Variable(4)
    P, q = cp.Parameter((4, 4), PSD=True), cp.Parameter(4)
    G, h, A, b = cp.Parameter((3, 4)), cp.Parameter(3), cp.Parameter((1, 4)), cp.Parameter(1)
    problem = cp.Problem(cp.Minimize(0.5 * cp.quad_form(x, P) + q @ x), [G @ x <= h, A @ x == b])
    L = rng.normal(size=(BATCH, 4, 4))
    values = {
        P: L @ L.mT + np.eye(4), q: 3 * rng.normal(size=(BATCH, 4)), G: rng.normal(size=(3, 4)),
        h: rng.uniform(0.1, 1.0, size=3), A: rng.normal(size=(BATCH, 1, 4)), b: rng.normal(size=(BATCH, 1)) / 5,
    }  # fmt: skip
    return Case(problem, values, [x])


def portfolio(rng):
    """Maximised, with a factor model, a limit on trades and a constant term."""
    w, f = cp.Variable(5), cp.Variable(2)
    mu, gamma, before = cp.Parameter(5), cp.Parameter(nonneg=True), cp.Parameter(5)
    F, D = rng.normal(size=(2, 5)), rng.uniform(0.5, 1.0, size=5)
    risk = cp.sum_squares(f) + cp.sum_squares(cp.multiply(np.sqrt(D), w))
    constraints = [f == F @ w, cp.sum(w) == 1, w >= -0.1, cp.norm1(w - before) <= 1.5]
    problem = cp.Problem(cp.Maximize(mu @ w - gamma * risk + 7), constraints)
    start = rng.uniform(size=(BATCH, 5))
    values = {mu: rng.normal(size=(BATCH, 5)), gamma: 0.3, before: start / start.sum(-1, keepdims=True)}
    return Case(problem, values, [w])


def elastic_net(rng):
    x, b, lasso, ridge = cp.Variable(4), cp.Parameter(6), cp.Parameter(nonneg=True), cp.Parameter(pos=True)
    M = rng.normal(size=(6, 4))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(M @ x - b) + lasso * cp.norm1(x) + ridge * cp.sum_squares(x)))
    return Case(problem, {b: rng.normal(size=6), lasso: rng.uniform(0.1, 1.0, BATCH), ridge: np.float64(0.2)}, [x])


def support_vector_machine(rng):
    w, bias, X = cp.Variable((2, 1)), cp.Variable(), cp.Parameter((8, 2))
    signs = np.where(np.arange(8) % 2, 1.0, -1.0)[:, None]
    hinge = cp.sum(cp.pos(1 - cp.multiply(signs, X @ w - bias)))
    problem = cp.Problem(cp.Minimize(hinge / 8 + 0.2 * cp.sum_squares(w)))
    return Case(problem, {X: rng.normal(size=(BATCH, 8, 2)) + 0.7 * signs}, [w])


def robust_regression(rng):
    x, b = cp.Variable(2, name="x"), cp.Parameter(7)
    M = rng.normal(size=(7, 2))
    problem = cp.Problem(cp.Minimize(cp.sum(cp.huber(M @ x - b, 0.5)) + cp.norm_inf(x)))
    return Case(problem, {b: rng.normal(size=(BATCH, 7))}, [x])


def control(rng):
    """Two inputs, four steps: matrix variables, whose order in memory matters."""
    x, u = cp.Variable((2, 5), name="x"), cp.Variable((2, 4), name="u", bounds=[-0.3, 0.4])
    A, B, start, target = cp.Parameter((2, 2)), cp.Parameter((2, 2)), cp.Parameter(2), cp.Parameter((2, 5))
    cost = cp.sum_squares(x - target) + 0.1 * cp.sum_squares(u)
    problem = cp.Problem(cp.Minimize(cost), [x[:, 1:] == A @ x[:, :-1] + B @ u, x[:, 0] == start])
    values = {
        A: np.eye(2) + 0.1 * rng.normal(size=(2, 2)), B: rng.normal(size=(BATCH, 2, 2)),
        start: rng.normal(size=(BATCH, 2)), target: rng.normal(size=(2, 5)),
    }  # fmt: skip
    return Case(problem, values, [u, x])


def nearest_matrices(rng):
    """Variables with symmetry, a diagonal, a sparsity pattern; parameters with the same."""
    S, D = cp.Variable((3, 3), symmetric=True), cp.Variable((3, 3), diag=True)
    Z = cp.Variable((3, 3), sparsity=[(0, 1, 2, 2), (1, 1, 0, 1)])
    to, scale = cp.Parameter((3, 3)), cp.Parameter((3, 3), diag=True)
    symmetric, sparse = cp.Parameter((3, 3), symmetric=True), cp.Parameter((3, 3), sparsity=[(0, 1, 2), (1, 2, 0)])
    cost = cp.sum_squares(S - to) + cp.sum_squares(D - scale) + cp.sum_squares(Z - to - sparse)
    problem = cp.Problem(cp.Minimize(cost), [symmetric + 0.5 >= S + D, cp.sum(Z) == 1, cp.trace(S) >= cp.sum(D)])
    M = rng.normal(size=(BATCH, 3, 3))
    pattern = np.zeros((3, 3))
    pattern[[0, 1, 2], [1, 2, 0]] = 1.0
    values = {
        to: rng.normal(size=(BATCH, 3, 3)), scale: np.eye(3) * rng.normal(size=(BATCH, 1, 3)), symmetric: M + M.mT,
        sparse: pattern * rng.normal(size=(3, 3)),
    }  # fmt: skip
    return Case(problem, values, [S, Z, D])


def bounded(rng):
    """Bounds that are parameters, and signs of variables and parameters."""
    upper, lower, c = cp.Parameter(3), cp.Parameter(3, nonpos=True), cp.Parameter((2, 1), bounds=[-9, 9])
    x, y, z = cp.Variable(3, bounds=[lower, upper]), cp.Variable(nonpos=True), cp.Variable((2, 1), nonneg=True)
    a = rng.normal(size=3)
    objective = a @ x - 0.1 * cp.sum_squares(x) + 2 * y - cp.sum_squares(z) - cp.square(y + 1) + cp.sum(c.T @ z)
    values = {
        upper: rng.uniform(0.5, 1.0, size=(BATCH, 3)), lower: -rng.uniform(size=3), c: rng.normal(size=(BATCH, 2, 1)),
    }  # fmt: skip
    return Case(cp.Problem(cp.Maximize(objective)), values, [z, y, x])


CASES = [
    absolute_deviations, least_squares, optnet, portfolio, elastic_net, support_vector_machine, robust_regression,
    control, nearest_matrices, bounded,
]  # fmt: skip


def make(case, seed=0):
    problem, values, variables = case(np.random.default_rng(seed))
    return problem, list(values), list(values.values()), variables


def solve_each(problem, parameters, values, variables):
    """Every problem of the batch solved by CVXPY with Clarabel: values of the variables and of the objective."""
    values = [
        np.broadcast_to(value, (BATCH, *parameter.shape)) for parameter, value in zip(parameters, values, strict=True)
    ]
    found, objectives = [], []
    for one in zip(*values, strict=True):
        for parameter, value in zip(parameters, one, strict=True):
            parameter.save_value(value)
        objectives.append(problem.solve(**CLARABEL))
        found.append([np.asarray(v.value.toarray() if hasattr(v.value, "toarray") else v.value) for v in variables])
    return [np.stack(parts) for parts in zip(*found, strict=True)], np.array(objectives)


def draw_tangents(rng, parameters, values):
    """Random tangents of the shapes of the values, within what the attributes of the parameters allow."""
    tangents = []
    for parameter, value in zip(parameters, values, strict=True):
        tangent = rng.normal(size=np.shape(value))
        if parameter.attributes["symmetric"] or parameter.attributes["PSD"]:
            tangent = (tangent + tangent.mT) / 2
        tangents.append(np.where(np.asarray(value) != 0, tangent, 0.0))
    return tangents


@pytest.fixture(params=["dense", "sparse"])
def matrices(request, monkeypatch):
    """Layers whose matrices are arrays, as those of small problems are, or sparse."""
    if request.param == "sparse":
        monkeypatch.setattr("qpdiff.cvxpy.canonical.keeps_sparse", lambda numbers, entries: True)


@pytest.mark.usefixtures("matrices")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_values_are_those_of_cvxpy(case, seed):
    problem, parameters, values, variables = make(case, seed)
    solution = qpdiff.from_cvxpy(problem, parameters, variables)(*values, **TIGHT)
    found, objectives = solve_each(problem, parameters, values, variables)
    assert solution.status.tolist() == [Status.SOLVED] * BATCH
    np.testing.assert_allclose(solution.value, objectives, rtol=1e-8, atol=1e-8)
    for variable, mine, theirs in zip(variables, solution.variables, found, strict=True):
        assert mine.shape == theirs.shape == (BATCH, *variable.shape)
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
        np.testing.assert_array_equal(solution[variable], mine)
        np.testing.assert_array_equal(solution[variable.name()], mine)


@pytest.mark.usefixtures("matrices")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_derivatives_are_those_of_cvxpys_solutions(case, seed):
    problem, parameters, values, variables = make(case, seed)
    rng, step = np.random.default_rng(seed + 100), 1e-4
    layer = qpdiff.from_cvxpy(problem, parameters, variables)
    solution = layer(*values, **TIGHT)
    cotangents = [rng.normal(size=(BATCH, *variable.shape)) for variable in variables]
    of_value = rng.normal(size=BATCH)
    gradients, of_objective, of_both = (
        layer.vjp(solution, *given, **options)
        for given, options in ((cotangents, {}), ((), {"value": of_value}), (cotangents, {"value": of_value}))
    )
    assert [g.shape for g in gradients] == [g.shape for g in of_objective] == [np.shape(value) for value in values]
    for one, other, both in zip(gradients, of_objective, of_both, strict=True):
        np.testing.assert_allclose(one + other, both, rtol=1e-8, atol=1e-8)
    for _ in range(2):
        tangents = draw_tangents(rng, parameters, values)
        nearby = ([v + h * t for v, t in zip(values, tangents, strict=True)] for h in (step, -step))
        (above, value_above), (below, value_below) = (
            solve_each(problem, parameters, there, variables) for there in nearby
        )
        value_moved = (value_above - value_below) / (2 * step)
        differences = [(a - b) / (2 * step) for a, b in zip(above, below, strict=True)]
        moved = layer.jvp(solution, *tangents)
        for mine, theirs in zip((*moved, moved.value), (*differences, value_moved), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)
        pulled = sum(np.sum(g * t) for g, t in zip(of_objective, tangents, strict=True))
        np.testing.assert_allclose(pulled, of_value @ value_moved, rtol=1e-4, atol=1e-4)
        pulled = sum(np.sum(g * t) for g, t in zip(gradients, tangents, strict=True))
        pushed = sum(np.sum(c * d) for c, d in zip(cotangents, differences, strict=True))
        np.testing.assert_allclose(pulled, pushed, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "case", [absolute_deviations, least_squares, portfolio, elastic_net, support_vector_machine, control]
)
def test_cvxpylayers_has_the_same_values_and_gradients(case):
    torch = pytest.importorskip("torch")
    layers = pytest.importorskip("cvxpylayers.torch")
    problem, parameters, values, variables = make(case)
    layer = qpdiff.from_cvxpy(problem, parameters, variables)
    solution = layer(*values, **TIGHT)
    rng = np.random.default_rng(0)
    cotangents = [rng.normal(size=value.shape) for value in solution.variables]
    gradients = layer.vjp(solution, *cotangents)

    tensors = [torch.tensor(value, requires_grad=True) for value in values]
    theirs = layers.CvxpyLayer(problem, parameters, variables)
    found = theirs(*tensors, solver_args={"solve_method": "Clarabel", "tol_gap_abs": 1e-12, "tol_gap_rel": 1e-12})
    sum(torch.sum(torch.tensor(c) * value) for c, value in zip(cotangents, found, strict=True)).backward()
    for mine, other in zip(solution.variables, found, strict=True):
        np.testing.assert_allclose(mine, other.detach(), atol=1e-5)
    for mine, tensor in zip(gradients, tensors, strict=True):
        np.testing.assert_allclose(mine, tensor.grad, rtol=1e-3, atol=1e-3)


# ---- batches, and the linear maps before and after the QP


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_operands_and_values_have_their_adjoints(case, seed, xp):
    """Of any numbers, with batch axes that differ: an operand has those of the parameters that move it."""
    problem, parameters, _, _ = make(case)
    layer, rng = qpdiff.from_cvxpy(problem, parameters), np.random.default_rng(seed)
    axes = [((), (3,), (2, 1), (1, 3), (2, 3))[rng.integers(5)] for _ in parameters]
    here, tangents = (
        [rng.normal(size=(*a, *parameter.shape)) for a, parameter in zip(axes, parameters, strict=True)] for _ in "ab"
    )

    def operands(values):
        return {name: xp.to_numpy(v) for name, v in layer.operands(*map(xp.asarray, values)).items()}

    base, change, moved_by = operands(here), {}, {}
    for i, tangent in enumerate(tangents):
        for name, value in operands([v + tangent if j == i else v for j, v in enumerate(here)]).items():
            difference = np.where(np.isfinite(value), value, 0.0) - np.where(np.isfinite(base[name]), base[name], 0.0)
            change[name] = change.get(name, 0.0) + difference
            moved_by.setdefault(name, [])
            moved_by[name] += [i] if np.any(difference) else []
    for name, value in base.items():
        leading = np.broadcast_shapes(*(axes[i] for i in moved_by[name]))
        assert value.shape == (*leading, *value.shape[value.ndim - len(OPERANDS[name]) :]), name

    cotangents = {name: rng.normal(size=value.shape) for name, value in base.items()}
    gradients = qpdiff.Gradients(**{name: xp.asarray(value) for name, value in cotangents.items()})
    pulled = layer.operands_adjoint(gradients, *map(xp.asarray, here))
    assert [tuple(value.shape) for value in pulled] == [value.shape for value in here]
    np.testing.assert_allclose(
        sum(np.sum(xp.to_numpy(p) * t) for p, t in zip(pulled, tangents, strict=True)),
        sum(np.sum(cotangents[name] * change[name]) for name in base),
        rtol=1e-10,
    )

    x = rng.normal(size=(2, 3, base["q"].shape[-1]))
    cotangents = [rng.normal(size=(2, 3, *variable.shape)) for variable in layer.variables]
    values = [xp.to_numpy(value) for value in layer.values(xp.asarray(x))]
    np.testing.assert_allclose(
        np.sum(xp.to_numpy(layer.values_adjoint(*map(xp.asarray, cotangents))) * x),
        sum(np.sum(c * value) for c, value in zip(cotangents, values, strict=True)),
        rtol=1e-10,
    )


def test_a_batch_is_its_problems(xp):
    """Solutions are those of single problems, and the gradient of what problems share is the sum of theirs."""
    problem, parameters, _, variables = make(least_squares)
    rng, layer = np.random.default_rng(0), qpdiff.from_cvxpy(problem, parameters, variables)
    A, b, cotangent = rng.normal(size=(2, 1, 5, 3)), rng.normal(size=(3, 5)), rng.normal(size=(2, 3, 3))
    solution = layer(xp.asarray(A), xp.asarray(b), **TIGHT)
    gradients = [xp.to_numpy(g) for g in layer.vjp(solution, xp.asarray(cotangent))]
    moved = xp.to_numpy(layer.jvp(solution, None, xp.asarray(b))[0])
    assert tuple(solution.status.shape) == tuple(solution.value.shape) == (2, 3)
    expected = [np.zeros_like(A), np.zeros_like(b)]
    for i, j in np.ndindex(2, 3):
        one = layer(A[i, 0], b[j], **TIGHT)
        np.testing.assert_allclose(xp.to_numpy(solution.variables[0])[i, j], one.variables[0], atol=1e-9)
        np.testing.assert_allclose(xp.to_numpy(solution.value)[i, j], one.value, atol=1e-9)
        np.testing.assert_allclose(moved[i, j], layer.jvp(one, None, b[j])[0], atol=1e-6)
        for total, index, part in zip(expected, ((i, 0), j), layer.vjp(one, cotangent[i, j]), strict=True):
            total[index] += part
    for mine, total in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(mine, total, atol=1e-6)


def test_what_no_batched_parameter_moves_is_shared():
    problem, parameters, values, _ = make(least_squares)  # A without a batch axis, b with one
    operands = qpdiff.from_cvxpy(problem, parameters).operands(*values)
    assert {name: value.ndim - len(OPERANDS[name]) for name, value in operands.items()} == {
        "Q": 0, "q": 0, "A": 0, "b": 1, "lb": 0,
    }  # fmt: skip


def test_the_type_is_that_of_the_parameters():
    problem, parameters, values, variables = make(least_squares)
    layer = qpdiff.from_cvxpy(problem, parameters, variables)
    single = [np.float32(value) for value in values]
    solution = layer(*single)
    gradients = layer.vjp(solution, np.ones(3))
    assert {a.dtype for a in (*solution.variables, *gradients)} == {np.dtype("float32")}
    exact = layer(*map(np.float64, single))
    np.testing.assert_array_equal(solution.variables[0], exact.variables[0].astype(np.float32))
    for one, other in zip(gradients, layer.vjp(exact, np.ones(3)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    tangent = layer.jvp(solution, np.ones((5, 3)), None)[0]
    assert tangent.dtype == np.float32
    np.testing.assert_allclose(tangent, layer.jvp(exact, np.ones((5, 3)), None)[0], rtol=1e-5, atol=1e-5)
    operands = layer.operands(*single)
    assert {a.dtype for a in operands.values()} == {np.dtype("float32")}
    np.testing.assert_allclose(layer.values(qpdiff.solve_qp(**operands).x)[0], exact.variables[0], atol=1e-5)
    assert layer(*single, dtype="float64").variables[0].dtype == np.float64
    assert layer(values[0].tolist(), values[1].tolist()).variables[0].dtype == np.float64


@pytest.mark.parametrize("case", [least_squares, optnet, portfolio])
def test_composed_with_the_torch_adapter(case):
    """Torch differentiates the linear maps by itself."""
    torch = pytest.importorskip("torch")
    adapter = pytest.importorskip("qpdiff.torch")
    problem, parameters, values, variables = make(case)
    layer = qpdiff.from_cvxpy(problem, parameters, variables)
    solution = layer(*values, **TIGHT)
    cotangent = np.random.default_rng(0).normal(size=solution.variables[0].shape)
    tensors = [torch.tensor(value, requires_grad=True) for value in values]
    (found,) = layer.values(adapter.solve_qp(**layer.operands(*tensors), **TIGHT).x)
    torch.sum(torch.tensor(cotangent) * found).backward()
    np.testing.assert_allclose(found.detach(), solution.variables[0], atol=1e-8)
    for tensor, gradient in zip(tensors, layer.vjp(solution, cotangent), strict=True):
        np.testing.assert_allclose(tensor.grad, gradient, atol=1e-6)


def test_composed_with_the_jax_adapter():
    """JAX traces and differentiates the linear maps by itself."""
    jax = pytest.importorskip("jax")
    from qpdiff.jax import solve_qp

    problem, parameters, values, variables = make(least_squares)
    layer = qpdiff.from_cvxpy(problem, parameters, variables)
    solution = layer(*values, **TIGHT)
    cotangent = np.random.default_rng(0).normal(size=solution.variables[0].shape)

    @jax.jit
    def loss(*arrays):
        (found,) = layer.values(solve_qp(**layer.operands(*arrays), tol=1e-11, rtol=1e-11).x)
        return jax.numpy.sum(cotangent * found)

    with jax.enable_x64(True):
        gradients = jax.grad(loss, argnums=range(len(values)))(*map(jax.numpy.asarray, values))
    for mine, theirs in zip(layer.vjp(solution, cotangent), gradients, strict=True):
        np.testing.assert_allclose(theirs, mine, atol=1e-6)


# ---- smoothing, where the gradient of a linear program is zero almost everywhere


KAPPA = 0.1


def smoothed_line(seed):
    """A linear program, two points of its parameters with the line between them, and the relaxed value on it.

    The value is a weighted sum of the variable at the relaxed points of the canonical program, each found by the test's
    own barrier method.
    """
    rng = np.random.default_rng(seed)
    x, cost, limit = cp.Variable(4), cp.Parameter(4), cp.Parameter(3)
    rows = rng.uniform(0.2, 1.0, size=(3, 4))
    constraints = [rows @ x <= limit, x >= -1, x <= 1]
    layer = qpdiff.from_cvxpy(cp.Problem(cp.Maximize(cost @ x), constraints), [cost, limit])
    start = rng.normal(size=(BATCH, 4)), rng.uniform(0.5, 1.0, size=(BATCH, 3))
    directions = rng.normal(size=(BATCH, 4)), rng.normal(size=(BATCH, 3))
    weights = rng.normal(size=(BATCH, 4))

    def at_relaxed(t):
        operands = layer.operands(*(a + t * d for a, d in zip(start, directions, strict=True)))
        total = 0.0
        for i in range(BATCH):
            one = {k: v[i] if v.ndim > len(OPERANDS[k]) else v for k, v in operands.items()}
            total += weights[i] @ layer.values(relaxed(one, KAPPA)[0])[0]
        return total

    step = 1e-4
    below, at, above = (at_relaxed(t) for t in (-step, 0.0, step))
    return layer, start, directions, weights, (above - below) / (2 * step), (above - 2 * at + below) / step**2


def test_smoothed_derivatives_of_a_layer():
    layer, start, directions, weights, first, _ = smoothed_line(0)
    solution = layer(*start)
    gradients = layer.vjp(solution, weights, smoothing=KAPPA)
    pulled = sum(np.sum(g * d) for g, d in zip(gradients, directions, strict=True))
    (pushed,) = layer.jvp(solution, *directions, smoothing=KAPPA)
    np.testing.assert_allclose([pulled, np.sum(weights * pushed)], first, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(layer.vjp(solution, weights)[0], 0.0, atol=1e-6)  # at a vertex


def test_smoothed_derivatives_of_a_layer_in_torch():
    torch = pytest.importorskip("torch")
    from qpdiff.torch import solve_qp

    layer, start, directions, weights, first, second = smoothed_line(1)
    start, directions, weights = (
        [torch.tensor(a) for a in start], [torch.tensor(a) for a in directions], torch.tensor(weights)
    )  # fmt: skip

    def loss(t):
        operands = layer.operands(*(a + t * d for a, d in zip(start, directions, strict=True)))
        return (weights * layer.values(solve_qp(**operands, smoothing=KAPPA, **TIGHT).x)[0]).sum()

    t = torch.tensor(0.0, dtype=torch.float64)
    for derivative in (torch.func.grad(loss), torch.func.jacfwd(loss)):
        np.testing.assert_allclose(derivative(t), first, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(torch.func.hessian(loss)(t), second, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(torch.func.grad(torch.func.grad(loss))(t), second, rtol=1e-3, atol=1e-3)


def test_smoothed_derivatives_of_a_layer_in_jax():
    jax = pytest.importorskip("jax")
    from qpdiff.jax import solve_qp

    layer, start, directions, weights, first, second = smoothed_line(2)

    @jax.jit
    def loss(t):
        operands = layer.operands(*(jax.numpy.asarray(a) + t * d for a, d in zip(start, directions, strict=True)))
        return jax.numpy.sum(weights * layer.values(solve_qp(**operands, smoothing=KAPPA).x)[0])

    with jax.enable_x64(True):
        for derivative in (jax.grad(loss), jax.jacfwd(loss)):
            np.testing.assert_allclose(derivative(0.0), first, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(jax.hessian(loss)(0.0), second, rtol=1e-3, atol=1e-3)


def test_smoothing_and_unsolved_are_for_the_derivatives_of_a_layer():
    layer, start, *_ = smoothed_line(0)
    for options in ({"smoothing": KAPPA}, {"unsolved": "zero"}):
        with pytest.raises(TypeError, match=f"{next(iter(options))} is an option of the layer's vjp and jvp"):
            layer(*start, **options)
    with pytest.raises(TypeError, match=r"layer\(\) got an unexpected keyword argument 'tolerance'"):
        layer(*start, tolerance=1e-9)


# ---- what became of the problems


@pytest.mark.parametrize("sense", [cp.Minimize, cp.Maximize])
def test_statuses_and_the_value_of_what_has_no_solution(sense):
    x, h, c = cp.Variable(2, nonneg=True), cp.Parameter(), cp.Parameter(2)
    sign = 1 if sense is cp.Minimize else -1
    layer = qpdiff.from_cvxpy(cp.Problem(sense(sign * (c @ x + 5)), [cp.sum(x) <= h, x[0] <= 1]), [h, c])
    h, c = np.array([2.0, -1.0, np.inf]), np.array([[-1.0, -2.0], [1.0, 1.0], [-1.0, -1.0]])
    solution = layer(h, c)
    assert solution.status.tolist() == [Status.SOLVED, Status.PRIMAL_INFEASIBLE, Status.DUAL_INFEASIBLE]
    np.testing.assert_allclose(solution.value, sign * np.array([1.0, np.inf, -np.inf]), atol=1e-6)
    gradients = layer.vjp(solution, np.ones(2))
    assert np.isfinite(gradients[1]).tolist() == [[True, True], [False, False], [False, False]]
    assert np.isfinite(layer.vjp(solution, np.ones(2), unsolved="zero")[1]).all()


def test_a_problem_without_numbers_leaves_the_gradients_of_shared_parameters_alone():
    x, A, b = cp.Variable(2), cp.Parameter((3, 2)), cp.Parameter(3)
    layer = qpdiff.from_cvxpy(cp.Problem(cp.Minimize(cp.norm1(A @ x - b) + cp.sum_squares(x))), [A, b])
    rng = np.random.default_rng(0)
    matrix, sides = rng.normal(size=(3, 2)), rng.normal(size=(BATCH, 3))
    cotangents = rng.normal(size=(BATCH, 2)) * [[1.0], [0.0], [1.0]]
    expected, _ = layer.vjp(layer(matrix, sides), cotangents)
    sides[1] = np.nan
    solution = layer(matrix, sides, check=False)
    assert solution.status[1] != Status.SOLVED
    found, of_sides = layer.vjp(solution, cotangents, unsolved="zero")
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(of_sides[1], 0.0)


@pytest.mark.parametrize("unsolved", ["nan", "zero"])
def test_the_value_with_its_constant_terms_and_its_sign(unsolved):
    """The largest value of 2c + dx − x² is 2c + d²/4; x ≤ 9 and x ≥ 10 have no solution."""
    c, d, least = (cp.Parameter(name=name) for name in ("c", "d", "least"))
    x = cp.Variable()
    layer = qpdiff.from_cvxpy(cp.Problem(cp.Maximize(2 * c + d * x - x**2), [x <= 9, x >= least]), [c, d, least])
    solution = layer(3.0, np.array([4.0, 6.0, 4.0]), np.array([-9.0, -9.0, 10.0]))
    np.testing.assert_allclose(solution.value, [10.0, 15.0, -np.inf], rtol=1e-6)
    of_c, of_d, _ = layer.vjp(solution, value=np.array([1.0, 10.0, 100.0]), unsolved=unsolved)
    moved = layer.jvp(solution, 1.0, None, None, unsolved=unsolved)
    rest = np.nan if unsolved == "nan" else 0.0
    np.testing.assert_allclose(of_c, 22.0 + rest, rtol=1e-6)
    np.testing.assert_allclose(of_d, [2.0, 30.0, rest], rtol=1e-6)
    np.testing.assert_allclose(moved.value, [2.0, 2.0, rest], rtol=1e-6)
    with pytest.raises(ValueError, match="cotangent of the value has shape"):
        layer.vjp(solution, value=np.ones(2))
    with pytest.raises(TypeError, match="0 cotangents were given; expected 1: "):
        layer.vjp(solution)


def test_parameters_that_are_not_listed_keep_their_value():
    problem, parameters, values, variables = make(nearest_matrices)
    solution = qpdiff.from_cvxpy(problem, parameters, variables)(*values)
    for kept in range(1, 4):  # diagonal, symmetric, sparse
        parameter, value = parameters[kept], np.broadcast_to(values[kept], (BATCH, 3, 3))[0]
        others = [p for p in parameters if p is not parameter]
        parameter.save_value(value)
        fixed = qpdiff.from_cvxpy(problem, others, variables)
        parameter.save_value(2 * value)  # too late
        found = fixed(*(v for p, v in zip(parameters, values, strict=True) if p is not parameter))
        np.testing.assert_allclose(found.value[0], solution.value[0], atol=1e-6)


def test_a_problem_without_parameters():
    x = cp.Variable(3)
    layer = qpdiff.from_cvxpy(cp.Problem(cp.Minimize(cp.sum_squares(x - [1, 2, 3])), [cp.sum(x) == 3]), [])
    solution = layer()
    np.testing.assert_allclose(solution[x], [0, 1, 2], atol=1e-7)
    assert layer.vjp(solution, np.ones(3)) == ()


def test_a_variable_that_drops_out_is_zero():
    x, gone = cp.Variable(2), cp.Variable((3, 2))
    layer = qpdiff.from_cvxpy(cp.Problem(cp.Minimize(cp.sum_squares(x - 1)), [gone[:0] >= 1]), [], [gone, x])
    np.testing.assert_allclose(layer()[gone], np.zeros((3, 2)))
    np.testing.assert_allclose(layer()[x], np.ones(2), atol=1e-7)


def copies(value):
    """Copies by every way to make one, and copies of copies."""
    once = [copy.copy(value), copy.deepcopy(value), *(pickle.loads(pickle.dumps(value, n)) for n in (2, 5))]
    return [*once, *map(copy.deepcopy, once), *(pickle.loads(pickle.dumps(one)) for one in once)]


def two_variables():
    """Variables that are a and 2a for a parameter a, and their layer."""
    x, y, a = cp.Variable(2, name="x"), cp.Variable(2), cp.Parameter(2)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - a) + cp.sum_squares(y - 2 * a)))
    return x, y, qpdiff.from_cvxpy(problem, [a], [x, y])


def test_copies_of_a_layer_know_the_callers_variables():
    x, y, layer = two_variables()
    other, *_ = two_variables()
    solution = layer(np.array([1.0, 3.0]))
    for copied in copies(layer):
        again = copied(np.array([1.0, 3.0]))
        own = copied.variables
        keys = (x, "x", own[0]), (y, y.name(), own[1])
        for names, expected in zip(keys, ([1.0, 3.0], [2.0, 6.0]), strict=True):
            for key in names:
                np.testing.assert_allclose(again[key], expected, atol=1e-6)
        for key in (other, "z", None, 0, x + y, cp.Variable(2, var_id=x.id)):
            with pytest.raises(KeyError, match=r"is not among the variables of the layer: x, var\d+"):
                again[key]
        gradient = layer.vjp(solution, *np.ones((2, 2)))[0]
        np.testing.assert_array_equal(copied.vjp(solution, *np.ones((2, 2)))[0], gradient)
        np.testing.assert_allclose(layer.vjp(again, *np.ones((2, 2)))[0], gradient, atol=1e-6)
    with pytest.raises(KeyError, match=r"it has another one of this name, solution\['x'\]"):
        solution[other]


def test_copies_of_a_solution_know_the_callers_variables():
    x, y, layer = two_variables()
    solution = layer(np.array([1.0, 3.0]))
    for copied in copies(solution):
        np.testing.assert_array_equal(copied[x], solution[x])
        np.testing.assert_array_equal(copied[y], solution[y])
        np.testing.assert_array_equal(layer.vjp(copied, np.ones(2), None)[0], layer.vjp(solution, np.ones(2), None)[0])


def test_a_layer_in_another_process(tmp_path):
    """Its variables have the same ids as others there."""
    x, _, layer = two_variables()
    (tmp_path / "both.pickle").write_bytes(pickle.dumps((layer, x)))
    code = f"""if True:
        import pickle, cvxpy as cp, numpy as np
        local = [cp.Variable(2, name="x", var_id=i) for i in range(1, {x.id + 2})] + [cp.Variable(2)]
        with open({str(tmp_path / "both.pickle")!r}, "rb") as file:
            layer, x = pickle.load(file)
        solution = layer(np.array([1.0, 3.0]), engine="array")
        assert np.allclose(solution[x], [1, 3]) and np.allclose(solution["x"], [1, 3])
        for variable in local:
            try:
                solution[variable]
            except KeyError:
                continue
            raise AssertionError(variable.id)
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_callers_problem_stays_as_it_is():
    problem, parameters, values, _ = make(least_squares)
    parameters[0].value = values[0]
    problem.get_problem_data("CLARABEL")
    compiled = problem._cache.param_prog
    qpdiff.from_cvxpy(problem, parameters)(*values)
    assert compiled is not None
    assert problem._cache.param_prog is compiled
    assert problem.status is None
    assert parameters[0].value is values[0]
    assert parameters[1].value is None


# ---- what is refused


def refused(objective, constraints=(), parameters=()):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        qpdiff.from_cvxpy(cp.Problem(objective, list(constraints)), list(parameters))
    return str(caught.value)


def test_problems_that_are_not_quadratic_programs():
    x, a, b = cp.Variable(2, name="x"), cp.Parameter(2, name="a"), cp.Parameter(name="b", nonneg=True)
    fine = cp.Minimize(cp.sum_squares(x))
    assert "rules (DCP): minimize -(quad_over_lin" in refused(cp.Minimize(-cp.sum_squares(x)), [x <= a], [a])
    assert "x, 2.0) == 1" in refused(fine, [cp.square(x) == 1])
    message = refused(fine, [x <= a, b * (a @ x) <= 1], [a, b])
    assert "not DPP" in message
    assert "b @ a @ x" in message.replace("(", "").replace(")", "").replace("*", "@")
    assert "x <= a" not in message
    message = refused(fine, [x <= a, cp.norm(x) <= b], [a, b])
    assert "not a QP, it needs the cones SOC: Pnorm" in message
    assert "x <= a" not in message
    assert "SOC: minimize Pnorm" in refused(cp.Minimize(cp.norm(x)), [x <= a], [a])
    assert "ExpCone" in refused(cp.Minimize(cp.sum(cp.exp(x))))
    matrix = cp.Variable((2, 2), PSD=True, name="matrix")
    assert "PSD" in refused(cp.Minimize(cp.trace(matrix)))
    for kind in ("integer", "boolean"):
        assert "integer or boolean: n" in refused(cp.Minimize(cp.Variable(name="n", **{kind: True})))
    assert "integer" in refused(fine, [cp.constraints.FiniteSet(x[0], [1, 2])])
    assert "complex: c" in refused(cp.Minimize(cp.real(cp.Variable(name="c", complex=True))), [])
    assert "no variables" in refused(cp.Minimize(0))


def test_lists_that_do_not_fit_the_problem():
    x, y = cp.Variable(2, name="x"), cp.Variable(name="y")
    a, b = cp.Parameter(2, name="a"), cp.Parameter(name="b")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [x >= b])
    for kind, message, arguments in (
        (ValueError, "the parameter b has no value and is not listed", ([a],)),
        (ValueError, r"parameters\[1\], c, is not in the problem", ([a, cp.Parameter(name="c"), b],)),
        (ValueError, r"parameters\[2\], a, is listed twice", ([a, b, a],)),
        (ValueError, r"variables\[0\], y, is not in the problem", ([a, b], [y])),
        (TypeError, r"parameters\[0\] is a Variable; expected a cvxpy.Parameter", ([x, a, b],)),
        (TypeError, "parameters is a Parameter; expected a list", (a,)),
    ):
        with pytest.raises(kind, match=message):
            qpdiff.from_cvxpy(problem, *arguments)
    with pytest.raises(TypeError, match=r"problem is a Minimize; expected a cvxpy.Problem"):
        qpdiff.from_cvxpy(problem.objective, [a, b])


def test_arguments_that_do_not_fit_the_layer():
    x, a, b = cp.Variable(2, name="x"), cp.Parameter((2, 2), name="a"), cp.Parameter(2, name="b", nonneg=True)
    layer = qpdiff.from_cvxpy(cp.Problem(cp.Minimize(cp.sum_squares(x) + b @ cp.abs(x) + cp.norm1(a @ x - 1))), [a, b])
    A, B = np.ones((3, 2, 2)), np.ones((3, 2))
    for kind, message, values in (
        (TypeError, "1 parameters were given; expected 2: a, b", (A,)),
        (ValueError, r"parameter b has shape \(3,\); expected \(\.\.\., 2\)", (A, np.ones(3))),
        (ValueError, r"parameter a has shape \(2,\); expected \(\.\.\., 2, 2\)", (np.ones(2), B)),
        (ValueError, r"parameter b has batch axes \(4,\), which do not broadcast with .* \(3,\)", (A, np.ones((4, 2)))),
        (ValueError, r"parameter b has NaN \(problem 1 of the batch\)", (A, np.array([[1, 1], [1, np.nan], [1, 1]]))),
        (TypeError, "parameter b has dtype complex128", (A, 1j * B)),
        (TypeError, "parameter a is a builtins.dict", ({}, B)),
    ):
        with pytest.raises(kind, match=message):
            layer(*values)
    solution = layer(A, B)
    for kind, message, call in (
        (TypeError, "2 cotangents were given; expected 1: x", lambda: layer.vjp(solution, B, B)),
        (ValueError, r"cotangent of x has shape \(4,\); expected \(3, 2\)", lambda: layer.vjp(solution, np.ones(4))),
        (ValueError, r"tangent of b has shape \(4,\); expected", lambda: layer.jvp(solution, None, np.ones(4))),
        (TypeError, "not one of this layer's", lambda: layer.vjp(solution.solution, B)),
    ):
        with pytest.raises(kind, match=message):
            call()
    with pytest.raises(KeyError, match="not among the variables"):
        solution["a"]


@pytest.mark.parametrize(
    ("attributes", "good", "bad"),
    [
        ({"nonneg": True}, np.eye(2), -np.eye(2)),
        ({"neg": True}, -np.ones((2, 2)), np.ones((2, 2))),
        ({"bounds": [0, 2]}, np.ones((2, 2)), 3 * np.ones((2, 2))),
        ({"bounds": [np.eye(2), np.inf]}, np.ones((2, 2)), np.zeros((2, 2))),
        ({"integer": True}, np.eye(2), np.eye(2) / 2),
        ({"boolean": True}, np.eye(2), 2 * np.eye(2)),
        ({"diag": True}, np.eye(2), np.ones((2, 2))),
        ({"sparsity": [(0, 1), (0, 1)]}, np.eye(2), np.ones((2, 2))),
        ({"symmetric": True}, np.ones((2, 2)), np.array([[1.0, 2.0], [3.0, 4.0]])),
        ({"PSD": True}, np.ones((2, 2)), np.array([[1.0, 2.0], [2.0, 1.0]])),
        ({"NSD": True}, -np.ones((2, 2)), np.ones((2, 2))),
    ],
)
@pytest.mark.parametrize("xp", ["numpy", "array-api-strict", "cupy"], indirect=True)
def test_parameters_are_what_their_attributes_promise(attributes, good, bad, xp):
    x, a = cp.Variable((2, 2)), cp.Parameter((2, 2), name="a", **attributes)
    layer = qpdiff.from_cvxpy(cp.Problem(cp.Minimize(cp.sum_squares(x - a))), [a])
    np.testing.assert_allclose(xp.to_numpy(layer(xp.asarray(good))[x]), good, atol=1e-6)
    with pytest.raises(ValueError, match=r"parameter a is declared .* \(problem 1 of the batch\)"):
        layer(xp.asarray(np.stack([good, bad])))
    assert int(layer(xp.asarray(bad), check=False).status) == Status.SOLVED


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_a_parameter_that_was_computed_in_another_type(kind):
    """Of rank 3 and rounded by more than the type that it is solved in would do; so are bounds on it."""
    x, P = cp.Variable(6), cp.Parameter((6, 6), name="P", PSD=True)
    q, shift = cp.Parameter(6), cp.Parameter(name="shift", bounds=[0.1, 0.7])
    problem = cp.Problem(cp.Minimize(cp.quad_form(x, P) + q @ x + shift), [x >= -1, x <= 1])
    layer = qpdiff.from_cvxpy(problem, [P, q, shift])
    numbers = np.random.default_rng(1).normal(size=(2, 6))
    value = rounded_product(kind)
    exact = (value.astype(np.float64) + value.mT) / 2
    expected = layer(exact, numbers, 0.5, check=False)
    solution = layer(value, numbers, np.float32(0.7), dtype="float64")
    np.testing.assert_allclose(solution[x], expected[x], atol=1e-8)
    pulled = [layer.vjp(found, np.ones(6))[0] for found in (solution, expected)]
    np.testing.assert_allclose(*pulled, atol=1e-7)
    with pytest.raises(ValueError, match="parameter P is declared PSD, but is not"):
        layer(value - kind(0.2 if kind == np.float16 else 0.01) * np.eye(6, dtype=kind), numbers, 0.5, dtype="float64")


# ---- the solver among CVXPY's own


def dense(value):
    return np.asarray(value.toarray() if hasattr(value, "toarray") else value)


def equality_constrained(rng):
    x, b = cp.Variable(6), cp.Parameter(3)
    constraints = [rng.normal(size=(3, 6)) @ x == b]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(rng.normal(size=(6, 6)) @ x - rng.normal(size=6))), constraints)
    return Case(problem, {b: rng.normal(size=(BATCH, 3))}, [x])


def linear_program(rng):
    """With both kinds of rows, a row in both directions and duals of every sign."""
    x, M, y = cp.Variable(8), rng.normal(size=(3, 8)), cp.Parameter(3)
    c = M.T @ rng.normal(size=3) + rng.uniform(0.1, 1.0, size=8) * rng.choice([0, 1], size=8)
    constraints = [M @ x == y, x >= -1, x <= 1, cp.abs(cp.sum(x)) <= 2, cp.maximum(x[0], 3 * x[1] + 2) <= 4]
    return Case(cp.Problem(cp.Maximize(c @ x + 3 * x[2]), constraints), {y: 0.5 * rng.normal(size=(BATCH, 3))}, [x])


@pytest.mark.parametrize("case", [*CASES, equality_constrained, linear_program])
@pytest.mark.parametrize("seed", range(3))
def test_the_solver_agrees_with_clarabel(case, seed):
    problem, parameters, values, variables = make(case, seed)
    for parameter, value in zip(parameters, values, strict=True):
        parameter.save_value(np.broadcast_to(value, (BATCH, *parameter.shape))[0])
    expected = problem.solve(**CLARABEL)
    found = [dense(variable.value) for variable in variables]
    duals = [dense(constraint.dual_value) for constraint in problem.constraints]
    assert problem.solve(solver=qpdiff.CVXPYSolver(), **TIGHT) == pytest.approx(expected, rel=1e-7, abs=1e-8)
    assert problem.status == "optimal"
    for variable, value in zip(variables, found, strict=True):
        np.testing.assert_allclose(dense(variable.value), value, atol=2e-5)
    for constraint, value in zip(problem.constraints, duals, strict=True):
        assert np.shape(constraint.dual_value) == value.shape
        np.testing.assert_allclose(constraint.dual_value, value, atol=1e-4)


def test_infeasible_and_unbounded():
    x = cp.Variable(2)
    below, above = x[0] <= -1, x >= 0
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x)), [below, above])
    assert problem.solve(solver=qpdiff.CVXPYSolver()) == np.inf
    assert problem.status == "infeasible"
    assert x.value is None
    assert below.dual_value > 0  # a Farkas certificate: the two rows with these weights add up to 0 ≤ −1
    np.testing.assert_allclose(above.dual_value, [below.dual_value, 0], atol=1e-6)
    problem = cp.Problem(cp.Maximize(cp.sum(x) - cp.square(x[0])), [above])
    assert problem.solve(solver=qpdiff.CVXPYSolver()) == np.inf
    assert problem.status == "unbounded"
    assert cp.Problem(cp.Minimize(x[1]), [x[0] == 1]).solve(solver=qpdiff.CVXPYSolver()) == -np.inf


def test_options_statistics_and_inaccurate_solutions():
    problem, parameters, values, variables = make(absolute_deviations)
    for parameter, value in zip(parameters, values, strict=True):
        parameter.value = value[0]
    solver = qpdiff.CVXPYSolver()
    best = problem.solve(solver=solver, tol=1e-10)
    stats = problem.solver_stats
    assert (stats.solver_name, stats.num_iters) == ("QPDIFF", int(stats.extra_stats.iterations))
    assert stats.solve_time > 0
    assert stats.extra_stats.dual_residual <= 1e-10
    with pytest.warns(UserWarning, match="may be inaccurate"):
        problem.solve(solver=solver, max_iterations=2, warm_start=False)
    assert problem.status == "user_limit"
    with pytest.warns(UserWarning, match="may be inaccurate"):  # a tolerance of 0 is beyond rounding
        assert problem.solve(solver=solver, tol=0, rtol=0) == pytest.approx(best, abs=1e-6)
    assert problem.status == "optimal_inaccurate"
    with pytest.raises(TypeError, match="unexpected keyword argument 'eps'"):
        problem.solve(solver=solver, eps=1e-3)
    with pytest.raises(cp.SolverError, match="'QPDIFF' failed"):
        cp.Problem(cp.Minimize(cp.sum(variables[0])), [1e-300 * variables[0] >= 1e300]).solve(solver=solver)


def test_a_problem_is_compiled_once_and_started_from_its_last_solution():
    problem, parameters, values, _ = make(portfolio)
    for parameter, value in zip(parameters, values, strict=True):
        parameter.value = np.broadcast_to(value, (BATCH, *parameter.shape))[0]
    problem.solve(solver=qpdiff.CVXPYSolver())
    compiled, iterations = problem._cache.param_prog, problem.solver_stats.num_iters
    parameters[0].value = parameters[0].value + 1e-6
    problem.solve(solver=qpdiff.CVXPYSolver())
    assert problem._cache.param_prog is compiled
    assert problem.solver_stats.num_iters < iterations
    problem.solve(solver=qpdiff.CVXPYSolver(), warm_start=False)
    assert problem.solver_stats.num_iters == iterations


def test_the_solver_refuses_what_is_not_a_quadratic_program():
    x = cp.Variable(2)
    for problem in (
        cp.Problem(cp.Minimize(cp.norm(x)), [x >= 1]),
        cp.Problem(cp.Minimize(cp.sum(cp.Variable(2, integer=True)))),
    ):
        with pytest.raises(cp.SolverError):
            problem.solve(solver=qpdiff.CVXPYSolver())


# ---- imports


def test_cvxpy_is_imported_on_demand_only():
    script = """
import sys, qpdiff
assert "cvxpy" not in sys.modules and "from_cvxpy" in dir(qpdiff)
assert not hasattr(qpdiff, "from_nowhere")
sys.modules["cvxpy"] = None  # as if it were not installed
try:
    qpdiff.CVXPYSolver
except ImportError as error:
    assert "pip install 'qpdiff[cvxpy]'" in str(error), error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_large_sparse_problem(monkeypatch):
    """Denoising in 2000 variables and as many rows, whose dense matrices would take minutes."""
    n = 2000
    signal = np.cumsum(np.random.default_rng(0).normal(size=n))
    x = cp.Variable(n)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - signal)), [cp.abs(cp.diff(x)) <= 0.3])
    monkeypatch.setattr("qpdiff.engines.choice.DENSE_BYTES", 0)
    found = problem.solve(solver=qpdiff.CVXPYSolver())
    assert found == pytest.approx(problem.solve(**CLARABEL), rel=1e-6)


def test_a_large_layer_has_sparse_matrices():
    """Fitting 5000 rows by least squares, for each of which CVXPY has a variable: 0.4 GiB as dense matrices."""
    rng = np.random.default_rng(1)
    data, point = rng.normal(size=(5000, 3)), rng.normal(size=(2, 5000))
    x, b = cp.Variable(3), cp.Parameter(5000)
    layer = qpdiff.from_cvxpy(cp.Problem(cp.Minimize(cp.sum_squares(data @ x - b))), [b], [x])
    operands = layer.operands(point)
    assert isinstance(operands["Q"], qpdiff.Sparse)
    assert operands["A"].nnz < 20_000 + 5000
    solution = layer(point)
    inverse = np.linalg.inv(data.T @ data) @ data.T
    np.testing.assert_allclose(solution.variables[0], point @ inverse.T, atol=1e-6)
    (gradient,) = layer.vjp(solution, np.ones(3))
    np.testing.assert_allclose(gradient, np.tile(np.ones(3) @ inverse, (2, 1)), atol=1e-6)
    (pushed,) = layer.jvp(solution, point)
    np.testing.assert_allclose(pushed, solution.variables[0], atol=1e-6)
