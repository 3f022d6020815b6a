// The four channel kernels (channel_kernels.h) over a slice of a feature map, on raw pointers.
//
// channel_loops_impl.h is compiled once per instruction set. channel_loops returns the tables of
// one instruction set.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../kernels/activation.h"
#include "isa.h"

namespace fusedconvbn::cpu {

template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// outer × channels × inner values, or outer × channels if channels last.
struct Shape {
  int64_t outer, channels, inner;
};

template <typename T>
struct Vectors {
  const acc_t<T>*mean, *scale, *shift;
};

// As in channel_kernels.h: act' follows from `result`, which is act(u + residual), or from
// u + residual, or, without either, from u.
template <typename T>
struct GradSource {
  const T* residual = nullptr;
  const T* result = nullptr;
  T* du = nullptr;
};

// Reductions add to sums[c] and sums[C + c]. If contiguous, they read positions [begin, end) of the
// outer·inner positions of `channel`; if channels last, rows [begin, end) of all channels, and
// `channel` is not read. Elementwise loops compute values [begin, end) of a contiguous map, and
// rows [begin, end) of a channels-last one.
template <typename T>
struct ChannelLoops {
  // Σ (y − origin), Σ (y − origin)²
  void (*stats)(Shape, int64_t channel, int64_t begin, int64_t end, const T* y,
                const acc_t<T>* origin, double* sums);
  void (*grad_stats)(Shape, int64_t channel, int64_t begin, int64_t end, const T* dout, const T* y,
                     Vectors<T>, Activation, GradSource<T>, double* sums);
  void (*apply)(Shape, int64_t begin, int64_t end, T* out, const T* y, Vectors<T>, Activation,
                const T* residual);
  void (*multiply)(Shape, int64_t begin, int64_t end, T* out, const T* y, const acc_t<T>* scale);
  void (*grad_apply)(Shape, int64_t begin, int64_t end, T* out, const T* dout, const T* y,
                     Vectors<T>, const acc_t<T>* slope, const acc_t<T>* offset, Activation);
};

template <typename T>
struct ChannelLoopsPair {
  ChannelLoops<T> contiguous, channels_last;
};

template <Isa isa, typename T>
ChannelLoopsPair<T> channel_loops();

}  // namespace fusedconvbn::cpu
