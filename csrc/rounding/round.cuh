// SPDX-License-Identifier: Apache-2.0
// A block for each support, with the arithmetic of rounding.h, operation for operation: changes of a unit are weighed
// by all threads at once, and the first or the best of them all is made.
#pragma once

#include "common/limits.h"
#include "cuda/primitives/group.cuh"
#include "cuda/primitives/launch.cuh"
#include "cuda/primitives/threads.h"
#include "rounding/quotas.cuh"
#include "rounding/rounding.h"
#include "rounding/rounding_cuda.h"

namespace hullkit {

// The products of a support as large as this are copied into shared memory: 78 KiB (capped: twice a total of 50).
inline constexpr int64_t kMaxCopied = 100;
inline constexpr int kRoundThreads = 256;

// Point k * blockDim.x + threadIdx.x is this thread's k-th: it alone writes what belongs to the point.
template <bool kCopied>
class DeviceRounding {
 public:
  __host__ static size_t bytes(int64_t size) {
    return size * (4 * sizeof(double) + 2 * sizeof(int)) + (kCopied ? size * size * sizeof(double) : 0);
  }

  // memory: bytes(width), shared.
  __device__ DeviceRounding(const Supports& supports, int64_t entry, void* memory, Contest::Places* places)
      : gram_(supports.gram + entry * (supports.n + 1) * supports.stride),
        stride_(supports.stride),
        query_at_(supports.n),
        max_multiplicity_(supports.max_multiplicity),
        total_(static_cast<double>(supports.total)),
        weights_(static_cast<double*>(memory)),
        slope_(weights_ + supports.width),
        diagonal_(slope_ + supports.width),
        counts_(reinterpret_cast<int64_t*>(diagonal_ + supports.width)),
        products_(reinterpret_cast<double*>(counts_ + supports.width)),
        place_(reinterpret_cast<int*>(products_ + (kCopied ? supports.width * supports.width : 0))),
        donors_(place_ + supports.width),
        contest_(places) {}

  __device__ void run(const Supports& supports, int64_t b) {
    int64_t* const out = supports.counts + b * supports.width;
    const bool broken = !read(supports, b) || (size_ > 0 && !start(supports.total));
    if (!broken && size_ > 0) {
      complete();
      for (int64_t pass = 0; pass < supports.exchange_passes && exchange(); ++pass) {
      }
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < supports.width; i += blockDim.x) {
      out[i] = i >= size_ ? 0 : broken ? -1 : counts_[i];
    }
    if (supports.residual_norm == nullptr) return;
    const double norm = broken || size_ == 0 ? NAN : residual_norm();
    if (threadIdx.x == 0) supports.residual_norm[b] = norm;
  }

 private:
  // The loss of the counts as a difference of products: y^2 - 2 <y, q> + q^2.
  __device__ double residual_norm() {
    __syncthreads();
    double change = 0.0;
#pragma unroll 4
    for (int i = 0; i < size_; ++i) {
      const double product = gram_[query_at_ * stride_ + place_[i]];
      change += static_cast<double>(counts_[i]) * (slope_[i] - total_ * product);
    }
    const double loss = gram_[query_at_ * stride_ + query_at_] + change / (total_ * total_);
    return sqrt(fmax(loss, 0.0));
  }

  __device__ double product(int i, int j) const {
    return kCopied ? products_[i * size_ + j] : gram_[place_[i] * stride_ + place_[j]];
  }

  // The support, and its products if they are copied. False if an index is out of range, or behind padding.
  __device__ bool read(const Supports& supports, int64_t b) {
    __shared__ int size;
    if (threadIdx.x == 0) size = static_cast<int>(supports.width);
    __syncthreads();
    bool broken = false;
#pragma unroll 1
    for (int s = threadIdx.x; s < supports.width; s += blockDim.x) {
      const int64_t index = supports.indices[b * supports.width + s];
      broken |= index < -1 || index >= supports.positions;
      if (index < 0) atomicMin(&size, s);  // padding is at the end
      place_[s] = static_cast<int>(supports.by_position ? index : s);
      weights_[s] = supports.weights[b * supports.width + s];
    }
    __syncthreads();
    size_ = size;
    bool behind = false;
#pragma unroll 1
    for (int s = size_ + threadIdx.x; s < supports.width; s += blockDim.x) {
      behind |= supports.indices[b * supports.width + s] >= 0;
    }
    if (__syncthreads_or(behind)) {
      broken = true;
      size_ = static_cast<int>(supports.width);  // the mark is on all of it
    }
    broken = __syncthreads_or(broken);
    if (kCopied && !broken) {
      const int lane = threadIdx.x % 32;
      for (int j = lane; j < size_; j += 32) {
        const double* const column = gram_ + place_[j];
#pragma unroll 4
        for (int i = threadIdx.x / 32; i < size_; i += kRoundThreads / 32) {
          products_[i * size_ + j] = column[place_[i] * stride_];
        }
      }
    }
    __syncthreads();
    return !broken;
  }

