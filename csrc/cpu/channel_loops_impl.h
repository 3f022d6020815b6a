// Included by channel_loops_{baseline,avx2,avx512}.cpp, each with its own target and
// FUSEDCONVBN_ISA. Plain loops over contiguous memory; the compiler makes the vector code.
//
// Both layouts run the same row loops: a channels-last row has one value per channel, and a
// contiguous plane is cut into rows of `lanes` values of one channel, whose sums are added up at
// the end.

#define FUSEDCONVBN_CONCAT_(a, b) a##b
#define FUSEDCONVBN_CONCAT(a, b) FUSEDCONVBN_CONCAT_(a, b)

namespace fusedconvbn::cpu {
namespace {

constexpr int64_t lanes = 32;

// v in the type of a map. c10's own rounding to bfloat16 branches on NaN, and no loop with it
// becomes a vector loop.
template <typename T>
FUSEDCONVBN_INLINE T rounded(acc_t<T> v) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const auto bits = std::bit_cast<uint32_t>(v);
    const uint32_t to_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return T(static_cast<uint16_t>(v != v ? 0x7fc0u : to_even), T::from_bits());
  } else {
    return T(v);
  }
}

// A reduction adds up its terms for a block of this many rows in float, and the blocks in double.
// Maps with few values a channel, where rounding does not average out and time does not count, are
// added up in double throughout.
constexpr int64_t block_rows = 64, block_channels = 512, few_values = 256;

// Calls f(Sum{}) with the type in which the terms of a block are added up.
template <typename T, typename F>
FUSEDCONVBN_INLINE void with_sum(Shape shape, const F& f) {
  if (shape.outer * shape.inner < few_values)
    f(double{});
  else
    f(acc_t<T>{});
}

// sums1[c], sums2[c] += Σ_rows term(row·stride + c, c)
template <typename Term, typename Sum>
FUSEDCONVBN_INLINE void add_rows(int64_t rows, int64_t stride, int64_t width, const Term& term,
                                 Sum* __restrict sums1, Sum* __restrict sums2) {
  int64_t row = 0;
  for (; row + 2 <= rows; row += 2) {  // for each read and write of the sums
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) {
      Sum add1 = 0, add2 = 0;
      term(row * stride + c, c, add1, add2);
      term((row + 1) * stride + c, c, add1, add2);
      sums1[c] += add1;
      sums2[c] += add2;
    }
  }
  if (row < rows) {
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) {
      Sum add1 = 0, add2 = 0;
      term(row * stride + c, c, add1, add2);
      sums1[c] += add1;
      sums2[c] += add2;
    }
  }
}

// f(offset, length) for the runs of memory that positions [begin, end) of a channel consist of
template <typename F>
FUSEDCONVBN_INLINE void for_runs(Shape shape, int64_t channel, int64_t begin, int64_t end,
                                 const F& f) {
  while (begin < end) {
    const int64_t plane = begin / shape.inner, at = begin % shape.inner;
    const int64_t length = end - begin < shape.inner - at ? end - begin : shape.inner - at;
    f((plane * shape.channels + channel) * shape.inner + at, length);
    begin += length;
  }
}

template <typename T>
struct Lanes {  // one channel's value in every lane
  explicit Lanes(T value) {
    for (auto& v : values) v = value;
  }
  T values[lanes];
};

// Sums of one channel of a contiguous map; term_at(offset) gives the term of the run that starts
// there.
template <typename Sum, typename TermAt>
FUSEDCONVBN_INLINE void add_channel(Shape shape, int64_t channel, int64_t begin, int64_t end,
                                    const TermAt& term_at, double* sums) {
  for_runs(shape, channel, begin, end, [&](int64_t offset, int64_t length) {
    for (const int64_t last = offset + length; offset < last;) {
      const int64_t left = last - offset, most = block_rows * lanes,
                    count = left < most ? left : most;
      const int64_t whole = count / lanes * lanes;
      const auto term = term_at(offset);
      Sum own1[lanes] = {}, own2[lanes] = {};
      add_rows(count / lanes, lanes, lanes, term, own1, own2);
      if (count > whole)
        add_rows(
            1, lanes, count - whole,
            [&](int64_t i, int64_t c, Sum& add1, Sum& add2) { term(whole + i, c, add1, add2); },
            own1, own2);
      double sum1 = 0, sum2 = 0;
      for (int64_t l = 0; l < lanes; ++l) {
        sum1 += own1[l];
        sum2 += own2[l];
      }
      term.add(0, count, sum1, sum2, sums[channel], sums[shape.channels + channel]);
      offset += count;
    }
  });
}

