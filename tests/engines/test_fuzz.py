"""Any problem at all: whatever status comes back, the solution or the certificate that comes with it holds.

Hypothesis draws what a problem is like and a seed, NumPy the numbers. The profile (see conftest.py) says how many
examples all tests of this file draw together.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    DEGENERATE,
    INFEASIBLE,
    SCALED,
    apply,
    documented_test,
    infeasible,
    random_problem,
    random_units,
    rescaled,
    stacked,
    unbounded,
)

import qpdiff
from qpdiff import Status

pytestmark = pytest.mark.usefixtures("each_engine")

OUTPUTS = ("x", "y", "z", "z_lb", "z_ub")
PARTS = ["", "A", "G", "lb", "ub", "lb ub", "A G", "A lb", "G ub", "A lb ub", "A G lb", "G lb ub", "A G lb ub"]
COSTS = ["pd", "psd", "diagonal", "lp"]
UNBOUNDED_PARTS = ["", "A", "G", "A G", "lb", "lb ub", "A lb", "G lb", "A G lb ub"]
PROOF = {"float64": 1e-6, "float32": 1e-2}
"""What a certificate may leave of 0, relative to what it proves with."""

seeds = st.integers(0, 2**32 - 1)
units = st.sampled_from([(0, 0)] * 4 + [(6, 0), (0, 6), (3, 3)])
"""Orders of magnitude between rows and between variables."""


def share(part):
    """A part of the examples of the profile."""
    return settings(max_examples=max(1, int(part * settings.default.max_examples)))


def single(operands):
    return {name: value.astype(np.float32) for name, value in operands.items()}


def in_units(rng, operands, orders):
    return rescaled(operands, *random_units(rng, operands, *orders)) if any(orders) else operands


# ---- what must hold


def check(operands, expected, *, surely=True, stalls=False, dtype="float64"):
    """Solve and check what comes back; `surely` asks for the expected status and not only for none that is wrong."""
    tol = 1e-8 if dtype == "float64" else 1e-4
    sol = qpdiff.solve_qp(**operands, tol=tol, dtype=dtype)  # in the caller's units, as below
    point = [getattr(sol, name) for name in OUTPUTS]
    status = np.asarray(sol.status)

    allowed = {expected}
    if not surely:  # SOLVED too: the test below is relative to the largest terms, and may have a point that meets it
        allowed |= {Status.SOLVED, Status.STALLED, Status.MAX_ITERATIONS}
    if stalls:
        allowed.add(Status.STALLED)
    if expected == Status.PRIMAL_INFEASIBLE:
        allowed.add(Status.DUAL_INFEASIBLE)  # where it is both, which the ray below then shows
    assert set(status.ravel().tolist()) <= allowed, status

    # Rounding in the solver's residuals and in these is far below the tolerance.
    solved = status == Status.SOLVED
    assert np.all(np.where(solved, documented_test(operands, *point, tol, tol), 0.0) <= 1.01)
    proof = PROOF[dtype] * (1 if surely else 1000)  # the solver's scales differ from those below where units do
    left = farkas_remainder(operands, *point[1:])
    assert np.all(np.where(status == Status.PRIMAL_INFEASIBLE, left, 0.0) <= proof)
    left = ray_remainder(operands, point[0])
    assert np.all(np.where(status == Status.DUAL_INFEASIBLE, left, 0.0) <= proof)

    rng = np.random.default_rng(0)
    cotangents = {name: rng.normal(size=value.shape) for name, value in zip(OUTPUTS, point, strict=True)}
    gradients = qpdiff.vjp(sol, **cotangents, unsolved="zero")
    assert all(np.isfinite(getattr(gradients, name)).all() for name in operands)


def farkas_remainder(operands, y, z, z_lb, z_ub):
    """‖Kᵀv‖ in the scale of the columns over −kᵀv; infinite where v proves nothing.

    With |Kᵀv| ≤ ε c (−kᵀv), a feasible x has c |x|₁ ≥ 1/ε.
    """
    _, _, K, k, p = stacked(operands)
    v = np.concat([y, z, z_lb, z_ub], axis=-1, dtype=np.float64)
    fall = -np.sum(k * v, axis=-1)
    scale = np.maximum(1.0, np.max(np.abs(K), axis=-2))
    left = np.max(np.abs(apply(K.mT, v)) / scale, axis=-1)
    proves = (fall > 0) & np.all(v[..., p:] >= 0, axis=-1)
    return np.where(proves, left / np.where(proves, fall, 1.0), np.inf)


def ray_remainder(operands, x):
    """How much x leaves the constraints and curves, in the scale of the rows, over −qᵀx; infinite where it rises."""
    Q, q, K, _, p = stacked(operands)
    x = np.float64(x)
    fall = -np.sum(q * x, axis=-1)
    out = apply(K, x) / np.maximum(1.0, np.max(np.abs(K), axis=-1))
    out[..., p:] = np.clip(out[..., p:], 0.0, None)
    curvature = apply(Q, x) / np.maximum(1.0, np.max(np.abs(Q), axis=-1))
    left = np.maximum(np.max(np.abs(out), axis=-1, initial=0.0), np.max(np.abs(curvature), axis=-1))
    return np.where(fall > 0, left / np.where(fall > 0, fall, 1.0), np.inf)


# ---- what is drawn


@st.composite
def solvable(draw):
    """A feasible, bounded problem with any of the operands, of any batch shape, with any of them shared."""
    cost, parts, n = draw(st.sampled_from(COSTS)), draw(st.sampled_from(PARTS)), draw(st.integers(1, 8))
    may_be_shared = ["Q", "G", "A", "point"] + (["q"] if cost in ("pd", "diagonal") else [])
    options = {
        "cost": cost,
        "n": n,
        "m": draw(st.integers(0, 14)),
        "p": draw(st.integers(1, n + 1)),
        "batch": draw(st.sampled_from([(), (1,), (3,), (2, 2)])),
        "shared": draw(st.sets(st.sampled_from(may_be_shared))),
        "infinite": draw(st.sampled_from([0.0, 0.3, 1.0])),
        "fixed": draw(st.integers(0, n)) if "lb ub" in parts else 0,
    }
    rng = np.random.default_rng(draw(seeds))
    return random_problem(rng, parts, **options)


@st.composite
def degenerate(draw, kinds):
    kind, n = draw(st.sampled_from(kinds)), draw(st.integers(1, 8))
    return kind(np.random.default_rng(draw(seeds)), (2,), n).operands


@st.composite
def without_a_point(draw):
    shape = draw(st.tuples(st.integers(1, 8), st.integers(2, 12), st.integers(1, 3)))
    change, cost = draw(st.sampled_from(list(INFEASIBLE))), draw(st.sampled_from(COSTS))
    return infeasible(np.random.default_rng(draw(seeds)), change, cost, shape, batch=2)


@st.composite
def without_a_bottom(draw):
    shape = draw(st.tuples(st.integers(1, 8), st.integers(1, 12), st.integers(1, 3)))
    parts, cost = draw(st.sampled_from(UNBOUNDED_PARTS)), draw(st.sampled_from(COSTS))
    return unbounded(np.random.default_rng(draw(seeds)), parts, cost, shape, batch=2)


@share(0.35)
@given(solvable(), units, seeds)
def test_solvable(operands, orders, seed):
    operands = in_units(np.random.default_rng(seed), operands, orders)
    check(operands, Status.SOLVED, surely=not any(orders))


@share(0.25)
@given(degenerate(DEGENERATE + SCALED))
def test_degenerate(operands):
    check(operands, Status.SOLVED)


@share(0.15)
@given(without_a_point(), units, seeds)
def test_infeasible(operands, orders, seed):
    operands = in_units(np.random.default_rng(seed), operands, orders)
    check(operands, Status.PRIMAL_INFEASIBLE, surely=not any(orders), stalls=True)  # how often: test_certificates


@share(0.15)
@given(without_a_bottom(), units, seeds)
def test_unbounded(operands, orders, seed):
    operands = in_units(np.random.default_rng(seed), operands, orders)
    check(operands, Status.DUAL_INFEASIBLE, surely=not any(orders), stalls=True)


@share(0.1)
@given(solvable() | degenerate(DEGENERATE))
def test_single_precision(operands):
    check(single(operands), Status.SOLVED, surely=False, dtype="float32")
