// The operations of the four kernels on a vector of values: Apply and GradApply are elementwise,
// Stats and GradStats are reductions. channel_launch.cu walks the map.
//
// Act is the functor of a frequent activation, or `Activation` for any other. An `Activation` is
// looked up once per vector, with the same outcome in all threads. A kernel for each activation
// would make about a hundred kernels.
//
// load<V> reads the V values at `at` and run<V, W> processes them. They belong to W groups: one if
// contiguous, V if channels last. `most_groups` is the largest W whose vectors fit into 64
// registers. A thread loads `in_flight<V, W>` vectors before it processes the first of them.
// (`python tests/kernels/build_cuda.py resources` shows the registers that result.)
#pragma once

#include <algorithm>
#include <type_traits>

#include "channel_launch.h"
#include "vector.cuh"

namespace fusedconvbn::cuda {
namespace {

// How many vectors of V values, in W groups, a thread loads at a time from each of `maps` maps.
template <typename Act, typename T, int V, int W, int maps>
constexpr int vectors_in_flight() {
  if (std::is_same_v<Act, Activation> || (W == 1 && V == 1)) return 1;
  return std::clamp((W == 1 ? 32 : 64) / (V * int(sizeof(T)) * maps), 1, 4);
}

template <typename F>
__device__ __forceinline__ void with_functor(const Activation& activation, const F& f) {
  with_activation(activation, f);
}
template <typename Act, typename F>
__device__ __forceinline__ void with_functor(const Act& functor, const F& f) {
  f(functor);
}

// ------------------------------------------------------------------------------- vectors of groups

// The groups of neighbouring values: the channels from `channel` on, continuing with the first
// after the last one, of the sample whose first group is `group`.
struct Lanes {
  int64_t group, channel, channels;
};

template <typename acc, int W>
struct Values {
  acc of[W];
};

// The values of the W groups from `lanes` on; all `absent` if the vector is null.
template <int W, typename acc>
__device__ __forceinline__ Values<acc, W> read(const acc* vector, const Lanes& lanes, acc absent) {
  constexpr int width = W < int(vector_bytes / sizeof(acc)) ? W : int(vector_bytes / sizeof(acc));
  Values<acc, W> values;
  const acc* const from = vector + lanes.group;
  const bool aligned =
      reinterpret_cast<uintptr_t>(from + lanes.channel) % (width * sizeof(acc)) == 0;
  if (vector == nullptr) {
#pragma unroll
    for (int j = 0; j < W; ++j) values.of[j] = absent;
  } else if (aligned && lanes.channel + W <= lanes.channels) {
#pragma unroll
    for (int j = 0; j < W; j += width) {
      const auto some = load<width>(from, lanes.channel + j);
#pragma unroll
      for (int k = 0; k < width; ++k) values.of[j + k] = some.values[k];
    }
  } else {
    int64_t c = lanes.channel;
#pragma unroll
    for (int j = 0; j < W; ++j) {
      values.of[j] = from[c];
      c = c + 1 == lanes.channels ? 0 : c + 1;
    }
  }
  return values;
}

// u = (y − mean)·scale + shift
template <typename acc, int W>
struct Affine {
  acc mean[W], scale[W], shift[W];

  __device__ __forceinline__ Affine(const Vectors& v, const Lanes& lanes) {
    const auto* statistics = static_cast<const acc*>(v.statistics);
    const auto found = read<W>(statistics, lanes, acc(0));
    const auto var = read<W>(statistics ? statistics + v.groups : nullptr, lanes, acc(0));
    const auto gamma = read<W>(static_cast<const acc*>(v.weight), lanes, acc(1));
    const auto beta = read<W>(static_cast<const acc*>(v.bias), lanes, acc(0));
#pragma unroll
    for (int j = 0; j < W; ++j) {
      mean[j] = found.of[j];
      scale[j] = (statistics ? inverse_std(v.how, var.of[j]) : acc(1)) * gamma.of[j];
      shift[j] = beta.of[j];
    }
  }
};

// ------------------------------------------------------------------------------------- elementwise

template <typename T, typename Act, bool with_residual>
struct Apply {
  using type = T;
  using acc = acc_t<T>;
  template <int W>
  using Groups = Affine<acc, W>;
  template <int V, int W>
  static constexpr int in_flight = vectors_in_flight<Act, T, V, W, with_residual ? 2 : 1>();
  static constexpr int most_groups = 4;

