// The gradients of the operands of a batch, in arrays of the caller's, and those of the vectors, which the solution
// (u_x, u_v) of the KKT system has in it.
#pragma once
#include "outcome.hpp"

namespace qpdiff {

// Without data where they are not wanted.
template <class T> struct Gradients {
    Rows<T> Q, q, G, h, A, b, lb, ub;
};

// Call put(entry of a gradient, number) for the gradients of the vectors of problem b.
//
// Where lb = ub fixes a variable, as in some problems of a batch that is `fixed`, that of the bound which does not hold
// it against the cost is 0 (`split_rows` in problem.py).
//
// Not inline: as a part of the workers it made their solves 5 to 14 % slower.
template <class T, class Batch, class Put>
QP_NOINLINE void each_vector_gradient(const Batch& batch, const Gradients<T>& to, Index b, Put put) {
    const Operands& operands = batch.operands;
    const T *u_x = batch.u_x.at(b), *of_A = batch.u_v.at(b), *of_G = of_A + operands.p;
    auto each = [&](const Rows<T>& gradient, int count, auto number) {
        if (T* out = gradient.at(b)) {
            for (int i = 0; i < count; i++) {
                put(out[i], number(i));
            }
        }
    };
    each(to.q, operands.n, [&](int j) { return -u_x[j]; });
    each(to.b, operands.p, [&](int i) { return of_A[i]; });
    each(to.h, operands.m, [&](int i) { return of_G[i]; });

    const T *of_lb = of_G + operands.m, *of_ub = of_lb + (operands.lb.given() ? operands.n : 0);
    if (!batch.fixed) {
        each(to.lb, operands.n, [&](int j) { return -of_lb[j]; });
        each(to.ub, operands.n, [&](int j) { return of_ub[j]; });
        return;
    }
    auto fixed = [&](int j) {
        T low = entry<T>(operands.lb.at(b), operands.lb.column, j);
        return low == entry<T>(operands.ub.at(b), operands.ub.column, j) && std::fabs(low) < T(INFINITY_);
    };
    auto at_upper = [&](int j) { return batch.multiplier(b, operands.linear() + j) < 0; };
    each(to.lb, operands.n, [&](int j) { return fixed(j) && at_upper(j) ? T(0) : -of_lb[j]; });
    each(to.ub, operands.n, [&](int j) { return !fixed(j) ? of_ub[j] : at_upper(j) ? -of_lb[j] : T(0); });
}

// Sum the gradients of the vectors that problems share over the batch, in its order, once all problems are solved.
template <class T, class Batch> void sum_vector_gradients(const Batch& batch) {
    const Operands& operands = batch.operands;
    const Gradients<T>& to = batch.sums;
    bool shared = false;
    auto clear = [&](const Rows<T>& gradient, int count) {
        if (gradient.data) {
            std::fill(gradient.data, gradient.data + count, T(0));
            shared = true;
        }
    };
    clear(to.q, operands.n), clear(to.b, operands.p), clear(to.h, operands.m);
    clear(to.lb, operands.n), clear(to.ub, operands.n);
    for (Index b = 0; shared && b < operands.count; b++) {
        each_vector_gradient(batch, to, b, [](T& sum, T number) { sum += number; });
    }
}

} // namespace qpdiff
