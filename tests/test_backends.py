"""What depends on the array library: transfers to the host, and moving data."""

import numpy as np
import pytest
from problems import random_problem

import qpdiff


@pytest.fixture
def strict():
    module = pytest.importorskip("array_api_strict")
    module.set_array_api_strict_flags(boolean_indexing=False, data_dependent_shapes=False)
    yield module
    module.reset_array_api_strict_flags()


@pytest.mark.parametrize("parts", ["A G", "A lb ub", "G lb"])
@pytest.mark.parametrize("cost", ["pd", "diagonal"])
def test_at_most_one_transfer_to_the_host_an_iteration(strict, monkeypatch, parts, cost):
    device = strict.Device("device1")
    operands = random_problem(np.random.default_rng(0), parts, cost=cost, batch=(6,), n=5, m=3, p=1)
    operands = {name: strict.asarray(value, device=device) for name, value in operands.items()}
    count = 0

    def counted(method):
        def call(self):
            nonlocal count
            count += 1
            return method(self)

        return call

    array = type(operands["Q"])
    for name in ("__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(array, name, counted(getattr(array, name)))
    observed = []
    for limit in (2, 5, 200):
        count = 0
        sol = qpdiff.solve_qp(**operands, max_iterations=limit)
        transfers = count
        iterations = int(np.max(np.asarray(strict.asarray(sol.iterations, device=strict.Device("CPU_DEVICE")))))
        observed.append((iterations, transfers))
    assert observed[1][0] > observed[0][0]
    for iterations, transfers in observed:
        assert transfers <= iterations + 6


def test_vjp_on_another_library(xp):
    operands = random_problem(np.random.default_rng(1), "A G lb ub")
    expected = qpdiff.vjp(qpdiff.solve_qp(**operands), x=np.ones((4, 6)))
    sol = qpdiff.solve_qp(**{name: xp.asarray(value) for name, value in operands.items()})
    actual = qpdiff.vjp(sol, x=xp.asarray(np.ones((4, 6))))
    tangent = qpdiff.jvp(sol, q=xp.asarray(np.ones((4, 6))))
    expected_tangent = qpdiff.jvp(qpdiff.solve_qp(**operands), q=np.ones((4, 6)))
    for name in operands:
        np.testing.assert_allclose(xp.to_numpy(getattr(actual, name)), getattr(expected, name), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(xp.to_numpy(tangent.x), expected_tangent.x, rtol=1e-5, atol=1e-6)


def test_the_backend_flag_moves_the_data(strict):
    operands = random_problem(np.random.default_rng(2), "A G")
    moved = qpdiff.solve_qp(**{name: strict.asarray(value) for name, value in operands.items()}, backend="numpy")
    assert isinstance(moved.x, np.ndarray)
    np.testing.assert_allclose(moved.x, qpdiff.solve_qp(**operands).x)


def test_an_unknown_backend():
    with pytest.raises(ValueError, match="backend is 'tensorflow'; expected one of 'numpy'"):
        qpdiff.solve_qp(np.eye(2), np.ones(2), backend="tensorflow")
