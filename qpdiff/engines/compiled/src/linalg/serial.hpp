// One problem on one thread: vectors that loops process a pack at a time, and linear algebra in tiles of registers.
//
// Matrices are stored by rows. Rows are padded to whole cache lines and their number to whole tiles, with zeros where
// this file does not say otherwise. Of symmetric matrices the upper triangle is used. A triangular factor is upper. It
// stores the inverses of its diagonal on the diagonal, and those of its diagonal blocks of four rows, transposed, below
// it: substitution in a block is then a product, whose operations do not depend on each other.
#pragma once
#include <algorithm>
#include <cstring>
#include <numeric>

#include "blas.hpp"
#include "numbers.hpp"

namespace qpdiff {

constexpr int ROWS = 4;  // rows of a tile
constexpr int LINE = 64; // bytes of a cache line

// Round up to whole tiles, packs or cache lines.
constexpr int whole_tiles(int n) {
    return (n + ROWS - 1) / ROWS * ROWS;
}
template <class T> constexpr int whole_packs(int n) {
    constexpr int unit = width<T> > ROWS ? width<T> : ROWS; // a tile's rows are some of its columns, too
    return (n + unit - 1) / unit * unit;
}
template <class T> constexpr int whole_lines(int n) {
    constexpr int count = LINE / sizeof(T);
    return (n + count - 1) / count * count;
}

namespace serial {

// An index of a loop over packs, with the type to be loaded there, so that one vector can be read in two precisions.
template <class N> struct At {
    int i;
    QP_INLINE At operator+(int offset) const { return {i + offset}; }
};

template <class T> struct Vector {
    T* data = nullptr;
    template <class N> QP_INLINE N operator[](At<N> at) const { return load<N>(data + at.i); }
    template <class N, class A> QP_INLINE void set(At<N> at, A value) const { store(data + at.i, as<N>(value)); }
    QP_INLINE Vector operator+(int offset) const { return {data + offset}; }
};

// The kind of each constraint, as masks.
template <class T> struct Kinds {
    integer_of<T>* is_inequality = nullptr;
    integer_of<T>* is_equality = nullptr;
    template <class N> QP_INLINE mask_of<N> inequality(At<N> at) const {
        return load<mask_of<N>>(is_inequality + at.i);
    }
    template <class N> QP_INLINE mask_of<N> equality(At<N> at) const { return load<mask_of<N>>(is_equality + at.i); }
    template <class N> QP_INLINE mask_of<N> absent(At<N> at) const { return ~(inequality(at) | equality(at)); }
};

// ---- factors and products in tiles

template <class T> struct Tiles {
    using V = pack_of<T>;
    static constexpr int W = width<T>;
    using Four = pack_of<T, 4 * sizeof(T)>;

    // Compute C ← M ± AᵀB in ROWS rows of C from i on and COUNT packs of columns from j on, with the rows of A and B
    // from `first` to `last`; with SOLVE, then solve with the triangle of A at (i, i), transposed. Without data M is 0.
    template <int COUNT, bool ADD, bool SOLVE>
    static QP_INLINE void tile(Matrix<T> A, Matrix<T> B, Matrix<T> M, Matrix<T> C, int i, int first, int last, int j) {
        V c[ROWS][COUNT];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 4
            for (int k = 0; k < COUNT; k++) {
                c[r][k] = ADD && !M.data ? V{} : load<V>(M[i + r] + j + k * W);
            }
        }
        const T* a = A[first] + i;
        const T* b = B[first] + j;
        for (int row = first; row < last; row++, a += A.ld, b += B.ld) {
            V across[COUNT];
#pragma GCC unroll 4
            for (int k = 0; k < COUNT; k++) {
                across[k] = load<V>(b + k * W);
            }
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
                V down = as<V>(a[r]);
#pragma GCC unroll 4
                for (int k = 0; k < COUNT; k++) {
                    c[r][k] = ADD ? c[r][k] + down * across[k] : c[r][k] - down * across[k];
                }
            }
        }
        if constexpr (SOLVE) {
            const T* t0 = A[i] + i;
            const T* t1 = A[i + 1] + i;
            const T* t2 = A[i + 2] + i;
            const T* t3 = A[i + 3] + i;
#pragma GCC unroll 4
            for (int k = 0; k < COUNT; k++) {
                c[0][k] = c[0][k] * t0[0];
                c[1][k] = (c[1][k] - t0[1] * c[0][k]) * t1[1];
                c[2][k] = (c[2][k] - t0[2] * c[0][k] - t1[2] * c[1][k]) * t2[2];
                c[3][k] = (c[3][k] - t0[3] * c[0][k] - t1[3] * c[1][k] - t2[3] * c[2][k]) * t3[3];
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 4
            for (int k = 0; k < COUNT; k++) {
                store(C[i + r] + j + k * W, c[r][k]);
            }
        }
    }

