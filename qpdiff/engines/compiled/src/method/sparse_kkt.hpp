// The KKT system of a problem with sparse Q and K, in full but for the bounds, which are on the diagonal:
//
//     [ Q + ρ + W   Kᵀ       ] [dx]   [r_x + Σ ± W r_v of the bounds]
//     [ K          −(θ + δ)  ] [dv] = [r_v                          ],    W = 1 / (θ + δ) of the bounds.
//
// It is quasidefinite: any order of its rows has a factor L D Lᵀ with pivots of known signs (Vanderbei, 1995), so one
// order, made for few entries in L, serves all iterations and all problems of one pattern.
#pragma once
#include <atomic>
#include <numeric>
#include <utility>
#include <vector>

#include "../linalg/block_rows.hpp"
#include "../linalg/minimum_degree.hpp"
#include "reduced_forms.hpp"

namespace qpdiff {

// What the KKT matrices of one pattern share: their symbolic factorisation, and where each operand's entries are.
class SparseKkt {
  public:
    static inline std::atomic<Index> made{0};
    const Index number = made++; // tells it from any other of this process
    int n, p, linear;
    std::vector<int> Q_starts, Q_columns, K_starts, K_columns;
    sparse::Pattern Q, K;
    std::vector<int> place;    // of each variable, then of each row of A and G, in the order of elimination
    std::vector<int> of_Q;     // where each entry of Q is in the matrix; −1 for the diagonal and what is below
    std::vector<int> mirror;   // where in Q the mirror image of each entry of Q is
    std::vector<int> of_K;     // where each entry of K is
    std::vector<int> diagonal; // where the diagonal is, of variables and rows
    std::vector<double> signs; // of the pivots
    sparse::LdlPattern ldl;
    sparse::BlockRows block_rows; // for one problem
    std::vector<int> component;   // of each variable, then of each row of A and G: the number of one of its variables
    int components;               // how many there are
    bool fits;                    // whether the number of entries of L is within the range of `int`

    // Analyse symmetric Q and K given in compressed rows.
    SparseKkt(int p, std::vector<int> Q_starts_, std::vector<int> Q_columns_, std::vector<int> K_starts_,
              std::vector<int> K_columns_)
        : n(int(Q_starts_.size()) - 1), p(p), linear(int(K_starts_.size()) - 1), Q_starts(std::move(Q_starts_)),
          Q_columns(std::move(Q_columns_)), K_starts(std::move(K_starts_)), K_columns(std::move(K_columns_)),
          Q{Q_starts.data(), Q_columns.data()}, K{K_starts.data(), K_columns.data()},
          place(sparse::MinimumDegree(neighbours()).order()), of_Q(Q_columns.size()), mirror(Q_columns.size()),
          of_K(K_columns.size()), diagonal(n + linear), signs(n + linear) {
        eliminate_leaves_first();
        int size = n + linear;
        std::vector<int> starts(size + 1, 0);
        each_entry([&](int&, int, int column) { starts[column + 1]++; });
        for (int j = 0; j < size; j++) {
            starts[j + 1] += starts[j];
        }
        std::vector<int> next(starts.begin(), starts.end() - 1), rows(starts[size]);
        std::fill(of_Q.begin(), of_Q.end(), -1);
        each_entry([&](int& at, int row, int column) {
            at = next[column]++;
            rows[at] = row;
        });
        for (int i = 0; i < size; i++) {
            signs[place[i]] = i < n ? 1 : -1;
        }
        for (int i = 0; i < n; i++) {
            for (int e = Q_starts[i]; e < Q_starts[i + 1]; e++) {
                auto row = Q_columns.begin() + Q_starts[Q_columns[e]],
                     end = Q_columns.begin() + Q_starts[Q_columns[e] + 1];
                mirror[e] = int(std::lower_bound(row, end, i) - Q_columns.begin());
            }
        }
        fits = ldl.analyse(size, std::move(starts), std::move(rows));
        if (fits) {
            block_rows.analyse(ldl);
        }
        find_components();
    }
    SparseKkt(const SparseKkt&) = delete;

