// The four channel kernels (channel_kernels.h) on raw device pointers; each call puts its work on `stream` and returns.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../activation.h"
#include "../channel_vectors.h"

namespace fusedconvbn::cuda {

enum class Dtype { f64, f32, bf16, f16 };

// outer × channels × inner values, or, channels last, outer × channels; none of them 0.
struct Map {
  Dtype dtype;
  bool channels_last;
  int64_t outer, channels, inner;
};

// C values each, double for f64 and else float.
struct Vectors {
  const void *mean, *scale, *shift;
};

// Of a link with a residual (channel_kernels.h); all null without one.
struct Joined {
  const void *residual, *result;
  void* du;
};

// Bytes of scratch memory that a reduction over `map` needs, aligned to 16.
int64_t scratch_bytes(const Map& map);

// result: (2, C), as channel_kernels.h says.
void channel_stats(const Map&, const void* y, void* scratch, void* result, cudaStream_t);
void channel_grad_stats(const Map&, const void* dout, const void* y, Vectors, Activation, Joined, void* scratch,
                        void* result, cudaStream_t);
void channel_apply_(const Map&, void* out, const void* y, Vectors, Activation, const void* residual, cudaStream_t);
void channel_grad_apply_(const Map&, void* out, const void* dout, const void* y, Vectors, const void* slope,
                         const void* offset, Activation, cudaStream_t);

// AffineVectors and GradVectors of channel_vectors.h; dtype is f64 or f32.
void affine_vectors(Dtype, int64_t channels, const void* var, const void* weight, const void* bias, Normalisation,
                    void* result, cudaStream_t);
void grad_vectors(Dtype, int64_t channels, const void* sums, const void* total, const void* var, const void* vectors,
                  const void* counts, Normalisation, void* result, cudaStream_t);

}  // namespace fusedconvbn::cuda
