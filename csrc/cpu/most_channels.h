#pragma once

#include <cstdint>

namespace fusedconvbn::cpu {

constexpr int64_t most_channels = 4096;  // of a map that is read with zeros around it (vector.h)

}  // namespace fusedconvbn::cpu
