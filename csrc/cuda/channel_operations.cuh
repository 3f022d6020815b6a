// What the four kernels do with a vector of values: Apply, GradApply, and, adding up, Stats and GradStats. How they
// walk a map is in channel_launch.cu.
//
// Act is the functor of an activation or, for all but the most frequent ones, `Activation`: then it is chosen once for
// a vector, alike in all threads. Kernels for each activation would be a hundred.
//
// run<V, stride> does the V values at `at`; value j belongs to channels[j · stride]. (stride 0: all to one channel)
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "channel_launch.h"

namespace fusedconvbn::cuda {
namespace {

template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T, int V>
struct alignas(sizeof(T) * V) Vector {
  T values[V];
};

template <int V, typename T>
__device__ __forceinline__ Vector<T, V> load(const T* from, int64_t at) {
  return *reinterpret_cast<const Vector<T, V>*>(from + at);
}

template <typename F>
__device__ __forceinline__ void with_functor(const Activation& activation, const F& f) {
  with_activation(activation, f);
}
template <typename Act, typename F>
__device__ __forceinline__ void with_functor(const Act& functor, const F& f) {
  f(functor);
}

template <typename acc>
struct ChannelVectors {  // those of one channel
  acc mean, scale, shift;
};

template <typename acc>
__device__ __forceinline__ ChannelVectors<acc> at(const Vectors& v, int64_t c) {
  return {static_cast<const acc*>(v.mean)[c], static_cast<const acc*>(v.scale)[c], static_cast<const acc*>(v.shift)[c]};
}

template <typename T, typename Act>
struct Apply {
  using acc = acc_t<T>;
  using Channel = ChannelVectors<acc>;
  T* out;
  const T *y, *residual;  // residual may be null
  Vectors vectors;
  Act activation;

  __device__ Channel channel(int64_t c) const { return at<acc>(vectors, c); }
  template <int V, int stride>
  __device__ __forceinline__ void run(int64_t at, const Channel* channels) const {
    auto v = load<V>(y, at);
    Vector<T, V> r{};
    if (residual) r = load<V>(residual, at);
    with_functor(activation, [&](auto act) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const auto& c = channels[j * stride];
        acc u = (acc(v.values[j]) - c.mean) * c.scale + c.shift;
        if (residual) u += acc(r.values[j]);
        v.values[j] = T(act.forward(u));
      }
    });
    *reinterpret_cast<Vector<T, V>*>(out + at) = v;
  }
};

template <typename T, typename Act>
struct GradApply {
  using acc = acc_t<T>;
  struct Channel {
    ChannelVectors<acc> norm;
    acc slope, offset;
  };
  T* out;
  const T *dout, *y;
  Vectors vectors;
  const acc *slope, *offset;
  Act activation;

  __device__ Channel channel(int64_t c) const { return {at<acc>(vectors, c), slope[c], offset[c]}; }
  template <int V, int stride>
  __device__ __forceinline__ void run(int64_t at, const Channel* channels) const {
    const auto v = load<V>(y, at);
    auto d = load<V>(dout, at);
    with_functor(activation, [&](auto act) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const auto& c = channels[j * stride];
        const acc centred = acc(v.values[j]) - c.norm.mean;
        const acc du = act.backward(centred * c.norm.scale + c.norm.shift, acc(d.values[j]));
        const acc linear = c.slope == acc(0) ? acc(0) : c.slope * centred;  // an infinite value is no NaN then
        d.values[j] = T(c.norm.scale * du + (linear + c.offset));
      }
    });
    *reinterpret_cast<Vector<T, V>*>(out + at) = d;
  }
};

// The mean, which is origin + mean, and Σ (y − mean)² of `count` values. The origin is a value near the mean, kept
// apart because their sum rounds more when |mean| ≫ std.
template <typename acc>
struct Moments {
  acc count, origin, mean, squares;

