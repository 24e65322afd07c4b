"""Memory of the compiled engine's results: used again once nothing holds on to it, and never before."""

import sys
import threading

import numpy as np
import pytest
from problems import optnet

import qpdiff

memory = pytest.importorskip("qpdiff.engines.compiled.memory", exc_type=ImportError)

SHAPE = (memory.SMALLEST // 8 + 5,)


@pytest.fixture(autouse=True)
def _nothing_kept():
    memory._pool.clear()


def kept():
    """Return the bytes of the free buffers in the pool."""
    size = 0
    for _ in range(len(memory._pool)):
        buffer, references = memory._next(memory._pool)
        size += buffer.size - memory.ALIGNMENT if references == memory.ALONE else 0
        memory._pool.append(buffer)
    return size


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.bool_])
@pytest.mark.parametrize("shape", [(0,), (3, 5), (100, 1000), (3, 5, 20_000)])
def test_array(shape, dtype):
    array = memory.empty(shape, dtype)
    assert array.shape == shape
    assert array.dtype == dtype
    assert array.flags.c_contiguous
    assert array.flags.aligned
    assert array.flags.writeable
    if memory.SMALLEST <= array.nbytes <= memory.LARGEST:
        assert array.ctypes.data % memory.ALIGNMENT == 0


def test_free_memory_is_used_again():
    array = memory.empty(SHAPE, np.float64)
    address = array.ctypes.data
    other = memory.empty(SHAPE, np.float64)
    assert not np.shares_memory(array, other)
    del array
    assert kept() == 8 * SHAPE[0]
    again = memory.empty((SHAPE[0] * 2,), np.float32)
    assert again.ctypes.data == address
    assert kept() == 0


@pytest.mark.parametrize(
    "view", [lambda a: a[3:], lambda a: a.reshape(-1, 1).T, memoryview, lambda a: a.view(np.int64)]
)
def test_a_view_holds_on(view):
    array = memory.empty(SHAPE, np.float64)
    array[:] = 7.0
    part = view(array)
    del array
    assert kept() == 0
    assert not np.shares_memory(part, memory.empty(SHAPE, np.float64))


def test_no_function_is_called_when_memory_becomes_free():
    """Python would handle Ctrl-C in there, and ignore the KeyboardInterrupt."""
    array, events = memory.empty(SHAPE, np.float64), []
    sys.setprofile(lambda frame, event, argument: events.append(event))
    del array
    sys.setprofile(None)
    assert "call" not in events


def test_what_is_not_free_does_not_fill_the_pool():
    arrays = [memory.empty((memory.LARGEST // 8,), np.float64) for _ in range(10)]
    assert kept() == 0
    test_free_memory_is_used_again()
    del arrays


def test_little_is_kept():
    arrays = [memory.empty((memory.LARGEST // 8,), np.float64) for _ in range(10)]
    del arrays
    assert 0 < kept() <= memory.HELD
    huge = memory.empty((memory.LARGEST // 8 + 1,), np.float64)
    before = kept()
    del huge
    assert kept() == before


def solved(operands):
    sol = qpdiff.solve_qp(**operands)
    return sol.x, qpdiff.vjp(sol, x=np.ones_like(sol.x)).Q


def test_results_of_other_threads_stay():
    problems = [optnet(np.random.default_rng(seed), (64,), 30, 20, 5) for seed in range(4)]
    expected = [solved(operands) for operands in problems]
    same = []

    def work(number):
        for _ in range(20):
            same.append(all(map(np.array_equal, solved(problems[number]), expected[number])))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 80
