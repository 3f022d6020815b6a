// The channel kernels on CPU: slices of work for the loops of channel_loops.h, and the sums put together.
#include "../channel_kernels.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "channel_loops.h"

namespace fusedconvbn {
namespace {

using at::Tensor;
using cpu::acc_t;
using cpu::ChannelLoops;
using cpu::Shape;
using cpu::Vectors;

constexpr int64_t grain = 1 << 15;  // values in a slice that is worth a thread
constexpr int64_t most_slices = 64;

template <typename T>
cpu::ChannelLoopsPair<T> choose_loops() {
#if defined(__x86_64__)
  // ATen's choice for its own kernels, which ATEN_CPU_CAPABILITY can lower.
  const auto capability = at::get_cpu_capability();
  if (capability == "AVX2") return cpu::channel_loops_avx2<T>();
  if (capability.find("AVX") == 0) return cpu::channel_loops_avx512<T>();
#endif
  return cpu::channel_loops_baseline<T>();
}

template <typename T>
const auto chosen_loops = choose_loops<T>();

template <typename T>
const ChannelLoops<T>& loops(const ChannelLayout& layout) {
  return layout.channels_last ? chosen_loops<T>.channels_last : chosen_loops<T>.contiguous;
}

Shape shape_of(const ChannelLayout& layout) { return {layout.outer, layout.channels, layout.inner}; }

template <typename T>
const acc_t<T>* row_of(const Tensor& t, int64_t i) {
  return static_cast<const acc_t<T>*>(row(t, i));
}

template <typename T>
Vectors<T> vectors_of(const Affine& a) {
  return {row_of<T>(a.statistics, 0), row_of<T>(a.vectors, 0), row_of<T>(a.vectors, 1)};
}

template <typename T>
const T* data_or_null(const Tensor& t) {
  return t.defined() ? t.const_data_ptr<T>() : nullptr;
}

// Both sums of each channel, (2, C). add(channel, begin, end, sums) is a reduction of ChannelLoops. The slices depend
// on the shape alone, and are added in order: the result does not depend on the number of threads.
template <typename Add>
std::vector<double> reduce(const ChannelLayout& layout, const Add& add) {
  const int64_t C = layout.channels, positions = layout.count();
  const int64_t groups = layout.channels_last ? 1 : C;  // channels that are sliced one by one
  const int64_t slices = std::clamp<int64_t>(std::min(most_slices / groups, positions * (C / groups) / grain), 1,
                                             std::max<int64_t>(positions, 1));
  const int64_t length = at::divup(positions, slices);
  std::vector<double> partial(slices * 2 * C);
  at::parallel_for(0, slices * groups, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t slice = i / groups, channel = i % groups;
      add(channel, slice * length, std::min(positions, (slice + 1) * length), partial.data() + slice * 2 * C);
    }
  });
  for (int64_t slice = 1; slice < slices; ++slice)
    for (int64_t c = 0; c < 2 * C; ++c) partial[c] += partial[slice * 2 * C + c];
  return partial;
}

template <typename F>
void for_slices(const ChannelLayout& layout, const F& f) {
  const int64_t width = layout.channels_last ? layout.channels : 1;
  const int64_t rows = layout.count() * layout.channels / width;
  at::parallel_for(0, rows, std::max<int64_t>(grain / width, 1), f);
}

template <typename F>
void dispatch(const Tensor& y, const F& f) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, y.scalar_type(), "fusedconvbn", [&] { f(scalar_t{}); });
}

Tensor channel_stats(const Tensor& y) {
  const auto layout = dense_layout(y);
  const int64_t C = layout.channels, count = layout.count();
  auto result = at::empty({2, C}, y.options().dtype(statistics_dtype(y)).memory_format(std::nullopt));
  dispatch(y, [&]<typename T>(T) {
    const auto* data = y.const_data_ptr<T>();
    // Sums are taken from a value of the channel, so that they stay exact when |mean| ≫ std. The middle one: the
    // first is next to the padding.
    std::vector<acc_t<T>> origin(C);
    const auto plane_stride = layout.channels_last ? 1 : layout.inner;
    const auto* middle = data + (layout.outer / 2) * C * layout.inner + layout.inner / 2;
    for (int64_t c = 0; c < C; ++c) {
      const auto value = acc_t<T>(middle[c * plane_stride]);
      origin[c] = std::isfinite(value) ? value : 0;
    }
    const auto sums = reduce(layout, [&](int64_t channel, int64_t begin, int64_t end, double* sums) {
      loops<T>(layout).stats(shape_of(layout), channel, begin, end, data, origin.data(), sums);
    });
    auto* mean = result.mutable_data_ptr<acc_t<T>>();
    for (int64_t c = 0; c < C; ++c) {
      const double shifted = sums[c] / count, var = sums[C + c] / count - shifted * shifted;
      mean[c] = acc_t<T>(origin[c] + shifted);
      mean[C + c] = acc_t<T>(var < 0 ? 0 : var);
    }
  });
  return result;
}

