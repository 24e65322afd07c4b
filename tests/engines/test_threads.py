"""Calls from several Python threads at a time: each gives to the last bit what it gives alone, and ends by itself."""

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from problems import optnet

import qpdiff
from qpdiff.backend import single_threaded_blas
from qpdiff.backend.threads import THREADS
from qpdiff.engines.choice import compiled_engine
from qpdiff.sparse import Sparse as SparseMatrix
from qpdiff.sparse import full_pattern

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "qpdiff" / "engines" / "compiled" / "src"
PYTHON_H = Path(sysconfig.get_path("include")) / "Python.h"
COMPILER = next(filter(None, map(shutil.which, [os.environ.get("CXX", ""), "g++", "clang++"])), None)


def diagonal(rng):
    operands = optnet(rng, (60,), 40, 8, 0)
    return operands | {"Q": np.eye(40) * rng.uniform(0.5, 2.0, (60, 1, 40))}


def shared(rng):
    operands = optnet(rng, (90,), 25, 12, 3)
    return operands | {name: operands[name][0] for name in ("Q", "G", "A")}


CASES = {
    "small": lambda rng: optnet(rng, (300,), 8, 5, 2),  # several at a time
    "medium": lambda rng: optnet(rng, (60,), 40, 20, 4),
    "large": lambda rng: optnet(rng, (3,), 140, 20, 4),  # with BLAS
    "single": lambda rng: {k: v.astype(np.float32) for k, v in optnet(rng, (60,), 20, 10, 2).items()},
    "diagonal": diagonal,
    "shared": shared,
}


@pytest.fixture(params=["array", "compiled"])
def chosen(request):
    if request.param == "compiled" and compiled_engine()[0] is None:
        pytest.skip("the compiled engine was not built")
    return request.param


@pytest.fixture(autouse=True)
def one_blas_thread():
    """A number that does not change with what other calls are under way: large sums of BLAS depend on it."""
    with single_threaded_blas():
        yield


@contextmanager
def workers(count):
    token = THREADS.set(count)
    try:
        yield
    finally:
        THREADS.reset(token)


def arrays(operands, chosen, **options):
    """Solve and differentiate; return all that this gives."""
    sol = qpdiff.solve_qp(**operands, engine=chosen, **options)
    gradients = qpdiff.vjp(sol, x=np.ones_like(sol.x))
    return [sol.x, sol.z, sol.status, sol.iterations, *[getattr(gradients, name) for name in operands]]


def check_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def together(tasks):
    """Call the tasks at the same time, each in a thread of its own."""
    barrier = threading.Barrier(len(tasks))

    def call(task):
        barrier.wait(60)
        return task()

    with ThreadPoolExecutor(len(tasks)) as pool:
        return list(pool.map(call, tasks))


def test_each_thread_gets_what_it_gets_alone(chosen):
    """Whatever the others solve, and with however many threads each call works itself."""
    problems = {name: case(np.random.default_rng(0)) for name, case in CASES.items()}
    with workers(1):
        expected = {name: arrays(operands, chosen) for name, operands in problems.items()}

    def task(name, count):
        with workers(count):
            return [arrays(problems[name], chosen) for _ in range(2)]

    names = [name for name in CASES for _ in range(2)]
    found = together([lambda name=name, i=i: task(name, 1 + i % 3) for i, name in enumerate(names)])
    for name, calls in zip(names, found, strict=True):
        for call in calls:
            check_same(call, expected[name])


@pytest.mark.parametrize("case", CASES)
def test_threads_share_a_solution(chosen, case):
    operands = CASES[case](np.random.default_rng(1))
    sol = qpdiff.solve_qp(**operands, engine=chosen)
    cotangents = [np.random.default_rng(i).normal(size=sol.x.shape).astype(sol.x.dtype) for i in range(6)]

    def gradients(i):
        with workers(1 + i % 3):
            return [getattr(qpdiff.vjp(sol, x=cotangents[i]), name) for name in operands]

    expected = [gradients(i) for i in range(6)]
    for found, alone in zip(together([lambda i=i: gradients(i) for i in range(6)]), expected, strict=True):
        check_same(found, alone)