// Sums of all channels of a channels-last map; term_at(row, c) gives the term of the block that
// starts there.
template <typename Sum, typename TermAt>
FUSEDCONVBN_INLINE void add_channels(Shape shape, int64_t begin, int64_t end, const TermAt& term_at,
                                     double* sums) {
  const int64_t C = shape.channels;
  for (int64_t row = begin; row < end; row += block_rows) {
    const int64_t rows = end - row < block_rows ? end - row : block_rows;
    for (int64_t first = 0; first < C; first += block_channels) {
      const int64_t width = C - first < block_channels ? C - first : block_channels;
      const auto term = term_at(row, first, width);
      Sum own1[block_channels], own2[block_channels];
      for (int64_t c = 0; c < width; ++c) own1[c] = own2[c] = 0;
      add_rows(rows, C, width, term, own1, own2);
      for (int64_t c = 0; c < width; ++c)
        term.add(c, rows, own1[c], own2[c], sums[first + c], sums[C + first + c]);
    }
  }
}

// Σ d and Σ d² of a block are those of the distances to a value of the block, `near`, and are moved
// to the origin of the channel then: a value far out spoils no sums but those of its block.
template <typename T, typename Sum, int64_t width>
struct StatsTerm {
  const T* y;
  const acc_t<T>* origin;
  acc_t<T> near[width];

  // near[c] = y[c·step]
  FUSEDCONVBN_INLINE StatsTerm(const T* y, const acc_t<T>* origin, int64_t used, int64_t step)
      : y(y), origin(origin) {
    for (int64_t c = 0; c < used; ++c) {
      const acc_t<T> value = acc_t<T>(y[c * step]);
      near[c] = value - value == 0 ? value : origin[c * step];  // a finite one
    }
  }

  FUSEDCONVBN_INLINE void operator()(int64_t i, int64_t c, Sum& sum, Sum& squares) const {
    const Sum d = Sum(acc_t<T>(y[i])) - Sum(near[c]);
    sum += d;
    squares += d * d;
  }
  // Σ (d + δ) = Σ d + n·δ      Σ (d + δ)² = Σ d² + 2δ·Σ d + n·δ²
  FUSEDCONVBN_INLINE void add(int64_t c, int64_t n, double own_sum, double own_squares, double& sum,
                              double& squares) const {
    const double shift = double(near[c]) - double(origin[c]);
    sum += own_sum + n * shift;
    squares += own_squares + shift * (2 * own_sum + n * shift);
  }
};

// Where act' is taken: at u, at u + residual, or where act(u + residual) says. All but `u` write
// du.
enum class At { u, u_writing, sum, result };

template <typename T, typename Act, At at, typename Sum>
struct GradTerm {
  const T *dout, *y;
  Vectors<T> v;
  Act act;
  const T* other;  // the residual or the result
  T* du;
  FUSEDCONVBN_INLINE void operator()(int64_t i, int64_t c, Sum& sum, Sum& dot) const {
    const acc_t<T> centred = acc_t<T>(y[i]) - v.mean[c];
    acc_t<T> u;
    if constexpr (at == At::result)
      u = acc_t<T>(other[i]);
    else
      u = centred * v.scale[c] + v.shift[c];
    if constexpr (at == At::sum) u += acc_t<T>(other[i]);
    const acc_t<T> gradient = act.backward(u, acc_t<T>(dout[i]));
    if constexpr (at != At::u) du[i] = rounded<T>(gradient);
    sum += Sum(gradient);
    dot += Sum(gradient) * Sum(centred);
  }
  FUSEDCONVBN_INLINE void add(int64_t, int64_t, double own_sum, double own_dot, double& sum,
                              double& dot) const {
    sum += own_sum;
    dot += own_dot;
  }
};

// Calls f(at, other) with what `joined` has for the functor.
template <typename T, typename Act, typename F>
FUSEDCONVBN_INLINE void with_slope_at(const Joined<T>& joined, Act, const F& f) {
  constexpr bool none = std::is_same_v<Act, Identity>, relu = std::is_same_v<Act, Relu>;
  if (joined.du == nullptr) return f(std::integral_constant<At, At::u>{}, joined.residual);
  if constexpr (relu) {
    if (joined.result) return f(std::integral_constant<At, At::result>{}, joined.result);
  }
  if constexpr (!none) {
    if (joined.residual) return f(std::integral_constant<At, At::sum>{}, joined.residual);
    f(std::integral_constant<At, At::u_writing>{}, joined.residual);
  }
}

template <typename T>
FUSEDCONVBN_INLINE T* advance(T* from, int64_t by) {
  return from ? from + by : from;
}

