// The public operator conv_bn. It checks its arguments, runs a chain of two links and updates the
// running statistics; in eval mode it runs the folded convolution. It is composite, so eager mode,
// TorchScript, torch.compile and export all run the same steps.
#include <ATen/TensorOperators.h>
#include <ATen/ops/batch_norm.h>
#include <ATen/ops/convolution.h>

#include <charconv>
#include <cmath>
#include <limits>

#include "arguments.h"
#include "autocast/autocast.h"
#include "chain/convolution.h"
#include "chain/dispatch.h"
#include "chain/tensors.h"
#include "chain/unfused.h"
#include "ops.h"
#include "running.h"

namespace fusedconvbn {

using at::Tensor;

namespace {

// "leaky_relu" or "leaky_relu(0.2)"
Activation parse_activation(std::string_view text) {
  const auto open = text.find('(');
  const auto name = text.substr(0, open);
  const auto* found = std::find_if(activation_table.begin(), activation_table.end(),
                                   [&](const auto& entry) { return entry.name == name; });
  Activation activation;
  bool well_formed = found != activation_table.end();
  if (well_formed) {
    activation.kind = static_cast<ActivationKind>(found - activation_table.begin());
    activation.parameter = found->parameter;
    if (open != text.npos) {
      const auto *first = text.data() + open + 1, *last = text.data() + text.size();
      const auto [end, error] = std::from_chars(first, last, activation.parameter);
      well_formed = found->has_parameter && error == std::errc() && end + 1 == last &&
                    *end == ')' && std::isfinite(activation.parameter);
    }
  }
  std::string names;
  if (!well_formed)
    for (const auto& known : activation_table)
      names += (names.empty() ? "'" : ", '") + std::string(known.name) + "'";
  TORCH_CHECK_VALUE(well_formed, "conv_bn: expected activation to be one of ", names,
                    ", or 'leaky_relu(slope)' or 'elu(alpha)' with a number, got '", text, "'");
  return activation;
}

Arithmetic parse_arithmetic(std::string_view name) {
  if (name == "batchnorm") return Arithmetic::batchnorm;
  if (name == "tutorial") return Arithmetic::tutorial;
  TORCH_CHECK_VALUE(false, "conv_bn: expected arithmetic 'batchnorm' or 'tutorial', got '", name,
                    "'");
}

// Returns one value for each of the n spatial dimensions. A single given value applies to all of
// them; without any, each is `absent`.
std::vector<int64_t> spatial(const char* name, at::OptionalIntArrayRef given, size_t n,
                             int64_t least, int64_t absent) {
  if (!given) return std::vector<int64_t>(n, absent);
  const auto values = *given;
  TORCH_CHECK_VALUE(values.size() == 1 || values.size() == n, "conv_bn: expected ", name,
                    " of 1 or ", n, " values (one for each spatial dimension), got ", values);
  for (const auto v : values)
    TORCH_CHECK_VALUE(v >= least && v <= std::numeric_limits<int32_t>::max(), "conv_bn: expected ",
                      name, " of at ", v < least ? "least " : "most ",
                      v < least ? least : std::numeric_limits<int32_t>::max(), ", got ", values);
  return values.size() == n ? values.vec() : std::vector<int64_t>(n, values[0]);
}

Tensor plain_convolution(const ConvArguments& arguments, const Tensor& input) {
  const auto& [conv, weight, bias] = arguments;
  const auto dtype = conv_dtype(input);
  const auto run = [&](const Optional& bias) {
    return at::convolution(input.to(dtype), weight.to(dtype), bias, conv.stride, conv.padding,
                           conv.dilation, conv.transposed, conv.output_padding, conv.groups);
  };
  if (!bias) return run({});
  if (!reads_padding_alone(conv, input, weight)) return run(bias->to(dtype));
  std::vector<int64_t> per_channel(weight.dim(), 1);
  per_channel[1] = -1;
  return run({}) + bias->to(dtype).reshape(per_channel);
}

// Eval mode: runs the chain conv → activation with the folded weight. If the chain has no
// advantage, or for a compiler if nothing requires grad, runs PyTorch's own convolution.
Tensor folded(const Tensor& input, const ConvArguments& conv, const NormArguments& norm) {
  const auto [weight, shift] = fold(conv, norm);
  const auto& activation = norm.norm.activation;
  const auto dtype = conv_dtype(input);
  const bool half = dtype == at::kBFloat16 || dtype == at::kHalf;
  const bool traced = is_traced(input);
  const bool plain =
      activation.none() && !half && (traced || !steps_over_few_channels(conv.conv, input, weight));
  if (plain ||
      (traced && !any_requires_grad({input, conv.weight, conv.bias.value_or(Tensor()),
                                     norm.weight.value_or(Tensor()), norm.bias.value_or(Tensor()),
                                     norm.residual.value_or(Tensor())})))
    return finish(plain_convolution({conv.conv, weight, shift}, input), norm.residual, activation);

  // The folded weight and the shift stay in float32, and so do their gradients.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  PackedChain chain(input.to(dtype));
  chain.push(conv.conv, weight, shift);
  Norm activated = norm.norm;
  activated.arithmetic = Arithmetic::none;
  if (!activation.none() || norm.residual)
    chain.push(activated, {}, {},
               norm.residual ? Optional(norm.residual->to(dtype)) : norm.residual);
  return std::get<0>(chain_forward(chain.tensors, chain.links, chain.scalars, "",
                                   saved_result(activated, norm.residual.has_value(), 2), {}));
}

}  // namespace

Tensor conv_bn(const Tensor& input, const Tensor& weight, const Optional& bias,
               const Optional& bn_weight, const Optional& bn_bias, const Optional& running_mean,
               const Optional& running_var, const Optional& num_batches_tracked,
               const Optional& residual, bool training, std::optional<double> momentum, double eps,
               at::OptionalIntArrayRef stride, at::OptionalIntArrayRef padding,
               at::OptionalIntArrayRef dilation, bool transposed,
               at::OptionalIntArrayRef output_padding, int64_t groups, std::string_view activation,
               std::string_view arithmetic, std::string_view process_group) {
  // All arguments are checked before anything is computed.
  const std::string op = "conv_bn";
  const NormArguments norm{{eps, parse_arithmetic(arithmetic), parse_activation(activation)},
                           bn_weight,
                           bn_bias,
                           running_mean,
                           running_var,
                           num_batches_tracked,
                           residual,
                           training,
                           momentum};
  const bool synchronised = training && !process_group.empty();
  TORCH_CHECK_VALUE(!synchronised || norm.norm.arithmetic == Arithmetic::batchnorm,
                    "conv_bn: expected arithmetic 'batchnorm' with a process_group, got '",
                    arithmetic, "'");
  check_tensor(op, "input", input, input);
  check_tensor(op, "weight", weight, input);
  const size_t n = std::clamp<int64_t>(weight.dim() - 2, 1, 3);
  const ConvArguments conv{
      {spatial("stride", stride, n, 1, 1), spatial("padding", padding, n, 0, 0),
       spatial("dilation", dilation, n, 1, 1), spatial("output_padding", output_padding, n, 0, 0),
       transposed, groups},
      weight,
      bias};
  const auto sizes = check_conv(op, input, input.sym_sizes(), conv);
  check_norm(op, "bn_", input, sizes, norm, synchronised);
  if (!training) return folded(input, conv, norm);

  RunningUpdates updates;
  Tensor output;
  if (input.sym_size(0) == 0 && process_group.empty()) {  // a batch without statistics
    output = finish(at::batch_norm(plain_convolution(conv, input), bn_weight, bn_bias, {}, {}, true,
                                   /*momentum=*/0, eps, false),
                    residual, norm.norm.activation);
    updates.add(norm);
  } else {
    PackedChain chain(input);
    chain.push(conv.conv, weight, bias);
    chain.push(norm.norm, bn_weight, bn_bias, residual);
    const auto result = chain_forward(chain.tensors, chain.links, chain.scalars, process_group,
                                      saved_result(norm.norm, residual.has_value(), 2), {});
    output = std::get<0>(result);
    updates.add(norm, std::get<2>(result)[0], sizes, bias, synchronised);
  }
  updates.write();
  return output;
}

}  // namespace fusedconvbn
