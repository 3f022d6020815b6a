// C entry points for tests/kernels/test_cuda_kernels.py: the CUDA kernels and the memory they run
// in, without PyTorch. By nvcc for a GPU, by a C++ compiler through the shim.
#include <cuda_runtime.h>

#include <vector>

#include "../../../csrc/cuda/channel_launch.h"
#include "../../../csrc/cuda/max_pool2d_launch.h"

using namespace fusedconvbn;

namespace {

constexpr int64_t multiprocessors = 132;

cuda::Map map_of(const int64_t* m) {
  return {static_cast<cuda::Dtype>(m[0]), m[1] != 0, m[2], m[3], m[4], m[5], multiprocessors};
}

cuda::Vectors vectors_of(const int64_t* map, const void* const* pointers, const double* how) {
  return {pointers[0],
          pointers[1],
          pointers[2],
          map[2] * map[4],
          {how[0], how[1] != 0, how[2], how[3] != 0}};
}

cuda::PoolMap pool_of(const int64_t* m) {
  return {static_cast<cuda::Dtype>(m[0]), m[1], m[2], m[3], m[4], m[5], m[6]};
}

cuda::PoolWindow window_of(const int64_t* w) {
  cuda::PoolWindow window;
  for (int* to : {window.kernel, window.stride, window.padding, window.dilation})
    for (int i = 0; i < 2; ++i) to[i] = int(*w++);
  return window;
}

const char* message(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

// map: dtype, channels_last, samples, outer, channels, inner. vectors: statistics, weight, bias.
// how: eps, tutorial, count, counted.
extern "C" {

// Each returns null, or what went wrong.
const char* device_allocate(void** at, int64_t bytes) { return message(cudaMalloc(at, bytes)); }
const char* device_free(void* at) { return message(cudaFree(at)); }
const char* device_copy(void* to, const void* from, int64_t bytes) {
  return message(cudaMemcpy(to, from, bytes, cudaMemcpyDefault));
}
const char* device_wait() {
  const auto launched = cudaGetLastError();
  return message(launched == cudaSuccess ? cudaDeviceSynchronize() : launched);
}

int64_t scratch_bytes(const int64_t* map) { return cuda::scratch_bytes(map_of(map)); }

void channel_stats(const int64_t* map, const void* y, void* scratch, void* result) {
  cuda::channel_stats(map_of(map), y, scratch, result, nullptr);
}

void channel_grad_stats(const int64_t* map, const void* dout, const void* y,
                        const void* const* vectors, const double* how, int64_t activation,
                        double parameter, const void* residual, const void* from_result, void* du,
                        void* scratch, void* result, void* dweight, void* dbias) {
  cuda::channel_grad_stats(map_of(map), dout, y, vectors_of(map, vectors, how),
                           {static_cast<ActivationKind>(activation), parameter},
                           {residual, from_result, du}, scratch, result, dweight, dbias, nullptr);
}

void channel_apply_(const int64_t* map, void* out, const void* y, const void* const* vectors,
                    const double* how, int64_t activation, double parameter, const void* residual) {
  cuda::channel_apply_(map_of(map), out, y, vectors_of(map, vectors, how),
                       {static_cast<ActivationKind>(activation), parameter}, residual, nullptr);
}

void channel_grad_apply_(const int64_t* map, void* out, const void* dout, const void* y,
                         const void* const* vectors, const double* how, const void* sums,
                         int64_t activation, double parameter) {
  cuda::channel_grad_apply_(map_of(map), out, dout, y, vectors_of(map, vectors, how), sums,
                            {static_cast<ActivationKind>(activation), parameter}, nullptr);
}

// Of each entry pointers: mean, var, counter, statistics, bias; numbers: channels, momentum,
// values.
void update_running(int64_t dtype, int64_t count, void* const* pointers, const double* numbers) {
  std::vector<cuda::RunningEntry> entries;
  for (int64_t i = 0; i < count; ++i, pointers += 5, numbers += 3)
    entries.push_back({pointers[0], pointers[1], static_cast<int64_t*>(pointers[2]), pointers[3],
                       pointers[4], static_cast<int64_t>(numbers[0]), numbers[1], numbers[2]});
  cuda::update_running(static_cast<cuda::Dtype>(dtype), entries.data(), count, nullptr);
}

// map: dtype, samples, height, width, channels, pooled height and width; window: kernel, stride,
// padding, dilation.
void max_pool2d(const int64_t* map, const int64_t* window, const void* input, void* output,
                void* offsets) {
  cuda::max_pool2d(pool_of(map), window_of(window), input, output, static_cast<uint8_t*>(offsets),
                   nullptr);
}

void max_pool2d_backward(const int64_t* map, const int64_t* window, const void* dout,
                         const void* offsets, void* dinput) {
  cuda::max_pool2d_backward(pool_of(map), window_of(window), dout,
                            static_cast<const uint8_t*>(offsets), dinput, nullptr);
}

}  // extern "C"
