"""Equilibration against its definition: about unit rows, in whatever units the problem comes."""

import numpy as np
import pytest
from problems import DEGENERATE, SCALED, components, random_problem, random_units, rescaled
from scipy.sparse.csgraph import connected_components

from qpdiff.engines.array.components import linked_variables
from qpdiff.engines.array.equilibration import balance, equilibrate, scale_cost
from qpdiff.engines.array.reduced_forms import PrimalForm
from qpdiff.engines.array.start import make_origin, with_cost
from qpdiff.engines.array.state import make_sub_batch
from qpdiff.engines.array.status import descent_direction, farkas_certificate, residuals
from qpdiff.engines.base import make_settings
from qpdiff.problem import OPERANDS
from qpdiff.validation import make_problem

PARTS = ["A", "G", "A G", "A G lb ub"]


def make(operands):
    return make_problem({name: operands.get(name) for name in OPERANDS})


def scaled_matrix(operands, D, E):
    """[[DQD, DKᵀE], [EKD, 0]] with the rows of A and G for K."""
    K = np.concat([operands[name] for name in ("A", "G") if name in operands], axis=-2)
    M, corner = E[:, :, None] * K * D[:, None, :], np.zeros((len(D), E.shape[-1], E.shape[-1]))
    return np.block([[D[:, :, None] * operands["Q"] * D[:, None, :], M.mT], [M, corner]])


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("cost", ["pd", "psd", "diagonal", "lp"])
@pytest.mark.parametrize("orders", [(0, 0), (6, 0), (0, 6), (3, 3)])
def test_rows_have_about_unit_length(parts, cost, orders):
    rng = np.random.default_rng(0)
    operands = random_problem(rng, parts, cost=cost, batch=(100,), n=8, m=6, p=3)
    operands = rescaled(operands, *random_units(rng, operands, *orders))
    balanced = balance(make(operands))
    length = np.linalg.norm(scaled_matrix(operands, balanced.D, np.concat(balanced.E, axis=-1)), axis=-1)
    assert np.min(length) >= 0.5
    assert np.max(length) <= 2.0


@pytest.mark.parametrize("parts", PARTS)
def test_units_do_not_matter(parts):
    rng = np.random.default_rng(1)
    operands = random_problem(rng, parts, batch=(50,))
    D, E = random_units(rng, operands, 6, 2)
    one, other = balance(make(operands)), balance(make(rescaled(operands, D, E)))
    np.testing.assert_allclose(other.D * D, one.D, rtol=1e-7)
    names = [name for name in ("b", "h") if name in operands]
    for name, of_one, of_other in zip(names, one.E, other.E, strict=True):
        np.testing.assert_allclose(of_other * E[name], of_one, rtol=1e-7)
    # So the sizes that residuals are measured in are the same numbers too.
    one, other = equilibrate(make(operands)), equilibrate(make(rescaled(operands, D, E)))
    for of_one, of_other in zip(one[2:], other[2:], strict=True):
        np.testing.assert_allclose(of_other, of_one, rtol=1e-6)


def test_bounds_are_scaled_with_their_variables():
    operands = random_problem(np.random.default_rng(2), "A G lb ub", batch=(20,))
    problem = make(operands)
    D, E, *_ = equilibrate(problem)
    for name in ("lb", "ub"):
        np.testing.assert_allclose(E[:, problem.blocks[name]] * D, 1.0, rtol=1e-12)


def test_a_cost_without_curvature_is_made_as_large_as_the_constraints():
    """Q = 0 leaves open how large x is; then q decides."""
    operands = random_problem(np.random.default_rng(3), "A G", cost="lp", batch=(20,))
    for factor in (1.0, 1e-6, 1e6):
        problem = make(operands | {"q": factor * operands["q"]})
        D, E, *_ = equilibrate(problem)
        slope = np.max(np.abs(D * problem.q), axis=-1)
        k = np.abs(E * problem.k)
        size = np.exp(np.mean(np.log(k), axis=-1))
        np.testing.assert_allclose(slope, size, rtol=1e-6)


@pytest.mark.parametrize("c", [1e-5, 1.0, 100.0])
def test_a_scaled_cost(c):
    operands = random_problem(np.random.default_rng(4), "A G", batch=(20,))
    scaling = equilibrate(make(operands))
    other = scale_cost(scaling, np.full((20, 1), c))
    one, M = (scaled_matrix(operands, s.D, s.E) for s in (scaling, other))
    np.testing.assert_allclose(M[:, :6, :6], c * one[:, :6, :6], rtol=1e-12)
    np.testing.assert_allclose(M[:, 6:], one[:, 6:], rtol=1e-12)
    np.testing.assert_allclose(other.primal * other.dual, scaling.primal * scaling.dual, rtol=1e-12)
    np.testing.assert_allclose(other.D / other.reach, c * scaling.D / scaling.reach, rtol=1e-12)


@pytest.mark.parametrize("kind", [*DEGENERATE, *SCALED], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("factor", [1.0, 1e-100, 1e100])
def test_scales_are_positive_and_finite(kind, factor):
    operands = kind(np.random.default_rng(5), (20,), 6).operands
    for name in ("Q", "G", "A"):
        if name in operands:
            operands[name] = factor * operands[name]
    with np.errstate(all="ignore"):
        scaling = equilibrate(make(operands))
    for value in scaling[:4]:
        assert np.all(value > 0)
        assert np.all(np.isfinite(value))
    assert np.all(scaling.reach > 0)


@pytest.mark.parametrize("cost", ["psd", "lp"])
@pytest.mark.parametrize("parts", ["A", "A G", "G lb ub"])
def test_certificates_do_not_depend_on_how_large_the_cost_counts(cost, parts):
    rng = np.random.default_rng(4)
    problem = make(random_problem(rng, parts, cost=cost))
    sub = make_sub_batch(PrimalForm(problem), make_settings(problem))
    x, v = rng.normal(size=(4, problem.n)), rng.normal(size=(4, problem.rows))
    proofs = []
    for each in (sub, with_cost(sub, 1e-5 + np.zeros((4, 1)))):
        origin, far = make_origin(each), np.full((4, 1), np.inf)
        found = residuals(problem, x, v, 0.0 * v)
        proofs.append((
            descent_direction(each, x, found, origin, far).ratio,
            farkas_certificate(each, v, origin.v, found.Kx, far).ratio,
        ))  # fmt: skip
    assert np.any(proofs[0][0] > 0) or np.any(proofs[0][1] > 0)
    for one, other in zip(*proofs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10)


def test_linked_variables_are_the_connected_components():
    """A chain through all variables, where numbers are passed on the longest, and random rows, some of them empty."""
    rng, n = np.random.default_rng(8), 12
    chain = np.eye(n) + np.eye(n, k=-1)
    rows = [np.where(rng.uniform(size=(9, n)) < density, rng.normal(size=(9, n)), 0.0) for density in (0.05, 0.1, 0.2)]
    G = np.stack([*rows, chain[rng.permutation(n)][:9], np.zeros((9, n))])
    same = linked_variables(make({"Q": np.zeros((n, n)), "q": np.zeros(n), "G": G, "h": np.ones(9)}), [G != 0])
    for linked, M in zip(same, G, strict=True):
        _, numbers = connected_components(np.abs(M).T @ np.abs(M))
        np.testing.assert_array_equal(linked, numbers[:, None] == numbers)


def test_components_without_curvature_have_the_same_scales_in_all_units():
    one, other = (
        equilibrate(make(components(np.random.default_rng(9), (20,), orders, curved=(False, False))[0]))
        for orders in (0, 6)
    )
    for a, b in zip(one[2:], other[2:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
