// SPDX-License-Identifier: Apache-2.0
// A block for each prompt, on its Gram matrix, with the arithmetic of sift_cpu.cpp, operation for operation; only the
// kernel is written down after other steps here, kTerms stretches, than there.
#include <algorithm>
#include <climits>
#include <cmath>

#include "common/limits.h"
#include "cuda/gram/gram.h"
#include "cuda/primitives/device_pool.cuh"
#include "cuda/primitives/group.cuh"
#include "cuda/primitives/launch.cuh"
#include "cuda/primitives/threads.h"
#include "hullkit/sift.h"
#include "sift/check_params.h"

namespace hullkit {
namespace {

constexpr int64_t kTerms = 64;  // stretches whose columns are kept, before they are subtracted from the kernel
constexpr int64_t kMaxThreads = 512;
constexpr int kFoldedRows = 4;  // at a time

struct SiftOutput {
  explicit SiftOutput(const SiftResult& result)
      : order(static_cast<int64_t*>(result.order.data)),
        indices(static_cast<int64_t*>(result.indices.data)),
        counts(static_cast<int64_t*>(result.counts.data)),
        num_steps(static_cast<int64_t*>(result.num_steps.data)),
        variance(static_cast<double*>(result.variance.data)),
        width(result.indices.shape[1]) {}
  int64_t *order, *indices, *counts, *num_steps;
  double* variance;
  int64_t width;
};

// In global memory. What belongs to candidate i is written by its thread alone.
struct SiftWorkspace {
  SiftWorkspace(void* workspace, int64_t count, int64_t n, int64_t vectors, int64_t total)
      : entry(gram_bytes_of_one(n + vectors - 1) / static_cast<int64_t>(sizeof(double))),
        stride(static_cast<int>(gram_stride(n + vectors - 1))),
        column_stride(static_cast<int>(gram_stride(n))),
        terms(static_cast<int>(std::min(total, kTerms))),
        gram(static_cast<double*>(workspace)),
        columns(gram + count * entry) {}
  static int64_t bytes_of_one(int64_t n, int64_t vectors, int64_t total) {
    return gram_bytes_of_one(n + vectors - 1) +
           std::min(total, kTerms) * gram_stride(n) * static_cast<int64_t>(sizeof(double));
  }
  int64_t entry;
  int stride, column_stride, terms;
  double* gram;     // [count, n + m, stride]
  double* columns;  // [count, terms, column_stride] posterior columns at the start of each stretch
};

// The kernel [n, stride] after all stretches. A thread changes the columns of its own candidates in each row, which it
// alone reads. Not inlined, as it is rare: the loop's instructions and registers stay together.
__device__ __noinline__ void fold(double* kernel, int stride, int n, const double* columns, int column_stride,
                                  const double* weights, int terms) {
  for (int first = 0; first < n; first += kFoldedRows) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      double values[kFoldedRows];
#pragma unroll
      for (int r = 0; r < kFoldedRows; ++r) values[r] = kernel[min(first + r, n - 1) * stride + i];
      for (int s = 0; s < terms; ++s) {
        const double* const column = columns + s * column_stride;
        const double own = column[i];
#pragma unroll
        for (int r = 0; r < kFoldedRows; ++r) {
          values[r] = fma(-weights[s] * column[min(first + r, n - 1)], own, values[r]);
        }
      }
#pragma unroll
      for (int r = 0; r < kFoldedRows; ++r) {
        if (first + r < n) kernel[(first + r) * stride + i] = values[r];
      }
    }
  }
  __syncthreads();
}

// One prompt's run. Candidate k * blockDim.x + threadIdx.x is this thread's k-th, of kPerThread.
template <int kPerThread>
struct Run {
  const DevicePool& pool;
  const int64_t b;
  const SiftParams params;
  const SiftOutput& out;
  const int n, num_vectors, stride, column_stride, max_terms;
  double* const kernel;      // [n, stride] before the stretches
  double* const products;    // [m, stride] k_S(query, candidate)
  double* const columns;     // [max_terms, column_stride]
  double* const variances;   // [n] k_S(candidate, candidate); shared, as all of these
  double* const moves;       // [m] products with the chosen candidate
  double* const weights;     // [max_terms] of the stretches
  double* const multiplies;  // [max_terms] by which their columns are subtracted
  Contest contest;

  double gains[kPerThread];
  int counts[kPerThread], places[kPerThread];
  uint32_t open;    // bit k: this thread's k-th candidate may be chosen
  double variance;  // of the prompt
  double scale;     // the last stretch's candidate has scale times its column now
  int terms, distinct, max_multiplicity;

  __device__ int candidate(int k) const { return k * blockDim.x + threadIdx.x; }

