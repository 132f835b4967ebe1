// The pass that keeps of every entry only its best candidate: that of least sign * product, the first on a tie. Every
// lane keeps its own best from tile to tile; they meet once, at the end of the block's share.
#pragma once

#include "cuda/scan.cuh"

namespace hullkit {

// partial [B, plan.blocks]. active [B], optional: groups of none but inactive entries are left out.
template <typename E, typename C, int kPieces>
__global__ void __launch_bounds__(Scan<E, C, kPieces>::kThreads)
    scan_best_kernel(const DevicePool<E> pool, const Directions<C> directions, int64_t batch, const ScanPlan plan,
                     double sign, const int* active, Best* partial) {
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
  partial[(b0 + thread) * plan.blocks + block] = best;
}

// The best of `count` partial ones; all threads of the block get it. Its key is kSmallestKey if a candidate is broken,
// kLargestKey if there is none.
__device__ inline Best best_of(const Best* partial, int64_t count) {
  __shared__ Contest::Places places;
  Best best = no_best();
  for (int64_t t = threadIdx.x; t < count; t += blockDim.x) {
    const Best here = partial[t];
    if (precedes(here, best)) best = here;
  }
  return Contest(&places).least(best);
}

// Laid out once, launched as often as there are directions.
template <typename E, typename C, int kPieces>
class BestScan {
 public:
  BestScan(const PoolSpec& pool, const DevicePool<E>& device_pool, const Directions<C>& directions, double sign,
           Best* partial)
      : device_pool_(device_pool), directions_(directions), batch_(pool.batch()), sign_(sign), partial_(partial) {
    plan_ = plan_scan<Scan<E, C, kPieces>>(kernel(), pool);
  }

  int64_t partials() const { return plan_.blocks; }

  void operator()(const int* active, void* stream) const {
    launch(kernel(), plan_.groups * plan_.blocks, Scan<E, C, kPieces>::kThreads, plan_.shared, stream, device_pool_,
           directions_, batch_, plan_, sign_, active, partial_);
  }

 private:
  static constexpr auto kernel() { return scan_best_kernel<E, C, kPieces>; }

  DevicePool<E> device_pool_;
  Directions<C> directions_;
  int64_t batch_;
  double sign_;
  Best* partial_;
  ScanPlan plan_;
};

inline int64_t scan_best_bytes(int64_t batch, int64_t positions) {
  return batch * scan_blocks(positions) * static_cast<int64_t>(sizeof(Best));
}

}  // namespace hullkit
