// How the four kernels walk a map:
//
//   contiguous      A plane (one sample, one channel) is read as the aligned vectors that cover it. Those that
//                   stick out at its ends, as planes need not begin at a vector, are done value by value.
//   channels last   A thread stays on one vector of channels and goes down the rows. Where the channels are no whole
//                   number of vectors, a vector is one value.
//
// A reduction has two stages. In the first a block makes one partial result of each channel it saw, in the second they
// are merged. Both add in an order that depends on the shape alone.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <type_traits>

#include "channel_launch.h"
#include "channel_operations.cuh"
#include "launch.cuh"

namespace fusedconvbn::cuda {
namespace {

constexpr unsigned threads = 256;                  // of a block
constexpr unsigned blocks_per_multiprocessor = 4;  // at least: 64 registers a thread
// Blocks at most. Channels last, each of them first reads the vectors of its channels: no more than run at a time, 4 on
// each of an H100's 132 multiprocessors. Contiguous, more of them make the last wave smaller.
constexpr int64_t most_row_blocks = 528;
constexpr int64_t most_reduction_blocks = 4736;  // the parts of which are merged
constexpr int64_t most_plane_blocks = 16384;
constexpr int64_t vector_bytes = 16;
constexpr int64_t steps = 4;  // vectors a thread should do, before more blocks are used

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---------------------------------------------------------------------------------------------- contiguous

// The aligned vectors that cover planes, `width` places for each: as many as a plane can touch.
template <int V>
struct Planes {
  int64_t inner, width;

  __host__ explicit Planes(int64_t inner) : inner(inner), width(ceil_div(inner, V) + (inner % V != 0)) {}

