// Packing and unpacking of chains, and the formulas that several files share.
#include "chain.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/sqrt.h>

namespace fusedconvbn {

using at::Tensor;

// ----------------------------------------------------------------------------------------- packing

namespace {

enum class Kind : int64_t { conv = 0, norm, gate, parts, prelu };

template <typename T>
void append(std::vector<T>& to, const std::vector<T>& from) {
  to.insert(to.end(), from.begin(), from.end());
}

bool push_if(std::vector<Tensor>& tensors, const std::optional<Tensor>& t) {
  const bool present = t.has_value() && t->defined();
  if (present) tensors.push_back(*t);
  return present;
}

}  // namespace

PackedChain::PackedChain(at::TensorList input) : tensors(input.vec()) {
  if (input.size() != 1) append(links, {int64_t(Kind::parts), int64_t(input.size())});
}

void PackedChain::push(const Conv& conv, const Tensor& weight, const std::optional<Tensor>& bias) {
  tensors.push_back(weight);
  const bool has_bias = push_if(tensors, bias);
  append(links, {int64_t(Kind::conv), has_bias, conv.transposed, conv.groups,
                 int64_t(conv.stride.size())});
  for (const auto* list : {&conv.stride, &conv.padding, &conv.dilation, &conv.output_padding})
    append(links, *list);
}

void PackedChain::push(const Norm& norm, const std::optional<Tensor>& weight,
                       const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                       const std::optional<Tensor>& statistics) {
  const bool has_weight = push_if(tensors, weight), has_bias = push_if(tensors, bias);
  const bool has_residual = push_if(tensors, residual);
  push_if(tensors, statistics);
  append(links, {int64_t(Kind::norm), has_weight, has_bias, has_residual, int64_t(norm.arithmetic),
                 int64_t(norm.activation.kind)});
  append(scalars, {norm.eps, norm.activation.parameter});
}

void PackedChain::push(const Gate&, const Tensor& values) {
  tensors.push_back(values);
  links.push_back(int64_t(Kind::gate));
}

void PackedChain::push(const Prelu&, const Tensor& slopes) {
  tensors.push_back(slopes);
  links.push_back(int64_t(Kind::prelu));
}

Chain unpack(at::IntArrayRef links, at::ArrayRef<double> scalars, size_t tensor_count) {
  // Only callers of the packed form see this; conv_bn has checked its arguments by name.
  constexpr auto malformed =
      "malformed chain: `links` ends inside a link or names what there is not";
  Chain chain;
  size_t at = 0, norms = 0;
  const auto next = [&] {
    TORCH_CHECK_VALUE(at < links.size(), malformed);
    return links[at++];
  };
  const auto next_list = [&](int64_t n) {
    TORCH_CHECK_VALUE(n >= 1 && n <= 3 && at + n <= links.size(), malformed);
    at += n;
    return links.slice(at - n, n).vec();
  };
  if (!links.empty() && links[0] == int64_t(Kind::parts)) {
    next();
    chain.parts = next();
    TORCH_CHECK_VALUE(chain.parts >= 1 && chain.parts <= int64_t(tensor_count), malformed);
  }
  int64_t tensor = chain.parts;
  const auto next_tensor = [&](bool present) { return present ? tensor++ : -1; };
  while (at < links.size()) {
    const auto kind = next();
    Link link;
    if (kind == int64_t(Kind::conv)) {
      link.weight = next_tensor(true);
      link.bias = next_tensor(next());
      Conv conv;
      conv.transposed = next() != 0;
      conv.groups = next();
      const auto n = next();
      for (auto* list : {&conv.stride, &conv.padding, &conv.dilation, &conv.output_padding})
        *list = next_list(n);
      TORCH_CHECK_VALUE(conv.groups > 0, malformed);
      for (const auto stride : conv.stride) TORCH_CHECK_VALUE(stride > 0, malformed);
      link.op = conv;
    } else if (kind == int64_t(Kind::gate)) {
      link.weight = next_tensor(true);
      link.op = Gate{};
    } else if (kind == int64_t(Kind::prelu)) {
      link.weight = next_tensor(true);
      link.op = Prelu{};
    } else {
      TORCH_CHECK_VALUE(kind == int64_t(Kind::norm) && 2 * norms + 1 < scalars.size(), malformed);
      link.weight = next_tensor(next());
      link.bias = next_tensor(next());
      link.residual = next_tensor(next());
      const auto arithmetic = next(), activation = next();
      TORCH_CHECK_VALUE(arithmetic >= 0 && arithmetic <= int64_t(Arithmetic::running), malformed);
      link.statistics = next_tensor(arithmetic == int64_t(Arithmetic::running));
      TORCH_CHECK_VALUE(activation >= 0 && activation < int64_t(activation_table.size()),
                        malformed);
      const Norm norm{scalars[2 * norms],
                      static_cast<Arithmetic>(arithmetic),
                      {static_cast<ActivationKind>(activation), scalars[2 * norms + 1]}};
      TORCH_CHECK_VALUE(norm.normalises() || (link.weight < 0 && link.bias < 0), malformed);
      link.op = norm;
      ++norms;
    }
    chain.push_back(std::move(link));
  }
  TORCH_CHECK_VALUE(
      !chain.empty() && 2 * norms == scalars.size() && tensor == int64_t(tensor_count), malformed);
  return chain;
}

std::vector<int64_t> saved_result(const Norm& last, bool has_residual, int64_t links) {
  const bool saved = last.activation.slope_from_result() && (has_residual || !last.normalises());
  return saved ? std::vector<int64_t>{links} : std::vector<int64_t>{};
}

bool last_residual_is_read(const Chain& chain, at::IntArrayRef saved) {
  const auto* norm = chain.back().norm();
  if (!norm || norm->activation.none()) return false;
  const bool result_is_saved = !saved.empty() && saved.back() == int64_t(chain.size());
  return !(result_is_saved && norm->activation.slope_from_result());
}

void check_indices(const char* name, at::IntArrayRef indices, int64_t first, int64_t last) {
  int64_t least = first;
  for (const auto i : indices) {
    TORCH_CHECK_VALUE(i >= least && i <= last, "expected `", name, "` between ", first, " and ",
                      last, ", ascending, got ", indices);
    least = i + 1;
  }
}

// ------------------------------------------------------------------------------------- mathematics

namespace {

// s of the table in chain.h
Tensor unbiased_std(const Tensor& var, const c10::SymInt& count) {
  return at::sqrt(var * at::Scalar(c10::SymFloat(count) / c10::SymFloat(count - 1)));
}

}  // namespace

Tensor inverse_std(const Norm& norm, const Tensor& var, const c10::SymInt& count) {
  return norm.arithmetic == Arithmetic::tutorial
             ? (unbiased_std(var, count) + norm.eps).reciprocal()
             : at::rsqrt(var + norm.eps);
}

Tensor inverse_running_std(const Norm& norm, const Tensor& running_var) {
  return norm.arithmetic == Arithmetic::tutorial ? (at::sqrt(running_var) + norm.eps).reciprocal()
                                                 : at::rsqrt(running_var + norm.eps);
}

Tensor concatenated(at::TensorList parts) {
  return parts.size() == 1 ? parts[0] : at::cat(parts, 1);
}

}  // namespace fusedconvbn
