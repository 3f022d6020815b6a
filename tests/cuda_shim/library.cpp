// C entry points for tests/test_cuda_kernels.py: the CUDA kernels and the memory they run in, without PyTorch. By nvcc
// for a GPU, by a C++ compiler through the shim.
#include <cuda_runtime.h>

#include "../../csrc/cuda/channel_launch.h"

using namespace fusedconvbn;

namespace {

cuda::Map map_of(const int64_t* m) { return {static_cast<cuda::Dtype>(m[0]), m[1] != 0, m[2], m[3], m[4]}; }

const char* message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace

// map: dtype, channels_last, outer, channels, inner. vectors: mean, scale, shift, slope, offset.
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

void channel_grad_stats(const int64_t* map, const void* dout, const void* y, const void* const* vectors,
                        int64_t activation, double parameter, const void* residual, const void* from_result, void* du,
                        void* scratch, void* result) {
  cuda::channel_grad_stats(map_of(map), dout, y, {vectors[0], vectors[1], vectors[2]},
                           {static_cast<ActivationKind>(activation), parameter}, {residual, from_result, du}, scratch,
                           result, nullptr);
}

void channel_apply_(const int64_t* map, void* out, const void* y, const void* const* vectors, int64_t activation,
                    double parameter, const void* residual) {
  cuda::channel_apply_(map_of(map), out, y, {vectors[0], vectors[1], vectors[2]},
                       {static_cast<ActivationKind>(activation), parameter}, residual, nullptr);
}

void channel_grad_apply_(const int64_t* map, void* out, const void* dout, const void* y, const void* const* vectors,
                         int64_t activation, double parameter) {
  cuda::channel_grad_apply_(map_of(map), out, dout, y, {vectors[0], vectors[1], vectors[2]}, vectors[3], vectors[4],
                            {static_cast<ActivationKind>(activation), parameter}, nullptr);
}

// pointers: var, weight, bias
void affine_vectors(int64_t dtype, int64_t channels, const void* const* pointers, double eps, bool tutorial,
                    double count, void* result) {
  cuda::affine_vectors(static_cast<cuda::Dtype>(dtype), channels, pointers[0], pointers[1], pointers[2],
                       {eps, tutorial, count}, result, nullptr);
}

// pointers: sums, total, var, vectors, counts
void grad_vectors(int64_t dtype, int64_t channels, const void* const* pointers, double eps, bool tutorial, double count,
                  void* result) {
  cuda::grad_vectors(static_cast<cuda::Dtype>(dtype), channels, pointers[0], pointers[1], pointers[2], pointers[3],
                     pointers[4], {eps, tutorial, count}, result, nullptr);
}

}  // extern "C"
