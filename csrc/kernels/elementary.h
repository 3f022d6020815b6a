// Elementary functions: inverse root, exp, expm1, tanh, sigmoid and the normal distribution. On CPU
// the compiler can vectorise them; on CUDA they call CUDA's own functions.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FUSEDCONVBN_INLINE __host__ __device__ __forceinline__
#else
// Inlining is forced: the CPU loops are compiled once per instruction set, and they would all share
// a function that is not inlined.
#define FUSEDCONVBN_INLINE inline __attribute__((always_inline))
#endif

namespace fusedconvbn {

// Propagates NaN.
template <typename T>
FUSEDCONVBN_INLINE T clamp(T x, T low, T high) {
  return x < low ? low : x > high ? high : x;
}

#if !defined(__CUDACC__)
// eˣ = 2ⁿ·(1 + p) with x = n·ln 2 + r, |r| ≤ ln 2 / 2, and p = eʳ − 1. x is clamped so that 2ⁿ is a
// normal number.
struct Exponential {
  float power, p;

  FUSEDCONVBN_INLINE explicit Exponential(float x) {
    // Adding and subtracting `shift` rounds; the lowest bits of the sum are n.
    constexpr float shift = 0x1.8p23f;
    const float bounded = clamp(x, -87.f, 88.f), shifted = bounded * 0x1.715476p0f + shift,
                n = shifted - shift;
    const float r = (bounded - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;  // ln 2 in two parts
    const float q = 1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f + r * (1 / 5040.f))));
    p = r + r * r * (0.5f + r * q);
    power = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) << 23) + 0x3f800000u);
  }
};
#endif

// 1/√x
template <typename T>
FUSEDCONVBN_INLINE T inverse_root(T x) {
#if defined(__CUDACC__)
  return ::rsqrt(x);
#else
  return 1 / std::sqrt(x);
#endif
}

FUSEDCONVBN_INLINE float exponential(float x) {
#if defined(__CUDACC__)
  return ::expf(x);
#else
  const Exponential e(x);
  return e.power + e.power * e.p;
#endif
}
FUSEDCONVBN_INLINE double exponential(double x) { return ::exp(x); }

// eˣ − 1, accurate near 0 too
FUSEDCONVBN_INLINE float exponential_minus_one(float x) {
#if defined(__CUDACC__)
  return ::expm1f(x);
#else
  const Exponential e(x);
  return (e.power - 1.f) + e.power * e.p;
#endif
}
FUSEDCONVBN_INLINE double exponential_minus_one(double x) { return ::expm1(x); }

// tanh x = m/(m + 2), m = e²ˣ − 1. It rounds to ±1 long before the bounds.
template <typename T>
FUSEDCONVBN_INLINE T hyperbolic_tangent(T x) {
  const T m = exponential_minus_one(T(2) * clamp(x, T(-20), T(20)));
  return m / (m + T(2));
}

template <typename T>
FUSEDCONVBN_INLINE T sigmoid(T x) {
  return T(1) / (T(1) + exponential(-x));
}

// The normal distribution at x: the density φ, and Φ, the probability of a value below x.
template <typename T>
struct Normal {
  T density, below;
};

FUSEDCONVBN_INLINE Normal<double> normal(double x) {
  return {0.39894228040143268 * ::exp(-0.5 * x * x), 0.5 * ::erfc(-0.70710678118654752 * x)};
}

FUSEDCONVBN_INLINE Normal<float> normal(float x) {
#if defined(__CUDACC__)
  return {0.39894228f * ::expf(-0.5f * x * x), ::normcdff(x)};
#else
  // Φ(−|x|) = exp(−x²/2)·t·P(s), t = 1/(1 + 0.3·|x|), s = 1 − t. P is the polynomial of least
  // relative error, 4·10⁻⁹, with P(0) = 1/2. It is a polynomial in s because near 0, where Φ is
  // largest, the rounding error of t would enter a polynomial in t almost three times.
  constexpr float coefficients[] = {
      0.0205008443f, -0.0727188438f, 0.070454441f, 0.0107375775f, 0.0230420567f,
      -0.139630646f, -0.0810390115f, 0.618147194f, -0.829807281f, 0.5f};
  const float scaled = 0.3f * (x < 0 ? -x : x), t = 1.f / (1.f + scaled), s = scaled * t;
  const float e = exponential(-0.5f * x * x);
  float polynomial = 0;
  for (const float c : coefficients) polynomial = polynomial * s + c;
  const float tail = e * t * polynomial;
  return {0.39894228f * e, x < 0 ? tail : 1.f - tail};
#endif
}

}  // namespace fusedconvbn