  // Floors of the quotas. False if a product or a weight is not finite.
  __device__ bool start(int64_t total) {
    const Quotas quotas(weights_, size_, total);
    bool broken = quotas.broken || max_multiplicity_ < (total + size_ - 1) / size_;
    const double slack = max_multiplicity_ < total ? 1.0 + 1e-13 : 1.0;  // as in rounding.h
#pragma unroll 1
    for (int i = threadIdx.x; i < size_; i += blockDim.x) {
      diagonal_[i] = product(i, i);
      slope_[i] = -total_ * gram_[query_at_ * stride_ + place_[i]];
      const double whole = fmin(floor(quotas[i] * slack), static_cast<double>(max_multiplicity_));
      counts_[i] = broken ? 0 : static_cast<int64_t>(whole);
      broken |= !isfinite(diagonal_[i]) || !isfinite(slope_[i]);
    }
    if (__syncthreads_or(broken)) return false;
    remaining_ = total;
    for (int i = 0; i < size_; ++i) remaining_ -= counts_[i];
    for (int j = threadIdx.x; j < size_; j += blockDim.x) {
      double slope = slope_[j];
#pragma unroll 8
      for (int i = 0; i < size_; ++i) slope += static_cast<double>(counts_[i]) * product(i, j);
      slope_[j] = slope;
    }
    return true;
  }

  __device__ void move(int i, int64_t units) {
    for (int j = threadIdx.x; j < size_; j += blockDim.x) {
      slope_[j] += static_cast<double>(units) * product(i, j);
      if (j == i) counts_[i] += units;
    }
  }

  __device__ void complete() {
    for (int64_t units; remaining_ > 0; remaining_ -= units) {
      units = max(int64_t{1}, remaining_ / (kParts * size_));
      Best best = no_best();
      for (int i = threadIdx.x; i < size_; i += blockDim.x) {
        if (counts_[i] > max_multiplicity_ - units) continue;
        const double change = 2.0 * slope_[i] + static_cast<double>(units) * diagonal_[i];
        const Best here{key_of(change), static_cast<uint32_t>(i), 0};
        if (precedes(here, best)) best = here;
      }
      move(static_cast<int>(contest_.least(best).index), units);
    }
  }

  // The donors of a pass, in order: points with units at its start. Every warp counts, the first one writes.
  __device__ void list_donors() {
    const int lane = threadIdx.x % 32;
    num_donors_ = 0;
    for (int i0 = 0; i0 < size_; i0 += 32) {
      const bool donor = i0 + lane < size_ && counts_[i0 + lane] > 0;
      const uint32_t lanes = __ballot_sync(kAllLanes, donor);
      if (donor && threadIdx.x < 32) donors_[num_donors_ + __popc(lanes & ((1u << lane) - 1))] = i0 + lane;
      num_donors_ += __popc(lanes);
    }
  }

  // Where a pass has come to: donor i, receiver j.
  __device__ static uint32_t position(int i, int j) { return static_cast<uint32_t>(i) << kIndexBits | j; }

  // One pass; false if it moved nothing.
  __device__ bool exchange() {
    const double threshold = -kMinImprovement * total_ * total_;
    __syncthreads();
    list_donors();
    uint32_t at = 0;
    int turn = 0;  // of donors
    bool moved = false;
    while (true) {
      __syncthreads();
      const int donor = static_cast<int>(at >> kIndexBits);
      while (turn < num_donors_ && donors_[turn] < donor) ++turn;
      at = next_exchange(turn, at, threshold);
      if (at == kNowhere) return moved;
      move(static_cast<int>(at >> kIndexBits), -1);
      move(static_cast<int>(at % (1u << kIndexBits)), 1);
      moved = true;
      ++at;
    }
  }

  // The first position >= from whose exchange is an improvement. Pairs of a donor, from the `turn`-th on, and a
  // receiver are dealt out to the threads, kPairs at a time until one of them is found.
  __device__ uint32_t next_exchange(int turn, uint32_t from, double threshold) {
    constexpr int kPairs = 4;
    const int threads = static_cast<int>(blockDim.x), down = threads / size_, right = threads % size_;
    int d = turn + static_cast<int>(threadIdx.x) / size_, j = static_cast<int>(threadIdx.x) % size_;
    for (int left = (num_donors_ - turn) * size_; left > 0; left -= kPairs * threads) {
      uint32_t first = kNowhere;
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        if (d < num_donors_) {
          const int i = donors_[d];
          const double own = diagonal_[i] - 2.0 * slope_[i];
          const double change = 2.0 * slope_[j] + diagonal_[j] - 2.0 * product(i, j) + own;
          const uint32_t here = position(i, j);
          // A donor has units at the start of the pass, and one left; a receiver has room.
          if (change < threshold && here >= from && j != i && counts_[i] > 0 && counts_[j] < max_multiplicity_) {
            first = min(first, here);
          }
        }
        d += down;
        j += right;
        if (j >= size_) {
          j -= size_;
          ++d;
        }
      }
      first = contest_.least(first);
      if (first != kNowhere) return first;
    }
    return kNowhere;
  }

  static constexpr int kIndexBits = 12;
  static_assert(kMaxOnDevice <= 1 << kIndexBits, "positions are packed");
  static constexpr uint32_t kNowhere = ~0u;

  const double* gram_;  // of the entry, [n + 1, stride]
  int64_t stride_, query_at_, max_multiplicity_;
  double total_;
  double* weights_;
  double* slope_;  // h = G c - N b
  double* diagonal_;
  int64_t* counts_;
  double* products_;  // [size, size] if kCopied
  int* place_;        // of a point in the Gram matrix
  int* donors_;       // with units at the start of a pass, in order
  Contest contest_;
  int size_, num_donors_;
  int64_t remaining_;
};

}  // namespace hullkit
