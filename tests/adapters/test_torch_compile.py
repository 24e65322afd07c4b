"""torch.compile and torch.export take the adapter without a break: results and gradients are those of eager calls."""

import numpy as np
import pytest
from elastic_problems import contradictory
from problems import random_problem
from torch_inside import replace_inside

pytest.importorskip("torch")
import torch
from torch import nn
from torch.func import vmap
from torch.library import opcheck

import qpdiff.torch
from qpdiff.problem import OPERANDS, PRICE_NAMES, PRICES
from qpdiff.solution import FIELDS
from qpdiff.torch.functions import Layer
from qpdiff.torch.operators import _backend_of
from qpdiff.torch.rules import OBJECTIVE, Settings

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's, about itself
TIGHT = {"tol": 1e-12, "rtol": 1e-13}


@pytest.fixture(params=["eager", "aot_eager"])
def compiled(request):
    """A function that compiles another without breaks of its graph."""
    torch._dynamo.reset()
    return lambda function, **options: torch.compile(function, fullgraph=True, backend=request.param, **options)


@pytest.fixture(params=["numpy", "torch"])
def solved_by(request, monkeypatch):
    if request.param == "torch":
        replace_inside(monkeypatch, "on_host", lambda device: False)


def problem(parts, batch=(4,), shared=()):
    operands = random_problem(np.random.default_rng(0), parts, batch=batch, shared=shared)
    return {name: torch.tensor(operands[name], requires_grad=True) for name in OPERANDS if name in operands}


def compare(function, other, *arguments):
    """Compare what two functions return, and the gradients of all arguments of a sum over it."""
    outputs, expected = function(*arguments), other(*arguments)
    torch.testing.assert_close(outputs, expected)
    for one, reference in zip(*(_gradients(values, arguments) for values in (outputs, expected)), strict=True):
        torch.testing.assert_close(one, reference, rtol=1e-5, atol=1e-7)


def _gradients(outputs, arguments):
    moving = [value for value in outputs if value.requires_grad]
    return torch.autograd.grad(sum(value.sin().sum() for value in moving), arguments, allow_unused=True)


# ---- torch.compile


@pytest.mark.parametrize("shared", [(), ("Q", "G", "A")])
def test_a_function_of_the_solution(compiled, solved_by, shared):
    operands = problem("A G lb ub", shared=shared)

    def solve(*values):
        sol = qpdiff.torch.solve_qp(**dict(zip(operands, values, strict=True)), **TIGHT)
        return tuple(getattr(sol, name) for name in FIELDS if name != "iterations")

    compare(compiled(solve), solve, *operands.values())


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_batch_axes(compiled, batch):
    operands = problem("G", batch=batch, shared=("G",))

    def solve(*values):
        return (qpdiff.torch.solve_qp(**dict(zip(operands, values, strict=True))).x,)

    compare(compiled(solve), solve, *operands.values())


def test_batches_of_any_size_take_one_program(compiled):
    Q, q, G, h = problem("G", batch=(8,), shared=("Q", "G")).values()
    Q, G, h = Q.detach(), G.detach(), h[0].detach()

    def solve(q):
        return (qpdiff.torch.solve_qp(Q, q, G, h, lb=-9.0).x,)

    program = compiled(solve, dynamic=True)
    compare(program, solve, q[:7].detach().requires_grad_())
    with torch.compiler.set_stance("fail_on_recompile"):
        for size in (3, 8):
            compare(program, solve, q[:size].detach().requires_grad_())


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_types(compiled, kind):
    def solve(q):
        return (qpdiff.torch.solve_qp(torch.eye(3, dtype=kind), q, lb=0.25).x,)

    q = torch.tensor([-1.0, 0.5, -0.125], dtype=kind, requires_grad=True)
    assert solve(q)[0].dtype == kind
    compare(compiled(solve), solve, q)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("other", [np.float32, np.float64, int, list])
def test_types_beside_arrays_of_numpys(kind, other):
    """An array and a number of NumPy's have a type that counts, as in eager calls; a list has none."""
    Q = np.eye(2).tolist() if other is list else np.eye(2, dtype=other)
    lb = 0 if other is list else Q[0, 1]

    def solve(q):
        return qpdiff.torch.solve_qp(Q, q, lb=lb).x

    q = torch.tensor([-1.0, 0.5], dtype=kind)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(solve, fullgraph=True, backend="eager")(q), solve(q))


