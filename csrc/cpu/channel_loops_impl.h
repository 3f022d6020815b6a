// The loops of the channel kernels. channel_loops_{baseline,avx2,avx512}.cpp include this file,
// each with its own target and FUSEDCONVBN_ISA. The loops are plain and run over contiguous memory;
// the compiler vectorises them.
//
// Both layouts run the same loops over rows. A channels-last row has one value of each channel. A
// contiguous plane is cut into rows of one channel. `step` tells them apart: the vectors of value c
// of a row are at [c·step].
//
// A cheap activation is a template argument of its pass. The others are applied row by row: the
// pass computes u of a row into a buffer in the cache, replaces it by the activation, and continues
// from the buffer.

namespace fusedconvbn::cpu {
namespace {

enum Step { contiguous = 0, channels_last = 1 };

constexpr int64_t most_width = 512;  // values in a row

// v in the type of a map. The rounding to bfloat16 in c10 branches on NaN, so the compiler
// vectorises no loop that contains it.
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

template <typename T>
FUSEDCONVBN_INLINE T* advance(T* from, int64_t by) {
  return from ? from + by : from;
}

template <typename T>
FUSEDCONVBN_INLINE Vectors<T> advance(Vectors<T> v, int64_t by) {
  return {v.mean + by, v.scale + by, v.shift + by};
}

// ---------------------------------------------------------------------------- activations of a row

// out = act(u); out may be u.
template <typename acc>
void forward_row(Activation activation, int64_t width, acc* u, acc* out) {
  with_activation(activation, [&](auto act) {
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) out[c] = act.forward(u[c]);
  });
}

// du = act'(u)·dout; du may be u or dout.
template <typename acc>
void backward_row(Activation activation, int64_t width, acc* u, const acc* dout, acc* du) {
  with_activation(activation, [&](auto act) {
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) du[c] = act.backward(u[c], dout[c]);
  });
}

template <Step step, typename T>
FUSEDCONVBN_INLINE void normalised_row(int64_t width, const T* y, Vectors<T> v, const T* residual,
                                       acc_t<T>* u) {
  if (residual) {
#pragma omp simd
    for (int64_t c = 0; c < width; ++c)
      u[c] = (acc_t<T>(y[c]) - v.mean[c * step]) * v.scale[c * step] + v.shift[c * step] +
             acc_t<T>(residual[c]);
  } else {
#pragma omp simd
    for (int64_t c = 0; c < width; ++c)
      u[c] = (acc_t<T>(y[c]) - v.mean[c * step]) * v.scale[c * step] + v.shift[c * step];
  }
}

// A row of a map in the accumulator type: the row itself or, if its type differs, a copy in cache.
template <typename T>
class Row {
 public:
  Row() {}
  FUSEDCONVBN_INLINE const acc_t<T>* load(int64_t width, const T* from) {
    if constexpr (same) {
      return from;
    } else {
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) values_[c] = acc_t<T>(from[c]);
      return values_;
    }
  }
  // The buffer to fill before `store` writes the row `to`, which may be null.
  FUSEDCONVBN_INLINE acc_t<T>* target(T* to) {
    if constexpr (same)
      if (to) return to;
    return values_;
  }
  FUSEDCONVBN_INLINE void store(int64_t width, T* to) const {
    if constexpr (!same) {
      if (!to) return;
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) to[c] = rounded<T>(values_[c]);
    }
  }

 private:
  static constexpr bool same = std::is_same_v<T, acc_t<T>>;
  acc_t<T> values_[most_width];
};

// Calls f with the functor of a cheap activation, or with nullptr for any other.
template <typename T, typename F>
FUSEDCONVBN_INLINE void with_cheap_activation(Activation activation, const F& f) {
  if (std::is_same_v<T, double> || !activation.cheap()) return f(nullptr);
  with_activation(activation, [&](auto act) {
    if constexpr (decltype(act)::cheap && !std::is_same_v<T, double>) f(act);
  });
}

