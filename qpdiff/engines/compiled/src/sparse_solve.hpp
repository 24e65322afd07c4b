// Solving a batch of problems with sparse matrices of one pattern: in lane groups, or one by one.
#pragma once
#include <numeric>
#include <optional>

#include "method/loop.hpp"
#include "outcome.hpp"
#include "queue.hpp"
#include "sparse_workspace.hpp"

namespace qpdiff {

struct SparseBatch {
    Operands operands; // of Q, A and G the entries, in the order of the pattern
    Shape shape;
    const SparseKkt* kkt;
    Settings settings;
    const Parameters* parameters;
    bool check;      // whether to check the operands, but for convexity
    double rounding; // rounding error to allow in Q, relative to its largest entry; infinite: Q need not be convex
    bool lanes;      // whether to solve in lane groups
    StartingPoint<double> start;
    Outcome<double> outcome;
    Rows<double> scaling; // D, then E
};

// Solves the problems that one thread claims.
template <bool PRICED> class SparseWorker {
  public:
    SparseWorker(const SparseBatch& batch, Queue& queue, bool calling)
        : batch(batch), queue(queue), calling(calling), one(batch) {
        if (batch.lanes) {
            group.emplace(batch);
        }
    }

    void run() {
        Index first, last;
        while (queue.claim(first, last)) {
            for (Index b = first; b < last && !queue.interrupted(calling);) {
                int size = batch.lanes ? int(std::min<Index>(LANES, last - b)) : 1;
                bool unsolved[LANES];
                std::fill(unsolved, unsolved + LANES, true);
                bool valid = !batch.lanes || solve_group(b, size, unsolved);
                for (int lane = 0; lane < size && valid && !queue.interrupted(calling); lane++) {
                    valid = !unsolved[lane] || solve_one(b + lane);
                }
                if (!valid) {
                    queue.refuse();
                    return;
                }
                queue.finish(size);
                b += size;
            }
        }
    }

  private:
    using Lanes = pack_of<double>;
    static constexpr int LANES = entries<Lanes>;

    // A workspace, and whether its matrices are those of all problems.
    template <class V> struct Place {
        Borrowed<SparseWorkspace<V, PRICED>> workspace;
        bool ready = false;

        explicit Place(const SparseBatch& batch) : workspace(batch.shape, *batch.kkt) {
            workspace->problem.parameters = batch.parameters;
            workspace->problem.settings = &batch.settings;
        }
    };

    const SparseBatch& batch;
    Queue& queue;
    bool calling;
    Place<double> one;
    std::optional<Place<Lanes>> group;

    // Read the matrices of `size` problems from b on, where they are not those that are there; balance them. Return
    // whether they are valid.
    template <class V> bool load_matrices(Place<V>& place, SparseProblem<V, PRICED>& o, Index b, int size) {
        if (place.ready && entries_shared(batch.operands)) {
            return true;
        }
        Index problems[sparse::Team<V, PRICED>::PROBLEMS];
        std::iota(problems, problems + size, b);
        load_entries(o, batch.operands, problems, size);
        place.ready = true;
        if (batch.check && !every(plausible_entries(o, batch.rounding))) {
            return false;
        }
        balance(static_cast<Problem<sparse::Team<V, PRICED>>&>(o));
        assemble(o);
        return every(convex(o, batch.rounding));
    }

    // Return whether the vectors of problem b are valid; those that are shared are checked with the first one.
    bool plausible(Index b) const { return !batch.check || plausible_vectors<double>(batch.operands, b, b == 0); }

    // Solve problem b; return false where an operand is not valid.
    bool solve_one(Index b) {
        SparseProblem<double, PRICED>& matrices = one.workspace->problem;
        Problem<sparse::Team<double, PRICED>>& o = matrices;
        load_vectors(o, batch.operands, b);
        if (!plausible(b) || !load_matrices(one, matrices, b, 1)) {
            return false;
        }
        balance_cost(o, equilibrate(o));
        count_inequalities(o);
        auto load_warm_start = [&](Iterate<sparse::Team<double, PRICED>>& at) { return batch.start.load(o, b, at); };
        auto ended = iterate<Form::sparse_kkt>(o, load_warm_start, [&] { return queue.interrupted(calling); });
        if (!ended.interrupted) {
            finish(o, b, 0, *ended.at, ended.state, ended.iterations);
        }
        return true;
    }

    // Solve the problems of a lane group but for those that stay `unsolved`; return false where an operand is not
    // valid.
    bool solve_group(Index b, int size, bool* unsolved) {
        using Team = sparse::Team<Lanes, PRICED>;
        SparseProblem<Lanes, PRICED>& matrices = group->workspace->problem;
        Problem<Team>& o = matrices;
        bool same_kinds = true, valid = true;
        for (int lane = 0; lane < LANES; lane++) {
            same_kinds &= load_vectors(o, batch.operands, b + std::min(lane, size - 1), lane);
            valid &= lane >= size || plausible(b + lane);
        }
        if (!valid || !load_matrices(*group, matrices, b, size)) {
            return false;
        }
        if (!same_kinds) {
            return true;
        }
        balance_cost(o, equilibrate<Team, true>(o));
        count_inequalities(o);
        std::fill(unsolved, unsolved + size, false);
        auto load_warm_start = [&](Iterate<Team>& at) {
            typename Team::Truth warm{};
            for (int lane = 0; lane < size; lane++) {
                warm[lane] = batch.start.load(o, b + lane, at, lane) ? -1 : 0;
            }
            return warm;
        };
        iterate_lanes<Form::sparse_kkt>(
            o, size, load_warm_start,
            [&](int lane, const Iterate<Team>& at, const State<Team>& state, int iterations) {
                finish(o, b + lane, lane, at, state, iterations);
            },
            [&](int lane) { unsolved[lane] = true; }, [&] { return queue.interrupted(calling); });
        return true;
    }

    // Put the outcome of problem b, which is in a lane, and its scaling into the arrays.
    template <class Team>
    void finish(const Problem<Team>& o, Index b, int lane, const Iterate<Team>& at, const State<Team>& state,
                int iterations) {
        batch.outcome.put(o, b, lane, at, state, iterations);
        gather_scaling(o, batch.scaling.at(b), lane);
    }
};

// Solve a batch; return false where an operand is not valid or, with a Python error set, where it was interrupted.
template <bool PRICED> bool solve_sparse_batch(const SparseBatch& batch, int workers, PyObject* progress) {
    Queue queue(batch.operands.count, batch.lanes ? entries<pack_of<double>> : 1, workers, progress);
    auto make = [&](bool calling) { return std::make_unique<SparseWorker<PRICED>>(batch, queue, calling); };
    return queue.run(make, [](SparseWorker<PRICED>& worker, bool) { worker.run(); });
}

} // namespace qpdiff
