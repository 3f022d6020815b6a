// The options of a convolution, and the size of its output.
#pragma once

#include <c10/core/SymIntArrayRef.h>
#include <c10/util/Exception.h>

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

inline std::vector<c10::SymInt> Conv::output_sizes(c10::SymIntArrayRef input,
                                                   c10::SymIntArrayRef weight) const {
  TORCH_CHECK_VALUE(input.size() == stride.size() + 2 && weight.size() == input.size(),
                    "expected a map and a weight of ", stride.size() + 2, " dimensions, got ",
                    input, " and ", weight);
  TORCH_CHECK_VALUE(
      input[1] == (transposed ? weight[0] : weight[1] * groups) && weight[0] % groups == 0,
      "expected a weight for the channels of the map and groups=", groups, ", got ", input, " and ",
      weight);
  std::vector<c10::SymInt> sizes{input[0], transposed ? weight[1] * groups : weight[0]};
  for (size_t d = 0; d < stride.size(); ++d) {
    const auto reach = (weight[d + 2] - 1) * dilation[d] + 1;  // input values that the kernel spans
    sizes.push_back(
        transposed
            ? (input[d + 2] - 1) * stride[d] - 2 * padding[d] + reach + output_padding[d]
            // ⌊(in + 2·padding − reach) / stride⌋ + 1, but at most 0 if the kernel does not fit
            : (input[d + 2] + 2 * padding[d] - reach + stride[d]) / stride[d]);
  }
  return sizes;
}

inline bool all(at::IntArrayRef values, int64_t value) {
  return std::all_of(values.begin(), values.end(), [&](int64_t v) { return v == value; });
}

}  // namespace fusedconvbn