template <typename Act>
constexpr bool by_row = std::is_same_v<Act, std::nullptr_t>;

// -------------------------------------------------------------------------------------- reductions

// A reduction sums the terms of a block of this many rows in float, and the blocks in double. It
// sums all terms in double if the map is double, or if it has few values per channel: there the
// rounding errors do not average out, and the time does not matter.
constexpr int64_t block_rows = 64, few_values = 256;

// Calls f(Sum{}) with the type in which the terms of a block are summed.
template <typename T, typename F>
FUSEDCONVBN_INLINE void with_sum(Shape shape, const F& f) {
  if (std::is_same_v<T, double> || shape.outer * shape.inner < few_values) return f(double{});
  if constexpr (!std::is_same_v<T, double>) f(acc_t<T>{});
}

// sums1[c], sums2[c] += Σ_rows term(first + row·stride + c, c)
template <typename Term, typename Sum>
FUSEDCONVBN_INLINE void add_rows(int64_t first, int64_t rows, int64_t stride, int64_t width,
                                 const Term& term, Sum* __restrict sums1, Sum* __restrict sums2) {
  if constexpr (Term::by_row) {
    for (int64_t row = 0; row < rows; ++row)
      term.add_row(first + row * stride, width, sums1, sums2);
  } else {
    int64_t row = 0;
    for (; row + 2 <= rows; row += 2) {  // two rows for each read and write of the sums
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) {
        Sum add1 = 0, add2 = 0;
        term(first + row * stride + c, c, add1, add2);
        term(first + (row + 1) * stride + c, c, add1, add2);
        sums1[c] += add1;
        sums2[c] += add2;
      }
    }
    if (row < rows) {
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) {
        Sum add1 = 0, add2 = 0;
        term(first + row * stride + c, c, add1, add2);
        sums1[c] += add1;
        sums2[c] += add2;
      }
    }
  }
}

// Calls f(offset, length) for each run of memory in positions [begin, end) of a channel.
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

// Computes the sums of one channel of a contiguous map. term_at(offset) returns the term of the
// block that starts at `offset`.
template <typename Sum, typename TermAt>
FUSEDCONVBN_INLINE void add_channel(Shape shape, int64_t channel, int64_t begin, int64_t end,
                                    const TermAt& term_at, double* sums) {
  for_runs(shape, channel, begin, end, [&](int64_t offset, int64_t length) {
    for (const int64_t last = offset + length; offset < last;) {
      const auto term = term_at(offset);
      const int64_t left = last - offset;
      if constexpr (decltype(term)::by_row) {
        const int64_t count = left < most_width ? left : most_width;
        term.add_row(0, count, sums + channel, sums + shape.channels + channel);
        offset += count;
      } else {
        constexpr int64_t lanes = 32, most = block_rows * lanes;
        const int64_t count = left < most ? left : most, whole = count / lanes * lanes;
        Sum own1[lanes] = {}, own2[lanes] = {};
        add_rows(0, count / lanes, lanes, lanes, term, own1, own2);
        add_rows(whole, count > whole, lanes, count - whole, term, own1, own2);
        double sum1 = 0, sum2 = 0;
        for (int64_t l = 0; l < lanes; ++l) {
          sum1 += own1[l];
          sum2 += own2[l];
        }
        term.add(0, count, sum1, sum2, sums[channel], sums[shape.channels + channel]);
        offset += count;
      }
    }
  });
}

