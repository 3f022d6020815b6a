// The state that forward and backward of a chain share: its tensors, the maps that are available,
// and the other tensors that each link reads.
#pragma once

#include "chain.h"
#include "maps.h"

namespace fusedconvbn {

struct State {
  State(at::TensorList tensors, at::IntArrayRef links, at::ArrayRef<double> scalars,
        std::string_view process_group, at::IntArrayRef saved);

  const at::Tensor& tensor(int64_t index) const { return tensors[index]; }
  // The weight of conv link i, or its copy in the dtype of the maps.
  const at::Tensor& weight(size_t i) const;

  // The tensors of link i, which reads y. For the kernels a gate is a norm with a scale for each
  // sample and channel.
  NormVectors norm(size_t i, const at::Tensor& y) const;
  NormVectors gate(size_t i, const at::Tensor& y) const;
  at::Tensor slopes(size_t i, const at::Tensor& y) const;
  at::Tensor residual(size_t i, const at::Tensor& y) const;

  bool synchronised(const Norm& norm) const {
    return norm.batch_statistics() && !process_group.empty();
  }

  // Computes T_0 if it is a virtual concatenation and not available.
  void make_input();

  at::TensorList tensors;
  Chain chain;
  std::string process_group;
  std::vector<at::Tensor> maps;                      // T_0 … T_n; undefined where not available
  std::vector<bool> saved;                           // of each map: saved for backward
  std::vector<at::Tensor> statistics, cast_weights;  // of each link

 private:
  at::Tensor channel_vector(int64_t index, const at::Tensor& y) const;
};

}  // namespace fusedconvbn
