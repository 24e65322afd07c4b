/* A module that finds out which of the engine's modules this processor can run; it is compiled for any processor. */
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include "level.h"

/* Return the highest level of x86-64 that the processor and the system support; 0 on other processors. */
static PyObject* highest(PyObject* module, PyObject* arguments) {
    (void)module, (void)arguments;
    return PyLong_FromLong(highest_level());
}

static PyMethodDef functions[] = {{"highest", highest, METH_NOARGS, NULL}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_level", NULL, 0, functions, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__level(void) {
    return PyModule_Create(&definition);
}
