// The status of problems: residuals, the stopping test, certificates, progress, acceptance of the last step.
#pragma once
#include "state.hpp"

namespace qpdiff {

// ---- residuals

// Return the factor on a gap before it is compared with the tolerance.
template <class Team> QP_INLINE typename Team::Exact per_gap_unit(const Problem<Team>& o) {
    using E = typename Team::Exact;
    return o.settings->absolute ? as<E>(1.0) : 1.0 / as<E>(o.gap_unit);
}

// Return the rounding error of the constraints at an x whose largest entry in the scaled problem is given, in the units
// of the tolerance; 0 in the caller's.
template <class Team, class E = typename Team::Exact> QP_INLINE E row_rounding(const Problem<Team>& o, E largest) {
    return o.settings->absolute ? E{} : o.parameters->row_rounding * largest / as<E>(o.primal_unit);
}

// Return the price of a violation but for the quadratic one; at an equality s is a violation like t.
template <class Team, class I> QP_INLINE auto linear_price(const Problem<Team>& o, const Iterate<Team>& at, I i) {
    decltype(at.s[i]) s = at.s[i], zero{};
    return select(limited(o, i), o.v_upper[i] * (at.t[i] + select(two_sided(o, i), s, zero)), zero);
}

// ---- the stopping test

// Return what the tolerance allows for a residual whose terms have this size: tol + rtol·size, `times` it, and with
// `rounding` relative to the size on top. The size is in the units of the tolerance.
template <class E> QP_INLINE E allowed(const Settings& settings, E size, double times = 1.0, double rounding = 0.0) {
    return times * settings.tol + (times * settings.rtol + rounding) * size;
}

// Return whether residuals are within the tolerance, absolute and relative to the sizes of their terms. The terms of
// the gap may cancel to 0 by chance: `hidden`, the effect of their rounding, must not be far beyond the tolerance.
template <class Team, class E = typename Team::Exact>
QP_INLINE typename Team::Truth is_within_tolerance(const Problem<Team>& o, const Residuals<E>& found,
                                                   const Residuals<E>& sizes, E hidden) {
    const Settings& settings = *o.settings;
    return (found.primal <= allowed(settings, sizes.primal)) & (found.dual <= allowed(settings, sizes.dual)) &
           (found.gap + hidden <= allowed(settings, sizes.gap));
}

// Return the status. `infeasible` and `unbounded` are the ratios of the directions that may prove so, `violation` is
// the largest of the constraints in the scaled problem, `scaled_k` the size of their right-hand sides there.
template <class Team, class E = typename Team::Exact>
QP_INLINE E decide_status(const Problem<Team>& o, const State<Team>& state, E infeasible, E unbounded, E violation,
                          E scaled_k, int iterations, int limit) {
    const Parameters& P = *o.parameters;
    const Settings& settings = *o.settings;
    auto progressing = state.without_progress < as<E>(P.stalled_after);
    auto last = no(progressing) | truth<typename Team::Truth>(iterations >= limit);
    E enough = P.certificate * select(last, as<E>(P.late_certificate), 1.0);
    E status = select(progressing, as<E>(iterations >= limit ? MAX_ITERATIONS : RUNNING), STALLED);
    auto falls = (unbounded > enough) & (last | (violation <= P.ray_violation * scaled_k));
    status = select(falls, DUAL_INFEASIBLE, status);
    status = select(infeasible > enough, PRIMAL_INFEASIBLE, status);
    auto solved = state.within_tolerance & ((state.worst <= as<E>(P.solved_share * settings.tol)) | last);
    return select(solved, SOLVED, status);
}

// Accept a step, or revert to `state`, the one before it, by setting `moved`, the one after it; return for which
// problems. The caller has to revert their iterates.
//
// From a point within the tolerance one more step is worth it only if it halves the residuals. Where they are above tol
// it gets a second chance, with step lengths that are the same: `again` is where.
template <class Team>
QP_INLINE typename Team::Truth accept_or_revert(const Problem<Team>& o, const State<Team>& state, State<Team>& moved,
                                                int iterations, int limit, typename Team::Truth& again) {
    using E = typename Team::Exact;
    using Truth = typename Team::Truth;
    const Parameters& P = *o.parameters;
    auto equal_steps_after = as<E>(P.equal_steps_after);
    Truth running = state.status == as<E>(RUNNING);
    Truth reverted = running & state.within_tolerance & no(moved.worst <= P.worthwhile * state.worst);
    again = reverted & (state.worst > as<E>(o.settings->tol)) & (state.without_progress < equal_steps_after) &
            truth<Truth>(iterations < limit);
    if (some(reverted)) {
        State<Team> stayed = state;
        stayed.status = select(again, as<E>(RUNNING), as<E>(SOLVED));
        stayed.without_progress = select(again, equal_steps_after, state.without_progress);
        moved = choose<Team>(reverted, stayed, moved);
    }
    return reverted;
}

// Fill `without_progress`, `best` and `certificate` of `assessed`, whose residuals are known, after those of `state`.
// Each of the three residuals counts by itself: while the primal and the dual one fall, the gap may grow.
template <class Team, class E = typename Team::Exact>
QP_INLINE void progress(const Problem<Team>& o, const State<Team>& state, E certificate, State<Team>& assessed) {
    const Parameters& P = *o.parameters;
    E least = as<E>(P.solved_share * o.settings->tol);
    auto improves = [&](E now, E best) { return (now < P.improvement * best) & (best > least); };
    auto improved = (certificate > P.certificate_improvement * state.certificate) |
                    improves(assessed.primal, state.best.primal) | improves(assessed.dual, state.best.dual) |
                    improves(assessed.gap, state.best.gap);
    assessed.without_progress = select(improved, E{}, state.without_progress + 1.0);
    assessed.best = {least_of(assessed.primal, state.best.primal), least_of(assessed.dual, state.best.dual),
                     least_of(assessed.gap, state.best.gap)};
    assessed.certificate = larger(certificate, state.certificate);
}

// ---- certificates
//
// Farkas: Kᵀv = 0, z ≥ 0, kᵀv < 0 leaves no x; Qx = 0, Kx ≤ 0 (= 0), qᵀx < 0 is a direction of unbounded descent.
// Iterates without a limit go off along such a direction, so it shows in their last step long before it does in them.
// Rows with a price contradict nothing, v = 0 there; along x they may be violated if qᵀx < 0 outweighs the linear
// price.

// A direction that may prove that there is no solution; its entries are in `ray` or `farkas`.
template <class E> struct Direction {
    E ratio; // the fall against the residual of the direction; 0 where it proves nothing
    E fall;  // the fall of the linear cost along it
};

// Return whether a linear cost falls along a direction. The fall has to be beyond rounding, for terms of this size, and
// beyond what any point may leave of the residual within the tolerance: tol·‖direction‖₁, given by `length`.
template <class Team, class E = typename Team::Exact>
QP_INLINE auto falls_along(const Problem<Team>& o, E fall, E size, E length) {
    return fall > larger(o.parameters->certificate_rounding * size, o.settings->tol * length);
}

// Compare the last step in the variables, stored in `ray`, with a direction of unbounded descent.
template <class Team, class E = typename Team::Exact>
QP_NOINLINE Direction<E> descent_direction(Problem<Team>& o, const Iterate<Team>& current,
                                           const Iterate<Team>& previous) {
    using N = typename Team::ExactEntry;
    N total_{}, size_{}, length_{}, uphill_{}, hidden_{}, cost_{};
    // As if the cost were not scaled, which changes the curvature of the scaled problem.
    auto per_cost = as<N>(1.0 / as<E>(o.cost));
    Team::each_exactly(o.np, [&](auto j) {
        N ray = current.x[j] - previous.x[j], q = o.q[j], term = q * ray, D = o.D[j], Qx = current.Qx[j];
        o.ray.set(j, ray);
        total_ += term;
        size_ += absolute(term);
        length_ += absolute(ray) / o.unit_x[j];
        uphill_ = larger(absolute(D * per_cost * (Qx - previous.Qx[j])), uphill_);
        hidden_ = larger(absolute(D * per_cost * Qx), hidden_);
        cost_ = larger(absolute(D * q), cost_);
    });
    E total, size, length;
    Team::reduce(Sum{total_, total}, Sum{size_, size}, Sum{length_, length});
    E fall = -total;
    auto falls = falls_along(o, fall, size, length);
    if (!some(falls)) {
        return {E{}, fall};
    }
    N unpaid_ = uphill_, price_{};
    Team::each_exactly(o.rows, [&](auto i) {
        N Kx = current.Kx[i], slope = Kx - previous.Kx[i], scale = o.E[i];
        N climb = select(o.kind.equality(i), absolute(slope), positive(slope));
        if constexpr (Team::PRICED) {
            auto priced = limited(o, i);
            climb = select(two_sided(o, i), absolute(slope), climb);
            price_ += select(priced, o.v_upper[i] * climb, N{});
            unpaid_ = larger(scale * select(priced, N{}, climb), unpaid_);
        }
        uphill_ = larger(scale * climb, uphill_);
        hidden_ = larger(absolute(scale * Kx), hidden_);
    });
    // The rounding of these differences hides as much.
    E uphill, hidden, cost;
    Team::reduce(Largest{uphill_, uphill}, Largest{hidden_, hidden}, Largest{cost_, cost});
    E scaled_q = larger(cost, as<E>(o.dual_unit));
    auto ratio_of = [&](E fall, E uphill) { return fall / (larger(uphill, EPS * hidden) * scaled_q); };
    E ratio = select(falls, ratio_of(fall, uphill), E{});
    if constexpr (Team::PRICED) { // or rows with a linear price are violated along the direction, at that price
        E unpaid, price;
        Team::reduce(Largest{unpaid_, unpaid}, Sum{price_, price});
        E left = fall - price;
        E paid = select(falls_along(o, left, size, length), ratio_of(left, unpaid), E{});
        auto pays = paid > ratio;
        return {select(pays, paid, ratio), select(pays, left, fall)};
    }
    return {ratio, fall};
}

// Compare the last step in the multipliers, stored in `farkas`, with a Farkas certificate. `scaled_k` is the size of
// the right-hand sides in the scaled problem.
template <class Team, class E = typename Team::Exact>
QP_NOINLINE Direction<E> farkas_certificate(Problem<Team>& o, const Iterate<Team>& current,
                                            const Iterate<Team>& previous, E scaled_k) {
    using N = typename Team::ExactEntry;
    const Parameters& P = *o.parameters;
    N total_{}, size_{}, length_{}, left_{}, reached_{}, hidden_{};
    Team::each_exactly(o.rows, [&](auto i) {
        N step = current.v[i] - previous.v[i], farkas = select(o.kind.inequality(i), positive(step), step);
        if constexpr (Team::PRICED) {
            farkas = select(limited(o, i) | (o.compliance[i] > N{}), N{}, farkas);
        }
        N term = o.k[i] * farkas;
        o.farkas.set(i, farkas);
        total_ += term;
        size_ += absolute(term);
        length_ += absolute(farkas) / o.unit_v[i];
    });
    E total, size, length;
    Team::reduce(Sum{total_, total}, Sum{size_, size}, Sum{length_, length});
    E fall = -total;
    auto falls = falls_along(o, fall, size, length);
    if (!some(falls)) {
        return {E{}, fall};
    }
    adjoint(o, o.farkas, o.Kv);
    Team::each_exactly(o.np, [&](auto j) { left_ = larger(absolute(o.D[j] * o.Kv[j]), left_); });
    Team::each_exactly(o.rows, [&](auto i) {
        N scale = o.E[i];
        reached_ = larger(absolute(scale * current.Kx[i]), reached_);
        hidden_ = larger(absolute(current.v[i] / scale), hidden_);
    });
    // The rounding of the difference hides as much.
    E left, hidden, reached;
    Team::reduce(Largest{left_, left}, Largest{hidden_, hidden}, Largest{reached_, reached});
    E residual = larger(left, EPS * hidden), scale = larger(scaled_k, smaller(reached, P.reached * scaled_k));
    return {select(falls, fall / (residual * scale), E{}), fall};
}

// ---- the assessment of an iterate

// A sum of products with its rounding error, which is added at the end (Knuth's TwoSum; Ogita, Rump & Oishi, 2005).
template <class N> struct ExactSum {
    N sum{}, error{};
    QP_INLINE void add(N a, N b) {
#if defined(__clang__)
#pragma clang fp reassociate(off)
#endif
        N term = rounded(a * b), total = rounded(sum + term), added = rounded(total - sum);
        // The error of the product is known where the processor fuses it with a sum; else it counts as 0.
        error += rounded(a * b - term) + (rounded(sum - rounded(total - added)) + rounded(term - added));
        sum = total;
    }
};

// Return the duality gap xᵀ(Qx + q) + kᵀv. Its terms cancel: added one by one they leave an error that grows with their
// number, and would hide a gap within the tolerance where there are thousands.
template <class Team> QP_NOINLINE typename Team::Exact exact_gap(const Problem<Team>& o, const Iterate<Team>& current) {
    using N = typename Team::ExactEntry;
    ExactSum<N> gap;
    Team::each_exactly(o.np, [&](auto j) {
        gap.add(current.x[j], current.Qx[j]);
        gap.add(current.x[j], o.q[j]);
    });
    Team::each_exactly(o.rows, [&](auto i) { gap.add(current.v[i], o.k[i]); });
    return Team::sum(gap.sum + gap.error);
}

// Compute the residuals of `current` afresh and return its state, after `state` of the last iterate. Steps from
// `previous` may go along a direction that proves that there is no solution; a certificate takes the place of x or v.
template <Form FORM, class Team>
QP_NOINLINE State<Team> assess(Problem<Team>& o, Iterate<Team>& current, const Iterate<Team>& previous,
                               const State<Team>& state, int iterations, int limit) {
    using N = typename Team::ExactEntry;
    using E = typename Team::Exact;
    const Parameters& P = *o.parameters;
    hessian<FORM>(o, current.x, current.Qx);
    constraints(o, current.x, current.Kx);
    adjoint(o, current.v, o.Kv);

    N absolute_dual_{}, dual_{}, Qx_{}, q_{}, Kv_{}, x_{}, terms{}, xQx_{}, qx_{};
    Team::each_exactly(o.np, [&](auto j) {
        N x = current.x[j], Qx = current.Qx[j], q = o.q[j], Kv = o.Kv[j], unit = o.unit_x[j], D = o.D[j],
          per_D2 = o.per_D2[j];
        x_ = larger(absolute(x) * D * per_D2, x_);
        N r_x = -(Qx + q + Kv), left = absolute(r_x);
        current.r_x.set(j, r_x);
        absolute_dual_ = larger(left, absolute_dual_);
        dual_ = larger(unit * left, dual_);
        Qx_ = larger(unit * absolute(Qx), Qx_);
        q_ = larger(unit * absolute(q), q_);
        Kv_ = larger(unit * absolute(Kv), Kv_);
        terms += absolute(x) * (absolute(Qx) + absolute(q));
        xQx_ += x * Qx;
        qx_ += x * q;
    });
    N absolute_primal_{}, primal_{}, Kx_{}, violated_{}, scaled_{}, linear_{}, quadratic_{};
    auto farthest = as<N>(P.loose * as<E>(o.reach));
    Team::each_exactly(o.rows, [&](auto i) {
        N k = o.k[i], scale = o.E[i], unit = o.unit_v[i], scaled = scale * k;
        auto absent = o.kind.absent(i);
        scaled_ = larger(select(scaled <= farthest, absolute(scaled), 0.0), scaled_);
        terms += absolute(current.v[i] * k);
        N Kx = select(absent, 0.0, current.Kx[i]);
        N r_v = select(absent, 0.0, k - Kx - net_slack(o, current, i));
        current.Kx.set(i, Kx);
        current.r_v.set(i, r_v);
        auto equality = o.kind.equality(i);
        N beyond = Kx - k;
        if constexpr (Team::PRICED) { // what is paid for
            N v = current.v[i], of_quadratic = o.compliance[i] * v;
            equality |= two_sided(o, i);
            beyond -= current.t[i] + of_quadratic;
            linear_ += linear_price(o, current, i);
            quadratic_ += of_quadratic * v;
        }
        N violation = select(equality, absolute(r_v), select(absent, 0.0, positive(beyond)));
        absolute_primal_ = larger(violation, absolute_primal_);
        primal_ = larger(unit * violation, primal_);
        Kx_ = larger(unit * absolute(Kx), Kx_);
        violated_ = larger(scale * violation, violated_);
    });
    N of_A_{}, of_G_{}, of_upper_{}, of_lower_{};
    Team::each_exactly(o.lp, [&](auto i) {
        N term = current.v[i] * o.k[i];
        auto equality = o.kind.equality(i);
        if constexpr (Team::PRICED) {
            equality |= two_sided(o, i);
        }
        of_A_ += select(equality, term, 0.0);
        of_G_ += select(equality, 0.0, term);
    });
    auto add_bounds = [&](int at, N& block) {
        Team::each_exactly(o.np, [&](auto j) { block += current.v[j + at] * o.k[j + at]; });
    };
    if (o.upper) {
        add_bounds(o.at_upper(), of_upper_);
    }
    if (o.lower) {
        add_bounds(o.at_lower(), of_lower_);
    }
    E xQx, qx, of_A, of_G, of_upper, of_lower, size_of_terms, x_size, Qx_size, q_size, Kv_size, Kx_size;
    E absolute_primal, absolute_dual, primal, dual, violated, scaled_k;
    Team::reduce(Sum{xQx_, xQx}, Sum{qx_, qx}, Sum{of_A_, of_A}, Sum{of_G_, of_G}, Sum{of_upper_, of_upper},
                 Sum{of_lower_, of_lower}, Sum{terms, size_of_terms}, Largest{x_, x_size}, Largest{Qx_, Qx_size},
                 Largest{q_, q_size}, Largest{Kv_, Kv_size}, Largest{Kx_, Kx_size},
                 Largest{absolute_primal_, absolute_primal}, Largest{absolute_dual_, absolute_dual},
                 Largest{primal_, primal}, Largest{dual_, dual}, Largest{violated_, violated},
                 Largest{scaled_, scaled_k});
    scaled_k = larger(scaled_k, as<E>(o.primal_unit));
    // By blocks, each summed by itself, the last first: terms that cancel do so in the same way everywhere.
    E kv = of_G + of_A + of_upper + of_lower, absolute_gap = xQx + qx + of_G + of_A + of_upper + of_lower;
    if constexpr (Team::SPARSE) {
        absolute_gap = exact_gap(o, current);
    }
    E linear{}, price{};
    if constexpr (Team::PRICED) {
        Team::reduce(Sum{linear_, linear}, Sum{quadratic_, price});
        price += linear;
        absolute_gap += price;
        size_of_terms += price;
    }
    E per_unit = per_gap_unit(o);
    absolute_gap = absolute(absolute_gap);
    E gap = per_unit * absolute_gap;
    // The rounding error of the constraints at x is no violation.
    E beyond = primal - row_rounding(o, x_size);
    E slope = larger(Qx_size, larger(q_size, Kv_size));
    // Without the price, whose share of the tolerance might be all of the cost.
    E size_gap = per_unit * larger(absolute(xQx), larger(absolute(qx), absolute(kv + price)));
    E hidden = P.gap_rounding * EPS * per_unit * size_of_terms;

    State<Team> assessed;
    assessed.objective = 0.5 * (xQx + (price + linear)) + qx;
    assessed.absolute = {absolute_primal, absolute_dual, absolute_gap};
    assessed.primal = primal, assessed.dual = dual, assessed.gap = gap;
    assessed.worst = larger(primal, larger(dual, gap));
    // Not `<=` on a largest entry alone: NaN must never pass, nor an infinity that is compared with its own size.
    assessed.within_tolerance = is_within_tolerance<Team>(o, {beyond, dual, gap}, {Kx_size, slope, size_gap}, hidden) &
                                (assessed.worst < as<E>(INFINITY_));

    E tol = as<E>(o.settings->tol);
    Direction<E> unbounded{E{}, as<E>(1.0)}, infeasible = unbounded;
    if (FORM != Form::dense_dual && some(dual > tol)) { // there a definite Q bounds the cost
        unbounded = descent_direction(o, current, previous);
        unbounded.ratio = select(dual > tol, unbounded.ratio, E{});
    }
    if (some(beyond > tol)) {
        infeasible = farkas_certificate(o, current, previous, scaled_k);
        infeasible.ratio = select(beyond > tol, infeasible.ratio, E{});
    }
    progress(o, state, larger(infeasible.ratio, unbounded.ratio), assessed);
    assessed.status =
        decide_status(o, assessed, infeasible.ratio, unbounded.ratio, violated, scaled_k, iterations, limit);
    auto falls = assessed.status == as<E>(DUAL_INFEASIBLE), contradicts = assessed.status == as<E>(PRIMAL_INFEASIBLE);
    if (some(falls)) {
        Team::each_exactly(
            o.np, [&](auto j) { current.x.set(j, select(falls, o.ray[j] / unbounded.fall, N(current.x[j]))); });
    }
    if (some(contradicts)) {
        Team::each_exactly(o.rows, [&](auto i) {
            current.v.set(i, select(contradicts, o.farkas[i] / infeasible.fall, N(current.v[i])));
        });
    }
    return assessed;
}

} // namespace qpdiff
