"""Problems with sparse matrices in the compiled engine: KKT conditions from the definition, and the dense engine."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
from numpy.testing import assert_allclose
from problems import DEGENERATE, INFEASIBLE, apply, infeasible
from scipy.sparse.linalg import splu
from sparse_problems import flows_on_a_grid

import qpdiff
from qpdiff.engines.base import Linearization, StartingPoint, _settings
from qpdiff.engines.choice import compiled_engine
from qpdiff.engines.parameters import DOUBLE
from qpdiff.problem import OPERANDS

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


def dynamics(move, push, steps):
    """Return the matrix of x_t − move x_{t−1} − push u_{t−1} = 0, for the variables u₀, x₁, u₁, x₂, ..."""
    now = np.kron(np.eye(steps), np.hstack([-push, np.eye(len(move))]))
    return now + np.kron(np.eye(steps, k=-1), np.hstack([np.zeros_like(push), -move]))


def mpc(rng, steps=8, states=4, inputs=2):
    """Linear dynamics as equalities, all variables bounded."""
    n = steps * (states + inputs)
    for _ in range(B):
        move = np.eye(states) + 0.1 * rng.normal(size=(states, states))
        A = dynamics(move, rng.normal(size=(states, inputs)), steps)
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


def pattern_of_csr(matrix):
    return qpdiff.Sparse.like(matrix, matrix.data).pattern


def make_batch(problems, full=True):
    """Return the pattern, the operands as the engine takes them, and with `full` dense ones by name."""
    from qpdiff.engines.compiled.sparse import pattern_of

    by_name = {name: values for name, *values in zip(NAMES, *problems, strict=True) if values[0] is not None}
    operands, patterns, dense = dict.fromkeys(NAMES), {}, {}
    for name, values in by_name.items():
        if name in "QAG":
            matrices = [sp.csr_array(M) for M in values]
            for M in matrices:
                M.sum_duplicates()
                assert np.array_equal(M.indices, matrices[0].indices)
            patterns[name] = pattern_of_csr(matrices[0])
            operands[name] = np.stack([M.data for M in matrices])
            dense[name] = np.stack([M.toarray() for M in matrices]) if full else None
        else:
            operands[name] = dense[name] = np.stack(values)
    return pattern_of(*[patterns[name] for name in "QAG"]), operands, dense


def solve(pattern, operands, count=B, start=None, workers=1, max_iterations=200, tol=1e-9, scaled=False):
    from qpdiff.engines.compiled import sparse

    settings = _settings(DOUBLE.tolerance, tol, 0.0, max_iterations)
    arrays = tuple(map(operands.get, OPERANDS))
    done = sparse.solve(pattern, arrays, count, settings, start, check=True, rounding=1e-10, workers=workers)
    return done if done is None or scaled else done[0]


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


def test_problems_with_and_without_curvature_share_a_lane_group():
    """Each takes the iterations that it takes alone: the cost is scaled in those without curvature."""
    problems = list(linear_program(np.random.default_rng(5)))
    n = len(problems[0][1])
    curvature = [sp.csr_array((np.full(n, b % 2.0), np.arange(n), np.arange(n + 1))) for b in range(B)]
    problems = [(Q, 1e3 * q, *rest) for Q, (_, q, *rest) in zip(curvature, problems, strict=True)]
    pattern, operands, _ = make_batch(problems)
    outcome = solve(pattern, operands)
    assert (outcome.status == qpdiff.Status.SOLVED).all()
    for b in range(B):
        alone = solve(pattern, {name: a if a is None else a[b : b + 1] for name, a in operands.items()}, 1)
        assert alone.iterations == outcome.iterations[b]
        assert_allclose(alone.objective[0], outcome.objective[b], rtol=1e-9)


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


@pytest.mark.parametrize("family", FAMILIES)
def test_warm_starts_in_lanes(family, monkeypatch):
    """As one by one, with starts for some, and with some that are far from everything, infeasible or of few steps."""
    from qpdiff.engines.compiled import sparse

    pattern, operands, _ = make_batch(list(family(np.random.default_rng(4))))
    cold = solve(pattern, operands)
    rng = np.random.default_rng(5)
    usable, x = rng.uniform(size=(B, 1)) < 0.7, cold.x + 0.01 * rng.normal(size=cold.x.shape)
    usable[[2, 5]], x[2], x[5] = True, 1e9, np.nan
    operands = operands | {"q": operands["q"] + 0.01 * rng.normal(size=operands["q"].shape)}
    if family is general:
        operands["h"] = operands["h"].copy()
        operands["h"][3] = -1e3  # no point is that far below
    start = StartingPoint(x, cold.v, usable)
    for limit in (0, 1, 5, 200):
        lanes = solve(pattern, operands, start=start, max_iterations=limit)
        with monkeypatch.context() as patch:
            patch.setattr(sparse, "LARGEST_LANES", 0)
            single = solve(pattern, operands, start=start, max_iterations=limit)
        np.testing.assert_array_equal(lanes.status, single.status)
        more = np.abs(lanes.iterations - single.iterations)
        assert more[2] <= 1  # rounding errors of 1e9 may decide
        assert not np.delete(more, 2).any()
        if limit == 5:
            assert_allclose(lanes.x, single.x, rtol=1e-5, atol=1e-5)
    assert (lanes.status == qpdiff.Status.SOLVED)[np.arange(B) != 3].all()


def test_warm_starts_in_lanes_with_prices(monkeypatch):
    from qpdiff.engines.compiled import sparse

    rng = np.random.default_rng(7)
    D = sp.diags_array([-np.ones(19), np.ones(19)], offsets=[0, 1], shape=(19, 20)).tocsr()
    d = {
        "Q": sp.eye_array(20).tocsr(),
        "G": D,
        "h": np.zeros(19),
        "lb": -1.0,
        "elastic": {"G": rng.uniform(0.1, 2, 19)},
    }
    q = rng.normal(size=(B, 20))
    cold = qpdiff.solve_qp(**d, q=q)
    lanes = qpdiff.solve_qp(**d, q=q + 0.01, warm_start=cold)
    monkeypatch.setattr(sparse, "LARGEST_LANES", 0)
    single = qpdiff.solve_qp(**d, q=q + 0.01, warm_start=cold)
    assert np.all(lanes.status == qpdiff.Status.SOLVED)
    assert lanes.iterations.sum() < cold.iterations.sum()
    np.testing.assert_array_equal(lanes.iterations, single.iterations)
    assert_allclose(lanes.x, single.x, atol=1e-6)


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


@pytest.mark.parametrize("change", INFEASIBLE, ids=lambda change: change.__name__)
@pytest.mark.parametrize("cost", ["pd", "lp"])
def test_infeasible_problems_have_certificates(change, cost):
    """V with Kᵀv = 0, z ≥ 0 and kᵀv = −1."""
    dense = infeasible(np.random.default_rng(1), change, cost, (12, 9, 3))
    outcome = solve(*with_pattern(dense), 25, tol=1e-8)
    proved = outcome.status[:, 0] == qpdiff.Status.PRIMAL_INFEASIBLE
    assert proved.mean() > 0.9
    unbounded = outcome.status[:, 0] == qpdiff.Status.DUAL_INFEASIBLE
    assert (outcome.status[~proved & ~unbounded] == qpdiff.Status.STALLED).all()
    for b in np.flatnonzero(unbounded):  # also: the cost falls along a ray that the constraints do not limit
        d, x = {name: a[b] for name, a in dense.items()}, outcome.x[b]
        assert d["q"] @ x == pytest.approx(-1.0)
        assert max(abs(d["Q"] @ x).max(), abs(d.get("A", d["Q"]) @ x).max(), (d["G"] @ x).max()) < 1e-6
    for b in np.flatnonzero(proved):
        d = {name: a[b] for name, a in dense.items()}
        n, p = len(d["q"]), len(d.get("b", ()))
        K, k = [d["G"]], [d["h"]]
        if p:
            K, k = [d["A"], *K], [d["b"], *k]
        for name, sign in (("lb", -1), ("ub", 1)):
            if name in d:
                K.append(sign * np.eye(n))
                k.append(sign * d[name])
        v = outcome.v[b]
        assert (v[p:] >= 0).all()
        assert_allclose(np.concatenate(k) @ v, -1, atol=1e-6)
        assert abs(np.concatenate(K).T @ v).max() < 1e-6


@pytest.mark.parametrize("count", [1, B])
def test_a_linear_program_in_other_units_is_not_unbounded(count):
    """Its cost is scaled to the size of its right-hand sides, which says nothing of the direction of a step."""
    problems = list(linear_program(np.random.default_rng(5)))[:count]
    pattern, operands, _ = make_batch(problems, full=False)
    objective = solve(pattern, operands, count, tol=None).objective
    for unit in 10.0 ** np.arange(-8, 9, 2):
        large = operands | {name: unit * operands[name] for name in ("h", "lb", "ub")}
        done = solve(pattern, large | {"q": operands["q"] / unit}, count, tol=None)
        assert (done.status == qpdiff.Status.SOLVED).all()
        assert_allclose(done.objective, objective, atol=1e-6)


def plants(rng, count, steps=15, states=6, inputs=2):
    """Yield optimal control as `mpc` has it: of a stable plant with a target, and of an unstable one without, in turn.

    The multipliers of the ordinary start are large for most; the start for a smaller cost is closer for some.
    """
    limit = np.tile(np.repeat([3.0, 40.0], [inputs, states]), steps)
    limit[6 :: states + inputs] = np.inf
    Q = sp.diags_array(np.tile(np.repeat([0.1, 1.0], [inputs, states]), steps))
    for i in range(count):
        move = np.eye(states) + 0.1 * rng.normal(size=(states, states)) / np.sqrt(states)
        move *= (0.95, 1.25)[i % 2] / np.abs(np.linalg.eigvals(move)).max()
        A = dynamics(move, rng.normal(size=(states, inputs)) / np.sqrt(states), steps)
        b = np.zeros(steps * states)
        b[:states] = move @ rng.uniform(-1, 1, states)
        q = np.tile(np.r_[np.zeros(inputs), -0.5 * rng.normal(size=states)], steps) * (1 - i % 2)
        yield Q, q, sp.csr_array(A), b, sp.csr_array((0, len(q))), np.zeros(0), -limit, limit


def test_starts_of_a_lane_group_are_those_of_its_problems():
    """Where the start for a smaller cost is closer for one problem, the others take the ordinary one again."""
    pattern, operands, _ = make_batch(list(plants(np.random.default_rng(0), 24)), full=False)
    together = solve(pattern, operands, 24)
    assert (together.status == qpdiff.Status.SOLVED).all()
    for b in range(24):
        alone = solve(pattern, {name: a if a is None else a[b : b + 1] for name, a in operands.items()}, 1)
        assert abs(int(alone.iterations[0, 0]) - int(together.iterations[b, 0])) <= 1
        assert_allclose(alone.x[0], together.x[b], atol=1e-5 * abs(alone.x).max())


def test_large_multipliers_do_not_look_like_an_unbounded_cost():
    """A start for a fraction of the cost takes the place of the ordinary one."""
    Q, q, A, b = flows_on_a_grid(100)
    none = sp.csr_array((0, A.shape[1])), np.zeros(0)
    pattern, operands, _ = make_batch([(Q, q, A, b, *none, None, None)], full=False)
    outcome = solve(pattern, operands, 1, tol=1e-6)
    assert outcome.status == qpdiff.Status.SOLVED
    assert abs(A @ outcome.x[0] - b).max() < 1e-8
    assert abs(Q @ outcome.x[0] + q + A.T @ outcome.v[0]).max() < 1e-6


def test_large_multipliers_do_not_look_like_an_unbounded_cost_when_dense():
    Q, q, A, b = flows_on_a_grid(40)
    sol = qpdiff.solve_qp(Q.toarray(), q, A=A.toarray(), b=b, check=False)
    assert sol.status == qpdiff.Status.SOLVED
    assert_allclose(A @ sol.x, b, atol=1e-8)
    assert_allclose(Q @ sol.x + q + A.T @ sol.y, 0.0, atol=1e-6)


def test_gap_of_many_terms():
    """Thousands of terms that cancel do not hide that the gap is within the tolerance."""
    n = 20_000
    rng = np.random.default_rng(18)
    none = sp.csr_array((0, n)), np.zeros(0)
    Q, q = sp.diags_array(rng.uniform(1, 2, n)), 1e3 * rng.normal(size=n)
    pattern, operands, _ = make_batch([(Q, q, *none, *none, np.full(n, -1.0), np.full(n, 1.0))], full=False)
    assert solve(pattern, operands, 1).status == qpdiff.Status.SOLVED


def test_multipliers_without_a_limit():
    """Third differences that are bounded below, of a sequence that is not: the multipliers grow by r/δ a step."""
    n = 2000
    D = sp.diags_array([-1.0, 3.0, -3.0, 1.0], offsets=range(4), shape=(n - 3, n)).tocsr()
    point = np.linspace(0, 1, n)
    target = point**3 - point**2 + 0.1 * np.sin(7 * np.arange(n))
    none = sp.csr_array((0, n)), np.zeros(0)
    pattern, operands, _ = make_batch([(sp.eye_array(n), -target, *none, -D, np.zeros(n - 3), None, None)], full=False)
    assert solve(pattern, operands, 1, tol=1e-6).status == qpdiff.Status.SOLVED


def test_refuses_what_is_not_convex():
    pattern, operands, _ = make_batch(list(general(np.random.default_rng(7))))
    operands["Q"][6] *= -1
    assert solve(pattern, operands) is None


@pytest.mark.parametrize("name", ["Q", "q", "A", "b", "G", "h", "lb", "ub"])
@pytest.mark.parametrize("count", [B, 1])
def test_refuses_what_is_not_valid(name, count):
    """NaN anywhere, an asymmetric Q, infinite limits of the wrong sign, crossed bounds; of one problem or of all."""
    pattern, operands, _ = make_batch(list(general(np.random.default_rng(7))))
    operands = {key: a[:count] for key, a in operands.items()}
    assert solve(pattern, operands, count) is not None

    def refused(b, entry, value):
        changed = operands | {name: operands[name].copy()}
        changed[name][b, entry] = value
        shared = changed | {name: changed[name][b : b + 1]}
        return solve(pattern, changed, count) is None and solve(pattern, shared, count) is None

    entry = int(np.flatnonzero(pattern.Q.indices != np.repeat(np.arange(30), np.diff(pattern.Q.indptr)))[0])
    wrong = {"Q": operands["Q"][-1, entry] + 1e-6, "lb": np.inf, "ub": -np.inf, "h": -np.inf}.get(name, -np.inf)
    assert refused(count - 1, entry if name == "Q" else 2, wrong)
    assert refused(count - 1, entry if name == "Q" else 2, np.nan)
    if name in ("lb", "ub"):
        assert refused(count - 1, 2, operands["ub"][-1, 2] + 1 if name == "lb" else operands["lb"][-1, 2] - 1)


def test_patterns_are_remembered():
    first, _, _ = make_batch(list(mpc(np.random.default_rng(8))))
    second, _, _ = make_batch(list(mpc(np.random.default_rng(9))))
    assert first is second
    assert first.kkt.size >= len(first.K.indices)


# ---- the derivative


def linearize(pattern, operands, count=B, **options):
    """Solve a batch; return its linearization, with the operands as sparse matrices and vectors."""
    from qpdiff.engines.compiled.sparse import Factors, operands_of

    outcome, scaling = solve(pattern, operands, count, scaled=True, **options)
    of = {name: qpdiff.Sparse.of_pattern(operands[name], getattr(pattern, name)) for name in "QAG"}
    workers = SimpleNamespace(workers=options.get("workers", 1))
    bounded = operands["lb"] is not None and operands["ub"] is not None
    fixed = operands["lb"] == operands["ub"] if bounded else None
    problem = SimpleNamespace(operands=operands | of, backend=workers, is_elastic=False, fixed=fixed)
    factors = Factors(pattern, scaling, operands_of(problem))
    return Linearization(problem, factors, outcome.x, outcome.v, outcome.s, outcome.status)


def right_hand_sides(lin, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=lin.x.shape), rng.normal(size=lin.v.shape)


def kkt_solution(d, x, v, s, r_x, r_v):
    """Solve the KKT system at a solution as a dense one, each constraint with a large θ divided by its root."""
    n, p = len(x), len(d["b"])
    rows, k = [d["A"], d["G"]], [np.zeros(p), d["h"]]
    equality = [np.ones(p, bool), np.zeros(len(d["h"]), bool)]
    fixed = d["lb"] == d["ub"] if {"lb", "ub"} <= d.keys() else np.zeros(n, bool)
    for name, sign in (("lb", -1), ("ub", 1)):
        if name in d:
            rows.append(sign * np.eye(n))
            k.append(np.where(fixed, np.inf if name == "ub" else 0.0, sign * d[name]))
            equality.append(fixed & (name == "lb"))
    K, k, equality = map(np.concatenate, (rows, k, equality))
    exists = equality | np.isfinite(k)
    s, v_of = s[exists], np.where(equality, 1.0, v)[exists]
    theta = np.where(equality[exists], 0.0, s / v_of)
    scale = 1 / np.sqrt(1 + theta)
    scaled = scale[:, None] * K[exists]
    matrix = np.block([[d["Q"], scaled.T], [scaled, -np.diag(theta * scale**2)]])
    u = np.linalg.solve(matrix, np.r_[r_x, scale * r_v[exists]])
    u_v = np.zeros(len(v))
    u_v[exists] = scale * u[n:]
    return u[:n], u_v


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("workers", [1, 2])
def test_derivative(family, workers):
    """The solution of the KKT system, and the gradients that adjoint.py defines, on the entries of the patterns."""
    pattern, operands, dense = make_batch(list(family(np.random.default_rng(11))))
    n, given = pattern.Q.shape[0], [name for name in NAMES if operands[name] is not None]
    lin = linearize(pattern, operands, workers=workers)
    assert (lin.status == qpdiff.Status.SOLVED).all()
    r_x, r_v = right_hand_sides(lin)
    u_x, u_v, gradients = lin.factors.solve(lin, r_x, r_v, np.nan, given)
    assert list(gradients) == given
    p, linear = pattern.A.shape[0], pattern.K.shape[0]
    expected = {"q": -u_x, "b": u_v[:, :p], "h": u_v[:, p:linear]}
    if "lb" in given:
        expected["lb"] = -u_v[:, linear : linear + n]
    if "ub" in given:  # one of lb = ub holds a variable against the cost
        fixed = operands["lb"] == operands["ub"]
        at_upper = fixed & (lin.v[:, linear : linear + n] < 0)
        assert not fixed.any() or (at_upper.any() and (fixed & ~at_upper).any())
        of_ub = np.where(fixed, 0.0, u_v[:, linear + n :])
        expected["ub"] = np.where(at_upper, expected["lb"], of_ub)
        expected["lb"] = np.where(at_upper, 0.0, expected["lb"])
    for name, value in expected.items():
        assert np.array_equal(gradients[name], value)
    for b in range(B):
        d = {name: a[b] for name, a in dense.items()}
        expected = kkt_solution(d, lin.x[b], lin.v[b], lin.s[b], r_x[b], r_v[b])
        for found, value in zip((u_x[b], u_v[b]), expected, strict=True):
            assert_allclose(found, value, atol=1e-6 * max(1, abs(value).max()))
        K = -np.outer(lin.v[b], u_x[b]) - np.outer(u_v[b], lin.x[b])
        Q = -np.outer(u_x[b], lin.x[b]) / 2
        for name, full in (("Q", Q + Q.T), ("A", K[:p]), ("G", K[p:linear])):
            csr = getattr(pattern, name)
            rows = np.repeat(np.arange(csr.shape[0]), np.diff(csr.indptr))
            assert_allclose(gradients[name][b], full[rows, csr.indices], rtol=1e-12, atol=1e-12)


def test_derivative_is_that_of_the_solution():
    """Against differences of x along changes of all operands, on the patterns and symmetric in Q."""
    pattern, operands, _ = make_batch(list(general(np.random.default_rng(12))))
    operands["lb"], operands["ub"] = (
        np.where(np.isfinite(operands[n]), operands[n], s) for n, s in (("lb", -9), ("ub", 9))
    )
    operands["lb"][:, 5] -= 1.0  # of a fixed variable
    rng, step = np.random.default_rng(0), 1e-6
    transposed = sp.csr_array((np.arange(len(pattern.Q.indices)), pattern.Q.indices, pattern.Q.indptr), pattern.Q.shape)
    transposed = transposed.T.tocsr().data
    changes = {name: rng.normal(size=a.shape) for name, a in operands.items()}
    changes["Q"] = changes["Q"] + changes["Q"][:, transposed]
    moved = [
        solve(pattern, {name: a + sign * step * changes[name] for name, a in operands.items()}, tol=1e-12)
        for sign in (-1, 1)
    ]
    lin = linearize(pattern, operands, tol=1e-12)
    x_bar = rng.normal(size=lin.x.shape)
    gradients = lin.factors.solve(lin, x_bar, np.zeros_like(lin.v), np.nan, NAMES)[2]
    found = sum((gradients[name] * changes[name]).sum(-1) for name in operands)
    expected = (x_bar * (moved[1].x - moved[0].x)).sum(-1) / (2 * step)
    assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def with_pattern(dense):
    """Return the pattern of the entries of dense operands that are not 0 in the whole batch, and sparse operands."""
    from qpdiff.engines.compiled.sparse import pattern_of

    n = dense["q"].shape[1]
    empty = {name: np.zeros((1, 0, n)) for name in "AG"} | {name: np.zeros((1, 0)) for name in "bh"}
    operands, patterns = dict.fromkeys(NAMES) | empty | dense, {}
    for name in "QAG":
        full = operands[name]
        pattern = sp.csr_array((full != 0).any(0))
        patterns[name] = pattern_of_csr(pattern)
        rows = np.repeat(np.arange(len(pattern.indptr) - 1), np.diff(pattern.indptr))
        operands[name] = np.ascontiguousarray(full[:, rows, pattern.indices])
    return pattern_of(*[patterns[name] for name in "QAG"]), operands


UNIQUE = [kind for kind in DEGENERATE if kind.__name__ != "optimal_face"]


@pytest.mark.parametrize("kind", UNIQUE, ids=lambda kind: kind.__name__)
def test_degenerate_derivatives(kind):
    """They are the dense engine's at the same point, for cotangents of x, or of the sums of duplicated variables."""
    from qpdiff.engines.compiled import engine

    degenerate = kind(np.random.default_rng(1), (40,), 6)
    dense = degenerate.operands
    lin = linearize(*with_pattern(dense), 40)
    assert (lin.status == qpdiff.Status.SOLVED).all()
    problem = qpdiff.solve_qp(**dense, engine="compiled").linearization.problem
    duplicated = "duplicated" in kind.__name__
    r_x = np.ones_like(lin.x) if duplicated else right_hand_sides(lin)[0]
    found = lin.factors.solve(lin, r_x, np.zeros_like(lin.v), np.nan, ())
    other = lin._replace(problem=problem, factors=engine.without_factor(problem, lin.factors.equilibration))
    expected = other.factors.solve(other, r_x, np.zeros_like(lin.v), np.nan, ())
    # How dependent constraints share differs a little, and how duplicated variables do.
    for a, b, share in zip(found[:2], expected[:2], (0.0, 0.1), strict=True):
        if duplicated and a is found[0]:
            a, b = apply(degenerate.back, a), apply(degenerate.back, b)
        size = abs(b).max(-1, keepdims=True) + 1
        assert_allclose(a / size, b / size, atol=max(1e-6, share * (not duplicated)))


