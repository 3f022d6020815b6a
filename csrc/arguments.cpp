// Checks of the arguments of conv_bn and conv_bn_chain.
#include "arguments.h"

#include <c10/core/InferenceMode.h>

#include <cmath>

#include "autocast/autocast.h"
#include "chain/tensors.h"

namespace fusedconvbn {

using at::Tensor;

void check_tensor(const std::string& op, const char* name, const Tensor& t, const Tensor& input) {
  TORCH_CHECK_VALUE(t.defined(), op, ": expected ", name, " to be a tensor, got an undefined one");
  TORCH_CHECK_TYPE(!t.is_nested(), op, ": expected ", name, " to be dense, got a nested tensor");
  TORCH_CHECK_TYPE(!t.is_quantized(), op, ": expected ", name,
                   " to be dense, got a quantised tensor");
  TORCH_CHECK_TYPE(t.layout() == at::kStrided, op, ": expected ", name, " to be dense, got layout ",
                   t.layout());
  const auto dtype = t.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
      op, ": expected ", name, " of dtype float64, float32, bfloat16 or float16, got ", dtype);
  TORCH_CHECK_VALUE(t.device() == input.device(), op, ": expected ", name,
                    " on the device of input (", input.device(), "), got ", t.device());
}

bool casts(const Tensor& t, const Tensor& input) {
  return (t.scalar_type() == at::kDouble) == (input.scalar_type() == at::kDouble);
}

namespace {

// Checks bias, bn_weight, bn_bias, running_mean or running_var.
void check_vector(const std::string& op, const char* name, const Optional& t, const Tensor& input,
                  const c10::SymInt& channels, bool any_dtype, bool convolution = false) {
  if (!t) return;
  check_tensor(op, name, *t, input);
  TORCH_CHECK_VALUE(t->dim() == 1 && t->sym_size(0) == channels, op, ": expected ", name,
                    " of shape [", channels, "] (the output channels of weight), got ",
                    t->sym_sizes());
  const bool half = input.scalar_type() == at::kBFloat16 || input.scalar_type() == at::kHalf;
  const bool wider = half && !convolution && t->scalar_type() == at::kFloat;
  TORCH_CHECK_TYPE(any_dtype || t->scalar_type() == input.scalar_type() || wider, op, ": expected ",
                   name, " of the dtype of input (", input.scalar_type(),
                   half && !convolution ? ") or Float, got " : "), got ", t->scalar_type());
}

// Checks that a running statistic can be updated. An error during the update would leave the other
// one updated already.
void check_writable(const std::string& op, const char* name, const Tensor& t) {
  TORCH_CHECK_VALUE(!t.requires_grad(), op, ": expected ", name, " that does not require grad");
  TORCH_CHECK_VALUE(t.dim() == 0 || t.sym_size(0) <= 1 || t.sym_stride(0) != 0, op, ": expected ",
                    name, " with a place in memory for each value, got an expanded tensor");
  TORCH_CHECK_VALUE(!t.is_inference() || c10::InferenceMode::is_enabled(), op, ": expected ", name,
                    " that can be updated, got an inference tensor outside inference mode");
}

}  // namespace

std::vector<c10::SymInt> check_conv(const std::string& op, const Tensor& input,
                                    c10::SymIntArrayRef sizes, const ConvArguments& arguments) {
  const auto& [conv, weight, bias] = arguments;
  check_tensor(op, "weight", weight, input);
  const auto dim = weight.dim();
  TORCH_CHECK_VALUE(
      dim >= 3 && dim <= 5, op,
      ": expected weight of 3, 4 or 5 dimensions (two of channels, then spatial), got shape ",
      weight.sym_sizes());
  TORCH_CHECK_VALUE(int64_t(sizes.size()) == dim, op, ": expected input of ", dim,
                    " dimensions (batch, channels, spatial) like weight, got shape ", sizes);
  const bool autocast = autocast_enabled(input);
  TORCH_CHECK_TYPE(
      weight.scalar_type() == input.scalar_type() || (autocast && casts(weight, input)), op,
      ": expected weight of the dtype of input (", input.scalar_type(), "), got ",
      weight.scalar_type());

  const size_t n = dim - 2;
  const auto groups = conv.groups;
  TORCH_CHECK_VALUE(groups >= 1, op, ": expected groups of at least 1, got ", groups);
  const auto in_channels = sizes[1], per_group = in_channels / groups;
  TORCH_CHECK_VALUE(per_group * groups == in_channels && in_channels > 0, op,
                    ": expected input channels divisible by groups=", groups, ", got input shape ",
                    sizes);
  if (conv.transposed) {
    TORCH_CHECK_VALUE(weight.sym_size(0) == in_channels, op, ": expected weight of shape [",
                      in_channels, ", out_channels / groups, ...] for input shape ", sizes,
                      ", got ", weight.sym_sizes());
  } else {
    TORCH_CHECK_VALUE(weight.sym_size(1) == per_group, op,
                      ": expected weight of shape [out_channels, ", per_group,
                      ", ...] for input shape ", sizes, " and groups=", groups, ", got ",
                      weight.sym_sizes());
    TORCH_CHECK_VALUE(weight.sym_size(0) % groups == 0, op,
                      ": expected out_channels divisible by groups=", groups, ", got weight shape ",
                      weight.sym_sizes());
  }
  for (size_t d = 0; d < n; ++d) {
    TORCH_CHECK_VALUE(weight.sym_size(d + 2) > 0, op,
                      ": expected weight with a kernel of at least 1, got ", weight.sym_sizes());
    TORCH_CHECK_VALUE(conv.transposed
                          ? conv.output_padding[d] < std::max(conv.stride[d], conv.dilation[d])
                          : conv.output_padding[d] == 0,
                      op, ": expected output_padding ",
                      conv.transposed ? "below stride or dilation" : "0 unless transposed",
                      ", got ", at::IntArrayRef(conv.output_padding));
  }
  const auto out = conv.output_sizes(sizes, weight.sym_sizes());
  TORCH_CHECK_VALUE(out[1] > 0, op, ": expected weight with output channels, got ",
                    weight.sym_sizes());
  for (size_t d = 0; d < n; ++d)
    TORCH_CHECK_VALUE(out[d + 2] > 0, op, ": expected an output size above 0, got ",
                      c10::SymIntArrayRef(out), " from input shape ", sizes, " and weight shape ",
                      weight.sym_sizes());
  double values = 1;
  for (const auto& size : out) values *= size.maybe_as_int().value_or(1);
  TORCH_CHECK_VALUE(values < 0x1p59, op,
                    ": expected an output of less than 2**59 values, got shape ",
                    c10::SymIntArrayRef(out));
  check_vector(op, "bias", bias, input, out[1], autocast && bias && casts(*bias, input),
               /*convolution=*/true);
  return out;
}

