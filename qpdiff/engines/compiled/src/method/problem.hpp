// One problem, or the problems of the lanes: what it is, what is computed on the way, what is stored of it.
#pragma once
#include "../linalg/lanes.hpp"
#include "../linalg/serial.hpp"

namespace qpdiff {

enum Kind { ABSENT, EQUALITY, INEQUALITY };
// qpdiff.Status, as numbers that lanes can hold.
constexpr double RUNNING = -1, SOLVED = 0, MAX_ITERATIONS = 1, PRIMAL_INFEASIBLE = 2, DUAL_INFEASIBLE = 3, STALLED = 4;

// The reduced KKT systems: in the variables; in the rows of A and G for a dense Q, or for a diagonal one and bounds.
enum class Form { primal, dense_dual, diagonal_dual };

constexpr double INFINITE = 1e20; // a bound this far out is none

// Every number of the method, by the names of engines/parameters.py, which says why each is what it is.
// clang-format off
#define QP_PARAMETERS(X) \
    X(equilibration_passes) X(smallest_curvature) X(largest_ratio) X(row_rounding) X(uncertainty) X(loose) \
    X(smallest_pivot) X(smallest_scaled_curvature) X(diagonal_regularization) X(least_centrality) \
    X(large_multipliers) X(smaller_cost) X(closer) X(less_multipliers) X(warm_centrality) X(step_fraction) \
    X(largest_step_fraction) X(refine_relative) X(refine_absolute) X(delta_share) X(delta_stuck) X(delta_floor) \
    X(fast_rate) X(failure_growth) X(solved_share) X(worthwhile) X(improvement) X(certificate_improvement) \
    X(equal_steps_after) X(least_centering) X(stalled_after) X(reached) X(gap_rounding) X(product_rounding) \
    X(certificate_rounding) X(late_certificate) X(ray_violation) X(nearly_active) X(inactive) X(least_theta) \
    X(derivative_rounds) X(derivative_accuracy) X(refined) X(refined_moved) X(nearly_refined) X(well_refined) \
    X(factor_residual) X(factor_moved) X(afresh_smallest) X(afresh_largest) X(afresh_equality) X(afresh_rho) \
    X(afresh_growth) X(afresh_attempts) X(afresh_rounds)
// clang-format on

struct Parameters {
#define X(name) double name;
    QP_PARAMETERS(X)
#undef X
};

// What a call decides: qpdiff.engines.base.Settings.
struct Settings {
    double tol, rtol;
    bool absolute;
    int max_iterations;
    double rho, delta, smallest, certificate, tiny;
};

template <class Team> struct Iterate {
    typename Team::Vector x, v, s;
    typename Team::Vector r_x; // −(Qx + q + Kᵀv)
    typename Team::Vector r_v; // k − Kx − s
    typename Team::ExactVector Qx, Kx;
};

// How a problem stands at an iterate.
template <class Team> struct Verdict {
    using Exact = typename Team::Exact;
    Exact status, objective;
    Exact found_primal, found_dual, found_gap; // residuals in the caller's units
    Exact primal, dual, gap;                   // residuals in the units of the tolerance
    typename Team::Truth near;                 // within the tolerance
    Exact worst;                               // largest of the three residuals
    Exact best_primal, best_dual, best_gap;    // smallest of each so far
    Exact certificate;                         // how near the iterates have come to one
    Exact waiting;                             // iterations without progress
};

// What a step has come to.
template <class Team> struct Step {
    typename Team::Truth sound;     // whether it could be computed
    typename Team::Truth factor_ok; // whether the matrix could be factored
    typename Team::Number alpha_s, alpha_z;
    typename Team::Number mu; // after it
};

// Numbers that one problem stores of its reduced KKT system for the derivative, by what they are of.
template <class T> struct StoredSizes {
    Index F = 0, V = 0, S = 0, diagonal = 0; // what does not change in an iteration
    Index U = 0, weights = 0;                // what the last iteration leaves

    StoredSizes() = default;
    StoredSizes(Form form, int n, int linear, int rows) {
        auto matrix = [](int height, int columns) { return (Index)whole_tiles(height) * whole_lines<T>(columns); };
        if (form == Form::dense_dual) {
            F = matrix(n, n), V = matrix(n, linear), S = matrix(linear, linear);
        } else {
            int size = form == Form::primal ? n : linear;
            U = matrix(size, size), weights = whole_lines<T>(rows);
            diagonal = form == Form::diagonal_dual ? whole_lines<T>(n) : 0;
        }
    }
    Index constant() const { return F + V + S + diagonal; }
    Index last() const { return U + weights; }
};

// Where one problem stores them; null for what it does not store.
template <class T> struct StoredFactors {
    T* F = nullptr;        // Q = FᵀF
    T* V = nullptr;        // F⁻ᵀKᵀ
    T* S = nullptr;        // K Q⁻¹ Kᵀ
    T* diagonal = nullptr; // of a diagonal Q, with the form's own regularisation
    T* U = nullptr;        // the last factor of the reduced matrix
    T* weights = nullptr;  // 1 / (θ + δ), of which it was made; rows as `Problem` has them

    StoredFactors() = default;
    StoredFactors(const StoredSizes<T>& sizes, T* constant, T* last) {
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

// Rows are in blocks: those of A and G, then of lower and of upper bounds, each padded with rows that are ABSENT.
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
    int np = 0, lp = 0, rows = 0; // padded: variables, rows of A and G, all rows

    QP_INLINE int at_lower() const { return lp; }
    QP_INLINE int at_upper() const { return lp + (lower ? np : 0); }

    // ---- the operands
    MatrixOf Q, K; // K: the rows of A and G
    Vector q, k, lb, ub;
    Vector exists; // 1 for the variables, 0 for their padding
    typename Team::Kinds kind;
    Number inequalities; // how many, at least 1
    bool any_inequality = false;

    // ---- equilibration
    Vector D, E;                   // the scaled problem has variables x/D, slacks E s, multipliers v/E
    Vector balanced_D, balanced_E; // those of the matrices alone
    Vector occupied;               // 1 for the variables that are in Q or in a row, else 0
    Vector flat;                   // 1 for the variables without curvature
    Number any_flat;               // the largest of them
    Vector filled;                 // 1 for the rows of A and G with an entry that is not 0, else 0
    Vector unit_x, unit_v;         // what residuals are multiplied by before they are compared with the tolerance
    Vector metric_x, metric_v;     // 1/D², 1/E²
    Number primal_unit, dual_unit, gap_unit;
    Number reach; // how far x/D is likely to go at most
    Number curvature, least_curvature;

    // ---- the reduced KKT system
    MatrixOf F, V, S, U;
    Vector weights;
    Vector diagonal_Q;      // of a diagonal Q
    Vector diagonal;        // the same with the form's own regularisation
    Vector inverse;         // 1 / (diagonal + what bounds add)
    Vector added;           // what is added to the diagonal of the reduced matrix
    MatrixOf scaled;        // rows of A and G, scaled
    MatrixOf turned;        // Kᵀ
    MatrixOf square_matrix; // n × n, for what is not stored

    // ---- a step
    Vector theta, rho, delta;
    Vector per_s, per_z; // 1/s, 1/z
    Vector right_v;      // right-hand side of the rows
    Vector excess;       // what s ∘ z is to be diminished by
    Vector dx, dv, ds, cx, cv, e_x, e_v;
    Vector t, Vt;                // F⁻ᵀ r_x, and K Q⁻¹ r_x
    Vector columns, lengths;     // scratch of the variables, of the rows
    ExactVector Kv, ray, farkas; // Kᵀv, and directions that may prove that there is no solution
    Iterate<Team> first, second;

    // ---- a step in the dual space: what is known of x, which is not formed
    Vector x_anchor, r_anchor, v_anchor;
    Vector u, Sdv;
};

} // namespace qpdiff
