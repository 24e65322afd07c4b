"""Ctrl-C at random moments of long calls: it ends them soon, later calls are right, and no memory is lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import numpy as np

import qpdiff

from .common import MIB, RECORDED, Clock, Plan, Row, resident, same_bits, threads, verdict
from .jobs import ENGINES, by_choice, draw, engine_for, mpc, optnet, solve, sparse, with_a_price, working_threads

SECONDS = 5.0
"""A call has to end so long after Ctrl-C; on an idle machine it takes a tenth of a second."""
THREADS = [1, 2, 3]
INTERRUPTS = 16
"""How many there are at least: what some of them take once, no quarter of them does."""
GROWTH = 16 * MIB
"""Memory that interrupts may take in each quarter of them: a leak does so in every one, buffers that stay do not."""


def run(plan: Plan) -> Iterator[Row]:
    """Interrupt each kind of call again and again."""
    calls = {what: call for engine in ENGINES for what, call in _of_engine(engine, plan.quick).items()}
    calls |= _of_choice(plan.quick)
    if not plan.quick:
        calls |= _of_frameworks()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for (what, call), clock in zip(calls.items(), plan.parts(len(calls)), strict=True):
        yield _interrupt(what, call, clock, plan)


def _of_engine(engine: str, quick: bool) -> dict[str, Callable[[], object]]:
    """Return long calls of an engine: many small problems, few large ones, and derivatives."""
    rng, size = np.random.default_rng(0), 5_000 if quick else 50_000
    small, large = optnet(rng, (size,), 8, 5, 2), optnet(rng, (4,), 200 if quick else 500, 200, 20)
    sol = qpdiff.solve_qp(**optnet(rng, (200,), 40, 20, 4), engine=engine)

    def differentiate():
        for _ in range(100):
            qpdiff.vjp(sol, x=np.ones_like(sol.x))

    return {
        f"{engine}: {size} small problems": lambda: qpdiff.solve_qp(**small, engine=engine),
        f"{engine}: 4 large problems": lambda: qpdiff.solve_qp(**large, engine=engine),
        f"{engine}: vjp": differentiate,
    }


def _of_choice(quick: bool) -> dict[str, Callable[[], object]]:
    """Return long calls with sparse matrices and with prices: many small problems, and few large ones."""
    rng, scale = np.random.default_rng(0), 10 if quick else 1
    batches = {
        "small sparse problems": sparse(mpc(rng, 3000 // scale, 10, 8, 3)),
        "large sparse problems": sparse(mpc(rng, 4, 1000 // scale, 12, 4)),
        "small problems with a price": with_a_price(rng, 5000 // scale, 8),
        "large problems with a price": with_a_price(rng, 4, 400 // scale),
    }
    return {
        f"{engine_for(given)}: {len(given['q'])} {what}": partial(qpdiff.solve_qp, **given)
        for what, given in batches.items()
    }


def _of_frameworks() -> dict[str, Callable[[], object]]:
    """Return long calls of torch and JAX, where they are installed."""
    operands, calls = optnet(np.random.default_rng(0), (20_000,), 8, 5, 2), {}
    try:
        import torch

        import qpdiff.torch

        tensors = {name: torch.from_numpy(value).requires_grad_() for name, value in operands.items()}
        calls["torch: solve and gradient"] = lambda: qpdiff.torch.solve_qp(**tensors).x.sum().backward()
    except ImportError:
        pass
    try:
        import jax

        import qpdiff.jax

        jax.config.update("jax_enable_x64", True)
        names, values = tuple(operands), tuple(map(jax.numpy.asarray, operands.values()))
        gradient = jax.jit(jax.grad(lambda *v: qpdiff.jax.solve_qp(**dict(zip(names, v, strict=True))).x.sum()))
        calls["JAX: gradient under jit"] = lambda: jax.block_until_ready(gradient(*values))
    except ImportError:
        pass
    return calls


def _interrupt(what: str, call: Callable[[], object], clock: Clock, plan: Plan) -> Row:
    """Send Ctrl-C at random moments of a call until the time is over."""
    rng, after = plan.random(), _after()
    expected = after()
    for count in THREADS:  # whose workspaces stay
        start = time.monotonic()
        with working_threads(count):
            call()
        length = time.monotonic() - start
    late: list[float] = []
    memory, ended, early, wrong, errors = [], 0, 0, 0, set()
    running = threads()
    while not clock.over() or len(memory) < INTERRUPTS:
        with working_threads(rng.choice(THREADS)):
            in_call, seconds, error = _once(call, rng.uniform(0.0, length))
        ended += in_call
        early += not in_call
        late.append(seconds)
        errors |= error
        wrong += not same_bits(after(), expected)
        memory.append(resident())
    quarters = [min(memory[len(memory) * i // 4 : len(memory) * (i + 1) // 4]) for i in range(4)]
    growth = min(late - early for early, late in pairwise(quarters))
    found = f"ended after at most {max(late):.2f} s, {_middle(late):.2f} s in the middle; "
    found += f"{wrong} later calls wrong; "
    found += f"{max(0, growth) / MIB:.1f} MiB more a quarter, {max(0, threads() - running)} threads more"
    found += f"; {', '.join(sorted(errors))}" if errors else ""
    kept = max(late) < SECONDS and not wrong and growth < GROWTH and threads() <= running + 2 and not errors
    # The frameworks decide when Python sees a signal, and which error comes out.
    outcome = verdict(kept) if not what.startswith("JAX") or wrong else RECORDED
    return Row(what, f"{ended} of {ended + early} interrupts within a call", found, outcome)


def _after() -> Callable[[], list[np.ndarray]]:
    """Return calls that must give what they gave before."""
    cases = [draw(case) for case in ("small", "medium", "bounds")]
    jobs = [partial(solve, operands, engine) for engine in ENGINES for operands in cases]
    jobs += by_choice(["sparse", "a price"]).values()
    return lambda: [array for job in jobs for array in job()]


def _middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _once(call: Callable[[], object], delay: float) -> tuple[bool, float, set[str]]:
    """Call, with Ctrl-C after `delay` seconds; return whether it came within, its delay, and other errors."""
    sent: list[float] = []

    def send():
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    done, errors = False, set()
    timer = threading.Timer(delay, send)
    try:
        timer.start()
        try:
            call()
        except KeyboardInterrupt:
            raise
        except Exception as error:
            errors.add(type(error).__name__)
        done = not sent
        while True:  # a signal that comes after the call ends this
            time.sleep(0.01)
            if sent and time.monotonic() - sent[0] > 2 * SECONDS:
                errors.add("no KeyboardInterrupt")
                break
    except KeyboardInterrupt:
        pass
    seconds = time.monotonic() - sent[0]
    timer.join()
    return not done, seconds, errors
