// Launches the four channel kernels. They walk a map like this:
//
//   contiguous      A plane (one sample, one channel) is read as the aligned vectors that cover it.
//                   A plane need not begin at a vector: vectors that extend beyond its ends are
//                   processed value by value.
//   channels last   A thread stays on one vector of channels and goes down the rows. If the number
//                   of channels is not a multiple of the vector, several rows are read as one.
//
// A reduction has two stages. In the first stage each block computes a partial result of every
// group that it reads, and the second stage merges them. The order of both depends only on the
// shape and the device. Reductions walk a map from its end and elementwise kernels from its start,
// because the cache still holds the part that the previous kernel touched last.
#include <algorithm>
#include <numeric>
#include <type_traits>

#include "channel_launch.h"
#include "channel_operations.cuh"
#include "launch.cuh"

namespace fusedconvbn::cuda {
namespace {

constexpr unsigned threads = 256;  // of a block, at most
// At least so many; a thread then has 64 registers, or 128 for double.
constexpr unsigned blocks_per_multiprocessor = 4;
template <typename acc>
constexpr unsigned resident = sizeof(acc) == 8 ? 2 : blocks_per_multiprocessor;
// The most blocks for contiguous maps; more blocks make the last wave shorter. For channels-last
// maps (RowPlan) no more blocks are used than run at a time, because each first reads the vectors
// of its channels.
constexpr int64_t most_reduction_blocks = 4736;  // fewer, because their partial results are merged
constexpr int64_t most_plane_blocks = 16384;
constexpr int64_t steps = 4;  // vectors that a thread should process before more blocks are used

// -------------------------------------------------------------------------------------- contiguous

// The aligned vectors that cover the planes: `width` for each plane, the most that one can touch.
template <int V>
struct Planes {
  int64_t inner, width, channels;

  __host__ Planes(int64_t inner, int64_t channels)
      : inner(inner), width(ceil_div(inner, V) + (inner % V != 0)), channels(channels) {}
};

// The position of a vector in the planes, or the distance from a thread's vector to its next one.
template <int V>
struct Position {
  int64_t plane, vector;

  __device__ Position(const Planes<V>& planes, int64_t index)
      : plane(index / planes.width), vector(index % planes.width) {}
  __device__ __forceinline__ void advance(const Planes<V>& planes, const Position& step) {
    plane += step.plane, vector += step.vector;
    if (vector >= planes.width) vector -= planes.width, ++plane;
  }
};

// The work of a thread at a position.
template <typename Op, int V>
struct Piece {
  int64_t plane, first;  // the indices of the plane and of the vector's first value
  bool whole;            // whether all values of the vector are in the plane
  typename Op::template Loaded<V> loaded;

  __device__ __forceinline__ void load(const Op& op, const Planes<V>& planes, int64_t number,
                                       int64_t vector) {
    plane = number;
    const int64_t start = plane * planes.inner;
    first = start / V * V + vector * V;
    whole = first >= start && first + V <= start + planes.inner;
    if (whole) loaded = op.template load<V>(first);
  }
  template <typename... Accumulator>
  __device__ __forceinline__ void run(const Op& op, const Planes<V>& planes,
                                      const typename Op::template Groups<1>& groups,
                                      Accumulator&... accumulator) const {
    if (whole) {
      op.template run<V, 1>(loaded, first, groups, accumulator...);
    } else {
      const int64_t start = plane * planes.inner, end = start + planes.inner;
      for (int64_t i = first < start ? start : first; i < first + V && i < end; ++i)
        op.template run<1, 1>(op.template load<1>(i), i, groups, accumulator...);
    }
  }
};

template <typename Op, int V>
__global__ void __launch_bounds__(threads, resident<typename Op::acc>)
    elementwise_contiguous(Op op, Planes<V> planes, int64_t count) {
  constexpr int batch = Op::template in_flight<V, 1>;
  const Position<V> step(planes, int64_t(gridDim.x) * threads);
  Position<V> position(planes, int64_t(blockIdx.x) * threads + threadIdx.x);
  while (position.plane < count) {
    Piece<Op, V> pieces[batch];
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      pieces[i].plane = position.plane;
      if (position.plane < count) pieces[i].load(op, planes, position.plane, position.vector);
      position.advance(planes, step);
    }
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      if (pieces[i].plane >= count) return;
      pieces[i].run(op, planes,
                    op.template groups<1>({0, pieces[i].plane % planes.channels, planes.channels}));
    }
  }
}

