// The Python module: functions that read arrays and fill arrays made in Python.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#include <numpy/arrayobject.h>

#include "block_problem.hpp"
#include "differentiate.hpp"
#include "solve.hpp"
#include "sparse_differentiate.hpp"
#include "sparse_solve.hpp"

namespace nb = nanobind;
using namespace qpdiff;

namespace {

// A NumPy array, or None, by NumPy's own C interface: to lock the buffer of each array of a call takes as long as to
// differentiate a small problem.
class Array {
  public:
    explicit Array(nb::handle object, bool writable = false) {
        if (object.is_none()) {
            return;
        }
        if (!PyArray_Check(object.ptr())) {
            throw nb::type_error("a NumPy array or None was expected");
        }
        array = reinterpret_cast<PyArrayObject*>(object.ptr());
        if (writable && !PyArray_ISWRITEABLE(array)) {
            throw nb::value_error("a writable array was expected");
        }
    }

    // Return it as an operand with a batch axis.
    Operand operand() const {
        if (!array) {
            return {};
        }
        int axes = PyArray_NDIM(array);
        Index batch = size(0) == 1 ? 0 : stride(0);
        Index row = axes == 3 ? stride(1) : 0;
        return {PyArray_BYTES(array), batch, row, stride(axes - 1)};
    }

    // Return it as rows of contiguous numbers.
    template <class T> Rows<T> rows() const {
        if (!array || size(0) == 0) {
            return {};
        }
        if (itemsize() != sizeof(T)) {
            throw nb::type_error("an array of another type was expected");
        }
        return {static_cast<T*>(PyArray_DATA(array)), size(0) == 1 ? 0 : stride(0) / Index(sizeof(T))};
    }

    Index size(int axis) const { return array ? PyArray_DIM(array, axis) : 0; }
    Index itemsize() const { return array ? PyArray_ITEMSIZE(array) : 0; }

  private:
    Index stride(int axis) const { return PyArray_STRIDE(array, axis); }

    PyArrayObject* array = nullptr; // the caller's reference keeps it
};

// The arrays of a tuple.
class Arrays {
  public:
    Arrays(nb::tuple objects, bool writable) {
        arrays.reserve(objects.size());
        for (nb::handle object : objects) {
            arrays.emplace_back(object, writable);
        }
    }
    const Array& operator[](int i) const { return arrays[i]; }
    int size() const { return int(arrays.size()); }