// Computes the sums of all channels of a channels-last map. term_at(row, c, width) returns the term
// of the block of `width` channels that starts at `row` and channel c.
template <typename Sum, typename TermAt>
FUSEDCONVBN_INLINE void add_channels(Shape shape, int64_t begin, int64_t end, const TermAt& term_at,
                                     double* sums) {
  const int64_t C = shape.channels;
  for (int64_t row = begin; row < end; row += block_rows) {
    const int64_t rows = end - row < block_rows ? end - row : block_rows;
    for (int64_t first = 0; first < C; first += most_width) {
      const int64_t width = C - first < most_width ? C - first : most_width;
      const auto term = term_at(row, first, width);
      Sum own1[most_width], own2[most_width];
      for (int64_t c = 0; c < width; ++c) own1[c] = own2[c] = 0;
      add_rows(0, rows, C, width, term, own1, own2);
      for (int64_t c = 0; c < width; ++c)
        term.add(c, rows, own1[c], own2[c], sums[first + c], sums[C + first + c]);
    }
  }
}

// A block sums d and d², where d is the distance of a value from `shift`, a value of the block. At
// the end of the block the sums are moved to the origin of the channel, so that an outlier only
// affects its own block.
template <typename T, Step step, typename Sum>
struct StatsTerm {
  static constexpr bool by_row = false;

  const T* y;
  const acc_t<T>* origin;
  acc_t<T> shift[step ? most_width : 1];

  FUSEDCONVBN_INLINE StatsTerm(const T* y, const acc_t<T>* origin, int64_t width)
      : y(y), origin(origin) {
    for (int64_t c = 0; c < (step ? width : 1); ++c) {
      const acc_t<T> value = acc_t<T>(y[c]);
      shift[c] = value - value == 0 ? value : origin[c];  // a finite value
    }
  }

  FUSEDCONVBN_INLINE void operator()(int64_t i, int64_t c, Sum& sum, Sum& squares) const {
    const Sum d = Sum(acc_t<T>(y[i])) - Sum(shift[c * step]);
    sum += d;
    squares += d * d;
  }
  // Σ (d + δ) = Σ d + n·δ      Σ (d + δ)² = Σ d² + 2δ·Σ d + n·δ²
  FUSEDCONVBN_INLINE void add(int64_t c, int64_t n, double own_sum, double own_squares, double& sum,
                              double& squares) const {
    const double delta = double(shift[c]) - double(origin[c]);
    sum += own_sum + n * delta;
    squares += own_squares + delta * (2 * own_sum + n * delta);
  }
};

template <typename T>
void stats_contiguous(Shape shape, int64_t channel, int64_t begin, int64_t end, const T* y,
                      const acc_t<T>* origin, double* sums) {
  with_sum<T>(shape, [&]<typename Sum>(Sum) {
    const auto term_at = [&](int64_t offset) {
      return StatsTerm<T, contiguous, Sum>(y + offset, origin + channel, 1);
    };
    add_channel<Sum>(shape, channel, begin, end, term_at, sums);
  });
}

template <typename T>
void stats_channels_last(Shape shape, int64_t, int64_t begin, int64_t end, const T* y,
                         const acc_t<T>* origin, double* sums) {
  with_sum<T>(shape, [&]<typename Sum>(Sum) {
    const auto term_at = [&](int64_t row, int64_t c, int64_t width) {
      return StatsTerm<T, channels_last, Sum>(y + row * shape.channels + c, origin + c, width);
    };
    add_channels<Sum>(shape, begin, end, term_at, sums);
  });
}

// The terms of grad_stats are du = act'·dout and du·(y − mean). The pointers are those of the first
// value of a block.
template <typename T>
struct GradBlock {
  const T *dout, *y;
  Vectors<T> v;
  GradSource<T> source;

  FUSEDCONVBN_INLINE GradBlock from(int64_t offset, int64_t channel) const {
    return {dout + offset,
            y + offset,
            advance(v, channel),
            {advance(source.residual, offset), advance(source.result, offset),
             advance(source.du, offset)}};
  }
  FUSEDCONVBN_INLINE void add(int64_t, int64_t, double own_sum, double own_dot, double& sum,
                              double& dot) const {
    sum += own_sum;
    dot += own_dot;
  }
};

// The argument of act': u, u + residual, or neither, because it follows from the result.
enum class At { u, sum, result };

