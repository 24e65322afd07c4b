// The sparse linear algebra of the compiled engine behind a C interface, for test_sparse.py.
#include <cstring>
#include <memory>

#include "linalg/block_rows.hpp"

using namespace qpdiff;

namespace {

// Numbers of a problem each, [entry][lane]: those of the caller are [problem][entry].
template <class V> struct Numbers {
    std::unique_ptr<V[]> data;
    int count;
    Numbers(int count, const double* from = nullptr) : data(new V[sparse::Team<V>::padded(count) + 1]()), count(count) {
        constexpr int W = sizeof(V) / sizeof(double);
        for (int lane = 0; from && lane < W; lane++) {
            for (int i = 0; i < count; i++) {
                reinterpret_cast<double*>(&data[i])[lane] = from[Index(lane) * count + i];
            }
        }
    }
    void give(double* to) const {
        constexpr int W = sizeof(V) / sizeof(double);
        for (int lane = 0; lane < W; lane++) {
            for (int i = 0; i < count; i++) {
                to[Index(lane) * count + i] = reinterpret_cast<const double*>(&data[i])[lane];
            }
        }
    }
    operator V*() const { return data.get(); }
    operator typename sparse::Team<V>::Vector() const { return {data.get()}; }
};

sparse::LdlPattern analysed(int n, const int* starts, const int* rows) {
    sparse::LdlPattern p;
    p.analyse(n, {starts, starts + n + 1}, {rows, rows + starts[n]});
    return p;
}

sparse::BlockRows block_rows(const sparse::LdlPattern& p) {
    sparse::BlockRows r;
    r.analyse(p);
    return r;
}

// Factor and solve, one problem by block rows or without. Return the number of entries of L, −1 where a pivot is not
// finite; −2 where one is not more than 10 rounding errors.
template <class V, bool BLOCKS>
int ldl(int n, const int* starts, const int* rows, const double* values, const double* signs, double* x) {
    sparse::LdlPattern p = analysed(n, starts, rows);
    sparse::BlockRows r = BLOCKS ? block_rows(p) : sparse::BlockRows();
    Numbers<V> M(starts[n], values), right(n, x), L(BLOCKS ? r.size() : p.size()), inverse(n), units(n),
        work(BLOCKS ? r.longest : n);
    std::fill(units.data.get(), units.data.get() + n, V{} + 1.0);
    sparse::Factor<V> f{L, inverse, work};
    sparse::Pivots<V> pivots{signs, units, 1e-13, 1e-6, 100, 10};
    auto compared = sparse::factor<true, V>(p, r, M, pivots, f);
    auto factored = sparse::factor<false, V>(p, r, M, pivots, f);
    sparse::solve<V>(p, r, f, right);
    right.give(x);
    mask_of<V> ok = factored.ok & compared.ok;
    return !every(ok) ? -1 : !every(compared.significant) ? -2 : p.size();
}

template <class V>
void products(int rows, int columns, const int* starts, const int* of_columns, const double* values, const double* x,
              const double* y, double* Mx, double* Mty, double* row_max, double* column_max, double* squares) {
    using Team = sparse::Team<V>;
    sparse::Pattern pattern{starts, of_columns};
    Numbers<V> data(starts[rows], values), by_columns(columns, x), by_rows(rows, y), out(rows), transposed(columns),
        weighted(rows), unweighted(rows), largest(columns), squared(starts[rows]);
    sparse::Matrix<V> M{&pattern, data};
    Team::product(M, rows, columns, by_columns, out);
    Team::add_product_transposed(M, rows, columns, by_rows, transposed);
    Team::largest_of_rows(M, rows, columns, by_columns, weighted, unweighted);
    Team::largest_of_columns(M, rows, columns, by_rows, largest);
    Team::scaled_squares(M, rows, columns, by_rows, by_columns, {&pattern, squared});
    out.give(Mx), transposed.give(Mty), weighted.give(row_max), largest.give(column_max), squared.give(squares);
}

} // namespace

extern "C" {
int lanes_of_a_register() {
    return sizeof(pack_of<double>) / sizeof(double);
}

// Count the block rows of each kind.
void kinds_of_rows(int n, const int* starts, const int* rows, int* counts) {
    for (auto kind : block_rows(analysed(n, starts, rows)).kinds) {
        counts[kind]++;
    }
}

int ldl_one(int n, const int* starts, const int* rows, const double* values, const double* signs, double* x) {
    return ldl<double, true>(n, starts, rows, values, signs, x);
}
int ldl_one_without_blocks(int n, const int* starts, const int* rows, const double* values, const double* signs,
                           double* x) {
    return ldl<double, false>(n, starts, rows, values, signs, x);
}
int ldl_lanes(int n, const int* starts, const int* rows, const double* values, const double* signs, double* x) {
    return ldl<pack_of<double>, false>(n, starts, rows, values, signs, x);
}

void products_one(int rows, int columns, const int* starts, const int* of_columns, const double* values,
                  const double* x, const double* y, double* Mx, double* Mty, double* row_max, double* column_max,
                  double* squares) {
    products<double>(rows, columns, starts, of_columns, values, x, y, Mx, Mty, row_max, column_max, squares);
}
void products_lanes(int rows, int columns, const int* starts, const int* of_columns, const double* values,
                    const double* x, const double* y, double* Mx, double* Mty, double* row_max, double* column_max,
                    double* squares) {
    products<pack_of<double>>(rows, columns, starts, of_columns, values, x, y, Mx, Mty, row_max, column_max, squares);
}
}
