// Winograd convolutions and their gradients: slices the work for the loops of winograd_loops.h.
#include "winograd.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "winograd_loops.h"

namespace fusedconvbn {
namespace {

using at::Tensor;
using cpu::WinogradShape;

constexpr auto channels_last = at::MemoryFormat::ChannelsLast;
constexpr int64_t unit = 32;         // the channels of both maps are multiples of it
constexpr int64_t least_tiles = 64;  // per thread; for fewer, transforming the filters costs more
// Values of a scratch buffer that all threads share, for filters or for tiles.
constexpr int64_t most_values = int64_t(1) << 20;

std::optional<cpu::WinogradLoops> choose_loops() {
  return cpu::with_isa([]<cpu::Isa isa>() -> std::optional<cpu::WinogradLoops> {
    if constexpr (isa == cpu::Isa::baseline)
      return std::nullopt;
    else
      return cpu::winograd_loops<isa>();
  });
}

const auto loops = choose_loops();

// Calls f(begin, end) in parallel for parts of `count` that begin at multiples of `unit`.
template <typename F>
void for_units(int64_t count, int64_t unit, const F& f) {
  at::parallel_for(0, at::divup(count, unit), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i * unit, std::min(count, (i + 1) * unit));
  });
}

Tensor scratch(int64_t values, const Tensor& like) {
  return at::empty({values}, like.options().memory_format(std::nullopt));
}

// How many filters fit into a buffer of most_values with their u or du.
int64_t filters_at_a_time(const WinogradShape& s) {
  return std::clamp<int64_t>(most_values / (cpu::winograd_positions * s.channels) / unit * unit,
                             unit, s.all_filters);
}

// Calls f(shape, k) for filters k, k + 1, …, k + shape.filters − 1, a few at a time.
template <typename F>
void for_filters(const WinogradShape& all, const F& f) {
  auto s = all;
  for (int64_t k = 0; k < s.all_filters; k += filters_at_a_time(s)) {
    s.filters = std::min(filters_at_a_time(s), s.all_filters - k);
    f(std::as_const(s), k);
  }
}

Tensor convolve(const WinogradShape& all, const Tensor& in, const Tensor& weight, bool rotated) {
  const Tensor kernel = weight.contiguous(channels_last);
  const cpu::WinogradWeight w{kernel.const_data_ptr<float>(), weight.size(0), weight.size(1),
                              rotated};
  auto out = at::empty({all.batch, all.all_filters, all.out_height(), all.out_width()},
                       in.options().memory_format(channels_last));
  const auto u = scratch(cpu::winograd_positions * all.channels * filters_at_a_time(all), in);
  // Each thread computes blocks of equal size, whose tiles and products stay in its cache.
  const int64_t threads = std::clamp<int64_t>(all.tiles() / 8, 1, at::get_num_threads());
  const int64_t most =
      std::clamp<int64_t>((1 << 15) / (all.channels + filters_at_a_time(all)), 16, 64);
  const int64_t rounds = at::divup(all.tiles(), threads * most);
  const int64_t block = at::divup(at::divup(all.tiles(), threads * rounds), 8) * 8,
                blocks = at::divup(all.tiles(), block);
  const int64_t own_values =
      cpu::winograd_positions * (block * (all.channels + filters_at_a_time(all)) + 2 * unit);
  const auto own = scratch(threads * own_values, in);
  for_filters(all, [&](const WinogradShape& s, int64_t k) {
    for_units(s.filters, loops->panel, [&](int64_t begin, int64_t end) {
      loops->filters(w, k, s.filters, begin, end, u.mutable_data_ptr<float>());
    });
    at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t)
        for (int64_t b = t * blocks / threads; b < (t + 1) * blocks / threads; ++b)
          loops->outputs(s, b * block, std::min(s.tiles(), (b + 1) * block),
                         in.const_data_ptr<float>(), u.const_data_ptr<float>(),
                         own.mutable_data_ptr<float>() + t * own_values,
                         out.mutable_data_ptr<float>() + k);
    });
  });
  return out;
}

WinogradShape shape_of(const Conv& conv, const Tensor& input, const Tensor& weight) {
  return {input.size(0),   input.size(1),  0, weight.size(0), input.size(2), input.size(3),
          conv.padding[0], conv.padding[1]};
}

}  // namespace

