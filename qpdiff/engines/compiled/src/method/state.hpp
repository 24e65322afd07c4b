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

} // namespace qpdiff
