"""What depends on the array library: that derivatives agree, and moving data."""

import numpy as np
import pytest
from problems import random_problem

import qpdiff


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


class TensorOnAGPU:
    """An array that other libraries cannot look into, until it is moved to the host."""

    def __init__(self, value):
        self.value = value

    def __dlpack__(self, **options):
        raise BufferError("on a GPU")

    def __dlpack_device__(self):
        return 2, 0

    def to_device(self, device, **options):
        assert device == "cpu"
        return self.value


def test_the_backend_flag_moves_data_from_a_gpu():
    operands = random_problem(np.random.default_rng(2), "A G")
    moved = qpdiff.solve_qp(**{name: TensorOnAGPU(value) for name, value in operands.items()}, backend="numpy")
    np.testing.assert_allclose(moved.x, qpdiff.solve_qp(**operands).x)


def test_an_unknown_backend():
    with pytest.raises(ValueError, match="backend is 'tensorflow'; expected one of 'numpy'"):
        qpdiff.solve_qp(np.eye(2), np.ones(2), backend="tensorflow")
