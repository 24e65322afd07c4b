"""Degenerate problems: they are solved, and their derivative is that of the solution map, or one of its derivatives.

What derivative there is depends on the kind. Redundant constraints and duplicated variables change nothing, so the
derivative is that of the problem without them, along every tangent that keeps them redundant. A weakly active or
dependent row makes a kink; there it has to be a convex combination of the derivatives around. Where x or the
multipliers are not unique, the optimal value still tells: its gradients are multipliers.
"""

import itertools

import numpy as np
import pytest
import quadprog
import scipy.optimize
from problems import (
    DEGENERATE,
    SCALED,
    apply,
    combined_inequalities,
    complete,
    degenerate_vertex,
    dependent_active,
    documented_test,
    duplicated_variables,
    duplicated_variables_in_a_box,
    empty_interior,
    from_solution,
    kkt_residuals,
    optimal_face,
    repeated_inequalities,
    weakly_active,
)

import qpdiff
from qpdiff import Status

pytestmark = pytest.mark.usefixtures("each_engine")

OUTPUTS = ("x", "y", "z", "z_lb", "z_ub")
TIGHT = {"tol": 1e-12, "rtol": 1e-12}
SIZES = [2, 4, 7]
KINKED = [weakly_active, dependent_active, degenerate_vertex]
DIFFERENTIABLE = [kind for kind in DEGENERATE if kind not in (*KINKED, optimal_face)]


def by_kind(kinds):
    return pytest.mark.parametrize("kind", kinds, ids=lambda kind: kind.__name__)


def generator(kind, n):
    return np.random.default_rng(sum(map(ord, kind.__name__)) + n)


def solve(operands, **options):
    sol = qpdiff.solve_qp(**operands, **options)
    assert np.all(sol.status == Status.SOLVED), sol.status
    return sol, tuple(getattr(sol, name) for name in OUTPUTS)


def random_tangents(rng, operands):
    tangents = {name: rng.normal(size=value.shape) for name, value in operands.items()}
    # A linear program stays one: with any other Q around it, it need not be convex.
    tangents["Q"] = (tangents["Q"] + tangents["Q"].mT) / 2 * (operands["Q"] != 0).any()
    if "lb" in operands and "ub" in operands:
        tangents["ub"] = np.where(operands["lb"] == operands["ub"], tangents["lb"], tangents["ub"])
    return tangents


def pulled(gradients, tangents):
    """<gradients, tangents> of each problem of a batch with one axis."""
    return sum(np.sum((getattr(gradients, name) * t).reshape(len(t), -1), axis=-1) for name, t in tangents.items())


def reference(operands):
    """Solve each problem of a batch for x by an active-set method: Goldfarb-Idnani, or simplex for a linear program."""

    def one(Q, q, G, h, A, b, lb, ub):
        if not Q.any():
            return scipy.optimize.linprog(q, G, h, A, b, np.stack([lb, ub], -1), method="highs-ds").x
        fixed = lb == ub
        below, above = np.isfinite(lb) & ~fixed, np.isfinite(ub) & ~fixed
        eye = np.eye(len(q))
        rows = np.concat([A, eye[fixed], -G, eye[below], -eye[above]])
        bounds = np.concat([b, lb[fixed], -h, lb[below], -ub[above]])
        return quadprog.solve_qp(Q, -q, rows.T, bounds, len(b) + fixed.sum())[0]

    d, batch = complete(operands), len(operands["q"])
    return np.array(
        [
            one(**{name: v[i] if len(v) == batch and name in operands else v for name, v in d.items()})
            for i in range(batch)
        ]
    )


def one_sided_differences(operands, tangents, step=1e-6):
    """The differences of the reference's x to the left and to the right."""
    here = reference(operands)
    left, right = (
        reference({name: value + sign * step * tangents[name] for name, value in operands.items()}) for sign in (-1, 1)
    )
    return (here - left) / step, (right - here) / step


# ---- solutions


@by_kind(DEGENERATE)
@pytest.mark.parametrize("n", [1, *SIZES, 20])
def test_degenerate_problems_are_solved(kind, n):
    operands = kind(generator(kind, n), (50,), n).operands
    _, point = solve(operands, tol=1e-8, rtol=0.0)
    assert max(kkt_residuals(operands, *point)) <= 1.1e-8


@by_kind(SCALED)
@pytest.mark.parametrize("n", [1, *SIZES, 20])
def test_badly_scaled_problems_are_solved(kind, n):
    operands = kind(generator(kind, n), (50,), n).operands
    _, point = solve(operands)
    assert np.max(documented_test(operands, *point, 1e-8, 1e-8)) <= 1.01


@by_kind(SCALED)
@pytest.mark.parametrize("n", SIZES)
def test_units_do_not_move_the_solution(kind, n):
    problem = kind(generator(kind, n), (50,), n)
    sol, _ = solve(problem.operands, **TIGHT)
    np.testing.assert_allclose(apply(problem.back, sol.x), reference(problem.base), rtol=1e-5, atol=1e-5)


