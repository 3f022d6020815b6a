// The activations a norm link can carry, one functor each, shared by the CPU and CUDA kernels.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FUSEDCONVBN_INLINE __host__ __device__ __forceinline__
#else
// Forced: the CPU loops are compiled once per instruction set, and a copy that is not inlined would
// be shared between them.
#define FUSEDCONVBN_INLINE inline __attribute__((always_inline))
#endif

namespace fusedconvbn {

// The numbers are part of the packed form of a chain (chain.h).
enum class Activation : int64_t { none = 0, relu = 1 };

// u is the normalised value; `forward` is act(u), `backward` is act'(u)·dout. Both let NaN through.
struct Identity {
  template <typename T>
  static FUSEDCONVBN_INLINE T forward(T u) {
    return u;
  }
  template <typename T>
  static FUSEDCONVBN_INLINE T backward(T, T dout) {
    return dout;
  }
};

struct Relu {
  template <typename T>
  static FUSEDCONVBN_INLINE T forward(T u) {
    return u <= T(0) ? T(0) : u;
  }
  template <typename T>
  static FUSEDCONVBN_INLINE T backward(T u, T dout) {
    return u <= T(0) ? T(0) : dout;
  }
};

// Calls f with the functor of `activation`.
template <typename F>
void with_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::none:
      return f(Identity{});
    case Activation::relu:
      return f(Relu{});
  }
}

}  // namespace fusedconvbn