def test_lists_and_other_arguments(compiled):
    def solve(q):
        return (
            qpdiff.torch.solve_qp([[2.0, 0.0], [0.0, 1.0]], q, [[1.0, 1.0]], [1.0], unsolved="nan", engine="array").x,
        )

    compare(compiled(solve), solve, torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("batch", [(), (4,)])
def test_smoothing(compiled, solved_by, batch):
    operands = problem("A G lb ub", batch=batch, shared=("Q",))

    def solve(*values):
        sol = qpdiff.torch.solve_qp(**dict(zip(operands, values, strict=True)), smoothing=0.1, **TIGHT)
        return sol.x, sol.z, sol.objective, sol.status

    compare(compiled(solve), solve, *operands.values())


@pytest.mark.parametrize("smoothing", [None, 0.1])
def test_prices(compiled, solved_by, smoothing):
    """The constraints contradict each other; prices are of one number, of each row and of each problem's."""
    operands = contradictory(np.random.default_rng(0), "G h A b lb ub", batch=(4,))
    operands = {name: torch.tensor(value, requires_grad=True) for name, value in operands.items()}
    w, sigma = torch.tensor(0.7, dtype=torch.float64, requires_grad=True), torch.full_like(operands["h"], 0.3)
    bounds = torch.full((6,), 5.0, dtype=torch.float64, requires_grad=True)

    def solve(w, bounds, sigma, *values):
        prices = {"elastic": {"A": w, "G": 2 * w, "bounds": bounds}, "elastic_quadratic": {"G": sigma}}
        sol = qpdiff.torch.solve_qp(
            **dict(zip(operands, values, strict=True)), **prices, smoothing=smoothing, **TIGHT
        )  # fmt: skip
        return sol.x, sol.y, sol.objective, sol.status, *sol.violation

    compare(compiled(solve), solve, w, bounds, sigma.requires_grad_(), *operands.values())


def test_a_price_that_is_a_number(compiled):
    Q, q, G, h = problem("G", shared=("Q", "G")).values()

    def solve(q, w):
        sol = qpdiff.torch.solve_qp(Q.detach(), q, G.detach(), h.detach(), elastic=w)
        assert sol.violation.A is None
        return sol.x, sol.violation.G

    program = compiled(solve)
    for w in (1.0, 0.1, 3, torch.tensor(0.1)):
        torch.testing.assert_close(program(q, w), solve(q, w))


def test_the_optimal_value_alone_solves_no_system(compiled, monkeypatch):
    operands = problem("A G lb ub")

    def solve(*values):
        return (qpdiff.torch.solve_qp(**dict(zip(operands, values, strict=True))).objective,)

    def refuse(*_, **options):
        raise AssertionError

    replace_inside(monkeypatch, "solve_adjoint", refuse)
    compare(compiled(solve), solve, *operands.values())


def test_warm_start(compiled):
    Q, q, G, h = problem("G").values()
    near = qpdiff.torch.solve_qp(Q, q * 1.01, G, h)

    def solve(*operands):
        sol = qpdiff.torch.solve_qp(*operands, warm_start=near)
        return sol.x, sol.iterations

    compare(compiled(solve), solve, Q, q, G, h)


def test_an_unsolved_problem_raises_when_the_program_runs(compiled):
    def solve(q):
        return qpdiff.torch.solve_qp(torch.zeros(1, 1), q).x

    with pytest.raises(RuntimeError, match="1 of 1 problems not solved"):
        compiled(solve)(torch.ones(1))


@pytest.mark.parametrize("options", [{}, {"elastic": 0.3}], ids=str)
def test_layers(compiled, options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), qpdiff.torch.OptNet(3, m=4, p=1, nonnegative=True, **options))
    inputs = torch.randn(5, 3)
    expected = torch.autograd.grad(net(inputs).sum(), net.parameters())
    program = compiled(net)
    torch.testing.assert_close(program(inputs), net(inputs))
    torch.testing.assert_close(torch.autograd.grad(program(inputs).sum(), net.parameters()), expected)


def test_qpths_function(compiled):
    operands = [*problem("G", shared=("Q", "G", "h")).values(), torch.zeros(0), torch.zeros(0)]

    def solve(*operands):
        return (qpdiff.torch.QPFunction()(*operands, torch.Tensor(), torch.Tensor()),)

    compare(compiled(solve), solve, *operands[:4])


def test_vmap_inside(compiled):
    Q, q, G, h = problem("G", shared=("Q", "G")).values()
    h = h[0].detach()

    def solve(Q, q, G):
        return (vmap(lambda q: qpdiff.torch.solve_qp(Q, q, G, h).x)(q),)

    compare(compiled(solve), solve, Q, q, G)


def test_vmap_over_prices_inside(compiled):
    Q, q, G, h = problem("G", shared=("Q", "G")).values()
    h = h[0].detach()

    def solve(q, w):
        return (vmap(lambda w: qpdiff.torch.solve_qp(Q.detach(), q[0], G.detach(), h, elastic=w).x)(w),)

    compare(compiled(solve), solve, q, torch.tensor([0.1, 1.0, 9.0], dtype=torch.float64, requires_grad=True))


def test_what_a_program_does_not_take(compiled):
    with pytest.raises(Exception, match=r"progress, which torch\.compile and torch\.export do not take"):
        compiled(lambda q: qpdiff.torch.solve_qp(torch.eye(2), q, progress=print).x)(torch.ones(2))
    for name, number in {"tol": np.float64(1e-9), "max_iterations": np.int64(9), "smoothing": np.float32(0.1)}.items():
        options = {name: number}
        assert qpdiff.torch.solve_qp(torch.eye(2), torch.ones(2), **options).x.isfinite().all()
        with pytest.raises(Exception, match=f"{name} is a number of NumPy's or torch's, which torch.compile traces"):
            compiled(lambda q, options=options: qpdiff.torch.solve_qp(torch.eye(2), q, **options).x)(torch.ones(2))


