// The workspace of a thread for problems with sparse matrices of one pattern, and reading their operands into it.
#pragma once
#include <optional>

#include "method/sparse_derivative.hpp"
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
              o.matrix = arena.take<V>(Index(kkt.ldl.rows.size()) + 1);
              o.units = arena.take<V>(kkt.ldl.n), o.right = arena.take<V>(kkt.ldl.n);
              bool blocks = !is_vector<V> && kkt.block_rows.usable;
              Index of_L = blocks ? kkt.block_rows.size() : kkt.ldl.size();
              Index of_row = blocks ? kkt.block_rows.longest : kkt.ldl.n;
              o.ldl = {arena.take<V>(of_L), arena.take<V>(kkt.ldl.n), arena.take<V>(of_row)};
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

    // Return the vectors of the derivative, made where they are needed first.
    SparseDerivative<V, PRICED>& derivative() {
        if (!memory_of_derivative) {
            memory_of_derivative.emplace([this](Arena& arena) { lay_out_derivative(arena); });
        }
        return vectors_of_derivative;
    }

    // Return the number of entries of L.
    Index entries() const { return problem.kkt->ldl.size(); }

  private:
    Shape shape;
    Index pattern;
    Memory memory;
    SparseDerivative<V, PRICED> vectors_of_derivative;
    std::optional<Memory> memory_of_derivative;

    void lay_out_derivative(Arena& arena) {
        const auto& o = problem;
        auto& d = vectors_of_derivative;
        auto of_variables = [&](auto&... vectors) { ((vectors.data = arena.take<V>(o.np)), ...); };
        auto of_rows = [&](auto&... vectors) { ((vectors.data = arena.take<V>(o.rows)), ...); };
        of_variables(d.x, d.right.x, d.per_D, d.left.x, d.left_after.x);
        of_rows(d.right.v, d.v, d.s, d.theta, d.nearly_active, d.per_E, d.share, d.left.v, d.left_after.v);
        for (auto* u : {&d.u, &d.correction, &d.best}) {
            of_variables(u->x);
            of_rows(u->v, u->Kx);
        }
    }
};

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
        std::array<const char*, Team::PROBLEMS> entries;
        for (int lane = 0; lane < Team::PROBLEMS; lane++) {
            entries[lane] = from.at(problems[std::min(lane, size - 1)]);
        }
        scatter_lanes<Team>(entries, from.column, count, to);
    };
    int of_A = o.kkt->K_starts[o.p], of_K = o.kkt->K_starts[o.linear];
    load(operands.Q, o.kkt->Q_starts[o.n], o.Q.data);
    load(operands.A, of_A, o.K.data);
    load(operands.G, of_K - of_A, o.K.data + of_A);
}

} // namespace qpdiff
