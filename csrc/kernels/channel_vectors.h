// The arithmetic of a norm link (chain.h) on the vectors of one channel, for CPU and CUDA kernels.
#pragma once

#include "elementary.h"

namespace fusedconvbn {

struct Normalisation {
  double eps = 0;
  bool tutorial = false;  // whether the arithmetic is Arithmetic::tutorial
  double count = 1;       // R
  bool counted = false;   // whether R is a row of the statistics instead
};

// s of the table in chain.h
template <typename acc>
FUSEDCONVBN_INLINE acc unbiased_std(const Normalisation& n, acc var) {
  return std::sqrt(var * acc(n.count / (n.count - 1)));
}

template <typename acc>
FUSEDCONVBN_INLINE acc inverse_std(const Normalisation& n, acc var) {  // r
  return n.tutorial ? 1 / (unbiased_std(n, var) + acc(n.eps)) : inverse_root(var + acc(n.eps));
}

// The terms that batch statistics add to a·du in dT, as slope·(T − μ) + offset:
// −κ·S2·(T − μ) − (a/R)·S1.
template <typename acc>
struct Linear {
  acc slope = 0, offset = 0;

  Linear() = default;
  FUSEDCONVBN_INLINE Linear(const Normalisation& n, acc var, acc a, acc r, acc count, acc S1,
                            acc S2) {
    const acc R = n.counted ? (count < 1 ? acc(1) : count) : acc(n.count);
    acc rho = r;
    if (n.tutorial) {  // in a constant channel s and S2 are 0, and the term is 0 too
      const acc s = unbiased_std(n, var);
      rho = s == 0 ? acc(0) : acc(n.count / (n.count - 1)) / s;
    }
    const acc factor = -a / R;
    slope = factor * r * S2 * rho;
    offset = factor * S1;
  }
};

// Updates the running statistics of a channel by one batch:
//   running = (1 − momentum)·running + momentum·batch
// where batch is mean + bias, and for the variance the unbiased v·R/(R−1). (Written as
// running + momentum·(batch − running), an infinite value would become NaN.)
template <typename acc>
struct RunningChannel {
  const acc *statistics, *bias;  // bias may be null
  int64_t channels;
  double momentum;  // NaN for 1/count
  double values;    // R; if 0, R is in row 2 of the statistics, where 0 means no sample anywhere
  double count;     // of batches, with this one

  FUSEDCONVBN_INLINE void move(int64_t c, acc& mean, acc& var) const {
    const double R = values > 0 ? values : double(statistics[2 * channels + c]);
    if (R == 0) return;
    const double part = momentum == momentum ? momentum : 1 / count;
    const acc unbiased = statistics[channels + c] * acc(R / (R > 2 ? R - 1 : 1));
    const acc batch = statistics[c] + (bias ? bias[c] : acc(0));
    mean = acc((1 - part) * mean + part * batch);
    var = acc((1 - part) * var + part * unbiased);
  }
};

}  // namespace fusedconvbn
