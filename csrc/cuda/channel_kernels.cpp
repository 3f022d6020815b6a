// The channel kernels on CUDA: takes tensors and launches the kernels on the current stream.
#include "../kernels/channel_kernels.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <vector>

#include "channel_launch.h"
#include "dtype.h"

namespace fusedconvbn {
namespace {

using at::Tensor;

cuda::Map map_of(const Tensor& y, int64_t samples) {
  const auto layout = dense_layout(y, samples);
  int multiprocessors = 0;
  C10_CUDA_CHECK(
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, y.device().index()));
  return {cuda::dtype_of(y), layout.channels_last, layout.samples, layout.outer,
          layout.channels,   layout.inner,         multiprocessors};
}

const void* data_or_null(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
void* mutable_data_or_null(const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

cuda::Vectors vectors_of(const NormVectors& norm, const Tensor& y, int64_t samples) {
  return {data_or_null(norm.statistics), data_or_null(norm.weight), data_or_null(norm.bias),
          samples * y.size(1), norm.how};
}

// Calls run(map, scratch, result, stream) with a new result, which it returns, and scratch memory.
template <typename Run>
Tensor reduce(const Tensor& y, int64_t samples, const Run& run) {
  const c10::cuda::CUDAGuard guard(y.device());
  const auto map = map_of(y, samples);
  const auto options = at::TensorOptions().device(y.device());
  auto result = at::empty({2, samples * y.size(1)}, options.dtype(statistics_dtype(y)));
  const auto scratch = at::empty({cuda::scratch_bytes(map)}, options.dtype(at::kByte));
  run(map, scratch.mutable_data_ptr(), result.mutable_data_ptr(),
      c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

// Calls run(map, vectors, stream).
template <typename Run>
void elementwise(const Tensor& y, const NormVectors& norm, const Run& run) {
  const c10::cuda::CUDAGuard guard(y.device());
  const int64_t samples = samples_of(y, norm);
  run(map_of(y, samples), vectors_of(norm, y, samples), c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor channel_stats(const Tensor& y, int64_t samples) {
  return reduce(y, samples,
                [&](const cuda::Map& map, void* scratch, void* result, cudaStream_t stream) {
                  cuda::channel_stats(map, y.const_data_ptr(), scratch, result, stream);
                });
}

Tensor channel_grad_stats(const Tensor& dout, const Tensor& y, int64_t samples,
                          const NormVectors& norm, const Activation& activation,
                          const GradSource& source, const ParameterGrads& grads) {
  const cuda::GradSource with{data_or_null(source.residual), data_or_null(source.result),
                              mutable_data_or_null(source.du)};
  return reduce(y, samples,
                [&](const cuda::Map& map, void* scratch, void* result, cudaStream_t stream) {
                  cuda::channel_grad_stats(map, dout.const_data_ptr(), y.const_data_ptr(),
                                           vectors_of(norm, y, samples), activation, with, scratch,
                                           result, mutable_data_or_null(grads.weight),
                                           mutable_data_or_null(grads.bias), stream);
                });
}

void channel_apply_(Tensor& out, const Tensor& y, const NormVectors& norm,
                    const Activation& activation, const Tensor& residual) {
  elementwise(y, norm,
              [&](const cuda::Map& map, const cuda::Vectors& vectors, cudaStream_t stream) {
                cuda::channel_apply_(map, out.mutable_data_ptr(), y.const_data_ptr(), vectors,
                                     activation, data_or_null(residual), stream);
              });
}

void channel_grad_apply_(Tensor& out, const Tensor& dout, const Tensor& y, const NormVectors& norm,
                         const Tensor& sums, const Activation& activation) {
  elementwise(y, norm,
              [&](const cuda::Map& map, const cuda::Vectors& vectors, cudaStream_t stream) {
                cuda::channel_grad_apply_(map, out.mutable_data_ptr(), dout.const_data_ptr(),
                                          y.const_data_ptr(), vectors, data_or_null(sums),
                                          activation, stream);
              });
}

void update_running(at::ArrayRef<RunningUpdate> updates) {
  const auto& first = updates[0].statistics;
  const c10::cuda::CUDAGuard guard(first.device());
  std::vector<cuda::RunningEntry> entries;
  const auto launch = [&] {
    cuda::update_running(cuda::dtype_of(first), entries.data(), entries.size(),
                         c10::cuda::getCurrentCUDAStream().stream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    entries.clear();
  };
  for (const auto& u : updates) {
    const cuda::RunningEntry entry{mutable_data_or_null(u.mean),
                                   mutable_data_or_null(u.var),
                                   static_cast<int64_t*>(mutable_data_or_null(u.counter)),
                                   data_or_null(u.statistics),
                                   data_or_null(u.bias),
                                   u.statistics.size(1),
                                   u.momentum,
                                   u.values};
    // A norm that occurs twice in a chain is updated by two launches, one after the other.
    const bool again = std::any_of(entries.begin(), entries.end(),
                                   [&](const auto& e) { return e.mean == entry.mean; });
    if (again || int64_t(entries.size()) == cuda::most_running_entries) launch();
    entries.push_back(entry);
  }
  launch();
}

const ChannelKernels kernels{channel_stats, channel_apply_, channel_grad_stats, channel_grad_apply_,
                             update_running};
const RegisterChannelKernels registered(at::kCUDA, kernels);

}  // namespace
}  // namespace fusedconvbn