template <typename T, typename Act>
FUSEDCONVBN_INLINE T grad_value(Act act, T dout, T y, acc_t<T> mean, acc_t<T> scale, acc_t<T> shift,
                                acc_t<T> slope, acc_t<T> offset) {
  const acc_t<T> centred = acc_t<T>(y) - mean;
  const acc_t<T> du = act.backward(centred * scale + shift, acc_t<T>(dout));
  const acc_t<T> linear =
      slope == 0 ? acc_t<T>(0) : slope * centred;  // an infinite value is no NaN then
  return rounded<T>(scale * du + (linear + offset));
}

// -------------------------------------------------------------------------------------------
// contiguous

template <typename T>
void stats_contiguous(Shape shape, int64_t channel, int64_t begin, int64_t end, const T* y,
                      const acc_t<T>* origin, double* sums) {
  with_sum<T>(shape, [&]<typename Sum>(Sum) {
    const auto term_at = [&](int64_t offset) {
      return StatsTerm<T, Sum, lanes>(y + offset, origin + channel, lanes, 0);
    };
    add_channel<Sum>(shape, channel, begin, end, term_at, sums);
  });
}

template <typename T>
void grad_stats_contiguous(Shape shape, int64_t channel, int64_t begin, int64_t end, const T* dout,
                           const T* y, Vectors<T> v, Activation activation, Joined<T> joined,
                           double* sums) {
  const Lanes<acc_t<T>> mean(v.mean[channel]), scale(v.scale[channel]), shift(v.shift[channel]);
  const Vectors<T> spread{mean.values, scale.values, shift.values};
  with_activation(activation, [&](auto act) {
    with_slope_at(joined, act, [&](auto at, const T* other) {
      with_sum<T>(shape, [&]<typename Sum>(Sum) {
        const auto term_at = [&](int64_t offset) {
          return GradTerm<T, decltype(act), at(), Sum>{dout + offset,
                                                       y + offset,
                                                       spread,
                                                       act,
                                                       advance(other, offset),
                                                       advance(joined.du, offset)};
        };
        add_channel<Sum>(shape, channel, begin, end, term_at, sums);
      });
    });
  });
}

// f(offset, length, channel) for the pieces of planes that values [begin, end) consist of
template <typename F>
FUSEDCONVBN_INLINE void for_planes(Shape shape, int64_t begin, int64_t end, const F& f) {
  while (begin < end) {
    const int64_t plane = begin / shape.inner, left = (plane + 1) * shape.inner - begin;
    const int64_t length = end - begin < left ? end - begin : left;
    f(begin, length, plane % shape.channels);
    begin += length;
  }
}

template <typename T>
void apply_contiguous(Shape shape, int64_t begin, int64_t end, T* out, const T* y, Vectors<T> v,
                      Activation activation, const T* residual) {
  with_activation(activation, [&](auto act) {
    for_planes(shape, begin, end, [&](int64_t offset, int64_t length, int64_t c) {
      const auto mean = v.mean[c], scale = v.scale[c], shift = v.shift[c];
      if (residual) {
#pragma omp simd
        for (int64_t i = offset; i < offset + length; ++i)
          out[i] = rounded<T>(
              act.forward((acc_t<T>(y[i]) - mean) * scale + shift + acc_t<T>(residual[i])));
      } else {
#pragma omp simd
        for (int64_t i = offset; i < offset + length; ++i)
          out[i] = rounded<T>(act.forward((acc_t<T>(y[i]) - mean) * scale + shift));
      }
    });
  });
}

template <typename T>
void multiply_contiguous(Shape shape, int64_t begin, int64_t end, T* out, const T* y,
                         const acc_t<T>* scale) {
  for_planes(shape, begin, end, [&](int64_t offset, int64_t length, int64_t c) {
    const auto by = scale[c];
#pragma omp simd
    for (int64_t i = offset; i < offset + length; ++i) out[i] = rounded<T>(acc_t<T>(y[i]) * by);
  });
}

template <typename T>
void grad_apply_contiguous(Shape shape, int64_t begin, int64_t end, T* out, const T* dout,
                           const T* y, Vectors<T> v, const acc_t<T>* slope, const acc_t<T>* offset,
                           Activation activation) {
  with_activation(activation, [&](auto act) {
    for_planes(shape, begin, end, [&](int64_t first, int64_t length, int64_t c) {
      const auto mean = v.mean[c], scale = v.scale[c], shift = v.shift[c];
      const auto slope_c = slope[c], offset_c = offset[c];
#pragma omp simd
      for (int64_t i = first; i < first + length; ++i)
        out[i] = grad_value<T>(act, dout[i], y[i], mean, scale, shift, slope_c, offset_c);
    });
  });
}

