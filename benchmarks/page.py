"""Write docs/benchmarks.md: all that was measured, in tables."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

from accuracy import ASKED
from measure import BOTH, FORWARD
from operations import operations
from report import digits, table
from rows import Growth
from solvers import QPDIFF, QPDIFF_SPARSE, Solver, counterpart
from verdicts import SparseTable, Table, Verdict, check_sparse_targets, check_targets


@dataclass
class Run:
    """A whole run of the benchmark."""

    solvers: list[Solver]
    machine: str
    """With the releases of all solvers."""
    rows: Table | SparseTable
    growths: list[tuple[Growth, Table, Path]]
    """With the picture of each."""
    peak: float
    """Floating point operations a second of a large matrix product."""
    repeats: int
    targets: bool
    """Whether the targets, which are those of the CPU, are checked."""


INTRODUCTION = f"""\
qpdiff next to other solvers, in float64. All run side by side in one run, each in a process and an environment of its
own: one pass each, round after round, so that what disturbs the machine disturbs all. A row is a batch: B problems of n
variables, m inequalities and p equalities; every problem has its own operands, but in the row *shared* (Q, G and A are
the same for all) and in *sudoku* (an OptNet layer on mini-Sudoku: all but q is the same for all, x ≥ 0). Solvers
without bounds get them as rows of G.

* **f** is the solution of the batch, **f+b** also the gradients of sum(x) with respect to all operands. The conversion
  of the operands to a solver's own arrays is not timed. PIQP, DAQP, quadprog, Clarabel, OSQP and ElastiQP solve a batch
  in a Python loop, ProxSuite in parallel; the set-up of all solvers is timed, since each pass has new operands. qpdiff
  runs with rtol=0. The fastest pass counts.
* **Called the same way**: qpth, QPLayer, Moreau and cvxpylayers are called from torch, and compared with *qpdiff torch*
  (`qpdiff.torch.solve_qp`, gradients by `torch.autograd`); qpax from JAX, under `jit`, and compared with *qpdiff JAX*
  (`qpdiff.jax.solve_qp` and `jax.grad` under `jit`). The others take NumPy arrays and are compared with *qpdiff*
  (`qpdiff.solve_qp` and `qpdiff.vjp`). *qpdiff array* is that on the array engine.
* **Accuracy**: primal residual, dual residual and duality gap of every answer are computed again from their
  definitions, with the solver's own multipliers. Each solver is run at the loosest of the tolerances 1e-8, 3e-9, 1e-9,
  ..., 1e-12 at which the largest of the three, over the batch, is at most {ASKED:.0e}. Where none is enough it is run
  at the best, marked with *, and not compared.
* A dash is a solver that did not finish; the reasons are at the end. In the curves it is not tried at larger points.
* qpax differentiates a relaxed problem, as is its default: its gradients differ by design. qpth averages the gradient
  of a shared operand over the batch; the sum is compared. QPLayer uses half the processors, by its own rule. *Moreau*
  chooses its method itself, *Moreau ipm* is its interior-point method. ElastiQP penalises the violation of
  inequalities: with a penalty larger than their multipliers, the solution is that of the QP.
* Where a constraint is weakly active, as in one problem of the row 1000, 10, 20, 0, no two solvers need agree in the
  gradient.
* The **targets** are how many times as long another solver takes (**against**) as qpdiff (**of**); those with ≤ are how
  many times as long qpdiff takes in a framework as on NumPy. **vjp's share of the solve** is the time of a vjp alone,
  of a stored solution, over f.