  // f(vector offset) for vector `v` of the plane at `start` if it lies inside, else g(offset) for each value of it that
  // does.
  template <typename F, typename G>
  __device__ __forceinline__ void visit(int64_t start, int64_t v, const F& f, const G& g) const {
    const int64_t first = start / V * V + v * V, end = start + inner;
    if (first >= start && first + V <= end) {
      f(first);
    } else {
      for (int64_t i = first < start ? start : first; i < first + V && i < end; ++i) g(i);
    }
  }
};

template <typename Op, int V>
__global__ void __launch_bounds__(threads, blocks_per_multiprocessor)
    elementwise_contiguous(Op op, Planes<V> planes, int64_t count, int64_t channels) {
  const int64_t stride = int64_t(gridDim.x) * threads, index = int64_t(blockIdx.x) * threads + threadIdx.x;
  const int64_t plane_step = stride / planes.width, vector_step = stride % planes.width;
  const int64_t channel_step = plane_step % channels;
  int64_t plane = index / planes.width, vector = index % planes.width, c = plane % channels;
  while (plane < count) {
    const auto channel = op.channel(c);
    planes.visit(
        plane * planes.inner, vector, [&](int64_t at) { op.template run<V, 0>(at, &channel); },
        [&](int64_t at) { op.template run<1, 0>(at, &channel); });
    plane += plane_step, vector += vector_step, c += channel_step;
    if (vector >= planes.width) vector -= planes.width, ++plane, ++c;
    if (c >= channels) c -= channels;
  }
}

// Block (c, k) reduces the vectors [k·length, (k + 1)·length) of channel c. partial: (gridDim.y, C)
template <typename Op, int V>
__global__ void __launch_bounds__(threads, blocks_per_multiprocessor)
    reduce_contiguous(Op op, Planes<V> planes, int64_t samples, int64_t channels, int64_t length,
                      typename Op::template Partial<typename Op::acc>* partial) {
  using Partial = typename Op::template Partial<typename Op::acc>;
  const int64_t c = blockIdx.x, total = samples * planes.width, first = blockIdx.y * length;
  const int64_t last = first + length < total ? first + length : total;
  const int64_t sample_step = threads / planes.width, vector_step = threads % planes.width;
  int64_t sample = (first + threadIdx.x) / planes.width, vector = (first + threadIdx.x) % planes.width;
  const auto channel = op.channel(c);
  typename Op::Accumulator accumulator;
  for (int64_t i = first + threadIdx.x; i < last; i += threads) {
    planes.visit((sample * channels + c) * planes.inner, vector,
                 [&](int64_t at) { op.template run<V, 0>(at, &channel, &accumulator); },
                 [&](int64_t at) { op.template run<1, 0>(at, &channel, &accumulator); });
    sample += sample_step, vector += vector_step;
    if (vector >= planes.width) vector -= planes.width, ++sample;
  }

  __shared__ Partial shared[threads];
  const unsigned t = threadIdx.x;
  shared[t] = accumulator.partial();
  for (unsigned half = threads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (t < half) shared[t].merge(shared[t + half]);
  }
  if (t == 0) partial[blockIdx.y * channels + c] = shared[0];
}

// ------------------------------------------------------------------------------------------- channels last

// Block (x, y): blockDim.x vectors of channels by blockDim.y rows at a time, from row blockIdx.y·blockDim.y on.
template <typename Op, int V>
__global__ void __launch_bounds__(threads, blocks_per_multiprocessor)
    elementwise_channels_last(Op op, int64_t rows, int64_t channels) {
  const int64_t c = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V;
  if (c >= channels) return;
  typename Op::Channel channel[V];
#pragma unroll
  for (int j = 0; j < V; ++j) channel[j] = op.channel(c + j);
  for (int64_t row = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; row < rows; row += int64_t(gridDim.y) * blockDim.y)
    op.template run<V, 1>(row * channels + c, channel);
}

// Block (x, k) reduces rows [k·length, (k + 1)·length) of its channels. partial: (gridDim.y, C)
template <typename Op, int V>
__global__ void __launch_bounds__(threads, blocks_per_multiprocessor)
    reduce_channels_last(Op op, int64_t rows, int64_t channels, int64_t length,
                         typename Op::template Partial<typename Op::acc>* partial) {
  using Partial = typename Op::template Partial<typename Op::acc>;
  const int64_t c = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V;
  typename Op::Accumulator accumulator[V];
  if (c < channels) {
    typename Op::Channel channel[V];
#pragma unroll
    for (int j = 0; j < V; ++j) channel[j] = op.channel(c + j);
    const int64_t first = blockIdx.y * length, last = first + length < rows ? first + length : rows;
    for (int64_t row = first + threadIdx.y; row < last; row += blockDim.y)
      op.template run<V, 1>(row * channels + c, channel, accumulator);
  }

  __shared__ Partial shared[threads * V];
  const unsigned t = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int j = 0; j < V; ++j) shared[j * threads + t] = accumulator[j].partial();
  for (unsigned half = blockDim.y / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.y < half)
      for (int j = 0; j < V; ++j) shared[j * threads + t].merge(shared[j * threads + t + half * blockDim.x]);
  }
  if (threadIdx.y == 0 && c < channels)
    for (int j = 0; j < V; ++j) partial[blockIdx.y * channels + c + j] = shared[j * threads + t];
}

// -------------------------------------------------------------------------------------------- second stage

constexpr unsigned merged_channels = 8;  // of a block

// result: (2, C), from partial: (parts, C)
template <template <typename> typename Partial, typename acc>
__global__ void __launch_bounds__(threads, blocks_per_multiprocessor)
    merge_partials(const Partial<acc>* partial, int64_t parts, int64_t channels, acc* result) {
  const int64_t c = int64_t(blockIdx.x) * merged_channels + threadIdx.x;
  Partial<double> merged{};
  constexpr int batch = 4;  // loads under way at a time
  for (int64_t k = threadIdx.y; c < channels && k < parts; k += batch * blockDim.y) {
    Partial<acc> next[batch];
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      const int64_t part = k + i * int64_t(blockDim.y);
      next[i] = part < parts ? partial[part * channels + c] : Partial<acc>{};
    }
#pragma unroll
    for (int i = 0; i < batch; ++i) merged.merge(next[i]);
  }

  __shared__ Partial<double> shared[threads];
  const unsigned t = threadIdx.y * merged_channels + threadIdx.x;
  shared[t] = merged;
  for (unsigned half = threads / merged_channels / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.y < half) shared[t].merge(shared[t + half * merged_channels]);
  }
  if (threadIdx.y == 0 && c < channels) {
    result[c] = acc(shared[t].first());
    result[channels + c] = acc(shared[t].second());
  }
}

// ---------------------------------------------------------------------------------------- C-sized arithmetic

