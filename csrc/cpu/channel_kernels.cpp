// The channel kernels on CPU. They slice the work for the loops of channel_loops.h and combine the
// sums of the slices.
#include "../kernels/channel_kernels.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "channel_loops.h"

namespace fusedconvbn {
namespace {

using at::Tensor;
using cpu::acc_t;
using cpu::ChannelLoops;
using cpu::Shape;
using cpu::Vectors;

constexpr int64_t grain = 1 << 15;  // values that are worth a thread
constexpr int64_t most_slices = 64;

template <typename T>
cpu::ChannelLoopsPair<T> choose_loops() {
  return cpu::with_isa([]<cpu::Isa isa>() { return cpu::channel_loops<isa, T>(); });
}

template <typename T>
const auto chosen_loops = choose_loops<T>();

template <typename T>
const ChannelLoops<T>& loops(const ChannelLayout& layout) {
  return layout.channels_last ? chosen_loops<T>.channels_last : chosen_loops<T>.contiguous;
}

Shape shape_of(const ChannelLayout& layout) {
  return {layout.outer, layout.channels, layout.inner};
}

template <typename T>
const T* data_or_null(const Tensor& t) {
  return t.defined() ? t.const_data_ptr<T>() : nullptr;
}

// The vectors of a norm as the loops read them.
template <typename T>
class Expanded {
 public:
  using acc = acc_t<T>;

  Expanded(const NormVectors& norm, const ChannelLayout& layout)
      : mean_(data_or_null<acc>(norm.statistics)),
        gamma_(data_or_null<acc>(norm.weight)),
        beta_(data_or_null<acc>(norm.bias)),
        absent_(layout.channels) {
    if (!mean_ && gamma_) return;
    const int64_t groups = mean_ ? layout.groups() : layout.channels;
    scale_.assign(groups, 1);
    if (!mean_) return;
    r_.resize(groups);
    for (int64_t g = 0; g < groups; ++g) r_[g] = inverse_std(norm.how, mean_[groups + g]);
    for (int64_t g = 0; g < groups; ++g) scale_[g] = gamma_ ? r_[g] * gamma_[g] : r_[g];
  }

  // The vectors from `group` on. An absent vector is the same for all samples.
  Vectors<T> from(int64_t group) const {
    const acc* scale = scale_.empty() ? gamma_ + group : scale_.data() + (mean_ ? group : 0);
    return {mean_ ? mean_ + group : absent_.data(), scale, beta_ ? beta_ + group : absent_.data()};
  }
  acc r(int64_t group) const { return r_.empty() ? acc(1) : r_[group]; }
  bool scale_alone() const { return !mean_ && !beta_; }

 private:
  const acc *mean_, *gamma_, *beta_;
  std::vector<acc> absent_, scale_, r_;  // absent_ is all 0
};

// Computes both sums of each group, (2, G). add(channel, group, begin, end, sums) is a reduction of
// ChannelLoops whose vectors start at `group`. The slices depend only on the shape and are summed
// in order, so the result does not depend on the number of threads.
template <typename Add>
std::vector<double> reduce(const ChannelLayout& layout, const Add& add) {
  const int64_t C = layout.channels, G = layout.groups(), positions = layout.count();
  // Each unit is sliced by itself: one channel, or all channels of a sample if channels last.
  const int64_t units = layout.channels_last ? layout.samples : C, width = G / units;
  const int64_t slices = std::clamp<int64_t>(
      std::min(most_slices / units, positions * width / grain), 1, std::max<int64_t>(positions, 1));
  const int64_t length = at::divup(positions, slices);
  std::vector<double> partial(slices * 2 * G);
  at::parallel_for(0, slices * units, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t slice = i / units, unit = i % units, start = slice * length;
      const int64_t begin = (layout.channels_last ? unit * positions : 0) + start;
      const int64_t end = begin + std::min(positions - start, length);
      add(layout.channels_last ? 0 : unit, layout.channels_last ? unit * C : 0, begin, end,
          partial.data() + slice * 2 * G + (layout.channels_last ? 2 * unit * C : 0));
    }
  });
  for (int64_t slice = 1; slice < slices; ++slice)
    for (int64_t i = 0; i < 2 * G; ++i) partial[i] += partial[slice * 2 * G + i];
  return partial;
}

