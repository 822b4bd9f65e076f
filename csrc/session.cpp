// SPDX-License-Identifier: Apache-2.0
// What is not an op, bound with pybind11: what was built, and the choice of instruction set.
// Importing the module also runs the registrations of library.cpp and of the host files.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/kernels.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled half of iss_kernels; use the functions of the package instead.";
  module.def("build_info", [] {
    py::dict info;
    info["compiler"] = __VERSION__;
    info["isas_built"] = iss::built_isas();
    info["isas_supported"] = iss::supported_isas();
    info["isa"] = iss::cpu_kernels().isa;
#ifdef ISS_WITH_CUDA
    info["cuda_built"] = true;
#else
    info["cuda_built"] = false;
#endif
    return info;
  });
  module.def("supported_isas", &iss::supported_isas);
  module.def("set_isa", &iss::set_isa);
  iss::cpu_kernels();  // so that a wrong ISS_KERNELS_ISA is an error here, at import
}
