// The loops of the Winograd convolutions, compiled for AVX-512.
#if defined(__x86_64__)
// Every header that other files share is included before the target changes, so that none of it is
// compiled for this target.
#include "winograd_loops.h"

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif

#define FUSEDCONVBN_ISA Isa::avx512
#define FUSEDCONVBN_VECTOR 16
#include "winograd_loops_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
