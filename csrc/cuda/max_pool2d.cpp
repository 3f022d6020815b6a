// Max pooling on CUDA: takes tensors and launches the kernels on the current stream.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../kernels/pool.h"
#include "dtype.h"
#include "max_pool2d_launch.h"

namespace fusedconvbn {
namespace {

using at::Tensor;

cuda::PoolMap map_of(const Tensor& like, at::IntArrayRef sizes, at::IntArrayRef pooled,
                     bool channels_last) {
  const int64_t planes = channels_last ? 1 : sizes[1];
  return {cuda::dtype_of(like), sizes[0] * planes, sizes[2], sizes[3],
          sizes[1] / planes,    pooled[2],         pooled[3]};
}

cuda::PoolWindow window_of(const Pool& pool) {
  const auto both = [](const std::array<int64_t, 2>& v, int (&to)[2]) {
    to[0] = int(v[0]), to[1] = int(v[1]);
  };
  cuda::PoolWindow window;
  both(pool.kernel, window.kernel);
  both(pool.stride, window.stride);
  both(pool.padding, window.padding);
  both(pool.dilation, window.dilation);
  return window;
}

std::tuple<Tensor, Tensor> max_pool2d_cuda(const Tensor& given, at::IntArrayRef packed) {
  const auto pool = Pool::unpack(packed);
  const auto format = given.suggest_memory_format();
  const auto input = given.contiguous(format);
  // PyTorch's meta kernel computes the sizes and raises the errors.
  const auto like =
      std::get<0>(pool.with_indices(at::empty_like(input, input.options().device(at::kMeta))));
  auto output = at::empty(like.sizes(), input.options().memory_format(format));
  auto offsets = at::empty_like(output, output.options().dtype(at::kByte));
  if (output.numel() == 0) return {output, offsets};
  const c10::cuda::CUDAGuard guard(input.device());
  cuda::max_pool2d(
      map_of(input, input.sizes(), output.sizes(), format == at::MemoryFormat::ChannelsLast),
      window_of(pool), input.const_data_ptr(), output.mutable_data_ptr(),
      offsets.mutable_data_ptr<uint8_t>(), c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {output, offsets};
}

Tensor max_pool2d_backward_cuda(const Tensor& dout, const Tensor& offsets, at::IntArrayRef packed,
                                at::IntArrayRef sizes, bool channels_last) {
  const auto pool = Pool::unpack(packed);
  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const auto gradients = dout.contiguous(format), found = offsets.contiguous(format);
  auto dinput = at::empty(sizes, dout.options().memory_format(format));
  if (dinput.numel() == 0) return dinput;
  const c10::cuda::CUDAGuard guard(dout.device());
  cuda::max_pool2d_backward(map_of(dout, sizes, dout.sizes(), channels_last), window_of(pool),
                            gradients.const_data_ptr(), found.const_data_ptr<uint8_t>(),
                            dinput.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return dinput;
}

}  // namespace

TORCH_LIBRARY_IMPL(fusedconvbn, CUDA, m) {
  m.impl("_max_pool2d", TORCH_FN(max_pool2d_cuda));
  m.impl("_max_pool2d_backward", TORCH_FN(max_pool2d_backward_cuda));
}

}  // namespace fusedconvbn
