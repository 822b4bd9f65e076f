// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <Python.h>

namespace iss {

// ops.cell_step(cell, parameters, x, hx), a METH_FASTCALL function.
PyObject* cell_step(PyObject*, PyObject* const* args, Py_ssize_t count);

}  // namespace iss
