// A warp (a block, from 257 points on) for each support, with the arithmetic of rounding.h, operation for operation:
// changes of a unit are weighed by all threads at once, and the first or the best of them all is made.
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
  const double* gram;  // [count, n + 1, stride]
  int64_t n, stride;
  bool by_position;
  int64_t positions;       // an index is less
  const int64_t* indices;  // [B, width]
  const double* weights;   // [B, width]
  int64_t width, total, exchange_passes;
  int64_t* counts;  // [B, width]
};

// Products of a support as large as this are copied beside the rest of its state: 64 KiB.
constexpr int64_t kMaxCopied = 90;
constexpr int kCopyThreads = 128;  // that copy, and leave but for the first warp

// Point k * kThreads + threadIdx.x is this thread's k-th: its slope, G_ii and count are in registers.
template <bool kOneWarp, bool kCopied>
struct DeviceRounding {
  using Threads = Group<kOneWarp>;
  static constexpr int kPoints = kCopied ? 3 : kPerThread;
  static_assert(!kCopied || (kOneWarp && kMaxCopied <= 32 * kPoints), "");

  const double* gram;  // of the entry, [n + 1, stride]
  int64_t n, stride;
  double total;
  int size;
  int* place;        // [size] of a point in the Gram matrix
  double* products;  // [size, size] if kCopied
  double* weights;   // [size]

  double slope[kPoints];  // h = G c - N b
  double diagonal[kPoints];
  int64_t counts[kPoints];

  __device__ static int threads() { return kOneWarp ? 32 : blockDim.x; }
  __device__ static int point(int k) { return k * threads() + threadIdx.x; }

  __device__ double product(int i, int j) const {
    return kCopied ? products[i * size + j] : gram[place[i] * stride + place[j]];
  }

  // By kCopyThreads threads.
  __device__ void copy() {
    for (int i = threadIdx.x / 32; i < size; i += kCopyThreads / 32) {
      const double* const row = gram + place[i] * stride;
#pragma unroll
      for (int k = 0; k < kPoints; ++k) {
        const int j = k * 32 + threadIdx.x % 32;
        if (j < size) products[i * size + j] = row[place[j]];
      }
    }
  }

  // slope += units * G_i, of this thread's points.
  __device__ void add_to_slope(int i, double units) {
#pragma unroll
    for (int k = 0; k < kPoints; ++k) {
      if (point(k) < size) slope[k] += units * product(i, point(k));
    }
  }

  __device__ void move(int i, int64_t units) {
    add_to_slope(i, static_cast<double>(units));
#pragma unroll
    for (int k = 0; k < kPoints; ++k) counts[k] += point(k) == i ? units : 0;
  }

  // The value of the thread that has point i.
  template <typename T>
  __device__ T of_point(const T (&values)[kPoints], int i) const {
    T value = values[0];
#pragma unroll
    for (int k = 1; k < kPoints; ++k) value = i / threads() == k ? values[k] : value;
    return Threads::from(i % threads(), value);
  }

  // False if a product or a weight is not finite.
  __device__ bool start(int64_t* remaining) {
    const Quotas quotas(weights, size, static_cast<int64_t>(total));
    bool broken = quotas.broken;
#pragma unroll
    for (int k = 0; k < kPoints; ++k) {
      slope[k] = diagonal[k] = 0.0;
      counts[k] = 0;
      const int i = point(k);
      if (i >= size) continue;
      diagonal[k] = product(i, i);
      slope[k] = -total * gram[n * stride + place[i]];
      if (!broken) counts[k] = static_cast<int64_t>(floor(quotas[i]));
      broken |= !isfinite(diagonal[k]) || !isfinite(slope[k]);
    }
    if (Threads::any(broken)) return false;
    *remaining = static_cast<int64_t>(total);
    for (int i = 0; i < size; ++i) {
      const int64_t count = of_point(counts, i);
      *remaining -= count;
      if (count > 0) add_to_slope(i, static_cast<double>(count));
    }
    return true;
  }

  __device__ void complete(int64_t remaining) {
    for (; remaining > 0; --remaining) {
      Best best{kLargestKey, 0xffffffffu};
#pragma unroll
      for (int k = 0; k < kPoints; ++k) {
        const Best here{key_of(2.0 * slope[k] + diagonal[k]), static_cast<uint32_t>(point(k))};
        if (point(k) < size && precedes(here, best)) best = here;
      }
      move(static_cast<int>(Threads::least(best).index), 1);
    }
  }

