"""The torch adapter against torch's own numerical checkers, NumPy, loops in place of vmap, and qpth."""

import copy
import gc
import pickle
import re
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace

import numpy as np
import pytest
import scipy.sparse as sp
from emulated_gpu import pose
from problems import mostly_active, random_problem, relaxed, rounded_product, strictly_feasible
from sparse_problems import as_sparse, smooth_sparse
from torch_inside import replace_inside

pytest.importorskip("torch")
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, stack_module_state, vmap

import qpdiff
import qpdiff.torch
from qpdiff.adjoint import solution_vjp
from qpdiff.backend import choose_backend
from qpdiff.backend.torch import TorchBackend
from qpdiff.differentiation import solve_adjoint, solve_kkt
from qpdiff.problem import OPERANDS, join_rows, make_layout
from qpdiff.solution import FIELDS

TIGHT = {"tol": 1e-12, "rtol": 1e-13}
OUTPUTS = ("x", "y", "z", "z_lb", "z_ub")
DOUBLE = torch.float64


@pytest.fixture(params=["numpy", "torch", "emulated-gpu"])
def solved_by(request, monkeypatch):
    """What solves: NumPy for the tensors on the CPU, torch itself as on any other device, or the kernels for a GPU."""
    if request.param != "numpy":
        replace_inside(monkeypatch, "on_host", lambda device: False)
    if request.param == "emulated-gpu":
        pose(monkeypatch, TorchBackend)
    return request.param


def problem(seed, parts, n=3, batch=2):
    operands = mostly_active(np.random.default_rng(seed), parts, n, batch)
    return {name: torch.tensor(value, requires_grad=True) for name, value in operands.items()}


@pytest.mark.filterwarnings("error")
def test_a_warm_start_of_numpys_is_taken_without_a_warning():
    sol = qpdiff.solve_qp(np.eye(2), -np.ones(2), lb=0.0)
    again = qpdiff.torch.solve_qp(torch.eye(2, dtype=DOUBLE), -torch.ones(2, dtype=DOUBLE), lb=0.0, warm_start=sol)
    np.testing.assert_allclose(again.x.numpy(), sol.x, atol=1e-7)


def symmetric(Q):
    return (Q + Q.mT) / 2


@pytest.fixture(params=["torch-cuda"])
def gpu(request):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return torch.device("cuda")


def outputs_of(operands):
    """All outputs that depend on the operands, as a function of them."""
    needs = {"y": "A", "z": "G", "z_lb": "lb", "z_ub": "ub"}
    names = [name for name in OUTPUTS if needs.get(name, "Q") in operands]

    def solve(*values):
        given = dict(zip(operands, values, strict=True))
        sol = qpdiff.torch.solve_qp(**(given | {"Q": symmetric(given["Q"])}), **TIGHT)
        return tuple(getattr(sol, name) for name in names)

    return solve


# ---- the solution


@pytest.mark.parametrize("parts", ["", "A", "G", "A G lb ub"])
@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 3), (0,)])
def test_is_the_solution_of_qpdiff(solved_by, parts, batch):
    operands = random_problem(np.random.default_rng(0), parts, batch=batch, shared=("Q", "A"))
    ours = qpdiff.torch.solve_qp(**{name: torch.tensor(value) for name, value in operands.items()})
    other = qpdiff.solve_qp(**operands)
    for field in fields(ours):
        if field.name not in ("violation", "linearization"):
            one, two = getattr(ours, field.name), getattr(other, field.name)
            assert isinstance(one, torch.Tensor)
            assert one.shape == two.shape
            if field.name in (*OUTPUTS, "s", "status", "objective"):
                np.testing.assert_allclose(one.numpy(), two, rtol=1e-6, atol=1e-6)


def random_problem_in_torch(seed=0, parts="A G lb ub", **options):
    operands = random_problem(np.random.default_rng(seed), parts, **options)
    return {name: torch.tensor(value) for name, value in operands.items()}


def test_nothing_is_copied(monkeypatch):
    seen = {}

    def spy(problem, **options):
        solved, outcome, factors = solve(problem, **options)
        seen.update(problem=solved, outcome=outcome)
        return solved, outcome, factors

    solve = qpdiff.solver.solve_problem
    monkeypatch.setattr(qpdiff.solver, "solve_problem", spy)
    for batch in [(), (3,), (2, 2)]:
        operands = {k: v.requires_grad_() for k, v in random_problem_in_torch(batch=batch, shared=("Q",)).items()}
        sol = qpdiff.torch.solve_qp(**operands)
        for name, array in seen["problem"].operands.items():
            assert isinstance(array, np.ndarray)
            assert array.__array_interface__["data"][0] == operands[name].data_ptr()
        assert np.shares_memory(sol.x.detach().numpy(), seen["outcome"].x)
        assert np.shares_memory(sol.z.detach().numpy(), seen["outcome"].v)


def test_layouts():
    operands = random_problem_in_torch(batch=(3,))
    expected = qpdiff.torch.solve_qp(**operands).x
    transposed = {k: v.movedim(0, -1).contiguous().movedim(-1, 0) for k, v in operands.items()}
    assert not transposed["G"].is_contiguous()
    torch.testing.assert_close(qpdiff.torch.solve_qp(**transposed).x, expected)
    negated = operands | {"q": torch.complex(operands["q"], -operands["q"]).conj().imag}  # with torch's negative bit
    assert negated["q"].is_neg()
    torch.testing.assert_close(qpdiff.torch.solve_qp(**negated).x, expected)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_floating_point_types(solved_by, kind):
    operands = {k: v.to(kind).requires_grad_() for k, v in random_problem_in_torch(batch=(3,)).items()}
    precise = {k: v.detach().double().requires_grad_() for k, v in operands.items()}
    sol, expected = qpdiff.torch.solve_qp(**operands), qpdiff.torch.solve_qp(**precise)
    for name in (*OUTPUTS, "s"):
        assert torch.equal(getattr(sol, name), getattr(expected, name).to(kind))
    first, second = first_and_second(operands)
    for one, other in zip((*first, *second), sum(first_and_second(precise), ()), strict=True):
        assert one.dtype == kind
        torch.testing.assert_close(one, other.to(kind), rtol=1e-4, atol=1e-4)
    (_, tangent), (_, other) = (
        torch.func.jvp(lambda q, o=o: qpdiff.torch.solve_qp(**o | {"q": q}).x, (o["q"],), (o["q"],))
        for o in (operands, precise)
    )
    torch.testing.assert_close(tangent, other.to(kind), rtol=1e-6, atol=1e-6)
    each = {"in_dims": (dict.fromkeys(operands, 0),)}
    mapped = vmap(lambda o: qpdiff.torch.solve_qp(**o).z, **each)(operands)
    torch.testing.assert_close(mapped, expected.z.to(kind), rtol=1e-6, atol=1e-6)
    near = qpdiff.torch.solve_qp(**operands, warm_start=sol)
    assert torch.all(near.iterations <= sol.iterations)
    torch.testing.assert_close(near.x, sol.x, rtol=1e-6, atol=1e-6)


def test_mixed_types_and_conversion():
    Q, q = torch.eye(2), torch.ones(2, dtype=DOUBLE, requires_grad=True)
    assert qpdiff.torch.solve_qp(Q, q).x.dtype == DOUBLE
    assert qpdiff.torch.solve_qp(Q, q, lb=torch.zeros(2, dtype=torch.int64)).x.dtype == DOUBLE
    sol = qpdiff.torch.solve_qp(Q, q, dtype="float32")
    assert sol.x.dtype == torch.float32
    sol.x.sum().backward()
    torch.testing.assert_close(q.grad, -torch.ones(2, dtype=DOUBLE))
    half = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    qpdiff.torch.solve_qp(Q, half, dtype="float32").x.sum().backward()
    assert half.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_solved_in_float64_and_returned_in_its_type(solved_by, kind):
    rng = np.random.default_rng(0)
    operands = {name: torch.tensor(value).to(kind) for name, value in random_problem(rng, "G lb", batch=(3,)).items()}
    operands["Q"] = torch.diag(torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0, 1.0], dtype=kind))[: operands["q"].shape[-1]]
    operands["Q"] = operands["Q"][:, : operands["q"].shape[-1]]
    exact = {name: value.double().requires_grad_() for name, value in operands.items()}
    rounded = {name: value.requires_grad_() for name, value in operands.items()}
    sol, expected = qpdiff.torch.solve_qp(**rounded), qpdiff.torch.solve_qp(**exact)
    assert sol.x.dtype == sol.z.dtype == sol.s.dtype == kind
    assert sol.objective.dtype == DOUBLE
    torch.testing.assert_close(sol.x, expected.x.to(kind))
    gradients = torch.autograd.grad(sol.x.sum(), rounded.values())
    for one, other in zip(gradients, torch.autograd.grad(expected.x.sum(), exact.values()), strict=True):
        torch.testing.assert_close(one, other.to(kind))


def test_half_precision_with_other_types():
    Q, q = torch.eye(2), torch.ones(2, dtype=torch.bfloat16)
    assert qpdiff.torch.solve_qp(Q, q).x.dtype == torch.float32
    assert qpdiff.torch.solve_qp(Q.double(), q).x.dtype == DOUBLE
    assert qpdiff.torch.solve_qp(Q.numpy(), q).x.dtype == torch.float32
    assert qpdiff.torch.solve_qp(Q.tolist(), q).x.dtype == torch.bfloat16
    assert qpdiff.torch.solve_qp(Q.half(), q.half(), lb=0.5).x.dtype == torch.float16


