// The workspace of a thread for problems with sparse matrices of one pattern, and reading their operands into it.
#pragma once
#include <memory>

#include "method/sparse_kkt.hpp"
#include "operands.hpp"
#include "workspace.hpp"

namespace qpdiff {

// A sparse problem with memory for its operands and work vectors.
template <class V, bool PRICED> class SparseWorkspace {
  public:
    SparseProblem<V, PRICED> problem;

    SparseWorkspace(const Shape& shape, const SparseKkt& kkt)
        : shape(shape), pattern(kkt.number), memory([&](Arena& arena) {
              auto& o = problem;
              lay_out_vectors(o, shape, arena, o.weights);
              Index of_Q = Index(kkt.Q_columns.size()), of_K = Index(kkt.K_columns.size());
              o.kkt = &kkt;
              o.Q = {&kkt.Q, arena.take<V>(of_Q)}, o.square_matrix = {&kkt.Q, arena.take<V>(of_Q)};
              o.K = {&kkt.K, arena.take<V>(of_K)}, o.scaled = {&kkt.K, arena.take<V>(of_K)};
              o.matrix = arena.take<V>(Index(kkt.ldl.rows.size()));
              o.units = arena.take<V>(kkt.ldl.n), o.right = arena.take<V>(kkt.ldl.n);
              o.ldl = {arena.take<V>(kkt.ldl.size()), arena.take<V>(kkt.ldl.n), arena.take<V>(kkt.ldl.n)};
              if constexpr (!is_vector<V>) {
                  o.ldl.of_rows = arena.take<V>(Index(width<V>) * kkt.ldl.n);
              }
          }) {
        for (int j = 0; j < problem.n; j++) {
            problem.exists.data[j] = as<V>(1.0);
        }
        // Of the padding too, which nothing else sets for the derivative.
        std::fill(problem.D.data, problem.D.data + problem.np, as<V>(1.0));
        std::fill(problem.E.data, problem.E.data + problem.rows, as<V>(1.0));
        if constexpr (PRICED) {
            std::fill(problem.v_upper.data, problem.v_upper.data + problem.rows, as<V>(INFINITY_));
        }
    }

    // Return whether it has been made for problems of this shape and pattern.
    bool serves(const Shape& other, const SparseKkt& kkt) const { return shape == other && pattern == kkt.number; }

  private:
    Shape shape;
    Index pattern;
    Memory memory;
};

// Return the workspace of this thread that is not in use, or null.
template <class V, bool PRICED> std::unique_ptr<SparseWorkspace<V, PRICED>>& idle_sparse_workspace() {
    static thread_local std::unique_ptr<SparseWorkspace<V, PRICED>> workspace;
    return workspace;
}

// The workspace of a thread during a call, made where it is needed first. The calling thread reuses small ones in the
// next call.
template <class V, bool PRICED> class BorrowedSparse {
  public:
    static constexpr Index LARGEST = 1 << 20; // entries of L

    BorrowedSparse(const Shape& shape, const SparseKkt& kkt, const Parameters* parameters, bool calling)
        : shape(shape), kkt(kkt), parameters(parameters), calling(calling) {}
    ~BorrowedSparse() {
        if (calling && workspace && kkt.ldl.size() <= LARGEST) {
            idle_sparse_workspace<V, PRICED>() = std::move(workspace);
        }
    }
    BorrowedSparse(const BorrowedSparse&) = delete;

    SparseProblem<V, PRICED>& problem() {
        if (!workspace) {
            auto& idle = idle_sparse_workspace<V, PRICED>();
            bool reused = calling && idle && idle->serves(shape, kkt);
            workspace = reused ? std::move(idle) : std::make_unique<SparseWorkspace<V, PRICED>>(shape, kkt);
            workspace->problem.parameters = parameters;
        }
        return workspace->problem;
    }

  private:
    const Shape& shape;
    const SparseKkt& kkt;
    const Parameters* parameters;
    bool calling;
    std::unique_ptr<SparseWorkspace<V, PRICED>> workspace;
};

// Call f(place in the problem, place in an array of the caller's) for all constraints.
template <class Team, class F> void each_row(const Problem<Team>& o, F f) {
    each_block(o, [&](int row, int at, int count) {
        for (int i = 0; i < count; i++) {
            f(row + i, at + i);
        }
    });
}

// Copy entries of all constraints from an array of the caller's into a lane, and the other way round.
template <class Team> void read_rows(const Problem<Team>& o, const double* from, typename Team::Vector to, int lane) {
    each_row(o, [&](int row, int at) { put<Team>(to.data[row], lane, from[at]); });
}
template <class Team> void write_rows(const Problem<Team>& o, typename Team::Vector from, double* to, int lane) {
    each_row(o, [&](int row, int at) { to[at] = take<Team>(from.data[row], lane); });
}

// Do the same with entries of the variables.
template <class Team>
void read_variables(const Problem<Team>& o, const double* from, typename Team::Vector to, int lane) {
    for (int j = 0; j < o.n; j++) {
        put<Team>(to.data[j], lane, from[j]);
    }
}
template <class Team> void write_variables(const Problem<Team>& o, typename Team::Vector from, double* to, int lane) {
    for (int j = 0; j < o.n; j++) {
        to[j] = take<Team>(from.data[j], lane);
    }
}

// Return whether all problems have the same entries of Q, A and G.
inline bool entries_shared(const Operands& operands) {
    return operands.Q.shared() && operands.A.shared() && operands.G.shared();
}

// Read the entries of Q, A and G of `size` problems, given by their numbers in the batch; the other lanes get the last
// one again.
template <class V, bool PRICED>
QP_NOINLINE void load_entries(SparseProblem<V, PRICED>& o, const Operands& operands, const Index* problems, int size) {
    using Team = sparse::Team<V, PRICED>;
    auto load = [&](const Operand& from, int count, V* to) {
        for (int lane = 0; lane < Team::PROBLEMS && count > 0; lane++) {
            const char* entries = from.at(problems[std::min(lane, size - 1)]);
            for (int e = 0; e < count; e++) {
                put<Team>(to[e], lane, entry<double>(entries, from.column, e));
            }
        }
    };
    int of_A = o.kkt->K_starts[o.p], of_K = o.kkt->K_starts[o.linear];
    load(operands.Q, o.kkt->Q_starts[o.n], o.Q.data);
    load(operands.A, of_A, o.K.data);
    load(operands.G, of_K - of_A, o.K.data + of_A);
}

} // namespace qpdiff
