// Sparse linear algebra: matrices of one pattern, and the factorisation of symmetric quasidefinite ones,
//
//     P M Pᵀ = L D Lᵀ,
//
// for one problem in each lane. The symbolic analysis depends on the pattern alone and is made once for all problems
// and all iterations; the numeric part is up-looking (Davis, Direct Methods for Sparse Linear Systems, SIAM 2006,
// chapter 4), with the pattern of each row of L stored instead of found again. L exists for any order of a
// quasidefinite matrix, with pivots of known signs (Vanderbei, 1995), so no order depends on numbers. One problem is
// factored by block rows (block_rows.hpp), or as here where that would take much memory.
#pragma once
#include <algorithm>
#include <limits>
#include <vector>

#include "lanes.hpp"
#include "serial.hpp"

namespace qpdiff::sparse {

// The places of a matrix's entries in compressed rows: sorted within a row, without duplicates.
struct Pattern {
    const int* starts = nullptr; // where each row begins, and where the last one ends
    const int* columns = nullptr;
};

// A matrix of numbers or of lanes.
template <class V> struct Matrix {
    const Pattern* pattern = nullptr;
    V* data = nullptr;
    QP_INLINE int begin(int row) const { return pattern->starts[row]; }
    QP_INLINE int end(int row) const { return pattern->starts[row + 1]; }
    QP_INLINE int column(int entry) const { return pattern->columns[entry]; }
};

// ---- the factorisation

// The symbolic analysis of a matrix given by its upper triangle in compressed columns, which is the lower triangle in
// compressed rows.
class LdlPattern {
  public:
    int n = 0;
    std::vector<int> starts, rows;     // of the matrix: where each column begins, and the row of each entry
    std::vector<int> L_starts, L_rows; // of L, likewise, without its diagonal of ones
    std::vector<int> R_starts, R_cols; // of the rows of L: the columns of their entries, ascending
    std::vector<int> R_places;         // where each of these entries is in the columns of L
    bool chained = false;              // whether most columns have an entry in the next row

    // Analyse a matrix that has a diagonal. Return whether the number of entries of L is within the range of `int`.
    bool analyse(int size, std::vector<int> column_starts, std::vector<int> entry_rows) {
        n = size, starts = std::move(column_starts), rows = std::move(entry_rows);
        std::vector<int> parent(n, -1), reached(n, -1), counts(n, 0);
        R_starts.assign(n + 1, 0);
        R_cols.clear();
        for (int k = 0; k < n; k++) {
            reached[k] = k;
            for (int entry = starts[k]; entry < starts[k + 1]; entry++) {
                // The path in the elimination tree from an entry of the column up to what has been reached.
                for (int i = rows[entry]; reached[i] != k; i = parent[i]) {
                    parent[i] = parent[i] < 0 ? k : parent[i];
                    reached[i] = k;
                    R_cols.push_back(i);
                    counts[i]++;
                }
            }
            if (R_cols.size() > size_t(std::numeric_limits<int>::max())) {
                return false;
            }
            std::sort(R_cols.begin() + R_starts[k], R_cols.end());
            R_starts[k + 1] = int(R_cols.size());
        }
        L_starts.assign(n + 1, 0);
        for (int j = 0; j < n; j++) {
            L_starts[j + 1] = L_starts[j] + counts[j];
        }
        L_rows.resize(R_cols.size());
        R_places.resize(R_cols.size());
        std::vector<int> next(L_starts.begin(), L_starts.end() - 1);
        for (int k = 0; k < n; k++) {
            for (int entry = R_starts[k]; entry < R_starts[k + 1]; entry++) {
                int place = next[R_cols[entry]]++;
                R_places[entry] = place;
                L_rows[place] = k;
            }
        }
        int next_rows = 0;
        for (int j = 0; j < n; j++) {
            next_rows += L_starts[j] < L_starts[j + 1] && L_rows[L_starts[j]] == j + 1;
        }
        chained = 2 * next_rows > n;
        return true;
    }

    // Return the number of entries of L.
    int size() const { return int(L_rows.size()); }

