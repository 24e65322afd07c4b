"""Prices of violations in the adapters: first derivatives are those of `qpdiff.vjp`, second ones finite differences."""

import numpy as np
import pytest
from elastic_problems import contradictory

import qpdiff

CASES = [("G h", None), ("G h A b lb ub", None), ("G h A b", 0.05)]


def draw(parts):
    """A small problem with both prices, all leaves by name, and functions of the leaves."""
    rng = np.random.default_rng(0)
    problem = contradictory(rng, parts, batch=(2,), n=3, m=4, p=2)
    leaves = dict(problem)
    for option, low, high in (("elastic", -0.5, 0.5), ("elastic_quadratic", -2, 0)):
        for of, k in (("G", "h"), ("A", "b")):
            if of in problem:
                leaves[f"{option} {of}"] = 10 ** rng.uniform(low, high, problem[k].shape)
    return leaves, rng


def arguments(leaves):
    """The arguments of solve_qp, with the symmetric part of Q."""
    out = {name: value for name, value in leaves.items() if " " not in name}
    out["Q"] = (out["Q"] + out["Q"].swapaxes(-1, -2)) / 2
    for name, value in leaves.items():
        option, _, of = name.partition(" ")
        if of:
            out.setdefault(option, {})[of] = value
    return out


def expected_gradients(leaves, weights, smoothing):
    sol = qpdiff.solve_qp(**arguments(leaves))
    grads = qpdiff.vjp(sol, x=weights, objective=2.0, smoothing=smoothing)
    of = {}
    for name in leaves:
        option, _, part = name.partition(" ")
        of[name] = getattr(grads, option)[part] if part else getattr(grads, option)
    return of


@pytest.mark.parametrize(("parts", "smoothing"), CASES[1:])
def test_torch(parts, smoothing):
    torch = pytest.importorskip("torch")
    import qpdiff.torch

    leaves, rng = draw(parts)
    weights = torch.tensor(rng.normal(size=(2, 3)))
    values = [torch.tensor(value, requires_grad=True) for value in leaves.values()]

    def loss(*values):
        given = arguments(dict(zip(leaves, values, strict=True)))
        sol = qpdiff.torch.solve_qp(**given, smoothing=smoothing, tol=1e-11)
        return (weights * sol.x).sum() + 2 * sol.objective.sum()

    gradients = torch.autograd.grad(loss(*values), values)
    for value, other in zip(gradients, expected_gradients(leaves, weights.numpy(), smoothing).values(), strict=True):
        np.testing.assert_allclose(value.numpy(), other, atol=1e-5)
    step = 1e-6 if smoothing is None else 1e-4  # relaxed points are known to the root of the rounding error
    torch.autograd.gradgradcheck(
        loss, values, eps=step, atol=1e-2, rtol=1e-3, fast_mode=True, check_fwd_over_rev=True
    )  # fmt: skip


def test_torch_forward_mode_and_violation():
    torch = pytest.importorskip("torch")
    import qpdiff.torch

    leaves, _ = draw("G h A b lb ub")
    values = [torch.tensor(value, requires_grad=True) for value in leaves.values()]

    def outputs(*values):
        sol = qpdiff.torch.solve_qp(**arguments(dict(zip(leaves, values, strict=True))), tol=1e-11)
        return sol.x, sol.y, sol.z, sol.objective, *(part for part in sol.violation if part is not None)

    torch.autograd.gradcheck(outputs, values, atol=1e-3, rtol=1e-3, fast_mode=True, check_forward_ad=True)


def test_torch_scalar_price():
    torch = pytest.importorskip("torch")
    import qpdiff.torch

    w = torch.tensor(0.5, requires_grad=True)
    x = qpdiff.torch.solve_qp(torch.eye(1), torch.zeros(1), -torch.ones(1, 1), -torch.ones(1), elastic=w).x
    x.sum().backward()  # x = min(w, 1)
    assert abs(float(x.detach()) - 0.5) < 1e-6
    assert abs(float(w.grad) - 1.0) < 1e-6


def test_torch_maps_over_prices():
    torch = pytest.importorskip("torch")
    import qpdiff.torch

    def solve(w):  # x₁ = x₂ = min(w, 2)
        G, h = -torch.ones(1, 2), torch.tensor([-4.0])
        return qpdiff.torch.solve_qp(torch.eye(2), torch.zeros(2), G, h, elastic=w).x.sum()

    w = torch.tensor([0.5, 1.0, 3.0])
    torch.testing.assert_close(torch.func.vmap(solve)(w), torch.tensor([1.0, 2.0, 4.0]))
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(solve))(w), torch.tensor([2.0, 2.0, 0.0]))


def test_a_layer_takes_prices():
    torch = pytest.importorskip("torch")
    import qpdiff.torch

    q = torch.ones(6, 4)
    layer, priced = qpdiff.torch.OptNet(4, m=3, p=1), qpdiff.torch.OptNet(4, m=3, p=1, elastic=1e4)
    priced.load_state_dict(layer.state_dict())  # always feasible, so that the price does not matter
    torch.testing.assert_close(priced(q), layer(q), atol=1e-5, rtol=1e-5)


