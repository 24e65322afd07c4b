// Connected components without curvature: the matrices leave the units of each open, which its vectors decide
// (engines/array/components.py, where the reason is explained).
#pragma once
#include "problem.hpp"

namespace qpdiff {

// Call f(i, counts) for all constraints, with a mask of those that the units are computed from: rows that have an
// entry, and bounds of variables that have an entry in Q, A or G.
template <class Team, class F> QP_INLINE void each_constraint(Problem<Team>& o, F f) {
    using N = typename Team::Entry;
    Team::each(o.lp, [&](auto i) { f(i, o.filled[i] > N{}); });
    auto of_bounds = [&](int at) { Team::each(o.np, [&](auto j) { f(j + at, o.occupied[j] > N{}); }); };
    if (o.lower) {
        of_bounds(o.at_lower());
    }
    if (o.upper) {
        of_bounds(o.at_upper());
    }
}

// Return |Ek| where x = 0 does not satisfy a constraint, else 0; `k` is its Ek.
template <class Team, class I, class N> QP_INLINE N unsatisfied_at_0(const Problem<Team>& o, I i, N k) {
    auto both = o.kind.equality(i);
    if constexpr (Team::PRICED) {
        both |= two_sided(o, i);
    }
    return select(both, absolute(k), positive(-k));
}

// Find which variables rows of A and G link: fill the number of the component of each variable, and of each row with an
// entry. Return whether there is more than one.
template <class Team, class V = typename Team::Vector>
QP_INLINE bool find_components(const Problem<Team>& o, V of_variables, V of_rows) {
    return Team::components(o.K, o.linear, o.n, of_variables, of_rows);
}

// Change D, and E of A and G, so that max |Dq| is as large as the right-hand sides in components without curvature:
// as the largest Ek that x = 0 does not satisfy; where it satisfies all, as the least that is not 0. Return whether
// there is more than one component.
template <class Team> QP_NOINLINE bool balance_components(Problem<Team>& o) {
    using N = typename Team::Entry;
    using Real = typename Team::Real;
    // Work vectors of the iteration, which has not begun.
    auto of_variables = o.cx, of_rows = o.cv, values = o.dx, unsatisfied = o.dv, per_length = o.lengths;
    auto curvature = o.e_x, slope = o.rho, needed = o.forward, nearest = o.columns; // of each component, at its number
    if (!find_components(o, of_variables, of_rows)) {
        return false;
    }
    each_constraint(o, [&](auto i, auto counts) {
        N k = select(counts & no(o.kind.absent(i)), o.E[i] * o.k[i], Real(0));
        unsatisfied.set(i, unsatisfied_at_0(o, i, k));
        per_length.set(i, select(k == N{}, Real(0), Real(1) / select(k == N{}, Real(1), absolute(k))));
    });
    Team::largest_of_rows(o.Q, o.n, o.n, o.flat, o.forward, values);
    set_zero<Team>(curvature, o.np), set_zero<Team>(slope, o.np);
    set_zero<Team>(needed, o.np), set_zero<Team>(nearest, o.np);
    auto largest_of_variables = [&](auto a, auto out) { Team::largest_of_each(of_variables, o.n, a, out, o.n); };
    auto largest_of_constraints = [&](auto a, auto out) {
        Team::largest_of_each(of_rows, o.linear, a, out, o.n);
        if (o.lower) {
            largest_of_variables(a + o.at_lower(), out);
        }
        if (o.upper) {
            largest_of_variables(a + o.at_upper(), out);
        }
    };
    largest_of_variables(values, curvature);
    Team::each(o.np, [&](auto j) { values.set(j, select(o.occupied[j] > N{}, absolute(o.D[j] * o.q[j]), Real(0))); });
    largest_of_variables(values, slope);
    largest_of_constraints(unsatisfied, needed);
    largest_of_constraints(per_length, nearest);
    auto times = needed;
    Team::each(o.np, [&](auto c) {
        N most = needed[c], some = nearest[c], cost = slope[c];
        N size = select(most > N{}, most, select(some > N{}, Real(1) / select(some > N{}, some, Real(1)), Real(0)));
        auto open = no(curvature[c] > N{}) & (size > N{}) & (cost > N{});
        times.set(c, select(open, root(select(open, size, Real(1))) / root(select(open, cost, Real(1))), Real(1)));
    });
    Team::take_of_each(of_variables, o.n, times, values);
    Team::each(o.np, [&](auto j) { o.D.set(j, select(o.exists[j] > N{}, o.D[j] * values[j], o.D[j])); });
    Team::each(o.lp, [&](auto i) { unsatisfied.set(i, Real(1)); }); // the padding may count as filled
    Team::take_of_each(of_rows, o.linear, times, unsatisfied);
    Team::each(o.lp, [&](auto i) { o.E.set(i, select(o.filled[i] > N{}, o.E[i] / unsatisfied[i], o.E[i])); });
    return true;
}

} // namespace qpdiff
