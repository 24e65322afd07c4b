// The types of numbers that the method is written in. A *pack* holds consecutive entries of one problem's vector,
// *lanes* hold the same entry of several problems: both are SIMD vectors, and the functions here are the same for both
// and for one number. Code whose only branches on numbers are `select` is therefore one source for all three.
#pragma once
#include "standard.hpp"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace qpdiff {

using Index = std::ptrdiff_t; // positions in memory and in a batch: `long` has 32 bits on Windows

constexpr double INFINITY_ = __builtin_bit_cast(double, 0x7ff0000000000000ull);
constexpr double NOT_A_NUMBER = __builtin_bit_cast(double, 0x7ff8000000000000ull);
constexpr double EPS = 2.220446049250313e-16;

// The largest number whose square is finite, and the smallest normal one.
template <class T> constexpr T largest_root = 1.3407807929942596e154;
template <> inline constexpr float largest_root<float> = 1.8446742974197924e19f;
template <class T> constexpr T smallest_normal = 2.2250738585072014e-308;
template <> inline constexpr float smallest_normal<float> = 1.1754943508222875e-38f;

// Bytes of a vector register. g++ must not be given wider vectors than the machine's, as it would hold them in memory.
#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

enum Kind { ABSENT, EQUALITY, INEQUALITY }; // of a constraint

// ---- types

#ifdef __CUDACC__
// On a GPU there are no packs: a number is an entry of one problem.
template <class T, int BYTES> struct VectorOf {
    using type = T;
    using unaligned = T;
};
#else
template <class T, int BYTES> struct VectorOf {
    typedef T type __attribute__((vector_size(BYTES)));
    typedef T unaligned __attribute__((vector_size(BYTES), aligned(alignof(T))));
};
#endif
template <class T, int BYTES = VECTOR_BYTES> using pack_of = typename VectorOf<T, BYTES>::type;
template <class T> constexpr int width = VECTOR_BYTES / sizeof(T); // entries of a pack

template <class N, class = void> struct Traits {
    static constexpr bool is_vector = false;
    using scalar = N;
    using mask = bool;
};
template <class N> struct Traits<N, std::void_t<decltype(std::declval<N>()[0])>> {
    static constexpr bool is_vector = true;
    using scalar = std::remove_cv_t<std::remove_reference_t<decltype(std::declval<N>()[0])>>;
    using mask = std::remove_cv_t<decltype(std::declval<N>() < std::declval<N>())>;
};
template <class N> constexpr bool is_vector = Traits<N>::is_vector;
template <class N> using scalar_of = typename Traits<N>::scalar;
template <class N> using mask_of = typename Traits<N>::mask;
template <class N> constexpr int entries = sizeof(N) / sizeof(scalar_of<N>);
template <class T> using integer_of = std::conditional_t<sizeof(T) == 8, std::int64_t, std::int32_t>;

// Matrices are stored by rows, `ld` numbers from one to the next.
template <class T> struct Matrix {
    T* data = nullptr;
    int ld = 0;
    QP_INLINE T* operator[](int i) const { return data + (Index)i * ld; }
};

// ---- memory and conversions

// Convert to a type of numbers: repeat a scalar, convert the entries of a vector.
#ifdef __CUDACC__
template <class N, class A> QP_INLINE N as(A a) {
    return N(a);
}
#else
template <class N, class A> QP_INLINE N as(A a) {
    if constexpr (std::is_same_v<N, A>) {
        return a;
    } else if constexpr (is_vector<N> && is_vector<A>) {
        return __builtin_convertvector(a, N);
    } else if constexpr (is_vector<N>) {
        return N{} + scalar_of<N>(a);
    } else {
        return N(a);
    }
}

// Load consecutive numbers, which may be of another precision.
template <class N, class T> QP_INLINE N load(const T* p) {
    using Stored = typename VectorOf<T, entries<N>* int(sizeof(T))>::unaligned;
    if constexpr (std::is_same_v<T, scalar_of<N>>) {
        return *reinterpret_cast<const Stored*>(p);
    } else {
        return __builtin_convertvector(*reinterpret_cast<const Stored*>(p), N);
    }
}