// Each block reduces `length` vectors of channel blockIdx.x. partial: (gridDim.y, C)
template <typename Op, int V>
__global__ void __launch_bounds__(threads, resident<typename Op::acc>)
    reduce_contiguous(Op op, Planes<V> planes, int64_t samples, int64_t length,
                      typename Op::template Partial<typename Op::acc>* partial) {
  using Partial = typename Op::template Partial<typename Op::acc>;
  constexpr int batch = Op::template in_flight<V, 1>;
  const int64_t c = blockIdx.x, total = samples * planes.width, part = gridDim.y - 1 - blockIdx.y;
  const int64_t first = part * length, last = first + length < total ? first + length : total;
  const Position<V> step(planes, threads);
  Position<V> position(planes, first + threadIdx.x);  // among the planes of the channel
  const auto groups = op.template groups<1>({0, c, planes.channels});
  typename Op::template Accumulator<1> accumulator;
  for (int64_t at = first + threadIdx.x; at < last; at += batch * threads) {
    Piece<Op, V> pieces[batch];
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      if (at + i * threads < last)
        pieces[i].load(op, planes, position.plane * planes.channels + c, position.vector);
      position.advance(planes, step);
    }
#pragma unroll
    for (int i = 0; i < batch; ++i)
      if (at + i * threads < last) pieces[i].run(op, planes, groups, accumulator);
  }

  __shared__ Partial shared[threads];
  const unsigned t = threadIdx.x;
  shared[t] = accumulator.partial(0);
  for (unsigned half = threads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (t < half) shared[t].merge(shared[t + half]);
  }
  if (t == 0) partial[part * planes.channels + c] = shared[0];
}

// ----------------------------------------------------------------------------------- channels last

// The rows of each sample. A row holds all channels `width / channels` times.
struct Rows {
  int64_t samples, rows, width, channels;
  int64_t columns;  // blocks per row

  int64_t folded() const { return width / channels; }
};

// The vector of a row that a thread stays on, in each sample.
template <int V>
struct Column {
  int64_t sample, first;

  __device__ explicit Column(const Rows& map)
      : sample(blockIdx.x / map.columns),
        first((blockIdx.x % map.columns * int64_t(blockDim.x) + threadIdx.x) * V) {}
  __device__ bool inside(const Rows& map) const { return first < map.width; }
  __device__ Lanes lanes(const Rows& map) const {
    return {sample * map.channels, first % map.channels, map.channels};
  }
};

// Runs `op` on every (gridDim.y·blockDim.y)-th row, from the first such row to the last or, if
// `backward`, from the last to the first.
template <int V, bool backward, typename Op, typename... Accumulator>
__device__ __forceinline__ void go_down(const Op& op, const Rows& map, const Column<V>& column,
                                        Accumulator&... accumulator) {
  constexpr int batch = Op::template in_flight<V, V>;
  const auto groups = op.template groups<V>(column.lanes(map));
  const int64_t step = int64_t(gridDim.y) * blockDim.y,
                jump = (backward ? -step : step) * map.width;
  int64_t row = int64_t(blockIdx.y) * blockDim.y + threadIdx.y;
  int64_t at =
      (column.sample * map.rows + (backward ? map.rows - 1 - row : row)) * map.width + column.first;
  for (; row < map.rows; row += batch * step, at += batch * jump) {
    typename Op::template Loaded<V> loaded[batch];
#pragma unroll
    for (int i = 0; i < batch; ++i)
      if (row + i * step < map.rows) loaded[i] = op.template load<V>(at + i * jump);
#pragma unroll
    for (int i = 0; i < batch; ++i)
      if (row + i * step < map.rows)
        op.template run<V, V>(loaded[i], at + i * jump, groups, accumulator...);
  }
}

template <typename Op, int V>
__global__ void __launch_bounds__(threads, resident<typename Op::acc>)
    elementwise_channels_last(Op op, Rows map) {
  const Column<V> column(map);
  if (column.inside(map)) go_down<V, false>(op, map, column);
}