  private:
    std::vector<Array> arrays;
};

// Read the operands in the order of qpdiff.problem.OPERANDS: Q, q, G, h, A, b, lb, ub; then, where there are prices of
// violations, those in the order of qpdiff.problem.PRICES.
Operands read_operands(const Arrays& arrays, Index count) {
    Operands operands;
    auto &linear = operands.linear_prices, &quadratic = operands.quadratic_prices;
    Operand* all[] = {&operands.Q,       &operands.q,     &operands.G,     &operands.h,         &operands.A,
                      &operands.b,       &operands.lb,    &operands.ub,    &linear.of_A,        &linear.of_G,
                      &linear.of_bounds, &quadratic.of_A, &quadratic.of_G, &quadratic.of_bounds};
    for (int i = 0; i < arrays.size(); i++) {
        *all[i] = arrays[i].operand();
    }
    operands.priced = arrays.size() > 8;
    operands.n = int(arrays[1].size(1)), operands.m = int(arrays[3].size(1)), operands.p = int(arrays[5].size(1));
    operands.count = count;
    return operands;
}

Shape read_shape(const Operands& operands, int form) {
    return {Form(form), operands.n, operands.p, operands.linear(), operands.lb.given(), operands.ub.given()};
}

// Read qpdiff.engines.base.Settings.
Settings read_settings(nb::tuple s) {
    return {nb::cast<double>(s[0]), nb::cast<double>(s[1]), nb::cast<bool>(s[2]), nb::cast<int>(s[3])};
}

// Read qpdiff.engines.base.Outcome.
template <class T> Outcome<T> read_outcome(const Arrays& a) {
    return {a[0].rows<T>(),      a[1].rows<T>(),      a[2].rows<T>(),      a[3].rows<int>(),   a[4].rows<int>(),
            a[5].rows<double>(), a[6].rows<double>(), a[7].rows<double>(), a[8].rows<double>()};
}

// Read qpdiff.engines.compiled.engine.Stored.
template <class T> StoredBatch<T> read_stored(const Arrays& a, const Shape& shape) {
    return {stored_sizes<T>(shape), a[0].rows<T>(),   a[1].rows<T>(),
            a[2].rows<T>(),         a[3].rows<int>(), a[4].rows<bool>()};
}

// Read qpdiff.engines.base.StartingPoint.
template <class T> StartingPoint<T> read_start(const Arrays& a) {
    return {a[0].rows<const T>(), a[1].rows<const T>(), a[2].rows<const bool>()};
}

// Solve a batch in one floating point type.
template <class T>
bool solve_as(const Operands& operands, const Arrays& outcome, const Arrays& stored, const Arrays& start,
              const Settings& settings, const Parameters& parameters, int form, bool check, double rounding, bool lanes,
              int workers, nb::object progress) {
    Batch<T> batch{operands, read_shape(operands, form), settings, &parameters, check, rounding, lanes, {}, {}, {}};
    batch.start = read_start<T>(start);
    batch.outcome = read_outcome<T>(outcome);
    batch.stored = read_stored<T>(stored, batch.shape);
    auto run = operands.priced ? solve_batch<T, true> : solve_batch<T, false>;
    bool valid = run(batch, workers, progress.ptr());
    if (PyErr_Occurred()) {
        throw nb::python_error();
    }
    return valid;
}

// Solve a batch: fill `outcome` and `stored`; return false where an operand breaks a rule.
bool solve_problems(nb::tuple operands, nb::tuple outcome, nb::tuple stored, nb::tuple start, nb::tuple settings,
                    const Parameters& parameters, int form, bool check, double rounding, bool lanes, int workers,
                    nb::object progress) {
    Arrays given(operands, false), out(outcome, true), factors(stored, true), warm_start(start, false);
    auto run = out[0].itemsize() == sizeof(double) ? solve_as<double> : solve_as<float>;
    return run(read_operands(given, out[0].size(0)), out, factors, warm_start, read_settings(settings), parameters,
               form, check, rounding, lanes, workers, progress);
}

// Read the gradients of the operands that each problem has its own of, or with `summed` those that are sums over the
// batch, in the order of qpdiff.problem.OPERANDS.
template <class T> Gradients<T> read_gradients(const Arrays& a, Index count, bool summed) {
    auto rows = [&](const Array& array) { return (array.size(0) != count) == summed ? array.rows<T>() : Rows<T>{}; };
    return {rows(a[2]), rows(a[3]), rows(a[4]), rows(a[5]), rows(a[6]), rows(a[7]), rows(a[8]), rows(a[9])};
}

// Solve the KKT system in one floating point type.
template <class T>
void differentiate_as(const Operands& operands, const Arrays& stored, const Arrays& given, const Arrays& out,
                      const Parameters& parameters, int form, double fill, bool fixed, int workers) {
    for (int i = 0; i < 5; i++) {
        if (given[i].itemsize() != sizeof(T)) {
            throw nb::type_error("solutions and right-hand sides of one type were expected");
        }
    }
    DerivativeBatch<T> batch;
    batch.operands = operands, batch.shape = read_shape(operands, form), batch.parameters = &parameters;
    batch.stored = read_stored<T>(stored, batch.shape);
    batch.x = given[0].operand(), batch.v = given[1].operand(), batch.s = given[2].operand();
    batch.r_x = given[3].operand(), batch.r_v = given[4].operand(), batch.status = given[5].rows<const int>();
    batch.u_x = out[0].rows<T>(), batch.u_v = out[1].rows<T>();
    batch.fill = T(fill), batch.fixed = fixed;
    batch.own = read_gradients<T>(out, operands.count, false);
    batch.sums = read_gradients<T>(out, operands.count, true);
    auto run = operands.priced ? differentiate_batch<T, true> : differentiate_batch<T, false>;
    if (!run(batch, workers)) {
        throw nb::python_error();
    }
}

// Solve the KKT system at the solutions. `given` has x, v, s, the right-hand sides r_x, r_v and the statuses; `out` has
// u_x, u_v and the gradients of the operands, with an entry for each problem or one for their sum.
void differentiate_problems(nb::tuple operands, nb::tuple stored, nb::tuple given, nb::tuple out,
                            const Parameters& parameters, int form, double fill, bool fixed, int workers) {
    Arrays of_batch(operands, false), factors(stored, false), in(given, false), results(out, true);
    auto run = results[0].itemsize() == sizeof(double) ? differentiate_as<double> : differentiate_as<float>;
    run(read_operands(of_batch, results[0].size(0)), factors, in, results, parameters, form, fill, fixed, workers);
}

// Return how many numbers one problem stores: constants of the reduced system, and of its last factor.
std::tuple<Index, Index> stored_numbers(int form, int n, int linear, bool lower, bool upper, int itemsize) {
    auto sizes = [&]<class T>(T) {
        auto s = stored_sizes<T>(Shape{Form(form), n, 0, linear, lower, upper});
        return std::make_tuple(s.constant(), s.last());
    };
    return itemsize == sizeof(double) ? sizes(0.0) : sizes(0.0f);
}

// Return how much memory a GPU kernel needs for one shape: the five numbers of `BlockSizes`.
std::tuple<Index, Index, Index, Index, Index> block_sizes(bool derivative, int form, int n, int p, int m, bool lower,
                                                          bool upper, bool priced, int itemsize, Index limit) {
    BlockShape shape{form, n, p, m, lower, upper, priced, 0};
    auto sizes = itemsize == sizeof(double) ? block::sizes<double> : block::sizes<float>;
    BlockSizes s = sizes(derivative, shape, limit);
    return {s.least_shared, s.shared, s.workspace, s.constant, s.last};
}

// Read an array of indices.
std::vector<int> read_indices(nb::handle object) {
    Array array(object);
    auto indices = array.rows<const int>();
    return {indices.data, indices.data + array.size(0)};
}

// Analyse the pattern of Q, and of A and G together, in compressed rows.
void analyse_pattern(SparseKkt* self, int p, nb::handle Q_starts, nb::handle Q_columns, nb::handle K_starts,
                     nb::handle K_columns) {
    auto starts_of_Q = read_indices(Q_starts), columns_of_Q = read_indices(Q_columns);
    auto starts_of_K = read_indices(K_starts), columns_of_K = read_indices(K_columns);
    nb::gil_scoped_release release; // other threads go on meanwhile
    new (self)
        SparseKkt(p, std::move(starts_of_Q), std::move(columns_of_Q), std::move(starts_of_K), std::move(columns_of_K));
}

// Read the operands of problems with sparse matrices.
Operands read_sparse_operands(const SparseKkt& kkt, const Arrays& arrays, Index count) {
    Operands operands = read_operands(arrays, count);
    operands.n = kkt.n, operands.p = kkt.p, operands.m = kkt.linear - kkt.p;
    return operands;
}

// Solve a batch of problems with sparse matrices: fill `outcome` and `scaling`; return false where an operand is not
// valid.
bool solve_sparse_problems(const SparseKkt& kkt, nb::tuple operands, nb::tuple outcome, nb::tuple start,
                           nb::tuple settings, const Parameters& parameters, bool check, double rounding, bool lanes,
                           int workers, nb::object progress) {
    Arrays given(operands, false), out(outcome, true), warm_start(start, false);
    SparseBatch batch{};
    batch.operands = read_sparse_operands(kkt, given, out[0].size(0));
    batch.shape = read_shape(batch.operands, int(Form::sparse_kkt));
    batch.kkt = &kkt, batch.settings = read_settings(settings), batch.parameters = &parameters;
    batch.check = check, batch.rounding = rounding, batch.lanes = lanes;
    batch.start = read_start<double>(warm_start), batch.outcome = read_outcome<double>(out);
    batch.scaling = out[9].rows<double>();
    auto run = batch.operands.priced ? solve_sparse_batch<true> : solve_sparse_batch<false>;
    bool valid = run(batch, workers, progress.ptr());
    if (PyErr_Occurred()) {
        throw nb::python_error();
    }
    return valid;
}

// Solve the KKT system at the solutions of problems with sparse matrices. `given` has x, v, s, the right-hand sides
// r_x, r_v, the statuses and the scaling; `out` has u_x, u_v and the gradients of the operands, of Q, G and A those of
// the entries, with an entry for each problem or one for their sum.
void differentiate_sparse_problems(const SparseKkt& kkt, nb::tuple operands, nb::tuple given, nb::tuple out,
                                   const Parameters& parameters, bool lanes, double fill, bool fixed, int workers) {
    Arrays of_batch(operands, false), in(given, false), results(out, true);
    SparseDerivativeBatch batch{};
    batch.operands = read_sparse_operands(kkt, of_batch, results[0].size(0));
    batch.shape = read_shape(batch.operands, int(Form::sparse_kkt));
    batch.kkt = &kkt, batch.parameters = &parameters, batch.lanes = lanes;
    batch.fill = fill, batch.fixed = fixed;
    batch.x = in[0].rows<const double>(), batch.v = in[1].rows<const double>(), batch.s = in[2].rows<const double>();
    batch.r_x = in[3].rows<const double>(), batch.r_v = in[4].rows<const double>();
    batch.status = in[5].rows<const int>(), batch.scaling = in[6].rows<const double>();
    batch.u_x = results[0].rows<double>(), batch.u_v = results[1].rows<double>();
    batch.own = read_gradients<double>(results, batch.operands.count, false);
    batch.sums = read_gradients<double>(results, batch.operands.count, true);
    auto run = batch.operands.priced ? differentiate_sparse_batch<true> : differentiate_sparse_batch<false>;
    if (!run(batch, workers)) {
        throw nb::python_error();
    }
}

// Take SciPy's BLAS, by the capsules of scipy.linalg.cython_blas.
void set_blas(nb::dict capsules) {
    auto pointer = [&](const char* name) {
        PyObject* capsule = nb::object(capsules[name]).ptr();
        void* p = PyCapsule_GetPointer(capsule, PyCapsule_GetName(capsule));
        if (!p) {
            throw nb::python_error();
        }
        return p;
    };
    blas::Functions<double>::syrk = reinterpret_cast<blas::Functions<double>::Syrk>(pointer("dsyrk"));
    blas::Functions<float>::syrk = reinterpret_cast<blas::Functions<float>::Syrk>(pointer("ssyrk"));
    blas::Functions<double>::gemm = reinterpret_cast<blas::Functions<double>::Gemm>(pointer("dgemm"));
    blas::Functions<float>::gemm = reinterpret_cast<blas::Functions<float>::Gemm>(pointer("sgemm"));
}

} // namespace

