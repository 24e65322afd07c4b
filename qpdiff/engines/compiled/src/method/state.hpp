// The state of a problem at an iterate: its residuals, its status, and what is remembered from iterate to iterate.
#pragma once
#include "kkt.hpp"

namespace qpdiff {

// Primal residual, dual residual and duality gap.
template <class E> struct Residuals {
    E primal, dual, gap;
};

template <class Team> struct State {
    using Exact = typename Team::Exact;
    Exact status, objective;
    Residuals<Exact> absolute;             // in the caller's units
    Exact primal, dual, gap;               // the residuals in the units of the tolerance
    typename Team::Truth within_tolerance; // whether the iterate passes the stopping test
    Exact worst;                           // largest of the three residuals
    Residuals<Exact> best;                 // the smallest of each so far
    Exact certificate;                     // the largest ratio so far that may prove infeasibility or unboundedness
    Exact without_progress;                // iterations since `best` or `certificate` last improved
};

// Return the state before anything is known.
template <class Team> QP_INLINE State<Team> unknown_state() {
    using E = typename Team::Exact;
    E infinite = as<E>(INFINITY_), zero{};
    State<Team> state;
    state.status = as<E>(RUNNING);
    state.absolute = state.best = {infinite, infinite, infinite};
    state.objective = state.primal = state.dual = state.gap = state.worst = infinite;
    state.within_tolerance = truth<typename Team::Truth>(false);
    state.certificate = state.without_progress = zero;
    return state;
}

template <class Truth, class E>
QP_INLINE Residuals<E> choose(Truth where, const Residuals<E>& a, const Residuals<E>& b) {
    return {select(where, a.primal, b.primal), select(where, a.dual, b.dual), select(where, a.gap, b.gap)};
}

// Take one state for the problems of a mask, another for the rest.
template <class Team>
QP_INLINE State<Team> choose(typename Team::Truth where, const State<Team>& a, const State<Team>& b) {
    typename Team::Truth within_tolerance = (where & a.within_tolerance) | (no(where) & b.within_tolerance);
    return {select(where, a.status, b.status),
            select(where, a.objective, b.objective),
            choose(where, a.absolute, b.absolute),
            select(where, a.primal, b.primal),
            select(where, a.dual, b.dual),
            select(where, a.gap, b.gap),
            within_tolerance,
            select(where, a.worst, b.worst),
            choose(where, a.best, b.best),
            select(where, a.certificate, b.certificate),
            select(where, a.without_progress, b.without_progress)};
}

// ---- points

// Copy the point of an iterate, without its products and residuals.
template <class Team>
QP_INLINE void copy_point(const Problem<Team>& o, const Iterate<Team>& from, const Iterate<Team>& to) {
    copy<Team>(from.x, to.x, o.np);
    copy<Team>(from.v, to.v, o.rows);
    copy<Team>(from.s, to.s, o.rows);
    if constexpr (Team::PRICED) {
        copy<Team>(from.t, to.t, o.rows);
        copy<Team>(from.z, to.z, o.rows);
        copy<Team>(from.r, to.r, o.rows);
    }
}

// Exchange the entries of two vectors for the problems of a mask.
template <class Team>
QP_INLINE void exchange(typename Team::Truth where, typename Team::Vector a, typename Team::Vector b, int count) {
    Team::each(count, [&](auto i) {
        auto x = a[i], y = b[i];
        a.set(i, select(where, y, x));
        b.set(i, select(where, x, y));
    });
}

// Exchange the points of two iterates for the problems of a mask.
template <class Team>
QP_INLINE void exchange_points(const Problem<Team>& o, typename Team::Truth where, const Iterate<Team>& a,
                               const Iterate<Team>& b) {
    exchange<Team>(where, a.x, b.x, o.np);
    exchange<Team>(where, a.v, b.v, o.rows);
    exchange<Team>(where, a.s, b.s, o.rows);
    if constexpr (Team::PRICED) {
        exchange<Team>(where, a.t, b.t, o.rows);
        exchange<Team>(where, a.z, b.z, o.rows);
        exchange<Team>(where, a.r, b.r, o.rows);
    }
}

} // namespace qpdiff
