// Starting points: the ordinary one, one for a fraction of the cost, one near the solution of another problem.
#pragma once
#include "status.hpp"

namespace qpdiff {

// Return the mean of s ∘ z over the inequalities.
template <class Team, class Vector = typename Team::Vector>
QP_INLINE typename Team::Number mean(const Problem<Team>& o, Vector s, Vector v) {
    typename Team::Entry sum{};
    Team::each(o.rows, [&](auto i) { sum += select(o.kind.inequality(i), s[i] * v[i], typename Team::Real(0)); });
    return Team::sum(sum) / o.inequalities;
}

// Fill `inequalities` and `any_inequality`.
template <class Team> QP_INLINE void count_inequalities(Problem<Team>& o) {
    using N = typename Team::Entry;
    using Real = typename Team::Real;
    N count{};
    Team::each(o.rows, [&](auto i) { count += select(o.kind.inequality(i), N{} + Real(1), Real(0)); });
    auto sum = Team::sum(count), one = as<typename Team::Number>(Real(1));
    o.inequalities = larger(sum, one);
    o.any_inequality = some(sum >= one);
}

// Return the ρ to begin with; the dense dual form, whose Q is definite, has none.
template <Form FORM, class Team> QP_INLINE typename Team::Number first_rho(const Problem<Team>& o) {
    return as<typename Team::Number>(FORM == Form::dense_dual ? 0.0 : o.settings->rho);
}

// Fill the diagonals of the KKT matrix that the starting point is made with. θ is 1 in the scaled constraints, more in
// those that are loose: else a bound of 1e12 that means none would draw the starting point half of the way there.
template <Form FORM, class Team> QP_INLINE void first_diagonals(Problem<Team>& o) {
    using N = typename Team::Entry;
    using Real = typename Team::Real;
    Real delta = o.settings->delta;
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
        o.theta.set(i, select(o.kind.inequality(i), distance * per_E2, other));
    });
}

// Set slacks and multipliers to the point of s ∘ z = μ with a given difference z − s in the scaled constraints; the
// multipliers of equalities stay.
template <class Team, class Vector = typename Team::Vector>
QP_INLINE void center_on_path(Problem<Team>& o, Vector difference, typename Team::Number mu, Vector v, Vector s) {
    using N = typename Team::Entry;
    using Real = typename Team::Real;
    Team::each(o.rows, [&](auto i) {
        N d = difference[i], scale = o.E[i];
        N large = (absolute(d) + root(d * d + Real(4) * mu)) * Real(0.5), small = mu / large;
        auto z_larger = d > N{}, inequality = o.kind.inequality(i);
        s.set(i, select(inequality, select(z_larger, small, large) / scale, Real(0)));
        N other = select(o.kind.equality(i), v[i], Real(0));
        v.set(i, select(inequality, select(z_larger, large, small) * scale, other));
    });
}

// Center the multipliers of `current`, a solution with θ, and fill its slacks; return the mean complementarity.
template <class Team> QP_NOINLINE typename Team::Number center_start(Problem<Team>& o, Iterate<Team>& current) {
    using N = typename Team::Entry;
    using S = typename Team::Number;
    using Real = typename Team::Real;
    auto difference = o.lengths;
    N most_{}, least_{}, sum{};
    Team::each(o.rows, [&](auto i) {
        N z = select(o.kind.inequality(i), current.v[i] / o.E[i], Real(0));
        difference.set(i, z);
        most_ = larger(z, most_);
        least_ = larger(-z, least_);
    });
    S most, least;
    Team::reduce(Largest{most_, most}, Largest{least_, least});
    Team::each(o.rows, [&](auto i) {
        N z = difference[i];
        sum += select(o.kind.inequality(i), (z + least) * (most - z), Real(0));
        N scaled_theta = select(o.kind.inequality(i), square(o.E[i]) * o.theta[i], Real(0));
        difference.set(i, z * scaled_theta);
    });
    S mu = larger(Team::sum(sum) / o.inequalities, Real(o.parameters->least_centrality) * square(larger(most, least)));
    mu = larger(mu, Real(o.settings->smallest) * o.primal_unit * o.dual_unit);
    center_on_path(o, difference, mu, current.v, current.s);
    return mean(o, current.s, current.v);
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

// Start in the ordinary way: fill `current`, and `previous` with the origin.
template <Form FORM, class Team>
QP_NOINLINE Start<Team> begin(Problem<Team>& o, Iterate<Team>& current, Iterate<Team>& previous) {
    using Real = typename Team::Real;
    Start<Team> start{};
    start.factor_ok = starting_point<FORM>(o, current, start.mu);
    make_origin(o, previous);
    start.state = assess<FORM>(o, current, previous, unknown_state<Team>(), 0, o.settings->max_iterations);
    // In float32 the regularisation, which a smaller cost makes larger against it, would outweigh it.
    if (FORM != Form::dense_dual && sizeof(Real) == 8 && (o.p > 0 || (o.lower && o.upper))) {
        start.multiplier_ratio = multiplier_ratio(o, current);
    }
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
    Start<Team> start = begin<FORM>(o, current, previous);
    typename Team::Truth large = start.multiplier_ratio > as<S>(Real(P.large_multipliers));
    if (!some(large)) {
        return start;
    }
    scale_cost(o, select(large, as<S>(Real(P.smaller_cost)), Real(1)));
    Start<Team> other = begin<FORM>(o, current, previous);
    typename Team::Truth closer = (other.state.primal < E(P.closer * start.state.primal)) &
                                  (other.multiplier_ratio < Real(P.less_multipliers) * start.multiplier_ratio),
                         farther = large & no(closer);
    if (!some(farther)) {
        return other;
    }
    scale_cost(o, select(farther, as<S>(Real(1 / P.smaller_cost)), Real(1)));
    return begin<FORM>(o, current, previous);
}

// Center another problem's solution in `current`, a warm start; return the mean complementarity. For one problem.
//
// μ grows with what that solution leaves of the residuals here, so that the slacks let the steps make up for it, up to
// the μ of the ordinary start.
template <class Team>
QP_NOINLINE typename Team::Number begin_warm(Problem<Team>& o, Iterate<Team>& current,
                                             typename Team::Number ordinary_mu) {
    using N = typename Team::Entry;
    using Real = typename Team::Real;
    auto slack = o.dv, difference = o.lengths;
    constraints(o, current.x, slack);
    Team::product(o.Q, o.n, o.n, current.x, o.dx);
    adjoint(o, current.v, o.columns);
    N error_{};
    Team::each(o.rows, [&](auto i) {
        N scale = o.E[i], value = scale * (o.k[i] - slack[i]);
        auto inequality = o.kind.inequality(i);
        N violation = select(inequality, positive(-value), select(o.kind.equality(i), absolute(value), Real(0)));
        error_ = larger(violation, error_);
        difference.set(i, select(inequality, current.v[i] / scale - value, Real(0)));
    });
    Team::each(o.np, [&](auto j) { error_ = larger(absolute(o.D[j] * (o.dx[j] + o.q[j] + o.columns[j])), error_); });
    Real unit = o.primal_unit * o.dual_unit;
    Real mu = Real(o.parameters->warm_centrality) * Team::largest(error_) * std::sqrt(unit);
    mu = mu < ordinary_mu ? mu : ordinary_mu;
    mu = std::max(mu, std::max(Real(o.settings->tol), Real(o.settings->smallest)) * unit);
    center_on_path(o, difference, mu, current.v, current.s);
    return mean(o, current.s, current.v);
}

} // namespace qpdiff
