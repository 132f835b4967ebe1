// A warp (a block, from 257 points on) for each support, with the arithmetic of rounding.h, operation for operation:
// every change of a unit is a candidate of one thread, and the first or the best of them all is made.
#include "cuda/gram.h"
#include "cuda/group.cuh"
#include "cuda/launch.cuh"
#include "cuda/prompt.cuh"
#include "hullkit/round_multiplicities.h"
#include "rounding/quotas.cuh"
#include "rounding/rounding.h"
#include "rounding/rounding_cuda.h"

namespace hullkit {
namespace {

struct Supports {
  const double* gram;  // [count, n + 1, n + 1]
  int64_t n;
  bool by_position;
  int64_t positions;       // an index is less
  const int64_t* indices;  // [B, width]
  const double* weights;   // [B, width]
  int64_t width, total, exchange_passes;
  int64_t* counts;  // [B, width]
};

template <bool kOneWarp>
struct DeviceRounding {
  using Threads = Group<kOneWarp>;

  const double* gram;
  int64_t ld;
  double total;
  int size;
  double* slope;     // [size] h = G c - N b
  double* diagonal;  // [size] G_ii
  int64_t* counts;   // [size]
  int64_t* starts;   // [size] counts at the start of a pass
  int* place;        // [size] of a point in the Gram matrix

  __device__ double product(int i, int j) const { return gram[place[i] * ld + place[j]]; }

  __device__ void add_to_slope(int i, double units) {
    for (int j = threadIdx.x; j < size; j += blockDim.x) slope[j] += units * product(i, j);
  }

  __device__ void move(int i, int64_t units) {
    add_to_slope(i, static_cast<double>(units));
    if (threadIdx.x == 0) counts[i] += units;
  }

  // False if a product or a weight is not finite.
  __device__ bool start(const double* weights, int64_t* remaining) {
    const Quotas quotas(weights, size, static_cast<int64_t>(total));
    bool broken = quotas.broken;
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
      diagonal[i] = product(i, i);
      slope[i] = -total * gram[(ld - 1) * ld + place[i]];
      counts[i] = broken ? 0 : static_cast<int64_t>(floor(quotas[i]));
      broken |= !isfinite(diagonal[i]) || !isfinite(slope[i]);
    }
    if (Threads::any(broken)) return false;
    Threads::sync();
    *remaining = static_cast<int64_t>(total);
    for (int i = 0; i < size; ++i) {
      *remaining -= counts[i];
      if (counts[i] > 0) add_to_slope(i, static_cast<double>(counts[i]));
    }
    Threads::sync();
    return true;
  }

  __device__ void complete(int64_t remaining) {
    for (; remaining > 0; --remaining) {
      Best best{kLargestKey, 0xffffffffu};
      for (int i = threadIdx.x; i < size; i += blockDim.x) {
        const Best here{key_of(2.0 * slope[i] + diagonal[i]), static_cast<uint32_t>(i)};
        if (precedes(here, best)) best = here;
      }
      best = Threads::least(best);
      move(static_cast<int>(best.index), 1);
      Threads::sync();
    }
  }

  // The first j >= begin to which a unit of i should go, `size` if there is none.
  __device__ int next_receiver(int i, int begin, double threshold) const {
    const double own = diagonal[i] - 2.0 * slope[i];
    uint32_t first = static_cast<uint32_t>(size);
    for (int j = threadIdx.x; j < size; j += blockDim.x) {
      const double change = 2.0 * slope[j] + diagonal[j] - 2.0 * product(i, j) + own;
      if (j >= begin && j != i && change < threshold) {
        first = static_cast<uint32_t>(j);
        break;
      }
    }
    return static_cast<int>(Threads::least(first));
  }

