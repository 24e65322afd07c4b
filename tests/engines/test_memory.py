"""The peak memory of a solve stays below four times the problem's data, what is shared counted once."""

import tracemalloc

import numpy as np
import pytest
from problems import optnet

import qpdiff

pytestmark = pytest.mark.usefixtures("each_engine")


def peak_over_data(operands):
    # What is imported or compiled on first use does not count.
    qpdiff.solve_qp(**{name: value[:50] for name, value in operands.items()})
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


def test_memory_is_used_again_only_when_no_view_is_left():
    memory = pytest.importorskip("qpdiff.engines.compiled.memory", exc_type=ImportError)
    first = memory.empty((1000, 100), float)
    first[...] = 1.0
    kept = [first[3], first.reshape(-1)[:5], first.base[:10], np.asarray(first.base)]
    del first
    while kept:
        second = memory.empty((1000, 100), float)
        second[...] = 2.0
        assert not any(np.shares_memory(second, view) for view in kept)
        assert all(np.all(view.view(float) == 1.0) for view in kept[:2])
        del second, kept[-1]
    assert len({memory.empty((1000, 100), float).ctypes.data for _ in range(5)}) < 3
