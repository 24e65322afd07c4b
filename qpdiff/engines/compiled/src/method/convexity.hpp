// Whether the matrix Q of a problem is what it has to be. An operand that is refused here is checked again by
// qpdiff.validation.check_values, which raises the error.
#pragma once
#include "problem.hpp"

namespace qpdiff {

// Return the largest entry of a positive semidefinite Q, which is on its diagonal.
template <class Team> QP_INLINE typename Team::Number largest_of_Q(Problem<Team>& o) {
    typename Team::Entry largest{};
    Team::take_diagonal(o.Q, o.n, o.diagonal_Q);
    Team::each(o.np, [&](auto j) { largest = larger(absolute(o.diagonal_Q[j]), largest); });
    return larger(Team::largest(largest), as<typename Team::Number>(smallest_normal<typename Team::Real>));
}

// Return whether Q is finite, and symmetric but for a rounding error relative to its largest entry.
template <class Team> QP_NOINLINE typename Team::Truth plausible_Q(Problem<Team>& o, typename Team::Real rounding) {
    typename Team::Number limit = rounding * largest_of_Q(o);
    return is_finite(limit) & Team::symmetric(o.Q, o.n, limit);
}

// Return whether Q is positive semidefinite but for such a rounding error. It is divided by its largest entry, because
// else the shift would overflow with huge numbers and vanish with denormal ones.
template <class Team> QP_NOINLINE typename Team::Truth convex(Problem<Team>& o, typename Team::Real rounding) {
    using S = typename Team::Number;
    using Real = typename Team::Real;
    S per_largest = Real(1) / largest_of_Q(o);
    Team::each(o.np, [&](auto j) {
        o.columns.set(j, per_largest);
        o.added.set(j, rounding);
    });
    Team::scale_rows(o.Q, o.n, o.n, o.columns, o.square_matrix);
    Team::clear_padding(o.square_matrix, o.n);
    return Team::cholesky(o.square_matrix, o.added, o.square_matrix, o.n);
}

} // namespace qpdiff