# ---- torch.export


@pytest.mark.parametrize("strict", [True, False])
def test_exported_gradients_of_shared_parameters_are_means(strict):
    class Projection(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.h = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))

        def forward(self, p):
            absent, eye = torch.Tensor(), torch.eye(2, dtype=torch.float64)
            return qpdiff.torch.QPFunction()(eye, p, eye, self.h, absent, absent)

    p, size = torch.full((4, 2), -5.0, dtype=torch.float64), torch.export.Dim("size")
    program = torch.export.export(Projection(), (p,), dynamic_shapes=({0: size},), strict=strict).module()
    for points in (p, p[:3]):  # x = h
        (gradient,) = torch.autograd.grad(program(points).sum(), list(program.parameters()))
        torch.testing.assert_close(gradient, torch.ones(2, dtype=torch.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"elastic": 0.3}], ids=str)
@pytest.mark.parametrize("strict", [True, False])
def test_exported(strict, options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), qpdiff.torch.OptNet(3, m=4, p=1, **options))
    size = torch.export.Dim("size", min=2)
    program = torch.export.export(net, (torch.randn(5, 4),), dynamic_shapes=({0: size},), strict=strict)
    names = {str(node.target) for node in program.run_decompositions().graph.nodes}
    assert "qpdiff.solve.default" in names
    module, inputs = program.module(), torch.randn(7, 4)
    torch.testing.assert_close(module(inputs), net(inputs))
    expected = torch.autograd.grad(net(inputs).sum(), net.parameters())
    torch.testing.assert_close(torch.autograd.grad(module(inputs).sum(), module.parameters()), expected)


# ---- the operators


def operators(parts, shared, smoothing=None, priced=False):
    """The arguments of both operators."""
    operands = problem(parts, shared=shared)
    if priced:
        operands[PRICE_NAMES["elastic"]["A"]] = torch.full((4, 2), 0.3, dtype=torch.float64)
        operands[PRICE_NAMES["elastic"]["bounds"]] = torch.full((1, 6), 0.5, dtype=torch.float64)
        operands[PRICE_NAMES["elastic_quadratic"]["bounds"]] = torch.full((4, 6), 0.1, dtype=torch.float64)
    flat = [value[None] if name in shared else value for name, value in operands.items()]
    flat = [value.detach().requires_grad_() for value in flat]
    names = " ".join(operands)
    first = (flat, names, [2, 2], [], 1e-8, "raise", None, None, 100, True, False, "auto", smoothing)
    x, v, _, status, *_, s, scaling = torch.ops.qpdiff.solve(*first)
    point = [value.detach().requires_grad_() for value in (x + 1, v + 1, x, v)]
    return first, (*point, flat, names, names, s, status.flatten(), scaling, 1e-8, "raise", "auto", smoothing)


@pytest.mark.parametrize("priced", [False, True], ids=["hard", "priced"])
def test_operators(solved_by, priced):
    first, second = operators("A G lb ub", ("G", "A"), priced=priced)
    opcheck(torch.ops.qpdiff.solve.default, first)
    opcheck(torch.ops.qpdiff.solve_kkt.default, second)
    smooth, _ = operators("A G lb ub", ("G", "A"), smoothing=0.1, priced=priced)
    opcheck(torch.ops.qpdiff.solve.default, smooth)


@pytest.mark.parametrize("smoothing", [None, 0.1])
@pytest.mark.parametrize("priced", [False, True], ids=["hard", "priced"])
def test_rules_of_the_operators(solved_by, smoothing, priced):
    """To the second order, and under vmap, they are those of the functions that eager calls take."""
    first, _ = operators("A G lb", ("Q", "A"), smoothing, priced)
    operands, names = first[0], tuple(first[1].split())
    assert set(names) <= set(OPERANDS | PRICES)

    def with_objective(output):
        return torch.cat([*output[:2], output[OBJECTIVE].reshape(4, 1)], 1)

    def by_operators(*values):
        return with_objective(torch.ops.qpdiff.solve(list(values), *first[1:]))

    def by_functions(*values):
        backend = _backend_of(values)
        layer = Layer(backend, Settings(names, 1e-8, "raise", {"smoothing": smoothing}, {}))
        return with_objective(layer.solution((2, 2), values, ()))

    def second(function):
        gradients = torch.autograd.grad(function(*operands).sin().sum(), operands, create_graph=True)
        return torch.autograd.grad(sum(value.square().sum() for value in gradients), operands)

    for one, other in zip(second(by_operators), second(by_functions), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    many = [
        value.detach().expand(3, *value.shape) * torch.linspace(1, 1.1, 3).view(3, *[1] * value.ndim)
        for value in operands
    ]
    torch.testing.assert_close(vmap(by_operators)(*many), vmap(by_functions)(*many))
