"""Sparse problems: solutions, derivatives on the pattern against those of dense ones and central differences."""

import pickle
from contextlib import nullcontext

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from problems import kkt_residuals
from sparse_problems import as_sparse, random_sparse, smooth_sparse

import qpdiff
from qpdiff import Sparse, Status
from qpdiff.engines.choice import compiled_engine, explain_choice
from qpdiff.sparse import stored, with_array

OUTPUTS = ("x", "y", "z", "z_lb", "z_ub")
TIGHT = {"tol": 1e-11, "rtol": 1e-13}
PARTS = ["", "A", "G", "lb ub", "G A lb", "G A lb ub"]
ROUTES = ["sparse", "dense", "array"]


@pytest.fixture(params=ROUTES, autouse=True)
def route(request, monkeypatch):
    """Sparse problems in the engine for them, made dense for the compiled engine, or for the array engine."""
    if request.param == "array":
        monkeypatch.setattr("qpdiff.engines.choice.compiled_engine", lambda: (None, "this is a test"))
    elif compiled_engine()[0] is None:
        pytest.skip("the compiled engine was not built")
    else:
        suits = request.param == "sparse"
        monkeypatch.setattr("qpdiff.engines.compiled.sparse_engine.suits", lambda problem: suits)
    return request.param


def sparsely(operands, masks, names="QAG"):
    return {name: as_sparse(a, masks[name]) if name in masks and name in names else a for name, a in operands.items()}


def solved(operands, **options):
    sol = qpdiff.solve_qp(**operands, **(TIGHT | options))
    assert np.all(sol.status == Status.SOLVED)
    return sol


def entries(value, mask):
    return value[..., *np.nonzero(mask)]


def complementary(sol):
    v, s = sol.linearization.v, sol.linearization.s
    inequality = np.broadcast_to(sol.linearization.problem.inequality, v.shape)
    return np.all((np.maximum(v, s) > 1e-3) | ~inequality)


def cases(seed, count=4, **options):
    """Problems whose solutions are differentiable, dense, with their patterns and what to differentiate along."""
    rng = np.random.default_rng(seed)
    found = 0
    while found < count:
        operands, masks = random_sparse(rng, **options)
        sol = solved(operands)
        if complementary(sol):
            found += 1
            yield rng, operands, masks, sol, {name: rng.normal(size=getattr(sol, name).shape) for name in OUTPUTS}


def check_gradients(gradients, expected, operands, masks, names, atol=1e-6):
    for name in operands:
        ours, dense = getattr(gradients, name), getattr(expected, name)
        scale = max(1.0, np.abs(dense).max())
        if name in masks and name in names:
            assert isinstance(ours, Sparse)
            assert ours.shape == dense.shape
            assert_allclose(ours.values, entries(dense, masks[name]), atol=atol * scale)
        else:
            assert_allclose(ours, dense, atol=atol * scale)


@pytest.mark.parametrize("parts", PARTS)
def test_kkt_conditions(parts):
    rng = np.random.default_rng(len(parts))
    for batch in ((), (1,), (3,), (2, 9)):
        operands, masks = random_sparse(rng, parts, batch=batch, n=9, m=6, p=3)
        sol = solved(sparsely(operands, masks))
        assert sol.x.shape == (*batch, 9)
        point = (getattr(sol, name) for name in OUTPUTS)
        assert max(kkt_residuals(operands, *point)) < 1e-8
        assert_allclose(sol.x, solved(operands).x, atol=1e-6)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("shared", [(), ("Q",), ("Q", "G", "A"), ("q",)], ids=lambda s: "shared-" + "".join(s))