  // One pass; false if it moved nothing.
  __device__ bool exchange() {
    const double threshold = -kMinImprovement * total * total;
    Threads::sync();  // whoever still reads the last pass's starts
    for (int i = threadIdx.x; i < size; i += blockDim.x) starts[i] = counts[i];
    Threads::sync();
    bool moved = false;
    for (int i = 0; i < size; ++i) {
      if (starts[i] == 0) continue;
      int j = 0;
      while (counts[i] > 0 && (j = next_receiver(i, j, threshold)) < size) {
        Threads::sync();
        move(i, -1);
        move(j, 1);
        Threads::sync();
        moved = true;
        ++j;
      }
    }
    return moved;
  }
};

template <bool kOneWarp>
__global__ void round_kernel(const Supports supports, int64_t first) {
  using Threads = Group<kOneWarp>;
  extern __shared__ __align__(16) char shared[];
  const int64_t b = first + blockIdx.x, width = supports.width, ld = supports.n + 1;
  const int64_t* const indices = supports.indices + b * width;
  int64_t* const out = supports.counts + b * width;

  DeviceRounding<kOneWarp> rounding;
  rounding.gram = supports.gram + blockIdx.x * ld * ld;
  rounding.ld = ld;
  rounding.total = static_cast<double>(supports.total);
  rounding.slope = reinterpret_cast<double*>(shared);
  rounding.diagonal = rounding.slope + width;
  rounding.counts = reinterpret_cast<int64_t*>(rounding.diagonal + width);
  rounding.starts = rounding.counts + width;
  rounding.place = reinterpret_cast<int*>(rounding.starts + width);
  uint32_t size = static_cast<uint32_t>(width);  // padding is at the end
  bool broken = false;
  for (int64_t s = threadIdx.x; s < width; s += blockDim.x) {
    const int64_t index = indices[s];
    broken |= index < -1 || index >= supports.positions;
    if (index < 0) size = min(size, static_cast<uint32_t>(s));
    rounding.place[s] = static_cast<int>(supports.by_position ? index : s);
    out[s] = 0;
  }
  rounding.size = static_cast<int>(Threads::least(size));
  if (rounding.size == 0) return;
  int64_t remaining = 0;
  if (Threads::any(broken) || !rounding.start(supports.weights + b * width, &remaining)) {
    for (int64_t s = threadIdx.x; s < rounding.size; s += blockDim.x) out[s] = -1;
    return;
  }
  rounding.complete(remaining);
  for (int64_t pass = 0; pass < supports.exchange_passes && rounding.exchange(); ++pass) {
  }
  Threads::sync();
  for (int64_t s = threadIdx.x; s < rounding.size; s += blockDim.x) out[s] = rounding.counts[s];
}

}  // namespace

void round_on_gram(const double* gram, int64_t n, bool by_position, int64_t positions, const TensorView& indices,
                   const TensorView& weights, int64_t total, int64_t exchange_passes, const TensorView& counts,
                   int64_t first, int64_t count, void* stream) {
  const int64_t width = indices.shape[1];
  const Supports supports{gram,
                          n,
                          by_position,
                          positions,
                          static_cast<const int64_t*>(indices.data),
                          static_cast<const double*>(weights.data),
                          width,
                          total,
                          exchange_passes,
                          static_cast<int64_t*>(counts.data)};
  const size_t shared = width * (2 * sizeof(double) + 2 * sizeof(int64_t) + sizeof(int));
  const int threads = prompt_threads(width);
  launch(threads == 32 ? round_kernel<true> : round_kernel<false>, count, threads, shared, stream, supports, first);
}

void round_multiplicities_cuda(const PoolSpec& pool, const TensorView& query, const TensorView& indices,
                               const TensorView& weights, int64_t total, int64_t exchange_passes,
                               const TensorView& counts, void* workspace, void* stream) {
  double* const gram = static_cast<double*>(workspace);
  const int64_t batch = pool.batch(), width = indices.shape[1], step = gram_batch(batch, width);
  for (int64_t first = 0; first < batch; first += step) {
    const int64_t count = step < batch - first ? step : batch - first;
    gram_cuda(pool, query, indices, first, count, gram, stream);
    round_on_gram(gram, width, false, pool.positions(), indices, weights, total, exchange_passes, counts, first, count,
                  stream);
  }
}

}  // namespace hullkit