def test_torch_traces_prices():
    torch = pytest.importorskip("torch")
    import qpdiff.torch

    def solve(q):
        return qpdiff.torch.solve_qp(torch.eye(1), q, torch.ones(1, 1), torch.zeros(1), elastic=1.0).x

    program = torch.fx.experimental.proxy_tensor.make_fx(solve, tracing_mode="fake")(torch.zeros(1))
    q = -torch.ones(1)
    torch.testing.assert_close(program(q), solve(q))


@pytest.mark.parametrize(("parts", "smoothing"), CASES[1:])
def test_jax(parts, smoothing):
    jax = pytest.importorskip("jax")
    import qpdiff.jax

    leaves, rng = draw(parts)
    weights = rng.normal(size=(2, 3))
    with jax.enable_x64(True):
        leaves = {name: jax.numpy.asarray(value) for name, value in leaves.items()}

        def loss(leaves):
            sol = qpdiff.jax.solve_qp(**arguments(leaves), smoothing=smoothing, tol=1e-11)
            return (weights * sol.x).sum() + 2 * sol.objective.sum()

        gradient = jax.jit(jax.grad(loss))
        numbers = {name: np.asarray(value) for name, value in leaves.items()}
        for value, other in zip(
            gradient(leaves).values(), sorted_values(expected_gradients(numbers, weights, smoothing)), strict=True
        ):
            np.testing.assert_allclose(value, other, atol=1e-5)
        if smoothing is not None:
            return
        direction = {name: rng.normal(size=value.shape) * np.abs(value) for name, value in numbers.items()}
        step = 1e-6
        sides = [
            gradient({name: value + sign * step * direction[name] for name, value in leaves.items()})
            for sign in (1, -1)
        ]
        _, second = jax.jvp(gradient, (leaves,), ({name: jax.numpy.asarray(d) for name, d in direction.items()},))
        for name in leaves:
            difference = (sides[0][name] - sides[1][name]) / (2 * step)
            scale = max(1.0, float(np.max(np.abs(difference))))
            np.testing.assert_allclose(second[name], difference, atol=1e-3 * scale)


@pytest.mark.parametrize("smoothing", [None, 1e-2])
@pytest.mark.parametrize("engine", ["compiled", "array"])
def test_jax_maps_over_prices(engine, smoothing):
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    import qpdiff.jax

    with jax.enable_x64(True):

        def solve(w):  # minimise ½|x − 3|² + w·x₊, whose x is 3 − w where that is positive, else 0
            return qpdiff.jax.solve_qp(
                jnp.eye(2), jnp.full(2, -3.0), jnp.eye(2), jnp.zeros(2), elastic={"G": w}, smoothing=smoothing,
                engine=engine, tol=1e-11,
            )  # fmt: skip

        prices = jnp.array([[0.5, 2.0], [1.0, 7.0]])
        expected = [[2.5, 1.0], [2.0, 0.0]]
        sol = jax.vmap(solve)(prices)
        np.testing.assert_allclose(sol.x, expected, atol=1e-7)
        np.testing.assert_allclose(sol.violation.G, expected, atol=1e-7)
        each = [jax.jacfwd(lambda w: solve(w).x)(w) for w in prices]
        mapped = jax.jit(jax.vmap(jax.jacrev(lambda w: solve(w).x)))(prices)
        np.testing.assert_allclose(mapped, each, atol=1e-7)
        if smoothing is None:
            np.testing.assert_allclose(each, [[[-1, 0], [0, -1]], [[-1, 0], [0, 0]]], atol=1e-5)


def sorted_values(by_name):
    """The values in the order of JAX's dictionaries."""
    return [by_name[name] for name in sorted(by_name)]


