// The KKT system at the solution of problems with sparse matrices, solved with a factor made for the purpose. It raises
// the smallest θ (engines/array/derivative.py explains how), a little at first, and where refinement does not take that
// back accurately, as much as the dense forms do. For one problem or one in each lane.
#pragma once
#include "derivative.hpp"
#include "sparse_kkt.hpp"

namespace qpdiff {

// A derivative with the vectors that a problem in a lane needs for itself.
template <class V, bool PRICED> struct SparseDerivative : Derivative<sparse::Team<V, PRICED>> {
    typename sparse::Team<V, PRICED>::Vector
        share; // factors on residuals of the constraints: E, less where a constraint is inactive
    KktSolution<sparse::Team<V, PRICED>> first;
};

// Return the size of a right-hand side or a residual in the scaled problem. An inactive constraint counts with what its
// elimination adds to those of the variables.
template <class V, bool PRICED>
V size_of(const SparseProblem<V, PRICED>& o, const SparseDerivative<V, PRICED>& d,
          const RightHandSide<sparse::Team<V, PRICED>>& right) {
    using Team = sparse::Team<V, PRICED>;
    typename Team::Entry size{};
    Team::each(o.np, [&](auto j) { size = larger(absolute(right.x[j] * o.D[j]), size); });
    Team::each(o.rows,
               [&](auto i) { size = larger(select(o.kind.absent(i), 0.0, absolute(right.v[i] * d.share[i])), size); });
    return Team::largest(size);
}

// How accurate a refined solution is: whether as a whole, or but for how dependent constraints share; and its residual
// against the right-hand side.
template <class V> struct Refined {
    mask_of<V> accurate, settled;
    V left;
};

// Solve the system with the factor of a nearby one, by so many rounds of refinement; the solution is left in `u`.
//
// Where active constraints are dependent, the multipliers that cancel each other converge slowly if at all: how they
// share what is asked of them is decided by the raised θ. Corrections that do not move the variables are of that kind.
template <class V, bool PRICED>
QP_NOINLINE Refined<V> solve_with_nearby_factor(SparseProblem<V, PRICED>& o, SparseDerivative<V, PRICED>& d,
                                                int rounds) {
    using Team = sparse::Team<V, PRICED>;
    using Mask = mask_of<V>;
    constexpr Form FORM = Form::sparse_kkt;
    const Parameters& P = *o.parameters;
    Problem<Team>& problem = o;
    auto solve = [&](const RightHandSide<Team>& right, const KktSolution<Team>& out) {
        solve_multipliers<FORM>(problem, right.x, right.v, out.x, out.v);
        constraints(problem, out.x, out.Kx);
    };
    auto size_of_solution = [&](const KktSolution<Team>& u) {
        return scaled_size<Team>(problem, d, d.per_D, d.per_E, u.x, u.v);
    };
    V asked = size_of(o, d, d.right), moved = as<V>(1.0), last = moved;
    solve(d.right, d.u);
    residual<FORM>(problem, d, d.u, d.left);
    V left = ratio(size_of(o, d, d.left), asked);
    auto active = truth<Mask>(true), settled = no(active);
    for (int round = 0; round < rounds && some(active); round++) {
        auto c = d.correction;
        solve(d.left, c);
        V size = size_of_solution(d.u), now = ratio(size_of_solution(c), size);
        moved = select(active, ratio(now * now, last), moved);
        last = now;
        typename Team::Entry of_x{};
        Team::each(o.np, [&](auto j) {
            of_x = larger(absolute(c.x[j] * d.per_D[j]), of_x);
            c.x.set(j, c.x[j] + d.u.x[j]);
        });
        V now_x = Team::largest(of_x);
        Team::each(o.rows, [&](auto i) {
            c.v.set(i, c.v[i] + d.u.v[i]);
            c.Kx.set(i, c.Kx[i] + d.u.Kx[i]);
        });
        residual<FORM>(problem, d, c, d.left_after);
        V after = ratio(size_of(o, d, d.left_after), asked);
        settled |= active & (ratio(now_x, size) <= as<V>(P.sparse_settled)) & (left <= as<V>(P.afresh_largest)) &
                   truth<Mask>(round > 0);
        // A factor too far off makes it worse from round to round; the best is returned.
        active &= after < left;
        auto take = [&](typename Team::Vector from, typename Team::Vector to, int count) {
            Team::each(count, [&](auto i) { to.set(i, select(active, from[i], to[i])); });
        };
        if (every(active)) {
            std::swap(d.u, d.correction);
            std::swap(d.left, d.left_after);
        } else {
            take(c.x, d.u.x, o.np), take(c.v, d.u.v, o.rows), take(c.Kx, d.u.Kx, o.rows);
            take(d.left_after.x, d.left.x, o.np), take(d.left_after.v, d.left.v, o.rows);
        }
        left = select(active, after, left);
        active &= no(settled | ((left <= as<V>(P.refined)) & (moved <= as<V>(P.refined_moved * P.refined))));
    }
    Mask accurate = (left <= as<V>(P.factor_residual)) & (moved <= as<V>(P.factor_moved));
    return {accurate, settled, left};
}

// Solve the KKT system at the solution that `set_point` has been called for.
template <class V, bool PRICED>
QP_NOINLINE void solve_kkt(SparseProblem<V, PRICED>& o, SparseDerivative<V, PRICED>& d) {
    using Team = sparse::Team<V, PRICED>;
    const Parameters& P = *o.parameters;
    Problem<Team>& problem = o;
    V rho = as<V>(P.afresh_rho);
    auto set_rho = [&] { Team::each(o.np, [&](auto j) { o.rho.set(j, rho * o.per_D2[j]); }); };
    Team::each(o.np, [&](auto j) {
        auto per_D = 1.0 / o.D[j];
        d.per_D.set(j, per_D);
        o.per_D2.set(j, square(per_D));
    });
    Team::each(o.rows, [&](auto i) {
        auto E = o.E[i], per_E = 1.0 / E;
        d.per_E.set(i, per_E);
        d.share.set(i, E / larger(d.theta[i] * square(E), as<typename Team::Entry>(1.0)));
        o.per_E2.set(i, square(per_E));
    });
    raise_nearly_active(problem, d, {P.sparse_smallest, P.sparse_largest, P.sparse_equality});
    set_rho();
    auto factored = factor_kkt<true>(o);
    Refined<V> before = solve_with_nearby_factor(o, d, int(P.derivative_rounds));
    // Between dependent constraints the smallest pivots decide.
    mask_of<V> accurate = (before.accurate | before.settled) & factored.significant;
    if (every(accurate)) {
        return;
    }
    std::swap(d.u, d.first);
    raise_nearly_active(problem, d, {P.afresh_smallest, P.afresh_largest, P.afresh_equality});
    for (int attempt = 0; attempt < int(P.afresh_attempts); attempt++) {
        set_rho();
        factored = factor_kkt<true>(o);
        mask_of<V> usable = accurate | (factored.ok & factored.significant);
        if (every(usable)) {
            break;
        }
        rho = select(usable, rho, P.afresh_growth * rho);
    }
    // Where θ was raised too much for constraints that are nearly dependent, the first solution is the better one.
    auto again = solve_with_nearby_factor(o, d, int(P.afresh_rounds));
    accurate |= no(before.settled) & (before.left < P.sparse_better * again.left);
    Team::each(o.np, [&](auto j) { d.u.x.set(j, select(accurate, d.first.x[j], d.u.x[j])); });
    Team::each(o.rows, [&](auto i) { d.u.v.set(i, select(accurate, d.first.v[i], d.u.v[i])); });
}

} // namespace qpdiff
