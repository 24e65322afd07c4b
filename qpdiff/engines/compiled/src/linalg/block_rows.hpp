// The factorisation of sparse.hpp for one problem, by block rows. The rows of L are single, or wide: as many together
// as a pack has entries. A block is where a single or wide row meets a column, or as many as are rows of a wide one.
// Those that have an entry of L are stored, with zeros for what they lack.
//
// A block is the matrix's less products of blocks to the left, which the symbolic analysis lists: the numeric part
// neither searches nor adds up in memory, where each sum would wait for the one before.
#pragma once
#include <algorithm>
#include <limits>
#include <vector>

#include "sparse.hpp"

namespace qpdiff::sparse {

// The symbolic analysis.
class BlockRows {
  public:
    static constexpr int W = width<double>;
    // The kinds of block rows: a wide one; a single one with a block of several columns, or without; and one of these
    // whose last entry is in the column of the row before, which is another of these.
    enum Kind : char { WIDE, MIXED, SCALAR, CHAINED };
    // A wide row's blocks have a pack for each column, with an entry of each row; those of a single row are a pack or a
    // number.
    struct Block {
        int place;    // where it is in L
        int triangle; // of several columns, where the triangle of the row that they belong to is in L; else −1
        int entry;    // in a scalar row: the entry of the matrix there, or where a zero is behind all entries
        int wide_products, products; // where its products over several columns end, and those over one
        bool is_wide() const { return triangle >= 0; }
    };
    // What is to be subtracted: a block of LD to the left times one of the row that the columns belong to.
    struct Product {
        int of_row;    // where the one is, in the row
        int of_column; // where the other is, in L
    };

    int count = 0;           // of block rows
    int leaves = 0;          // those before the first that has an entry; all are single
    int longest = 0;         // numbers in the longest one
    bool usable = false;     // whether the lists of products are not too long
    std::vector<Kind> kinds; // of each block row
    std::vector<int> first;  // its first row; behind it, the number of rows
    std::vector<int> starts; // where its blocks begin, and where those of the last one end
    std::vector<int> places; // where it begins in L, and where the last one ends
    std::vector<Block> blocks;
    std::vector<int> columns; // the first one of each block
    std::vector<Product> products;
    std::vector<int> at; // where, in its row, each entry of the matrix is

    // Return the numbers that L takes. A wide row's blocks are followed by the triangle on the diagonal, by columns and
    // then by rows.
    int size() const { return places.back(); }
    int triangle_of(int row) const { return places[row + 1] - 2 * W * W; }
    int end_of_blocks(int row) const { return kinds[row] == WIDE ? triangle_of(row) : places[row + 1]; }

    void analyse(const LdlPattern& p) {
        choose_rows(p);
        std::vector<int> row_of(p.n), where(count, -1), met;
        for (int row = 0; row < count; row++) {
            std::fill(row_of.begin() + first[row], row_of.begin() + first[row + 1], row);
        }
        at.resize(p.rows.size());
        starts.assign(1, 0), places.assign(1, 0);
        for (int row = 0; row < count; row++) {
            int begin = first[row], end = first[row + 1], height = end - begin;
            met.clear();
            for (int e = p.R_starts[begin]; e < p.R_starts[end]; e++) {
                int column = row_of[p.R_cols[e]];
                if (column != row && where[column] < 0) {
                    where[column] = 0;
                    met.push_back(column);
                }
            }
            std::sort(met.begin(), met.end());
            Index place = places[row];
            for (int column : met) {
                where[column] = int(place - places[row]);
                add_block(column, int(place), int(p.rows.size()), where);
                place += height * (first[column + 1] - first[column]);
            }
            int numbers = int(place - places[row]);
            place += height > 1 ? 2 * W * W : 0;
            constexpr size_t LARGEST = std::numeric_limits<int>::max();
            size_t most_products = std::min(LARGEST, MOST_PRODUCTS * (size_t(p.size()) + size_t(p.n)));
            usable = size_t(place) <= LARGEST && products.size() <= most_products;
            if (!usable) {
                *this = BlockRows();
                return;
            }
            for (int k = begin; k < end; k++) {
                for (int e = p.starts[k]; e < p.starts[k + 1]; e++) {
                    int column = row_of[p.rows[e]];
                    at[e] =
                        (column == row ? numbers : where[column]) + (p.rows[e] - first[column]) * height + k - begin;
                    if (column != row) {
                        auto found = std::lower_bound(met.begin(), met.end(), column);
                        blocks[starts[row] + (found - met.begin())].entry = e;
                    }
                }
            }
            for (int column : met) {
                where[column] = -1;
            }
            kinds.push_back(kind_of(row, met));
            starts.push_back(int(blocks.size()));
            places.push_back(int(place));
            longest = std::max(longest, numbers + height * height);
            leaves += leaves == row && met.empty() && height == 1;
        }
    }

