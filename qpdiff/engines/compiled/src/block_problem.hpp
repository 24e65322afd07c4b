// One problem of a launch in the memory of a block: its layout, and the operands, read and checked.
#pragma once
#include "launch.hpp"
#include "linalg/block.hpp"
#include "method/convexity.hpp"
#include "method/derivative.hpp"

namespace qpdiff::block {

// Divides shared memory and the workspace of a block into vectors and matrices. Without memory it only counts the
// bytes.
class Arena {
  public:
    Arena(void* shared, Index limit, void* workspace)
        : shared(static_cast<char*>(shared)), workspace(static_cast<char*>(workspace)), limit(limit) {}

    Index shared_used = RESERVED * Index(sizeof(double)), workspace_used = 0;

    // Take vectors of so many entries, in shared memory.
    template <class... V> QP_INLINE void vectors(int count, V&... taken) { (vector(count, taken), ...); }

    // Take a matrix: in shared memory as long as there is enough, else in the workspace.
    template <class T> QP_INLINE void matrix(Matrix<T>& taken, int rows, int columns) {
        taken.ld = Team<T>::leading(columns);
        Index bytes = aligned(rows * Index(taken.ld) * Index(sizeof(T)));
        bool fits = shared_used + bytes <= limit;
        char* base = fits ? shared : workspace;
        Index& used = fits ? shared_used : workspace_used;
        taken.data = base ? reinterpret_cast<T*>(base + used) : nullptr;
        used += bytes;
    }

  private:
    char *shared, *workspace;
    Index limit;