// Calls f(g, at) for each group g; its sums in the result of `reduce` are at[0] and at[C].
template <typename F>
void for_groups(const ChannelLayout& layout, const std::vector<double>& sums, const F& f) {
  const int64_t C = layout.channels;
  for (int64_t sample = 0; sample < layout.samples; ++sample)
    for (int64_t c = 0; c < C; ++c) f(sample * C + c, sums.data() + sample * 2 * C + c);
}

// Calls f(begin, end, group) for slices whose vectors start at `group`.
template <typename F>
void for_slices(const ChannelLayout& layout, const F& f) {
  const int64_t width = layout.channels_last ? layout.channels : 1;
  const int64_t rows = layout.count() * layout.groups() / width;
  at::parallel_for(0, rows, std::max<int64_t>(grain / width, 1), [&](int64_t begin, int64_t end) {
    while (begin < end) {  // if each sample has vectors of its own, once per sample
      const int64_t sample = layout.samples == 1 ? 0 : begin / layout.outer;
      const int64_t last = layout.samples == 1 ? end : std::min(end, (sample + 1) * layout.outer);
      f(begin, last, sample * layout.channels);
      begin = last;
    }
  });
}

template <typename F>
void dispatch(const Tensor& y, const F& f) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, y.scalar_type(), "fusedconvbn",
                                  [&] { f(scalar_t{}); });
}

template <typename T>
acc_t<T>* values_of(Tensor& t) {
  return t.mutable_data_ptr<acc_t<T>>();
}

Tensor pair_of_vectors(const Tensor& y, const ChannelLayout& layout) {
  return at::empty({2, layout.groups()},
                   y.options().dtype(statistics_dtype(y)).memory_format(std::nullopt));
}

Tensor channel_stats(const Tensor& y, int64_t samples) {
  const auto layout = dense_layout(y, samples);
  const int64_t C = layout.channels, G = layout.groups(), count = layout.count();
  auto result = pair_of_vectors(y, layout);
  dispatch(y, [&]<typename T>(T) {
    const auto* data = y.const_data_ptr<T>();
    // Sums are relative to a value of the channel, so that they stay exact when |mean| ≫ std. It is
    // the middle value because the first one is next to the padding.
    std::vector<acc_t<T>> origin(G);
    const auto plane_stride = layout.channels_last ? 1 : layout.inner;
    const auto* middle = data + (layout.outer / 2) * C * layout.inner + layout.inner / 2;
    for (int64_t sample = 0; sample < layout.samples; ++sample, middle += count * C) {
      for (int64_t c = 0; c < C; ++c) {
        const auto value = acc_t<T>(middle[c * plane_stride]);
        origin[sample * C + c] = std::isfinite(value) ? value : 0;
      }
    }
    const auto sums = reduce(
        layout, [&](int64_t channel, int64_t group, int64_t begin, int64_t end, double* sums) {
          loops<T>(layout).stats(shape_of(layout), channel, begin, end, data, origin.data() + group,
                                 sums);
        });
    auto* mean = values_of<T>(result);
    for_groups(layout, sums, [&](int64_t g, const double* at) {
      const double shifted = at[0] / count, var = at[C] / count - shifted * shifted;
      mean[g] = acc_t<T>(origin[g] + shifted);
      mean[G + g] = acc_t<T>(var < 0 ? 0 : var);
    });
  });
  return result;
}

void channel_apply_(Tensor& out, const Tensor& y, const NormVectors& norm,
                    const Activation& activation, const Tensor& residual) {
  const auto layout = dense_layout(y, samples_of(y, norm));
  dispatch(y, [&]<typename T>(T) {
    const Expanded<T> vectors(norm, layout);
    auto* to = out.mutable_data_ptr<T>();
    const auto* from = y.const_data_ptr<T>();
    const auto* added = data_or_null<T>(residual);
    const bool product = vectors.scale_alone() && activation.none() && !added;  // with a gate
    for_slices(layout, [&](int64_t begin, int64_t end, int64_t group) {
      const auto v = vectors.from(group);
      if (product)
        loops<T>(layout).multiply(shape_of(layout), begin, end, to, from, v.scale);
      else
        loops<T>(layout).apply(shape_of(layout), begin, end, to, from, v, activation, added);
    });
  });
}

