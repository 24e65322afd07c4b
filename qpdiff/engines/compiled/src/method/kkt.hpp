// The KKT system: products, the reduced matrices, their factors, solves and a round of refinement (qpdiff.kkt).
#pragma once
#include "equilibration.hpp"

namespace qpdiff {

// ---- products

// out = Qx; in the form for diagonal Q only the diagonal counts.
template <Form FORM, class Team, class X, class O> QP_INLINE void hessian(const Problem<Team>& o, X x, O out) {
    if constexpr (FORM == Form::diagonal_dual) {
        Team::each_of(out, o.np, [&](auto j) { out.set(j, o.diagonal_Q[j] * x[j]); });
    } else {
        Team::product(o.Q, o.n, o.n, x, out);
    }
}

// out = Kx: the left-hand side of every row.
template <class Team, class X, class O> QP_INLINE void constraints(const Problem<Team>& o, X x, O out) {
    Team::product(o.K, o.linear, o.n, x, out);
    if (o.lower) {
        Team::each_of(out, o.np, [&](auto j) { out.set(j + o.at_lower(), -x[j]); });
    }
    if (o.upper) {
        Team::each_of(out, o.np, [&](auto j) { out.set(j + o.at_upper(), x[j]); });
    }
}

// out = Kᵀv: the multipliers of all rows mapped to the variables.
template <class Team, class X, class O> QP_INLINE void adjoint(const Problem<Team>& o, X v, O out) {
    Team::each_of(out, o.np, [&](auto j) {
        decltype(v[j]) sum{};
        if (o.lower) {
            sum -= v[j + o.at_lower()];
        }
        if (o.upper) {
            sum += v[j + o.at_upper()];
        }
        out.set(j, sum);
    });
    Team::add_product_transposed(o.K, o.linear, o.n, v, out);
}

template <class Team> QP_INLINE void set_zero(typename Team::Vector a, int count) {
    Team::each(count, [&](auto i) { a.set(i, typename Team::Real(0)); });
}

template <class Team, class A> QP_INLINE void copy(A a, A out, int count) {
    Team::each(count, [&](auto i) { out.set(i, a[i]); });
}

template <class Team, class A> QP_INLINE typename Team::Truth all_finite(A a, int count) {
    auto finite = truth<mask_of<typename Team::Entry>>(true);
    Team::each(count, [&](auto i) { finite &= is_finite(a[i]); });
    return Team::all(finite);
}

// ---- the reduced matrices

// Compute what does not change of the reduced matrix; whether that is safe.
template <Form FORM, class Team> QP_NOINLINE typename Team::Truth prepare(Problem<Team>& o) {
    using N = typename Team::Entry;
    using Real = typename Team::Real;
    using Truth = typename Team::Truth;
    const Parameters& P = *o.parameters;
    if constexpr (FORM == Form::primal) {
        return truth<Truth>(true);
    } else if constexpr (FORM == Form::diagonal_dual) {
        // Without enough curvature the weight of a variable away from its bounds tends to ρ, whose inverse drowns the
        // rest.
        auto safe = truth<mask_of<N>>(true);
        Team::each(o.np, [&](auto j) {
            N entry = o.diagonal_Q[j], scale = o.balanced_D[j];
            safe &= (entry * scale * scale > as<N>(Real(P.smallest_scaled_curvature))) | (o.exists[j] == N{});
            o.diagonal.set(j, entry + (Real(P.diagonal_regularization) * entry + smallest_normal<Real>));
        });
        return Team::all(safe);
    } else {
        Team::complete_diagonal(o.Q, o.n);
        Truth safe = Team::cholesky(o.Q, decltype(o.q){}, o.F, o.n);
        auto pivots = o.columns; // their inverse roots
        Team::take_diagonal(o.F, o.n, pivots);
        auto enough = truth<mask_of<N>>(true);
        Team::each(o.np, [&](auto j) {
            N entry = o.diagonal_Q[j], f = pivots[j];
            auto good = (entry > N{}) & (Real(P.smallest_pivot) * entry * f * f < as<N>(Real(1)));
            enough &= good | (o.exists[j] == N{});
        });
        safe &= Team::all(enough);
        if (some(safe)) {
            Team::transpose(o.K, o.linear, o.n, o.V);
            Team::solve_transposed(o.F, o.n, o.V, o.linear);
            Team::gram({}, o.V, o.n, o.S, o.linear);
            Team::mirror(o.S, o.linear);
        }
        return safe;
    }
}

// What the weights of the bounds add to the diagonal at a variable.
template <class Team, class I> QP_INLINE auto bound_weights(const Problem<Team>& o, I j) {
    typename Team::Entry sum{};
    if (o.lower) {
        sum += o.weights[j + o.at_lower()];
    }
    if (o.upper) {
        sum += o.weights[j + o.at_upper()];
    }
    return sum;
}

// Fill 1 / (diagonal Q + what the bounds add).
template <class Team> QP_INLINE void invert_diagonal(Problem<Team>& o) {
    using Real = typename Team::Real;
    Team::each(o.np, [&](auto j) { o.inverse.set(j, Real(1) / (o.diagonal[j] + bound_weights(o, j))); });
}

// Factor the reduced matrix for θ, ρ and δ; whether it was positive definite.
template <Form FORM, class Team> QP_NOINLINE typename Team::Truth factor(Problem<Team>& o) {
    using N = typename Team::Entry;
    using Real = typename Team::Real;
    if constexpr (FORM != Form::dense_dual) {
        Team::each(o.rows, [&](auto i) { o.weights.set(i, Real(1) / (o.theta[i] + o.delta[i])); });
    }
    if constexpr (FORM == Form::primal) {
        Team::each(o.lp, [&](auto i) { o.lengths.set(i, root(o.weights[i])); });
        Team::scale_rows(o.K, o.linear, o.n, o.lengths, o.scaled);
        Team::gram(o.Q, o.scaled, o.linear, o.U, o.n);
        Team::each(o.np, [&](auto j) { o.added.set(j, o.rho[j] + bound_weights(o, j)); });
        return Team::cholesky(o.U, o.added, o.U, o.n);
    } else {
        // Rows that do not exist get a diagonal that is huge but harmless to the factorisation.
        Team::each(o.lp, [&](auto i) {
            N entry = o.theta[i] + o.delta[i];
            o.added.set(i, select(is_finite(entry), entry, largest_root<Real>));
        });
        if constexpr (FORM == Form::dense_dual) {
            return Team::cholesky(o.S, o.added, o.U, o.linear);
        } else {
            invert_diagonal(o);
            Team::each(o.np, [&](auto j) { o.columns.set(j, root(o.inverse[j])); });
            Team::scale_rows(o.turned, o.n, o.linear, o.columns, o.V);
            Team::gram({}, o.V, o.n, o.U, o.linear);
            return Team::cholesky(o.U, o.added, o.U, o.linear);
        }
    }
}

// ---- solving with a factor

// Solve with the factor of the reduced matrix, in place.
template <class Team> QP_INLINE void solve_cholesky(const Problem<Team>& o, int size, typename Team::Vector r) {
    Team::forward(o.U, size, r);
    Team::backward(o.U, size, r);
}

// Compute what a solve needs of the right-hand side of the variables alone: once for many solves.
template <Form FORM, class Team> QP_INLINE void eliminate(Problem<Team>& o, typename Team::Vector r_x) {
    if constexpr (FORM == Form::dense_dual) {
        copy<Team>(r_x, o.t, o.np);
        Team::forward(o.F, o.n, o.t);
        set_zero<Team>(o.Vt, o.lp);
        Team::add_product_transposed(o.V, o.n, o.linear, o.t, o.Vt);
    }
}

// Solve as far as the multipliers need it, which with the dense dual form is without dx.
template <Form FORM, class Team, class Vector = typename Team::Vector>
QP_INLINE void solve_rows(Problem<Team>& o, Vector r_x, Vector r_v, Vector dx, Vector dv) {
    using N = typename Team::Entry;
    if constexpr (FORM == Form::dense_dual) {
        Team::each(o.lp, [&](auto i) { dv.set(i, o.Vt[i] - r_v[i]); });
        solve_cholesky(o, o.linear, dv);
    } else if constexpr (FORM == Form::primal) {
        Team::each(o.rows, [&](auto i) { dv.set(i, o.weights[i] * r_v[i]); });
        adjoint(o, dv, dx);
        Team::each(o.np, [&](auto j) { dx.set(j, dx[j] + r_x[j]); });
        solve_cholesky(o, o.n, dx);
        constraints(o, dx, dv);
        Team::each(o.rows, [&](auto i) { dv.set(i, o.weights[i] * (dv[i] - r_v[i])); });
    } else {
        int low = o.at_lower(), up = o.at_upper();
        Team::each(o.np, [&](auto j) {
            N right = r_x[j];
            if (o.lower) {
                right -= o.weights[j + low] * r_v[j + low];
            }
            if (o.upper) {
                right += o.weights[j + up] * r_v[j + up];
            }
            o.t.set(j, right * o.inverse[j]);
        });
        Team::product(o.K, o.linear, o.n, o.t, dv);
        Team::each(o.lp, [&](auto i) { dv.set(i, dv[i] - r_v[i]); });
        solve_cholesky(o, o.linear, dv);
        set_zero<Team>(dx, o.np);
        Team::add_product_transposed(o.K, o.linear, o.n, dv, dx);
        Team::each(o.np, [&](auto j) {
            N x = o.t[j] - o.inverse[j] * dx[j];
            dx.set(j, x);
            if (o.lower) {
                dv.set(j + low, o.weights[j + low] * (-x - r_v[j + low]));
            }
            if (o.upper) {
                dv.set(j + up, o.weights[j + up] * (x - r_v[j + up]));
            }
        });
    }
}

// Triangular solves with the factor of Q: dx = Q⁻¹ (share r_x − Kᵀdv) in the dense dual form, after `eliminate`.
template <class Team, class Vector = typename Team::Vector>
QP_INLINE void solve_variables(Problem<Team>& o, typename Team::Number share, Vector dv, Vector dx) {
    Team::product(o.V, o.n, o.linear, dv, dx);
    Team::each(o.np, [&](auto j) { dx.set(j, share * o.t[j] - dx[j]); });
    Team::backward(o.F, o.n, dx);
}

// Solve for right-hand sides of the variables and the rows, after `eliminate`.
template <Form FORM, class Team, class Vector = typename Team::Vector>
QP_NOINLINE void solve(Problem<Team>& o, Vector r_x, Vector r_v, Vector dx, Vector dv) {
    solve_rows<FORM>(o, r_x, r_v, dx, dv);
    if constexpr (FORM == Form::dense_dual) {
        solve_variables(o, as<typename Team::Number>(typename Team::Real(1)), dv, dx);
    }
}

// Fill e_x, e_v with what a step (dx, dv) leaves of the right-hand side of the KKT system.
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

// Solve for dx and dv, with one round of refinement for the problems that want it.
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
