// The loops of the channel kernels, compiled for the default target.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "channel_loops.h"

#define FUSEDCONVBN_ISA Isa::baseline
#include "channel_loops_impl.h"
