// The build's facts, in a module that needs no torch to import: it is what can still speak when
// `_ops` does not load.
#include <pybind11/pybind11.h>

#include <string>

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

pybind11::dict build_info() {
  const std::string cuda = FUSEDCONVBN_CUDA_VERSION, architectures = FUSEDCONVBN_CUDA_ARCHITECTURES;
  pybind11::dict facts;
  facts["torch"] = FUSEDCONVBN_TORCH_VERSION;
  facts["cuda"] = cuda.empty() ? pybind11::object(pybind11::none()) : pybind11::str(cuda);
  facts["cuda_architectures"] = architectures;
  facts["compiler"] = compiler();
#if defined(__x86_64__)
  facts["instruction_sets"] = pybind11::make_tuple("baseline", "avx2", "avx512");
#else
  facts["instruction_sets"] = pybind11::make_tuple("baseline");
#endif
  return facts;
}

}  // namespace

PYBIND11_MODULE(_C, m) { m.def("build_info", &build_info); }
