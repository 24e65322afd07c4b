"""The derivative against central differences, against itself by duality, and where it must not break."""

import copy
import pickle

import numpy as np
import pytest
from problems import strictly_feasible

import qpdiff

pytestmark = pytest.mark.usefixtures("each_engine")

OUTPUTS = ("x", "y", "z", "z_lb", "z_ub")
PARTS = [
    "Q q",
    "Q q A b",
    "Q q G h",
    "Q q G h A b",
    "Q q lb",
    "Q q ub",
    "Q q lb ub",
    "Q q A b lb",
    "Q q G h A b lb ub",
]
TIGHT = {"tol": 1e-12, "rtol": 1e-13}


def random_problem(rng, parts, *, batch=(3,), shared=(), diagonal=False, n=6, m=5, p=2):
    """A strictly convex problem with the operands named, feasible at a point inside its bounds."""
    parts = parts.split()

    def draw(name, *core):
        return rng.normal(size=core if name in shared else (*batch, *core))

    point = draw("point", n)
    operands = {"q": 2 * draw("q", n)}
    if diagonal:
        operands["Q"] = np.eye(n) * rng.uniform(0.5, 2.0, size=n if "Q" in shared else (*batch, 1, n))
    else:
        L = draw("Q", n, n)
        operands["Q"] = L @ np.swapaxes(L, -1, -2) / n + 0.5 * np.eye(n)
    if "A" in parts:
        operands["A"] = draw("A", p, n)
        operands["b"] = np.einsum("...ij,...j->...i", operands["A"], point)
    if "G" in parts:
        operands["G"] = draw("G", m, n)
        operands["h"] = np.einsum("...ij,...j->...i", operands["G"], point) + 0.5
    if "lb" in parts:
        operands["lb"] = point - rng.uniform(0.1, 0.5, size=point.shape)
    if "ub" in parts:
        operands["ub"] = point + rng.uniform(0.1, 0.5, size=point.shape)
    return operands


def random_tangents(rng, operands):
    tangents = {name: rng.normal(size=value.shape) for name, value in operands.items()}
    tangents["Q"] = (tangents["Q"] + np.swapaxes(tangents["Q"], -1, -2)) / 2
    for name in ("lb", "ub"):
        if name in operands:
            tangents[name] = np.where(np.isfinite(operands[name]), tangents[name], 0.0)
    if "lb" in operands and "ub" in operands:
        fixed = operands["lb"] == operands["ub"]
        tangents["lb"] = np.where(fixed, tangents["ub"], tangents["lb"])
    return tangents


def strictly_complementary(xp, sol, margin=1e-3):
    """Whether every inequality is clearly active or clearly inactive, so that the solution is differentiable."""
    lin = sol.linearization
    v, s, inequality = (xp.to_numpy(a) for a in (lin.v, lin.s, lin.problem.inequality))
    return bool(np.all((np.maximum(v, s) > margin) | ~np.broadcast_to(inequality, v.shape)))


