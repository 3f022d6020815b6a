// The module _C, which describes the build. It can be imported without torch, so it is available
// even if the library with the operators does not load.
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
  pybind11::dict info;
  info["torch"] = FUSEDCONVBN_TORCH_VERSION;
  info["cuda"] = cuda.empty() ? pybind11::object(pybind11::none()) : pybind11::str(cuda);
  info["cuda_architectures"] = architectures;
  info["compiler"] = compiler();
#if defined(__x86_64__)
  info["instruction_sets"] = pybind11::make_tuple("baseline", "avx2", "avx512");
#else
  info["instruction_sets"] = pybind11::make_tuple("baseline");
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) { m.def("build_info", &build_info); }
