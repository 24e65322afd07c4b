"""What a batch of quadratic programs is: constraint rows, their split into named parts, selections of the batch."""

import numpy as np
import pytest

from qpdiff.problem import MATRICES, OPERANDS, join_rows, split_rows
from qpdiff.validation import make_problem

SEEDS = range(20)


def operands(rng, batch=5, n=4, m=3, p=2):
    """Random operands with infinite and equal bounds, of which some are left out."""
    lb, ub = -rng.random((batch, n)), rng.random((batch, n))
    fixed = rng.random((batch, n)) < 0.4
    ub = np.where(fixed, lb, np.where(rng.random((batch, n)) < 0.2, np.inf, ub))
    all_of_them = {
        "Q": np.eye(n), "q": rng.normal(size=(batch, n)), "G": rng.normal(size=(batch, m, n)),
        "h": rng.random((batch, m)), "A": rng.normal(size=(p, n)), "b": rng.normal(size=(batch, p)), "lb": lb, "ub": ub,
    }  # fmt: skip
    absent = {name for pair in ("Gh", "Ab") if rng.random() < 0.3 for name in pair}
    absent |= {name for name in ("lb", "ub") if rng.random() < 0.3}
    return {name: None if name in absent else all_of_them[name] for name in OPERANDS}


def stacked(given, batch):
    """K and k by their definition, and the kinds of the rows: "equality", "inequality" or "absent"."""
    K, k, kinds = [], [], []
    for i in range(batch):
        one = {name: value if name in ("Q", "A") else value[i] for name, value in given.items() if value is not None}
        n = one["Q"].shape[-1]
        rows = [(a, b, "equality") for a, b in zip(one.get("A", ()), one.get("b", ()), strict=True)]
        rows += [(g, h, "inequality") for g, h in zip(one.get("G", ()), one.get("h", ()), strict=True)]
        both = "lb" in one and "ub" in one
        equal = one["lb"] == one["ub"] if both else np.zeros(n, bool)
        for name, sign in (("lb", -1), ("ub", 1)):
            for j, bound in enumerate(one.get(name, ())):
                kind = "equality" if equal[j] and name == "lb" else "inequality"
                absent = np.isinf(bound) or (equal[j] and name == "ub")
                rows.append((sign * np.eye(n)[j], 0.0 if absent else sign * bound, "absent" if absent else kind))
        K.append([row for row, *_ in rows])
        k.append([number for _, number, _ in rows])
        kinds.append([kind for *_, kind in rows])
    return np.array(K).reshape(batch, -1, given["Q"].shape[-1]), np.array(k), np.array(kinds)


@pytest.mark.parametrize("seed", SEEDS)
def test_rows_are_those_of_the_definition(seed):
    rng = np.random.default_rng(seed)
    given = operands(rng)
    problem = make_problem(given)
    K, k, kinds = stacked(given, problem.batch)
    x, v = rng.normal(size=(problem.batch, problem.n)), rng.normal(size=(problem.batch, problem.rows))
    assert K.shape[1] == problem.rows
    np.testing.assert_array_equal(np.broadcast_to(problem.k, k.shape), k)
    np.testing.assert_array_equal(np.broadcast_to(problem.equality, kinds.shape), kinds == "equality")
    np.testing.assert_array_equal(np.broadcast_to(problem.inequality, kinds.shape), kinds == "inequality")
    np.testing.assert_array_equal(np.broadcast_to(problem.exists, kinds.shape), kinds != "absent")
    np.testing.assert_allclose(problem.constraints(x), np.einsum("bij,bj->bi", K, x), atol=1e-12)
    np.testing.assert_allclose(problem.adjoint(v), np.einsum("bij,bi->bj", K, v), atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_split_and_join_are_transposes_of_each_other(seed):
    rng = np.random.default_rng(seed)
    problem = make_problem(operands(rng))
    v, u = rng.normal(size=(2, problem.batch, problem.rows))
    u = np.where(problem.exists, u, 0.0)
    sizes = (problem.p, problem.m, problem.n, problem.n)
    parts = [rng.normal(size=(problem.batch, size)) for size in sizes]
    given = [True, True, problem.lb is not None, problem.ub is not None]
    parts = [part if there else 0.0 * part for part, there in zip(parts, given, strict=True)]
    split, joined = split_rows(problem, u, v), np.where(problem.exists, join_rows(problem, *parts, v), 0.0)
    left = sum(np.sum(a * b, axis=-1) for a, b in zip(split, parts, strict=True))
    np.testing.assert_allclose(left, np.sum(u * joined, axis=-1), atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_multiplier_of_a_fixed_variable_goes_to_the_bound_that_holds_it(seed):
    rng = np.random.default_rng(seed)
    given = operands(rng) | {"lb": np.zeros((5, 4)), "ub": np.where(rng.random((5, 4)) < 0.5, 0.0, 1.0)}
    problem = make_problem(given)
    v = rng.normal(size=(problem.batch, problem.rows))
    v = np.where(problem.inequality, np.abs(v), np.where(problem.exists, v, 0.0))
    y, z, z_lb, z_ub = split_rows(problem, v, v)
    assert np.all(z_lb >= 0)
    assert np.all(z_ub >= 0)
    fixed = given["ub"] == 0.0
    assert np.all((z_lb * z_ub)[fixed] == 0.0)
    # z_ub − z_lb is what the bounds add to the dual residual, however it is split.
    zero = np.zeros((problem.batch, problem.rows))
    zero[:, problem.blocks["lb"].start :] = v[:, problem.blocks["lb"].start :]
    np.testing.assert_allclose(z_ub - z_lb, problem.adjoint(zero), atol=1e-15)
    np.testing.assert_array_equal(np.where(problem.exists, join_rows(problem, y, z, z_lb, z_ub), 0.0), v)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_selection_of_a_selection_has_the_numbers_of_the_batch(seed):
    rng = np.random.default_rng(seed)
    given = operands(rng, batch=9)
    problem = make_problem(given)
    first, second = rng.permutation(9)[:6], rng.permutation(6)[:3]
    part = problem.select(first).select(second)
    if rng.random() < 0.5:
        _ = part.Q  # copied now, the other matrices later
    assert part.batch_shape == (3,)
    assert (part.n, part.m, part.p, part.rows) == (problem.n, problem.m, problem.p, problem.rows)
    for name, value in problem.operands.items():
        expected = value if len(value) == 1 else value[first[second]]
        np.testing.assert_array_equal(getattr(part, name), expected)
        np.testing.assert_array_equal(part.operands[name], expected)
    for name in ("k", "equality", "inequality", "exists"):
        whole = getattr(problem, name)
        np.testing.assert_array_equal(getattr(part, name), whole if len(whole) == 1 else whole[first[second]])
    assert all(getattr(part, name) is None for name in OPERANDS if given[name] is None)
    assert all(
        np.shares_memory(getattr(part, name), getattr(problem, name))
        for name in MATRICES
        if given[name] is not None and len(getattr(problem, name)) == 1
    )


def test_changes_leave_the_original():
    rng = np.random.default_rng(0)
    problem = make_problem(operands(rng))
    other = problem.with_operands(Q=2.0 * problem.Q)
    np.testing.assert_array_equal(problem.Q[0], np.eye(4))
    np.testing.assert_array_equal(other.Q[0], 2.0 * np.eye(4))
    assert problem.with_layout(rounding=0.5).rounding == 0.5 != problem.rounding
    assert problem.astype(np.float32).q.dtype == np.float32 != problem.q.dtype
