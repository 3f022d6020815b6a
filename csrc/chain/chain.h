// A chain: maps T_0 … T_n with link i making T_{i+1} from T_i.
//
//   conv   T' = conv(T, weight) + bias
//   norm   T' = act(u),  u = (T − μ)·a + β [+ residual]   per channel, with the batch statistics of
//   T gate   T' = T·s                                       s is (N, C, 1, …): a value per sample
//   and channel prelu  T' = T where T > 0, T·s elsewhere              s is (C) or (1): a value per
//   channel, or one
//
// The backward of a link reads its input; a norm link's also its residual, or, where act' shows in
// it, its result, and nothing else. A plan names the maps that are kept; of the inner ones the
// others are remade in backward from the nearest kept one before them, with the statistics already
// known.
//
// T_0 may be a list of tensors, a virtual concatenation of their channels: it is made where a link
// reads it, and let go of. Statistics are per channel, so those of T_0 are those of its parts, and
// may be given.
//
//   a = γ·r      κ = (a/R)·r·ρ      r = 1/√(v + eps)      ρ = r                  batchnorm
//                                   r = 1/(s + eps)       ρ = R/((R−1)·s)        tutorial, s =
//                                   √(v·R/(R−1))
//
//   du = act'(u)·dout      S1 = Σ du      S2 = Σ du·(T − μ)      d residual = du
//   dβ = S1      dγ = r·S2      dT = a·du − κ·S2·(T − μ) − (a/R)·S1
//
// μ mean, v biased variance, R values per channel, γ and β affine (1 and 0 when absent). In a
// synchronised chain μ, v, R and the sums in dT are those of all processes of a group, dβ and dγ of
// this one.
//
// A link of arithmetic `running` is given μ and v, which do not depend on T: dT = a·du. One of
// arithmetic `none` has neither statistics nor γ and β: it is its activation, u = T [+ residual],
// dT = du.
//
// Of a gate: ds = Σ dout·T over the positions, dT = dout·s. Of a prelu: dT is dout where T > 0,
// dout·s elsewhere, and ds = Σ dout·T over what is elsewhere.
#pragma once

#include <ATen/core/Tensor.h>

#include <variant>
#include <vector>

#include "../kernels/activation.h"
#include "convolution.h"

namespace fusedconvbn {

enum class Arithmetic : int64_t { batchnorm = 0, tutorial, none, running };

struct Norm {
  double eps;
  Arithmetic arithmetic;
  Activation activation;

  bool normalises() const { return arithmetic != Arithmetic::none; }
  bool batch_statistics() const { return normalises() && arithmetic != Arithmetic::running; }
  bool identity() const { return !normalises() && activation.none(); }  // but for a residual
};

struct Gate {};

struct Prelu {};

struct Link {
  std::variant<Conv, Norm, Gate, Prelu> op;
  // places in `tensors`, -1 when absent; the weight of a gate or prelu is s
  int64_t weight = -1, bias = -1, residual = -1, statistics = -1;

  const Conv* conv() const { return std::get_if<Conv>(&op); }
  const Norm* norm() const { return std::get_if<Norm>(&op); }
  bool gate() const { return std::holds_alternative<Gate>(op); }
  bool prelu() const { return std::holds_alternative<Prelu>(op); }
  bool normalises() const { return norm() && norm()->normalises(); }
};

struct Chain : std::vector<Link> {
  int64_t parts = 1;  // tensors that T_0 is the concatenation of
};

// A chain as it crosses the dispatcher; `unpack` is the way back. (fusedconvbn/chain.py is this in
// Python.)
struct PackedChain {
  std::vector<at::Tensor> tensors;  // T_0 or its parts, then of each link its weight, bias,
                                    // residual and (2, C) running statistics, as far as present
  std::vector<int64_t>
      links;  // conv: 0, has_bias, transposed, groups, d,
              //       stride[d], padding[d], dilation[d], output_padding[d]
              // norm: 1, has_weight, has_bias, has_residual, arithmetic, activation
              // gate: 2
              // prelu: 4
              // before them, if T_0 has parts: 3, parts
  std::vector<double> scalars;  // of each norm link eps and the parameter of its activation

  explicit PackedChain(at::TensorList input);
  void push(const Conv& conv, const at::Tensor& weight, const std::optional<at::Tensor>& bias);
  void push(const Norm& norm, const std::optional<at::Tensor>& weight,
            const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual,
            const std::optional<at::Tensor>& statistics = {});
  void push(const Gate& gate, const at::Tensor& values);
  void push(const Prelu& prelu, const at::Tensor& slopes);
};

Chain unpack(at::IntArrayRef links, at::ArrayRef<double> scalars, size_t tensor_count);

// Whether the backward of the last link reads its residual when the maps at `kept` are.
bool last_residual_is_read(const Chain& chain, at::IntArrayRef kept);

// An error unless the places ascend and are among first … last.
void check_places(const char* name, at::IntArrayRef places, int64_t first, int64_t last);

// r of the table above as differentiable operations (the kernels': channel_vectors.h), from the
// biased variance of `count` values or from a running variance, which is unbiased.
at::Tensor inverse_std(const Norm& norm, const at::Tensor& var, const c10::SymInt& count);
at::Tensor inverse_running_std(const Norm& norm, const at::Tensor& running_var);

// A convolution's bias in front of batch statistics shifts the mean and nothing else: it is left
// out, and its gradient is 0.
inline bool bias_cancels(const Chain& chain, size_t i) {
  return chain[i].conv() && i + 1 < chain.size() && chain[i + 1].norm() &&
         chain[i + 1].norm()->batch_statistics();
}

// The concatenation of `parts`, or the one tensor itself.
at::Tensor concatenated(at::TensorList parts);

}  // namespace fusedconvbn