  private:
    static constexpr size_t MOST_PRODUCTS = 16; // for each entry of L and each row
    // The time of an entry of L, of a wide row and of a pack in it, and of its products, in those of a single row.
    static constexpr double ENTRY = 6, WIDE_ROW = 30 * W, WIDE_COLUMN = 18, WIDE_PRODUCT = 0.5;
    std::vector<int> numbers; // of the block row that the columns of each block belong to

    // Choose the wide rows: those that together save the most time.
    void choose_rows(const LdlPattern& p) {
        std::vector<int> reached(p.n, -1);
        std::vector<double> saved(p.n + 1, 0);
        std::vector<bool> together(p.n, false);
        for (int k = p.n - W; k >= 0; k--) {
            double gain = saving(p, k, reached) + saved[k + W];
            together[k] = gain > saved[k + 1];
            saved[k] = std::max(gain, saved[k + 1]);
        }
        for (int k = 0; k < p.n; k += together[k] ? W : 1) {
            first.push_back(k);
        }
        count = int(first.size());
        first.push_back(p.n);
    }

    // Return the time that a wide row saves.
    static double saving(const LdlPattern& p, int k, std::vector<int>& reached) {
        double single = 0, wide = WIDE_ROW;
        for (int e = p.R_starts[k]; e < p.R_starts[k + W]; e++) {
            int column = p.R_cols[e], above = p.R_places[e] - p.L_starts[column];
            single += ENTRY + above;
            if (column < k && reached[column] != k) {
                reached[column] = k;
                wide += WIDE_COLUMN + WIDE_PRODUCT * (above + W);
            }
        }
        return single - wide;
    }

    // Add a block at the columns of a row, with its products with the blocks before it, of which `where` says where
    // they are in the row.
    void add_block(int row, int place, int no_entry, const std::vector<int>& where) {
        auto add_products = [&](bool wide) {
            for (int b = starts[row]; b < starts[row + 1]; b++) {
                if (blocks[b].is_wide() == wide && where[numbers[b]] >= 0) {
                    products.push_back({where[numbers[b]], blocks[b].place});
                }
            }
            return int(products.size());
        };
        int wide = add_products(true), all = add_products(false);
        blocks.push_back({place, kinds[row] == WIDE ? triangle_of(row) : -1, no_entry, wide, all});
        columns.push_back(first[row]);
        numbers.push_back(row);
    }

