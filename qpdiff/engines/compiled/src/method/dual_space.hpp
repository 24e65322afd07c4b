// Steps of the dense dual form in the dual space: x is formed only where it is wanted (engines/array/dual_space.py
// explains why that is enough). For one problem in float64.
#pragma once
#include "step.hpp"

namespace qpdiff::dual_space {

// Products from which the residuals and, where it is wanted, x are computed. Where x was last formed it was `x_anchor`,
// v was `v_anchor` and r_x was `r_anchor`. Now r_x is `a` times that and Kᵀu, and Q (x − x_anchor) is
// (1 − a) r_anchor − Kᵀ(u + v − v_anchor).
struct ImplicitX {
    double a = 0;
    double rr = 0;     // r_xᵀ Q⁻¹ r_x
    double xr = 0;     // xᵀ r_x
    double qx = 0;     // qᵀx
    double r = 0;      // largest entry of `r_anchor`, in the units of the tolerance
    double column = 0; // largest norm of a column of K in the scaled constraints, in the units of the tolerance
};

template <class Team> QP_INLINE double dot(typename Team::Vector a, typename Team::Vector b, int count) {
    typename Team::Entry sum{};
    Team::each(count, [&](auto i) { sum += a[i] * b[i]; });
    return Team::sum(sum);
}

// Compute out = S a.
template <class Team>
QP_INLINE void multiply_S(const Problem<Team>& o, typename Team::Vector a, typename Team::Vector out) {
    set_zero<Team>(out, o.lp);
    Team::add_product_transposed(o.S, o.linear, o.linear, a, out); // symmetric
}

// Return the largest norm of a column of K in the scaled constraints, in the units of the tolerance.
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

// Begin the recurrences at an iterate whose x and residuals are known.
template <class Team> QP_NOINLINE ImplicitX anchor(Problem<Team>& o, const Iterate<Team>& at, double column) {
    typename Team::Entry r{};
    copy<Team>(at.x, o.x_anchor, o.np);
    copy<Team>(at.v, o.v_anchor, o.lp);
    copy<Team>(at.r_x, o.r_anchor, o.np);
    set_zero<Team>(o.u, o.lp);
    eliminate<Form::dense_dual>(o, at.r_x);
    Team::each(o.np, [&](auto j) { r = larger(o.unit_x[j] * absolute(at.r_x[j]), r); });
    return {1.0,
            dot<Team>(o.forward, o.forward, o.np),
            dot<Team>(at.x, at.r_x, o.np),
            dot<Team>(o.q, at.x, o.np),
            Team::largest(r),
            column};
}

// Solve for dv, with one round of refinement where `refine` asks for it, and compute S dv. The right-hand sides are `t`
// and `right_v`.
template <class Team> QP_NOINLINE void solve_refined(Problem<Team>& o, bool refine) {
    using N = typename Team::Entry;
    Team::each(o.lp, [&](auto i) { o.dv.set(i, o.t[i] - o.right_v[i]); });
    solve_cholesky(o, o.linear, o.dv);
    multiply_S(o, o.dv, o.Sdv);
    if (refine) {
        Team::each(o.lp, [&](auto i) {
            N left = o.t[i] - o.right_v[i] - o.Sdv[i] - (o.theta[i] + o.delta[i]) * o.dv[i];
            o.cv.set(i, select(o.kind.absent(i), 0.0, left));
        });
        solve_cholesky(o, o.linear, o.cv);
        Team::each(o.lp, [&](auto i) { o.dv.set(i, o.dv[i] + o.cv[i]); });
        multiply_S(o, o.dv, o.Sdv);
    }
}

// Make one step from `previous` to `current` as `qpdiff::step` does, without x.
template <class Team>
QP_NOINLINE Step<Team> step(Problem<Team>& o, double mu, const Regularization<Team>& regularization, bool refine,
                            double without_progress, const Iterate<Team>& previous, Iterate<Team>& current) {
    Step<Team> made{};
    made.mu = mu;
    predictor_rhs<Form::dense_dual>(o, regularization, previous);
    made.computed = made.factor_ok = factor<Form::dense_dual>(o);
    if (!made.factor_ok) {
        return made;
    }
    solve_multipliers<Form::dense_dual>(o, previous.r_x, o.right_v, o.dx, o.dv);
    double fraction = corrector_rhs(o, mu, without_progress, previous);
    solve_refined(o, refine);
    take_step(o, without_progress, fraction, previous, current, made.alpha_s, made.alpha_z);
    made.computed =
        all_finite<Team>(o.Sdv, o.lp) & all_finite<Team>(current.v, o.rows) & all_finite<Team>(current.s, o.rows);
    made.mu = made.computed ? mean(o, current) : mu;
    return made;
}

// Update Kx, r_v and the recurrences after a step dv in the multipliers.
template <class Team>
QP_NOINLINE ImplicitX update(Problem<Team>& o, const ImplicitX& known, const Step<Team>& made,
                             const Iterate<Team>& previous, Iterate<Team>& current) {
    using N = typename Team::Entry;
    double alpha_s = made.alpha_s, rest = 1 - alpha_s, apart = alpha_s - made.alpha_z;
    N t_dv_{}, dv_S_dv_{}, Kx_dv_{}, v_Kdx_{};
    Team::each(o.lp, [&](auto i) {
        N t = o.t[i], Sdv = o.Sdv[i], dv = o.dv[i], Kdx = t - Sdv, Kx_before = previous.Kx[i];
        t_dv_ += t * dv;
        dv_S_dv_ += dv * Sdv;
        Kx_dv_ += Kx_before * dv;
        v_Kdx_ += previous.v[i] * Kdx;
        N Kx = select(o.kind.absent(i), 0.0, Kx_before + alpha_s * Kdx);
        current.Kx.set(i, Kx);
        current.r_v.set(i, o.k[i] - Kx - net_slack(o, current, i));
        o.t.set(i, rest * t + apart * Sdv);
        o.u.set(i, rest * o.u[i] + apart * dv);
    });
    double t_dv, dv_S_dv, Kx_dv, v_Kdx;
    Team::reduce(Sum{t_dv_, t_dv}, Sum{dv_S_dv_, dv_S_dv}, Sum{Kx_dv_, Kx_dv}, Sum{v_Kdx_, v_Kdx});
    double r_dx = known.rr - t_dv;
    ImplicitX after = known;
    after.a = rest * known.a;
    after.rr = rest * rest * known.rr + 2 * rest * apart * t_dv + apart * apart * dv_S_dv;
    after.xr = rest * known.xr + apart * Kx_dv + alpha_s * (rest * r_dx + apart * (t_dv - dv_S_dv));
    after.qx = known.qx - alpha_s * (known.xr - Kx_dv + v_Kdx + r_dx);
    return after;
}

// Compute the state as far as the recurrences tell; return whether that is enough: the stopping test is far from being
// passed, and the problem makes progress.
template <class Team>
QP_NOINLINE bool assess_without_x(Problem<Team>& o, const ImplicitX& known, const Iterate<Team>& current,
                                  const Iterate<Team>& previous, const State<Team>& state, State<Team>& assessed) {
    using N = typename Team::Entry;
    const Parameters& P = *o.parameters;
    const Settings& settings = *o.settings;
    N primal_{}, Kx_{}, scaled_{}, vKx_{}, kv_{}, uu_{}, price_{};
    N farthest = as<N>(P.loose * o.reach);
    Team::each(o.lp, [&](auto i) {
        N k = o.k[i], Kx = current.Kx[i], v = current.v[i], unit = o.unit_v[i], scaled = o.E[i] * k;
        auto absent = o.kind.absent(i);
        auto equality = o.kind.equality(i);
        N beyond = Kx - k;
        if constexpr (Team::PRICED) { // what is paid for
            N of_quadratic = o.compliance[i] * v;
            equality |= two_sided(o, i);
            beyond -= current.t[i] + of_quadratic;
            price_ += linear_price(o, current, i) + of_quadratic * v;
        }
        N violation = select(equality, absolute(current.r_v[i]), select(absent, 0.0, positive(beyond)));
        primal_ = larger(unit * violation, primal_);
        Kx_ = larger(unit * absolute(Kx), Kx_);
        scaled_ = larger(select(scaled <= farthest, absolute(scaled), 0.0), scaled_);
        vKx_ += v * Kx;
        kv_ += v * k;
        uu_ += square(o.u[i]) * o.per_E2[i];
    });
    double primal, Kx_size, scaled_k, vKx, kv, uu, per_unit = per_gap_unit(o);
    Team::reduce(Largest{primal_, primal}, Largest{Kx_, Kx_size}, Largest{scaled_, scaled_k}, Sum{vKx_, vKx},
                 Sum{kv_, kv}, Sum{uu_, uu});
    double price = Team::PRICED ? double(Team::sum(price_)) : 0;
    double gap = per_unit * std::fabs(kv - vKx - known.xr + price);
    // The residual of the variables is seldom the largest, and if so a bound says that, without K.
    double dual = known.a * known.r + known.column * std::sqrt(uu);
    if (!(dual <= larger(primal, gap))) {
        set_zero<Team>(o.columns, o.np);
        Team::add_product_transposed(o.K, o.linear, o.n, o.u, o.columns);
        N most{};
        Team::each(
            o.np, [&](auto j) { most = larger(o.unit_x[j] * absolute(known.a * o.r_anchor[j] + o.columns[j]), most); });
        dual = Team::largest(most);
    }
    double infeasible = 0;
    if (primal > settings.tol) {
        infeasible = farkas_certificate(o, current, previous, larger(scaled_k, double(o.primal_unit))).ratio;
    }
    assessed = unknown_state<Team>();
    assessed.primal = primal, assessed.dual = dual, assessed.gap = gap;
    assessed.worst = larger(primal, larger(dual, gap));
    progress(o, state, infeasible, assessed);
    double size = larger(std::fabs(known.xr + known.qx + vKx), larger(std::fabs(known.qx), std::fabs(kv + price)));
    bool far = primal > allowed(settings, Kx_size) || gap > allowed(settings, per_unit * size, 2, P.product_rounding);
    bool well = assessed.without_progress < P.equal_steps_after && assessed.worst < INFINITY_ &&
                !(infeasible > P.late_certificate * P.certificate);
    return far && well && !state.within_tolerance;
}

// Form x, from where it was last formed, so that rounding counts for less and less.
template <class Team> QP_NOINLINE void form_x(Problem<Team>& o, const ImplicitX& known, Iterate<Team>& current) {
    Team::each(o.lp, [&](auto i) { o.cv.set(i, o.u[i] + current.v[i] - o.v_anchor[i]); });
    solve_variables(o, 1 - known.a, o.cv, o.dx);
    Team::each(o.np, [&](auto j) { current.x.set(j, o.x_anchor[j] + o.dx[j]); });
}

// Return the state: without x, or with x formed where that is not enough, or with `form`. `formed` is whether it was.
template <class Team>
QP_INLINE State<Team> assess(Problem<Team>& o, const ImplicitX& known, bool form, Iterate<Team>& current,
                             const Iterate<Team>& previous, const State<Team>& state, int iterations, int limit,
                             bool& formed) {
    State<Team> assessed;
    formed = form || iterations >= limit || !assess_without_x(o, known, current, previous, state, assessed);
    if (formed) {
        form_x(o, known, current);
        assessed = qpdiff::assess<Form::dense_dual>(o, current, previous, state, iterations, limit);
    }
    return assessed;
}

// Start in the ordinary way as `qpdiff::begin` does: fill `current`, `previous` with the origin, and what is known of
// x.
template <class Team>
QP_NOINLINE Start<Team> begin(Problem<Team>& o, Iterate<Team>& current, Iterate<Team>& previous, ImplicitX& known,
                              bool& formed) {
    using N = typename Team::Entry;
    Start<Team> start{};
    set_zero<Team>(previous.x, o.np);
    set_zero<Team>(previous.v, o.rows);
    Team::each(o.np, [&](auto j) { previous.r_x.set(j, -o.q[j]); });
    ImplicitX origin = anchor(o, previous, longest_column(o));
    first_diagonals<Form::dense_dual>(o);
    start.factor_ok = factor<Form::dense_dual>(o);
    bool computed = start.factor_ok;
    if (computed) {
        copy<Team>(o.k, o.right_v, o.rows);
        solve_refined(o, true);
        computed = all_finite<Team>(o.Sdv, o.lp);
    }
    if (!computed) {
        set_zero<Team>(o.dv, o.rows);
    }
    // From x = 0 the step is Q⁻¹ (−q − Kᵀdv), which leaves nothing of Qx + q + Kᵀdv; but v is moved onto the path.
    copy<Team>(o.dv, current.v, o.rows);
    start.mu = center_start(o, current);
    N qx{}, xr{}, rr{};
    auto exists = truth<mask_of<N>>(computed);
    Team::each(o.lp, [&](auto i) {
        N t = o.t[i], dv = o.dv[i], u = dv - current.v[i];
        N Kx = select(exists & no(o.kind.absent(i)), t - o.Sdv[i], 0.0);
        o.u.set(i, u);
        current.Kx.set(i, Kx);
        current.r_v.set(i, o.k[i] - Kx - net_slack(o, current, i));
        qx += t * dv;
        xr += Kx * u;
    });
    multiply_S(o, o.u, o.Sdv);
    double a = computed ? 0 : 1;
    Team::each(o.lp, [&](auto i) {
        N t = o.t[i], Su = o.Sdv[i];
        rr += o.u[i] * (2 * a * t + Su);
        o.t.set(i, a * t + Su);
    });
    known = origin;
    double sum_rr, sum_xr, sum_qx;
    Team::reduce(Sum{rr, sum_rr}, Sum{xr, sum_xr}, Sum{qx, sum_qx});
    known.a = a, known.rr = a * origin.rr + sum_rr, known.xr = sum_xr;
    known.qx = computed ? sum_qx - origin.rr : 0;
    start.state =
        assess(o, known, false, current, previous, unknown_state<Team>(), 0, o.settings->max_iterations, formed);
    return start;
}

} // namespace qpdiff::dual_space
