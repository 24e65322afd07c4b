"""Measure one row: prepare every solver and check its answer, then time all of them, one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from accuracy import ASKED, gradient_difference, residual
from operands import save
from remote import Failed, Remote
from rows import Row, SparseRow
from solvers import QPDIFF, QPDIFF_SPARSE

FORWARD, BOTH, BACKWARD = "forward", "forward_backward", "backward"
TOLERANCES = [1e-8, 3e-9, 1e-9, 3e-10, 1e-10, 3e-11, 1e-11, 3e-12, 1e-12]
PAUSE = 0.05
"""Seconds after which the idle threads of the solver that ran last no longer spin."""


@dataclass
class Limits:
    """Seconds."""

    first: float
    """For a first pass, with all that a solver compiles or analyses in it, and for a conversion."""
    later: float
    """For a later pass, and for all passes of one solver and measure in a row together."""


@dataclass
class Result:
    """What was measured of one solver in one row."""

    tolerance: float = np.nan
    residual: float = np.inf
    gradient: float = np.nan
    """Relative difference of the gradients from qpdiff's."""
    iterations: int = 0
    """Of all problems together, of qpdiff."""
    first: dict[str, float] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    """Why a measure was not taken."""

    @property
    def accurate(self) -> bool:
        return self.residual <= ASKED

    def seconds(self, measure: str) -> float | None:
        """Return the seconds of the fastest pass."""
        return min(self.times[measure]) if self.times.get(measure) else None


def measure(
    row: Row | SparseRow,
    team: list[Remote],
    folder: Path,
    repeats: int,
    limits: Limits,
    reasons: dict[str, dict[str, str]],
    step: Callable[[str], None],
) -> dict[str, Result]:
    """Measure a row; return results by the name of the solver.

    `reasons` says by solver and measure why it need not be tried; `step` is called after each pass of a solver.
    """
    operands = row.operands()
    file = folder / "operands.npz"
    save(file, operands)
    results, reference = {}, {}
    for remote in team:
        result = results[remote.solver.name] = Result(reasons=dict(reasons.get(remote.solver.name, {})))
        answer = _prepare(remote, result, operands, file, limits)
        if remote is team[0]:  # qpdiff
            reference = answer
        if "grad_q" in answer and "grad_q" in reference:
            result.gradient = gradient_difference(operands, reference, answer)
        step(f"{row.title}: {remote.solver.name}")
    for _ in range(repeats):
        for remote in team:
            _time_once(remote, results[remote.solver.name], limits)
            step(f"{row.title}: {remote.solver.name}")
    return results


def measures(remote: Remote) -> list[str]:
    """Return what is measured of a solver."""
    alone = remote.solver.name in (QPDIFF.name, QPDIFF_SPARSE.name)
    return [FORWARD, *([BOTH] if remote.solver.differentiable else []), *([BACKWARD] if alone else [])]


def _prepare(remote: Remote, result: Result, operands, file: Path, limits: Limits) -> dict[str, np.ndarray]:
    """Choose the solver's tolerance and time each first pass; return the last answer."""
    answer = {}
    try:
        if FORWARD not in result.reasons:
            answer = _choose_tolerance(remote, result, operands, file, limits)
        if BOTH in measures(remote) and BOTH not in result.reasons:
            answer = _differentiate(remote, result, file, limits)
    except Failed as failure:
        result.reasons |= dict.fromkeys(measures(remote), str(failure))
    return answer


def _differentiate(remote: Remote, result: Result, file: Path, limits: Limits) -> dict[str, np.ndarray]:
    """Time the first pass with gradients; where it fails, the solution can still be timed."""
    try:
        result.first[BOTH] = remote.ask(BOTH, True, limit=limits.first)
        return _answer(remote, file, limits)
    except Failed as failure:
        result.reasons |= {BOTH: str(failure), BACKWARD: str(failure)}
        _restore(remote, result, file, limits)
        return {}


def _choose_tolerance(remote: Remote, result: Result, operands, file: Path, limits: Limits):
    """Choose the loosest tolerance at which the answer is accurate enough, else the one with the best answer."""
    best = {}
    for tolerance in TOLERANCES:
        try:
            remote.ask("prepare", str(file), tolerance, limit=limits.first)
            seconds = remote.ask(FORWARD, True, limit=limits.later if result.first else limits.first)
            answer = _answer(remote, file, limits)
        except Failed:
            if not best:
                raise
            break
        result.first.setdefault(FORWARD, seconds)
        reached = residual(operands, answer)
        if reached < result.residual:
            result.residual, result.tolerance, best = reached, tolerance, answer
        if result.accurate:
            break
    if not best:
        raise Failed("no finite answer")
    if result.tolerance != tolerance:
        _restore(remote, result, file, limits)
    if "iterations" in best:
        result.iterations = int(np.sum(best["iterations"]))
    return best


def _restore(remote: Remote, result: Result, file: Path, limits: Limits) -> None:
    """Prepare a solver again as it was, where another tolerance or the loss of its process came between."""
    remote.ask("prepare", str(file), result.tolerance, limit=limits.first)
    remote.ask(FORWARD, True, limit=limits.first)


def _answer(remote: Remote, file: Path, limits: Limits) -> dict[str, np.ndarray]:
    path = file.with_name("answer.npz")
    remote.ask("answer", str(path), limit=limits.first)
    with np.load(path) as arrays:
        return dict(arrays)


def _time_once(remote: Remote, result: Result, limits: Limits) -> None:
    """Time a pass of each measure that has not failed and has time left."""
    for name in measures(remote):
        taken = result.times.setdefault(name, [])
        if name in result.reasons or sum(taken) > limits.later:
            continue
        time.sleep(PAUSE)
        try:
            taken.append(remote.ask(name, limit=limits.later))
        except Failed as failure:
            result.reasons |= dict.fromkeys(measures(remote), str(failure))