    // Compute the same in the columns from `start` to `stop`, whole packs.
    template <bool ADD, bool SOLVE>
    static QP_INLINE void tiles(Matrix<T> A, Matrix<T> B, Matrix<T> M, Matrix<T> C, int i, int first, int last,
                                int start, int stop) {
        for (; start + 3 * W <= stop; start += 3 * W) {
            tile<3, ADD, SOLVE>(A, B, M, C, i, first, last, start);
        }
        if (start + 2 * W <= stop) {
            tile<2, ADD, SOLVE>(A, B, M, C, i, first, last, start);
            start += 2 * W;
        }
        if (start + W <= stop) {
            tile<1, ADD, SOLVE>(A, B, M, C, i, first, last, start);
        }
    }

    // The upper factor of a 4 × 4 block, by rows, with the inverses of its diagonal.
    struct Corner {
        T d0, a01, a02, a03, d1, a12, a13, d2, a23, d3;
    };

    // Factor the block of M at (i, i). Only a division lies between a pivot and the next: the roots, which other
    // operations do not depend on, are taken in parallel.
    static QP_INLINE Corner factor_corner(Matrix<T> M, int i) {
        const T* r0 = M[i] + i;
        const T* r1 = M[i + 1] + i;
        const T* r2 = M[i + 2] + i;
        const T* r3 = M[i + 3] + i;
        T a01 = r0[1], a02 = r0[2], a03 = r0[3];
        T e0 = 1 / r0[0];
        T t1 = a01 * e0, t2 = a02 * e0;
        T a12 = r1[2] - t1 * a02, a13 = r1[3] - t1 * a03;
        T e1 = 1 / (r1[1] - t1 * a01);
        T s2 = a12 * e1;
        T a23 = r2[3] - t2 * a03 - s2 * a13;
        T e2 = 1 / (r2[2] - t2 * a02 - s2 * a12);
        T e3 = 1 / (r3[3] - a03 * e0 * a03 - a13 * e1 * a13 - a23 * e2 * a23);
        T d0 = std::sqrt(e0), d1 = std::sqrt(e1), d2 = std::sqrt(e2), d3 = std::sqrt(e3);
        return {d0, d0 * a01, d0 * a02, d0 * a03, d1, d1 * a12, d1 * a13, d2, d2 * a23, d3};
    }

    // Store a factored block at (i, i).
    static QP_INLINE void put_corner(Matrix<T> U, int i, const Corner& c) {
        T* r0 = U[i] + i;
        T* r1 = U[i + 1] + i;
        T* r2 = U[i + 2] + i;
        r0[0] = c.d0, r0[1] = c.a01, r0[2] = c.a02, r0[3] = c.a03;
        r1[1] = c.d1, r1[2] = c.a12, r1[3] = c.a13;
        r2[2] = c.d2, r2[3] = c.a23;
        U[i + 3][i + 3] = c.d3;
    }

    // Store the inverse of a factored block below its diagonal, transposed.
    static QP_INLINE void put_inverse(Matrix<T> U, int i, const Corner& c) {
        T w01 = -c.d0 * c.a01 * c.d1, w12 = -c.d1 * c.a12 * c.d2, w23 = -c.d2 * c.a23 * c.d3;
        T w02 = -c.d0 * (c.a01 * w12 + c.a02 * c.d2), w13 = -c.d1 * (c.a12 * w23 + c.a13 * c.d3);
        T w03 = -c.d0 * (c.a01 * w13 + c.a02 * w23 + c.a03 * c.d3);
        U[i + 1][i] = w01;
        U[i + 2][i] = w02, U[i + 2][i + 1] = w12;
        U[i + 3][i] = w03, U[i + 3][i + 1] = w13, U[i + 3][i + 2] = w23;
    }

    // Compute the inverses of blocks that `cholesky` stores, for a factor that was not computed by it.
    static void invert_blocks(Matrix<T> U, int n) {
        for (int i = 0; i < n; i += ROWS) {
            const T* a = U[i] + i;
            const T* b = U[i + 1] + i;
            const T* c = U[i + 2] + i;
            put_inverse(U, i, {a[0], a[1], a[2], a[3], b[1], b[2], b[3], c[2], c[3], U[i + 3][i + 3]});
        }
    }

    // Factor the rows from `first` to `last` of S + diagonal, once the products of the rows above `first` have been
    // subtracted.
    static QP_INLINE void factor_rows(Matrix<T> S, const T* diagonal, Matrix<T> U, int first, int last, int stop) {
        constexpr int UNIT = W > ROWS ? W : ROWS;
        for (int i = first; i < last; i += ROWS) {
            // The first tile contains the block on the diagonal; it has full width, which hides the latency of the
            // sums.
            int start = i - i % UNIT;
            int edge = std::min(start + 3 * W, stop);
            tiles<false, false>(U, U, S, U, i, first, i, start, edge);
            if (diagonal) {
                for (int r = i; r < i + ROWS; r++) {
                    U[r][r] += diagonal[r];
                }
            }
            Corner corner = factor_corner(U, i);
            put_corner(U, i, corner);
            tiles<false, true>(U, U, U, U, i, 0, 0, start, edge);
            put_corner(U, i, corner);
            put_inverse(U, i, corner);
            tiles<false, true>(U, U, S, U, i, first, i, edge, stop);
        }
    }