// For a cheap activation. du is the gradient of the residual: it is written if there is one.
template <typename T, Step step, typename Act, At at>
struct GradTerm : GradBlock<T> {
  static constexpr bool by_row = false;

  Act act;

  template <typename Sum>
  FUSEDCONVBN_INLINE void operator()(int64_t i, int64_t c, Sum& sum, Sum& dot) const {
    const auto& v = this->v;
    const acc_t<T> centred = acc_t<T>(this->y[i]) - v.mean[c * step];
    acc_t<T> u;
    if constexpr (at == At::result)
      u = acc_t<T>(this->source.result[i]);
    else
      u = centred * v.scale[c * step] + v.shift[c * step];
    if constexpr (at == At::sum) u += acc_t<T>(this->source.residual[i]);
    const acc_t<T> gradient = act.backward(u, acc_t<T>(this->dout[i]));
    if constexpr (at != At::u) this->source.du[i] = rounded<T>(gradient);
    sum += Sum(gradient);
    dot += Sum(gradient) * Sum(centred);
  }
};

// For any activation and any At, row by row. A contiguous row has a single sum.
template <typename T, Step step, typename Sum>
struct GradRowTerm : GradBlock<T> {
  static constexpr bool by_row = true;

  Activation activation;

  template <typename Total>
  FUSEDCONVBN_INLINE void add_row(int64_t first, int64_t width, Total* __restrict sums,
                                  Total* __restrict dots) const {
    const auto& [residual, result, du] = this->source;
    const auto& mean = this->v.mean;
    const T* const y = this->y + first;
    acc_t<T> u[most_width];
    Row<T> gradients, douts;
    if (result) {
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) u[c] = acc_t<T>(result[first + c]);
    } else {
      normalised_row<step>(width, y, this->v, advance(residual, first), u);
    }
    T* const to = advance(du, first);
    acc_t<T>* const gradient = gradients.target(to);
    backward_row(activation, width, u, douts.load(width, this->dout + first), gradient);
    gradients.store(width, to);
    if constexpr (step == contiguous) {
      Sum sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
      for (int64_t c = 0; c < width; ++c) {
        sum += Sum(gradient[c]);
        dot += Sum(gradient[c]) * Sum(acc_t<T>(y[c]) - *mean);
      }
      *sums += sum;
      *dots += dot;
    } else {
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) {
        sums[c] += Sum(gradient[c]);
        dots[c] += Sum(gradient[c]) * Sum(acc_t<T>(y[c]) - mean[c]);
      }
    }
  }
};

// Calls f(term_of, Sum{}), where term_of(block) is the term for a block.
template <Step step, typename T, typename F>
FUSEDCONVBN_INLINE void with_grad_term(Shape shape, Activation activation,
                                       const GradSource<T>& source, const F& f) {
  with_sum<T>(shape, [&]<typename Sum>(Sum) {
    const auto by_row = [&](const GradBlock<T>& block) {
      return GradRowTerm<T, step, Sum>{block, activation};
    };
    if constexpr (std::is_same_v<Sum, double>) {
      f(by_row, Sum{});
    } else {
      with_cheap_activation<T>(activation, [&]<typename Act>(Act act) {
        if constexpr (std::is_same_v<Act, std::nullptr_t>) {
          f(by_row, Sum{});
        } else {
          const auto fused = [&]<At at>() {
            f([&](const GradBlock<T>& block) { return GradTerm<T, step, Act, at>{block, act}; },
              Sum{});
          };
          if constexpr (std::is_same_v<Act, Relu>)
            if (source.result) return fused.template operator()<At::result>();
          if constexpr (!std::is_same_v<Act, Identity>)
            if (source.residual) return fused.template operator()<At::sum>();
          fused.template operator()<At::u>();
        }
      });
    }
  });
}