"""


def write(run: Run) -> str:
    """Return the page as Markdown."""
    rows = list(run.rows)
    names = [solver.name for solver in run.solvers]
    differentiable = [solver.name for solver in run.solvers if solver.differentiable]
    sections = ["# Benchmarks", *_origin(run), INTRODUCTION.rstrip()]
    if rows:
        if run.targets:
            sections += ["## Targets", *_verdicts(check_targets(run.rows, run.solvers))]
        for title, measure, listed in (("f", FORWARD, names), ("f+b", BOTH, differentiable)):
            sections += [f"## {title} [ms]", _grid(run, listed, lambda r, m=measure: _milliseconds(r, m))]
            pairs = [(solver.name, counterpart(solver, run.solvers)) for solver in run.solvers if solver.name in listed]
            pairs = [(name, own) for name, own in pairs if name != own]
            sections += [f"### {title}: times that of qpdiff called the same way", _ratios(run, pairs, measure)]
        frameworks = [solver.name for solver in run.solvers if solver.own and solver.framework != QPDIFF.framework]
        if frameworks:
            pairs = [(name, QPDIFF.name) for name in frameworks]
            sections += ["### f+b: times that of qpdiff on NumPy", _ratios(run, pairs, BOTH)]
        sections += ["## Accuracy", "Largest residual or gap:", _grid(run, names, lambda r: _number(r.residual))]
        sections += ["Gradients differ from qpdiff's, relative to the largest entry, by:"]
        sections += [_grid(run, [name for name in differentiable if name != "qpdiff"], lambda r: _number(r.gradient))]
        sections += ["## The first pass [ms]", "With what is compiled in it, f+b after f:"]
        compiled = [name for name in names if name.startswith("qpdiff") or name == "qpax"]
        sections += [_grid(run, compiled, _first)]
        sections += ["## Share of the machine's peak", *_peak(run)]
    if run.growths:
        sections.append("## Growth")
        sections += [f"![Time against {growth.title}]({picture.name})" for growth, _, picture in run.growths]
    sections += _reasons(run)
    return "\n\n".join(sections) + "\n"


def _grid(run: Run, names: list[str], cell) -> str:
    """Return a table with a line for each solver and a column for each row of the benchmark."""
    lines = [[name, *(cell(results[name]) for results in run.rows.values())] for name in names]
    return table(["B, n, m, p", *(row.title for row in run.rows)], lines)


def _ratios(run: Run, pairs: list[tuple[str, str]], measure: str) -> str:
    """Return a table with a line for each pair: how many times the second solver's time the first one takes."""
    lines = []
    for name, own in pairs:
        cells = []
        for results in run.rows.values():
            ours, other = results[own].seconds(measure), results[name].seconds(measure)
            mark = _mark(results[name]) or _mark(results[own])
            cells.append("—" if ours is None or other is None else f"{digits(other / ours)}{mark}")
        lines.append([f"{name} / {own}", *cells])
    return table(["B, n, m, p", *(row.title for row in run.rows)], lines)


def _milliseconds(result, measure) -> str:
    seconds = result.seconds(measure)
    return "—" if seconds is None else f"{digits(1000 * seconds)}{_mark(result)}"


def _first(result) -> str:
    return " + ".join(f"{1000 * seconds:.0f}" for seconds in result.first.values()) or "—"


def _number(value: float) -> str:
    return f"{value:.1e}" if value < float("inf") else "—"


def _mark(result) -> str:
    return "" if result.accurate else "*"


def _verdicts(verdicts: list[Verdict]) -> list[str]:
    checked = [verdict for verdict in verdicts if not verdict.outcome.startswith("not checked")]
    met = sum(verdict.outcome == "PASS" for verdict in checked)
    lines = [[v.target, v.row.title, v.own, v.against, v.measured, v.asked, v.outcome] for v in verdicts]
    headings = ["target", "row", "of", "against", "measured", "asked", ""]
    return [f"{met} of {len(checked)} met.", table(headings, lines)] if lines else ["None applies to these rows."]


