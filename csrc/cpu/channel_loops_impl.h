// Included by channel_loops_{baseline,avx2,avx512}.cpp, each with its own target and FUSEDCONVBN_ISA.
// Plain loops over contiguous memory; the compiler makes the vector code.
//
// Both layouts run the same row loops: a channels-last row has one value per channel, and a contiguous plane is cut
// into rows of `lanes` values of one channel, whose sums are added up at the end.

#define FUSEDCONVBN_CONCAT_(a, b) a##b
#define FUSEDCONVBN_CONCAT(a, b) FUSEDCONVBN_CONCAT_(a, b)

namespace fusedconvbn::cpu {
namespace {

constexpr int64_t lanes = 32;

// v in the type of a map. c10's own rounding to bfloat16 branches on NaN, and no loop with it becomes a vector loop.
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

// sums1[c], sums2[c] += Σ_rows term(row·stride + c, c)
template <typename Term>
FUSEDCONVBN_INLINE void add_rows(int64_t rows, int64_t stride, int64_t width, const Term& term,
                                 double* __restrict sums1, double* __restrict sums2) {
  constexpr int64_t unroll = 4;  // rows for each read and write of the sums
  int64_t row = 0;
  for (; row + unroll <= rows; row += unroll) {
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) {
      double add1 = 0, add2 = 0;
#pragma GCC unroll 4
      for (int64_t u = 0; u < unroll; ++u) term((row + u) * stride + c, c, add1, add2);
      sums1[c] += add1;
      sums2[c] += add2;
    }
  }
  for (; row < rows; ++row) {
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) {
      double add1 = 0, add2 = 0;
      term(row * stride + c, c, add1, add2);
      sums1[c] += add1;
      sums2[c] += add2;
    }
  }
}