  T* out;
  const T *y, *residual;
  Vectors vectors;
  Act activation;

  template <int V>
  struct Loaded {
    Vector<T, V> y, residual;
  };
  template <int W>
  __device__ Groups<W> groups(const Lanes& lanes) const {
    return {vectors, lanes};
  }
  template <int V>
  __device__ __forceinline__ Loaded<V> load(int64_t at) const {
    Loaded<V> loaded;
    loaded.y = cuda::load<V>(y, at);
    if constexpr (with_residual) loaded.residual = cuda::load<V>(residual, at);
    return loaded;
  }
  template <int V, int W>
  __device__ __forceinline__ void run(const Loaded<V>& loaded, int64_t at,
                                      const Groups<W>& g) const {
    acc result[V] = {};
    with_functor(activation, [&](auto act) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const int w = W == 1 ? 0 : j;
        acc u = (loaded.y.get(j) - g.mean[w]) * g.scale[w] + g.shift[w];
        if constexpr (with_residual) u += loaded.residual.get(j);
        result[j] = act.forward(u);
      }
    });
    store<V>(out, at, result);
  }
};

template <typename T, typename Act>
struct GradApply {
  using type = T;
  using acc = acc_t<T>;
  template <int W>
  struct Groups {
    Affine<acc, W> norm;
    acc slope[W], offset[W];
  };
  template <int V, int W>
  static constexpr int in_flight = vectors_in_flight<Act, T, V, W, 2>();
  static constexpr int most_groups = 4;

  T* out;
  const T *dout, *y;
  Vectors vectors;
  const acc* sums;  // S1 and S2; null if the statistics do not depend on y
  Act activation;

  template <int V>
  struct Loaded {
    Vector<T, V> y, dout;
  };
  template <int W>
  __device__ Groups<W> groups(const Lanes& lanes) const {
    Groups<W> g{{vectors, lanes}, {}, {}};
    if (sums == nullptr) return g;
    const auto* statistics = static_cast<const acc*>(vectors.statistics);
    const auto* counts = vectors.how.counted ? statistics + 2 * vectors.groups : nullptr;
    const auto var = read<W>(statistics + vectors.groups, lanes, acc(0)),
               count = read<W>(counts, lanes, acc(0));
    const auto S1 = read<W>(sums, lanes, acc(0)),
               S2 = read<W>(sums + vectors.groups, lanes, acc(0));
#pragma unroll
    for (int j = 0; j < W; ++j) {
      const acc r = inverse_std(vectors.how, var.of[j]);
      const Linear<acc> linear(vectors.how, var.of[j], g.norm.scale[j], r, count.of[j], S1.of[j],
                               S2.of[j]);
      g.slope[j] = linear.slope;
      g.offset[j] = linear.offset;
    }
    return g;
  }
  template <int V>
  __device__ __forceinline__ Loaded<V> load(int64_t at) const {
    return {cuda::load<V>(y, at), cuda::load<V>(dout, at)};
  }
  template <int V, int W>
  __device__ __forceinline__ void run(const Loaded<V>& loaded, int64_t at,
                                      const Groups<W>& g) const {
    acc result[V] = {};
    with_functor(activation, [&](auto act) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const int w = W == 1 ? 0 : j;
        const acc centred = loaded.y.get(j) - g.norm.mean[w];
        const acc du =
            act.backward(centred * g.norm.scale[w] + g.norm.shift[w], loaded.dout.get(j));
        // A slope of 0 must not turn an infinite value into NaN.
        const acc linear = g.slope[w] == acc(0) ? acc(0) : g.slope[w] * centred;
        result[j] = g.norm.scale[w] * du + (linear + g.offset[w]);
      }
    });
    store<V>(out, at, result);
  }
};

// -------------------------------------------------------------------------------------- reductions

