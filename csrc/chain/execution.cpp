// Runs a chain forward and backward on a device; all that is particular to the device is in its
// channel kernels.
#include <ATen/CachedTensorUtils.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/_prelu_kernel.h>
#include <ATen/ops/_prelu_kernel_backward.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <array>

#include "chain.h"
#include "../kernels/channel_kernels.h"
#include "../cpu/arena.h"
#include "../ops.h"
#include "process_group.h"
#include "recompute_check.h"

namespace fusedconvbn {
namespace {

// Rows 0 … 4 of the statistics of a synchronised link (ops.h), from the (2, C) mean and variance of
// `count` values.
Tensor synchronise(const Tensor& own, int64_t count, const std::string& process_group) {
  // Added up in double, Σ T and Σ T² of float maps lose nothing when |mean| ≫ std; those of double
  // maps lose digits of the variance, as many as (mean/std)² has.
  const auto wide = own.to(at::kDouble);
  const auto mean = wide.select(0, 0), var = wide.select(0, 1);
  const auto sums = all_reduce_sum(
      at::stack({mean * count, (var + mean * mean) * count, at::full_like(mean, double(count))}),
      process_group);
  const auto n = sums.select(0, 2), divisor = n.clamp_min(1);
  const auto joint_mean = sums.select(0, 0) / divisor;
  const auto joint_var = (sums.select(0, 1) / divisor - joint_mean * joint_mean).clamp_min(0);
  return at::cat({at::stack({joint_mean, joint_var, n}).to(own.scalar_type()), own});
}

// What a norm link finds of y.
Tensor map_statistics(const Tensor& y, const std::string& process_group) {
  const auto own = y.numel() ? channel_kernels(y).stats(y, /*samples=*/1)
                             : at::zeros({2, y.size(1)}, y.options().dtype(statistics_dtype(y)));
  return process_group.empty() ? own : synchronise(own, y.numel() / y.size(1), process_group);
}

class Execution {
 public:
  Execution(at::TensorList tensors, at::IntArrayRef links, at::ArrayRef<double> scalars,
            std::string_view process_group, at::IntArrayRef kept,
            const Tensor& input_statistics = {})
      : tensors_(tensors),
        chain_(unpack(links, scalars, tensors.size())),
        process_group_(process_group),
        maps_(chain_.size() + 1),
        kept_(chain_.size() + 1),
        statistics_(chain_.size()),
        cast_weights_(chain_.size()) {
    if (chain_.parts == 1) maps_[0] = tensors[0];
    kept_[0] = chain_.parts == 1;
    if (input_statistics.defined() && chain_[0].norm() && chain_[0].norm()->batch_statistics())
      statistics_[0] = input_statistics.clone(at::MemoryFormat::Contiguous);
    check_places("kept", kept, 1, int64_t(chain_.size()));
    for (const auto i : kept) kept_[i] = true;
  }

  ChainResult forward(at::IntArrayRef kept) {
    make_input();
    run(0, chain_.size(), kept_);
    std::vector<Tensor> kept_maps, statistics;
    for (const auto i : kept)
      if (i < int64_t(chain_.size())) kept_maps.push_back(maps_[i]);
    for (const auto& s : statistics_)
      if (s.defined()) statistics.push_back(s);
    return {maps_.back(), kept_maps, statistics};
  }