// Store consecutive numbers, likewise.
template <class N, class T> QP_INLINE void store(T* p, N value) {
    using Stored = typename VectorOf<T, entries<N>* int(sizeof(T))>::unaligned;
    if constexpr (std::is_same_v<T, scalar_of<N>>) {
        *reinterpret_cast<Stored*>(p) = value;
    } else {
        *reinterpret_cast<Stored*>(p) = __builtin_convertvector(value, Stored);
    }
}

// Return the sum of the entries of a pack.
template <class N> QP_INLINE scalar_of<N> total(N v) {
    if constexpr (entries<N> == 16) {
        return total(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                     __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
    } else if constexpr (entries<N> == 8) {
        return total(__builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7));
    } else if constexpr (entries<N> == 4) {
        return (v[0] + v[2]) + (v[1] + v[3]);
    } else {
        return v[0] + v[1];
    }
}

// Return the sum of the entries of each of as many packs of float64 as one has entries: neighbours are added up, then
// what has become neighbours.
template <class N, int W = entries<N>> QP_INLINE N totals(const N (&v)[W]) {
    static_assert(W == 2 || W == 4 || W == 8);
    N t[W];
    for (int k = 0; k < W; k += 2) {
        N a = v[k], b = v[k + 1];
        if constexpr (W == 8) {
            t[k / 2] = __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14) +
                       __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
        } else if constexpr (W == 4) {
            t[k / 2] = __builtin_shufflevector(a, b, 0, 4, 2, 6) + __builtin_shufflevector(a, b, 1, 5, 3, 7);
        } else {
            t[k / 2] = __builtin_shufflevector(a, b, 0, 2) + __builtin_shufflevector(a, b, 1, 3);
        }
    }
    if constexpr (W == 8) {
        for (int k = 0; k < 4; k += 2) {
            t[k / 2] = __builtin_shufflevector(t[k], t[k + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
                       __builtin_shufflevector(t[k], t[k + 1], 2, 3, 10, 11, 6, 7, 14, 15);
        }
        return __builtin_shufflevector(t[0], t[1], 0, 1, 2, 3, 8, 9, 10, 11) +
               __builtin_shufflevector(t[0], t[1], 4, 5, 6, 7, 12, 13, 14, 15);
    } else if constexpr (W == 4) {
        return __builtin_shufflevector(t[0], t[1], 0, 1, 4, 5) + __builtin_shufflevector(t[0], t[1], 2, 3, 6, 7);
    } else {
        return t[0];
    }
}
#endif

// ---- masks: bool for one number, for packs and lanes a vector of integers with all bits set or none; whether some,
// every or no entry of one is true, `no` entry by entry

QP_INLINE bool some(bool m) {
    return m;
}
QP_INLINE bool no(bool m) {
    return !m;
}
QP_INLINE bool every(bool m) {
    return m;
}

template <class M> QP_INLINE M no(const M& m) {
    return ~m;
}

template <class M> QP_INLINE bool some(const M& m) {
#if defined(__AVX512F__)
    if constexpr (sizeof(M) == 64) {
        return _mm512_test_epi64_mask((__m512i)m, (__m512i)m) != 0;
    }
#endif
#if defined(__AVX__)
    if constexpr (sizeof(M) == 32) {
        return !_mm256_testz_si256((__m256i)m, (__m256i)m);
    }
#endif
    long long any = 0;
    for (int i = 0; i < entries<M>; i++) {
        any |= m[i];
    }
    return any != 0;
}

template <class M> QP_INLINE bool every(const M& m) {
    return !some(~m);
}

// Return a mask with the same value for all problems.
template <class M> QP_INLINE M truth(bool value) {
    if constexpr (is_vector<M>) {
        return value ? ~M{} : M{};
    } else {
        return value;
    }
}

// Return a where the mask is true and b elsewhere, number by number; scalars are repeated.
template <class M, class A, class B> QP_INLINE auto select(M m, A a, B b) {
    if constexpr (is_vector<A>) {
        return m ? a : as<A>(b);
    } else if constexpr (is_vector<B>) {
        return m ? as<B>(a) : b;
    } else if constexpr (is_vector<M>) {
        using T = std::conditional_t<sizeof(scalar_of<M>) == 8, double, float>;
        using N = pack_of<T, sizeof(M)>;
        return m ? as<N>(a) : as<N>(b);
    } else {
        using N = std::common_type_t<A, B>;
        return m ? N(a) : N(b);
    }
}

// ---- reductions

// What a loop has accumulated for a sum, or for a largest entry, and where that goes: arguments of `Team::reduce`,
// which reduces several at once, as that takes a block of threads no longer than one.
template <class N, class S> struct Sum {
    N entries;
    S& result;
    template <class Team> QP_INLINE void finish() { result = Team::sum(entries); }
    static QP_INLINE N combine(N a, N b) { return a + b; }
};
template <class N, class S> Sum(N, S&) -> Sum<N, S>;

template <class N, class S> struct Largest {
    N entries;
    S& result;
    template <class Team> QP_INLINE void finish() { result = Team::largest(entries); }
    static QP_INLINE N combine(N a, N b); // after `larger`
};
template <class N, class S> Largest(N, S&) -> Largest<N, S>;

// ---- functions of a number

// Return a product rounded by itself, not fused with a sum (clang fuses within a statement only).
template <class N> QP_INLINE N rounded(N product) {
#if defined(__clang__)
    return product;
#else
    return __builtin_assoc_barrier(product);
#endif
}

template <class N> QP_INLINE N absolute(N a) {
    if constexpr (is_vector<N>) {
        using Bits = pack_of<integer_of<scalar_of<N>>, sizeof(N)>;
        using Bit = scalar_of<Bits>;
        return (N)((Bits)a & (Bits{} + Bit(~(Bit(1) << (8 * sizeof(Bit) - 1)))));
    } else {
        return std::fabs(a);
    }
}

// Return the larger number, or the smaller one; NaN if one of them is.
template <class N> QP_INLINE N larger(N a, N b) {
    return select((a >= b) | (a != a), a, b);
}
template <class N> QP_INLINE N smaller(N a, N b) {
    return select((a <= b) | (a != a), a, b);
}
template <class N, class S> QP_INLINE N Largest<N, S>::combine(N a, N b) {
    return larger(a, b);
}

// Return the largest entry of a pack; NaN if there is one.
template <class N> QP_INLINE scalar_of<N> largest_entry(N v) {
    if constexpr (entries<N> == 16) {
        return largest_entry(larger(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                                    __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15)));
    } else if constexpr (entries<N> == 8) {
        return largest_entry(
            larger(__builtin_shufflevector(v, v, 0, 1, 2, 3), __builtin_shufflevector(v, v, 4, 5, 6, 7)));
    } else if constexpr (entries<N> == 4) {
        return largest_entry(larger(__builtin_shufflevector(v, v, 0, 1), __builtin_shufflevector(v, v, 2, 3)));
    } else {
        return larger(scalar_of<N>(v[0]), scalar_of<N>(v[1]));
    }
}