  template <typename other>
  __device__ void merge(const Moments<other>& b) {
    if (b.count == other(0)) return;
    if (count == acc(0)) {
      *this = {acc(b.count), acc(b.origin), acc(b.mean), acc(b.squares)};
      return;
    }
    const acc total = count + acc(b.count), share = acc(b.count) / total;
    const acc delta = (acc(b.origin) - origin) + (acc(b.mean) - mean);
    mean += delta * share;
    squares += acc(b.squares) + delta * delta * (count * share);
    count = total;
  }
  __device__ acc first() const { return origin + mean; }
  __device__ acc second() const { return squares / count; }  // the variance
};

template <typename acc>
struct Sums {
  acc sum, dot;

  template <typename other>
  __device__ void merge(const Sums<other>& b) {
    sum += acc(b.sum);
    dot += acc(b.dot);
  }
  __device__ acc first() const { return sum; }
  __device__ acc second() const { return dot; }
};

template <typename T>
struct Stats {
  using acc = acc_t<T>;
  template <typename other>
  using Partial = Moments<other>;
  struct Channel {};
  const T* y;

  __device__ Channel channel(int64_t) const { return {}; }

  // Sums are taken from the first value that the thread sees: exact when |mean| ≫ std, and the values of one thread are
  // too few for one that stands far out to spoil them.
  struct Accumulator {
    acc origin = 0, sum = 0, squares = 0;
    int count = 0;

    __device__ __forceinline__ void start(acc value) {
      origin = value - value == acc(0) ? value : acc(0);
    }  // if finite
    __device__ __forceinline__ void add(acc value) {
      const acc d = value - origin;
      sum += d;
      squares += d * d;
      ++count;
    }
    __device__ Partial<acc> partial() const {
      if (count == 0) return {0, 0, 0, 0};
      const acc shifted = sum / acc(count), rest = squares - sum * shifted;
      return {acc(count), origin, shifted, rest < acc(0) ? acc(0) : rest};
    }
  };

  template <int V, int stride>
  __device__ __forceinline__ void run(int64_t at, const Channel*, Accumulator* accumulators) const {
    const auto v = load<V>(y, at);
    if (accumulators[0].count == 0) {
#pragma unroll
      for (int j = 0; j <= (V - 1) * stride; ++j) accumulators[j].start(acc(v.values[j]));
    }
#pragma unroll
    for (int j = 0; j < V; ++j) accumulators[j * stride].add(acc(v.values[j]));
  }
};

template <typename T, typename Act>
struct GradStats {
  using acc = acc_t<T>;
  template <typename other>
  using Partial = Sums<other>;
  using Channel = ChannelVectors<acc>;
  const T *dout, *y, *residual, *result;  // act' at result, or else at u [+ residual]; each of the two may be null
  T* du;                                  // null without a residual
  Vectors vectors;
  Act activation;

  __device__ Channel channel(int64_t c) const { return at<acc>(vectors, c); }

  struct Accumulator {
    acc sum = 0, dot = 0;
    __device__ Partial<acc> partial() const { return {sum, dot}; }
  };

  template <int V, int stride>
  __device__ __forceinline__ void run(int64_t at, const Channel* channels, Accumulator* accumulators) const {
    const auto v = load<V>(y, at);
    auto d = load<V>(dout, at);
    Vector<T, V> r{};
    if (result)
      r = load<V>(result, at);
    else if (residual)
      r = load<V>(residual, at);
    with_functor(activation, [&](auto act) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const auto& c = channels[j * stride];
        auto& sums = accumulators[j * stride];
        const acc centred = acc(v.values[j]) - c.mean;
        acc u = centred * c.scale + c.shift;
        if (result)
          u = acc(r.values[j]);
        else if (residual)
          u += acc(r.values[j]);
        const acc gradient = act.backward(u, acc(d.values[j]));
        d.values[j] = T(gradient);
        sums.sum += gradient;
        sums.dot += gradient * centred;
      }
    });
    if (du) *reinterpret_cast<Vector<T, V>*>(du + at) = d;
  }
};

}  // namespace
}  // namespace fusedconvbn::cuda