// partial: (gridDim.y, samples, width)
template <typename Op, int V>
__global__ void __launch_bounds__(threads, resident<typename Op::acc>)
    reduce_channels_last(Op op, Rows map,
                         typename Op::template Partial<typename Op::acc>* partial) {
  using Partial = typename Op::template Partial<typename Op::acc>;
  const Column<V> column(map);
  typename Op::template Accumulator<V> accumulator;
  if (column.inside(map)) go_down<V, true>(op, map, column, accumulator);

  __shared__ Partial shared[threads * V];
  const unsigned t = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int j = 0; j < V; ++j) shared[j * threads + t] = accumulator.partial(j);
  for (unsigned left = blockDim.y; left > 1;) {
    const unsigned half = (left + 1) / 2;
    __syncthreads();
    if (threadIdx.y + half < left)
      for (int j = 0; j < V; ++j)
        shared[j * threads + t].merge(shared[j * threads + t + half * blockDim.x]);
    left = half;
  }
  if (threadIdx.y == 0 && column.inside(map))
    for (int j = 0; j < V; ++j)
      partial[(blockIdx.y * map.samples + column.sample) * map.width + column.first + j] =
          shared[j * threads + t];
}

// ------------------------------------------------------------------------------------ second stage

constexpr unsigned merged_groups = 8;  // per block

// Where the merged sums of each group go: result is (2, G); weight, which gets r·S2, and bias,
// which gets S1, may be null.
template <typename acc>
struct Sink {
  acc *result, *weight, *bias;
  Vectors vectors;
};

// partial: (parts / folded, samples, folded, channels)
template <template <typename> typename Partial, typename acc>
__global__ void __launch_bounds__(threads, 2)
    merge_partials(const Partial<acc>* partial, int64_t parts, int64_t folded, int64_t channels,
                   int64_t groups, Sink<acc> sink) {
  const int64_t g = int64_t(blockIdx.x) * merged_groups + threadIdx.x;
  const int64_t start = g / channels * folded * channels + g % channels;
  Partial<double> merged{};
  constexpr int batch = 4;  // loads in flight
  for (int64_t k = threadIdx.y; g < groups && k < parts; k += batch * blockDim.y) {
    Partial<acc> next[batch];
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      const int64_t part = k + i * int64_t(blockDim.y);
      next[i] = part < parts
                    ? partial[start + part / folded * folded * groups + part % folded * channels]
                    : Partial<acc>{};
    }
#pragma unroll
    for (int i = 0; i < batch; ++i) merged.merge(next[i]);
  }

  __shared__ Partial<double> shared[threads];
  const unsigned t = threadIdx.y * merged_groups + threadIdx.x;
  shared[t] = merged;
  for (unsigned half = threads / merged_groups / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.y < half) shared[t].merge(shared[t + half * merged_groups]);
  }
  if (threadIdx.y == 0 && g < groups) {
    const acc first = acc(shared[t].first()), second = acc(shared[t].second());
    sink.result[g] = first;
    sink.result[groups + g] = second;
    if (sink.bias) sink.bias[g] = first;
    if (sink.weight) {
      const auto* statistics = static_cast<const acc*>(sink.vectors.statistics);
      sink.weight[g] =
          statistics ? inverse_std(sink.vectors.how, statistics[groups + g]) * second : second;
    }
  }
}

// ------------------------------------------------------------------------------------------ launch

// How many rows are read as one for vectors of V values; 0 if the rows do not allow such vectors.
int64_t folded_rows(const Map& map, int64_t V) {
  const int64_t folded = V / std::gcd(V, map.channels);
  return map.outer % folded == 0 ? folded : 0;
}

// Calls f(std::integral_constant<int, V>) for the widest vector to which all pointers are aligned.
template <typename T, typename F>
void with_plane_vector(std::initializer_list<const void*> pointers, const F& f) {
  if (aligned<T>(pointers, whole_vector<T>))
    return f(std::integral_constant<int, whole_vector<T>>{});
  f(std::integral_constant<int, 1>{});
}