    // Factor S + diagonal = UᵀU; return whether it was positive definite. The padding of S or of `diagonal` must be
    // positive on the diagonal.
    static QP_NOINLINE bool cholesky(Matrix<T> S, const T* diagonal, Matrix<T> U, int n) {
        int rows = whole_tiles(n), stop = whole_packs<T>(n);
        int block = blas::available<T>() ? blas::BLOCK : rows;
        for (int first = 0; first < rows; first += block) {
            int last = std::min(first + block, rows);
            Matrix<T> M = S;
            if (first > 0) {
                if (S.data != U.data) {
                    for (int i = first; i < last; i++) {
                        std::memcpy(U[i] + first, S[i] + first, sizeof(T) * (stop - first));
                    }
                }
                M = U;
                blas::add_product<T>(-1, U.data + first, U.ld, last - first, U.data + first, U.ld, stop - first, first,
                                     U[first] + first, U.ld);
            }
            factor_rows(M, diagonal, U, first, last, stop);
        }
        // A pivot that is not positive, or NaN, causes NaN in all rows of the blocks below it.
        bool factor_ok = true;
        for (int i = std::max(0, rows - ROWS); i < rows; i++) {
            factor_ok &= U[i][i] > 0 && U[i][i] < T(INFINITY_);
        }
        return factor_ok;
    }
    static QP_INLINE bool cholesky(Matrix<T> S, Vector<T> diagonal, Matrix<T> U, int n) {
        return cholesky(S, diagonal.data, U, n);
    }

    // Solve UᵀX = B in place for a factor U of n rows.
    static QP_NOINLINE void solve_transposed(Matrix<T> U, int n, Matrix<T> B, int columns) {
        constexpr int PANEL = 12 * W; // columns whose entries fit in the cache
        int stop = whole_packs<T>(columns), block = blas::available<T>() ? blas::BLOCK : whole_tiles(n);
        for (int first = 0; first < n; first += block) {
            int last = std::min(first + block, n);
            if (first > 0) {
                blas::add_product<T>(-1, U.data + first, U.ld, last - first, B.data, B.ld, stop, first, B[first], B.ld);
            }
            for (int j = 0; j < stop; j += PANEL) {
                for (int i = first; i < last; i += ROWS) {
                    tiles<false, true>(U, B, B, B, i, first, i, j, std::min(j + PANEL, stop));
                }
            }
        }
    }

    // Compute C ← M + AᵀA with so many rows of A, in the upper triangle; without data M is 0. The padding of C becomes
    // 0.
    static QP_NOINLINE void gram(Matrix<T> M, Matrix<T> A, int rows, Matrix<T> C, int n) {
        constexpr int PANEL = 128; // rows whose entries fit in the cache
        clear_padding(C, n);
        if (n > blas::BLOCK && blas::available<T>()) {
            if (M.data) {
                std::memcpy(C.data, M.data, sizeof(T) * n * M.ld);
            } else {
                std::memset(C.data, 0, sizeof(T) * n * C.ld);
            }
            blas::add_gram(A.data, A.ld, rows, C.data, C.ld, n);
            return;
        }
        int stop = whole_packs<T>(n), k = 0;
        do {
            for (int i = 0; i < n; i += ROWS) {
                tiles<true, false>(A, A, M, C, i, k, std::min(k + PANEL, rows), i - i % W, stop);
            }
            M = C;
            k += PANEL;
        } while (k < rows);
    }

    // Return the sums of the entries of four packs.
    static QP_INLINE Four sums(V a, V b, V c, V d) {
        if constexpr (W == 2) {
            return Four{a[0] + a[1], b[0] + b[1], c[0] + c[1], d[0] + d[1]};
        } else if constexpr (W == 4) {
            V ab = __builtin_shufflevector(a, b, 0, 4, 2, 6) + __builtin_shufflevector(a, b, 1, 5, 3, 7);
            V cd = __builtin_shufflevector(c, d, 0, 4, 2, 6) + __builtin_shufflevector(c, d, 1, 5, 3, 7);
            return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
        } else {
            Four fa = folded(a), fb = folded(b), fc = folded(c), fd = folded(d);
            Four ab = __builtin_shufflevector(fa, fb, 0, 4, 2, 6) + __builtin_shufflevector(fa, fb, 1, 5, 3, 7);
            Four cd = __builtin_shufflevector(fc, fd, 0, 4, 2, 6) + __builtin_shufflevector(fc, fd, 1, 5, 3, 7);
            return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
        }
    }

    // Return four sums of entries of a wider pack.
    static QP_INLINE Four folded(V v) {
        if constexpr (W == 16) {
            auto half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                        __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
            return (Four)(__builtin_shufflevector(half, half, 0, 1, 2, 3) +
                          __builtin_shufflevector(half, half, 4, 5, 6, 7));
        } else {
            return (Four)(__builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7));
        }
    }