    // Return the multiplications of a factorisation.
    double operations() const {
        double sum = 0;
        for (int j = 0; j < n; j++) {
            sum += square(double(L_starts[j + 1] - L_starts[j]));
        }
        return sum;
    }
};

// The pivots that a factorisation has to end with, against rounding errors.
template <class V> struct Pivots {
    const scalar_of<V>* signs; // 1 or −1 for each pivot
    const V* units;            // positive: what its size is measured in
    // A pivot below `least` units, or of the other sign, becomes `replacement` units, or `growth` times as large where
    // that is more: it is a rounding error, as large as those of the entries that it divides.
    scalar_of<V> least, replacement, growth;
    scalar_of<V> errors = 0; // rounding errors of its terms that a significant pivot is larger than
};

// The arrays that a factorisation fills.
template <class V> struct Factor {
    V* L = nullptr;       // entries in the order of `LdlPattern::L_rows`; of `BlockRows`, if that is used, in its order
    V* inverse = nullptr; // 1 / D
    V* work = nullptr;    // n zeros, which are zeros again afterwards; or memory for a row of `BlockRows`
};

// What the pivots of a factorisation turned out to be.
template <class V> struct Factored {
    mask_of<V> ok = truth<mask_of<V>>(true); // whether all are finite
    mask_of<V> significant = ok; // whether all are above so many rounding errors of their terms as was asked for

    // Take the next pivot, the sum of terms of a size; return it, or what takes its place.
    template <bool COMPARED> QP_INLINE V take(const Pivots<V>& pivots, int k, V d, V size) {
        using Real = scalar_of<V>;
        auto sign = pivots.signs[k];
        V unit = pivots.units[k];
        if constexpr (COMPARED) {
            significant &= (d * sign > pivots.errors * Real(EPS) * size) | truth<mask_of<V>>(sign > 0);
        }
        auto wrong = d * sign <= pivots.least * unit;
        if (is_vector<V> || some(wrong)) { // a branch for one problem, whose next pivots wait for this one; NaN stays
            V replacement = larger(pivots.replacement * unit, pivots.growth * absolute(d));
            d = select(wrong, sign * replacement, d);
        }
        ok &= is_finite(d);
        return d;
    }
};

// Factor a matrix with entries in the order of `LdlPattern::rows`. With `COMPARED`, compare each pivot with rounding
// errors of the terms that it is the sum of.
template <bool COMPARED = false, class V>
QP_NOINLINE Factored<V> factor(const LdlPattern& p, const V* M, const Pivots<V>& pivots, Factor<V> f) {
    const int *L_starts = p.L_starts.data(), *L_rows = p.L_rows.data();
    V* y = f.work;
    Factored<V> all;
    for (int k = 0; k < p.n; k++) {
        V d{}, size{};
        for (int entry = p.starts[k]; entry < p.starts[k + 1]; entry++) {
            int i = p.rows[entry];
            (i == k ? d : y[i]) = M[entry];
        }
        for (int entry = p.R_starts[k]; entry < p.R_starts[k + 1]; entry++) {
            int column = p.R_cols[entry], end = p.R_places[entry];
            V value = y[column];
            y[column] = V{};
            for (int place = L_starts[column]; place < end; place++) {
                y[L_rows[place]] -= f.L[place] * value;
            }
            V scaled = value * f.inverse[column], part = value * scaled;
            d -= part;
            if constexpr (COMPARED) {
                size += absolute(part);
            }
            f.L[end] = scaled;
        }
        f.inverse[k] = scalar_of<V>(1) / all.template take<COMPARED>(pivots, k, d, size);
    }
    return all;
}

// Solve with the factor, in place. With `CHAINED`, what goes from a column to the next one stays in a register; by way
// of memory it would take several times as long.
template <bool CHAINED, class V> QP_NOINLINE void solve(const LdlPattern& p, const Factor<V>& f, V* x) {
    const int *starts = p.L_starts.data(), *rows = p.L_rows.data();
    auto is_next = [&](int j) { return CHAINED && starts[j] < starts[j + 1] && rows[starts[j]] == j + 1; };
    V handed{};
    for (int j = 0; j < p.n; j++) {
        V value = x[j] - handed;
        bool next = is_next(j);
        x[j] = value;
        handed = next ? f.L[starts[j]] * value : V{};
        for (int place = starts[j] + next; place < starts[j + 1]; place++) {
            x[rows[place]] -= f.L[place] * value;
        }
    }
    V behind{};
    for (int j = p.n - 1; j >= 0; j--) {
        V value = x[j] * f.inverse[j];
        bool next = is_next(j);
        for (int place = starts[j] + next; place < starts[j + 1]; place++) {
            value -= f.L[place] * x[rows[place]];
        }
        behind = next ? value - f.L[starts[j]] * behind : value;
        x[j] = behind;
    }
}
template <class V> QP_INLINE void solve(const LdlPattern& p, const Factor<V>& f, V* x) {
    p.chained ? solve<true, V>(p, f, x) : solve<false, V>(p, f, x);
}

// ---- the team

// The team of one thread and one problem (V is a number), or one in each lane, with sparse matrices. All but these is
// that of the team for dense ones: its vectors, their padding and the loops over them.
template <class V, bool OF_PRICED = false>
struct Team : std::conditional_t<is_vector<V>, lanes::Team, serial::Team<V>> {
    using Base = std::conditional_t<is_vector<V>, lanes::Team, serial::Team<V>>;
    using Truth = typename Base::Truth;
    using Vector = typename Base::Vector;
    using Matrix = sparse::Matrix<V>;
    using Indices = int*;
    static constexpr bool SPARSE = true;
    static constexpr bool PRICED = OF_PRICED;