def check_derivative(xp, rng, operands):
    """Compare vjp and jvp on a library with central differences of NumPy's solutions, and with each other."""
    sol = qpdiff.solve_qp(**{name: xp.asarray(value) for name, value in operands.items()}, **TIGHT)
    assert np.all(xp.to_numpy(sol.status) == qpdiff.Status.SOLVED)
    if not strictly_complementary(xp, sol):
        return False
    cotangents = {name: rng.normal(size=tuple(getattr(sol, name).shape)) for name in OUTPUTS}
    tangents = random_tangents(rng, operands)
    gradients = qpdiff.vjp(sol, **{name: xp.asarray(value) for name, value in cotangents.items()})
    gradients = {name: xp.to_numpy(getattr(gradients, name)) for name in operands}
    pushed = qpdiff.jvp(sol, **{name: xp.asarray(value) for name, value in tangents.items()})
    pushed = {name: xp.to_numpy(getattr(pushed, name)) for name in OUTPUTS}

    step = 1e-5
    plus, minus = (
        qpdiff.solve_qp(**{name: value + sign * step * tangents[name] for name, value in operands.items()}, **TIGHT)
        for sign in (1, -1)
    )
    difference = sum(
        float(np.sum(cotangents[name] * (getattr(plus, name) - getattr(minus, name)))) / (2 * step) for name in OUTPUTS
    )
    pulled = sum(float(np.sum(gradients[name] * tangents[name])) for name in operands)
    dual = sum(float(np.sum(cotangents[name] * pushed[name])) for name in OUTPUTS)
    size = sum(float(np.linalg.norm(cotangents[name]) * np.linalg.norm(pushed[name])) for name in OUTPUTS)
    assert abs(pulled - difference) <= 1e-6 * size
    assert abs(dual - pulled) <= 1e-10 * size
    for name, value in operands.items():
        assert gradients[name].shape == value.shape
    assert np.array_equal(gradients["Q"], np.swapaxes(gradients["Q"], -1, -2))
    return True


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("shared", [(), ("Q",), ("Q", "G", "A"), ("q",)], ids=lambda s: "shared-" + "".join(s))
@pytest.mark.parametrize("diagonal", [False, True])
def test_vjp_and_jvp_against_central_differences(xp, parts, shared, diagonal):
    rng = np.random.default_rng(sum(map(ord, parts)) + 7 * len(shared) + diagonal)
    checked = [
        check_derivative(xp, rng, random_problem(rng, parts, shared=shared, diagonal=diagonal)) for _ in range(4)
    ]
    assert any(checked)


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_a_number_for_bounds_and_right_hand_sides(xp, batch):
    rng = np.random.default_rng(11)
    numbers = {"lb": np.array(-0.4), "ub": np.array(0.6), "h": np.array(0.3), "b": np.array(0.0)}
    checked = [
        check_derivative(xp, rng, random_problem(rng, "Q q A b G h lb ub", batch=batch) | numbers) for _ in "123"
    ]
    assert any(checked)


def test_derivatives_by_a_number_are_those_by_its_entries():
    rng = np.random.default_rng(12)
    Q, q = 2 * np.eye(4), rng.normal(size=(4, 4))  # as many problems as variables
    sol, full = qpdiff.solve_qp(Q, q, lb=-0.2, ub=0.3), qpdiff.solve_qp(Q, q, lb=np.full(4, -0.2), ub=np.full(4, 0.3))
    cotangents = {name: rng.normal(size=(4, 4)) for name in ("x", "z_lb", "z_ub")}
    for options in ({}, {"smoothing": 0.1}):
        one, other = (qpdiff.vjp(each, **cotangents, **options) for each in (sol, full))
        assert one.lb.shape == one.ub.shape == ()
        np.testing.assert_allclose([one.lb, one.ub], [other.lb.sum(), other.ub.sum()], rtol=1e-9)
        # A tangent is a number, or one for each problem.
        for tangent, entries in ((2.0, np.full(4, 2.0)), (q[0], np.tile(q[0][:, None], 4))):
            one, other = qpdiff.jvp(sol, lb=tangent, **options), qpdiff.jvp(full, lb=entries, **options)
            np.testing.assert_allclose(one.x, other.x, rtol=1e-9)
    with pytest.raises(ValueError, match=r"tangent of lb has shape \(3,\); expected \(4,\)"):
        qpdiff.jvp(sol, lb=np.ones(3))
    with pytest.raises(ValueError, match=r"tangent of lb has shape \(4,\); expected \(\)"):
        qpdiff.jvp(qpdiff.solve_qp(Q, q[0], lb=-0.2), lb=np.ones(4))


@pytest.mark.parametrize(("n", "m", "p"), [(1, 1, 0), (1, 2, 1), (3, 12, 1), (30, 10, 5)])
def test_sizes(xp, n, m, p):
    rng = np.random.default_rng(n + m)
    parts = "Q q G h" + (" A b" if p and p < n else "")
    assert any(check_derivative(xp, rng, random_problem(rng, parts, n=n, m=m, p=p)) for _ in range(6))


