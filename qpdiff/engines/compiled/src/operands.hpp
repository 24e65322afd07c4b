// The operands of a batch in the caller's memory: reading them into a problem, and checking them.
#pragma once
#include <algorithm>
#include <array>
#include <cstring>

#include "linalg/lanes.hpp"
#include "linalg/serial.hpp"
#include "method/convexity.hpp"

namespace qpdiff {

// An operand; its first axis is the batch, with a stride of 0 where it is shared.
struct Operand {
    const char* data = nullptr;
    Index batch = 0;           // bytes from one problem to the next
    Index row = 0, column = 0; // bytes from a row to the next, and from an entry to the next
    bool given() const { return data != nullptr; }
    bool shared() const { return batch == 0; }
    const char* at(Index b, int i = 0) const { return data + b * batch + i * row; }
};

// Prices of violations, by the constraints.
struct Prices {
    Operand of_A, of_G, of_bounds;
};

struct Operands {
    Operand Q, q, G, h, A, b, lb, ub;
    Prices linear_prices, quadratic_prices;
    int n = 0, m = 0, p = 0;
    Index count = 0;     // problems
    bool priced = false; // whether violations have prices
    int linear() const { return m + p; }
    bool matrices_shared() const { return Q.shared() && A.shared() && G.shared() && lb.shared() && ub.shared(); }
};

// Return entry j, for a stride in bytes.
template <class T> QP_INLINE T entry(const char* p, Index stride, int j) {
    T value;
    std::memcpy(&value, p + j * stride, sizeof(T));
    return value;
}

// Copy `count` entries, for a stride in bytes.
template <class T> QP_INLINE void read(const char* p, Index stride, int count, T* out) {
    if (stride == sizeof(T)) {
        std::memcpy(out, p, count * sizeof(T));
    } else {
        for (int j = 0; j < count; j++) {
            out[j] = entry<T>(p, stride, j);
        }
    }
}

// ---- numbers of one problem: those in a lane, or the only ones

// Set the number of one problem.
template <class Team> QP_INLINE void put(typename Team::Stored& to, int lane, typename Team::Real value) {
    if constexpr (Team::lanes) {
        reinterpret_cast<typename Team::Real*>(&to)[lane] = value;
    } else {
        to = value;
    }
}

// Return the number of one problem.
template <class Team> QP_INLINE typename Team::Real take(const typename Team::Stored& from, int lane) {
    if constexpr (Team::lanes) {
        return reinterpret_cast<const typename Team::Real*>(&from)[lane];
    } else {
        return from;
    }
}

// Copy `count` numbers of one problem from the caller's memory, and to it.
template <class Team, class T> void scatter(const T* from, int count, typename Team::Stored* to, int lane = 0) {
    for (int i = 0; i < count; i++) {
        put<Team>(to[i], lane, from[i]);
    }
}
template <class Team, class T> void gather(const typename Team::Stored* from, int count, T* to, int lane = 0) {
    for (int i = 0; i < count; i++) {
        to[i] = take<Team>(from[i], lane);
    }
}

// Copy `count` numbers of each problem in the lanes from the caller's memory, for a stride in bytes. Lane by lane it
// would take longer, as the numbers of one problem are a vector apart.
template <class Team>
void scatter_lanes(std::array<const char*, Team::PROBLEMS> from, Index stride, int count, typename Team::Stored* to) {
    for (int i = 0; i < count; i++) {
        typename Team::Stored value;
        for (int lane = 0; lane < Team::PROBLEMS; lane++) {
            put<Team>(value, lane, entry<typename Team::Real>(from[lane], stride, i));
        }
        to[i] = value;
    }
}

// ---- the constraints of a problem, and the caller's, which have no padding

// Call f(first of the problem's, first of the caller's, count) for each block of constraints.
template <class Team, class F> QP_INLINE void each_block(const Problem<Team>& o, F f) {
    f(0, 0, o.linear);
    if (o.lower) {
        f(o.at_lower(), o.linear, o.n);
    }
    if (o.upper) {
        f(o.at_upper(), o.linear + (o.lower ? o.n : 0), o.n);
    }
}

// Copy entries of all constraints of one problem from an array of the caller's, and to one.
template <class Team, class T>
void scatter_rows(const Problem<Team>& o, const T* from, typename Team::Vector to, int lane = 0) {
    each_block(o, [&](int row, int at, int count) { scatter<Team>(from + at, count, to.data + row, lane); });
}
template <class Team, class T>
void gather_rows(const Problem<Team>& o, typename Team::Vector from, T* to, int lane = 0) {
    each_block(o, [&](int row, int at, int count) { gather<Team>(from.data + row, count, to + at, lane); });
}

// Copy D and E of one problem from an array of the caller's, and to one.
template <class Team, class T> void scatter_scaling(const Problem<Team>& o, const T* from) {
    scatter<Team>(from, o.n, o.D.data);
    scatter_rows(o, from + o.n, o.E);
}
template <class Team, class T> void gather_scaling(const Problem<Team>& o, T* to, int lane = 0) {
    gather<Team>(o.D.data, o.n, to, lane);
    gather_rows(o, o.E, to + o.n, lane);
}

// ---- reading

// Read the vectors of problem b and the kinds of its constraints into a lane; return whether the kinds are those of the
// first lane. A limit that is infinite on the wrong side, where operands are not checked, becomes a constraint that no
// point satisfies, not one that is absent. Without `NUMBERS` only the kinds are read.
template <class Team, bool NUMBERS = true>
bool load_vectors(Problem<Team>& o, const Operands& operands, Index b, int lane = 0) {
    using T = typename Team::Real;
    bool same_kinds = true;
    auto set_row = [&](int i, T k, Kind kind, const RowPrice<T>& price) {
        if constexpr (Team::PRICED) {
            Limits<T> limits = price.apply(k, kind);
            put<Team>(o.v_lower.data[i], lane, limits.lower);
            put<Team>(o.v_upper.data[i], lane, limits.upper);
            put<Team>(o.compliance.data[i], lane, limits.compliance);
        }
        if constexpr (NUMBERS) {
            put<Team>(o.k.data[i], lane, k);
        }
        decltype(+o.kind.is_equality[0]) is_equality = kind == EQUALITY ? -1 : 0,
                                         is_inequality = kind == INEQUALITY ? -1 : 0;
        if (lane == 0) {
            o.kind.is_equality[i] = is_equality, o.kind.is_inequality[i] = is_inequality;
        }
        same_kinds &= o.kind.is_equality[i] == is_equality && o.kind.is_inequality[i] == is_inequality;
    };
    auto set_limit = [&](int i, T limit, const RowPrice<T>& price) {
        if (limit >= T(INFINITE)) {
            set_row(i, 0, ABSENT, price);
        } else {
            set_row(i, limit > -T(INFINITY_) ? limit : T(NOT_A_NUMBER), INEQUALITY, price);
        }
    };
    auto price_of = [&](const Operand& linear, const Operand& quadratic, int j) -> RowPrice<T> {
        auto number = [&](const Operand& of, T missing) {
            return of.given() ? entry<T>(of.at(b), of.column, j) : missing;
        };
        if constexpr (Team::PRICED) {
            return {number(linear, T(INFINITY_)), number(quadratic, T(0))};
        } else {
            return {};
        }
    };
    const Prices &linear = operands.linear_prices, &quadratic = operands.quadratic_prices;
    const char* q = operands.q.at(b);
    for (int j = 0; NUMBERS && j < o.n; j++) {
        put<Team>(o.q.data[j], lane, entry<T>(q, operands.q.column, j));
    }
    for (int i = 0; i < o.p; i++) {
        auto price = price_of(linear.of_A, quadratic.of_A, i);
        set_row(i, entry<T>(operands.b.at(b), operands.b.column, i), EQUALITY, price);
    }
    for (int i = o.p; i < o.linear; i++) {
        auto price = price_of(linear.of_G, quadratic.of_G, i - o.p);
        set_limit(i, entry<T>(operands.h.at(b), operands.h.column, i - o.p), price);
    }
    for (int j = 0; j < o.n && (o.lower || o.upper); j++) {
        T low = o.lower ? entry<T>(operands.lb.at(b), operands.lb.column, j) : 0;
        T high = o.upper ? entry<T>(operands.ub.at(b), operands.ub.column, j) : 0;
        if constexpr (NUMBERS) {
            put<Team>(o.lb.data[j], lane, low);
            put<Team>(o.ub.data[j], lane, high);
        }
        auto price = price_of(linear.of_bounds, quadratic.of_bounds, j);
        if (o.lower && o.upper && low == high && std::fabs(low) < T(INFINITY_)) {
            set_row(o.at_lower() + j, -low, EQUALITY, price);
            set_row(o.at_upper() + j, 0, ABSENT, price);
            continue;
        }
        if (o.lower) {
            set_limit(o.at_lower() + j, -low, price);
        }
        if (o.upper) {
            set_limit(o.at_upper() + j, high, price);
        }
    }
    return same_kinds;
}

// Read the matrix Q of problem b.
template <class Team> void load_Q(Problem<Team>& o, const Operands& operands, Index b) {
    for (int i = 0; i < o.n; i++) {
        read(operands.Q.at(b, i), operands.Q.column, o.n, o.Q[i]);
    }
}

// Read the matrices A and G of problem b.
template <class Team> void load_K(Problem<Team>& o, const Operands& operands, Index b) {
    for (int i = 0; i < o.p; i++) {
        read(operands.A.at(b, i), operands.A.column, o.n, o.K[i]);
    }
    for (int i = o.p; i < o.linear; i++) {
        read(operands.G.at(b, i - o.p), operands.G.column, o.n, o.K[i]);
    }
}

// Reads the matrices of one problem after the other; those that all share are read once.
class MatrixReader {
  public:
    struct Read {
        bool Q, K;
    };