  // False if the entry is broken: too few valid candidates, or one that is not finite.
  __device__ bool prepare() {
    bool broken = false;
    int64_t valid = 0;
    open = 0;
    terms = distinct = 0;
    max_multiplicity = static_cast<int>(params.max_multiplicity < INT_MAX ? params.max_multiplicity : INT_MAX);
    variance = 0.0;
    for (int j = 0; j < num_vectors; ++j) variance += products[j * stride + n + j];
    broken |= !isfinite(variance);
    const int64_t length = pool.length(b);
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      counts[k] = 0;
      const int i = candidate(k);
      const int64_t row = i < n ? pool.row(b, i, length) : DevicePool::kNone;
      broken |= row == DevicePool::kBroken;
      valid += __syncthreads_count(row >= 0);
      if (i >= n) continue;
      variances[i] = kernel[i * stride + i];
      if (row < 0) continue;
      open |= 1u << k;
      double reduction = 0.0;
#pragma unroll 1
      for (int j = 0; j < num_vectors; ++j) {
        const double product = products[j * stride + i];
        reduction = fma(product, product, reduction);
      }
      gains[k] = reduction / (fmax(variances[i], 0.0) + params.noise);
      broken |= !isfinite(variances[i]) || !isfinite(gains[k]);
    }
    return !__syncthreads_or(broken) && valid > (params.total - 1) / params.max_multiplicity;
  }

  __device__ Best best_gain() {
    Best best = no_best();
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      if (!(open >> k & 1)) continue;
      const Best here{key_of(-gains[k]), static_cast<uint32_t>(candidate(k)), counts[k] == 0};
      if (precedes(here, best)) best = here;
    }
    return contest.least(best);
  }

  // The number of steps; kBroken if a gain is not finite any more.
  static constexpr int64_t kBroken = -1;
  __device__ int64_t run() {
    int last = -1;
    for (int64_t steps = 0;;) {
      const Best best = best_gain();  // and every thread is done with the step before
      if (!isfinite(value_of(best.key))) return kBroken;
      const int chosen = static_cast<int>(best.index);
      const bool again = chosen == last;
      if (!again && terms == max_terms) {
        fold(kernel, stride, n, columns, column_stride, weights, terms);
        terms = 0;
      }
      const double observed = fmax(variances[chosen], 0.0) + params.noise;
      for (int j = threadIdx.x; j < num_vectors; j += blockDim.x) moves[j] = products[j * stride + chosen];
      for (int s = threadIdx.x; !again && s < terms; s += blockDim.x) {
        multiplies[s] = -weights[s] * columns[s * column_stride + chosen];
      }
      __syncthreads();
      double reduction = 0.0;
      for (int j = 0; j < num_vectors; ++j) reduction += moves[j] * moves[j];
      variance = fmax(variance - reduction / observed, 0.0);
      count(chosen, best.note != 0);
      if (threadIdx.x == 0) {
        out.order[b * params.total + steps] = chosen;
        out.variance[b * params.total + steps] = variance;
      }
      ++steps;
      if (steps == params.total || sqrt(variance) > 1.0 / (params.alpha * static_cast<double>(steps))) return steps;
      if (!again) begin_stretch(chosen);
      last = chosen;
      condition(observed);
    }
  }

  __device__ void count(int chosen, bool first) {
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      if (candidate(k) != chosen) continue;
      if (first) {
        places[k] = distinct;
        out.indices[b * out.width + distinct] = chosen;
      }
      if (++counts[k] == max_multiplicity) open &= ~(1u << k);
    }
    distinct += first;
  }

  __device__ void begin_stretch(int chosen) {
    double values[kPerThread];
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      if (candidate(k) < n) values[k] = kernel[chosen * stride + candidate(k)];
    }