    // Set the entries of a vector to 0, with its padding.
    static QP_INLINE void clear(Vector a, int count) { std::fill(a.data, a.data + Base::padded(count), V{}); }

    // Call f(row, column, entry of M) for all entries.
    template <class F> static QP_INLINE void each_entry(Matrix M, int rows, F f) {
        for (int i = 0; i < rows; i++) {
            for (int e = M.begin(i); e < M.end(i); e++) {
                f(i, M.column(e), M.data[e]);
            }
        }
    }

    // Compute out = M x.
    static QP_NOINLINE void product(Matrix M, int rows, int, Vector x, Vector out) {
        for (int i = 0; i < rows; i++) {
            V sum{}, other{}; // an addition need not wait for the one before
            int e = M.begin(i), end = M.end(i);
            for (; e + 2 <= end; e += 2) {
                sum += M.data[e] * x.data[M.column(e)];
                other += M.data[e + 1] * x.data[M.column(e + 1)];
            }
            if (e < end) {
                sum += M.data[e] * x.data[M.column(e)];
            }
            out.data[i] = sum + other;
        }
        std::fill(out.data + rows, out.data + Base::padded(rows), V{});
    }

    // Compute out += Mᵀx.
    static QP_NOINLINE void add_product_transposed(Matrix M, int rows, int, Vector x, Vector out) {
        each_entry(M, rows, [&](int i, int j, V entry) { out.data[j] += entry * x.data[i]; });
    }

    // Compute out_ij = (M_ij of_rows_i of_columns_j)², on the pattern of M.
    static QP_NOINLINE void scaled_squares(Matrix M, int rows, int, Vector of_rows, Vector of_columns, Matrix out) {
        V* to = out.data;
        each_entry(M, rows,
                   [&](int i, int j, V entry) { *to++ = square(entry * of_rows.data[i] * of_columns.data[j]); });
    }

    // Compute weighted_i = max_j |M_ij| weights_j and unweighted_i = max_j |M_ij|.
    static QP_NOINLINE void largest_of_rows(Matrix M, int rows, int, Vector weights, Vector weighted,
                                            Vector unweighted) {
        clear(weighted, rows), clear(unweighted, rows);
        each_entry(M, rows, [&](int i, int j, V entry) {
            weighted.data[i] = larger(absolute(entry) * weights.data[j], weighted.data[i]);
            unweighted.data[i] = larger(absolute(entry), unweighted.data[i]);
        });
    }

    // Compute out_j = max_i |M_ij| weights_i.
    static QP_NOINLINE void largest_of_columns(Matrix M, int rows, int columns, Vector weights, Vector out) {
        clear(out, columns);
        each_entry(M, rows, [&](int i, int j, V entry) {
            out.data[j] = larger(absolute(entry) * weights.data[i], out.data[j]);
        });
    }

    // Return a number that is the same for all problems.
    static QP_INLINE int common(V number) {
        if constexpr (is_vector<V>) {
            return int(number[0]);
        } else {
            return int(number);
        }
    }
    // Update out_c with the largest a_i of those whose number is c; all problems have the same numbers.
    static QP_NOINLINE void largest_of_each(Vector numbers, int count, Vector a, Vector out, int) {
        for (int i = 0; i < count; i++) {
            V& most = out.data[common(numbers.data[i])];
            most = larger(a.data[i], most);
        }
    }
    // Set out_i to the a_c of its number c.
    static QP_NOINLINE void take_of_each(Vector numbers, int count, Vector a, Vector out) {
        for (int i = 0; i < count; i++) {
            out.data[i] = a.data[common(numbers.data[i])];
        }
    }

    // Copy the diagonal, with 0 where it has no entry.
    static QP_NOINLINE void take_diagonal(Matrix M, int n, Vector out) {
        clear(out, n);
        each_entry(M, n, [&](int i, int j, V entry) {
            if (i == j) {
                out.data[i] = entry;
            }
        });
    }

    // Return for which problems all entries are finite.
    static QP_NOINLINE Truth all_finite(Matrix M, int rows, int) {
        auto finite = truth<Truth>(true);
        each_entry(M, rows, [&](int, int, V entry) { finite &= is_finite(entry); });
        return finite;
    }
};

} // namespace qpdiff::sparse