Tensor channel_grad_stats(const Tensor& dout, const Tensor& y, int64_t samples,
                          const NormVectors& norm, const Activation& activation,
                          const GradSource& source, const ParameterGrads& grads) {
  TORCH_INTERNAL_ASSERT(source.du.defined() == writes_du(y, activation, source));
  const auto layout = dense_layout(y, samples);
  const int64_t G = layout.groups();
  auto result = pair_of_vectors(y, layout);
  dispatch(y, [&]<typename T>(T) {
    const Expanded<T> vectors(norm, layout);
    const cpu::GradSource<T> with{data_or_null<T>(source.residual), data_or_null<T>(source.result),
                                  source.du.defined() ? source.du.mutable_data_ptr<T>() : nullptr};
    const auto sums = reduce(
        layout, [&](int64_t channel, int64_t group, int64_t begin, int64_t end, double* sums) {
          loops<T>(layout).grad_stats(shape_of(layout), channel, begin, end,
                                      dout.const_data_ptr<T>(), y.const_data_ptr<T>(),
                                      vectors.from(group), activation, with, sums);
        });
    auto *S1 = values_of<T>(result), *S2 = S1 + G;
    for_groups(layout, sums, [&](int64_t g, const double* at) {
      S1[g] = acc_t<T>(at[0]);
      S2[g] = acc_t<T>(at[layout.channels]);
    });
    auto [dgamma, dbeta] = grads;
    if (dgamma.defined())
      for (int64_t g = 0; g < G; ++g) values_of<T>(dgamma)[g] = vectors.r(g) * S2[g];
    if (dbeta.defined()) std::copy_n(S1, G, values_of<T>(dbeta));
  });
  return result;
}

void channel_grad_apply_(Tensor& out, const Tensor& dout, const Tensor& y, const NormVectors& norm,
                         const Tensor& sums, const Activation& activation) {
  const auto layout = dense_layout(y, samples_of(y, norm));
  const int64_t G = layout.groups();
  dispatch(y, [&]<typename T>(T) {
    using acc = acc_t<T>;
    const Expanded<T> vectors(norm, layout);
    std::vector<acc> linear(2 * G);
    if (sums.defined()) {
      const auto *S1 = sums.const_data_ptr<acc>(), *S2 = S1 + G,
                 *found = data_or_null<acc>(norm.statistics);
      for (int64_t g = 0; g < G; ++g) {
        const Linear<acc> of(norm.how, found[G + g], vectors.from(g).scale[0], vectors.r(g),
                             norm.how.counted ? found[2 * G + g] : acc(0), S1[g], S2[g]);
        linear[g] = of.slope, linear[G + g] = of.offset;
      }
    }
    auto* to = out.mutable_data_ptr<T>();
    for_slices(layout, [&](int64_t begin, int64_t end, int64_t group) {
      loops<T>(layout).grad_apply(shape_of(layout), begin, end, to, dout.const_data_ptr<T>(),
                                  y.const_data_ptr<T>(), vectors.from(group), linear.data() + group,
                                  linear.data() + G + group, activation);
    });
  });
}

void update_running(at::ArrayRef<RunningUpdate> updates) {
  for (const auto& update : updates) {
    const int64_t C = update.statistics.size(1);
    const double count =
        update.counter.defined() ? ++*update.counter.mutable_data_ptr<int64_t>() : 0;
    if (!update.mean.defined()) continue;
    dispatch(update.statistics, [&]<typename acc>(acc) {
      if constexpr (std::is_same_v<acc, acc_t<acc>>) {
        const auto* found = update.statistics.const_data_ptr<acc>();
        const RunningChannel<acc> of{
            found, data_or_null<acc>(update.bias), C, update.momentum, update.values, count};
        auto *mean = update.mean.mutable_data_ptr<acc>(), *var = update.var.mutable_data_ptr<acc>();
        for (int64_t c = 0; c < C; ++c) of.move(c, mean[c], var[c]);
      }
    });
  }
}

const ChannelKernels kernels{channel_stats, channel_apply_, channel_grad_stats, channel_grad_apply_,
                             update_running};
const RegisterChannelKernels registered(at::kCPU, kernels);

}  // namespace
}  // namespace fusedconvbn
