// Lane groups: several small problems on one thread, one in each lane of a register. Vectors and matrices of lanes, and
// the linear algebra of `serial`, which needs neither shuffles nor padding here. Loops run several sums at a time,
// which hides the latency of each addition.
#pragma once
#include "numbers.hpp"
#include "serial.hpp"

namespace qpdiff::lanes {

template <class V> struct Vector {
    V* data = nullptr;
    QP_INLINE V operator[](int i) const { return data[i]; }
    template <class A> QP_INLINE void set(int i, A value) const { data[i] = as<V>(value); }
    QP_INLINE Vector operator+(int offset) const { return {data + offset}; }
};

// The kind of each constraint, which is the same in all lanes.
template <class V> struct Kinds {
    using Mask = mask_of<V>;
    integer_of<scalar_of<V>>* is_inequality = nullptr;
    integer_of<scalar_of<V>>* is_equality = nullptr;
    QP_INLINE Mask inequality(int i) const { return Mask{} + is_inequality[i]; }
    QP_INLINE Mask equality(int i) const { return Mask{} + is_equality[i]; }
    QP_INLINE Mask absent(int i) const { return ~(inequality(i) | equality(i)); }
};

template <class V> struct Algebra {
    using Truth = mask_of<V>;
    using T = scalar_of<V>;

    // Compute row i of X = U⁻ᵀM in the columns from j to `stop`, once the rows above it are computed.
    static QP_INLINE void solve_row(Matrix<V> U, Matrix<V> X, Matrix<V> M, int i, int j, int stop, V inverse) {
        const V* m = M[i];
        V* x = X[i];
        for (; j + 4 <= stop; j += 4) {
            V s0 = m[j], s1 = m[j + 1], s2 = m[j + 2], s3 = m[j + 3];
            for (int k = 0; k < i; k++) {
                V factor = U[k][i];
                const V* above = X[k] + j;
                s0 -= factor * above[0];
                s1 -= factor * above[1];
                s2 -= factor * above[2];
                s3 -= factor * above[3];
            }
            x[j] = s0 * inverse, x[j + 1] = s1 * inverse, x[j + 2] = s2 * inverse, x[j + 3] = s3 * inverse;
        }
        for (; j < stop; j++) {
            V s = m[j];
            for (int k = 0; k < i; k++) {
                s -= U[k][i] * X[k][j];
            }
            x[j] = s * inverse;
        }
    }

    // Factor S + diagonal = UᵀU; return where it was positive definite.
    static QP_NOINLINE Truth cholesky(Matrix<V> S, const V* diagonal, Matrix<V> U, int n) {
        Truth factor_ok = ~Truth{};
        for (int i = 0; i < n; i++) {
            V pivot = S[i][i];
            if (diagonal) {
                pivot += diagonal[i];
            }
            for (int k = 0; k < i; k++) {
                pivot -= square(U[k][i]);
            }
            factor_ok &= (pivot > V{}) & (pivot < as<V>(INFINITY_));
            V inverse = T(1) / root(pivot);
            U[i][i] = inverse;
            solve_row(U, U, S, i, i + 1, n, inverse);
        }
        return factor_ok;
    }
    static QP_INLINE Truth cholesky(Matrix<V> S, Vector<V> diagonal, Matrix<V> U, int n) {
        return cholesky(S, diagonal.data, U, n);
    }

    // Solve UᵀX = B in place.
    static QP_NOINLINE void solve_transposed(Matrix<V> U, int n, Matrix<V> B, int columns) {
        for (int i = 0; i < n; i++) {
            solve_row(U, B, B, i, 0, columns, U[i][i]);
        }
    }

    // Compute C ← M + AᵀA with so many rows of A, in the upper triangle; without data M is 0.
    static QP_NOINLINE void gram(Matrix<V> M, Matrix<V> A, int rows, Matrix<V> C, int n) {
        auto start = [&](int i, int j) { return M.data ? M[i][j] : V{}; };
        int i = 0;
        for (; i + 2 <= n; i += 2) {
            for (int j = i; j + 2 <= n; j += 2) {
                V s00 = start(i, j), s01 = start(i, j + 1), s10 = start(i + 1, j), s11 = start(i + 1, j + 1);
                for (int k = 0; k < rows; k++) {
                    const V* r = A[k];
                    s00 += r[i] * r[j];
                    s01 += r[i] * r[j + 1];
                    s10 += r[i + 1] * r[j];
                    s11 += r[i + 1] * r[j + 1];
                }
                C[i][j] = s00, C[i][j + 1] = s01, C[i + 1][j] = s10, C[i + 1][j + 1] = s11;
            }
        }
        for (int k = 0; i < n && k < n; k++) {
            V s = start(k, i);
            for (int row = 0; row < rows; row++) {
                s += A[row][k] * A[row][i];
            }
            C[k][i] = s;
        }
    }

    // Solve Uᵀx = r in place.
    static QP_NOINLINE void forward(Matrix<V> U, int n, Vector<V> r) {
        V* x = r.data;
        for (int i = 0; i < n; i++) {
            const V* u = U[i];
            V entry = x[i] * u[i];
            x[i] = entry;
            for (int j = i + 1; j < n; j++) {
                x[j] -= u[j] * entry;
            }
        }
    }

    // Solve Ux = r in place.
    static QP_NOINLINE void backward(Matrix<V> U, int n, Vector<V> r) {
        V* x = r.data;
        for (int i = n - 1; i >= 0; i--) {
            V entry = x[i] * U[i][i];
            x[i] = entry;
            for (int k = 0; k < i; k++) {
                x[k] -= U[k][i] * entry;
            }
        }
    }

    // Compute out = M x.
    static QP_NOINLINE void product(Matrix<V> M, int rows, int columns, Vector<V> x, Vector<V> out) {
        int i = 0;
        for (; i + 4 <= rows; i += 4) {
            const V* a = M[i];
            const V* b = M[i + 1];
            const V* c = M[i + 2];
            const V* d = M[i + 3];
            V s0{}, s1{}, s2{}, s3{};
            for (int j = 0; j < columns; j++) {
                V y = x[j];
                s0 += a[j] * y;
                s1 += b[j] * y;
                s2 += c[j] * y;
                s3 += d[j] * y;
            }
            out.set(i, s0), out.set(i + 1, s1), out.set(i + 2, s2), out.set(i + 3, s3);
        }
        for (; i < rows; i++) {
            V s{};
            for (int j = 0; j < columns; j++) {
                s += M[i][j] * x[j];
            }
            out.set(i, s);
        }
    }

    // Compute out += Mᵀx.
    static QP_NOINLINE void add_product_transposed(Matrix<V> M, int rows, int columns, Vector<V> x, Vector<V> out) {
        int j = 0;
        for (; j + 4 <= columns; j += 4) {
            V s0 = out[j], s1 = out[j + 1], s2 = out[j + 2], s3 = out[j + 3];
            for (int i = 0; i < rows; i++) {
                const V* m = M[i] + j;
                V factor = x[i];
                s0 += m[0] * factor;
                s1 += m[1] * factor;
                s2 += m[2] * factor;
                s3 += m[3] * factor;
            }
            out.set(j, s0), out.set(j + 1, s1), out.set(j + 2, s2), out.set(j + 3, s3);
        }
        for (; j < columns; j++) {
            V s = out[j];
            for (int i = 0; i < rows; i++) {
                s += M[i][j] * x[i];
            }
            out.set(j, s);
        }
    }

    // Copy the upper triangle of n rows and columns to the lower one.
    static QP_NOINLINE void mirror(Matrix<V> S, int n) {
        for (int i = 0; i < n; i++) {
            for (int j = 0; j < i; j++) {
                S[i][j] = S[j][i];
            }
        }
    }

    // Compute out = Mᵀ.
    static QP_NOINLINE void transpose(Matrix<V> M, int rows, int columns, Matrix<V> out) {
        for (int i = 0; i < rows; i++) {
            for (int j = 0; j < columns; j++) {
                out[j][i] = M[i][j];
            }
        }
    }

    // Compute out_ij = scale_i M_ij.
    static QP_NOINLINE void scale_rows(Matrix<V> M, int rows, int columns, Vector<V> scale, Matrix<V> out) {
        for (int i = 0; i < rows; i++) {
            V factor = scale[i];
            for (int j = 0; j < columns; j++) {
                out[i][j] = factor * M[i][j];
            }
        }
    }

    // Compute out_ij = (M_ij of_rows_i of_columns_j)².
    static QP_NOINLINE void scaled_squares(Matrix<V> M, int rows, int columns, Vector<V> of_rows, Vector<V> of_columns,
                                           Matrix<V> out) {
        for (int i = 0; i < rows; i++) {
            V factor = of_rows[i];
            for (int j = 0; j < columns; j++) {
                out[i][j] = square(M[i][j] * factor * of_columns[j]);
            }
        }
    }

    // Compute weighted_i = max_j |M_ij| weights_j and unweighted_i = max_j |M_ij|.
    static QP_NOINLINE void largest_of_rows(Matrix<V> M, int rows, int columns, Vector<V> weights, Vector<V> weighted,
                                            Vector<V> unweighted) {
        for (int i = 0; i < rows; i++) {
            V with{}, without{};
            for (int j = 0; j < columns; j++) {
                V entry = absolute(M[i][j]);
                with = larger(entry * weights[j], with);
                without = larger(entry, without);
            }
            weighted.set(i, with);
            unweighted.set(i, without);
        }
    }

    // Compute out_j = max_i |M_ij| weights_i.
    static QP_NOINLINE void largest_of_columns(Matrix<V> M, int rows, int columns, Vector<V> weights, Vector<V> out) {
        for (int j = 0; j < columns; j++) {
            V most{};
            for (int i = 0; i < rows; i++) {
                most = larger(absolute(M[i][j]) * weights[i], most);
            }
            out.set(j, most);
        }
    }

    // Return for which problems all entries are finite.
    static QP_NOINLINE Truth all_finite(Matrix<V> M, int rows, int columns) {
        Truth finite = ~Truth{};
        for (Index i = 0; i < (Index)rows * columns; i++) {
            finite &= is_finite(M.data[i]);
        }
        return finite;
    }
    // Return for which problems a matrix differs from its transpose by a limit at most.
    static QP_NOINLINE Truth symmetric(Matrix<V> M, int n, V limit) {
        Truth within = ~Truth{};
        for (int i = 0; i < n; i++) {
            for (int j = 0; j < i; j++) {
                within &= absolute(M[i][j] - M[j][i]) <= limit;
            }
        }
        return within;
    }

    // Copy the diagonal.
    static QP_INLINE void take_diagonal(Matrix<V> M, int n, Vector<V> out) {
        for (int j = 0; j < n; j++) {
            out.set(j, M[j][j]);
        }
    }

    // There is no padding to fill.
    static QP_INLINE void complete_diagonal(Matrix<V>, int) {}
    static QP_INLINE void clear_padding(Matrix<V>, int) {}
};

// The team of one thread and as many problems as a register of doubles has lanes.
struct Team : Algebra<pack_of<double>> {
    using Real = double;
    using Number = pack_of<double>;
    using Exact = Number;
    using Truth = mask_of<Number>;
    using Entry = Number;
    using ExactEntry = Number;
    using Vector = lanes::Vector<Number>;
    using ExactVector = Vector;
    using Matrix = qpdiff::Matrix<Number>;
    using Kinds = lanes::Kinds<Number>;
    using Stored = Number;
    using ExactStored = Number;
    static constexpr bool lanes = true;
    static constexpr bool SPARSE = false;
    static constexpr bool PRICED = false;
    static constexpr int PROBLEMS = entries<Number>;

    static QP_INLINE int padded(int n) { return n; }
    static QP_INLINE int leading(int columns) { return columns; }
    static QP_INLINE int whole_rows(int rows) { return rows; }

    template <class F> static QP_INLINE void each(int count, F f) {
        for (int i = 0; i < count; i++) {
            f(i);
        }
    }
    template <class F> static QP_INLINE void each_of(Vector, int count, F f) { each(count, f); }
    template <class F> static QP_INLINE void each_exactly(int count, F f) { each(count, f); }

    // Return the sums of the logarithms of positive numbers.
    static QP_NOINLINE Number sum_of_logarithms(Vector a, int count) {
        Number sum{};
        for (int i = 0; i < count; i++) {
            for (int lane = 0; lane < PROBLEMS; lane++) {
                sum[lane] += std::log(a.data[i][lane]);
            }
        }
        return sum;
    }

    static QP_INLINE Number sum(Number a) { return a; }
    static QP_INLINE Number largest(Number a) { return a; }
    static QP_INLINE Number smallest(Number a) { return a; }
    static QP_INLINE Truth all(Truth m) { return m; }
    template <class... R> static QP_INLINE void reduce(R... reductions) { (reductions.template finish<Team>(), ...); }
};

} // namespace qpdiff::lanes
