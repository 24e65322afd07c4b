// The GPU kernels as a shared library for the CPU, with emulated blocks.
#include "emulation.hpp"

#include <cstring>

#include "block_differentiate.hpp"
#include "block_solve.hpp"

namespace {

using namespace qpdiff;

struct Kernel {
    const char* name;
    void (*run)(const void*);
    std::size_t argument_bytes;
};

template <class T, Form FORM, bool PRICED, class Launch> void run(const void* arguments) {
    block::run<T, FORM, PRICED>(*static_cast<const Launch*>(arguments));
}

#define QP_KERNELS(form, type)                                                                                         \
    {"solve_" #form "_" #type, run<type, Form::form, false, SolveLaunch>, sizeof(SolveLaunch)},                        \
        {"solve_" #form "_" #type "_priced", run<type, Form::form, true, SolveLaunch>, sizeof(SolveLaunch)},           \
        {"derivative_" #form "_" #type, run<type, Form::form, false, DerivativeLaunch>, sizeof(DerivativeLaunch)},     \
        {"derivative_" #form "_" #type "_priced", run<type, Form::form, true, DerivativeLaunch>,                       \
         sizeof(DerivativeLaunch)},

constexpr Kernel KERNELS[] = {
    // clang-format off
    QP_KERNELS(primal, double) QP_KERNELS(dense_dual, double) QP_KERNELS(diagonal_dual, double)
    QP_KERNELS(primal, float) QP_KERNELS(dense_dual, float) QP_KERNELS(diagonal_dual, float)
    // clang-format on
};

} // namespace

// Run a kernel, with the arguments of a launch; return 0, or 1 where there is no such kernel. `order` is an
// `emulation::Order`.
extern "C" int qp_emulated_launch(const char* kernel, int blocks, int threads, std::size_t shared_bytes,
                                  const void* arguments, std::size_t argument_bytes, int order) {
    for (const Kernel& one : KERNELS) {
        if (std::strcmp(one.name, kernel) == 0 && one.argument_bytes == argument_bytes) {
            emulation::launch(blocks, threads, shared_bytes, order, one.run, arguments);
            return 0;
        }
    }
    return 1;
}

// Fill in how much memory a kernel needs: the five numbers of `BlockSizes`.
extern "C" void qp_block_sizes(int derivative, int form, int n, int p, int m, int lower, int upper, int priced,
                               int itemsize, int limit, long long* sizes) {
    BlockShape shape{form, n, p, m, lower, upper, priced, 0};
    BlockSizes found = itemsize == sizeof(double) ? block::sizes<double>(derivative, shape, limit)
                                                  : block::sizes<float>(derivative, shape, limit);
    std::memcpy(sizes, &found, sizeof(found));
}