  std::vector<Tensor> backward(Tensor dout, at::TensorList kept_maps, at::TensorList statistics,
                               at::IntArrayRef kept, at::IntArrayRef wanted) {
    TORCH_CHECK_VALUE(kept_maps.size() == kept.size(), "got ", kept_maps.size(), " kept maps for ",
                      kept.size(), " places");
    for (size_t k = 0; k < kept.size(); ++k) maps_[kept[k]] = kept_maps[k];
    size_t norms = 0;
    for (const auto& link : chain_) norms += link.normalises();
    TORCH_CHECK_VALUE(statistics.size() == norms, "got ", statistics.size(), " statistics for ",
                      norms, " norm links");
    for (size_t i = chain_.size(); i-- > 0;)
      if (chain_[i].normalises()) statistics_[i] = statistics[--norms].contiguous();
    check_maps(dout);
    plan_gradients(wanted);
    remade_.assign(maps_.size(), false);

    grad_owned_ = nobody_else_has(dout);
    grad_ = std::move(dout);
    for (size_t i = chain_.size(); i-- > 0 && reached_[i + 1];) {
      if (read_[i] && !maps_[i].defined()) remake(i);
      if (const auto* conv = chain_[i].conv())
        conv_backward(*conv, i);
      else if (chain_[i].gate())
        gate_backward(i);
      else if (chain_[i].prelu())
        prelu_backward(i);
      else if (chain_[i].normalises() && !only_residual(i))
        norm_backward(*chain_[i].norm(), i);
      else
        activation_backward(*chain_[i].norm(), i);
    }
    if (wanted_[0]) grads_[0] = grad_owned_ ? std::move(grad_) : grad_.clone();

    std::vector<Tensor> result;
    for (const auto t : wanted) {  // that of a bias that cancels was not computed
      result.push_back(grads_[t].defined() ? grads_[t] : at::zeros_like(tensor(t)));
    }
    return result;
  }

 private:
  const Tensor& tensor(int64_t place) const { return tensors_[place]; }
  std::optional<Tensor> optional_tensor(int64_t place) const {
    return place < 0 ? std::nullopt : std::optional<Tensor>(tensors_[place]);
  }
  bool wanted(int64_t place) const { return place >= 0 && wanted_[place]; }

  // What backward is given went through the hands of autograd's hooks, or is a caller's. The maps
  // must be those of forward, but for their layout: each link makes sure of that where it reads
  // one.
  void check_maps(const Tensor& dout) const {
    auto sizes = tensors_[0].sym_sizes().vec();
    for (int64_t p = 1; p < chain_.parts; ++p) sizes[1] = sizes[1] + tensors_[p].sym_size(1);
    const auto check = [&](const std::string& name, const Tensor& t) {
      TORCH_CHECK_VALUE(t.sym_sizes() == sizes && t.scalar_type() == tensors_[0].scalar_type() &&
                            t.device() == tensors_[0].device(),
                        "expected ", name, " of shape ", c10::SymIntArrayRef(sizes), ", ",
                        tensors_[0].scalar_type(), " and on ", tensors_[0].device(), ", got ",
                        t.sym_sizes(), ", ", t.scalar_type(), " and ", t.device());
    };
    for (size_t i = 0; i < chain_.size(); ++i) {
      if (const auto* conv = chain_[i].conv())
        sizes = conv->output_sizes(sizes, tensor(chain_[i].weight).sym_sizes());
      if (maps_[i + 1].defined()) check("the kept map " + std::to_string(i + 1), maps_[i + 1]);
    }
    check("a gradient like the output,", dout);
  }

  // A virtual concatenation exists while a link reads it.
  void make_input() {
    if (!maps_[0].defined()) maps_[0] = concatenated(tensors_.slice(0, chain_.parts));
  }

  // Makes T_last from T_first. Statistics that are known are used, the others are computed. A map
  // outside `retain` is let go, or overwritten, by the link that reads it.
  void run(size_t first, size_t last, const std::vector<bool>& retain) {
    for (size_t i = first; i < last; ++i) {
      const bool free_to_overwrite = !retain[i] && (i > first || !kept_[i]);
      Tensor in = retain[i] ? maps_[i] : std::move(maps_[i]);
      if (const auto* conv = chain_[i].conv()) {
        maps_[i + 1] = convolve(*conv, i, in);
      } else {
        const auto y = dense(in, i);
        const bool in_place = free_to_overwrite || !y.is_same(in);
        if (chain_[i].gate()) {
          maps_[i + 1] = in_place ? y : at::empty_like(y);
          apply_(maps_[i + 1], y, gate(i, y), {}, {});
          continue;
        }
        if (chain_[i].prelu()) {
          maps_[i + 1] = at::_prelu_kernel(y, slopes(i, y));
          continue;
        }
        const auto& norm = *chain_[i].norm();
        if (norm.normalises() && !statistics_[i].defined()) statistics_[i] = statistics(norm, i, y);
        maps_[i + 1] = in_place ? y : at::empty_like(y);
        apply_(maps_[i + 1], y, vectors(norm, i, y), norm.activation, residual(i, y));
      }
    }
  }

