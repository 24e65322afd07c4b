"""Compare what was measured with the targets: how much faster than the others qpdiff is meant to be."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from accuracy import ASKED
from measure import BACKWARD, BOTH, FORWARD, Result
from rows import Row
from solvers import Solver

Table = dict[Row, dict[str, Result]]


class Verdict(NamedTuple):
    """One target in one row."""

    target: str
    row: Row
    against: str
    measured: str
    asked: str
    outcome: str
    """PASS, "short of", or why it is not checked."""


def check_targets(table: Table, solvers: list[Solver]) -> list[Verdict]:
    """Check all targets in all rows that they are for."""
    differentiable = [solver.name for solver in solvers if solver.differentiable and not solver.own]
    others = [solver.name for solver in solvers if not solver.own]
    verdicts = []

    def faster(target, measure, ratio, names, rows: Callable[[Row], bool], own="qpdiff"):
        for row, results in table.items():
            if rows(row) and own in results and any(name in results for name in names):
                verdicts.append(_faster(target, row, results, measure, ratio, names, own))

    def batched(row):
        return row.batch > 1

    def single(row):
        return row.batch == 1

    faster("f+b, fastest differentiable", BOTH, 2.5, differentiable, batched)
    faster("f+b, qpth", BOTH, 8, ["qpth"], lambda row: True)
    faster("f, fastest of all", FORWARD, 1, others, batched)
    faster("f+b at B = 1, QPLayer", BOTH, 1, ["QPLayer"], single)
    faster("f+b at B = 1, qpax", BOTH, 1, ["qpax"], single)
    faster('f+b of engine="array", qpth', BOTH, 2.5, ["qpth"], batched, own="qpdiff array")
    verdicts += [_share_of_vjp(row, results["qpdiff"]) for row, results in table.items() if row.n >= 50]
    verdicts += [
        _sharing(row, results["qpdiff"], table[distinct]["qpdiff"])
        for row, results in table.items()
        if row.kind == "shared" and (distinct := row._replace(kind="distinct")) in table
    ]
    return verdicts


def _faster(target, row, results, measure, ratio, names, own) -> Verdict:
    """Divide the fastest rival's time by that of qpdiff, among rivals that are accurate enough."""
    ours = results[own]
    times = {name: results[name].seconds(measure) for name in names if name in results and results[name].accurate}
    times = {name: seconds for name, seconds in times.items() if seconds is not None}
    asked = f"{ratio:g} ×"
    if ours.seconds(measure) is None or not ours.accurate:
        return Verdict(target, row, "", "", asked, f"not checked: {own} has no answer within {ASKED:.0e}")
    if not times:
        return Verdict(target, row, "", "", asked, f"not checked: no other has an answer within {ASKED:.0e}")
    rival = min(times, key=times.__getitem__)
    measured = times[rival] / ours.seconds(measure)
    return Verdict(target, row, rival, f"{measured:.3g} ×", asked, _outcome(measured >= ratio))


def _share_of_vjp(row, ours) -> Verdict:
    target, asked = "vjp's share of the solve", "≤ 15 %"
    if not ours.times.get(BACKWARD) or not ours.times.get(FORWARD):
        return Verdict(target, row, "", "", asked, "not checked: not measured")
    share = ours.seconds(BACKWARD) / ours.seconds(FORWARD)
    return Verdict(target, row, "solve", f"{100 * share:.0f} %", asked, _outcome(share <= 0.15))


def _sharing(row, shared, distinct) -> Verdict:
    target, asked = "f+b, shared operands", "2 ×"
    if not shared.times.get(BOTH) or not distinct.times.get(BOTH):
        return Verdict(target, row, "", "", asked, "not checked: not measured")
    ratio = distinct.seconds(BOTH) / shared.seconds(BOTH)
    return Verdict(target, row, "distinct", f"{ratio:.3g} ×", asked, _outcome(ratio >= 2))


def _outcome(met: bool) -> str:
    return "PASS" if met else "short of"
