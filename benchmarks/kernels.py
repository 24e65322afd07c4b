"""Time the kernels of the compiled engine on a GPU, by threads a block, next to qpth and JAX; write a page of figures.

    python benchmarks/kernels.py --output gpu.md
    python benchmarks/kernels.py --sanitize     # small solves under each tool of compute-sanitizer, where it is found
    python benchmarks/kernels.py --small        # those solves alone

Times are those between two CUDA events: of the kernels alone, and of a call with all that the processor does in it.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from peers.arrays import arrays_of
from rows import ROWS, Row, parse

import qpdiff
from qpdiff.engines.compiled import cuda, gpu

THREADS = (32, 64, 128, 256)
BATCHES = [Row(10**k, 10, 10, 0) for k in range(7)]
TOOLS = ("memcheck", "racecheck", "synccheck")
SMALL = [Row(3, 10, 10, 0), Row(2, 20, 30, 3), Row(2, 64, 0, 40, "sudoku")]
REPEATS = 5
OPTIONS: dict[str, Any] = {"tol": 1e-8, "rtol": 0.0, "check": False}


class Events:
    """Times between CUDA events, in milliseconds."""

    def __init__(self):
        import torch

        self.torch, self.kernels = torch, []

    def event(self):
        event = self.torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def time(self, call: Callable[[], Any]) -> tuple[float, float]:
        """Return the time of the kernels in a call, and that of the call."""
        self.kernels.clear()
        start = self.event()
        call()
        end = self.event()
        end.synchronize()
        return sum(a.elapsed_time(b) for a, b in self.kernels), start.elapsed_time(end)

    @contextmanager
    def around_launches(self):
        """Record an event before and after each launch."""
        launch = cuda.launch

        def recorded(*arguments):
            start = self.event()
            launch(*arguments)
            self.kernels.append((start, self.event()))

        cuda.launch = recorded
        try:
            yield
        finally:
            cuda.launch = launch


def passes(operands: dict[str, np.ndarray], library: str, engine: str) -> tuple[Callable, Callable]:
    """Return a solve, and a solve with the gradients of sum(x)."""
    put = arrays_of(library).put
    arrays = {name: put(value) for name, value in operands.items()}
    cotangent = put(np.ones_like(operands["q"]))

    def forward():
        return qpdiff.solve_qp(**arrays, **OPTIONS, engine=engine)

    return forward, lambda: qpdiff.vjp(forward(), x=cotangent)


def jax_passes(operands: dict[str, np.ndarray]) -> tuple[Callable, Callable]:
    """Return the same in JAX's traced loop."""
    import jax

    import qpdiff.jax

    jax.config.update("jax_enable_x64", True)
    arrays = {name: jax.numpy.asarray(value) for name, value in operands.items()}

    def total(given):
        return jax.numpy.sum(qpdiff.jax.solve_qp(**given, **OPTIONS, engine="array", unsolved="nan").x)

    forward, both = jax.jit(total), jax.jit(jax.grad(total))
    return lambda: jax.block_until_ready(forward(arrays)), lambda: jax.block_until_ready(both(arrays))


def qpth_passes(operands: dict[str, np.ndarray]) -> tuple[Callable, Callable]:
    """Return the same of qpth."""
    from peers.qpth import Qpth

    peer = Qpth(operands, OPTIONS["tol"], "torch-cuda")
    return peer.forward, peer.forward_backward


def fastest(events: Any, call: Callable[[], Any]) -> tuple[float, float]:
    """Return the least times of some passes, after one that compiles."""
    call()
    return tuple(map(min, zip(*(events.time(call) for _ in range(REPEATS)), strict=True)))  # type: ignore[return-value]


def lines_of(row: Row, events: Any, library: str, others: dict[str, Callable]) -> list[str]:
    """Measure a row; return lines of the table."""
    operands, lines = row.operands(), []
    own, of_size = passes(operands, library, "compiled"), gpu.threads_for

    def add(who: str, two: tuple[Callable, Callable]) -> None:
        for what, call in zip(("solve", "with gradients"), two, strict=True):
            kernels, whole = fastest(events, call)
            share = f"{kernels:.3f}" if kernels else ""
            lines.append(f"| {row.title} | {who} | {what} | {share} | {whole:.3f} |")

    with events.around_launches():
        for threads in THREADS:
            gpu.threads_for = lambda *_, threads=threads: threads
            try:
                add(f"{threads} threads", own)
            finally:
                gpu.threads_for = of_size
    for name, make in others.items():
        try:
            add(name, make(operands))
        except Exception as error:  # a solver that is missing, or out of memory, is a line of the table
            reason = str(error).partition("\n")[0][:80]
            lines.append(f"| {row.title} | {name} | {type(error).__name__}: {reason} | | |")
    return lines


def write(path: Path, rows: list[Row], events: Any, library: str, others: dict[str, Callable], where: str) -> None:
    """Measure all rows, and write the page after each."""
    head = [
        f"{where}, {platform.platform()}, qpdiff {qpdiff.__version__}.", "",
        f"Milliseconds, the least of {REPEATS}: of the kernels alone, and of the call.", "",
        "| B, n, m, p | | | kernels | call |", "|---|---|---|--:|--:|",
    ]  # fmt: skip
    for row in rows:
        head += lines_of(row, events, library, others)
        path.write_text("\n".join(head) + "\n", encoding="utf-8")
        print(f"{row.title}: done", flush=True)


def solve_small(library: str) -> None:
    """Solve and differentiate a few small problems of each form with the kernels, and compare with NumPy."""
    for row in SMALL:
        operands = row.operands()
        arrays = arrays_of(library)
        sol = qpdiff.solve_qp(**{k: arrays.put(v) for k, v in operands.items()}, tol=1e-8, engine="compiled")
        grads = qpdiff.vjp(sol, x=arrays.put(np.ones_like(operands["q"])))
        expected = qpdiff.solve_qp(**operands, tol=1e-8)
        np.testing.assert_allclose(arrays.get(sol.x), expected.x, atol=1e-6)
        wanted = qpdiff.vjp(expected, x=np.ones_like(operands["q"]))
        np.testing.assert_allclose(arrays.get(grads.q), wanted.q, atol=1e-5)


def sanitize() -> int:
    """Run the small solves under each tool; return the largest exit status."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        print("compute-sanitizer was not found: memory, races and barriers are not checked")
        return 0
    command = [sys.executable, __file__, "--small"]
    return max(
        subprocess.run([program, "--tool", tool, "--error-exitcode", "9", *command]).returncode for tool in TOOLS
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("gpu.md"))
    parser.add_argument("--rows", nargs="*", type=parse, default=ROWS + BATCHES)
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    if options.sanitize:
        return sanitize()
    if options.small:
        solve_small("torch-cuda")
        return 0
    events = Events()
    where = f"{events.torch.cuda.get_device_name()}, torch {events.torch.__version__}"
    write(options.output, options.rows, events, "torch-cuda", {"JAX": jax_passes, "qpth": qpth_passes}, where)
    return 0


if __name__ == "__main__":
    sys.exit(main())