def test_vjp_equals_that_of_the_dense_problem(parts, shared):
    for _, operands, masks, dense, cotangents in cases(len(shared), parts=parts, shared=shared, batch=(9,), n=8):
        for names in ("QAG", "Q", "A", "G"):
            if not set(names) & set(masks):
                continue
            given = sparsely(operands, masks, names)
            gradients = qpdiff.vjp(solved(given), **cotangents)
            check_gradients(gradients, qpdiff.vjp(dense, **cotangents), operands, masks, names)
            for name in set(masks) & set(names):
                assert getattr(gradients, name).indices is given[name].indices
            if "Q" in names:
                assert_array_equal(gradients.Q.values, gradients.Q.values[..., gradients.Q.pattern.mirror])


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_jvp_equals_that_of_the_dense_problem(parts, batch):
    for rng, operands, masks, dense, cotangents in cases(1, 2, parts=parts, batch=batch, n=8):
        tangents = {name: rng.normal(size=a.shape) for name, a in operands.items()}
        for name, mask in masks.items():
            tangents[name] = np.where(mask, tangents[name], 0.0)
        sol = solved(sparsely(operands, masks))
        pushed, expected = qpdiff.jvp(sol, **sparsely(tangents, masks)), qpdiff.jvp(dense, **tangents)
        by_values = {name: entries(a, masks[name]) if name in masks else a for name, a in tangents.items()}
        again = qpdiff.jvp(sol, **by_values)
        for name in OUTPUTS:
            value = getattr(expected, name)
            assert_allclose(getattr(pushed, name), value, atol=1e-6 * max(1.0, np.abs(value).max(initial=0)))
            assert_array_equal(getattr(pushed, name), getattr(again, name))
        gradients = qpdiff.vjp(sol, **cotangents)
        pulled = sum(np.sum(getattr(gradients, name) * a) for name, a in by_values.items() if name not in masks)
        pulled += sum(np.sum(getattr(gradients, name).values * by_values[name]) for name in masks)
        pairs = [(cotangents[name], getattr(pushed, name)) for name in OUTPUTS]
        size = sum(np.linalg.norm(a) * np.linalg.norm(b) for a, b in pairs)
        assert abs(pulled - sum(np.sum(a * b) for a, b in pairs)) < 1e-7 * size


@pytest.mark.parametrize("shared", [(), ("Q", "G", "A")], ids=lambda s: "shared-" + "".join(s))
def test_vjp_against_central_differences(shared):
    for rng, operands, masks, _, cotangents in cases(2, parts="G A lb ub", shared=shared, batch=(3,), n=8):
        sol = solved(sparsely(operands, masks))
        gradients, step = qpdiff.vjp(sol, **cotangents), 1e-5
        for name in operands:
            tangent = rng.normal(size=operands[name].shape)
            if name in masks:
                tangent = np.where(masks[name], tangent, 0.0)
                tangent = (tangent + tangent.mT) / 2 if name == "Q" else tangent
            moved = [
                solved(sparsely(operands | {name: operands[name] + sign * step * tangent}, masks)) for sign in (1, -1)
            ]
            differences = {key: (getattr(moved[0], key) - getattr(moved[1], key)) / (2 * step) for key in OUTPUTS}
            expected = sum(np.sum(cotangents[key] * differences[key]) for key in OUTPUTS)
            size = sum(np.linalg.norm(cotangents[key]) * np.linalg.norm(differences[key]) for key in OUTPUTS)
            gradient = getattr(gradients, name)
            if name in masks:
                gradient, tangent = gradient.values, entries(tangent, masks[name])
            assert abs(np.sum(gradient * tangent) - expected) <= 1e-6 * size