#ifndef QP_MODULE
#define QP_MODULE _core
#endif

NB_MODULE(QP_MODULE, m) {
    if (PyArray_ImportNumPyAPI() < 0) {
        throw nb::python_error();
    }
    nb::set_leak_warnings(false); // Python modules refer to `Parameters` until the process ends
    nb::class_<Parameters>(m, "Parameters").def("__init__", [](Parameters* self, nb::object numbers) {
        new (self) Parameters();
#define X(name) self->name = nb::cast<double>(numbers.attr(#name));
        QP_PARAMETERS(X)
#undef X
    });
    nb::class_<SparseKkt>(m, "SparseKkt")
        .def("__init__", &analyse_pattern)
        .def_ro("fits", &SparseKkt::fits)
        .def_prop_ro("size", [](const SparseKkt& kkt) { return kkt.ldl.size(); })
        .def_prop_ro("operations", [](const SparseKkt& kkt) { return kkt.ldl.operations(); });
    m.attr("INFINITE") = INFINITE;
    m.attr("LANES") = entries<pack_of<double>>;
    m.attr("BLOCK") = blas::BLOCK;
    nb::list names;
#define X(name) names.append(#name);
    QP_PARAMETERS(X)
#undef X
    m.attr("PARAMETERS") = nb::tuple(names);
    m.def("block_sizes", &block_sizes);
    m.def("stored_numbers", &stored_numbers);
    m.def("set_blas", &set_blas);
    m.def("solve_kkt", &differentiate_problems);
    m.def("solve_sparse_kkt", &differentiate_sparse_problems);
    m.def("solve_sparse", &solve_sparse_problems, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
          nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none());
    m.def("solve", &solve_problems, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
          nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none());
}