void channel_apply_(Tensor& out, const Tensor& y, const Affine& a, const Activation& activation,
                    const Tensor& residual) {
  const auto layout = dense_layout(y);
  dispatch(y, [&]<typename T>(T) {
    auto* to = out.mutable_data_ptr<T>();
    const auto* from = y.const_data_ptr<T>();
    const auto* added = data_or_null<T>(residual);
    for_slices(layout, [&](int64_t begin, int64_t end) {
      loops<T>(layout).apply(shape_of(layout), begin, end, to, from, vectors_of<T>(a), activation, added);
    });
  });
}

Tensor channel_grad_stats(const Tensor& dout, const Tensor& y, const Affine& a, const Activation& activation,
                          const Joined& joined) {
  const auto layout = dense_layout(y);
  auto result = at::empty({2, layout.channels}, a.vectors.options());
  dispatch(y, [&]<typename T>(T) {
    const cpu::Joined<T> with{data_or_null<T>(joined.residual), data_or_null<T>(joined.result),
                              joined.du.defined() ? joined.du.mutable_data_ptr<T>() : nullptr};
    const auto sums = reduce(layout, [&](int64_t channel, int64_t begin, int64_t end, double* sums) {
      loops<T>(layout).grad_stats(shape_of(layout), channel, begin, end, dout.const_data_ptr<T>(),
                                  y.const_data_ptr<T>(), vectors_of<T>(a), activation, with, sums);
    });
    std::copy_n(sums.begin(), 2 * layout.channels, result.mutable_data_ptr<acc_t<T>>());
  });
  return result;
}

void channel_grad_apply_(Tensor& out, const Tensor& dout, const Tensor& y, const Affine& a, const Tensor& linear,
                         const Activation& activation) {
  const auto layout = dense_layout(y);
  dispatch(y, [&]<typename T>(T) {
    auto* to = out.mutable_data_ptr<T>();
    for_slices(layout, [&](int64_t begin, int64_t end) {
      loops<T>(layout).grad_apply(shape_of(layout), begin, end, to, dout.const_data_ptr<T>(), y.const_data_ptr<T>(),
                                  vectors_of<T>(a), row_of<T>(linear, 0), row_of<T>(linear, 1), activation);
    });
  });
}

// f(c) of each channel, where make(acc*) makes f for (3, C) results.
template <typename Make>
Tensor for_channels(const Tensor& like, const Make& make) {
  const int64_t channels = like.size(1);
  auto result = at::empty({3, channels}, like.options());
  dispatch(like, [&]<typename T>(T) {
    if constexpr (std::is_same_v<T, acc_t<T>>) {
      const auto f = make(result.mutable_data_ptr<T>());
      for (int64_t c = 0; c < channels; ++c) f(c);
    }
  });
  return result;
}

Tensor affine_vectors(const Tensor& statistics, const Tensor& weight, const Tensor& bias, const Normalisation& how) {
  return for_channels(statistics, [&]<typename acc>(acc* result) {
    return AffineVectors<acc>{row_of<acc>(statistics, 1), data_or_null<acc>(weight),
                              data_or_null<acc>(bias),    result,
                              statistics.size(1),         how};
  });
}

Tensor grad_vectors(const Tensor& sums, const Tensor& total, const Affine& a, bool counted, const Normalisation& how) {
  return for_channels(sums, [&]<typename acc>(acc* result) {
    return GradVectors<acc>{row_of<acc>(sums, 0),
                            row_of<acc>(total, 0),
                            row_of<acc>(a.statistics, 1),
                            row_of<acc>(a.vectors, 0),
                            counted ? row_of<acc>(a.statistics, 2) : nullptr,
                            result,
                            sums.size(1),
                            how};
  });
}

const ChannelKernels kernels{channel_stats,       channel_apply_, channel_grad_stats,
                             channel_grad_apply_, affine_vectors, grad_vectors};
const RegisterChannelKernels registered(at::kCPU, kernels);

}  // namespace
}  // namespace fusedconvbn
