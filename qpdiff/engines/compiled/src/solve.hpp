// Solving a batch on the CPU: small problems in lanes, all others one by one.
#pragma once
#include <memory>

#include "method/loop.hpp"
#include "operands.hpp"
#include "queue.hpp"
#include "workspace.hpp"

namespace qpdiff {

// Arrays whose first axis is the batch, with a stride of 0 where one entry is for all problems; or none.
template <class T> struct Rows {
    T* data = nullptr;
    Index stride = 0;
    T* at(Index b) const { return data ? data + b * stride : nullptr; }
};

// Where the outcome goes: qpdiff.engines.base.Outcome.
template <class T> struct Outcome {
    Rows<T> x, v, s;
    Rows<int> status, iterations;
    Rows<double> objective, primal, dual, gap;
};

// What is stored of the problems for the derivative: qpdiff.engines.compiled.engine.Stored.
template <class T> struct StoredBatch {
    StoredSizes<T> sizes;
    Rows<T> constant, last; // `StoredFactors`, without data where nothing is stored
    Rows<T> scaling;        // D, then E in rows as the caller has them
    Rows<int> form;         // the form that each problem has been solved with
    Rows<bool> factor_ok;   // the last factor is of use
    StoredFactors<T> at(Index b) const { return {sizes, constant.at(b), last.at(b)}; }
};

template <class T> StoredSizes<T> stored_sizes(const Shape& shape) {
    using Team = serial::Team<T>;
    int bounds = int(shape.lower) + int(shape.upper);
    return {shape.form, shape.n, shape.linear, Team::padded(shape.linear) + bounds * Team::padded(shape.n)};
}

// Another problem's solution to start from, of rows as the caller has them.
template <class T> struct Near {
    Rows<const T> x, v;
    Rows<const bool> usable;
};

template <class T> struct Batch {
    Operands operands;
    Shape shape;
    Settings settings;
    const Parameters* parameters;
    bool check;
    double rounding; // how large rounding may be in Q
    bool lanes;      // whether to take problems several at a time
    Near<T> near;
    Outcome<T> outcome;
    StoredBatch<T> stored;
};

// Workspaces of a thread: the calling thread keeps them for the next call where they are small.
template <class Team> std::unique_ptr<Workspace<Team>>& idle_workspace() {
    static thread_local std::unique_ptr<Workspace<Team>> workspace;
    return workspace;
}

template <class Team> class Borrowed {
  public:
    static constexpr Index LARGEST = 1 << 20; // entries of the matrices

    Borrowed(const Shape& shape, bool calling) : calling(calling) {
        if (calling && idle_workspace<Team>() && idle_workspace<Team>()->shape == shape) {
            workspace = std::move(idle_workspace<Team>());
        } else {
            workspace = std::make_unique<Workspace<Team>>(shape);
        }
    }
    ~Borrowed() {
        if (calling && (Index)workspace->shape.n * (workspace->shape.n + workspace->shape.linear) <= LARGEST) {
            idle_workspace<Team>() = std::move(workspace);
        }
    }
    Workspace<Team>* operator->() { return workspace.get(); }

  private:
    bool calling;
    std::unique_ptr<Workspace<Team>> workspace;
};

// What a thread does. Problems whose matrices are shared have them prepared once, by the calling thread.
template <class T> class Worker {
  public:
    Worker(const Batch<T>& batch, Queue& queue, bool calling)
        : batch(batch), queue(queue), calling(calling), workspace(batch.shape, calling), o(workspace->problem),
          memory([this](Arena& arena) { lay_out(arena); }) {
        o.parameters = batch.parameters;
        o.settings = &batch.settings;
    }

    // Prepare matrices that all problems share, and say in which form to solve them; false where Q is not convex.
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
    using Serial = serial::Team<T>;
    const Batch<T>& batch;
    Queue& queue;
    bool calling;
    Borrowed<Serial> workspace;
    Problem<Serial>& o;
    const Form* prepared = nullptr;
    MatrixReader matrices;
    bool refused = false;
    T *own_constant = nullptr, *own_last = nullptr; // for one problem in place of what is not stored
    Memory memory;

    void lay_out(Arena& arena) {
        const StoredBatch<T>& stored = batch.stored;
        own_constant = stored.constant.data ? nullptr : arena.take<T>(stored.sizes.constant());
        own_last = stored.last.data ? nullptr : arena.take<T>(stored.sizes.last());
    }

    // The memory for what the engine stores of problem b, be it used again for the next one.
    StoredFactors<T> factors_of(Index b) const {
        const StoredBatch<T>& stored = batch.stored;
        T *constant = stored.constant.at(b), *last = stored.last.at(b);
        return {stored.sizes, constant ? constant : own_constant, last ? last : own_last};
    }

    // Read what problem b does not share with the one before, and what follows from the matrices alone.
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
            Serial::transpose(o.K, o.linear, o.n, o.turned);
        }
    }

    // Compute what does not change of the reduced matrix, in the form that suits; and check that Q is convex.
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

    // End the call unless what an operand has to be holds.
    void refuse_unless(bool good) {
        if (!good) {
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
        auto load_near = [&](Iterate<Serial>& at) {
            if (!batch.near.x.data || !*batch.near.usable.at(b)) {
                return false;
            }
            std::copy(batch.near.x.at(b), batch.near.x.at(b) + o.n, at.x.data);
            scatter_rows(o, batch.near.v.at(b), at.v);
            return true;
        };
        return iterate<FORM>(o, load_near, [&] { return queue.interrupted(calling); });
    }

    void finish(Index b, Form form, const Ended<Serial>& ended) {
        if (ended.interrupted) {
            return;
        }
        const Outcome<T>& outcome = batch.outcome;
        const Verdict<Serial>& verdict = ended.verdict;
        std::copy(ended.at->x.data, ended.at->x.data + o.n, outcome.x.at(b));
        gather_rows(o, ended.at->v, outcome.v.at(b));
        gather_rows(o, ended.at->s, outcome.s.at(b));
        put_verdict(b, verdict, ended.iterations, [](double number) { return number; });
        std::copy(o.D.data, o.D.data + o.n, batch.stored.scaling.at(b));
        gather_rows(o, o.E, batch.stored.scaling.at(b) + o.n);
        *batch.stored.form.at(b) = int(form);
        *batch.stored.factor_ok.at(b) = ended.factor_ok && form == batch.shape.form;
    }

    // Put how problem b stands into the outcome; `number_of` takes its own from the numbers of a team.
    template <class Team, class NumberOf>
    void put_verdict(Index b, const Verdict<Team>& verdict, int iterations, NumberOf number_of) {
        const Outcome<T>& outcome = batch.outcome;
        *outcome.status.at(b) = int(number_of(verdict.status));
        *outcome.iterations.at(b) = iterations;
        *outcome.objective.at(b) = number_of(verdict.objective);
        *outcome.primal.at(b) = number_of(verdict.found_primal);
        *outcome.dual.at(b) = number_of(verdict.found_dual);
        *outcome.gap.at(b) = number_of(verdict.found_gap);
    }

    // ---- lanes; those who do not take the ordinary course are solved one by one

    struct Lanes {
        Borrowed<lanes::Team> workspace;
        bool ready = false, safe = false;
        explicit Lanes(const Shape& shape, bool calling) : workspace(shape, calling) {}
    };
    std::unique_ptr<Lanes> group;

    void solve_in_lanes(Index first, Index last) {
        if constexpr (sizeof(T) == 8) {
            constexpr int W = lanes::Team::PROBLEMS;
            if (!group) {
                group = std::make_unique<Lanes>(batch.shape, calling);
                group->workspace->problem.parameters = batch.parameters;
                group->workspace->problem.settings = &batch.settings;
            }
            for (Index b = first; b < last && !queue.interrupted(calling); b += W) {
                int size = int(std::min<Index>(W, last - b));
                bool left[W];
                std::fill(left, left + W, true);
                if (!solve_group(b, size, left)) {
                    return;
                }
                for (int lane = 0; lane < size; lane++) {
                    if (left[lane] && !queue.interrupted(calling)) {
                        solve_one(b + lane);
                    }
                }
                queue.finish(size);
            }
        }
    }

    // Solve the problems of a group but for those that are left; false where an operand breaks a rule.
    bool solve_group(Index b, int size, bool* left) {
        using Team = lanes::Team;
        auto& o = group->workspace->problem;
        const Operands& operands = batch.operands;
        bool alike = true;
        for (int lane = 0; lane < size; lane++) {
            refuse_unless(!batch.check || plausible_vectors<double>(operands, b + lane, b + lane == 0));
        }
        for (int lane = 0; lane < Team::PROBLEMS; lane++) {
            alike &= load_vectors(o, operands, b + std::min(lane, size - 1), lane);
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
        // How large the linear cost of variables without curvature is to be is found one by one.
        bool curved = every((o.any_flat == Team::Number{}) | no(slope > Team::Number{}));
        if (!alike || !group->safe || !curved) {
            return true;
        }
        count_inequalities(o);
        if (batch.shape.form == Form::primal) {
            iterate_group<Form::primal>(b, size, left);
        } else if (batch.shape.form == Form::dense_dual) {
            iterate_group<Form::dense_dual>(b, size, left);
        } else {
            iterate_group<Form::diagonal_dual>(b, size, left);
        }
        return true;
    }

    bool prepare_group(Problem<lanes::Team>& o) {
        if (batch.shape.form == Form::dense_dual) {
            return every(prepare<Form::dense_dual>(o));
        }
        if (batch.shape.form == Form::diagonal_dual) {
            lanes::Team::transpose(o.K, o.linear, o.n, o.turned);
            return every(prepare<Form::diagonal_dual>(o));
        }
        return true;
    }

    template <Form FORM> void iterate_group(Index b, int size, bool* left) {
        auto& o = group->workspace->problem;
        std::fill(left, left + size, false);
        iterate_lanes<FORM>(
            o, size,
            [&](int lane, const Iterate<lanes::Team>& at, const Verdict<lanes::Team>& verdict, int iterations) {
                keep_lane<FORM>(b + lane, lane, at, verdict, iterations);
            },
            [&](int lane) { left[lane] = true; }, [&] { return queue.interrupted(calling); });
    }

    // Put aside what the problem of a lane has come to, and what its derivative needs.
    template <Form FORM>
    void keep_lane(Index b, int lane, const Iterate<lanes::Team>& at, const Verdict<lanes::Team>& verdict,
                   int iterations) {
        using Team = lanes::Team;
        const auto& o = group->workspace->problem;
        const Outcome<T>& outcome = batch.outcome;
        auto vector = [&](Team::Vector from, int count, T* to) {
            for (int i = 0; i < count; i++) {
                to[i] = take<Team>(from.data[i], lane);
            }
        };
        auto rows = [&](Team::Vector from, T* to) {
            each_block(o, [&](int row, int at, int count) { vector(from + row, count, to + at); });
        };
        auto matrix = [&](Team::Matrix from, int height, int columns, T* to) {
            int ld = whole_lines<T>(columns);
            for (int i = 0; i < height; i++, to += ld) {
                vector({from[i]}, columns, to);
                std::fill(to + columns, to + ld, T(0));
            }
            std::fill(to, to + (Index)(whole_tiles(height) - height) * ld, T(0));
        };
        auto triangle = [&](Team::Matrix from, int size, T* to) {
            matrix(from, size, size, to);
            Matrix<T> U{to, whole_lines<T>(size)};
            Serial::complete_diagonal(U, size);
            Serial::invert_blocks(U, size);
        };
        vector(at.x, o.n, outcome.x.at(b));
        rows(at.v, outcome.v.at(b));
        rows(at.s, outcome.s.at(b));
        put_verdict(b, verdict, iterations, [&](const auto& number) { return number[lane]; });
        vector(o.D, o.n, batch.stored.scaling.at(b));
        rows(o.E, batch.stored.scaling.at(b) + o.n);
        *batch.stored.form.at(b) = int(FORM);
        *batch.stored.factor_ok.at(b) = true;
        StoredFactors<T> stored = batch.stored.at(b);
        if (FORM == Form::dense_dual && stored.F && !prepared) {
            triangle(o.F, o.n, stored.F);
            matrix(o.V, o.n, o.linear, stored.V);
            matrix(o.S, o.linear, o.linear, stored.S);
        }
        if (FORM == Form::diagonal_dual && stored.diagonal && !prepared) {
            vector(o.diagonal, o.n, stored.diagonal);
            std::fill(stored.diagonal + o.n, stored.diagonal + whole_lines<T>(o.n), smallest_normal<T>);
        }
        if (FORM != Form::dense_dual && stored.U) {
            triangle(o.U, FORM == Form::primal ? o.n : o.linear, stored.U);
            std::fill(stored.weights, stored.weights + this->o.rows, T(0));
            each_block(this->o,
                       [&](int row, int at, int count) { vector(o.weights + at, count, stored.weights + row); });
        }
    }
};

// Solve a batch; false where an operand breaks a rule or, with a Python error set, where the call was interrupted.
template <class T> bool solve_batch(const Batch<T>& batch, int workers, PyObject* progress) {
    Queue queue(batch.operands.count, batch.lanes ? lanes::Team::PROBLEMS : 1, workers, progress);
    bool shared = batch.operands.matrices_shared();
    Form form = batch.shape.form;
    std::mutex preparing;
    bool ready = false, good = true;
    return queue.run([&](bool calling) {
        Worker<T> worker(batch, queue, calling);
        if (shared) {
            std::lock_guard<std::mutex> lock(preparing);
            if (!ready) {
                good = worker.prepare_shared(form);
                ready = true;
            }
        }
        if (good) {
            worker.run(shared ? &form : nullptr);
        }
    });
}

} // namespace qpdiff