// ---------------------------------------------------------------------------------------- channels
// last

template <typename T>
void stats_channels_last(Shape shape, int64_t, int64_t begin, int64_t end, const T* y,
                         const acc_t<T>* origin, double* sums) {
  with_sum<T>(shape, [&]<typename Sum>(Sum) {
    const auto term_at = [&](int64_t row, int64_t c, int64_t width) {
      return StatsTerm<T, Sum, block_channels>(y + row * shape.channels + c, origin + c, width, 1);
    };
    add_channels<Sum>(shape, begin, end, term_at, sums);
  });
}

template <typename T>
void grad_stats_channels_last(Shape shape, int64_t, int64_t begin, int64_t end, const T* dout,
                              const T* y, Vectors<T> v, Activation activation, Joined<T> joined,
                              double* sums) {
  with_activation(activation, [&](auto act) {
    with_slope_at(joined, act, [&](auto at, const T* other) {
      with_sum<T>(shape, [&]<typename Sum>(Sum) {
        const auto term_at = [&](int64_t row, int64_t c, int64_t) {
          const int64_t offset = row * shape.channels + c;
          return GradTerm<T, decltype(act), at(), Sum>{dout + offset,
                                                       y + offset,
                                                       {v.mean + c, v.scale + c, v.shift + c},
                                                       act,
                                                       advance(other, offset),
                                                       advance(joined.du, offset)};
        };
        add_channels<Sum>(shape, begin, end, term_at, sums);
      });
    });
  });
}

template <typename T>
void apply_channels_last(Shape shape, int64_t begin, int64_t end, T* out, const T* y, Vectors<T> v,
                         Activation activation, const T* residual) {
  const int64_t C = shape.channels;
  with_activation(activation, [&](auto act) {
    for (int64_t row = begin * C; row < end * C; row += C) {
      if (residual) {
#pragma omp simd
        for (int64_t c = 0; c < C; ++c)
          out[row + c] = rounded<T>(act.forward((acc_t<T>(y[row + c]) - v.mean[c]) * v.scale[c] +
                                                v.shift[c] + acc_t<T>(residual[row + c])));
      } else {
#pragma omp simd
        for (int64_t c = 0; c < C; ++c)
          out[row + c] =
              rounded<T>(act.forward((acc_t<T>(y[row + c]) - v.mean[c]) * v.scale[c] + v.shift[c]));
      }
    }
  });
}

template <typename T>
void multiply_channels_last(Shape shape, int64_t begin, int64_t end, T* out, const T* y,
                            const acc_t<T>* scale) {
  const int64_t C = shape.channels;
  for (int64_t row = begin * C; row < end * C; row += C) {
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) out[row + c] = rounded<T>(acc_t<T>(y[row + c]) * scale[c]);
  }
}

template <typename T>
void grad_apply_channels_last(Shape shape, int64_t begin, int64_t end, T* out, const T* dout,
                              const T* y, Vectors<T> v, const acc_t<T>* slope,
                              const acc_t<T>* offset, Activation activation) {
  const int64_t C = shape.channels;
  with_activation(activation, [&](auto act) {
    for (int64_t row = begin * C; row < end * C; row += C) {
#pragma omp simd
      for (int64_t c = 0; c < C; ++c)
        out[row + c] = grad_value<T>(act, dout[row + c], y[row + c], v.mean[c], v.scale[c],
                                     v.shift[c], slope[c], offset[c]);
    }
  });
}

}  // namespace

template <typename T>
ChannelLoopsPair<T> FUSEDCONVBN_CONCAT(channel_loops_, FUSEDCONVBN_ISA)() {
  return {{stats_contiguous<T>, grad_stats_contiguous<T>, apply_contiguous<T>,
           multiply_contiguous<T>, grad_apply_contiguous<T>},
          {stats_channels_last<T>, grad_stats_channels_last<T>, apply_channels_last<T>,
           multiply_channels_last<T>, grad_apply_channels_last<T>}};
}

template ChannelLoopsPair<double> FUSEDCONVBN_CONCAT(channel_loops_, FUSEDCONVBN_ISA)();
template ChannelLoopsPair<float> FUSEDCONVBN_CONCAT(channel_loops_, FUSEDCONVBN_ISA)();
template ChannelLoopsPair<c10::BFloat16> FUSEDCONVBN_CONCAT(channel_loops_, FUSEDCONVBN_ISA)();
template ChannelLoopsPair<c10::Half> FUSEDCONVBN_CONCAT(channel_loops_, FUSEDCONVBN_ISA)();

}  // namespace fusedconvbn::cpu
