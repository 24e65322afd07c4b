// Differentiating a batch of problems with sparse matrices of one pattern: the KKT system at the solutions, in lane
// groups or one by one, and the gradients of the operands, of the entries of the matrices −½ (u_i x_j + x_i u_j) for Q
// and −(v_i u_j + u_i x_j) for A and G, summed over the batch where one is shared.
#pragma once
#include <array>
#include <optional>

#include "gradients.hpp"
#include "queue.hpp"
#include "sparse_workspace.hpp"

namespace qpdiff {

struct SparseDerivativeBatch {
    Operands operands; // of Q, A and G the entries, in the order of the pattern
    Shape shape;
    const SparseKkt* kkt;
    const Parameters* parameters;
    bool lanes;                           // whether to solve in lane groups
    Rows<const double> scaling;           // D, then E
    Rows<const double> x, v, s, r_x, r_v; // the solutions and the right-hand sides
    Rows<const int> status;
    Rows<double> u_x, u_v;
    double fill;                 // the solution and the gradients of problems that are not SOLVED
    bool fixed;                  // whether lb = ub may fix a variable
    Gradients<double> own, sums; // of each problem's own operands, and of shared ones

    bool solved(Index b) const { return *status.at(b) == SOLVED; }
    double multiplier(Index b, int row) const { return v.at(b)[row]; }
};

// The gradients of one matrix: its rows in the pattern of Q, or in that of A and G together.
struct SparseGradients {
    Rows<double> out;
    bool of_Q;
    int first, last;
};

inline std::array<SparseGradients, 3> gradients_by_matrix(const SparseKkt& kkt, const Gradients<double>& to) {
    return {{{to.Q, true, 0, kkt.n}, {to.A, false, 0, kkt.p}, {to.G, false, kkt.p, kkt.linear}}};
}

// Call f(entry of the matrix, its gradient) for the entries in some rows of a matrix of problem b, which is solved for.
template <class F>
QP_INLINE void each_gradient(const SparseDerivativeBatch& batch, const SparseGradients& of, int first, int last,
                             Index b, F f) {
    const sparse::Pattern& pattern = of.of_Q ? batch.kkt->Q : batch.kkt->K;
    int origin = pattern.starts[of.first];
    if (!batch.solved(b)) {
        for (int e = pattern.starts[first]; e < pattern.starts[last]; e++) {
            f(e - origin, batch.fill);
        }
        return;
    }
    const double *x = batch.x.at(b), *u_x = batch.u_x.at(b);
    const double *with_x = of.of_Q ? u_x : batch.u_v.at(b), *with_u = of.of_Q ? x : batch.v.at(b);
    double factor = of.of_Q ? -0.5 : -1.0;
    for (int i = first; i < last; i++) {
        double a = factor * with_x[i], c = factor * with_u[i];
        for (int e = pattern.starts[i]; e < pattern.starts[i + 1]; e++) {
            int j = pattern.columns[e];
            f(e - origin, rounded(a * x[j]) + rounded(c * u_x[j])); // the same for an entry of Q and its mirror image
        }
    }
}

// Solves the KKT system for the problems that one thread claims, and computes the gradients of their own operands.
template <bool PRICED> class SparseDerivativeWorker {
  public:
    SparseDerivativeWorker(const SparseDerivativeBatch& batch, Queue& queue, bool calling)
        : batch(batch), queue(queue), calling(calling), one(batch) {
        if (batch.lanes) {
            group.emplace(batch);
        }
    }

    void run() {
        Index first, last;
        while (queue.claim(first, last)) {
            Index solved[LANES];
            int size = 0, most = batch.lanes ? LANES : 1;
            for (Index b = first; b < last && !queue.interrupted(calling); b++) {
                if (batch.solved(b)) {
                    solved[size++] = b;
                } else {
                    std::fill(batch.u_x.at(b), batch.u_x.at(b) + batch.shape.n, batch.fill);
                    std::fill(batch.u_v.at(b), batch.u_v.at(b) + batch.shape.rows(), batch.fill);
                    put_gradients(b);
                }
                if (size == most) {
                    differentiate(solved, size);
                    size = 0;
                }
            }
            differentiate(solved, size);
        }
    }

  private:
    using Lanes = pack_of<double>;
    static constexpr int LANES = entries<Lanes>;

    // A workspace with the vectors of the derivative, and whether its matrices, and the kinds of its constraints where
    // the limits are shared, are those of all problems.
    template <class V> struct Place {
        Borrowed<SparseWorkspace<V, PRICED>> workspace;
        SparseDerivative<V, PRICED>& derivative;
        bool ready = false;

        explicit Place(const SparseDerivativeBatch& batch)
            : workspace(batch.shape, *batch.kkt), derivative(workspace->derivative()) {
            workspace->problem.parameters = batch.parameters;
        }
    };

    const SparseDerivativeBatch& batch;
    Queue& queue;
    bool calling;
    Place<double> one;
    std::optional<Place<Lanes>> group;

    // Solve for problems that are SOLVED, and compute the gradients of their own operands.
    void differentiate(const Index* problems, int size) {
        if (size < 2 || !solve(*group, problems, size)) {
            for (int k = 0; k < size && !queue.interrupted(calling); k++) {
                solve(one, problems + k, 1);
            }
        }
        for (int k = 0; k < size; k++) {
            put_gradients(problems[k]);
        }
    }

    // Solve for problems in the lanes of a place; return false where their constraints are not of the same kinds.
    template <class V> bool solve(Place<V>& place, const Index* problems, int size) {
        using Team = sparse::Team<V, PRICED>;
        SparseProblem<V, PRICED>& o = place.workspace->problem;
        SparseDerivative<V, PRICED>& d = place.derivative;
        auto of_lane = [&](int lane) { return problems[std::min(lane, size - 1)]; };
        const Operands& operands = batch.operands;
        // The derivative reads the numbers in the vectors for prices only.
        bool shared_kinds = !PRICED && operands.h.shared() && operands.lb.shared() && operands.ub.shared();
        bool same_kinds = true;
        for (int lane = 0; lane < (shared_kinds ? int(!place.ready) : Team::PROBLEMS); lane++) {
            same_kinds &= load_vectors<Team, PRICED>(o, operands, of_lane(lane), lane);
        }
        if (!same_kinds) {
            return false;
        }
        if (!place.ready || !entries_shared(operands)) {
            load_entries(o, operands, problems, size);
            Team::take_diagonal(o.Q, o.n, o.diagonal_Q);
            assemble(o);
            place.ready = true;
        }
        auto load = [&](const Rows<const double>& rows, int first, int count, V* to) {
            std::array<const char*, Team::PROBLEMS> from;
            for (int lane = 0; lane < Team::PROBLEMS; lane++) {
                from[lane] = reinterpret_cast<const char*>(rows.at(of_lane(lane)) + first);
            }
            scatter_lanes<Team>(from, sizeof(double), count, to);
        };
        auto load_rows = [&](const Rows<const double>& rows, int first, typename Team::Vector to) {
            each_block(o, [&](int row, int at, int count) { load(rows, first + at, count, to.data + row); });
        };
        load(batch.scaling, 0, o.n, o.D.data), load_rows(batch.scaling, o.n, o.E);
        load(batch.x, 0, o.n, d.x.data), load(batch.r_x, 0, o.n, d.right.x.data);
        load_rows(batch.v, 0, d.v), load_rows(batch.s, 0, d.s), load_rows(batch.r_v, 0, d.right.v);
        set_point<Team>(o, d);
        solve_kkt(o, d);
        for (int lane = 0; lane < size; lane++) {
            gather<Team>(d.u.x.data, o.n, batch.u_x.at(problems[lane]), lane);
            gather_rows<Team>(o, d.u.v, batch.u_v.at(problems[lane]), lane);
        }
        return true;
    }

    // Compute the gradients of the operands of problem b.
    void put_gradients(Index b) {
        each_vector_gradient(batch, batch.own, b, [](double& gradient, double number) { gradient = number; });
        for (const SparseGradients& of : gradients_by_matrix(*batch.kkt, batch.own)) {
            if (double* out = of.out.at(b)) {
                each_gradient(batch, of, of.first, of.last, b, [&](int e, double gradient) { out[e] = gradient; });
            }
        }
    }
};

// Sums the gradients of shared matrices over the batch, once all problems are solved. A work item is a few rows of a
// matrix; problems are summed in the order of the batch, so that the sums do not depend on the number of threads.
class SparseSums {
  public:
    static constexpr int ITEM = 64;             // rows in a work item
    static constexpr Index OF_THREAD = 1 << 15; // gradients, of entries and problems, that are worth starting a thread

