// The public operator: checks, the folded convolution of eval mode, and the running statistics around a chain of two
// links. It is composite, so eager, TorchScript, compile and export all run the same steps.
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/batch_norm.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/where.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <charconv>
#include <cmath>
#include <limits>

#include "autocast/autocast.h"
#include "chain.h"
#include "ops.h"
#include "unfused.h"

namespace fusedconvbn {
namespace {

using Optional = std::optional<Tensor>;

struct Arguments {
  Conv conv;
  Norm norm;
};

constexpr std::pair<std::string_view, ActivationKind> activations[] = {
    {"none", ActivationKind::none},   {"relu", ActivationKind::relu},
    {"relu6", ActivationKind::relu6}, {"leaky_relu", ActivationKind::leaky_relu},
    {"elu", ActivationKind::elu},     {"silu", ActivationKind::silu},
    {"mish", ActivationKind::mish},   {"hardswish", ActivationKind::hardswish},
    {"gelu", ActivationKind::gelu},   {"gelu_tanh", ActivationKind::gelu_tanh},
    {"tanh", ActivationKind::tanh},   {"sigmoid", ActivationKind::sigmoid},
};

// "leaky_relu" or "leaky_relu(0.2)"
Activation parse_activation(std::string_view text) {
  const auto open = text.find('(');
  const auto name = text.substr(0, open);
  const auto* found = std::find_if(std::begin(activations), std::end(activations),
                                   [&](const auto& activation) { return activation.first == name; });
  Activation activation;
  bool well_formed = found != std::end(activations);
  if (well_formed) {
    activation.kind = found->second;
    const bool leaky = activation.kind == ActivationKind::leaky_relu;
    const bool has_parameter = leaky || activation.kind == ActivationKind::elu;
    if (has_parameter) activation.parameter = leaky ? 0.01 : 1;
    if (open != text.npos) {
      const auto *first = text.data() + open + 1, *last = text.data() + text.size();
      const auto [end, error] = std::from_chars(first, last, activation.parameter);
      well_formed = has_parameter && error == std::errc() && end + 1 == last && *end == ')' &&
                    std::isfinite(activation.parameter);
    }
  }
  std::string names;
  if (!well_formed)
    for (const auto& known : activations) names += (names.empty() ? "'" : ", '") + std::string(known.first) + "'";
  TORCH_CHECK_VALUE(well_formed, "conv_bn: expected activation to be one of ", names,
                    ", or 'leaky_relu(slope)' or 'elu(alpha)' with a number, got '", text, "'");
  return activation;
}

Arithmetic parse_arithmetic(std::string_view name) {
  if (name == "batchnorm") return Arithmetic::batchnorm;
  if (name == "tutorial") return Arithmetic::tutorial;
  TORCH_CHECK_VALUE(false, "conv_bn: expected arithmetic 'batchnorm' or 'tutorial', got '", name, "'");
}

// One value for each of the n spatial dimensions; a single one stands for all.
std::vector<int64_t> spatial(const char* name, at::IntArrayRef values, size_t n, int64_t least) {
  TORCH_CHECK_VALUE(values.size() == 1 || values.size() == n, "conv_bn: expected ", name, " of 1 or ", n,
                    " values (one for each spatial dimension), got ", values);
  for (const auto v : values)
    TORCH_CHECK_VALUE(v >= least && v <= std::numeric_limits<int32_t>::max(), "conv_bn: expected ", name, " of at ",
                      v < least ? "least " : "most ", v < least ? least : std::numeric_limits<int32_t>::max(), ", got ",
                      values);
  return values.size() == n ? values.vec() : std::vector<int64_t>(n, values[0]);
}

void check_tensor(const char* name, const Tensor& t, const Tensor& input) {
  TORCH_CHECK_VALUE(t.defined(), "conv_bn: expected ", name, " to be a tensor, got an undefined one");
  TORCH_CHECK_TYPE(!t.is_quantized(), "conv_bn: expected ", name, " to be dense, got a quantised tensor");
  TORCH_CHECK_TYPE(t.layout() == at::kStrided, "conv_bn: expected ", name, " to be dense, got layout ", t.layout());
  const auto dtype = t.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
                   "conv_bn: expected ", name, " of dtype float64, float32, bfloat16 or float16, got ", dtype);
  TORCH_CHECK_VALUE(t.device() == input.device(), "conv_bn: expected ", name, " on the device of input (",
                    input.device(), "), got ", t.device());
}

// Autocast lowers both of them, or neither is what it lowers.
bool casts(const Tensor& t, const Tensor& input) {
  return (t.scalar_type() == at::kDouble) == (input.scalar_type() == at::kDouble);
}

// bias, bn_weight, bn_bias, running_mean, running_var
void check_vector(const char* name, const Optional& t, const Tensor& input, const c10::SymInt& channels, bool any_dtype,
                  bool convolution = false) {
  if (!t) return;
  check_tensor(name, *t, input);
  TORCH_CHECK_VALUE(t->dim() == 1 && t->sym_size(0) == channels, "conv_bn: expected ", name, " of shape [", channels,
                    "] (the output channels of weight), got ", t->sym_sizes());
  const bool half = input.scalar_type() == at::kBFloat16 || input.scalar_type() == at::kHalf;
  const bool wider = half && !convolution && t->scalar_type() == at::kFloat;
  TORCH_CHECK_TYPE(any_dtype || t->scalar_type() == input.scalar_type() || wider, "conv_bn: expected ", name,
                   " of the dtype of input (", input.scalar_type(),
                   half && !convolution ? ") or Float, got " : "), got ", t->scalar_type());
}

// Of a running statistic that is to be updated: an error there would come after the other one was.
void check_writable(const char* name, const Tensor& t) {
  TORCH_CHECK_VALUE(!t.requires_grad(), "conv_bn: expected ", name, " that does not require grad");
  TORCH_CHECK_VALUE(t.dim() == 0 || t.sym_size(0) <= 1 || t.sym_stride(0) != 0, "conv_bn: expected ", name,
                    " with a place in memory for each value, got an expanded tensor");
  TORCH_CHECK_VALUE(!t.is_inference() || c10::InferenceMode::is_enabled(), "conv_bn: expected ", name,
                    " that can be updated, got an inference tensor outside inference mode");
}

// Everything that can be wrong is found here, before anything is computed.
Arguments check(const Tensor& input, const Tensor& weight, const Optional& bias, const Optional& bn_weight,
                const Optional& bn_bias, const Optional& running_mean, const Optional& running_var,
                const Optional& num_batches_tracked, const Optional& residual, bool training,
                std::optional<double> momentum, double eps, at::IntArrayRef stride, at::IntArrayRef padding,
                at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups,
                std::string_view activation, std::string_view arithmetic, std::string_view process_group) {
  const Norm norm{eps, parse_arithmetic(arithmetic), parse_activation(activation)};
  TORCH_CHECK_VALUE(eps >= 0, "conv_bn: expected eps of at least 0, got ", eps);
  TORCH_CHECK_VALUE(!momentum || std::isfinite(*momentum), "conv_bn: expected momentum that is a number or None, got ",
                    momentum.value_or(0));
  const bool synchronised = training && !process_group.empty();
  TORCH_CHECK_VALUE(!synchronised || norm.arithmetic == Arithmetic::batchnorm,
                    "conv_bn: expected arithmetic 'batchnorm' with a process_group, got '", arithmetic, "'");

  check_tensor("input", input, input);
  check_tensor("weight", weight, input);
  const auto dim = weight.dim();
  TORCH_CHECK_VALUE(dim >= 3 && dim <= 5,
                    "conv_bn: expected weight of 3, 4 or 5 dimensions (two of channels, then spatial), got shape ",
                    weight.sym_sizes());
  TORCH_CHECK_VALUE(input.dim() == dim, "conv_bn: expected input of ", dim,
                    " dimensions (batch, channels, spatial) like weight, got shape ", input.sym_sizes());
  const bool autocast = autocast_enabled(input);
  TORCH_CHECK_TYPE(weight.scalar_type() == input.scalar_type() || (autocast && casts(weight, input)),
                   "conv_bn: expected weight of the dtype of input (", input.scalar_type(), "), got ",
                   weight.scalar_type());

  const size_t n = dim - 2;
  const Conv conv{spatial("stride", stride, n, 1),
                  spatial("padding", padding, n, 0),
                  spatial("dilation", dilation, n, 1),
                  spatial("output_padding", output_padding, n, 0),
                  transposed,
                  groups};
  TORCH_CHECK_VALUE(groups >= 1, "conv_bn: expected groups of at least 1, got ", groups);
  const auto in_channels = input.sym_size(1), per_group = in_channels / groups;
  TORCH_CHECK_VALUE(per_group * groups == in_channels && in_channels > 0,
                    "conv_bn: expected input channels divisible by groups=", groups, ", got input shape ",
                    input.sym_sizes());
  if (transposed) {
    TORCH_CHECK_VALUE(weight.sym_size(0) == in_channels, "conv_bn: expected weight of shape [", in_channels,
                      ", out_channels / groups, ...] for input shape ", input.sym_sizes(), ", got ",
                      weight.sym_sizes());
  } else {
    TORCH_CHECK_VALUE(weight.sym_size(1) == per_group, "conv_bn: expected weight of shape [out_channels, ", per_group,
                      ", ...] for input shape ", input.sym_sizes(), " and groups=", groups, ", got ",
                      weight.sym_sizes());
    TORCH_CHECK_VALUE(weight.sym_size(0) % groups == 0, "conv_bn: expected out_channels divisible by groups=", groups,
                      ", got weight shape ", weight.sym_sizes());
  }
  for (size_t d = 0; d < n; ++d) {
    TORCH_CHECK_VALUE(weight.sym_size(d + 2) > 0, "conv_bn: expected weight with a kernel of at least 1, got ",
                      weight.sym_sizes());
    TORCH_CHECK_VALUE(
        transposed ? conv.output_padding[d] < std::max(conv.stride[d], conv.dilation[d]) : conv.output_padding[d] == 0,
        "conv_bn: expected output_padding ", transposed ? "below stride or dilation" : "0 unless transposed", ", got ",
        output_padding);
  }
  const auto out = conv.output_sizes(input.sym_sizes(), weight.sym_sizes());
  TORCH_CHECK_VALUE(out[1] > 0, "conv_bn: expected weight with output channels, got ", weight.sym_sizes());
  c10::SymInt values = out[0];
  for (size_t d = 0; d < n; ++d) {
    TORCH_CHECK_VALUE(out[d + 2] > 0, "conv_bn: expected an output size above 0, got ", c10::SymIntArrayRef(out),
                      " from input shape ", input.sym_sizes(), " and weight shape ", weight.sym_sizes());
    values = values * out[d + 2];
  }

  check_vector("bias", bias, input, out[1], autocast && bias && casts(*bias, input), /*convolution=*/true);
  check_vector("bn_weight", bn_weight, input, out[1], autocast);
  check_vector("bn_bias", bn_bias, input, out[1], autocast);
  check_vector("running_mean", running_mean, input, out[1], autocast);
  check_vector("running_var", running_var, input, out[1], autocast);
  TORCH_CHECK_VALUE(running_mean.has_value() == running_var.has_value(),
                    "conv_bn: expected running_mean and running_var both or neither, got only ",
                    running_mean ? "running_mean" : "running_var");
  TORCH_CHECK_VALUE(training || running_mean,
                    "conv_bn: expected running_mean and running_var when training=False, got None");
  if (residual) {
    check_tensor("residual", *residual, input);
    TORCH_CHECK_VALUE(residual->sym_sizes() == c10::SymIntArrayRef(out), "conv_bn: expected residual of shape ",
                      c10::SymIntArrayRef(out), " (that of the output; it is not broadcast), got ",
                      residual->sym_sizes());
    TORCH_CHECK_TYPE(residual->scalar_type() == input.scalar_type() || (autocast && casts(*residual, input)),
                     "conv_bn: expected residual of the dtype of input (", input.scalar_type(), "), got ",
                     residual->scalar_type());
  }
  // Of a synchronised batch other processes may have more.
  TORCH_CHECK_VALUE(!training || synchronised || values != 1,
                    "conv_bn: expected more than 1 value per channel when training, got output shape ",
                    c10::SymIntArrayRef(out));
  if (training && running_mean) {
    check_writable("running_mean", *running_mean);
    check_writable("running_var", *running_var);
    TORCH_CHECK_VALUE(momentum || num_batches_tracked,
                      "conv_bn: expected num_batches_tracked when momentum is None, got None");
  }
  if (training && num_batches_tracked) {
    TORCH_CHECK_TYPE(num_batches_tracked->scalar_type() == at::kLong,
                     "conv_bn: expected num_batches_tracked of dtype int64, got ", num_batches_tracked->scalar_type());
    TORCH_CHECK_VALUE(num_batches_tracked->dim() == 0 && num_batches_tracked->device() == input.device(),
                      "conv_bn: expected num_batches_tracked of shape [] on the device of input (", input.device(),
                      "), got ", num_batches_tracked->sym_sizes(), " on ", num_batches_tracked->device());
    check_writable("num_batches_tracked", *num_batches_tracked);
  }
  return {conv, norm};
}

Tensor plain_convolution(const Conv& conv, const Tensor& input, const Tensor& weight, const Optional& bias) {
  const auto dtype = conv_dtype(input);
  return at::convolution(input.to(dtype), weight.to(dtype), bias ? Optional(bias->to(dtype)) : bias, conv.stride,
                         conv.padding, conv.dilation, conv.transposed, conv.output_padding, conv.groups);
}

// act(out [+ residual]) in ATen
Tensor finish(Tensor out, const Optional& residual, const Activation& activation) {
  if (residual) out = out + residual->to(out.scalar_type());
  return activate(out, activation);
}

// What reads the graph, to export or compile it, is to find plain convolutions in it where no gradient is asked for.
bool is_traced(const Tensor& t) {
  return t.key_set().has(c10::DispatchKey::Python) || c10::impl::TorchDispatchModeTLS::any_modes_set();
}

bool requires_grad(const Optional& t) { return t && t->requires_grad(); }

// Which maps are kept by conv → norm: none but the result, if it is all that act' needs of what else must be remade.
std::vector<int64_t> plan(const Norm& norm, const Optional& residual) {
  const bool result = norm.activation.slope_from_result() && (residual || !norm.normalises());
  return result ? std::vector<int64_t>{2} : std::vector<int64_t>{};
}

// BN with given statistics is a scale and a shift per output channel: one convolution with
//   weight' = a·weight      bias' = β + (bias − running_mean)·a
Tensor folded(const Arguments& args, const Tensor& input, const Tensor& weight, const Optional& bias,
              const Optional& bn_weight, const Optional& bn_bias, const Tensor& running_mean, const Tensor& running_var,
              const Optional& residual) {
  const auto& conv = args.conv;
  const auto wide = running_var.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  auto scale = inverse_running_std(args.norm, running_var.to(wide));
  if (bn_weight) scale = scale * *bn_weight;
  const auto mean = running_mean.to(wide);
  auto shift = (bias ? *bias - mean : -mean) * scale;
  if (bn_bias) shift = shift + *bn_bias;
  // The output channels are dimension 0; of a transposed weight (in, out/groups, …), those of each group in turn.
  Tensor scaled;
  if (conv.transposed) {
    std::vector<int64_t> per_channel(weight.dim() + 1, 1);
    per_channel[0] = conv.groups;
    per_channel[2] = -1;
    scaled = (weight.unflatten(0, {conv.groups, -1}) * scale.reshape(per_channel)).flatten(0, 1);
  } else {
    std::vector<int64_t> per_channel(weight.dim(), 1);
    per_channel[0] = -1;
    scaled = weight * scale.reshape(per_channel);
  }
  Norm norm = args.norm;
  norm.arithmetic = Arithmetic::none;
  const bool grad =
      at::GradMode::is_enabled() && (input.requires_grad() || weight.requires_grad() || requires_grad(bias) ||
                                     requires_grad(bn_weight) || requires_grad(bn_bias) || requires_grad(residual));
  const auto dtype = conv_dtype(input);
  const bool half = dtype == at::kBFloat16 || dtype == at::kHalf;
  if ((norm.activation.none() && !half) || (!grad && is_traced(input)))
    return finish(plain_convolution(conv, input, scaled, shift), residual, norm.activation);

  // The folded weight and the shift stay in float, and so do their gradients.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  PackedChain chain(input.to(dtype));
  chain.push(conv, scaled, shift);
  if (!norm.activation.none() || residual)
    chain.push(norm, {}, {}, residual ? Optional(residual->to(dtype)) : residual);
  return std::get<0>(chain_forward(chain.tensors, chain.links, chain.scalars, "", plan(norm, residual)));
}

// running = (1 − momentum)·running + momentum·batch, where no momentum stands for 1/n of the n-th batch
Tensor moved(const Tensor& running, const Tensor& batch, const std::optional<double>& momentum, const Tensor& count) {
  const auto wide = running.to(batch.scalar_type());
  return momentum ? wide.lerp(batch, *momentum) : wide.lerp(batch, count.to(batch.scalar_type()).reciprocal());
}

}  // namespace

