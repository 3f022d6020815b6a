// Vectors of neighbouring values that are read or written at once, and their accumulator type.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "channel_launch.h"

namespace fusedconvbn::cuda {
namespace {

constexpr int64_t vector_bytes = 16;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T, int V>
struct alignas(sizeof(T) * V) Vector {
  T values[V];

  __device__ __forceinline__ acc_t<T> get(int j) const { return values[j]; }
  __device__ __forceinline__ void set(const acc_t<T> (&from)[V]) {
#pragma unroll
    for (int j = 0; j < V; ++j) values[j] = T(from[j]);
  }
};

// Two values of a half type share a register until they are read.
template <typename T, int V>
  requires(sizeof(T) == 2 && V > 1)
struct alignas(2 * V) Vector<T, V> {
  uint32_t words[V / 2];

  __device__ __forceinline__ float get(int j) const {
    const auto bits = uint16_t(words[j / 2] >> (j % 2 * 16));
    if constexpr (std::is_same_v<T, c10::BFloat16>)
      return c10::detail::f32_from_bits(bits);
    else
      return T(bits, T::from_bits());
  }
  __device__ __forceinline__ void set(const float (&from)[V]) {
#pragma unroll
    for (int j = 0; j < V; j += 2) words[j / 2] = uint32_t(T(from[j + 1]).x) << 16 | T(from[j]).x;
  }
};

template <int V, typename T>
__device__ __forceinline__ Vector<T, V> load(const T* from, int64_t at) {
  return *reinterpret_cast<const Vector<T, V>*>(from + at);
}
template <int V, typename T>
__device__ __forceinline__ void store(T* to, int64_t at, const acc_t<T> (&values)[V]) {
  Vector<T, V> v;
  v.set(values);
  *reinterpret_cast<Vector<T, V>*>(to + at) = v;
}

template <typename T>
constexpr int whole_vector = vector_bytes / sizeof(T);

template <typename T>
bool aligned(std::initializer_list<const void*> pointers, int64_t V) {
  return std::all_of(pointers.begin(), pointers.end(), [&](const void* p) {
    return reinterpret_cast<uintptr_t>(p) % (V * sizeof(T)) == 0;
  });
}

// Calls f(T{}) with the type of `dtype`.
template <typename F>
void with_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::f64:
      return f(double{});
    case Dtype::f32:
      return f(float{});
    case Dtype::bf16:
      return f(c10::BFloat16{});
    case Dtype::f16:
      return f(c10::Half{});
  }
}

}  // namespace
}  // namespace fusedconvbn::cuda
