"""The JAX adapter: under every transformation, against NumPy's answers, finite differences and closed forms."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

jax = pytest.importorskip("jax")
import jax.numpy as jnp
from emulated_gpu import pose
from jax.test_util import check_grads
from problems import random_problem, relaxed, rounded_product, strictly_feasible
from sparse_problems import as_sparse, smooth_sparse

import qpdiff
import qpdiff.jax
from qpdiff.backend.jax import BufferBackend
from qpdiff.engines.choice import compiled_engine

TIGHT = {"tol": 1e-12, "rtol": 1e-13}
OUTPUTS = ("x", "y", "z", "z_lb", "z_ub")


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def with_engine(name):
    if name == "compiled" and compiled_engine()[0] is None:
        pytest.skip("the compiled engine was not built")
    return partial(qpdiff.jax.solve_qp, engine=name)


def pose_as_gpu(monkeypatch, **options):
    """Let JAX's buffers on the CPU pose as a GPU's."""
    if jax.default_backend() != "cpu":
        pytest.skip("JAX works on a GPU")

    def located(self, buffer):
        value = np.asarray(buffer)
        return value.ctypes.data, value[0].size if len(value) > 1 else 0, buffer

    monkeypatch.setattr(BufferBackend, "of", lambda buffer, context: BufferBackend(0))
    monkeypatch.setattr(BufferBackend, "located", located)
    monkeypatch.setattr(qpdiff.jax.call, "_inside_callbacks", lambda device: BufferBackend(0))
    return pose(monkeypatch, BufferBackend, **options)


@pytest.fixture(params=["compiled", "array", "kernels"])
def solve_qp(request, monkeypatch):
    if request.param == "kernels":
        pose_as_gpu(monkeypatch)
        return with_engine("compiled")
    return with_engine(request.param)


@pytest.fixture(params=["compiled", "kernels"])
def called(request, monkeypatch):
    """The compiled engine, which is called from JAX's program."""
    if request.param == "kernels":
        pose_as_gpu(monkeypatch)
    return with_engine("compiled")


@pytest.fixture
def on_host():
    return with_engine("compiled")


def some(rng, parts, **sizes):
    operands = random_problem(rng, parts, **({"batch": (3,), "n": 4, "m": 3, "p": 1} | sizes))
    return {name: jnp.asarray(value) for name, value in operands.items()}


def weigh(sol):
    """A number that depends on every output."""
    return sum(jnp.sum(jnp.sin((i + 1) * getattr(sol, name))) for i, name in enumerate(OUTPUTS))


