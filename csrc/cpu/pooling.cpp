#include "../kernels/pooling.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/max_pool2d_with_indices.h>
#include <ATen/ops/max_pool2d_with_indices_backward.h>
#include <torch/library.h>

namespace fusedconvbn {

using at::Tensor;

Pool Pool::of(at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
              at::IntArrayRef dilation, bool ceil_mode) {
  const auto pair = [](at::IntArrayRef v) { return std::array<int64_t, 2>{v[0], v[v.size() - 1]}; };
  return {pair(kernel), pair(stride.empty() ? kernel : stride), pair(padding), pair(dilation),
          ceil_mode};
}

Pool Pool::unpack(at::IntArrayRef v) {
  TORCH_CHECK_VALUE(
      v.size() == 9 && v[0] > 0 && v[1] > 0 && v[2] > 0 && v[3] > 0 && v[6] > 0 && v[7] > 0,
      "expected the kernel, stride, padding and dilation of a window in two dimensions and "
      "ceil_mode, "
      "got ",
      v);
  const Pool pool{{v[0], v[1]}, {v[2], v[3]}, {v[4], v[5]}, {v[6], v[7]}, v[8] != 0};
  TORCH_CHECK_VALUE(pool.places() <= most_places, "expected a window of at most ", most_places,
                    " places, got ", v);
  return pool;
}

std::vector<int64_t> Pool::packed() const {
  return {kernel[0],  kernel[1],   stride[0],   stride[1], padding[0],
          padding[1], dilation[0], dilation[1], ceil_mode};
}

std::tuple<Tensor, Tensor> Pool::with_indices(const Tensor& input) const {
  return at::max_pool2d_with_indices(input, kernel, stride, padding, dilation, ceil_mode);
}

Tensor Pool::backward_of_indices(const Tensor& dout, const Tensor& indices,
                                 c10::SymIntArrayRef sizes, bool channels_last) const {
  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const auto input = at::empty_symint(sizes, dout.options().memory_format(format));  // not read
  return at::max_pool2d_with_indices_backward(dout, input, kernel, stride, padding, dilation,
                                              ceil_mode, indices);
}

namespace {

// f(place in memory, row, column) for each value of a dense (N, C, H, W) map
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

// Of each place in the window from its first, in a map of `width`.
std::array<int64_t, Pool::most_places> distances(const Pool& pool, int64_t width) {
  std::array<int64_t, Pool::most_places> distance{};
  for (int64_t k = 0; k < pool.places(); ++k)
    distance[k] =
        k / pool.kernel[1] * pool.dilation[0] * width + k % pool.kernel[1] * pool.dilation[1];
  return distance;
}

// From where PyTorch found the values, row·width + column.
Tensor places_in_window(const Tensor& indices, const Pool& pool, int64_t width) {
  const auto distance = distances(pool, width);
  auto places = at::empty_like(indices, indices.options().dtype(at::kByte));
  const auto* const from = indices.const_data_ptr<int64_t>();
  auto* const to = places.mutable_data_ptr<uint8_t>();
  // Two places may be as far from the first where a row of the window is longer than what it steps
  // over.
  if ((pool.kernel[1] - 1) * pool.dilation[1] >= pool.dilation[0] * width) {
    for_values(indices, [&](int64_t at, int64_t row, int64_t column) {
      const int64_t down = from[at] / width - row * pool.stride[0] + pool.padding[0];
      const int64_t right = from[at] % width - column * pool.stride[1] + pool.padding[1];
      to[at] = uint8_t(down / pool.dilation[0] * pool.kernel[1] + right / pool.dilation[1]);
    });
    return places;
  }
  std::vector<uint8_t> place(distance[pool.places() - 1] + 1);
  for (int64_t k = 0; k < pool.places(); ++k) place[distance[k]] = uint8_t(k);
  for_values(indices, [&](int64_t at, int64_t row, int64_t column) {
    const auto found = uint64_t(from[at] - pool.first(row, column, width));
    to[at] = found < place.size() ? place[found] : 0;
  });
  return places;
}

Tensor places_in_map(const Tensor& places, const Pool& pool, int64_t width) {
  const auto distance = distances(pool, width);
  auto indices = at::empty_like(places, places.options().dtype(at::kLong));
  const auto* const from = places.const_data_ptr<uint8_t>();
  auto* const to = indices.mutable_data_ptr<int64_t>();
  for_values(places, [&](int64_t at, int64_t row, int64_t column) {
    to[at] = pool.first(row, column, width) + distance[from[at]];
  });
  return indices;
}

std::tuple<Tensor, Tensor> max_pool2d_cpu(const Tensor& input, at::IntArrayRef packed) {
  const auto pool = Pool::unpack(packed);
  auto [output, indices] = pool.with_indices(input);
  return {output, places_in_window(indices, pool, input.size(3))};
}

Tensor max_pool2d_backward_cpu(const Tensor& dout, const Tensor& places, at::IntArrayRef packed,
                               c10::SymIntArrayRef sizes, bool channels_last) {
  const auto pool = Pool::unpack(packed);
  const auto dense = places.contiguous(channels_last ? at::MemoryFormat::ChannelsLast
                                                     : at::MemoryFormat::Contiguous);
  const auto indices = places_in_map(dense, pool, sizes[3].expect_int());
  return pool.backward_of_indices(dout, indices, sizes, channels_last);
}

std::tuple<Tensor, Tensor> max_pool2d_meta(const Tensor& input, at::IntArrayRef packed) {
  auto [output, indices] = Pool::unpack(packed).with_indices(input);
  return {output, at::empty_like(indices, indices.options().dtype(at::kByte))};
}

Tensor max_pool2d_backward_meta(const Tensor& dout, const Tensor&, at::IntArrayRef,
                                c10::SymIntArrayRef sizes, bool channels_last) {
  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  return at::empty_symint(sizes, dout.options().memory_format(format));
}

}  // namespace

TORCH_LIBRARY_IMPL(fusedconvbn, CPU, m) {
  m.impl("_max_pool2d", TORCH_FN(max_pool2d_cpu));
  m.impl("_max_pool2d_backward", TORCH_FN(max_pool2d_backward_cpu));
}

TORCH_LIBRARY_IMPL(fusedconvbn, Meta, m) {
  m.impl("_max_pool2d", TORCH_FN(max_pool2d_meta));
  m.impl("_max_pool2d_backward", TORCH_FN(max_pool2d_backward_meta));
}

}  // namespace fusedconvbn
