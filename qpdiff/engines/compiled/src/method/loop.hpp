// The iteration, from the start of a problem to its end: for one problem, and for those of a lane group together.
#pragma once
#include "dual_space.hpp"

namespace qpdiff {

// The end of the iteration on one problem.
template <class Team> struct Ended {
    const Iterate<Team>* at;
    State<Team> state;
    int iterations;
    bool factor_ok;   // whether the factor of the last step can be used
    bool interrupted; // then nothing else here is valid
};

// True where steps are made in the dual space: more operations on fewer numbers. float32 needs its residuals in
// float64, which they do not give.
template <Form FORM, class Team>
constexpr bool in_dual_space = FORM == Form::dense_dual && sizeof(typename Team::Real) == 8 && !Team::lanes;

// Start in the ordinary way. In the dual space also fill what is known of x, and whether it was formed.
template <Form FORM, class Team>
QP_INLINE Start<Team> begin_ordinary(Problem<Team>& o, Iterate<Team>& current, Iterate<Team>& previous,
                                     dual_space::ImplicitX& known, bool& formed) {
    if constexpr (in_dual_space<FORM, Team>) {
        return dual_space::begin(o, current, previous, known, formed);
    } else {
        formed = true;
        return begin_closer<FORM>(o, current, previous);
    }
}

// Iterate on one problem until it has ended. `load_warm_start` fills an iterate with the solution of another problem to
// start from and returns whether there is one; `interrupted` returns whether to give up.
template <Form FORM, class Team, class LoadWarmStart, class Interrupted>
QP_NOINLINE Ended<Team> iterate(Problem<Team>& o, LoadWarmStart load_warm_start, Interrupted interrupted) {
    constexpr bool DUAL_SPACE = in_dual_space<FORM, Team>;
    using Real = typename Team::Real;
    const Settings& settings = *o.settings;
    Iterate<Team>* current = &o.first;
    Iterate<Team>* previous = &o.second;
    int iterations = 0, limit = settings.max_iterations;
    dual_space::ImplicitX known;
    bool formed = true;
    Start<Team> start = begin_ordinary<FORM>(o, *current, *previous, known, formed);
    State<Team> state = start.state;
    Real mu = start.mu;
    bool factor_ok = start.factor_ok, warm = load_warm_start(*previous);
    if (warm) {
        WarmStart<Team> at = begin_warm<FORM>(o, *previous, warm, state, mu);
        if (at.usable) {
            std::swap(current, previous);
            state = at.state, mu = at.mu;
            formed = true;
        }
    }
    while (true) {
        Regularization<Team> regularization = first_regularization<FORM>(o);
        bool refine = true, in_dual = DUAL_SPACE;
        while (state.status == RUNNING) {
            if (interrupted()) {
                return {current, state, iterations, factor_ok, true};
            }
            std::swap(current, previous);
            Step<Team> made;
            // In the dual space the rounding of large multipliers is all in the constraints (docs/method.md).
            in_dual = in_dual && state.without_progress < o.parameters->equal_steps_after;
            if (in_dual) {
                if constexpr (DUAL_SPACE) {
                    if (formed) {
                        known = dual_space::anchor(o, *previous, known.column);
                    }
                    made = dual_space::step(o, mu, regularization, refine, state.without_progress, *previous, *current);
                }
            } else {
                made = step<FORM>(o, mu, regularization, refine, state.without_progress, *previous, *current);
            }
            factor_ok = made.factor_ok;
            if (!made.computed) {
                // A step that cannot be computed is not taken; more regularisation comes instead.
                copy_point(o, *previous, *current);
            }
            iterations++;
            State<Team> moved;
            if (in_dual) {
                if constexpr (DUAL_SPACE) {
                    if (made.computed) {
                        known = dual_space::update(o, known, made, *previous, *current);
                    }
                    moved = dual_space::assess(o, known, !made.computed, *current, *previous, state, iterations, limit,
                                               formed);
                }
            } else {
                moved = assess<FORM>(o, *current, *previous, state, iterations, limit);
            }
            bool again, reverted = accept_or_revert(o, state, moved, iterations, limit, again);
            if (!reverted && moved.status == RUNNING) {
                bool limiting = false, accurate = false;
                if (made.computed) {
                    accurate = constraints_are_accurate(o, made, *previous, *current, limiting);
                    if (!in_dual) {
                        accurate &= variables_are_accurate<FORM>(o, made, state, *previous, *current);
                    }
                }
                refine = !accurate;
                update_regularization<FORM>(o, made, mu, limiting, regularization);
                mu = made.mu;
            }
            state = moved;
            if (reverted) {
                std::swap(current, previous);
                iterations -= again ? 0 : 1;
            }
        }
        if (!warm || state.status == SOLVED || iterations == 0) {
            return {current, state, iterations, factor_ok, false};
        }
        // Begin again from the ordinary start, once, where a start near another solution has led nowhere.
        warm = false;
        limit = iterations + settings.max_iterations;
        start = begin_ordinary<FORM>(o, *current, *previous, known, formed);
        state = start.state, mu = start.mu, factor_ok = start.factor_ok;
    }
}

// ---- lane groups

// Exchange two iterates for the problems of a mask.
template <class Team>
QP_NOINLINE void exchange(const Problem<Team>& o, typename Team::Truth where, Iterate<Team>& a, Iterate<Team>& b) {
    exchange_points(o, where, a, b);
    exchange<Team>(where, a.r_x, b.r_x, o.np);
    exchange<Team>(where, a.Qx, b.Qx, o.np);
    exchange<Team>(where, a.r_v, b.r_v, o.rows);
    exchange<Team>(where, a.Kx, b.Kx, o.rows);
}

// Iterate on the problems of the first `size` lanes together. `load_warm_start` fills an iterate with solutions of
// other problems to start from and returns for which problems there is one. `finish(lane, iterate, state, iterations)`
// is called for each that ends SOLVED or, from the ordinary start, at the limit of iterations; `defer(lane)` for each
// that is to be solved by itself: where a step cannot be computed, for certificates, without progress, for large
// multipliers of a dense problem, and where a warm start has led nowhere.
template <Form FORM, class Team, class LoadWarmStart, class Finish, class Defer, class Interrupted>
QP_NOINLINE void iterate_lanes(Problem<Team>& o, int size, LoadWarmStart load_warm_start, Finish finish, Defer defer,
                               Interrupted interrupted) {
    using S = typename Team::Number;
    using B = typename Team::Truth;
    S running = as<S>(RUNNING);
    int iterations = 0, limit = o.settings->max_iterations;
    Iterate<Team>* current = &o.first;
    Iterate<Team>* previous = &o.second;
    // A dense problem is small enough to be solved by itself where the multipliers of the ordinary start are large.
    constexpr bool CLOSER = FORM == Form::sparse_kkt;
    Start<Team> start;
    if constexpr (CLOSER) {
        start = begin_closer<FORM>(o, *current, *previous);
    } else {
        start = begin<FORM>(o, *current, *previous, false);
    }
    State<Team> state = start.state;
    S mu = start.mu;
    B warm = load_warm_start(*previous);
    if (some(warm)) {
        WarmStart<Team> at = begin_warm<FORM>(o, *previous, warm, state, mu);
        exchange(o, at.usable, *current, *previous);
        state = choose<Team>(at.usable, at.state, state);
        mu = select(at.usable, at.mu, mu);
    }
    B active{};
    for (int lane = 0; lane < size; lane++) {
        active[lane] = -1;
    }
    active &= start.factor_ok & (state.status == running);
    if constexpr (!CLOSER) {
        active &= no(has_large_multipliers(o, start));
    }
    for (int lane = 0; lane < size; lane++) {
        if (!active[lane]) {
            defer(lane);
        }
    }
    Regularization<Team> regularization = first_regularization<FORM>(o);
    B refine = truth<B>(true);
    while (some(active) && !interrupted()) {
        std::swap(current, previous);
        Step<Team> made = step<FORM>(o, mu, regularization, refine, state.without_progress, *previous, *current);
        iterations++;
        State<Team> moved = assess<FORM>(o, *current, *previous, state, iterations, limit);
        B limiting, again, accurate = constraints_are_accurate(o, made, *previous, *current, limiting);
        accurate &= variables_are_accurate<FORM>(o, made, state, *previous, *current);
        B reverted = active & accept_or_revert(o, state, moved, iterations, limit, again);
        again &= active;
        if (some(reverted)) {
            exchange(o, reverted, *current, *previous);
        }
        state = moved;
        B usable = made.computed | reverted;
        B at_limit = no(warm) & (state.status == as<S>(MAX_ITERATIONS));
        B ended = active & usable & ((state.status == as<S>(SOLVED)) | at_limit);
        B going_on = active & usable & (state.status == running);
        if (some(active & no(going_on))) {
            for (int lane = 0; lane < size; lane++) {
                if (ended[lane]) {
                    finish(lane, *current, state, iterations - (reverted[lane] ? 1 : 0));
                } else if (active[lane] && !going_on[lane]) {
                    defer(lane);
                }
            }
        }
        active = going_on;
        Regularization<Team> updated = regularization;
        update_regularization<FORM>(o, made, mu, limiting, updated);
        regularization.rho = select(again, regularization.rho, updated.rho);
        regularization.delta = select(again, regularization.delta, updated.delta);
        mu = select(again, mu, made.mu);
        refine = (again & refine) | (no(again) & no(accurate));
    }
}

} // namespace qpdiff
