// The operator that runs a chain as models have it: convolutions, batch norms in either mode with
// their running statistics, gates and PReLUs. It is composite, as conv_bn is.
//
//   tensors, links, scalars   the packed form of chain.h; the arithmetic of its norm links is
//                             batchnorm. Only the last norm link, behind which only a prelu may
//                             follow, may have a residual, which is broadcast
//   buffers                   of each norm link in turn: running_mean, running_var and
//                             num_batches_tracked, without those that are absent
//   buffer_counts             of each norm link, how many buffers it has: 0, 1 (the last), 2 (the
//                             first two) or 3
//   momenta                   of each norm link; NaN for None
//   training                  of each norm link: 1 to use batch statistics, 0 to use running ones
//   process_group, saved      as for _chain_forward
//   statistics                as for _chain_forward, for its norm links in training
//
// A first gate may be the factor of any product. If it is not a gate by its shape, the product is
// computed first and becomes T_0. In eval mode a batch norm is folded into the convolution in front
// of it.
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/batch_norm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/prelu.h>
#include <ATen/ops/stack.h>

#include <algorithm>
#include <cmath>

#include "arguments.h"
#include "autocast/autocast.h"
#include "chain/dispatch.h"
#include "chain/tensors.h"
#include "chain/unfused.h"
#include "ops.h"
#include "running.h"

namespace fusedconvbn {

using at::Tensor;

namespace {

using Sizes = std::vector<c10::SymInt>;

// Whether s is one value per sample and channel of t.
bool is_gate(const Tensor& s, const Tensor& t) {
  if (s.dim() != t.dim() || s.dim() < 3 || s.scalar_type() != t.scalar_type() ||
      s.device() != t.device())
    return false;
  for (int64_t d = 0; d < s.dim(); ++d)
    if (s.sym_size(d) != (d < 2 ? t.sym_size(d) : c10::SymInt(1))) return false;
  return true;
}

bool broadcasts_to(const Tensor& t, c10::SymIntArrayRef sizes) {
  if (t.dim() > int64_t(sizes.size())) return false;
  for (int64_t d = 1; d <= t.dim(); ++d)
    if (t.sym_size(t.dim() - d) != 1 && t.sym_size(t.dim() - d) != sizes[sizes.size() - d])
      return false;
  return true;
}

struct ModelLink {
  std::optional<ConvArguments> conv;
  std::optional<NormArguments> norm;
  Tensor gate, slopes;
  Sizes sizes;  // of its result
};

struct Model {
  std::vector<Tensor> parts;
  std::vector<ModelLink> links;
  // A residual that the kernels cannot add, because its dtype differs or it is larger than the map,
  // with the activation and the slopes that follow it.
  Optional tail;
  Activation tail_activation;
  Tensor tail_slopes;