// The mean and Σ (y − mean)² of `count` values. The mean is origin + mean, where the origin is a
// value near the mean. The two are stored apart because their sum rounds more when |mean| ≫ std.
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
  using type = T;
  using acc = acc_t<T>;
  template <typename other>
  using Partial = Moments<other>;
  template <int W>
  struct Groups {};
  template <int V, int W>
  static constexpr int in_flight = std::min(vectors_in_flight<void, T, V, W, 1>(), 3);
  static constexpr int most_groups = 8;

  const T* y;

  template <int V>
  using Loaded = Vector<T, V>;
  template <int W>
  __device__ Groups<W> groups(const Lanes&) const {
    return {};
  }
  template <int V>
  __device__ __forceinline__ Loaded<V> load(int64_t at) const {
    return cuda::load<V>(y, at);
  }

  // Sums are relative to the first value that the thread reads, so they are exact when |mean| ≫
  // std. If that value is an outlier, it affects only the few values of this thread.
  template <int W>
  struct Accumulator {
    acc origin[W] = {}, sum[W] = {}, squares[W] = {};
    int count = 0;  // values in each group

    __device__ Partial<acc> partial(int w) const {
      if (count == 0) return {0, 0, 0, 0};
      const acc shifted = sum[w] / acc(count), rest = squares[w] - sum[w] * shifted;
      return {acc(count), origin[w], shifted, rest < acc(0) ? acc(0) : rest};
    }
  };

  template <int V, int W>
  __device__ __forceinline__ void run(const Loaded<V>& loaded, int64_t, const Groups<W>&,
                                      Accumulator<W>& a) const {
    if (a.count == 0) {
#pragma unroll
      for (int w = 0; w < W; ++w) {
        const acc value = loaded.get(w);
        a.origin[w] = value - value == acc(0) ? value : acc(0);  // if finite
      }
    }
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const int w = W == 1 ? 0 : j;
      const acc d = loaded.get(j) - a.origin[w];
      a.sum[w] += d;
      a.squares[w] += d * d;
    }
    a.count += V / W;
  }
};

// The argument of act': u, u + residual, or neither, because it follows from the result. The latter
// two write du.
enum class At { u, sum, result };

template <typename T, typename Act, At where>
struct GradStats {
  using type = T;
  using acc = acc_t<T>;
  template <typename other>
  using Partial = Sums<other>;
  template <int W>
  using Groups = Affine<acc, W>;
  template <int V, int W>
  static constexpr int in_flight = vectors_in_flight<Act, T, V, W, where == At::u ? 2 : 3>();
  static constexpr int most_groups = 4;

  const T *dout, *y, *other;  // the residual or the result
  T* du;
  Vectors vectors;
  Act activation;

  template <int V>
  struct Loaded {
    Vector<T, V> y, dout, other;
  };
  template <int W>
  __device__ Groups<W> groups(const Lanes& lanes) const {
    return {vectors, lanes};
  }
  template <int V>
  __device__ __forceinline__ Loaded<V> load(int64_t at) const {
    Loaded<V> loaded;
    loaded.y = cuda::load<V>(y, at);
    loaded.dout = cuda::load<V>(dout, at);
    if constexpr (where != At::u) loaded.other = cuda::load<V>(other, at);
    return loaded;
  }

  template <int W>
  struct Accumulator {
    acc sum[W] = {}, dot[W] = {};
    __device__ Partial<acc> partial(int w) const { return {sum[w], dot[w]}; }
  };

  template <int V, int W>
  __device__ __forceinline__ void run(const Loaded<V>& loaded, int64_t at, const Groups<W>& g,
                                      Accumulator<W>& a) const {
    acc du_values[V] = {};
    with_functor(activation, [&](auto act) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const int w = W == 1 ? 0 : j;
        const acc centred = loaded.y.get(j) - g.mean[w];
        acc u;
        if constexpr (where == At::result)
          u = loaded.other.get(j);
        else
          u = centred * g.scale[w] + g.shift[w];
        if constexpr (where == At::sum) u += loaded.other.get(j);
        const acc gradient = act.backward(u, loaded.dout.get(j));
        du_values[j] = gradient;
        a.sum[w] += gradient;
        a.dot[w] += gradient * centred;
      }
    });
    if constexpr (where != At::u) store<V>(du, at, du_values);
  }
};

}  // namespace
}  // namespace fusedconvbn::cuda
