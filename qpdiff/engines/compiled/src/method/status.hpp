// How problems stand: residuals, the stopping test, certificates, progress (qpdiff.method).
#pragma once
#include "kkt.hpp"

namespace qpdiff {

// What a gap is multiplied by before it is compared with the tolerance.
template <class Team> QP_INLINE typename Team::Exact per_gap_unit(const Problem<Team>& o) {
    using E = typename Team::Exact;
    return o.settings->absolute ? as<E>(1.0) : 1.0 / as<E>(o.gap_unit);
}

// How problems stand before anything is known of them.
template <class Team> QP_INLINE Verdict<Team> unknown() {
    using E = typename Team::Exact;
    E bad = as<E>(INFINITY_), zero{};
    Verdict<Team> verdict;
    verdict.status = as<E>(RUNNING);
    verdict.objective = verdict.found_primal = verdict.found_dual = verdict.found_gap = bad;
    verdict.primal = verdict.dual = verdict.gap = verdict.worst = bad;
    verdict.best_primal = verdict.best_dual = verdict.best_gap = bad;
    verdict.near = truth<typename Team::Truth>(false);
    verdict.certificate = verdict.waiting = zero;
    return verdict;
}

// Iterations since a residual, or what proves that there is no solution, last improved.
template <class Team, class E = typename Team::Exact>
QP_INLINE E waited(const Problem<Team>& o, const Verdict<Team>& past, E primal, E dual, E gap, E certificate) {
    const Parameters& P = *o.parameters;
    E least = as<E>(P.solved_share * o.settings->tol);
    auto improves = [&](E now, E best) { return (now < P.improvement * best) & (best > least); };
    // Each residual counts by itself: while the primal and the dual one fall, the gap may grow.
    auto improved = (certificate > P.certificate_improvement * past.certificate) | improves(primal, past.best_primal) |
                    improves(dual, past.best_dual) | improves(gap, past.best_gap);
    return select(improved, E{}, past.waiting + 1.0);
}

// How near the last step in x is to a direction of unbounded descent, left in `ray`; and how far that goes down.
template <class Team, class E = typename Team::Exact>
QP_NOINLINE E descent(Problem<Team>& o, const Iterate<Team>& now, const Iterate<Team>& before, E& fall) {
    using N = typename Team::ExactEntry;
    const Parameters& P = *o.parameters;
    N total_{}, size_{}, length_{}, uphill_{}, hidden_{}, cost_{};
    Team::each_exactly(o.np, [&](auto j) {
        N ray = now.x[j] - before.x[j], q = o.q[j], term = q * ray, D = o.D[j], Qx = now.Qx[j];
        o.ray.set(j, ray);
        total_ += term;
        size_ += absolute(term);
        length_ += absolute(ray) / o.unit_x[j];
        uphill_ = larger(absolute(D * (Qx - before.Qx[j])), uphill_);
        hidden_ = larger(absolute(D * Qx), hidden_);
        cost_ = larger(absolute(D * q), cost_);
    });
    fall = -Team::sum(total_);
    auto falls = fall > larger(P.certificate_rounding * Team::sum(size_), o.settings->tol * Team::sum(length_));
    if (!some(falls)) {
        return E{};
    }
    Team::each_exactly(o.rows, [&](auto i) {
        N Kx = now.Kx[i], slope = Kx - before.Kx[i], scale = o.E[i];
        uphill_ = larger(scale * select(o.kind.equality(i), absolute(slope), positive(slope)), uphill_);
        hidden_ = larger(absolute(scale * Kx), hidden_);
    });
    // The rounding of these differences hides as much.
    E uphill = larger(Team::largest(uphill_), EPS * Team::largest(hidden_));
    return select(falls, fall / (uphill * larger(Team::largest(cost_), as<E>(o.dual_unit))), E{});
}

// How near the last step in the multipliers is to a Farkas certificate, left in `farkas`; and how much that gains.
template <class Team, class E = typename Team::Exact>
QP_NOINLINE E contradiction(Problem<Team>& o, const Iterate<Team>& now, const Iterate<Team>& before, E size_k,
                            E& gain) {
    using N = typename Team::ExactEntry;
    const Parameters& P = *o.parameters;
    N total_{}, size_{}, length_{}, left_{}, reached_{}, hidden_{};
    Team::each_exactly(o.rows, [&](auto i) {
        N step = now.v[i] - before.v[i], farkas = select(o.kind.inequality(i), positive(step), step);
        N term = o.k[i] * farkas;
        o.farkas.set(i, farkas);
        total_ += term;
        size_ += absolute(term);
        length_ += absolute(farkas) / o.unit_v[i];
    });
    gain = -Team::sum(total_);
    auto gains = gain > larger(P.certificate_rounding * Team::sum(size_), o.settings->tol * Team::sum(length_));
    if (!some(gains)) {
        return E{};
    }
    adjoint(o, o.farkas, o.Kv);
    Team::each_exactly(o.np, [&](auto j) { left_ = larger(absolute(o.D[j] * o.Kv[j]), left_); });
    Team::each_exactly(o.rows, [&](auto i) {
        N scale = o.E[i];
        reached_ = larger(absolute(scale * now.Kx[i]), reached_);
        hidden_ = larger(absolute(now.v[i] / scale), hidden_);
    });
    // The rounding of the difference hides as much.
    E left = larger(Team::largest(left_), EPS * Team::largest(hidden_));
    E most = larger(size_k, smaller(Team::largest(reached_), P.reached * size_k));
    return select(gains, gain / (left * most), E{});
}

// Compute the residuals of `now` afresh and decide how problems stand; a certificate takes the place of x or v.
template <Form FORM, class Team>
QP_NOINLINE Verdict<Team> assess(Problem<Team>& o, Iterate<Team>& now, const Iterate<Team>& before,
                                 const Verdict<Team>& past, int iterations, int limit) {
    using N = typename Team::ExactEntry;
    using E = typename Team::Exact;
    const Parameters& P = *o.parameters;
    const Settings& settings = *o.settings;
    hessian<FORM>(o, now.x, now.Qx);
    constraints(o, now.x, now.Kx);
    adjoint(o, now.v, o.Kv);

    N found_dual_{}, dual_{}, Qx_{}, q_{}, Kv_{}, x_{}, terms{}, xQx_{}, qx_{};
    Team::each_exactly(o.np, [&](auto j) {
        N x = now.x[j], Qx = now.Qx[j], q = o.q[j], Kv = o.Kv[j], unit = o.unit_x[j], D = o.D[j],
          per_D2 = o.metric_x[j];
        x_ = larger(absolute(x) * D * per_D2, x_);
        N r_x = -(Qx + q + Kv), left = absolute(r_x);
        now.r_x.set(j, r_x);
        found_dual_ = larger(left, found_dual_);
        dual_ = larger(unit * left, dual_);
        Qx_ = larger(unit * absolute(Qx), Qx_);
        q_ = larger(unit * absolute(q), q_);
        Kv_ = larger(unit * absolute(Kv), Kv_);
        terms += absolute(x) * (absolute(Qx) + absolute(q));
        xQx_ += x * Qx;
        qx_ += x * q;
    });
    N found_primal_{}, primal_{}, Kx_{}, violated_{}, scaled_{};
    auto farthest = as<N>(P.loose * as<E>(o.reach));
    Team::each_exactly(o.rows, [&](auto i) {
        N k = o.k[i], scale = o.E[i], unit = o.unit_v[i], scaled = scale * k;
        auto absent = o.kind.absent(i);
        scaled_ = larger(select(scaled <= farthest, absolute(scaled), 0.0), scaled_);
        terms += absolute(now.v[i] * k);
        N Kx = select(absent, 0.0, now.Kx[i]);
        N r_v = select(absent, 0.0, k - Kx - now.s[i]);
        now.Kx.set(i, Kx);
        now.r_v.set(i, r_v);
        N violation = select(o.kind.equality(i), absolute(r_v), select(absent, 0.0, positive(Kx - k)));
        found_primal_ = larger(violation, found_primal_);
        primal_ = larger(unit * violation, primal_);
        Kx_ = larger(unit * absolute(Kx), Kx_);
        violated_ = larger(scale * violation, violated_);
    });
    E xQx = Team::sum(xQx_), qx = Team::sum(qx_), kv{}, found_gap = xQx + qx;
    // By blocks, each summed by itself, the last first: terms that cancel do so in the same way everywhere.
    auto take_block = [&](N block) {
        E part = Team::sum(block);
        found_gap += part;
        kv += part;
    };
    N of_A{}, of_G{};
    Team::each_exactly(o.lp, [&](auto i) {
        N term = now.v[i] * o.k[i];
        of_A += select(o.kind.equality(i), term, 0.0);
        of_G += select(o.kind.equality(i), 0.0, term);
    });
    take_block(of_G);
    take_block(of_A);
    auto take_bounds = [&](int at) {
        N block{};
        Team::each_exactly(o.np, [&](auto j) { block += now.v[j + at] * o.k[j + at]; });
        take_block(block);
    };
    if (o.upper) {
        take_bounds(o.at_upper());
    }
    if (o.lower) {
        take_bounds(o.at_lower());
    }
    E per_unit = per_gap_unit(o);
    found_gap = absolute(found_gap);
    E gap = per_unit * found_gap, primal = Team::largest(primal_), dual = Team::largest(dual_);
    E scaled_k = larger(Team::largest(scaled_), as<E>(o.primal_unit));

    // Not `<=` on a largest entry alone: NaN must never pass, nor an infinity that is compared with its own size.
    E worst = larger(primal, larger(dual, gap));
    double tol = settings.tol, rtol = settings.rtol;
    E slope = larger(Team::largest(Qx_), larger(Team::largest(q_), Team::largest(Kv_)));
    E size_gap = per_unit * larger(absolute(xQx), larger(absolute(qx), absolute(kv)));
    // The terms of the gap may cancel to 0 by chance: what their rounding hides must not be far beyond the tolerance.
    E hidden = P.gap_rounding * EPS * per_unit * Team::sum(terms);
    // What rounding leaves of the rows at x is no violation; in the caller's units all of it counts.
    E rounding = settings.absolute ? E{} : P.row_rounding * Team::largest(x_) / as<E>(o.primal_unit);
    auto near = (primal - rounding <= tol + rtol * Team::largest(Kx_)) & (dual <= tol + rtol * slope) &
                (gap + hidden <= tol + rtol * size_gap) & (worst < as<E>(INFINITY_));

    // Farkas: Kᵀv = 0, z ≥ 0, kᵀv < 0 leaves no x; Qx = 0, Kx ≤ 0 (= 0), qᵀx < 0 is a way down without end. Iterates
    // without a limit go off along such a direction, so it shows in their last step long before it does in them.
    E unbounded{}, infeasible{}, fall = as<E>(1.0), gain = as<E>(1.0), allowed = as<E>(tol);
    if (FORM != Form::dense_dual && some(dual > allowed)) {
        unbounded = select(dual > allowed, descent(o, now, before, fall), E{});
    }
    if (some(primal - rounding > allowed)) {
        infeasible = select(primal - rounding > allowed, contradiction(o, now, before, scaled_k, gain), E{});
    }
    E certificate = larger(infeasible, unbounded), waiting = waited(o, past, primal, dual, gap, certificate);

    auto patient = waiting < as<E>(P.stalled_after);
    auto last = no(patient) | truth<typename Team::Truth>(iterations >= limit);
    E enough = settings.certificate * select(last, as<E>(P.late_certificate), 1.0);
    E status = select(patient, as<E>(iterations >= limit ? MAX_ITERATIONS : RUNNING), STALLED);
    auto falls = (unbounded > enough) & (last | (Team::largest(violated_) <= P.ray_violation * scaled_k));
    status = select(falls, DUAL_INFEASIBLE, status);
    status = select(infeasible > enough, PRIMAL_INFEASIBLE, status);
    status = select(near & ((worst <= as<E>(P.solved_share * tol)) | last), SOLVED, status);
    auto descends = status == as<E>(DUAL_INFEASIBLE), contradicts = status == as<E>(PRIMAL_INFEASIBLE);
    if (some(descends)) {
        Team::each_exactly(o.np, [&](auto j) { now.x.set(j, select(descends, o.ray[j] / fall, N(now.x[j]))); });
    }
    if (some(contradicts)) {
        Team::each_exactly(o.rows, [&](auto i) { now.v.set(i, select(contradicts, o.farkas[i] / gain, N(now.v[i]))); });
    }
    Verdict<Team> verdict;
    verdict.status = status, verdict.objective = 0.5 * xQx + qx;
    verdict.found_primal = Team::largest(found_primal_), verdict.found_dual = Team::largest(found_dual_);
    verdict.found_gap = found_gap;
    verdict.primal = primal, verdict.dual = dual, verdict.gap = gap, verdict.worst = worst, verdict.near = near;
    verdict.best_primal = least_of(primal, past.best_primal), verdict.best_dual = least_of(dual, past.best_dual);
    verdict.best_gap = least_of(gap, past.best_gap);
    verdict.certificate = larger(certificate, past.certificate), verdict.waiting = waiting;
    return verdict;
}

} // namespace qpdiff
