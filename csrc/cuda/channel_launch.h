// The device code (channel_kernels.h) on raw device pointers; each call puts its work on `stream`
// and returns.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../kernels/activation.h"
#include "../kernels/channel_vectors.h"

namespace fusedconvbn::cuda {

enum class Dtype { f64, f32, bf16, f16 };

// outer × channels × inner values, or, channels last, samples × outer × channels; none of them 0.
// Contiguous, samples with vectors of their own are channels.
struct Map {
  Dtype dtype;
  bool channels_last;
  int64_t samples, outer, channels, inner;
  int64_t multiprocessors;  // of the device
};

// Those of a NormVectors, double for f64 and else float; null where undefined.
struct Vectors {
  const void *statistics, *weight, *bias;
  int64_t groups;
  Normalisation how;
};

// As in channel_kernels.h; with a residual or a result there is a du.
struct GradSource {
  const void *residual, *result;
  void* du;
};

// Bytes of scratch memory that a reduction over `map` needs, aligned to 16.
int64_t scratch_bytes(const Map& map);

// result: (2, G), as channel_kernels.h says; dweight and dbias may be null.
void channel_stats(const Map&, const void* y, void* scratch, void* result, cudaStream_t);
void channel_grad_stats(const Map&, const void* dout, const void* y, Vectors, Activation,
                        GradSource, void* scratch, void* result, void* dweight, void* dbias,
                        cudaStream_t);
void channel_apply_(const Map&, void* out, const void* y, Vectors, Activation, const void* residual,
                    cudaStream_t);
// sums: S1 and S2, or null
void channel_grad_apply_(const Map&, void* out, const void* dout, const void* y, Vectors,
                         const void* sums, Activation, cudaStream_t);

// A RunningUpdate: vectors of f64 or f32; the counter may be null, or the others, and the bias.
struct RunningEntry {
  void *mean, *var;
  int64_t* counter;
  const void *statistics, *bias;
  int64_t channels;
  double momentum, values;
};
constexpr int64_t most_running_entries =
    32;  // in one launch; a kernel's arguments are 4 KiB at most

// No two of the entries may be of the same running statistics.
void update_running(Dtype, const RunningEntry* entries, int64_t count, cudaStream_t);

}  // namespace fusedconvbn::cuda