@pytest.mark.skipif(compiled_engine()[0] is None, reason="the compiled engine was not built")
def test_other_threads_go_on_while_a_pattern_is_analysed():
    from qpdiff.engines.compiled.sparse import Pattern

    n, begun, went_on = 200_000, threading.Event(), threading.Event()
    diagonal = SparseMatrix(np.ones(n), np.arange(n), np.arange(n + 1), (n, n)).pattern
    pattern = Pattern(diagonal, full_pattern(0, n), diagonal)
    other = threading.Thread(target=lambda: begun.wait() and went_on.set(), daemon=True)
    other.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e3)  # so that the interpreter does not pass its lock on by itself
    try:
        begun.set()
        assert pattern.size == n  # an entry of L for each row
        assert went_on.is_set()
    finally:
        sys.setswitchinterval(interval)
        other.join()


def test_an_error_in_one_thread_is_its_own(chosen):
    """Raised by `progress` or by a check of the operands."""
    operands = optnet(np.random.default_rng(2), (300,), 20, 10, 2)
    broken = operands | {"q": np.where(np.arange(300)[:, None] == 250, np.nan, operands["q"])}
    with workers(1):
        expected = arrays(operands, chosen)

    class Stopped(Exception):
        pass

    def stop(done, batch):
        raise Stopped

    def failing(error, operands, **options):
        with workers(2), pytest.raises(error):
            qpdiff.solve_qp(**operands, engine=chosen, **options)

    def fine():
        with workers(2):
            return arrays(operands, chosen)

    tasks = [fine, lambda: failing(Stopped, operands, progress=stop), lambda: failing(ValueError, broken)] * 3
    for found in filter(None, together(tasks)):
        check_same(found, expected)


INTERRUPTED = """
import os, signal, sys, threading
import numpy as np
import qpdiff
from qpdiff.backend.threads import THREADS

rng = np.random.default_rng(0)
chosen, n = sys.argv[1], 30
G, h = rng.normal(size=(n, n)), np.ones(n)
q = rng.normal(size=(50, n))
expected = qpdiff.solve_qp(np.eye(n), q, G, h, engine=chosen)
gradient = qpdiff.vjp(expected, x=expected.x).Q
begun, over, failures = threading.Semaphore(0), threading.Event(), []

def solve():
    THREADS.set(2)
    try:
        while not over.is_set():
            sol = qpdiff.solve_qp(np.eye(n), q, G, h, engine=chosen)
            np.testing.assert_array_equal(sol.x, expected.x)
            np.testing.assert_array_equal(qpdiff.vjp(sol, x=sol.x).Q, gradient)
            begun.release()
    except BaseException as error:
        failures.append(error)
        begun.release()

threads = [threading.Thread(target=solve) for _ in range(3)]
for thread in threads:
    thread.start()
for _ in range(6):
    begun.acquire()
threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    qpdiff.solve_qp(np.eye(n), rng.normal(size=(1_000_000, n)), G, h, engine=chosen)
except KeyboardInterrupt:
    print("interrupted")
for _ in range(6):  # they go on
    begun.acquire()
over.set()
for thread in threads:
    thread.join()
assert not failures, failures
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send itself Ctrl-C there")
def test_ctrl_c_ends_the_call_of_the_main_thread_alone(chosen):
    done = subprocess.run(
        [sys.executable, "-P", "-c", INTERRUPTED, chosen], capture_output=True, text=True, timeout=300,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "interrupted\n"


FORKED = """
import os, sys
import numpy as np
import qpdiff
from qpdiff.backend.threads import THREADS