template <typename F>
__global__ void __launch_bounds__(threads) for_channels(F f) {
  const int64_t c = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (c < f.channels) f(c);
}

// -------------------------------------------------------------------------------------------------- launch

template <typename T>
constexpr int whole_vector = vector_bytes / sizeof(T);

// f(std::integral_constant<int, V>) with the vector that every pointer and, channels last, every row allows.
template <typename T, typename F>
void with_vector(const Map& map, std::initializer_list<const void*> pointers, const F& f) {
  const bool aligned = std::all_of(pointers.begin(), pointers.end(),
                                   [](const void* p) { return reinterpret_cast<uintptr_t>(p) % vector_bytes == 0; });
  if (aligned && (!map.channels_last || map.channels % whole_vector<T> == 0))
    f(std::integral_constant<int, whole_vector<T>>{});
  else
    f(std::integral_constant<int, 1>{});
}

// A block of `threads`, as wide as the vectors of a row, at most a warp.
dim3 row_block(int64_t vectors) {
  unsigned x = 1;
  while (x < 32 && x < vectors) x *= 2;
  return {x, threads / x, 1};
}

// How many parts the work is cut into, when one part has `blocks` blocks and each block `units` steps to do.
int64_t parts_for(int64_t most, int64_t blocks, int64_t units) {
  return std::clamp<int64_t>(std::min(most / blocks, units / steps), 1, most);
}

template <typename Op>
void reduce(const Map& map, const Op& op, std::initializer_list<const void*> pointers, void* scratch, void* result,
            cudaStream_t stream) {
  using acc = typename Op::acc;
  using Partial = typename Op::template Partial<acc>;
  auto* partial = static_cast<Partial*>(scratch);
  int64_t parts = 1;
  with_vector<std::remove_const_t<std::remove_pointer_t<decltype(op.y)>>>(map, pointers, [&](auto width) {
    constexpr int V = width();
    if (map.channels_last) {
      const int64_t vectors = map.channels / V;
      const dim3 block = row_block(vectors);
      const int64_t columns = ceil_div(vectors, block.x);
      parts = parts_for(most_row_blocks, columns, map.outer / block.y);
      const int64_t length = ceil_div(map.outer, parts);
      launch(reduce_channels_last<Op, V>, dim3(columns, parts), block, stream, op, map.outer, map.channels, length,
             partial);
    } else {
      const Planes<V> planes(map.inner);
      parts = parts_for(most_reduction_blocks, map.channels, map.outer * planes.width / threads);
      const int64_t length = ceil_div(map.outer * planes.width, parts);
      launch(reduce_contiguous<Op, V>, dim3(map.channels, parts), dim3(threads), stream, op, planes, map.outer,
             map.channels, length, partial);
    }
  });
  launch(merge_partials<Op::template Partial, acc>, dim3(ceil_div(map.channels, merged_channels)),
         dim3(merged_channels, threads / merged_channels), stream, static_cast<const Partial*>(partial), parts,
         map.channels, static_cast<acc*>(result));
}

template <typename Op>
void elementwise(const Map& map, const Op& op, std::initializer_list<const void*> pointers, cudaStream_t stream) {
  with_vector<std::remove_pointer_t<decltype(op.out)>>(map, pointers, [&](auto width) {
    constexpr int V = width();
    if (map.channels_last) {
      const int64_t vectors = map.channels / V;
      const dim3 block = row_block(vectors);
      const int64_t columns = ceil_div(vectors, block.x);
      const int64_t parts = parts_for(most_row_blocks, columns, map.outer / block.y);
      launch(elementwise_channels_last<Op, V>, dim3(columns, parts), block, stream, op, map.outer, map.channels);
    } else {
      const Planes<V> planes(map.inner);
      const int64_t count = map.outer * map.channels;
      const int64_t blocks = parts_for(most_plane_blocks, 1, count * planes.width / threads);
      launch(elementwise_contiguous<Op, V>, dim3(blocks), dim3(threads), stream, op, planes, count, map.channels);
    }
  });
}

template <typename F>
void with_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::f64:
      return f(double{});
    case Dtype::f32:
      return f(float{});
    case Dtype::bf16:
      return f(c10::BFloat16{});
    case Dtype::f16:
      return f(c10::Half{});
  }
}

