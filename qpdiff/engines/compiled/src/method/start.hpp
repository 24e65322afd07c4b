// Starting points: the ordinary one, one for a fraction of the cost, one near another problem's solution
// (qpdiff.method).
#pragma once
#include "status.hpp"

namespace qpdiff {

// Mean of s ∘ z over the inequalities.
template <class Team, class Vector = typename Team::Vector>
QP_INLINE typename Team::Number mean(const Problem<Team>& o, Vector s, Vector v) {
    typename Team::Entry sum{};
    Team::each(o.rows, [&](auto i) { sum += select(o.kind.inequality(i), s[i] * v[i], typename Team::Real(0)); });
    return Team::sum(sum) / o.inequalities;
}

// Count the inequalities.
template <class Team> QP_INLINE void count_inequalities(Problem<Team>& o) {
    using N = typename Team::Entry;
    using Real = typename Team::Real;
    N count{};
    Team::each(o.rows, [&](auto i) { count += select(o.kind.inequality(i), N{} + Real(1), Real(0)); });
    auto sum = Team::sum(count), one = as<typename Team::Number>(Real(1));
    o.inequalities = larger(sum, one);
    o.any_inequality = some(sum >= one);
}

// The ρ to begin with; a dense Q that is reduced to the rows is definite without.
template <Form FORM, class Team> QP_INLINE typename Team::Number first_rho(const Problem<Team>& o) {
    return as<typename Team::Number>(FORM == Form::dense_dual ? 0.0 : o.settings->rho);
}

// Fill the diagonals of the KKT matrix that the starting point is made with: θ is 1 in the scaled rows, more in those
// that are loose, as else a bound of 1e12 that means none would draw the starting point half of the way there.
template <Form FORM, class Team> QP_INLINE void first_diagonals(Problem<Team>& o) {
    using N = typename Team::Entry;
    using Real = typename Team::Real;
    Real delta = o.settings->delta;
    auto rho = first_rho<FORM>(o), far = Real(o.parameters->loose) * o.reach;
    Team::each(o.np, [&](auto j) {
        N metric = Real(1) / square(o.D[j]);
        o.metric_x.set(j, metric);
        o.rho.set(j, rho * metric);
    });
    Team::each(o.rows, [&](auto i) {
        N scale = o.E[i], metric = Real(1) / square(scale), distance = larger(scale * o.k[i] / far, as<N>(Real(1)));
        o.metric_v.set(i, metric);
        o.delta.set(i, delta * metric);
        auto other = select(o.kind.equality(i), N{}, Real(INFINITY_));
        o.theta.set(i, select(o.kind.inequality(i), distance * metric, other));
    });
}

// Move slacks and multipliers onto s ∘ z = μ with the difference z − s in the scaled rows kept.
template <class Team, class Vector = typename Team::Vector>
QP_INLINE void center_on_path(Problem<Team>& o, Vector difference, typename Team::Number mu, Vector v, Vector s) {
    using N = typename Team::Entry;
    using Real = typename Team::Real;
    Team::each(o.rows, [&](auto i) {
        N d = difference[i], scale = o.E[i];
        N large = (absolute(d) + root(d * d + Real(4) * mu)) * Real(0.5), small = mu / large;
        auto up = d > N{}, inequality = o.kind.inequality(i);
        s.set(i, select(inequality, select(up, small, large) / scale, Real(0)));
        N other = select(o.kind.equality(i), v[i], Real(0));
        v.set(i, select(inequality, select(up, large, small) * scale, other));
    });
}

// Center the starting point: slacks and multipliers for the multipliers that `now` has; the mean complementarity.
template <class Team> QP_NOINLINE typename Team::Number center_start(Problem<Team>& o, Iterate<Team>& now) {
    using N = typename Team::Entry;
    using S = typename Team::Number;
    using Real = typename Team::Real;
    auto difference = o.lengths;
    N most_{}, least_{}, sum{};
    Team::each(o.rows, [&](auto i) {
        N z = select(o.kind.inequality(i), now.v[i] / o.E[i], Real(0));
        difference.set(i, z);
        most_ = larger(z, most_);
        least_ = larger(-z, least_);
    });
    S most = Team::largest(most_), least = Team::largest(least_);
    Team::each(o.rows, [&](auto i) {
        N z = difference[i];
        sum += select(o.kind.inequality(i), (z + least) * (most - z), Real(0));
        N scaled_theta = select(o.kind.inequality(i), square(o.E[i]) * o.theta[i], Real(0));
        difference.set(i, z * scaled_theta);
    });
    S mu = larger(Team::sum(sum) / o.inequalities, Real(o.parameters->least_centrality) * square(larger(most, least)));
    mu = larger(mu, Real(o.settings->smallest) * o.primal_unit * o.dual_unit);
    center_on_path(o, difference, mu, now.v, now.s);
    return mean(o, now.s, now.v);
}

// How problems begin.
template <class Team> struct Start {
    typename Team::Number mu;
    Verdict<Team> verdict;
    typename Team::Truth factor_ok;
    typename Team::Number multiplier_ratio; // 0 where it is of no interest
};

// Compute the starting point in `now`, the solution with θ of `first_diagonals`; whether the matrix could be factored.
template <Form FORM, class Team>
QP_NOINLINE typename Team::Truth starting_point(Problem<Team>& o, Iterate<Team>& now, typename Team::Number& mu) {
    using Real = typename Team::Real;
    first_diagonals<FORM>(o);
    Team::each(o.np, [&](auto j) { now.r_x.set(j, -o.q[j]); });
    copy<Team>(o.k, now.r_v, o.rows);
    auto factor_ok = factor<FORM>(o), sound = factor_ok;
    if (some(factor_ok)) {
        eliminate<FORM>(o, now.r_x);
        solve_refined<FORM>(o, factor_ok, now.r_x, now.r_v);
        sound &= all_finite<Team>(o.dx, o.np) & all_finite<Team>(o.dv, o.rows);
    }
    Team::each(o.np, [&](auto j) { now.x.set(j, select(sound, o.dx[j], Real(0))); });
    Team::each(o.rows, [&](auto i) { now.v.set(i, select(sound, o.dv[i], Real(0))); });
    mu = center_start(o, now);
    return factor_ok;
}

// The largest multiplier of an equality against the largest variable in the scaled problem.
template <class Team>
QP_NOINLINE typename Team::Number multiplier_ratio(const Problem<Team>& o, const Iterate<Team>& now) {
    using N = typename Team::Entry;
    using S = typename Team::Number;
    using Real = typename Team::Real;
    N x_{}, v_{};
    Team::each(o.np, [&](auto j) { x_ = larger(absolute(now.x[j] / o.D[j]), x_); });
    Team::each(o.rows,
               [&](auto i) { v_ = larger(select(o.kind.equality(i), absolute(now.v[i] / o.E[i]), Real(0)), v_); });
    S x = Team::largest(x_), v = Team::largest(v_);
    return v / select(x > S{}, x, as<S>(Real(1)));
}

// Start in `now` in the ordinary way.
template <Form FORM, class Team>
QP_NOINLINE Start<Team> begin(Problem<Team>& o, Iterate<Team>& now, Iterate<Team>& before) {
    using Real = typename Team::Real;
    Start<Team> start{};
    start.factor_ok = starting_point<FORM>(o, now, start.mu);
    set_zero<Team>(before.x, o.np);
    set_zero<Team>(before.v, o.rows);
    Team::each_exactly(o.np, [&](auto j) { before.Qx.set(j, 0.0); });
    Team::each_exactly(o.rows, [&](auto i) { before.Kx.set(i, 0.0); });
    start.verdict = assess<FORM>(o, now, before, unknown<Team>(), 0, o.settings->max_iterations);
    // In float32 the proximal terms, which a smaller cost makes larger against it, would outweigh it.
    if (FORM != Form::dense_dual && sizeof(Real) == 8 && (o.p > 0 || (o.lower && o.upper))) {
        start.multiplier_ratio = multiplier_ratio(o, now);
    }
    return start;
}

// The same, for one problem; where the multipliers of equalities are large because of the cost, as in optimal control
// of an unstable plant, the ordinary start is far from feasible, and one for a fraction of the cost may be closer.
template <Form FORM, class Team>
QP_NOINLINE Start<Team> begin_closer(Problem<Team>& o, Iterate<Team>& now, Iterate<Team>& before) {
    const Parameters& P = *o.parameters;
    Start<Team> start = begin<FORM>(o, now, before);
    if (!(start.multiplier_ratio > P.large_multipliers)) {
        return start;
    }
    scale_cost(o, P.smaller_cost);
    Start<Team> other = begin<FORM>(o, now, before);
    if (other.verdict.primal < P.closer * start.verdict.primal &&
        other.multiplier_ratio < P.less_multipliers * start.multiplier_ratio) {
        return other;
    }
    scale_cost(o, 1 / P.smaller_cost);
    return begin<FORM>(o, now, before);
}

// Move another problem's solution in `now` onto a point of s ∘ z = μ; the mean complementarity. For one problem. μ
// grows with what that solution leaves of the residuals here, so that the slacks let the steps make up for it.
template <class Team>
QP_NOINLINE typename Team::Number start_near(Problem<Team>& o, Iterate<Team>& now, typename Team::Number ordinary_mu) {
    using N = typename Team::Entry;
    using Real = typename Team::Real;
    auto slack = o.dv, difference = o.lengths;
    constraints(o, now.x, slack);
    Team::product(o.Q, o.n, o.n, now.x, o.dx);
    adjoint(o, now.v, o.columns);
    N error_{};
    Team::each(o.rows, [&](auto i) {
        N scale = o.E[i], value = scale * (o.k[i] - slack[i]);
        auto inequality = o.kind.inequality(i);
        N amiss = select(inequality, positive(-value), select(o.kind.equality(i), absolute(value), Real(0)));
        error_ = larger(amiss, error_);
        difference.set(i, select(inequality, now.v[i] / scale - value, Real(0)));
    });
    Team::each(o.np, [&](auto j) { error_ = larger(absolute(o.D[j] * (o.dx[j] + o.q[j] + o.columns[j])), error_); });
    Real unit = o.primal_unit * o.dual_unit;
    Real mu = Real(o.parameters->warm_centrality) * Team::largest(error_) * std::sqrt(unit);
    mu = mu < ordinary_mu ? mu : ordinary_mu;
    mu = std::max(mu, std::max(Real(o.settings->tol), Real(o.settings->smallest)) * unit);
    center_on_path(o, difference, mu, now.v, now.s);
    return mean(o, now.s, now.v);
}

} // namespace qpdiff