@pytest.mark.parametrize("count", [1, 40])
def test_derivatives_where_x_is_not_unique_are_finite(count):
    """What is left of the pivots of variables without curvature is the rounding error of an equality's elimination."""
    rng = np.random.default_rng(19)
    for _ in range(400 // count):
        F = rng.choice([-1.0, 0.0, 0.0, 1.0], size=(count, 10, 20))
        A, x = rng.normal(size=(count, 1, 20)), rng.normal(size=(count, 20))
        Q = F.mT @ F
        dense = {"Q": Q, "q": -apply(Q, x), "A": A, "b": apply(A, x)}
        dense |= {"lb": x - rng.uniform(0.1, 1.0, size=x.shape), "ub": x + rng.uniform(0.1, 1.0, size=x.shape)}
        lin = linearize(*with_pattern(dense), count)
        assert (lin.status == qpdiff.Status.SOLVED).all()
        for value in lin.factors.solve(lin, np.ones_like(lin.x), np.zeros_like(lin.v), np.nan, ())[:2]:
            assert abs(value).max() < 1e16


@pytest.mark.parametrize("shared", ["QAG", ["b", "lb", "ub"], ["q", "lb"], ["h"]], ids=str)
def test_gradients_of_shared_operands_are_sums(shared):
    pattern, operands, _ = make_batch(list(mpc(np.random.default_rng(13))))
    repeated = operands | {name: np.repeat(operands[name][:1], B, 0) for name in shared}
    lin, other = (
        linearize(pattern, operands | {name: operands[name][:1] for name in shared}),
        linearize(pattern, repeated),
    )
    right = right_hand_sides(lin)
    sums, each = (which.factors.solve(which, *right, np.nan, shared)[2] for which in (lin, other))
    for name in shared:
        assert sums[name].shape == (1, each[name].shape[1])
        assert_allclose(sums[name][0], each[name].sum(0), rtol=1e-7, atol=1e-7)


def test_sums_do_not_depend_on_the_number_of_threads():
    """Of a batch so large that threads are started for the sums of the gradients too."""
    pattern, operands, _ = make_batch(list(mpc(np.random.default_rng(13))))
    times = 1 + 2**17 // (B * len(pattern.K.indices))
    operands = {name: a if a is None else np.tile(a, (times, 1)) for name, a in operands.items()}
    operands |= {name: operands[name][:1] for name in "QAG"}
    lin = linearize(pattern, operands, B * times)
    right = right_hand_sides(lin)
    alone = lin.factors.solve(lin, *right, np.nan, ("Q", "A", "G"))[2]
    lin.problem.backend.workers = 3
    for name, value in lin.factors.solve(lin, *right, np.nan, ("Q", "A", "G"))[2].items():
        assert np.array_equal(value, alone[name])


@pytest.mark.parametrize("fill", [np.nan, 0.0])
def test_unsolved_problems_are_filled(fill):
    pattern, operands, _ = make_batch(list(general(np.random.default_rng(6))))
    operands["h"][3] = -1e3
    lin = linearize(pattern, operands)
    assert lin.status[3] == qpdiff.Status.PRIMAL_INFEASIBLE
    u_x, u_v, gradients = lin.factors.solve(lin, *right_hand_sides(lin), fill, ("Q", "A", "G", "q", "b", "h"))
    for value in (u_x, u_v, *gradients.values()):
        assert np.array_equal(value[3], np.full_like(value[3], fill), equal_nan=True)
        assert np.isfinite(np.delete(value, 3, 0)).all()


def test_one_derivative_and_many_agree():
    pattern, operands, _ = make_batch(list(general(np.random.default_rng(14))))
    lin = linearize(pattern, operands)
    right = right_hand_sides(lin)
    together = lin.factors.solve(lin, *right, np.nan, ("G",))
    for b in range(0, B, 4):
        one = {name: a if a is None else a[b : b + 1] for name, a in operands.items()}
        alone = linearize(pattern, one, 1)
        at = alone._replace(x=lin.x[b : b + 1], v=lin.v[b : b + 1], s=lin.s[b : b + 1])
        at = at._replace(factors=at.factors._replace(equilibration=lin.factors.equilibration[b : b + 1]))
        found = at.factors.solve(at, *(r[b : b + 1] for r in right), np.nan, ("G",))
        for a, expected in zip((*found[:2], found[2]["G"]), (*together[:2], together[2]["G"]), strict=True):
            assert_allclose(a[0], expected[b], rtol=1e-6, atol=1e-6)


def test_factors_can_be_pickled():
    pattern, operands, _ = make_batch(list(mpc(np.random.default_rng(15))))
    factors = linearize(pattern, operands).factors
    again = pickle.loads(pickle.dumps(factors))
    assert again.pattern is factors.pattern
    assert np.array_equal(again.scaling(None), factors.scaling(None))


# ---- patterns and workspaces


def test_reused_workspaces_leave_no_trace():
    """Calls for one problem after another of other patterns and shapes give the same bits as the first ones."""
    batches = [make_batch(list(family(np.random.default_rng(16)))) for family in FAMILIES]
    without_bounds = batches[0][1] | {"lb": None, "ub": None}
    calls = [(pattern, operands) for pattern, operands, _ in batches] + [(batches[0][0], without_bounds)]
    ones = [(pattern, {name: a if a is None else a[:1] for name, a in operands.items()}) for pattern, operands in calls]
    first = [solve(*one, 1) for one in ones]
    for one, expected in zip(ones[::-1], first[::-1], strict=True):
        for _ in range(2):
            assert np.array_equal(solve(*one, 1).x, expected.x)


@pytest.mark.parametrize("family", FAMILIES)
def test_order_has_few_entries_in_the_factor(family):
    """As few as SuperLU's minimum degree, but for a tenth."""
    pattern, _, _ = make_batch(list(family(np.random.default_rng(17))))
    n, rows = pattern.Q.shape[0], pattern.K.shape[0]
    Q, K = (sp.csr_array((np.ones(len(M.indices)), M.indices, M.indptr), M.shape) for M in (pattern.Q, pattern.K))
    matrix = sp.csc_array(sp.block_array([[Q, K.T], [K, None]]) + 1e4 * sp.eye_array(n + rows))
    options = {"permc_spec": "MMD_AT_PLUS_A", "diag_pivot_thresh": 0.0, "options": {"SymmetricMode": True}}
    expected = splu(matrix, **options).L.nnz - (n + rows)
    assert pattern.kkt.size <= 1.1 * expected


def test_a_pattern_that_fills_up_does_not_pay():
    from qpdiff.engines.compiled.sparse import pattern_of

    def pattern(Q):
        Q = sp.csr_array(Q)
        return pattern_of(*map(pattern_of_csr, (Q, *[sp.csr_array((0, Q.shape[1]))] * 2)))

    band = sp.diags_array([1.0, 1.0, 1.0], offsets=[-1, 0, 1], shape=(300, 300))
    for bounded in (False, True):
        assert pattern(band).pays(bounded, 32)
        assert not pattern(np.ones((300, 300))).pays(bounded, 32)
    filled = pattern(np.ones((50, 50)))
    assert [filled.pays(True, count) for count in (1, 32)] == [True, False]  # the calls take longer than the solve


def test_what_pays_depends_on_the_form_of_the_dense_engine():
    """60 rows full of entries: dense, they are all that is left of 200 variables where Q has its diagonal alone."""
    from qpdiff.engines.compiled.sparse import pattern_of

    rng, n = np.random.default_rng(0), 200
    none = sp.csr_array((0, n))

    def pays(Q, G):
        pattern = pattern_of(*[pattern_of_csr(sp.csr_array(M)) for M in (Q, none, G)])
        return pattern.pays(False, 32), pattern.pays(True, 32)

    half, eye = rng.uniform(size=(60, n)) < 0.9, np.eye(n)
    assert pays(eye, half) == (False, False)
    assert pays(np.where(np.arange(n) < n - 1, eye, 0.0), half) == (True, True)  # the last variable has no curvature
    assert pays(eye + np.eye(n, k=1) + np.eye(n, k=-1), half) == (False, True)  # bounds and a Q that is not diagonal


def test_a_lane_group_has_one_thread():
    from qpdiff.engines.compiled.sparse import _core

    pattern, *_ = make_batch(list(mpc(np.random.default_rng(16))))
    lanes = _core.LANES
    found = [pattern.workers(4, count, True, 1e9, 4) for count in (1, lanes, lanes + 1, 3 * lanes, 9 * lanes)]
    assert found == [1, 1, 2, 3, 4]
    assert [pattern.workers(4, count, False, 1e9, 4) for count in (1, 2, lanes)] == [1, 2, min(lanes, 4)]


def test_analyses_are_forgotten_by_number_and_size(monkeypatch):
    from qpdiff.engines.compiled import sparse

    def key(n):
        none = pattern_of_csr(sp.csr_array((0, n)))
        return pattern_of_csr(sp.csr_array(np.ones((n, n)))), none, none

    def remembered(n):
        return sparse._remembered.get(key(n)) is not None

    monkeypatch.setattr(sparse, "_remembered", {})
    monkeypatch.setattr(sparse, "LARGEST_REMEMBERED", 1000)
    for n in range(2, 2 + sparse.MOST_REMEMBERED):
        assert sparse.pattern_of(*key(n)) is sparse.pattern_of(*key(n))
    sparse.pattern_of(*key(2))  # used last
    sparse.pattern_of(*key(40))
    assert [n for n in (2, 3, 4, 40) if remembered(n)] == [2, 4, 40]
    assert sparse.pattern_of(*key(40)).size == 780  # n(n − 1)/2 entries of L
    assert remembered(2)
    assert sparse.pattern_of(*key(30)).size == 435
    assert [n for n in (2, 40, 30) if remembered(n)] == [30]
    assert sparse.pattern_of(*key(60)).size == 1770  # more than the limit by itself
    assert [n for n in (30, 60) if remembered(n)] == [60]


def test_problems_of_torch_move_once_to_the_host(monkeypatch):
    torch = pytest.importorskip("torch")
    from qpdiff.backend.torch import TorchBackend

    moved, to_host = [], TorchBackend.to_host
    monkeypatch.setattr(TorchBackend, "to_host", lambda self, array: moved.append(array.shape) or to_host(self, array))
    Q = qpdiff.Sparse(torch.ones(7, dtype=torch.float64), np.arange(7), np.arange(8), (7, 7))
    sol = qpdiff.solve_qp(Q, torch.ones((5, 7), dtype=torch.float64))
    assert_allclose(sol.x, -1.0, atol=1e-7)
    assert moved.count((1, 7)) == 1  # the entries of Q