  // Remakes T_i, and on the way the other maps that are read by a backward still to come. But for
  // the one below T_i, which is read next, those that are one pass away from another one are let go
  // of and made again when their turn comes.
  void remake(size_t i) {
    size_t first = i;
    while (first > 0 && !maps_[first].defined()) --first;
    auto retain = read_;
    for (size_t m = first + 1; m + 1 < i; ++m) retain[m] = read_[m] && chain_[m - 1].conv();
    retain[first] = kept_[first] || (first > 0 && read_[first]);
    make_input();
    for (size_t m = first; m < i; ++m)
      if (chain_[m].conv())
        cast_weights_[m] = tensor(chain_[m].weight).to(maps_[first].scalar_type());
    run(first, i, retain);
    for (size_t m = kept_[first] ? first + 1 : first; m <= i; ++m) remade_[m] = maps_[m].defined();
  }

  // The weight of conv link i, or that which remaking its result has left for its backward.
  const Tensor& weight(size_t i) const {
    return cast_weights_[i].defined() ? cast_weights_[i] : tensor(chain_[i].weight);
  }

  Tensor convolve(const Conv& conv, size_t i, const Tensor& in) const {
    const auto bias = bias_cancels(chain_, i) ? std::nullopt : optional_tensor(chain_[i].bias);
    return convolution(conv, in, weight(i), bias);
  }

  // The kernels read the two dense layouts; any other map is copied into the one it is nearer to.
  // T_0 always is in the one that the fake kernels promise.
  static Tensor dense(const Tensor& t, size_t i) {
    return dense(i == 0 ? t.contiguous(t.suggest_memory_format()) : t);
  }
  static Tensor dense(const Tensor& t) {
    TORCH_CHECK_VALUE(t.dim() >= 2 && t.size(1) > 0, "a norm link needs channels, got shape ",
                      t.sizes());
    return t.numel() == 0 || channel_layout(t) ? t : t.contiguous(t.suggest_memory_format());
  }
  static Tensor dense_like(const char* name, const Tensor& t, const Tensor& like) {
    TORCH_CHECK_VALUE(t.sizes() == like.sizes() && t.scalar_type() == like.scalar_type() &&
                          t.device() == like.device(),
                      "expected a ", name, " like the output, ", like.toString(), like.sizes(),
                      ", got ", t.toString(), t.sizes());
    if (t.numel() == 0) return t;
    const auto layout = channel_layout(t);
    if (layout && layout->channels_last == dense_layout(like).channels_last) return t;
    return at::empty_like(like).copy_(t);
  }

  Tensor residual(size_t i, const Tensor& y) const {
    const auto place = chain_[i].residual;
    return place < 0 ? Tensor() : dense_like("residual", tensor(place), y);
  }

  // A gate as a norm with vectors for each sample
  NormVectors gate(size_t i, const Tensor& y) const {
    const auto& s = tensor(chain_[i].weight);
    auto sizes = y.sizes().vec();
    std::fill(sizes.begin() + 2, sizes.end(), 1);
    TORCH_CHECK_VALUE(s.sizes() == sizes && s.device() == y.device(), "expected a gate of shape ",
                      sizes, " on ", y.device(), ", got ", s.toString(), s.sizes());
    return {.statistics = {},
            .weight = s.to(statistics_dtype(y)).reshape({-1}).contiguous(),
            .bias = {},
            .how = {}};
  }

