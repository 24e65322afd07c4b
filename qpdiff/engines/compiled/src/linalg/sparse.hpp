// Sparse linear algebra: matrices of one pattern, and the factorisation of symmetric quasidefinite ones,
//
//     P M Pᵀ = L D Lᵀ,
//
// for one problem or for one in each lane. The symbolic analysis depends on the pattern alone and is made once for all
// problems and all iterations; the numeric part is up-looking (Davis, Direct Methods for Sparse Linear Systems, SIAM
// 2006, chapter 4), with the pattern of each row of L stored instead of found again. L exists for any order of a
// quasidefinite matrix, with pivots of known signs (Vanderbei, 1995), so no order depends on numbers.
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

// Consecutive rows of L that one problem computes together, one in each entry of a pack: those whose entries are in
// about the same columns. For each group of several rows, the columns before it that have an entry in one of them.
struct RowGroups {
    static constexpr int MOST = width<double>;
    struct Column {
        int column, first, last; // the places of its entries in the group
    };
    std::vector<int> rows;   // the first row of each group, and the number of rows
    std::vector<int> starts; // where the columns of each group begin; those of a single row are not listed
    std::vector<Column> columns;
};

// The symbolic analysis of a matrix given by its upper triangle in compressed columns, which is the lower triangle in
// compressed rows.
class LdlPattern {
  public:
    int n = 0;
    std::vector<int> starts, rows;     // of the matrix: where each column begins, and the row of each entry
    std::vector<int> L_starts, L_rows; // of L, likewise, without its diagonal of ones
    std::vector<int> R_starts, R_cols; // of the rows of L: the columns of their entries, ascending
    std::vector<int> R_places;         // where each of these entries is in the columns of L
    RowGroups groups;
    bool chained = false; // whether most columns have an entry in the next row

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
        group_rows();
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

  private:
    // The time of a loop over a column, of one for a group and of an operation there, in operations for one row.
    static constexpr double COLUMN = 6, GROUP_COLUMN = 14, GROUP_OPERATION = 1.5, GROUP_ROW = 20;

    // Divide the rows into groups. From each row on, as many are taken together as save most of the time that they take
    // one by one.
    void group_rows() {
        std::vector<int> where(n, -1); // of the columns of a group
        std::vector<RowGroups::Column> found, chosen;
        groups.rows.assign(1, 0);
        groups.starts.assign(1, 0);
        for (int k = 0; k < n; k = groups.rows.back()) {
            double alone = 0, together = 0, saved = 0;
            int next = k + 1;
            found.clear();
            for (int row = k; row < std::min(n, k + RowGroups::MOST); row++) {
                for (int entry = R_starts[row]; entry < R_starts[row + 1]; entry++) {
                    int column = R_cols[entry], place = R_places[entry], above = place - L_starts[column];
                    alone += COLUMN + above;
                    together += GROUP_OPERATION;
                    if (column < k && where[column] < 0) {
                        where[column] = int(found.size());
                        found.push_back({column, place, place + 1});
                        together += GROUP_COLUMN + GROUP_OPERATION * above;
                    } else if (column < k) {
                        found[where[column]].last++;
                    }
                }
                together += GROUP_ROW;
                if (row > k && alone - together > saved) {
                    saved = alone - together;
                    next = row + 1;
                    chosen = found;
                }
            }
            for (const auto& each : found) {
                where[each.column] = -1;
            }
            if (saved > 0) {
                std::sort(chosen.begin(), chosen.end(), [](auto& a, auto& b) { return a.column < b.column; });
                groups.columns.insert(groups.columns.end(), chosen.begin(), chosen.end());
            }
            groups.rows.push_back(next);
            groups.starts.push_back(int(groups.columns.size()));
        }
    }
};

// The pivots that a factorisation has to end with, against rounding errors.
template <class V> struct Pivots {
    const scalar_of<V>* signs; // 1 or −1 for each pivot
    const V* units;            // positive: what its size is measured in
    // A pivot below `least` units, or of the other sign, becomes `replacement` units, or `growth` times as large where
    // that is more: it is a rounding error, as large as those of the entries that it divides.
    scalar_of<V> least, replacement, growth;
};

// The arrays that a factorisation fills.
template <class V> struct Factor {
    V* L = nullptr;       // entries in the order of `LdlPattern::L_rows`
    V* inverse = nullptr; // 1 / D
    V* work = nullptr;    // n zeros, which are zeros again afterwards
    V* of_rows = nullptr; // as many zeros for each entry of a pack, for one problem
};

