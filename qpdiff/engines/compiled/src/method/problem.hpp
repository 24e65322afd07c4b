// One problem, or the problems of a lane group: operands, work vectors, and the factors that are stored for the
// derivative.
#pragma once
#include "../linalg/numbers.hpp"

namespace qpdiff {

// The values of qpdiff.Status, as numbers that lanes can hold.
constexpr double RUNNING = -1, SOLVED = 0, MAX_ITERATIONS = 1, PRIMAL_INFEASIBLE = 2, DUAL_INFEASIBLE = 3, STALLED = 4;

// The reduced KKT systems (reduced_forms.hpp), by the numbers of qpdiff.engines.reduction.Form, and that of sparse
// matrices (sparse_kkt.hpp).
enum class Form { primal, dense_dual, diagonal_dual, sparse_kkt };

constexpr double INFINITE = 1e20; // bounds from this magnitude on count as infinite

// Every number of the method, by the names of engines/parameters.py, which gives the reasons.
// clang-format off
#define QP_PARAMETERS(X) \
    X(rho) X(delta) X(smallest) X(certificate) X(tiny) X(equilibration_passes) X(smallest_curvature) X(largest_ratio) X(row_rounding) X(uncertainty) \
    X(least_reach) X(loose) X(smallest_pivot) X(smallest_scaled_curvature) X(diagonal_regularization) \
    X(least_sparse_pivot) X(sparse_pivot) X(sparse_pivot_growth) X(sparse_pivot_errors) \
    X(sparse_smallest) X(sparse_largest) X(sparse_equality) X(sparse_settled) X(sparse_better) X(least_centrality) \
    X(large_multipliers) X(smaller_cost) X(closer) X(less_multipliers) X(warm_centrality) X(step_fraction) \
    X(largest_step_fraction) X(near_limit) X(least_distance) X(refine_relative) X(refine_absolute) \
    X(delta_share) X(delta_stuck) X(delta_floor) X(fast_rate) X(failure_growth) X(solved_share) \
    X(worthwhile) X(improvement) X(certificate_improvement) \
    X(equal_steps_after) X(least_centering) X(stalled_after) X(reached) X(gap_rounding) X(product_rounding) \
    X(certificate_rounding) X(late_certificate) X(ray_violation) X(nearly_active) X(inactive) X(least_theta) \
    X(derivative_rounds) X(derivative_accuracy) X(refined) X(refined_moved) X(nearly_refined) X(well_refined) \
    X(factor_residual) X(factor_moved) X(afresh_smallest) X(afresh_largest) X(afresh_equality) X(afresh_rho) \
    X(afresh_growth) X(afresh_attempts) X(afresh_levels) X(afresh_better) X(afresh_rounds)
// clang-format on

struct Parameters {
#define X(name) double name;
    QP_PARAMETERS(X)
#undef X
};

// The settings of a call: qpdiff.engines.base.Settings.
struct Settings {
    double tol, rtol;
    bool absolute;
    int max_iterations;
};

// A team whose problems have prices of violations (engines/array/state.py: `ElasticState`), which are code of its own:
// problems without them do without.
template <class Team> struct Priced : Team {
    static constexpr bool PRICED = true;
};
template <class Team, bool PRICED> using WithPrices = std::conditional_t<PRICED, Priced<Team>, Team>;

// A point of the iteration, with its products and residuals.
template <class Team> struct Iterate {
    typename Team::Vector x, v, s;
    typename Team::Vector r_x; // −(Qx + q + Kᵀv)
    typename Team::Vector r_v; // k − Kx − s, with prices k − Kx − s + t + σv
    typename Team::ExactVector Qx, Kx;
    // With prices: the violation beyond that of the quadratic one, 0 in rows without a linear price; the distances of
    // the multiplier from its lower limit, and from its upper one.
    typename Team::Vector t, z, r;
};

// The count of numbers in each array of `StoredFactors`, with a team's padding.
template <class Team> struct StoredSizes {
    Index F = 0, V = 0, S = 0, diagonal = 0; // constant during the iteration
    Index U = 0, weights = 0;                // of the last iteration

    StoredSizes() = default;
    StoredSizes(Form form, int n, int linear, int rows) {
        auto matrix = [](int height, int columns) { return (Index)Team::whole_rows(height) * Team::leading(columns); };
        if (form == Form::dense_dual) {
            F = matrix(n, n), V = matrix(n, linear), S = matrix(linear, linear);
        } else {
            int size = form == Form::primal ? n : linear;
            U = matrix(size, size), weights = Team::padded(rows);
            diagonal = form == Form::diagonal_dual ? Team::padded(n) : 0;
        }
    }
    Index constant() const { return F + V + S + diagonal; }
    Index last() const { return U + weights; }
};

// The factors of a reduced KKT system that one problem stores for the derivative; null where it does not.
template <class Team> struct StoredFactors {
    using T = typename Team::Real;
    T* F = nullptr;        // Q = FᵀF
    T* V = nullptr;        // F⁻ᵀKᵀ
    T* S = nullptr;        // K Q⁻¹ Kᵀ
    T* diagonal = nullptr; // of a diagonal Q, with the form's own regularisation
    T* U = nullptr;        // the last factor of the reduced matrix
    T* weights = nullptr;  // 1 / (θ + δ) in that matrix; constraints in the order and padding of `Problem`

    StoredFactors() = default;
    StoredFactors(const StoredSizes<Team>& sizes, T* constant, T* last) {
        auto take = [](T*& from, Index size) {
            T* taken = from && size ? from : nullptr;
            from += from ? size : 0;
            return taken;
        };
        F = take(constant, sizes.F), V = take(constant, sizes.V), S = take(constant, sizes.S);
        diagonal = take(constant, sizes.diagonal);
        U = take(last, sizes.U), weights = take(last, sizes.weights);
    }
};

// A problem with its work vectors. Constraints ("rows") are in blocks: those of A and G, then lower and upper bounds,
// each block padded with constraints of kind ABSENT.
template <class Team_> struct Problem {
    using Team = Team_;
    using Real = typename Team::Real;
    using Number = typename Team::Number;
    using Exact = typename Team::Exact;
    using Truth = typename Team::Truth;
    using Vector = typename Team::Vector;
    using ExactVector = typename Team::ExactVector;
    using MatrixOf = typename Team::Matrix;

    const Parameters* parameters = nullptr;
    const Settings* settings = nullptr;

    // ---- sizes
    int n = 0, p = 0, linear = 0; // variables, rows of A, rows of A and G
    bool lower = false, upper = false;
    int np = 0, lp = 0, rows = 0; // padded: variables, rows of A and G, all constraints

    QP_INLINE int at_lower() const { return lp; }
    QP_INLINE int at_upper() const { return lp + (lower ? np : 0); }

    // ---- the operands
    MatrixOf Q, K; // K: the rows of A and G
    Vector q, k, lb, ub;
    Vector exists; // 1 for the variables, 0 for their padding
    typename Team::Kinds kind;
    Number inequalities; // their number, at least 1; with prices, that of those which are no equality with a price
    Number pairs;        // the number of pairs whose product is μ on the central path, at least 1
    bool any_inequality = false;

    // ---- prices of violations (`Team::PRICED`)
    Vector v_lower, v_upper; // limits of the multipliers by a linear price w: ±w at equalities, 0 and w at
                             // inequalities; 0 and infinity without one
    Vector compliance;       // σ of the quadratic price, 0 where there is none

    // ---- equilibration
    Vector D, E;                   // the scaled problem has variables x/D, slacks E s, multipliers v/E
    Vector balanced_D, balanced_E; // D and E as computed from the matrices alone
    Vector occupied;               // 1 for variables with an entry in Q, A or G, else 0
    Vector flat;                   // 1 for variables without curvature, else 0
    Number any_flat;               // the largest entry of `flat`
    Vector filled;                 // 1 for rows of A and G with an entry that is not 0, else 0
    Vector unit_x, unit_v;         // factors on residuals before they are compared with the tolerance
    Vector per_D2, per_E2;         // 1/D², 1/E²
    Number primal_unit, dual_unit, gap_unit;
    Number reach;                      // upper estimate of |x/D|
    Number cost;                       // how many times as large the cost counts (`scale_cost`)
    Number curvature, least_curvature; // the largest and the smallest length of a row of DQD

    // ---- the reduced KKT system
    MatrixOf F, V, S, U;    // as in `StoredFactors`
    Vector weights;         // 1 / (θ + δ)
    Vector diagonal_Q;      // the diagonal of Q
    Vector diagonal;        // the same with the diagonal dual form's own regularisation
    Vector inverse;         // 1 / (diagonal + the weights of the bounds)
    Vector added;           // added to the diagonal of the reduced matrix
    MatrixOf scaled;        // K, scaled
    MatrixOf K_transposed;  // Kᵀ
    MatrixOf square_matrix; // n × n workspace

    // ---- a step
    Vector theta, rho, delta;
    Vector per_s, per_z;                        // 1/s, 1/z
    Vector right_v;                             // right-hand side of the constraints
    Vector complementarity;                     // right-hand side of the complementarity: the amount to take off s ∘ z
    Vector dx, dv, ds;                          // the direction
    Vector per_t, per_r, complementarity_t, dt; // the same for t ∘ r, with prices
    Vector cx, cv, e_x, e_v;                    // a correction of it, and the residual that it leaves
    Vector forward;          // F⁻ᵀ r_x; in the diagonal dual form, the eliminated right-hand side over the diagonal
    Vector t;                // K Q⁻¹ r_x
    Vector columns, lengths; // workspace of the variables, of the constraints
    ExactVector Kv;          // Kᵀv
    ExactVector ray, farkas; // directions that may prove that there is no solution
    Iterate<Team> first, second;

    // ---- steps in the dual space (`dual_space::ImplicitX`)
    Vector x_anchor, r_anchor, v_anchor;
    Vector u, Sdv;
};

// ---- rows with prices of violations

// What a price makes of a constraint: limits of its multiplier, and σ.
template <class T> struct Limits {
    T lower, upper, compliance;
};

// The price of violating a constraint: w ≥ 0, infinite where it has none, and σ ≥ 0.
template <class T> struct RowPrice {
    T linear, quadratic;

    // Set the right-hand side and the kind of the constraint at this price. What costs nothing is no constraint; of
    // numbers that were not checked, NaN and those below 0 make a row that no point satisfies.
    QP_INLINE Limits<T> apply(T& k, Kind& kind) const {
        kind = linear == 0 ? ABSENT : kind;
        if (kind == ABSENT) {
            k = 0;
            return {0, T(INFINITY_), 0};
        }
        k = linear >= 0 && quadratic >= 0 ? k : T(NOT_A_NUMBER);
        if (!(linear < T(INFINITE))) {
            return {0, T(INFINITY_), quadratic};
        }
        bool both = kind == EQUALITY;
        kind = INEQUALITY;
        return {both ? -linear : T(0), linear, quadratic};
    }
};

// Return whether a violation has a linear price; such an equality is an inequality from both sides.
template <class Team, class I> QP_INLINE auto limited(const Problem<Team>& o, I i) {
    return is_finite(o.v_upper[i]);
}
template <class Team, class I> QP_INLINE auto two_sided(const Problem<Team>& o, I i) {
    auto lower = o.v_lower[i];
    return lower < decltype(lower){};
}

// Return the distances of the multipliers from their lower limits: without prices, the multipliers of inequalities.
template <class Team> QP_INLINE typename Team::Vector distance(const Iterate<Team>& at) {
    if constexpr (Team::PRICED) {
        return at.z;
    } else {
        return at.v;
    }
}

// Return the slack less the violation that is paid for.
template <class Team, class I> QP_INLINE auto net_slack(const Problem<Team>& o, const Iterate<Team>& at, I i) {
    if constexpr (Team::PRICED) {
        return at.s[i] - (at.t[i] + o.compliance[i] * at.v[i]);
    } else {
        return at.s[i];
    }
}

// ---- products

// Compute out = Qx; in the diagonal dual form, with the diagonal of Q alone.
template <Form FORM, class Team, class X, class O> QP_INLINE void hessian(const Problem<Team>& o, X x, O out) {
    if constexpr (FORM == Form::diagonal_dual) {
        Team::each_of(out, o.np, [&](auto j) { out.set(j, o.diagonal_Q[j] * x[j]); });
    } else {
        Team::product(o.Q, o.n, o.n, x, out);
    }
}

// Compute out = Kx, for all constraints.
template <class Team, class X, class O> QP_INLINE void constraints(const Problem<Team>& o, X x, O out) {
    Team::product(o.K, o.linear, o.n, x, out);
    if (o.lower) {
        Team::each_of(out, o.np, [&](auto j) { out.set(j + o.at_lower(), -x[j]); });
    }
    if (o.upper) {
        Team::each_of(out, o.np, [&](auto j) { out.set(j + o.at_upper(), x[j]); });
    }
}

// Compute out = Kᵀv, for multipliers of all constraints.
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

// ---- operations on vectors

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

} // namespace qpdiff