@pytest.mark.parametrize("parts", ["", "A", "G", "A G", "lb ub", "A G lb ub"])
@pytest.mark.parametrize("cost", ["pd", "diagonal"])
def test_under_jit_as_on_numpy(parts, cost, solve_qp):
    solve = jax.jit(lambda operands: solve_qp(**operands))
    for seed in range(5):
        operands = some(np.random.default_rng(seed), parts, cost=cost)
        sol = solve(operands)
        expected = qpdiff.solve_qp(**{name: np.asarray(value) for name, value in operands.items()}, engine="array")
        np.testing.assert_array_equal(sol.status, expected.status)
        np.testing.assert_allclose(sol.iterations, expected.iterations, atol=1)
        for name in OUTPUTS:
            np.testing.assert_allclose(getattr(sol, name), getattr(expected, name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("parts", ["A G", "A lb ub"])
def test_every_derivative_to_second_order(parts, solve_qp):
    operands = some(np.random.default_rng(1), parts, batch=(2,), n=3, m=2)

    @jax.jit
    def loss(operands):
        symmetric = (operands["Q"] + operands["Q"].mT) / 2
        sol = solve_qp(**operands | {"Q": symmetric}, **TIGHT)
        return weigh(sol) + jnp.sum(jnp.cos(sol.objective))

    check_grads(loss, (operands,), order=2, modes=("fwd", "rev"))


@pytest.mark.parametrize("shared", [(), ("Q", "G", "b")])
def test_the_optimal_value_as_vjp_has_it(shared, called):
    operands = some(np.random.default_rng(2), "A G lb ub", shared=shared, fixed=1, infinite=0.3)
    cotangent = jnp.asarray(np.random.default_rng(3).normal(size=3))
    gradients = jax.grad(lambda operands: cotangent @ called(**operands).objective)(operands)
    expected = qpdiff.vjp(called(**operands), objective=cotangent)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, getattr(expected, name), rtol=1e-9, atol=1e-9, err_msg=name)


def test_the_optimal_value_of_unsolved_problems(called):
    def loss(q, unsolved):
        h = jnp.array([[1.0, 1.0], [-2.0, -2.0]])
        return jnp.sum(called(jnp.eye(1), q, jnp.array([[1.0], [-1.0]]), h, unsolved=unsolved).objective)

    q = jnp.full((2, 1), -0.5)
    assert np.isnan(jax.grad(loss)(q, "nan")[:, 0]).tolist() == [False, True]
    np.testing.assert_allclose(jax.grad(loss)(q, "zero")[:, 0], [0.5, 0.0], atol=1e-6)


def test_gradients_are_those_of_vjp_with_and_without_a_kept_factor(solve_qp):
    for names in ("A G", "G lb ub"):
        operands = some(np.random.default_rng(2), names, n=6, m=2)
        cotangent = jnp.asarray(np.random.default_rng(3).normal(size=operands["q"].shape))
        pulled = jax.jit(jax.grad(lambda o, c=cotangent: jnp.sum(c * solve_qp(**o).x)))(operands)
        sol = qpdiff.solve_qp(**{name: np.asarray(value) for name, value in operands.items()})
        expected = qpdiff.vjp(sol, x=np.asarray(cotangent))
        for name in operands:
            np.testing.assert_allclose(pulled[name], getattr(expected, name), rtol=1e-5, atol=1e-6)


def test_hessian_of_a_value_function(solve_qp):
    """The optimal value v(b) of min ½ xᵀQx, Ax = b has the Hessian (A Q⁻¹ Aᵀ)⁻¹ (Boyd & Vandenberghe, 5.6)."""
    rng = np.random.default_rng(4)
    L, A, b = rng.normal(size=(4, 4)), rng.normal(size=(2, 4)), rng.normal(size=2)
    Q = L @ L.T + np.eye(4)

    def value(b):
        x = solve_qp(Q, jnp.zeros(4), A=A, b=b, **TIGHT).x
        return x @ Q @ x / 2

    expected = np.linalg.inv(A @ np.linalg.solve(Q, A.T))
    np.testing.assert_allclose(jax.jit(jax.hessian(value))(jnp.asarray(b)), expected, rtol=1e-8)


def test_both_modes_give_the_jacobian_of_a_projection_onto_the_simplex(solve_qp):
    def project(point):
        return solve_qp(jnp.eye(3), -point, A=jnp.ones((1, 3)), b=[1.0], lb=jnp.zeros(3)).x

    point = jnp.asarray([0.4, 0.5, 0.3])
    for jacobian in (jax.jacfwd, jax.jacrev):
        np.testing.assert_allclose(jax.jit(jacobian(project))(point), np.eye(3) - 1 / 3, atol=1e-6)


def test_numbers_as_bounds(solve_qp):
    Q, q = jnp.diag(jnp.asarray([1.0, 2.0, 3.0])), jnp.asarray([[3.0, -2.0, 0.1], [-4.0, 2.0, 6.0]])

    @jax.jit
    def loss_and_gradients(lb, ub):
        return jax.value_and_grad(lambda lb, ub: weigh(solve_qp(Q, q, lb=lb, ub=ub, **TIGHT)), (0, 1))(lb, ub)

    _, gradients = loss_and_gradients(-0.9, 0.7)
    assert [gradient.shape for gradient in gradients] == [(), ()]
    for gradient, (dl, du) in zip(gradients, [(1e-5, 0.0), (0.0, 1e-5)], strict=True):
        above, below = (loss_and_gradients(-0.9 + sign * dl, 0.7 + sign * du)[0] for sign in (1, -1))
        np.testing.assert_allclose(gradient, (above - below) / 2e-5, rtol=1e-6)


def test_vmap_is_the_batch(solve_qp):
    operands = some(np.random.default_rng(5), "A G lb")
    shared = {name: value if name in ("q", "h") else value[0] for name, value in operands.items()}
    axes = {name: 0 if name in ("q", "h") else None for name in operands}

    def loss(operands):
        return jnp.sum(solve_qp(**operands).x ** 3)

    batch = solve_qp(**shared)
    mapped = jax.jit(jax.vmap(lambda o: solve_qp(**o), in_axes=(axes,)))(shared)
    for name in (*OUTPUTS, "status", "objective"):
        np.testing.assert_allclose(getattr(mapped, name), getattr(batch, name), rtol=1e-9, atol=1e-9)
    each = jax.jit(jax.vmap(jax.grad(loss), in_axes=(axes,)))(shared)
    whole = jax.jit(jax.grad(loss))(shared)
    for name, axis in axes.items():
        total = each[name] if axis == 0 else jnp.sum(each[name], axis=0)
        np.testing.assert_allclose(total, whole[name], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("parts", ["A G", "lb ub"])
def test_the_whole_solve_lowers_for_accelerators(platform, parts):
    operands = some(np.random.default_rng(6), parts)
    dtype = "float32" if platform == "tpu" else None  # which has no double precision
    function = jax.jit(jax.value_and_grad(lambda o: weigh(qpdiff.jax.solve_qp(**o, dtype=dtype, engine="array"))))
    if platform == "tpu":
        operands = {name: value.astype(jnp.float32) for name, value in operands.items()}
    module = jax.export.export(function, platforms=[platform])(operands).mlir_module()
    assert "stablehlo.while" in module
    assert "callback" not in module


def test_unsolved(solve_qp):
    G, h = jnp.asarray([[1.0], [-1.0]]), jnp.asarray([[1.0, 1.0], [1.0, -2.0], [1.0, -2.0]])
    q = jnp.ones((3, 1))

    def loss(q, unsolved):
        return jnp.sum(solve_qp([[1.0]], q, G, h, unsolved=unsolved).x)

    gradient = jax.grad(loss)
    message = "2 of 3 problems not solved; the first is problem 1: PRIMAL_INFEASIBLE"
    for function in (loss, gradient, jax.jacfwd(loss)):
        with pytest.raises(RuntimeError, match=message):
            function(q, "raise")
    for traced in ("raise", "nan"):
        pulled = jax.jit(gradient, static_argnums=1)(q, traced)
        assert np.isnan(pulled).tolist() == [[False], [True], [True]]
    assert np.isnan(gradient(q, "nan")).tolist() == [[False], [True], [True]]
    np.testing.assert_array_equal(gradient(q, "zero")[1:], 0.0)
    np.testing.assert_array_equal(jax.jacfwd(loss)(q, "zero")[1:], 0.0)
    with pytest.raises(ValueError, match="unsolved"):
        loss(q, "ignore")


def test_single_precision_is_what_jax_starts_with(solve_qp):
    rng = np.random.default_rng(7)
    operands = random_problem(rng, "A G lb ub", batch=(3,), n=4, m=3, p=1)
    expected = qpdiff.solve_qp(**operands)
    with jax.enable_x64(False):
        sol = jax.jit(lambda o: solve_qp(**o))({name: jnp.asarray(value) for name, value in operands.items()})
        assert sol.x.dtype == jnp.float32
        assert not np.any(sol.status)
        np.testing.assert_allclose(sol.x, expected.x, atol=1e-3)
        with pytest.raises(ValueError, match="dtype is float64"):
            solve_qp(jnp.eye(2), jnp.ones(2), dtype="float64")


def test_the_type_follows_the_setting_of_jax_from_call_to_call():
    """Shapes that were seen with float64 switched off are not for calls with it, nor the other way."""
    numbers = {"Q": 2.0 * np.eye(3), "q": np.full((2, 3), -1.0 / 3.0)}
    for x64 in (False, True, False, True):
        with jax.enable_x64(x64):
            given = {name: jnp.asarray(value, dtype=jnp.float32) for name, value in numbers.items()}
            sol = qpdiff.solve_qp(**given, backend="jax")
            assert sol.linearization.problem.dtype == (jnp.float64 if x64 else jnp.float32)
            assert sol.objective.dtype == (jnp.float64 if x64 else jnp.float32)
            assert sol.x.dtype == jnp.float32


def test_a_hessian_that_was_computed_in_float32(solve_qp):
    """Traced or not, it is rounded by more than float64 would do."""
    Q, q = rounded_product(np.float32), jnp.asarray(np.random.default_rng(1).normal(size=(2, 6)))

    def solve(Q, **options):
        return jnp.sum(solve_qp(Q, q, lb=-jnp.ones(6), ub=jnp.ones(6), **options).x)

    expected, gradient = jax.value_and_grad(solve)(jnp.asarray(Q.astype(np.float64) + Q.mT) / 2, check=False)
    for function in (solve, jax.jit(solve)):
        value, pulled = jax.value_and_grad(function)(jnp.asarray(Q))
        np.testing.assert_allclose(value, expected, atol=1e-8)
        np.testing.assert_allclose(pulled, gradient, atol=1e-6)  # it has the type of Q
        np.testing.assert_array_equal(pulled, pulled.mT)


def test_float32_operands_are_solved_in_float64_where_there_is(solve_qp):
    operands = some(np.random.default_rng(10), "A G lb ub")
    single = {name: value.astype(jnp.float32) for name, value in operands.items()}
    precise = {name: value.astype(jnp.float64) for name, value in single.items()}

    def solve(q, operands):
        return solve_qp(**operands | {"q": q})

    def loss(q, operands):
        return weigh(solve(q, operands))

    for transformed in (lambda function: function, jax.jit):
        sol, exact = (transformed(solve)(o["q"], o) for o in (single, precise))
        for name in (*OUTPUTS, "s"):
            assert getattr(sol, name).dtype == jnp.float32
            np.testing.assert_allclose(getattr(sol, name), getattr(exact, name), rtol=1e-6, atol=1e-6)
        assert sol.objective.dtype == jnp.float64
        gradient, other = (transformed(jax.grad(loss))(o["q"], o) for o in (single, precise))
        assert gradient.dtype == jnp.float32
        np.testing.assert_allclose(gradient, other, rtol=1e-5, atol=1e-5)
    second, other = (jax.jit(jax.hessian(loss))(o["q"], o) for o in (single, precise))
    np.testing.assert_allclose(second, other, rtol=1e-4, atol=1e-4)
    mapped = jax.vmap(lambda o: solve_qp(**o).x)(single)
    np.testing.assert_allclose(mapped, sol.x, rtol=1e-6, atol=1e-6)
    assert qpdiff.vjp(solve(single["q"], single), x=jnp.ones_like(sol.x)).q.dtype == jnp.float32
    assert solve_qp(**single, dtype="float64").x.dtype == jnp.float64


def test_a_warm_start_saves_iterations(solve_qp):
    operands = some(np.random.default_rng(8), "A G lb ub")
    near = operands | {"q": operands["q"] + 1e-6}
    cold = solve_qp(**operands)
    again = jax.jit(lambda o, start: solve_qp(**o, warm_start=start))(near, cold)
    assert not np.any(again.status)
    assert np.sum(again.iterations) < np.sum(cold.iterations) / 2
    np.testing.assert_allclose(again.x, solve_qp(**near).x, atol=1e-6)


def test_a_concrete_solution_takes_vjp_and_jvp(solve_qp):
    operands = some(np.random.default_rng(9), "A G")
    sol = solve_qp(**operands)
    expected = qpdiff.solve_qp(**{name: np.asarray(value) for name, value in operands.items()})
    np.testing.assert_allclose(qpdiff.vjp(sol, x=sol.x).q, qpdiff.vjp(expected, x=expected.x).q, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(qpdiff.jvp(sol, q=sol.x).x, qpdiff.jvp(expected, q=expected.x).x, rtol=1e-5, atol=1e-6)
    smooth, other = (qpdiff.vjp(s, x=s.x, smoothing=0.1).q for s in (sol, expected))
    np.testing.assert_allclose(smooth, other, rtol=1e-5, atol=1e-6)


def test_bad_operands(solve_qp):
    with pytest.raises(ValueError, match="h has shape"):
        jax.jit(lambda h: solve_qp(jnp.eye(2), jnp.ones(2), jnp.ones((3, 2)), h).x)(jnp.ones(2))
    with pytest.raises(ValueError, match="q has NaN"):
        solve_qp(jnp.eye(2), jnp.asarray([1.0, jnp.nan]))
    with pytest.raises(ValueError, match=r"Q is not positive semidefinite.*\(problem \(1, 0\) of the batch\)"):
        solve_qp(jnp.asarray([[np.eye(2)], [-np.eye(2)]]), jnp.ones((2, 3, 2)))
    with jax.enable_x64(False), pytest.raises(ValueError, match="q has NaN"):
        solve_qp(jnp.eye(2), jnp.asarray([1.0, jnp.nan]))
    with pytest.raises(ValueError, match="q has NaN"):
        jax.grad(lambda q: solve_qp(jnp.eye(2), q).x[0])(jnp.asarray([1.0, jnp.nan]))
    with pytest.raises(TypeError, match=r"has no numbers yet.*qpdiff\.jax\.solve_qp"):
        jax.jit(lambda q: qpdiff.solve_qp(jnp.eye(2), q).x)(jnp.ones(2))
    with pytest.raises(ValueError, match="verbose"):
        qpdiff.solve_qp(jnp.eye(2), jnp.ones(2), verbose=True)


def test_lists_of_traced_numbers(solve_qp):
    solved = jax.jit(lambda a: solve_qp(jnp.eye(2), [-a, 0.0], lb=[0.0, 1.0]).x)(2.0)
    np.testing.assert_allclose(solved, [2.0, 1.0], atol=1e-6)


# ---- the compiled engine, called from JAX's program


def test_gradients_in_any_order_of_transformations(called):
    operands = some(np.random.default_rng(11), "A G lb ub")
    cotangent = jnp.asarray(np.random.default_rng(12).normal(size=operands["q"].shape))

    def loss(operands, cotangent):
        return jnp.sum(cotangent * called(**operands).x)

    sol = qpdiff.solve_qp(**{name: np.asarray(value) for name, value in operands.items()})
    expected = qpdiff.vjp(sol, x=np.asarray(cotangent))
    gradient = jax.grad(loss)
    remat = jax.grad(jax.checkpoint(loss))
    for transformed in (
        gradient, jax.jit(gradient), jax.vmap(gradient), jax.jit(jax.vmap(gradient)), jax.vmap(jax.jit(gradient)),
        remat, jax.jit(remat), jax.jit(jax.vmap(remat)),
        lambda o, c: jax.lax.map(lambda pair: gradient(*pair), (o, c)),
    ):  # fmt: skip
        pulled = transformed(operands, cotangent)
        for name in operands:
            np.testing.assert_allclose(pulled[name], getattr(expected, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("parts", ["A G", "A G lb"])
def test_gradients_of_the_factor_that_the_solve_has_stored(parts, on_host):
    """Another factor of the same matrix would give other last digits."""
    operands = some(np.random.default_rng(21), parts, n=6, m=2)
    cotangent = jnp.asarray(np.random.default_rng(22).normal(size=operands["q"].shape))
    gradient = jax.grad(lambda operands, cotangent: jnp.sum(cotangent * on_host(**operands).x))
    shared = operands | {name: operands[name][0] for name in operands if name not in ("q", "h")}
    axes = {name: 0 if name in ("q", "h") else None for name in operands}
    for given, transformed in (
        (operands, (gradient, jax.jit(gradient), jax.vmap(gradient))),
        (shared, (gradient, jax.jit(jax.vmap(gradient, in_axes=(axes, 0))))),
    ):
        sol = qpdiff.solve_qp(**{name: np.asarray(value) for name, value in given.items()})
        expected = qpdiff.vjp(sol, x=np.asarray(cotangent))
        for function in transformed:
            np.testing.assert_array_equal(function(given, cotangent)["q"], expected.q)


@pytest.mark.parametrize("case", ["numbers decide on the form", "mapped matrices", "too many"])
def test_gradients_where_a_factor_cannot_be_stored(case, on_host, monkeypatch):
    diagonal = case == "numbers decide on the form"
    operands = some(
        np.random.default_rng(23), "A lb ub" if diagonal else "A G", n=6, cost="diagonal" if diagonal else "pd"
    )
    if case == "mapped matrices":  # which the problems of one call share
        operands |= {name: operands[name][0] for name in ("Q", "A", "G")}
    if case == "too many":  # for all of the mapped problems together
        monkeypatch.setattr("qpdiff.engines.compiled.engine.STORED_BYTES", (8 * 3 * 300, 0))
    given = {name: jnp.stack([value, 1.1 * value]) for name, value in operands.items()}
    mapped = jax.vmap(jax.grad(lambda operands: jnp.sum(on_host(**operands, **TIGHT).x)))(given)
    for i in range(2):
        sol = qpdiff.solve_qp(**{name: np.asarray(value[i]) for name, value in given.items()}, **TIGHT)
        expected = qpdiff.vjp(sol, x=np.ones((3, 6)))
        for name in operands:
            np.testing.assert_allclose(mapped[name][i], getattr(expected, name), rtol=1e-6, atol=1e-8, err_msg=name)


def test_jacobians_of_shared_operands_under_vmap(called):
    """Right-hand sides that are mapped, beside problems that are not, or along another axis."""
    rng = np.random.default_rng(13)
    operands = some(rng, "A G lb", batch=())
    h = jnp.asarray(operands["h"] + rng.uniform(size=(2, 5, 3)))

    def solve(h):
        return called(**operands | {"h": h}).x

    each = [[jax.jacrev(solve)(h[i, j]) for j in range(5)] for i in range(2)]
    for jacobian in (jax.jacrev(solve), jax.jacfwd(solve)):
        mapped = jax.vmap(jax.vmap(jacobian))
        np.testing.assert_allclose(mapped(h), each, rtol=1e-6, atol=1e-9)
        across = jax.jit(jax.vmap(jax.vmap(jacobian, 1), 1, 1))  # over the last axis first
        np.testing.assert_allclose(across(h.transpose(2, 0, 1)).swapaxes(0, 1), each, rtol=1e-6, atol=1e-9)
    whole = jax.jit(jax.jacrev(solve))(h)
    assert whole.shape == (2, 5, 4, 2, 5, 3)
    for i, j in np.ndindex(2, 5):
        np.testing.assert_allclose(whole[i, j, :, i, j], each[i][j], rtol=1e-6, atol=1e-9)


def test_jacobians_of_problems_with_matrices_of_their_own(called):
    operands = some(np.random.default_rng(19), "A G lb")
    jacobian = jax.jit(jax.jacrev(lambda q: called(**operands | {"q": q}).x))(operands["q"])
    assert jacobian.shape == (3, 4, 3, 4)
    for i in range(3):
        one = {name: np.asarray(value[i]) for name, value in operands.items()}
        sol = qpdiff.solve_qp(**one)
        expected = [qpdiff.vjp(sol, x=row).q for row in np.eye(4)]
        np.testing.assert_allclose(jacobian[i, :, i], expected, rtol=1e-5, atol=1e-6)
        assert not np.any(np.delete(jacobian[i], i, axis=1))


def test_hessians_agree_in_every_mode(called):
    operands = some(np.random.default_rng(14), "A G lb ub", batch=())

    def loss(q):
        return weigh(called(**operands | {"q": q}, **TIGHT))

    gradient, step = jax.jit(jax.grad(loss)), 1e-5
    q, directions = operands["q"], step * jnp.eye(4)
    differences = [(gradient(q + d) - gradient(q - d)) / (2 * step) for d in directions]
    for outer, inner in ((jax.jacfwd, jax.jacrev), (jax.jacrev, jax.jacfwd), (jax.jacrev, jax.jacrev)):
        second = jax.jit(outer(inner(loss)))(q)
        np.testing.assert_allclose(second, differences, rtol=1e-5, atol=1e-5)
    mapped = jax.jit(jax.vmap(jax.hessian(loss)))(jnp.stack([q, q + step]))
    np.testing.assert_allclose(mapped[0], differences, rtol=1e-5, atol=1e-5)


def test_a_gradient_through_a_scan(called):
    operands = some(np.random.default_rng(15), "A G", batch=())

    def rolled(q):
        def step(q, _):
            x = called(**operands | {"q": q}).x
            return 0.9 * q + 0.1 * x, x

        last, seen = jax.lax.scan(step, q, length=12)
        return jnp.sum(last**2) + jnp.sum(seen)

    def unrolled(q):
        total = 0.0
        for _ in range(12):
            x = called(**operands | {"q": q}).x
            q, total = 0.9 * q + 0.1 * x, total + jnp.sum(x)
        return jnp.sum(q**2) + total

    expected = jax.grad(unrolled)(operands["q"])
    for function in (rolled, jax.checkpoint(rolled)):
        np.testing.assert_allclose(jax.jit(jax.grad(function))(operands["q"]), expected, rtol=1e-6)


def test_without_double_precision_it_is_solved_in_double_precision(called):
    operands = random_problem(np.random.default_rng(16), "A G lb ub", batch=(3,), n=4, m=3, p=1)
    single = {name: value.astype(np.float32) for name, value in operands.items()}
    expected = qpdiff.solve_qp(**single)
    gradients = qpdiff.vjp(expected, x=np.ones_like(expected.x))
    with jax.enable_x64(False):
        arrays = {name: jnp.asarray(value) for name, value in single.items()}
        sol = called(**arrays)
        pulled = jax.jit(jax.grad(lambda o: jnp.sum(called(**o).x)))(arrays)
        rough = called(**arrays, dtype="float32")
    np.testing.assert_array_equal(sol.iterations, expected.iterations)
    for name in OUTPUTS:
        assert getattr(sol, name).dtype == jnp.float32
        np.testing.assert_allclose(getattr(sol, name), getattr(expected, name), rtol=1e-6, atol=1e-7)
    for name, value in pulled.items():
        np.testing.assert_allclose(value, getattr(gradients, name), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(rough.x, expected.x, atol=1e-3)
    assert np.any(rough.iterations < sol.iterations)


def test_large_arrays_from_several_threads(on_host):
    rng = np.random.default_rng(17)
    Q, q = jnp.asarray(np.tile(np.eye(160) + 0.01, (100, 1, 1))), jnp.asarray(rng.normal(size=(100, 160)))
    assert Q.nbytes > 20e6
    gradient = jax.jit(jax.grad(lambda Q, q: jnp.sum(on_host(Q, q, lb=jnp.full(160, -0.5)).x), (0, 1)))
    expected = gradient(Q, q)

    def in_thread(_):
        with jax.enable_x64(True):  # which is a thread's own
            return gradient(Q, q)

    with ThreadPoolExecutor(4) as threads:
        for pulled in threads.map(in_thread, range(8)):
            np.testing.assert_array_equal(pulled[0], expected[0])
    sol = qpdiff.solve_qp(np.asarray(Q), np.asarray(q), lb=np.full(160, -0.5))
    np.testing.assert_allclose(expected[1], qpdiff.vjp(sol, x=np.ones((100, 160))).q, rtol=1e-5, atol=1e-6)


def test_a_warm_start_of_each_problem_under_vmap(called):
    operands = some(np.random.default_rng(18), "A G lb ub")
    near = operands | {"q": operands["q"] + 1e-6}
    cold = called(**operands)
    again = jax.jit(jax.vmap(lambda o, start: called(**o, warm_start=start)))(near, cold)
    one = jax.vmap(lambda q: called(**operands | {"q": q}, warm_start=cold))(jnp.stack([near["q"]] * 2))
    for warm, expected in ((again.x, cold.x), (one.x[1], cold.x)):
        np.testing.assert_allclose(warm, expected, atol=1e-5)
    assert np.sum(again.iterations) < np.sum(cold.iterations) / 2


def test_an_empty_batch(called):
    Q, q = jnp.eye(2), jnp.ones((0, 2))
    gradients = jax.jit(jax.grad(lambda Q, q: jnp.sum(called(Q, q, lb=jnp.zeros(2)).x), (0, 1)))(Q, q)
    np.testing.assert_array_equal(gradients[0], 0.0)
    assert gradients[1].shape == (0, 2)


def test_the_choice_of_the_engine(called):
    q = jnp.asarray([1.0, -2.0])

    def traced(engine):
        return str(jax.make_jaxpr(lambda q: qpdiff.jax.solve_qp(jnp.eye(2), q, engine=engine).x)(q))

    for engine, callback in (("auto", True), ("compiled", True), ("array", False)):
        assert ("buffer_callback" in traced(engine)) == callback
        assert ("while" in traced(engine)) != callback
    with pytest.raises(ValueError, match="engine is 'fast'"):
        called(jnp.eye(2), q, engine="fast")
    with pytest.raises(NotImplementedError, match="host_callbacks"):
        jax.export.export(jax.jit(lambda q: called(jnp.eye(2), q).x))(q)


def test_kernels_are_launched_where_they_are_switched_on(monkeypatch):
    gpu = pose_as_gpu(monkeypatch)
    gpu.stream = 99
    operands = some(np.random.default_rng(20), "A G", n=6, m=2, p=1)

    def kernels(engine):
        gpu.launches.clear()
        jax.jit(jax.grad(lambda o: jnp.sum(qpdiff.jax.solve_qp(**o, engine=engine).x)))(operands)[
            "q"
        ].block_until_ready()
        assert {each.stream for each in gpu.launches} <= {99}
        assert {each.blocks for each in gpu.launches} <= {3}
        return [each.kernel for each in gpu.launches]

    every = ["solve_dense_dual_double", "solve_primal_double", "derivative_dense_dual_double"]
    assert kernels("auto") == kernels("compiled") == every
    assert kernels("array") == []
    monkeypatch.delenv("QPDIFF_GPU_ENGINE")
    assert kernels("auto") == []
    assert kernels("compiled") == every


def test_matrices_in_the_workspace(monkeypatch):
    operands = some(np.random.default_rng(21), "A G lb", n=20, m=15, p=2)
    expected = with_engine("compiled")(**operands)
    monkeypatch.setattr("qpdiff.engines.compiled.gpu.WORKSPACE_BYTES", 1)  # one block solves all problems
    gpu = pose_as_gpu(monkeypatch, shared_bytes=14336)
    gradient = jax.grad(lambda q: jnp.sum(qpdiff.jax.solve_qp(**operands | {"q": q}, engine="compiled").x))
    given = qpdiff.vjp(expected, x=jnp.ones((3, 20))).q
    np.testing.assert_allclose(gradient(operands["q"]), given, rtol=1e-5, atol=1e-6)
    assert {each.blocks for each in gpu.launches} == {1}


@pytest.mark.parametrize(("platform", "version"), [("tpu", "tpu"), ("gpu", "rocm 60000"), ("gpu", "cuda 13000")])
def test_other_devices(monkeypatch, platform, version):
    device = SimpleNamespace(platform=platform, client=SimpleNamespace(platform_version=version), local_hardware_id=3)
    inside = qpdiff.jax.call._inside_callbacks(device)
    assert inside.gpu == (3 if "cuda" in version else None)
    monkeypatch.setattr(qpdiff.jax.call, "_device", lambda operands: device)
    if inside.gpu is None:
        assert "while" in str(jax.make_jaxpr(lambda q: qpdiff.jax.solve_qp(jnp.eye(2), q).x)(jnp.ones(2)))
        with pytest.raises(ValueError, match=f"JAX on {platform}"):
            qpdiff.jax.solve_qp(jnp.eye(2), jnp.ones(2), engine="compiled")


def test_what_the_kernels_get_of_a_buffer():
    """On a GPU a buffer has no more than this (`jax.experimental.buffer_callback.Buffer`)."""
    buffer = SimpleNamespace(
        shape=(3, 4, 5), __cuda_array_interface__={"data": (4096, False)}, __dlpack_device__=lambda: (2, 1)
    )
    backend = BufferBackend.of(buffer, SimpleNamespace(stream=77))
    assert (backend.gpu, backend.stream()) == (1, 77)
    assert backend.located(buffer) == (4096, 20, buffer)
    buffer.shape = 1, 4, 5
    assert backend.located(buffer)[1] == 0


def test_without_the_compiled_engine(monkeypatch):
    monkeypatch.setattr("qpdiff.engines.choice.compiled_engine", lambda: (None, "this is a test"))
    q = jnp.asarray([1.0, -2.0])
    assert "while" in str(jax.make_jaxpr(lambda q: qpdiff.jax.solve_qp(jnp.eye(2), q).x)(q))
    with pytest.raises(ImportError, match="this is a test"):
        qpdiff.jax.solve_qp(jnp.eye(2), q, engine="compiled")


def test_smoothing_against_differences_of_the_relaxed_solution(called):
    rng, kappa = np.random.default_rng(6), 0.1
    operands = strictly_feasible(rng, "A G lb ub", batch=2, n=4, m=2, p=1)
    directions = {name: rng.normal(size=value.shape) for name, value in operands.items()}
    directions["Q"] = directions["Q"] + directions["Q"].mT
    weights = rng.normal(size=operands["q"].shape)

    def along(t):
        return {name: value + t * directions[name] for name, value in operands.items()}

    @jax.jit
    def loss(t):
        sol = called(**along(t), smoothing=kappa, **TIGHT)
        return jnp.sum(weights * sol.x) + jnp.sum(sol.objective)

    def relaxed_loss(t):
        d, total = along(t), 0.0
        for i, weight in enumerate(weights):
            one = {name: value[i] for name, value in d.items()}
            x = relaxed(one, kappa)[0]
            total += weight @ x + 0.5 * x @ one["Q"] @ x + one["q"] @ x
        return total

    exact = qpdiff.solve_qp(**operands, **TIGHT)
    np.testing.assert_allclose(loss(0.0), np.sum(weights * exact.x) + np.sum(exact.objective), rtol=1e-9)
    step = 1e-4
    below, at, above = (relaxed_loss(t) for t in (-step, 0.0, step))
    first, second = (above - below) / (2 * step), (above - 2 * at + below) / step**2
    for derivative in (jax.grad, jax.jacfwd):
        np.testing.assert_allclose(derivative(loss)(0.0), first, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jax.hessian(loss)(0.0), second, rtol=1e-3, atol=1e-3)


def test_smoothing_under_vmap_and_in_a_concrete_solution(called):
    operands = strictly_feasible(np.random.default_rng(7), "A G lb ub")

    def loss(lb, q):
        sol = called(**one | {"lb": lb, "q": q}, smoothing=0.1)
        return jnp.sum(sol.x**2) + sol.objective

    one = {name: value[0] for name, value in operands.items()}
    lbs = operands["lb"]
    together = jax.vmap(jax.grad(loss), (0, None))(lbs, one["q"])
    for lb, gradient in zip(lbs, together, strict=True):
        sol = qpdiff.solve_qp(**one | {"lb": lb})
        # The adapter's cotangent of x is that of the loss at the solution, as its values are the solution's.
        expected = qpdiff.vjp(sol, x=2 * sol.x, objective=1.0, smoothing=0.1)
        np.testing.assert_allclose(gradient, expected.lb, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="smoothing is -1"):
        called(**one, smoothing=-1)


def test_smoothing_of_the_traced_engine():
    operands = strictly_feasible(np.random.default_rng(8), "lb", batch=2, n=3)
    solve = partial(with_engine("array"), smoothing=0.1)
    gradient = jax.grad(lambda lb: jnp.sum(solve(**operands | {"lb": lb}).x))(operands["lb"])
    expected = qpdiff.vjp(qpdiff.solve_qp(**operands), x=np.ones((2, 3)), smoothing=0.1)
    np.testing.assert_allclose(gradient, expected.lb, rtol=1e-6, atol=1e-7)


def test_unsolved_problems_add_nothing_to_the_gradient_of_a_smoothed_value(called):
    """Where q < 0, Q = 0 and x ≤ 0, the relaxed x is κ / q; where q > 0 the problem is unbounded."""

    def loss(Q, q, unsolved):
        sol = called(Q, q, ub=jnp.zeros(2), unsolved=unsolved, smoothing=0.1)
        return jnp.sum(sol.objective)

    q = jnp.array([[1.0, 1.0], [-1.0, -1.0]])
    of_Q = jax.grad
    np.testing.assert_allclose(of_Q(loss)(jnp.zeros((2, 2)), q, "zero"), np.full((2, 2), -0.005), atol=1e-6)
    assert np.all(np.isnan(of_Q(loss)(jnp.zeros((2, 2)), q, "nan")))


@pytest.mark.parametrize("smoothing", [None, 0.1])
def test_a_problem_without_numbers_leaves_derivatives_by_shared_operands_alone(on_host, smoothing):
    shared = {name: value[0] for name, value in strictly_feasible(np.random.default_rng(3), "A G", n=3, m=2).items()}
    q = np.random.default_rng(4).normal(size=(3, 3))
    directions = {name: np.random.default_rng(5).normal(size=shared[name].shape) for name in ("Q", "G", "A")}
    directions["Q"] = directions["Q"] + directions["Q"].mT

    def loss(t, h):
        moved = {name: shared[name] + t * direction for name, direction in directions.items()}
        sol = on_host(**shared | moved | {"q": q, "h": h}, unsolved="zero", smoothing=smoothing, **TIGHT)
        return sum(jnp.sum(jnp.sin(value[jnp.array([0, 2])])) for value in (sol.x, sol.z, sol.objective))

    h = jnp.ones((3, 2))
    for derivative in (jax.grad(loss), jax.jacfwd(loss), jax.hessian(loss)):
        expected, found = (jax.jit(derivative)(0.0, side) for side in (h, h.at[1].set(jnp.nan)))
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_relaxed_point_that_is_not_found_is_named(on_host):
    with pytest.raises(RuntimeError, match=r"relaxed point of 1 of 2 problems not found; the first is problem 1\."):
        on_host(jnp.zeros((1, 1)), jnp.array([[1.0], [0.0]]), lb=0.0, smoothing=0.1)


def test_the_choice_of_the_engine_is_logged(caplog, on_host, monkeypatch):
    operands = {"Q": jnp.eye(2), "q": jnp.ones((3, 2)), "lb": jnp.zeros(2)}
    with caplog.at_level("DEBUG", logger="qpdiff"):
        qpdiff.jax.solve_qp(**operands)
        jax.jit(partial(qpdiff.jax.solve_qp, engine="array"))(**operands)
        monkeypatch.setattr(qpdiff.jax.call, "_device", lambda operands: SimpleNamespace(platform="tpu"))
        jax.eval_shape(qpdiff.jax.solve_qp, **operands)
    compiled, array, other = (record.getMessage() for record in caplog.records)
    device = jax.devices()[0]
    assert compiled.startswith(f"batch (3,), n = 2, m = 0, p = 0: compiled engine on {device}: built ahead of time")
    assert array == f"batch (3,), n = 2, m = 0, p = 0: array engine on {device}: engine='array'"
    assert other.endswith("the compiled one works on the CPU and on NVIDIA's GPUs")


# ---- sparse operands


@pytest.fixture(params=["sparse", "dense"])
def solve_sparse(request, monkeypatch):
    """The compiled engine for sparse problems, or that for dense ones."""
    solve = with_engine("compiled")
    monkeypatch.setattr("qpdiff.engines.compiled.sparse_engine.suits", lambda problem: request.param == "sparse")
    return solve


def sparse_loss(solve_qp, matrices, names, **options):
    mirror = matrices["Q"].pattern.mirror

    def loss(*values):
        given = dict(zip(names, values, strict=True))
        given |= {name: qpdiff.Sparse.like(matrix, given[name]) for name, matrix in matrices.items()}
        given["Q"] = given["Q"].with_values((given["Q"].values + given["Q"].values[..., mirror]) / 2)
        sol = solve_qp(**given, **TIGHT, **options)
        parts = [jnp.sum(jnp.sin(getattr(sol, name))) for name in (*OUTPUTS, "objective")]
        return sum(parts)

    return loss


@pytest.mark.parametrize("solve_sparse", ["sparse"], indirect=True)
@pytest.mark.parametrize("shared", [(), ("Q", "G", "A", "q")], ids=["batch", "shared"])
def test_derivatives_of_sparse_problems(solve_sparse, shared):
    operands, masks = smooth_sparse(1, "G A lb", shared=shared, batch=(2,), n=4, m=3, p=1)
    matrices = {name: as_sparse(operands[name], mask) for name, mask in masks.items()}
    values = {name: matrices[name].values if name in matrices else value for name, value in operands.items()}
    loss, arrays = sparse_loss(solve_sparse, matrices, tuple(values)), [jnp.asarray(a) for a in values.values()]
    check_grads(jax.jit(loss), arrays, order=2, rtol=1e-5, atol=1e-5)
    sol = qpdiff.solve_qp(**(operands | matrices), **TIGHT)
    cotangents = {name: np.cos(getattr(sol, name)) for name in (*OUTPUTS, "objective")}
    expected = qpdiff.vjp(sol, **cotangents)
    found = jax.grad(loss, argnums=range(len(arrays)))(*arrays)
    for name, gradient in zip(values, found, strict=True):
        by_hand = getattr(expected, name)
        by_hand = by_hand.values if name in matrices else by_hand
        np.testing.assert_allclose(gradient, by_hand, rtol=1e-5, atol=1e-6)


def test_sparse_pytrees_and_their_linearization(solve_sparse):
    operands, masks = smooth_sparse(2, "G A lb", batch=(3,), n=4, m=3, p=1)
    matrices = {name: as_sparse(operands[name], mask) for name, mask in masks.items()}
    given = jax.tree.map(jnp.asarray, operands | matrices)
    solve = lambda given: solve_sparse(**given, **TIGHT).x.sum()  # noqa: E731
    gradient = jax.jit(jax.grad(solve))(given)["G"]
    sol = solve_sparse(**given, **TIGHT)
    by_hand = qpdiff.vjp(sol, x=jnp.ones(4)).G
    assert gradient.pattern is by_hand.pattern is matrices["G"].pattern
    np.testing.assert_allclose(gradient.values, by_hand.values, rtol=1e-6, atol=1e-8)
    expected = qpdiff.solve_qp(**(operands | matrices), **TIGHT)
    np.testing.assert_allclose(sol.x, expected.x, atol=1e-7)
    pushed = qpdiff.jvp(sol, G=matrices["G"]).x
    np.testing.assert_allclose(pushed, qpdiff.jvp(expected, G=matrices["G"]).x, atol=1e-6)
    batched = jax.vmap(jax.grad(solve))(given)["G"]
    np.testing.assert_allclose(batched.values, gradient.values, rtol=1e-6, atol=1e-8)
    shared = given | {"G": jax.tree.map(lambda a: a[0], given["G"])}
    axes = ({name: None if name == "G" else 0 for name in shared},)
    of_shared = jax.vmap(jax.grad(solve), in_axes=axes)(shared)["G"].values
    np.testing.assert_allclose(of_shared[0], gradient.values[0], rtol=1e-6, atol=1e-8)
    smooth = qpdiff.vjp(expected, x=np.ones(4), smoothing=1e-2).G
    relaxed = jax.grad(lambda given: solve_sparse(**given, **TIGHT, smoothing=1e-2).x.sum())(given)["G"]
    np.testing.assert_allclose(relaxed.values, smooth.values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("solve_sparse", ["sparse"], indirect=True)
def test_bcsr_and_bcoo(solve_sparse):
    from jax.experimental.sparse import BCOO, BCSR

    dense = jnp.asarray([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    q, h = -jnp.asarray([1.0, 2.0, 1.0]), jnp.asarray([0.5, 3.0])
    expected = jax.grad(lambda G: solve_sparse(jnp.eye(3), q, G, h, **TIGHT).x[1])(dense)[dense != 0]
    for kind in (BCSR, BCOO):
        G = kind.fromdense(dense)

        def second(data, G=G, kind=kind):
            places = (data, G.indices, G.indptr) if kind is BCSR else (data, G.indices)
            return solve_sparse(jnp.eye(3), q, kind(places, shape=G.shape), h, **TIGHT).x[1]

        np.testing.assert_allclose(jax.grad(second)(G.data), expected, atol=1e-6)
        with pytest.raises(TypeError, match=r"^G has indices that JAX traces; let the function close over them"):
            jax.jit(lambda G: solve_sparse(jnp.eye(3), q, G, h).x)(G)


def test_bad_values_in_sparse_operands(solve_sparse):
    Q = qpdiff.Sparse(jnp.asarray([1.0, -1.0]), [0, 1], [0, 1, 2], (2, 2))
    with pytest.raises(ValueError, match=r"^Q is not positive semidefinite, so the problem is not convex"):
        solve_sparse(Q, jnp.ones(2))
    with pytest.raises(ValueError, match=r"^Q has NaN or infinite entries; all must be finite: Q\[1, 1\] = nan"):
        solve_sparse(Q.with_values(jnp.asarray([1.0, jnp.nan])), jnp.ones(2))


def test_sparse_operands_in_the_array_engine():
    G = qpdiff.Sparse(jnp.asarray([1.0, 1.0, 1.0]), [1, 2, 0], [0, 2, 3], (2, 3))
    given = (jnp.eye(3), -jnp.asarray([1.0, 2.0, 1.0]), G, jnp.asarray([0.5, 3.0]))
    solve = partial(qpdiff.jax.solve_qp, engine="array")
    sol, expected = solve(*given), qpdiff.solve_qp(np.eye(3), *map(np.asarray, (given[1], G.toarray(), given[3])))
    of_dense = qpdiff.vjp(expected, x=[0.0, 1.0, 0.0]).G
    by_grad = jax.grad(lambda G: solve(*given[:2], G, given[3]).x[1])(G)
    for gradient in (qpdiff.vjp(sol, x=jnp.asarray([0.0, 1.0, 0.0])).G, by_grad):
        np.testing.assert_allclose(gradient.values, of_dense[G.pattern.rows, G.indices], atol=1e-6)
