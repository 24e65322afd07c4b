"""The system that all derivatives solve, with what the solver has kept, against a dense solve."""

import numpy as np
import pytest
from problems import from_solution, random_problem, unique_vertex, weakly_active

import qpdiff
from qpdiff import Status
from qpdiff.backend import NumPyBackend
from qpdiff.differentiation import solve_kkt

pytestmark = pytest.mark.usefixtures("each_engine")


def rng():
    return np.random.default_rng(1)


CASES = {
    "everything": lambda: random_problem(rng(), "A G lb ub", batch=(100,)),
    "semidefinite": lambda: random_problem(rng(), "A G lb ub", batch=(100,), cost="psd"),
    "linear programs": lambda: random_problem(rng(), "A G lb ub", batch=(100,), cost="lp"),
    "vertices": lambda: unique_vertex(rng(), (100,), 5).operands,
    "diagonal": lambda: random_problem(rng(), "A G lb ub", cost="diagonal", batch=(100,), n=12, m=3, p=2),
    "dense dual": lambda: random_problem(rng(), "A G", batch=(100,), n=12, m=3, p=2),
    "many inequalities": lambda: random_problem(rng(), "G", batch=(100,), m=30),
    "weakly active": lambda: weakly_active(rng(), (100,), 6).operands,
    "some weakly active": lambda: from_solution(rng(), (100,), 10, active=2, weak=2, inactive=12),
}


def dense_solution(lin, operands, r_x, r_v):
    """Solve [Q, Kᵀ; K, −θ] with θ = s/v at the inequalities, problem by problem."""
    n, inequality = lin.x.shape[-1], np.broadcast_to(lin.problem.inequality, lin.v.shape)
    theta = np.where(inequality, lin.s / np.where(inequality, lin.v, 1.0), 0.0)
    eye = np.broadcast_to(np.eye(n), (len(lin.x), n, n))
    rows = {"A": operands.get("A"), "G": operands.get("G")}
    rows |= {name: sign * eye for name, sign in (("lb", -1), ("ub", 1)) if name in operands}
    K = np.concat([matrix for matrix in rows.values() if matrix is not None], axis=1)
    u_x, u_v = np.empty_like(r_x), np.empty_like(r_v)
    for i in range(len(r_x)):
        M = np.block([[operands["Q"][i], K[i].T], [K[i], -np.diag(theta[i])]])
        u_x[i], u_v[i] = np.split(np.linalg.solve(M, np.concat([r_x[i], r_v[i]])), [n])
    return u_x, u_v


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tol", [1e-4, 1e-8, 1e-12])
def test_against_a_dense_solve(case, tol):
    """At a loose tolerance too, where the factor of the last step is that of a point further away."""
    operands = CASES[case]()
    sol = qpdiff.solve_qp(**operands, tol=tol, rtol=tol)
    assert np.all(sol.status == Status.SOLVED)
    lin = sol.linearization
    r_x, r_v = rng().normal(size=lin.x.shape), rng().normal(size=lin.v.shape)
    with np.errstate(all="ignore"):
        found = solve_kkt(lin, r_x, r_v)
    for one, expected in zip(found, dense_solution(lin, operands, r_x, r_v), strict=True):
        error = np.max(np.abs(one - expected), axis=-1) / np.maximum(1.0, np.max(np.abs(expected), axis=-1))
        assert np.max(error) <= 1e-6


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("parts", ["A G lb ub", "A G"])
@pytest.mark.parametrize("kind", ["infeasible", "unbounded"])
def test_unsolved_problems_ask_for_nothing(monkeypatch, seed, parts, kind):
    """They would never be accurate, and have the whole batch refined as often as that is allowed."""
    operands = random_problem(np.random.default_rng(seed), parts, batch=(20,))
    if kind == "infeasible":
        operands["G"][1::2, 1], operands["h"][1::2, 1] = -operands["G"][1::2, 0], -operands["h"][1::2, 0] - 1.0
    else:
        changes = {"Q": 0.0, "q": 1.0, "A": 0.0, "b": 0.0, "G": 0.0, "h": 1.0, "lb": -np.inf, "ub": np.inf}
        for name in operands:
            operands[name][1::2] = changes[name]
    sol = qpdiff.solve_qp(**operands)
    solved = sol.status == Status.SOLVED
    np.testing.assert_array_equal(solved, np.arange(20) % 2 == 0)

    calls, gradients, solve = [], [], NumPyBackend.solve

    def counted(self, factor, r):
        calls[-1] += 1
        return solve(self, factor, r)

    monkeypatch.setattr(NumPyBackend, "solve", counted)
    for cotangent in (np.ones_like(sol.x), np.where(solved[:, None], 1.0, 0.0)):
        calls.append(0)
        gradients.append(qpdiff.vjp(sol, x=cotangent, unsolved="zero"))
    assert calls[0] == calls[1]
    for name in operands:
        np.testing.assert_array_equal(*(getattr(each, name) for each in gradients))
