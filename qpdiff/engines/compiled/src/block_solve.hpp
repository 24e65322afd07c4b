// Solving the problems of a launch, each by a block of threads (solve.hpp, for the CPU, does the same).
#pragma once
#include "block_problem.hpp"
#include "method/loop.hpp"

namespace qpdiff::block {

// Solves the problems that one block takes, in one form.
template <class T, Form FORM, bool PRICED> class Solver {
  public:
    QP_INLINE explicit Solver(const SolveLaunch& launch) : launch(launch) {
        o.parameters = &launch.parameters;
        o.settings = &launch.settings;
        set_sizes(o, launch.shape);
        char* workspace = static_cast<char*>(launch.memory.workspace);
        Arena arena(shared_memory, launch.memory.shared_bytes,
                    workspace + first_problem() * launch.memory.workspace_bytes);
        lay_out_to_solve(o, FORM, arena);
    }

    QP_INLINE void run() {
        QP_ROLLED for (Index b = first_problem(); b < launch.count; b += blocks()) {
            if (preferred() || launch.stored.form[b] == int(Form::primal)) {
                solve(b);
                QP_BARRIER(); // before the next problem overwrites this one
            }
        }
    }

  private:
    using Of = WithPrices<Team<T>, PRICED>;
    const SolveLaunch& launch;
    Problem<Of> o;

    // Return whether this is the first launch; a second one solves what it has left.
    QP_INLINE bool preferred() const { return launch.shape.form == int(FORM); }

    QP_INLINE void solve(Index b) {
        load_vectors(o, launch.operands, b);
        load_matrices(o, launch.operands, b);
        each(o.n, [&](int j) { o.exists.set(j, T(1)); });
        if (launch.check && !check(b)) {
            return;
        }
        if constexpr (FORM == Form::diagonal_dual) { // chosen by the shapes alone
            bool diagonal = true;
            each_entry(o.n, o.n, [&](int i, int j) { diagonal &= i == j || o.Q[i][j] == T(0); });
            if (!Of::all(diagonal)) {
                leave(b, Form::primal);
                return;
            }
            Of::transpose(o.K, o.linear, o.n, o.K_transposed);
        }
        balance(o);
        if (!prepare<FORM>(o)) {
            leave(b, Form::primal);
            return;
        }
        balance_cost(o, equilibrate(o));
        count_inequalities(o);
        auto load_warm_start = [&](Iterate<Of>& at) {
            if (!launch.start_x || !launch.start_usable[b]) {
                return false;
            }
            read(launch.start_x, b, at.x, o.n);
            read(launch.start_v, b, at.v, o.rows);
            return true;
        };
        finish(b, iterate<FORM>(o, load_warm_start, [] { return false; }));
    }

    // Check the operands of problem b, as far as that has not been done for another problem or in the first launch;
    // return whether they are valid.
    QP_NOINLINE bool check(Index b) {
        T rounding = T(launch.rounding);
        bool valid = true, with_shared = b == 0;
        if (preferred()) {
            valid = plausible_vectors(o, launch.operands, b, with_shared) &&
                    plausible_matrices(o, launch.operands, rounding, with_shared);
        }
        // The other forms exist only for a Q that is positive definite.
        if (FORM == Form::primal && valid && (with_shared || launch.operands.Q.stride != 0)) {
            valid = convex(o, rounding);
        }
        if (thread() == 0 && (preferred() || !valid)) {
            launch.refused[b] = !valid;
        }
        if (!valid) {
            leave(b, Form(launch.shape.form));
        }
        return valid;
    }

    // Leave problem b unsolved: to a launch of another form, or for good.
    QP_INLINE void leave(Index b, Form form) {
        if (thread() == 0) {
            launch.stored.form[b] = int(form);
            launch.stored.factor_ok[b] = 0;
        }
        QP_BARRIER();
    }

    // Copy the vector of problem b from an array, or to one.
    QP_INLINE void read(const void* array, Index b, Vector<T> to, int count) {
        const T* from = static_cast<const T*>(array) + b * count;
        each(count, [&](int i) { to.set(i, from[i]); });
    }
    QP_INLINE void write(Vector<T> from, void* array, Index b, int count) {
        T* to = static_cast<T*>(array) + b * count;
        each(count, [&](int i) { to[i] = from[i]; });
    }

    // Write the outcome of problem b, its scaling and its factors.
    QP_NOINLINE void finish(Index b, const Ended<Of>& ended) {
        write(ended.at->x, launch.x, b, o.n);
        write(ended.at->v, launch.v, b, o.rows);
        write(ended.at->s, launch.s, b, o.rows);
        T* scaling = static_cast<T*>(launch.stored.scaling) + b * (o.n + o.rows);
        each(o.n, [&](int j) { scaling[j] = o.D[j]; });
        each(o.rows, [&](int i) { scaling[o.n + i] = o.E[i]; });
        if (thread() == 0) {
            const State<Of>& state = ended.state;
            launch.status[b] = int(state.status);
            launch.iterations[b] = ended.iterations;
            launch.objective[b] = state.objective;
            launch.primal[b] = state.absolute.primal;
            launch.dual[b] = state.absolute.dual;
            launch.gap[b] = state.absolute.gap;
            launch.stored.form[b] = int(FORM);
            launch.stored.factor_ok[b] = ended.factor_ok && preferred();
        }
        if (preferred()) {
            store(b);
        }
    }

    // Store the factors of problem b, where they are wanted.
    QP_INLINE void store(Index b) {
        using Algebra = Team<T>;
        const StoredArrays& arrays = launch.stored;
        StoredSizes<Of> sizes(FORM, o.n, o.linear, o.rows);
        bool own = arrays.constant && (arrays.constant_stride != 0 || b == 0);
        StoredFactors<Of> stored(sizes, own ? static_cast<T*>(arrays.constant) + b * arrays.constant_stride : nullptr,
                                 arrays.last ? static_cast<T*>(arrays.last) + b * sizes.last() : nullptr);
        if (stored.F) {
            Algebra::copy_matrix(o.F, o.n, o.n, {stored.F, o.F.ld});
            Algebra::copy_matrix(o.V, o.n, o.linear, {stored.V, o.V.ld});
            Algebra::copy_matrix(o.S, o.linear, o.linear, {stored.S, o.S.ld});
        }
        if (stored.diagonal) {
            each(o.n, [&](int j) { stored.diagonal[j] = o.diagonal[j]; });
        }
        if (stored.U) {
            int size = FORM == Form::primal ? o.n : o.linear;
            Algebra::copy_matrix(o.U, size, size, {stored.U, o.U.ld});
        }
        if (stored.weights) {
            each(o.rows, [&](int i) { stored.weights[i] = o.weights[i]; });
        }
    }
};

template <class T, Form FORM, bool PRICED> QP_INLINE void run(const SolveLaunch& launch) {
    Solver<T, FORM, PRICED>(launch).run();
}

} // namespace qpdiff::block