  bool in_training() const {
    return std::any_of(links.begin(), links.end(),
                       [](const auto& l) { return l.norm && l.norm->training; });
  }
};

// Checks all arguments before anything is computed.
Model checked(at::TensorList tensors, at::TensorList buffers, const Chain& chain,
              at::IntArrayRef buffer_counts, at::ArrayRef<double> momenta, at::IntArrayRef training,
              std::string_view process_group) {
  const size_t norms =
      std::count_if(chain.begin(), chain.end(), [](const Link& l) { return l.norm(); });
  int64_t buffer_count = 0;
  for (const auto n : buffer_counts) buffer_count += n;
  TORCH_CHECK_VALUE(
      buffer_counts.size() == norms && momenta.size() == norms && training.size() == norms &&
          buffer_count == int64_t(buffers.size()),
      "conv_bn_chain: expected a number of buffers, a momentum and a mode for each of ", norms,
      " norm links, got ", buffer_counts, ", ", momenta, " and ", training);
  Model model;
  model.parts = tensors.slice(0, chain.parts).vec();
  for (const auto& part : model.parts) check_tensor("conv_bn_chain", "input", part, tensors[0]);
  const auto optional = [&](int64_t index) {
    return index < 0 ? Optional() : Optional(tensors[index]);
  };

  size_t first = 0;
  if (chain[0].gate()) {
    auto &x = model.parts[0], s = tensors[chain[0].weight];
    TORCH_CHECK_VALUE(chain.parts == 1,
                      "conv_bn_chain: expected one input in front of a gate, got ", chain.parts);
    if (!is_gate(s, x) && is_gate(x, s)) std::swap(x, s);
    if (is_gate(s, x)) {
      model.links.push_back(
          {.conv = {}, .norm = {}, .gate = s, .slopes = {}, .sizes = x.sym_sizes().vec()});
    } else {
      x = x * s;
    }
    first = 1;
  }
  const auto& input = model.parts[0];
  auto sizes = input.sym_sizes().vec();
  TORCH_CHECK_VALUE(sizes.size() >= 2, "conv_bn_chain: expected input with channels, got shape ",
                    input.sym_sizes());
  for (size_t p = 1; p < model.parts.size(); ++p) {
    auto part = model.parts[p].sym_sizes().vec();
    TORCH_CHECK_VALUE(part.size() == sizes.size(),
                      "conv_bn_chain: expected inputs of as many dimensions, got ",
                      input.sym_sizes(), " and ", model.parts[p].sym_sizes());
    sizes[1] = sizes[1] + part[1];
    part[1] = sizes[1];
    TORCH_CHECK_VALUE(part == sizes,
                      "conv_bn_chain: expected inputs that differ in their channels alone, got ",
                      input.sym_sizes(), " and ", model.parts[p].sym_sizes());
    TORCH_CHECK_TYPE(model.parts[p].scalar_type() == input.scalar_type(),
                     "conv_bn_chain: expected inputs of one dtype, got ", input.scalar_type(),
                     " and ", model.parts[p].scalar_type());
  }
  size_t n = 0, buffer = 0;
  bool convolved = false;
  for (size_t i = first; i < chain.size(); ++i) {
    const auto op = "conv_bn_chain: link " + std::to_string(i);
    const auto& link = chain[i];
    ModelLink checked_link;
    if (const auto* conv = link.conv()) {
      checked_link.conv = ConvArguments{*conv, tensors[link.weight], optional(link.bias)};
      sizes = check_conv(op, input, sizes, *checked_link.conv);
      convolved = true;
    } else if (link.gate()) {
      checked_link.gate = tensors[link.weight];
    } else if (link.prelu()) {
      const auto& slopes = tensors[link.weight];
      check_tensor(op, "slopes", slopes, input);
      TORCH_CHECK_VALUE(
          slopes.dim() == 1 && (slopes.sym_size(0) == 1 || slopes.sym_size(0) == sizes[1]), op,
          ": expected slopes of shape [1] or [", sizes[1], "], got ", slopes.sym_sizes());
      (model.tail ? model.tail_slopes : checked_link.slopes) = slopes;
      if (model.tail) continue;
    } else {
      const bool train = training[n] != 0;
      TORCH_CHECK_VALUE(link.norm()->arithmetic == Arithmetic::batchnorm, op,
                        ": expected arithmetic batchnorm, got ", int64_t(link.norm()->arithmetic));
      const bool last = i + 1 == chain.size() || (i + 2 == chain.size() && chain[i + 1].prelu());
      TORCH_CHECK_VALUE(link.residual < 0 || last, op,
                        ": expected a residual at the last norm link alone");
      NormArguments norm{
          *link.norm(), optional(link.weight), optional(link.bias), {}, {}, {}, {}, train, {}};
      if (!std::isnan(momenta[n])) norm.momentum = momenta[n];
      const auto given = buffer_counts[n];
      TORCH_CHECK_VALUE(given >= 0 && given <= 3, op, ": expected 0 to 3 buffers, got ", given);
      if (given >= 2) norm.running_mean = buffers[buffer++], norm.running_var = buffers[buffer++];
      if (given % 2 == 1) norm.num_batches_tracked = buffers[buffer++];
      if (const auto residual = optional(link.residual)) {
        // The dtype of the map. The sum in eager mode has the wider dtype of the two.
        const auto dtype = convolved ? conv_dtype(input) : input.scalar_type();
        const bool fits = residual->scalar_type() == dtype &&
                          residual->device() == input.device() && broadcasts_to(*residual, sizes);
        if (fits) {
          norm.residual = residual->expand_symint(sizes);
        } else {
          model.tail = residual;
          model.tail_activation = std::exchange(norm.norm.activation, Activation{});
        }
      }
      check_norm(op, "", input, sizes, norm, train && !process_group.empty());
      checked_link.norm = norm;
      ++n;
    }
    checked_link.sizes = sizes;
    model.links.push_back(std::move(checked_link));
  }
  return model;
}

// Runs a batch without samples, which has no statistics.
Tensor run_empty(const Model& model, RunningUpdates& updates) {
  auto t = concatenated(model.parts);
  for (const auto& link : model.links) {
    if (link.conv) {
      const auto& conv = link.conv->conv;
      t = at::convolution(t, link.conv->weight, link.conv->bias, conv.stride, conv.padding,
                          conv.dilation, conv.transposed, conv.output_padding, conv.groups);
    } else if (link.norm) {
      const auto& norm = *link.norm;
      const bool running = !norm.training;
      t = at::batch_norm(t, norm.weight, norm.bias, running ? norm.running_mean : Optional(),
                         running ? norm.running_var : Optional(), norm.training, /*momentum=*/0,
                         norm.norm.eps, false);
      t = finish(t, norm.residual, norm.norm.activation);
      if (norm.training) updates.add(norm);
    } else {
      t = link.gate.defined() ? t * link.gate : at::prelu(t, link.slopes.to(t.scalar_type()));
    }
  }
  return t;
}

// How many links at the front can run under no_grad because nothing in them requires grad. 0 if
// nothing requires grad at all: the whole chain then runs without a graph anyway.
size_t first_trained(const Model& model) {
  if (!at::GradMode::is_enabled() || any_requires_grad(model.parts)) return 0;
  const auto trained = [](const Optional& t) { return t && t->requires_grad(); };
  for (size_t i = 0; i < model.links.size(); ++i) {
    const auto& link = model.links[i];
    if (link.conv && (link.conv->weight.requires_grad() || trained(link.conv->bias))) return i;
    for (const auto& t : {link.gate, link.slopes})
      if (t.defined() && t.requires_grad()) return i;
    if (link.norm &&
        (trained(link.norm->weight) || trained(link.norm->bias) || trained(link.norm->residual)))
      // An eval-mode norm is folded into the convolution in front of it, so both must be included.
      return !link.norm->training && i > 0 && model.links[i - 1].conv ? i - 1 : i;
  }
  return 0;
}

// Runs links first … last - 1 of the model on T_first. `saved` holds indices of the whole model.
// `known` are statistics of the first of these norm links that are in training; the statistics of
// all of them are added to `found`.
Tensor run(const Model& model, at::TensorList parts, size_t first, size_t last,
           std::string_view process_group, at::IntArrayRef saved, const Optional& known,
           std::vector<Tensor>& found, RunningUpdates& updates) {
  const auto& links = model.links;
  // Whether norm link i is folded into the convolution in front of it.
  const auto folds = [&](size_t i) {
    return !links[i].norm->training && i > first && links[i - 1].conv.has_value();
  };
  PackedChain packed(parts);
  std::vector<int64_t> index(links.size() + 1, 0);  // of each map of the model, in the packed chain
  int64_t pushed = 0;
  const auto push = [&](size_t i, const auto& link, const auto&... rest) {
    packed.push(link, rest...);
    index[i + 1] = ++pushed;
  };
  bool training = false;
  std::optional<Norm> ending;
  bool ending_residual = false;
  for (size_t i = first; i < last; ++i) {
    const auto& link = links[i];
    ending.reset();
    if (link.conv) {
      if (i + 1 < last && links[i + 1].norm && folds(i + 1)) {
        const auto [weight, bias] = fold(*link.conv, *links[i + 1].norm);
        push(i, link.conv->conv, weight, Optional(bias));
      } else {
        push(i, link.conv->conv, link.conv->weight, link.conv->bias);
      }
    } else if (link.norm) {
      const auto& norm = *link.norm;
      training |= norm.training;
      ending = norm.norm;
      ending_residual = norm.residual.has_value();
      if (norm.training) {
        push(i, *ending, norm.weight, norm.bias, norm.residual);
      } else if (folds(i)) {
        ending->arithmetic = Arithmetic::none;
        if (ending->identity() && !norm.residual)
          index[i + 1] = pushed;
        else
          push(i, *ending, Optional(), Optional(), norm.residual);
      } else {
        ending->arithmetic = Arithmetic::running;
        const auto wide = norm.running_var->scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
        push(i, *ending, norm.weight, norm.bias, norm.residual,
             Optional(at::stack({norm.running_mean->to(wide), norm.running_var->to(wide)})));
      }
    } else if (link.gate.defined()) {
      push(i, Gate{}, link.gate);
    } else {
      push(i, Prelu{}, link.slopes);
    }
  }
  const bool grad = any_requires_grad(packed.tensors);
  std::vector<int64_t> indices;
  if (grad) {
    for (const auto k : saved)
      if (index[k] > 0 && index[k] < pushed && (indices.empty() || indices.back() < index[k]))
        indices.push_back(index[k]);
    if (ending)
      for (const auto k : saved_result(*ending, ending_residual, pushed)) indices.push_back(k);
  }
  const auto group = training ? process_group : std::string_view();
  const auto result =
      !grad && !training && is_traced(parts[0])
          ? unfused_chain(packed.tensors, packed.links, packed.scalars, group, {}, {})
          : chain_forward(packed.tensors, packed.links, packed.scalars, group, indices, known);
  auto next = std::get<2>(result).begin();
  for (size_t i = first; i < last; ++i) {
    if (!links[i].norm || folds(i)) continue;
    const auto& statistics = *next++;
    const auto& norm = *links[i].norm;
    if (!norm.training) continue;
    found.push_back(statistics);
    const bool bias_left_out = i > first && links[i - 1].conv;
    updates.add(norm, statistics, links[i].sizes,
                bias_left_out ? links[i - 1].conv->bias : Optional(), !process_group.empty());
  }
  return std::get<0>(result);
}

// The statistics behind those of the links that have run.
Optional rest_of(const Optional& statistics, const std::vector<Tensor>& found) {
  c10::SymInt used = 0;
  for (const auto& s : found) used = used + s.sym_size(1);
  if (!statistics || statistics->sym_size(1) <= used) return {};
  return statistics->narrow_symint(1, used, statistics->sym_size(1) - used);
}

// The chain's result. The batch statistics of its norm links in training are added to `found`.
Tensor run_chain(at::TensorList tensors, at::TensorList buffers, at::IntArrayRef links,
                 at::ArrayRef<double> scalars, at::IntArrayRef buffer_counts,
                 at::ArrayRef<double> momenta, at::IntArrayRef training,
                 std::string_view process_group, at::IntArrayRef saved, const Optional& statistics,
                 std::vector<Tensor>& found) {
  const auto chain = unpack(links, scalars, tensors.size());
  const auto model =
      checked(tensors, buffers, chain, buffer_counts, momenta, training, process_group);

  RunningUpdates updates;
  Tensor output;
  if (model.parts[0].sym_size(0) == 0 && process_group.empty() && model.in_training()) {
    output = run_empty(model, updates);
  } else {
    const auto first = first_trained(model);
    const bool multiplied =
        chain[0].gate() && !(model.links.size() && model.links[0].gate.defined());
    std::vector<int64_t> inner;
    for (const auto k : saved) {
      TORCH_CHECK_VALUE(k > 0 && k < int64_t(chain.size()),
                        "conv_bn_chain: expected saved between 1 and ", chain.size() - 1, ", got ",
                        saved);
      inner.push_back(k - multiplied);  // the model has no link for a product computed above
    }
    auto parts = model.parts;
    if (first > 0) {
      // These links need no gradient, so they save nothing, as in eager mode.
      const at::NoGradGuard no_grad;
      parts = {run(model, parts, 0, first, process_group, {}, statistics, found, updates)};
    }
    output = run(model, parts, first, model.links.size(), process_group, inner,
                 rest_of(statistics, found), found, updates);
  }
  if (model.tail) output = activate(output + *model.tail, model.tail_activation);
  if (model.tail_slopes.defined())
    output = at::prelu(output, model.tail_slopes.to(output.scalar_type()));
  updates.write();
  return output;
}

}  // namespace

Tensor conv_bn_chain(at::TensorList tensors, at::TensorList buffers, at::IntArrayRef links,
                     at::ArrayRef<double> scalars, at::IntArrayRef buffer_counts,
                     at::ArrayRef<double> momenta, at::IntArrayRef training,
                     std::string_view process_group, at::IntArrayRef saved,
                     const Optional& statistics) {
  std::vector<Tensor> found;
  return run_chain(tensors, buffers, links, scalars, buffer_counts, momenta, training,
                   process_group, saved, statistics, found);
}

std::tuple<Tensor, Tensor> conv_bn_chain_with_statistics(
    at::TensorList tensors, at::TensorList buffers, at::IntArrayRef links,
    at::ArrayRef<double> scalars, at::IntArrayRef buffer_counts, at::ArrayRef<double> momenta,
    at::IntArrayRef training, std::string_view process_group, at::IntArrayRef saved,
    const Optional& statistics) {
  std::vector<Tensor> found;
  const auto output = run_chain(tensors, buffers, links, scalars, buffer_counts, momenta, training,
                                process_group, saved, statistics, found);
  return {output, found.empty() ? output.new_empty({2, 0}) : at::cat(found, 1)};
}

}  // namespace fusedconvbn