  // The first j >= begin to which a unit of i should go, `size` if there is none.
  __device__ int next_receiver(int i, int begin, double threshold) const {
    double own[kPoints];
#pragma unroll
    for (int k = 0; k < kPoints; ++k) own[k] = diagonal[k] - 2.0 * slope[k];
    const double donor = of_point(own, i);
    uint32_t first = static_cast<uint32_t>(size);
#pragma unroll
    for (int k = kPoints - 1; k >= 0; --k) {
      const int j = point(k);
      if (j >= size) continue;
      const double change = 2.0 * slope[k] + diagonal[k] - 2.0 * product(i, j) + donor;
      if (j >= begin && j != i && change < threshold) first = static_cast<uint32_t>(j);
    }
    return static_cast<int>(Threads::least(first));
  }

  // One pass; false if it moved nothing.
  __device__ bool exchange() {
    const double threshold = -kMinImprovement * total * total;
    int64_t starts[kPoints];  // counts at the start of the pass
#pragma unroll
    for (int k = 0; k < kPoints; ++k) starts[k] = counts[k];
    bool moved = false;
    for (int i = 0; i < size; ++i) {
      if (of_point(starts, i) == 0) continue;
      int j = 0;
      while (of_point(counts, i) > 0 && (j = next_receiver(i, j, threshold)) < size) {
        move(i, -1);
        move(j, 1);
        moved = true;
        ++j;
      }
    }
    return moved;
  }
};

template <bool kOneWarp, bool kCopied>
__global__ void round_kernel(const Supports supports, int64_t first) {
  extern __shared__ __align__(16) char shared[];
  const int64_t b = first + blockIdx.x, width = supports.width;
  const int64_t* const indices = supports.indices + b * width;
  int64_t* const out = supports.counts + b * width;

  DeviceRounding<kOneWarp, kCopied> rounding;
  rounding.n = supports.n;
  rounding.stride = supports.stride;
  rounding.gram = supports.gram + blockIdx.x * (supports.n + 1) * supports.stride;
  rounding.total = static_cast<double>(supports.total);
  rounding.weights = reinterpret_cast<double*>(shared);
  rounding.products = rounding.weights + width;
  rounding.place = reinterpret_cast<int*>(rounding.products + (kCopied ? width * width : 0));
  __shared__ int size;
  if (threadIdx.x == 0) size = static_cast<int>(width);
  __syncthreads();
  bool broken = false;
  for (int s = threadIdx.x; s < width; s += blockDim.x) {
    const int64_t index = indices[s];
    broken |= index < -1 || index >= supports.positions;
    if (index < 0) atomicMin(&size, s);  // padding is at the end
    rounding.place[s] = static_cast<int>(supports.by_position ? index : s);
    rounding.weights[s] = supports.weights[b * width + s];
    out[s] = 0;
  }
  broken = __syncthreads_or(broken);
  rounding.size = size;
  if (size == 0) return;
  if (kCopied) {
    if (!broken) rounding.copy();
    __syncthreads();
    if (threadIdx.x >= 32) return;
  }
  int64_t remaining = 0;
  broken = broken || !rounding.start(&remaining);
  if (!broken) {
    rounding.complete(remaining);
    for (int64_t pass = 0; pass < supports.exchange_passes && rounding.exchange(); ++pass) {
    }
  }
#pragma unroll
  for (int k = 0; k < rounding.kPoints; ++k) {
    if (rounding.point(k) < size) out[rounding.point(k)] = broken ? -1 : rounding.counts[k];
  }
}

}  // namespace

void round_on_gram(const double* gram, int64_t n, bool by_position, int64_t positions, const TensorView& indices,
                   const TensorView& weights, int64_t total, int64_t exchange_passes, const TensorView& counts,
                   int64_t first, int64_t count, void* stream) {
  const int64_t width = indices.shape[1];
  const Supports supports{gram,
                          n,
                          gram_stride(n),
                          by_position,
                          positions,
                          static_cast<const int64_t*>(indices.data),
                          static_cast<const double*>(weights.data),
                          width,
                          total,
                          exchange_passes,
                          static_cast<int64_t*>(counts.data)};
  const bool copied = width <= kMaxCopied;
  const int threads = copied ? kCopyThreads : prompt_threads(width);
  const size_t shared = width * (sizeof(double) + sizeof(int)) + (copied ? width * width * sizeof(double) : 0);
  const auto kernel = copied          ? round_kernel<true, true>
                      : threads == 32 ? round_kernel<true, false>
                                      : round_kernel<false, false>;
  launch(kernel, count, threads, shared, stream, supports, first);
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