def test_fixed_variables_and_infinite_bounds(xp):
    rng = np.random.default_rng(5)
    checked = []
    for _ in range(5):
        operands = random_problem(rng, "Q q A b lb ub")
        operands["lb"][:, 0] = -np.inf
        operands["ub"][:, 1] = np.inf
        operands["lb"][:, 2] = operands["ub"][:, 2] = 0.5 * (operands["lb"] + operands["ub"])[:, 2]
        operands["b"] = np.einsum(
            "bij,bj->bi", operands["A"], np.clip(np.zeros((3, 6)), operands["lb"] + 1e-2, operands["ub"] - 1e-2)
        )
        operands["A"][:, :, 2] = 0.0
        operands["b"] = np.einsum(
            "bij,bj->bi", operands["A"], np.clip(np.zeros((3, 6)), operands["lb"] + 1e-2, operands["ub"] - 1e-2)
        )
        checked.append(check_derivative(xp, rng, operands))
    assert any(checked)


@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (2, 1, 2)])
def test_batch_axes(xp, batch):
    rng = np.random.default_rng(len(batch))
    assert any(check_derivative(xp, rng, random_problem(rng, "Q q G h A b", batch=batch)) for _ in range(4))


def test_operands_broadcast_over_different_axes(xp):
    rng = np.random.default_rng(8)
    operands = random_problem(rng, "Q q G h", batch=(2, 3))
    operands["Q"] = operands["Q"][:, :1]
    operands["G"] = operands["G"][:1]
    operands["h"] = np.abs(operands["h"][0, 0]) + 0.2  # the origin is feasible
    assert check_derivative(xp, rng, operands)


def test_gradient_of_a_shared_operand_is_the_sum_over_the_batch():
    rng = np.random.default_rng(3)
    operands = random_problem(rng, "Q q G h A b", batch=(), n=5)
    repeated = {name: np.repeat(value[None], 4, axis=0) for name, value in operands.items()}
    repeated["q"] = shifted = repeated["q"] + rng.normal(size=(4, 5))
    cotangent = rng.normal(size=(4, 5))
    shared = qpdiff.vjp(qpdiff.solve_qp(**(operands | {"q": shifted}), **TIGHT), x=cotangent)
    separate = qpdiff.vjp(qpdiff.solve_qp(**repeated, **TIGHT), x=cotangent)
    for name in ("Q", "G", "h", "A", "b"):
        np.testing.assert_allclose(getattr(shared, name), getattr(separate, name).sum(0), rtol=1e-6, atol=1e-8)


def test_empty_batch():
    sol = qpdiff.solve_qp(np.eye(2), np.zeros((0, 2)), lb=np.zeros(2))
    gradients = qpdiff.vjp(sol, x=np.zeros((0, 2)))
    assert gradients.q.shape == (0, 2)
    np.testing.assert_array_equal(gradients.Q, np.zeros((2, 2)))


def test_unsolved_problems_give_nan_or_zero_and_leave_the_others_alone():
    q = np.ones((3, 2))
    h = np.array([[1.0, 1.0], [1.0, -2.0], [1.0, 1.0]])  # x₁ ≤ 1 and −x₁ ≤ −2 for the second
    G = np.array([[1.0, 0.0], [-1.0, 0.0]])
    sol = qpdiff.solve_qp(np.eye(2), q, G, h)
    assert sol.status.tolist() == [qpdiff.Status.SOLVED, qpdiff.Status.PRIMAL_INFEASIBLE, qpdiff.Status.SOLVED]
    marked = qpdiff.vjp(sol, x=np.ones((3, 2)))
    zeroed = qpdiff.vjp(sol, x=np.ones((3, 2)), unsolved="zero")
    assert np.isnan(marked.q[1]).all()
    assert np.isnan(marked.G).any()
    assert (zeroed.q[1] == 0).all()
    assert np.isfinite(zeroed.G).all()
    np.testing.assert_array_equal(marked.q[[0, 2]], zeroed.q[[0, 2]])
    with pytest.raises(ValueError, match="unsolved"):
        qpdiff.vjp(sol, x=np.ones((3, 2)), unsolved="raise")