THREADS.set(3)
rng = np.random.default_rng(0)
problems = []
for count, n in (600, 6), (200, 40), (6, 150):
    Q, q = np.eye(n) + np.zeros((count, n, n)), rng.normal(size=(count, n))
    problems.append((Q + 0.1 * np.ones((n, n)), q, rng.normal(size=(count, n // 2, n)), np.ones((count, n // 2))))

def results():
    out = []
    for operands in problems:
        sol = qpdiff.solve_qp(*operands, engine=sys.argv[1])
        gradients = qpdiff.vjp(sol, x=sol.x)
        out += [sol.x, gradients.Q, gradients.G]
    return out

expected = results()
children = []
for _ in range(2):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = int(not all(map(np.array_equal, results(), expected)))
        finally:
            os._exit(status)
    children.append(child)
assert all(map(np.array_equal, results(), expected))  # meanwhile
for child in children:
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_children_of_a_fork_get_the_same(chosen):
    subprocess.run([sys.executable, "-P", "-W", "ignore", "-c", FORKED, chosen], check=True, timeout=300)


HELD = """
import os, threading
import numpy as np
import qpdiff
from qpdiff.backend import threads

begun = threading.Event()

def hold():
    with threads.single_threaded_blas(), threads._lock:
        begun.set()
        threading.Event().wait()

threading.Thread(target=hold, daemon=True).start()
begun.wait()
child = os.fork()
if child == 0:
    with threads.single_threaded_blas():
        sol = qpdiff.solve_qp(np.eye(2), -np.ones(2))
    os._exit(int(not np.allclose(sol.x, 1.0)))
assert os.waitpid(child, 0)[1] == 0
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_does_not_wait_for_a_thread_that_it_does_not_have():
    pytest.importorskip("threadpoolctl")
    subprocess.run([sys.executable, "-P", "-W", "ignore", "-c", HELD], check=True, timeout=60)


COMPUTING = """
import os, threading
from qpdiff.once import cached_property

begun = threading.Event()

class Problem:
    @cached_property
    def constant(self):
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            threading.Event().wait()
        return 3

problem = Problem()
threading.Thread(target=lambda: problem.constant, daemon=True).start()
begun.wait()
child = os.fork()
if child == 0:
    os._exit(problem.constant)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
assert problem.constant == 3
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_computes_what_a_thread_that_it_does_not_have_was_computing():
    subprocess.run([sys.executable, "-P", "-W", "ignore", "-c", COMPUTING], check=True, timeout=60)


def test_no_attribute_has_a_lock():
    """That of `functools` has one in Python 3.11, which all objects share."""
    for file in (HERE.parents[1] / "qpdiff").rglob("*.py"):
        imported = re.findall(r"^from functools import (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
        assert "cached_property" not in ", ".join(imported).split(", "), file


# ---- without memory

QUEUE = """
import ctypes, sys

queue = ctypes.PyDLL(sys.argv[1])
for allocations in range(2):
    assert queue.claimed(1000, 4, allocations) == -1  # nothing was begun
for allocations in range(2, 10):
    assert queue.claimed(1000, 4, allocations) == 1000
"""


@pytest.mark.skipif(sys.platform != "linux" or COMPILER is None, reason="no C++ compiler, or not of Linux")
@pytest.mark.skipif(not SOURCES.exists() or not PYTHON_H.exists(), reason="no sources of the engine or of Python")
def test_a_call_ends_with_fewer_threads_where_memory_is_short(tmp_path):
    library = tmp_path / "queue_test.so"
    # -Bsymbolic: its own operator new
    options = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-Wl,-Bsymbolic"]
    folders = [f"-I{SOURCES}", f"-I{PYTHON_H.parent}"]
    source = HERE / "queue_test.cpp"
    subprocess.run([COMPILER, *options, *folders, source, "-o", library], check=True, timeout=300)
    subprocess.run([sys.executable, "-P", "-c", QUEUE, library], check=True, timeout=100)
