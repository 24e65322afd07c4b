"""What goes to the host: on a GPU each number makes the processor wait for all that was asked of the device before.

array-api-strict on a device that is not the CPU stands in for the GPU and counts.
"""

from functools import partial

import numpy as np
import pytest
from problems import infeasible, parallel_rows, random_problem

import qpdiff
from qpdiff.engines.array import reduced_forms

MIXED = "some dual, some primal"
FORMS = {
    "no constraints": ("", "pd", reduced_forms.PrimalForm),
    "bounds only": ("lb ub", "psd", reduced_forms.PrimalForm),
    "primal": ("A G", "psd", reduced_forms.PrimalForm),
    "linear program": ("A G lb ub", "lp", reduced_forms.PrimalForm),
    "dense dual": ("A", "pd", reduced_forms.DenseDualForm),
    "diagonal dual": ("A lb ub", "diagonal", reduced_forms.DiagonalDualForm),
    MIXED: ("A", "pd", reduced_forms.DenseDualForm),
}
A_SOLVE = 8
"""On top of the iterations: two for the check, two to choose the form, for each form that all has ended and whether
there are variables in no entry of Q, and one for a start in the rows alone."""
A_DERIVATIVE = 52
"""For problems that ended together: 3 rounds with the last factor, whether that did, and up to 3 fresh factors, each
with two attempts, 12 rounds and whether that did."""


@pytest.fixture(params=[("float64", None), ("float32", None), ("float32", "float32")], ids=["64", "32 in 64", "32"])
def on_device(request, strict):
    """Onto a device that is not the CPU, in either type, solved in either."""
    kind, dtype = request.param

    def moved(value):
        return strict.asarray(np.asarray(value), dtype=getattr(strict, kind), device=strict.Device("device1"))

    moved.solve = partial(qpdiff.solve_qp, dtype=dtype)
    return moved


def draw(form, batch):
    parts, cost, _ = FORMS[form]
    operands = random_problem(np.random.default_rng(0), parts, cost=cost, batch=(batch,), n=9, m=8, p=2)
    if form == MIXED:
        operands["Q"][0], operands["q"][0] = 0.0, 0.0  # too flat to invert
    return operands


def to_host(strict, value):
    return np.asarray(strict.asarray(value, device=strict.Device("CPU_DEVICE")))


def counted(transfers, function, *args, **kwargs):
    transfers.clear()
    value = function(*args, **kwargs)
    return value, len(transfers)


def rounds(strict, form, sol):
    """What the iterations of a solve send to the host, where the problems of the two forms take turns.

    That is one value an iteration, and two with steps in the rows alone.
    """
    iterations = to_host(strict, sol.iterations)
    primal, dense = (iterations[:1], iterations[1:]) if form == MIXED else (iterations[:0], iterations)
    in_rows = FORMS[form][2] is reduced_forms.DenseDualForm and sol.linearization.problem.dtype == strict.float64
    return int(np.max(primal, initial=0)) + (1 + in_rows) * int(np.max(dense, initial=0))


@pytest.mark.parametrize("batch", [1, 20])
@pytest.mark.parametrize("form", FORMS)
def test_one_an_iteration_and_a_few_a_solve(strict, transfers, on_device, form, batch):
    operands = {name: on_device(value) for name, value in draw(form, batch).items()}
    on_top = set()
    for limit in (1, 3, 200):
        sol, count = counted(transfers, on_device.solve, **operands, max_iterations=limit)
        on_top.add(count - rounds(strict, form, sol))
    assert len(on_top) == 1, "the same few, however many iterations"
    assert max(on_top) <= A_SOLVE
    assert np.all(to_host(strict, sol.status) == qpdiff.Status.SOLVED)
    forms = {reduced_forms.PrimalForm} if form == MIXED else {FORMS[form][2]}
    forms |= {reduced_forms.DenseDualForm} if form == MIXED and batch > 1 else set()
    assert {each.form for each in sol.linearization.factors.saved} == forms


def test_the_check_of_the_numbers_takes_one(transfers, on_device):
    operands = {name: on_device(value) for name, value in draw("linear program", 6).items()}
    _, checked = counted(transfers, on_device.solve, **operands)
    _, unchecked = counted(transfers, on_device.solve, **operands, check=False)
    assert checked - unchecked == 1


@pytest.mark.parametrize("form", FORMS)
def test_a_warm_start_takes_none(strict, transfers, on_device, form):
    operands = draw(form, 6)
    near = on_device.solve(**{name: on_device(value) for name, value in operands.items()})
    operands["q"] = operands["q"] * 1.01
    operands = {name: on_device(value) for name, value in operands.items()}
    cold, cold_count = counted(transfers, on_device.solve, **operands)
    warm, warm_count = counted(transfers, on_device.solve, **operands, warm_start=near)
    assert cold_count - rounds(strict, form, cold) == warm_count - rounds(strict, form, warm)


@pytest.mark.parametrize("shared", [(), ("Q", "A", "G")], ids=["own", "shared"])
@pytest.mark.parametrize("form", FORMS)
def test_a_derivative_takes_a_few_whatever_the_batch(transfers, on_device, form, shared):
    for batch in (1, 20):
        operands = {name: on_device(v[0] if name in shared else v) for name, v in draw(form, batch).items()}
        sol = on_device.solve(**operands)
        groups = len(sol.linearization.factors.saved)
        assert groups <= 2 * (1 + np.log2(batch))
        _, count = counted(transfers, qpdiff.vjp, sol, x=sol.x)
        assert 1 <= count <= A_DERIVATIVE * groups
        _, count = counted(transfers, qpdiff.jvp, sol, q=sol.x)
        assert 1 <= count <= A_DERIVATIVE * groups


def test_smoothing_takes_one_a_newton_step(transfers, on_device):
    sol = on_device.solve(**{name: on_device(value) for name, value in draw("primal", 6).items()})
    _, plain = counted(transfers, qpdiff.vjp, sol, x=sol.x)
    _, smoothed = counted(transfers, qpdiff.vjp, sol, x=sol.x, smoothing=1e-2)
    assert smoothed <= plain + 50


def test_certificates_take_no_more(strict, transfers, on_device):
    operands = infeasible(np.random.default_rng(0), parallel_rows, "pd", (5, 4, 2))
    sol, count = counted(transfers, on_device.solve, **{name: on_device(value) for name, value in operands.items()})
    certified = np.mean(to_host(strict, sol.status) == qpdiff.Status.PRIMAL_INFEASIBLE)
    assert certified >= 0.95  # in float32 rounding may leave one of 25 without a certificate
    assert count <= 2 * np.max(to_host(strict, sol.iterations)) + A_SOLVE


def test_verbose_works_where_only_the_standard_does(strict, on_device, capsys):
    sol = on_device.solve(**{name: on_device(value) for name, value in draw("primal", 6).items()}, verbose=True)
    assert capsys.readouterr().out.count("\n") == 1 + int(np.max(to_host(strict, sol.iterations)))