@pytest.mark.parametrize(
    "operands",
    [
        {"A": [[1.0, 1.0], [1.0, 1.0]], "b": [1.0, 1.0]},  # the same equality twice
        {"G": [[1.0, 0.0], [1.0, 0.0]], "h": [-2.0, -2.0]},  # the same active inequality twice
        {"G": [[1.0, 0.0]], "h": [-1.0]},  # weakly active: −1 is also the unconstrained minimiser
        {"Q": np.zeros((2, 2)), "lb": [0.0, 0.0]},  # a linear program at a vertex
        {"Q": np.ones((2, 2)), "lb": [-5.0, -5.0]},  # singular Q, a line of solutions
    ],
)
def test_gradients_of_degenerate_problems_are_finite(operands):
    sol = qpdiff.solve_qp(**({"Q": np.eye(2), "q": np.ones(2)} | operands))
    assert sol.status == qpdiff.Status.SOLVED
    gradients = qpdiff.vjp(sol, x=np.array([1.0, -0.5]))
    assert all(np.isfinite(value).all() for value in gradients if value is not None)


def test_wrong_cotangents_and_tangents_are_named():
    sol = qpdiff.solve_qp(np.eye(2), np.ones(2))
    with pytest.raises(ValueError, match=r"cotangent of x has shape \(3,\)"):
        qpdiff.vjp(sol, x=np.ones(3))
    with pytest.raises(ValueError, match="no G"):
        qpdiff.jvp(sol, G=np.ones((1, 2)))


@pytest.mark.parametrize(("parts", "largest"), [("Q q G h A b lb ub", 0), ("Q q G h A b", 29)], ids=["primal", "dual"])
def test_the_last_factorisation_is_reused(monkeypatch, parts, largest):
    rng = np.random.default_rng(0)
    sol = qpdiff.solve_qp(**random_problem(rng, parts, n=30))
    backend = sol.linearization.problem.backend
    factor = type(backend).factor

    def refuse(self, matrix):
        assert matrix.shape[-1] <= largest, "factored again"
        return factor(self, matrix)

    monkeypatch.setattr(type(backend), "factor", refuse)
    gradients = qpdiff.vjp(sol, x=np.ones((3, 30)))
    assert np.isfinite(gradients.Q).all()


# ---- float32


@pytest.mark.parametrize("shared", [(), ("Q", "A", "G")], ids=["own", "shared"])
@pytest.mark.parametrize("smoothing", [None, 0.1])
def test_derivatives_of_float32_operands_are_those_of_float64_rounded(xp, shared, smoothing):
    rng = np.random.default_rng(4)
    operands = random_problem(rng, "Q q G h A b lb ub", shared=shared)
    operands = {name: xp.asarray(value.astype(np.float32)) for name, value in operands.items()}
    tangent = rng.normal(size=(3, 6))
    quick, precise = (qpdiff.solve_qp(**operands, dtype=dtype) for dtype in (None, "float64"))
    assert "float32" in str(quick.x.dtype)
    for kind in (np.float32, np.float64):
        direction = xp.asarray(tangent.astype(kind))
        for derivative, name in ((qpdiff.vjp, "x"), (qpdiff.jvp, "q")):
            exact, rounded = (derivative(sol, **{name: direction}, smoothing=smoothing) for sol in (precise, quick))
            for one, other in zip(exact, rounded, strict=True):
                if one is None:
                    continue
                one, other = xp.to_numpy(one), xp.to_numpy(other)
                assert (one.dtype, other.dtype) == (np.float64, np.float32)
                np.testing.assert_array_equal(other, one.astype(np.float32))