bool winograd_takes(const Conv& conv, at::IntArrayRef weight) {
  const auto wide = [](int64_t channels) {
    return channels % unit == 0 && channels <= cpu::most_channels;
  };
  return loops && weight.size() == 4 && weight[2] == 3 && weight[3] == 3 && wide(weight[0]) &&
         wide(weight[1]) && !conv.transposed && conv.groups == 1 && all(conv.stride, 1) &&
         all(conv.dilation, 1) &&
         std::all_of(conv.padding.begin(), conv.padding.end(), [](int64_t p) { return p <= 2; });
}

bool winograd_applies(const Conv& conv, const Tensor& input, const Tensor& weight) {
  if (!input.is_cpu() || input.scalar_type() != at::kFloat || weight.scalar_type() != at::kFloat ||
      input.dim() != 4 || !winograd_takes(conv, weight.sizes()) ||
      weight.size(1) != input.size(1) || !input.is_contiguous(channels_last))
    return false;
  const int64_t tiles = input.size(0) * at::divup(input.size(2) + 2 * conv.padding[0] - 2, 2) *
                        at::divup(input.size(3) + 2 * conv.padding[1] - 2, 2);
  return tiles >= least_tiles * at::get_num_threads();
}

Tensor winograd(const Conv& conv, const Tensor& input, const Tensor& weight) {
  return convolve(shape_of(conv, input, weight), input, weight, /*rotated=*/false);
}

Tensor winograd_grad_input(const Conv& conv, const Tensor& dout, const Tensor& weight) {
  const WinogradShape shape{dout.size(0),        weight.size(0),     0,
                            weight.size(1),      dout.size(2),       dout.size(3),
                            2 - conv.padding[0], 2 - conv.padding[1]};
  return convolve(shape, dout.contiguous(channels_last), weight, /*rotated=*/true);
}

Tensor winograd_grad_weight(const Conv& conv, const Tensor& dout, const Tensor& input,
                            const Tensor& weight) {
  const auto all = shape_of(conv, input, weight);
  const Tensor gradient = dout.contiguous(channels_last);
  auto dweight = at::empty(weight.sizes(), input.options().memory_format(channels_last));
  const int64_t C = all.channels, most = filters_at_a_time(all),
                size = cpu::winograd_positions * most * C;
  // If the sums are small, the tiles are sliced and each slice has its own sums. Otherwise the
  // threads share the products.
  const int64_t slices = std::clamp<int64_t>(std::min(most_values / size, all.tiles() / 256), 1, 8);
  const int64_t length = at::divup(all.tiles(), slices);
  const int64_t count =
      slices > 1 ? 64 : std::clamp<int64_t>(most_values / 16 / (C + most) / 64 * 64, 64, 256);
  const int64_t v_size = cpu::winograd_positions * count * C,
                z_size = cpu::winograd_positions * count * most;
  const auto sums = scratch(slices * size, input),
             spread = scratch(slices * (v_size + z_size), input);
  for_filters(all, [&](const WinogradShape& s, int64_t k) {
    const auto add = [&](int64_t slice, const auto& for_each) {
      auto* const v = spread.mutable_data_ptr<float>() + slice * (v_size + z_size);
      auto* const z = v + v_size;
      auto* const du = sums.mutable_data_ptr<float>() + slice * size;
      std::fill_n(du, cpu::winograd_positions * s.filters * C, 0.f);
      const int64_t end = std::min(s.tiles(), (slice + 1) * length);
      for (int64_t first = slice * length; first < end; first += count) {
        const int64_t now = std::min(count, end - first);
        for_each(now, 16, [&](int64_t begin, int64_t end) {
          loops->spread(s, first, begin, end, count, input.const_data_ptr<float>(),
                        gradient.const_data_ptr<float>() + k, v, z);
        });
        for_each(cpu::winograd_positions * s.filters, unit, [&](int64_t begin, int64_t end) {
          const int64_t p = begin / s.filters, of = p * s.filters;
          loops->products(s, p, begin - of, end - of, now, count, v, z, du);
        });
      }
    };
    if (slices == 1)
      add(0, [](int64_t count, int64_t unit, const auto& f) { for_units(count, unit, f); });
    else
      at::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
        for (int64_t slice = begin; slice < end; ++slice)
          add(slice, [](int64_t count, int64_t unit, const auto& f) {
            for (int64_t i = 0; i < count; i += unit) f(i, std::min(count, i + unit));
          });
      });
    for_units(s.filters, unit, [&](int64_t begin, int64_t end) {
      loops->filter_gradients(s, begin, end, slices, size, sums.mutable_data_ptr<float>(),
                              dweight.mutable_data_ptr<float>() + k * 9 * C);
    });
  });
  return dweight;
}

}  // namespace fusedconvbn