template <typename T>
void grad_stats_contiguous(Shape shape, int64_t channel, int64_t begin, int64_t end, const T* dout,
                           const T* y, Vectors<T> v, Activation activation, GradSource<T> source,
                           double* sums) {
  const GradBlock<T> map{dout, y, v, source};
  with_grad_term<contiguous>(shape, activation, source, [&]<typename Sum>(auto term_of, Sum) {
    const auto term_at = [&](int64_t offset) { return term_of(map.from(offset, channel)); };
    add_channel<Sum>(shape, channel, begin, end, term_at, sums);
  });
}

template <typename T>
void grad_stats_channels_last(Shape shape, int64_t, int64_t begin, int64_t end, const T* dout,
                              const T* y, Vectors<T> v, Activation activation, GradSource<T> source,
                              double* sums) {
  const GradBlock<T> map{dout, y, v, source};
  with_grad_term<channels_last>(shape, activation, source, [&]<typename Sum>(auto term_of, Sum) {
    const auto term_at = [&](int64_t row, int64_t c, int64_t) {
      return term_of(map.from(row * shape.channels + c, c));
    };
    add_channels<Sum>(shape, begin, end, term_at, sums);
  });
}

// ------------------------------------------------------------------------------------- elementwise

// Calls f(offset, width, channel) for each row, or part of a row, in values [begin, end). `channel`
// is the channel of its first value.
template <Step step, typename F>
FUSEDCONVBN_INLINE void for_rows(Shape shape, int64_t begin, int64_t end, const F& f) {
  const int64_t length = step ? shape.channels : shape.inner;
  int64_t first = begin / length * length, plane = step ? 0 : begin / length % shape.channels;
  while (begin < end) {
    const int64_t last = end < first + length ? end : first + length;
    f(begin, last - begin, step ? begin - first : plane);
    begin = first = last;
    if (!step) plane = plane + 1 < shape.channels ? plane + 1 : 0;
  }
}

// Calls f(begin, end) for parts of the values [begin, end) that fit into a Row. A part may be
// several short rows or a piece of a long one.
template <typename F>
FUSEDCONVBN_INLINE void for_parts(int64_t begin, int64_t end, const F& f) {
  for (; begin < end; begin += most_width)
    f(begin, end < begin + most_width ? end : begin + most_width);
}

// Slices of channels-last maps are given in rows (channel_loops.h).
template <Step step>
FUSEDCONVBN_INLINE int64_t value_at(Shape shape, int64_t index) {
  return step ? index * shape.channels : index;
}

template <typename T, Step step>
void apply(Shape shape, int64_t begin, int64_t end, T* out, const T* y, Vectors<T> vectors,
           Activation activation, const T* residual) {
  begin = value_at<step>(shape, begin), end = value_at<step>(shape, end);
  with_cheap_activation<T>(activation, [&](auto act) {
    if constexpr (by_row<decltype(act)>) {
      for_parts(begin, end, [&](int64_t begin, int64_t end) {
        Row<T> row;
        acc_t<T>* const u = row.target(out + begin);
        for_rows<step>(shape, begin, end, [&](int64_t offset, int64_t width, int64_t channel) {
          normalised_row<step>(width, y + offset, advance(vectors, channel),
                               advance(residual, offset), u + (offset - begin));
        });
        forward_row(activation, end - begin, u, u);
        row.store(end - begin, out + begin);
      });
    } else {
      for_rows<step>(shape, begin, end, [&](int64_t offset, int64_t width, int64_t channel) {
        const auto v = advance(vectors, channel);
        const T *const from = y + offset, *const added = advance(residual, offset);
        T* const to = out + offset;
        if (added) {
#pragma omp simd
          for (int64_t c = 0; c < width; ++c)
            to[c] =
                rounded<T>(act.forward((acc_t<T>(from[c]) - v.mean[c * step]) * v.scale[c * step] +
                                       v.shift[c * step] + acc_t<T>(added[c])));
        } else {
#pragma omp simd
          for (int64_t c = 0; c < width; ++c)
            to[c] = rounded<T>(act.forward(
                (acc_t<T>(from[c]) - v.mean[c * step]) * v.scale[c * step] + v.shift[c * step]));
        }
      });
    }
  });
}