  // s of a prelu, as it multiplies y
  Tensor slopes(size_t i, const Tensor& y) const {
    const auto& s = tensor(chain_[i].weight);
    TORCH_CHECK_VALUE(
        s.dim() == 1 && (s.size(0) == 1 || s.size(0) == y.size(1)) && s.device() == y.device(),
        "expected one slope or ", y.size(1), " on ", y.device(), ", got ", s.toString(), s.sizes());
    std::vector<int64_t> sizes(y.dim(), 1);
    sizes[1] = s.size(0);
    return s.to(y.scalar_type()).view(sizes);
  }

  Tensor statistics(const Norm& norm, size_t i, const Tensor& y) const {
    // An operator's results are its own.
    if (norm.arithmetic == Arithmetic::running)
      return tensor(chain_[i].statistics)
          .to(statistics_dtype(y), /*non_blocking=*/false, /*copy=*/true,
              at::MemoryFormat::Contiguous);
    // A process without samples takes part in a synchronised batch.
    TORCH_CHECK_VALUE(y.numel() > 0 || !process_group_.empty(),
                      "a norm link needs values, got shape ", y.sizes());
    return map_statistics(y, process_group_);
  }

  // A vector of the norm link at `y`, as the kernels read it; undefined when absent.
  Tensor channel_vector(int64_t place, const Tensor& y) const {
    if (place < 0) return {};
    const auto& t = tensors_[place];
    TORCH_CHECK_VALUE(t.dim() == 1 && t.size(0) == y.size(1) && t.device() == y.device(),
                      "expected a vector of ", y.size(1), " values on ", y.device(), ", got ",
                      t.toString(), t.sizes());
    return t.to(statistics_dtype(y)).contiguous();
  }

  // out may be y.
  static void apply_(Tensor& out, const Tensor& y, const NormVectors& norm,
                     const Activation& activation, const Tensor& residual) {
    if (y.numel()) channel_kernels(y).apply_(out, y, norm, activation, residual);
  }

  // S1 and S2
  static Tensor channel_sums(const Tensor& dout, const Tensor& y, int64_t samples,
                             const NormVectors& norm, const Activation& activation,
                             const Joined& joined, const ParameterGrads& grads) {
    if (y.numel())
      return channel_kernels(y).grad_stats(dout, y, samples, norm, activation, joined, grads);
    for (auto t : {grads.weight, grads.bias})
      if (t.defined()) t.zero_();
    return at::zeros({2, samples * y.size(1)},
                     y.options().dtype(statistics_dtype(y)).memory_format(std::nullopt));
  }

  Normalisation normalisation(const Norm& norm, const Tensor& y) const {
    return {norm.eps, norm.arithmetic == Arithmetic::tutorial, double(y.numel() / y.size(1)),
            synchronised(norm)};
  }

  // Of link i, which reads y.
  NormVectors vectors(const Norm& norm, size_t i, const Tensor& y) const {
    if (!norm.normalises()) return {};
    const auto& statistics = statistics_[i];
    const int64_t rows = synchronised(norm) ? 5 : 2;
    TORCH_CHECK_VALUE(
        statistics.sizes() == at::IntArrayRef({rows, y.size(1)}) &&
            statistics.scalar_type() == statistics_dtype(y) && statistics.device() == y.device(),
        "expected the statistics of a map of shape ", y.sizes(), " to be of shape [", rows, ", ",
        y.size(1), "], ", statistics_dtype(y), " and on ", y.device(), ", got ", statistics.sizes(),
        ", ", statistics.scalar_type(), " and ", statistics.device());
    TORCH_CHECK_VALUE(norm.arithmetic != Arithmetic::tutorial || process_group_.empty(),
                      "the tutorial's arithmetic is not synchronised");
    return {statistics, channel_vector(chain_[i].weight, y), channel_vector(chain_[i].bias, y),
            normalisation(norm, y)};
  }

  bool synchronised(const Norm& norm) const {
    return norm.batch_statistics() && !process_group_.empty();
  }

  // The result of link i, if it is at hand and act' shows in it.
  Tensor result(size_t i) const {
    const bool shows = i + 1 == chain_.size() && chain_[i].norm()->activation.slope_from_result();
    return shows ? maps_[i + 1] : Tensor();
  }