def equalities_beside_little_curvature(seed):
    """A singular Q with a few entries and equalities: in the scaled problem, those outweigh the curvature that is left.

    Also the matrix of the KKT system, which is well-conditioned; None where it is not.
    """
    rng = np.random.default_rng(seed)
    n = int(rng.integers(4, 40))
    p = int(rng.integers(n // 3, n + 1))
    factor = rng.normal(size=(n - 1, n)) * (rng.random((n - 1, n)) < rng.choice([0.1, 0.3]))
    A = rng.normal(size=(p, n)) * (rng.random((p, n)) < 0.3)
    operands = {"Q": factor.T @ factor, "q": rng.normal(size=n), "A": A, "b": rng.normal(size=p)}
    operands["Q"] = (operands["Q"] + operands["Q"].T) / 2
    kkt = np.block([[operands["Q"], A.T], [A, np.zeros((p, p))]])
    well_posed = np.linalg.svd(A, compute_uv=False)[-1] > 0.1 and np.linalg.cond(kkt) < 1e4
    return operands, kkt if well_posed else None


def test_equalities_beside_little_curvature():
    """The seeds above 40 are those of gradients that were wrong, by up to eight times their size."""
    for seed in (*range(40), 76, 1102, 1361, 1856, 2728, 3208, 3298, 4568, 6119):
        operands, kkt = equalities_beside_little_curvature(seed)
        if kkt is None:
            continue
        n, masks = len(operands["q"]), {name: operands[name] != 0 for name in "QA"}
        cotangent = np.random.default_rng(1).normal(size=n)
        right = np.concat([cotangent, np.zeros(len(operands["b"]))])
        of_q, of_b = np.split(np.linalg.solve(kkt, right) * np.where(np.arange(len(right)) < n, -1, 1), [n])
        for q in (operands["q"], np.tile(operands["q"], (9, 1))):  # one problem, and several in lanes
            sol = qpdiff.solve_qp(**sparsely(operands | {"q": q}, masks))
            gradients = qpdiff.vjp(sol, x=cotangent)
            for found, expected in ((gradients.q, of_q), (gradients.b / (q.size // n), of_b)):
                error = np.abs(found - expected).max()
                assert error <= 1e-6 * max(np.abs(expected).max(), 0.01)


def rank_deficient(seed):
    """A strictly complementary problem whose Q is singular, in any units, and the matrix of its active constraints."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(4, 60))
    p, m, rank = int(rng.integers(1, n // 2 + 1)), int(rng.integers(1, n + 10)), int(rng.integers(1, n + 1))
    factor = rng.normal(size=(rank, n)) * (rng.random((rank, n)) < rng.choice([0.1, 0.3, 1.0]))
    Q = 10.0 ** rng.integers(-3, 4) * (factor.T @ factor)
    A, G = (rng.normal(size=(rows, n)) * (rng.random((rows, n)) < 0.3) for rows in (p, m))
    x, y = rng.normal(size=n), rng.normal(size=p)
    slack, over = (rng.choice([0, 1], size=k, p=[a, 1 - a]) * rng.uniform(0.1, 1, k) for k, a in ((m, 0.5), (n, 0.2)))
    z, z_lb = (np.where(s == 0, rng.uniform(0.1, 1, len(s)), 0.0) for s in (slack, over))
    Q = (Q + Q.T) / 2
    operands = {"Q": Q, "q": z_lb - Q @ x - A.T @ y - G.T @ z, "A": A, "b": A @ x, "G": G, "h": G @ x + slack}
    return operands | {"lb": x - over}, np.concat([A, G[slack == 0], -np.eye(n)[over == 0]])


def test_rank_deficient_costs_in_any_units():
    tested = 0
    for seed in range(150):
        operands, active = rank_deficient(seed)
        n = len(operands["q"])
        kkt = np.block([[operands["Q"], active.T], [active, np.zeros((len(active),) * 2)]])
        if len(active) > n or np.linalg.svd(active, compute_uv=False)[-1] < 0.05 or np.linalg.cond(kkt) > 1e5:
            continue
        tested += 1
        cotangent = np.random.default_rng(1).normal(size=n)
        expected = -np.linalg.solve(kkt, np.concat([cotangent, np.zeros(len(active))]))[:n]
        masks = {name: operands[name] != 0 for name in "QAG"}
        for q in (operands["q"], np.tile(operands["q"], (9, 1))):  # one problem, and several in lanes
            sol = qpdiff.solve_qp(**sparsely(operands | {"q": q}, masks), tol=1e-10, rtol=1e-10)
            found = qpdiff.vjp(sol, x=cotangent).q[np.asarray(sol.status) == Status.SOLVED]
            assert np.abs(found - expected).max(initial=0) <= 1e-5 * max(np.abs(expected).max(), 0.01)
    assert tested > 20


@pytest.mark.parametrize("shared", [(), ("Q", "A")], ids=lambda s: "shared-" + "".join(s))
@pytest.mark.parametrize("smoothing", [None, 1e-2])
def test_objective_and_smoothing(shared, smoothing):
    options = {"parts": "G A lb ub", "shared": shared, "batch": (5,), "n": 8}
    for _, operands, masks, dense, cotangents in cases(3, 2, **options):
        sol = solved(sparsely(operands, masks))
        for given in ({"objective": np.arange(5.0)}, cotangents, cotangents | {"objective": np.ones(5)}):
            gradients, expected = (qpdiff.vjp(s, **given, smoothing=smoothing) for s in (sol, dense))
            check_gradients(gradients, expected, operands, masks, "QAG")


def test_float32_operands(route):
    operands, masks = random_sparse(np.random.default_rng(4), "G A", batch=(3,))
    operands = {name: value.astype(np.float32) for name, value in operands.items()}
    sol = qpdiff.solve_qp(**sparsely(operands, masks))
    assert sol.x.dtype == np.float32
    gradients = qpdiff.vjp(sol, x=np.ones(6))
    assert gradients.Q.dtype == gradients.G.dtype == gradients.h.dtype == np.float32
    expected = qpdiff.solve_qp(**operands)
    assert_allclose(sol.x, expected.x, atol=1e-5)


def test_unsolved_problems():
    operands, masks = random_sparse(np.random.default_rng(5), "G A lb ub", batch=(9,), n=8)
    operands["h"][4] = -1e3
    sol = qpdiff.solve_qp(**sparsely(operands, masks))
    assert sol.status[4] == Status.PRIMAL_INFEASIBLE
    assert np.all(np.delete(sol.status, 4) == Status.SOLVED)
    filled = qpdiff.vjp(sol, x=np.ones(8))
    assert np.all(np.isnan(filled.G.values[4]))
    assert np.all(np.isnan(filled.Q.values[4]))
    assert np.all(np.isfinite(np.delete(filled.G.values, 4, axis=0)))
    zero = qpdiff.vjp(sol, x=np.ones(8), objective=1.0, unsolved="zero")
    assert not zero.A.values[4].any()


def test_warm_start():
    operands, masks = random_sparse(np.random.default_rng(6), "G A lb ub", batch=(9,), n=8)
    given = sparsely(operands, masks)
    cold = solved(given)
    warm = solved(given, warm_start=cold)
    assert warm.iterations.mean() < cold.iterations.mean()
    assert_allclose(warm.x, cold.x, atol=1e-6)


def test_options_and_pickle():
    operands, masks = random_sparse(np.random.default_rng(7), "G A lb ub", batch=(9,), n=8)
    given, seen = sparsely(operands, masks), []
    sol = solved(given, progress=lambda done, batch: seen.append((done, batch)))
    assert seen[-1] == (9, 9)
    assert np.all(qpdiff.solve_qp(**given, max_iterations=1).status == Status.MAX_ITERATIONS)
    again = pickle.loads(pickle.dumps(sol))
    expected, gradients = (qpdiff.vjp(each, x=np.ones(8)) for each in (sol, again))
    assert_array_equal(gradients.G.values, expected.G.values)
    assert gradients.G.pattern is given["G"].pattern


def test_empty_batch():
    operands, masks = random_sparse(np.random.default_rng(8), "G A", batch=(0,))
    sol = qpdiff.solve_qp(**sparsely(operands, masks))
    assert sol.x.shape == (0, 6)
    assert qpdiff.vjp(sol, x=sol.x).G.values.shape == (0, masks["G"].sum())
    sol = qpdiff.solve_qp(**sparsely(operands, {"Q": masks["Q"]}))  # beside dense matrices
    assert qpdiff.vjp(sol, x=sol.x).G.shape == operands["G"].shape


def test_the_pattern_of_a_tangent_must_fit():
    operands, masks = random_sparse(np.random.default_rng(9), "G", batch=(3,))
    sol = solved(sparsely(operands, masks))
    with pytest.raises(ValueError, match=r"^tangent of G has another pattern than the operand; pass its values"):
        qpdiff.jvp(sol, G=as_sparse(operands["G"], np.ones_like(masks["G"])))
    with pytest.raises(ValueError, match=r"^tangent of Q has shape \(6, 6\); expected \(3, \d+\)"):
        qpdiff.jvp(sol, Q=np.eye(6))
    with pytest.raises(TypeError, match=r"^tangent of q is a sparse matrix; expected an array of shape \(3, 6\)"):
        qpdiff.jvp(sol, q=as_sparse(operands["Q"], masks["Q"]))
    with pytest.raises(TypeError, match=r"^cotangent of x is a sparse matrix; expected an array of shape \(3, 6\)"):
        qpdiff.vjp(sol, x=as_sparse(operands["Q"], masks["Q"]))


@pytest.mark.parametrize("route", ["sparse"], indirect=True)
def test_without_checks():
    operands, masks = random_sparse(np.random.default_rng(10), "G lb ub", batch=(9,), n=8)
    operands["q"][5] = np.nan
    operands["lb"][6] = operands["ub"][6] + 1
    for Q in (-operands["Q"][3], np.where(np.eye(8), 0, operands["Q"][3]), np.nan * operands["Q"][3]):
        operands["Q"][3] = Q
        sol = qpdiff.solve_qp(**sparsely(operands, masks), check=False)
        assert np.all(sol.status[5:7] != Status.SOLVED)
        assert np.all(np.delete(sol.status, [3, 5, 6]) == Status.SOLVED)
    assert sol.status[3] != Status.SOLVED


def test_which_engine_solves(route):
    operands, masks = random_sparse(np.random.default_rng(11), "G A", batch=(3,))
    said = explain_choice("auto", solved(sparsely(operands, masks)).linearization.problem)
    assert ("matrices made dense" in said) == (route != "sparse")
    assert said.startswith("array" if route == "array" else "compiled")
    if route == "array":
        with pytest.raises(ImportError, match=r"^engine='compiled' cannot run"):
            qpdiff.solve_qp(**sparsely(operands, masks), engine="compiled")


@pytest.mark.parametrize("route", ["sparse"], indirect=True)
@pytest.mark.parametrize("library", ["torch", "jax"])
def test_sparse_matrices_of_other_libraries_have_sparse_gradients(library):
    operands, masks = smooth_sparse(0, "G A lb", batch=(), n=5, m=3, p=1)
    given = sparsely(operands, masks)
    if library == "torch":
        torch = pytest.importorskip("torch")
        theirs = {name: torch.tensor(value) for name, value in operands.items()}
        theirs |= {name: theirs[name].to_sparse_csr() for name in "QGA"}
        kind, double = torch.Tensor, nullcontext()
    else:
        jax = pytest.importorskip("jax")
        sparse = pytest.importorskip("jax.experimental.sparse")
        kind, double = jax.Array, jax.enable_x64(True)
    with double:
        if library == "jax":
            theirs = {name: jax.numpy.asarray(value) for name, value in operands.items()}
            theirs |= {name: sparse.BCSR.fromdense(theirs[name]) for name in "QGA"}
        sol, expected = qpdiff.solve_qp(**theirs, **TIGHT), solved(given)
        gradients, by_numpy = qpdiff.vjp(sol, x=np.ones(5)), qpdiff.vjp(expected, x=np.ones(5))
        assert isinstance(sol.x, kind)
        for name in operands:
            one, other = getattr(gradients, name), getattr(by_numpy, name)
            if name in "QGA":
                assert isinstance(one, qpdiff.Sparse)
                assert one.pattern.key == other.pattern.key
                one, other = one.values, other.values
            assert isinstance(one, kind)
            assert_allclose(np.asarray(one), other, atol=1e-7)
        near = qpdiff.solve_qp(**theirs, **TIGHT, warm_start=sol)
        assert int(near.iterations) < int(sol.iterations)
        moved = qpdiff.vjp(sol, x=np.ones(5), smoothing=0.1).q
        assert_allclose(np.asarray(moved), qpdiff.vjp(expected, x=np.ones(5), smoothing=0.1).q, atol=1e-7)
        if library == "jax":
            traced = jax.jit(lambda x: qpdiff.vjp(sol, x=x).q)(jax.numpy.ones(5))
            assert_allclose(np.asarray(traced), by_numpy.q, atol=1e-7)


@pytest.mark.parametrize("route", ["sparse", "array"], indirect=True)
@pytest.mark.parametrize("xp", ["array-api-strict", "torch", "jax", "cupy"], indirect=True)
def test_other_libraries(xp, route):
    operands, masks = smooth_sparse(0, "G A lb", batch=(3,), n=5, m=3, p=1)
    given = sparsely(operands, masks)
    on_library = {name: with_array(value, xp.asarray(stored(value))) for name, value in given.items()}
    sol, expected = qpdiff.solve_qp(**on_library, **TIGHT), solved(given)
    on_host = route == "sparse" and xp.name in ("torch", "jax")
    assert ("matrices made dense" in explain_choice("auto", sol.linearization.problem)) != on_host
    assert_allclose(xp.to_numpy(sol.x), expected.x, atol=1e-7)
    for options in ({"objective": np.ones(3)}, {"smoothing": 1e-2}):
        gradients = qpdiff.vjp(sol, x=xp.asarray(np.ones(5)), **options)
        by_numpy = qpdiff.vjp(expected, x=np.ones(5), **options)
        for name in operands:
            ours, theirs = (stored(getattr(each, name)) for each in (gradients, by_numpy))
            assert_allclose(xp.to_numpy(ours), theirs, atol=1e-7 * max(1.0, np.abs(theirs).max()))
    pushed = qpdiff.jvp(sol, G=on_library["G"]).x
    assert_allclose(xp.to_numpy(pushed), qpdiff.jvp(expected, G=given["G"]).x, atol=1e-7)
