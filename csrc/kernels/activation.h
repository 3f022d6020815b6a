// The activations a norm link can carry, one functor each, shared by the CPU and CUDA kernels.
#pragma once

#include "elementary.h"

namespace fusedconvbn {

// The numbers are part of the packed form of a chain (chain.h).
enum class ActivationKind : int64_t {
  none = 0,
  relu,
  relu6,
  leaky_relu,
  elu,
  silu,
  hardswish,
  gelu,
  gelu_tanh,
  mish,
  sigmoid,
  tanh,
};
constexpr int64_t activation_kinds = 12;

struct Activation {
  ActivationKind kind = ActivationKind::none;
  double parameter = 0;  // the slope of leaky_relu, α of elu

  bool none() const { return kind == ActivationKind::none; }
  // Whether act'(u) can be had from act(u), which then is kept, as by PyTorch's own.
  bool slope_from_result() const { return kind == ActivationKind::relu; }
  // Made of comparisons and a few products, so that making it again costs nothing beside the memory
  // it is read from.
  bool cheap() const {
    return kind <= ActivationKind::leaky_relu || kind == ActivationKind::hardswish;
  }
};

// u is the normalised value; `forward` is act(u), `backward` is act'(u)·dout. Both let NaN through.
struct Identity {
  template <typename T>
  FUSEDCONVBN_INLINE T forward(T u) const {
    return u;
  }
  template <typename T>
  FUSEDCONVBN_INLINE T backward(T, T dout) const {
    return dout;
  }
};

struct Relu {
  template <typename T>
  FUSEDCONVBN_INLINE T forward(T u) const {
    return u <= T(0) ? T(0) : u;
  }
  template <typename T>
  FUSEDCONVBN_INLINE T backward(T u, T dout) const {
    return u <= T(0) ? T(0) : dout;
  }
};

struct Relu6 {
  template <typename T>
  FUSEDCONVBN_INLINE T forward(T u) const {
    return clamp(u, T(0), T(6));
  }
  template <typename T>
  FUSEDCONVBN_INLINE T backward(T u, T dout) const {
    return u <= T(0) || u >= T(6) ? T(0) : dout;
  }
};

struct LeakyRelu {
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

struct Elu {
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

struct Silu {  // u·σ(u)
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

struct Hardswish {  // u·relu6(u + 3)/6
  template <typename T>
  FUSEDCONVBN_INLINE T forward(T u) const {
    return u * clamp(u + T(3), T(0), T(6)) * T(1. / 6);
  }
  template <typename T>
  FUSEDCONVBN_INLINE T backward(T u, T dout) const {
    return u <= T(-3) ? T(0) : u >= T(3) ? dout : dout * (u * T(1. / 3) + T(0.5));
  }
};

struct Gelu {  // u·Φ(u)
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

struct GeluTanh {  // u·(1 + tanh v)/2,  v = √(2/π)·(u + 0.044715·u³)
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

struct Mish {  // u·t,  t = tanh(log(1 + eᵘ)) = n/(n + 2),  n = eᵘ(eᵘ + 2);  t is 1 to the last bit
               // long before u = 20
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

struct Sigmoid {
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

struct Tanh {
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

// Calls f with the functor of `activation`.
template <typename F>
FUSEDCONVBN_INLINE void with_activation(const Activation& activation, const F& f) {
  switch (activation.kind) {
    case ActivationKind::none:
      return f(Identity{});
    case ActivationKind::relu:
      return f(Relu{});
    case ActivationKind::relu6:
      return f(Relu6{});
    case ActivationKind::leaky_relu:
      return f(LeakyRelu{activation.parameter});
    case ActivationKind::elu:
      return f(Elu{activation.parameter});
    case ActivationKind::silu:
      return f(Silu{});
    case ActivationKind::hardswish:
      return f(Hardswish{});
    case ActivationKind::gelu:
      return f(Gelu{});
    case ActivationKind::gelu_tanh:
      return f(GeluTanh{});
    case ActivationKind::mish:
      return f(Mish{});
    case ActivationKind::sigmoid:
      return f(Sigmoid{});
    case ActivationKind::tanh:
      return f(Tanh{});
  }
}

}  // namespace fusedconvbn