    // Solve Uᵀx = r in place.
    static QP_NOINLINE void forward(Matrix<T> U, int n, T* r) {
        int stop = whole_packs<T>(n);
        for (int i = 0; i < n; i += ROWS) {
            const T* u0 = U[i] + i;
            const T* u1 = u0 + U.ld;
            const T* u2 = u1 + U.ld;
            const T* u3 = u2 + U.ld;
            T a0 = r[i], a1 = r[i + 1], a2 = r[i + 2], a3 = r[i + 3];
            T x0 = u0[0] * a0;
            T x1 = u1[0] * a0 + u1[1] * a1;
            T x2 = u2[0] * a0 + u2[1] * a1 + u2[2] * a2;
            T x3 = (u3[0] * a0 + u3[1] * a1) + (u3[2] * a2 + u3[3] * a3);
            V y0 = as<V>(x0), y1 = as<V>(x1), y2 = as<V>(x2), y3 = as<V>(x3);
            // From the pack on that contains the next entry; the entries before it, which this overwrites, are
            // restored.
            int start = (i + ROWS) / W * W - i;
            T before[W];
            if (W > 2 * ROWS && start < 0) {
                std::memcpy(before, r + i + start, sizeof(T) * -start);
            }
            for (int j = start; j < stop - i; j += W) {
                V t = (load<V>(u0 + j) * y0 + load<V>(u1 + j) * y1) + (load<V>(u2 + j) * y2 + load<V>(u3 + j) * y3);
                store(r + i + j, load<V>(r + i + j) - t);
            }
            if (W > 2 * ROWS && start < 0) {
                std::memcpy(r + i + start, before, sizeof(T) * -start);
            }
            r[i] = x0, r[i + 1] = x1, r[i + 2] = x2, r[i + 3] = x3;
        }
    }
    static QP_INLINE void forward(Matrix<T> U, int n, Vector<T> r) { forward(U, n, r.data); }

    // Solve Ux = r in place.
    static QP_NOINLINE void backward(Matrix<T> U, int n, T* r) {
        using Mask = pack_of<integer_of<T>, 4 * sizeof(T)>;
        const Mask one{-1, 0, 0, 0}, two{-1, -1, 0, 0}, three{-1, -1, -1, 0};
        const Four zero{};
        int stop = whole_packs<T>(n);
        for (int i = whole_tiles(n) - ROWS; i >= 0; i -= ROWS) {
            const T* u0 = U[i];
            const T* u1 = u0 + U.ld;
            const T* u2 = u1 + U.ld;
            const T* u3 = u2 + U.ld;
            V s0{}, s1{}, s2{}, s3{};
            int start = i + ROWS;
            if (start % W != 0 && start < stop) {
                // In the pack that contains the next entry, mask the entries before it.
                mask_of<V> counts{};
                for (int k = start % W; k < W; k++) {
                    counts[k] = -1;
                }
                start = start / W * W;
                V y = select(counts, load<V>(r + start), V{});
                s0 += load<V>(u0 + start) * y;
                s1 += load<V>(u1 + start) * y;
                s2 += load<V>(u2 + start) * y;
                s3 += load<V>(u3 + start) * y;
                start += W;
            }
            for (int j = stop - W; j >= start; j -= W) { // the entries that were computed last come last
                V y = load<V>(r + j);
                s0 += load<V>(u0 + j) * y;
                s1 += load<V>(u1 + j) * y;
                s2 += load<V>(u2 + j) * y;
                s3 += load<V>(u3 + j) * y;
            }
            Four a = load<Four>(r + i) - sums(s0, s1, s2, s3);
            Four w0 = select(one, load<Four>(u0 + i), zero), w1 = select(two, load<Four>(u1 + i), zero);
            Four w2 = select(three, load<Four>(u2 + i), zero), w3 = load<Four>(u3 + i);
            store(r + i, (w0 * a[0] + w1 * a[1]) + (w2 * a[2] + w3 * a[3]));
        }
    }
    static QP_INLINE void backward(Matrix<T> U, int n, Vector<T> r) { backward(U, n, r.data); }

    // ---- products, in the precision of the result, whatever that of the matrix and the vector is

