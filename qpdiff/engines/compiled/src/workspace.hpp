// The workspace of a thread: allocated once, used for many problems.
#pragma once
#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "linalg/lanes.hpp"
#include "linalg/serial.hpp"
#include "method/problem.hpp"

namespace qpdiff {

// The sizes of a problem, which decide how much workspace it takes.
struct Shape {
    Form form;
    int n, p, linear;
    bool lower, upper;
    bool operator==(const Shape&) const = default;

    // Return the number of bounds on each variable, and that of all constraints.
    int bounds() const { return int(lower) + int(upper); }
    int rows() const { return linear + n * bounds(); }
};

// Divides a block of memory into arrays, each aligned to a cache line; without memory it only counts the bytes.
class Arena {
  public:
    explicit Arena(char* memory) : memory(memory) {}
    template <class T> T* take(Index count) {
        T* array = memory ? reinterpret_cast<T*>(memory + used) : nullptr;
        used += (count * (Index)sizeof(T) + LINE - 1) / LINE * LINE;
        return array;
    }
    Index used = 0;

  private:
    char* memory;
};

// A block of memory, all zero. `lay_out` takes arrays from an arena; it is called twice, to count and to take.
class Memory {
  public:
    template <class F> explicit Memory(F lay_out) {
        Arena counting(nullptr);
        lay_out(counting);
        memory = std::calloc(counting.used + LINE, 1); // the system clears large blocks at the first access
        if (!memory) {
            throw std::bad_alloc();
        }
        Arena arena(reinterpret_cast<char*>((reinterpret_cast<std::uintptr_t>(memory) + LINE - 1) / LINE * LINE));
        lay_out(arena);
    }
    ~Memory() { std::free(memory); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

  private:
    void* memory;
};

// Workspaces that no call uses at present, kept for later ones. Not one for each thread: where memory is short, the C
// library ends a process whose new thread has no room for a `thread_local` variable. And without a lock, for which a
// process forked while another thread holds it would wait for ever.
template <class Workspace> class Idle {
  public:
    // Return one that serves such problems, or null.
    template <class... Sizes> static std::unique_ptr<Workspace> take(const Sizes&... sizes) {
        for (auto& place : places) {
            std::unique_ptr<Workspace> found(place.exchange(nullptr));
            if (found && found->serves(sizes...)) {
                return found;
            }
            if (found) {
                keep(std::move(found), place);
            }
        }
        return nullptr;
    }

    // Keep one, where there is room or else instead of an older one.
    static void keep(std::unique_ptr<Workspace> workspace) {
        for (auto& place : places) {
            if (!place.load(std::memory_order_relaxed)) {
                keep(std::move(workspace), place);
                return;
            }
        }
        keep(std::move(workspace), places[oldest.fetch_add(1) % places.size()]);
    }

  private:
    static inline std::array<std::atomic<Workspace*>, 4> places{};
    static inline std::atomic<unsigned> oldest{0};

    static void keep(std::unique_ptr<Workspace> workspace, std::atomic<Workspace*>& place) {
        delete place.exchange(workspace.release());
    }
};

// The workspace of a thread during a call; a small one is kept for later calls.
template <class Workspace> class Borrowed {
  public:
    static constexpr Index LARGEST = 1 << 20; // entries, of the matrices or of L

    template <class... Sizes> explicit Borrowed(const Sizes&... sizes) : workspace(Idle<Workspace>::take(sizes...)) {
        if (!workspace) {
            workspace = std::make_unique<Workspace>(sizes...);
        }
    }
    ~Borrowed() {
        if (workspace->entries() <= LARGEST) {
            Idle<Workspace>::keep(std::move(workspace));
        }
    }
    Borrowed(const Borrowed&) = delete;
    Workspace* operator->() { return workspace.get(); }

  private:
    std::unique_ptr<Workspace> workspace;
};

// Set the sizes of a problem and take its vectors from an arena.
template <class Team>
void lay_out_vectors(Problem<Team>& o, const Shape& shape, Arena& arena, typename Team::Vector& weights) {
    using Real = typename Team::Real;
    using Stored = typename Team::Stored;
    using ExactStored = typename Team::ExactStored;
    o.n = shape.n, o.linear = shape.linear;
    o.p = shape.p, o.lower = shape.lower, o.upper = shape.upper;
    o.np = Team::padded(o.n), o.lp = Team::padded(o.linear);
    o.rows = o.lp + shape.bounds() * o.np;
    // A tile is as wide as four entries, also at the end of an empty vector.
    auto of_variables = [&](auto&... vectors) { ((vectors.data = arena.take<Stored>(o.np + ROWS)), ...); };
    auto of_rows = [&](auto&... vectors) { ((vectors.data = arena.take<Stored>(o.rows + ROWS)), ...); };
    auto exact = [&](int count, auto&... vectors) { ((vectors.data = arena.take<ExactStored>(count + ROWS)), ...); };
    of_variables(o.q, o.lb, o.ub, o.exists, o.D, o.balanced_D, o.occupied, o.flat, o.unit_x, o.per_D2, o.diagonal_Q,
                 o.inverse, o.rho, o.dx, o.cx, o.e_x, o.forward, o.columns, o.x_anchor, o.r_anchor);
    of_rows(o.k, o.E, o.balanced_E, o.filled, o.unit_v, o.per_E2, weights, o.theta, o.delta, o.per_s, o.per_z,
            o.right_v, o.complementarity, o.dv, o.ds, o.cv, o.e_v, o.t, o.lengths, o.v_anchor, o.u, o.Sdv);
    for (Iterate<Team>* at : {&o.first, &o.second}) {
        of_variables(at->x, at->r_x);
        of_rows(at->v, at->s, at->r_v);
        exact(o.np, at->Qx);
        exact(o.rows, at->Kx);
    }
    if constexpr (Team::PRICED) {
        of_rows(o.v_lower, o.v_upper, o.compliance, o.per_t, o.per_r, o.complementarity_t, o.dt);
        of_rows(o.first.t, o.first.z, o.first.r, o.second.t, o.second.z, o.second.r);
    }
    exact(o.np, o.Kv, o.ray);
    exact(o.rows, o.farkas);
    o.added.data = arena.take<Stored>(std::max(o.np, o.lp) + ROWS);
    o.kind.is_inequality = arena.take<integer_of<Real>>(o.rows + ROWS);
    o.kind.is_equality = arena.take<integer_of<Real>>(o.rows + ROWS);
}

// A problem with memory for its operands and work vectors.
template <class Team> class Workspace {
  public:
    Problem<Team> problem;

    explicit Workspace(const Shape& shape) : shape(shape), memory([this](Arena& arena) { lay_out(arena); }) {
        for (int j = 0; j < problem.n; j++) {
            problem.exists.data[j] = typename Team::Number{} + Real(1);
        }
        if constexpr (Team::PRICED) { // the padding has no price
            std::fill_n(problem.v_upper.data, problem.rows, typename Team::Number{} + Real(INFINITY_));
        }
    }

    // Return whether it has been made for problems of this shape.
    bool serves(const Shape& other) const { return shape == other; }

    // Return the number of entries of Q, A and G.
    Index entries() const { return Index(shape.n) * (shape.n + shape.linear); }

    // Let a single problem compute its factors where they are stored or, where it has to take the primal form instead
    // of the preferred one, in the workspace.
    void use(const StoredFactors<serial::Team<typename Team::Real>>& stored, Form form)
        requires(!Team::lanes)
    {
        auto& o = problem;
        int wide = Team::leading(o.n), high = Team::leading(o.linear);
        if (shape.form == Form::dense_dual) {
            o.F = {stored.F, wide}, o.V = {stored.V, high}, o.S = {stored.S, high};
        }
        o.diagonal = shape.form == Form::diagonal_dual ? typename Team::Vector{stored.diagonal} : o.diagonal;
        bool own = form != shape.form || form == Form::dense_dual;
        o.weights = own ? own_weights : typename Team::Vector{stored.weights};
        o.U = form != shape.form         ? o.square_matrix
              : form == Form::dense_dual ? own_U
                                         : MatrixOf{stored.U, form == Form::primal ? wide : high};
    }

    // Let a single problem compute the factor of the primal form in the workspace.
    void use_primal()
        requires(!Team::lanes)
    {
        problem.U = problem.square_matrix;
        problem.weights = own_weights;
    }

  private:
    using Real = typename Team::Real;
    using MatrixOf = typename Team::Matrix;
    using Stored = typename Team::Stored;
    Shape shape;
    typename Team::Vector own_weights;
    MatrixOf own_U;
    Memory memory; // zero, as the padding of matrices and vectors has to be; initialised last, as it fills the others

    void lay_out(Arena& arena) {
        auto& o = problem;
        Form form = shape.form;
        int n = shape.n, linear = shape.linear;
        lay_out_vectors(o, shape, arena, own_weights);
        auto matrix = [&](MatrixOf& M, int rows, int columns) {
            M.ld = Team::leading(columns);
            M.data = arena.take<Stored>((Index)Team::whole_rows(rows) * M.ld);
        };
        matrix(o.Q, n, n);
        matrix(o.K, linear, n);
        matrix(o.scaled, linear, n);
        matrix(o.square_matrix, n, n);
        if (form == Form::diagonal_dual) {
            matrix(o.K_transposed, n, linear);
            matrix(o.V, n, linear);
        }
        if (form == Form::dense_dual || Team::lanes) {
            int size = form == Form::primal ? n : linear;
            matrix(own_U, size, size);
        }
        if constexpr (Team::lanes) {
            o.weights = own_weights;
            o.U = own_U;
            o.diagonal.data = arena.take<Stored>(o.np + ROWS);
            if (form == Form::dense_dual) {
                matrix(o.F, n, n);
                matrix(o.V, n, linear);
                matrix(o.S, linear, linear);
            }
        }
    }
};

} // namespace qpdiff
