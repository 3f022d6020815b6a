// Stands in for c10's header of this name: there is one device (device.cpp).
#pragma once

#include <c10/core/Device.h>

namespace c10::cuda {

struct CUDAGuard {
  explicit CUDAGuard(Device) {}
};

}  // namespace c10::cuda

// What is registered for CUDA by a source that includes this is registered for the device that
// stands in for it.
#define kCUDA kPrivateUse1
