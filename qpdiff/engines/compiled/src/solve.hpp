// Solving a batch on the CPU: small problems in lane groups, all others one by one.
#pragma once
#include <memory>
#include <optional>

#include "method/loop.hpp"
#include "outcome.hpp"
#include "queue.hpp"
#include "workspace.hpp"

namespace qpdiff {

// The arrays of qpdiff.engines.compiled.engine.Stored: factors and scaling for the derivative.
template <class T> struct StoredBatch {
    StoredSizes<serial::Team<T>> sizes;
    Rows<T> constant, last; // `StoredFactors`, without data where they are not stored
    Rows<T> scaling;        // D, then E without padding
    Rows<int> form;         // the form that each problem has been solved with
    Rows<bool> factor_ok;   // whether the last factor can be used
    StoredFactors<serial::Team<T>> at(Index b) const { return {sizes, constant.at(b), last.at(b)}; }
};

template <class T> StoredSizes<serial::Team<T>> stored_sizes(const Shape& shape) {
    using Team = serial::Team<T>;
    return {shape.form, shape.n, shape.linear, Team::padded(shape.linear) + shape.bounds() * Team::padded(shape.n)};
}

template <class T> struct Batch {
    Operands operands;
    Shape shape;
    Settings settings;
    const Parameters* parameters;
    bool check;
    double rounding; // rounding error to allow in Q, relative to its largest entry
    bool lanes;      // whether to solve in lane groups
    StartingPoint<T> start;
    Outcome<T> outcome;
    StoredBatch<T> stored;
};

// Solves the problems that one thread claims. Where all matrices are shared, they are prepared once for all threads.
template <class T, bool PRICED> class Worker {
  public:
    Worker(const Batch<T>& batch, Queue& queue, bool calling)
        : batch(batch), queue(queue), calling(calling), workspace(batch.shape), o(workspace->problem),
          memory([this](Arena& arena) { lay_out(arena); }) {
        o.parameters = batch.parameters;
        o.settings = &batch.settings;
        if (batch.lanes) {
            group.emplace(batch);
        }
    }

    // Prepare matrices that all problems share and find the form to solve them in; return false where Q is not convex.
    bool prepare_shared(Form& form) {
        load_matrices(0);
        form = prepare_form(0);
        return !refused;
    }

    void run(const Form* shared_form) {
        prepared = shared_form;
        Index first, last;
        while (queue.claim(first, last)) {
            if (batch.lanes) {
                solve_in_lanes(first, last);
            } else {
                for (Index b = first; b < last && !queue.interrupted(calling); b++) {
                    solve_one(b);
                    queue.finish(1);
                }
            }
        }
    }

  private:
    using Serial = WithPrices<serial::Team<T>, PRICED>;
    using Lanes = WithPrices<lanes::Team, PRICED>;
    const Batch<T>& batch;
    Queue& queue;
    bool calling;
    Borrowed<Workspace<Serial>> workspace;
    Problem<Serial>& o;
    const Form* prepared = nullptr;
    MatrixReader matrices;
    bool refused = false;
    T *own_constant = nullptr, *own_last = nullptr; // workspace for one problem, for factors that are not stored
    Memory memory;

    void lay_out(Arena& arena) {
        const StoredBatch<T>& stored = batch.stored;
        own_constant = stored.constant.data ? nullptr : arena.take<T>(stored.sizes.constant());
        own_last = stored.last.data ? nullptr : arena.take<T>(stored.sizes.last());
    }

    // Return where the factors of problem b go: the caller's arrays, or else workspace that every problem uses again.
    StoredFactors<serial::Team<T>> factors_of(Index b) const {
        const StoredBatch<T>& stored = batch.stored;
        T *constant = stored.constant.at(b), *last = stored.last.at(b);
        return {stored.sizes, constant ? constant : own_constant, last ? last : own_last};
    }

    // Read the matrices that problem b does not share with the one before, check and balance them.
    void load_matrices(Index b) {
        auto read = matrices.load(o, batch.operands, b);
        if (batch.check && !prepared) {
            refuse_unless(!read.Q || plausible_Q(o, T(batch.rounding)));
            refuse_unless(!read.K || Serial::all_finite(o.K, o.linear, o.n));
        }
        if (read.Q || read.K) {
            balance(o);
        }
        if (read.K && batch.shape.form == Form::diagonal_dual) {
            Serial::transpose(o.K, o.linear, o.n, o.K_transposed);
        }
    }

    // Compute the constants of the reduced matrix in the preferred form, or take the primal form where that is not
    // safe; also check that Q is convex. Return the form.
    Form prepare_form(Index b) {
        workspace->use(factors_of(b), batch.shape.form);
        Form form = batch.shape.form;
        if ((form == Form::dense_dual && !prepare<Form::dense_dual>(o)) ||
            (form == Form::diagonal_dual && !prepare<Form::diagonal_dual>(o))) {
            form = Form::primal;
        }
        // The other forms exist only for a Q that is positive definite.
        bool check = batch.check && form == Form::primal && (b == 0 || !batch.operands.Q.shared());
        refuse_unless(!check || convex(o, T(batch.rounding)));
        return form;
    }

    // End the call unless the operands are valid.
    void refuse_unless(bool valid) {
        if (!valid) {
            refused = true;
            queue.refuse();
        }
    }

    void solve_one(Index b) {
        refuse_unless(!batch.check || plausible_vectors<T>(batch.operands, b, b == 0));
        load_vectors(o, batch.operands, b);
        load_matrices(b);
        Form form = prepared ? *prepared : prepare_form(b);
        if (refused) {
            return;
        }
        workspace->use(factors_of(b), form);
        balance_cost(o, equilibrate(o));
        count_inequalities(o);
        if (form == Form::primal) {
            finish(b, form, solve_in<Form::primal>(b));
        } else if (form == Form::dense_dual) {
            finish(b, form, solve_in<Form::dense_dual>(b));
        } else {
            finish(b, form, solve_in<Form::diagonal_dual>(b));
        }
    }

    template <Form FORM> Ended<Serial> solve_in(Index b) {
        auto load_warm_start = [&](Iterate<Serial>& at) { return batch.start.load(o, b, at); };
        return iterate<FORM>(o, load_warm_start, [&] { return queue.interrupted(calling); });
    }

    // Put the outcome of problem b, its scaling and its form into the arrays.
    void finish(Index b, Form form, const Ended<Serial>& ended) {
        if (ended.interrupted) {
            return;
        }
        batch.outcome.put(o, b, 0, *ended.at, ended.state, ended.iterations);
        gather_scaling(o, batch.stored.scaling.at(b));
        *batch.stored.form.at(b) = int(form);
        *batch.stored.factor_ok.at(b) = ended.factor_ok && form == batch.shape.form;
    }

    // ---- lane groups; problems that `iterate_lanes` defers are solved one by one

    struct LaneGroup {
        Borrowed<Workspace<Lanes>> workspace;
        bool ready = false; // whether its matrices are prepared
        bool safe = false;  // whether the preferred form is safe for all of its problems
        explicit LaneGroup(const Batch<T>& batch) : workspace(batch.shape) {
            workspace->problem.parameters = batch.parameters;
            workspace->problem.settings = &batch.settings;
        }
    };
    std::optional<LaneGroup> group;

    void solve_in_lanes(Index first, Index last) {
        if constexpr (sizeof(T) == 8) {
            constexpr int W = Lanes::PROBLEMS;
            for (Index b = first; b < last && !queue.interrupted(calling); b += W) {
                int size = int(std::min<Index>(W, last - b));
                bool unsolved[W];
                std::fill(unsolved, unsolved + W, true);
                if (!solve_group(b, size, unsolved)) {
                    return;
                }
                for (int lane = 0; lane < size; lane++) {
                    if (unsolved[lane] && !queue.interrupted(calling)) {
                        solve_one(b + lane);
                    }
                }
                queue.finish(size);
            }
        }
    }

    // Solve the problems of a lane group but for those that stay `unsolved`; return false where an operand breaks a
    // rule.
    bool solve_group(Index b, int size, bool* unsolved) {
        using Team = Lanes;
        auto& o = group->workspace->problem;
        const Operands& operands = batch.operands;
        bool same_kinds = true;
        for (int lane = 0; lane < size; lane++) {
            refuse_unless(!batch.check || plausible_vectors<double>(operands, b + lane, b + lane == 0));
        }
        for (int lane = 0; lane < Team::PROBLEMS; lane++) {
            same_kinds &= load_vectors(o, operands, b + std::min(lane, size - 1), lane);
        }
        if (!group->ready || !operands.matrices_shared()) {
            load_lanes(o, operands, b, size);
            if (batch.check && !prepared) {
                refuse_unless(every(plausible_Q(o, batch.rounding) & Team::all_finite(o.K, o.linear, o.n)));
                refuse_unless(batch.shape.form != Form::primal || every(convex(o, batch.rounding)));
            }
            balance(o);
            group->safe = prepare_group(o);
            group->ready = true;
        }
        if (refused) {
            return false;
        }
        auto slope = equilibrate(o);
        // The scales of variables with a linear cost and no curvature are found one by one (`enlarge_flat`).
        typename Team::Number zero{};
        bool curved = every((o.any_flat == zero) | no(slope > zero));
        if (!same_kinds || !group->safe || !curved) {
            return true;
        }
        count_inequalities(o);
        if (batch.shape.form == Form::primal) {
            iterate_group<Form::primal>(b, size, unsolved);
        } else if (batch.shape.form == Form::dense_dual) {
            iterate_group<Form::dense_dual>(b, size, unsolved);
        } else {
            iterate_group<Form::diagonal_dual>(b, size, unsolved);
        }
        return true;
    }

    // Prepare the preferred form; return whether it is safe for all problems.
    bool prepare_group(Problem<Lanes>& o) {
        if (batch.shape.form == Form::dense_dual) {
            return every(prepare<Form::dense_dual>(o));
        }
        if (batch.shape.form == Form::diagonal_dual) {
            Lanes::transpose(o.K, o.linear, o.n, o.K_transposed);
            return every(prepare<Form::diagonal_dual>(o));
        }
        return true;
    }

    template <Form FORM> void iterate_group(Index b, int size, bool* unsolved) {
        auto& o = group->workspace->problem;
        std::fill(unsolved, unsolved + size, false);
        iterate_lanes<FORM>(
            o, size, [](Iterate<Lanes>&) { return typename Lanes::Truth{}; }, // those are solved one by one
            [&](int lane, const Iterate<Lanes>& at, const State<Lanes>& state, int iterations) {
                finish_lane<FORM>(b + lane, lane, at, state, iterations);
            },
            [&](int lane) { unsolved[lane] = true; }, [&] { return queue.interrupted(calling); });
    }

    // Put the outcome of problem b, which is in a lane, its scaling and its factors into the arrays.
    template <Form FORM>
    void finish_lane(Index b, int lane, const Iterate<Lanes>& at, const State<Lanes>& state, int iterations) {
        const auto& o = group->workspace->problem;
        auto matrix = [&](Lanes::Matrix from, int height, int columns, T* to) {
            int ld = whole_lines<T>(columns);
            for (int i = 0; i < height; i++, to += ld) {
                gather<Lanes>(from[i], columns, to, lane);
                std::fill(to + columns, to + ld, T(0));
            }
            std::fill(to, to + (Index)(whole_tiles(height) - height) * ld, T(0));
        };
        auto triangle = [&](Lanes::Matrix from, int size, T* to) {
            matrix(from, size, size, to);
            Matrix<T> U{to, whole_lines<T>(size)};
            Serial::complete_diagonal(U, size);
            Serial::invert_blocks(U, size);
        };
        batch.outcome.put(o, b, lane, at, state, iterations);
        gather_scaling(o, batch.stored.scaling.at(b), lane);
        *batch.stored.form.at(b) = int(FORM);
        *batch.stored.factor_ok.at(b) = true;
        StoredFactors<serial::Team<T>> stored = batch.stored.at(b);
        if (FORM == Form::dense_dual && stored.F && !prepared) {
            triangle(o.F, o.n, stored.F);
            matrix(o.V, o.n, o.linear, stored.V);
            matrix(o.S, o.linear, o.linear, stored.S);
        }
        if (FORM == Form::diagonal_dual && stored.diagonal && !prepared) {
            gather<Lanes>(o.diagonal.data, o.n, stored.diagonal, lane);
            std::fill(stored.diagonal + o.n, stored.diagonal + whole_lines<T>(o.n), smallest_normal<T>);
        }
        if (FORM != Form::dense_dual && stored.U) {
            triangle(o.U, FORM == Form::primal ? o.n : o.linear, stored.U);
            std::fill(stored.weights, stored.weights + this->o.rows, T(0));
            each_block(this->o, [&](int row, int at, int count) {
                gather<Lanes>(o.weights.data + at, count, stored.weights + row, lane);
            });
        }
    }
};

// Solve a batch; return false where an operand breaks a rule or, with a Python error set, where it was interrupted.
template <class T, bool PRICED> bool solve_batch(const Batch<T>& batch, int workers, PyObject* progress) {
    Queue queue(batch.operands.count, batch.lanes ? lanes::Team::PROBLEMS : 1, workers, progress);
    bool shared = batch.operands.matrices_shared();
    Form form = batch.shape.form;
    std::mutex preparing;
    bool ready = false, valid = true;
    auto make = [&](bool calling) { return std::make_unique<Worker<T, PRICED>>(batch, queue, calling); };
    return queue.run(make, [&](Worker<T, PRICED>& worker, bool) {
        if (shared) {
            std::lock_guard<std::mutex> lock(preparing);
            if (!ready) {
                valid = worker.prepare_shared(form);
                ready = true;
            }
        }
        if (valid) {
            worker.run(shared ? &form : nullptr);
        }
    });
}

} // namespace qpdiff
