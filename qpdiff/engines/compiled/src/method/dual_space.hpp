// Steps of the dense dual form in the dual space: x is not formed, but where it is wanted (qpdiff.rows explains why
// that is enough). For one problem in float64: float32 wants its residuals in float64, which these steps do not give.
#pragma once
#include "step.hpp"

namespace qpdiff::dual_space {

// What is known of x. Where it was last formed, it was `x_anchor`, v was `v_anchor` and r_x was `r_anchor`. Now r_x is
// `a` times that and Kᵀu, and Q (x − x_anchor) is (1 − a) r_anchor − Kᵀ(u + v − v_anchor).
struct Products {
    double a = 0;
    double rr = 0;     // r_xᵀ Q⁻¹ r_x
    double xr = 0;     // xᵀ r_x
    double qx = 0;     // qᵀx
    double r = 0;      // largest entry of `r_anchor`, in the units of the tolerance
    double column = 0; // largest norm of a column of K in the scaled rows, likewise
};

template <class Team> QP_INLINE double dot(typename Team::Vector a, typename Team::Vector b, int count) {
    typename Team::Entry sum{};
    Team::each(count, [&](auto i) { sum += a[i] * b[i]; });
    return Team::sum(sum);
}

// out = S a.
template <class Team>
QP_INLINE void multiply_S(const Problem<Team>& o, typename Team::Vector a, typename Team::Vector out) {
    set_zero<Team>(out, o.lp);
    Team::add_product_transposed(o.S, o.linear, o.linear, a, out); // symmetric
}

// The largest norm of a column of K in the scaled rows, in the units of the tolerance.
template <class Team> QP_NOINLINE double longest_column(Problem<Team>& o) {
    using N = typename Team::Entry;
    Team::each(o.np, [&](auto j) { o.e_x.set(j, 1.0); });
    Team::scaled_squares(o.K, o.linear, o.n, o.E, o.e_x, o.scaled);
    Team::each(o.lp, [&](auto i) { o.cv.set(i, 1.0); });
    set_zero<Team>(o.columns, o.np);
    Team::add_product_transposed(o.scaled, o.linear, o.n, o.cv, o.columns);
    N most{};
    Team::each(o.np, [&](auto j) { most = larger(o.unit_x[j] * root(o.columns[j]), most); });
    return Team::largest(most);
}

// Begin at an iterate that is known with its residuals.
template <class Team> QP_NOINLINE Products anchor(Problem<Team>& o, const Iterate<Team>& at, double column) {
    typename Team::Entry r{};
    copy<Team>(at.x, o.x_anchor, o.np);
    copy<Team>(at.v, o.v_anchor, o.lp);
    copy<Team>(at.r_x, o.r_anchor, o.np);
    set_zero<Team>(o.u, o.lp);
    eliminate<Form::dense_dual>(o, at.r_x);
    Team::each(o.np, [&](auto j) { r = larger(o.unit_x[j] * absolute(at.r_x[j]), r); });
    return {
        1.0,   dot<Team>(o.t, o.t, o.np), dot<Team>(at.x, at.r_x, o.np), dot<Team>(o.q, at.x, o.np), Team::largest(r),
        column};
}

// Solve for the right-hand sides `Vt` of the variables and `right_v` of the rows: dv, and S dv.
template <class Team> QP_NOINLINE void solve_multipliers(Problem<Team>& o, bool refine) {
    using N = typename Team::Entry;
    Team::each(o.lp, [&](auto i) { o.dv.set(i, o.Vt[i] - o.right_v[i]); });
    solve_cholesky(o, o.linear, o.dv);
    multiply_S(o, o.dv, o.Sdv);
    if (refine) {
        Team::each(o.lp, [&](auto i) {
            N left = o.Vt[i] - o.right_v[i] - o.Sdv[i] - (o.theta[i] + o.delta[i]) * o.dv[i];
            o.cv.set(i, select(o.kind.absent(i), 0.0, left));
        });
        solve_cholesky(o, o.linear, o.cv);
        Team::each(o.lp, [&](auto i) { o.dv.set(i, o.dv[i] + o.cv[i]); });
        multiply_S(o, o.dv, o.Sdv);
    }
}

// Make one step from `before` to `now`; `Sdv` is S times the step in the multipliers.
template <class Team>
QP_NOINLINE Step<Team> step(Problem<Team>& o, double mu, double delta, bool refine, double waiting,
                            const Iterate<Team>& before, Iterate<Team>& now) {
    Step<Team> result{};
    result.mu = mu;
    predictor_rhs<Form::dense_dual>(o, 0.0, delta, before);
    result.sound = result.factor_ok = factor<Form::dense_dual>(o);
    if (!result.factor_ok) {
        return result;
    }
    solve_rows<Form::dense_dual>(o, before.r_x, o.right_v, o.dx, o.dv);
    double fraction = corrector_rhs(o, mu, waiting, before);
    solve_multipliers(o, refine);
    take_step(o, waiting, fraction, before, now, result.alpha_s, result.alpha_z);
    result.sound = all_finite<Team>(o.Sdv, o.lp) & all_finite<Team>(now.v, o.rows) & all_finite<Team>(now.s, o.rows);
    result.mu = result.sound ? mean(o, now.s, now.v) : mu;
    return result;
}

// Update the residuals of the rows and what is known of x after a step.
template <class Team>
QP_NOINLINE Products update(Problem<Team>& o, const Products& known, const Step<Team>& step,
                            const Iterate<Team>& before, Iterate<Team>& now) {
    using N = typename Team::Entry;
    double alpha_s = step.alpha_s, keep = 1 - alpha_s, apart = alpha_s - step.alpha_z;
    N t_dv_{}, dv_S_dv_{}, Kx_dv_{}, v_Kdx_{};
    Team::each(o.lp, [&](auto i) {
        N t = o.Vt[i], Sdv = o.Sdv[i], dv = o.dv[i], Kdx = t - Sdv, Kx_before = before.Kx[i];
        t_dv_ += t * dv;
        dv_S_dv_ += dv * Sdv;
        Kx_dv_ += Kx_before * dv;
        v_Kdx_ += before.v[i] * Kdx;
        N Kx = select(o.kind.absent(i), 0.0, Kx_before + alpha_s * Kdx);
        now.Kx.set(i, Kx);
        now.r_v.set(i, o.k[i] - Kx - now.s[i]);
        o.Vt.set(i, keep * t + apart * Sdv);
        o.u.set(i, keep * o.u[i] + apart * dv);
    });
    double t_dv = Team::sum(t_dv_), dv_S_dv = Team::sum(dv_S_dv_), Kx_dv = Team::sum(Kx_dv_), v_Kdx = Team::sum(v_Kdx_);
    double r_dx = known.rr - t_dv;
    Products after = known;
    after.a = keep * known.a;
    after.rr = keep * keep * known.rr + 2 * keep * apart * t_dv + apart * apart * dv_S_dv;
    after.xr = keep * known.xr + apart * Kx_dv + alpha_s * (keep * r_dx + apart * (t_dv - dv_S_dv));
    after.qx = known.qx - alpha_s * (known.xr - Kx_dv + v_Kdx + r_dx);
    return after;
}

// Decide how the problem stands as far as it shows without x; whether that is enough for now.
template <class Team>
QP_NOINLINE bool assess_without_x(Problem<Team>& o, const Products& known, const Iterate<Team>& now,
                                  const Iterate<Team>& before, const Verdict<Team>& past, Verdict<Team>& verdict) {
    using N = typename Team::Entry;
    const Parameters& P = *o.parameters;
    const Settings& settings = *o.settings;
    N primal_{}, Kx_{}, scaled_{}, vKx_{}, kv_{}, uu_{};
    N farthest = as<N>(P.loose * o.reach);
    Team::each(o.lp, [&](auto i) {
        N k = o.k[i], Kx = now.Kx[i], v = now.v[i], unit = o.unit_v[i], scaled = o.E[i] * k;
        auto absent = o.kind.absent(i);
        N violation = select(o.kind.equality(i), absolute(now.r_v[i]), select(absent, 0.0, positive(Kx - k)));
        primal_ = larger(unit * violation, primal_);
        Kx_ = larger(unit * absolute(Kx), Kx_);
        scaled_ = larger(select(scaled <= farthest, absolute(scaled), 0.0), scaled_);
        vKx_ += v * Kx;
        kv_ += v * k;
        uu_ += square(o.u[i]) * o.metric_v[i];
    });
    double primal = Team::largest(primal_), vKx = Team::sum(vKx_), kv = Team::sum(kv_), per_unit = per_gap_unit(o);
    double gap = per_unit * std::fabs(kv - vKx - known.xr);
    // The residual of the variables is seldom the largest, and if so a bound does, without K.
    double dual = known.a * known.r + known.column * std::sqrt(Team::sum(uu_));
    if (!(dual <= larger(primal, gap))) {
        set_zero<Team>(o.columns, o.np);
        Team::add_product_transposed(o.K, o.linear, o.n, o.u, o.columns);
        N most{};
        Team::each(
            o.np, [&](auto j) { most = larger(o.unit_x[j] * absolute(known.a * o.r_anchor[j] + o.columns[j]), most); });
        dual = Team::largest(most);
    }
    double worst = larger(primal, larger(dual, gap)), infeasible = 0, gain;
    if (primal > settings.tol) {
        infeasible = contradiction(o, now, before, larger(double(Team::largest(scaled_)), double(o.primal_unit)), gain);
    }
    double tol = settings.tol, rtol = settings.rtol;
    double size_gap = larger(std::fabs(known.xr + known.qx + vKx), larger(std::fabs(known.qx), std::fabs(kv)));
    bool far = primal > tol + rtol * Team::largest(Kx_) ||
               gap > 2 * tol + (2 * rtol + P.product_rounding) * per_unit * size_gap;
    double waiting = waited(o, past, primal, dual, gap, infeasible);
    bool well =
        waiting < P.equal_steps_after && worst < INFINITY_ && !(infeasible > P.late_certificate * settings.certificate);
    verdict = unknown<Team>();
    verdict.primal = primal, verdict.dual = dual, verdict.gap = gap, verdict.worst = worst;
    verdict.best_primal = least_of(primal, past.best_primal), verdict.best_dual = least_of(dual, past.best_dual);
    verdict.best_gap = least_of(gap, past.best_gap);
    verdict.certificate = larger(infeasible, past.certificate), verdict.waiting = waiting;
    return far && well && !past.near;
}

// Form x, from where it was last formed, so that rounding counts for less and less.
template <class Team> QP_NOINLINE void form_x(Problem<Team>& o, const Products& known, Iterate<Team>& now) {
    Team::each(o.lp, [&](auto i) { o.cv.set(i, o.u[i] + now.v[i] - o.v_anchor[i]); });
    solve_variables(o, 1 - known.a, o.cv, o.dx);
    Team::each(o.np, [&](auto j) { now.x.set(j, o.x_anchor[j] + o.dx[j]); });
}

// Decide how the problem stands; x is formed for it where that is wanted, and with `form`. `formed` says whether.
template <class Team>
QP_INLINE Verdict<Team> assess(Problem<Team>& o, const Products& known, bool form, Iterate<Team>& now,
                               const Iterate<Team>& before, const Verdict<Team>& past, int iterations, int limit,
                               bool& formed) {
    Verdict<Team> verdict;
    formed = form || iterations >= limit || !assess_without_x(o, known, now, before, past, verdict);
    if (formed) {
        form_x(o, known, now);
        verdict = qpdiff::assess<Form::dense_dual>(o, now, before, past, iterations, limit);
    }
    return verdict;
}

// Start in `now` in the ordinary way.
template <class Team>
QP_NOINLINE Start<Team> begin(Problem<Team>& o, Iterate<Team>& now, Iterate<Team>& before, Products& known,
                              bool& formed) {
    using N = typename Team::Entry;
    Start<Team> start{};
    set_zero<Team>(before.x, o.np);
    set_zero<Team>(before.v, o.rows);
    Team::each(o.np, [&](auto j) { before.r_x.set(j, -o.q[j]); });
    Products origin = anchor(o, before, longest_column(o));
    first_diagonals<Form::dense_dual>(o);
    start.factor_ok = factor<Form::dense_dual>(o);
    bool sound = start.factor_ok;
    if (sound) {
        copy<Team>(o.k, o.right_v, o.rows);
        solve_multipliers(o, true);
        sound = all_finite<Team>(o.Sdv, o.lp);
    }
    if (!sound) {
        set_zero<Team>(o.dv, o.rows);
    }
    // From x = 0 the step is Q⁻¹ (−q − Kᵀdv), which leaves nothing of Qx + q + Kᵀdv; but v is moved onto the path.
    copy<Team>(o.dv, now.v, o.rows);
    start.mu = center_start(o, now);
    N qx{}, xr{}, rr{};
    auto exists = truth<mask_of<N>>(sound);
    Team::each(o.lp, [&](auto i) {
        N t = o.Vt[i], dv = o.dv[i], u = dv - now.v[i];
        N Kx = select(exists & no(o.kind.absent(i)), t - o.Sdv[i], 0.0);
        o.u.set(i, u);
        now.Kx.set(i, Kx);
        now.r_v.set(i, o.k[i] - Kx - now.s[i]);
        qx += t * dv;
        xr += Kx * u;
    });
    multiply_S(o, o.u, o.Sdv);
    double a = sound ? 0 : 1;
    Team::each(o.lp, [&](auto i) {
        N t = o.Vt[i], Su = o.Sdv[i];
        rr += o.u[i] * (2 * a * t + Su);
        o.Vt.set(i, a * t + Su);
    });
    known = origin;
    known.a = a, known.rr = a * origin.rr + Team::sum(rr), known.xr = Team::sum(xr);
    known.qx = sound ? Team::sum(qx) - origin.rr : 0;
    start.verdict = assess(o, known, false, now, before, unknown<Team>(), 0, o.settings->max_iterations, formed);
    return start;
}

} // namespace qpdiff::dual_space
