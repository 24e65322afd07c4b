// A predictor-corrector step (qpdiff.method): the right-hand sides, the step lengths, what decides on refinement and on
// the proximal terms of the next one.
#pragma once
#include "start.hpp"

namespace qpdiff {

// The largest steps in [0, 1] that keep s and z, of which 1/s and 1/z are known, ≥ (1 − fraction) times what they are.
template <class Team, class S = typename Team::Number>
QP_INLINE void step_lengths(const Problem<Team>& o, S fraction, S& alpha_s, S& alpha_z) {
    using N = typename Team::Entry;
    using Real = typename Team::Real;
    N of_s{}, of_z{};
    Team::each(o.rows, [&](auto i) {
        auto inequality = o.kind.inequality(i);
        of_s = larger(select(inequality, -o.ds[i] * o.per_s[i], Real(0)), of_s);
        of_z = larger(select(inequality, -o.dv[i] * o.per_z[i], Real(0)), of_z);
    });
    S one = as<S>(Real(1));
    alpha_s = Real(1) / larger(Team::largest(of_s) / fraction, one);
    alpha_z = Real(1) / larger(Team::largest(of_z) / fraction, one);
}

// Fill the diagonals of the KKT matrix at `before`, and the predictor's right-hand side of the rows. A division takes
// as long as many products, so each is done once.
template <Form FORM, class Team, class S = typename Team::Number>
QP_INLINE void predictor_rhs(Problem<Team>& o, S rho, S delta, const Iterate<Team>& before) {
    using N = typename Team::Entry;
    using Real = typename Team::Real;
    if constexpr (FORM != Form::dense_dual) {
        Team::each(o.np, [&](auto j) { o.rho.set(j, rho * o.metric_x[j]); });
    }
    Team::each(o.rows, [&](auto i) {
        N s = before.s[i], per_z = Real(1) / before.v[i];
        o.delta.set(i, delta * o.metric_v[i]);
        o.per_s.set(i, Real(1) / s);
        o.per_z.set(i, per_z);
        o.theta.set(i, select(o.kind.inequality(i), s * per_z, select(o.kind.equality(i), N{}, Real(INFINITY_))));
        o.right_v.set(i, before.r_v[i] + s); // s is 0 in the other rows
    });
}

// Fill the corrector's right-hand side of the rows, after the predictor's multipliers; return the share of the step to
// the boundary that it is to take. How far the predictor gets towards s ∘ z = 0 decides both.
template <class Team, class S = typename Team::Number>
QP_INLINE S corrector_rhs(Problem<Team>& o, S mu, typename Team::Exact waiting, const Iterate<Team>& before) {
    using N = typename Team::Entry;
    using Real = typename Team::Real;
    const Parameters& P = *o.parameters;
    S one = as<S>(Real(1)), alpha_s, alpha_z;
    Team::each(o.rows, [&](auto i) {
        o.ds.set(i, select(o.kind.inequality(i), -(before.s[i] + o.theta[i] * o.dv[i]), Real(0)));
    });
    step_lengths(o, one, alpha_s, alpha_z);
    N sum{};
    Team::each(o.rows, [&](auto i) {
        N reached = (before.s[i] + alpha_s * o.ds[i]) * (before.v[i] + alpha_z * o.dv[i]);
        sum += select(o.kind.inequality(i), reached, Real(0));
    });
    S ratio = smaller(positive(Team::sum(sum) / o.inequalities / (mu + Real(o.settings->tiny))), one);
    // What goes round in circles otherwise comes to an end with more centering.
    S sigma = ratio * ratio * ratio, least = as<S>(Real(P.least_centering));
    sigma = select(waiting > as<typename Team::Exact>(P.equal_steps_after), larger(sigma, least), sigma);
    S target = sigma * mu;
    Team::each(o.rows, [&](auto i) {
        N excess = before.s[i] * before.v[i] + o.ds[i] * o.dv[i] - target;
        o.excess.set(i, excess);
        o.right_v.set(i, before.r_v[i] + select(o.kind.inequality(i), excess * o.per_z[i], Real(0)));
    });
    return smaller(larger(Real(1) - ratio, as<S>(Real(P.step_fraction))), as<S>(Real(P.largest_step_fraction)));
}

// Move the slacks and the multipliers along the corrector's direction; find the step lengths for x and s, and for v.
template <class Team, class S = typename Team::Number>
QP_INLINE void take_step(Problem<Team>& o, typename Team::Exact waiting, S fraction, const Iterate<Team>& before,
                         Iterate<Team>& now, S& alpha_s, S& alpha_z) {
    using N = typename Team::Entry;
    using Real = typename Team::Real;
    Team::each(o.rows, [&](auto i) {
        N ds = -(o.excess[i] * o.per_z[i] + o.theta[i] * o.dv[i]);
        o.ds.set(i, select(o.kind.inequality(i), ds, Real(0)));
    });
    step_lengths(o, fraction, alpha_s, alpha_z);
    // Unequal steps leave Qx + Kᵀv behind, which now and then goes round in circles.
    auto equal_steps = waiting >= as<typename Team::Exact>(o.parameters->equal_steps_after);
    S shorter = smaller(alpha_s, alpha_z);
    alpha_s = select(equal_steps, shorter, alpha_s), alpha_z = select(equal_steps, shorter, alpha_z);
    auto tiny = as<N>(Real(o.settings->tiny));
    Team::each(o.rows, [&](auto i) {
        auto inequality = o.kind.inequality(i);
        N v = before.v[i] + alpha_z * o.dv[i];
        now.s.set(i, select(inequality, larger(before.s[i] + alpha_s * o.ds[i], tiny), Real(0)));
        now.v.set(i, select(inequality, larger(v, tiny), select(o.kind.equality(i), v, Real(0))));
    });
}

// Make one step from `before` to `now`.
template <Form FORM, class Team, class S = typename Team::Number>
QP_NOINLINE Step<Team> step(Problem<Team>& o, S mu, S rho, S delta, typename Team::Truth refine,
                            typename Team::Exact waiting, const Iterate<Team>& before, Iterate<Team>& now) {
    Step<Team> result{};
    result.mu = mu;
    predictor_rhs<FORM>(o, rho, delta, before);
    result.sound = result.factor_ok = factor<FORM>(o);
    if (!some(result.factor_ok)) {
        return result;
    }
    eliminate<FORM>(o, before.r_x);
    solve_rows<FORM>(o, before.r_x, o.right_v, o.dx, o.dv);
    S fraction = corrector_rhs(o, mu, waiting, before);
    solve_refined<FORM>(o, refine, before.r_x, o.right_v);
    take_step(o, waiting, fraction, before, now, result.alpha_s, result.alpha_z);
    Team::each(o.np, [&](auto j) { now.x.set(j, before.x[j] + result.alpha_s * o.dx[j]); });
    result.sound &= all_finite<Team>(now.x, o.np) & all_finite<Team>(now.v, o.rows) & all_finite<Team>(now.s, o.rows);
    result.mu = select(result.sound, mean(o, now.s, now.v), mu);
    return result;
}

// Whether the linear solve has left little in the variables, which shows in the products before and after the step.
template <Form FORM, class Team>
QP_NOINLINE typename Team::Truth variables_are_exact(const Problem<Team>& o, const Step<Team>& step,
                                                     const Verdict<Team>& past, const Iterate<Team>& before,
                                                     const Iterate<Team>& now) {
    using N = typename Team::ExactEntry;
    using E = typename Team::Exact;
    const Parameters& P = *o.parameters;
    N left{};
    E per_alpha_s = 1.0 / as<E>(step.alpha_s), per_alpha_z = 1.0 / as<E>(step.alpha_z);
    Team::each_exactly(o.np, [&](auto j) {
        N r_x = before.r_x[j], Q_dx = now.Qx[j] - before.Qx[j], Kt_dv = r_x - now.r_x[j] - Q_dx;
        N value = r_x - Q_dx * per_alpha_s - Kt_dv * per_alpha_z;
        if constexpr (FORM != Form::dense_dual) {
            value -= o.rho[j] * o.dx[j];
        }
        left = larger(o.unit_x[j] * absolute(value), left);
    });
    return Team::largest(left) <= larger(P.refine_relative * past.dual, as<E>(P.refine_absolute * o.settings->tol));
}

// Whether the linear solve has left little in the rows; and whether δ keeps their residual from falling, as it does
// where the multipliers have to become very large.
template <class Team>
QP_NOINLINE typename Team::Truth rows_are_exact(const Problem<Team>& o, const Step<Team>& step,
                                                const Iterate<Team>& before, const Iterate<Team>& now,
                                                typename Team::Truth& limiting) {
    using N = typename Team::ExactEntry;
    using E = typename Team::Exact;
    const Parameters& P = *o.parameters;
    N left_{}, before_{}, now_{}, by_delta_{};
    E alpha_s = as<E>(step.alpha_s), keep = 1.0 - alpha_s;
    Team::each_exactly(o.rows, [&](auto i) {
        N unit = o.unit_v[i], r = before.r_v[i], r_now = now.r_v[i], proximal = alpha_s * o.delta[i] * o.dv[i];
        before_ = larger(unit * absolute(r), before_);
        now_ = larger(unit * absolute(r_now), now_);
        by_delta_ = larger(unit * absolute(proximal), by_delta_);
        left_ = larger(unit * absolute(r_now - keep * r + proximal), left_);
    });
    E was = Team::largest(before_), is = Team::largest(now_), by_delta = Team::largest(by_delta_);
    double tol = o.settings->tol;
    limiting = (by_delta > P.delta_share * is) & (is > P.delta_stuck * was) & (is > as<E>(tol));
    if (some(limiting)) {
        N multipliers{}, products{};
        Team::each_exactly(o.rows, [&](auto i) {
            multipliers = larger(absolute(now.v[i] / o.E[i]), multipliers);
            products = larger(absolute(o.E[i] * now.Kx[i]), products);
        });
        limiting &= Team::largest(multipliers) > Team::largest(products);
    }
    return Team::largest(left_) <= larger(P.refine_relative * was, as<E>(P.refine_absolute * tol));
}

// The proximal terms of the next step.
template <Form FORM, class Team> struct ProximalTerms {
    using S = typename Team::Number;
    using Real = typename Team::Real;
    S rho, delta;

    explicit ProximalTerms(const Problem<Team>& o) : rho(first_rho<FORM>(o)), delta(as<S>(Real(o.settings->delta))) {}

    // They shrink with μ, or by themselves where there is no complementarity; δ faster and further where it is
    // limiting.
    QP_INLINE void shrink(const Problem<Team>& o, S mu, S mu_after, typename Team::Truth limiting) {
        const Parameters& P = *o.parameters;
        S fast = as<S>(Real(P.fast_rate)), smallest = as<S>(Real(o.settings->smallest));
        S rate = o.any_inequality ? positive((mu - mu_after) / (mu + Real(o.settings->tiny))) : fast;
        rate = select(limiting, larger(rate, fast), rate);
        if constexpr (FORM != Form::dense_dual) {
            rho = larger((Real(1) - rate) * rho, smallest);
        }
        S lowest = select(limiting, Real(P.delta_floor) * smallest, smaller(delta, smallest));
        delta = larger((Real(1) - rate) * delta, lowest);
    }

    // After a step that could not be computed.
    QP_INLINE void grow(const Problem<Team>& o) {
        rho = rho * Real(o.parameters->failure_growth);
        delta = delta * Real(o.parameters->failure_growth);
    }
};

} // namespace qpdiff
