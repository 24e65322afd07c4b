// The arguments of the GPU kernels (kernels.cu): plain structs with the same layout in C++, CUDA and ctypes. A kernel
// has one parameter, such a struct by value.
//
// Every array is in device memory and contiguous within a problem, matrices by rows. Numbers are of the kernel's type
// T, double or float, unless a comment says otherwise. Constraints ("rows") are in the order A, G, lower bounds, upper
// bounds; v is their multipliers. B problems are solved by any number of blocks: block k takes problems k, k + blocks,
// …
//
// The kernels, where TYPE is `double` or `float`, with blocks of 2, 4, 8, 16 or 32 threads, or of a multiple of 32:
//
//   solve_primal_TYPE, solve_dense_dual_TYPE, solve_diagonal_dual_TYPE(SolveLaunch)
//       Solve the batch. The form is `shape.form`. Problems for which a dual form is not safe are left unsolved, with
//       `form` set to Form::primal: launch solve_primal_TYPE with the same struct afterwards, on the same stream. It
//       solves just these; the blocks of other problems end at once.
//   derivative_primal_TYPE, derivative_dense_dual_TYPE, derivative_diagonal_dual_TYPE(DerivativeLaunch)
//       Solve the KKT system at the solutions, with the factors that the solve has stored or else with a new one, and
//       compute the gradients of the matrices that each problem has of its own. The gradient of a matrix that is shared
//       is the product of two matrices over the batch, −½ (U_xᵀX + XᵀU_x) for Q and −(VᵀU_x + U_vᵀX) for A and G: left
//       to the array library.
//
// Each has a twin for problems with prices of violations, whose name ends with _priced.
#pragma once
#include "method/problem.hpp"

namespace qpdiff {

// An operand; without data it is not given.
struct OperandArray {
    const void* data;
    long long stride; // numbers from one problem to the next, 0 where it is shared
};

struct BlockShape {
    int form;         // the preferred one, which the name of the first kernel has: a `Form`
    int n, p, m;      // variables, rows of A, rows of G
    int lower, upper; // 1 where lb, or ub, is given, else 0
    int priced;       // 1 where violations have prices, else 0
    int reserved;     // 0
};

// The prices of violating some constraints: one for each of them, or none.
struct PriceArrays {
    OperandArray linear, quadratic;
};

// The operands, in the order of qpdiff.problem.OPERANDS, and the prices of violations.
struct OperandArrays {
    OperandArray Q, q, G, h, A, b, lb, ub;
    PriceArrays price_of_A, price_of_G, price_of_bounds;
};

// Factors and scaling that the solve stores for the derivative. Each has room for B problems. `constant` and `last` may
// be null: then the derivative factors the KKT matrix again.
struct StoredArrays {
    void* constant;            // (B, constant numbers); (1, constant numbers) with `constant_stride` 0
    void* last;                // (B, last numbers)
    void* scaling;             // (B, n + rows): D, then E
    int* form;                 // (B,): the `Form` that each problem has been solved with
    unsigned char* factor_ok;  // (B,): 1 where the last factor can be used, else 0
    long long constant_stride; // numbers from one problem to the next; 0: one entry, that of problem 0, is for all,
                               // where Q, A, G, lb and ub are shared
};

// Memory that a launch works in: `BlockSizes` says how much.
struct BlockMemory {
    void* workspace;           // blocks × `workspace_bytes`, aligned to 16 bytes; need not be initialised
    long long workspace_bytes; // of one block
    int shared_bytes;          // dynamic shared memory that the kernel is launched with
    int reserved;              // 0
};

struct SolveLaunch {
    Parameters parameters; // qpdiff.engines.parameters, all double, in the order of `_core.PARAMETERS`
    Settings settings;
    OperandArrays operands;
    BlockShape shape;
    int count;       // B
    int check;       // 1: check the values of operands
    double rounding; // rounding error to allow in Q, relative to its largest entry: `Problem.rounding`
    // A warm start; all null without one.
    const void* start_x;               // (B, n)
    const void* start_v;               // (B, rows)
    const unsigned char* start_usable; // (B,): 1 where problem b has one
    // The outcome.
    void *x, *v, *s;                         // (B, n), (B, rows), (B, rows)
    int *status, *iterations;                // (B,)
    double *objective, *primal, *dual, *gap; // (B,), double in any case
    int*
        refused; // (B,): with `check`, 1 where an operand breaks a rule, else 0; such a problem is not solved. Operands
                 // that are shared are checked with problem 0 alone. Both launches may set it; the first one writes 0.
    StoredArrays stored;
    BlockMemory memory;
};

struct DerivativeLaunch {
    Parameters parameters;
    OperandArrays operands;
    BlockShape shape;
    int count;
    int reserved;             // 0
    double fill;              // the solution for problems that are not SOLVED
    const void *x, *v, *s;    // the solutions, as the solve wrote them
    const int* status;        // (B,)
    OperandArray r_x, r_v;    // right-hand sides: (B, n), (B, rows)
    void *u_x, *u_v;          // the solution of the KKT system: (B, n), (B, rows)
    void *of_Q, *of_A, *of_G; // gradients of the matrices: (B, n, n), (B, p, n), (B, m, n), or null
    StoredArrays stored;      // is read
    BlockMemory memory;
};

// How much memory a kernel needs for one shape, and for a limit on the dynamic shared memory of a block. In Python:
// `_core.block_sizes(derivative, form, n, p, m, lower, upper, priced, itemsize, limit)`, which returns the five.
// In the shared library of emulation.cpp: `qp_block_sizes`, with the same arguments and a pointer to the five.
struct BlockSizes {
    long long least_shared;   // bytes of shared memory without any matrix: where this is too much, it cannot run
    long long shared;         // bytes of shared memory with all matrices that fit within the limit
    long long workspace;      // bytes of workspace of one block, with so much shared memory
    long long constant, last; // numbers stored for each problem in `StoredArrays`
};

static_assert(sizeof(OperandArray) == 16 && sizeof(OperandArrays) == 224 && sizeof(BlockShape) == 32);
static_assert(sizeof(Settings) == 24 && offsetof(Settings, max_iterations) == 20);
static_assert(sizeof(StoredArrays) == 48 && sizeof(BlockMemory) == 24);
static_assert(sizeof(Parameters) % 8 == 0 && offsetof(SolveLaunch, settings) == sizeof(Parameters));
static_assert(offsetof(SolveLaunch, shape) == sizeof(Parameters) + 248 &&
              offsetof(SolveLaunch, rounding) == sizeof(Parameters) + 288);
static_assert(offsetof(SolveLaunch, stored) == sizeof(Parameters) + 400 &&
              sizeof(SolveLaunch) == sizeof(Parameters) + 472);
static_assert(offsetof(DerivativeLaunch, fill) == sizeof(Parameters) + 264 &&
              offsetof(DerivativeLaunch, r_x) == sizeof(Parameters) + 304);
static_assert(offsetof(DerivativeLaunch, stored) == sizeof(Parameters) + 376 &&
              sizeof(DerivativeLaunch) == sizeof(Parameters) + 448);

} // namespace qpdiff
