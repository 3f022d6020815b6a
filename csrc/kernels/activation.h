// The activations that a norm link can have, shared by the CPU and CUDA kernels.
#pragma once

#include <array>
#include <string_view>
#include <type_traits>

#include "elementary.h"

namespace fusedconvbn {

// The functors of the activations: `forward` is act(u), `backward` is act'(u)·dout. NaN propagates.
//
// A cheap activation consists of comparisons and a few products: computing it twice costs nothing
// compared with reading its argument from memory.
struct Cheap {
  static constexpr bool cheap = true;
};
struct Expensive {
  static constexpr bool cheap = false;
};

struct Identity : Cheap {
  template <typename T>
  FUSEDCONVBN_INLINE T forward(T u) const {
    return u;
  }
  template <typename T>
  FUSEDCONVBN_INLINE T backward(T, T dout) const {
    return dout;
  }
};

struct Relu : Cheap {
  template <typename T>
  FUSEDCONVBN_INLINE T forward(T u) const {
    return u <= T(0) ? T(0) : u;
  }
  template <typename T>
  FUSEDCONVBN_INLINE T backward(T u, T dout) const {
    return u <= T(0) ? T(0) : dout;
  }
};

struct Relu6 : Cheap {
  template <typename T>
  FUSEDCONVBN_INLINE T forward(T u) const {
    return clamp(u, T(0), T(6));
  }
  template <typename T>
  FUSEDCONVBN_INLINE T backward(T u, T dout) const {
    return u <= T(0) || u >= T(6) ? T(0) : dout;
  }
};

struct LeakyRelu : Cheap {
  static constexpr double usual = 0.01;
  double slope;
  template <typename T>
  FUSEDCONVBN_INLINE T forward(T u) const {
    return u > T(0) ? u : u * T(slope);
  }
  template <typename T>
  FUSEDCONVBN_INLINE T backward(T u, T dout) const {
    return u > T(0) ? dout : dout * T(slope);
  }
};

struct Elu : Expensive {
  static constexpr double usual = 1;
  double alpha;
  template <typename T>
  FUSEDCONVBN_INLINE T forward(T u) const {
    const T below = T(alpha) * exponential_minus_one(u);
    return u > T(0) ? u : below;
  }
  template <typename T>
  FUSEDCONVBN_INLINE T backward(T u, T dout) const {
    const T below = dout * (T(alpha) * exponential(u));
    return u > T(0) ? dout : below;
  }
};

struct Silu : Expensive {  // u·σ(u)
  template <typename T>
  FUSEDCONVBN_INLINE T forward(T u) const {
    return u * sigmoid(u);
  }
  template <typename T>
  FUSEDCONVBN_INLINE T backward(T u, T dout) const {
    const T s = sigmoid(u);
    return dout * (s * (T(1) + u * (T(1) - s)));
  }
};

struct Hardswish : Cheap {  // u·relu6(u + 3)/6
  template <typename T>
  FUSEDCONVBN_INLINE T forward(T u) const {
    return u * clamp(u + T(3), T(0), T(6)) * T(1. / 6);
  }
  template <typename T>
  FUSEDCONVBN_INLINE T backward(T u, T dout) const {
    return u <= T(-3) ? T(0) : u >= T(3) ? dout : dout * (u * T(1. / 3) + T(0.5));
  }
};

struct Gelu : Expensive {  // u·Φ(u)
  template <typename T>
  FUSEDCONVBN_INLINE T forward(T u) const {
    return u * normal(u).below;
  }
  template <typename T>
  FUSEDCONVBN_INLINE T backward(T u, T dout) const {
    const auto n = normal(u);
    return dout * (n.below + u * n.density);
  }
};

struct GeluTanh : Expensive {  // u·(1 + tanh v)/2,  v = √(2/π)·(u + 0.044715·u³)
  static constexpr double root = 0.79788456080286536, cubic = 0.044715;

