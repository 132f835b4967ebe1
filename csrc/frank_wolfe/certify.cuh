// SPDX-License-Identifier: Apache-2.0
// Certificates of a Frank-Wolfe result, from the weights returned. They do not use the recurrences of the run.
#pragma once

#include "cuda/primitives/device_pool.cuh"
#include "cuda/primitives/group.cuh"
#include "frank_wolfe/capped_simplex.h"
#include "frank_wolfe/output.cuh"

namespace hullkit {

inline constexpr int kNormBuffer = 512;

// A support in shared memory, and room to measure distances from its iterate.
struct SupportState {
  double* buffer;   // [kNormBuffer]
  double* weights;  // [width], and so on
  double* unsorted_weights;
  const char** rows;
  int* indices;
  int* unsorted_indices;

  static size_t bytes(int64_t width) {
    return width * (2 * sizeof(double) + sizeof(void*) + 2 * sizeof(int)) + kNormBuffer * sizeof(double);
  }
  __device__ SupportState(void* memory, int64_t width)
      : buffer(static_cast<double*>(memory)),
        weights(buffer + kNormBuffer),
        unsorted_weights(weights + width),
        rows(reinterpret_cast<const char**>(unsorted_weights + width)),
        indices(reinterpret_cast<int*>(rows + width)),
        unsorted_indices(indices + width) {}
};

// ||vector - iterate||^2 from the rows themselves, summed in an order that depends on d alone. All threads call this
// and get it; support.rows and weights may have been written just before.
__device__ inline double iterate_distance_squared(const DevicePool& pool, const char* vector,
                                                  const SupportState& support, int support_size) {
  double sum = 0.0;  // this lane's
  for (int64_t begin = 0; begin < pool.dim; begin += kNormBuffer) {
    const int count = static_cast<int>(pool.dim - begin < kNormBuffer ? pool.dim - begin : kNormBuffer);
    __syncthreads();
    with_element_on_device(pool.dtype, [&](auto element) {
      const auto at = [&](const char* row, int j) {
        return to_double(reinterpret_cast<const decltype(element)*>(row)[begin + j]);
      };
      for (int j = threadIdx.x; j < count; j += blockDim.x) {
        double iterate = 0.0;
#pragma unroll 8
        for (int s = 0; s < support_size; ++s) iterate = fma(support.weights[s], at(support.rows[s], j), iterate);
        const double difference = at(vector, j) - iterate;
        support.buffer[j] = difference * difference;
      }
    });
    __syncthreads();
#pragma unroll 4
    for (int j = threadIdx.x % 32; j < count; j += 32) sum += support.buffer[j];
  }
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  return sum;
}

inline constexpr int kCertifyThreads = 256;

inline size_t certify_bytes(int64_t n, int64_t width) { return 2 * n * sizeof(double) + SupportState::bytes(width); }

// max <scores, w> over the capped simplex, from scores [n] of which at least its size are not -inf; sorted [n] is room.
__device__ inline double best_mean(const double* scores, int n, const CappedSimplex& simplex, double* sorted) {
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    const double score = scores[i];
    if (score == -INFINITY) continue;
    int rank = 0;
    for (int j = 0; j < n; ++j) rank += scores[j] != score ? scores[j] > score : j < i;
    if (rank < simplex.size) sorted[rank] = score;
  }
  __syncthreads();
  double sum = 0.0;
  for (int r = 0; r + 1 < simplex.size; ++r) sum += simplex.cap * sorted[r];
  return sum + simplex.last * sorted[simplex.size - 1];
}

// residual_norm and dual_gap of entry first + entry, with r the residual at the iterate x: its scores <r, x_i> come
// anew from the Gram matrix, and so does ||r||^2 = <r, query> - <r, x>, unless it is so small (or the products so
// rough: half types) that their rounding would show; then from the rows.
__device__ inline void certify(const DevicePool& pool, int64_t first, int64_t entry, const double* grams,
                               int64_t stride, const CappedSimplex& simplex, const FrankWolfeOutput& out, void* shared,
                               Contest::Places* places) {
  constexpr double kTrusted = 1e-6;  // of the squared norms that ||r||^2 is a difference of
  const int64_t b = first + entry;
  const int n = static_cast<int>(pool.size), support_size = static_cast<int>(out.support_size[b]);
  if (support_size == 0) {
    if (threadIdx.x == 0) out.residual_norm[b] = out.dual_gap[b] = __longlong_as_double(0x7ff8000000000000ll);  // NaN
    return;
  }
  const double* const gram = grams + entry * (n + 1) * stride;
  double* const bases = static_cast<double*>(shared);  // [n]
  double* const scores = bases + n;                    // [n]
  const SupportState support(scores + n, out.width);
  const int64_t length = pool.length(b);
#pragma unroll 1
  for (int s = threadIdx.x; s < support_size; s += blockDim.x) {
    support.weights[s] = out.weights[b * out.width + s];
    support.indices[s] = static_cast<int>(out.indices[b * out.width + s]);
    support.rows[s] = pool.row_at(b, pool.row(b, support.indices[s], length));
  }
  __syncthreads();
  Best best = no_best();
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    if (pool.row(b, i, length) < 0) {
      scores[i] = -INFINITY;
      continue;
    }
    double product_iterate = 0.0;
#pragma unroll 16
    for (int s = 0; s < support_size; ++s) {
      product_iterate = fma(support.weights[s], gram[support.indices[s] * stride + i], product_iterate);
    }
    bases[i] = gram[n * stride + i];
    scores[i] = bases[i] - product_iterate;
    const Best here{key_of(-scores[i]), static_cast<uint32_t>(i), 0};
    if (precedes(here, best)) best = here;
  }
  best = Contest(places).least(best);  // and every score is written
  double residual_iterate = 0.0, query_iterate = 0.0;
#pragma unroll 8
  for (int s = 0; s < support_size; ++s) {
    const int i = support.indices[s];
    residual_iterate = fma(support.weights[s], scores[i], residual_iterate);
    query_iterate = fma(support.weights[s], bases[i], query_iterate);
  }
  const double query_squared = gram[n * (stride + 1)];
  double squared = query_squared - query_iterate - residual_iterate;
  // The squared norm of the iterate is no larger than the sum of the query's and the residual's, roughly.
  if (pool.rough() || squared <= kTrusted * query_squared) {
    squared = iterate_distance_squared(pool, pool.query_at(b), support, support_size);
  }
  const double vertex_score = simplex.size == 1 ? -value_of(best.key) : best_mean(scores, n, simplex, bases);
  if (threadIdx.x != 0) return;
  out.residual_norm[b] = sqrt(squared);
  out.dual_gap[b] = vertex_score - residual_iterate;
}

}  // namespace hullkit
