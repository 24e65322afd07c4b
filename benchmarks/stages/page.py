"""Write docs/reliability.md: what is promised, and what a run of the soak found."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from .common import BROKEN, KEPT, Row

HEADINGS = ["what", "done", "found", "promise"]


@dataclass
class Run:
    """A whole run of the soak."""

    machine: str
    minutes: float
    seed: int
    rows: dict[str, list[Row]]
    """By stage."""

    def lines(self, stage: str) -> list[list[str]]:
        return [[row.what, row.done, row.found, row.verdict] for row in self.rows[stage]]


INTRODUCTION = """\
What is promised of calls beside other calls, threads, processes, signals and limits, and what a long test of that
found. `python -m tox run -e soak` makes the test and writes this page with its figures; a form of some seconds is among
the tests. In the tables, *kept* is a promise that held, *recorded* something that is not promised, and **BROKEN** a
promise that did not hold."""

SECTIONS = {
    "million": (
        "Statuses and isolation",
        """\
* Every problem of a batch gets its own [status](statuses.md). SOLVED is never said of a problem whose residuals and gap
  are not within the tolerance. A problem that has a solution is not called infeasible or unbounded, but for the
  [limits](limits.md#how-accurate-it-is) of floating point.
* A problem that cannot be solved changes nothing for the others but the last digits: where one of a lane group is not
  strictly convex, the compiled engine solves all of this group one by one.
* `unsolved="zero"` makes the gradients of problems that are not SOLVED exactly 0.

A batch with distinct matrices; n = 6, m = 5, p = 1. Residuals and gap are computed again from their definitions, and
gradients are compared with differences of solutions along a random direction of q, h and b.""",
    ),
    "determinism": (
        "Which bits repeat",
        """\
* The same call gives the same bits on the same machine and with the same releases of NumPy and SciPy: again, in another
  process, wherever the operands lie in memory, and in the compiled engine with any number of qpdiff's threads.
* The array engine on NumPy divides a batch of large problems for its threads: another number of them, or of processors,
  may change the last digits.
* Problems of the same batch in another order or number may differ in their last digits: small problems are solved in
  lane groups where there are enough of them, and NumPy sums long and short arrays differently.
* Results of BLAS may depend on its own number of threads. qpdiff holds it to one where several of its own threads work,
  with the extra `threads`.
* Another processor, another level of x86-64 or another release of a library may change the last digits. So may the
  engine: the two take the same steps, in another order of sums.

*Same bits* are those of x, the multipliers, slacks, statuses, iterations, objectives and all gradients.
[Sparse matrices](sparse.md) and [prices](elastic.md) are among the cases of the engine that `engine="auto"` takes for
them.""",
    ),
    "threads": (
        "Threads",
        """\
* `solve_qp`, `vjp`, `jvp` and the adapters to torch, JAX and autograd may be called from any number of threads at once,
  also with the same operands and the same solution. Each call gives the bits that it gives alone.
* An error or Ctrl-C ends the call that it belongs to, and no other.
* Operands and solutions must stay as they are while a call reads them.

Each caller draws one call after another at random, with one to three threads of its own.""",
    ),
    "processes": (
        "Processes",
        """\
* Processes that are spawned give the same bits. So do processes that are forked before the first solve, after solves,
  and, where BLAS has one thread, while other threads solve.
* Where BLAS has more threads and another thread solves, a fork may leave hanging the child, and the solving thread too:
  OpenBLAS stops its threads at a fork, whoever waits for them. Set `OPENBLAS_NUM_THREADS=1`, or do not fork meanwhile.
* What torch and JAX do in a child of a fork is up to them, once they have started threads. Take `spawn` or
  `forkserver`, or fork first.

A child counts as hanging after a minute.""",
    ),
    "interrupts": (
        "Ctrl-C",
        """\
* Ctrl-C ends a solve or a derivative as KeyboardInterrupt: in the compiled engine within an iteration of one problem,
  in the array engine within an operation of NumPy.
* Nothing of the interrupted call is left: later calls give the same bits, no thread goes on, and memory is free again.
* Under `jax.jit`, JAX decides when Python sees the signal, and may raise an error of its own.

Ctrl-C comes at a random moment of the call, and afterwards other calls are compared with what they gave before.""",
    ),
    "memory": (
        "Memory that runs out",
        """\
* Where memory does not suffice a call raises MemoryError. It does not end the process and returns no wrong number, and
  once there is memory, later calls are right. Where there is no memory for a thread, fewer threads solve.
* Except for what others decide: OpenBLAS ends the process where it has no memory for a buffer of 32 MiB for each thread
  that calls it, or cannot start its own threads. The compiled engine asks for that memory before it calls BLAS; NumPy,
  and so the array engine with large matrices, does not. Linux ends processes when the machine's memory is full.

Solve and gradient in a forked child, whose address space (`RLIMIT_AS`, `ulimit -v`) is limited to a random size above
what it has; BLAS has one thread.""",
    ),
    "disk": (
        "A full disk",
        """\
* `-o` of the command writes under a temporary name. Where the disk is full, the command ends with one line and exit
  code 2, nothing is left, and a file of this name that was there before is as it was.""",
    ),
    "leaks": (
        "Memory over many calls",
        """\
* No function and no adapter takes more memory from call to call. What stays is bounded: buffers for results that are
  used again (128 MiB), and what frameworks compile once for each shape.

Each line is a window of warming up and at least four more of as many calls. What leaks grows in each window; so the
least of them counts, of the resident memory and of the number of Python's blocks of memory.""",
    ),
}


def write(run: Run) -> str:
    """Return the page as Markdown."""
    today = datetime.datetime.now(tz=datetime.UTC).date()
    rows = [row for stage in run.rows.values() for row in stage]
    kept, broken = (sum(row.verdict == each for row in rows) for each in (KEPT, BROKEN))
    parts = ["# Reliability", INTRODUCTION]
    parts += [f"Written by `benchmarks/soak.py` on {today}, in {run.minutes:.0f} minutes, with seed {run.seed}."]
    parts += [run.machine]
    parts += [f"{kept} of {kept + broken} promises were kept."]
    for stage, (title, text) in SECTIONS.items():
        if stage in run.rows:
            lines = [[f"**{cell}**" if cell == BROKEN else cell for cell in line] for line in run.lines(stage)]
            parts += [f"## {title}", text.rstrip(), words(lines)]
    return "\n\n".join(parts) + "\n"


def words(lines: list[list[str]]) -> str:
    """Make a Markdown table of cells that are words."""
    rows = [HEADINGS, ["---"] * len(HEADINGS), *([cell.replace("|", r"\|") for cell in line] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
