// The only code that chooses among the instruction sets for which the loops here are compiled.
#pragma once

#include <ATen/Version.h>

#include <string>

namespace fusedconvbn::cpu {

enum class Isa { baseline, avx2, avx512 };

// Calls f.operator()<isa>() with the instruction set that ATen chose for its own kernels. The
// environment variable ATEN_CPU_CAPABILITY can lower it.
template <typename F>
auto with_isa(const F& f) {
#if defined(__x86_64__)
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX2") return f.template operator()<Isa::avx2>();
  if (capability.find("AVX") == 0) return f.template operator()<Isa::avx512>();
#endif
  return f.template operator()<Isa::baseline>();
}

}  // namespace fusedconvbn::cpu
