"""Memory that runs out: a solve raises MemoryError or is right; it neither ends the process nor is wrong."""

from __future__ import annotations

import math
import os
import re
import resource
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from .common import MIB, RECORDED, Clock, Plan, Row, counted, same_bits, verdict, virtual
from .jobs import ENGINES, draw, each_array, engine_for, mpc, optnet, solve, sparse, with_a_price, working_threads

PATIENCE = 60
"""Seconds after which a call counts as hanging."""
RIGHT, REFUSED = "right", "MemoryError"


def run(plan: Plan) -> Iterator[Row]:
    """Solve in children whose address space is limited to a little more than they have."""
    rng, scale = np.random.default_rng(0), 10 if plan.quick else 1
    batches = {
        "small problems": optnet(rng, (20_000 // scale,), 8, 5, 2),
        "medium problems": optnet(rng, (1000 // scale,), 40, 20, 4),
        "large problems": optnet(rng, (8,), 300 // scale + 100, 50, 4),
    }
    cases = [(engine, what, operands) for engine in ENGINES for what, operands in batches.items()]
    chosen = {
        "sparse problems": sparse(mpc(rng, 1000 // scale, 10, 8, 3)),
        "large sparse problems": sparse(mpc(rng, 8, 1000 // scale, 12, 4)),
        "problems with a price": with_a_price(rng, 10_000 // scale, 8),
    }
    cases += [(engine_for(given), what, given) for what, given in chosen.items()]
    for (engine, what, operands), clock in zip(cases, plan.parts(len(cases)), strict=True):
        yield _limited(f"{engine}: {what}", operands, engine, clock, plan)


def _limited(what: str, operands, engine: str, clock: Clock, plan: Plan) -> Row:
    """Try limits from nothing to twice what the call takes, at random, until the time is over."""
    rng, small = plan.random(), draw("small")
    with working_threads(1):  # what is imported or made at the first call, without starting threads
        solve(each_array(lambda value: value[:8], operands), engine)
        after, expected = solve(small, engine), solve(operands, engine)
    need = max(MIB, int(_in_child(lambda: _most(lambda: solve(operands, engine)))))

    def attempt(extra: int, count: int) -> str:
        found = _attempt(lambda: solve(operands, engine), expected, extra, count)
        with working_threads(1):
            return found if same_bits(solve(small, engine), after) else "wrong afterwards"

    outcomes: Counter = Counter()
    while not clock.over() or outcomes.total() < 4:
        extra = int(math.exp(rng.uniform(math.log(need / 200), math.log(2 * need))))
        outcomes[_in_child(partial(attempt, extra, rng.choice([1, 2, 3])))] += 1
    done = f"{outcomes.total()} limits between {need / 200 / MIB:.1f} and {2 * need / MIB:.0f} MiB"
    kept = set(outcomes) <= {RIGHT, REFUSED}
    by_numpy = engine == "array" and not any(outcome.startswith("wrong") for outcome in outcomes)
    return Row(what, done, counted(outcomes), RECORDED if by_numpy and not kept else verdict(kept))


def _most(call: Callable[[], object]) -> str:
    """Return how many bytes of address space a call takes at most."""
    before = virtual()
    call()
    peak = re.search(r"VmPeak:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return str((int(peak[1]) if peak else 0) * 1024 - before)


def _attempt(call: Callable[[], list[np.ndarray]], expected, extra: int, count: int) -> str:
    """Call within a limit of so many bytes more than there are, with so many threads; return what became of it."""
    signal.alarm(PATIENCE)
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (virtual() + extra, before[1]))
    try:
        with working_threads(count):
            found = call()
        outcome = RIGHT if _agree(found, expected) else "wrong"
    except MemoryError:
        outcome = REFUSED
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    return outcome


def _agree(found: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    """Return whether statuses, solutions and gradients are the same to the tolerance; bits depend on BLAS's threads."""
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if a.dtype.kind == "f"]
    return np.array_equal(found[6], expected[6]) and all(np.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs)


def _in_child(work: Callable[[], str]) -> str:
    """Fork a child and return what its work returns, or the signal that ended it."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        try:
            os.write(writing, work().encode()[:4000])
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        outcome = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return "hanging" if name == "SIGALRM" else f"ended by {name}"
    return outcome or "ended by OpenBLAS"  # which calls exit