@by_kind([duplicated_variables, duplicated_variables_in_a_box])
@pytest.mark.parametrize("n", SIZES)
def test_the_sum_of_duplicated_variables_is_the_variable(kind, n):
    problem = kind(generator(kind, n), (50,), n)
    sol, _ = solve(problem.operands)
    np.testing.assert_allclose(apply(problem.back, sol.x), reference(problem.base), rtol=1e-5, atol=1e-5)


# ---- derivatives


@by_kind([*DEGENERATE, *SCALED])
@pytest.mark.parametrize("options", [{}, TIGHT], ids=["default", "tight"])
@pytest.mark.parametrize("n", [1, *SIZES])
def test_derivatives_are_finite(kind, n, options):
    rng = generator(kind, n)
    operands = kind(rng, (100,), n).operands
    sol, point = solve(operands, **options)
    gradients = qpdiff.vjp(
        sol, **{name: rng.normal(size=value.shape) for name, value in zip(OUTPUTS, point, strict=True)}
    )
    assert all(np.isfinite(getattr(gradients, name)).all() for name in operands)
    for name, value in operands.items():
        tangent = rng.normal(size=value.shape)
        assert all(np.isfinite(part).all() for part in qpdiff.jvp(sol, **{name: tangent})), name


@by_kind([*DIFFERENTIABLE, *SCALED])
@pytest.mark.parametrize("n", [1, *SIZES])
def test_derivative_where_it_exists(kind, n):
    """Along tangents that keep the problem as degenerate as it is, in the units of the problem it was made of."""
    rng = generator(kind, n)
    problem = kind(rng, (100,), n)
    tangents = random_tangents(rng, problem.base)
    left, right = one_sided_differences(problem.base, tangents)
    size = np.maximum(1.0, np.max(np.abs(left), -1))
    far_left, far_right = one_sided_differences(problem.base, tangents, step=1e-4)  # no kink near enough to blur it
    smooth = (np.max(np.abs(right - left), -1) <= 1e-3 * size) & (
        np.max(np.abs(far_right - far_left), -1) <= 0.1 * size
    )
    assert np.mean(smooth) >= 0.75
    expected = (left + right) / 2

    sol, _ = solve(problem.operands, **TIGHT)
    lifted = problem.lift_tangents(tangents)
    pushed = apply(problem.back, qpdiff.jvp(sol, **lifted).x)
    error = np.max(np.abs(pushed - expected), axis=-1) / size
    assert np.max(error[smooth]) <= 1e-4, np.flatnonzero(smooth & (error > 1e-4))

    cotangent = rng.normal(size=expected.shape)
    gradients = qpdiff.vjp(sol, x=apply(problem.back.mT, cotangent))
    error = np.abs(pulled(gradients, lifted) - np.sum(cotangent * expected, -1)) / size
    assert np.max(error[smooth]) <= 1e-4 * n, np.flatnonzero(smooth & (error > 1e-4 * n))