  private:
    // Return the graph of the KKT matrix.
    std::vector<std::vector<int>> neighbours() const {
        std::vector<std::vector<int>> of(n + linear);
        for (int i = 0; i < n; i++) {
            for (int e = Q_starts[i]; e < Q_starts[i + 1]; e++) {
                if (i != Q_columns[e]) {
                    of[i].push_back(Q_columns[e]);
                }
            }
        }
        for (int i = 0; i < linear; i++) {
            for (int e = K_starts[i]; e < K_starts[i + 1]; e++) {
                of[n + i].push_back(K_columns[e]);
                of[K_columns[e]].push_back(n + i);
            }
        }
        return of;
    }

    // Bring to the front what is eliminated before all that it has an entry with: it needs nothing of the others.
    void eliminate_leaves_first() {
        int size = n + linear, leaves = 0;
        std::vector<int> is_leaf(size, 1), moved(size);
        each_entry([&](int&, int row, int column) { is_leaf[column] &= row == column; });
        for (int k = 0; k < size; k++) {
            moved[k] = leaves;
            leaves += is_leaf[k];
        }
        for (int k = 0; k < size; k++) {
            moved[k] = is_leaf[k] ? moved[k] : leaves + k - moved[k];
        }
        for (int& k : place) {
            k = moved[k];
        }
    }

    // Find which variables rows of A and G link.
    void find_components() {
        component.resize(n + linear);
        std::iota(component.begin(), component.end(), 0);
        auto root = [&](int j) {
            while (component[j] != j) {
                j = component[j] = component[component[j]];
            }
            return j;
        };
        for (int i = 0; i < linear; i++) {
            for (int e = K_starts[i]; e < K_starts[i + 1]; e++) {
                component[root(K_columns[e])] = root(K_columns[K_starts[i]]);
            }
        }
        components = 0;
        for (int j = 0; j < n; j++) {
            components += component[j] == j;
            component[j] = root(j);
        }
        for (int i = 0; i < linear; i++) {
            component[n + i] = K_starts[i] < K_starts[i + 1] ? component[K_columns[K_starts[i]]] : 0;
        }
    }

