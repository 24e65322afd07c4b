// The KKT system at the solution of a problem, solved with the factors that are stored of its last iteration, or with a
// factor made for the purpose (engines/array/derivative.py, where the mathematics is explained):
//
//     [ Q   Kᵀ ] [u_x]   [r_x]
//     [ K  −θ  ] [u_v] = [r_v],    θ = s/v at the inequalities, 0 at the equalities, ∞ where there is no constraint;
//                                  with prices of violations s/z + t/r + σ.
//
// For one problem, not for lane groups.
#pragma once
#include "kkt.hpp"

namespace qpdiff {

// A right-hand side of the KKT system, or a residual of it: of the variables and of the constraints.
template <class Team> struct RightHandSide {
    typename Team::Vector x, v;
};

// A solution of the KKT system, with the product Kx.
template <class Team> struct KktSolution {
    typename Team::Vector x, v, Kx;
};

// The accuracy of a solve with the factor of another system, in the scaled problem.
template <class Real> struct Accuracy {
    Real left;  // the residual against the right-hand side
    Real moved; // the likely size of a next correction against the solution
};

template <class Team> struct Derivative {
    using Vector = typename Team::Vector;
    RightHandSide<Team> right;
    KktSolution<Team> u;            // the solution of the KKT system
    Vector x, v, s;                 // the solution of the problem
    Vector theta, weights;          // θ and 1/θ there
    Vector nearly_active;           // 1 for equalities and for inequalities with a small θ, else 0
    Vector per_D, per_E;            // 1/D, 1/E
    RightHandSide<Team> eliminated; // the right-hand side after the elimination of the inactive constraints
    RightHandSide<Team> left;       // the residual of `u`
    RightHandSide<Team> left_after; // the residual after the next correction
    KktSolution<Team> correction;
    KktSolution<Team> best;           // the solution with another factor that left the least so far
    Vector of_inactive;               // the entries of a solution at the inactive constraints, else 0
    typename Team::Indices numbers{}; // the indices of the nearly active constraints
};

// ---- with the factor of another system

// Return whether a constraint is nearly active.
template <class Team, class I> QP_INLINE auto is_nearly_active(const Derivative<Team>& d, I i) {
    return d.nearly_active[i] > typename Team::Entry{};
}

// Return the θ of a row that may have a price, for the product Kx there.
//
// The distances z and r of the multiplier from its limits count as at least a small share of these (`limit_distances`
// in problem.py, which says why).
template <class Team, class I, class N = typename Team::Entry>
QP_INLINE N ratio_with_price(const Problem<Team>& o, const Derivative<Team>& d, I i, N Kx) {
    using Real = typename Team::Real;
    auto priced = limited(o, i);
    N s = d.s[i], v = d.v[i], sigma = o.compliance[i], one = as<N>(Real(1)), zero{};
    N upper = select(priced, o.v_upper[i], one), least = Real(o.parameters->least_distance) * upper;
    N z = select(two_sided(o, i), larger(v - o.v_lower[i], least), v), r = larger(upper - v, least);
    N t = positive(s - (o.k[i] - Kx + sigma * v));
    N other = select(o.kind.equality(i), zero, Real(INFINITY_));
    return select(o.kind.inequality(i), s / z, other) + sigma + select(priced, t / r, zero);
}

// Fill θ and 1/θ at the solution, and find the constraints that are nearly active there. With prices, the matrices have
// to be there.
template <class Team> QP_INLINE void set_point(const Problem<Team>& o, Derivative<Team>& d) {
    using N = typename Team::Entry;
    using Real = typename Team::Real;
    if constexpr (Team::PRICED) {
        constraints(o, d.x, d.u.Kx);
    }
    Team::each(o.rows, [&](auto i) {
        auto equality = o.kind.equality(i), inequality = o.kind.inequality(i);
        N theta;
        if constexpr (Team::PRICED) {
            theta = ratio_with_price(o, d, i, N(d.u.Kx[i]));
        } else {
            theta = select(inequality, d.s[i] / d.v[i], select(equality, N{}, Real(INFINITY_)));
        }
        N scaled = theta * square(o.E[i]);
        d.theta.set(i, theta);
        if constexpr (!Team::SPARSE) { // whose factor has all constraints
            d.weights.set(i, Real(1) / theta);
        }
        auto active = equality | (scaled < as<N>(Real(o.parameters->nearly_active)));
        d.nearly_active.set(i, select(active, as<N>(Real(1)), N{}));
    });
}

// Return the largest entry of a vector, scaled entry by entry, without the inactive constraints.
template <class Team, class Vector = typename Team::Vector>
QP_INLINE auto scaled_size(const Problem<Team>& o, const Derivative<Team>& d, Vector scale_x, Vector scale_v, Vector x,
                           Vector v) {
    using N = typename Team::Entry;
    N size{};
    Team::each(o.np, [&](auto j) { size = larger(absolute(x[j] * scale_x[j]), size); });
    Team::each(o.rows,
               [&](auto i) { size = larger(select(is_nearly_active(d, i), absolute(v[i] * scale_v[i]), N{}), size); });
    return Team::largest(size);
}

// Return a / b, or a where b is 0.
template <class N> QP_INLINE N ratio(N a, N b) {
    return a / select(b > N{}, b, as<N>(1));
}

// Eliminate the inactive constraints from a right-hand side with their own weights 1/θ; return the size of the rest.
template <class Team>
QP_INLINE typename Team::Real eliminate_inactive(const Problem<Team>& o, Derivative<Team>& d,
                                                 const RightHandSide<Team>& right) {
    using N = typename Team::Entry;
    auto to = d.eliminated;
    Team::each(o.rows, [&](auto i) { to.v.set(i, select(is_nearly_active(d, i), N{}, d.weights[i] * right.v[i])); });
    adjoint(o, to.v, to.x);
    Team::each(o.np, [&](auto j) { to.x.set(j, to.x[j] + right.x[j]); });
    Team::each(o.rows, [&](auto i) { to.v.set(i, select(is_nearly_active(d, i), right.v[i], N{})); });
    return scaled_size(o, d, o.D, o.E, to.x, to.v);
}

// Solve for a right-hand side with the factor of another system, the inactive constraints eliminated with the weights
// 1/θ of this one. In the dual form `eliminate_inactive` has to be called for it before.
template <Form FORM, class Team>
QP_NOINLINE void solve_approximately(Problem<Team>& o, Derivative<Team>& d, const RightHandSide<Team>& right,
                                     const KktSolution<Team>& out) {
    if constexpr (FORM == Form::primal) {
        // The form eliminates the other constraints in the same way, which saves half of the products.
        auto weight = [&](auto i) { return select(is_nearly_active(d, i), o.weights[i], d.weights[i]); };
        Team::each(o.rows, [&](auto i) { out.v.set(i, weight(i) * right.v[i]); });
        adjoint(o, out.v, out.x);
        Team::each(o.np, [&](auto j) { out.x.set(j, out.x[j] + right.x[j]); });
        solve_cholesky(o, o.n, out.x);
        constraints(o, out.x, out.Kx);
        Team::each(o.rows, [&](auto i) { out.v.set(i, weight(i) * (out.Kx[i] - right.v[i])); });
    } else {
        eliminate<FORM>(o, d.eliminated.x);
        solve<FORM>(o, d.eliminated.x, d.eliminated.v, out.x, out.v);
        constraints(o, out.x, out.Kx);
        Team::each(o.rows, [&](auto i) {
            auto inactive = d.weights[i] * (out.Kx[i] - right.v[i]);
            out.v.set(i, select(is_nearly_active(d, i), out.v[i], inactive));
        });
    }
}

// Fill `out` with the residual that a solution leaves of `right`.
template <Form FORM, class Team>
QP_NOINLINE void residual(const Problem<Team>& o, const Derivative<Team>& d, const KktSolution<Team>& solution,
                          const RightHandSide<Team>& out) {
    using N = typename Team::Entry;
    hessian<FORM>(o, solution.x, out.x);
    adjoint(o, solution.v, o.columns);
    Team::each(o.np, [&](auto j) { out.x.set(j, d.right.x[j] - out.x[j] - o.columns[j]); });
    Team::each(o.rows, [&](auto i) {
        N value = d.right.v[i] - solution.Kx[i] + d.theta[i] * solution.v[i];
        out.v.set(i, select(o.kind.absent(i), N{}, value));
    });
}

// Solve the system with the factor of another one, by so many rounds of refinement; the solution is left in `u`.
// engines/array/derivative.py explains why it contracts.
template <Form FORM, class Team, class Real = typename Team::Real>
QP_NOINLINE Accuracy<Real> solve_with_inexact_factor(Problem<Team>& o, Derivative<Team>& d, int rounds) {
    const Parameters& P = *o.parameters;
    Real accuracy = Real(P.refined);
    Team::each(o.np, [&](auto j) { d.per_D.set(j, Real(1) / o.D[j]); });
    Team::each(o.rows, [&](auto i) { d.per_E.set(i, Real(1) / o.E[i]); });
    Real asked = eliminate_inactive(o, d, d.right);
    solve_approximately<FORM>(o, d, d.right, d.u);
    residual<FORM>(o, d, d.u, d.left);
    Real left = ratio(scaled_size(o, d, o.D, o.E, d.left.x, d.left.v), asked), moved = 1, last = 1;
    for (int round = 0; round < rounds && !(left <= accuracy && moved <= Real(P.refined_moved) * accuracy); round++) {
        auto c = d.correction;
        if constexpr (FORM != Form::primal) {
            eliminate_inactive(o, d, d.left);
        }
        solve_approximately<FORM>(o, d, d.left, c);
        Real now =
            ratio(scaled_size(o, d, d.per_D, d.per_E, c.x, c.v), scaled_size(o, d, d.per_D, d.per_E, d.u.x, d.u.v));
        // The residual is the difference of the two systems times the solution, and so shrinks as the corrections do.
        Real after = left * ratio(now, last);
        moved = ratio(now * now, last);
        last = now;
        Team::each(o.np, [&](auto j) { c.x.set(j, c.x[j] + d.u.x[j]); });
        Team::each(o.rows, [&](auto i) {
            c.v.set(i, c.v[i] + d.u.v[i]);
            c.Kx.set(i, c.Kx[i] + d.u.Kx[i]);
        });
        // Where that predicts an accurate solution, the products that confirm it are not computed.
        bool predicted =
            left <= Real(P.nearly_refined) && after <= Real(P.well_refined) * accuracy && moved <= accuracy;
        if (!predicted) {
            residual<FORM>(o, d, c, d.left_after);
            after = ratio(scaled_size(o, d, o.D, o.E, d.left_after.x, d.left_after.v), asked);
        }
        // A factor too far off makes it worse from round to round; the best is returned.
        if (predicted || after < left) {
            std::swap(d.u, d.correction);
            std::swap(d.left, d.left_after);
            left = after;
        }
        if (predicted) {
            break;
        }
    }
    return {left, moved};
}

// ---- in the dense dual form, with a factor of the nearly active constraints

// Solve (S + diag(θ)) u_v = `eliminated`; return whether the solution is accurate.
//
// A constraint is inactive here where its θ is `inactive` times its entry of S: it hardly changes the solution of the
// others, and inactive constraints that of each other still less, so that their rows of S are not read. The matrix of
// the nearly active constraints is factored, with the smallest θ raised lest dependent constraints make it singular;
// refinement corrects for both. `while_factoring` and `while_refining` are called with (i, count) for each of `count`
// rows in the passes over the matrix, for software prefetch.
template <class Team, class Factoring, class Refining, class Real = typename Team::Real>
QP_NOINLINE bool solve_nearly_active(Problem<Team>& o, Derivative<Team>& d, Real inactive, Factoring while_factoring,
                                     Refining while_refining) {
    using N = typename Team::Entry;
    const Parameters& P = *o.parameters;
    auto right = d.eliminated.v, u = d.u.v, left = d.left.v, packed = d.correction.v, diagonal = o.lengths;
    Team::take_diagonal(o.S, o.linear, diagonal);
    Team::each(o.lp, [&](auto i) {
        auto absent = o.kind.absent(i);
        auto eliminated = absent | (d.theta[i] > inactive * diagonal[i]);
        N alone = select(absent, N{}, right[i] / d.theta[i]);
        u.set(i, alone);
        d.of_inactive.set(i, select(eliminated, alone, N{}));
        d.nearly_active.set(i, select(eliminated, N{}, as<N>(Real(1))));
        diagonal.set(i, larger(d.theta[i], Real(P.least_theta) / square(o.E[i])));
    });
    int count = Team::list(d.nearly_active, o.linear, d.numbers);
    Team::gather_square(o.S, d.numbers, count, o.U, while_factoring);
    Team::gather(diagonal, d.numbers, count, o.added);
    Team::gather(right, d.numbers, count, packed);
    if (count > 0 && !Team::cholesky(o.U, o.added, o.U, count)) {
        return false;
    }
    solve_cholesky(o, count, packed);
    Team::scatter(packed, d.numbers, count, u);
    for (int round = 0; round < int(P.derivative_rounds); round++) {
        Team::each(o.lp, [&](auto i) { left.set(i, select(o.kind.absent(i), N{}, right[i] - d.theta[i] * u[i])); });
        Team::subtract_product(o.S, o.linear, d.numbers, count, u, d.of_inactive, left, packed, while_refining);
        solve_cholesky(o, count, packed);
        N moved{}, solution{};
        Team::each(o.lp, [&](auto i) {
            N alone = select(is_nearly_active(d, i) | o.kind.absent(i), N{}, left[i] / d.theta[i]);
            left.set(i, alone);
            d.of_inactive.set(i, d.of_inactive[i] + alone);
        });
        Team::scatter(packed, d.numbers, count, left);
        Team::each(o.lp, [&](auto i) {
            N per_E = Real(1) / o.E[i], correction = left[i], before = u[i];
            moved = larger(absolute(correction) * per_E, moved);
            solution = larger(absolute(before) * per_E, solution);
            u.set(i, before + correction);
        });
        Real most_moved, size;
        Team::reduce(Largest{moved, most_moved}, Largest{solution, size});
        if (most_moved <= Real(P.derivative_accuracy) * size) {
            return true;
        }
    }
    return false;
}

// Solve the system with the dense dual form, whose matrix is factored anew; return whether the solution is accurate.
template <class Team, class Factoring, class Refining>
QP_NOINLINE bool solve_dense_dual(Problem<Team>& o, Derivative<Team>& d, Factoring while_factoring,
                                  Refining while_refining) {
    using N = typename Team::Entry;
    using Real = typename Team::Real;
    eliminate<Form::dense_dual>(o, d.right.x);
    Team::each(o.lp, [&](auto i) { d.eliminated.v.set(i, select(o.kind.absent(i), N{}, o.t[i] - d.right.v[i])); });
    bool accurate = solve_nearly_active(o, d, Real(o.parameters->inactive), while_factoring, while_refining) ||
                    solve_nearly_active(o, d, Real(INFINITY_), while_factoring, while_refining);
    solve_variables(o, Real(1), d.u.v, d.u.x);
    return accurate;
}

// ---- with a factor made for the purpose

// Return whether the pivots of a factor of the primal form are above the rounding error: where x is not unique, ρ may
// be lost to rounding beside the weights of the last iteration.
template <class Team> QP_INLINE bool pivots_are_significant(const Problem<Team>& o) {
    return Team::pivots_exceed(o.U, o.n, std::numeric_limits<typename Team::Real>::epsilon(), o.columns);
}

// The θ of a factor made for the purpose in the scaled problem: the limits between which those of nearly active
// inequalities are raised, and that of equalities.
struct RaisedTheta {
    double smallest, largest, equality;
};

// Fill θ and δ of a factor made for the purpose (engines/array/derivative.py explains how).
template <class Team>
QP_INLINE void raise_nearly_active(Problem<Team>& o, const Derivative<Team>& d, const RaisedTheta& to) {
    using N = typename Team::Entry;
    using S = typename Team::Number;
    using Real = typename Team::Real;
    N smallest = as<N>(Real(to.smallest)), largest = as<N>(Real(to.largest)), top_{};
    auto raised = [&](auto i, N scaled) { return o.kind.inequality(i) & (scaled < largest); };
    Team::each(o.rows, [&](auto i) {
        N scaled = d.theta[i] * square(o.E[i]);
        top_ = larger(select(raised(i, scaled), scaled, N{}), top_);
    });
    S top = Team::largest(top_), lift = Real(to.largest) / select(top > S{}, top, as<S>(Real(1)));
    Team::each(o.rows, [&](auto i) {
        N E2 = square(o.E[i]), scaled = d.theta[i] * E2;
        N level = select(raised(i, scaled), smaller(larger(scaled * lift, smallest), largest), scaled);
        N of_equality = larger(scaled, as<N>(Real(to.equality)));
        o.theta.set(i, select(o.kind.equality(i), of_equality, level) / E2);
        o.delta.set(i, N{});
    });
}

// Solve with a new factor of the primal form, whose θ is raised to certain limits.
template <class Team>
QP_NOINLINE Accuracy<typename Team::Real> solve_raised(Problem<Team>& o, Derivative<Team>& d, const RaisedTheta& to) {
    using Real = typename Team::Real;
    const Parameters& P = *o.parameters;
    raise_nearly_active(o, d, to);
    Real rho = Real(P.afresh_rho);
    for (int attempt = 0; attempt < int(P.afresh_attempts); attempt++) {
        Team::each(o.np, [&](auto j) { o.rho.set(j, rho / square(o.D[j])); });
        if (factor<Form::primal>(o) && pivots_are_significant(o)) {
            break;
        }
        rho *= Real(P.afresh_growth);
    }
    return solve_with_inexact_factor<Form::primal>(o, d, int(P.afresh_rounds));
}

// Return how many values of θ of the equalities are tried.
template <class Team> QP_INLINE int afresh_levels(const Problem<Team>& o) {
    return o.p > 0 ? int(o.parameters->afresh_levels) : 1;
}

// Solve with factors made for the purpose, until one is accurate enough.
template <class Team> QP_NOINLINE void solve_afresh(Problem<Team>& o, Derivative<Team>& d) {
    using Real = typename Team::Real;
    const Parameters& P = *o.parameters;
    Real equality = Real(P.afresh_equality), left = Real(INFINITY_);
    for (int level = 0; level < afresh_levels(o) && !(left <= Real(P.factor_residual)); level++) {
        std::swap(d.u, d.best);
        Real now = solve_raised(o, d, {P.afresh_smallest, P.afresh_largest, equality}).left;
        if (level > 0 && !(now < Real(P.afresh_better) * left)) {
            std::swap(d.u, d.best);
        } else {
            left = now;
        }
        equality *= Real(P.afresh_growth);
    }
}

} // namespace qpdiff
