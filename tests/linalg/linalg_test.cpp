// The linear algebra of the compiled engine against plain loops in long double, for all small sizes and some large
// ones, with and without BLAS. Prints what is wrong; exits with 1 then.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <new>
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

    template <class F> static Plain of(int rows, int columns, F entry) {
        Plain out(rows, columns);
        for (int i = 0; i < rows; i++) {
            for (int j = 0; j < columns; j++) {
                out(i, j) = entry(i, j);
            }
        }
        return out;
    }
};

// The two functions of BLAS that are used, for matrices that lie row by row.
template <class T> struct PlainBlas {
    static void gemm(const char*, const char*, const int* of_B, const int* of_A, const int* rows, const T* alpha,
                     const T* B, const int* ldb, const T* A, const int* lda, const T* beta, T* C, const int* ldc) {
        for (int i = 0; i < *of_A; i++) {
            for (int j = 0; j < *of_B; j++) {
                T sum = 0;
                for (int k = 0; k < *rows; k++) {
                    sum += A[(long)k * *lda + i] * B[(long)k * *ldb + j];
                }
                T& entry = C[(long)i * *ldc + j];
                entry = *beta * entry + *alpha * sum;
            }
        }
    }
    static void syrk(const char*, const char*, const int* n, const int* rows, const T* alpha, const T* A,
                     const int* lda, const T* beta, T* C, const int* ldc) {
        for (int i = 0; i < *n; i++) {
            for (int j = i; j < *n; j++) {
                T sum = 0;
                for (int k = 0; k < *rows; k++) {
                    sum += A[(long)k * *lda + i] * A[(long)k * *lda + j];
                }
                T& entry = C[(long)i * *ldc + j];
                entry = *beta * entry + *alpha * sum;
            }
        }
    }
    static void use() {
        blas::Functions<T>::gemm = gemm;
        blas::Functions<T>::syrk = syrk;
    }
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
            ::operator delete(block, std::align_val_t(LINE));
        }
        blocks.clear();
    }

    Stored* zeros(size_t count) {
        size_t bytes = (count * sizeof(Stored) + 2 * LINE - 1) / LINE * LINE;
        void* block = ::operator new(bytes, std::align_val_t(LINE));
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
        auto first = matrix(columns, columns), sum = matrix(columns, columns);
        auto x = vector(columns), y = vector(rows), Mx = vector(rows), My = vector(columns);
        std::vector<Plain> plain, of_x, of_y, before, of_first;
        for (int b = 0; b < PROBLEMS; b++) {
            plain.push_back(draw(rows, columns, M, b));
            of_x.push_back(draw(columns, x, b));
            of_y.push_back(draw(rows, y, b));
            before.push_back(draw(columns, My, b));
            of_first.push_back(draw(columns, columns, first, b));
        }
        Team::product(M, rows, columns, x, Mx);
        Team::add_product_transposed(M, rows, columns, y, My);
        Team::transpose(M, rows, columns, T);
        Team::gram({}, M, rows, G, columns);
        Team::gram(first, M, rows, sum, columns);
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
            auto added = [&](int i, int j) { return of_first[b](i, j) + gram(i, j); };
            compare("gram added to a matrix", Plain::of(columns, columns, added), sum, b, true);
        }
        release();
    }

    // Whether a matrix is exactly what it should be, where no kernel has anything to round.
    void same(const char* what, const Plain& expected, Matrix<Stored> found, int problem) {
        bool good = true;
        for (int i = 0; i < expected.rows; i++) {
            for (int j = 0; j < expected.columns; j++) {
                good &= entry(found[i][j], problem) == Real(expected(i, j));
            }
        }
        check(good, name, what, expected.rows, expected.columns);
    }

    // What is done with each entry, and the largest of rows and columns.
    void entries_of(int rows, int columns) {
        auto M = matrix(rows, columns), scaled = matrix(rows, columns), squares = matrix(rows, columns);
        auto of_rows = vector(rows), of_columns = vector(columns), down = vector(columns);
        auto weighted = vector(rows), unweighted = vector(rows);
        std::vector<Plain> plain, r, c;
        for (int b = 0; b < PROBLEMS; b++) {
            plain.push_back(draw(rows, columns, M, b));
            r.push_back(draw(rows, of_rows, b));
            c.push_back(draw(columns, of_columns, b));
            for (auto [vector, values] : {std::pair{of_rows, &r[b]}, std::pair{of_columns, &c[b]}}) {
                for (int i = 0; i < values->rows; i++) { // weights are not negative
                    (*values)(i) = std::abs((*values)(i));
                    entry(vector.data[i], b) = Real((*values)(i));
                }
            }
        }
        Team::scale_rows(M, rows, columns, of_rows, scaled);
        Team::scaled_squares(M, rows, columns, of_rows, of_columns, squares);
        Team::largest_of_rows(M, rows, columns, of_columns, weighted, unweighted);
        Team::largest_of_columns(M, rows, columns, of_rows, down);
        check(every(Team::all_finite(M, rows, columns)), name, "all_finite", rows, columns);
        for (int b = 0; b < PROBLEMS; b++) {
            const Plain& m = plain[b];
            auto most = [&](int count, auto value) {
                long double out = 0;
                for (int i = 0; i < count; i++) {
                    out = std::max(out, std::abs(value(i)));
                }
                return out;
            };
            auto in_row = [&](int i, int) { return most(columns, [&](int j) { return m(i, j); }); };
            auto in_row_weighted = [&](int i, int) { return most(columns, [&](int j) { return m(i, j) * c[b](j); }); };
            auto in_column = [&](int j, int) { return most(rows, [&](int i) { return m(i, j) * r[b](i); }); };
            auto square = [&](int i, int j) { return std::pow(m(i, j) * r[b](i) * c[b](j), 2.0L); };
            compare("scale_rows", Plain::of(rows, columns, [&](int i, int j) { return r[b](i) * m(i, j); }), scaled, b);
            compare("scaled_squares", Plain::of(rows, columns, square), squares, b);
            compare("largest_of_rows, weighted", Plain::of(rows, 1, in_row_weighted), weighted, b);
            compare("largest_of_rows", Plain::of(rows, 1, in_row), unweighted, b);
            compare("largest_of_columns", Plain::of(columns, 1, in_column), down, b);
        }
        for (Real bad : {Real(INFINITY), -Real(INFINITY), Real(NAN)}) {
            entry(M[rows - 1][columns - 1], PROBLEMS - 1) = bad;
            auto finite = Team::all_finite(M, rows, columns);
            check(!every(finite), name, "all_finite of a matrix that is not", rows, columns);
            check(PROBLEMS == 1 || some(finite), name, "its neighbours", rows, columns);
        }
        release();
    }

    // Square matrices: their diagonal, their two triangles.
    void squares_of(int n) {
        auto M = matrix(n, n);
        auto diagonal = vector(n);
        std::vector<Plain> plain;
        for (int b = 0; b < PROBLEMS; b++) {
            plain.push_back(draw(n, n, M, b));
        }
        Team::take_diagonal(M, n, diagonal);
        Team::mirror(M, n);
        for (int b = 0; b < PROBLEMS; b++) {
            auto mirrored = [&](int i, int j) { return i <= j ? plain[b](i, j) : plain[b](j, i); };
            same("mirror", Plain::of(n, n, mirrored), M, b);
            compare("take_diagonal", Plain::of(n, 1, [&](int i, int) { return plain[b](i, i); }), diagonal, b);
        }
        typename Team::Number limit{}, more{};
        for (int b = 0; b < PROBLEMS; b++) {
            reinterpret_cast<Real*>(&limit)[b] = Real(0.25);
            reinterpret_cast<Real*>(&more)[b] = Real(0.75);
        }
        check(every(Team::symmetric(M, n, limit)), name, "symmetric", n, n);
        for (int i = 1; i < n; i += 1 + n / 3) {
            for (int j : {0, i - 1}) {
                Real before = entry(M[i][j], PROBLEMS - 1);
                entry(M[i][j], PROBLEMS - 1) += Real(0.5);
                auto symmetric = Team::symmetric(M, n, limit);
                check(!every(symmetric), name, "symmetric of a matrix that is not", i, j);
                check(PROBLEMS == 1 || some(symmetric), name, "its neighbours", i, j);
                check(every(Team::symmetric(M, n, more)), name, "symmetric within a limit", i, j);
                entry(M[i][j], PROBLEMS - 1) = before;
            }
        }
        release();
    }

    // What only the team of one problem has: parts of vectors and matrices, products of vectors, sums over entries.
    void parts_of(int n, int columns) {
        auto S = matrix(n, n), A = matrix(n, n), B = matrix(n, columns), C = matrix(n, columns), part = matrix(n, n);
        auto chosen = vector(n), v = vector(n), packed = vector(n), back = vector(n), others = vector(n),
             out = vector(n), a = vector(n), x = vector(n), u = vector(n);
        draw(n, n, S, 0);
        Team::mirror(S, n);
        auto s = Plain::of(n, n, [&](int i, int j) { return S[i][j]; });
        auto of_A = draw(n, n, A, 0), of_B = draw(n, columns, B, 0), of_C = draw(n, columns, C, 0);
        auto of_v = draw(n, v, 0), of_others = draw(n, others, 0), of_out = draw(n, out, 0), of_a = draw(n, a, 0),
             of_x = draw(n, x, 0), of_u = draw(n, u, 0);
        std::vector<int> numbers(n), expected;
        for (int i = 0; i < n; i++) {
            if (random() % 3) {
                chosen.data[i] = Real(1) + i;
                expected.push_back(i);
            }
        }
        int count = Team::list(chosen, n, numbers.data());
        numbers.resize(count);
        check(numbers == expected, name, "list", n, count);
        Team::gather(v, numbers.data(), count, packed);
        Team::scatter(packed, numbers.data(), count, back);
        for (int i = 0; i < n; i++) {
            check(back.data[i] == (chosen.data[i] != 0 ? v.data[i] : Real(0)), name, "gather and scatter", n, i);
        }
        int calls = 0;
        Team::gather_square(S, numbers.data(), count, part, [&](int, int) { calls++; });
        auto of_part = Plain::of(count, count, [&](int i, int j) { return s(numbers[i], numbers[j]); });
        compare("gather_square", of_part, part, 0, true);
        check(calls == count, name, "gather_square's calls", calls, count);

        // Without what the chosen rows contribute, and there without the product of these rows with the others.
        auto left = [&](int i, int) {
            long double sum = of_out(i);
            for (int k : numbers) {
                sum -= s(i, k) * of_v(k);
            }
            return sum;
        };
        auto of_left = Plain::of(n, 1, left);
        Team::subtract_product(S, n, numbers.data(), count, v, others, out, packed, [](int, int) {});
        compare("subtract_product", of_left, out, 0);
        auto of_packed = [&](int i, int) {
            long double sum = of_left(numbers[i]);
            for (int j = 0; j < n; j++) {
                sum -= s(numbers[i], j) * of_others(j);
            }
            return sum;
        };
        compare("subtract_product, packed", Plain::of(count, 1, of_packed), packed, 0);

        std::vector<Real> rows(size_t(columns) * n + 1, Real(7)); // with one entry beyond, which stays
        int height = std::min(n, columns);
        Team::outer(Real(-0.5), a.data, u.data, others.data, x.data, height, n, rows.data());
        auto outer = [&](int i, int j) { return -0.5L * (of_a(i) * of_u(j) + of_others(i) * of_x(j)); };
        compare("outer", Plain::of(height, n, outer), Matrix<Stored>{rows.data(), n}, 0);
        check(rows[size_t(height) * n] == Real(7), name, "outer, beyond its end", height, n);
        Team::outer(Real(-0.5), x.data, u.data, u.data, x.data, height, n, rows.data());
        for (int i = 0; i < height; i++) {
            for (int j = 0; j < i; j++) {
                check(rows[size_t(i) * n + j] == rows[size_t(j) * n + i], name, "symmetry of outer", i, j);
            }
        }
        Team::add_product_matrix(A, B, n, C, n, columns);
        auto sum = [&](int i, int j) {
            long double out = of_C(i, j);
            for (int k = 0; k < n; k++) {
                out += of_A(k, i) * of_B(k, j);
            }
            return out;
        };
        compare("add_product_matrix", Plain::of(n, columns, sum), C, 0);

        // In double, whatever the type of the matrix.
        typename Team::ExactVector product{reinterpret_cast<double*>(zeros(4 * n + 64))};
        Team::product(A, n, n, v, product);
        long double error = 0;
        for (int i = 0; i < n; i++) {
            long double exact = 0;
            for (int j = 0; j < n; j++) {
                exact += of_A(i, j) * of_v(j);
            }
            error = std::max(error, std::abs(exact - product.data[i]));
        }
        check(error <= 1e-12L * n, name, "product in double", n, n, double(error));

        using Entry = typename Team::Entry;
        Entry total{}, most{}, least{};
        Team::each(n, [&](auto at) {
            Entry value = v[at];
            total += value;
            most = larger(value, most);
            least = smaller(value, least);
        });
        long double all = 0, highest = 0, lowest = 0;
        for (int i = 0; i < n; i++) {
            all += of_v(i);
            highest = std::max(highest, of_v(i)), lowest = std::min(lowest, of_v(i));
        }
        double enough = std::numeric_limits<Real>::epsilon() * 10.0 * (n + 10);
        check(std::abs(all - Team::sum(total)) <= enough, name, "sum", n, 1);
        check(Team::largest(most) == highest && Team::smallest(least) == lowest, name, "largest, smallest", n, 1);
        release();
    }

    // A factor whose upper triangle alone is known solves as well.
    void factor_from_elsewhere(int n) {
        auto root = matrix(n + 2, n), S = matrix(n, n), U = matrix(n, n), V = matrix(n, n);
        auto one = vector(n), other = vector(n);
        draw(n + 2, n, root, 0);
        draw(n, one, 0);
        Team::gram({}, root, n + 2, S, n);
        Team::complete_diagonal(S, n);
        for (int i = 0; i < n; i++) {
            S[i][i] += n;
        }
        check(Team::cholesky(S, nullptr, U, n), name, "cholesky without a diagonal", n, n);
        for (int i = 0; i < Team::whole_rows(n); i++) {
            for (int j = i; j < U.ld; j++) {
                V[i][j] = U[i][j];
            }
        }
        Team::invert_blocks(V, n);
        for (int i = 0; i < n; i++) {
            other.data[i] = one.data[i];
        }
        Team::forward(U, n, one), Team::backward(U, n, one);
        Team::forward(V, n, other), Team::backward(V, n, other);
        compare("invert_blocks", Plain::of(n, 1, [&](int i, int) { return one.data[i]; }), other, 0);
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
                entries_of(n, columns);
                if constexpr (!Team::lanes) {
                    parts_of(n, columns);
                }
            }
            factors(n, 1 + n % 7);
            squares_of(n);
            if constexpr (!Team::lanes) {
                factor_from_elsewhere(n);
            }
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
    PlainBlas<double>::use(), PlainBlas<float>::use();
    for (int n : {127, 128, 129, 140, 257, 300}) { // around the blocks that are factored without BLAS
        Test<serial::Team<double>> with_blas("one problem, double, BLAS");
        with_blas.products(n - 1, n), with_blas.factors(n, 9);
        Test<serial::Team<float>> with_blas_float("one problem, float, BLAS");
        with_blas_float.products(n - 1, n), with_blas_float.factors(n, 9);
    }
    std::printf("%d failures\n", failures);
    return failures != 0;
}