  // Whether of a norm link's gradients that of the residual alone is wanted, and needs no u.
  bool only_residual(size_t i) const {
    const auto& link = chain_[i];
    const bool others = reached_[i] || wanted(link.weight) || wanted(link.bias);
    return !others && (link.norm()->activation.none() || result(i).defined());
  }

  // reached: the gradient of T_i is needed. read: a backward that will run reads T_i.
  void plan_gradients(at::IntArrayRef wanted) {
    wanted_.resize(tensors_.size());
    grads_.resize(tensors_.size());
    check_places("wanted", wanted, 0, int64_t(tensors_.size()) - 1);
    for (const auto t : wanted) {
      TORCH_CHECK_VALUE(t == 0 || t >= chain_.parts,
                        "expected `wanted` with 0 for the gradient of all parts, got ", wanted);
      wanted_[t] = true;
    }
    reached_.assign(maps_.size(), false);
    read_.assign(maps_.size(), false);
    reached_[0] = wanted_[0];
    for (size_t i = 0; i < chain_.size(); ++i) {
      const auto& link = chain_[i];
      const bool bias = this->wanted(link.bias) && !bias_cancels(chain_, i);
      reached_[i + 1] =
          reached_[i] || this->wanted(link.weight) || bias || this->wanted(link.residual);
      const bool needs_u = link.norm() && !link.norm()->activation.none() && !result(i).defined();
      const bool reads = link.conv() || needs_u || (link.normalises() && !only_residual(i)) ||
                         (link.gate() && this->wanted(link.weight)) || link.prelu();
      read_[i] = reached_[i + 1] && reads;
    }
  }

  void conv_backward(const Conv& conv, size_t i) {
    const auto& link = chain_[i];
    const Tensor in = std::move(maps_[i]);
    const bool bias = wanted(link.bias) && !bias_cancels(chain_, i);
    // Half types are added up in float, by a kernel that does so.
    const bool half = in.scalar_type() == at::kBFloat16 || in.scalar_type() == at::kHalf;
    if (bias && half) {
      const auto dout = dense(grad_);
      const auto dbias = vector_of_grads(link.bias, dout, 1);
      channel_sums(dout, dout, 1, {}, {}, {}, {.weight = {}, .bias = dbias});
      set_grad(link.bias, dbias);
    }
    auto [din, dweight, dbias] = convolution_backward(
        conv, grad_, in, weight(i), {reached_[i], wanted(link.weight), bias && !half});
    cast_weights_[i].reset();
    if (dweight.defined()) grads_[link.weight] = dweight.to(tensor(link.weight).scalar_type());
    if (dbias.defined()) grads_[link.bias] = std::move(dbias);
    grad_ = std::move(din);
    grad_owned_ = true;
  }

  void gate_backward(size_t i) {
    const auto& link = chain_[i];
    const Tensor in = std::move(maps_[i]);
    if (wanted(link.weight)) {  // ds = Σ dout·T, as the dγ of a norm with mean 0 and r 1
      const auto y = dense(in, i);
      const int64_t samples = y.size(0);
      const auto ds = vector_of_grads(link.weight, y, samples);
      channel_sums(dense_like("gradient", grad_, y), y, samples, {}, {}, {},
                   {.weight = ds, .bias = {}});
      set_grad(link.weight, ds);
    }
    if (!reached_[i]) return grad_.reset();
    const auto dout = dense(grad_);
    Tensor din = grad_owned_ || !dout.is_same(grad_) ? dout : at::empty_like(dout);
    apply_(din, dout, gate(i, dout), {}, {});
    grad_ = std::move(din);
    grad_owned_ = true;
  }

