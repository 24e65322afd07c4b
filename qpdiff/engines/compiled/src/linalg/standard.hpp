// What the method takes of the standard library. NVRTC compiles it for the GPU and has no standard library: for it the
// few names that are used are defined here.
#pragma once
#ifndef __CUDACC_RTC__
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>
#else
#define offsetof(type, member) __builtin_offsetof(type, member)

namespace std {
using ptrdiff_t = long;
using size_t = unsigned long;
using int32_t = int;
using int64_t = long;

template <class A, class B> constexpr bool is_same_v = false;
template <class A> constexpr bool is_same_v<A, A> = true;
template <class...> struct make_void {
    using type = void;
};
template <class... T> using void_t = typename make_void<T...>::type;
template <class T> T&& declval();

template <bool, class A, class> struct conditional {
    using type = A;
};
template <class A, class B> struct conditional<false, A, B> {
    using type = B;
};
template <bool CHOICE, class A, class B> using conditional_t = typename conditional<CHOICE, A, B>::type;
template <class A, class B> using common_type_t = decltype(true ? A() : B());

template <class T> struct remove_reference {
    using type = T;
};
template <class T> struct remove_reference<T&> {
    using type = T;
};
template <class T> struct remove_cv {
    using type = T;
};
template <class T> struct remove_cv<const T> {
    using type = T;
};
template <class T> using remove_reference_t = typename remove_reference<T>::type;
template <class T> using remove_cv_t = typename remove_cv<T>::type;

template <class T> struct numeric_limits {
    static constexpr T epsilon() { return sizeof(T) == 8 ? T(2.220446049250313e-16) : T(1.1920929e-7f); }
};

template <class T> __device__ __forceinline__ void swap(T& a, T& b) {
    T before = a;
    a = b;
    b = before;
}
template <class T> __device__ __forceinline__ T max(T a, T b) {
    return a < b ? b : a;
}
template <class T> __device__ __forceinline__ T fabs(T a) {
    return ::fabs(a);
}
template <class T> __device__ __forceinline__ T sqrt(T a) {
    return ::sqrt(a);
}
template <class T> __device__ __forceinline__ T exp(T a) {
    return ::exp(a);
}
template <class T> __device__ __forceinline__ T log(T a) {
    return ::log(a);
}
} // namespace std
#endif

#ifdef __CUDACC__
#define QP_INLINE __device__ __forceinline__
#define QP_NOINLINE __device__ __noinline__
#else
#define QP_INLINE inline __attribute__((always_inline))
#define QP_NOINLINE __attribute__((noinline))
#endif
