// The reduced KKT systems: their matrices, factors and solves (engines/array/reduced_forms.py).
#pragma once
#include "equilibration.hpp"

namespace qpdiff {

// ---- the reduced matrices

// Compute the constants of the reduced matrix; return whether the form is safe (`prepare` of the array engine's forms).
template <Form FORM, class Team> QP_NOINLINE typename Team::Truth prepare(Problem<Team>& o) {
    using N = typename Team::Entry;
    using Real = typename Team::Real;
    using Truth = typename Team::Truth;
    const Parameters& P = *o.parameters;
    if constexpr (FORM == Form::primal) {
        return truth<Truth>(true);
    } else if constexpr (FORM == Form::diagonal_dual) {
        // Without enough curvature the weight of a variable away from its bounds tends to ρ, whose inverse is so large
        // that the other terms are lost to rounding.
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
        auto pivots = o.columns; // 1 / the root of each
        Team::take_diagonal(o.F, o.n, pivots);
        auto enough = truth<mask_of<N>>(true);
        Team::each(o.np, [&](auto j) {
            N entry = o.diagonal_Q[j], f = pivots[j];
            auto large = (entry > N{}) & (Real(P.smallest_pivot) * entry * f * f < as<N>(Real(1)));
            enough &= large | (o.exists[j] == N{});
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

// Return what the weights of the bounds add to the diagonal at a variable.
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

// Fill `inverse` with 1 / (diagonal Q + the weights of the bounds).
template <class Team> QP_INLINE void invert_diagonal(Problem<Team>& o) {
    using Real = typename Team::Real;
    Team::each(o.np, [&](auto j) { o.inverse.set(j, Real(1) / (o.diagonal[j] + bound_weights(o, j))); });
}

// Factor the reduced matrix for θ, ρ and δ; return whether it was positive definite.
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
        // Constraints that do not exist get a diagonal that is huge but harmless to the factorisation.
        Team::each(o.lp, [&](auto i) {
            N entry = o.theta[i] + o.delta[i];
            o.added.set(i, select(is_finite(entry), entry, largest_root<Real>));
        });
        if constexpr (FORM == Form::dense_dual) {
            return Team::cholesky(o.S, o.added, o.U, o.linear);
        } else {
            invert_diagonal(o);
            Team::each(o.np, [&](auto j) { o.columns.set(j, root(o.inverse[j])); });
            Team::scale_rows(o.K_transposed, o.n, o.linear, o.columns, o.V);
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

// Eliminate the right-hand side of the variables, once for several solves with the same: fill `forward` and `t`.
template <Form FORM, class Team> QP_INLINE void eliminate(Problem<Team>& o, typename Team::Vector r_x) {
    if constexpr (FORM == Form::dense_dual) {
        copy<Team>(r_x, o.forward, o.np);
        Team::forward(o.F, o.n, o.forward);
        set_zero<Team>(o.t, o.lp);
        Team::add_product_transposed(o.V, o.n, o.linear, o.forward, o.t);
    }
}

// Solve for the multipliers dv, after `eliminate`; the dense dual form does not compute dx.
template <Form FORM, class Team, class Vector = typename Team::Vector>
QP_INLINE void solve_multipliers(Problem<Team>& o, Vector r_x, Vector r_v, Vector dx, Vector dv) {
    using N = typename Team::Entry;
    if constexpr (FORM == Form::dense_dual) {
        Team::each(o.lp, [&](auto i) { dv.set(i, o.t[i] - r_v[i]); });
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
            o.forward.set(j, right * o.inverse[j]);
        });
        Team::product(o.K, o.linear, o.n, o.forward, dv);
        Team::each(o.lp, [&](auto i) { dv.set(i, dv[i] - r_v[i]); });
        solve_cholesky(o, o.linear, dv);
        set_zero<Team>(dx, o.np);
        Team::add_product_transposed(o.K, o.linear, o.n, dv, dx);
        Team::each(o.np, [&](auto j) {
            N x = o.forward[j] - o.inverse[j] * dx[j];
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

// Solve dx = Q⁻¹ (share r_x − Kᵀdv) with the factor of Q in the dense dual form, after `eliminate`.
template <class Team, class Vector = typename Team::Vector>
QP_INLINE void solve_variables(Problem<Team>& o, typename Team::Number share, Vector dv, Vector dx) {
    Team::product(o.V, o.n, o.linear, dv, dx);
    Team::each(o.np, [&](auto j) { dx.set(j, share * o.forward[j] - dx[j]); });
    Team::backward(o.F, o.n, dx);
}

// Solve for right-hand sides of the variables and the constraints, after `eliminate`.
template <Form FORM, class Team, class Vector = typename Team::Vector>
QP_NOINLINE void solve(Problem<Team>& o, Vector r_x, Vector r_v, Vector dx, Vector dv) {
    solve_multipliers<FORM>(o, r_x, r_v, dx, dv);
    if constexpr (FORM == Form::dense_dual) {
        solve_variables(o, as<typename Team::Number>(typename Team::Real(1)), dv, dx);
    }
}

} // namespace qpdiff
