// SPDX-License-Identifier: Apache-2.0
#include "cuda/primitives/launch.cuh"
#include "cuda/scan/residual.cuh"
#include "cuda/scan/scan.cuh"

namespace hullkit {
namespace {

__device__ uint64_t scan_key(double value) {
  return value == -INFINITY ? kSmallestKey : value == INFINITY ? kLargestKey : key_of(value);
}

template <typename E>
__global__ void __launch_bounds__(Scan<E, E, 1>::kThreads)
    scan_all_kernel(const DevicePool pool, const Directions directions, int64_t batch, const ScanPlan plan, double sign,
                    const int*, Best* out) {
  extern __shared__ __align__(16) char shared[];
  const int64_t b0 = blockIdx.x % plan.groups * plan.group;
  const int members = static_cast<int>(batch - b0 < plan.group ? batch - b0 : plan.group);
  Scan<E, E, 1> scan(pool, directions, b0, members);
  scan.run(shared, plan, blockIdx.x / plan.groups, sign, [&](int, int member, int64_t position, double value) {
    if (position >= pool.size) return;
    out[(b0 + member) * pool.size + position] = {scan_key(value), static_cast<uint32_t>(position), 0};
  });
}

// Every lane keeps its own best from tile to tile; they meet once, at the end of the block's share.
template <typename E, typename C, int kPieces>
__global__ void __launch_bounds__(Scan<E, C, kPieces>::kThreads)
    scan_best_kernel(const DevicePool pool, const Directions directions, int64_t batch, const ScanPlan plan,
                     double sign, const int* active, Best* out) {
  using T = Scan<E, C, kPieces>;
  constexpr int kSlots = 2 * T::kPromptBlocks;
  extern __shared__ __align__(16) char shared[];
  __shared__ Best of_warps[T::kWarps][kScanGroup];

  const int64_t b0 = blockIdx.x % plan.groups * plan.group, block = blockIdx.x / plan.groups;
  const int members = static_cast<int>(batch - b0 < plan.group ? batch - b0 : plan.group);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  if (active != nullptr && !__syncthreads_or(thread < members && active[b0 + thread] != 0)) return;

  double values[kSlots];
  uint32_t places[kSlots];
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    values[s] = INFINITY;
    places[s] = kNoIndex;
  }
  T scan(pool, directions, b0, members);
  scan.run(shared, plan, block, sign, [&](int s, int, int64_t position, double value) {
    if (value < values[s]) {  // positions rise, so the first of equals stays
      values[s] = value;
      places[s] = static_cast<uint32_t>(position);
    }
  });
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
#pragma unroll
    for (int apart = 4; apart < 32; apart *= 2) {  // lanes with the same directions
      const double value = __shfl_xor_sync(kAllLanes, values[s], apart);
      const uint32_t place = __shfl_xor_sync(kAllLanes, places[s], apart);
      if (value < values[s] || (value == values[s] && place < places[s])) {
        values[s] = value;
        places[s] = place;
      }
    }
    if (lane < 4) of_warps[warp][s / 2 * 8 + lane * 2 + s % 2] = {scan_key(values[s]), places[s], 0};
  }
  __syncthreads();
  if (thread >= members) return;
  Best best = of_warps[0][thread];
#pragma unroll
  for (int w = 1; w < T::kWarps; ++w) {
    if (precedes(of_warps[w][thread], best)) best = of_warps[w][thread];
  }
  out[(b0 + thread) * plan.blocks + block] = best;
}

// Entries that share their candidates also share the pass, so many at a time; others take one each.
int scan_group(const PoolSpec& pool) {
  const bool shared = pool.rows.stride[0] == 0 && !pool.lengths.defined() && !pool.candidates.defined();
  return shared ? kScanGroup : 1;
}

int64_t attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device), "CUDA device");
  check_cuda(cudaDeviceGetAttribute(&value, which, device), "CUDA device");
  return value;
}

}  // namespace

// On the current device: as many blocks as it holds at a time.
template <typename T>
void ScanPass::lay_out(const PoolSpec& pool, Kernel kernel) {
  static_assert(T::kRows == kScanRows, "");
  kernel_ = kernel;
  threads_ = T::kThreads;
  plan_.group = scan_group(pool);
  plan_.groups = (pool.batch() + plan_.group - 1) / plan_.group;
  // Two blocks are to fit on a multiprocessor. 2 KiB each are left for static shared memory and the device's own part.
  const int64_t half = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / 2 - 2048;
  plan_.shared = T::shared_bytes(pool.dim(), true);
  plan_.resident = static_cast<int64_t>(plan_.shared) <= half || T::chunks(pool.dim()) <= T::kStages;
  if (!plan_.resident) plan_.shared = T::shared_bytes(pool.dim(), false);
  allow_shared(kernel_, plan_.shared);
  int of_processor = 0;
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_processor, kernel_, T::kThreads, plan_.shared),
             "CUDA occupancy");
  const int64_t groups = plan_.groups < 1 ? 1 : plan_.groups;
  const int64_t share = of_processor * attribute(cudaDevAttrMultiProcessorCount) / groups;
  const int64_t most = scan_blocks(pool.positions());
  plan_.blocks = share < 4 ? 4 : share;  // of many groups, parts small enough to fill the last wave
  if (plan_.blocks > most) plan_.blocks = most;
}

ScanPass::ScanPass(const PoolSpec& pool, const DevicePool& device_pool, const Directions& directions, double sign,
                   Best* out, Keep keep)
    : device_pool_(device_pool), directions_(directions), batch_(pool.batch()), sign_(sign), out_(out) {
  with_element(pool.rows.dtype, [&](auto element) {
    using E = decltype(element);
    using R = Residual<E>;
    using C = typename R::Column;
    if (keep == Keep::kAll) {
      lay_out<Scan<E, E, 1>>(pool, scan_all_kernel<E>);
    } else if (directions.residuals) {
      lay_out<Scan<E, C, R::kPieces>>(pool, scan_best_kernel<E, C, R::kPieces>);
    } else {
      lay_out<Scan<E, E, 1>>(pool, scan_best_kernel<E, E, 1>);
    }
  });
}

void ScanPass::operator()(const int* active, void* stream) const {
  launch(kernel_, plan_.groups * plan_.blocks, threads_, plan_.shared, stream, device_pool_, directions_, batch_, plan_,
         sign_, active, out_);
}

}  // namespace hullkit
