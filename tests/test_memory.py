"""The peak memory of a solve stays below four times the problem's data, what is shared counted once."""

import tracemalloc

import numpy as np
import pytest

import qpdiff

from .problems import optnet


def peak_over_data(operands):
    qpdiff.solve_qp(**{name: value[:1] for name, value in operands.items()})  # what is imported on first use
    tracemalloc.start()
    sol = qpdiff.solve_qp(**operands)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.all(sol.status == qpdiff.Status.SOLVED)
    return peak / sum(value.nbytes for value in operands.values())


@pytest.mark.parametrize(("batch", "n", "m", "p"), [(128, 100, 50, 10), (128, 50, 50, 0), (2000, 10, 20, 0)])
def test_matrices_of_each_problem(batch, n, m, p):
    assert peak_over_data(optnet(np.random.default_rng(0), (batch,), n, m, p)) < 4


def test_shared_matrices():
    rng = np.random.default_rng(1)
    operands = optnet(rng, (1,), 50, 25, 5)
    operands["q"] = rng.normal(size=(10_000, 50))
    for name in ("h", "b"):
        operands[name] = np.repeat(operands[name], 10_000, axis=0)
    assert peak_over_data(operands) < 4
