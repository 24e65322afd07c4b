"""Gradients beside finite differences, along directions in which the problem keeps its kind."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

import qpdiff

from .arrays import to_numpy


class Comparison(NamedTuple):
    """What differences say of the gradient of one operand."""

    operand: str
    error: float
    """The largest relative one."""
    left_out: int
    """Directions along which there is no derivative."""


def compare(operands, sol: qpdiff.Solution, options, step: float, directions: int, rng, report) -> list | None:
    """Compare the gradients of c·x, for a random c, with differences along random directions of each operand.

    Parameters
    ----------
    operands : dict
        Arrays by name.
    sol : Solution
        Of them, solved with `options`.
    options : dict
        Of `solve_qp`, for the problems that are moved.
    step : float
        Of the differences.
    directions : int
        For each operand.
    rng : numpy.random.Generator
    report : callable
        Is told how many directions are done, and of how many.

    Returns
    -------
    list of Comparison, or None where a problem's solution is not unique
    """
    cotangent = rng.normal(size=sol.x.shape)
    gradients = {name: to_numpy(value) for name, value in qpdiff.vjp(sol, x=cotangent)._asdict().items()}

    def loss(changed):
        moved = qpdiff.solve_qp(**(operands | changed), **options)
        solved = np.all(to_numpy(moved.status) == qpdiff.Status.SOLVED)
        return float(np.sum(cotangent * to_numpy(moved.x))) if solved else np.nan

    here = loss({})
    if jumps(loss, here, operands["q"], step * rng.normal(size=operands["q"].shape)):
        return None
    comparisons = []
    for position, name in enumerate(operands):
        worst, left_out = 0.0, 0
        for count in range(directions):
            tangents = direction(rng, name, operands, step)
            slope, right, left = slopes(loss, here, tangents, operands, to_numpy(sol.x), step)
            pulled = float(sum(np.sum(gradients[other] * tangent) for other, tangent in tangents.items()))
            size = max(abs(pulled), abs(slope), 1e-2 * float(np.linalg.norm(cotangent)))
            report(position * directions + count + 1, len(operands) * directions)
            if not np.isfinite(pulled):  # a fault, as all problems are SOLVED
                worst = np.inf
            elif abs(right - left) <= 0.01 * size and np.isfinite(slope):
                worst = max(worst, abs(slope - pulled) / size)
            else:
                left_out += 1
        comparisons.append(Comparison(name, worst, left_out))
    return comparisons


def direction(rng: np.random.Generator, name: str, operands, step: float) -> dict[str, np.ndarray]:
    """Draw a random tangent of an operand, and of the bound that it moves, along which the problem keeps its kind.

    That of Q is symmetric, and positive semidefinite where Q is too close to singular for a step the other way. That of
    a bound is 0 where it is infinite. A fixed variable stays fixed, and a bound does not pass the other one.
    """
    value = operands[name]
    tangent = rng.normal(size=value.shape)
    if name == "Q":
        both_ways = (tangent + np.swapaxes(tangent, -1, -2)) / 2
        if keeps_definite(value, step * both_ways):
            return {name: both_ways}
        return {name: tangent @ np.swapaxes(tangent, -1, -2) / value.shape[-1]}
    tangent = np.where(np.isfinite(value), tangent, 0.0)
    if name not in ("lb", "ub") or not {"lb", "ub"} <= set(operands):
        return {name: tangent}
    gap = operands["ub"] - operands["lb"]
    limit = np.where(gap > 0, gap / (2 * step), np.inf)
    tangent = np.clip(tangent, -limit, limit)
    return {name: tangent, "ub" if name == "lb" else "lb": np.where(gap > 0, 0.0, tangent)}


def jumps(loss, here: float, q: np.ndarray, change: np.ndarray) -> bool:
    """Return whether a loss jumps: a hundredth of a change of q changes it as much as all of it, or leaves no value.

    So it is where x is not unique: the smallest change of q leaves few of the solutions, or none.
    """
    once, little = (abs(loss({"q": q + size * change}) - here) for size in (1.0, 0.01))
    return not little <= 0.1 * once + 1e-5 * (1.0 + abs(here))


def slopes(loss, here: float, tangents, operands, x, step: float) -> tuple[float, float, float]:
    """Estimate the slope of a loss along tangents, to second or third order, and those to the right and the left.

    The last two differ where there is a kink. A change of Q moves the solution as one of q by (change of Q) x does, to
    first order: that tells a kink where Q cannot move to the left.
    """

    def differences(tangents):
        above, below = (
            loss({name: operands[name] + size * tangent for name, tangent in tangents.items()})
            for size in (step, -step)
        )
        return (above - below) / (2 * step), (above - here) / step, (here - below) / step

    Q = tangents.get("Q")
    if Q is None or keeps_definite(operands["Q"], step * Q):
        return differences(tangents)
    once, twice, thrice = (loss({"Q": operands["Q"] + count * step * Q}) for count in (1, 2, 3))
    _, right, left = differences({"q": (Q @ x[..., None])[..., 0]})
    return (18 * once - 9 * twice + 2 * thrice - 11 * here) / (6 * step), right, left


def keeps_definite(Q: np.ndarray, change: np.ndarray) -> bool:
    """Return whether Q minus the change is positive definite, with as much left as the change takes."""
    return bool(np.min(np.linalg.eigvalsh(Q)) > 2 * np.max(np.linalg.norm(change, 2, axis=(-2, -1))))