    // Compute out = M x, and zeros in the padding.
    template <class X, class O>
    static QP_NOINLINE void product(Matrix<T> M, int rows, int columns, const X* x, O* out) {
        using P = pack_of<O>;
        constexpr int STEP = width<O>;
        int stop = whole_packs<O>(columns), i = 0;
        for (; i + ROWS < rows; i += 2 * ROWS) {
            P s[2 * ROWS] = {};
            const T* m = M[i];
            for (int j = 0; j < stop; j += STEP) {
                P y = load<P>(x + j);
#pragma GCC unroll 8
                for (int r = 0; r < 2 * ROWS; r++) {
                    s[r] += load<P>(m + (Index)r * M.ld + j) * y;
                }
            }
            put(out, i, rows, Tiles<O>::sums(s[0], s[1], s[2], s[3]));
            put(out, i + ROWS, rows, Tiles<O>::sums(s[4], s[5], s[6], s[7]));
        }
        if (i < rows) {
            P s[ROWS] = {};
            const T* m = M[i];
            for (int j = 0; j < stop; j += STEP) {
                P y = load<P>(x + j);
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; r++) {
                    s[r] += load<P>(m + (Index)r * M.ld + j) * y;
                }
            }
            put(out, i, rows, Tiles<O>::sums(s[0], s[1], s[2], s[3]));
        }
    }
    template <class X, class O>
    static QP_INLINE void product(Matrix<T> M, int rows, int columns, Vector<X> x, Vector<O> out) {
        product(M, rows, columns, x.data, out.data);
        std::fill(out.data + rows, out.data + whole_lines<T>(rows), O(0));
    }

    // Store four entries, but for those beyond `rows`.
    template <class O> static QP_INLINE void put(O* out, int i, int rows, pack_of<O, 4 * sizeof(O)> four) {
        if (i + ROWS <= rows) {
            store(out + i, four);
        } else {
            for (int r = 0; i + r < rows; r++) {
                out[i + r] = four[r];
            }
        }
    }

    // Compute out += Mᵀx.
    template <class X, class O>
    static QP_NOINLINE void add_product_transposed(Matrix<T> M, int rows, int columns, const X* x, O* out) {
        constexpr int STEP = width<O>;
        int stop = whole_packs<O>(columns), j = 0;
        for (; j + 4 * STEP <= stop; j += 4 * STEP) {
            add_columns<4, 2>(M, rows, j, x, out);
        }
        if (j + 2 * STEP <= stop) {
            add_columns<2, 4>(M, rows, j, x, out);
            j += 2 * STEP;
        }
        if (j + STEP <= stop) {
            add_columns<1, 4>(M, rows, j, x, out);
        }
    }
    template <class X, class O>
    static QP_INLINE void add_product_transposed(Matrix<T> M, int rows, int columns, Vector<X> x, Vector<O> out) {
        add_product_transposed(M, rows, columns, x.data, out.data);
    }

    // Compute the same for COUNT packs of columns, with separate sums over every AT_ONCE-th row, which hides the
    // latency of each addition.
    template <int COUNT, int AT_ONCE, class X, class O>
    static QP_INLINE void add_columns(Matrix<T> M, int rows, int j, const X* x, O* out) {
        using P = pack_of<O>;
        constexpr int STEP = width<O>;
        P s[AT_ONCE][COUNT] = {};
        const T* m = M.data + j;
        int i = 0;
        for (; i + AT_ONCE <= rows; i += AT_ONCE) {
#pragma GCC unroll 4
            for (int r = 0; r < AT_ONCE; r++, m += M.ld) {
                P factor = as<P>(x[i + r]);
#pragma GCC unroll 4
                for (int k = 0; k < COUNT; k++) {
                    s[r][k] += factor * load<P>(m + k * STEP);
                }
            }
        }
        for (; i < rows; i++, m += M.ld) {
            P factor = as<P>(x[i]);
#pragma GCC unroll 4
            for (int k = 0; k < COUNT; k++) {
                s[0][k] += factor * load<P>(m + k * STEP);
            }
        }
#pragma GCC unroll 4
        for (int k = 0; k < COUNT; k++) {
            P sum = s[0][k];
#pragma GCC unroll 4
            for (int r = 1; r < AT_ONCE; r++) {
                sum += s[r][k];
            }
            O* to = out + j + k * STEP;
            store(to, load<P>(to) + sum);
        }
    }

    // ---- other operations on matrices

    // Transpose a block of four rows and columns.
    static QP_INLINE void transpose_block(const T* from, Index ld, T* to, Index to_ld) {
        Four a = load<Four>(from), b = load<Four>(from + ld), c = load<Four>(from + 2 * ld),
             d = load<Four>(from + 3 * ld);
        Four ab = __builtin_shufflevector(a, b, 0, 4, 2, 6), ab1 = __builtin_shufflevector(a, b, 1, 5, 3, 7);
        Four cd = __builtin_shufflevector(c, d, 0, 4, 2, 6), cd1 = __builtin_shufflevector(c, d, 1, 5, 3, 7);
        store(to, __builtin_shufflevector(ab, cd, 0, 1, 4, 5));
        store(to + to_ld, __builtin_shufflevector(ab1, cd1, 0, 1, 4, 5));
        store(to + 2 * to_ld, __builtin_shufflevector(ab, cd, 2, 3, 6, 7));
        store(to + 3 * to_ld, __builtin_shufflevector(ab1, cd1, 2, 3, 6, 7));
    }

    // Copy the upper triangle of n rows and columns to the lower one.
    static QP_NOINLINE void mirror(Matrix<T> S, int n) {
        for (int i = 0; i < n; i += ROWS) {
            for (int r = 1; r < ROWS; r++) {
                for (int k = 0; k < r; k++) {
                    S[i + r][i + k] = S[i + k][i + r];
                }
            }
            for (int j = i + ROWS; j < n; j += ROWS) {
                transpose_block(S[i] + j, S.ld, S[j] + i, S.ld);
            }
        }
    }

    // Compute out = Mᵀ, with zeros in the padding, for an M with zeros in its own.
    static QP_NOINLINE void transpose(Matrix<T> M, int rows, int columns, Matrix<T> out) {
        for (int i = 0; i < rows; i += ROWS) {
            for (int j = 0; j < columns; j += ROWS) {
                transpose_block(M[i] + j, M.ld, out[j] + i, out.ld);
            }
        }
        for (int j = 0; j < whole_tiles(columns); j++) {
            std::fill(out[j] + whole_tiles(rows), out[j] + out.ld, T(0));
        }
    }

    // Return whether all entries are finite.
    static QP_NOINLINE bool all_finite(Matrix<T> M, int rows, int columns) {
        mask_of<V> finite = ~mask_of<V>{};
        for (int i = 0; i < rows; i++) {
            for (int j = 0; j < whole_packs<T>(columns); j += W) {
                finite &= is_finite(load<V>(M[i] + j));
            }
        }
        return every(finite);
    }
    // Return whether a matrix differs from its transpose by a limit at most.
    static QP_NOINLINE bool symmetric(Matrix<T> M, int n, T limit) {
        using Mask = mask_of<Four>;
        Mask within = ~Mask{};
        T transposed[ROWS * ROWS];
        for (int i = 0; i < n; i += ROWS) {
            for (int j = 0; j <= i; j += ROWS) {
                transpose_block(M[j] + i, M.ld, transposed, ROWS);
                for (int r = 0; r < ROWS; r++) {
                    within &= absolute(load<Four>(M[i + r] + j) - load<Four>(transposed + r * ROWS)) <= as<Four>(limit);
                }
            }
        }
        return every(within);
    }

    // Compute out_ij = scale_i M_ij.
    static QP_NOINLINE void scale_rows(Matrix<T> M, int rows, int columns, Vector<T> scale, Matrix<T> out) {
        for (int i = 0; i < rows; i++) {
            V factor = as<V>(scale.data[i]);
            for (int j = 0; j < whole_packs<T>(columns); j += W) {
                store(out[i] + j, factor * load<V>(M[i] + j));
            }
        }
    }

    // Compute out_ij = (M_ij of_rows_i of_columns_j)².
    static QP_NOINLINE void scaled_squares(Matrix<T> M, int rows, int columns, Vector<T> of_rows, Vector<T> of_columns,
                                           Matrix<T> out) {
        for (int i = 0; i < rows; i++) {
            V factor = as<V>(of_rows.data[i]);
            for (int j = 0; j < whole_packs<T>(columns); j += W) {
                store(out[i] + j, square(load<V>(M[i] + j) * factor * load<V>(of_columns.data + j)));
            }
        }
    }

    // Compute weighted_i = max_j |M_ij| weights_j and unweighted_i = max_j |M_ij|.
    static QP_NOINLINE void largest_of_rows(Matrix<T> M, int rows, int columns, Vector<T> weights, Vector<T> weighted,
                                            Vector<T> unweighted) {
        for (int i = 0; i < rows; i++) {
            V with{}, without{};
            for (int j = 0; j < whole_packs<T>(columns); j += W) {
                V entry = absolute(load<V>(M[i] + j));
                with = larger(entry * load<V>(weights.data + j), with);
                without = larger(entry, without);
            }
            weighted.data[i] = largest_entry(with);
            unweighted.data[i] = largest_entry(without);
        }
    }

    // Compute out_j = max_i |M_ij| weights_i.
    static QP_NOINLINE void largest_of_columns(Matrix<T> M, int rows, int columns, Vector<T> weights, Vector<T> out) {
        for (int j = 0; j < whole_packs<T>(columns); j += W) {
            V most{};
            for (int i = 0; i < rows; i++) {
                most = larger(absolute(load<V>(M[i] + j)) * weights.data[i], most);
            }
            store(out.data + j, most);
        }
    }

    // Number the connected components of columns that have entries in a row together: fill the number of each column,
    // and of each row, which is that of their last column. Return whether there is more than one.
    static QP_NOINLINE bool components(Matrix<T> M, int rows, int columns, Vector<T> of_columns, Vector<T> of_rows) {
        T* number = of_columns.data;
        std::iota(number, number + columns, T(0));
        bool moved = true;
        while (moved) {
            V changes{};
            for (int i = 0; i < rows; i++) {
                V last_{};
                for (int j = 0; j < whole_packs<T>(columns); j += W) {
                    last_ = larger(select(load<V>(M[i] + j) != V{}, load<V>(number + j), T(0)), last_);
                }
                T last = of_rows.data[i] = largest_entry(last_);
                for (int j = 0; j < whole_packs<T>(columns); j += W) {
                    V before = load<V>(number + j), after = larger(before, as<V>(last));
                    after = select(load<V>(M[i] + j) != V{}, after, before);
                    changes += after - before;
                    store(number + j, after);
                }
            }
            if (std::all_of(number, number + columns, [&](T of) { return of == T(columns - 1); })) {
                return false;
            }
            moved = largest_entry(changes) > 0;
        }
        return true;
    }

    // Update out_c with the largest a_i of those whose number is c.
    static QP_INLINE void largest_of_each(Vector<T> numbers, int count, Vector<T> a, Vector<T> out, int) {
        for (int i = 0; i < count; i++) {
            T& most = out.data[int(numbers.data[i])];
            most = larger(a.data[i], most);
        }
    }
    // Set out_i to the a_c of its number c.
    static QP_INLINE void take_of_each(Vector<T> numbers, int count, Vector<T> a, Vector<T> out) {
        for (int i = 0; i < count; i++) {
            out.data[i] = a.data[int(numbers.data[i])];
        }
    }

    // Set the rows of the padding to 0: a factorisation that failed leaves NaN there.
    static QP_INLINE void clear_padding(Matrix<T> M, int n) {
        std::memset(M[n], 0, sizeof(T) * (whole_tiles(n) - n) * M.ld);
    }

    // Copy the diagonal.
    static QP_INLINE void take_diagonal(Matrix<T> M, int n, Vector<T> out) {
        for (int j = 0; j < n; j++) {
            out.data[j] = M[j][j];
        }
    }

    // Set the diagonal of the padding to 1, so that the matrix has a factor.
    static QP_INLINE void complete_diagonal(Matrix<T> M, int n) {
        for (int j = n; j < whole_tiles(n); j++) {
            M[j][j] = 1;
        }
    }

    // Return whether the pivots of a factor U are more than a share of the diagonal of UᵀU.
    static QP_NOINLINE bool pivots_exceed(Matrix<T> U, int n, T share, Vector<T> workspace) {
        T* squares = workspace.data; // of the entries above the diagonal, summed over the rows
        int stop = whole_packs<T>(n);
        std::fill(squares, squares + stop, T(0));
        for (int i = 0; i < n; i++) {
            T pivot = T(1) / square(U[i][i]);
            if (!(pivot > share * (squares[i] + pivot))) {
                return false;
            }
            // The entries for the columns up to i, which are added to as well, are not used any more.
            for (int j = (i + 1) / W * W; j < stop; j += W) {
                store(squares + j, load<V>(squares + j) + square(load<V>(U[i] + j)));
            }
        }
        return true;
    }

    // ---- some rows of vectors and matrices, given by their indices: `numbers`

    // Fill `numbers` with the indices of the entries that are not 0; return how many there are.
    static QP_INLINE int list(Vector<T> chosen, int rows, int* numbers) {
        int count = 0;
        for (int i = 0; i < rows; i++) {
            numbers[count] = i;
            count += chosen.data[i] != 0;
        }
        return count;
    }

    // Compute out_a = v_i for the a-th index i, and zeros in the padding.
    static QP_INLINE void gather(Vector<T> v, const int* numbers, int count, Vector<T> out) {
        for (int a = 0; a < count; a++) {
            out.data[a] = v.data[numbers[a]];
        }
        std::fill(out.data + count, out.data + std::max(whole_packs<T>(count), whole_tiles(count)), T(0));
    }

    // Compute out_i = v_a for the a-th index i.
    static QP_INLINE void scatter(Vector<T> v, const int* numbers, int count, Vector<T> out) {
        for (int a = 0; a < count; a++) {
            out.data[numbers[a]] = v.data[a];
        }
    }

    // Fill the upper triangle of `out` with these rows and columns of S, and the padding such that it has a factor.
    // meanwhile(a, count) is called before the a-th row of `count` is read, for software prefetch.
    template <class F>
    static QP_NOINLINE void gather_square(Matrix<T> S, const int* numbers, int count, Matrix<T> out, F meanwhile) {
        int stop = whole_packs<T>(count);
        for (int a = 0; a < count; a++) {
            meanwhile(a, count);
            const T* from = S[numbers[a]];
            T* to = out[a];
            for (int b = a; b < count; b++) {
                to[b] = from[numbers[b]];
            }
            std::fill(to + count, to + stop, T(0));
        }
        for (int a = count; a < whole_tiles(count); a++) {
            std::fill(out[a], out[a] + stop, T(0));
            out[a][a] = 1;
        }
    }

    // Subtract the product of these columns of a symmetric S with the entries of x there from `out`; then, in `packed`,
    // the product of these rows with `others` from the entries of `out` there. `meanwhile` is as in `gather_square`.
    template <class F>
    static QP_NOINLINE void subtract_product(Matrix<T> S, int rows, const int* numbers, int count, Vector<T> x,
                                             Vector<T> others, Vector<T> out, Vector<T> packed, F meanwhile) {
        int stop = whole_packs<T>(rows);
        for (int a = 0; a < count; a++) {
            meanwhile(a, count);
            const T* row = S[numbers[a]];
            V factor = as<V>(x.data[numbers[a]]), sum{};
            for (int j = 0; j < stop; j += W) {
                V entry = load<V>(row + j);
                store(out.data + j, load<V>(out.data + j) - factor * entry);
                sum += entry * load<V>(others.data + j);
            }
            packed.data[a] = total(sum);
        }
        for (int a = 0; a < count; a++) {
            packed.data[a] = out.data[numbers[a]] - packed.data[a];
        }
    }

    // ---- products of vectors

    // Compute factor·(a uᵀ + b xᵀ) in so many rows of n numbers without padding; u and x are padded. The result is
    // exactly symmetric where a is x and b is u.
    static QP_NOINLINE void outer(T factor, const T* a, const T* u, const T* b, const T* x, int rows, int n, T* out) {
        // At most 32 bytes: rows seldom begin at a cache line, and fewer of these stores cross two lines.
        using P = pack_of<T, std::min(VECTOR_BYTES, 32)>;
        constexpr int STEP = entries<P>;
        const T* end = out + (Index)rows * n;
        int stop = (n + STEP - 1) / STEP * STEP, i = 0;
        auto value = [&](P of_u, P of_x, int j) {
            P first = rounded(of_u * load<P>(u + j)), second = rounded(of_x * load<P>(x + j));
            return first + second;
        };
        // The stores beyond the end of a row are overwritten by those of later rows,
        for (; i < rows && out + stop <= end; i++, out += n) {
            P of_u = as<P>(factor * a[i]), of_x = as<P>(factor * b[i]);
            for (int j = 0; j < stop; j += STEP) {
                store(out + j, value(of_u, of_x, j));
            }
        }
        // but for the last rows.
        for (; i < rows; i++, out += n) {
            P of_u = as<P>(factor * a[i]), of_x = as<P>(factor * b[i]);
            for (int j = 0; j < n; j += STEP) {
                P last = value(of_u, of_x, j);
                std::memcpy(out + j, &last, sizeof(T) * std::min(STEP, n - j));
            }
        }
    }

    // Compute C ← C + AᵀB with so many rows of A and B, all padded.
    static QP_NOINLINE void add_product_matrix(Matrix<T> A, Matrix<T> B, int rows, Matrix<T> C, int of_A, int of_B) {
        for (int i = 0; i < of_A; i += ROWS) {
            tiles<true, false>(A, B, C, C, i, 0, rows, 0, whole_packs<T>(of_B));
        }
    }
};

