"""Ctrl-C during a long batch: it ends soon, as KeyboardInterrupt, and leaves nothing behind."""

import signal
import subprocess
import sys

import pytest

from qpdiff.engines.choice import compiled_engine

SCRIPT = """
import os, signal, sys, threading, time
import numpy as np
import qpdiff
from qpdiff.backend.threads import THREADS

engine, what, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
THREADS.set(threads)
rng = np.random.default_rng(0)
n = 60
G, h = rng.normal(size=(n, n)), np.ones(n)
few = qpdiff.solve_qp(np.eye(n), rng.normal(size=(50, n)), G, h, engine=engine)
many = (np.eye(n), rng.normal(size=(300_000, n)), G, h)
interrupted = []

def interrupt():
    interrupted.append(time.perf_counter())
    os.kill(os.getpid(), signal.SIGINT)

try:
    threading.Timer(0.5, interrupt).start()
    if what == "solve":
        qpdiff.solve_qp(*many, engine=engine)
    else:  # where Python has hardly a chance to look
        while True:
            qpdiff.vjp(few, x=np.ones_like(few.x))
except KeyboardInterrupt:
    print(time.perf_counter() - interrupted[0])
again = qpdiff.solve_qp(np.eye(n), few.linearization.problem.q, G, h, engine=engine)
np.testing.assert_array_equal(again.status, qpdiff.Status.SOLVED)
np.testing.assert_allclose(again.x, few.x, atol=1e-8)
np.testing.assert_allclose(qpdiff.vjp(again, x=again.x).q, qpdiff.vjp(few, x=few.x).q, atol=1e-6)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send itself Ctrl-C there")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("what", ["solve", "vjp"])
@pytest.mark.parametrize("engine", ["array", "compiled"])
def test_ctrl_c_ends_a_long_batch(engine, what, threads):
    if engine == "compiled" and compiled_engine()[0] is None:
        pytest.skip("the compiled engine was not built")
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, engine, what, str(threads)], capture_output=True, text=True, timeout=100,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 5.0, "a second on a free machine"
