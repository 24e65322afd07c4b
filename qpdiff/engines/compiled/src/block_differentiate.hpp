// Differentiating the problems of a launch, each by a block of threads (differentiate.hpp, for the CPU, does the same):
// the KKT system at the solutions, and the gradients of the matrices that each problem has of its own,
// −½ (u_x xᵀ + x u_xᵀ) for Q and −(v u_xᵀ + u_v xᵀ) for A and G.
#pragma once
#include "block_problem.hpp"

namespace qpdiff::block {

// Solves the KKT system for the problems that one block takes; `FORM` is the one they were to be solved in.
template <class T, Form FORM, bool PRICED> class Differentiator {
  public:
    QP_INLINE explicit Differentiator(const DerivativeLaunch& launch) : launch(launch) {
        o.parameters = &launch.parameters;
        set_sizes(o, launch.shape);
        char* workspace = static_cast<char*>(launch.memory.workspace);
        Arena arena(shared_memory, launch.memory.shared_bytes,
                    workspace + first_problem() * launch.memory.workspace_bytes);
        lay_out_to_differentiate(o, d, arena);
        own_U = o.U.data;
    }

    QP_INLINE void run() {
        QP_ROLLED for (Index b = first_problem(); b < launch.count; b += blocks()) {
            differentiate(b);
            QP_BARRIER(); // before the next problem overwrites this one
        }
    }

  private:
    using Algebra = WithPrices<Team<T>, PRICED>;
    const DerivativeLaunch& launch;
    Problem<Algebra> o;
    Derivative<Algebra> d;
    T* own_U;

    QP_INLINE void differentiate(Index b) {
        read(static_cast<const T*>(launch.x) + b * o.n, d.x, o.n);
        read(static_cast<const T*>(launch.v) + b * o.rows, d.v, o.rows);
        if (launch.status[b] == int(SOLVED)) {
            solve_kkt(b);
        } else {
            each(o.n, [&](int j) { d.u.x.set(j, launch.fill); });
            each(o.rows, [&](int i) { d.u.v.set(i, launch.fill); });
        }
        T *u_x = static_cast<T*>(launch.u_x) + b * o.n, *u_v = static_cast<T*>(launch.u_v) + b * o.rows;
        each(o.n, [&](int j) { u_x[j] = d.u.x[j]; });
        each(o.rows, [&](int i) { u_v[i] = d.u.v[i]; });
        write_outer(T(-0.5), d.x, d.u.x, o.n, launch.of_Q, b);
        write_outer(T(-1), d.v, d.u.v, o.p, launch.of_A, b);
        write_outer(T(-1), d.v + o.p, d.u.v + o.p, o.linear - o.p, launch.of_G, b);
    }

    // Copy numbers of problem b to a vector.
    static QP_INLINE void read(const T* from, Vector<T> to, int count) {
        each(count, [&](int i) { to.set(i, from[i]); });
    }

    // Solve the KKT system at the solution of problem b.
    QP_NOINLINE void solve_kkt(Index b) {
        bool usable = launch.stored.factor_ok[b] && launch.stored.form[b] == int(FORM);
        StoredFactors<Algebra> stored = factors_of(b);
        load_vectors(o, launch.operands, b);
        load_matrices(o, launch.operands, b);
        const T* scaling = static_cast<const T*>(launch.stored.scaling) + b * (o.n + o.rows);
        read(scaling, o.D, o.n);
        read(scaling + o.n, o.E, o.rows);
        read(static_cast<const T*>(launch.s) + b * o.rows, d.s, o.rows);
        read(entries_of<T>(launch.r_x, b), d.right.x, o.n);
        read(entries_of<T>(launch.r_v, b), d.right.v, o.rows);
        set_point(o, d);
        if (usable && solve_with_stored(stored)) {
            return;
        }
        set_point(o, d);
        o.U = {own_U, Algebra::leading(o.n)};
        solve_afresh(o, d);
    }

    QP_INLINE StoredFactors<Algebra> factors_of(Index b) const {
        const StoredArrays& arrays = launch.stored;
        StoredSizes<Algebra> sizes(FORM, o.n, o.linear, o.rows);
        return {sizes, arrays.constant ? static_cast<T*>(arrays.constant) + b * arrays.constant_stride : nullptr,
                arrays.last ? static_cast<T*>(arrays.last) + b * sizes.last() : nullptr};
    }

    // Solve with the factors of the last iteration; return whether they are stored and the solution is accurate.
    QP_INLINE bool solve_with_stored(const StoredFactors<Algebra>& stored) {
        if constexpr (FORM == Form::dense_dual) {
            if (!stored.F) {
                return false;
            }
            o.F = {stored.F, Algebra::leading(o.n)};
            o.V = {stored.V, Algebra::leading(o.linear)};
            o.S = {stored.S, Algebra::leading(o.linear)};
            o.U = {own_U, Algebra::leading(o.linear)};
            auto nothing = [](int, int) {};
            return solve_dense_dual(o, d, nothing, nothing);
        } else {
            if (!stored.U || (FORM == Form::diagonal_dual && !stored.diagonal)) {
                return false;
            }
            int size = FORM == Form::primal ? o.n : o.linear;
            o.U = {own_U, Algebra::leading(size)};
            Algebra::copy_matrix({stored.U, o.U.ld}, size, size, o.U);
            read(stored.weights, o.weights, o.rows);
            const Parameters& P = *o.parameters;
            if constexpr (FORM == Form::primal) {
                if (!pivots_are_significant(o)) {
                    return false;
                }
            } else {
                read(stored.diagonal, o.diagonal, o.n);
                Algebra::take_diagonal(o.Q, o.n, o.diagonal_Q);
                invert_diagonal(o);
            }
            Accuracy<T> accuracy = solve_with_inexact_factor<FORM>(o, d, int(P.derivative_rounds));
            return accuracy.left <= T(P.factor_residual) && accuracy.moved <= T(P.factor_moved);
        }
    }

    // Write factor·(a u_xᵀ + b xᵀ), the gradient of a matrix of problem b with so many rows, unless it is not wanted.
    // It is exactly symmetric where a is x and b is u_x.
    QP_INLINE void write_outer(T factor, Vector<T> a, Vector<T> u, int rows, void* gradients, Index b) {
        if (!gradients) {
            return;
        }
        T* out = static_cast<T*>(gradients) + b * rows * o.n;
        each_entry(rows, o.n, [&](int i, int j) {
            out[i * o.n + j] = sum_of_products(factor * a[i], d.u.x[j], factor * u[i], d.x[j]);
        });
    }
};

template <class T, Form FORM, bool PRICED> QP_INLINE void run(const DerivativeLaunch& launch) {
    Differentiator<T, FORM, PRICED>(launch).run();
}

} // namespace qpdiff::block