    // Return the kind of a row, from the rows that its columns belong to.
    Kind kind_of(int row, const std::vector<int>& met) const {
        if (first[row + 1] - first[row] > 1) {
            return WIDE;
        }
        if (std::any_of(met.begin(), met.end(), [&](int column) { return kinds[column] == WIDE; })) {
            return MIXED;
        }
        bool chained = row > leaves && !met.empty() && met.back() == row - 1 && kinds[row - 1] >= SCALAR;
        return chained ? CHAINED : SCALAR;
    }
};

// The numeric part.
template <bool COMPARED> class BlockFactorization {
  public:
    BlockFactorization(const LdlPattern& p, const BlockRows& r, const double* M, const Pivots<double>& pivots,
                       const Factor<double>& f)
        : p(p), r(r), M(M), pivots(pivots), f(f) {}

    Factored<double> run() {
        invert_leaves();
        for (int row = r.leaves; row < r.count;) {
            switch (r.kinds[row]) {
            case BlockRows::WIDE:
                factor<true>(row++);
                break;
            case BlockRows::MIXED:
                factor<false>(row++);
                break;
            default:
                row = factor_scalars(row);
            }
        }
        return all;
    }

  private:
    static constexpr int W = BlockRows::W;
    using Pack = pack_of<double>;
    using Block = BlockRows::Block;
    using Product = BlockRows::Product;
    const LdlPattern& p;
    const BlockRows& r;
    const double* M;
    const Pivots<double>& pivots;
    const Factor<double>& f;
    Factored<double> all;

    void invert(int k, double d, double size) { f.inverse[k] = 1.0 / all.template take<COMPARED>(pivots, k, d, size); }

    // The first rows have no entry but that on the diagonal.
    QP_NOINLINE void invert_leaves() {
        for (int k = 0; k < r.leaves; k++) {
            invert(k, M[k], 0.0);
        }
    }

    // Factor the scalar rows from one on, up to the next of another kind, which is returned.
    QP_NOINLINE int factor_scalars(int row) {
        const int *first = r.first.data(), *starts = r.starts.data(), *places = r.places.data();
        const int *columns = r.columns.data(), *matrix_starts = p.starts.data();
        const BlockRows::Kind* kinds = r.kinds.data();
        const Block* blocks = r.blocks.data();
        const Product* products = r.products.data();
        const double *L = f.L, *inverse = f.inverse;
        double* y = f.work;
        Factored<double> found = all;
        int b = starts[row], product = b ? blocks[b - 1].products : 0;
        for (; row < r.count && kinds[row] >= BlockRows::SCALAR; row++) {
            int begin = b, k = first[row];
            double d = M[matrix_starts[k + 1] - 1], size = 0;
            double* l = f.L + places[row];
            for (int end = starts[row + 1]; b < end; b++) {
                double sum = M[blocks[b].entry];
                for (int last = blocks[b].products; product < last; product++) {
                    asm("" : "+r"(product)); // vectorised it would take longer
                    sum -= y[products[product].of_row] * L[products[product].of_column];
                }
                double scaled = sum * inverse[columns[b]], part = sum * scaled;
                y[b - begin] = sum;
                l[b - begin] = scaled;
                d -= part;
                if constexpr (COMPARED) {
                    size += absolute(part);
                }
            }
            f.inverse[k] = 1.0 / found.template take<COMPARED>(pivots, k, d, size);
        }
        all = found;
        return row;
    }

    // Factor a wide or a mixed row.
    template <bool WIDE> QP_NOINLINE void factor(int row) {
        constexpr int HEIGHT = WIDE ? W : 1;
        int first = r.first[row], size = r.end_of_blocks(row) - r.places[row];
        double *y = f.work, *L = f.L;
        std::fill(y, y + size + HEIGHT * HEIGHT, 0.0);
        for (int e = p.starts[first]; e < p.starts[first + HEIGHT]; e++) {
            y[r.at[e]] = M[e];
        }
        for (int b = r.starts[row]; b < r.starts[row + 1]; b++) {
            const Block& block = r.blocks[b];
            double *u = y + (block.place - r.places[row]), *l = L + block.place;
            const double* inverse = f.inverse + r.columns[b];
            if constexpr (WIDE) {
                block.is_wide() ? factor_square(block, b, u, l, inverse) : factor_column(block, b, u, l, *inverse);
            } else {
                block.is_wide() ? factor_pack(block, b, u, l, inverse) : factor_number(block, b, u, l, *inverse);
            }
        }
        if constexpr (WIDE) {
            factor_triangle(first, y, L + r.places[row], size);
        } else {
            double d = y[size], terms = 0;
            for (int i = 0; i < size; i++) {
                double part = y[i] * L[r.places[row] + i];
                d -= part;
                terms += absolute(part);
            }
            invert(first, d, terms);
        }
    }

    // Call wide(of the row, of the columns) for the products of block b over several columns, and single(...) for those
    // over one.
    template <class Wide, class Single>
    QP_INLINE void each_product(const Block& block, int b, Wide wide, Single single) const {
        const Product* products = r.products.data();
        const double *y = f.work, *L = f.L;
        int product = b ? r.blocks[b - 1].products : 0;
        for (; product < block.wide_products; product++) {
            wide(y + products[product].of_row, L + products[product].of_column);
        }
        for (; product < block.products; product++) {
            single(y + products[product].of_row, L + products[product].of_column);
        }
    }

    // A block of several rows and columns.
    QP_INLINE void factor_square(const Block& block, int b, double* u, double* l, const double* inverse) {
        Pack sum[W];
        for (int j = 0; j < W; j++) {
            sum[j] = load<Pack>(u + j * W);
        }
        each_product(
            block, b,
            [&](const double* a, const double* c) {
                for (int k = 0; k < W; k++) {
                    subtract(sum, load<Pack>(a + k * W), c + k * W);
                }
            },
            [&](const double* a, const double* c) { subtract(sum, load<Pack>(a), c); });
        solve_triangle<0>(sum, f.L + block.triangle);
        for (int j = 0; j < W; j++) {
            store(u + j * W, sum[j]);
            store(l + j * W, sum[j] * inverse[j]);
        }
    }

    // One of several rows and one column.
    QP_INLINE void factor_column(const Block& block, int b, double* u, double* l, double inverse) {
        Pack sum = load<Pack>(u);
        each_product(
            block, b,
            [&](const double* a, const double* c) {
                for (int k = 0; k < W; k++) {
                    sum -= load<Pack>(a + k * W) * c[k];
                }
            },
            [&](const double* a, const double* c) { sum -= load<Pack>(a) * *c; });
        store(u, sum);
        store(l, sum * inverse);
    }

    // One of a row and several columns.
    QP_INLINE void factor_pack(const Block& block, int b, double* u, double* l, const double* inverse) {
        Pack sum = load<Pack>(u);
        each_product(
            block, b,
            [&](const double* a, const double* c) {
                for (int k = 0; k < W; k++) {
                    sum -= a[k] * load<Pack>(c + k * W);
                }
            },
            [&](const double* a, const double* c) { sum -= *a * load<Pack>(c); });
        const double* triangle = f.L + block.triangle;
        for (int j = 0; j < W - 1; j++) {
            sum -= sum[j] * load<Pack>(triangle + j * W);
        }
        store(u, sum);
        store(l, sum * load<Pack>(inverse));
    }

    // One of a row and a column.
    QP_INLINE void factor_number(const Block& block, int b, double* u, double* l, double inverse) {
        Pack parts{};
        double sum = *u;
        each_product(
            block, b, [&](const double* a, const double* c) { parts += load<Pack>(a) * load<Pack>(c); },
            [&](const double* a, const double* c) { sum -= *a * *c; });
        sum -= total(parts);
        *u = sum;
        *l = sum * inverse;
    }

    // Factor the block on the diagonal of a wide row, from the numbers of LD in the row.
    QP_NOINLINE void factor_triangle(int first, const double* y, double* L, int size) {
        Pack S[W], terms{};
        for (int j = 0; j < W; j++) {
            S[j] = load<Pack>(y + size + j * W);
        }
        for (int k = 0; k < size; k += W) {
            Pack u = load<Pack>(y + k);
            subtract(S, u, L + k);
            if constexpr (COMPARED) {
                terms += absolute(u * load<Pack>(L + k));
            }
        }
        eliminate<0>(first, S, terms, L + size);
    }
    template <int J> QP_INLINE void eliminate(int first, Pack (&S)[W], Pack& terms, double* triangle) {
        if constexpr (J < W) {
            invert(first + J, S[J][J], COMPARED ? terms[J] : 0.0);
            Pack u = S[J], l = u * f.inverse[first + J];
            for (int i = 0; i <= J; i++) {
                l[i] = 0;
            }
            store(triangle + J * W, l);
            for (int i = 0; i < W; i++) {
                triangle[W * W + i * W + J] = l[i];
            }
            for (int i = J + 1; i < W; i++) {
                S[i] -= u * l[i];
            }
            if constexpr (COMPARED) {
                terms += absolute(u * l);
            }
            eliminate<J + 1>(first, S, terms, triangle);
        }
    }

    // Subtract a bⱼ from sumⱼ.
    static QP_INLINE void subtract(Pack (&sum)[W], Pack a, const double* b) {
        for (int j = 0; j < W; j++) {
            sum[j] -= a * b[j];
        }
    }
    // Solve Y Lᵀ = X in place, for a triangle L by columns.
    template <int J> static QP_INLINE void solve_triangle(Pack (&x)[W], const double* triangle) {
        if constexpr (J < W) {
            for (int i = J + 1; i < W; i++) {
                x[i] -= x[J] * triangle[J * W + i];
            }
            solve_triangle<J + 1>(x, triangle);
        }
    }
};

// Solves with the factor, in place.
class BlockSolve {
  public:
    BlockSolve(const BlockRows& r, const Factor<double>& f, double* x) : r(r), f(f), x(x) {}

