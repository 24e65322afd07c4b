/* Which of the engine's modules this processor can run; compiled for any processor. */
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

/* The highest level of x86-64 that the processor and the system support; 0 on other processors. */
static PyObject* highest(PyObject* module, PyObject* arguments) {
    (void)module, (void)arguments;
    long level = 0;
#if defined(__x86_64__) || defined(_M_X64)
    __builtin_cpu_init();
    level = 1;
    if (__builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt")) {
        level = 2;
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
            level = 3;
            if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
                level = 4;
            }
        }
    }
#endif
    return PyLong_FromLong(level);
}

static PyMethodDef functions[] = {{"highest", highest, METH_NOARGS, NULL}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_level", NULL, 0, functions, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__level(void) {
    return PyModule_Create(&definition);
}
