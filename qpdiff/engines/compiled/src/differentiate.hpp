// Differentiating a batch: the KKT system at the solutions, problem by problem, and the gradients of the operands, of
// the matrices −½ (u_x xᵀ + x u_xᵀ) for Q and −(v u_xᵀ + u_v xᵀ) for A and G, summed over the batch where one is
// shared.
#pragma once
#include "gradients.hpp"
#include "method/derivative.hpp"
#include "solve.hpp"

namespace qpdiff {

template <class T> struct DerivativeBatch {
    Operands operands;
    Shape shape;
    const Parameters* parameters;
    StoredBatch<T> stored;
    Operand x, v, s, r_x, r_v; // the solutions and the right-hand sides
    Rows<const int> status;
    Rows<T> u_x, u_v;
    T fill;                 // the solution for problems that are not SOLVED
    bool fixed;             // whether lb = ub may fix a variable
    Gradients<T> own, sums; // of each problem's own operands, and of shared ones; of a shared Q, the gradient is the
                            // sum and its transpose

    int m() const { return operands.m; }
    T multiplier(Index b, int row) const { return entry<T>(v.at(b), v.column, row); }
};

// Prefetch contiguous numbers into the L2 cache. The arithmetic on one problem is bound by the latency of its
// operations, and the processor can load a few cache lines meanwhile.
template <class T> QP_INLINE void prefetch(const T* numbers, Index count) {
    const char* base = reinterpret_cast<const char*>(numbers);
    for (Index at = 0; at < count * (Index)sizeof(T); at += LINE) {
        __builtin_prefetch(base + at, 0, 2);
    }
}

// Solves the KKT system for the problems that one thread claims, and computes the gradients of their own operands.
template <class T, bool PRICED> class DerivativeWorker {
  public:
    DerivativeWorker(const DerivativeBatch<T>& batch, Queue& queue, bool calling)
        : batch(batch), queue(queue), calling(calling), workspace(batch.shape), o(workspace->problem),
          memory([this](Arena& arena) { lay_out(arena); }) {
        o.parameters = batch.parameters;
        // In the padding these scale zeros, so that any finite number will do.
        std::fill(o.D.data, o.D.data + o.np, T(1));
        std::fill(o.E.data, o.E.data + o.rows, T(1));
    }

    void run() {
        Index first, last;
        while (queue.claim(first, last)) {
            for (Index k = first; k < last && !queue.interrupted(calling); k++) {
                // Backwards: the cache still holds the problems that were solved last.
                Index b = batch.operands.count - 1 - k;
                differentiate(b, o.n >= PREFETCH_FROM ? b - 1 : -1);
            }
        }
    }

  private:
    using Team = WithPrices<serial::Team<T>, PRICED>;
    using Stored = StoredFactors<serial::Team<T>>;
    static constexpr int PREFETCH_FROM = 32; // variables from which on the hardware prefetcher does not keep up
    static constexpr int PREFETCH_ROWS = 8;  // rows of a gradient between two prefetches

    const DerivativeBatch<T>& batch;
    Queue& queue;
    bool calling;
    Borrowed<Workspace<Team>> workspace;
    Problem<Team>& o;
    Derivative<Team> d;
    MatrixReader matrices;
    Memory memory;

    void lay_out(Arena& arena) {
        auto of_variables = [&](auto&... vectors) { ((vectors.data = arena.take<T>(o.np + ROWS)), ...); };
        auto of_rows = [&](auto&... vectors) { ((vectors.data = arena.take<T>(o.rows + ROWS)), ...); };
        of_variables(d.right.x, d.u.x, d.x, d.per_D, d.eliminated.x, d.left.x, d.left_after.x, d.correction.x,
                     d.best.x);
        of_rows(d.right.v, d.u.v, d.u.Kx, d.v, d.s, d.theta, d.weights, d.nearly_active, d.per_E, d.eliminated.v,
                d.left.v, d.left_after.v, d.correction.v, d.correction.Kx, d.of_inactive, d.best.v, d.best.Kx);
        d.numbers = arena.take<int>(o.lp + 1);
    }

    // Solve for problem b and compute the gradients of its own operands; meanwhile prefetch the vectors and the stored
    // factors of problem `next`, unless that is negative.
    void differentiate(Index b, Index next) {
        bool own_factors = next >= 0 && batch.stored.sizes.F && batch.stored.constant.stride;
        Stored next_factors = own_factors ? batch.stored.at(next) : Stored{};
        prefetch_vectors(next);
        read(batch.x.at(b), batch.x.column, o.n, d.x.data);
        read_rows(batch.v, b, d.v);
        if (*batch.status.at(b) == SOLVED) {
            solve_kkt(b, next_factors, next);
        } else {
            std::fill(d.u.x.data, d.u.x.data + o.n, batch.fill);
            std::fill(d.u.v.data, d.u.v.data + o.rows, batch.fill);
        }
        std::copy(d.u.x.data, d.u.x.data + o.n, batch.u_x.at(b));
        gather_rows(o, d.u.v, batch.u_v.at(b));
        put_gradients(b, next_factors);
    }

    // Read entries of all constraints of problem b.
    void read_rows(const Operand& from, Index b, typename Team::Vector to) {
        each_block(o, [&](int row, int at, int count) {
            read(from.at(b) + at * from.column, from.column, count, to.data + row);
        });
    }

    // Solve the KKT system at the solution of problem b; meanwhile prefetch factors of the next one.
    void solve_kkt(Index b, const Stored& next_factors, Index next) {
        Form form = Form(*batch.stored.form.at(b));
        Stored stored = batch.stored.at(b);
        bool usable = *batch.stored.factor_ok.at(b) && form == batch.shape.form;
        load_vectors(o, batch.operands, b);
        scatter_scaling(o, batch.stored.scaling.at(b));
        read_rows(batch.s, b, d.s);
        read(batch.r_x.at(b), batch.r_x.column, o.n, d.right.x.data);
        read_rows(batch.r_v, b, d.right.v);
        if constexpr (PRICED) {
            matrices.load(o, batch.operands, b);
        }
        set_point(o, d);
        if (usable) {
            workspace->use(stored, form);
        }
        if (usable && form == Form::dense_dual && stored.F) {
            if (solve_dense_dual(
                    o, d, [&](int i, int count) { prefetch_F(next_factors, i, count); },
                    [&](int i, int count) { prefetch_S(next_factors, next, i, count); })) {
                return;
            }
            set_point(o, d);
        }
        if constexpr (!PRICED) {
            matrices.load(o, batch.operands, b);
        }
        if (usable && form != Form::dense_dual && stored.U && solve_with_inexact_factor(form)) {
            return;
        }
        workspace->use_primal();
        solve_afresh(o, d);
    }

    // Solve with the last factor of the iteration; return whether the solution is accurate.
    bool solve_with_inexact_factor(Form form) {
        const Parameters& P = *o.parameters;
        Accuracy<T> accuracy;
        if (form == Form::primal) {
            if (!pivots_are_significant(o)) {
                return false;
            }
            accuracy = qpdiff::solve_with_inexact_factor<Form::primal>(o, d, int(P.derivative_rounds));
        } else {
            Team::take_diagonal(o.Q, o.n, o.diagonal_Q);
            invert_diagonal(o);
            accuracy = qpdiff::solve_with_inexact_factor<Form::diagonal_dual>(o, d, int(P.derivative_rounds));
        }
        return accuracy.left <= T(P.factor_residual) && accuracy.moved <= T(P.factor_moved);
    }

    // Compute the gradients of the operands of problem b; meanwhile prefetch V of the next one.
    void put_gradients(Index b, const Stored& next_factors) {
        each_vector_gradient(batch, batch.own, b, [](T& gradient, T number) { gradient = number; });
        const T *u_x = d.u.x.data, *u_v = d.u.v.data, *x = d.x.data, *v = d.v.data;
        Index n = o.n;
        if (T* out = batch.own.Q.at(b)) {
            for (int i = 0; i < n; i += PREFETCH_ROWS) {
                int rows = std::min<int>(PREFETCH_ROWS, n - i);
                if (next_factors.V) {
                    prefetch(next_factors.V + (Index)i * Team::leading(o.linear),
                             (Index)rows * Team::leading(o.linear));
                }
                Team::outer(T(-0.5), x + i, u_x, u_x + i, x, rows, n, out + i * n);
            }
        }
        if (T* out = batch.own.A.at(b)) {
            Team::outer(T(-1), v, u_x, u_v, x, o.p, n, out);
        }
        if (T* out = batch.own.G.at(b)) {
            Team::outer(T(-1), v + o.p, u_x, u_v + o.p, x, batch.m(), n, out);
        }
    }

    // Prefetch one of `count` equal shares of the rows of the triangle F.
    void prefetch_F(const Stored& next_factors, int share, int count) const {
        for (int i = next_factors.F ? o.n * share / count : o.n; i < o.n * (share + 1) / count; i++) {
            prefetch(next_factors.F + (Index)i * Team::leading(o.n) + i, o.n - i);
        }
    }

    // Prefetch, of one of `count` equal shares of the rows of S, those of nearly active constraints.
    void prefetch_S(const Stored& next_factors, Index next, int share, int count) const {
        int last = o.linear * (share + 1) / count;
        for (int i = next_factors.S ? o.linear * share / count : last; i < last; i++) {
            T s = entry<T>(batch.s.at(next), batch.s.column, i), v = entry<T>(batch.v.at(next), batch.v.column, i);
            if (s < std::fabs(v)) {
                prefetch(next_factors.S + (Index)i * Team::leading(o.linear), o.linear);
            }
        }
    }

    // Prefetch the solution, the right-hand sides and E of a problem.
    void prefetch_vectors(Index next) const {
        if (next >= 0) {
            for (const Operand* from : {&batch.x, &batch.r_x}) {
                prefetch(reinterpret_cast<const T*>(from->at(next)), o.n);
            }
            for (const Operand* from : {&batch.v, &batch.s, &batch.r_v}) {
                prefetch(reinterpret_cast<const T*>(from->at(next)), batch.shape.rows());
            }
            prefetch(batch.stored.scaling.at(next) + batch.shape.n, batch.shape.rows());
        }
    }
};

// Sums the gradients of shared matrices over the batch, once all problems are solved. A work item is a few rows of a
// gradient; problems are summed in the order of the batch, so that the sums do not depend on the number of threads.
template <class T> class SumWorker {
  public:
    static constexpr int ITEM = 16;  // rows of a gradient in a work item
    static constexpr int CHUNK = 64; // problems whose vectors are gathered for one product

    explicit SumWorker(const DerivativeBatch<T>& batch)
        : batch(batch), n(batch.shape.n), memory([this](Arena& arena) { lay_out(arena); }) {}

    // Return the number of work items of a batch.
    static int items(const DerivativeBatch<T>& batch) {
        return items(batch.sums.Q, batch.shape.n) + items(batch.sums.A, batch.shape.p) + items(batch.sums.G, batch.m());
    }

    void run(Queue& queue, bool calling) {
        Index first, last;
        while (queue.claim(first, last)) {
            for (Index k = first; k < last && !queue.interrupted(calling); k++) {
                sum_item(int(k));
            }
        }
    }

  private:
    using Team = serial::Team<T>;
    const DerivativeBatch<T>& batch;
    const int n;
    Matrix<T> sums, of_rows, of_variables; // ITEM × n, CHUNK × ITEM, CHUNK × n
    int first = 0, height = 0;             // first row of the work item, and the number of its rows
    Memory memory;

    static int items(const Rows<T>& sums, int rows) { return sums.data ? (rows + ITEM - 1) / ITEM : 0; }

    void lay_out(Arena& arena) {
        auto matrix = [&](Matrix<T>& M, int rows, int columns) {
            M.ld = Team::leading(columns);
            M.data = arena.take<T>((Index)rows * M.ld);
        };
        matrix(sums, ITEM, n);
        matrix(of_rows, CHUNK, ITEM);
        matrix(of_variables, CHUNK, n);
    }

    // Compute the sums of a work item.
    void sum_item(int number) {
        int of_Q = items(batch.sums.Q, n), of_A = items(batch.sums.A, batch.shape.p);
        if (number < of_Q) {
            begin(number, n);
            add_products(T(-0.5), batch.u_x, 0, batch.x);
            put(batch.sums.Q);
        } else if (number < of_Q + of_A) {
            add_rows(number - of_Q, batch.shape.p, 0, batch.sums.A);
        } else {
            add_rows(number - of_Q - of_A, batch.m(), batch.shape.p, batch.sums.G);
        }
    }

    // Compute the sums of a work item of A or G, whose multipliers are those from `at` on.
    void add_rows(int number, int rows, int at, const Rows<T>& out) {
        begin(number, rows);
        add_products(T(-1), batch.v, at, batch.u_x);
        add_products(T(-1), batch.u_v, at, batch.x);
        put(out);
    }

    // Set the sums of a work item, one of those of a matrix with so many rows, to 0.
    void begin(int number, int rows) {
        first = number * ITEM;
        height = std::min(ITEM, rows - first);
        std::fill(sums.data, sums[ITEM], T(0));
    }

    // Add factor·a bᵀ of all problems, with the entries of a, counted from `at`, that belong to the work item.
    template <class A, class B> void add_products(T factor, const A& a, int at, const B& b) {
        Index count = batch.operands.count;
        for (Index from = 0; from < count; from += CHUNK) {
            int size = int(std::min<Index>(CHUNK, count - from));
            for (int i = 0; i < size; i++) {
                copy_entries(a, from + i, at + first, height, of_rows[i]);
                std::for_each(of_rows[i], of_rows[i] + height, [&](T& entry) { entry *= factor; });
                copy_entries(b, from + i, 0, n, of_variables[i]);
            }
            Team::add_product_matrix(of_rows, of_variables, size, sums, height, n);
        }
    }

    static void copy_entries(const Operand& from, Index b, int at, int count, T* to) {
        read(from.at(b) + at * from.column, from.column, count, to);
    }
    static void copy_entries(const Rows<T>& from, Index b, int at, int count, T* to) {
        std::copy(from.at(b) + at, from.at(b) + at + count, to);
    }

    // Copy the sums of the work item to a gradient.
    void put(const Rows<T>& out) {
        for (int i = 0; i < height; i++) {
            std::copy(sums[i], sums[i] + n, out.data + (Index)(first + i) * n);
        }
    }
};

// Differentiate a batch; return false, with a Python error set, where the call was interrupted.
template <class T, bool PRICED> bool differentiate_batch(const DerivativeBatch<T>& batch, int workers) {
    Queue problems(batch.operands.count, 1, workers, Py_None);
    using Worker = DerivativeWorker<T, PRICED>;
    auto make = [&](bool calling) { return std::make_unique<Worker>(batch, problems, calling); };
    if (!problems.run(make, [](Worker& worker, bool) { worker.run(); })) {
        return false;
    }
    sum_vector_gradients<T>(batch);
    int items = SumWorker<T>::items(batch);
    Queue sums(items, 1, std::min(workers, items), Py_None);
    auto make_sums = [&](bool) { return std::make_unique<SumWorker<T>>(batch); };
    return items == 0 || sums.run(make_sums, [&](SumWorker<T>& worker, bool calling) { worker.run(sums, calling); });
}

} // namespace qpdiff
