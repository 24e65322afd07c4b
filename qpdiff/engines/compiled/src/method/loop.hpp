// From the start to the end: one problem, or the problems of the lanes together.
#pragma once
#include <utility>

#include "dual_space.hpp"

namespace qpdiff {

// Where one problem has ended.
template <class Team> struct Ended {
    const Iterate<Team>* at;
    Verdict<Team> verdict;
    int iterations;
    bool factor_ok;   // whether the factor of its last step is of use
    bool interrupted; // then nothing of this is
};

// Whether steps are made without x: they are more operations on fewer numbers.
template <Form FORM, class Team>
constexpr bool in_dual_space = FORM == Form::dense_dual && sizeof(typename Team::Real) == 8 && !Team::lanes;

// Start in the ordinary way; in the dual space also say what is known of x, and whether it was formed.
template <Form FORM, class Team>
QP_INLINE Start<Team> begin_anywhere(Problem<Team>& o, Iterate<Team>& now, Iterate<Team>& before,
                                     dual_space::Products& known, bool& formed) {
    if constexpr (in_dual_space<FORM, Team>) {
        return dual_space::begin(o, now, before, known, formed);
    } else {
        formed = true;
        return begin_closer<FORM>(o, now, before);
    }
}

// Carry one problem to its end. `load_near` puts another problem's solution into an iterate to start from, if it can;
// `interrupted` says whether to give up.
template <Form FORM, class Team, class LoadNear, class Interrupted>
QP_NOINLINE Ended<Team> iterate(Problem<Team>& o, LoadNear load_near, Interrupted interrupted) {
    constexpr bool DUAL_SPACE = in_dual_space<FORM, Team>;
    using Real = typename Team::Real;
    const Parameters& P = *o.parameters;
    const Settings& settings = *o.settings;
    Iterate<Team>* now = &o.first;
    Iterate<Team>* before = &o.second;
    int iterations = 0, limit = settings.max_iterations;
    dual_space::Products known;
    bool formed = true;
    Start<Team> start = begin_anywhere<FORM>(o, *now, *before, known, formed);
    Verdict<Team> verdict = start.verdict;
    Real mu = start.mu;
    bool factor_ok = start.factor_ok, warm = load_near(*before);
    if (warm) {
        Real near_mu = start_near(o, *before, mu);
        Verdict<Team> near = assess<FORM>(o, *before, *before, verdict, iterations, limit);
        if (near.status == RUNNING || near.status == SOLVED) {
            // Also from a solution one step is taken: the derivative needs its factor.
            std::swap(now, before);
            mu = near_mu;
            verdict = near;
            verdict.status = RUNNING;
            formed = true;
        }
    }
    while (true) {
        ProximalTerms<FORM, Team> terms(o);
        bool refine = true;
        while (verdict.status == RUNNING) {
            if (interrupted()) {
                return {now, verdict, iterations, factor_ok, true};
            }
            std::swap(now, before);
            Verdict<Team> past = verdict;
            Step<Team> made;
            if constexpr (DUAL_SPACE) {
                if (formed) {
                    known = dual_space::anchor(o, *before, known.column);
                }
                made = dual_space::step(o, mu, terms.delta, refine, past.waiting, *before, *now);
            } else {
                made = step<FORM>(o, mu, terms.rho, terms.delta, refine, past.waiting, *before, *now);
            }
            factor_ok = made.factor_ok;
            if (!made.sound) {
                // A step that cannot be computed is not taken; stronger proximal terms come instead.
                copy<Team>(before->x, now->x, o.np);
                copy<Team>(before->v, now->v, o.rows);
                copy<Team>(before->s, now->s, o.rows);
            }
            iterations++;
            if constexpr (DUAL_SPACE) {
                if (made.sound) {
                    known = dual_space::update(o, known, made, *before, *now);
                }
                verdict = dual_space::assess(o, known, !made.sound, *now, *before, past, iterations, limit, formed);
            } else {
                verdict = assess<FORM>(o, *now, *before, past, iterations, limit);
            }
            if (past.near && !(verdict.worst <= P.worthwhile * past.worst)) {
                // From a point within the tolerance one more step is worth it only if it halves the residuals. Where
                // they are above tol it gets a second chance, with step lengths that are the same.
                std::swap(now, before);
                verdict = past;
                if (past.worst > settings.tol && past.waiting < P.equal_steps_after && iterations < limit) {
                    verdict.status = RUNNING;
                    verdict.waiting = P.equal_steps_after;
                    continue;
                }
                verdict.status = SOLVED;
                iterations--;
                break;
            }
            if (verdict.status != RUNNING) {
                break;
            }
            if (made.sound) {
                bool limiting;
                bool exact = rows_are_exact(o, made, *before, *now, limiting);
                if constexpr (!DUAL_SPACE) {
                    exact &= variables_are_exact<FORM>(o, made, past, *before, *now);
                }
                refine = !exact;
                terms.shrink(o, mu, made.mu, limiting);
                mu = made.mu;
            } else {
                refine = true;
                terms.grow(o);
            }
        }
        if (!warm || verdict.status == SOLVED || iterations == 0) {
            return {now, verdict, iterations, factor_ok, false};
        }
        // Begin again from the ordinary start, once, where a start near another solution has led nowhere.
        warm = false;
        limit = iterations + settings.max_iterations;
        start = begin_anywhere<FORM>(o, *now, *before, known, formed);
        verdict = start.verdict, mu = start.mu, factor_ok = start.factor_ok;
    }
}

// ---- lanes

// Exchange two vectors of the problems of a mask.
template <class Team>
QP_INLINE void exchange(typename Team::Truth where, typename Team::Vector a, typename Team::Vector b, int count) {
    Team::each(count, [&](auto i) {
        auto x = a[i], y = b[i];
        a.set(i, select(where, y, x));
        b.set(i, select(where, x, y));
    });
}

template <class Team>
QP_NOINLINE void exchange(const Problem<Team>& o, typename Team::Truth where, Iterate<Team>& a, Iterate<Team>& b) {
    exchange<Team>(where, a.x, b.x, o.np);
    exchange<Team>(where, a.r_x, b.r_x, o.np);
    exchange<Team>(where, a.Qx, b.Qx, o.np);
    exchange<Team>(where, a.v, b.v, o.rows);
    exchange<Team>(where, a.s, b.s, o.rows);
    exchange<Team>(where, a.r_v, b.r_v, o.rows);
    exchange<Team>(where, a.Kx, b.Kx, o.rows);
}

// One verdict for the problems of a mask, another for the rest.
template <class Team>
QP_INLINE Verdict<Team> select_verdict(typename Team::Truth where, const Verdict<Team>& a, const Verdict<Team>& b) {
    return {select(where, a.status, b.status),
            select(where, a.objective, b.objective),
            select(where, a.found_primal, b.found_primal),
            select(where, a.found_dual, b.found_dual),
            select(where, a.found_gap, b.found_gap),
            select(where, a.primal, b.primal),
            select(where, a.dual, b.dual),
            select(where, a.gap, b.gap),
            (where & a.near) | (no(where) & b.near),
            select(where, a.worst, b.worst),
            select(where, a.best_primal, b.best_primal),
            select(where, a.best_dual, b.best_dual),
            select(where, a.best_gap, b.best_gap),
            select(where, a.certificate, b.certificate),
            select(where, a.waiting, b.waiting)};
}

// Carry the problems of the first lanes to their ends together. `keep(lane, iterate, verdict, iterations)` is called
// for each that takes the ordinary course, `leave(lane)` for each that does not: a pivot that is not positive, a
// certificate, no progress, large multipliers.
template <Form FORM, class Team, class Keep, class Leave, class Interrupted>
QP_NOINLINE void iterate_lanes(Problem<Team>& o, int size, Keep keep, Leave leave, Interrupted interrupted) {
    using S = typename Team::Number;
    using B = typename Team::Truth;
    const Parameters& P = *o.parameters;
    const Settings& settings = *o.settings;
    S running = as<S>(RUNNING), equal_steps_after = as<S>(P.equal_steps_after), tol = as<S>(settings.tol);
    int iterations = 0, limit = settings.max_iterations;
    Iterate<Team>* now = &o.first;
    Iterate<Team>* before = &o.second;
    Start<Team> start = begin<FORM>(o, *now, *before);
    Verdict<Team> verdict = start.verdict;
    B active{};
    for (int lane = 0; lane < size; lane++) {
        active[lane] = -1;
    }
    active &= start.factor_ok & (verdict.status == running) & no(start.multiplier_ratio > as<S>(P.large_multipliers));
    for (int lane = 0; lane < size; lane++) {
        if (!active[lane]) {
            leave(lane);
        }
    }
    S mu = start.mu;
    ProximalTerms<FORM, Team> terms(o);
    B refine = truth<B>(true);
    while (some(active) && !interrupted()) {
        std::swap(now, before);
        Verdict<Team> past = verdict;
        Step<Team> made = step<FORM>(o, mu, terms.rho, terms.delta, refine, past.waiting, *before, *now);
        iterations++;
        verdict = assess<FORM>(o, *now, *before, past, iterations, limit);
        B limiting;
        B exact = rows_are_exact(o, made, *before, *now, limiting);
        exact &= variables_are_exact<FORM>(o, made, past, *before, *now);
        // From a point within the tolerance one more step is worth it only if it halves the residuals.
        B back = active & past.near & no(verdict.worst <= P.worthwhile * past.worst);
        B again = back & (past.worst > tol) & (past.waiting < equal_steps_after) & truth<B>(iterations < limit);
        if (some(back)) {
            past.status = select(again, running, as<S>(SOLVED));
            past.waiting = select(again, equal_steps_after, past.waiting);
            verdict = select_verdict<Team>(back, past, verdict);
            exchange(o, back, *now, *before);
        }
        B sound = made.sound | back;
        B ended = active & sound & ((verdict.status == as<S>(SOLVED)) | (verdict.status == as<S>(MAX_ITERATIONS)));
        B going_on = active & sound & (verdict.status == running);
        if (some(active & no(going_on))) {
            for (int lane = 0; lane < size; lane++) {
                if (ended[lane]) {
                    keep(lane, *now, verdict, iterations - (back[lane] ? 1 : 0));
                } else if (active[lane] && !going_on[lane]) {
                    leave(lane);
                }
            }
        }
        active = going_on;
        ProximalTerms<FORM, Team> stay = terms;
        terms.shrink(o, mu, made.mu, limiting);
        terms.rho = select(again, stay.rho, terms.rho);
        terms.delta = select(again, stay.delta, terms.delta);
        mu = select(again, mu, made.mu);
        refine = (again & refine) | (no(again) & no(exact));
    }
}

} // namespace qpdiff