    // Call f(where its place is stored, row, column) for each entry of the upper triangle in the order of elimination.
    template <class F> void each_entry(F f) {
        auto entry = [&](int& at, int a, int b) { f(at, std::min(place[a], place[b]), std::max(place[a], place[b])); };
        for (int i = 0; i < n; i++) {
            for (int e = Q_starts[i]; e < Q_starts[i + 1]; e++) {
                if (i < Q_columns[e]) {
                    entry(of_Q[e], i, Q_columns[e]);
                }
            }
        }
        for (int i = 0; i < linear; i++) {
            for (int e = K_starts[i]; e < K_starts[i + 1]; e++) {
                entry(of_K[e], K_columns[e], n + i);
            }
        }
        for (int i = 0; i < n + linear; i++) {
            entry(diagonal[i], i, i);
        }
    }
};

// A problem with sparse matrices, and its KKT matrix.
template <class V, bool PRICED> struct SparseProblem : Problem<sparse::Team<V, PRICED>> {
    const SparseKkt* kkt = nullptr;
    V* matrix = nullptr; // the entries of the KKT matrix, in the order of `kkt->ldl.rows`, and a zero
    V* units = nullptr;  // what its pivots are measured in: 1/D², 1/E²
    V* right = nullptr;  // a right-hand side in the order of elimination
    sparse::Factor<V> ldl;
};

// Fill the numbers of the components, which depend on the pattern alone; return whether there is more than one.
template <class V, bool PRICED, class Vector>
QP_NOINLINE bool find_components(const Problem<sparse::Team<V, PRICED>>& problem, Vector of_variables, Vector of_rows) {
    const SparseKkt& kkt = *static_cast<const SparseProblem<V, PRICED>&>(problem).kkt;
    if (kkt.components == 1) {
        return false;
    }
    for (int j = 0; j < kkt.n; j++) {
        of_variables.data[j] = as<V>(double(kkt.component[j]));
    }
    for (int i = 0; i < kkt.linear; i++) {
        of_rows.data[i] = as<V>(double(kkt.component[kkt.n + i]));
    }
    return true;
}

// Put the entries of Q and K that are not on the diagonal into the KKT matrix.
template <class V, bool PRICED> void assemble(SparseProblem<V, PRICED>& o) {
    const SparseKkt& kkt = *o.kkt;
    for (size_t e = 0; e < kkt.of_Q.size(); e++) {
        if (kkt.of_Q[e] >= 0) {
            o.matrix[kkt.of_Q[e]] = o.Q.data[e];
        }
    }
    for (size_t e = 0; e < kkt.of_K.size(); e++) {
        o.matrix[kkt.of_K[e]] = o.K.data[e];
    }
}

// Return where all entries are finite and Q is symmetric but for a rounding error relative to its largest entry.
template <class V, bool PRICED>
QP_NOINLINE mask_of<V> plausible_entries(const SparseProblem<V, PRICED>& o, double rounding) {
    using Team = sparse::Team<V, PRICED>;
    const SparseKkt& kkt = *o.kkt;
    V largest = as<V>(smallest_normal<double>), apart{};
    Team::each_entry(o.Q, o.n, [&](int i, int j, V entry) {
        if (i == j) {
            largest = larger(absolute(entry), largest);
        }
    });
    for (size_t e = 0; e < kkt.mirror.size(); e++) {
        apart = larger(absolute(o.Q.data[e] - o.Q.data[kkt.mirror[e]]), apart);
    }
    return (apart <= rounding * largest) & Team::all_finite(o.Q, o.n, o.n) & Team::all_finite(o.K, o.linear, o.n);
}

// Return where Q is positive semidefinite but for a rounding error relative to its largest entry, after `balance` and
// `assemble`: at once where no row has more beside its diagonal than on it (Gershgorin), else by a factorisation.
template <class V, bool PRICED> QP_NOINLINE mask_of<V> convex(SparseProblem<V, PRICED>& o, double rounding) {
    const SparseKkt& kkt = *o.kkt;
    if (rounding == INFINITY_) {
        return truth<mask_of<V>>(true); // not to be checked
    }
    auto beside = o.columns;
    V largest{};
    for (int j = 0; j < o.n; j++) {
        largest = larger(absolute(o.diagonal_Q.data[j]), largest);
        beside.data[j] = V{};
    }
    sparse::Team<V, PRICED>::each_entry(o.Q, o.n, [&](int i, int j, V entry) {
        if (i != j) {
            beside.data[i] += absolute(entry);
        }
    });
    V allowed = rounding * largest;
    auto dominant = truth<mask_of<V>>(true);
    for (int j = 0; j < o.n; j++) {
        dominant &= o.diagonal_Q.data[j] + allowed >= beside.data[j];
    }
    if (every(dominant)) {
        return dominant;
    }
    for (int j = 0; j < o.n; j++) {
        o.matrix[kkt.diagonal[j]] = o.diagonal_Q.data[j] + allowed + smallest_normal<double>;
    }
    for (int i = 0; i < o.linear; i++) {
        o.matrix[kkt.diagonal[o.n + i]] = as<V>(-1.0);
    }
    for (int place : kkt.of_K) {
        o.matrix[place] = V{};
    }
    std::fill(o.units, o.units + kkt.ldl.n, as<V>(1.0));
    sparse::Pivots<V> pivots{kkt.signs.data(), o.units, 0, NOT_A_NUMBER, 1};
    auto factored = sparse::factor(kkt.ldl, kkt.block_rows, o.matrix, pivots, o.ldl);
    assemble(o);
    return factored.ok;
}

// Factor the KKT matrix for θ, ρ and δ. With `COMPARED`, find where the pivots are significant.
template <bool COMPARED, class V, bool PRICED> QP_NOINLINE sparse::Factored<V> factor_kkt(SparseProblem<V, PRICED>& o) {
    const SparseKkt& kkt = *o.kkt;
    const Parameters& P = *o.parameters;
    using Team = sparse::Team<V, PRICED>;
    Problem<Team>& problem = o;
    auto diagonal = o.added;
    Team::each(o.rows, [&](auto i) { o.weights.set(i, 1.0 / (o.theta[i] + o.delta[i])); });
    Team::each(o.np, [&](auto j) { diagonal.set(j, o.diagonal_Q[j] + o.rho[j] + bound_weights(problem, j)); });
    for (int j = 0; j < o.n; j++) {
        o.matrix[kkt.diagonal[j]] = diagonal.data[j];
        o.units[kkt.place[j]] = o.per_D2.data[j];
    }
    Team::each(o.lp, [&](auto i) {
        auto entry = o.theta[i] + o.delta[i];
        diagonal.set(i, -select(is_finite(entry), entry, largest_root<double>));
    });
    for (int i = 0; i < o.linear; i++) {
        o.matrix[kkt.diagonal[o.n + i]] = diagonal.data[i];
        o.units[kkt.place[o.n + i]] = o.per_E2.data[i];
    }
    sparse::Pivots<V> pivots{kkt.signs.data(),     o.units, P.least_sparse_pivot, P.sparse_pivot, P.sparse_pivot_growth,
                             P.sparse_pivot_errors};
    return sparse::factor<COMPARED>(kkt.ldl, kkt.block_rows, o.matrix, pivots, o.ldl);
}

// Factor the KKT matrix for θ, ρ and δ; return whether its pivots are finite.
template <Form FORM, class V, bool PRICED>
    requires(FORM == Form::sparse_kkt)
QP_INLINE mask_of<V> factor(Problem<sparse::Team<V, PRICED>>& problem) {
    return factor_kkt<false>(static_cast<SparseProblem<V, PRICED>&>(problem)).ok;
}

// Solve for dx and dv.
template <Form FORM, class V, bool PRICED, class Vector = typename sparse::Team<V, PRICED>::Vector>
    requires(FORM == Form::sparse_kkt)
QP_NOINLINE void solve_multipliers(Problem<sparse::Team<V, PRICED>>& problem, Vector r_x, Vector r_v, Vector dx,
                                   Vector dv) {
    auto& o = static_cast<SparseProblem<V, PRICED>&>(problem);
    const SparseKkt& kkt = *o.kkt;
    using Team = sparse::Team<V, PRICED>;
    int n = o.n, low = o.at_lower(), up = o.at_upper();
    Team::each(o.np, [&](auto j) {
        auto right = r_x[j];
        if (o.lower) {
            right -= o.weights[j + low] * r_v[j + low];
        }
        if (o.upper) {
            right += o.weights[j + up] * r_v[j + up];
        }
        dx.set(j, right);
    });
    for (int j = 0; j < n; j++) {
        o.right[kkt.place[j]] = dx.data[j];
    }
    for (int i = 0; i < o.linear; i++) {
        o.right[kkt.place[n + i]] = r_v.data[i];
    }
    sparse::solve(kkt.ldl, kkt.block_rows, o.ldl, o.right);
    for (int j = 0; j < n; j++) {
        dx.data[j] = o.right[kkt.place[j]];
    }
    std::fill(dx.data + n, dx.data + o.np, V{});
    for (int i = 0; i < o.linear; i++) {
        dv.data[i] = o.right[kkt.place[n + i]];
    }
    std::fill(dv.data + o.linear, dv.data + o.lp, V{});
    Team::each(o.np, [&](auto j) {
        auto x = dx[j];
        if (o.lower) {
            dv.set(j + low, o.weights[j + low] * (-x - r_v[j + low]));
        }
        if (o.upper) {
            dv.set(j + up, o.weights[j + up] * (x - r_v[j + up]));
        }
    });
}

} // namespace qpdiff