    static QP_INLINE Index aligned(Index bytes) { return (bytes + 15) / 16 * 16; }
    template <class T> QP_INLINE void vector(int count, Vector<T>& taken) {
        taken.place = int(shared_used / Index(sizeof(T)));
        shared_used += aligned(count * Index(sizeof(T)));
    }
};

// Set the sizes of a problem; return the number of its constraints.
template <class Of> QP_INLINE void set_sizes(Problem<Of>& o, const BlockShape& shape) {
    o.n = o.np = shape.n, o.p = shape.p;
    o.linear = o.lp = shape.p + shape.m;
    o.lower = shape.lower, o.upper = shape.upper;
    o.rows = o.lp + (o.lower ? o.n : 0) + (o.upper ? o.n : 0);
}

// Take the matrix of both kinds of linear constraints, unless there is only one kind, which is read where it is.
template <class Of> QP_INLINE void lay_out_K(Problem<Of>& o, Arena& arena) {
    if (o.p > 0 && o.p < o.linear) {
        arena.matrix(o.K, o.linear, o.n);
    }
}

// Lay out a problem that is to be solved in one form. The matrices that every iteration reads come first, so that they
// are in shared memory.
template <class Of> QP_INLINE void lay_out_to_solve(Problem<Of>& o, Form form, Arena& arena) {
    int n = o.n, linear = o.linear, rows = o.rows;
    arena.vectors(n, o.q, o.lb, o.ub, o.exists, o.D, o.balanced_D, o.occupied, o.flat, o.unit_x, o.per_D2, o.diagonal_Q,
                  o.rho, o.dx, o.cx, o.e_x, o.forward, o.columns, o.Kv, o.ray);
    arena.vectors(rows, o.k, o.E, o.balanced_E, o.filled, o.unit_v, o.per_E2, o.weights, o.theta, o.delta, o.per_s,
                  o.per_z, o.right_v, o.complementarity, o.dv, o.ds, o.cv, o.e_v, o.t, o.lengths, o.farkas,
                  o.kind.kinds);
    for (Iterate<Of>* at : {&o.first, &o.second}) {
        arena.vectors(n, at->x, at->r_x, at->Qx);
        arena.vectors(rows, at->v, at->s, at->r_v, at->Kx);
        if constexpr (Of::PRICED) {
            arena.vectors(rows, at->t, at->z, at->r);
        }
    }
    if constexpr (Of::PRICED) {
        arena.vectors(rows, o.v_lower, o.v_upper, o.compliance, o.per_t, o.per_r, o.complementarity_t, o.dt);
    }
    arena.vectors(n > linear ? n : linear, o.added);
    if (form == Form::diagonal_dual) {
        arena.vectors(n, o.diagonal, o.inverse);
    }
    if (form == Form::dense_dual) {
        arena.vectors(n, o.x_anchor, o.r_anchor);
        arena.vectors(linear, o.v_anchor, o.u, o.Sdv);
    }
    int size = form == Form::primal ? n : linear;
    arena.matrix(o.U, size, size);
    if (form == Form::dense_dual) {
        arena.matrix(o.S, linear, linear);
        arena.matrix(o.F, n, n);
    }
    if (form != Form::primal) {
        arena.matrix(o.V, n, linear);
    }
    arena.matrix(o.scaled, linear, n);
    if (form == Form::diagonal_dual) {
        arena.matrix(o.K_transposed, n, linear);
        arena.matrix(o.square_matrix, n, n);
    } else { // it is used before the factor is computed
        o.square_matrix = form == Form::primal ? o.U : o.F;
    }
    lay_out_K(o, arena);
}

// Lay out the KKT system at the solution of a problem.
template <class Of> QP_INLINE void lay_out_to_differentiate(Problem<Of>& o, Derivative<Of>& d, Arena& arena) {
    int n = o.n, linear = o.linear, rows = o.rows;
    arena.vectors(n, o.q, o.lb, o.ub, o.D, o.diagonal_Q, o.diagonal, o.inverse, o.rho, o.forward, o.columns, d.right.x,
                  d.u.x, d.x, d.per_D, d.eliminated.x, d.left.x, d.left_after.x, d.correction.x, d.best.x);
    arena.vectors(rows, o.k, o.E, o.weights, o.theta, o.delta, o.t, o.lengths, o.kind.kinds, d.right.v, d.u.v, d.u.Kx,
                  d.v, d.s, d.theta, d.weights, d.nearly_active, d.per_E, d.eliminated.v, d.left.v, d.left_after.v,
                  d.correction.v, d.correction.Kx, d.of_inactive, d.best.v, d.best.Kx);
    if constexpr (Of::PRICED) {
        arena.vectors(rows, o.v_lower, o.v_upper, o.compliance);
    }
    arena.vectors(n > linear ? n : linear, o.added);
    arena.vectors(linear, d.numbers);
    int size = n > linear ? n : linear; // of the nearly active constraints, or of the primal form
    arena.matrix(o.U, size, size);
    arena.matrix(o.scaled, linear, n);
    lay_out_K(o, arena);
}

// Return how much memory a kernel needs, with a limit on the bytes of shared memory.
template <class Of> BlockSizes sizes_of(bool derivative, const BlockShape& shape, Index limit) {
    auto lay_out = [&](Index limit) {
        Problem<Of> o;
        set_sizes(o, shape);
        Arena arena(nullptr, limit, nullptr);
        if (derivative) {
            Derivative<Of> d;
            lay_out_to_differentiate(o, d, arena);
        } else {
            lay_out_to_solve(o, Form(shape.form), arena);
        }
        return arena;
    };
    Problem<Of> o;
    set_sizes(o, shape);
    StoredSizes<Of> stored(Form(shape.form), o.n, o.linear, o.rows);
    Arena used = lay_out(limit);
    return {lay_out(0).shared_used, used.shared_used, used.workspace_used, stored.constant(), stored.last()};
}
template <class T> BlockSizes sizes(bool derivative, const BlockShape& shape, Index limit) {
    return shape.priced ? sizes_of<Priced<Team<T>>>(derivative, shape, limit)
                        : sizes_of<Team<T>>(derivative, shape, limit);
}

// ---- reading

// Return an operand of problem b, or null where it is not given.
template <class T> QP_INLINE const T* entries_of(const OperandArray& operand, Index b) {
    return operand.data ? static_cast<const T*>(operand.data) + b * operand.stride : nullptr;
}

// Read the vectors of problem b and the kinds of its constraints (as `load_vectors` does on the CPU).
template <class Of> QP_INLINE void load_vectors(Problem<Of>& o, const OperandArrays& operands, Index b) {
    using T = typename Of::Real;
    const T *q = entries_of<T>(operands.q, b), *equal = entries_of<T>(operands.b, b), *h = entries_of<T>(operands.h, b),
            *lb = entries_of<T>(operands.lb, b), *ub = entries_of<T>(operands.ub, b);
    // Entry j of prices of the same constraints sets what it makes of one of these.
    auto set_row = [&](int i, T k, Kind kind, const PriceArrays& price, int j) {
        if constexpr (Of::PRICED) {
            const T *linear = entries_of<T>(price.linear, b), *quadratic = entries_of<T>(price.quadratic, b);
            RowPrice<T> of_row{linear ? linear[j] : T(INFINITY_), quadratic ? quadratic[j] : T(0)};
            Limits<T> limits = of_row.apply(k, kind);
            o.v_lower.set(i, limits.lower);
            o.v_upper.set(i, limits.upper);
            o.compliance.set(i, limits.compliance);
        }
        o.k.set(i, k);
        o.kind.kinds.set(i, kind);
    };
    auto set_limit = [&](int i, T limit, const PriceArrays& price, int j) {
        if (limit >= T(INFINITE)) {
            set_row(i, 0, ABSENT, price, j);
        } else {
            set_row(i, limit > -T(INFINITY_) ? limit : T(NOT_A_NUMBER), INEQUALITY, price, j);
        }
    };
    each(o.linear, [&](int i) {
        if (i < o.p) {
            set_row(i, equal[i], EQUALITY, operands.price_of_A, i);
        } else {
            set_limit(i, h[i - o.p], operands.price_of_G, i - o.p);
        }
    });
    each(o.n, [&](int j) {
        T low = lb ? lb[j] : T(0), high = ub ? ub[j] : T(0);
        o.q.set(j, q[j]);
        o.lb.set(j, low);
        o.ub.set(j, high);
        if (lb && ub && low == high && is_finite(low)) {
            set_row(o.at_lower() + j, -low, EQUALITY, operands.price_of_bounds, j);
            set_row(o.at_upper() + j, 0, ABSENT, operands.price_of_bounds, j);
        } else {
            if (lb) {
                set_limit(o.at_lower() + j, -low, operands.price_of_bounds, j);
            }
            if (ub) {
                set_limit(o.at_upper() + j, high, operands.price_of_bounds, j);
            }
        }
    });
}

// Let Q and K be the matrices of problem b; they are not written to.
template <class Of> QP_INLINE void load_matrices(Problem<Of>& o, const OperandArrays& operands, Index b) {
    using T = typename Of::Real;
    const T *A = entries_of<T>(operands.A, b), *G = entries_of<T>(operands.G, b);
    o.Q = {const_cast<T*>(entries_of<T>(operands.Q, b)), o.n};
    if (o.p > 0 && o.p < o.linear) {
        each_entry(o.linear, o.n, [&](int i, int j) { o.K[i][j] = i < o.p ? A[i * o.n + j] : G[(i - o.p) * o.n + j]; });
    } else {
        o.K = {const_cast<T*>(o.p > 0 ? A : G), o.n};
    }
}

// ---- checks, as on the CPU

// Return whether the vectors of problem b are valid; with `with_shared`, those that are shared are checked, too.
template <class Of>
QP_NOINLINE bool plausible_vectors(const Problem<Of>& o, const OperandArrays& operands, Index b, bool with_shared) {
    using T = typename Of::Real;
    bool valid = true;
    auto checked = [&](const OperandArray& v) { return v.data && (with_shared || v.stride != 0); };
    auto check = [&](const OperandArray& operand, int count, auto holds) {
        const T* v = entries_of<T>(operand, b);
        each(checked(operand) ? count : 0, [&](int j) { valid &= holds(v[j]); });
    };
    check(operands.q, o.n, [](T value) { return is_finite(value); });
    check(operands.b, o.p, [](T value) { return is_finite(value); });
    check(operands.h, o.linear - o.p, [](T value) { return value > -T(INFINITY_); });
    check(operands.lb, o.n, [](T value) { return value < T(INFINITY_); });
    check(operands.ub, o.n, [](T value) { return value > -T(INFINITY_); });
    const PriceArrays& price = operands.price_of_bounds;
    if constexpr (Of::PRICED) {
        auto check_price = [&](const PriceArrays& of, int count) {
            check(of.linear, count, [](T value) { return value >= 0; });
            check(of.quadratic, count, [](T value) { return value >= 0 && is_finite(value); });
        };
        check_price(operands.price_of_A, o.p);
        check_price(operands.price_of_G, o.linear - o.p);
        check_price(price, o.n);
    }
    bool prices_checked = Of::PRICED && (checked(price.linear) || checked(price.quadratic));
    if (o.lower && o.upper && (checked(operands.lb) || checked(operands.ub) || prices_checked)) {
        const T *lb = entries_of<T>(operands.lb, b), *ub = entries_of<T>(operands.ub, b);
        const T *linear = entries_of<T>(price.linear, b), *quadratic = entries_of<T>(price.quadratic, b);
        each(o.n, [&](int j) {
            bool has_price = Of::PRICED && ((linear && linear[j] < T(INFINITE)) || (quadratic && quadratic[j] > 0));
            valid &= lb[j] <= ub[j] || has_price;
        });
    }
    return Of::all(valid);
}

// Return whether the matrices of problem b are finite, and its Q is symmetric.
template <class Of>
QP_NOINLINE bool plausible_matrices(Problem<Of>& o, const OperandArrays& operands, typename Of::Real rounding,
                                    bool with_shared) {
    bool of_Q = with_shared || operands.Q.stride != 0;
    bool of_K = with_shared || operands.A.stride != 0 || operands.G.stride != 0;
    return (!of_Q || plausible_Q(o, rounding)) && (!of_K || Of::all_finite(o.K, o.linear, o.n));
}

} // namespace qpdiff::block
