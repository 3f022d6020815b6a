// The loops of depthwise convolutions. depthwise_loops_{avx2,avx512}.cpp include this file, each
// with its own target, FUSEDCONVBN_ISA and FUSEDCONVBN_VECTOR.
#include "vector.h"

namespace fusedconvbn::cpu {
namespace {

// Calls f(c) for each vector of channels; the last vector may overlap the one before it.
template <typename F>
inline void for_vectors(int64_t channels, const F& f) {
  for (int64_t c = 0; c < channels; c += lanes) f(c + lanes <= channels ? c : channels - lanes);
}

// out[x] = Σ in[x·stride − pad + j]·weight[j] over a kernel, for `count` neighbouring results of a
// row, which share their inputs.
template <int64_t kernel, int64_t stride, int64_t count>
inline void convolve(const DepthwiseShape& s, int64_t sample, int64_t y, int64_t x, const float* in,
                     const float* weight, float* out) {
  constexpr int64_t columns = (count - 1) * stride + kernel;
  const Window<kernel, columns> window(in + sample * s.height * s.width * s.channels, s.height,
                                       s.width, s.channels, y * stride - s.pad_height,
                                       x * stride - s.pad_width);
  float* const to = out + ((sample * s.out_height + y) * s.out_width + x) * s.channels;
  for_vectors(s.channels, [&](int64_t c) {
    Vector sums[count] = {};
#pragma GCC unroll 5
    for (int64_t i = 0; i < kernel; ++i) {
      Vector w[kernel];
#pragma GCC unroll 5
      for (int64_t j = 0; j < kernel; ++j) w[j] = load(weight + (i * kernel + j) * s.channels + c);
#pragma GCC unroll 16
      for (int64_t j = 0; j < columns; ++j) {
        const Vector value = load(window.at[i][j] + c);
#pragma GCC unroll 4
        for (int64_t k = 0; k < count; ++k)
          if (j >= k * stride && j < k * stride + kernel) sums[k] += value * w[j - k * stride];
      }
    }
#pragma GCC unroll 4
    for (int64_t k = 0; k < count; ++k) store(to + k * s.channels + c, sums[k]);
  });
}

template <int64_t kernel, int64_t stride>
void forward(const DepthwiseShape& s, int64_t begin, int64_t end, const float* in,
             const float* weight, float* out) {
  constexpr int64_t count = 4;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t sample = row / s.out_height, y = row % s.out_height;
    int64_t x = 0;
    for (; x + count <= s.out_width; x += count)
      convolve<kernel, stride, count>(s, sample, y, x, in, weight, out);
    for (; x < s.out_width; ++x) convolve<kernel, stride, 1>(s, sample, y, x, in, weight, out);
  }
}

// din[y, x] = Σ dout[(y + pad − i)/stride, (x + pad − j)/stride]·weight[i, j] over the (i, j) for
// which both divisions leave no remainder.
template <int64_t kernel>
void grad_input(const DepthwiseShape& s, int64_t begin, int64_t end, const float* dout,
                const float* weight, float* din) {
  const int64_t C = s.channels;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t sample = row / s.height, y = row % s.height;
    for (int64_t x = 0; x < s.width; ++x) {
      const float *values[kernel * kernel], *weights[kernel * kernel];
      int64_t taps = 0;
      for (int64_t i = (y + s.pad_height) % s.stride; i < kernel; i += s.stride)
        for (int64_t j = (x + s.pad_width) % s.stride; j < kernel; j += s.stride) {
          const int64_t oy = (y + s.pad_height - i) / s.stride,
                        ox = (x + s.pad_width - j) / s.stride;
          if (y + s.pad_height < i || x + s.pad_width < j || oy >= s.out_height ||
              ox >= s.out_width)
            continue;
          values[taps] = dout + ((sample * s.out_height + oy) * s.out_width + ox) * C;
          weights[taps++] = weight + (i * kernel + j) * C;
        }
      float* const to = din + (row * s.width + x) * C;
      for_vectors(C, [&](int64_t c) {
        Vector sum = {};
        for (int64_t t = 0; t < taps; ++t) sum += load(values[t] + c) * load(weights[t] + c);
        store(to + c, sum);
      });
    }
  }
}

// Sums over a few rows of a sample at a time, with the sums of one vector of channels in registers.
template <int64_t kernel, int64_t stride>
void grad_weight(const DepthwiseShape& s, int64_t begin, int64_t end, const float* dout,
                 const float* in, double* sums) {
  constexpr int64_t most = 512;  // products that are summed in float
  const int64_t C = s.channels;
  // The columns [first, last) of dout whose windows lie inside the map.
  const int64_t first = std::min((s.pad_width + stride - 1) / stride, s.out_width);
  const int64_t last =
      std::clamp((s.width + s.pad_width - kernel) / stride + 1, first, s.out_width);
  for (int64_t row = begin; row < end;) {
    const int64_t sample = row / s.out_height, next = std::min(end, (sample + 1) * s.out_height);
    const int64_t rows = std::min(next - row, std::max<int64_t>(1, most / s.out_width));
    int64_t done = 0;
    for_vectors(C, [&](int64_t c) {
      Vector own[kernel][kernel] = {};
      for (int64_t r = row; r < row + rows; ++r) {
        const int64_t top = r % s.out_height * stride - s.pad_height;
        const int64_t i_begin = std::max<int64_t>(0, -top),
                      i_end = std::min(kernel, s.height - top);
        const float* const d = dout + r * s.out_width * C + c;
        const float* const map = in + (sample * s.height + top) * s.width * C + c;
        const auto add = [&](int64_t x, auto inside) {
          const Vector value = load(d + x * C);
          const int64_t left = x * stride - s.pad_width;
#pragma GCC unroll 5
          for (int64_t i = 0; i < kernel; ++i) {
            if (i < i_begin || i >= i_end) continue;
#pragma GCC unroll 5
            for (int64_t j = 0; j < kernel; ++j)
              if (inside() || (left + j >= 0 && left + j < s.width))
                own[i][j] += value * load(map + (i * s.width + left + j) * C);
          }
        };
        for (int64_t x = 0; x < first; ++x) add(x, std::false_type{});
        for (int64_t x = first; x < last; ++x) add(x, std::true_type{});
        for (int64_t x = last; x < s.out_width; ++x) add(x, std::false_type{});
      }
      for (int64_t q = 0; q < kernel * kernel; ++q)
        for (int64_t l = done - c; l < lanes; ++l)
          sums[q * C + c + l] += own[q / kernel][q % kernel][l];
      done = c + lanes;
    });
    row += rows;
  }
}

template <int64_t kernel, int64_t stride>
constexpr DepthwiseLoops loops_of = {forward<kernel, stride>, grad_input<kernel>,
                                     grad_weight<kernel, stride>};

}  // namespace

template <>
DepthwiseLoops depthwise_loops<FUSEDCONVBN_ISA>(int64_t kernel, int64_t stride) {
  if (kernel == 3) return stride == 1 ? loops_of<3, 1> : loops_of<3, 2>;
  return stride == 1 ? loops_of<5, 1> : loops_of<5, 2>;
}

}  // namespace fusedconvbn::cpu
