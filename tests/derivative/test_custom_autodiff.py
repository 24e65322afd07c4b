"""The code of docs/custom-autodiff.md, taken from the page: its gradients and tangents against central differences."""

import importlib.util
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from problems import apply

import qpdiff

PAGE = (Path(__file__).parents[2] / "docs" / "custom-autodiff.md").read_text(encoding="utf-8")
TIGHT = {"tol": 1e-12, "rtol": 1e-13}
STEP = 1e-5

CASES = [
    (parts, shared, seed)
    for parts in ("G h", "A b G h", "lb ub", "A b G h lb ub")
    for shared in ((), ("Q", "G", "A", "lb"))
    for seed in range(3)
]


def section(heading):
    return PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """What imports the code blocks of a section as one module (TensorFlow reads the source of functions)."""

    def load(heading):
        name = heading.replace(" ", "_").lower() + "_of_the_page"
        path = tmp_path_factory.mktemp(name) / f"{name}.py"
        path.write_text("\n\n".join(re.findall(r"^```python\n(.*?)^```$", section(heading), re.M | re.S)), "utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def draw(parts, shared, seed):
    """A random batch made around its solution, every constraint clearly active or clearly not, and a cotangent."""
    rng, batch, n = np.random.default_rng(seed), (3,), 5

    def array(name, *core):
        return rng.normal(size=core if name in shared else (*batch, *core))

    L = array("Q", n, n)
    operands = {"Q": L @ L.mT / n + np.eye(n)}
    x = array("lb" if "lb" in parts else "x", n)  # shared where it touches a bound that is
    q = -apply(operands["Q"], x)
    if "A" in parts:
        operands["A"] = array("A", 1, n)
        operands["b"] = apply(operands["A"], x)
        q = q - apply(operands["A"].mT, array("y", 1))
    if "G" in parts:
        operands["G"], z, s = array("G", 4, n), *rng.uniform(0.5, 1.5, size=(2, *batch, 4))
        z[:, 1:], s[:, :1] = 0.0, 0.0
        operands["h"] = apply(operands["G"], x) + s
        q = q - apply(operands["G"].mT, z)
    if "lb" in parts:
        operands["lb"] = x - np.array([0.0, 0.5, 0.5, 0.5, 0.5])
        q = q + np.array([1.0, 0.0, 0.0, 0.0, 0.0])
    if "ub" in parts:
        operands["ub"] = x + np.array([0.5, 0.0, 0.5, 0.5, 0.5])
        q = q - np.array([0.0, 1.0, 0.0, 0.0, 0.0])
    operands["q"] = q + np.zeros((*batch, n))
    return rng, operands, rng.normal(size=(*batch, n))


def derivative(rng, operands, cotangent, name):
    """A random tangent of an operand, and the change of the sum of cotangent ∘ x along it, by a central difference."""
    tangent = rng.normal(size=operands[name].shape)
    if name == "Q":
        tangent = tangent + tangent.mT
    plus, minus = (
        qpdiff.solve_qp(**operands | {name: operands[name] + sign * STEP * tangent}, **TIGHT).x for sign in (1, -1)
    )
    return tangent, float(np.sum(cotangent * (plus - minus))) / (2 * STEP)


def check_gradients(gradients, parts, shared, seed):
    """Whether a function of operands and cotangent gives their gradients, in their shapes."""
    rng, operands, cotangent = draw(parts, shared, seed)
    given = gradients(operands, cotangent)
    assert given.keys() == operands.keys()
    for name, value in operands.items():
        tangent, difference = derivative(rng, operands, cotangent, name)
        assert given[name].shape == value.shape
        np.testing.assert_allclose(np.sum(given[name] * tangent), difference, rtol=1e-5, atol=1e-5, err_msg=name)


INFEASIBLE = {"Q": np.eye(1), "q": np.ones((3, 1)), "G": np.array([[1.0], [-1.0]]), "h": np.array([1.0, -2.0])}


# ---- without a framework


@pytest.fixture(scope="module")
def solve_with_pull_back(load):
    return load("Reverse mode").solve_with_pull_back


@pytest.mark.parametrize(("parts", "shared", "seed"), CASES)
def test_reverse_mode(solve_with_pull_back, parts, shared, seed):
    check_gradients(lambda operands, g: solve_with_pull_back(**operands)[1](g), parts, shared, seed)


def test_one_solution_in_many_threads(solve_with_pull_back):
    _, operands, cotangent = draw("A b G h lb ub", (), 0)
    _, pull_back = solve_with_pull_back(**operands)
    expected = pull_back(cotangent)
    with ThreadPoolExecutor(8) as pool:
        for gradients in pool.map(pull_back, [cotangent] * 64):
            for name, gradient in gradients.items():
                np.testing.assert_array_equal(gradient, expected[name])


@pytest.fixture(scope="module")
def forward(load):
    return load("Forward mode")


@pytest.mark.parametrize(("parts", "shared", "seed"), CASES)
def test_forward_mode(forward, parts, shared, seed):
    rng, operands, cotangent = draw(parts, shared, seed)

    def tangent_of_x(tangents):
        return forward.solve_qp(**operands | {k: forward.Dual(operands[k], t) for k, t in tangents.items()}).tangent

    tangents = {}
    for name in operands:
        tangents[name], difference = derivative(rng, operands, cotangent, name)
        change = np.sum(cotangent * tangent_of_x({name: tangents[name]}))
        np.testing.assert_allclose(change, difference, rtol=1e-5, atol=1e-5, err_msg=name)
    one_by_one = sum(tangent_of_x({name: tangent}) for name, tangent in tangents.items())
    np.testing.assert_allclose(tangent_of_x(tangents), one_by_one, atol=1e-7)


def test_unsolved_problems_are_counted(solve_with_pull_back, forward):
    for solve in (solve_with_pull_back, forward.solve_qp):
        with pytest.raises(RuntimeError, match="3 of 3 problems not solved"):
            solve(**INFEASIBLE)


@pytest.mark.parametrize(
    ("heading", "needs"), [("Forward mode", "numpy"), ("TensorFlow", "tensorflow"), ("MLX", "mlx")]
)
def test_the_page_says_what_is_printed(load, heading, needs, capfd):
    pytest.importorskip(needs)
    load(heading)
    assert capfd.readouterr().out.splitlines() == re.findall(r"^print\(.*  # (.*)$", section(heading), re.MULTILINE)


# ---- TensorFlow


@pytest.fixture(scope="module")
def tf():
    return pytest.importorskip("tensorflow")


@pytest.fixture
def page(tf, load):
    return load("TensorFlow")


def tape_gradients(tf, solve_qp, operands, cotangent, compiled, dynamic=False):
    """The gradients by a tape, eagerly or inside tf.function, there also with batch axes of unknown length."""
    names = list(operands)

    def pull(cotangent, *values):
        with tf.GradientTape() as tape:
            tape.watch(values)
            loss = tf.reduce_sum(cotangent * solve_qp(**dict(zip(names, values, strict=True))))
        return tape.gradient(loss, values)

    if compiled:
        signature = [tf.TensorSpec([None, *a.shape[1:]] if a.shape[0] == 3 else a.shape, tf.float64)
                     for a in (cotangent, *operands.values())] if dynamic else None  # fmt: skip
        pull = tf.function(pull, input_signature=signature)
    values = pull(*(tf.constant(value) for value in (cotangent, *operands.values())))
    return {name: value.numpy() for name, value in zip(names, values, strict=True)}


@pytest.mark.parametrize(("compiled", "dynamic"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("parts", "shared", "seed"), CASES)
def test_tensorflow(tf, page, parts, shared, seed, compiled, dynamic):
    solve_qp = page.solve_qp
    check_gradients(lambda d, g: tape_gradients(tf, solve_qp, d, g, compiled, dynamic), parts, shared, seed)


def test_tensorflow_static_shapes(tf, page):
    seen = {}

    @tf.function(input_signature=[tf.TensorSpec([None, 1, 4]), tf.TensorSpec([5, 2, 4]), tf.TensorSpec([2, 4])])
    def trace(q, G, h):
        with tf.GradientTape() as tape:
            tape.watch([q, G])
            x = page.solve_qp(Q=tf.eye(4), q=q, G=G, h=h[:, 0])
        seen["x"], seen["gradients"] = x.shape, [g.shape for g in tape.gradient(x, [q, G])]
        return x

    x = trace(tf.ones([3, 1, 4]), tf.ones([5, 2, 4]), tf.ones([2, 4]))
    assert seen["x"].as_list() == [None, 5, 4]
    assert [shape.as_list() for shape in seen["gradients"]] == [[None, 1, 4], [5, 2, 4]]
    assert x.shape == (3, 5, 4)
    assert x.dtype == tf.float32


@pytest.mark.parametrize("stored", [16, 0])
@pytest.mark.parametrize("compiled", [False, True])
def test_tensorflow_several_solves_before_the_backward_pass(tf, page, compiled, stored):
    """As in a loop, and where the solutions have gone by then."""
    page.LAST = stored
    page.recent.clear()
    rng, operands, cotangent = draw("A b G h", ("G",), 5)

    def pull(G):
        with tf.GradientTape() as tape:
            tape.watch(G)
            x = tf.zeros([3, 5], tf.float64)
            for _ in tf.range(3):
                x = page.solve_qp(**operands | {"G": G, "q": operands["q"] + 0.1 * x})
            loss = tf.reduce_sum(cotangent * x)
        return loss, tape.gradient(loss, G)

    pull = tf.function(pull) if compiled else pull
    tangent = rng.normal(size=operands["G"].shape)
    plus, minus = (pull(tf.constant(operands["G"] + sign * STEP * tangent))[0].numpy() for sign in (1, -1))
    gradient = pull(tf.constant(operands["G"]))[1].numpy()
    np.testing.assert_allclose(np.sum(gradient * tangent), (plus - minus) / (2 * STEP), rtol=1e-4, atol=1e-5)
    assert len(page.recent) <= stored


@pytest.mark.parametrize("compiled", [False, True])
def test_tensorflow_refuses_second_derivatives(tf, page, compiled):
    def second(q):
        with tf.GradientTape() as outer:
            outer.watch(q)
            with tf.GradientTape() as inner:
                inner.watch(q)
                loss = tf.reduce_sum(page.solve_qp(Q=tf.eye(2), q=q) ** 2)
            size = tf.reduce_sum(inner.gradient(loss, q) ** 2)
        return outer.gradient(size, q)

    with pytest.raises(NotImplementedError, match="first derivatives only"):
        (tf.function(second) if compiled else second)(tf.ones(2))


def test_tensorflow_unsolved(tf, page):
    with pytest.raises(RuntimeError, match="3 of 3 problems not solved"):
        page.solve_qp(**INFEASIBLE)
    with pytest.raises(tf.errors.UnknownError, match="3 of 3 problems not solved"):
        tf.function(lambda: page.solve_qp(**INFEASIBLE))()


# ---- MLX


@pytest.fixture(scope="module")
def mx():
    core = pytest.importorskip("mlx.core")
    before = core.default_device()
    core.set_default_device(core.cpu)  # which alone has float64
    yield core
    core.set_default_device(before)


@pytest.fixture
def mlx_solve(mx, load):
    return load("MLX").solve_qp


def to_mlx(mx, operands):
    return {name: mx.array(value, dtype=mx.float64) for name, value in operands.items()}


@pytest.mark.parametrize(("parts", "shared", "seed"), CASES)
def test_mlx_reverse_mode(mx, mlx_solve, parts, shared, seed):
    def gradients(operands, cotangent):
        weights = mx.array(cotangent, dtype=mx.float64)
        grads = mx.grad(lambda arrays: mx.sum(weights * mlx_solve(**arrays)))(to_mlx(mx, operands))
        return {name: np.array(gradient) for name, gradient in grads.items()}

    check_gradients(gradients, parts, shared, seed)


@pytest.mark.parametrize(("parts", "shared", "seed"), CASES)
def test_mlx_forward_mode(mx, mlx_solve, parts, shared, seed):
    rng, operands, cotangent = draw(parts, shared, seed)
    arrays, weights = to_mlx(mx, operands), mx.array(cotangent, dtype=mx.float64)
    for name in operands:
        tangent, difference = derivative(rng, operands, cotangent, name)

        def loss(value, name=name):
            return mx.sum(weights * mlx_solve(**arrays | {name: value}))

        _, (change,) = mx.jvp(loss, [arrays[name]], [mx.array(tangent, dtype=mx.float64)])
        np.testing.assert_allclose(change.item(), difference, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("kind", "atol"), [("float32", 1e-3), ("float64", 1e-6)])
def test_mlx_keeps_the_type(mx, mlx_solve, kind, atol):
    _, operands, cotangent = draw("A b G h", (), 7)
    expected = qpdiff.vjp(qpdiff.solve_qp(**operands), x=cotangent).q
    arrays = {name: mx.array(value, dtype=getattr(mx, kind)) for name, value in operands.items()}
    x, (gradient,) = mx.vjp(lambda q: mlx_solve(**arrays | {"q": q}), [arrays["q"]], [mx.array(cotangent)])
    assert x[0].dtype == gradient.dtype == getattr(mx, kind)
    np.testing.assert_allclose(np.array(gradient), expected, atol=atol)


def test_mlx_refuses_second_derivatives(mx, mlx_solve):
    point, one = mx.array([1.0, 2.0]), mx.array([1.0, 0.0])

    def loss(q):
        return mx.sum(mlx_solve(Q=mx.eye(2), q=q) ** 2)

    first = {"reverse": lambda q: mx.grad(loss)(q)[0], "forward": lambda q: mx.jvp(loss, [q], [one])[1][0]}
    for inner in first.values():
        with pytest.raises(NotImplementedError, match="first derivatives only"):
            mx.grad(inner)(point)
        with pytest.raises(NotImplementedError, match="first derivatives only"):
            mx.jvp(inner, [point], [one])


def test_mlx_unsolved(mx, mlx_solve):
    with pytest.raises(RuntimeError, match="3 of 3 problems not solved"):
        mlx_solve(**{name: mx.array(value) for name, value in INFEASIBLE.items()})
