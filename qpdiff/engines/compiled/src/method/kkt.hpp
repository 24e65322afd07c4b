// The KKT system: residuals and refinement (engines/array/kkt.py explains the system).
#pragma once
#include "reduced_forms.hpp"

namespace qpdiff {

// Fill e_x, e_v with the residual that a direction (dx, dv) leaves of the right-hand side of the KKT system.
template <Form FORM, class Team, class Vector = typename Team::Vector>
QP_INLINE void residual(Problem<Team>& o, Vector r_x, Vector r_v, Vector dx, Vector dv, Vector e_x, Vector e_v) {
    using Real = typename Team::Real;
    hessian<FORM>(o, dx, e_x);
    adjoint(o, dv, o.columns);
    Team::each(o.np, [&](auto j) { e_x.set(j, r_x[j] - e_x[j] - o.rho[j] * dx[j] - o.columns[j]); });
    constraints(o, dx, e_v);
    Team::each(o.rows, [&](auto i) {
        auto theta = o.theta[i];
        e_v.set(i, select(is_finite(theta), r_v[i] - e_v[i] + (theta + o.delta[i]) * dv[i], Real(0)));
    });
}

// Solve for dx and dv, after `eliminate`, with one round of refinement for the problems of a mask.
template <Form FORM, class Team, class Vector = typename Team::Vector>
QP_NOINLINE void solve_refined(Problem<Team>& o, typename Team::Truth refine, Vector r_x, Vector r_v) {
    using Real = typename Team::Real;
    solve<FORM>(o, r_x, r_v, o.dx, o.dv);
    if (!some(refine)) {
        return;
    }
    residual<FORM>(o, r_x, r_v, o.dx, o.dv, o.e_x, o.e_v);
    eliminate<FORM>(o, o.e_x);
    solve<FORM>(o, o.e_x, o.e_v, o.cx, o.cv);
    Team::each(o.np, [&](auto j) { o.dx.set(j, o.dx[j] + select(refine, o.cx[j], Real(0))); });
    Team::each(o.rows, [&](auto i) { o.dv.set(i, o.dv[i] + select(refine, o.cv[i], Real(0))); });
}

} // namespace qpdiff
