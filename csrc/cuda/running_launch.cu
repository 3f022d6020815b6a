// Updates the running statistics of all norms of a chain; each block updates one norm.
#include <algorithm>

#include "channel_launch.h"
#include "launch.cuh"

namespace fusedconvbn::cuda {
namespace {

constexpr unsigned threads = 256;

struct RunningEntries {
  RunningEntry entry[most_running_entries];
};

template <typename acc>
__global__ void __launch_bounds__(threads)
    update_running_statistics(const __grid_constant__ RunningEntries entries) {
  const RunningEntry& entry = entries.entry[blockIdx.x];
  const double count = entry.counter ? double(*entry.counter + 1) : 0;
  __syncthreads();
  if (threadIdx.x == 0 && entry.counter) ++*entry.counter;
  if (entry.mean == nullptr) return;
  const RunningChannel<acc> of{static_cast<const acc*>(entry.statistics),
                               static_cast<const acc*>(entry.bias),
                               entry.channels,
                               entry.momentum,
                               entry.values,
                               count};
  for (int64_t c = threadIdx.x; c < entry.channels; c += threads)
    of.move(c, static_cast<acc*>(entry.mean)[c], static_cast<acc*>(entry.var)[c]);
}

}  // namespace

void update_running(Dtype dtype, const RunningEntry* entries, int64_t count, cudaStream_t stream) {
  RunningEntries some{};
  std::copy_n(entries, count, some.entry);
  launch(dtype == Dtype::f64 ? update_running_statistics<double> : update_running_statistics<float>,
         dim3(count), dim3(threads), stream, some);
}

}  // namespace fusedconvbn::cuda