// f(offset, length) for the runs of memory that positions [begin, end) of a channel consist of
template <typename F>
FUSEDCONVBN_INLINE void for_runs(Shape shape, int64_t channel, int64_t begin, int64_t end, const F& f) {
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

// Sums of one channel of a contiguous map; term_at(offset) gives the term of the run that starts there.
template <typename TermAt>
FUSEDCONVBN_INLINE void add_channel(Shape shape, int64_t channel, int64_t begin, int64_t end, const TermAt& term_at,
                                    double* sums) {
  double sums1[lanes] = {}, sums2[lanes] = {};
  for_runs(shape, channel, begin, end, [&](int64_t offset, int64_t length) {
    const int64_t rows = length / lanes, whole = rows * lanes;
    add_rows(rows, lanes, lanes, term_at(offset), sums1, sums2);
    add_rows(1, lanes, length - whole, term_at(offset + whole), sums1, sums2);
  });
  for (int64_t l = 0; l < lanes; ++l) {
    sums[channel] += sums1[l];
    sums[shape.channels + channel] += sums2[l];
  }
}

template <typename T>
struct StatsTerm {
  const T* y;
  const acc_t<T>* origin;
  FUSEDCONVBN_INLINE void operator()(int64_t i, int64_t c, double& sum, double& squares) const {
    const double d = double(acc_t<T>(y[i])) - double(origin[c]);
    sum += d;
    squares += d * d;
  }
};

// Where act' is taken: at u, at u + residual, or where act(u + residual) says. The latter two also write du.
enum class At { u, sum, result };

template <typename T, typename Act, At at>
struct GradTerm {
  const T *dout, *y;
  Vectors<T> v;
  Act act;
  const T* other;  // the residual or the result
  T* du;
  FUSEDCONVBN_INLINE void operator()(int64_t i, int64_t c, double& sum, double& dot) const {
    const acc_t<T> centred = acc_t<T>(y[i]) - v.mean[c];
    acc_t<T> u;
    if constexpr (at == At::result)
      u = acc_t<T>(other[i]);
    else
      u = centred * v.scale[c] + v.shift[c];
    if constexpr (at == At::sum) u += acc_t<T>(other[i]);
    const acc_t<T> gradient = act.backward(u, acc_t<T>(dout[i]));
    if constexpr (at != At::u) du[i] = rounded<T>(gradient);
    sum += gradient;
    dot += double(gradient) * double(centred);
  }
};

// Calls f(at, other) with what `joined` has for the functor.
template <typename T, typename Act, typename F>
FUSEDCONVBN_INLINE void with_slope_at(const Joined<T>& joined, Act, const F& f) {
  if (joined.du == nullptr) return f(std::integral_constant<At, At::u>{}, static_cast<const T*>(nullptr));
  if constexpr (std::is_same_v<Act, Relu>) {
    if (joined.result) return f(std::integral_constant<At, At::result>{}, joined.result);
  }
  if constexpr (!std::is_same_v<Act, Identity>) f(std::integral_constant<At, At::sum>{}, joined.residual);
}

template <typename T>
FUSEDCONVBN_INLINE T* advance(T* from, int64_t by) {
  return from ? from + by : from;
}

template <typename T, typename Act>
FUSEDCONVBN_INLINE T grad_value(Act act, T dout, T y, acc_t<T> mean, acc_t<T> scale, acc_t<T> shift, acc_t<T> slope,
                                acc_t<T> offset) {
  const acc_t<T> centred = acc_t<T>(y) - mean;
  const acc_t<T> du = act.backward(centred * scale + shift, acc_t<T>(dout));
  const acc_t<T> linear = slope == 0 ? acc_t<T>(0) : slope * centred;  // an infinite value is no NaN then
  return rounded<T>(scale * du + (linear + offset));
}

// ------------------------------------------------------------------------------------------- contiguous

template <typename T>
void stats_contiguous(Shape shape, int64_t channel, int64_t begin, int64_t end, const T* y, const acc_t<T>* origin,
                      double* sums) {
  const Lanes<acc_t<T>> origins(origin[channel]);
  add_channel(
      shape, channel, begin, end, [&](int64_t offset) { return StatsTerm<T>{y + offset, origins.values}; }, sums);
}

template <typename T>
void grad_stats_contiguous(Shape shape, int64_t channel, int64_t begin, int64_t end, const T* dout, const T* y,
                           Vectors<T> v, Activation activation, Joined<T> joined, double* sums) {
  const Lanes<acc_t<T>> mean(v.mean[channel]), scale(v.scale[channel]), shift(v.shift[channel]);
  const Vectors<T> spread{mean.values, scale.values, shift.values};
  with_activation(activation, [&](auto act) {
    with_slope_at(joined, act, [&](auto at, const T* other) {
      add_channel(
          shape, channel, begin, end,
          [&](int64_t offset) {
            return GradTerm<T, decltype(act), at()>{
                dout + offset, y + offset, spread, act, advance(other, offset), advance(joined.du, offset)};
          },
          sums);
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
void apply_contiguous(Shape shape, int64_t begin, int64_t end, T* out, const T* y, Vectors<T> v, Activation activation,
                      const T* residual) {
  with_activation(activation, [&](auto act) {
    for_planes(shape, begin, end, [&](int64_t offset, int64_t length, int64_t c) {
      const auto mean = v.mean[c], scale = v.scale[c], shift = v.shift[c];
      if (residual) {
#pragma omp simd
        for (int64_t i = offset; i < offset + length; ++i)
          out[i] = rounded<T>(act.forward((acc_t<T>(y[i]) - mean) * scale + shift + acc_t<T>(residual[i])));
      } else {
#pragma omp simd
        for (int64_t i = offset; i < offset + length; ++i)
          out[i] = rounded<T>(act.forward((acc_t<T>(y[i]) - mean) * scale + shift));
      }
    });
  });
}

template <typename T>
void grad_apply_contiguous(Shape shape, int64_t begin, int64_t end, T* out, const T* dout, const T* y, Vectors<T> v,
                           const acc_t<T>* slope, const acc_t<T>* offset, Activation activation) {
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

// ---------------------------------------------------------------------------------------- channels last

template <typename T>
void stats_channels_last(Shape shape, int64_t, int64_t begin, int64_t end, const T* y, const acc_t<T>* origin,
                         double* sums) {
  const int64_t C = shape.channels;
  add_rows(end - begin, C, C, StatsTerm<T>{y + begin * C, origin}, sums, sums + C);
}

template <typename T>
void grad_stats_channels_last(Shape shape, int64_t, int64_t begin, int64_t end, const T* dout, const T* y, Vectors<T> v,
                              Activation activation, Joined<T> joined, double* sums) {
  const int64_t C = shape.channels, first = begin * C;
  with_activation(activation, [&](auto act) {
    with_slope_at(joined, act, [&](auto at, const T* other) {
      const GradTerm<T, decltype(act), at()> term{
          dout + first, y + first, v, act, advance(other, first), advance(joined.du, first)};
      add_rows(end - begin, C, C, term, sums, sums + C);
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
          out[row + c] = rounded<T>(
              act.forward((acc_t<T>(y[row + c]) - v.mean[c]) * v.scale[c] + v.shift[c] + acc_t<T>(residual[row + c])));
      } else {
#pragma omp simd
        for (int64_t c = 0; c < C; ++c)
          out[row + c] = rounded<T>(act.forward((acc_t<T>(y[row + c]) - v.mean[c]) * v.scale[c] + v.shift[c]));
      }
    }
  });
}

template <typename T>
void grad_apply_channels_last(Shape shape, int64_t begin, int64_t end, T* out, const T* dout, const T* y, Vectors<T> v,
                              const acc_t<T>* slope, const acc_t<T>* offset, Activation activation) {
  const int64_t C = shape.channels;
  with_activation(activation, [&](auto act) {
    for (int64_t row = begin * C; row < end * C; row += C) {
#pragma omp simd
      for (int64_t c = 0; c < C; ++c)
        out[row + c] =
            grad_value<T>(act, dout[row + c], y[row + c], v.mean[c], v.scale[c], v.shift[c], slope[c], offset[c]);
    }
  });
}

}  // namespace

template <typename T>
ChannelLoopsPair<T> FUSEDCONVBN_CONCAT(channel_loops_, FUSEDCONVBN_ISA)() {
  return {{stats_contiguous<T>, grad_stats_contiguous<T>, apply_contiguous<T>, grad_apply_contiguous<T>},
          {stats_channels_last<T>, grad_stats_channels_last<T>, apply_channels_last<T>, grad_apply_channels_last<T>}};
}

template ChannelLoopsPair<double> FUSEDCONVBN_CONCAT(channel_loops_, FUSEDCONVBN_ISA)();
template ChannelLoopsPair<float> FUSEDCONVBN_CONCAT(channel_loops_, FUSEDCONVBN_ISA)();
template ChannelLoopsPair<c10::BFloat16> FUSEDCONVBN_CONCAT(channel_loops_, FUSEDCONVBN_ISA)();
template ChannelLoopsPair<c10::Half> FUSEDCONVBN_CONCAT(channel_loops_, FUSEDCONVBN_ISA)();

}  // namespace fusedconvbn::cpu
