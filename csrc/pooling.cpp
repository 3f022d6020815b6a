#include "pooling.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/div.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

namespace fusedconvbn {

using at::Tensor;

PoolWindow PoolWindow::of(at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                          at::IntArrayRef dilation) {
  const auto pair = [](at::IntArrayRef v) { return std::array<int64_t, 2>{v[0], v[v.size() - 1]}; };
  return {pair(kernel), pair(stride.empty() ? kernel : stride), pair(padding), pair(dilation)};
}

PoolWindow PoolWindow::unpack(at::IntArrayRef v) {
  TORCH_CHECK_VALUE(v.size() == 8 && v[0] > 0 && v[1] > 0 && v[6] > 0 && v[7] > 0,
                    "expected the kernel, stride, padding and dilation of a window in two dimensions, got ", v);
  const PoolWindow window{{v[0], v[1]}, {v[2], v[3]}, {v[4], v[5]}, {v[6], v[7]}};
  TORCH_CHECK_VALUE(window.places() <= most_places, "expected a window of at most ", most_places, " places, got ", v);
  return window;
}

std::vector<int64_t> PoolWindow::packed() const {
  return {kernel[0], kernel[1], stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1]};
}

namespace {

// In ATen, for every device: the first row, or column, of each window, which may be in the padding.
Tensor first_places(const PoolWindow& window, size_t dim, const Tensor& pooled) {
  const auto size = pooled.sym_size(dim - 2);
  const auto first = at::arange(size, pooled.options().dtype(at::kLong)) * window.stride[dim] - window.padding[dim];
  return dim == 0 ? first.unsqueeze(1) : first;
}

Tensor floor_divide(const Tensor& t, const at::Scalar& by) { return at::div(t, by, "floor"); }

Tensor places_in_window_aten(const Tensor& indices, at::IntArrayRef packed, c10::SymInt width) {
  const auto window = PoolWindow::unpack(packed);
  const auto row = floor_divide(indices, width), column = indices - row * width;
  return (floor_divide(row - first_places(window, 0, indices), window.dilation[0]) * window.kernel[1] +
          floor_divide(column - first_places(window, 1, indices), window.dilation[1]))
      .to(at::kByte);
}

Tensor places_in_map_aten(const Tensor& places, at::IntArrayRef packed, c10::SymInt width) {
  const auto window = PoolWindow::unpack(packed);
  const auto place = places.to(at::kLong), row = floor_divide(place, window.kernel[1]);
  const auto column = place - row * window.kernel[1];
  return (row * window.dilation[0] + first_places(window, 0, places)) * width +
         (column * window.dilation[1] + first_places(window, 1, places));
}

// f(place in memory, row, column) for each value of a dense (N, C, H, W) map
template <typename F>
void for_values(const Tensor& map, const F& f) {
  const int64_t height = map.size(2), width = map.size(3);
  const bool last = !map.is_contiguous();
  const int64_t channels = last ? map.size(1) : 1, rows = map.size(0) * (last ? 1 : map.size(1)) * height;
  at::parallel_for(0, rows, std::max<int64_t>((1 << 14) / std::max<int64_t>(width * channels, 1), 1),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t row = begin; row < end; ++row)
                       for (int64_t column = 0; column < width; ++column)
                         for (int64_t c = 0; c < channels; ++c)
                           f((row * width + column) * channels + c, row % height, column);
                   });
}

// Of each place in the window from its first, in a map of `width`.
std::array<int64_t, PoolWindow::most_places> distances(const PoolWindow& w, int64_t width) {
  std::array<int64_t, PoolWindow::most_places> distance{};
  for (int64_t k = 0; k < w.places(); ++k)
    distance[k] = k / w.kernel[1] * w.dilation[0] * width + k % w.kernel[1] * w.dilation[1];
  return distance;
}

bool is_dense(const Tensor& map) {
  return map.dim() == 4 && (map.is_contiguous() || map.is_contiguous(at::MemoryFormat::ChannelsLast));
}

Tensor places_in_window_cpu(const Tensor& indices, at::IntArrayRef packed, c10::SymInt sym_width) {
  const int64_t width = sym_width.expect_int();
  if (!is_dense(indices) || indices.scalar_type() != at::kLong) return places_in_window_aten(indices, packed, width);
  const auto w = PoolWindow::unpack(packed);
  // Two places may be as far from the first where a row of the window is longer than what it steps over.
  if ((w.kernel[1] - 1) * w.dilation[1] >= w.dilation[0] * width) return places_in_window_aten(indices, packed, width);
  const auto distance = distances(w, width);
  std::vector<uint8_t> place(distance[w.places() - 1] + 1);
  for (int64_t k = 0; k < w.places(); ++k) place[distance[k]] = uint8_t(k);
  auto places = at::empty_like(indices, indices.options().dtype(at::kByte));
  const auto* const from = indices.const_data_ptr<int64_t>();
  auto* const to = places.mutable_data_ptr<uint8_t>();
  for_values(indices, [&](int64_t at, int64_t row, int64_t column) {
    const auto found = uint64_t(from[at] - w.first(row, column, width));
    to[at] = found < place.size() ? place[found] : 0;
  });
  return places;
}

Tensor places_in_map_cpu(const Tensor& places, at::IntArrayRef packed, c10::SymInt sym_width) {
  const int64_t width = sym_width.expect_int();
  if (!is_dense(places) || places.scalar_type() != at::kByte) return places_in_map_aten(places, packed, width);
  const auto w = PoolWindow::unpack(packed);
  const auto distance = distances(w, width);
  auto indices = at::empty_like(places, places.options().dtype(at::kLong));
  const auto* const from = places.const_data_ptr<uint8_t>();
  auto* const to = indices.mutable_data_ptr<int64_t>();
  for_values(places, [&](int64_t at, int64_t row, int64_t column) {
    to[at] = w.first(row, column, width) + distance[from[at]];
  });
  return indices;
}

}  // namespace

TORCH_LIBRARY_IMPL(fusedconvbn, CompositeExplicitAutograd, m) {
  m.impl("_places_in_window", TORCH_FN(places_in_window_aten));
  m.impl("_places_in_map", TORCH_FN(places_in_map_aten));
}

TORCH_LIBRARY_IMPL(fusedconvbn, CPU, m) {
  m.impl("_places_in_window", TORCH_FN(places_in_window_cpu));
  m.impl("_places_in_map", TORCH_FN(places_in_map_cpu));
}

}  // namespace fusedconvbn