// ---- the team

// The team of one thread and one problem, in T; residuals are computed in double.
template <class T> struct Team : Tiles<T> {
    using Real = T;           // floating point type
    using Number = T;         // a number of each problem
    using Exact = double;     // the same in the precision of residuals
    using Truth = bool;       // a mask of the problems
    using Entry = pack_of<T>; // entries of a vector that a loop processes at a time
    using ExactEntry = pack_of<double>;
    using Vector = serial::Vector<T>;
    using ExactVector = serial::Vector<double>;
    using Matrix = qpdiff::Matrix<T>;
    using Kinds = serial::Kinds<T>;
    using Indices = int*;
    static constexpr bool SPARSE = false;
    using Stored = T; // an element of a vector in memory
    using ExactStored = double;
    static constexpr bool lanes = false;
    static constexpr int PROBLEMS = 1;
    static constexpr bool PRICED = false;

    static QP_INLINE int padded(int n) { return whole_lines<T>(n); }
    static QP_INLINE int leading(int columns) { return whole_lines<T>(columns); }
    static QP_INLINE int whole_rows(int rows) { return whole_tiles(rows); }

    // Call f for every entry, or pack of entries, up to a padded count.
    template <class F> static QP_INLINE void each(int count, F f) {
        for (int i = 0; i < count; i += entries<Entry>) {
            f(At<Entry>{i});
        }
    }
    // Do the same in the precision of a vector, and in that of residuals.
    template <class X, class F> static QP_INLINE void each_of(serial::Vector<X>, int count, F f) {
        for (int i = 0; i < count; i += width<X>) {
            f(At<pack_of<X>>{i});
        }
    }
    template <class F> static QP_INLINE void each_exactly(int count, F f) { each_of(ExactVector{}, count, f); }

    // Reduce the entries that a loop has accumulated.
    template <class N> static QP_INLINE scalar_of<N> sum(N a) { return total(a); }
    template <class N> static QP_INLINE scalar_of<N> largest(N a) { return largest_entry(a); }
    template <class N> static QP_INLINE scalar_of<N> smallest(N a) { return -largest_entry(-a); }
    template <class M> static QP_INLINE bool all(M m) { return every(m); }
    template <class... R> static QP_INLINE void reduce(R... reductions) { (reductions.template finish<Team>(), ...); }

    // Return the sum of the logarithms of positive numbers.
    static QP_NOINLINE T sum_of_logarithms(Vector a, int count) {
        T sum = 0;
        for (int i = 0; i < count; i++) {
            sum += std::log(a.data[i]);
        }
        return sum;
    }
};

} // namespace serial
} // namespace qpdiff
