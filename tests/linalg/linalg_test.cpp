// The linear algebra of the compiled engine against plain loops in long double, for all small sizes and some large
// ones. Prints what is wrong; exits with 1 then.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "linalg/lanes.hpp"
#include "linalg/serial.hpp"

using namespace qpdiff;

namespace {

int failures = 0;

void check(bool good, const char* team, const char* what, int n, int columns, double error = NAN) {
    if (!good && failures++ < 20) {
        std::printf("%s: %s, %d x %d: error %g\n", team, what, n, columns, error);
    }
}

// Numbers as the test sees them: of each problem, row by row.
struct Plain {
    int rows, columns;
    std::vector<long double> values;

    Plain(int rows, int columns) : rows(rows), columns(columns), values(size_t(rows) * columns) {}
    long double& operator()(int i, int j = 0) { return values[size_t(i) * columns + j]; }
    long double operator()(int i, int j = 0) const { return values[size_t(i) * columns + j]; }
};

template <class Team> struct Test {
    using Stored = typename Team::Stored;
    using Real = typename Team::Real;
    static constexpr int PROBLEMS = Team::PROBLEMS;

    const char* name;
    std::mt19937 random{0};
    std::vector<void*> blocks;

    explicit Test(const char* name) : name(name) {}
    ~Test() { release(); }

    void release() {
        for (void* block : blocks) {
            std::free(block);
        }
        blocks.clear();
    }

    Stored* zeros(size_t count) {
        size_t bytes = (count * sizeof(Stored) + 2 * LINE - 1) / LINE * LINE;
        void* block = std::aligned_alloc(LINE, bytes);
        std::memset(block, 0, bytes);
        blocks.push_back(block);
        return static_cast<Stored*>(block);
    }
    Matrix<Stored> matrix(int rows, int columns) {
        int ld = Team::leading(columns);
        return {zeros(size_t(Team::whole_rows(rows) + 1) * ld), ld};
    }
    typename Team::Vector vector(int count) { return {zeros(Team::padded(Team::whole_rows(count)) + LINE)}; }

    static Real& entry(Stored& stored, int problem) { return reinterpret_cast<Real*>(&stored)[problem]; }

    // Random entries, stored in a matrix as well.
    Plain draw(int rows, int columns, Matrix<Stored> out, int problem) {
        std::normal_distribution<double> normal;
        Plain plain(rows, columns);
        for (int i = 0; i < rows; i++) {
            for (int j = 0; j < columns; j++) {
                Real value = Real(normal(random));
                plain(i, j) = value;
                entry(out[i][j], problem) = value;
            }
        }
        return plain;
    }
    Plain draw(int count, typename Team::Vector out, int problem) { return draw(count, 1, {out.data, 1}, problem); }

    // The largest difference, against the largest entry.
    void compare(const char* what, const Plain& expected, Matrix<Stored> found, int problem, bool upper = false) {
        long double error = 0, size = 1;
        for (int i = 0; i < expected.rows; i++) {
            for (int j = upper ? i : 0; j < expected.columns; j++) {
                size = std::max(size, std::abs(expected(i, j)));
                error = std::max(error, std::abs(expected(i, j) - entry(found[i][j], problem)));
            }
        }
        double most = std::numeric_limits<Real>::epsilon() * 40.0 * (expected.rows + expected.columns + 10);
        check(error <= most * size, name, what, expected.rows, expected.columns, double(error / size));
    }
    void compare(const char* what, const Plain& expected, typename Team::Vector found, int problem) {
        compare(what, expected, Matrix<Stored>{found.data, 1}, problem);
    }

    void products(int rows, int columns) {
        auto M = matrix(rows, columns), T = matrix(columns, rows), G = matrix(columns, columns);
        auto x = vector(columns), y = vector(rows), Mx = vector(rows), My = vector(columns);
        std::vector<Plain> plain, of_x, of_y, before;
        for (int b = 0; b < PROBLEMS; b++) {
            plain.push_back(draw(rows, columns, M, b));
            of_x.push_back(draw(columns, x, b));
            of_y.push_back(draw(rows, y, b));
            before.push_back(draw(columns, My, b));
        }
        Team::product(M, rows, columns, x, Mx);
        Team::add_product_transposed(M, rows, columns, y, My);
        Team::transpose(M, rows, columns, T);
        Team::gram({}, M, rows, G, columns);
        for (int b = 0; b < PROBLEMS; b++) {
            Plain product(rows, 1), transposed(columns, 1), other(columns, rows), gram(columns, columns);
            for (int i = 0; i < rows; i++) {
                for (int j = 0; j < columns; j++) {
                    product(i) += plain[b](i, j) * of_x[b](j);
                    transposed(j) += plain[b](i, j) * of_y[b](i);
                    other(j, i) = plain[b](i, j);
                    for (int k = 0; k < columns; k++) {
                        gram(j, k) += plain[b](i, j) * plain[b](i, k);
                    }
                }
            }
            for (int j = 0; j < columns; j++) {
                transposed(j) += before[b](j);
            }
            compare("product", product, Mx, b);
            compare("add_product_transposed", transposed, My, b);
            compare("transpose", other, T, b);
            compare("gram", gram, G, b, true);
        }
        release();
    }

    // A factor by its definition: UᵀU is S plus the diagonal; then what is solved with it.
    void factors(int n, int columns) {
        auto root = matrix(n + 2, n), S = matrix(n, n), U = matrix(n, n), B = matrix(n, columns);
        auto diagonal = vector(n), down = vector(n), up = vector(n);
        std::vector<Plain> sums, right, of_down, of_up;
        for (int b = 0; b < PROBLEMS; b++) {
            Plain plain = draw(n + 2, n, root, b), sum(n, n);
            Plain added = draw(n, diagonal, b);
            for (int i = 0; i < n; i++) {
                entry(diagonal.data[i], b) = Real(std::abs(added(i)) + 1);
                for (int j = 0; j < n; j++) {
                    for (int k = 0; k < n + 2; k++) {
                        sum(i, j) += plain(k, i) * plain(k, j);
                    }
                    entry(S[i][j], b) = Real(sum(i, j));
                    sum(i, j) = entry(S[i][j], b);
                }
                sum(i, i) += entry(diagonal.data[i], b);
            }
            sums.push_back(sum);
            right.push_back(draw(n, columns, B, b));
            of_down.push_back(draw(n, down, b));
            of_up.push_back(draw(n, up, b));
        }
        Team::complete_diagonal(S, n);
        check(every(Team::cholesky(S, diagonal, U, n)), name, "cholesky of a definite matrix", n, n);
        Team::solve_transposed(U, n, B, columns);
        Team::forward(U, n, down);
        Team::backward(U, n, up);
        for (int b = 0; b < PROBLEMS; b++) {
            auto u = [&](int i, int j) -> long double { // with the pivots themselves on the diagonal
                return i == j ? 1 / (long double)entry(U[i][i], b) : i < j ? (long double)entry(U[i][j], b) : 0;
            };
            Plain square(n, n), solved(n, columns), forward(n, 1), backward(n, 1);
            for (int i = 0; i < n; i++) {
                for (int k = 0; k <= i; k++) {
                    for (int j = 0; j < n; j++) {
                        square(i, j) += u(k, i) * u(k, j);
                    }
                    for (int j = 0; j < columns; j++) {
                        solved(i, j) += u(k, i) * (long double)entry(B[k][j], b);
                    }
                    forward(i) += u(k, i) * (long double)entry(down.data[k], b);
                    backward(k) += u(k, i) * (long double)entry(up.data[i], b);
                }
            }
            auto same = [&](const char* what, const Plain& a, const Plain& c) {
                long double error = 0, size = 1;
                for (size_t i = 0; i < a.values.size(); i++) {
                    error = std::max(error, std::abs(a.values[i] - c.values[i]));
                    size = std::max(size, std::abs(c.values[i]));
                }
                double most = std::numeric_limits<Real>::epsilon() * 200.0 * (n + 10);
                check(error <= most * size, name, what, n, columns, double(error / size));
            };
            same("cholesky", square, sums[b]);
            same("solve_transposed", solved, right[b]);
            same("forward", forward, of_down[b]);
            same("backward", backward, of_up[b]);
        }
        // A pivot that is not positive, anywhere, is found; in lanes for its own problem alone.
        for (int i = 0; i < n; i += 1 + n / 3) {
            auto bad = matrix(n, n);
            std::memcpy(bad.data, S.data, sizeof(Stored) * n * S.ld);
            Team::complete_diagonal(bad, n);
            entry(bad[i][i], PROBLEMS - 1) = Real(-1e6);
            auto factor_ok = Team::cholesky(bad, diagonal, U, n);
            check(!every(factor_ok), name, "cholesky of an indefinite matrix", n, i);
            check(PROBLEMS == 1 || some(factor_ok), name, "its neighbours", n, i);
        }
        release();
    }

    void run(int largest) {
        for (int n = 1; n <= 40; n++) {
            for (int columns : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33}) {
                products(n, columns);
            }
            factors(n, 1 + n % 7);
        }
        for (int n : {63, 64, 65, 127, 128, 129, 200}) {
            if (n <= largest) {
                products(n, n - 1);
                factors(n, 5);
            }
        }
    }
};

} // namespace

int main() {
    Test<serial::Team<double>>("one problem, double").run(200);
    Test<serial::Team<float>>("one problem, float").run(200);
    Test<lanes::Team>("lanes").run(64);
    std::printf("%d failures\n", failures);
    return failures != 0;
}