@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_a_hessian_that_was_computed_in_another_type(solved_by, kind):
    """It is rounded by more than the type that it is solved in would do."""
    Q = torch.tensor(rounded_product({torch.float32: np.float32, torch.float16: np.float16}[kind])).requires_grad_()
    q, others = torch.randn(2, 6), {"lb": -torch.ones(6), "ub": torch.ones(6)}
    precise = symmetric(Q.detach().double()).requires_grad_()
    expected = qpdiff.torch.solve_qp(precise, q, **others, dtype="float64", check=False).x
    expected.sum().backward()
    x = qpdiff.torch.solve_qp(Q, q, **others, dtype="float64").x
    x.sum().backward()
    torch.testing.assert_close(x, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(Q.grad, precise.grad.to(kind), atol=1e-3 if kind == torch.float16 else 1e-6, rtol=1e-3)
    mapped = vmap(lambda Q, q: qpdiff.torch.solve_qp(Q, q, **others, dtype="float64").x)
    torch.testing.assert_close(mapped(Q.detach(), q), expected.detach(), atol=1e-9, rtol=1e-9)


def test_lists_numbers_and_arrays_become_tensors():
    b = torch.ones((), requires_grad=True)
    array = np.broadcast_to(1.0, 2)  # read-only
    sol = qpdiff.torch.solve_qp([[1.0, 0.0], [0.0, 1.0]], array[::-1], A=[[1.0, 1.0]], b=[b])
    torch.testing.assert_close(sol.x, torch.full((2,), 0.5, dtype=DOUBLE), atol=1e-6, rtol=0)
    sol.x.sum().backward()
    assert b.grad.item() == pytest.approx(1.0, abs=1e-6)


def test_lists_go_to_the_default_device():
    operands = {"Q": [[1.0]], "q": [1.0]}
    for device in ("meta", "cpu"):
        with torch.device(device):
            backend, tensors = choose_backend(operands, "torch")
        assert backend.device.type == device
        assert {value.device.type for value in tensors.values()} == {device}


def test_refused():
    Q, q = torch.eye(2), torch.ones(2)
    with pytest.raises(ValueError, match="unsolved is 'ignore'"):
        qpdiff.torch.solve_qp(Q, q, unsolved="ignore")
    with pytest.raises(TypeError, match="backend"):
        qpdiff.torch.solve_qp(Q, q, backend="numpy")
    with pytest.raises(TypeError, match="warm_start is a int"):
        qpdiff.torch.solve_qp(Q, q, warm_start=1)
    with pytest.raises(ValueError, match="q is on device meta but Q on cpu"):
        qpdiff.torch.solve_qp(Q, q.to("meta"))
    with pytest.raises(ValueError, match=r"q has NaN .* nan \(problem 1 of the batch\)"):
        qpdiff.torch.solve_qp(Q, torch.stack([q, q * torch.nan]))
    sol = qpdiff.torch.solve_qp(Q, q)
    for derivative in (qpdiff.vjp, qpdiff.jvp):
        with pytest.raises(ValueError, match=re.escape("pass a solution of qpdiff.solve_qp itself")):
            derivative(sol)


def test_unsolved(solved_by):
    q, G = torch.ones(3, 1, dtype=DOUBLE, requires_grad=True), torch.tensor([[1.0], [-1.0]], dtype=DOUBLE)
    h = torch.tensor([[1.0, 1.0], [1.0, -2.0], [1.0, -2.0]], dtype=DOUBLE)

    def gradient(unsolved):
        sol = qpdiff.torch.solve_qp([[1.0]], q, G, h, unsolved=unsolved)
        assert sol.status.tolist() == [0, 2, 2]
        return torch.autograd.grad(sol.x.sum(), q)[0]

    with pytest.raises(RuntimeError, match="2 of 3 problems not solved; the first is problem 1: PRIMAL_INFEASIBLE"):
        gradient("raise")
    assert gradient("nan").isnan().tolist() == [[False], [True], [True]]
    assert gradient("zero")[1:].tolist() == [[0.0], [0.0]]
    with pytest.raises(RuntimeError, match=r"2 of 3 problems not solved; the first is problem 1: PRIMAL"):
        vmap(lambda h: qpdiff.torch.solve_qp([[1.0]], [1.0], G, h).x)(h)
    with pytest.raises(RuntimeError, match=r"2 of 6 problems not solved; the first is problem \(1, 0\): PRIMAL"):
        vmap(lambda h: qpdiff.torch.solve_qp([[1.0]], torch.ones(2, 1), G, h).x)(
            h[:, None].expand(-1, 2, -1)[[0, 1, 0]]
        )


@pytest.mark.parametrize("made_by", ["torch", "numpy"])
def test_warm_start(solved_by, made_by):
    operands = random_problem_in_torch(batch=(2, 3))
    cold = qpdiff.torch.solve_qp(**operands)
    if made_by == "torch":
        near = qpdiff.torch.solve_qp(**{k: v.clone().requires_grad_() for k, v in operands.items()})
    else:
        near = qpdiff.solve_qp(**{k: v.numpy() for k, v in operands.items()})
    moved = operands | {"q": (1.0001 * operands["q"]).requires_grad_()}
    warm = qpdiff.torch.solve_qp(**moved, warm_start=near)
    assert warm.iterations.sum() < 0.7 * cold.iterations.sum()
    expected = qpdiff.torch.solve_qp(**moved)
    torch.testing.assert_close(warm.x, expected.x, atol=1e-6, rtol=0)
    for one, two in zip(*(torch.autograd.grad(s.x.sum(), moved["q"]) for s in (warm, expected)), strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def test_warm_start_inside_vmap():
    operands = random_problem_in_torch(batch=(2, 3))
    q = operands.pop("q")

    def iterations(q, index):
        shared = {name: value[index] for name, value in operands.items()}
        first = qpdiff.torch.solve_qp(q=q, **shared)
        return first.iterations, qpdiff.torch.solve_qp(q=1.0001 * q, **shared, warm_start=first).iterations

    for mapped, index in ((vmap(iterations, (0, None)), 0), (vmap(vmap(iterations, (0, None)), (0, None)), (0, 0))):
        cold, warm = mapped(q, index)
        assert cold.shape == warm.shape == (2, 3)
        assert warm.sum() < 0.7 * cold.sum()


def test_vmap_over_the_warm_start_alone():
    operands = random_problem_in_torch(batch=())
    sol = qpdiff.torch.solve_qp(**operands)
    warm = vmap(lambda x: qpdiff.torch.solve_qp(**operands, warm_start=replace(sol, x=x)).x)(sol.x.expand(4, -1))
    torch.testing.assert_close(warm, sol.x.expand(4, -1), atol=1e-6, rtol=0)


# ---- derivatives


@pytest.mark.parametrize("parts", ["", "A", "G", "A G", "lb", "ub", "lb ub", "A lb ub", "A G lb ub"])
def test_first_and_second_derivatives(parts):
    operands = problem(0, parts.split())
    solve, values = outputs_of(operands), tuple(operands.values())
    assert gradcheck(solve, values, atol=1e-6, rtol=1e-5, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(solve, values, atol=1e-5, rtol=1e-5, check_fwd_over_rev=True, fast_mode=True)


def test_every_entry_of_first_and_second_derivatives():
    operands = problem(1, ["A", "G", "lb", "ub"], n=2)
    solve, values = outputs_of(operands), tuple(operands.values())
    assert gradcheck(solve, values, atol=1e-6, rtol=1e-5, check_forward_ad=True)
    assert gradgradcheck(solve, values, atol=1e-5, rtol=1e-5, check_fwd_over_rev=True)


NUMBERS = {"Q": np.diag([1.0, 2.0, 3.0]), "q": np.array([[3.0, -2.0, 0.1], [-4.0, 2.0, 6.0]]), "lb": -0.9, "ub": 0.7}
"""A box of one number each, with all but one variable at a bound."""


def test_numbers_as_bounds(solved_by):
    def solve(q, lb, ub):
        sol = qpdiff.torch.solve_qp(torch.tensor(NUMBERS["Q"]), q, lb=lb, ub=ub, **TIGHT)
        return sol.x, sol.z_lb, sol.z_ub

    values = [torch.tensor(NUMBERS[name], dtype=DOUBLE, requires_grad=True) for name in ("q", "lb", "ub")]
    assert gradcheck(solve, values, atol=1e-6, rtol=1e-5, check_forward_ad=True)
    assert gradgradcheck(solve, values, atol=1e-5, rtol=1e-5, check_fwd_over_rev=True)
    x, *_ = solve(*values)
    x.sum().backward()
    assert [value.grad.shape for value in values[1:]] == [(), ()]
    torch.testing.assert_close(torch.stack([v.grad for v in values[1:]]), torch.tensor([3.0, 2.0], dtype=DOUBLE))
    with_numbers, *_ = solve(values[0], NUMBERS["lb"], NUMBERS["ub"])
    torch.testing.assert_close(with_numbers, x)
    # A number for each sample: gradients of its own.
    each = vmap(jacrev(lambda q, ub: solve(q, values[1], ub)[0].sum(), 1))(values[0], values[2].expand(2))
    torch.testing.assert_close(each, torch.tensor([1.0, 1.0], dtype=DOUBLE))


def test_third_derivatives():
    operands = problem(2, ["A", "G", "ub"])

    def gradient(*values):
        return torch.autograd.grad(
            sum(out.sin().sum() for out in outputs_of(operands)(*values)), values, create_graph=True
        )

    assert gradgradcheck(gradient, tuple(operands.values()), atol=1e-4, rtol=1e-4, fast_mode=True)


def first_and_second(operands):
    """Derivatives of a number that depends on every output."""
    values = tuple(operands.values())
    loss = sum(out.sin().sum() for out in outputs_of(operands)(*values))
    first = torch.autograd.grad(loss, values, create_graph=True)
    return first, torch.autograd.grad(sum(gradient.sin().sum() for gradient in first), values)


def test_derivatives_where_torch_solves(monkeypatch):
    operands = problem(2, ["A", "G", "lb", "ub"])
    expected = first_and_second(operands)
    replace_inside(monkeypatch, "on_host", lambda device: False)
    torch.testing.assert_close(first_and_second(operands), expected, rtol=1e-7, atol=1e-9)


def test_fixed_and_infinite_bounds():
    inf = torch.inf
    lb, ub = torch.tensor([0.3, -inf, -1.0], dtype=DOUBLE), torch.tensor([0.3, 1.0, inf], dtype=DOUBLE)
    Q = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE))

    def solve(q, A):
        sol = qpdiff.torch.solve_qp(Q, q, A=A, b=[0.5], lb=lb, ub=ub, **TIGHT)
        return tuple(getattr(sol, name) for name in OUTPUTS)

    q = torch.tensor([1.0, -2.0, 0.3], dtype=DOUBLE, requires_grad=True)
    A = torch.tensor([[1.0, 1.0, -1.0]], dtype=DOUBLE, requires_grad=True)
    assert gradcheck(solve, (q, A), atol=1e-6, rtol=1e-5, check_forward_ad=True)
    assert gradgradcheck(solve, (q, A), atol=1e-5, rtol=1e-5, check_fwd_over_rev=True)


@pytest.mark.parametrize("parts", ["G", "A G lb ub"])
def test_matches_vjp_and_jvp(solved_by, parts):
    operands = problem(3, parts.split())
    rng = np.random.default_rng(4)
    sol = qpdiff.torch.solve_qp(**operands)
    plain = qpdiff.solve_qp(**{name: value.detach().numpy() for name, value in operands.items()})
    cotangents = {name: rng.normal(size=getattr(sol, name).shape) for name in OUTPUTS}
    scalar = sum((torch.tensor(c) * getattr(sol, name)).sum() for name, c in cotangents.items())
    by_hand = qpdiff.vjp(plain, **cotangents)
    for name, gradient in zip(operands, torch.autograd.grad(scalar, tuple(operands.values())), strict=True):
        np.testing.assert_allclose(gradient, getattr(by_hand, name), rtol=1e-6, atol=1e-9)
    tangents = {name: rng.normal(size=value.shape) for name, value in operands.items()}
    tangents["Q"] = tangents["Q"] + tangents["Q"].mT
    with forward_ad.dual_level():
        duals = {k: forward_ad.make_dual(v.detach(), torch.tensor(tangents[k])) for k, v in operands.items()}
        moved = qpdiff.torch.solve_qp(**duals)
        pushed = qpdiff.jvp(plain, **tangents)
        for name in OUTPUTS:
            tangent = forward_ad.unpack_dual(getattr(moved, name)).tangent
            tangent = torch.zeros_like(getattr(sol, name)) if tangent is None else tangent
            np.testing.assert_allclose(tangent.detach(), getattr(pushed, name), rtol=1e-6, atol=1e-9)


def gradients_by_operations(sol, cotangents, unsolved="zero"):
    """Return the gradients that torch's operations make of the solution of one KKT system, by name."""
    lin = sol.linearization
    rows = [cotangents[name].reshape(len(lin.x), -1) for name in OUTPUTS]
    u = solve_kkt(lin, rows[0], join_rows(lin.problem, *rows[1:], lin.v), unsolved=unsolved)
    tensors = {name: torch.tensor(value) for name, value in lin.problem.operands.items()}
    backend, _ = choose_backend(tensors)
    problem = make_layout(backend, (len(lin.x),), tensors).problem(tensors)
    gradients = solution_vjp(problem, *map(torch.from_numpy, (lin.x, lin.v, *u)))
    pairs = {name: (gradients[name], torch.Size(shape)) for name, shape in lin.problem.shapes.items()}
    return {name: g.reshape(s) if g.numel() == s.numel() else g.sum_to_size(s) for name, (g, s) in pairs.items()}


def compare_with_operations(operands, wanted=None, unsolved="raise", atol=1e-12, rtol=1e-10):
    """Hold the gradients of a function of all outputs to those of torch's operations."""
    tensors = {name: torch.tensor(value) for name, value in operands.items()}
    wanted = {name: tensors[name].requires_grad_() for name in wanted or operands}
    sol, plain = qpdiff.torch.solve_qp(**tensors, unsolved=unsolved), qpdiff.solve_qp(**operands)
    rng = np.random.default_rng(8)
    cotangents = {name: rng.normal(size=getattr(plain, name).shape) for name in OUTPUTS}
    scalar = sum((torch.tensor(value).to(sol.x) * getattr(sol, name)).sum() for name, value in cotangents.items())
    found = torch.autograd.grad(scalar, tuple(wanted.values()))
    cotangents = {name: value.astype(plain.x.dtype).astype(np.float64) for name, value in cotangents.items()}
    expected = gradients_by_operations(plain, cotangents, "zero" if unsolved == "raise" else unsolved)
    for name, gradient in zip(wanted, found, strict=True):
        assert gradient.dtype == tensors[name].dtype
        scale = expected[name].nan_to_num().abs().max().item()
        other = expected[name].to(gradient.dtype)
        torch.testing.assert_close(gradient, other, atol=max(atol, rtol * scale), rtol=rtol, equal_nan=True)


@pytest.mark.parametrize("shared", ["", "Q", "G", "A point", "q G A", "Q G A point"])
@pytest.mark.parametrize("parts", ["", "A", "G", "A G", "lb", "ub", "A lb ub", "A G lb ub"])
@pytest.mark.parametrize("batch", [(), (1,), (4,), (2, 3)])
def test_gradients_are_those_of_operations(parts, shared, batch):
    operands = random_problem(np.random.default_rng(9), parts, batch=batch, shared=shared.split())
    compare_with_operations(operands)
    compare_with_operations(operands, wanted=["q"])
    compare_with_operations(operands, wanted=[name for name in operands if name not in ("G", "lb")])


def test_gradients_of_fixed_variables_are_those_of_operations():
    compare_with_operations(random_problem(np.random.default_rng(9), "A G lb ub", fixed=2, infinite=0.3))


def test_gradients_of_numbers_are_those_of_operations():
    compare_with_operations({name: np.asarray(value) for name, value in NUMBERS.items()})
    G = np.random.default_rng(0).normal(size=(4, 3))
    compare_with_operations({"Q": NUMBERS["Q"], "q": NUMBERS["q"], "G": G, "h": np.array(0.5)})


def test_gradients_in_float32_are_those_of_operations():
    operands = random_problem(np.random.default_rng(9), "A G lb ub", batch=(4,), shared=("Q", "A"))
    compare_with_operations({name: value.astype(np.float32) for name, value in operands.items()}, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("unsolved", ["nan", "zero"])
@pytest.mark.parametrize("shared", [True, False])
def test_gradients_of_unsolved_problems_are_those_of_operations(shared, unsolved):
    axes = () if shared else (3,)
    operands = {"Q": np.ones((*axes, 1, 1)), "q": np.ones((3, 1)), "G": np.ones((*axes, 2, 1)) * [[1.0], [-1.0]]}
    compare_with_operations(operands | {"h": np.array([[1.0, 1.0], [1.0, -2.0], [1.0, -2.0]])}, unsolved=unsolved)


def test_only_gradients_that_are_needed_are_computed(monkeypatch):
    asked = []

    def spy(lin, r_x, r_v, names, **options):
        asked.append(tuple(names))
        return solve_adjoint(lin, r_x, r_v, names, **options)

    replace_inside(monkeypatch, "solve_adjoint", spy)
    operands = random_problem_in_torch(batch=(3,))
    operands["q"].requires_grad_()
    operands["A"].requires_grad_()
    qpdiff.torch.solve_qp(**operands).x.sum().backward()
    assert asked == [("q", "A")]


@pytest.mark.parametrize("shared", ["Q", "G h A", "Q q lb", "Q G A b ub"])
def test_second_derivatives_of_shared_operands(shared):
    operands = problem(4, ["A", "G", "lb", "ub"])
    values = {}
    for name, value in operands.items():
        one = value.detach().reshape(-1, *value.shape[value.ndim - len(OPERANDS[name]) :])[0]
        values[name] = one if name in shared.split() else torch.stack([one, 1.01 * one])
    solve = outputs_of(values)
    inputs = tuple(value.clone().requires_grad_() for value in values.values())
    assert gradcheck(solve, inputs, atol=1e-6, rtol=1e-5, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(solve, inputs, atol=1e-5, rtol=1e-5, check_fwd_over_rev=True, fast_mode=True)


def test_second_derivatives_of_the_gradients_alone(solved_by):
    """A number that depends on the gradients of matrices, which are the engine's own, and on nothing else."""
    operands = problem(2, ["A", "G", "ub"])
    values = tuple(operands.values())

    def gradients(*values):
        x = qpdiff.torch.solve_qp(**(dict(zip(operands, values, strict=True)) | {"Q": symmetric(values[0])}), **TIGHT).x
        named = [value for name, value in zip(operands, values, strict=True) if name in ("Q", "G", "A")]
        return torch.autograd.grad(x.sin().sum(), named, create_graph=True)

    assert gradcheck(gradients, values, atol=1e-5, rtol=1e-5, fast_mode=True)


def test_constants_have_no_gradient():
    sol = qpdiff.torch.solve_qp(**problem(0, ["G"]))
    for name in ("s", "status", "iterations", "primal_residual", "dual_residual", "duality_gap"):
        assert not getattr(sol, name).requires_grad


# ---- fields that are made when they are asked for


def unread(parts="A G lb ub", **options):
    """A solution of which nothing was asked for yet, and the same one by operations alone, with their operands."""
    operands = random_problem_in_torch(5, parts, batch=(3,), **options)
    one, other = ({k: v.clone().requires_grad_() for k, v in operands.items()} for _ in range(2))
    first = qpdiff.torch.solve_qp(**one)
    with pytest.MonkeyPatch.context() as patch:
        replace_inside(patch, "are_numpys", lambda operands: False)
        second = qpdiff.torch.solve_qp(**other)
    return first, second, one, other


def nothing(read):
    return read()


def in_no_grad(read):
    with torch.no_grad():
        return read()


def in_inference(read):
    with torch.inference_mode():
        return read()


def in_vmap(read):
    return vmap(lambda t: t * read())(torch.ones(2, dtype=DOUBLE))[0]


def in_grad(read):
    found = []
    grad(lambda t: found.append(read()) or t)(torch.tensor(1.0))
    return found[0]


def in_forward_mode(read):
    with forward_ad.dual_level():
        return read()


@pytest.mark.parametrize("mode", [nothing, in_no_grad, in_inference, in_vmap, in_grad, in_forward_mode])
@pytest.mark.parametrize("parts", ["", "G", "A", "lb", "A G lb ub"])
def test_fields_do_not_depend_on_the_mode_in_which_they_are_read_first(mode, parts):
    bounds = {"fixed": 1, "infinite": 0.3} if "lb ub" in parts else {}
    ours, expected, operands, others = unread(parts, **bounds)
    for name in FIELDS:
        mode(lambda name=name: getattr(ours, name))
    for name in FIELDS:
        value, other = getattr(ours, name), getattr(expected, name)
        torch.testing.assert_close(value, other, rtol=0, atol=0)
        assert value.dtype == other.dtype
        assert not value.is_inference()
        assert value is getattr(ours, name)
    losses = [sum(getattr(sol, name).sin().sum() for name in (*OUTPUTS, "objective")) for sol in (ours, expected)]
    gradients = [
        torch.autograd.grad(*pair)
        for pair in zip(losses, (tuple(operands.values()), tuple(others.values())), strict=True)
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("first", FIELDS)
def test_fields_read_first_in_a_program(first):
    ours, expected, _, _ = unread()
    torch._dynamo.reset()
    program = torch.compile(lambda t: t + getattr(ours, first), fullgraph=True, backend="eager")
    torch.testing.assert_close(
        program(torch.zeros(())),
        getattr(expected, first).to(torch.promote_types(getattr(expected, first).dtype, torch.float32)),
    )
    torch.testing.assert_close(getattr(ours, first), getattr(expected, first))


def test_copies_and_pickles_of_a_solution_have_all_of_its_fields():
    for made in (copy.copy, lambda sol: pickle.loads(pickle.dumps(sol)), lambda sol: replace(sol, s=sol.s)):
        ours, expected, _, _ = unread()
        again = made(ours)
        assert isinstance(again, qpdiff.Solution)
        for name in FIELDS:
            torch.testing.assert_close(getattr(again, name), getattr(expected, name))
    shown = repr(unread()[0])
    assert shown.startswith("Solution(x=tensor(")
    assert all(f"{name}=" in shown for name in FIELDS)
    with pytest.raises(AttributeError, match="'w'"):
        ours.w  # noqa: B018


def test_multipliers_of_absent_bounds_are_not_shared_by_solutions():
    for mode in (torch.no_grad(), torch.enable_grad()):
        with mode:
            q = torch.ones(1, 2, requires_grad=True)
            qpdiff.torch.solve_qp(torch.eye(2), q).z_lb.add_(1.0)
            assert not qpdiff.torch.solve_qp(torch.eye(2), q).z_lb.any()


# ---- the optimal value


@pytest.mark.parametrize("parts", ["", "A", "A G lb ub"])
@pytest.mark.parametrize("with_x", [False, True])
def test_derivatives_of_the_optimal_value(parts, with_x):
    operands = problem(0, parts.split())

    def solve(*values):
        given = dict(zip(operands, values, strict=True))
        sol = qpdiff.torch.solve_qp(**(given | {"Q": symmetric(given["Q"])}), **TIGHT)
        return (sol.objective, sol.x) if with_x else sol.objective

    values = tuple(operands.values())
    assert gradcheck(solve, values, atol=1e-6, rtol=1e-5, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(solve, values, atol=1e-5, rtol=1e-5, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("shared", [(), ("Q", "G", "b")])
def test_the_optimal_value_alone_solves_no_system(solved_by, monkeypatch, shared, kind):
    operands = random_problem_in_torch(2, batch=(3,), shared=shared, fixed=1, infinite=0.3)
    operands = {name: value.to(kind).requires_grad_() for name, value in operands.items()}
    cotangent = torch.tensor(np.random.default_rng(3).normal(size=3))
    plain = qpdiff.solve_qp(**{name: value.detach().numpy() for name, value in operands.items()})
    calls = []
    replace_inside(
        monkeypatch, "solve_adjoint", lambda *args, **options: calls.append(1) or solve_adjoint(*args, **options)
    )
    values = tuple(operands.values())
    for with_x in (False, True):
        sol = qpdiff.torch.solve_qp(**operands)
        assert sol.objective.dtype == DOUBLE
        loss = cotangent @ sol.objective
        found = torch.autograd.grad(loss + sol.x.sum() if with_x else loss, values)
        assert len(calls) == with_x
        given = {"x": np.ones(plain.x.shape)} if with_x else {}
        expected = qpdiff.vjp(plain, objective=cotangent.numpy(), **given)
        close = {"rtol": 1e-9, "atol": 1e-9} if kind == DOUBLE else {"rtol": 1e-5, "atol": 1e-5}
        for name, gradient in zip(operands, found, strict=True):
            assert gradient.dtype == kind
            np.testing.assert_allclose(gradient, getattr(expected, name), err_msg=name, **close)


def test_the_optimal_value_under_vmap():
    operands = {name: value.detach() for name, value in problem(1, ["A", "G", "lb"]).items()}
    names = [name for name in operands if operands[name].ndim == 1 + len(OPERANDS[name])]

    def loss(values):
        return qpdiff.torch.solve_qp(**(operands | values), **TIGHT).objective.sin().sum()

    values = {name: operands[name] for name in names}
    singles = [{name: value[i] for name, value in values.items()} for i in range(2)]
    for derivative in (grad(loss), jacfwd(loss), hessian(loss)):
        mapped = vmap(derivative)(values)
        for i, single in enumerate(singles):
            leaves, _ = torch.utils._pytree.tree_flatten(mapped)
            others, _ = torch.utils._pytree.tree_flatten(derivative(single))
            torch.testing.assert_close([leaf[i] for leaf in leaves], others, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("smoothing", [None, 0.1])
def test_optimal_value_of_unsolved_problems(solved_by, smoothing):
    q, G = torch.full((2, 1), -0.5, dtype=DOUBLE, requires_grad=True), torch.tensor([[1.0], [-1.0]], dtype=DOUBLE)
    h = torch.tensor([[1.0, 1.0], [1.0, -2.0]], dtype=DOUBLE)

    def gradient(unsolved):
        sol = qpdiff.torch.solve_qp([[1.0]], q, G, h, unsolved=unsolved, smoothing=smoothing)
        return torch.autograd.grad(sol.objective.sum(), q)[0]

    assert gradient("nan").isnan().tolist() == [[False], [True]]
    first, second = gradient("zero")
    assert second == 0.0
    assert first != 0.0
    if smoothing is None:
        torch.testing.assert_close(first, torch.tensor([0.5], dtype=DOUBLE))


@pytest.mark.parametrize("smoothing", [None, 0.1])
def test_a_problem_without_numbers_leaves_derivatives_by_shared_operands_alone(solved_by, smoothing):
    """They are those of the loss of the other problems, to the second order and in both modes."""
    shared = {
        name: torch.tensor(value[0]) for name, value in strictly_feasible(np.random.default_rng(3), "A G").items()
    }
    q = torch.tensor(np.random.default_rng(4).normal(size=(3, 5)))
    hs = torch.ones(3, 4, dtype=DOUBLE), torch.ones(3, 4, dtype=DOUBLE)
    hs[1][1] = torch.nan

    def derivatives(h):
        def loss(Q, G, A):
            operands = shared | {"Q": symmetric(Q), "G": G, "A": A, "q": q, "h": h}
            sol = qpdiff.torch.solve_qp(**operands, unsolved="zero", smoothing=smoothing, check=False, **TIGHT)
            if h is hs[1]:
                assert sol.z[1].isnan().any()
            kept = [value[[0, 2]] for value in (sol.x, sol.y, sol.z, sol.objective)]
            return sum(value.sin().sum() for value in kept) + 0 * sol.x.sum()  # the last is NaN

        values = tuple(shared[name].clone().requires_grad_() for name in ("Q", "G", "A"))
        first = torch.autograd.grad(loss(*values), values, create_graph=True)
        second = torch.autograd.grad(sum(value.square().sum() for value in first), values)
        pushed = torch.func.jvp(lambda Q: loss(Q, *values[1:]), values[:1], (torch.eye(5, dtype=DOUBLE),))[1]
        return *first, *second, pushed

    expected, found = (derivatives(h) for h in hs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


# ---- smoothing


def along(operands, directions, t):
    return {name: value + t * directions[name] for name, value in operands.items()}


def line(seed, parts="A G lb ub", **options):
    """A problem, and a direction in which all of its operands move."""
    rng = np.random.default_rng(seed)
    operands = strictly_feasible(rng, parts, **options)
    directions = {name: rng.normal(size=value.shape) for name, value in operands.items()}
    directions["Q"] = directions["Q"] + directions["Q"].mT
    return operands, directions, rng.normal(size=operands["q"].shape)


def smoothed_loss(operands, directions, weights, kappa, **options):
    """A number that depends on the solution and on the optimal value, as a function of the step along the line."""
    tensors = [{name: torch.tensor(value) for name, value in each.items()} for each in (operands, directions)]

    def loss(t):
        sol = qpdiff.torch.solve_qp(**along(*tensors, t), smoothing=kappa, **TIGHT, **options)
        return (torch.tensor(weights) * sol.x).sum() + sol.objective.sum()

    return loss


ZERO = torch.tensor(0.0, dtype=DOUBLE)


@pytest.mark.parametrize("parts", ["G", "A G lb ub"])
@pytest.mark.parametrize("kappa", [0.01, 1.0])
def test_smoothing_against_differences_of_the_relaxed_solution(solved_by, parts, kappa):
    operands, directions, weights = line(6, parts, batch=2)

    def relaxed_loss(t):
        d, total = along(operands, directions, t), 0.0
        for i, weight in enumerate(weights):
            one = {name: value[i] for name, value in d.items()}
            x = relaxed(one, kappa)[0]
            total += weight @ x + 0.5 * x @ one["Q"] @ x + one["q"] @ x
        return total

    loss = smoothed_loss(operands, directions, weights, kappa)
    exact = qpdiff.solve_qp(**operands, **TIGHT)
    value = np.sum(weights * exact.x) + np.sum(exact.objective)
    torch.testing.assert_close(loss(ZERO).item(), value, rtol=1e-9, atol=1e-9)
    step = 1e-4
    below, at, above = (relaxed_loss(t) for t in (-step, 0.0, step))
    first, second = (above - below) / (2 * step), (above - 2 * at + below) / step**2
    for derivative in (grad, jacfwd):
        torch.testing.assert_close(derivative(loss)(ZERO).item(), first, rtol=1e-4, atol=1e-4)
    for derivative in (grad(grad(loss)), hessian(loss), jacfwd(jacfwd(loss))):
        torch.testing.assert_close(derivative(ZERO).item(), second, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("parts", ["", "A G lb ub"])
def test_forward_mode_alone_to_third_order(parts):
    loss, step = smoothed_loss(*line(10, parts, batch=2), None), 1e-4
    second = jacfwd(jacfwd(loss))
    torch.testing.assert_close(second(ZERO), hessian(loss)(ZERO))
    first = [jacfwd(loss)(torch.full_like(ZERO, t)) for t in (-step, step)]
    torch.testing.assert_close(second(ZERO), (first[1] - first[0]) / (2 * step), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(jacfwd(second)(ZERO), grad(grad(grad(loss)))(ZERO), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("made", [grad, lambda loss: grad(grad(loss))])
def test_smoothing_under_vmap(made):
    loss, steps = smoothed_loss(*line(7), 0.1), torch.linspace(0, 0.02, 3, dtype=DOUBLE)
    torch.testing.assert_close(vmap(made(loss))(steps), torch.stack([made(loss)(t) for t in steps]))


def test_smoothing_to_third_order():
    loss, step = smoothed_loss(*line(8, batch=1), 0.1), 1e-4
    second = grad(grad(loss))
    difference = (second(ZERO + step) - second(ZERO - step)) / (2 * step)
    torch.testing.assert_close(grad(second)(ZERO), difference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_smoothing_as_vjp_has_it(solved_by, kind):
    operands, _, weights = line(9)
    operands["Q"] = operands["Q"][0]
    tensors = {name: torch.tensor(value, dtype=kind, requires_grad=True) for name, value in operands.items()}
    sol = qpdiff.torch.solve_qp(**tensors, smoothing=0.1)
    loss = (torch.tensor(weights) * sol.x).sum() + sol.objective.sum() + sol.z.sum()
    found = torch.autograd.grad(loss, tuple(tensors.values()))
    expected = qpdiff.vjp(qpdiff.solve_qp(**operands), x=weights, z=1.0, objective=1.0, smoothing=0.1)
    close = {"rtol": 1e-7, "atol": 1e-7} if kind == DOUBLE else {"rtol": 1e-3, "atol": 1e-4}
    for name, gradient in zip(tensors, found, strict=True):
        assert gradient.dtype == kind
        np.testing.assert_allclose(gradient, getattr(expected, name), err_msg=name, **close)


def test_smoothing_of_a_layer():
    torch.manual_seed(0)
    plain = qpdiff.torch.OptNet(3, m=4, p=1).double()
    smooth = qpdiff.torch.OptNet(3, m=4, p=1, smoothing=0.1).double()
    smooth.load_state_dict(plain.state_dict())
    q = torch.randn(5, 3, dtype=DOUBLE)
    torch.testing.assert_close(smooth(q), plain(q))
    smooth(q).sum().backward()
    operands = {name: value.detach().numpy() for name, value in smooth.operands().items()}
    gradients = qpdiff.vjp(qpdiff.solve_qp(q=q.numpy(), **operands), x=np.ones((5, 3)), smoothing=0.1)
    slope = torch.sigmoid(smooth.s0.detach()).numpy()  # h moves with the parameter of the slack
    np.testing.assert_allclose(smooth.s0.grad, gradients.h * slope, rtol=1e-6, atol=1e-8)
    assert "smoothing=0.1" in repr(smooth)


def test_a_relaxed_point_that_is_not_found_is_named():
    """Where neither cost nor bounds hold x ≥ 0, its logarithmic barrier has no minimum."""
    message = "relaxed point of 1 of 2 problems not found; the first is problem 1. With a smaller smoothing"
    with pytest.raises(RuntimeError, match=message):
        qpdiff.torch.solve_qp(torch.zeros(1, 1), torch.tensor([[1.0], [0.0]]), lb=0.0, smoothing=0.1)


@pytest.mark.parametrize("smoothing", [0, -1.0, float("inf"), "much", True])
def test_bad_smoothing(smoothing):
    with pytest.raises(ValueError, match="smoothing is"):
        qpdiff.torch.solve_qp(torch.eye(2), torch.ones(2), smoothing=smoothing)


def test_a_change_in_place_is_noticed():
    for change in ("q", "x"):
        operands = problem(0, ["G"])
        q = operands["q"] * 1
        sol = qpdiff.torch.solve_qp(**(operands | {"q": q}))
        with torch.no_grad():
            {"q": q, "x": sol.x}[change].mul_(2.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            sol.z.sum().backward()


def linearizations(monkeypatch):
    """References to what the solutions from now on keep for the derivative."""
    kept = []
    solve = qpdiff.solver.solve_problem

    def spy(problem, **options):
        kept.append(weakref.ref(problem))
        return solve(problem, **options)

    monkeypatch.setattr(qpdiff.solver, "solve_problem", spy)
    return kept


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_without_gradients(solved_by, monkeypatch, mode):
    kept = linearizations(monkeypatch)
    operands = problem(0, ["A", "G", "lb", "ub"])
    recorded = qpdiff.torch.solve_qp(**operands)
    assert recorded.x.requires_grad
    with mode():
        sol = qpdiff.torch.solve_qp(**operands)
    assert not any(getattr(sol, name).requires_grad for name in OUTPUTS)
    torch.testing.assert_close(sol.x, recorded.x.detach())
    gc.disable()
    try:
        assert kept[0]() is not None
        assert kept[1]() is None
        del recorded
        assert kept[0]() is None  # without a cycle that the garbage collector would have to find
    finally:
        gc.enable()


def test_only_what_is_asked_for():
    operands = problem(0, ["A", "G", "lb", "ub"])
    for name, value in operands.items():
        value.requires_grad_(name == "h")
    qpdiff.torch.solve_qp(**operands).x.sum().backward()
    assert [name for name, value in operands.items() if value.grad is not None] == ["h"]


def test_autocast():
    operands = {k: v.detach().float().requires_grad_() for k, v in problem(0, ["A", "G"]).items()}

    def run():
        return torch.autograd.grad(qpdiff.torch.solve_qp(**operands).x.sum(), tuple(operands.values()))

    for host in (True, False):
        with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
            replace_inside(patch, "on_host", lambda device, host=host: host)
            with torch.autocast("cpu", enabled=False):
                expected = run()
            assert (torch.eye(2) @ torch.eye(2)).dtype == torch.bfloat16
            for one, two in zip(run(), expected, strict=True):
                assert torch.equal(one, two)


def test_threads():
    problems = [problem(seed, ["A", "G", "lb", "ub"]) for seed in range(16)]

    def gradients(operands):
        sol = qpdiff.torch.solve_qp(**operands)
        return torch.autograd.grad(sum(getattr(sol, name).sum() for name in OUTPUTS), tuple(operands.values()))

    expected = [gradients(operands) for operands in problems]
    with ThreadPoolExecutor(4) as pool:
        for one, two in zip(pool.map(gradients, problems), expected, strict=True):
            assert all(map(torch.equal, one, two))


def test_checkpoint():
    operands = problem(0, ["A", "G"])

    def solve(*values):
        return qpdiff.torch.solve_qp(**dict(zip(operands, values, strict=True))).x.sin().sum()

    values = tuple(operands.values())
    expected = torch.autograd.grad(solve(*values), values)
    again = torch.autograd.grad(torch.utils.checkpoint.checkpoint(solve, *values, use_reentrant=False), values)
    torch.testing.assert_close(again, expected)


# ---- torch.func


@pytest.fixture(scope="module")
def sample():
    """X (3) as a function of q, Q and G; five q; Q and G."""
    operands = random_problem_in_torch(0, "A G lb ub", batch=(), n=3, m=4, p=1)
    qs = operands.pop("q") + 3 * torch.tensor(np.random.default_rng(1).normal(size=(5, 3)))

    def x(q, Q=operands["Q"], G=operands["G"]):
        return qpdiff.torch.solve_qp(**(operands | {"Q": symmetric(Q), "q": q, "G": G}), **TIGHT).x

    return x, qs, operands["Q"], operands["G"]


def close(one, two):
    torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-8)


def test_vmap(solved_by, sample):
    x, qs, Q, _ = sample
    expected = torch.stack([x(q) for q in qs])
    close(vmap(x)(qs), expected)
    close(vmap(x, in_dims=1, out_dims=1)(qs.mT), expected.mT)
    close(vmap(x, chunk_size=2)(qs), expected)
    Qs = Q * torch.tensor([1.0, 2.0], dtype=DOUBLE)[:, None, None]
    expected = torch.stack([torch.stack([x(q, Q) for q in qs]) for Q in Qs])
    close(vmap(vmap(x, (0, None)), (None, 0))(qs, Qs), expected)
    close(vmap(vmap(x, (None, 0)), (0, None), out_dims=1)(qs, Qs), expected)
    close(vmap(x, (None, 0))(qs, Qs), expected)  # a batch axis, of some operands, beneath the mapped one
    close(vmap(lambda Q: x(qs, Q[None]))(Qs), expected)
    close(vmap(x, (0, None))(qs[None].expand(2, -1, -1), Qs[:, None]), expected[None].expand(2, -1, -1, -1))


def test_vmap_gives_every_output(sample):
    operands = random_problem_in_torch(batch=(4,))
    names = FIELDS

    def solve(*values):
        sol = qpdiff.torch.solve_qp(**dict(zip(operands, values, strict=True)))
        return tuple(getattr(sol, name) for name in names)

    for one, two in zip(vmap(solve)(*operands.values()), solve(*operands.values()), strict=True):
        assert torch.equal(one, two)


SECOND = {
    "hessian": hessian,
    "jacrev(jacrev)": lambda f: jacrev(jacrev(f)),
    "jacrev(jacfwd)": lambda f: jacrev(jacfwd(f)),
    "jacfwd(jacfwd)": lambda f: jacfwd(jacfwd(f)),
    "jacfwd(grad)": lambda f: jacfwd(grad(f)),
}


def test_first_derivatives_under_transforms(solved_by, sample):
    x, qs, *_ = sample
    expected = torch.autograd.functional.jacobian(x, qs)
    for jacobian in (jacrev, jacfwd):
        close(jacobian(x)(qs), expected)
        close(jacobian(vmap(x))(qs), expected)
        close(vmap(jacobian(x))(qs), torch.stack([expected[i, :, i] for i in range(len(qs))]))


@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives_under_transforms(solved_by, sample, name):
    x, qs, *_ = sample

    def loss(q):
        return (x(q) ** 3).sum()

    expected = torch.stack([torch.autograd.functional.hessian(loss, q) for q in qs])
    close(SECOND[name](loss)(qs[0]), expected[0])
    close(vmap(SECOND[name](loss))(qs), expected)


def test_gradients_of_shared_operands_under_transforms(solved_by, sample):
    x, qs, Q, G = sample

    def loss(q, Q, G):
        return (x(q, Q, G) ** 3).sum()

    expected = [torch.autograd.functional.jacobian(lambda Q, G, q=q: loss(q, Q, G), (Q, G)) for q in qs]
    expected = [torch.stack(column) for column in zip(*expected, strict=True)]
    for one, two in zip(vmap(grad(loss, (1, 2)), (0, None, None))(qs, Q, G), expected, strict=True):
        close(one, two)
    summed = grad(lambda Q, G: vmap(loss, (0, None, None))(qs, Q, G).sum(), (0, 1))(Q, G)
    for one, two in zip(summed, expected, strict=True):
        close(one, two.sum(0))
    mixed = torch.autograd.functional.hessian(lambda Q, G: loss(qs[0], Q, G), (Q, G))[0][1]
    close(jacfwd(jacrev(loss, 1), 2)(qs[0], Q, G), mixed)


def test_gradients_of_operands_that_a_batch_shares_under_vmap(solved_by, sample):
    x, qs, Q, G = sample
    qs, Qs = qs[:4].reshape(2, 2, 3), torch.stack([Q, 2 * Q])
    gradient = grad(lambda q, Q, G: (x(q, Q, G) ** 3).sum(), (0, 1, 2))
    for dims, values in (((0, None, None), (qs, Q, G)), ((0, 0, None), (qs, Qs, G)), ((None, 0, None), (qs[0], Qs, G))):
        each = [[a if dim is None else a[i] for a, dim in zip(values, dims, strict=True)] for i in range(2)]
        expected = zip(*[gradient(*some) for some in each], strict=True)
        for one, two in zip(vmap(gradient, dims)(*values), expected, strict=True):
            close(one, torch.stack(two))


def test_the_first_vmap_of_torch_is_refused(sample):
    x, qs, *_ = sample
    with pytest.raises(RuntimeError, match=r"take torch\.func\.jacrev, jacfwd or vmap instead"):
        torch.autograd.functional.jacobian(x, qs, vectorize=True)


# ---- tensors in qpdiff.solve_qp itself


def test_the_array_engine_records_nothing():
    operands = problem(0, ["A", "G", "lb", "ub"])
    sol = qpdiff.solve_qp(**operands)
    assert not any(getattr(sol, name).requires_grad for name in OUTPUTS)
    gradients = qpdiff.vjp(sol, x=torch.ones_like(sol.x))
    tangents = qpdiff.jvp(sol, q=torch.ones_like(sol.x))
    assert not any(value.requires_grad for value in (*gradients, *tangents) if value is not None)
    recorded = torch.autograd.grad(qpdiff.torch.solve_qp(**operands).x.sum(), tuple(operands.values()))
    for name, gradient in zip(operands, recorded, strict=True):
        torch.testing.assert_close(getattr(gradients, name), gradient, rtol=1e-5, atol=1e-7)


# ---- OptNet


SIZES = [
    (4, 0, 0, False), (4, 0, 0, True), (4, 6, 0, False), (4, 3, 2, False), (4, 0, 2, True), (4, 3, 2, True)
]  # fmt: skip


def optnet(n, m, p, nonnegative, **options):
    return qpdiff.torch.OptNet(n, m, p, nonnegative=nonnegative, **options)


def violation(layer, x):
    """The largest of any constraint, relative to the terms that it is a difference of."""
    d = {name: value.detach().double() for name, value in layer.operands().items()}
    x = x.detach().double()
    parts = []
    for matrix, vector in [pair for pair in (("G", "h"), ("A", "b")) if pair[0] in d]:
        product, size = x @ d[matrix].mT, 1 + x.abs() @ d[matrix].abs().mT + d[vector].abs()
        over = (product - d[vector]) / size
        parts.append(over if matrix == "G" else over.abs())
    if layer.nonnegative:
        parts.append(-x)
    return max((part.max().item() for part in parts if part.numel()), default=0.0)


@pytest.mark.parametrize("sizes", SIZES)
def test_optnet_is_the_problem_that_it_says(sizes):
    torch.manual_seed(0)
    n, m, p, nonnegative = sizes
    layer = optnet(*sizes, dtype=DOUBLE)
    q = 10 * torch.randn(2, 3, n, dtype=DOUBLE)
    assert violation(layer, layer(q)) < 1e-8
    L = np.tril(layer.L.detach().numpy())
    z0 = np.zeros(n) if layer.z0 is None else layer.z0.detach().numpy()
    point = np.log1p(np.exp(z0)) if nonnegative else z0
    operands = {"Q": L @ L.T + 1e-4 * np.eye(n), "q": q.numpy()}
    if m:
        G = layer.G.detach().numpy()
        operands |= {"G": G, "h": G @ point + np.log1p(np.exp(layer.s0.detach().numpy()))}
    if p:
        A = layer.A.detach().numpy()
        operands |= {"A": A, "b": A @ point}
    if nonnegative:
        operands["lb"] = np.zeros(n)
    np.testing.assert_allclose(layer(q).detach(), qpdiff.solve_qp(**operands).x, rtol=1e-6, atol=1e-6)


def test_optnet_starts_as_the_original():
    torch.manual_seed(0)
    layer = qpdiff.torch.OptNet(30, m=40, p=20)
    assert torch.equal(layer.L, layer.L.tril())
    lower = layer.L[torch.ones_like(layer.L).tril().bool()]
    for value, low, high in ((lower, 0, 1), (layer.A, 0, 1), (layer.G, -1, 1)):
        assert low <= value.min() < low + 0.05
        assert high - 0.05 < value.max() <= high
    operands = layer.operands()
    torch.testing.assert_close(operands["h"], torch.ones(40, dtype=DOUBLE))  # z₀ = 0, slack 1
    torch.testing.assert_close(operands["b"], torch.zeros(20, dtype=DOUBLE))
    before = layer.L.clone()
    layer.reset_parameters()
    assert not torch.equal(before, layer.L)


@pytest.mark.parametrize("sizes", SIZES)
def test_gradients_of_the_parameters_of_optnet(sizes):
    torch.manual_seed(1)
    layer = optnet(*sizes, dtype=DOUBLE, eps=0.5, **TIGHT)
    parameters = dict(layer.named_parameters())
    q = 3 * torch.randn(5, 4, dtype=DOUBLE, requires_grad=True)

    def run(q, *values):
        return functional_call(layer, dict(zip(parameters, values, strict=True)), (q,))

    assert gradcheck(run, (q, *parameters.values()), atol=1e-6, rtol=1e-5, fast_mode=True, check_forward_ad=True)
    above = torch.autograd.grad(layer(q).sum(), layer.L)[0].triu(1)
    assert torch.equal(above, torch.zeros_like(above))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", SIZES)
def test_optnet_is_feasible_wherever_the_optimiser_goes(sizes, kind):
    torch.manual_seed(2)
    layer = optnet(*sizes, dtype=kind)
    q = torch.randn(8, 4, dtype=kind)
    for _ in range(30):
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter += 10 ** (3 * torch.rand(()) - 2) * torch.randn_like(parameter)
        assert violation(layer, layer(q)) < (1e-6 if kind == torch.float32 else 1e-7)


@pytest.mark.parametrize("nonnegative", [False, True])
def test_optnet_learns(nonnegative):
    torch.manual_seed(3)
    teacher = qpdiff.torch.OptNet(4, m=3, p=1, nonnegative=nonnegative, dtype=DOUBLE)
    student = qpdiff.torch.OptNet(4, m=3, p=1, nonnegative=nonnegative, dtype=DOUBLE)
    q = 3 * torch.randn(64, 4, dtype=DOUBLE)
    target = teacher(q).detach()
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (student(q) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert violation(student, student(q)) < 1e-7


def test_optnet_as_a_module():
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(5, 4), qpdiff.torch.OptNet(4, m=3, p=1, nonnegative=True, unsolved="zero"))
    inputs = torch.randn(2, 3, 5)
    for shape in ((5,), (3, 5), (2, 3, 5), (0, 5)):
        assert net(inputs[0, 0].expand(shape)).shape == (*shape[:-1], 4)
    other = nn.Sequential(nn.Linear(5, 4), qpdiff.torch.OptNet(4, m=3, p=1, nonnegative=True))
    other.load_state_dict(net.state_dict())
    for same in (other, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(same(inputs), net(inputs))
    assert str(net[1]) == "OptNet(n=4, m=3, p=1, nonnegative=True, eps=0.0001, unsolved='zero')"
    assert {name for name, _ in net[1].named_parameters()} == {"L", "G", "A", "z0", "s0"}
    double = copy.deepcopy(net).double()
    assert double(inputs.double()).dtype == DOUBLE
    torch.testing.assert_close(double(inputs.double()).float(), net(inputs), atol=1e-4, rtol=1e-4)
    empty = copy.deepcopy(net).to("meta")
    assert empty[1].L.device.type == "meta"
    empty = empty.to_empty(device="cpu")
    for layer in empty:
        layer.reset_parameters()
    assert empty(inputs).isfinite().all()


def earlier_state(layer):
    """The state as it was when each parameter was there in any case."""
    n = len(layer.L)
    empty = {"L": layer.L, "G": torch.empty(0, n), "A": torch.empty(0, n), "z0": torch.ones(n), "s0": torch.empty(0)}
    return empty | dict(layer.named_parameters())


@pytest.mark.parametrize("sizes", SIZES)
def test_optnet_has_no_empty_parameters(sizes):
    torch.manual_seed(7)
    n, m, p, _ = sizes
    layer, other = optnet(*sizes), optnet(*sizes)
    expected = {"L": (n, n)} | ({"G": (m, n), "s0": (m,)} if m else {}) | ({"A": (p, n)} if p else {})
    expected |= {"z0": (n,)} if m or p else {}
    assert {name: tuple(value.shape) for name, value in layer.named_parameters()} == expected
    assert set(layer.state_dict()) == set(expected)
    for name in {"L", "G", "A", "z0", "s0"} - set(expected):
        assert getattr(layer, name) is None
    inputs = 3 * torch.randn(5, n)
    layer(inputs).square().sum().backward()
    assert all(parameter.grad.abs().max().isfinite() for parameter in layer.parameters())
    optimizer = torch.optim.AdamW(layer.parameters(), weight_decay=0.1)
    torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0, norm_type=float("inf"))
    optimizer.step()
    for state in (layer.state_dict(), earlier_state(layer)):
        other.reset_parameters()
        assert not torch.equal(other(inputs), layer(inputs))
        other.load_state_dict(state)
        assert torch.equal(other(inputs), layer(inputs))
        network = nn.Sequential(other, nn.Identity())
        network.load_state_dict({f"0.{name}": value for name, value in state.items()})
        assert torch.equal(network(inputs), layer(inputs))
    for same in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.double().float()):
        assert torch.equal(same(inputs), layer(inputs))
    assert f"n={n}, m={m}, p={p}" in str(layer)


def test_optnet_refuses_the_state_of_other_sizes():
    state = optnet(3, 2, 1, False).state_dict()
    for sizes, wrong in (((3, 0, 1, False), "G"), ((3, 2, 0, False), "A"), ((3, 0, 0, True), "s0")):
        with pytest.raises(RuntimeError, match=rf'Unexpected key.* "{wrong}"'):
            optnet(*sizes).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Missing key.* "G"'):
        optnet(3, 2, 1, False).load_state_dict(optnet(3, 0, 1, False).state_dict())


def test_optnet_in_a_network_of_another_type():
    net = nn.Sequential(nn.Linear(5, 4), qpdiff.torch.OptNet(4, m=3, dtype=DOUBLE), nn.Linear(4, 2))
    inputs = torch.randn(7, 5)
    net(inputs).sum().backward()
    assert net[1].G.grad.dtype == DOUBLE
    assert net[0].weight.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert net(inputs).dtype == torch.bfloat16
        features = net[0](inputs)
        assert torch.equal(net[1](features), net[1](features.float()).bfloat16())


def test_ensembles_of_optnet():
    layers = [qpdiff.torch.OptNet(4, m=3, p=1, dtype=DOUBLE) for _ in range(3)]
    parameters, buffers = stack_module_state(layers)
    q = torch.randn(5, 4, dtype=DOUBLE)

    def loss(parameters, q):
        return functional_call(layers[0], (parameters, buffers), (q,)).square().sum()

    expected = [torch.autograd.grad(layer(q).square().sum(), tuple(layer.parameters())) for layer in layers]
    gradients = vmap(grad(loss), (0, None))(parameters, q)
    for (name, _), column in zip(layers[0].named_parameters(), zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(gradients[name], torch.stack(column), rtol=1e-6, atol=1e-8)
    per_sample = vmap(grad(loss), (None, 0))(dict(layers[0].named_parameters()), q)
    torch.testing.assert_close(per_sample["G"].sum(0), expected[0][1], rtol=1e-6, atol=1e-8)


def test_optnet_refuses():
    for message, options in (
        ("eps is 0", {"eps": 0}),
        (r"OptNet\(\) got an unexpected keyword argument 'tolerance'", {"tolerance": 1e-9}),
        ("tol is -1", {"tol": -1}),
        ("max_iterations is 0.5", {"max_iterations": 0.5}),
        ("smoothing is True", {"smoothing": True}),
        ("unsolved is 'drop'", {"unsolved": "drop"}),
        ("engine is 'fast'", {"engine": "fast"}),
        ("progress is a int", {"progress": 1}),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            qpdiff.torch.OptNet(3, **options)


def test_unknown_options_are_those_of_the_function_that_was_called():
    with pytest.raises(TypeError, match=r"solve_qp\(\) got an unexpected keyword argument 'tolerance'"):
        qpdiff.torch.solve_qp(torch.eye(2), torch.ones(2), tolerance=1e-9)


# ---- QPFunction


def qpth_problem(seed, batched, kind=DOUBLE, m=6, p=2):
    """Operands in qpth's order with a batch axis for the names in `batched`, some constraints active."""
    rng = np.random.default_rng(seed)
    n, batch = 5, 3

    def draw(name, *core):
        return rng.normal(size=(batch, *core) if name in batched else core)

    L, G, A, z0 = draw("Q", n, n), draw("G", m, n), draw("A", p, n), rng.normal(size=n)
    h = G @ z0 + rng.uniform(0.1, 0.5, size=m) if "G" not in batched or "h" in batched else None
    h = h if h is not None else (np.abs(G) @ np.abs(z0)).max(0) + 0.1
    h = h + np.zeros((batch, 1)) if "h" in batched else h
    b = A @ z0 if "A" not in batched or "b" in batched else None
    b = b if b is not None else np.zeros(p)
    b = b + np.zeros((batch, 1)) if "b" in batched and b.ndim == 1 else b
    values = (L @ L.mT + np.eye(n), 3 * draw("p", n), G, h, A, b)
    return [torch.tensor(value, dtype=kind, requires_grad=True) for value in values]


BATCHED = ["", "p", "Q p G h A b", "Q", "Q p", "G h", "p h", "p A b", "h b"]


def run_with_gradients(function, operands, weights):
    z = function(*operands)
    (z * weights.to(z.dtype)).sum().backward()
    gradients = [value.grad for value in operands]
    for value in operands:
        value.grad = None
    return z.detach(), gradients


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [(6, 2), (6, 0), (6, 3)])
@pytest.mark.parametrize("batched", BATCHED)
def test_qpfunction_does_what_qpth_does(batched, rows, kind):
    qpth = pytest.importorskip("qpth.qp")
    operands = qpth_problem(5, batched.split(), kind, *rows)
    precise = [value.detach().double().requires_grad_() for value in operands]  # in float32 qpth is not exact enough
    weights = torch.randn(3 if batched else 1, 5, generator=torch.Generator().manual_seed(0))
    ours, gradients = run_with_gradients(qpdiff.torch.QPFunction(), operands, weights)
    theirs, expected = run_with_gradients(qpth.QPFunction(verbose=-1), precise, weights)
    assert ours.dtype == kind
    torch.testing.assert_close(ours, theirs.to(kind), atol=1e-5, rtol=1e-5)
    for value, one, two in zip(operands, gradients, expected, strict=True):
        assert (one is None) == (two is None) == (value.numel() == 0)
        if one is not None:
            torch.testing.assert_close(one, two.to(kind), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("batched", BATCHED)
def test_qpfunction_by_its_definition(batched):
    operands = qpth_problem(6, batched.split())
    names = dict(zip("QpGhAb", ("Q", "q", "G", "h", "A", "b"), strict=True))
    weights = torch.randn(3 if batched else 1, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    z, gradients = run_with_gradients(qpdiff.torch.QPFunction(), operands, weights)
    sol = qpdiff.solve_qp(**dict(zip(names.values(), (value.detach().numpy() for value in operands), strict=True)))
    assert z.shape == (3 if batched else 1, 5)
    np.testing.assert_allclose(z, sol.x.reshape(-1, 5), rtol=1e-7, atol=1e-7)
    by_hand = qpdiff.vjp(sol, x=weights.numpy().reshape(sol.x.shape))
    for (short, name), gradient in zip(names.items(), gradients, strict=True):
        mean = 3 if batched and short not in batched.split() else 1
        np.testing.assert_allclose(gradient, getattr(by_hand, name) / mean, rtol=1e-6, atol=1e-8)


def test_qpfunction_without_constraints_and_with_an_odd_hessian():
    e = torch.Tensor()
    Q, p, G, h, A, b = qpth_problem(7, ["p"])
    torch.testing.assert_close(qpdiff.torch.QPFunction()(Q, p, e, e, e, e), -torch.linalg.solve(Q, p.mT).mT)
    function = qpdiff.torch.QPFunction(1e-12, -1, 3, 20, qpdiff.torch.QPSolvers.PDIPM_BATCHED, False)
    expected = function(Q, p, G, h, A, b)
    odd = Q + (skew := torch.randn(5, 5, dtype=DOUBLE)) - skew.mT
    torch.testing.assert_close(function(odd, p, G, h, A, b), expected, atol=1e-6, rtol=1e-6)
    linear = function(
        torch.zeros_like(Q), p, torch.cat([G, torch.eye(5), -torch.eye(5)]), torch.cat([h, torch.ones(10)]), e, e
    )
    assert linear.isfinite().all()


def closed_form(batch, n, axes):
    """A batch of projections onto Σz = 1 as operands with a batch axis where `axes` says so, and their solution."""
    rng = np.random.default_rng(10)
    p = rng.normal(size=(batch, n))
    operands = {"Q": np.eye(n), "p": p, "G": -np.eye(n), "h": np.full(n, 100.0), "A": np.ones((1, n)), "b": np.ones(1)}
    shaped = {name: value[None] if axes[name] else value for name, value in operands.items() if name != "p"}
    shaped = {"Q": shaped.pop("Q"), "p": p, **shaped}
    return shaped, -p + (1 + p.sum(-1, keepdims=True)) / n


@pytest.mark.parametrize("single", ["", "Q", "G h", "A b", "Q G h A b"])
@pytest.mark.parametrize("batch", [0, 1, 7])
def test_qpfunction_broadcasts_a_batch_axis_of_one(batch, single):
    operands, expected = closed_form(batch, 3, {name: name in single.split() for name in "QpGhAb"})
    tensors = [torch.tensor(value, requires_grad=True) for value in operands.values()]
    z = qpdiff.torch.QPFunction()(*tensors)
    assert z.shape == (batch, 3)
    torch.testing.assert_close(z.detach(), torch.tensor(expected), atol=1e-7, rtol=1e-7)
    z[:, 0].sum().backward()
    # Each z moves with b along 1/n: the sum over the batch where b has an axis that broadcasts, else qpth's mean.
    size = batch if "b" in single.split() else min(batch, 1)
    torch.testing.assert_close(tensors[5].grad, torch.full(tensors[5].shape, size / 3.0, dtype=DOUBLE))


@pytest.mark.parametrize(
    "absent",
    [
        (None, None),
        (torch.Tensor(),) * 2,
        (torch.empty(0, 3), torch.empty(0)),
        (np.empty(0), None),
        ([], torch.Tensor()),
    ],
    ids=str,
)
def test_qpfunction_without_constraints_in_any_form(absent):
    Q, p = torch.eye(3, dtype=DOUBLE), torch.tensor([[1.0, -2.0, 3.0]], dtype=DOUBLE)
    torch.testing.assert_close(qpdiff.torch.QPFunction()(Q, p, *absent, *absent), -p)
    bound = qpdiff.torch.QPFunction()(Q, p, -torch.eye(3), torch.zeros(3), *absent)
    torch.testing.assert_close(bound, p.neg().clamp(min=0), atol=1e-6, rtol=0)


def test_qpfunction_keeps_a_batch_that_only_absent_constraints_have():
    e = torch.empty(4, 0, 2)
    z = qpdiff.torch.QPFunction()(torch.eye(2), torch.ones(2), torch.Tensor(), torch.Tensor(), e, torch.empty(4, 0))
    torch.testing.assert_close(z, -torch.ones(4, 2))


def test_qpfunction_takes_arrays_lists_and_integers():
    operands, expected = closed_form(3, 4, dict.fromkeys("QpGhAb", False))
    for form in (lambda a: a, np.ndarray.tolist, np.asfortranarray, lambda a: a[::-1][::-1]):
        z = qpdiff.torch.QPFunction()(*(form(value) for value in operands.values()))
        assert z.dtype == DOUBLE
        np.testing.assert_allclose(z, expected, atol=1e-7)
    p = torch.tensor(operands["p"], dtype=torch.float32, requires_grad=True)
    z = qpdiff.torch.QPFunction()(*(p if name == "p" else value for name, value in operands.items()))
    assert z.dtype == torch.float32
    z.sum().backward()
    assert p.grad.shape == p.shape
    z = qpdiff.torch.QPFunction()(2 * torch.eye(2), torch.tensor([1, -1]), None, None, None, None)
    torch.testing.assert_close(z, torch.tensor([[-0.5, 0.5]], dtype=DOUBLE))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"p": torch.Tensor()}, TypeError, "p is empty; every problem needs Q and p"),
        ({"p": None}, TypeError, "p is None; every problem needs Q and p"),
        ({"Q": None}, TypeError, "Q is None; every problem needs Q and p"),
        ({"Q": torch.Tensor()}, TypeError, "Q is empty; every problem needs Q and p"),
        ({"Q": np.empty((0, 0))}, TypeError, "Q is empty; every problem needs Q and p"),
        ({"G": None}, ValueError, "h was given without G"),
        ({"b": torch.Tensor()}, ValueError, "A was given without b"),
        ({"p": torch.ones(7, 3), "h": torch.ones(5, 4)}, ValueError, "h has a batch of 5, but p one of 7"),
        ({"Q": torch.eye(3).expand(2, 3, 3), "p": torch.ones(0, 3)}, ValueError, "p has a batch of 0, but Q one of 2"),
        ({"p": torch.ones(4)}, ValueError, "p has shape (4,); expected (..., n) with n = 3 from Q"),
        ({"p": torch.ones(7, 4)}, ValueError, "p has shape (7, 4); expected (..., n) with n = 3 from Q"),
        ({"Q": torch.ones(3, 2)}, ValueError, "Q has shape (3, 2); expected (..., n, n), square"),
        ({"p": torch.tensor([1.0, torch.nan, 0.0])}, ValueError, "p has NaN or infinite entries"),
        ({"p": torch.ones(3, dtype=torch.complex64)}, TypeError, "p has dtype"),
        ({"h": torch.tensor(1.0)}, ValueError, "h has 0 axes; expected 1, or 2 with that of the batch"),
        ({"G": torch.ones(3)}, ValueError, "G has 1 axes; expected 2, or 3 with that of the batch"),
        ({"p": "ones"}, TypeError, "p has dtype"),
        ({"A": {}}, TypeError, "A has dtype"),
        ({"p": [[1.0], [1.0, 2.0]]}, ValueError, "p is not a regular array"),
    ],
)
def test_qpfunction_names_what_is_wrong(change, kind, message):
    good = {"Q": torch.eye(3), "p": torch.ones(3), "G": torch.ones(4, 3), "h": torch.ones(4)}
    good |= {"A": torch.ones(1, 3), "b": torch.ones(1)}
    with pytest.raises(kind, match="^" + re.escape(message)):
        qpdiff.torch.QPFunction()(**(good | change))


@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_qpfunction_takes_a_hessian_that_was_computed_in_its_type(kind):
    Q = torch.tensor(rounded_product(np.float32)).to(kind)
    box, p = torch.cat([torch.eye(6), -torch.eye(6)]).to(kind), torch.randn(2, 6).to(kind)
    e = torch.Tensor()
    z = qpdiff.torch.QPFunction()(Q, p, box, torch.ones(12).to(kind), e, e)
    assert z.dtype == kind
    precise = symmetric(Q.double())
    expected = qpdiff.torch.solve_qp(precise, p.double(), box.double(), torch.ones(12).double(), check=False).x
    torch.testing.assert_close(z, expected.to(kind), atol=1e-6, rtol=1e-6)


def test_qpfunction_under_vmap():
    Q, p, G, h, A, b = qpth_problem(9, ["p"])
    function = qpdiff.torch.QPFunction()
    torch.testing.assert_close(
        vmap(function, (None, 0, None, None, None, None))(Q, p, G, h, A, b)[:, 0], function(Q, p, G, h, A, b)
    )


def test_qpfunction_prints_and_refuses(capsys):
    operands = qpth_problem(8, ["p"])
    qpdiff.torch.QPFunction(verbose=0)(*operands)
    assert capsys.readouterr().out == ""
    qpdiff.torch.QPFunction(verbose=1)(*operands)
    assert "primal" in capsys.readouterr().out
    Q, p, G, h, A, b = operands
    message = "3 of 3 problems not solved; the first is problem 0: PRIMAL_INFEASIBLE. Call solve_qp with unsolved="
    with pytest.raises(RuntimeError, match=message):  # QPFunction has no such option
        qpdiff.torch.QPFunction()(Q, p, torch.cat([G, -G]), torch.cat([h, -h - 1]), A, b)
    with pytest.raises(ValueError, match="Q is not positive semidefinite"):
        qpdiff.torch.QPFunction()(-Q, p, G, h, A, b)
    with pytest.raises(ValueError, match="p has 3 axes; expected 1, or 2 with that of the batch"):
        qpdiff.torch.QPFunction()(Q, p[None], G, h, A, b)


# ---- on a GPU


@pytest.mark.parametrize("parts", ["", "A", "G", "A G", "A G lb ub"])
def test_derivatives_on_a_gpu(gpu, parts):
    operands = problem(2, parts.split())
    there = {name: value.detach().to(gpu).requires_grad_() for name, value in operands.items()}
    gradients = first_and_second(there)
    assert {gradient.device.type for order in gradients for gradient in order} == {"cuda"}
    torch.testing.assert_close(gradients, first_and_second(operands), rtol=1e-7, atol=1e-9, check_device=False)


def test_transforms_on_a_gpu(gpu):
    operands = random_problem(np.random.default_rng(5), "A G lb ub", batch=())
    q = torch.randn(4, len(operands["q"]), dtype=DOUBLE)

    def gradients(device):
        fixed = {name: torch.tensor(value, device=device) for name, value in operands.items()}
        return vmap(grad(lambda q: sum(out.sin().sum() for out in outputs_of(fixed)(*(fixed | {"q": q}).values()))))(
            q.to(device)
        )

    torch.testing.assert_close(gradients(gpu), gradients("cpu"), rtol=1e-6, atol=1e-8, check_device=False)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_a_network_on_a_gpu(gpu, kind):
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(5, 4), qpdiff.torch.OptNet(4, m=3, p=1, nonnegative=True, eps=0.5)).to(kind)
    there, inputs = copy.deepcopy(net).to(gpu), torch.randn(7, 5, dtype=kind)
    on_gpu = inputs.to(gpu)
    stream = torch.cuda.Stream()  # all work of the solver has to go to the stream of the caller's
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        there(on_gpu).square().sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    net(inputs).square().sum().backward()
    close = {"rtol": 1e-6, "atol": 1e-7} if kind == DOUBLE else {"rtol": 1e-2, "atol": 1e-2}
    for one, two in zip(there.parameters(), net.parameters(), strict=True):
        assert one.grad.device.type == "cuda"
        torch.testing.assert_close(one.grad, two.grad, check_device=False, **close)


def test_unsolved_on_a_gpu(gpu):
    operands = {"Q": torch.eye(1), "q": torch.zeros(2, 1), "G": torch.tensor([[1.0], [-1.0]])}
    operands["h"] = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    operands = {name: value.double().to(gpu) for name, value in operands.items()}
    with pytest.raises(RuntimeError, match="1 of 2"):
        qpdiff.torch.solve_qp(**operands)
    q = operands["q"].requires_grad_()
    (gradient,) = torch.autograd.grad(qpdiff.torch.solve_qp(**operands, unsolved="nan").x.sum(), q)
    assert gradient.isnan().flatten().tolist() == [False, True]


# ---- sparse operands


def sparse_problem(seed, shared=(), parts="G A lb"):
    """Sparse matrices, and tensors by name of which those of the matrices are the values."""
    operands, masks = smooth_sparse(seed, parts, shared=shared, batch=(2,), n=4, m=3, p=1)
    matrices = {name: as_sparse(operands[name], mask) for name, mask in masks.items()}
    arrays = operands | {name: matrix.values for name, matrix in matrices.items()}
    return matrices, {name: torch.tensor(value, requires_grad=True) for name, value in arrays.items()}


def sparse_outputs(matrices, names, **options):
    def outputs(*values):
        given = dict(zip(names, values, strict=True))
        mirror = torch.tensor(matrices["Q"].pattern.mirror)
        given["Q"] = (given["Q"] + given["Q"][..., mirror]) / 2
        given |= {name: qpdiff.Sparse.like(matrix, given[name]) for name, matrix in matrices.items()}
        sol = qpdiff.torch.solve_qp(**given, **TIGHT, **options)
        return sol.x, sol.y, sol.z, sol.z_lb, sol.objective

    return outputs


@pytest.mark.parametrize("shared", [(), ("Q", "G", "A", "q")], ids=["batch", "shared"])
def test_derivatives_of_sparse_problems(shared):
    matrices, tensors = sparse_problem(1, shared)
    outputs = sparse_outputs(matrices, tuple(tensors))
    assert gradcheck(outputs, tuple(tensors.values()), check_forward_ad=True, check_batched_grad=False)
    assert gradgradcheck(outputs, tuple(tensors.values()), check_fwd_over_rev=True)


def test_relaxed_derivatives_of_sparse_problems():
    matrices, tensors = sparse_problem(2)
    values = {name: value.detach().numpy() for name, value in tensors.items()}
    given = values | {name: matrix.with_values(values[name]) for name, matrix in matrices.items()}
    sol = qpdiff.solve_qp(**given, **TIGHT)
    expected = qpdiff.vjp(sol, x=np.ones(4), z=np.ones(3), smoothing=1e-2)
    x, _, z, *_ = sparse_outputs(matrices, tuple(tensors), smoothing=1e-2)(*tensors.values())
    (x.sum() + z.sum()).backward()
    for name, tensor in tensors.items():
        gradient = getattr(expected, name)
        gradient = gradient.values if name in matrices else gradient
        np.testing.assert_allclose(tensor.grad, gradient, rtol=1e-6, atol=1e-7)


def test_hessian_and_vmap_of_sparse_problems():
    matrices, tensors = sparse_problem(3)
    outputs, names = sparse_outputs(matrices, tuple(tensors)), tuple(tensors)
    values = [tensor.detach() for tensor in tensors.values()]

    def loss(*values):
        return outputs(*values)[0].square().sum()

    forward = hessian(loss, argnums=names.index("G"))(*values)
    backward = jacrev(jacrev(loss, argnums=names.index("G")), argnums=names.index("G"))(*values)
    torch.testing.assert_close(forward, backward, rtol=1e-6, atol=1e-7)
    at = [torch.stack([value, 1.01 * value]) for value in values]
    together = vmap(grad(loss, argnums=names.index("A")))(*at)
    one_by_one = [grad(loss, argnums=names.index("A"))(*[value[i] for value in at]) for i in range(2)]
    torch.testing.assert_close(together, torch.stack(one_by_one), rtol=1e-6, atol=1e-7)
    only_q = [0 if name == "q" else None for name in names]
    gradients = vmap(grad(loss, argnums=names.index("G")), in_dims=tuple(only_q))
    at = [torch.stack([v, 1.01 * v]) if name == "q" else v for name, v in zip(names, values, strict=True)]
    expected = [
        grad(loss, argnums=names.index("G"))(*[v[i] if name == "q" else v for name, v in zip(names, at, strict=True)])
        for i in range(2)
    ]
    torch.testing.assert_close(gradients(*at), torch.stack(expected), rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("shared", [(), ("Q", "G", "A")], ids=["batch", "shared"])
def test_gradients_of_tensors_in_the_layout_csr(shared):
    matrices, tensors = sparse_problem(4, shared)
    given, leaves = {}, {}
    for name, value in tensors.items():
        given[name] = leaves[name] = value.detach().requires_grad_()
        if name in matrices:
            copies = () if name in shared else (2, 1)
            indptr, indices = (
                torch.tensor(a).repeat(copies or 1) for a in (matrices[name].indptr, matrices[name].indices)
            )
            csr = torch.sparse_csr_tensor(indptr, indices, value.detach(), matrices[name].shape)
            given[name] = leaves[name] = csr.requires_grad_()
    sol = qpdiff.torch.solve_qp(**given, **TIGHT)
    (sol.x.sum() + sol.objective.sum()).backward()
    x, *_, objective = sparse_outputs(matrices, tuple(tensors))(*tensors.values())
    (x.sum() + objective.sum()).backward()
    for name, leaf in leaves.items():
        gradient = leaf.grad.values() if name in matrices else leaf.grad
        torch.testing.assert_close(gradient, tensors[name].grad, rtol=1e-6, atol=1e-8)


def test_scipy_matrices_and_half_precision():
    G = sp.csr_array([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    q = torch.tensor([-1.0, -2.0, -1.0], requires_grad=True)
    sol = qpdiff.torch.solve_qp(sp.eye_array(3, format="csc"), q, G, torch.tensor([0.5, 3.0]))
    assert sol.x.dtype == DOUBLE
    sol.x[1].backward()
    torch.testing.assert_close(q.grad, torch.tensor([0.0, -0.5, 0.5]), atol=1e-4, rtol=0)
    half = qpdiff.Sparse(torch.ones(3, dtype=torch.float16), [0, 1, 2], [0, 1, 2, 3], (3, 3))
    assert qpdiff.torch.solve_qp(half, -torch.ones(3, dtype=torch.float16)).x.dtype == torch.float16


def test_qpths_function_refuses_sparse_operands():
    Q = qpdiff.Sparse(torch.ones(2), [0, 1], [0, 1, 2], (2, 2))
    e = torch.Tensor()
    with pytest.raises(
        TypeError, match=r"^Q is sparse; QPFunction takes dense tensors, and qpdiff.torch.solve_qp sparse"
    ):
        qpdiff.torch.QPFunction()(Q, torch.ones(2), e, e, e, e)


def test_programs_refuse_sparse_operands():
    matrices, tensors = sparse_problem(5)
    Q = matrices["Q"].with_values(tensors["Q"].detach())
    program = torch.compile(lambda q: qpdiff.torch.solve_qp(Q, q).x, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"Q is sparse, which torch.compile and torch.export do not take"):
        program(tensors["q"])
