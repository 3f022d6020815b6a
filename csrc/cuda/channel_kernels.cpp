// The channel kernels on CUDA: tensors in, launches on the current stream.
#include "../channel_kernels.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "channel_launch.h"

namespace fusedconvbn {
namespace {

using at::Tensor;

cuda::Map map_of(const Tensor& y) {
  const auto layout = dense_layout(y);
  const auto dtype = [&] {
    switch (y.scalar_type()) {
      case at::kDouble:
        return cuda::Dtype::f64;
      case at::kFloat:
        return cuda::Dtype::f32;
      case at::kBFloat16:
        return cuda::Dtype::bf16;
      default:
        TORCH_INTERNAL_ASSERT(y.scalar_type() == at::kHalf);
        return cuda::Dtype::f16;
    }
  }();
  return {dtype, layout.channels_last, layout.outer, layout.channels, layout.inner};
}

cuda::Vectors vectors_of(const Affine& a) { return {row(a.statistics, 0), row(a.vectors, 0), row(a.vectors, 1)}; }

const void* data_or_null(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }

// run(map, scratch, result, stream)
template <typename Run>
Tensor reduce(const Tensor& y, const Run& run) {
  const c10::cuda::CUDAGuard guard(y.device());
  const auto map = map_of(y);
  const auto options = at::TensorOptions().device(y.device());
  auto result = at::empty({2, map.channels}, options.dtype(statistics_dtype(y)));
  const auto scratch = at::empty({cuda::scratch_bytes(map)}, options.dtype(at::kByte));
  run(map, scratch.mutable_data_ptr(), result.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

// run(map, stream)
template <typename Run>
void elementwise(const Tensor& y, const Run& run) {
  const c10::cuda::CUDAGuard guard(y.device());
  run(map_of(y), c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor channel_stats(const Tensor& y) {
  return reduce(y, [&](const cuda::Map& map, void* scratch, void* result, cudaStream_t stream) {
    cuda::channel_stats(map, y.const_data_ptr(), scratch, result, stream);
  });
}

Tensor channel_grad_stats(const Tensor& dout, const Tensor& y, const Affine& a, const Activation& activation,
                          const Joined& joined) {
  const cuda::Joined with{data_or_null(joined.residual), data_or_null(joined.result),
                          joined.du.defined() ? joined.du.mutable_data_ptr() : nullptr};
  return reduce(y, [&](const cuda::Map& map, void* scratch, void* result, cudaStream_t stream) {
    cuda::channel_grad_stats(map, dout.const_data_ptr(), y.const_data_ptr(), vectors_of(a), activation, with, scratch,
                             result, stream);
  });
}

void channel_apply_(Tensor& out, const Tensor& y, const Affine& a, const Activation& activation,
                    const Tensor& residual) {
  elementwise(y, [&](const cuda::Map& map, cudaStream_t stream) {
    cuda::channel_apply_(map, out.mutable_data_ptr(), y.const_data_ptr(), vectors_of(a), activation,
                         data_or_null(residual), stream);
  });
}

void channel_grad_apply_(Tensor& out, const Tensor& dout, const Tensor& y, const Affine& a, const Tensor& linear,
                         const Activation& activation) {
  elementwise(y, [&](const cuda::Map& map, cudaStream_t stream) {
    cuda::channel_grad_apply_(map, out.mutable_data_ptr(), dout.const_data_ptr(), y.const_data_ptr(), vectors_of(a),
                              row(linear, 0), row(linear, 1), activation, stream);
  });
}

// run(dtype, channels, result, stream)
template <typename Run>
Tensor for_channels(const Tensor& like, const Run& run) {
  const c10::cuda::CUDAGuard guard(like.device());
  auto result = at::empty({3, like.size(1)}, like.options());
  run(like.scalar_type() == at::kDouble ? cuda::Dtype::f64 : cuda::Dtype::f32, like.size(1), result.mutable_data_ptr(),
      c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

Tensor affine_vectors(const Tensor& statistics, const Tensor& weight, const Tensor& bias, const Normalisation& how) {
  return for_channels(statistics, [&](cuda::Dtype dtype, int64_t channels, void* result, cudaStream_t stream) {
    cuda::affine_vectors(dtype, channels, row(statistics, 1), data_or_null(weight), data_or_null(bias), how, result,
                         stream);
  });
}

Tensor grad_vectors(const Tensor& sums, const Tensor& total, const Affine& a, bool counted, const Normalisation& how) {
  return for_channels(sums, [&](cuda::Dtype dtype, int64_t channels, void* result, cudaStream_t stream) {
    cuda::grad_vectors(dtype, channels, row(sums, 0), row(total, 0), row(a.statistics, 1), row(a.vectors, 0),
                       counted ? row(a.statistics, 2) : nullptr, how, result, stream);
  });
}

const ChannelKernels kernels{channel_stats,       channel_apply_, channel_grad_stats,
                             channel_grad_apply_, affine_vectors, grad_vectors};
const RegisterChannelKernels registered(at::kCUDA, kernels);

}  // namespace
}  // namespace fusedconvbn
