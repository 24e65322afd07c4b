// A predictor-corrector step of Mehrotra's on the regularised KKT system, and how accurate its linear solve was
// (engines/array/step.py).
#pragma once
#include "start.hpp"

namespace qpdiff {

// A step along a direction, as far as the stopping test and the regularisation need it.
template <class Team> struct Step {
    typename Team::Truth computed;  // whether it could be computed
    typename Team::Truth factor_ok; // whether the matrix could be factored
    typename Team::Number alpha_s;  // step length for x and s
    typename Team::Number alpha_z;  // step length for v
    typename Team::Number mu;       // μ after it
};

// The regularisation of a step, in the scaled problem.
template <class Team> struct Regularization {
    typename Team::Number rho, delta;
};

// Find the largest steps in [0, 1] that keep s and z, and with prices t and r, at least 1 − fraction times as large.
template <class Team, class S = typename Team::Number>
QP_INLINE void step_lengths(const Problem<Team>& o, S fraction, S& alpha_s, S& alpha_z) {
    using N = typename Team::Entry;
    using Real = typename Team::Real;
    N of_s{}, of_z{};
    Team::each(o.rows, [&](auto i) {
        auto inequality = o.kind.inequality(i);
        of_s = larger(select(inequality, -o.ds[i] * o.per_s[i], Real(0)), of_s);
        of_z = larger(select(inequality, -o.dv[i] * o.per_z[i], Real(0)), of_z);
        if constexpr (Team::PRICED) { // r falls as the multiplier grows
            auto priced = limited(o, i);
            of_s = larger(select(priced, -o.dt[i] * o.per_t[i], Real(0)), of_s);
            of_z = larger(select(priced, o.dv[i] * o.per_r[i], Real(0)), of_z);
        }
    });
    S one = as<S>(Real(1)), most_of_s, most_of_z;
    Team::reduce(Largest{of_s, most_of_s}, Largest{of_z, most_of_z});
    alpha_s = Real(1) / larger(most_of_s / fraction, one);
    alpha_z = Real(1) / larger(most_of_z / fraction, one);
}

// Fill the diagonals of the KKT matrix at `previous`, and the predictor's right-hand side of the constraints. A
// division takes as long as many products, so each is done once.
template <Form FORM, class Team>
QP_INLINE void predictor_rhs(Problem<Team>& o, const Regularization<Team>& regularization,
                             const Iterate<Team>& previous) {
    using N = typename Team::Entry;
    using Real = typename Team::Real;
    if constexpr (FORM != Form::dense_dual) {
        Team::each(o.np, [&](auto j) { o.rho.set(j, regularization.rho * o.per_D2[j]); });
    }
    auto z = distance(previous);
    Team::each(o.rows, [&](auto i) {
        N s = previous.s[i], per_z = Real(1) / z[i];
        o.delta.set(i, regularization.delta * o.per_E2[i]);
        o.per_s.set(i, Real(1) / s);
        o.per_z.set(i, per_z);
        N theta = select(o.kind.inequality(i), s * per_z, select(o.kind.equality(i), N{}, Real(INFINITY_)));
        N right = previous.r_v[i] + s; // s is 0 where the constraint is no inequality
        if constexpr (Team::PRICED) {
            N t = previous.t[i], per_r = Real(1) / previous.r[i];
            o.per_t.set(i, Real(1) / t);
            o.per_r.set(i, per_r);
            theta += select(limited(o, i), t * per_r, Real(0)) + o.compliance[i];
            right -= t;
        }
        o.theta.set(i, theta);
        o.right_v.set(i, right);
    });
}

// Return s/z of an inequality: without prices, what `predictor_rhs` has filled θ with.
template <class Team, class I>
QP_INLINE auto ratio_of_slack(const Problem<Team>& o, const Iterate<Team>& previous, I i) {
    if constexpr (Team::PRICED) {
        return previous.s[i] * o.per_z[i];
    } else {
        return o.theta[i];
    }
}

// Fill the corrector's right-hand sides, after the predictor's multipliers; return its share of the step to the
// boundary.
//
// How far towards s ∘ z = 0 the predictor gets decides both: the centering (Nocedal & Wright, 16.62 to 16.66), and the
// share, which has to tend to 1 for fast convergence.
template <class Team, class S = typename Team::Number>
QP_INLINE S corrector_rhs(Problem<Team>& o, S mu, typename Team::Exact without_progress,
                          const Iterate<Team>& previous) {
    using N = typename Team::Entry;
    using Real = typename Team::Real;
    const Parameters& P = *o.parameters;
    S one = as<S>(Real(1)), alpha_s, alpha_z;
    auto z = distance(previous);
    Team::each(o.rows, [&](auto i) {
        o.ds.set(i, select(o.kind.inequality(i), -(previous.s[i] + ratio_of_slack(o, previous, i) * o.dv[i]), Real(0)));
        if constexpr (Team::PRICED) {
            N t = previous.t[i];
            o.dt.set(i, select(limited(o, i), t * o.per_r[i] * o.dv[i] - t, Real(0)));
        }
    });
    step_lengths(o, one, alpha_s, alpha_z);
    N sum{};
    Team::each(o.rows, [&](auto i) {
        N reached = (previous.s[i] + alpha_s * o.ds[i]) * (z[i] + alpha_z * o.dv[i]);
        sum += select(o.kind.inequality(i), reached, Real(0));
        if constexpr (Team::PRICED) {
            N of_upper = (previous.t[i] + alpha_s * o.dt[i]) * (previous.r[i] - alpha_z * o.dv[i]);
            sum += select(limited(o, i), of_upper, Real(0));
        }
    });
    S ratio = smaller(positive(Team::sum(sum) / o.pairs / (mu + Real(o.parameters->tiny))), one);
    // Iterates that would repeat each other come to an end with more centering.
    S sigma = ratio * ratio * ratio, least = as<S>(Real(P.least_centering));
    auto repeating = without_progress > as<typename Team::Exact>(P.equal_steps_after);
    sigma = select(repeating, larger(sigma, least), sigma);
    S target = sigma * mu;
    Team::each(o.rows, [&](auto i) {
        N complementarity = previous.s[i] * z[i] + o.ds[i] * o.dv[i] - target;
        o.complementarity.set(i, complementarity);
        N right = previous.r_v[i] + select(o.kind.inequality(i), complementarity * o.per_z[i], Real(0));
        if constexpr (Team::PRICED) {
            N of_upper = previous.t[i] * previous.r[i] - o.dt[i] * o.dv[i] - target;
            o.complementarity_t.set(i, of_upper);
            right -= select(limited(o, i), of_upper * o.per_r[i], Real(0));
        }
        o.right_v.set(i, right);
    });
    return smaller(larger(Real(1) - ratio, as<S>(Real(P.step_fraction))), as<S>(Real(P.largest_step_fraction)));
}

// Move what an iterate has of rows with a price, for multipliers v and slacks after a step, which are those of rows
// without.
//
// A multiplier near a limit follows from its distance, which is known better than the difference of the two.
template <class Team, class S = typename Team::Number>
QP_NOINLINE void move_priced(const Problem<Team>& o, S alpha_s, S alpha_z, const Iterate<Team>& previous,
                             const Iterate<Team>& current) {
    using N = typename Team::Entry;
    using Real = typename Team::Real;
    auto tiny = as<N>(Real(o.parameters->tiny));
    Real near_limit = Real(o.parameters->near_limit);
    Team::each(o.rows, [&](auto i) {
        auto priced = limited(o, i), both = two_sided(o, i), inequality = o.kind.inequality(i);
        N dz = alpha_z * o.dv[i], zero{}, upper = select(priced, o.v_upper[i], Real(1)), lower = o.v_lower[i];
        N z = larger(previous.z[i] + dz, tiny), r = larger(previous.r[i] - dz, tiny), near = near_limit * upper;
        auto at_upper = r < near, at_lower = z < near;
        N v = select(inequality & no(both), z, select(o.kind.absent(i), zero, previous.v[i] + dz));
        v = select(priced, select(at_upper, upper - r, select(at_lower | no(both), lower + z, v)), v);
        current.v.set(i, v);
        current.z.set(i, select(both & no(at_lower), v - lower, select(inequality, z, zero)));
        current.r.set(i, select(priced, select(at_upper, r, upper - v), zero));
        current.t.set(i, select(priced, larger(previous.t[i] + alpha_s * o.dt[i], tiny), zero));
    });
}

// Move slacks and multipliers along the corrector's direction; find the step lengths.
template <class Team, class S = typename Team::Number>
QP_INLINE void take_step(Problem<Team>& o, typename Team::Exact without_progress, S fraction,
                         const Iterate<Team>& previous, Iterate<Team>& current, S& alpha_s, S& alpha_z) {
    using N = typename Team::Entry;
    using Real = typename Team::Real;
    Team::each(o.rows, [&](auto i) {
        N ds = -(o.complementarity[i] * o.per_z[i] + ratio_of_slack(o, previous, i) * o.dv[i]);
        o.ds.set(i, select(o.kind.inequality(i), ds, Real(0)));
        if constexpr (Team::PRICED) {
            N dt = (previous.t[i] * o.dv[i] - o.complementarity_t[i]) * o.per_r[i];
            o.dt.set(i, select(limited(o, i), dt, Real(0)));
        }
    });
    step_lengths(o, fraction, alpha_s, alpha_z);
    // Unequal steps leave Qx + Kᵀv behind, with which iterates may repeat each other.
    auto equal_steps = without_progress >= as<typename Team::Exact>(o.parameters->equal_steps_after);
    S shorter = smaller(alpha_s, alpha_z);
    alpha_s = select(equal_steps, shorter, alpha_s), alpha_z = select(equal_steps, shorter, alpha_z);
    auto tiny = as<N>(Real(o.parameters->tiny));
    Team::each(o.rows, [&](auto i) {
        auto inequality = o.kind.inequality(i);
        current.s.set(i, select(inequality, larger(previous.s[i] + alpha_s * o.ds[i], tiny), Real(0)));
        if constexpr (!Team::PRICED) {
            N v = previous.v[i] + alpha_z * o.dv[i];
            current.v.set(i, select(inequality, larger(v, tiny), select(o.kind.equality(i), v, Real(0))));
        }
    });
    if constexpr (Team::PRICED) {
        move_priced(o, alpha_s, alpha_z, previous, current);
    }
}

// Make one predictor-corrector step from `previous` to `current`.
template <Form FORM, class Team, class S = typename Team::Number>
QP_NOINLINE Step<Team> step(Problem<Team>& o, S mu, const Regularization<Team>& regularization,
                            typename Team::Truth refine, typename Team::Exact without_progress,
                            const Iterate<Team>& previous, Iterate<Team>& current) {
    Step<Team> made{};
    made.mu = mu;
    predictor_rhs<FORM>(o, regularization, previous);
    made.computed = made.factor_ok = factor<FORM>(o);
    if (!some(made.factor_ok)) {
        return made;
    }
    eliminate<FORM>(o, previous.r_x);
    solve_multipliers<FORM>(o, previous.r_x, o.right_v, o.dx, o.dv);
    S fraction = corrector_rhs(o, mu, without_progress, previous);
    solve_refined<FORM>(o, refine, previous.r_x, o.right_v);
    take_step(o, without_progress, fraction, previous, current, made.alpha_s, made.alpha_z);
    Team::each(o.np, [&](auto j) { current.x.set(j, previous.x[j] + made.alpha_s * o.dx[j]); });
    made.computed &=
        all_finite<Team>(current.x, o.np) & all_finite<Team>(current.v, o.rows) & all_finite<Team>(current.s, o.rows);
    made.mu = select(made.computed, mean(o, current), mu);
    return made;
}

// ---- how accurate the linear solve was, which shows in the products before and after the step

// Return what a linear solve may leave of a residual without being refined.
template <class Team, class E = typename Team::Exact> QP_INLINE E negligible(const Problem<Team>& o, E before) {
    const Parameters& P = *o.parameters;
    return larger(P.refine_relative * before, as<E>(P.refine_absolute * o.settings->tol));
}

// Return whether the linear solve has left little of the residual of the variables.
template <Form FORM, class Team>
QP_NOINLINE typename Team::Truth variables_are_accurate(const Problem<Team>& o, const Step<Team>& made,
                                                        const State<Team>& state, const Iterate<Team>& previous,
                                                        const Iterate<Team>& current) {
    using N = typename Team::ExactEntry;
    using E = typename Team::Exact;
    N left{};
    E per_alpha_s = 1.0 / as<E>(made.alpha_s), per_alpha_z = 1.0 / as<E>(made.alpha_z);
    Team::each_exactly(o.np, [&](auto j) {
        N r_x = previous.r_x[j], Q_dx = current.Qx[j] - previous.Qx[j], Kt_dv = r_x - current.r_x[j] - Q_dx;
        N value = r_x - Q_dx * per_alpha_s - Kt_dv * per_alpha_z;
        if constexpr (FORM != Form::dense_dual) {
            value -= o.rho[j] * o.dx[j];
        }
        left = larger(o.unit_x[j] * absolute(value), left);
    });
    return Team::largest(left) <= negligible(o, state.dual);
}

// Return whether the linear solve has left little of the residual of the constraints; and find out, in the same pass,
// whether δ is limiting: it keeps that residual from falling, as it does where the multipliers have to become very
// large.
template <class Team>
QP_NOINLINE typename Team::Truth constraints_are_accurate(const Problem<Team>& o, const Step<Team>& made,
                                                          const Iterate<Team>& previous, const Iterate<Team>& current,
                                                          typename Team::Truth& limiting) {
    using N = typename Team::ExactEntry;
    using E = typename Team::Exact;
    const Parameters& P = *o.parameters;
    N left_{}, before_{}, after_{}, by_delta_{}, of_gap{};
    E alpha_s = as<E>(made.alpha_s), rest = 1.0 - alpha_s, apart = as<E>(made.alpha_z) - alpha_s;
    Team::each_exactly(o.rows, [&](auto i) {
        N unit = o.unit_v[i], r = previous.r_v[i], r_after = current.r_v[i], share = alpha_s * o.delta[i] * o.dv[i];
        before_ = larger(unit * absolute(r), before_);
        after_ = larger(unit * absolute(r_after), after_);
        by_delta_ = larger(unit * absolute(share), by_delta_);
        N left_of_row = r_after - rest * r + share;
        if constexpr (Team::PRICED) { // what unequal step lengths leave where violations have a quadratic price
            left_of_row -= apart * o.compliance[i] * o.dv[i];
        }
        left_ = larger(unit * absolute(left_of_row), left_);
        if constexpr (Team::SPARSE) {
            of_gap += current.v[i] * r_after;
        }
    });
    E before, after, by_delta, left;
    Team::reduce(Largest{before_, before}, Largest{after_, after}, Largest{by_delta_, by_delta}, Largest{left_, left});
    limiting = (by_delta > P.delta_share * after) & (after > P.delta_stuck * before);
    auto matters = after > as<E>(o.settings->tol);
    if constexpr (Team::SPARSE) {
        // Large multipliers make a gap of a small residual.
        matters |= per_gap_unit(o) * absolute(Team::sum(of_gap)) > as<E>(o.settings->tol);
    }
    limiting &= matters;
    if (some(limiting)) {
        N multipliers{}, products{};
        Team::each_exactly(o.rows, [&](auto i) {
            multipliers = larger(absolute(current.v[i] / o.E[i]), multipliers);
            N product = current.Kx[i];
            if constexpr (Team::PRICED) { // less the violation that is paid for
                product += net_slack(o, current, i) - current.s[i];
            }
            products = larger(absolute(o.E[i] * product), products);
        });
        limiting &= Team::largest(multipliers) > Team::largest(products);
    }
    return left <= negligible(o, before);
}

// ---- regularisation

// Return the regularisation of the first step.
template <Form FORM, class Team> QP_INLINE Regularization<Team> first_regularization(const Problem<Team>& o) {
    return {first_rho<FORM>(o), as<typename Team::Number>(typename Team::Real(o.parameters->delta))};
}

// Update ρ and δ after a step from a point with mean complementarity μ.
//
// They shrink with μ, or by themselves where there is no complementarity, and grow where the step could not be
// computed. Where δ is limiting it shrinks faster, and further.
template <Form FORM, class Team, class S = typename Team::Number>
QP_INLINE void update_regularization(const Problem<Team>& o, const Step<Team>& made, S mu,
                                     typename Team::Truth limiting, Regularization<Team>& regularization) {
    using Real = typename Team::Real;
    const Parameters& P = *o.parameters;
    auto& [rho, delta] = regularization;
    S fast = as<S>(Real(P.fast_rate)), smallest = as<S>(Real(P.smallest));
    S rate = o.any_inequality ? positive((mu - made.mu) / (mu + Real(P.tiny))) : fast;
    rate = select(limiting, larger(rate, fast), rate);
    S lowest = select(limiting, Real(P.delta_floor) * smallest, smaller(delta, smallest));
    S times = select(made.computed, Real(1) - rate, as<S>(Real(P.failure_growth)));
    if constexpr (FORM != Form::dense_dual) {
        rho = larger(times * rho, smallest);
    }
    delta = larger(times * delta, lowest);
}

} // namespace qpdiff
