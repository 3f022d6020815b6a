#if defined(__x86_64__)
// All that is shared with other files comes before the target changes, so none of it is compiled
// for this one.
#include "winograd_loops.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define FUSEDCONVBN_ISA Isa::avx2
#define FUSEDCONVBN_VECTOR 8
#include "winograd_loops_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