@pytest.mark.parametrize("n", SIZES)
def test_at_one_weakly_active_row_the_derivative_lies_between_the_two_sides(n):
    rng = np.random.default_rng(n)
    operands = from_solution(rng, (100,), n, active=(n - 1) // 2, weak=1)
    tangents = random_tangents(rng, operands)
    left, right = one_sided_differences(operands, tangents)
    sol, _ = solve(operands, **TIGHT)
    pushed = qpdiff.jvp(sol, **tangents).x
    jump = right - left
    share = np.sum((pushed - left) * jump, -1) / np.sum(jump**2, -1)
    assert np.min(share) >= -1e-3
    assert np.max(share) <= 1 + 1e-3
    np.testing.assert_allclose(pushed, left + share[:, None] * jump, atol=1e-4 * np.max(np.abs(left)))


def pieces(d, x, active, tangents):
    """Derivatives of x around a problem: one for every set of its active rows that is independent and optimal."""
    n, p = len(x), len(d["b"])
    slope = d["Q"] @ x + d["q"]
    for K, dK, dk, count in independent(d, x, active, tangents, range(min(len(active), n - p) + 1)):
        v = np.linalg.lstsq(K.T, -slope)[0]
        if np.max(np.abs(K.T @ v + slope)) <= 1e-6 and np.all(v[p:] >= -1e-6):
            M = np.block([[d["Q"], K.T], [K, np.zeros((p + count, p + count))]])
            yield np.linalg.solve(M, np.concat([-tangents["Q"] @ x - tangents["q"] - dK.T @ v, dk]))[:n]


def vertices(d, x, active, tangents):
    """Derivatives of every vertex that just enough of the active rows make."""
    for K, _, dk, _ in independent(d, x, active, tangents, [len(x) - len(d["b"])]):
        yield np.linalg.solve(K, dk)


def independent(d, x, active, tangents, counts):
    """Every independent set of active rows with the equalities: K, its tangent, that of k − K x, how many rows."""
    for count in counts:
        for rows in map(list, itertools.combinations(active, count)):
            K, dK = (np.concat([data["A"], data["G"][rows]]) for data in (d, tangents))
            if np.linalg.cond(K) < 1e8:
                yield K, dK, np.concat([tangents["b"], tangents["h"][rows]]) - dK @ x, count


def distance_from_hull(point, points):
    """Of a point from the convex hull of points, relative to their size."""
    size = np.max(np.abs(points)) + 1e-300
    weight = 1e3  # of the condition that the coefficients sum to 1
    columns = np.concat([points.T / size, weight * np.ones((1, len(points)))])
    return scipy.optimize.nnls(columns, np.append(point / size, weight))[1]


@by_kind([weakly_active, repeated_inequalities, dependent_active, degenerate_vertex])
@pytest.mark.parametrize("n", [2, 4])
def test_at_a_kink_the_derivative_is_a_convex_combination(kind, n):
    """Of the derivatives around; at a vertex with dependent rows, of those of all vertices that its rows make.

    There the derivative is that of a smoothed problem, a mean over the vertices with positive weights, and not all of
    them are optimal after a change of the data.
    """
    around = pieces if kind in (weakly_active, repeated_inequalities) else vertices
    rng = generator(kind, n)
    operands = kind(rng, (40,), n).operands
    tangents = random_tangents(rng, operands)
    sol, (x, *_) = solve(operands, **TIGHT)
    pushed = qpdiff.jvp(sol, **tangents).x
    slack = operands["h"] - apply(operands["G"], x)
    distances = []
    for i in range(40):
        one, dots = ({name: value[i] for name, value in data.items()} for data in (operands, tangents))
        points = list(around(one, x[i], np.flatnonzero(slack[i] < 1e-5), dots))
        distances.append(distance_from_hull(pushed[i], np.array(points)))
    assert np.max(distances) <= 5e-3, distances  # the refinement is slow where tangents contradict each other


@by_kind([dependent_active, degenerate_vertex, repeated_inequalities])
@pytest.mark.parametrize("n", SIZES)
def test_tangents_stay_on_the_equalities(kind, n):
    """Tangents of dependent inequalities may contradict each other; those of A and b hold nevertheless."""
    rng = generator(kind, n)
    operands = kind(rng, (100,), n).operands
    tangents = random_tangents(rng, operands)
    sol, (x, *_) = solve(operands, **TIGHT)
    pushed = qpdiff.jvp(sol, **tangents).x
    left = apply(operands["A"], pushed) + apply(tangents["A"], x) - tangents["b"]
    assert np.max(np.abs(left)) <= 1e-6 * np.max(np.abs(pushed))


@by_kind([dependent_active, degenerate_vertex])
@pytest.mark.parametrize("n", SIZES)
def test_a_vertex_held_by_more_rows_than_needed_does_not_follow_the_cost(kind, n):
    rng = generator(kind, n)
    operands = kind(rng, (100,), n).operands
    sol, _ = solve(operands, **TIGHT)
    tangents = random_tangents(rng, operands)
    assert np.max(np.abs(qpdiff.jvp(sol, Q=tangents["Q"], q=tangents["q"]).x)) <= 1e-6
    gradients = qpdiff.vjp(sol, x=rng.normal(size=sol.x.shape))
    assert max(np.max(np.abs(gradients.Q)), np.max(np.abs(gradients.q))) <= 1e-6


@by_kind(DEGENERATE)
@pytest.mark.parametrize("n", [1, *SIZES])
def test_gradients_of_the_optimal_value_are_multipliers(kind, n):
    """Envelope theorem: the value falls with h by z, and moves with q by x, so not at all through the change of x.

    Where active inequalities are dependent, h and z have no derivative of their own, and only the combinations of z in
    Gᵀz are determined: there z may have either sign.
    """
    operands = kind(generator(kind, n), (100,), n).operands
    sol, (x, *_) = solve(operands, **TIGHT)
    gradients = qpdiff.vjp(sol, x=apply(operands["Q"], x) + operands["q"])
    zero = np.zeros_like(x)
    y, z, z_lb, z_ub = (
        sign * (zero if (value := getattr(gradients, name)) is None else value)
        for sign, name in ((-1, "b"), (-1, "h"), (1, "lb"), (-1, "ub"))
    )
    y, z = y[:, : sol.y.shape[-1]], z[:, : sol.z.shape[-1]]
    assert np.max(np.abs(gradients.q)) <= 1e-4  # rounding over ρ where x is not unique
    signs = kind not in (empty_interior, combined_inequalities, dependent_active, degenerate_vertex)
    assert max(kkt_residuals(operands, x, y, z, z_lb, z_ub, signs=signs)) <= 1e-5