    // Read the matrices of problem b that it does not share with the one before; return which these are.
    template <class Team> Read load(Problem<Team>& o, const Operands& operands, Index b) {
        Read read{first || !operands.Q.shared(), first || !operands.A.shared() || !operands.G.shared()};
        if (read.Q) {
            load_Q(o, operands, b);
        }
        if (read.K) {
            load_K(o, operands, b);
        }
        first = false;
        return read;
    }

  private:
    bool first = true;
};

// Read the matrices of `size` problems from b on into the lanes; the other lanes get the last one again.
template <class Team> void load_lanes(Problem<Team>& o, const Operands& operands, Index b, int size) {
    constexpr int W = lanes::Team::PROBLEMS;
    auto load_rows = [&](const Operand& from, int count, Matrix<lanes::Team::Number> to, int first) {
        for (int i = 0; i < count; i++) {
            const char* rows[W];
            for (int lane = 0; lane < W; lane++) {
                rows[lane] = from.at(b + std::min(lane, size - 1), i);
            }
            lanes::Team::Number* out = to[first + i];
            for (int j = 0; j < o.n; j++) {
                lanes::Team::Number value;
                for (int lane = 0; lane < W; lane++) {
                    value[lane] = entry<double>(rows[lane], from.column, j);
                }
                out[j] = value;
            }
        }
    };
    load_rows(operands.Q, o.n, o.Q, 0);
    load_rows(operands.A, o.p, o.K, 0);
    load_rows(operands.G, o.linear - o.p, o.K, o.p);
}

// ---- validation: operands that are refused here are checked again by qpdiff.validation.check_values, which raises the
// error

// Return whether the vectors of problem b are valid; with `with_shared`, those that are shared are checked, too.
template <class T> bool plausible_vectors(const Operands& operands, Index b, bool with_shared) {
    constexpr T infinity = T(INFINITY_);
    auto checked = [&](const Operand& v) { return v.given() && (with_shared || !v.shared()); };
    auto holds = [&](const Operand& v, int count, auto rule) {
        bool result = true;
        for (int j = 0; checked(v) && j < count; j++) {
            result &= rule(entry<T>(v.at(b), v.column, j));
        }
        return result;
    };
    auto finite = [&](T value) { return std::fabs(value) < infinity; };
    auto not_above = [&](T value) { return value < infinity; };
    auto not_below = [&](T value) { return value > -infinity; };
    auto linear = [&](T value) { return value >= 0; };
    auto quadratic = [&](T value) { return value >= 0 && value < infinity; };
    bool valid = holds(operands.q, operands.n, finite) & holds(operands.b, operands.p, finite) &
                 holds(operands.h, operands.m, not_below) & holds(operands.lb, operands.n, not_above) &
                 holds(operands.ub, operands.n, not_below);
    valid &= holds(operands.linear_prices.of_A, operands.p, linear) &
             holds(operands.linear_prices.of_G, operands.m, linear) &
             holds(operands.linear_prices.of_bounds, operands.n, linear) &
             holds(operands.quadratic_prices.of_A, operands.p, quadratic) &
             holds(operands.quadratic_prices.of_G, operands.m, quadratic) &
             holds(operands.quadratic_prices.of_bounds, operands.n, quadratic);
    const Operand &linear_bounds = operands.linear_prices.of_bounds,
                  &quadratic_bounds = operands.quadratic_prices.of_bounds;
    auto has_price = [&](int j) {
        return (linear_bounds.given() && entry<T>(linear_bounds.at(b), linear_bounds.column, j) < T(INFINITE)) ||
               (quadratic_bounds.given() && entry<T>(quadratic_bounds.at(b), quadratic_bounds.column, j) > 0);
    };
    bool crossing_checked =
        checked(operands.lb) || checked(operands.ub) || checked(linear_bounds) || checked(quadratic_bounds);
    if (operands.lb.given() && operands.ub.given() && crossing_checked) {
        for (int j = 0; j < operands.n; j++) {
            T low = entry<T>(operands.lb.at(b), operands.lb.column, j),
              high = entry<T>(operands.ub.at(b), operands.ub.column, j);
            valid &= low <= high || has_price(j);
        }
    }
    return valid;
}

} // namespace qpdiff