Tensor conv_bn(const Tensor& input, const Tensor& weight, const Optional& bias, const Optional& bn_weight,
               const Optional& bn_bias, const Optional& running_mean, const Optional& running_var,
               const Optional& num_batches_tracked, const Optional& residual, bool training,
               std::optional<double> momentum, double eps, at::IntArrayRef stride, at::IntArrayRef padding,
               at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups,
               std::string_view activation, std::string_view arithmetic, std::string_view process_group) {
  const auto args = check(input, weight, bias, bn_weight, bn_bias, running_mean, running_var, num_batches_tracked,
                          residual, training, momentum, eps, stride, padding, dilation, transposed, output_padding,
                          groups, activation, arithmetic, process_group);
  if (!training) return folded(args, input, weight, bias, bn_weight, bn_bias, *running_mean, *running_var, residual);

  // What allocates, and so may fail, comes before the first write.
  std::vector<std::pair<Tensor, Tensor>> writes;
  const auto count = num_batches_tracked ? *num_batches_tracked + 1 : Tensor();
  Tensor output;
  if (input.sym_size(0) == 0 && process_group.empty()) {  // nothing to normalise, nothing to average
    output = finish(at::batch_norm(plain_convolution(args.conv, input, weight, bias), bn_weight, bn_bias, {}, {}, true,
                                   /*momentum=*/0, eps, false),
                    residual, args.norm.activation);
  } else {
    PackedChain chain(input);
    chain.push(args.conv, weight, bias);
    chain.push(args.norm, bn_weight, bn_bias, residual);
    const auto result =
        chain_forward(chain.tensors, chain.links, chain.scalars, process_group, plan(args.norm, residual));
    output = std::get<0>(result);
    if (running_mean) {
      const auto batch = std::get<2>(result)[0].detach();
      auto mean = batch.select(0, 0), var = batch.select(0, 1);
      if (bias) mean = mean + bias->detach();
      if (process_group.empty()) {
        const auto values = output.sym_numel() / output.sym_size(1);
        var = var * at::Scalar(c10::SymFloat(values) / c10::SymFloat(values - 1));
      } else {
        const auto values = batch.select(0, 2);
        var = var * (values / (values - 1).clamp_min(1));
        mean = at::where(values > 0, mean, running_mean->to(mean.scalar_type()));  // no process has a sample
        var = at::where(values > 0, var, running_var->to(var.scalar_type()));
      }
      writes.emplace_back(*running_mean, moved(*running_mean, mean, momentum, count));
      writes.emplace_back(*running_var, moved(*running_var, var, momentum, count));
    }
  }
  if (num_batches_tracked) writes.emplace_back(*num_batches_tracked, count);
  for (const auto& [target, value] : writes) target.copy_(value);
  return output;
}

}  // namespace fusedconvbn
