// Max pooling on CPU: PyTorch's kernels, with their indices converted to offsets and back.
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../kernels/pool.h"

namespace fusedconvbn {

using at::Tensor;

namespace {

// Calls f(index in memory, row, column) for each value of a dense (N, C, H, W) map.
template <typename F>
void for_values(const Tensor& map, const F& f) {
  const int64_t height = map.size(2), width = map.size(3);
  const bool last = !map.is_contiguous();
  const int64_t channels = last ? map.size(1) : 1,
                rows = map.size(0) * (last ? 1 : map.size(1)) * height;
  at::parallel_for(0, rows,
                   std::max<int64_t>((1 << 14) / std::max<int64_t>(width * channels, 1), 1),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t row = begin; row < end; ++row)
                       for (int64_t column = 0; column < width; ++column)
                         for (int64_t c = 0; c < channels; ++c)
                           f((row * width + column) * channels + c, row % height, column);
                   });
}

// For each offset in the window, its distance in memory from the first value of the window, in a
// map of `width`.
std::array<int64_t, Pool::most_offsets> distances(const Pool& pool, int64_t width) {
  std::array<int64_t, Pool::most_offsets> distance{};
  for (int64_t k = 0; k < pool.offsets(); ++k)
    distance[k] =
        k / pool.kernel[1] * pool.dilation[0] * width + k % pool.kernel[1] * pool.dilation[1];
  return distance;
}

// Converts PyTorch's indices in the map, row·width + column, to offsets in the windows.
Tensor offsets_in_windows(const Tensor& indices, const Pool& pool, int64_t width) {
  const auto distance = distances(pool, width);
  auto offsets = at::empty_like(indices, indices.options().dtype(at::kByte));
  const auto* const from = indices.const_data_ptr<int64_t>();
  auto* const to = offsets.mutable_data_ptr<uint8_t>();
  // If a row of the window is longer than the distance to its next row, two offsets may have the
  // same distance.
  if ((pool.kernel[1] - 1) * pool.dilation[1] >= pool.dilation[0] * width) {
    for_values(indices, [&](int64_t at, int64_t row, int64_t column) {
      const int64_t down = from[at] / width - row * pool.stride[0] + pool.padding[0];
      const int64_t right = from[at] % width - column * pool.stride[1] + pool.padding[1];
      to[at] = uint8_t(down / pool.dilation[0] * pool.kernel[1] + right / pool.dilation[1]);
    });
    return offsets;
  }
  std::vector<uint8_t> offset(distance[pool.offsets() - 1] + 1);
  for (int64_t k = 0; k < pool.offsets(); ++k) offset[distance[k]] = uint8_t(k);
  for_values(indices, [&](int64_t at, int64_t row, int64_t column) {
    const auto found = uint64_t(from[at] - pool.first(row, column, width));
    to[at] = found < offset.size() ? offset[found] : 0;
  });
  return offsets;
}

Tensor indices_in_map(const Tensor& offsets, const Pool& pool, int64_t width) {
  const auto distance = distances(pool, width);
  auto indices = at::empty_like(offsets, offsets.options().dtype(at::kLong));
  const auto* const from = offsets.const_data_ptr<uint8_t>();
  auto* const to = indices.mutable_data_ptr<int64_t>();
  for_values(offsets, [&](int64_t at, int64_t row, int64_t column) {
    to[at] = pool.first(row, column, width) + distance[from[at]];
  });
  return indices;
}

std::tuple<Tensor, Tensor> max_pool2d_cpu(const Tensor& input, at::IntArrayRef packed) {
  const auto pool = Pool::unpack(packed);
  auto [output, indices] = pool.with_indices(input);
  return {output, offsets_in_windows(indices, pool, input.size(3))};
}

// A tensor of which nothing but the sizes and the layout may be read.
Tensor without_memory(c10::SymIntArrayRef sizes, at::MemoryFormat format,
                      const at::TensorOptions& options) {
  const auto layout = at::empty_symint(sizes, options.device(at::kMeta).memory_format(format));
  auto t = at::empty({0}, options);
  t.unsafeGetTensorImpl()->set_sizes_and_strides(layout.sizes(), layout.strides());
  return t;
}

Tensor max_pool2d_backward_cpu(const Tensor& dout, const Tensor& offsets, at::IntArrayRef packed,
                               c10::SymIntArrayRef sizes, bool channels_last) {
  const auto pool = Pool::unpack(packed);
  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const auto dense = offsets.contiguous(format);
  const auto indices = indices_in_map(dense, pool, sizes[3].expect_int());
  return pool.backward_of_indices(dout, indices, without_memory(sizes, format, dout.options()));
}

}  // namespace

TORCH_LIBRARY_IMPL(fusedconvbn, CPU, m) {
  m.impl("_max_pool2d", TORCH_FN(max_pool2d_cpu));
  m.impl("_max_pool2d_backward", TORCH_FN(max_pool2d_backward_cpu));
}

}  // namespace fusedconvbn
