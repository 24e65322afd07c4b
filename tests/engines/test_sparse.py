"""Problems with sparse matrices in the compiled engine: KKT conditions from the definition, and the dense engine."""

import numpy as np
import pytest
import scipy.sparse as sp
from numpy.testing import assert_allclose

import qpdiff
from qpdiff.engines.base import StartingPoint, _settings
from qpdiff.engines.choice import compiled_engine
from qpdiff.engines.parameters import DOUBLE

pytestmark = pytest.mark.skipif(compiled_engine()[0] is None, reason="the compiled engine was not built")
B = 11  # more than a register has lanes, and no multiple of it


def general(rng):
    """Anything: dense columns, an empty row and a free variable, bounds on some, fixed variables."""
    n, p, m = 30, 8, 25
    Q = sp.random_array((n, n), density=0.1, rng=rng).tolil()
    Q[3] = 0
    A, G = (sp.random_array((rows, n), density=0.15, rng=rng).tolil() for rows in (p, m))
    A.setdiag(1.0)
    G[4] = 0
    F, A, G = (M.tocsr() for M in (Q, A, G))
    for _ in range(B):
        for M in (F, A, G):
            M.data = rng.normal(size=M.nnz)
        x = rng.normal(size=n)
        span = rng.uniform(0, 1, (2, n))
        span[:, 5] = 0
        span[:, ::4] = np.inf
        rows = A.copy(), A @ x, G.copy(), G @ x + rng.uniform(0, 1, m)
        yield F.T @ F + 0.1 * sp.eye_array(n), rng.normal(size=n), *rows, x - span[0], x + span[1]


def mpc(rng, steps=8, states=4, inputs=2):
    """Linear dynamics as equalities, all variables bounded."""
    n = steps * (states + inputs)
    for _ in range(B):
        move = np.eye(states) + 0.1 * rng.normal(size=(states, states))
        push = rng.normal(size=(states, inputs))
        A = np.kron(np.eye(steps), np.hstack([-push, np.eye(states)]))
        A += np.kron(np.eye(steps, k=-1), np.hstack([np.zeros((states, inputs)), -move]))
        b = np.zeros(steps * states)
        b[:states] = move @ rng.uniform(-1, 1, states)
        limit = np.tile(np.repeat([0.5, 5.0], [inputs, states]), steps)
        Q = sp.diags_array(np.tile(np.repeat([0.1, 1.0], [inputs, states]), steps))
        yield Q, rng.normal(size=n), sp.csr_array(A), b, sp.csr_array((0, n)), np.zeros(0), -limit, limit


def total_variation(rng, N=25):
    """No curvature in half of the variables, rows alone."""
    D = sp.diags_array([-np.ones(N - 1), np.ones(N - 1)], offsets=[0, 1], shape=(N - 1, N))
    E = sp.eye_array(N - 1)
    G = sp.block_array([[D, -E], [-D, -E]]).tocsr()
    Q = sp.csr_array(sp.block_diag([sp.eye(N), sp.csr_matrix((N - 1, N - 1))]))
    for _ in range(B):
        q = np.r_[-rng.normal(size=N), np.full(N - 1, rng.uniform(0.2, 1))]
        yield Q, q, sp.csr_array((0, 2 * N - 1)), np.zeros(0), G, np.zeros(2 * N - 2), None, None


def portfolio(rng, n=40, factors=4):
    """A few full rows, one-sided bounds on some variables."""
    for _ in range(B):
        F = rng.normal(size=(factors, n))
        Q = sp.diags_array(np.r_[rng.uniform(0.1, 2, n), np.ones(factors)])
        A = sp.csr_array(np.block([[F, -np.eye(factors)], [np.ones((1, n)), np.zeros((1, factors))]]))
        low = np.r_[np.zeros(n), np.full(factors, -np.inf)]
        none = sp.csr_array((0, n + factors)), np.zeros(0)
        yield Q, np.r_[rng.normal(size=n), np.zeros(factors)], A, np.r_[np.zeros(factors), 1.0], *none, low, None


def linear_program(rng, n=20, m=15):
    """No Q at all."""
    G = sp.random_array((m, n), density=0.2, rng=rng).tocsr()
    for _ in range(B):
        G.data = rng.normal(size=G.nnz)
        h = G @ rng.uniform(0, 1, n) + rng.uniform(0.1, 1, m)
        yield (
            sp.csr_array((n, n)),
            rng.normal(size=n),
            sp.csr_array((0, n)),
            np.zeros(0),
            G.copy(),
            h,
            np.zeros(n),
            np.ones(n),
        )


FAMILIES = [general, mpc, total_variation, portfolio, linear_program]
NAMES = "Q", "q", "A", "b", "G", "h", "lb", "ub"


def make_batch(problems):
    """Return the pattern, the operands as the engine takes them, and dense ones by name."""
    from qpdiff.engines.compiled.sparse import Csr, pattern_of

    by_name = {name: values for name, *values in zip(NAMES, *problems, strict=True) if values[0] is not None}
    operands, patterns, dense = dict.fromkeys(NAMES), {}, {}
    for name, values in by_name.items():
        if name in "QAG":
            matrices = [sp.csr_array(M) for M in values]
            for M in matrices:
                M.sum_duplicates()
                assert np.array_equal(M.indices, matrices[0].indices)
            patterns[name] = Csr(matrices[0].indptr, matrices[0].indices, matrices[0].shape)
            operands[name] = np.stack([M.data for M in matrices])
            dense[name] = np.stack([M.toarray() for M in matrices])
        else:
            operands[name] = dense[name] = np.stack(values)
    return pattern_of(*[patterns[name] for name in "QAG"]), operands, dense


