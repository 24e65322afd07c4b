// Equilibration: scales of the variables and the constraints, and the sizes that residuals are measured in
// (engines/array/equilibration.py, where the mathematics is explained).
#pragma once
#include "components.hpp"

namespace qpdiff {

// Return 1 / length, or 1 where the length is 0 or not finite.
template <class N> QP_INLINE N reciprocal(N length) {
    auto usable = (length > N{}) & is_finite(length);
    return scalar_of<N>(1) / select(usable, length, as<N>(1));
}

// Return a squared scale after a pass of equilibration, for the squared length of its row or column.
template <class N> QP_INLINE N rescaled(const Parameters& P, N scale, N length2) {
    using Real = scalar_of<N>;
    auto usable = is_finite(length2) & (length2 > N{});
    N value = scale / root(select(usable, length2, as<N>(1)));
    return select(usable, smaller(larger(value, as<N>(Real(1 / P.largest_ratio))), as<N>(Real(P.largest_ratio))),
                  Real(1));
}

// Find `balanced_D` and `balanced_E`, such that the rows of [[DQD, DKᵀE], [EKD, 0]] are of about unit length (Ruiz,
// 2001, in the 2-norm), and the masks and the curvature that depend on the matrices alone.
template <class Team> QP_NOINLINE void balance(Problem<Team>& o) {
    using N = typename Team::Entry;
    using Real = typename Team::Real;
    const Parameters& P = *o.parameters;
    int n = o.n, linear = o.linear;
    auto D2 = o.balanced_D, E2 = o.balanced_E;
    // Each scale begins with the curvature of its variable, or else with the largest entry of its row or column.
    auto first_D = o.dx, first_E = o.dv, curved = o.occupied, columns = o.columns, lengths = o.lengths;
    Team::take_diagonal(o.Q, n, o.diagonal_Q);
    N highest_{}, flat_{};
    Team::each(o.np, [&](auto j) { highest_ = larger(o.diagonal_Q[j], highest_); });
    auto highest = Team::largest(highest_);
    Team::each(o.np, [&](auto j) {
        N entry = o.diagonal_Q[j];
        auto usable = (entry > Real(P.smallest_curvature) * highest) & is_finite(entry);
        N scale = Real(1) / root(select(usable, entry, Real(1)));
        first_D.set(j, scale);
        curved.set(j, select(usable, N{} + Real(1), Real(0)));
        columns.set(j, select(usable, scale, Real(0)));
        D2.set(j, Real(1));
        N flat = select(usable, Real(0), N{} + Real(1));
        o.flat.set(j, flat * o.exists[j]);
        flat_ = larger(flat * o.exists[j], flat_);
    });
    o.any_flat = Team::largest(flat_);
    Team::largest_of_rows(o.K, linear, n, columns, lengths, E2);
    Team::each(o.lp, [&](auto i) {
        N weighted = lengths[i], length = select(weighted > N{}, weighted, E2[i]);
        first_E.set(i, reciprocal(length));
        o.filled.set(i, select((length > N{}) & is_finite(length), N{} + Real(1), Real(0)));
        E2.set(i, Real(1));
    });
    Team::largest_of_columns(o.K, linear, n, first_E, columns);
    Team::each(o.np, [&](auto j) { first_D.set(j, select(curved[j] > N{}, first_D[j], reciprocal(columns[j]))); });

    auto Q2 = o.square_matrix, K2 = o.scaled;
    Team::scaled_squares(o.Q, n, n, first_D, first_D, Q2);
    Team::scaled_squares(o.K, linear, n, first_E, first_D, K2);
    N curvature{}, flattest{};
    for (int pass = 0; pass < int(P.equilibration_passes); pass++) {
        Team::product(Q2, n, n, D2, curved);
        Team::product(K2, linear, n, D2, lengths);
        Team::each(o.np, [&](auto j) { columns.set(j, curved[j]); });
        Team::add_product_transposed(K2, linear, n, E2, columns);
        curvature = N{};
        flattest = as<N>(Real(INFINITY_));
        Team::each(o.np, [&](auto j) {
            N scale = D2[j], length = scale * columns[j], after = rescaled(P, scale, length), row = curved[j] * after;
            columns.set(j, length);
            D2.set(j, after);
            curvature = larger(row, curvature);
            flattest = smaller(select(o.exists[j] > N{}, row, Real(INFINITY_)), flattest);
        });
        Team::each(o.lp, [&](auto i) { E2.set(i, rescaled(P, E2[i], E2[i] * lengths[i])); });
    }
    Team::each(o.np, [&](auto j) {
        D2.set(j, root(D2[j]) * first_D[j]);
        o.occupied.set(j, select(columns[j] > N{}, N{} + Real(1), Real(0)));
    });
    Team::each(o.lp, [&](auto i) { E2.set(i, root(E2[i]) * first_E[i]); });
    o.curvature = root(Team::largest(curvature));
    o.least_curvature = root(Team::smallest(flattest));
}

// Fill E at the bounds: the scale of a bound is that of its variable.
template <class Team> QP_INLINE void scale_bounds(Problem<Team>& o) {
    using Real = typename Team::Real;
    Team::each(o.np, [&](auto j) {
        auto scale = Real(1) / o.D[j];
        if (o.lower) {
            o.E.set(j + o.at_lower(), scale);
        }
        if (o.upper) {
            o.E.set(j + o.at_upper(), scale);
        }
    });
}

// Return how large the bounds say that a variable is: their distance, or that of one from 0.
template <class Team, class J> QP_INLINE typename Team::Entry size_of_bounds(const Problem<Team>& o, J j) {
    using N = typename Team::Entry;
    using Real = typename Team::Real;
    auto far = as<N>(Real(INFINITE));
    N lower = o.lower ? absolute(N(o.lb[j])) : N{}, upper = o.upper ? absolute(N(o.ub[j])) : N{};
    N size = larger(select(lower < far, lower, Real(0)), select(upper < far, upper, Real(0)));
    if (!o.lower || !o.upper) {
        return size;
    }
    N span = absolute(o.ub[j] - o.lb[j]);
    return select((span > N{}) & (span < far), span, size);
}

// Find the units of residuals and how far x is likely to go at most, for D and E; return the largest |Dq|.
template <class Team> QP_NOINLINE typename Team::Number measure_residual_units(Problem<Team>& o) {
    using N = typename Team::Entry;
    using S = typename Team::Number;
    using Real = typename Team::Real;
    const Parameters& P = *o.parameters;
    S zero{}, one = as<S>(Real(1)), infinite = as<S>(Real(INFINITY_));
    N needed_{}, nearest_{}, slope_{}, curved_slope_{};
    each_constraint(o, [&](auto i, auto counts) {
        N k = select(counts & no(o.kind.absent(i)), o.E[i] * o.k[i], Real(0)), length = absolute(k);
        N unsatisfied = unsatisfied_at_0(o, i, k);
        if constexpr (Team::PRICED) {
            auto moves = limited(o, i) & (as<N>(o.curvature) > N{}); // x, up to where the curvature outweighs the price
            N moved = o.v_upper[i] / (o.E[i] * select(moves, as<N>(o.curvature), Real(1)));
            unsatisfied = select(moves, smaller(unsatisfied, moved), unsatisfied);
        }
        needed_ = larger(unsatisfied, needed_);
        nearest_ = larger(select(length == N{}, Real(0), Real(1) / select(length == N{}, Real(1), length)), nearest_);
    });
    Team::each(o.np, [&](auto j) {
        N cost = select(o.occupied[j] > N{}, absolute(o.D[j] * o.q[j]), Real(0));
        slope_ = larger(cost, slope_);
        curved_slope_ = larger(select(o.flat[j] > N{}, Real(0), cost), curved_slope_);
    });
    S needed, nearest, slope, curved_slope;
    Team::reduce(Largest{needed_, needed}, Largest{nearest_, nearest}, Largest{slope_, slope},
                 Largest{curved_slope_, curved_slope});
    auto where_positive = [&](S a, S value, S other) {
        return select(a > zero, value / select(a > zero, a, one), other);
    };

    S free = where_positive(o.curvature, slope, zero);
    // The cost of variables without curvature says nothing of where that of the others is least.
    S of_curved = where_positive(o.curvature, curved_slope, zero);
    S least = smaller(where_positive(nearest, one, infinite), select(of_curved > zero, of_curved, infinite));
    S primal = select(needed > zero, needed, least);
    primal = select(primal < infinite, primal, select(free > zero, Real(P.least_reach) * free, one));
    S curved = o.curvature * primal;
    S between = root(slope) * root(select(curved > zero, curved, slope));
    // Curvature along some variables says nothing of the others, which may have a linear cost alone.
    S all_curved = select(slope > zero, larger(o.least_curvature * primal, slope), curved);
    S dual = select(curved < slope, between, all_curved);
    dual = select(dual > zero, dual, primal);
    S far = where_positive(o.least_curvature, slope, infinite);
    S reach = larger(needed, smaller(far, Real(P.uncertainty) * free));
    o.primal_unit = primal, o.dual_unit = dual, o.gap_unit = primal * dual;
    o.reach = select(reach > zero, reach, infinite);
    return slope;
}

// Enlarge the scales of variables without curvature where others have some, so that their linear cost is not small
// against curvature times the size of x; return whether that changed any.
template <class Team> QP_NOINLINE bool enlarge_flat(Problem<Team>& o) {
    using N = typename Team::Entry;
    using S = typename Team::Number;
    using Real = typename Team::Real;
    N slope_{};
    Team::each(o.np, [&](auto j) { slope_ = larger(o.flat[j] * o.occupied[j] * absolute(o.D[j] * o.q[j]), slope_); });
    S slope = Team::largest(slope_), curved = o.curvature * o.primal_unit;
    typename Team::Truth small = (slope > S{}) & (curved > slope);
    if (!some(small)) {
        return false;
    }
    S times = select(small, root(curved / slope), as<S>(Real(1)));
    Team::largest_of_rows(o.K, o.linear, o.n, o.flat, o.lengths, o.dv);
    Team::each(o.np, [&](auto j) { o.D.set(j, select(o.flat[j] > N{}, times * o.D[j], o.D[j])); });
    Team::each(o.lp, [&](auto i) { o.E.set(i, select(o.lengths[i] > N{}, o.E[i] / times, o.E[i])); });
    scale_bounds(o);
    return true;
}

// Fill D and E after `balance`, and the units of residuals; return the largest |Dq|. `FLAT`: whether the scales of
// variables without curvature may be enlarged.
template <class Team, bool FLAT = !Team::lanes> QP_NOINLINE typename Team::Number equilibrate(Problem<Team>& o) {
    using N = typename Team::Entry;
    using Real = typename Team::Real;
    Team::each(o.np, [&](auto j) { o.D.set(j, o.balanced_D[j]); });
    Team::each(o.lp, [&](auto i) { o.E.set(i, o.balanced_E[i]); });
    scale_bounds(o);
    bool any_flat = FLAT && some(o.any_flat > typename Team::Number{});
    if constexpr (FLAT) {
        if (any_flat && balance_components(o)) {
            scale_bounds(o);
        }
    }
    auto slope = measure_residual_units(o);
    if constexpr (FLAT) {
        if (any_flat && enlarge_flat(o)) {
            slope = measure_residual_units(o);
        }
    }
    o.cost = as<typename Team::Number>(Real(1));
    auto primal = o.primal_unit;
    if (o.lower || o.upper) {
        // A variable in no row and not in Q takes the scale of its bounds, or that of others where these are 0 or
        // infinite, and says nothing of them.
        auto is_known = [&](auto j) { return (o.occupied[j] > N{}) | (size_of_bounds(o, j) > N{}); };
        N largest_{}, whole_{};
        Team::each(o.np, [&](auto j) {
            o.D.set(j, select(o.occupied[j] > N{}, o.D[j], size_of_bounds(o, j) / primal));
            largest_ = larger(select(is_known(j), N(o.D[j]), Real(0)), largest_);
        });
        typename Team::Number zero{}, largest = Team::largest(largest_);
        auto other = select(largest > zero, largest, Real(1));
        Team::each(o.np, [&](auto j) {
            N D = select(is_known(j), N(o.D[j]), as<N>(other));
            o.D.set(j, D);
            whole_ = larger(absolute(D * o.q[j]), whole_);
        });
        scale_bounds(o);
        // Where no other has a cost, these decide how large it is.
        auto whole = Team::largest(whole_);
        auto decides = no(o.curvature > zero) & no(slope > zero) & (whole > zero);
        o.dual_unit = select(decides, whole, o.dual_unit);
        o.gap_unit = primal * o.dual_unit;
        slope = select(decides, whole, slope);
    }
    auto dual = o.dual_unit;
    bool absolute_ = o.settings->absolute;
    Team::each(o.np, [&](auto j) { o.unit_x.set(j, absolute_ ? as<N>(Real(1)) : o.D[j] / dual); });
    Team::each(o.rows, [&](auto i) { o.unit_v.set(i, absolute_ ? as<N>(Real(1)) : o.E[i] / primal); });
    return slope;
}

// Scale the problem as if its cost were c times as large; what residuals are compared with does not change.
template <class Team> QP_NOINLINE void scale_cost(Problem<Team>& o, typename Team::Number c) {
    auto factor = root(c);
    Team::each(o.np, [&](auto j) { o.D.set(j, o.D[j] * factor); });
    Team::each(o.rows, [&](auto i) { o.E.set(i, o.E[i] / factor); });
    o.primal_unit = o.primal_unit / factor;
    o.dual_unit = o.dual_unit * factor;
    o.reach = o.reach / factor;
    o.cost = o.cost * c;
}

// Without curvature, scale the cost to the size of the right-hand sides: their geometric mean, which no single one
// decides. `slope` is the largest |Dq|.
template <class Team, class S = typename Team::Number> QP_NOINLINE void balance_cost(Problem<Team>& o, S slope) {
    using N = typename Team::Entry;
    using Real = typename Team::Real;
    typename Team::Truth linear = no(o.curvature > S{}) & (slope > S{});
    if (!some(linear)) {
        return;
    }
    auto sizes = o.lengths;
    N count{};
    each_constraint(o, [&](auto i, auto counts) {
        N k = absolute(o.E[i] * o.k[i]);
        auto nonzero = counts & no(o.kind.absent(i)) & (k > N{});
        sizes.set(i, select(nonzero, k, Real(1)));
        count += select(nonzero, N{} + Real(1), Real(0));
    });
    S mean = exponential(Team::sum_of_logarithms(sizes, o.rows) / larger(Team::sum(count), as<S>(Real(1))));
    scale_cost(o, select(linear, mean / slope, as<S>(Real(1))));
}

} // namespace qpdiff