  void prelu_backward(size_t i) {
    const auto& link = chain_[i];
    const auto y = dense(std::exchange(maps_[i], {}), i);
    const auto s = slopes(i, y);
    auto [din, ds] = at::_prelu_kernel_backward(dense_like("gradient", grad_, y), y, s);
    if (wanted(link.weight)) {
      const auto& weight = tensor(link.weight);
      grads_[link.weight] = ds.sum_to_size(s.sizes()).to(weight.scalar_type()).view(weight.sizes());
    }
    if (!reached_[i]) return grad_.reset();
    grad_ = std::move(din);
    grad_owned_ = true;
  }

  // du, which is in grad_, is the gradient of the residual too.
  void share_with_residual(size_t i) {
    if (!wanted(chain_[i].residual)) return;
    grads_[chain_[i].residual] = grad_owned_ ? grad_ : grad_.clone();
    grad_owned_ = false;
  }

  void activation_backward(const Norm& norm, size_t i) {
    Tensor in = std::move(maps_[i]);
    if (!norm.activation.none()) {
      bool u_owned = false;
      Tensor u = result(i);
      if (!u.defined()) {
        const auto y = dense(in, i);
        u_owned = remade_[i] || !y.is_same(in);
        u = y;
        if (const auto r = residual(i, y); r.defined()) {
          u = u_owned ? y : at::empty_like(y);
          u_owned = true;
          apply_(u, y, {}, {}, r);
        }
      }
      u = dense(u);
      const auto dout = dense_like("gradient", grad_, u);
      Tensor du = grad_owned_ || !dout.is_same(grad_) ? dout : u_owned ? u : at::empty_like(u);
      if (u.numel()) channel_kernels(u).grad_apply_(du, dout, u, {}, {}, norm.activation);
      grad_ = std::move(du);
      grad_owned_ = true;
    }
    share_with_residual(i);
    if (!reached_[i]) grad_.reset();
  }

  // Uninitialised, for the gradient of the vector or gate at `place`, if it is wanted.
  Tensor vector_of_grads(int64_t place, const Tensor& y, int64_t samples) const {
    if (!wanted(place)) return {};
    return at::empty({samples * y.size(1)},
                     y.options().dtype(statistics_dtype(y)).memory_format(std::nullopt));
  }

  void set_grad(int64_t place, const Tensor& gradient) {
    if (!gradient.defined()) return;
    const auto& like = tensor(place);
    grads_[place] =
        gradient.to(like.scalar_type()).view(like.sizes()).contiguous(like.suggest_memory_format());
  }

  void norm_backward(const Norm& norm, size_t i) {
    const auto& link = chain_[i];
    const Tensor in = std::move(maps_[i]);
    const auto y = dense(in, i);
    const bool y_owned = remade_[i] || !y.is_same(in);
    const auto& kernels = channel_kernels(y);
    const auto& statistics = statistics_[i];
    const auto vectors = this->vectors(norm, i, y);
    if (recompute_is_checked() && y.numel() && norm.batch_statistics())
      check_recomputed(y, kernels.stats(y, /*samples=*/1),
                       statistics.slice(0, statistics.size(0) - 2));

    auto dout = dense_like("gradient", grad_, y);
    grad_owned_ |= !dout.is_same(grad_);
    auto activation = norm.activation;
    Joined joined;
    if (link.residual >= 0 && !activation.none()) {
      if (const auto out = result(i); out.defined())
        joined.result = dense_like("result", out, y);
      else
        joined.residual = residual(i, y);
    }
    // du is the gradient of the residual; and a pass that is limited by arithmetic need not do it
    // twice.
    if ((link.residual >= 0 && !activation.none()) || (!activation.cheap() && y.is_cpu()))
      joined.du = grad_owned_ ? dout : at::empty_like(y);
    const ParameterGrads grads{vector_of_grads(link.weight, y, 1),
                               vector_of_grads(link.bias, y, 1)};
    const auto sums = channel_sums(dout, y, 1, vectors, activation, joined, grads);
    set_grad(link.weight, grads.weight);
    set_grad(link.bias, grads.bias);
    if (joined.du.defined()) {
      dout = joined.du;
      grad_owned_ = true;
      activation = Activation{};
    }
    grad_ = dout;
    share_with_residual(i);

    if (!reached_[i]) return grad_.reset();

    Tensor all;  // the sums of all processes, where the statistics depend on y
    if (norm.batch_statistics())
      all = synchronised(norm) ? all_reduce_sum(sums, process_group_) : sums;
    Tensor out = y_owned ? y : grad_owned_ ? dout : at::empty_like(y);
    if (y.numel()) kernels.grad_apply_(out, dout, y, vectors, all, activation);
    grad_ = std::move(out);
    grad_owned_ = true;
  }

