"""Solutions against the KKT conditions, other solvers and themselves, on every array library."""

import copy
import dataclasses
import pickle
import re

import clarabel
import numpy as np
import pytest
import quadprog
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import apply, complete, gap_rounding, kkt_residuals, optnet, random_problem

import qpdiff
from qpdiff import Status
from qpdiff.solution import FIELDS

pytestmark = pytest.mark.usefixtures("each_engine")

PARTS = ["", "A", "G", "lb", "ub", "lb ub", "A G", "A lb", "G ub", "A G lb", "A G lb ub"]
OUTPUTS = ("x", "y", "z", "z_lb", "z_ub")
STRICT = {"tol": 1e-8, "rtol": 0.0}


def solve(operands, xp=None, **options):
    """Solve on an array library and return the solution's fields as NumPy arrays."""
    to, back = (xp.asarray, xp.to_numpy) if xp else (np.asarray, np.asarray)
    sol = qpdiff.solve_qp(**{name: to(value) for name, value in operands.items()}, **options)
    fields = (*OUTPUTS, "s", "status", "iterations", "objective", "primal_residual", "dual_residual", "duality_gap")
    return {name: back(getattr(sol, name)) for name in fields}


def assert_optimal(operands, sol, tolerance=1e-8):
    assert np.all(sol["status"] == Status.SOLVED), sol["status"]
    residuals = kkt_residuals(operands, *(sol[name] for name in OUTPUTS))
    assert max(residuals) <= tolerance, residuals


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("cost", ["pd", "psd", "diagonal", "lp"])
def test_kkt_conditions(xp, parts, cost):
    if cost in ("psd", "lp") and parts == "":
        pytest.skip("unbounded or without a unique solution by chance only; see test_unconstrained")
    rng = np.random.default_rng(len(parts) * 10 + len(cost))
    operands = random_problem(rng, parts, cost=cost)
    assert_optimal(operands, solve(operands, xp, **STRICT))


