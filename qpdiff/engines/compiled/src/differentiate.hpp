// Differentiating a batch: the KKT system at the solutions, problem by problem, and the gradients of the matrices,
// −½ (u_x xᵀ + x u_xᵀ) for Q and −(v u_xᵀ + u_v xᵀ) for A and G; summed over the batch where the problems share them.
#pragma once
#include "method/derivative.hpp"
#include "solve.hpp"

namespace qpdiff {

// The gradients of the matrices: of each problem's own, or sums over the batch; without data where they are not wanted.
template <class T> struct MatrixGradients {
    Rows<T> Q, G, A;
};

template <class T> struct DerivativeBatch {
    Operands operands;
    Shape shape;
    const Parameters* parameters;
    StoredBatch<T> stored;
    Operand x, v, s, r_x, r_v; // the solutions and the right-hand sides
    Rows<const int> status;
    Rows<T> u_x, u_v;
    T fill;                       // for problems that are not solved
    MatrixGradients<T> own, sums; // the sum of Q is the half that with its transpose is the gradient

    int m() const { return operands.m; }
    int rows() const { return shape.linear + (shape.lower ? shape.n : 0) + (shape.upper ? shape.n : 0); }
};

// Ask for numbers that lie side by side: software prefetch. The arithmetic on one problem waits more for itself than
// for memory, and the processor has room for a few lines under way.
template <class T> QP_INLINE void prefetch(const T* numbers, Index count) {
    const char* base = reinterpret_cast<const char*>(numbers);
    for (Index at = 0; at < count * (Index)sizeof(T); at += LINE) {
        __builtin_prefetch(base + at, 0, 2);
    }
}

// What a thread does problem by problem.
template <class T> class DerivativeWorker {
  public:
    DerivativeWorker(const DerivativeBatch<T>& batch, Queue& queue, bool calling)
        : batch(batch), queue(queue), calling(calling), workspace(batch.shape, calling), o(workspace->problem),
          memory([this](Arena& arena) { lay_out(arena); }) {
        o.parameters = batch.parameters;
        // What is scaled by them in the padding is 0.
        std::fill(o.D.data, o.D.data + o.np, T(1));
        std::fill(o.E.data, o.E.data + o.rows, T(1));
    }

    void run() {
        Index first, last;
        while (queue.claim(first, last)) {
            for (Index k = first; k < last && !queue.interrupted(calling); k++) {
                // Backwards: what the solve has left in the cache is what it came to last.
                Index b = batch.operands.count - 1 - k;
                differentiate(b, o.n >= FETCHED ? b - 1 : -1);
            }
        }
    }

  private:
    using Team = serial::Team<T>;
    static constexpr int FETCHED = 32; // variables from which on the processor does not fetch in time by itself
    static constexpr int STRIP = 8;    // rows of a gradient between two requests

    const DerivativeBatch<T>& batch;
    Queue& queue;
    bool calling;
    Borrowed<Team> workspace;
    Problem<Team>& o;
    Derivative<Team> d;
    MatrixReader matrices;
    Memory memory;

    void lay_out(Arena& arena) {
        auto of_variables = [&](auto&... vectors) { ((vectors.data = arena.take<T>(o.np + ROWS)), ...); };
        auto of_rows = [&](auto&... vectors) { ((vectors.data = arena.take<T>(o.rows + ROWS)), ...); };
        of_variables(d.right.x, d.u.x, d.x, d.per_D, d.eliminated.x, d.left.x, d.left_after.x, d.correction.x);
        of_rows(d.right.v, d.u.v, d.u.Kx, d.v, d.s, d.theta, d.weights, d.nearly_active, d.per_E, d.eliminated.v,
                d.left.v, d.left_after.v, d.correction.v, d.correction.Kx, d.of_inactive);
        d.numbers = arena.take<int>(o.lp + 1);
    }

    // Solve for problem b and compute the gradients of its own matrices; fetch meanwhile what is stored of problem
    // `next`, if there is one.
    void differentiate(Index b, Index next) {
        bool fetch = next >= 0 && batch.stored.sizes.F && batch.stored.constant.stride;
        StoredFactors<T> ahead = fetch ? batch.stored.at(next) : StoredFactors<T>{};
        prefetch_vectors(next);
        read(batch.x.at(b), batch.x.column, o.n, d.x.data);
        read_rows(batch.v, b, d.v);
        if (*batch.status.at(b) == SOLVED) {
            solve_kkt(b, ahead, next);
        } else {
            std::fill(d.u.x.data, d.u.x.data + o.n, batch.fill);
            std::fill(d.u.v.data, d.u.v.data + o.rows, batch.fill);
        }
        std::copy(d.u.x.data, d.u.x.data + o.n, batch.u_x.at(b));
        gather_rows(o, d.u.v, batch.u_v.at(b));
        put_gradients(b, ahead);
    }

    void read_rows(const Operand& from, Index b, typename Team::Vector to) {
        each_block(o, [&](int row, int at, int count) {
            read(from.at(b) + at * from.column, from.column, count, to.data + row);
        });
    }

    void solve_kkt(Index b, const StoredFactors<T>& ahead, Index next) {
        Form form = Form(*batch.stored.form.at(b));
        StoredFactors<T> stored = batch.stored.at(b);
        bool usable = *batch.stored.factor_ok.at(b) && form == batch.shape.form;
        load_vectors(o, batch.operands, b);
        const T* scaling = batch.stored.scaling.at(b);
        std::copy(scaling, scaling + o.n, o.D.data);
        scatter_rows(o, scaling + o.n, o.E);
        read_rows(batch.s, b, d.s);
        read(batch.r_x.at(b), batch.r_x.column, o.n, d.right.x.data);
        read_rows(batch.r_v, b, d.right.v);
        set_point(o, d);
        if (usable) {
            workspace->use(stored, form);
        }
        if (usable && form == Form::dense_dual && stored.F) {
            if (solve_dense_dual(
                    o, d, [&](int part, int parts) { prefetch_F(ahead, part, parts); },
                    [&](int part, int parts) { prefetch_S(ahead, next, part, parts); })) {
                return;
            }
            set_point(o, d);
        }
        matrices.load(o, batch.operands, b);
        if (usable && form != Form::dense_dual && stored.U && solve_nearby(form)) {
            return;
        }
        workspace->use_primal();
        solve_afresh(o, d);
    }

    // Solve with the last factor; return whether that is accurate.
    bool solve_nearby(Form form) {
        const Parameters& P = *o.parameters;
        Reached<T> reached;
        if (form == Form::primal) {
            if (!pivots_count(o)) {
                return false;
            }
            reached = qpdiff::solve_nearby<Form::primal>(o, d, int(P.derivative_rounds));
        } else {
            Team::take_diagonal(o.Q, o.n, o.diagonal_Q);
            invert_diagonal(o);
            reached = qpdiff::solve_nearby<Form::diagonal_dual>(o, d, int(P.derivative_rounds));
        }
        return reached.left <= T(P.factor_residual) && reached.moved <= T(P.factor_moved);
    }

    void put_gradients(Index b, const StoredFactors<T>& ahead) {
        const T *u_x = d.u.x.data, *u_v = d.u.v.data, *x = d.x.data, *v = d.v.data;
        Index n = o.n;
        if (T* out = batch.own.Q.at(b)) {
            for (int i = 0; i < n; i += STRIP) {
                int rows = std::min<int>(STRIP, n - i);
                if (ahead.V) {
                    prefetch(ahead.V + (Index)i * Team::leading(o.linear), (Index)rows * Team::leading(o.linear));
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

    // Ask for a part of the rows of the triangle F.
    void prefetch_F(const StoredFactors<T>& ahead, int part, int parts) const {
        for (int i = ahead.F ? o.n * part / parts : o.n; i < o.n * (part + 1) / parts; i++) {
            prefetch(ahead.F + (Index)i * Team::leading(o.n) + i, o.n - i);
        }
    }

    // Ask for those rows of S among a part that belong to active constraints.
    void prefetch_S(const StoredFactors<T>& ahead, Index next, int part, int parts) const {
        int last = o.linear * (part + 1) / parts;
        for (int i = ahead.S ? o.linear * part / parts : last; i < last; i++) {
            T s = entry<T>(batch.s.at(next), batch.s.column, i), v = entry<T>(batch.v.at(next), batch.v.column, i);
            if (s < std::fabs(v)) {
                prefetch(ahead.S + (Index)i * Team::leading(o.linear), o.linear);
            }
        }
    }

    void prefetch_vectors(Index next) const {
        if (next >= 0) {
            for (const Operand* from : {&batch.x, &batch.r_x}) {
                prefetch(reinterpret_cast<const T*>(from->at(next)), o.n);
            }
            for (const Operand* from : {&batch.v, &batch.s, &batch.r_v}) {
                prefetch(reinterpret_cast<const T*>(from->at(next)), batch.rows());
            }
            prefetch(batch.stored.scaling.at(next) + batch.shape.n, batch.rows());
        }
    }
};

// What a thread does strip by strip, once all problems are solved: sums over the batch in its order, whichever thread
// takes them.
template <class T> class SumWorker {
  public:
    static constexpr int STRIP = 16;   // rows of a gradient
    static constexpr int PORTION = 64; // problems whose vectors are brought together

    explicit SumWorker(const DerivativeBatch<T>& batch)
        : batch(batch), n(batch.shape.n), memory([this](Arena& arena) { lay_out(arena); }) {}

    // How many strips a batch has.
    static int strips(const DerivativeBatch<T>& batch) {
        return strips(batch.sums.Q, batch.shape.n) + strips(batch.sums.A, batch.shape.p) +
               strips(batch.sums.G, batch.m());
    }

    void run(Queue& queue, bool calling) {
        Index first, last;
        while (queue.claim(first, last)) {
            for (Index k = first; k < last && !queue.interrupted(calling); k++) {
                add_strip(int(k));
            }
        }
    }

  private:
    using Team = serial::Team<T>;
    const DerivativeBatch<T>& batch;
    const int n;
    Matrix<T> sums, of_rows, of_variables; // STRIP × n, PORTION × STRIP, PORTION × n
    int first = 0, height = 0;             // rows of the strip
    Memory memory;

    static int strips(const Rows<T>& sums, int rows) { return sums.data ? (rows + STRIP - 1) / STRIP : 0; }

    void lay_out(Arena& arena) {
        auto matrix = [&](Matrix<T>& M, int rows, int columns) {
            M.ld = Team::leading(columns);
            M.data = arena.take<T>((Index)rows * M.ld);
        };
        matrix(sums, STRIP, n);
        matrix(of_rows, PORTION, STRIP);
        matrix(of_variables, PORTION, n);
    }

    void add_strip(int number) {
        int of_Q = strips(batch.sums.Q, n), of_A = strips(batch.sums.A, batch.shape.p);
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

    // The multipliers of A and G are those from `at` on.
    void add_rows(int number, int rows, int at, const Rows<T>& out) {
        begin(number, rows);
        add_products(T(-1), batch.v, at, batch.u_x);
        add_products(T(-1), batch.u_v, at, batch.x);
        put(out);
    }

    void begin(int number, int rows) {
        first = number * STRIP;
        height = std::min(STRIP, rows - first);
        std::fill(sums.data, sums[STRIP], T(0));
    }

    // Add factor a bᵀ of all problems, with the entries of a, counted from `at`, that belong to the strip.
    template <class A, class B> void add_products(T factor, const A& a, int at, const B& b) {
        Index count = batch.operands.count;
        for (Index from = 0; from < count; from += PORTION) {
            int portion = int(std::min<Index>(PORTION, count - from));
            for (int i = 0; i < portion; i++) {
                copy_entries(a, from + i, at + first, height, of_rows[i]);
                std::for_each(of_rows[i], of_rows[i] + height, [&](T& entry) { entry *= factor; });
                copy_entries(b, from + i, 0, n, of_variables[i]);
            }
            Team::add_product_matrix(of_rows, of_variables, portion, sums, height, n);
        }
    }

    static void copy_entries(const Operand& from, Index b, int at, int count, T* to) {
        read(from.at(b) + at * from.column, from.column, count, to);
    }
    static void copy_entries(const Rows<T>& from, Index b, int at, int count, T* to) {
        std::copy(from.at(b) + at, from.at(b) + at + count, to);
    }

    void put(const Rows<T>& out) {
        for (int i = 0; i < height; i++) {
            std::copy(sums[i], sums[i] + n, out.data + (Index)(first + i) * n);
        }
    }
};

// Differentiate a batch; false with a Python error set, where the call was interrupted.
template <class T> bool differentiate_batch(const DerivativeBatch<T>& batch, int workers) {
    Queue problems(batch.operands.count, 1, workers, Py_None);
    if (!problems.run([&](bool calling) { DerivativeWorker<T>(batch, problems, calling).run(); })) {
        return false;
    }
    int strips = SumWorker<T>::strips(batch);
    Queue sums(strips, 1, std::min(workers, strips), Py_None);
    return strips == 0 || sums.run([&](bool calling) { SumWorker<T>(batch).run(sums, calling); });
}

} // namespace qpdiff