    void run() {
        for (int row = r.leaves; row < r.count;) {
            switch (r.kinds[row]) {
            case BlockRows::WIDE:
                forward_wide(row++);
                break;
            case BlockRows::MIXED:
                forward_mixed(row++);
                break;
            default:
                row = forward_scalars(row);
            }
        }
        for (int i = 0; i < r.first[r.count]; i++) {
            x[i] *= f.inverse[i];
        }
        for (int row = r.count - 1; row >= r.leaves;) {
            switch (r.kinds[row]) {
            case BlockRows::WIDE:
                backward_wide(row--);
                break;
            case BlockRows::MIXED:
                backward_mixed(row--);
                break;
            default:
                row = backward_scalars(row);
            }
        }
    }

  private:
    static constexpr int W = BlockRows::W, LONG = 8;
    using Pack = pack_of<double>;
    const BlockRows& r;
    const Factor<double>& f;
    double* x;

    // Solve for the scalar rows from one on, up to the next of another kind, which is returned. What goes from a row to
    // the next one stays in a register; by way of memory it would take several times as long.
    QP_NOINLINE int forward_scalars(int row) {
        const int *first = r.first.data(), *starts = r.starts.data(), *places = r.places.data();
        const int* columns = r.columns.data();
        const BlockRows::Kind* kinds = r.kinds.data();
        double before = 0;
        for (; row < r.count && kinds[row] >= BlockRows::SCALAR; row++) {
            bool chained = kinds[row] == BlockRows::CHAINED;
            int b = starts[row], end = starts[row + 1] - chained, k = first[row];
            const double* l = f.L + places[row] - b;
            double sum = x[k];
            if (end - b >= LONG) { // an addition need not wait for the one before
                double second = 0, third = 0, fourth = 0;
                for (; b + 4 <= end; b += 4) {
                    asm("" : "+r"(b)); // vectorised it would take longer
                    sum -= l[b] * x[columns[b]];
                    second -= l[b + 1] * x[columns[b + 1]];
                    third -= l[b + 2] * x[columns[b + 2]];
                    fourth -= l[b + 3] * x[columns[b + 3]];
                }
                sum += second + (third + fourth);
            }
            for (; b < end; b++) {
                asm("" : "+r"(b));
                sum -= l[b] * x[columns[b]];
            }
            if (chained) {
                sum -= l[b] * before;
            }
            x[k] = before = sum;
        }
        return row;
    }
    QP_NOINLINE int backward_scalars(int row) {
        const int *first = r.first.data(), *starts = r.starts.data(), *places = r.places.data();
        const int* columns = r.columns.data();
        const BlockRows::Kind* kinds = r.kinds.data();
        double handed = 0;
        for (; row >= r.leaves && kinds[row] >= BlockRows::SCALAR; row--) {
            bool chained = kinds[row] == BlockRows::CHAINED;
            int b = starts[row], end = starts[row + 1] - chained, k = first[row];
            const double* l = f.L + places[row] - b;
            double value = x[k] - handed;
            x[k] = value;
            for (; b < end; b++) {
                x[columns[b]] -= l[b] * value;
            }
            handed = chained ? l[b] * value : 0;
        }
        return row;
    }

