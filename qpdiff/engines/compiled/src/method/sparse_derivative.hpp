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

// Factor the KKT matrix with θ raised to certain limits, and with as large a ρ as significant pivots take; those of
// problems that are `done` do not matter.
template <class V, bool PRICED>
QP_NOINLINE sparse::Factored<V> factor_raised(SparseProblem<V, PRICED>& o, const SparseDerivative<V, PRICED>& d,
                                              const RaisedTheta& to, mask_of<V> done, int attempts) {
    using Team = sparse::Team<V, PRICED>;
    const Parameters& P = *o.parameters;
    Problem<Team>& problem = o;
    raise_nearly_active(problem, d, to);
    V rho = as<V>(P.afresh_rho);
    sparse::Factored<V> factored;
    for (int attempt = 0; attempt < attempts; attempt++) {
        Team::each(o.np, [&](auto j) { o.rho.set(j, rho * o.per_D2[j]); });
        factored = factor_kkt<true>(o);
        mask_of<V> usable = done | (factored.ok & factored.significant);
        if (every(usable)) {
            break;
        }
        rho = select(usable, rho, P.afresh_growth * rho);
    }
    return factored;
}

// Solve the KKT system at the solution that `set_point` has been called for.
template <class V, bool PRICED>
QP_NOINLINE void solve_kkt(SparseProblem<V, PRICED>& o, SparseDerivative<V, PRICED>& d) {
    using Team = sparse::Team<V, PRICED>;
    using Mask = mask_of<V>;
    const Parameters& P = *o.parameters;
    Problem<Team>& problem = o;
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
    Mask none = no(truth<Mask>(true));
    auto factored = factor_raised(o, d, {P.sparse_smallest, P.sparse_largest, P.sparse_equality}, none, 1);
    Refined<V> first = solve_with_nearby_factor(o, d, int(P.derivative_rounds));
    // Between dependent constraints the smallest pivots decide.
    Mask usable = first.accurate | first.settled, done = usable & factored.significant;
    V left = first.left;
    double equality = P.afresh_equality;
    for (int level = 0; level < afresh_levels(problem) && !every(done); level++) {
        std::swap(d.u, d.best);
        factor_raised(o, d, {P.afresh_smallest, P.afresh_largest, equality}, done, int(P.afresh_attempts));
        Refined<V> now = solve_with_nearby_factor(o, d, int(P.afresh_rounds));
        Mask accurate = now.accurate | now.settled, keeps = no(now.left < P.afresh_better * left);
        if (level == 0) {
            // Where θ was raised too much for constraints that are nearly dependent, or ρ for a small curvature, the
            // first solution is the better one.
            keeps = (no(first.settled) & (first.left < P.sparse_better * now.left)) | (usable & no(accurate));
        }
        keeps |= done;
        Team::each(o.np, [&](auto j) { d.u.x.set(j, select(keeps, d.best.x[j], d.u.x[j])); });
        Team::each(o.rows, [&](auto i) { d.u.v.set(i, select(keeps, d.best.v[i], d.u.v[i])); });
        left = select(keeps, left, now.left);
        done |= accurate | (left <= as<V>(P.factor_residual));
        equality *= P.afresh_growth;
    }
}

} // namespace qpdiff
