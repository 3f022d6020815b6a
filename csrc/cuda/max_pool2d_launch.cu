// The kernels of max pooling. A thread processes a vector of channels at one position: of the
// result in forward, of the input in backward. In backward it reads every window that covers the
// position and sums the gradients of those whose maximum is there.
#include <cmath>

#include "launch.cuh"
#include "max_pool2d_launch.h"
#include "vector.cuh"

namespace fusedconvbn::cuda {
namespace {

constexpr unsigned threads = 256;  // of a block, at most

// The vector of a thread. A block processes neighbouring vectors of one row.
template <int V>
struct Item {
  int64_t sample, channel;
  int row, column;

  __device__ Item(int64_t rows, int64_t channels) {
    const int64_t item = int64_t(blockIdx.y) * blockDim.x + threadIdx.x, vectors = channels / V;
    sample = blockIdx.x / rows;
    row = int(blockIdx.x % rows);
    column = int(item / vectors);
    channel = item % vectors * V;
  }
};

template <typename T, int V>
__global__ void __launch_bounds__(threads, 4)
    pool(PoolMap map, PoolWindow window, const T* input, T* output, uint8_t* offsets) {
  using acc = acc_t<T>;
  const Item<V> item(map.pooled_height, map.channels);
  if (item.column >= map.pooled_width) return;
  acc best[V];
  int offset[V] = {};
#pragma unroll
  for (int j = 0; j < V; ++j) best[j] = -acc(INFINITY);
  bool first = true;
  for (int i = 0; i < window.kernel[0]; ++i) {
    const int row = item.row * window.stride[0] - window.padding[0] + i * window.dilation[0];
    if (row < 0 || row >= map.height) continue;
    for (int k = 0; k < window.kernel[1]; ++k) {
      const int column =
          item.column * window.stride[1] - window.padding[1] + k * window.dilation[1];
      if (column < 0 || column >= map.width) continue;
      const int64_t at =
          ((item.sample * map.height + row) * map.width + column) * map.channels + item.channel;
      const auto values = load<V>(input, at);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const acc value = values.get(j);
        if (first || value > best[j] || value != value) {  // the last NaN wins, as in PyTorch
          best[j] = value;
          offset[j] = i * window.kernel[1] + k;
        }
      }
      first = false;
    }
  }
  const int64_t at =
      ((item.sample * map.pooled_height + item.row) * map.pooled_width + item.column) *
          map.channels +
      item.channel;
  store<V>(output, at, best);
  Vector<uint8_t, V> bytes;
#pragma unroll
  for (int j = 0; j < V; ++j) bytes.values[j] = uint8_t(offset[j]);
  *reinterpret_cast<Vector<uint8_t, V>*>(offsets + at) = bytes;
}

// The windows that cover `position` in one dimension: `first` to `last`.
struct Windows {
  int first, last;

  __device__ Windows(const PoolWindow& window, int dim, int position, int64_t count) {
    const int shifted = position + window.padding[dim],
              reach = (window.kernel[dim] - 1) * window.dilation[dim];
    const int stride = window.stride[dim];
    first = shifted > reach ? (shifted - reach + stride - 1) / stride : 0;
    last = shifted / stride < count ? shifted / stride : int(count) - 1;
  }
};

template <typename T, int V>
__global__ void __launch_bounds__(threads, 4)
    pool_backward(PoolMap map, PoolWindow window, const T* dout, const uint8_t* offsets,
                  T* dinput) {
  using acc = acc_t<T>;
  const Item<V> item(map.height, map.channels);
  if (item.column >= map.width) return;
  acc sum[V] = {};
  const Windows down(window, 0, item.row, map.pooled_height),
      right(window, 1, item.column, map.pooled_width);
  for (int row = down.first; row <= down.last; ++row) {
    const int i = item.row + window.padding[0] - row * window.stride[0];
    if (i % window.dilation[0] != 0) continue;
    for (int column = right.first; column <= right.last; ++column) {
      const int k = item.column + window.padding[1] - column * window.stride[1];
      if (k % window.dilation[1] != 0) continue;
      const int here = i / window.dilation[0] * window.kernel[1] + k / window.dilation[1];
      const int64_t at =
          ((item.sample * map.pooled_height + row) * map.pooled_width + column) * map.channels +
          item.channel;
      const auto found = load<V>(offsets, at);
      const auto gradients = load<V>(dout, at);
#pragma unroll
      for (int j = 0; j < V; ++j) sum[j] += found.values[j] == here ? gradients.get(j) : acc(0);
    }
  }
  store<V>(dinput,
           ((item.sample * map.height + item.row) * map.width + item.column) * map.channels +
               item.channel,
           sum);
}

// Calls f(T{}, std::integral_constant<int, V>{}), where the channels are a multiple of V.
template <typename F>
void with_channel_vector(const PoolMap& map, std::initializer_list<const void*> pointers,
                         const void* offsets, const F& f) {
  with_dtype(map.dtype, [&]<typename T>(T) {
    constexpr int V = whole_vector<T>;
    if (map.channels % V == 0 && aligned<T>(pointers, V) && aligned<uint8_t>({offsets}, V))
      f(T{}, std::integral_constant<int, V>{});
    else
      f(T{}, std::integral_constant<int, 1>{});
  });
}

// The blocks for `rows` rows of `items` vectors.
struct Blocks {
  dim3 grid, block;

  Blocks(int64_t rows, int64_t items) {
    const int64_t warps = ceil_div(items, 32), x = warps * 32 < threads ? warps * 32 : threads;
    block = dim3(x);
    grid = dim3(rows, ceil_div(items, x));
  }
};

}  // namespace

void max_pool2d(const PoolMap& map, const PoolWindow& window, const void* input, void* output,
                uint8_t* offsets, cudaStream_t stream) {
  with_channel_vector(map, {input, output}, offsets, [&]<typename T>(T, auto V) {
    const Blocks blocks(map.samples * map.pooled_height, map.pooled_width * (map.channels / V));
    launch(pool<T, V()>, blocks.grid, blocks.block, stream, map, window,
           static_cast<const T*>(input), static_cast<T*>(output), offsets);
  });
}

void max_pool2d_backward(const PoolMap& map, const PoolWindow& window, const void* dout,
                         const uint8_t* offsets, void* dinput, cudaStream_t stream) {
  with_channel_vector(map, {dout, dinput}, offsets, [&]<typename T>(T, auto V) {
    const Blocks blocks(map.samples * map.height, map.width * (map.channels / V));
    launch(pool_backward<T, V()>, blocks.grid, blocks.block, stream, map, window,
           static_cast<const T*>(dout), offsets, static_cast<T*>(dinput));
  });
}

}  // namespace fusedconvbn::cuda
