// A limit that the loops of convolutions share with the functions that call them.
#pragma once

#include <cstdint>

namespace fusedconvbn::cpu {

constexpr int64_t most_channels = 4096;  // of a map that is read through a Window (vector.h)

}  // namespace fusedconvbn::cpu