def _peak(run: Run) -> list[str]:
    lines = []
    for row, results in run.rows.items():
        own = results["qpdiff"]
        seconds = own.seconds(FORWARD)
        if seconds is None:
            continue
        form, count = operations(row, own.iterations)
        rate = count / seconds
        cells = [form, f"{own.iterations / row.batch:.1f}", digits(count / 1e9), digits(1000 * seconds)]
        lines.append([row.title, *cells, digits(rate / 1e9), f"{100 * rate / run.peak:.1f} %"])
    headings = ["B, n, m, p", "reduced system", "iterations", "GFLOP", "f [ms]", "GFLOP/s", "of the peak"]
    text = (
        f"The peak is that of a product of two 2000 × 2000 matrices with all threads, {digits(run.peak / 1e9)} GFLOP/s "
        "before or after the run. What qpdiff computes is counted by the formula in `benchmarks/operations.py`."
    )
    return [text, table(headings, lines)]


SPARSE = f"""\
Families of problems whose matrices are sparse, with one pattern for the batch (`benchmarks/families.py`). The number
before the name is the batch B, those after it are the sizes: *mpc* horizon, states, inputs; *portfolio* assets,
factors; *opf* buses; *tv* points; *sudoku* rows and columns of a box; *svm* examples, features.

* **f** is the solution of the batch, **f+b** also the gradients of sum(x) with respect to all operands, of matrices
  those of the entries in the pattern. The fastest pass counts.
* *qpdiff sparse* is `qpdiff.solve_qp` and `qpdiff.vjp` with `qpdiff.Sparse` operands. Moreau is called from torch.
  PIQP, OSQP, Clarabel and ProxSuite update the values of one set-up for each problem of the batch, one after the other;
  qpdiff and Moreau solve a batch with all processors. The analysis of the pattern is timed of no solver, and none
  starts from an earlier solution.
* Accuracy is that of the [dense table](benchmarks.md): each solver runs at the loosest tolerance at which residuals and
  gap are at most {ASKED:.0e}; a solver marked with * reaches that at none, and is not compared.
"""


def write_sparse(run: Run) -> str:
    """Return the page of the sparse rows: tables with a line for each row and a column for each solver."""
    names = [solver.name for solver in run.solvers]
    differentiable = [solver.name for solver in run.solvers if solver.differentiable]

    def grid(columns, cell):
        lines = [[row.title, *(cell(results[name]) for name in columns)] for row, results in run.rows.items()]
        return table(["B, family", *columns], lines)

    sections = ["# Benchmarks with sparse matrices", *_origin(run), SPARSE.rstrip()]
    sections += ["## Targets", *_verdicts(check_sparse_targets(run.rows))]
    for title, measure, columns in (("f", FORWARD, names), ("f+b", BOTH, differentiable)):
        sections += [f"## {title} [ms]", grid(columns, lambda r, m=measure: _milliseconds(r, m))]
    sections += ["## Accuracy", "Largest residual or gap:", grid(names, lambda r: _number(r.residual))]
    others = [name for name in differentiable if name != QPDIFF_SPARSE.name]
    sections += ["Gradients differ from qpdiff's, relative to the largest entry, by:"]
    sections += [grid(others, lambda r: _number(r.gradient)), *_reasons(run)]
    return "\n\n".join(sections) + "\n"


def _origin(run: Run) -> list[str]:
    today = datetime.datetime.now(tz=datetime.UTC).date()
    return [f"Written by `benchmarks/bench.py` on {today}; {run.repeats} rounds.", run.machine]


def _reasons(run: Run) -> list[str]:
    """List which solvers did not finish and why, with the rows."""
    found: dict[str, list[str]] = {}
    for results_of in [run.rows, *(points for _, points, _ in run.growths)]:
        for row, results in results_of.items():
            for name, result in results.items():
                for measure, short in ((FORWARD, "f"), (BOTH, "f+b")):
                    if measure in result.reasons and result.seconds(measure) is None:
                        found.setdefault(f"{name}, {short}: {result.reasons[measure]}", []).append(row.title)
    lines = [f"* {reason} ({'; '.join(titles)})" for reason, titles in found.items()]
    return ["## Not measured", "\n".join(lines)] if lines else []
