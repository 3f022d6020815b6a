// The options of a convolution.
#pragma once

#include <c10/core/SymIntArrayRef.h>

#include <algorithm>
#include <vector>

namespace fusedconvbn {

struct Conv {
  std::vector<int64_t> stride, padding, dilation, output_padding;
  bool transposed = false;
  int64_t groups = 1;

  std::vector<c10::SymInt> output_sizes(c10::SymIntArrayRef input,
                                        c10::SymIntArrayRef weight) const;
};

inline bool all(at::IntArrayRef values, int64_t value) {
  return std::all_of(values.begin(), values.end(), [&](int64_t v) { return v == value; });
}

}  // namespace fusedconvbn
