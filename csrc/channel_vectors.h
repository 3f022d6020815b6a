// The arithmetic of a norm link on the values of one channel (chain.h), shared by the CPU and CUDA kernels.
#pragma once

#include "elementary.h"

namespace fusedconvbn {

struct Normalisation {
  double eps;
  bool tutorial;  // its arithmetic
  double count;   // R
};

// s of the table in chain.h
template <typename acc>
FUSEDCONVBN_INLINE acc unbiased_std(const Normalisation& n, acc var) {
  return std::sqrt(var * acc(n.count / (n.count - 1)));
}

template <typename acc>
FUSEDCONVBN_INLINE acc inverse_std(const Normalisation& n, acc var) {  // r
  return n.tutorial ? 1 / (unbiased_std(n, var) + acc(n.eps)) : 1 / std::sqrt(var + acc(n.eps));
}

// Rows of `result`: a = γ·r, β, r.
template <typename acc>
struct AffineVectors {
  const acc *var, *weight, *bias;  // each of the latter two may be null
  acc* result;
  int64_t channels;
  Normalisation how;

  FUSEDCONVBN_INLINE void operator()(int64_t c) const {
    const acc r = inverse_std(how, var[c]);
    result[c] = weight ? r * weight[c] : r;
    result[channels + c] = bias ? bias[c] : acc(0);
    result[2 * channels + c] = r;
  }
};

// Rows of `result`: the slope −κ·S2 and the offset −(a/R)·S1 of dT, and dγ = r·S2.
template <typename acc>
struct GradVectors {
  const acc *sums, *total;  // S1 and S2 of this process and of all
  const acc *var, *vectors;
  const acc* counts;  // R, or null where it is how.count
  acc* result;
  int64_t channels;
  Normalisation how;

  FUSEDCONVBN_INLINE void operator()(int64_t c) const {
    const acc r = vectors[2 * channels + c], R = counts ? (counts[c] < 1 ? acc(1) : counts[c]) : acc(how.count);
    acc rho = r;
    if (how.tutorial) {  // in a constant channel S2 is 0 as well as s, and so is the term
      const acc s = unbiased_std(how, var[c]);
      rho = s == 0 ? acc(0) : acc(how.count / (how.count - 1)) / s;
    }
    const acc factor = -vectors[c] / R;
    result[c] = factor * r * total[channels + c] * rho;
    result[channels + c] = factor * total[c];
    result[2 * channels + c] = r * sums[channels + c];
  }
};

}  // namespace fusedconvbn
