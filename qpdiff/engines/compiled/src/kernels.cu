// The GPU kernels (launch.hpp says what they do). NVRTC compiles one at a time, as each takes seconds: with QP_STAGE as
// `solve` or `derivative`, QP_FORM as the name of a `Form`, QP_TYPE as `double` or `float`, and QP_PRICED as 1 where
// violations have prices, or else 0.
#include "block_differentiate.hpp"
#include "block_solve.hpp"

#if QP_PRICED
#define QP_JOINED(stage, form, type) stage##_##form##_##type##_priced
#else
#define QP_JOINED(stage, form, type) stage##_##form##_##type
#endif
#define QP_NAME(stage, form, type) QP_JOINED(stage, form, type)

using solve = qpdiff::SolveLaunch;
using derivative = qpdiff::DerivativeLaunch;

// With at most 256 threads each may have all of the 255 registers that it can address.
extern "C" __global__ void __launch_bounds__(256, 2)
    QP_NAME(QP_STAGE, QP_FORM, QP_TYPE)(const __grid_constant__ QP_STAGE launch) {
    qpdiff::block::run<QP_TYPE, qpdiff::Form::QP_FORM, QP_PRICED>(launch);
}
