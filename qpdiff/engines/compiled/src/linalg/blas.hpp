// SciPy's BLAS, for most of the work on large matrices. Python passes the function pointers with the first large
// problem; without them everything works, only slower.
//
// BLAS takes matrices by columns, so that every matrix here is its transpose to BLAS.
#pragma once

namespace qpdiff::blas {

constexpr int BLOCK = 128; // rows that are factored, or solved for, without BLAS

template <class T> struct Functions {
    using Gemm = void (*)(const char*, const char*, const int*, const int*, const int*, const T*, const T*, const int*,
                          const T*, const int*, const T*, T*, const int*);
    using Syrk = void (*)(const char*, const char*, const int*, const int*, const T*, const T*, const int*, const T*,
                          T*, const int*);
    inline static Gemm gemm = nullptr;
    inline static Syrk syrk = nullptr;
};

template <class T> bool available() {
    return Functions<T>::gemm != nullptr;
}

// Compute C ← C + α AᵀB with `rows` rows of A and B.
template <class T>
void add_product(T alpha, const T* A, int lda, int of_A, const T* B, int ldb, int of_B, int rows, T* C, int ldc) {
    const T one = 1;
    Functions<T>::gemm("N", "T", &of_B, &of_A, &rows, &alpha, B, &ldb, A, &lda, &one, C, &ldc);
}

// Compute C ← C + AᵀA with `rows` rows of A, in the upper triangle.
template <class T> void add_gram(const T* A, int lda, int rows, T* C, int ldc, int n) {
    const T one = 1;
    Functions<T>::syrk("L", "N", &n, &rows, &one, A, &lda, &one, C, &ldc);
}

} // namespace qpdiff::blas
