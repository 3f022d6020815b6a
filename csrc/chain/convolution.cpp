// Runs a convolution by the fastest correct implementation: Winograd, depthwise, or ATen's.
#include "convolution.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "../cpu/depthwise.h"
#include "../cpu/winograd.h"

namespace fusedconvbn {

using at::Tensor;

at::MemoryFormat conv_memory_format(const Tensor& input, const Tensor& weight) {
  // The rule that ATen has for its fast backends, where 1-d convolution, and 3-d convolution in
  // double, is contiguous.
  const bool contiguous =
      input.dim() < 4 || (input.dim() == 5 && input.scalar_type() == at::kDouble);
  if (contiguous) return at::MemoryFormat::Contiguous;
  const auto format = input.suggest_memory_format();
  return format == at::MemoryFormat::Contiguous ? weight.suggest_memory_format() : format;
}

bool reads_padding_alone(const Conv& conv, const Tensor& input, const Tensor& weight) {
  const auto width = input.sym_size(-1).maybe_as_int(), taps = weight.sym_size(-1).maybe_as_int();
  if (!input.is_cpu() || conv.transposed || !width || !taps) return false;
  const size_t last = conv.stride.size() - 1;
  const auto columns = conv.output_sizes(input.sym_sizes(), weight.sym_sizes()).back().expect_int();
  for (int64_t column = 0; column < columns; ++column)
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t at =
          column * conv.stride[last] - conv.padding[last] + tap * conv.dilation[last];
      if (at >= 0 && at < width) return false;
    }
  return true;
}

bool steps_over_few_channels(const Conv& conv, const Tensor& input, const Tensor& weight) {
  constexpr int64_t enough = 16;
  if (!input.is_cpu() || input.dim() != 4 || all(conv.stride, 1) || !all(conv.padding, 0))
    return false;
  return all(weight.sizes().slice(2), 1) &&
         (conv.transposed ? weight.size(1) * conv.groups : input.size(1)) < enough;
}

namespace {

bool cpu_has(const char* check) {
  const auto op = c10::Dispatcher::singleton().findSchema({check, ""});
  return op && op->typed<bool()>().call();
}

const bool cpu_has_bfloat16 = cpu_has("mkldnn::_is_mkldnn_bf16_supported");
const bool cpu_has_half = cpu_has("mkldnn::_is_mkldnn_fp16_supported");

// Whether to run the convolution in float: if oneDNN has no fast path for a dtype on this CPU,
// ATen's fallback takes ten times as long as a convolution in float.
bool runs_in_float(const Tensor& t) {
  if (!t.is_cpu()) return false;
  return (t.scalar_type() == at::kBFloat16 && !cpu_has_bfloat16) ||
         (t.scalar_type() == at::kHalf && !cpu_has_half);
}

// Calls f(first, count) for slices of samples whose maps in float fit into the caches.
template <typename F>
void for_sample_slices(const Tensor& input, const Tensor& output, const F& f) {
  constexpr int64_t slice_bytes = 8 << 20;
  const int64_t samples = input.size(0);
  const int64_t bytes = (input.numel() + output.numel()) * int64_t(sizeof(float));
  const int64_t count =
      std::clamp<int64_t>(samples * slice_bytes / std::max<int64_t>(bytes, 1), 1, samples);
  for (int64_t first = 0; first < samples; first += count)
    f(first, std::min(count, samples - first));
}

// The values of `map` that a strided 1×1 convolution reads, one for each value of `other`. With
// them a convolution of stride 1 has the same weight gradient.
Tensor every(at::IntArrayRef stride, Tensor map, const Tensor& other) {
  for (size_t d = 0; d < stride.size(); ++d)
    map = map.slice(int64_t(d) + 2, 0, (other.size(int64_t(d) + 2) - 1) * stride[d] + 1, stride[d]);
  return map.contiguous(map.suggest_memory_format());
}

}  // namespace