    // Call f(a block, its columns of x, whether they are several) for the blocks of a row.
    template <class F> QP_INLINE void each_block(int row, F function) const {
        for (int b = r.starts[row]; b < r.starts[row + 1]; b++) {
            function(f.L + r.blocks[b].place, x + r.columns[b], r.blocks[b].is_wide());
        }
    }

    QP_NOINLINE void forward_mixed(int row) {
        double sum = x[r.first[row]];
        Pack parts{};
        each_block(row, [&](const double* l, const double* c, bool wide) {
            if (wide) {
                parts += load<Pack>(l) * load<Pack>(c);
            } else {
                sum -= *l * *c;
            }
        });
        x[r.first[row]] = sum - total(parts);
    }
    QP_NOINLINE void backward_mixed(int row) {
        double value = x[r.first[row]];
        each_block(row, [&](const double* l, double* c, bool wide) {
            if (wide) {
                store(c, load<Pack>(c) - load<Pack>(l) * value);
            } else {
                *c -= *l * value;
            }
        });
    }

    QP_NOINLINE void forward_wide(int row) {
        double* own = x + r.first[row];
        Pack sum = load<Pack>(own), other{}; // a subtraction need not wait for the one before
        each_block(row, [&](const double* l, const double* c, bool wide) {
            if (wide) {
                Pack parts[2]{};
                for (int k = 0; k < W; k++) {
                    parts[k % 2] += load<Pack>(l + k * W) * c[k];
                }
                sum -= parts[0], other += parts[1];
            } else {
                other += load<Pack>(l) * *c;
            }
        });
        sum -= other;
        const double* triangle = f.L + r.triangle_of(row);
        for (int k = 0; k < W - 1; k++) {
            sum -= load<Pack>(triangle + k * W) * sum[k];
        }
        store(own, sum);
    }
    QP_NOINLINE void backward_wide(int row) {
        double* own = x + r.first[row];
        Pack value = load<Pack>(own);
        const double* by_rows = f.L + r.triangle_of(row) + W * W;
        for (int k = W - 1; k > 0; k--) {
            value -= load<Pack>(by_rows + k * W) * value[k];
        }
        store(own, value);
        each_block(row, [&](const double* l, double* c, bool wide) {
            if (wide) {
                Pack products[W];
                for (int k = 0; k < W; k++) {
                    products[k] = load<Pack>(l + k * W) * value;
                }
                store(c, load<Pack>(c) - totals(products));
            } else {
                *c -= total(load<Pack>(l) * value);
            }
        });
    }
};

// ---- for one problem or one in each lane

// Factor a matrix with entries in the order of `LdlPattern::rows`, and a zero behind them.
template <bool COMPARED = false, class V>
QP_INLINE Factored<V> factor(const LdlPattern& p, const BlockRows& r, const V* M, const Pivots<V>& pivots,
                             const Factor<V>& f) {
    if constexpr (!is_vector<V>) {
        if (r.usable) {
            return BlockFactorization<COMPARED>(p, r, M, pivots, f).run();
        }
    }
    return factor<COMPARED>(p, M, pivots, f);
}

template <class V> QP_INLINE void solve(const LdlPattern& p, const BlockRows& r, const Factor<V>& f, V* x) {
    if constexpr (!is_vector<V>) {
        if (r.usable) {
            BlockSolve(r, f, x).run();
            return;
        }
    }
    solve(p, f, x);
}

} // namespace qpdiff::sparse
