// The backward of a chain: recomputes the maps that were not saved and computes the gradients.
#include "backward.h"

#include <ATen/ops/_prelu_kernel_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>

#include "../cpu/arena.h"
#include "convolution.h"
#include "forward.h"
#include "process_group.h"
#include "recompute_check.h"

namespace fusedconvbn {
namespace {

using at::Tensor;

// From the last link to the first: recompute the map that the link reads, if it was not saved, then
// turn the gradient of the link's output into that of its input.
class Backward {
 public:
  Backward(State state, at::TensorList saved_maps, at::TensorList statistics,
           at::IntArrayRef saved);

  std::vector<Tensor> run(Tensor dout, at::IntArrayRef needs_grad);

 private:
  void check_maps(const Tensor& dout) const;
  void plan(at::IntArrayRef needs_grad);
  void recompute(size_t i);

  void link_backward(size_t i);
  void conv_backward(size_t i);
  void gate_backward(size_t i);
  void prelu_backward(size_t i);
  void norm_backward(size_t i);
  void activation_backward(size_t i);

  bool needs_grad(int64_t index) const { return index >= 0 && tensor_needs_grad_[index]; }
  Tensor result(size_t i) const;
  bool only_residual(size_t i) const;
  Tensor uninitialised_grad(int64_t index, const Tensor& y, int64_t samples) const;
  void set_grad(int64_t index, const Tensor& gradient);
  void share_with_residual(size_t i);
  void pass_on(Tensor gradient, size_t i);

  State state_;
  const Chain& chain_ = state_.chain;

  std::vector<bool> tensor_needs_grad_, map_needs_grad_;
  std::vector<bool> read_;        // of each map: a link's backward will read it
  std::vector<bool> recomputed_;  // of each map: it was recomputed, so it may be overwritten

