// What forward and backward of a chain share: its tensors, the maps that are available, and what a
// link reads beside its map.
#pragma once

#include "chain.h"
#include "maps.h"

namespace fusedconvbn {

struct State {
  State(at::TensorList tensors, at::IntArrayRef links, at::ArrayRef<double> scalars,
        std::string_view process_group, at::IntArrayRef saved);

  const at::Tensor& tensor(int64_t index) const { return tensors[index]; }
  // The weight of conv link i, or the copy of it in the dtype of the maps.
  const at::Tensor& weight(size_t i) const;

  // Of link i, which reads y. A gate is a norm with vectors for each sample.
  NormVectors norm(size_t i, const at::Tensor& y) const;
  NormVectors gate(size_t i, const at::Tensor& y) const;
  at::Tensor slopes(size_t i, const at::Tensor& y) const;
  at::Tensor residual(size_t i, const at::Tensor& y) const;

  bool synchronised(const Norm& norm) const {
    return norm.batch_statistics() && !process_group.empty();
  }

  // A virtual concatenation exists while a link reads it.
  void make_input();

  at::TensorList tensors;
  Chain chain;
  std::string process_group;
  std::vector<at::Tensor> maps;                      // T_0 … T_n; undefined where not available
  std::vector<bool> saved;                           // of each map, for backward
  std::vector<at::Tensor> statistics, cast_weights;  // of each link

 private:
  at::Tensor channel_vector(int64_t index, const at::Tensor& y) const;
};

}  // namespace fusedconvbn