@settings(max_examples=60, deadline=None)
@given(
    parts=st.sampled_from(PARTS),
    cost=st.sampled_from(["pd", "diagonal"]),
    batch=st.sampled_from([(), (1,), (3,), (2, 3), (2, 1, 2)]),
    shared=st.sets(st.sampled_from(["Q", "q", "G", "A", "point"])),
    n=st.integers(1, 9),
    m=st.integers(1, 14),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_shape(parts, cost, batch, shared, n, m, seed):
    rng = np.random.default_rng(seed)
    operands = random_problem(rng, parts, cost=cost, batch=batch, shared=shared, n=n, m=m, p=max(1, n // 3))
    sol = solve(operands)
    assert np.all(sol["status"] == Status.SOLVED)
    scale = max(1.0, *(float(np.max(np.abs(np.where(np.isfinite(v), v, 0)), initial=0.0)) for v in operands.values()))
    multiplier = max(1.0, *(float(np.max(np.abs(sol[name]), initial=0.0)) for name in OUTPUTS))
    assert max(kkt_residuals(operands, *(sol[name] for name in OUTPUTS))) <= 1e-7 * scale * multiplier * n


@pytest.mark.parametrize("n", [10, 100, 200])
@pytest.mark.parametrize("p", [0, 10, 50])
@pytest.mark.parametrize("m", [10, 50])
def test_optnet_family(n, p, m):
    if p > n or m > n:
        pytest.skip("more constraints than variables")
    operands = optnet(np.random.default_rng(n + p + m), (128 if n <= 100 else 16,), n, m, p)
    sol = solve(operands, **STRICT)
    assert np.all(sol["status"] == Status.SOLVED), sol["status"]
    *residuals, gap = kkt_residuals(operands, *(sol[name] for name in OUTPUTS))
    assert max(residuals) <= 1e-8, residuals
    assert gap <= 1e-8 + gap_rounding(operands, sol["x"], sol["y"], sol["z"])
    assert sol["iterations"].max() <= 25


@pytest.mark.parametrize("seed", range(10))
def test_against_quadprog(seed):
    d = complete(random_problem(np.random.default_rng(seed), "A G lb ub", batch=()))
    rows = np.concatenate([d["A"], -d["G"], np.eye(6), -np.eye(6)])
    bounds = np.concatenate([d["b"], -d["h"], d["lb"], -d["ub"]])
    expected = quadprog.solve_qp(d["Q"], -d["q"], rows.T, bounds, 2)[0]
    np.testing.assert_allclose(solve(d)["x"], expected, atol=1e-6)


@pytest.mark.parametrize("cost", ["psd", "lp"])
@pytest.mark.parametrize("seed", range(5))
def test_against_clarabel(cost, seed):
    d = random_problem(np.random.default_rng(seed), "A G lb ub", cost=cost, batch=())
    rows = np.concatenate([d["A"], d["G"], -np.eye(6), np.eye(6)])
    bounds = np.concatenate([d["b"], d["h"], -d["lb"], d["ub"]])
    options = clarabel.DefaultSettings()
    options.verbose = False
    cones = [clarabel.ZeroConeT(2), clarabel.NonnegativeConeT(len(bounds) - 2)]
    reference = clarabel.DefaultSolver(
        scipy.sparse.csc_matrix(np.triu(d["Q"])), d["q"], scipy.sparse.csc_matrix(rows), bounds, cones, options
    ).solve()
    np.testing.assert_allclose(solve(d)["objective"], reference.obj_val, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("parts", ["", "A"])
def test_unconstrained_and_equality_only_are_linear_solves(xp, parts):
    operands = random_problem(np.random.default_rng(1), parts)
    sol = solve(operands, xp)
    if parts == "":
        expected = np.linalg.solve(operands["Q"], -operands["q"][..., None])[..., 0]
    else:
        A = operands["A"]
        K = np.block([[operands["Q"], A.mT], [A, np.zeros((4, 2, 2))]])
        r = np.concatenate([-operands["q"], operands["b"]], axis=-1)
        expected = np.linalg.solve(K, r[..., None])[..., :6, 0]
    np.testing.assert_allclose(sol["x"], expected, atol=1e-7)


def test_projection_onto_a_box_is_a_clip(xp):
    rng = np.random.default_rng(0)
    points, lb, ub = 2 * rng.normal(size=(50, 7)), -rng.uniform(size=7), rng.uniform(size=7)
    lb[0], ub[1] = -np.inf, np.inf
    sol = solve({"Q": np.eye(7), "q": -points, "lb": lb, "ub": ub}, xp)
    np.testing.assert_allclose(sol["x"], np.clip(points, lb, ub), atol=1e-6)
    assert np.all(sol["z_lb"][:, 0] == 0)
    assert np.all(sol["z_ub"][:, 1] == 0)


def test_fixed_variables(xp):
    operands = random_problem(np.random.default_rng(2), "A lb ub")
    operands["A"][..., 1] = 0
    operands["b"] = apply(operands["A"], (operands["lb"] + operands["ub"]) / 2)
    operands["lb"][..., 1] = operands["ub"][..., 1]
    sol = solve(operands, xp, **STRICT)
    assert_optimal(operands, sol)
    np.testing.assert_allclose(sol["x"][..., 1], operands["ub"][..., 1], atol=1e-8)
    assert np.all(np.minimum(sol["z_lb"], sol["z_ub"])[..., 1] == 0)


def test_infinite_right_hand_sides_are_no_constraints(xp):
    operands = random_problem(np.random.default_rng(3), "G")
    without = operands | {"G": operands["G"][:, 1:], "h": operands["h"][:, 1:]}
    operands["h"][:, 0] = np.inf
    sol = solve(operands, xp)
    np.testing.assert_allclose(sol["x"], solve(without)["x"], atol=1e-6)
    assert np.all(sol["z"][:, 0] == 0)
    assert np.all(np.isinf(sol["s"][:, 0]))


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_a_number_is_every_entry(xp, batch):
    operands = random_problem(np.random.default_rng(7), "A G lb ub", batch=batch)
    numbers = {"lb": -0.5, "ub": 0.75, "h": 2.0, "b": 0.0}
    full = {name: np.full(operands[name].shape[-1:], value) for name, value in numbers.items()}
    matrices = {name: xp.asarray(value) for name, value in operands.items()}
    for form in (numbers, {name: xp.asarray(value) for name, value in numbers.items()}):
        sol = qpdiff.solve_qp(**matrices | form)
        sol = {name: xp.to_numpy(getattr(sol, name)) for name in (*OUTPUTS, "status")}
        assert_optimal(operands | full, sol)
        np.testing.assert_allclose(sol["x"], solve(operands | full)["x"], atol=1e-7)


def test_numbers_alone(xp):
    """Bounds that are numbers, and the least that may come with them."""
    sol = qpdiff.solve_qp(xp.asarray(np.eye(3)), xp.asarray(np.array([-2.0, 0.5, 2.0])), lb=-1, ub=1.0)
    np.testing.assert_allclose(xp.to_numpy(sol.x), [1.0, -0.5, -1.0], atol=1e-7)
    sol = qpdiff.solve_qp([[1.0]], [-5.0], lb=0.0, ub=np.float64(2.0))
    np.testing.assert_allclose(sol.x, [2.0], atol=1e-7)


def test_huge_bounds_are_none(xp):
    operands = random_problem(np.random.default_rng(12), "A G lb ub")
    for name, value in (("h", 1e20), ("lb", -1e30), ("ub", 1e25)):
        operands[name][..., 0] = value
    infinite = {
        name: np.where(np.abs(value) >= 1e20, np.sign(value) * np.inf, value) for name, value in operands.items()
    }
    sol = solve(operands, xp)
    assert np.all(sol["status"] == Status.SOLVED)
    np.testing.assert_allclose(sol["x"], solve(infinite)["x"], atol=1e-10)
    assert np.all(sol["z_ub"][:, 0] == 0)


@pytest.mark.parametrize("parts", ["A G", "lb ub", "A G lb ub"])
@pytest.mark.parametrize("shared", [(), ("Q", "G", "A")])
@pytest.mark.parametrize("cost", ["pd", "diagonal"])
def test_a_batch_equals_its_members(parts, shared, cost):
    operands = random_problem(np.random.default_rng(4), parts, shared=shared, cost=cost, batch=(9,))
    together = solve(operands)
    for i in range(9):
        alone = solve({name: v if name in shared or v.shape[0] != 9 else v[i] for name, v in operands.items()})
        for name in OUTPUTS:
            np.testing.assert_allclose(together[name][i], alone[name], rtol=1e-9, atol=1e-9)
        assert together["iterations"][i] == alone["iterations"]


@pytest.mark.parametrize("shared", [(), ("Q", "G", "A")])
def test_members_that_end_apart(xp, shared):
    """Without bounds x is computed only where it is looked at, which is at another time for each problem."""
    operands = random_problem(np.random.default_rng(3), "A G", shared=shared, batch=(12,), n=60, m=20, p=4)
    operands["q"] = operands["q"] * np.logspace(-3, 1, 12)[:, None]
    sol = solve(operands, xp, **STRICT)
    assert_optimal(operands, sol)
    assert len(np.unique(sol["iterations"])) > 1
    for i in (0, 5, 11):
        alone = solve({k: v if k in shared else v[i : i + 1] for k, v in operands.items()}, xp, **STRICT)
        # On a GPU products of one problem and of twelve need not round alike.
        assert abs(alone["iterations"] - sol["iterations"][i]) <= (xp.name in ("cupy", "torch-cuda"))
        np.testing.assert_allclose(alone["x"][0], sol["x"][i], rtol=1e-9, atol=1e-9)


def test_shared_operands_equal_their_copies():
    shared = random_problem(np.random.default_rng(5), "A G", shared=("Q", "G", "A", "point"), batch=(6,))
    copied = {name: np.broadcast_to(v, (6, *v.shape[-(2 if name in "QGA" else 1) :])) for name, v in shared.items()}
    np.testing.assert_allclose(solve(shared)["x"], solve(copied)["x"], atol=1e-7)


def test_chunks_equal_the_whole(monkeypatch):
    operands = random_problem(np.random.default_rng(6), "A G", batch=(40,))
    whole = solve(operands)
    from qpdiff.backend import NumPyBackend

    monkeypatch.setattr(NumPyBackend, "chunk_bytes", 20_000)
    np.testing.assert_allclose(solve(operands)["x"], whole["x"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_permuting_variables_and_constraints(seed):
    rng = np.random.default_rng(seed)
    d = random_problem(rng, "A G lb ub")
    variables, inequalities, equalities = rng.permutation(6), rng.permutation(5), rng.permutation(2)
    permuted = {
        "Q": d["Q"][:, variables][:, :, variables],
        "q": d["q"][:, variables],
        "G": d["G"][:, inequalities][:, :, variables],
        "h": d["h"][:, inequalities],
        "A": d["A"][:, equalities][:, :, variables],
        "b": d["b"][:, equalities],
        "lb": d["lb"][:, variables],
        "ub": d["ub"][:, variables],
    }
    one, other = solve(d, **STRICT), solve(permuted, **STRICT)
    np.testing.assert_allclose(other["x"], one["x"][:, variables], atol=1e-7)
    np.testing.assert_allclose(other["z"], one["z"][:, inequalities], atol=1e-6)
    np.testing.assert_allclose(other["y"], one["y"][:, equalities], atol=1e-6)


@pytest.mark.parametrize("batch", [(0,), (0, 3), (2, 0)])
def test_empty_batch(xp, batch):
    sol = solve({"Q": np.eye(3), "q": np.zeros((*batch, 3)), "A": np.ones((1, 3)), "b": np.ones(1)}, xp)
    assert sol["x"].shape == (*batch, 3)
    assert sol["y"].shape == (*batch, 1)
    assert sol["status"].shape == batch


# ---- problems that have no solution


@pytest.mark.parametrize(
    ("bad", "status"),
    [
        ({"q": np.zeros(3), "G": np.array([[1.0, 0, 0], [-1.0, 0, 0]]), "h": [0.0, -1.0]}, Status.PRIMAL_INFEASIBLE),
        ({"Q": np.zeros((3, 3)), "q": np.array([-1.0, 0, 0]), "h": [np.inf, np.inf]}, Status.DUAL_INFEASIBLE),
        ({"q": np.full(3, 1e200)}, None),
    ],
)
def test_a_bad_problem_leaves_its_batch_as_it_is(xp, bad, status):
    rng = np.random.default_rng(7)
    good = random_problem(rng, "G", batch=(5,), n=3, m=2)
    mixed = {name: value.copy() for name, value in good.items()}
    for name, value in bad.items():
        mixed[name][2] = value
    alone = solve({name: np.delete(value, 2, axis=0) for name, value in good.items()}, xp)
    together = solve(mixed, xp)
    if status is None:
        assert together["status"][2] != Status.SOLVED or np.isfinite(together["x"][2]).all()
    else:
        assert together["status"][2] == status
    for name in OUTPUTS:
        np.testing.assert_allclose(np.delete(together[name], 2, axis=0), alone[name], rtol=1e-12, atol=1e-12)


def infeasible(rng, kind, n=6):
    operands = random_problem(rng, "A G lb ub", batch=(20,), n=n)
    if kind == "rows":  # g x ≤ h and −g x ≤ −h − 1
        operands["G"][:, 1] = -operands["G"][:, 0]
        operands["h"][:, 1] = -operands["h"][:, 0] - rng.uniform(0.5, 2.0, size=20)
    elif kind == "equalities":
        operands["A"][:, 1] = 2 * operands["A"][:, 0]
        operands["b"][:, 1] = 2 * operands["b"][:, 0] + 1
    else:  # a sum of all variables that the bounds do not reach
        operands["A"][:, 0] = 1
        operands["b"][:, 0] = operands["ub"].sum(-1) + 1
    return operands


@pytest.mark.parametrize("kind", ["rows", "equalities", "bounds"])
@pytest.mark.parametrize("seed", range(3))
def test_infeasible(kind, seed):
    operands = infeasible(np.random.default_rng(seed), kind)
    sol = solve(operands)
    assert np.all(sol["status"] == Status.PRIMAL_INFEASIBLE), sol["status"]
    # The multipliers are a certificate: Kᵀv = 0 and kᵀv < 0 with v ≥ 0 at the inequalities.
    combination = apply(operands["A"].mT, sol["y"]) + apply(operands["G"].mT, sol["z"]) - sol["z_lb"] + sol["z_ub"]
    pairs = [("b", "y", 1), ("h", "z", 1), ("lb", "z_lb", -1), ("ub", "z_ub", 1)]
    value = sum(sign * np.sum(operands[a] * sol[b], axis=-1) for a, b, sign in pairs)
    assert np.all(value < 0)
    assert np.all(np.max(np.abs(combination), axis=-1) <= 1e-6 * -value)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("cost", ["lp", "psd"])
def test_unbounded(seed, cost):
    rng = np.random.default_rng(seed)
    operands = random_problem(rng, "A G", cost=cost, batch=(20,), m=3, p=1)
    ray = rng.normal(size=(20, 6))
    # Make the ray feasible for ever, flat in Q and downhill.
    for name in ("A", "Q"):
        M = operands[name]
        operands[name] = M - apply(M, ray)[..., None] * ray[:, None, :] / np.sum(ray**2, -1)[:, None, None]
    Q = operands["Q"]
    operands["Q"] = (Q.mT @ Q) if cost == "psd" else 0 * Q
    operands["G"] = operands["G"] * -np.sign(apply(operands["G"], ray))[..., None]
    operands["b"] = apply(operands["A"], np.ones((20, 6)))
    operands["h"] = apply(operands["G"], np.ones((20, 6))) + 1
    operands["q"] = -ray
    sol = solve(operands)
    unbounded = sol["status"] == Status.DUAL_INFEASIBLE
    assert not np.any(sol["status"] == Status.SOLVED)
    assert np.mean(unbounded) >= 0.95, sol["status"]
    # x is a certificate: a direction that is flat in Q, stays feasible and goes down.
    fall = -np.sum(operands["q"] * sol["x"], axis=-1)
    up = np.abs(apply(operands["Q"], sol["x"])).max(-1) + np.clip(apply(operands["G"], sol["x"]), 0, None).max(-1)
    assert np.all((up + np.abs(apply(operands["A"], sol["x"])).max(-1) <= 1e-5 * fall)[unbounded])


def test_the_iteration_limit(xp):
    operands = random_problem(np.random.default_rng(8), "A G")
    sol = solve(operands, xp, max_iterations=1)
    assert np.all(sol["status"] == Status.MAX_ITERATIONS)
    assert np.all(sol["iterations"] == 1)


# ---- data types and the caller's arrays


@pytest.mark.parametrize("parts", ["A G", "lb ub", "A G lb ub"])
def test_float32(xp, parts):
    operands = random_problem(np.random.default_rng(9), parts)
    single = {name: value.astype(np.float32) for name, value in operands.items()}
    precise, sol, quick = (solve(single, xp, dtype=dtype) for dtype in ("float64", None, "float32"))
    for name in ("x", "y", "z", "z_lb", "z_ub", "s"):
        assert (precise[name].dtype, sol[name].dtype, quick[name].dtype) == (np.float64, np.float32, np.float32)
        np.testing.assert_array_equal(sol[name], precise[name].astype(np.float32))
    for name in ("status", "iterations", "objective", "primal_residual", "dual_residual", "duality_gap"):
        np.testing.assert_array_equal(sol[name], precise[name])
        assert sol[name].dtype == precise[name].dtype
    assert np.all(quick["status"] == Status.SOLVED)
    np.testing.assert_allclose(quick["x"], solve(operands)["x"], atol=5e-2)


def test_lists_and_integers():
    sol = qpdiff.solve_qp([[2, 0], [0, 2]], [-1, -4], lb=[0, 0], ub=[1, 1])
    assert sol.x.dtype == np.float64
    np.testing.assert_allclose(sol.x, [0.5, 1.0], atol=1e-6)


def test_layouts_and_read_only_arrays():
    operands = random_problem(np.random.default_rng(10), "A G lb ub")
    expected = solve(operands)["x"]
    fortran = {name: np.asfortranarray(value) for name, value in operands.items()}
    reversed_twice = {name: value[::-1].copy()[::-1] for name, value in operands.items()}
    for layout in (fortran, reversed_twice):
        copies = {name: value.copy() for name, value in layout.items()}
        for value in layout.values():
            value.flags.writeable = False
        np.testing.assert_allclose(solve(layout)["x"], expected, atol=1e-8)
        for name, value in layout.items():
            np.testing.assert_array_equal(value, copies[name])


def test_options_that_are_numbers_of_numpys():
    options = {"tol": np.float32(1e-9), "max_iterations": np.int64(50), "check": np.bool_(True), "verbose": np.False_}
    np.testing.assert_allclose(qpdiff.solve_qp(np.eye(2), -np.ones(2), **options).x, 1.0, atol=1e-6)


def test_verbose_prints_a_line_an_iteration(capsys):
    sol = solve(random_problem(np.random.default_rng(11), "A G"), verbose=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == sol["iterations"].max() + 1
    assert "primal" in lines[0]


@pytest.mark.parametrize("parts", ["", "A", "G", "lb", "A G lb ub"])
@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
def test_no_change_of_a_solution_changes_its_derivative(parts, batch):
    rng = np.random.default_rng(0)
    sol = qpdiff.solve_qp(**random_problem(rng, parts, batch=batch, n=4, m=3, p=2))
    cotangent = rng.normal(size=sol.x.shape)
    before = qpdiff.vjp(sol, x=cotangent)
    with pytest.raises(ValueError, match="read-only"):
        sol.x[...] = 0.0
    for name in (*OUTPUTS, "s", "status"):
        array = getattr(sol, name)
        if array.flags.writeable:  # a copy, or empty
            array[...] = 1
    for mine, theirs in zip(qpdiff.vjp(sol, x=cotangent), before, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("made", [copy.deepcopy, lambda sol: pickle.loads(pickle.dumps(sol))], ids=["copy", "pickle"])
def test_copies_of_a_solution_are_read_only_where_it_is(made, dtype, each_engine):
    sol = qpdiff.solve_qp(np.eye(2, dtype=dtype), np.ones((3, 2), dtype), [[1.0, 0.0]], [0.5], lb=-1.0)
    copied = made(sol)
    for name in FIELDS:
        assert getattr(copied, name).flags.writeable == getattr(sol, name).flags.writeable, name
    for array in copied.linearization[2:]:
        assert not array.flags.writeable
    np.testing.assert_array_equal(qpdiff.vjp(copied, x=np.ones(2)).q, qpdiff.vjp(sol, x=np.ones(2)).q)
    assert made(dataclasses.replace(sol, linearization=None)).linearization is None


def test_the_choice_of_the_engine_is_logged(caplog, each_engine):
    operands = {"Q": np.eye(2), "q": np.ones((3, 2)), "lb": 0.0}
    qpdiff.solve_qp(**operands)
    assert not caplog.records
    with caplog.at_level("DEBUG", logger="qpdiff"):
        qpdiff.solve_qp(**operands)
        qpdiff.solve_qp(**operands, engine="array")
    chosen, array = (record.getMessage() for record in caplog.records)
    assert array == "batch (3,), n = 2, m = 0, p = 0: array engine on cpu: engine='array'"
    assert re.search(
        r": (compiled engine on cpu: built ahead|array engine on cpu: the compiled one does not run)", chosen
    )
