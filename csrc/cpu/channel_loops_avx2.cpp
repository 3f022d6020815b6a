// The loops of the channel kernels, compiled for AVX2.
#if defined(__x86_64__)
// Every header that other files share is included before the target changes, so that none of it is
// compiled for this target.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "channel_loops.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define FUSEDCONVBN_ISA Isa::avx2
#include "channel_loops_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