    explicit SparseSums(const SparseDerivativeBatch& batch) : batch(batch) {
        for (const SparseGradients& of : gradients_by_matrix(*batch.kkt, batch.sums)) {
            if (!of.out.data) {
                continue;
            }
            const sparse::Pattern& pattern = of.of_Q ? batch.kkt->Q : batch.kkt->K;
            gradients += batch.operands.count * (pattern.starts[of.last] - pattern.starts[of.first]);
            for (int row = of.first; row < of.last; row += ITEM) {
                items.push_back({of, row, std::min(row + ITEM, of.last)});
            }
        }
    }

    int count() const { return int(items.size()); }

    // Return how many threads to work on, up to so many.
    int workers(int most) const { return int(std::min<Index>({most, count(), 1 + gradients / OF_THREAD})); }

    // Compute the sums of the work items that one thread claims.
    void run(Queue& queue, bool calling) const {
        Index next, end;
        while (queue.claim(next, end)) {
            for (; next < end && !queue.interrupted(calling); next++) {
                const auto& [of, first, last] = items[next];
                const sparse::Pattern& pattern = of.of_Q ? batch.kkt->Q : batch.kkt->K;
                double* out = of.out.data;
                std::fill(out + pattern.starts[first] - pattern.starts[of.first],
                          out + pattern.starts[last] - pattern.starts[of.first], 0.0);
                for (Index b = 0; b < batch.operands.count; b++) {
                    each_gradient(batch, of, first, last, b, [&](int e, double gradient) { out[e] += gradient; });
                }
            }
        }
    }

  private:
    struct Item {
        SparseGradients of;
        int first, last;
    };
    const SparseDerivativeBatch& batch;
    std::vector<Item> items;
    Index gradients = 0;
};

// Differentiate a batch; return false, with a Python error set, where the call was interrupted.
template <bool PRICED> bool differentiate_sparse_batch(const SparseDerivativeBatch& batch, int workers) {
    Queue problems(batch.operands.count, batch.lanes ? entries<pack_of<double>> : 1, workers, Py_None);
    using Worker = SparseDerivativeWorker<PRICED>;
    auto make = [&](bool calling) { return std::make_unique<Worker>(batch, problems, calling); };
    if (!problems.run(make, [](Worker& worker, bool) { worker.run(); })) {
        return false;
    }
    sum_vector_gradients<double>(batch);
    SparseSums sums(batch);
    Queue items(sums.count(), 1, sums.workers(workers), Py_None);
    auto all = [&](bool) { return &sums; };
    return sums.count() == 0 || items.run(all, [&](SparseSums& sums, bool calling) { sums.run(items, calling); });
}

} // namespace qpdiff
