// Starting points: the ordinary one, one for a fraction of the cost, one near the solution of another problem.
#pragma once
#include "status.hpp"

namespace qpdiff {

// Return the mean of s ∘ z over the inequalities; with prices, of s ∘ z and t ∘ r.
template <class Team> QP_INLINE typename Team::Number mean(const Problem<Team>& o, const Iterate<Team>& at) {
    typename Team::Entry sum{};
    auto z = distance(at);
    Team::each(o.rows, [&](auto i) {
        sum += select(o.kind.inequality(i), at.s[i] * z[i], typename Team::Real(0));
        if constexpr (Team::PRICED) {
            sum += at.t[i] * at.r[i];
        }
    });
    return Team::sum(sum) / o.pairs;
}

// Fill `inequalities`, `pairs` and `any_inequality`.
template <class Team> QP_INLINE void count_inequalities(Problem<Team>& o) {
    using N = typename Team::Entry;
    using S = typename Team::Number;
    using Real = typename Team::Real;
    N count{};
    Team::each(o.rows, [&](auto i) { count += select(o.kind.inequality(i), N{} + Real(1), Real(0)); });
    S sum = Team::sum(count), one = as<S>(Real(1));
    o.pairs = o.inequalities = larger(sum, one);
    o.any_inequality = some(sum >= one);
    if constexpr (Team::PRICED) {
        N of_upper_{}, from_both_{};
        Team::each(o.rows, [&](auto i) {
            of_upper_ += select(limited(o, i), N{} + Real(1), Real(0));
            from_both_ += select(two_sided(o, i), N{} + Real(1), Real(0));
        });
        S of_upper, from_both;
        Team::reduce(Sum{of_upper_, of_upper}, Sum{from_both_, from_both});
        o.inequalities = larger(sum - from_both, one);
        o.pairs = larger(sum + of_upper, one);
    }
}

// Return the ρ to begin with; the dense dual form, whose Q is definite, has none.
template <Form FORM, class Team> QP_INLINE typename Team::Number first_rho(const Problem<Team>& o) {
    return as<typename Team::Number>(FORM == Form::dense_dual ? 0.0 : o.parameters->rho);
}

// Fill the diagonals of the KKT matrix that the starting point is made with. θ is 1 in the scaled constraints, more in
// those that are loose: else a bound of 1e12 that means none would draw the starting point half of the way there.
template <Form FORM, class Team> QP_INLINE void first_diagonals(Problem<Team>& o) {
    using N = typename Team::Entry;
    using Real = typename Team::Real;
    Real delta = o.parameters->delta;
    auto rho = first_rho<FORM>(o), far = Real(o.parameters->loose) * o.reach;
    Team::each(o.np, [&](auto j) {
        N per_D2 = Real(1) / square(o.D[j]);
        o.per_D2.set(j, per_D2);
        o.rho.set(j, rho * per_D2);
    });
    Team::each(o.rows, [&](auto i) {
        N scale = o.E[i], per_E2 = Real(1) / square(scale), distance = larger(scale * o.k[i] / far, as<N>(Real(1)));
        o.per_E2.set(i, per_E2);
        o.delta.set(i, delta * per_E2);
        auto other = select(o.kind.equality(i), N{}, Real(INFINITY_));
        N theta = select(o.kind.inequality(i), distance * per_E2, other);
        if constexpr (Team::PRICED) {
            theta = select(two_sided(o, i), N{}, theta) + o.compliance[i];
        }
        o.theta.set(i, theta);
    });
}

// Move rows with a linear price, which `center_on_path` has treated as those without, to where s ∘ z = t ∘ r = μ and
// v − s + t has a given difference in the scaled constraints; the pair of the limit that is farther from it does not
// count in the difference. Fill t, z and r.
template <class Team, class N = typename Team::Entry>
QP_NOINLINE void center_between_limits(const Problem<Team>& o, typename Team::Vector difference,
                                       typename Team::Number mu, const Iterate<Team>& at) {
    using Real = typename Team::Real;
    Real half = Real(0.5);
    Team::each(o.rows, [&](auto i) {
        auto priced = limited(o, i);
        N d = difference[i], scale = o.E[i], zero{};
        N upper = select(priced, o.v_upper[i] / scale, Real(1)), lower = o.v_lower[i] / scale, width = upper - lower;
        auto below = Real(2) * d <= lower + upper;
        N to_limit = select(below, d - lower, upper - d);
        N large = (absolute(to_limit) + root(to_limit * to_limit + Real(4) * mu)) * half, moved = mu / large;
        N near = smaller(select(to_limit > zero, large, moved), width * half), far = width - near;
        // Not the limit and the distance from it where the limit may be so large that it drowns the multiplier.
        auto inside = (to_limit > zero) & (large < width * half);
        N from_difference = select(below, d + moved, d - moved);
        N v = select(inside, from_difference, select(below, lower + near, upper - near));
        N of_lower = select(below, near, far), of_upper = select(below, far, near);
        at.s.set(i, select(priced, mu / of_lower / scale, at.s[i]));
        at.z.set(i, select(priced, of_lower * scale, select(o.kind.inequality(i), at.v[i], zero)));
        at.v.set(i, select(priced, v * scale, at.v[i]));
        at.t.set(i, select(priced, mu / of_upper / scale, zero));
        at.r.set(i, select(priced, of_upper * scale, zero));
    });
}

// Set slacks and multipliers to the point of s ∘ z = μ with a given difference z − s in the scaled constraints; the
// multipliers of equalities stay.
template <class Team>
QP_INLINE void center_on_path(Problem<Team>& o, typename Team::Vector difference, typename Team::Number mu,
                              const Iterate<Team>& at) {
    using N = typename Team::Entry;
    using Real = typename Team::Real;
    auto s = at.s, v = at.v;
    Team::each(o.rows, [&](auto i) {
        N d = difference[i], scale = o.E[i];
        N large = (absolute(d) + root(d * d + Real(4) * mu)) * Real(0.5), small = mu / large;
        auto z_larger = d > N{}, inequality = o.kind.inequality(i);
        s.set(i, select(inequality, select(z_larger, small, large) / scale, Real(0)));
        N other = select(o.kind.equality(i), v[i], Real(0));
        v.set(i, select(inequality, select(z_larger, large, small) * scale, other));
    });
    if constexpr (Team::PRICED) {
        center_between_limits(o, difference, mu, at);
    }
}

// Center the multipliers of `current`, a solution with θ, and fill its slacks; return the mean complementarity.
template <class Team> QP_NOINLINE typename Team::Number center_start(Problem<Team>& o, Iterate<Team>& current) {
    using N = typename Team::Entry;
    using S = typename Team::Number;
    using Real = typename Team::Real;
    auto difference = o.lengths;
    auto one_sided = [&](auto i) {
        if constexpr (Team::PRICED) {
            return o.kind.inequality(i) & no(two_sided(o, i));
        } else {
            return o.kind.inequality(i);
        }
    };
    N most_{}, least_{}, sum{};
    Team::each(o.rows, [&](auto i) {
        N z = select(one_sided(i), current.v[i] / o.E[i], Real(0));
        difference.set(i, z);
        most_ = larger(z, most_);
        least_ = larger(-z, least_);
    });
    S most, least;
    Team::reduce(Largest{most_, most}, Largest{least_, least});
    S size = larger(most, least);
    Team::each(o.rows, [&](auto i) {
        N z = difference[i];
        sum += select(one_sided(i), (z + least) * (most - z), Real(0));
        N scaled_theta = select(one_sided(i), square(o.E[i]) * o.theta[i], Real(0));
        difference.set(i, z * scaled_theta);
    });
    if constexpr (Team::PRICED) {
        N any_{}, multiplier_{};
        Team::each(o.rows, [&](auto i) {
            auto both = two_sided(o, i);
            N v = current.v[i], of_limit = smaller(absolute(v), N(o.v_upper[i])) / o.E[i];
            any_ = larger(select(one_sided(i), N{} + Real(1), Real(0)), any_);
            multiplier_ = larger(select(both, of_limit, Real(0)), multiplier_);
            difference.set(i, select(both, v / o.E[i], difference[i]));
        });
        // Equalities with a price decide where there are no inequalities.
        S any, multiplier;
        Team::reduce(Largest{any_, any}, Largest{multiplier_, multiplier});
        size = select(any > S{}, size, multiplier);
    }
    S mu = larger(Team::sum(sum) / o.inequalities, Real(o.parameters->least_centrality) * square(size));
    mu = larger(mu, Real(o.parameters->smallest) * o.primal_unit * o.dual_unit);
    center_on_path(o, difference, mu, current);
    return mean(o, current);
}

// A starting point, beside its iterate.
template <class Team> struct Start {
    typename Team::Number mu;
    State<Team> state;
    typename Team::Truth factor_ok;         // of the factor that it was made with
    typename Team::Number multiplier_ratio; // 0 where it is not needed
};

// Set `origin` to x = 0 and v = 0 with the products there.
template <class Team> QP_INLINE void make_origin(const Problem<Team>& o, Iterate<Team>& origin) {
    set_zero<Team>(origin.x, o.np);
    set_zero<Team>(origin.v, o.rows);
    Team::each_exactly(o.np, [&](auto j) { origin.Qx.set(j, 0.0); });
    Team::each_exactly(o.rows, [&](auto i) { origin.Kx.set(i, 0.0); });
}

// Solve with θ = 1 in the scaled constraints and center the solution in `current` (PIQP); return whether the matrix
// could be factored, and fill μ.
template <Form FORM, class Team>
QP_NOINLINE typename Team::Truth starting_point(Problem<Team>& o, Iterate<Team>& current, typename Team::Number& mu) {
    using Real = typename Team::Real;
    first_diagonals<FORM>(o);
    Team::each(o.np, [&](auto j) { current.r_x.set(j, -o.q[j]); });
    copy<Team>(o.k, current.r_v, o.rows);
    auto factor_ok = factor<FORM>(o), computed = factor_ok;
    if (some(factor_ok)) {
        eliminate<FORM>(o, current.r_x);
        solve_refined<FORM>(o, factor_ok, current.r_x, current.r_v);
        computed &= all_finite<Team>(o.dx, o.np) & all_finite<Team>(o.dv, o.rows);
    }
    Team::each(o.np, [&](auto j) { current.x.set(j, select(computed, o.dx[j], Real(0))); });
    Team::each(o.rows, [&](auto i) { current.v.set(i, select(computed, o.dv[i], Real(0))); });
    mu = center_start(o, current);
    return factor_ok;
}

// Return the largest multiplier of an equality against the largest variable in the scaled problem.
template <class Team>
QP_NOINLINE typename Team::Number multiplier_ratio(const Problem<Team>& o, const Iterate<Team>& current) {
    using N = typename Team::Entry;
    using S = typename Team::Number;
    using Real = typename Team::Real;
    N x_{}, v_{};
    Team::each(o.np, [&](auto j) { x_ = larger(absolute(current.x[j] / o.D[j]), x_); });
    Team::each(o.rows,
               [&](auto i) { v_ = larger(select(o.kind.equality(i), absolute(current.v[i] / o.E[i]), Real(0)), v_); });
    S x, v;
    Team::reduce(Largest{x_, x}, Largest{v_, v});
    return v / select(x > S{}, x, as<S>(Real(1)));
}

// Return whether a start for a smaller cost is to be tried.
template <class Team> QP_INLINE auto has_large_multipliers(const Problem<Team>& o, const Start<Team>& start) {
    return start.multiplier_ratio > as<typename Team::Number>(typename Team::Real(o.parameters->large_multipliers));
}

// Return where a starting point is kept: in vectors of the origin that nothing reads.
template <class Team> QP_INLINE Iterate<Team> kept_in(const Iterate<Team>& origin) {
    Iterate<Team> kept = origin;
    kept.x = origin.r_x, kept.v = origin.r_v;
    return kept;
}

// Start in the ordinary way: fill `current`, and `previous` with the origin. With `keep`, the point is kept beside that
// where a start for a smaller cost is to be tried.
template <Form FORM, class Team>
QP_NOINLINE Start<Team> begin(Problem<Team>& o, Iterate<Team>& current, Iterate<Team>& previous, bool keep) {
    using Real = typename Team::Real;
    Start<Team> start{};
    start.factor_ok = starting_point<FORM>(o, current, start.mu);
    make_origin(o, previous);
    // In float32 the regularisation, which a smaller cost makes larger against it, would outweigh it.
    if (FORM != Form::dense_dual && sizeof(Real) == 8 && (o.p > 0 || (o.lower && o.upper))) {
        start.multiplier_ratio = multiplier_ratio(o, current);
        if (keep && some(has_large_multipliers(o, start))) {
            copy_point(o, current, kept_in(previous));
        }
    }
    start.state = assess<FORM>(o, current, previous, unknown_state<Team>(), 0, o.settings->max_iterations);
    return start;
}

// Start in the ordinary way, or for a fraction of the cost where that is closer to feasible.
//
// Where the multipliers of equalities are large because of the cost, as in optimal control of an unstable plant, the
// ordinary starting point is far from feasible; one for a fraction of the cost takes its place if it is closer.
template <Form FORM, class Team>
QP_NOINLINE Start<Team> begin_closer(Problem<Team>& o, Iterate<Team>& current, Iterate<Team>& previous) {
    using S = typename Team::Number;
    using E = typename Team::Exact;
    using Real = typename Team::Real;
    const Parameters& P = *o.parameters;
    Start<Team> start = begin<FORM>(o, current, previous, true);
    typename Team::Truth large = has_large_multipliers(o, start);
    if (!some(large)) {
        return start;
    }
    scale_cost(o, select(large, as<S>(Real(P.smaller_cost)), Real(1)));
    Start<Team> other = begin<FORM>(o, current, previous, false);
    typename Team::Truth closer = (other.state.primal < E(P.closer * start.state.primal)) &
                                  (other.multiplier_ratio < Real(P.less_multipliers) * start.multiplier_ratio),
                         farther = large & no(closer);
    if (!some(farther)) {
        return other;
    }
    scale_cost(o, select(farther, as<S>(Real(1 / P.smaller_cost)), Real(1)));
    first_diagonals<FORM>(o);
    if constexpr (Team::lanes) {
        exchange_points(o, farther, current, kept_in(previous));
    } else {
        copy_point(o, kept_in(previous), current);
    }
    State<Team> state = assess<FORM>(o, current, previous, unknown_state<Team>(), 0, o.settings->max_iterations);
    typename Team::Truth factor_ok = (farther & start.factor_ok) | (no(farther) & other.factor_ok);
    return {select(farther, start.mu, other.mu), choose<Team>(farther, state, other.state), factor_ok,
            select(farther, start.multiplier_ratio, other.multiplier_ratio)};
}

// Center another problem's solution in `current`, a warm start; return the mean complementarity.
//
// μ grows with what that solution leaves of the residuals here, so that the slacks let the steps make up for it, up to
// the μ of the ordinary start.
template <class Team>
QP_NOINLINE typename Team::Number center_warm_start(Problem<Team>& o, Iterate<Team>& current,
                                                    typename Team::Number ordinary_mu) {
    using N = typename Team::Entry;
    using S = typename Team::Number;
    using Real = typename Team::Real;
    auto slack = o.dv, difference = o.lengths;
    constraints(o, current.x, slack);
    Team::product(o.Q, o.n, o.n, current.x, o.dx);
    adjoint(o, current.v, o.columns);
    N error_{};
    Team::each(o.rows, [&](auto i) {
        N scale = o.E[i], value = scale * (o.k[i] - slack[i]);
        auto inequality = o.kind.inequality(i);
        if constexpr (Team::PRICED) {
            value += scale * o.compliance[i] * current.v[i];
        }
        N violation = select(inequality, positive(-value), select(o.kind.equality(i), absolute(value), Real(0)));
        if constexpr (Team::PRICED) { // what is violated at its price is no error
            auto both = two_sided(o, i);
            N v = current.v[i], upper = o.v_upper[i], of_lower = select(both, absolute(upper + v), Real(0));
            N to_limit = select(value < N{}, absolute(upper - v), of_lower);
            violation = select(both, absolute(value), violation);
            violation = select(limited(o, i), smaller(violation, to_limit / scale), violation);
        }
        error_ = larger(violation, error_);
        difference.set(i, select(inequality, current.v[i] / scale - value, Real(0)));
    });
    Team::each(o.np, [&](auto j) { error_ = larger(absolute(o.D[j] * (o.dx[j] + o.q[j] + o.columns[j])), error_); });
    S unit = o.primal_unit * o.dual_unit;
    S mu = Real(o.parameters->warm_centrality) * Team::largest(error_) * root(unit);
    mu = select(mu < ordinary_mu, mu, ordinary_mu);
    mu = larger(std::max(Real(o.settings->tol), Real(o.parameters->smallest)) * unit, mu);
    center_on_path(o, difference, mu, current);
    return mean(o, current);
}

// A warm start: the state there, its mean complementarity, and for which problems it is of use.
template <class Team> struct WarmStart {
    State<Team> state;
    typename Team::Number mu;
    typename Team::Truth usable;
};

// Start at other problems' solutions in `current`, which those of the mask `warm` have.
template <Form FORM, class Team>
QP_INLINE WarmStart<Team> begin_warm(Problem<Team>& o, Iterate<Team>& current, typename Team::Truth warm,
                                     const State<Team>& ordinary, typename Team::Number ordinary_mu) {
    using E = typename Team::Exact;
    WarmStart<Team> start;
    start.mu = center_warm_start(o, current, ordinary_mu);
    start.state = assess<FORM>(o, current, current, ordinary, 0, o.settings->max_iterations);
    start.usable = warm & ((start.state.status == as<E>(RUNNING)) | (start.state.status == as<E>(SOLVED)));
    // Also from a solution one step is taken: the derivative needs its factor.
    start.state.status = as<E>(RUNNING);
    return start;
}

} // namespace qpdiff