  Tensor grad_;              // the gradient of the current link's output
  bool grad_owned_ = false;  // whether grad_ may be overwritten
  std::vector<Tensor> grads_;
};

// -------------------------------------------------------------------------------- before the links

Backward::Backward(State state, at::TensorList saved_maps, at::TensorList statistics,
                   at::IntArrayRef saved)
    : state_(std::move(state)) {
  TORCH_CHECK_VALUE(saved_maps.size() == saved.size(), "got ", saved_maps.size(),
                    " saved maps for ", saved.size(), " indices");
  for (size_t k = 0; k < saved.size(); ++k) state_.maps[saved[k]] = saved_maps[k];
  size_t norms = 0;
  for (const auto& link : chain_) norms += link.normalises();
  TORCH_CHECK_VALUE(statistics.size() == norms, "got ", statistics.size(), " statistics for ",
                    norms, " norm links");
  for (size_t i = chain_.size(); i-- > 0;)
    if (chain_[i].normalises()) state_.statistics[i] = statistics[--norms].contiguous();
}

// Checks the saved maps and dout, which hooks of autograd or a caller may have replaced. They must
// have the shape, dtype and device that they had in forward. Their layout may differ: each link
// converts the map that it reads.
void Backward::check_maps(const Tensor& dout) const {
  const auto& input = state_.tensor(0);
  auto sizes = input.sym_sizes().vec();
  for (int64_t p = 1; p < chain_.parts; ++p) sizes[1] = sizes[1] + state_.tensor(p).sym_size(1);
  const auto check = [&](const std::string& name, const Tensor& t) {
    TORCH_CHECK_VALUE(t.sym_sizes() == sizes && t.scalar_type() == input.scalar_type() &&
                          t.device() == input.device(),
                      "expected ", name, " of shape ", c10::SymIntArrayRef(sizes), ", ",
                      input.scalar_type(), " and on ", input.device(), ", got ", t.sym_sizes(),
                      ", ", t.scalar_type(), " and ", t.device());
  };
  for (size_t i = 0; i < chain_.size(); ++i) {
    if (const auto* conv = chain_[i].conv())
      sizes = conv->output_sizes(sizes, state_.tensor(chain_[i].weight).sym_sizes());
    const auto& map = state_.maps[i + 1];
    if (map.defined()) check("the saved map " + std::to_string(i + 1), map);
  }
  check("a gradient like the output,", dout);
}

void Backward::plan(at::IntArrayRef needs_grad) {
  const size_t tensors = state_.tensors.size();
  check_indices("needs_grad", needs_grad, 0, int64_t(tensors) - 1);
  tensor_needs_grad_.resize(tensors);
  grads_.resize(tensors);
  for (const auto t : needs_grad) {
    TORCH_CHECK_VALUE(t == 0 || t >= chain_.parts,
                      "expected `needs_grad` with 0 for the gradient of all parts, got ",
                      needs_grad);
    tensor_needs_grad_[t] = true;
  }
  map_needs_grad_.assign(state_.maps.size(), false);
  read_.assign(state_.maps.size(), false);
  recomputed_.assign(state_.maps.size(), false);
  map_needs_grad_[0] = tensor_needs_grad_[0];
  for (size_t i = 0; i < chain_.size(); ++i) {
    const auto& link = chain_[i];
    const bool weight = this->needs_grad(link.weight);
    const bool bias = this->needs_grad(link.bias) && !bias_cancels(chain_, i);
    map_needs_grad_[i + 1] =
        map_needs_grad_[i] || weight || bias || this->needs_grad(link.residual);
    const bool needs_u = link.norm() && !link.norm()->activation.none() && !result(i).defined();
    const bool reads = link.conv() || link.prelu() || (link.gate() && weight) || needs_u ||
                       (link.normalises() && !only_residual(i));
    read_[i] = map_needs_grad_[i + 1] && reads;
  }
}

// Recomputes T_i from the nearest available map before it. Of the maps on the way it retains those
// that a later step of backward reads: T_{i−1}, which is read next, and the results of
// convolutions. Backward recomputes each of the others with one elementwise pass when it needs it.
void Backward::recompute(size_t i) {
  auto& maps = state_.maps;
  const auto& saved = state_.saved;
  size_t first = i;
  while (first > 0 && !maps[first].defined()) --first;
  auto retain = read_;
  for (size_t m = first + 1; m + 1 < i; ++m) retain[m] = read_[m] && chain_[m - 1].conv();
  retain[first] = saved[first] || (first > 0 && read_[first]);
  state_.make_input();
  const auto dtype = maps[first].scalar_type();
  for (size_t m = first; m < i; ++m)  // one cast for the recomputation and for the link's backward
    if (chain_[m].conv()) state_.cast_weights[m] = state_.tensor(chain_[m].weight).to(dtype);
  run_links(state_, first, i, retain);
  for (size_t m = saved[first] ? first + 1 : first; m <= i; ++m) recomputed_[m] = maps[m].defined();
}

std::vector<Tensor> Backward::run(Tensor dout, at::IntArrayRef needs_grad) {
  check_maps(dout);
  plan(needs_grad);
  grad_owned_ = nobody_else_has(dout);
  grad_ = std::move(dout);
  for (size_t i = chain_.size(); i-- > 0 && map_needs_grad_[i + 1];) {
    if (read_[i] && !state_.maps[i].defined()) recompute(i);
    link_backward(i);
  }
  if (tensor_needs_grad_[0]) grads_[0] = grad_owned_ ? std::move(grad_) : grad_.clone();

  std::vector<Tensor> result;
  for (const auto t : needs_grad)  // the gradient of a bias that cancels was not computed: it is 0
    result.push_back(grads_[t].defined() ? grads_[t] : at::zeros_like(state_.tensor(t)));
  return result;
}

void Backward::link_backward(size_t i) {
  const auto& link = chain_[i];
  if (link.conv()) return conv_backward(i);
  if (link.gate()) return gate_backward(i);
  if (link.prelu()) return prelu_backward(i);
  if (link.normalises() && !only_residual(i)) return norm_backward(i);
  activation_backward(i);
}

// ------------------------------------------------------------------------------------------ shared

// The result of link i, if it was saved and act' follows from it.
Tensor Backward::result(size_t i) const {
  const bool last = i + 1 == chain_.size();
  return last && chain_[i].norm()->activation.slope_from_result() ? state_.maps[i + 1] : Tensor();
}

// Whether the residual of norm link i is the only tensor of the link that needs a gradient, and the
// gradient can be computed without u.
bool Backward::only_residual(size_t i) const {
  const auto& link = chain_[i];
  const bool others = map_needs_grad_[i] || needs_grad(link.weight) || needs_grad(link.bias);
  return !others && (link.norm()->activation.none() || result(i).defined());
}

// Allocates the vector to which a kernel writes the gradient of a vector or gate. Undefined if no
// gradient is needed.
Tensor Backward::uninitialised_grad(int64_t index, const Tensor& y, int64_t samples) const {
  if (!needs_grad(index)) return {};
  return at::empty({samples * y.size(1)},
                   y.options().dtype(statistics_dtype(y)).memory_format(std::nullopt));
}

void Backward::set_grad(int64_t index, const Tensor& gradient) {
  if (!gradient.defined()) return;
  const auto& like = state_.tensor(index);
  grads_[index] =
      gradient.to(like.scalar_type()).view(like.sizes()).contiguous(like.suggest_memory_format());
}

// Makes grad_, which is du here, the gradient of the residual too.
void Backward::share_with_residual(size_t i) {
  if (!needs_grad(chain_[i].residual)) return;
  grads_[chain_[i].residual] = grad_owned_ ? grad_ : grad_.clone();
  grad_owned_ = false;
}

// Makes a new tensor the gradient of T_i.
void Backward::pass_on(Tensor gradient, size_t i) {
  grad_ = map_needs_grad_[i] ? std::move(gradient) : Tensor();
  grad_owned_ = true;
}

// --------------------------------------------------------------------------------------- the links

void Backward::conv_backward(size_t i) {
  const auto& link = chain_[i];
  const Tensor in = std::move(state_.maps[i]);
  const bool bias = needs_grad(link.bias) && !bias_cancels(chain_, i);
  // For half types grad_stats computes the bias gradient, because it sums in float.
  const bool half = in.scalar_type() == at::kBFloat16 || in.scalar_type() == at::kHalf;
  if (bias && half) {
    const auto dout = dense(grad_);
    const auto dbias = uninitialised_grad(link.bias, dout, 1);
    grad_stats(dout, dout, 1, {}, {}, {}, {.weight = {}, .bias = dbias});
    set_grad(link.bias, dbias);
  }
  auto [din, dweight, dbias] =
      convolution_backward(*link.conv(), grad_, in, state_.weight(i),
                           {map_needs_grad_[i], needs_grad(link.weight), bias && !half});
  state_.cast_weights[i].reset();
  if (dweight.defined()) grads_[link.weight] = dweight.to(state_.tensor(link.weight).scalar_type());
  if (dbias.defined()) grads_[link.bias] = std::move(dbias);
  pass_on(std::move(din), i);
}

// ds = Σ dout·T is dγ of a norm with mean 0 and r = 1.
void Backward::gate_backward(size_t i) {
  const auto& link = chain_[i];
  const Tensor in = std::move(state_.maps[i]);
  if (needs_grad(link.weight)) {
    const auto y = dense_input(in, i);
    const int64_t samples = y.size(0);
    const auto ds = uninitialised_grad(link.weight, y, samples);
    grad_stats(dense_like("gradient", grad_, y), y, samples, {}, {}, {},
               {.weight = ds, .bias = {}});
    set_grad(link.weight, ds);
  }
  if (!map_needs_grad_[i]) return grad_.reset();
  const auto dout = dense(grad_);
  Tensor din = grad_owned_ || !dout.is_same(grad_) ? dout : at::empty_like(dout);
  apply_(din, dout, state_.gate(i, dout), {}, {});
  pass_on(std::move(din), i);
}

void Backward::prelu_backward(size_t i) {
  const auto& link = chain_[i];
  const auto y = dense_input(std::exchange(state_.maps[i], {}), i);
  const auto s = state_.slopes(i, y);
  auto [din, ds] = at::_prelu_kernel_backward(dense_like("gradient", grad_, y), y, s);
  if (needs_grad(link.weight)) {
    const auto& weight = state_.tensor(link.weight);
    grads_[link.weight] = ds.sum_to_size(s.sizes()).to(weight.scalar_type()).view(weight.sizes());
  }
  pass_on(std::move(din), i);
}

// The backward of a link without statistics, or of a link in which only the residual needs a
// gradient: du = act'(u)·dout with u = T [+ residual].
void Backward::activation_backward(size_t i) {
  const auto& activation = chain_[i].norm()->activation;
  const Tensor in = std::move(state_.maps[i]);
  if (!activation.none()) {
    bool u_owned = false;
    Tensor u = result(i);
    if (!u.defined()) {
      const auto y = dense_input(in, i);
      u_owned = recomputed_[i] || !y.is_same(in);
      u = y;
      if (const auto residual = state_.residual(i, y); residual.defined()) {
        if (!u_owned) u = at::empty_like(y);
        u_owned = true;
        apply_(u, y, {}, {}, residual);
      }
    }
    u = dense(u);
    const auto dout = dense_like("gradient", grad_, u);
    const bool dout_owned = grad_owned_ || !dout.is_same(grad_);
    Tensor du = dout_owned ? dout : u_owned ? u : at::empty_like(u);
    grad_apply_(du, dout, u, {}, {}, activation);
    grad_ = std::move(du);
    grad_owned_ = true;
  }
  share_with_residual(i);
  if (!map_needs_grad_[i]) grad_.reset();
}

// The formulas of chain.h in two passes: one for S1, S2, dγ and dβ, and one for dT.
void Backward::norm_backward(size_t i) {
  const auto& link = chain_[i];
  const auto& norm = *link.norm();
  const Tensor in = std::move(state_.maps[i]);
  const auto y = dense_input(in, i);
  const bool y_owned = recomputed_[i] || !y.is_same(in);
  const auto vectors = state_.norm(i, y);
  if (recompute_is_checked() && y.numel() && norm.batch_statistics())
    check_recomputed(y, stats(y), vectors.statistics.slice(0, vectors.statistics.size(0) - 2));

  auto dout = dense_like("gradient", grad_, y);
  grad_owned_ |= !dout.is_same(grad_);
  auto activation = norm.activation;
  GradSource source;
  if (link.residual >= 0 && !activation.none()) {
    if (const auto out = result(i); out.defined())
      source.result = dense_like("result", out, y);
    else
      source.residual = state_.residual(i, y);
  }
  if (writes_du(y, activation, source)) source.du = grad_owned_ ? dout : at::empty_like(y);
  const ParameterGrads grads{uninitialised_grad(link.weight, y, 1),
                             uninitialised_grad(link.bias, y, 1)};
  const auto sums = grad_stats(dout, y, 1, vectors, activation, source, grads);
  set_grad(link.weight, grads.weight);
  set_grad(link.bias, grads.bias);
  if (source.du.defined()) {
    dout = source.du;
    grad_owned_ = true;
    activation = Activation{};
  }
  grad_ = dout;
  share_with_residual(i);
  if (!map_needs_grad_[i]) return grad_.reset();

  Tensor all;  // the sums over all processes; undefined if the statistics do not depend on y
  if (norm.batch_statistics())
    all = state_.synchronised(norm) ? all_reduce_sum(sums, state_.process_group) : sums;
  Tensor din = y_owned ? y : grad_owned_ ? dout : at::empty_like(y);
  grad_apply_(din, dout, y, vectors, all, activation);
  pass_on(std::move(din), i);
}

}  // namespace

std::vector<Tensor> chain_backward_kernel(Tensor dout, at::TensorList tensors,
                                          at::TensorList saved_maps, at::TensorList statistics,
                                          at::IntArrayRef links, at::ArrayRef<double> scalars,
                                          std::string_view process_group, at::IntArrayRef saved,
                                          at::IntArrayRef needs_grad) {
  const ArenaScope scope;
  return Backward({tensors, links, scalars, process_group, saved}, saved_maps, statistics, saved)
      .run(std::move(dout), needs_grad);
}

}  // namespace fusedconvbn
