"""A million problems in one call, some without a solution: statuses, residuals, gradients, and the other problems."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator

import numpy as np

import qpdiff
from qpdiff import Status

from .common import MIB, RECORDED, Plan, Row, resident, verdict
from .jobs import ENGINES, optnet

N, M, P = 6, 5, 1
TOLERANCE = 1e-8
SAMPLE = 5000
DIGITS = 1e-11
"""Difference that rounding may make."""
STEP = 1e-5
WEAK = 2e-3
"""Slack and multiplier up to which a constraint is nearly weakly active, with errors of up to TOLERANCE / WEAK²."""


def run(plan: Plan) -> Iterator[Row]:
    """Solve a batch whole, and check what can be checked apart from the solver."""
    for engine in ENGINES:
        size = 10_000 if plan.quick else 1_000_000 if engine == "compiled" else 100_000
        yield from _batch(engine, size, plan)


def _draw(size: int, seed: int) -> dict[str, np.ndarray]:
    """Draw distinct problems, part by part."""
    rng, step = np.random.default_rng(seed), 100_000
    parts = [optnet(rng, (min(step, size - start),), N, M, P) for start in range(0, size, step)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _spoil(operands, rng) -> dict[Status, np.ndarray]:
    """Make one problem in a thousand infeasible, and one unbounded; return their places."""
    size = len(operands["q"])
    places = rng.permutation(size)[: 2 * (size // 1000)].reshape(2, -1)
    infeasible, unbounded = places
    operands["G"][infeasible, 1], operands["h"][infeasible, 1] = -operands["G"][infeasible, 0], -1.0
    operands["h"][infeasible, 1] -= operands["h"][infeasible, 0]
    for name in ("Q", "A", "b"):
        operands[name][unbounded] = 0.0
    operands["q"][unbounded] = -1.0  # x + t falls without end
    operands["G"][unbounded] = -np.abs(operands["G"][unbounded])
    return {Status.PRIMAL_INFEASIBLE: infeasible, Status.DUAL_INFEASIBLE: unbounded}


def _batch(engine: str, size: int, plan: Plan) -> Iterator[Row]:
    rng = np.random.default_rng(plan.seed)
    operands = _draw(size, plan.seed)
    good = qpdiff.solve_qp(**operands, engine=engine, tol=TOLERANCE, rtol=0).x.copy()
    places = _spoil(operands, rng)
    before, start = resident(), time.perf_counter()
    sol = qpdiff.solve_qp(**operands, engine=engine, tol=TOLERANCE, rtol=0)
    seconds = time.perf_counter() - start
    expected = np.full(size, Status.SOLVED)
    for status, where in places.items():
        expected[where] = status
    ordinary = expected == Status.SOLVED
    stalled = int(np.sum((sol.status == Status.STALLED) | (sol.status == Status.MAX_ITERATIONS)))
    wrong = int(np.sum(sol.status != expected)) - stalled
    spoiled = f"{size // 1000} infeasible and {size // 1000} unbounded among them"
    found = f"{wrong} wrong statuses, {stalled} ended without a solution or a certificate; "
    found += f"{1e6 * seconds / size:.1f} µs for each problem"
    yield Row(f"{engine}: statuses", f"{size} problems, {spoiled}", found, verdict(wrong == 0))
    moved = np.max(np.abs(sol.x[ordinary] - good[ordinary]), axis=-1)
    differ = np.count_nonzero(moved)
    found = f"x of {differ} differs, by up to {np.max(moved):.0e}" if differ else "x of none differs"
    what = f"{engine}: the others, beside them and not"
    yield Row(what, f"{int(ordinary.sum())} problems", found, verdict(np.max(moved) < DIGITS))

    solved = np.flatnonzero(ordinary & (sol.status == Status.SOLVED))
    sample = rng.choice(solved, min(SAMPLE, len(solved)), replace=False)
    largest = max(_residuals({k: v[sample] for k, v in operands.items()}, sol.x[sample], sol.y[sample], sol.z[sample]))
    found = f"residuals and gap at most {largest:.1e}, computed again; {TOLERANCE:.0e} was asked for"
    yield Row(f"{engine}: KKT conditions", f"a sample of {len(sample)}", found, verdict(largest <= 1.01 * TOLERANCE))

    cotangent = rng.normal(size=sol.x.shape)
    gradients = qpdiff.vjp(sol, x=cotangent, unsolved="zero")
    unsolved = sol.status != Status.SOLVED
    zero = all(not np.any(getattr(gradients, k)[unsolved]) for k in operands)
    finite = all(np.all(np.isfinite(getattr(gradients, k))) for k in operands)
    wrong, kinks = _differences(operands, sol, gradients, cotangent, sample, rng, engine)
    found = f"{wrong} differ by more than 1 ‰, {kinks} beside kinks left out; "
    found += "zero for the unsolved" if zero and finite else "not zero or not finite for the unsolved"
    kept = wrong == 0 and zero and finite and kinks < 0.1 * len(sample)
    yield Row(f"{engine}: gradients against differences", f"a sample of {len(sample)}", found, verdict(kept))

    if engine != ENGINES[0]:  # the largest size of the process is that of the first engine
        return
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    data = sum(value.nbytes for value in operands.values())
    found = f"at most {peak / MIB:.0f} MiB beyond the operands' {data / MIB:.0f} MiB, solution and gradients included"
    yield Row(f"{engine}: memory", f"{size} problems", found, RECORDED)


def _residuals(d, x, y, z) -> tuple[float, float, float]:
    """Compute the residuals and the gap from their definitions, the largest of the batch."""

    def apply(matrix, vector):
        return np.einsum("bij,bj->bi", matrix, vector)

    primal = max(np.max(apply(d["G"], x) - d["h"]), np.max(np.abs(apply(d["A"], x) - d["b"])))
    Qx = apply(d["Q"], x)
    dual = np.max(np.abs(Qx + d["q"] + apply(d["G"].mT, z) + apply(d["A"].mT, y)))
    gap = np.sum(x * (Qx + d["q"]), -1) + np.sum(d["h"] * z, -1) + np.sum(d["b"] * y, -1)
    return float(primal), max(float(dual), float(np.max(-z))), float(np.max(np.abs(gap)))


def _differences(operands, sol, gradients, cotangent, sample, rng, engine: str) -> tuple[int, int]:
    """Compare gradients with central differences along a random direction of q, h and b together.

    Return how many differ, and at how many the two one-sided differences do, or a constraint is nearly weakly active:
    there the solution has a kink, and the derivative is not promised.
    """
    part = {name: value[sample] for name, value in operands.items()}
    direction = {name: rng.normal(size=part[name].shape) for name in ("q", "h", "b")}

    def value(step: float) -> np.ndarray:
        moved = {name: part[name] + step * tangent for name, tangent in direction.items()}
        x = qpdiff.solve_qp(**part | moved, engine=engine, tol=1e-13, rtol=1e-13).x
        return np.sum(cotangent[sample] * x, axis=-1)

    left, middle, right = value(-STEP), value(0.0), value(STEP)
    slope, pulled = (right - left) / (2 * STEP), np.zeros(len(sample))
    for name, tangent in direction.items():
        pulled += np.sum(getattr(gradients, name)[sample] * tangent, axis=-1)
    size = np.maximum(np.abs(slope), np.abs(pulled)) + 1.0
    kink = np.abs(right - 2 * middle + left) / STEP > 1e-2 * size
    kink |= np.any(np.maximum(sol.s[sample], sol.z[sample]) < WEAK, axis=-1)
    return int(np.sum((np.abs(slope - pulled) > 1e-3 * size) & ~kink)), int(kink.sum())