// What the pivots of a factorisation turned out to be.
template <class V> struct Factored {
    mask_of<V> ok;          // whether all are finite
    mask_of<V> significant; // whether all are above so many rounding errors of their terms as was asked for
};

// A factorisation in progress.
template <bool COMPARED, class V> class Factorization {
  public:
    using Real = scalar_of<V>;

    Factorization(const LdlPattern& p, const V* M, const Pivots<V>& pivots, const Factor<V>& f, Real errors)
        : p(p), L_starts(p.L_starts.data()), L_rows(p.L_rows.data()), M(M), pivots(pivots), f(f), errors(errors) {}

    // Compute row k of L, and its pivot.
    QP_INLINE void factor_row(int k) {
        V* y = f.work;
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
        put_pivot(k, d, size);
    }

    // Compute a group of rows of L, and their pivots, for one problem. An entry of a pack is a row.
    QP_INLINE void factor_rows(int group)
        requires(!is_vector<V>)
    {
        using Pack = pack_of<V>;
        constexpr int W = width<V>;
        const RowGroups& g = p.groups;
        int first = g.rows[group], last = g.rows[group + 1];
        V* y = f.of_rows;
        for (int k = first; k < last; k++) {
            for (int entry = p.starts[k]; entry < p.starts[k + 1]; entry++) {
                y[W * p.rows[entry] + k - first] = M[entry];
            }
        }
        Pack sizes{};
        auto subtract = [&](int place, Pack value) {
            V* to = y + W * L_rows[place];
            store(to, load<Pack>(to) - f.L[place] * value);
        };
        for (int c = g.starts[group]; c < g.starts[group + 1]; c++) {
            const auto& [column, begin, end] = g.columns[c];
            Pack value = load<Pack>(y + W * column), scaled = value * f.inverse[column];
            store(y + W * column, Pack{});
            for (int place = begin; place < end; place++) {
                f.L[place] = scaled[L_rows[place] - first];
            }
            for (int place = L_starts[column]; place < end; place++) {
                subtract(place, value);
            }
            if constexpr (COMPARED) {
                sizes += absolute(value * scaled);
            }
        }
        for (int k = first; k < last; k++) {
            Pack value = load<Pack>(y + W * k);
            store(y + W * k, Pack{});
            put_pivot(k, value[k - first], sizes[k - first]);
            Pack scaled = value * f.inverse[k];
            for (int place = L_starts[k]; place < L_starts[k + 1] && L_rows[place] < last; place++) {
                f.L[place] = scaled[L_rows[place] - first];
                subtract(place, value);
            }
            if constexpr (COMPARED) {
                sizes += absolute(value * scaled);
            }
        }
    }

    Factored<V> result() const { return {factor_ok, significant}; }

  private:
    const LdlPattern& p;
    const int *L_starts, *L_rows;
    const V* M;
    const Pivots<V>& pivots;
    const Factor<V>& f;
    Real errors;
    mask_of<V> factor_ok = truth<mask_of<V>>(true), significant = factor_ok;

    // Store a pivot, the sum of terms of a size.
    QP_INLINE void put_pivot(int k, V d, V size) {
        auto sign = pivots.signs[k];
        V unit = pivots.units[k];
        if constexpr (COMPARED) {
            significant &= (d * sign > errors * Real(EPS) * size) | truth<mask_of<V>>(sign > 0);
        }
        V replacement = larger(pivots.replacement * unit, pivots.growth * absolute(d));
        d = select(d * sign <= pivots.least * unit, sign * replacement, d); // NaN stays
        factor_ok &= is_finite(d);
        f.inverse[k] = Real(1) / d;
    }
};

// Factor a matrix with entries in the order of `LdlPattern::rows`. With `COMPARED`, compare each pivot with so many
// rounding errors of the terms that it is the sum of.
template <bool COMPARED = false, class V>
QP_NOINLINE Factored<V> factor(const LdlPattern& p, const V* M, const Pivots<V>& pivots, Factor<V> f,
                               scalar_of<V> errors = 0) {
    Factorization<COMPARED, V> work(p, M, pivots, f, errors);
    if constexpr (is_vector<V>) {
        for (int k = 0; k < p.n; k++) {
            work.factor_row(k);
        }
    } else {
        const std::vector<int>& rows = p.groups.rows;
        for (int group = 0; group + 1 < int(rows.size()); group++) {
            if (rows[group + 1] - rows[group] > 1) {
                work.factor_rows(group);
            } else {
                work.factor_row(rows[group]);
            }
        }
    }
    return work.result();
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
            V sum{};
            for (int e = M.begin(i); e < M.end(i); e++) {
                sum += M.data[e] * x.data[M.column(e)];
            }
            out.data[i] = sum;
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
