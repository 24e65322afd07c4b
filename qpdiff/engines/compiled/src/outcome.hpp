// The arrays of a call in the caller's memory: where the problems of a batch start from, and where their outcome goes.
#pragma once
#include "method/state.hpp"
#include "operands.hpp"

namespace qpdiff {

// An array whose first axis is the batch, with a stride of 0 where one entry is for all problems; without data, none.
template <class T> struct Rows {
    T* data = nullptr;
    Index stride = 0;
    T* at(Index b) const { return data ? data + b * stride : nullptr; }
};

// A warm start: qpdiff.engines.base.StartingPoint; multipliers are without padding.
template <class T> struct StartingPoint {
    Rows<const T> x, v;
    Rows<const bool> usable;

    // Read the starting point of problem b into a lane; return whether it has a usable one.
    template <class Team> bool load(const Problem<Team>& o, Index b, Iterate<Team>& at, int lane = 0) const {
        if (!x.data || !*usable.at(b)) {
            return false;
        }
        scatter<Team>(x.at(b), o.n, at.x.data, lane);
        scatter_rows(o, v.at(b), at.v, lane);
        return true;
    }
};

// The arrays of qpdiff.engines.base.Outcome, to be filled.
template <class T> struct Outcome {
    Rows<T> x, v, s;
    Rows<int> status, iterations;
    Rows<double> objective, primal, dual, gap;

    // Put the outcome of problem b, which is in a lane, into the arrays.
    template <class Team>
    void put(const Problem<Team>& o, Index b, int lane, const Iterate<Team>& at, const State<Team>& state,
             int count) const {
        auto number = [lane](const auto& of) {
            if constexpr (Team::lanes) {
                return of[lane];
            } else {
                return of;
            }
        };
        gather<Team>(at.x.data, o.n, x.at(b), lane);
        gather_rows(o, at.v, v.at(b), lane);
        gather_rows(o, at.s, s.at(b), lane);
        *status.at(b) = int(number(state.status));
        *iterations.at(b) = count;
        *objective.at(b) = number(state.objective);
        *primal.at(b) = number(state.absolute.primal);
        *dual.at(b) = number(state.absolute.dual);
        *gap.at(b) = number(state.absolute.gap);
    }
};

} // namespace qpdiff