void check_norm(const std::string& op, const std::string& prefix, const Tensor& input,
                c10::SymIntArrayRef sizes, const NormArguments& arguments, bool synchronised) {
  const auto& [norm, weight, bias, running_mean, running_var, num_batches_tracked, residual,
               training, momentum] = arguments;
  const bool above = training && norm.arithmetic != Arithmetic::tutorial;
  TORCH_CHECK_VALUE(above ? norm.eps > 0 : norm.eps >= 0, op, ": expected eps ",
                    above ? "above 0 when training" : "of at least 0", ", got ", norm.eps);
  TORCH_CHECK_VALUE(!momentum || std::isfinite(*momentum), op,
                    ": expected momentum that is a number or None, got ", momentum.value_or(0));
  const bool autocast = autocast_enabled(input);
  check_vector(op, (prefix + "weight").c_str(), weight, input, sizes[1], autocast);
  check_vector(op, (prefix + "bias").c_str(), bias, input, sizes[1], autocast);
  check_vector(op, "running_mean", running_mean, input, sizes[1], autocast);
  check_vector(op, "running_var", running_var, input, sizes[1], autocast);
  TORCH_CHECK_VALUE(running_mean.has_value() == running_var.has_value(), op,
                    ": expected running_mean and running_var both or neither, got only ",
                    running_mean ? "running_mean" : "running_var");
  TORCH_CHECK_VALUE(training || running_mean, op,
                    ": expected running_mean and running_var when training=False, got None");
  if (residual) {
    check_tensor(op, "residual", *residual, input);
    TORCH_CHECK_VALUE(residual->sym_sizes() == sizes, op, ": expected residual of shape ", sizes,
                      " (that of the output; it is not broadcast), got ", residual->sym_sizes());
    TORCH_CHECK_TYPE(
        residual->scalar_type() == input.scalar_type() || (autocast && casts(*residual, input)), op,
        ": expected residual of the dtype of input (", input.scalar_type(), "), got ",
        residual->scalar_type());
  }
  if (!training) return;
  c10::SymInt values = sizes[0];
  for (const auto& size : sizes.slice(2)) values = values * size;
  // Other processes may have more values of a synchronised batch.
  TORCH_CHECK_VALUE(synchronised || values != 1, op,
                    ": expected more than 1 value per channel when training, got output shape ",
                    sizes);
  if (running_mean) {
    check_writable(op, "running_mean", *running_mean);
    check_writable(op, "running_var", *running_var);
    TORCH_CHECK_VALUE(momentum || num_batches_tracked, op,
                      ": expected num_batches_tracked when momentum is None, got None");
  }
  if (num_batches_tracked) {
    TORCH_CHECK_TYPE(num_batches_tracked->scalar_type() == at::kLong, op,
                     ": expected num_batches_tracked of dtype int64, got ",
                     num_batches_tracked->scalar_type());
    TORCH_CHECK_VALUE(
        num_batches_tracked->dim() == 0 && num_batches_tracked->device() == input.device(), op,
        ": expected num_batches_tracked of shape [] on the device of input (", input.device(),
        "), got ", num_batches_tracked->sym_sizes(), " on ", num_batches_tracked->device());
    check_writable(op, "num_batches_tracked", *num_batches_tracked);
  }
}

}  // namespace fusedconvbn
