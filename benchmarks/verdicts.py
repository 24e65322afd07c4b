"""Compare what was measured with the targets: how much faster than the others qpdiff is meant to be."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from accuracy import ASKED
from measure import BACKWARD, BOTH, FORWARD, Result
from report import digits
from rows import Row, SparseRow
from solvers import QPDIFF, QPDIFF_SPARSE, Solver, counterpart

Table = dict[Row, dict[str, Result]]
SparseTable = dict[SparseRow, dict[str, Result]]


class Verdict(NamedTuple):
    """One target in one row."""

    target: str
    row: Row | SparseRow
    own: str
    """Which qpdiff."""
    against: str
    measured: str
    asked: str
    outcome: str
    """PASS, "short of", or why it is not checked."""


def check_targets(table: Table, solvers: list[Solver]) -> list[Verdict]:
    """Check all targets in all rows that they are for."""
    counterparts = {solver.name: counterpart(solver, solvers) for solver in solvers if not solver.own}
    differentiable = [solver.name for solver in solvers if solver.differentiable and not solver.own]
    verdicts = []

    def faster(target, measure, ratio, names, rows: Callable[[Row], bool], own=None):
        for row, results in table.items():
            pairs = {name: own or counterparts[name] for name in names if name in results}
            if rows(row) and pairs and all(name in results for name in pairs.values()):
                verdicts.append(_faster(target, row, results, measure, ratio, pairs))

    def close(target, ratio, own, rows: Callable[[Row], bool]):
        verdicts.extend(
            _close(target, row, results, ratio, own) for row, results in table.items() if rows(row) and own in results
        )

    def many(row):
        return row.batch >= 128

    def batched(row):
        return row.batch > 1

    def single(row):
        return row.batch == 1

    faster("f+b, fastest differentiable", BOTH, 2.5, differentiable, batched)
    faster("f+b, qpth", BOTH, 8, ["qpth"], lambda row: True)
    faster("f, fastest of all", FORWARD, 1, counterparts, batched)
    faster("f+b at B = 1, QPLayer", BOTH, 1, ["QPLayer"], single)
    faster("f+b at B = 1, qpax", BOTH, 1, ["qpax"], single)
    faster('f+b of engine="array", qpth', BOTH, 2.5, ["qpth"], batched, own="qpdiff array")
    close("f+b in torch, B ≥ 128", 1.15, "qpdiff torch", many)
    close("f+b in torch, B = 1", 2, "qpdiff torch", single)
    close("f+b in JAX, B ≥ 128", 1.5, "qpdiff JAX", many)
    verdicts += [_share_of_vjp(row, results["qpdiff"], "qpdiff", 0.15) for row, results in table.items() if row.n >= 50]
    verdicts += [
        _sharing(row, results["qpdiff"], table[distinct]["qpdiff"])
        for row, results in table.items()
        if row.kind == "shared" and (distinct := row._replace(kind="distinct")) in table
    ]
    return verdicts


def check_sparse_targets(table: SparseTable) -> list[Verdict]:
    """Check the targets of the sparse rows."""
    own, verdicts = QPDIFF_SPARSE.name, []
    for row, results in table.items():
        ratio = 0.9 if row.batch == 1 else 2.0 if row.family in ("portfolio", "sudoku") else 2.5
        pairs = [("f, PIQP", FORWARD, ratio, ["PIQP"]), ("f+b, Moreau", BOTH, 10, ["Moreau", "Moreau ipm"])]
        for target, measure, asked, rivals in pairs:
            pair = {rival: own for rival in rivals if rival in results}
            if pair:
                verdicts.append(_faster(target, row, results, measure, asked, pair))
        verdicts.append(_share_of_vjp(row, results[own], own, 0.25))
    return verdicts


def _faster(target, row, results, measure, ratio, pairs) -> Verdict:
    """Divide the time of each rival by that of its qpdiff; the least quotient counts, of rivals accurate enough."""
    asked = f"{ratio:g} ×"
    times = {name: _accurate_seconds(results[name], measure) for name in {*pairs, *pairs.values()}}
    pairs = {rival: own for rival, own in pairs.items() if times[rival] is not None}
    if not pairs:
        return Verdict(target, row, "", "", "", asked, f"not checked: no other has an answer within {ASKED:.0e}")
    if without := [own for own in pairs.values() if times[own] is None]:
        return Verdict(target, row, without[0], "", "", asked, f"not checked: no answer within {ASKED:.0e}")
    quotients = {rival: times[rival] / times[own] for rival, own in pairs.items()}
    rival = min(quotients, key=quotients.__getitem__)
    measured = quotients[rival]
    return Verdict(target, row, pairs[rival], rival, f"{digits(measured)} ×", asked, _outcome(measured >= ratio))


def _close(target, row, results, ratio, own) -> Verdict:
    """Divide the time of qpdiff in a framework by that on NumPy."""
    asked = f"≤ {ratio:g} ×"
    times = [_accurate_seconds(results[name], BOTH) for name in (own, QPDIFF.name)]
    if None in times:
        return Verdict(target, row, own, QPDIFF.name, "", asked, f"not checked: no answer within {ASKED:.0e}")
    measured = times[0] / times[1]
    return Verdict(target, row, own, QPDIFF.name, f"{digits(measured)} ×", asked, _outcome(measured <= ratio))


def _accurate_seconds(result: Result, measure) -> float | None:
    return result.seconds(measure) if result.accurate else None


def _share_of_vjp(row, ours, own, limit) -> Verdict:
    target, asked = "vjp's share of the solve", f"≤ {100 * limit:.0f} %"
    if not ours.times.get(BACKWARD) or not ours.times.get(FORWARD):
        return Verdict(target, row, own, "", "", asked, "not checked: not measured")
    share = ours.seconds(BACKWARD) / ours.seconds(FORWARD)
    return Verdict(target, row, own, "solve", f"{100 * share:.0f} %", asked, _outcome(share <= limit))


def _sharing(row, shared, distinct) -> Verdict:
    target, asked = "f+b, shared operands", "2 ×"
    if not shared.times.get(BOTH) or not distinct.times.get(BOTH):
        return Verdict(target, row, QPDIFF.name, "", "", asked, "not checked: not measured")
    ratio = distinct.seconds(BOTH) / shared.seconds(BOTH)
    return Verdict(target, row, QPDIFF.name, "distinct", f"{digits(ratio)} ×", asked, _outcome(ratio >= 2))


def _outcome(met: bool) -> str:
    return "PASS" if met else "short of"
