// The channel kernels (channel_kernels.h) on raw device pointers. Each call queues its work on the
// stream and returns.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../kernels/activation.h"
#include "../kernels/channel_vectors.h"

namespace fusedconvbn::cuda {

enum class Dtype { f64, f32, bf16, f16 };

// outer × channels × inner values, or samples × outer × channels if channels last. None is 0. In a
// contiguous map, samples with vectors of their own count as channels.
struct Map {
  Dtype dtype;
  bool channels_last;
  int64_t samples, outer, channels, inner;
  int64_t multiprocessors;  // of the device
};

// The tensors of a NormVectors: double for f64, float otherwise; null if undefined.
struct Vectors {
  const void *statistics, *weight, *bias;
  int64_t groups;
  Normalisation how;
};

// As in channel_kernels.h. du is given if residual or result is.
struct GradSource {
  const void *residual, *result;
  void* du;
};

// Bytes of scratch memory, aligned to 16, that a reduction over `map` needs.
int64_t scratch_bytes(const Map& map);

// result is (2, G), as in channel_kernels.h; dweight and dbias may be null.
void channel_stats(const Map&, const void* y, void* scratch, void* result, cudaStream_t);
void channel_grad_stats(const Map&, const void* dout, const void* y, Vectors, Activation,
                        GradSource, void* scratch, void* result, void* dweight, void* dbias,
                        cudaStream_t);
void channel_apply_(const Map&, void* out, const void* y, Vectors, Activation, const void* residual,
                    cudaStream_t);
// sums holds S1 and S2, or is null.
void channel_grad_apply_(const Map&, void* out, const void* dout, const void* y, Vectors,
                         const void* sums, Activation, cudaStream_t);

// A RunningUpdate with vectors of f64 or f32. Undefined tensors are null.
struct RunningEntry {
  void *mean, *var;
  int64_t* counter;
  const void *statistics, *bias;
  int64_t channels;
  double momentum, values;
};
// In one launch; the arguments of a kernel may take 4 KiB.
constexpr int64_t most_running_entries = 32;

// No two entries may have the same running statistics.
void update_running(Dtype, const RunningEntry* entries, int64_t count, cudaStream_t);

}  // namespace fusedconvbn::cuda
