"""Memory that runs out: MemoryError, or a solve with fewer threads."""

import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from problems import optnet

import qpdiff
from qpdiff.backend import single_threaded_blas
from qpdiff.engines.choice import compiled_engine

LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np
import qpdiff
from qpdiff.backend.threads import THREADS

THREADS.set(1)
rng, n = np.random.default_rng(0), 400
operands = np.eye(n), rng.normal(size=(8, n)), rng.normal(size=(8, 50, n)), np.ones(50)
few = qpdiff.solve_qp(*(value[:2] if value.shape[0] == 8 else value for value in operands), engine="compiled")
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[1]) * 2**20, resource.RLIM_INFINITY))
THREADS.set(2)
try:
    sol = qpdiff.solve_qp(*operands, engine="compiled")
    assert not np.any(sol.status)
    np.testing.assert_allclose(sol.x[:2], few.x, atol=1e-7)
except MemoryError:
    print("MemoryError")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
@pytest.mark.skipif(compiled_engine()[0] is None, reason="the compiled engine was not built")
@pytest.mark.parametrize("mebibytes", [16, 32, 100, 1000])
def test_large_problems_within_a_limit_of_address_space(mebibytes):
    """OpenBLAS would try without end to allocate a buffer for a second thread."""
    command = [sys.executable, "-P", "-c", LIMITED, str(mebibytes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" or mebibytes < 1000


@pytest.mark.parametrize("shape", [(40, 120, 20, 0), (300, 60, 60, 0)])
def test_without_memory_for_threads_there_are_fewer(monkeypatch, shape):
    """Neither for chunks on threads nor for stacks of matrices."""
    operands = optnet(np.random.default_rng(2), shape[:1], *shape[1:])
    with single_threaded_blas():
        expected = qpdiff.solve_qp(**operands, engine="array")
        refused = []

        def start(thread):
            refused.append(thread)
            raise RuntimeError("can't start new thread")

        threads = ThreadPoolExecutor(2)
        monkeypatch.setattr("qpdiff.backend.numpy.pool", lambda: threads)
        monkeypatch.setattr("threading.Thread.start", start)
        found = qpdiff.solve_qp(**operands, engine="array")
    assert refused
    np.testing.assert_array_equal(found.x, expected.x)


@pytest.mark.skipif(sys.platform != "linux", reason="ELF")
@pytest.mark.skipif(compiled_engine()[0] is None, reason="the compiled engine was not built")
def test_no_thread_local_variables():
    """Glibc ends a process that has no memory for those of a thread that has just begun."""
    module = Path(compiled_engine()[0]._core.__file__).read_bytes()
    assert module[:6] == b"\x7fELF\x02\x01"  # 64 bits, little-endian
    (at,), (size, count) = struct.unpack_from("<Q", module, 32), struct.unpack_from("<HH", module, 54)
    segments = [struct.unpack_from("<I", module, at + i * size)[0] for i in range(count)]
    loaded, thread_local = 1, 7
    assert loaded in segments
    assert thread_local not in segments