template <typename T, Step step>
void multiply(Shape shape, int64_t begin, int64_t end, T* out, const T* y, const acc_t<T>* scale) {
  begin = value_at<step>(shape, begin), end = value_at<step>(shape, end);
  for_rows<step>(shape, begin, end, [&](int64_t offset, int64_t width, int64_t channel) {
    const acc_t<T>* const by = scale + channel;
#pragma omp simd
    for (int64_t c = 0; c < width; ++c)
      out[offset + c] = rounded<T>(acc_t<T>(y[offset + c]) * by[c * step]);
  });
}

// out = a·du + slope·(y − mean) + offset
template <typename T, Step step>
void grad_apply(Shape shape, int64_t begin, int64_t end, T* out, const T* dout, const T* y,
                Vectors<T> vectors, const acc_t<T>* slopes, const acc_t<T>* offsets,
                Activation activation) {
  begin = value_at<step>(shape, begin), end = value_at<step>(shape, end);
  // Computes values [begin, end) with du = du_of(u, i).
  const auto run = [&](int64_t begin, int64_t end, const auto& du_of) {
    for_rows<step>(shape, begin, end, [&](int64_t at, int64_t width, int64_t channel) {
      const auto v = advance(vectors, channel);
      const acc_t<T>*const slope = slopes + channel, *const offset = offsets + channel;
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) {
        const acc_t<T> centred = acc_t<T>(y[at + c]) - v.mean[c * step], a = v.scale[c * step];
        const acc_t<T> du = du_of(centred * a + v.shift[c * step], at + c);
        // A slope of 0 must not turn an infinite value into NaN.
        const acc_t<T> linear = slope[c * step] == 0 ? acc_t<T>(0) : slope[c * step] * centred;
        out[at + c] = rounded<T>(a * du + (linear + offset[c * step]));
      }
    });
  };
  with_cheap_activation<T>(activation, [&](auto act) {
    if constexpr (by_row<decltype(act)>) {
      for_parts(begin, end, [&](int64_t begin, int64_t end) {
        acc_t<T> u[most_width], du[most_width] = {};
        for_rows<step>(shape, begin, end, [&](int64_t at, int64_t width, int64_t channel) {
          normalised_row<step>(width, y + at, advance(vectors, channel),
                               static_cast<const T*>(nullptr), u + (at - begin));
        });
        for (int64_t i = begin; i < end; ++i) du[i - begin] = acc_t<T>(dout[i]);
        backward_row(activation, end - begin, u, du, du);
        run(begin, end, [&](acc_t<T>, int64_t i) { return du[i - begin]; });
      });
    } else {
      run(begin, end, [&](acc_t<T> u, int64_t i) { return act.backward(u, acc_t<T>(dout[i])); });
    }
  });
}

template <typename T>
constexpr ChannelLoopsPair<T> loops = {
    {stats_contiguous<T>, grad_stats_contiguous<T>, apply<T, contiguous>, multiply<T, contiguous>,
     grad_apply<T, contiguous>},
    {stats_channels_last<T>, grad_stats_channels_last<T>, apply<T, channels_last>,
     multiply<T, channels_last>, grad_apply<T, channels_last>}};

}  // namespace

// clang-format off
template <> ChannelLoopsPair<double> channel_loops<FUSEDCONVBN_ISA>() { return loops<double>; }
template <> ChannelLoopsPair<float> channel_loops<FUSEDCONVBN_ISA>() { return loops<float>; }
template <> ChannelLoopsPair<c10::BFloat16> channel_loops<FUSEDCONVBN_ISA>() { return loops<c10::BFloat16>; }
template <> ChannelLoopsPair<c10::Half> channel_loops<FUSEDCONVBN_ISA>() { return loops<c10::Half>; }
// clang-format on

}  // namespace fusedconvbn::cpu