// The same with the widest vector, of at most V values, that the rows allow too.
template <typename T, int V, typename F>
void with_row_vector(const Map& map, std::initializer_list<const void*> pointers, const F& f) {
  if constexpr (V > 1) {
    if (!aligned<T>(pointers, V) || folded_rows(map, V) == 0)
      return with_row_vector<T, (V > 4 ? 4 : 1)>(map, pointers, f);
  }
  f(std::integral_constant<int, V>{});
}

template <typename Op>
constexpr int row_vector = std::min(whole_vector<typename Op::type>, Op::most_groups);

// The number of parts to cut the work into, if one part takes `blocks` blocks and each block would
// have `units` steps without cutting.
int64_t parts_for(int64_t most, int64_t blocks, int64_t units) {
  return std::clamp<int64_t>(std::min(most / blocks, units / steps), 1, most);
}

// How rows are cut. A block is as wide as a row or an equal share of it, and at most a warp.
struct RowPlan {
  Rows map;
  dim3 block;
  int64_t parts;

  RowPlan(const Map& m, int64_t V) {
    const int64_t folded = folded_rows(m, V), vectors = folded * m.channels / V,
                  columns = ceil_div(vectors, 32);
    map = {m.samples, m.outer / folded, folded * m.channels, m.channels, columns};
    const unsigned x = ceil_div(vectors, columns);
    block = {x, threads / x, 1};
    const int64_t most = blocks_per_multiprocessor * m.multiprocessors;
    parts = parts_for(most, columns * m.samples, map.rows / block.y);
  }
  dim3 grid() const { return dim3(map.columns * map.samples, parts); }
};

template <int V>
int64_t plane_parts(const Map& map) {
  const Planes<V> planes(map.inner, map.channels);
  return parts_for(most_reduction_blocks, map.channels, map.outer * planes.width / threads);
}

template <typename Op>
void reduce(const Map& map, const Op& op, std::initializer_list<const void*> pointers,
            void* scratch, const Sink<typename Op::acc>& sink, cudaStream_t stream) {
  using acc = typename Op::acc;
  using Partial = typename Op::template Partial<acc>;
  auto* partial = static_cast<Partial*>(scratch);
  int64_t parts = 1, folded = 1;
  if (map.channels_last) {
    with_row_vector<typename Op::type, row_vector<Op>>(map, pointers, [&](auto V) {
      const RowPlan plan(map, V);
      folded = plan.map.folded();
      parts = plan.parts * folded;
      launch(reduce_channels_last<Op, V()>, plan.grid(), plan.block, stream, op, plan.map, partial);
    });
  } else {
    with_plane_vector<typename Op::type>(pointers, [&](auto V) {
      const Planes<V()> planes(map.inner, map.channels);
      parts = plane_parts<V()>(map);
      const int64_t length = ceil_div(map.outer * planes.width, parts);
      launch(reduce_contiguous<Op, V()>, dim3(map.channels, parts), dim3(threads), stream, op,
             planes, map.outer, length, partial);
    });
  }
  const int64_t groups = map.samples * map.channels;
  launch(merge_partials<Op::template Partial, acc>, dim3(ceil_div(groups, merged_groups)),
         dim3(merged_groups, threads / merged_groups), stream, static_cast<const Partial*>(partial),
         parts, folded, map.channels, groups, sink);
}

template <typename Op>
void elementwise(const Map& map, const Op& op, std::initializer_list<const void*> pointers,
                 cudaStream_t stream) {
  if (map.channels_last) {
    with_row_vector<typename Op::type, row_vector<Op>>(map, pointers, [&](auto V) {
      const RowPlan plan(map, V);
      launch(elementwise_channels_last<Op, V()>, plan.grid(), plan.block, stream, op, plan.map);
    });
  } else {
    with_plane_vector<typename Op::type>(pointers, [&](auto V) {
      const Planes<V()> planes(map.inner, map.channels);
      const int64_t count = map.outer * map.channels;
      const int64_t blocks = parts_for(most_plane_blocks, 1, count * planes.width / threads);
      launch(elementwise_contiguous<Op, V()>, dim3(blocks), dim3(threads), stream, op, planes,
             count);
    });
  }
}

// Calls f with the Act for `activation` (channel_operations.cuh).
template <typename F>
void with_act(const Activation& activation, const F& f) {
  switch (activation.kind) {
    case ActivationKind::none:
      return f(Identity{});
    case ActivationKind::relu:
      return f(Relu{});
    default:
      return f(activation);
  }
}