def solve(pattern, operands, count=B, start=None, workers=1, max_iterations=200):
    from qpdiff.engines.compiled import sparse

    settings = _settings(DOUBLE, 1e-9, 0.0, max_iterations)
    done = sparse.solve(pattern, operands, count, settings, start, rounding=1e-10, workers=workers)
    return done if done is None else done[0]


def kkt_residual(d, x, v):
    """Return the largest violation of the KKT conditions, from their definition; bounds with no limit do not count."""
    n, p, m = len(x), len(d["b"]), len(d["h"])
    y, z, rest = v[:p], v[p : p + m], v[p + m :]
    stationarity, gap = d["Q"] @ x + d["q"] + d["A"].T @ y + d["G"].T @ z, x @ d["Q"] @ x + d["q"] @ x
    worst = [abs(d["A"] @ x - d["b"]), d["G"] @ x - d["h"], -z]
    # The bounds of a fixed variable are one equality, with a multiplier of any sign.
    free = d["lb"] != d["ub"] if {"lb", "ub"} <= d.keys() else np.ones(n, bool)
    gap += y @ d["b"] + z @ d["h"]
    for name, sign in (("lb", -1), ("ub", 1)):
        if name in d:
            of_bound, rest = rest[:n], rest[n:]
            finite = np.isfinite(d[name])
            stationarity += sign * of_bound
            gap += sign * of_bound[finite] @ d[name][finite]
            worst += [sign * (x - d[name]), -of_bound[free]]
            assert not of_bound[~finite].any()
    return max(abs(stationarity).max(), abs(gap), *[a.max(initial=0) for a in worst])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("workers", [1, 2])
def test_solutions(family, workers):
    pattern, operands, dense = make_batch(list(family(np.random.default_rng(1))))
    outcome = solve(pattern, operands, workers=workers)
    assert (outcome.status == qpdiff.Status.SOLVED).all()
    expected = qpdiff.solve_qp(**dense, tol=1e-9, rtol=0.0)
    assert_allclose(outcome.objective[:, 0], expected.objective, atol=1e-7)
    for b in range(B):
        assert kkt_residual({name: a[b] for name, a in dense.items()}, outcome.x[b], outcome.v[b]) < 1e-8
    if family is not linear_program:
        assert_allclose(outcome.x, expected.x, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_problem_and_many_agree(family):
    pattern, operands, _ = make_batch(list(family(np.random.default_rng(2))))
    outcome = solve(pattern, operands)
    for b in range(0, B, 5):
        alone = solve(pattern, {name: a if a is None else a[b : b + 1] for name, a in operands.items()}, 1)
        assert alone.status == outcome.status[b]
        assert_allclose(alone.objective[0], outcome.objective[b], atol=1e-8)


def test_shared_matrices():
    pattern, operands, _ = make_batch(list(mpc(np.random.default_rng(3))))
    shared = operands | {name: operands[name][:1] for name in "QAG"}
    repeated = operands | {name: np.repeat(operands[name][:1], B, 0) for name in "QAG"}
    assert_allclose(solve(pattern, shared).x, solve(pattern, repeated).x, atol=1e-12)


def test_warm_start():
    pattern, operands, _ = make_batch(list(mpc(np.random.default_rng(4))))
    cold = solve(pattern, operands)
    warm = solve(pattern, operands, start=StartingPoint(cold.x, cold.v, np.ones((B, 1), bool)))
    assert (warm.status == qpdiff.Status.SOLVED).all()
    assert warm.iterations.mean() < 0.5 * cold.iterations.mean()


def test_statuses():
    pattern, operands, _ = make_batch(list(general(np.random.default_rng(6))))
    operands["h"][3] = -1e3  # no point is that far below within the bounds and the equalities
    operands["h"][4, 4] = -1.0  # of a row without entries
    outcome = solve(pattern, operands)
    assert (outcome.status[3:5] == qpdiff.Status.PRIMAL_INFEASIBLE).all()
    assert (np.delete(outcome.status, [3, 4]) == qpdiff.Status.SOLVED).all()
    pattern, operands, _ = make_batch(list(linear_program(np.random.default_rng(6))))
    operands["lb"], operands["ub"] = None, None
    assert (solve(pattern, operands).status == qpdiff.Status.DUAL_INFEASIBLE).any()


def test_refuses_what_is_not_convex():
    pattern, operands, _ = make_batch(list(general(np.random.default_rng(7))))
    operands["Q"][6] *= -1
    assert solve(pattern, operands) is None


def test_patterns_are_remembered():
    first, _, _ = make_batch(list(mpc(np.random.default_rng(8))))
    second, _, _ = make_batch(list(mpc(np.random.default_rng(9))))
    assert first is second
    assert first.kkt.size >= len(first.K.indices)