Tensor convolution(const Conv& conv, const Tensor& input, const Tensor& weight,
                   const std::optional<Tensor>& bias) {
  const auto run = [&](const Tensor& in, const Tensor& w, const std::optional<Tensor>& b) {
    return at::convolution(in, w, b, conv.stride, conv.padding, conv.dilation, conv.transposed,
                           conv.output_padding, conv.groups);
  };
  const auto format = conv_memory_format(input, weight);
  const auto cast = [&](at::ScalarType dtype) {
    return bias ? std::optional<Tensor>(bias->to(dtype)) : bias;
  };
  if (reads_padding_alone(conv, input, weight)) {
    auto output = at::zeros_symint(conv.output_sizes(input.sym_sizes(), weight.sym_sizes()),
                                   input.options().memory_format(format));
    if (bias) output.movedim(1, -1).copy_(*bias);
    return output;
  }
  if (!bias && winograd_applies(conv, input, weight)) return winograd(conv, input, weight);
  if (!bias && depthwise_applies(conv, input, weight)) return depthwise(conv, input, weight);
  if (!runs_in_float(input) || input.numel() == 0) {
    const auto dtype = input.scalar_type();
    return run(input, weight.to(dtype), cast(dtype)).contiguous(format);
  }

  const auto sizes = conv.output_sizes(input.sym_sizes(), weight.sym_sizes());
  auto output = at::empty_symint(sizes, input.options().memory_format(format));
  const auto w = weight.to(input.scalar_type()).to(at::kFloat);
  const auto b = cast(at::kFloat);
  for_sample_slices(input, output, [&](int64_t first, int64_t count) {
    output.narrow(0, first, count)
        .copy_(convolution(conv, input.narrow(0, first, count).to(at::kFloat), w, b));
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Conv& conv, const Tensor& dout,
                                                        const Tensor& input, const Tensor& weight,
                                                        std::array<bool, 3> needs_grad) {
  const auto format = conv_memory_format(input, weight);
  const std::array<int64_t, 1> bias_size{dout.size(1)};
  const auto run = [&](const Tensor& grad, const Tensor& in, const Tensor& w) {
    auto [din, dweight, dbias] = at::convolution_backward(
        grad, in, w, needs_grad[2] ? at::OptionalIntArrayRef(bias_size) : std::nullopt, conv.stride,
        conv.padding, conv.dilation, conv.transposed, conv.output_padding, conv.groups, needs_grad);
    return std::make_tuple(needs_grad[0] ? din.contiguous(format) : Tensor(),
                           needs_grad[1] ? dweight.contiguous(format) : Tensor(), dbias);
  };
  if (!needs_grad[2] && winograd_applies(conv, input, weight))
    return {needs_grad[0] ? winograd_grad_input(conv, dout, weight) : Tensor(),
            needs_grad[1] ? winograd_grad_weight(conv, dout, input, weight) : Tensor(), Tensor()};
  if (!needs_grad[2] && depthwise_applies(conv, input, weight))
    return {needs_grad[0] ? depthwise_grad_input(conv, dout, input, weight) : Tensor(),
            needs_grad[1] ? depthwise_grad_weight(conv, dout, input, weight) : Tensor(), Tensor()};
  if ((needs_grad[1] || needs_grad[2]) && steps_over_few_channels(conv, input, weight)) {
    Tensor din, dweight, dbias;
    if (needs_grad[0])
      din = std::get<0>(convolution_backward(conv, dout, input, weight, {true, false, false}));
    if (needs_grad[1]) {
      Conv dense = conv;
      for (auto* list : {&dense.stride, &dense.dilation}) std::fill(list->begin(), list->end(), 1);
      std::fill(dense.output_padding.begin(), dense.output_padding.end(), 0);
      const auto part =
          conv.transposed ? every(conv.stride, dout, input) : every(conv.stride, input, dout);
      dweight = std::get<1>(convolution_backward(dense, conv.transposed ? part : dout,
                                                 conv.transposed ? input : part, weight,
                                                 {false, true, false}))
                    .contiguous(format);
    }
    // Not by oneDNN, which computes it together with the weight gradient.
    if (needs_grad[2]) dbias = dout.sum({0, 2, 3});
    return {din, dweight, dbias};
  }
  const bool half = input.scalar_type() == at::kBFloat16 || input.scalar_type() == at::kHalf;
  if ((!runs_in_float(input) && !(half && is_depthwise(conv, input, weight))) || input.numel() == 0)
    return run(dout, input, weight.to(input.scalar_type()));

  Tensor din, dweight, dbias;
  const auto w = weight.to(input.scalar_type()).to(at::kFloat);
  if (needs_grad[0]) din = at::empty(input.sizes(), input.options().memory_format(format));
  for_sample_slices(input, dout, [&](int64_t first, int64_t count) {
    const auto part = [&](const Tensor& t) { return t.narrow(0, first, count).to(at::kFloat); };
    auto [slice_din, slice_dweight, slice_dbias] =
        convolution_backward(conv, part(dout), part(input), w, needs_grad);
    if (needs_grad[0]) din.narrow(0, first, count).copy_(slice_din);
    if (needs_grad[1]) dweight = first == 0 ? slice_dweight : dweight.add_(slice_dweight);
    if (needs_grad[2]) dbias = first == 0 ? slice_dbias : dbias.add_(slice_dbias);
  });
  return {din, dweight, dbias};
}

}  // namespace fusedconvbn