// Return the smaller number; if a is NaN, b.
template <class N> QP_INLINE N least_of(N a, N b) {
    return select(a < b, a, b);
}

// Return the positive part; NaN of NaN.
template <class N> QP_INLINE N positive(N a) {
    return select(a < N{}, N{}, a);
}

template <class N> QP_INLINE N square(N a) {
    return a * a;
}

template <class N> QP_INLINE mask_of<N> is_finite(N a) {
    return absolute(a) < as<N>(INFINITY_);
}

template <class N> QP_INLINE N root(N a) {
#if defined(__AVX512F__)
    if constexpr (sizeof(N) == 64) {
        if constexpr (sizeof(scalar_of<N>) == 8) {
            return (N)_mm512_sqrt_pd((__m512d)a);
        } else {
            return (N)_mm512_sqrt_ps((__m512)a);
        }
    }
#endif
#if defined(__AVX__)
    if constexpr (sizeof(N) == 32) {
        if constexpr (sizeof(scalar_of<N>) == 8) {
            return (N)_mm256_sqrt_pd((__m256d)a);
        } else {
            return (N)_mm256_sqrt_ps((__m256)a);
        }
    }
#endif
    if constexpr (is_vector<N>) {
        N r{};
        for (int i = 0; i < entries<N>; i++) {
            r[i] = std::sqrt(a[i]);
        }
        return r;
    } else {
        return std::sqrt(a);
    }
}

template <class N> QP_INLINE N exponential(N a) {
    if constexpr (is_vector<N>) {
        for (int i = 0; i < entries<N>; i++) {
            a[i] = std::exp(a[i]);
        }
        return a;
    } else {
        return std::exp(a);
    }
}

} // namespace qpdiff