  // Nobody else can see what is written to t. (PyTorch's rule where it adds up gradients in place.
  // Not on CUDA, where a kernel on another stream may still have to read it; not where the memory
  // is not PyTorch's own.)
  static bool nobody_else_has(const Tensor& t) {
    return t.is_cpu() && at::caching::adjusted_use_count(t) == 1 &&
           !at::caching::is_cached_tensor(t) && t.has_storage() && t.storage().use_count() == 1 &&
           t.storage().allocator();
  }

  at::TensorList tensors_;
  Chain chain_;
  std::string process_group_;
  std::vector<Tensor> maps_;  // T_0 … T_n, undefined where not at hand
  std::vector<bool> kept_;
  std::vector<Tensor> statistics_, cast_weights_;  // of link i
  // backward
  Tensor grad_;              // of the output of the link at hand
  bool grad_owned_ = false;  // and may be written over
  std::vector<bool> wanted_, reached_, read_, remade_;
  std::vector<Tensor> grads_;
};

ChainResult chain_forward_kernel(at::TensorList tensors, at::IntArrayRef links,
                                 at::ArrayRef<double> scalars, std::string_view process_group,
                                 at::IntArrayRef kept,
                                 const std::optional<Tensor>& input_statistics) {
  const ArenaScope scope;
  return Execution(tensors, links, scalars, process_group, kept,
                   input_statistics.value_or(Tensor()))
      .forward(kept);
}

Tensor channel_stats_kernel(const Tensor& y, std::string_view process_group) {
  TORCH_CHECK_VALUE(y.dim() >= 2 && y.size(1) > 0 && (y.numel() > 0 || !process_group.empty()),
                    "expected a map with values, got shape ", y.sizes());
  return map_statistics(y.contiguous(y.suggest_memory_format()), std::string(process_group));
}

std::vector<Tensor> chain_backward_op(const Tensor& dout, at::TensorList tensors,
                                      at::TensorList kept_maps, at::TensorList statistics,
                                      at::IntArrayRef links, at::ArrayRef<double> scalars,
                                      std::string_view process_group, at::IntArrayRef kept,
                                      at::IntArrayRef wanted) {
  return chain_backward_kernel(dout, tensors, kept_maps, statistics, links, scalars, process_group,
                               kept, wanted);
}

}  // namespace

std::vector<Tensor> chain_backward_kernel(Tensor dout, at::TensorList tensors,
                                          at::TensorList kept_maps, at::TensorList statistics,
                                          at::IntArrayRef links, at::ArrayRef<double> scalars,
                                          std::string_view process_group, at::IntArrayRef kept,
                                          at::IntArrayRef wanted) {
  const ArenaScope scope;
  return Execution(tensors, links, scalars, process_group, kept)
      .backward(std::move(dout), kept_maps, statistics, kept, wanted);
}

TORCH_LIBRARY_IMPL(fusedconvbn, CPU, m) {
  m.impl("_chain_forward", TORCH_FN(chain_forward_kernel));
  m.impl("_chain_backward", TORCH_FN(chain_backward_op));
  m.impl("_channel_stats", TORCH_FN(channel_stats_kernel));
}

TORCH_LIBRARY_IMPL(fusedconvbn, CUDA, m) {
  m.impl("_chain_forward", TORCH_FN(chain_forward_kernel));
  m.impl("_chain_backward", TORCH_FN(chain_backward_op));
  m.impl("_channel_stats", TORCH_FN(channel_stats_kernel));
}

}  // namespace fusedconvbn