template <bool condition>
using Bool = std::bool_constant<condition>;

template <At where>
using Where = std::integral_constant<At, where>;

// Calls f with the At for `source`.
template <typename Act, typename F>
void with_slope_at(const GradSource& source, const F& f) {
  if constexpr (!std::is_same_v<Act, Identity>) {
    if constexpr (std::is_same_v<Act, Relu>) {
      if (source.result) return f(Where<At::result>{});
    }
    if (source.residual) return f(Where<At::sum>{});
  }
  f(Where<At::u>{});
}

}  // namespace

int64_t scratch_bytes(const Map& map) {
  const int64_t acc = map.dtype == Dtype::f64 ? sizeof(double) : sizeof(float);
  // The pointers are not known here: take the vector size that needs the most scratch memory.
  int64_t parts = 1;
  with_dtype(map.dtype, [&]<typename T>(T) {
    if (!map.channels_last) {
      parts = std::max(plane_parts<whole_vector<T>>(map), plane_parts<1>(map));
      return;
    }
    for (const int64_t V : {whole_vector<T>, 4, 1}) {
      if (V > whole_vector<T> || folded_rows(map, V) == 0) continue;
      const RowPlan plan(map, V);
      parts = std::max(parts, plan.parts * plan.map.folded());
    }
  });
  return parts * map.samples * map.channels * 4 * acc;
}

void channel_stats(const Map& map, const void* y, void* scratch, void* result,
                   cudaStream_t stream) {
  with_dtype(map.dtype, [&]<typename T>(T) {
    const Sink<acc_t<T>> sink{static_cast<acc_t<T>*>(result), nullptr, nullptr, {}};
    reduce(map, Stats<T>{static_cast<const T*>(y)}, {y}, scratch, sink, stream);
  });
}

void channel_grad_stats(const Map& map, const void* dout, const void* y, Vectors vectors,
                        Activation activation, GradSource source, void* scratch, void* result,
                        void* dweight, void* dbias, cudaStream_t stream) {
  with_dtype(map.dtype, [&]<typename T>(T) {
    using acc = acc_t<T>;
    const Sink<acc> sink{static_cast<acc*>(result), static_cast<acc*>(dweight),
                         static_cast<acc*>(dbias), vectors};
    with_act(activation, [&]<typename Act>(Act act) {
      with_slope_at<Act>(source, [&](auto where) {
        const void* other = where() == At::u     ? nullptr
                            : where() == At::sum ? source.residual
                                                 : source.result;
        const GradStats<T, Act, where()> op{static_cast<const T*>(dout),
                                            static_cast<const T*>(y),
                                            static_cast<const T*>(other),
                                            static_cast<T*>(source.du),
                                            vectors,
                                            act};
        reduce(map, op, {dout, y, other, source.du}, scratch, sink, stream);
      });
    });
  });
}

void channel_apply_(const Map& map, void* out, const void* y, Vectors vectors,
                    Activation activation, const void* residual, cudaStream_t stream) {
  with_dtype(map.dtype, [&]<typename T>(T) {
    with_act(activation, [&]<typename Act>(Act act) {
      const auto run = [&](auto with_residual) {
        const Apply<T, Act, with_residual()> op{static_cast<T*>(out), static_cast<const T*>(y),
                                                static_cast<const T*>(residual), vectors, act};
        elementwise(map, op, {out, y, residual}, stream);
      };
      residual ? run(Bool<true>{}) : run(Bool<false>{});
    });
  });
}

void channel_grad_apply_(const Map& map, void* out, const void* dout, const void* y,
                         Vectors vectors, const void* sums, Activation activation,
                         cudaStream_t stream) {
  with_dtype(map.dtype, [&]<typename T>(T) {
    with_act(activation, [&]<typename Act>(Act act) {
      const GradApply<T, Act> op{static_cast<T*>(out),
                                 static_cast<const T*>(dout),
                                 static_cast<const T*>(y),
                                 vectors,
                                 static_cast<const acc_t<T>*>(sums),
                                 act};
      elementwise(map, op, {out, dout, y}, stream);
    });
  });
}

}  // namespace fusedconvbn::cuda
