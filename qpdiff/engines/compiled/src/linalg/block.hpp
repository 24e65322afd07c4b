// A block of GPU threads, one problem: loops are shared among the threads, sums are reductions, and linear algebra is
// cooperative. Vectors are in shared memory, matrices there or in global memory.
//
// All threads of the block call every function, with the same arguments but for the numbers that each has accumulated
// in a loop. On entry all of memory is visible to all threads, and every function that writes to memory ends with a
// barrier, so that on return it is again. Scalars are the same in all threads.
//
// A triangular factor is upper, with the inverses of its diagonal on the diagonal; the entries below it are not used.
#pragma once
#include "numbers.hpp"

namespace qpdiff::block {

// ---- the threads: of a GPU, or emulated

#ifdef __CUDACC__
extern __shared__ double shared_memory[];
QP_INLINE int thread() {
    return int(threadIdx.x);
}
QP_INLINE int threads() {
    return int(blockDim.x);
}
QP_INLINE int first_problem() {
    return int(blockIdx.x);
}
QP_INLINE int blocks() {
    return int(gridDim.x);
}
QP_INLINE unsigned warp_mask() { // of the threads in a warp: a block may have fewer
    return blockDim.x < 32 ? (1u << blockDim.x) - 1 : 0xffffffffu;
}
#define QP_BARRIER() __syncthreads()
#define QP_WARP_BARRIER() __syncwarp(warp_mask())
#define QP_EXCHANGE(value, offset) __shfl_xor_sync(warp_mask(), value, offset)
#define QP_ROLLED _Pragma("unroll 1")
#else
// emulation.hpp defines these.
extern double* shared_memory;
int thread();
int threads();
int first_problem();
int blocks();
void wait_for_block(const char* function, int line);
void wait_for_warp(const char* function, int line);
double exchange(double value, int other, const char* function, int line);
#define QP_BARRIER() wait_for_block(__PRETTY_FUNCTION__, __LINE__)
#define QP_WARP_BARRIER() wait_for_warp(__PRETTY_FUNCTION__, __LINE__)
#define QP_EXCHANGE(value, offset) decltype(value)(exchange(value, thread() ^ (offset), __PRETTY_FUNCTION__, __LINE__))
#define QP_ROLLED
#endif

constexpr int WARP = 32;
constexpr int MOST_WARPS = 8;                       // of a block
constexpr int MOST_REDUCED = 18;                    // numbers in a reduction
constexpr int RESERVED = MOST_WARPS * MOST_REDUCED; // doubles at the beginning of shared memory, for reductions
constexpr int LANES = 8;                            // threads that work on a row of a matrix together

QP_INLINE int warp_width() {
    return threads() < WARP ? threads() : WARP;
}

// Return ab + cd with each product rounded by itself, so that the order of the two does not matter.
template <class T> QP_INLINE T sum_of_products(T a, T b, T c, T d) {
#ifdef __CUDACC__
    if constexpr (sizeof(T) == 8) {
        return __dadd_rn(__dmul_rn(a, b), __dmul_rn(c, d));
    } else {
        return __fadd_rn(__fmul_rn(a, b), __fmul_rn(c, d));
    }
#else
    return rounded(a * b) + rounded(c * d);
#endif
}

// ---- vectors in shared memory, by their places there, so that the compiler knows that that is where they are

// The index of an entry in a loop, with the type to be loaded there, so that one vector can be read in two precisions.
template <class N> struct At {
    int i;
    QP_INLINE At operator+(int offset) const { return {i + offset}; }
};

template <class T> struct Vector {
    int place = -1; // in numbers of type T; negative: none
    QP_INLINE T* data() const { return reinterpret_cast<T*>(shared_memory) + place; }
    QP_INLINE bool given() const { return place >= 0; }
    QP_INLINE T operator[](int i) const { return data()[i]; }
    template <class N> QP_INLINE N operator[](At<N> at) const { return N(data()[at.i]); }
    template <class A> QP_INLINE void set(int i, A value) const { data()[i] = T(value); }
    template <class N, class A> QP_INLINE void set(At<N> at, A value) const { data()[at.i] = T(value); }
    QP_INLINE Vector operator+(int offset) const { return {place + offset}; }
};

// The kind of each constraint.
struct Kinds {
    Vector<int> kinds{};
    template <class N> QP_INLINE bool equality(At<N> at) const { return kinds[at.i] == EQUALITY; }
    template <class N> QP_INLINE bool inequality(At<N> at) const { return kinds[at.i] == INEQUALITY; }
    template <class N> QP_INLINE bool absent(At<N> at) const { return kinds[at.i] == ABSENT; }
};

// ---- loops and reductions

// Call f for every entry.
template <class F> QP_INLINE void each(int count, F f) {
    QP_ROLLED for (int i = thread(); i < count; i += threads()) {
        f(i);
    }
    QP_BARRIER();
}

// Call f(i, j) for every entry of a matrix, in such an order that neighbouring threads have neighbouring columns.
template <class F> QP_INLINE void each_entry(int rows, int columns, F f) {
    int width = threads() < LANES ? 1 : LANES, lane = thread() % width;
    QP_ROLLED for (int i = thread() / width; i < rows; i += threads() / width) {
        QP_ROLLED for (int j = lane; j < columns; j += width) {
            f(i, j);
        }
    }
    QP_BARRIER();
}

// Call f(i, j) for every entry of a row and add up what it returns, or find the largest, with some threads for each
// row; put(i, result) is called once for each row.
template <class N, bool LARGEST = false, class F, class P>
QP_INLINE void reduce_rows(int rows, int columns, F f, P put) {
    int width = threads() < LANES ? 1 : LANES, lane = thread() % width;
    QP_ROLLED for (int base = 0; base < rows; base += threads() / width) {
        int i = base + thread() / width;
        N result{};
        if (i < rows) {
            for (int j = lane; j < columns; j += width) {
                result = LARGEST ? larger(N(f(i, j)), result) : result + f(i, j);
            }
        }
        for (int offset = width / 2; offset > 0; offset /= 2) {
            N other = QP_EXCHANGE(result, offset);
            result = LARGEST ? larger(result, other) : result + other;
        }
        if (i < rows && lane == 0) {
            put(i, result);
        }
    }
    QP_BARRIER();
}

// Reduce what the threads have accumulated, all numbers at once.
template <class... R> QP_INLINE void reduce(R... numbers) {
    constexpr int COUNT = sizeof...(R);
    static_assert(COUNT <= MOST_REDUCED);
    QP_ROLLED for (int offset = warp_width() / 2; offset > 0; offset /= 2) {
        ((numbers.entries = R::combine(numbers.entries, QP_EXCHANGE(numbers.entries, offset))), ...);
    }
    if (threads() > WARP) {
        double* scratch = shared_memory;
        if (thread() % WARP == 0) {
            int at = thread() / WARP * COUNT;
            ((scratch[at++] = numbers.entries), ...);
        }
        QP_BARRIER();
        int at = 0;
        ((numbers.entries = decltype(numbers.entries)(scratch[at++])), ...);
        QP_ROLLED for (int warp = 1; warp < threads() / WARP; warp++) {
            ((numbers.entries = R::combine(numbers.entries, decltype(numbers.entries)(scratch[at++]))), ...);
        }
        QP_BARRIER();
    }
    // Of 0 and −0 the threads may have found different ones; the sum with 0 is 0 for both.
    ((numbers.result = numbers.entries + decltype(numbers.entries)(0)), ...);
}

// ---- linear algebra

template <class T> struct Algebra {
    using Vec = Vector<T>;
    using Mat = Matrix<T>;

    // Factor S + diagonal = UᵀU; return whether it was positive definite. Without a diagonal, factor S.
    static QP_INLINE bool cholesky(Mat S, Vec diagonal, Mat U, int n) {
        bool added = diagonal.given(), copied = S.data != U.data;
        if (copied || added) {
            each_entry(n, n, [&](int i, int j) {
                if (j == i || (copied && j > i)) {
                    U[i][j] = S[i][j] + (added && j == i ? diagonal[i] : T(0));
                }
            });
        }
        return factor(U, n);
    }

    // Factor a matrix in place.
    static QP_NOINLINE bool factor(Mat U, int n) {
        int width = threads() < LANES ? 1 : LANES, lane = thread() % width, height = threads() / width;
        QP_ROLLED for (int k = 0; k < n; k++) {
            T* row = U[k];
            T pivot = row[k];
            if (!(pivot > T(0) && pivot < T(INFINITY_))) {
                QP_BARRIER();
                return false;
            }
            T inverse = T(1) / pivot;
            QP_ROLLED for (int i = k + 1 + thread() / width; i < n; i += height) {
                T factor = row[i] * inverse;
                T* to = U[i];
                QP_ROLLED for (int j = i + lane; j < n; j += width) {
                    to[j] -= factor * row[j];
                }
            }
            QP_BARRIER();
        }
        QP_ROLLED for (int i = thread() / width; i < n; i += height) {
            T inverse = T(1) / root(U[i][i]);
            QP_ROLLED for (int j = i + 1 + lane; j < n; j += width) {
                U[i][j] *= inverse;
            }
        }
        QP_BARRIER();
        block::each(n, [&](int i) { U[i][i] = T(1) / root(U[i][i]); });
        return true;
    }

    // Solve UᵀX = B in place.
    static QP_NOINLINE void solve_transposed(Mat U, int n, Mat B, int columns) {
        block::each(columns, [&](int j) {
            QP_ROLLED for (int i = 0; i < n; i++) {
                T sum = B[i][j];
                for (int k = 0; k < i; k++) {
                    sum -= U[k][i] * B[k][j];
                }
                B[i][j] = sum * U[i][i];
            }
        });
    }

    // Compute C ← M + AᵀA with so many rows of A, in the upper triangle; without data M is 0.
    static QP_NOINLINE void gram(Mat M, Mat A, int rows, Mat C, int n) {
        each_entry(n, n, [&](int i, int j) {
            if (j >= i) {
                T sum = M.data ? M[i][j] : T(0);
                for (int k = 0; k < rows; k++) {
                    sum += A[k][i] * A[k][j];
                }
                C[i][j] = sum;
            }
        });
    }

    // Solve Uᵀx = r in place, with one warp.
    static QP_NOINLINE void forward(Mat U, int n, Vec r) {
        if (thread() < WARP) {
            QP_ROLLED for (int i = 0; i < n; i++) {
                T x = r[i] * U[i][i];
                QP_ROLLED for (int j = i + 1 + thread(); j < n; j += warp_width()) {
                    r.set(j, r[j] - U[i][j] * x);
                }
                QP_WARP_BARRIER();
            }
        }
        QP_BARRIER();
        block::each(n, [&](int i) { r.set(i, r[i] * U[i][i]); });
    }

    // Solve Ux = r in place, with one warp.
    static QP_NOINLINE void backward(Mat U, int n, Vec r) {
        if (thread() < WARP) {
            QP_ROLLED for (int i = n - 1; i >= 0; i--) {
                T x = r[i] * U[i][i];
                QP_ROLLED for (int k = thread(); k < i; k += warp_width()) {
                    r.set(k, r[k] - U[k][i] * x);
                }
                QP_WARP_BARRIER();
            }
        }
        QP_BARRIER();
        block::each(n, [&](int i) { r.set(i, r[i] * U[i][i]); });
    }

    // Compute out = M x, in the precision of the result.
    template <class X, class O>
    static QP_NOINLINE void product(Mat M, int rows, int columns, Vector<X> x, Vector<O> out) {
        reduce_rows<O>(
            rows, columns, [&](int i, int j) { return O(M[i][j]) * O(x[j]); }, [&](int i, O sum) { out.set(i, sum); });
    }

    // Compute out += Mᵀx, likewise.
    template <class X, class O>
    static QP_NOINLINE void add_product_transposed(Mat M, int rows, int columns, Vector<X> x, Vector<O> out) {
        block::each(columns, [&](int j) {
            O sum = out[j];
            for (int i = 0; i < rows; i++) {
                sum += O(M[i][j]) * O(x[i]);
            }
            out.set(j, sum);
        });
    }

    // Copy the upper triangle of n rows and columns to the lower one.
    static QP_INLINE void mirror(Mat S, int n) {
        each_entry(n, n, [&](int i, int j) {
            if (j < i) {
                S[i][j] = S[j][i];
            }
        });
    }

    // Compute out = Mᵀ.
    static QP_INLINE void transpose(Mat M, int rows, int columns, Mat out) {
        each_entry(rows, columns, [&](int i, int j) { out[j][i] = M[i][j]; });
    }

    // Copy a matrix.
    static QP_INLINE void copy_matrix(Mat M, int rows, int columns, Mat out) {
        each_entry(rows, columns, [&](int i, int j) { out[i][j] = M[i][j]; });
    }

    // Compute out_ij = scale_i M_ij.
    static QP_INLINE void scale_rows(Mat M, int rows, int columns, Vec scale, Mat out) {
        each_entry(rows, columns, [&](int i, int j) { out[i][j] = scale[i] * M[i][j]; });
    }

    // Compute out_ij = (M_ij of_rows_i of_columns_j)².
    static QP_INLINE void scaled_squares(Mat M, int rows, int columns, Vec of_rows, Vec of_columns, Mat out) {
        each_entry(rows, columns, [&](int i, int j) { out[i][j] = square(M[i][j] * of_rows[i] * of_columns[j]); });
    }

    // Compute weighted_i = max_j |M_ij| weights_j and unweighted_i = max_j |M_ij|.
    static QP_NOINLINE void largest_of_rows(Mat M, int rows, int columns, Vec weights, Vec weighted, Vec unweighted) {
        reduce_rows<T, true>(
            rows, columns, [&](int i, int j) { return absolute(M[i][j]) * weights[j]; },
            [&](int i, T most) { weighted.set(i, most); });
        reduce_rows<T, true>(
            rows, columns, [&](int i, int j) { return absolute(M[i][j]); },
            [&](int i, T most) { unweighted.set(i, most); });
    }

    // Compute out_j = max_i |M_ij| weights_i.
    static QP_NOINLINE void largest_of_columns(Mat M, int rows, int columns, Vec weights, Vec out) {
        block::each(columns, [&](int j) {
            T most{};
            for (int i = 0; i < rows; i++) {
                most = larger(absolute(M[i][j]) * weights[i], most);
            }
            out.set(j, most);
        });
    }

    // Number the connected components of columns that have entries in a row together: fill the number of each column,
    // and of each row, which is that of their last column. Return whether there is more than one.
    static QP_NOINLINE bool components(Mat M, int rows, int columns, Vec of_columns, Vec of_rows) {
        block::each(columns, [&](int j) { of_columns.set(j, T(j)); });
        bool moved = true;
        while (moved) {
            reduce_rows<T, true>(
                rows, columns, [&](int i, int j) { return M[i][j] != T(0) ? of_columns[j] : T(0); },
                [&](int i, T last) { of_rows.set(i, last); });
            bool same = true, one = true;
            block::each(columns, [&](int j) {
                T last = of_columns[j];
                for (int i = 0; i < rows; i++) {
                    last = M[i][j] != T(0) ? larger(of_rows[i], last) : last;
                }
                same &= last == of_columns[j];
                one &= last == T(columns - 1);
                of_columns.set(j, last);
            });
            if (all(one)) {
                return false;
            }
            moved = !all(same);
        }
        return true;
    }

    // Update out_c, for c below a limit, with the largest a_i of those whose number is c.
    static QP_NOINLINE void largest_of_each(Vec numbers, int count, Vec a, Vec out, int limit) {
        block::each(limit, [&](int c) {
            T most = out[c];
            for (int i = 0; i < count; i++) {
                most = numbers[i] == T(c) ? larger(a[i], most) : most;
            }
            out.set(c, most);
        });
    }
    // Set out_i to the a_c of its number c.
    static QP_INLINE void take_of_each(Vec numbers, int count, Vec a, Vec out) {
        block::each(count, [&](int i) { out.set(i, a[int(numbers[i])]); });
    }

    // Return whether all entries are finite.
    static QP_NOINLINE bool all_finite(Mat M, int rows, int columns) {
        bool finite = true;
        each_entry(rows, columns, [&](int i, int j) { finite &= is_finite(M[i][j]); });
        return all(finite);
    }
    // Return whether a matrix differs from its transpose by a limit at most.
    static QP_NOINLINE bool symmetric(Mat M, int n, T limit) {
        bool within = true;
        each_entry(n, n, [&](int i, int j) { within &= j >= i || absolute(M[i][j] - M[j][i]) <= limit; });
        return all(within);
    }

    // Copy the diagonal.
    static QP_INLINE void take_diagonal(Mat M, int n, Vec out) {
        block::each(n, [&](int j) { out.set(j, M[j][j]); });
    }

    // There is no padding to fill.
    static QP_INLINE void complete_diagonal(Mat, int) {}
    static QP_INLINE void clear_padding(Mat, int) {}

    // Return whether the pivots of a factor U are more than a share of the diagonal of UᵀU.
    static QP_NOINLINE bool pivots_exceed(Mat U, int n, T share, Vec) {
        bool exceed = true;
        block::each(n, [&](int j) {
            T squares = 0, pivot = T(1) / square(U[j][j]);
            for (int i = 0; i < j; i++) {
                squares += square(U[i][j]);
            }
            exceed &= pivot > share * (squares + pivot);
        });
        return all(exceed);
    }

    // Reduce what the threads have accumulated in a loop.
    template <class... R> static QP_INLINE void reduce(R... reductions) { block::reduce(reductions...); }
    template <class N> static QP_INLINE N sum(N a) {
        N result;
        reduce(Sum{a, result});
        return result;
    }
    template <class N> static QP_INLINE N largest(N a) {
        N result;
        reduce(Largest{a, result});
        return result;
    }
    template <class N> static QP_INLINE N smallest(N a) { return -largest(-a); }
    static QP_INLINE bool all(bool m) { return largest(m ? T(0) : T(1)) == T(0); }

    // Return the sum of the logarithms of positive numbers.
    static QP_NOINLINE T sum_of_logarithms(Vec a, int count) {
        T total = 0;
        block::each(count, [&](int i) { total += std::log(a[i]); });
        return sum(total);
    }

    // ---- some rows of vectors and matrices, given by their indices: `numbers`

    // Fill `numbers` with the indices of the entries that are not 0; return how many there are.
    static QP_NOINLINE int list(Vec chosen, int rows, Vector<int> numbers) {
        T count = 0;
        block::each(rows, [&](int i) {
            if (chosen[i] != T(0)) {
                int before = 0;
                for (int k = 0; k < i; k++) {
                    before += chosen[k] != T(0);
                }
                numbers.set(before, i);
                count += T(1);
            }
        });
        return int(sum(count));
    }

    // Compute out_a = v_i for the a-th index i.
    static QP_INLINE void gather(Vec v, Vector<int> numbers, int count, Vec out) {
        block::each(count, [&](int a) { out.set(a, v[numbers[a]]); });
    }

    // Compute out_i = v_a for the a-th index i.
    static QP_INLINE void scatter(Vec v, Vector<int> numbers, int count, Vec out) {
        block::each(count, [&](int a) { out.set(numbers[a], v[a]); });
    }

    // Fill the upper triangle of `out` with these rows and columns of S. Nothing is prefetched meanwhile.
    template <class F> static QP_NOINLINE void gather_square(Mat S, Vector<int> numbers, int count, Mat out, F) {
        each_entry(count, count, [&](int a, int b) {
            if (b >= a) {
                out[a][b] = S[numbers[a]][numbers[b]];
            }
        });
    }

    // Subtract the product of these columns of a symmetric S with the entries of x there from `out`; then, in `packed`,
    // the product of these rows with `others` from the entries of `out` there.
    template <class F>
    static QP_NOINLINE void subtract_product(Mat S, int rows, Vector<int> numbers, int count, Vec x, Vec others,
                                             Vec out, Vec packed, F) {
        block::each(rows, [&](int j) {
            T left = out[j];
            for (int a = 0; a < count; a++) {
                left -= S[numbers[a]][j] * x[numbers[a]];
            }
            out.set(j, left);
        });
        reduce_rows<T>(
            count, rows, [&](int a, int j) { return S[numbers[a]][j] * others[j]; },
            [&](int a, T sum) { packed.set(a, out[numbers[a]] - sum); });
    }
};

// The team of a block of threads and one problem, in T; residuals are computed in double.
template <class T> struct Team : Algebra<T> {
    using Real = T;
    using Number = T;
    using Exact = double;
    using Truth = bool;
    using Entry = T;
    using ExactEntry = double;
    using Vector = block::Vector<T>;
    using ExactVector = block::Vector<double>;
    using Matrix = qpdiff::Matrix<T>;
    using Kinds = block::Kinds;
    using Indices = block::Vector<int>;
    static constexpr bool SPARSE = false;
    static constexpr bool PRICED = false;
    static constexpr bool lanes = false;
    static constexpr int PROBLEMS = 1;

    static QP_INLINE int padded(int n) { return n; }
    static QP_INLINE int leading(int columns) { return columns | 1; } // neighbouring rows are in different banks
    static QP_INLINE int whole_rows(int rows) { return rows; }

    // Call f for every entry; do the same in the precision of a vector, and in that of residuals.
    template <class F> static QP_INLINE void each(int count, F f) { each_of(Vector{}, count, f); }
    template <class X, class F> static QP_INLINE void each_of(block::Vector<X>, int count, F f) {
        block::each(count, [&](int i) { f(At<X>{i}); });
    }
    template <class F> static QP_INLINE void each_exactly(int count, F f) { each_of(ExactVector{}, count, f); }
};

} // namespace qpdiff::block
