// The arithmetic of a norm link on the values of one channel (chain.h), shared by the CPU and CUDA
// kernels.
#pragma once

#include "elementary.h"

namespace fusedconvbn {

struct Normalisation {
  double eps = 0;
  bool tutorial = false;  // its arithmetic
  double count = 1;       // R
  bool counted = false;   // R of each channel is a row of the statistics
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

// slope·(T − μ) + offset is what the statistics add to a·du in dT: −κ·S2·(T − μ) − (a/R)·S1.
template <typename acc>
struct Linear {
  acc slope = 0, offset = 0;

  Linear() = default;
  FUSEDCONVBN_INLINE Linear(const Normalisation& n, acc var, acc a, acc r, acc count, acc S1,
                            acc S2) {
    const acc R = n.counted ? (count < 1 ? acc(1) : count) : acc(n.count);
    acc rho = r;
    if (n.tutorial) {  // in a constant channel S2 is 0 as well as s, and so is the term
      const acc s = unbiased_std(n, var);
      rho = s == 0 ? acc(0) : acc(n.count / (n.count - 1)) / s;
    }
    const acc factor = -a / R;
    slope = factor * r * S2 * rho;
    offset = factor * S1;
  }
};

// One batch more in the running statistics of a channel:
//   running = (1 − momentum)·running + momentum·batch      of the mean + bias, and of the unbiased
//   variance v·R/(R−1)
// (Not running + momentum·(batch − running): that of an infinite one is NaN.)
template <typename acc>
struct RunningChannel {
  const acc *statistics, *bias;  // bias may be null
  int64_t channels;
  double momentum;  // NaN: 1/n of the n-th batch, which is `count`
  double values;    // R; 0: row 2 of the statistics has it, and where that is 0 nobody has a sample
  double count;

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