#pragma unroll(8 / kPerThread)
    for (int s = 0; s < terms; ++s) {
      const double* const column = columns + s * column_stride;
#pragma unroll
      for (int k = 0; k < kPerThread; ++k) {
        if (candidate(k) < n) values[k] = fma(multiplies[s], column[candidate(k)], values[k]);
      }
    }
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      if (candidate(k) < n) columns[terms * column_stride + candidate(k)] = values[k];
    }
    if (threadIdx.x == 0) weights[terms] = 0.0;
    ++terms;
    scale = 1.0;
  }

  __device__ void condition(double observed) {
    const double shrink = scale * scale / observed, pace = scale / observed;
    const double* const column = columns + (terms - 1) * column_stride;
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      const int i = candidate(k);
      if (i >= n) continue;
      const double change = column[i];
      variances[i] = fma(-shrink * change, change, variances[i]);
      double reduction = 0.0;
#pragma unroll 1
      for (int j = 0; j < num_vectors; ++j) {
        const double product = fma(-(moves[j] * pace), change, products[j * stride + i]);
        products[j * stride + i] = product;
        reduction = fma(product, product, reduction);
      }
      gains[k] = reduction / (fmax(variances[i], 0.0) + params.noise);
    }
    if (threadIdx.x == 0) weights[terms - 1] += shrink;
    scale *= params.noise / observed;
  }

  __device__ void write(int64_t steps) const {
    for (int64_t t = steps + threadIdx.x; t < params.total; t += blockDim.x) {
      out.order[b * params.total + t] = -1;
      out.variance[b * params.total + t] = variance;
    }
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      if (counts[k] > 0) out.counts[b * out.width + places[k]] = counts[k];
    }
    for (int64_t s = distinct + threadIdx.x; s < out.width; s += blockDim.x) {
      out.indices[b * out.width + s] = -1;
      out.counts[b * out.width + s] = 0;
    }
    if (threadIdx.x == 0) out.num_steps[b] = steps;
  }

  __device__ void write_broken() {
    variance = __longlong_as_double(0x7ff8000000000000ll);  // NaN
    distinct = 0;
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) counts[k] = 0;
    write(0);
  }
};

size_t shared_bytes(int64_t n, int64_t vectors) {
  return sizeof(Contest::Places) + (n + vectors + 2 * kTerms) * sizeof(double);
}

template <int kPerThread>
__global__ void __launch_bounds__(kMaxThreads, kPerThread == 1 ? 2 : 1)
    sift_kernel(const DevicePool pool, const SiftParams params, int64_t first, const SiftWorkspace workspace,
                const SiftOutput out) {
  extern __shared__ __align__(16) char shared[];
  auto* const places = reinterpret_cast<Contest::Places*>(shared);
  const int n = static_cast<int>(pool.size), num_vectors = static_cast<int>(pool.vectors);
  double* const variances = reinterpret_cast<double*>(places + 1);
  double* const kernel = workspace.gram + blockIdx.x * workspace.entry;
  Run<kPerThread> run{pool,
                      first + blockIdx.x,
                      params,
                      out,
                      n,
                      num_vectors,
                      workspace.stride,
                      workspace.column_stride,
                      workspace.terms,
                      kernel,
                      kernel + n * workspace.stride,
                      workspace.columns + int64_t{blockIdx.x} * (workspace.terms * workspace.column_stride),
                      variances,
                      variances + n,
                      variances + n + num_vectors,
                      variances + n + num_vectors + kTerms,
                      Contest(places)};
  const int64_t steps = run.prepare() ? run.run() : run.kBroken;
  if (steps != run.kBroken) {
    run.write(steps);
  } else {
    run.write_broken();
  }
}

int64_t piece(int64_t batch, int64_t positions, int64_t vectors, int64_t total) {
  return entries_of_piece(batch, SiftWorkspace::bytes_of_one(positions, vectors, total));
}

}  // namespace

int64_t sift_workspace_bytes(const PoolSpec& pool, const TensorView& query, const SiftParams& params) {
  const int64_t n = pool.positions(), vectors = query.rank == 3 ? query.shape[1] : 1;
  HULLKIT_SUPPORTED(n + vectors - 1 <= kMaxOnDevice, "sift: expected at most ", kMaxOnDevice,
                    " candidates of a prompt (with its vectors but one) on a CUDA device, got ", n + vectors - 1,
                    ". Take the nearest first: hullkit.knn");
  return piece(pool.batch(), n, vectors, params.total) * SiftWorkspace::bytes_of_one(n, vectors, params.total);
}

void sift_cuda(const PoolSpec& pool, const TensorView& query, const SiftParams& params, const SiftResult& result,
               void* workspace, void* stream) {
  check_params(params);
  const DevicePool device_pool(pool, query);
  const int64_t batch = pool.batch(), n = pool.positions(), vectors = device_pool.vectors;
  const int64_t step = piece(batch, n, vectors, params.total);
  const int per_thread = n <= kMaxThreads ? 1 : static_cast<int>(kMaxOnDevice / kMaxThreads);
  const auto kernel = per_thread == 1 ? sift_kernel<1> : sift_kernel<kMaxOnDevice / kMaxThreads>;
  for (int64_t first = 0; first < batch; first += step) {
    const int64_t count = std::min(step, batch - first);
    const SiftWorkspace places(workspace, count, n, vectors, params.total);
    gram_cuda(pool, query, {}, first, count, places.gram, stream);
    launch(kernel, count, threads_for(n, per_thread), shared_bytes(n, vectors), stream, device_pool, params, first,
           places, SiftOutput(result));
  }
}

}  // namespace hullkit
