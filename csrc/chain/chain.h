// A chain: maps T_0 … T_n, where link i computes T_{i+1} from T_i.
//
//   conv    T' = conv(T, weight) + bias
//   norm    T' = act(u),  u = (T − μ)·a + β [+ residual]    per channel; batch statistics of T
//   gate    T' = T·s                                        s is (N, C, 1, …): per sample, channel
//   prelu   T' = T where T > 0, T·s elsewhere               s is (C) or (1): per channel, or one
//
// The backward of a link reads the link's input. The backward of a norm link also reads its
// residual or, if act' follows from the result, its result. A plan names the maps that are saved.
// Backward recomputes the other inner maps, each from the nearest saved map before it and with the
// statistics that forward computed.
//
// T_0 may be a list of tensors, a virtual concatenation of their channels: it is computed when a
// link reads it and freed after that. Statistics are per channel, so the statistics of T_0 are
// those of its parts and the caller may pass them in.
//
//   a = γ·r      κ = (a/R)·r·ρ      r = 1/√(v + eps)      ρ = r                  batchnorm
//                                   r = 1/(s + eps)       ρ = R/((R−1)·s)        tutorial
//                                                         s = √(v·R/(R−1))
//
//   du = act'(u)·dout      S1 = Σ du      S2 = Σ du·(T − μ)      d residual = du
//   dβ = S1      dγ = r·S2      dT = a·du − κ·S2·(T − μ) − (a/R)·S1
//
// μ is the mean, v the biased variance, R the number of values per channel; γ and β are affine (1
// and 0 when absent). In a synchronised chain μ, v, R and the sums in dT are those of all processes
// of a group, dβ and dγ those of this one.
//
// A link of arithmetic `running` is given μ and v, which do not depend on T: dT = a·du. A link of
// arithmetic `none` has neither statistics nor γ and β: u = T [+ residual], dT = du.
//
// A gate has ds = Σ dout·T over the positions and dT = dout·s. A prelu has dT = dout where T > 0
// and dout·s elsewhere, and ds = Σ dout·T over the values that are not above 0.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>
#include <variant>
#include <vector>

#include "../kernels/activation.h"
#include "../kernels/conv.h"

namespace fusedconvbn {

enum class Arithmetic : int64_t { batchnorm = 0, tutorial, none, running };

struct Norm {
  double eps;
  Arithmetic arithmetic;
  Activation activation;

  bool normalises() const { return arithmetic != Arithmetic::none; }
  bool batch_statistics() const { return normalises() && arithmetic != Arithmetic::running; }
  // Whether T' = T, apart from a residual.
  bool identity() const { return !normalises() && activation.none(); }
};

struct Gate {};

struct Prelu {};

struct Link {
  std::variant<Conv, Norm, Gate, Prelu> op;
  // indices of `tensors`, -1 when absent; the weight of a gate or prelu is s
  int64_t weight = -1, bias = -1, residual = -1, statistics = -1;

  const Conv* conv() const { return std::get_if<Conv>(&op); }
  const Norm* norm() const { return std::get_if<Norm>(&op); }
  bool gate() const { return std::holds_alternative<Gate>(op); }
  bool prelu() const { return std::holds_alternative<Prelu>(op); }
  bool normalises() const { return norm() && norm()->normalises(); }
};

struct Chain : std::vector<Link> {
  int64_t parts = 1;  // the number of tensors whose concatenation is T_0
};

// A chain as it crosses the dispatcher; `unpack` is its inverse. (In Python: fusedconvbn/chain.py.)
//
//   tensors   T_0 or its parts; then of each link its weight, bias, residual and (2, C) running
//             statistics, without those that are absent
//   links     conv:   0, has_bias, transposed, groups, d,
//                     stride[d], padding[d], dilation[d], output_padding[d]
//             norm:   1, has_weight, has_bias, has_residual, arithmetic, activation
//             gate:   2
//             prelu:  4
//             before all links, if T_0 has parts: 3, parts
//   scalars   of each norm link eps and the parameter of its activation
struct PackedChain {
  std::vector<at::Tensor> tensors;
  std::vector<int64_t> links;
  std::vector<double> scalars;

  explicit PackedChain(at::TensorList input);
  void push(const Conv& conv, const at::Tensor& weight, const std::optional<at::Tensor>& bias);
  void push(const Norm& norm, const std::optional<at::Tensor>& weight,
            const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual,
            const std::optional<at::Tensor>& statistics = {});
  void push(const Gate& gate, const at::Tensor& values);
  void push(const Prelu& prelu, const at::Tensor& slopes);
};

Chain unpack(at::IntArrayRef links, at::ArrayRef<double> scalars, size_t tensor_count);

// The results of a chain (dispatch.h): T_n, the inner maps that are saved, and the statistics.
using ChainResult = std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>>;

// {links}, the index of the result, if a chain of so many links must save its result: act' of the
// last link follows from the result, and could otherwise only be computed from a recomputed map. An
// empty list if not.
std::vector<int64_t> saved_result(const Norm& last, bool has_residual, int64_t links);

// Whether the backward of the last link reads its residual when the maps at `saved` are saved.
bool last_residual_is_read(const Chain& chain, at::IntArrayRef saved);

// Raises an error unless the indices ascend and lie within first … last.
void check_indices(const char* name, at::IntArrayRef indices, int64_t first, int64_t last);

// r of the table above in differentiable operations, from the biased variance of `count` values or
// from a running variance, which is unbiased. (The kernels compute theirs in channel_vectors.h.)
at::Tensor inverse_std(const Norm& norm, const at::Tensor& var, const c10::SymInt& count);
at::Tensor inverse_running_std(const Norm& norm, const at::Tensor& running_var);

// Whether link i is a convolution in front of batch statistics. Its bias only shifts the mean, so
// it is left out and its gradient is 0.
inline bool bias_cancels(const Chain& chain, size_t i) {
  return chain[i].conv() && i + 1 < chain.size() && chain[i + 1].norm() &&
         chain[i + 1].norm()->batch_statistics();
}

// The concatenation of `parts`, or the one tensor itself.
at::Tensor concatenated(at::TensorList parts);

}  // namespace fusedconvbn