@pytest.mark.parametrize(("distance", "slope"), [(1e-3, 0.0), (-1e-3, 1.0)], ids=["active", "inactive"])
def test_float32_operands_beside_a_nearly_active_bound(xp, distance, slope):
    """In float32 arithmetic the derivative of this projection is 0.4 on one side of the kink and 0.6 on the other."""
    operands = {"Q": np.eye(1), "q": np.array([-distance]), "ub": np.zeros(1)}
    sol = qpdiff.solve_qp(**{name: xp.asarray(value.astype(np.float32)) for name, value in operands.items()})
    gradient = xp.to_numpy(qpdiff.vjp(sol, x=xp.asarray(np.ones(1, np.float32))).q)
    assert gradient.dtype == np.float32
    np.testing.assert_allclose(gradient, -slope, atol=1e-3)


# ---- the optimal value


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("shared", [(), ("Q", "G", "h", "A"), ("q", "b")], ids=lambda s: "shared-" + "".join(s))
def test_optimal_value_against_differences(xp, parts, shared):
    rng = np.random.default_rng(len(parts) + len(shared))
    operands = random_problem(rng, parts, shared=shared)
    sol = qpdiff.solve_qp(**{name: xp.asarray(value) for name, value in operands.items()}, **TIGHT)
    g, tangents, step = rng.normal(size=3), random_tangents(rng, operands), 1e-5
    gradients = qpdiff.vjp(sol, objective=xp.asarray(g))
    plus, minus = (
        qpdiff.solve_qp(**{name: value + sign * step * tangents[name] for name, value in operands.items()}, **TIGHT)
        for sign in (1, -1)
    )
    difference = float(np.sum(g * (plus.objective - minus.objective))) / (2 * step)
    pulled = 0.0
    for name, value in operands.items():
        gradient = xp.to_numpy(getattr(gradients, name))
        assert gradient.shape == value.shape
        pulled += float(np.sum(gradient * tangents[name]))
    assert abs(pulled - difference) <= 1e-6 * (1 + abs(difference))
    pushed = qpdiff.jvp(sol, **{name: xp.asarray(value) for name, value in tangents.items()}).objective
    assert pushed.dtype == sol.objective.dtype
    slope = (plus.objective - minus.objective) / (2 * step)
    np.testing.assert_allclose(xp.to_numpy(pushed), slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shared", [(), ("Q", "q", "G")])
def test_optimal_value_with_the_solution(shared):
    rng = np.random.default_rng(3)
    operands = random_problem(rng, "Q q G h A b lb ub", shared=shared)
    sol = qpdiff.solve_qp(**operands, **TIGHT)
    g, y, x = rng.normal(size=3), rng.normal(size=sol.y.shape), rng.normal(size=sol.x.shape)
    both = qpdiff.vjp(sol, x=x, y=y, objective=g)
    # ½ xᵀQx + qᵀx, differentiated as a function of the solution
    cost = np.einsum("...ij,...j->...i", operands["Q"], sol.x) + operands["q"]
    explicit = qpdiff.vjp(sol, x=x + g[:, None] * cost, y=y)._asdict()
    explicit["q"] = explicit["q"] + (g[:, None] * sol.x).sum(0) if shared else explicit["q"] + g[:, None] * sol.x
    outer = np.einsum("b,bi,bj->bij", g / 2, sol.x, sol.x)
    explicit["Q"] = explicit["Q"] + (outer.sum(0) if shared else outer)
    for name in operands:
        np.testing.assert_allclose(getattr(both, name), explicit[name], rtol=1e-7, atol=1e-8, err_msg=name)


def test_optimal_value_where_the_solution_is_degenerate():
    # minimise -x₁ - x₂ with x₁ + x₂ ≤ h and 0 ≤ x ≤ 1: a face of solutions, with the optimal value -h
    sol = qpdiff.solve_qp(np.zeros((2, 2)), -np.ones(2), G=np.ones((1, 2)), h=[1.5], lb=0.0, ub=1.0)
    gradients = qpdiff.vjp(sol, objective=2.0)
    np.testing.assert_allclose(gradients.h, [-2.0], atol=1e-6)
    np.testing.assert_allclose([gradients.lb, gradients.ub], 0.0, atol=1e-6)
    np.testing.assert_allclose(gradients.q, 2 * sol.x, atol=1e-6)


@pytest.mark.parametrize("with_x", [False, True])
def test_optimal_value_of_unsolved_problems(with_x):
    sol = qpdiff.solve_qp(np.eye(1), [1.0], G=np.ones((1, 1)), h=[[1.0], [-1.0]], lb=[[0.0], [0.0]])
    assert sol.status.tolist() == [qpdiff.Status.SOLVED, qpdiff.Status.PRIMAL_INFEASIBLE]
    cotangents = {"objective": 1.0} | ({"x": np.ones(1)} if with_x else {})
    assert np.isnan(qpdiff.vjp(sol, **cotangents).lb[:, 0]).tolist() == [False, True]
    assert np.isnan(qpdiff.vjp(sol, **cotangents).Q).all()
    zeros = qpdiff.vjp(sol, **cotangents, unsolved="zero")
    assert zeros.lb[1, 0] == zeros.h[1, 0] == 0.0 != zeros.lb[0, 0]
    assert np.isnan(qpdiff.jvp(sol, lb=np.ones(1)).objective).tolist() == [False, True]
    assert qpdiff.jvp(sol, lb=np.ones(1), unsolved="zero").objective[1] == 0.0
    with pytest.raises(ValueError, match="unsolved is 'no'"):
        qpdiff.vjp(sol, objective=1.0, unsolved="no")
    with pytest.raises(ValueError, match="cotangent of objective has shape"):
        qpdiff.vjp(sol, objective=np.ones(3))


@pytest.mark.parametrize("smoothing", [None, 0.1])
def test_a_problem_without_numbers_leaves_the_gradients_of_shared_operands_alone(xp, smoothing):
    """They are those of a batch whose second problem has zeros as its cotangents."""
    if smoothing is not None and xp.name in ("jax", "array-api-strict"):
        pytest.skip("takes long")
    rng = np.random.default_rng(21)
    operands = {name: value[0] for name, value in strictly_feasible(rng, "A G", n=3, m=2, p=1).items()}
    operands |= {"q": rng.normal(size=(3, 3)), "h": np.ones((3, 2))}
    one_without = operands | {"h": np.where([[False], [True], [False]], np.nan, operands["h"])}
    with_numbers, without = (
        qpdiff.solve_qp(**{name: xp.asarray(value) for name, value in each.items()}, check=False)
        for each in (operands, one_without)
    )
    assert np.isnan(xp.to_numpy(without.z)[1]).all()
    cotangents = {"x": rng.normal(size=(3, 3)), "z": rng.normal(size=(3, 2)), "objective": rng.normal(size=3)}
    for names in (("x", "z"), ("objective",), ("x", "objective")):
        gradients = []
        for sol, fill in ((with_numbers, 0.0), (without, np.nan)):  # those of a loss are NaN where the solution is
            for name in names:
                cotangents[name][1] = fill
            given = {name: xp.asarray(cotangents[name]) for name in names}
            gradients.append(qpdiff.vjp(sol, **given, smoothing=smoothing, unsolved="zero"))
        for name in operands:
            expected, found = (xp.to_numpy(getattr(each, name)) for each in gradients)
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9, err_msg=f"{name} of {names}")
        assert np.isnan(xp.to_numpy(qpdiff.vjp(without, **given, smoothing=smoothing).G)).all()


def test_the_tangent_of_the_optimal_value_is_beside_the_other_five():
    """Code that unpacks five tangents stays right."""
    sol = qpdiff.solve_qp(np.eye(2), [-1.0, 2.0], lb=0.0)
    tangents = qpdiff.jvp(sol, q=np.array([1.0, 0.0]))
    x, _, _, z_lb, _ = tangents
    np.testing.assert_allclose([*x, *z_lb], [-1.0, 0.0, 0.0, 0.0], atol=1e-6)
    assert len(tangents) == 5
    for copied in (tangents, copy.deepcopy(tangents), pickle.loads(pickle.dumps(tangents))):
        np.testing.assert_allclose(copied.objective, 1.0, atol=1e-6)
    assert qpdiff.jvp(qpdiff.solve_qp(np.eye(2), np.ones((0, 2)))).objective.shape == (0,)