// f with what the kernels take for `activation` (channel_operations.cuh)
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

}  // namespace

int64_t scratch_bytes(const Map& map) {
  const int64_t acc = map.dtype == Dtype::f64 ? sizeof(double) : sizeof(float);
  // At most parts_for's parts, with the widest blocks: 32 vectors of channels, or one channel.
  const int64_t parts = map.channels_last ? most_row_blocks / ceil_div(map.channels, 32 * whole_vector<c10::Half>)
                                          : most_reduction_blocks / map.channels;
  return std::max<int64_t>(parts, 1) * map.channels * 4 * acc;
}

void channel_stats(const Map& map, const void* y, void* scratch, void* result, cudaStream_t stream) {
  with_dtype(map.dtype,
             [&]<typename T>(T) { reduce(map, Stats<T>{static_cast<const T*>(y)}, {y}, scratch, result, stream); });
}

void channel_grad_stats(const Map& map, const void* dout, const void* y, Vectors vectors, Activation activation,
                        Joined joined, void* scratch, void* result, cudaStream_t stream) {
  with_dtype(map.dtype, [&]<typename T>(T) {
    with_act(activation, [&]<typename Act>(Act act) {
      const GradStats<T, Act> op{static_cast<const T*>(dout),
                                 static_cast<const T*>(y),
                                 static_cast<const T*>(joined.residual),
                                 static_cast<const T*>(joined.result),
                                 static_cast<T*>(joined.du),
                                 vectors,
                                 act};
      reduce(map, op, {dout, y, joined.residual, joined.result, joined.du}, scratch, result, stream);
    });
  });
}

void channel_apply_(const Map& map, void* out, const void* y, Vectors vectors, Activation activation,
                    const void* residual, cudaStream_t stream) {
  with_dtype(map.dtype, [&]<typename T>(T) {
    with_act(activation, [&]<typename Act>(Act act) {
      const Apply<T, Act> op{static_cast<T*>(out), static_cast<const T*>(y), static_cast<const T*>(residual), vectors,
                             act};
      elementwise(map, op, {out, y, residual}, stream);
    });
  });
}

void channel_grad_apply_(const Map& map, void* out, const void* dout, const void* y, Vectors vectors, const void* slope,
                         const void* offset, Activation activation, cudaStream_t stream) {
  with_dtype(map.dtype, [&]<typename T>(T) {
    using acc = acc_t<T>;
    with_act(activation, [&]<typename Act>(Act act) {
      const GradApply<T, Act> op{static_cast<T*>(out),
                                 static_cast<const T*>(dout),
                                 static_cast<const T*>(y),
                                 vectors,
                                 static_cast<const acc*>(slope),
                                 static_cast<const acc*>(offset),
                                 act};
      elementwise(map, op, {out, dout, y}, stream);
    });
  });
}

void affine_vectors(Dtype dtype, int64_t channels, const void* var, const void* weight, const void* bias,
                    Normalisation how, void* result, cudaStream_t stream) {
  const auto run = [&]<typename acc>(acc) {
    const AffineVectors<acc> f{static_cast<const acc*>(var),
                               static_cast<const acc*>(weight),
                               static_cast<const acc*>(bias),
                               static_cast<acc*>(result),
                               channels,
                               how};
    launch(for_channels<AffineVectors<acc>>, dim3(ceil_div(channels, threads)), dim3(threads), stream, f);
  };
  dtype == Dtype::f64 ? run(double{}) : run(float{});
}

void grad_vectors(Dtype dtype, int64_t channels, const void* sums, const void* total, const void* var,
                  const void* vectors, const void* counts, Normalisation how, void* result, cudaStream_t stream) {
  const auto run = [&]<typename acc>(acc) {
    const GradVectors<acc> f{static_cast<const acc*>(sums),
                             static_cast<const acc*>(total),
                             static_cast<const acc*>(var),
                             static_cast<const acc*>(vectors),
                             static_cast<const acc*>(counts),
                             static_cast<acc*>(result),
                             channels,
                             how};
    launch(for_channels<GradVectors<acc>>, dim3(ceil_div(channels, threads)), dim3(threads), stream, f);
  };
  dtype == Dtype::f64 ? run(double{}) : run(float{});
}

}  // namespace fusedconvbn::cuda