@pytest.mark.parametrize(("parts", "smoothing"), CASES)
def test_autograd(parts, smoothing):
    autograd = pytest.importorskip("autograd")
    import autograd.numpy as anp

    import qpdiff.autograd

    leaves, rng = draw(parts)
    weights = rng.normal(size=(2, 3))
    names = list(leaves)

    def loss(values):
        given = arguments(dict(zip(names, values, strict=True)))
        sol = qpdiff.autograd.solve_qp(**given, smoothing=smoothing, tol=1e-11)
        return anp.sum(weights * sol.x) + 2 * anp.sum(sol.objective)

    gradient = autograd.grad(loss)
    values = list(leaves.values())
    for value, other in zip(gradient(values), expected_gradients(leaves, weights, smoothing).values(), strict=True):
        np.testing.assert_allclose(value, other, atol=1e-5)
    direction = [rng.normal(size=value.shape) * np.abs(value) for value in values]
    other_way = [rng.normal(size=value.shape) * np.abs(value) for value in values]

    def along(values):
        return sum(anp.sum(g * d) for g, d in zip(gradient(values), direction, strict=True))

    second = sum(np.sum(g * d) for g, d in zip(autograd.grad(along)(values), other_way, strict=True))
    step = 1e-6 if smoothing is None else 1e-4
    sides = [along([v + sign * step * d for v, d in zip(values, other_way, strict=True)]) for sign in (1, -1)]
    np.testing.assert_allclose(second, (sides[0] - sides[1]) / (2 * step), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("seed", range(12))
def test_dask(seed):
    pytest.importorskip("dask.array")
    import dask
    import dask.array as da

    import qpdiff.dask

    rng = np.random.default_rng(seed)
    parts, batch = (("G", ()), ("A", (5,)), ("A G lb ub", (5,)), ("A G lb ub", (2, 3)))[seed % 4]
    eager = contradictory(rng, parts, batch=batch, shared=("Q", "G") if seed % 3 else (), n=4, m=4, p=2)
    sizes = {"A": 2, "G": 4, "bounds": 4}
    present = [of for of in sizes if of in eager or (of == "bounds" and "lb" in eager)]
    prices = {}
    for option in ("elastic", "elastic_quadratic")[: 1 + seed % 2]:
        shapes = {of: ((), (sizes[of],), (*batch, sizes[of]))[rng.integers(3)] for of in present}
        prices[option] = {of: 10 ** rng.uniform(-1, 0.5, shape) for of, shape in shapes.items()}
    if seed % 5 == 0:
        prices["elastic"] = 0.7  # of A and G alone

    def lazily(value):
        value = np.asarray(value)
        chunks = [2] * (value.ndim - 1) + [3] * (value.ndim > 0)
        return da.from_array(value, chunks=tuple(chunks)) if rng.uniform() < 0.6 else value

    def each(function, option):
        return {of: function(price) for of, price in option.items()} if isinstance(option, dict) else option

    expected = qpdiff.solve_qp(**eager, **prices, tol=1e-10)
    cotangents = {"x": rng.normal(size=expected.x.shape), "objective": 2.0}
    moved = {"q": rng.normal(size=eager["q"].shape)} | {
        option: each(lambda price: rng.normal(size=np.shape(price)), value) for option, value in prices.items()
    }
    lazy = {name: lazily(value) for name, value in eager.items()}
    lazy_prices = {option: each(lazily, value) for option, value in prices.items()}
    sol = qpdiff.dask.solve_qp(**lazy, **lazy_prices, tol=1e-10, unsolved="nan")
    pulled, pushed = qpdiff.dask.vjp(sol, **cotangents), qpdiff.dask.jvp(sol, **moved)
    found, gradients, tangents = dask.compute(sol, pulled, pushed, scheduler="sync")
    np.testing.assert_array_equal(found.status, expected.status)
    np.testing.assert_allclose(found.x, expected.x, atol=1e-7)
    np.testing.assert_allclose(found.objective, expected.objective, rtol=1e-9)
    for name, value in expected.violation._asdict().items():
        lazy_part, part = getattr(sol.violation, name), getattr(found.violation, name)
        assert (part is None) == (value is None)
        if value is not None:
            assert lazy_part.shape == value.shape
            np.testing.assert_allclose(part, value, atol=1e-7)
    for name, value in qpdiff.vjp(expected, **cotangents)._asdict().items():
        both = getattr(gradients, name), value
        for one, other in zip(*(part.values() if isinstance(value, dict) else [part] for part in both), strict=True):
            if other is None:
                assert one is None
            else:
                assert one.shape == other.shape, name
                np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5, err_msg=name)
        assert isinstance(value, dict) == isinstance(both[0], dict)
    expected_tangents = qpdiff.jvp(expected, **moved)
    for one, other in zip(
        (*tangents, tangents.objective), (*expected_tangents, expected_tangents.objective), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_bad_prices_in_dask_raise_at_once_as_without():
    pytest.importorskip("dask.array")
    import qpdiff.dask

    good = {"Q": np.eye(2), "q": np.ones((3, 2)), "G": np.ones((4, 2)), "h": np.ones(4)}
    for prices in (
        {"elastic": np.ones(4)},
        {"elastic": {"A": 1.0}},
        {"elastic": {"rows": 1.0}},
        {"elastic": {"G": np.ones(3)}},
        {"elastic_quadratic": {"G": np.ones((5, 4))}},
    ):
        with pytest.raises((TypeError, ValueError)) as expected:
            qpdiff.solve_qp(**good, **prices)
        with pytest.raises(expected.type) as error:
            qpdiff.dask.solve_qp(**good, **prices)
        assert str(error.value) == str(expected.value)
    sols = [module.solve_qp(**good, elastic={"G": np.ones(4)}) for module in (qpdiff, qpdiff.dask)]
    for tangent in ({"elastic": {"A": 1.0}}, {"elastic_quadratic": 1.0}):
        with pytest.raises(ValueError, match="was given, but the problem has no") as expected:
            qpdiff.jvp(sols[0], **tangent)
        with pytest.raises(ValueError, match="was given, but") as error:
            qpdiff.dask.jvp(sols[1], **tangent)
        assert str(error.value) == str(expected.value)