  template <typename T>
  static FUSEDCONVBN_INLINE T tanh_of(T u) {
    return hyperbolic_tangent(T(root) * (u + T(cubic) * u * u * u));
  }
  template <typename T>
  FUSEDCONVBN_INLINE T forward(T u) const {
    return T(0.5) * u * (T(1) + tanh_of(u));
  }
  template <typename T>
  FUSEDCONVBN_INLINE T backward(T u, T dout) const {
    const T t = tanh_of(u);
    const T dv = T(root) * (T(1) + T(3 * cubic) * u * u);
    return dout * (T(0.5) * (T(1) + t) + T(0.5) * u * (T(1) - t * t) * dv);
  }
};

// u·t,  t = tanh(log(1 + eᵘ)) = n/(n + 2),  n = eᵘ(eᵘ + 2);  t rounds to 1 long before u = 20
struct Mish : Expensive {
  template <typename T>
  FUSEDCONVBN_INLINE T forward(T u) const {
    const T e = exponential(clamp(u, T(-1e4), T(20))), n = e * (e + T(2));
    return u * (n / (n + T(2)));
  }
  template <typename T>
  FUSEDCONVBN_INLINE T backward(T u, T dout) const {  // t + u·(1 − t²)·σ(u)
    const T bounded = clamp(u, T(-1e4), T(20));
    const T e = exponential(bounded), n = e * (e + T(2)), inverse = T(1) / (n + T(2));
    const T rest = T(4) * (n + T(1)) * inverse * inverse;
    return dout * (n * inverse + bounded * rest * (e / (T(1) + e)));
  }
};

struct Sigmoid : Expensive {
  template <typename T>
  FUSEDCONVBN_INLINE T forward(T u) const {
    return sigmoid(u);
  }
  template <typename T>
  FUSEDCONVBN_INLINE T backward(T u, T dout) const {
    const T s = sigmoid(u);
    return dout * (s * (T(1) - s));
  }
};

struct Tanh : Expensive {
  template <typename T>
  FUSEDCONVBN_INLINE T forward(T u) const {
    return hyperbolic_tangent(u);
  }
  template <typename T>
  FUSEDCONVBN_INLINE T backward(T u, T dout) const {
    const T t = hyperbolic_tangent(u);
    return dout * (T(1) - t * t);
  }
};

// The table of activations: name and functor. Their order numbers them in the packed form of a
// chain (chain/chain.h) and in fusedconvbn/activations.py.
#define FUSEDCONVBN_ACTIVATIONS(ACTIVATION) \
  ACTIVATION(none, Identity)                \
  ACTIVATION(relu, Relu)                    \
  ACTIVATION(relu6, Relu6)                  \
  ACTIVATION(leaky_relu, LeakyRelu)         \
  ACTIVATION(elu, Elu)                      \
  ACTIVATION(silu, Silu)                    \
  ACTIVATION(hardswish, Hardswish)          \
  ACTIVATION(gelu, Gelu)                    \
  ACTIVATION(gelu_tanh, GeluTanh)           \
  ACTIVATION(mish, Mish)                    \
  ACTIVATION(sigmoid, Sigmoid)              \
  ACTIVATION(tanh, Tanh)

#define FUSEDCONVBN_KIND(name, Functor) name,
enum class ActivationKind : int64_t { FUSEDCONVBN_ACTIVATIONS(FUSEDCONVBN_KIND) };
#undef FUSEDCONVBN_KIND

struct ActivationEntry {
  std::string_view name;
  bool cheap, has_parameter;
  double parameter;  // the default

  template <typename Functor>
  static constexpr ActivationEntry of(std::string_view name) {
    if constexpr (std::is_empty_v<Functor>)
      return {name, Functor::cheap, false, 0};
    else
      return {name, Functor::cheap, true, Functor::usual};
  }
};

#define FUSEDCONVBN_ENTRY(name, Functor) ActivationEntry::of<Functor>(#name),
constexpr std::array activation_table{FUSEDCONVBN_ACTIVATIONS(FUSEDCONVBN_ENTRY)};
#undef FUSEDCONVBN_ENTRY

struct Activation {
  ActivationKind kind = ActivationKind::none;
  double parameter = 0;  // the slope of leaky_relu, α of elu

  bool none() const { return kind == ActivationKind::none; }
  // Whether act'(u) follows from act(u). Then act(u) can be saved instead of u, as PyTorch does.
  bool slope_from_result() const { return kind == ActivationKind::relu; }
  bool cheap() const { return activation_table[size_t(kind)].cheap; }
};

template <typename Functor>
FUSEDCONVBN_INLINE Functor functor_of(const Activation& activation) {
  if constexpr (std::is_empty_v<Functor>)
    return {};
  else
    return {{}, activation.parameter};
}

// Calls f with the functor of `activation`.
template <typename F>
FUSEDCONVBN_INLINE void with_activation(const Activation& activation, const F& f) {
  switch (activation.kind) {
#define FUSEDCONVBN_CASE(name, Functor) \
  case ActivationKind::name:            \
    return f(functor_of<Functor>(activation));
    FUSEDCONVBN_ACTIVATIONS(FUSEDCONVBN_CASE)
#undef FUSEDCONVBN_CASE
  }
}

}  // namespace fusedconvbn
