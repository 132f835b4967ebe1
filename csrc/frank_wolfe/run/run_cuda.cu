// SPDX-License-Identifier: Apache-2.0
// One launch runs a whole batch: a block for each prompt, on its Gram matrix. The arithmetic is that of
// run_cpu.h, operation for operation; only which lengths are recomputed depends on the largest norm of all
// candidates here, of those touched so far there.
#include <climits>
#include <cmath>

#include "common/limits.h"
#include "cuda/gram/gram.h"
#include "cuda/primitives/launch.cuh"
#include "cuda/primitives/threads.h"
#include "frank_wolfe/certify.cuh"
#include "frank_wolfe/frank_wolfe_cuda.h"

namespace hullkit {
namespace {

// A prompt's candidates by the thread. What is not done by the candidate is repeated by every thread of a prompt, so
// many candidates cost fewer instructions in all and few a shorter way from one step to the next.
constexpr int kFew = 4, kMany = 8;
constexpr int64_t kMaxWithFew = 1024;
constexpr int max_threads(int per_thread) {
  return static_cast<int>((per_thread == kFew ? kMaxWithFew : kMaxOnDevice) / per_thread);
}

// By falling weight, lowest index on a tie. Not inlined, like all that is rare: the loop's instructions stay together.
__device__ __noinline__ void sort_support(const SupportState support, int support_size) {
  __syncthreads();
#pragma unroll 1
  for (int s = threadIdx.x; s < support_size; s += blockDim.x) {
    const double weight = support.unsorted_weights[s];
    const int index = support.unsorted_indices[s];
    int rank = 0;
    for (int t = 0; t < support_size; ++t) {
      const double other = support.unsorted_weights[t];
      rank += other != weight ? other > weight : support.unsorted_indices[t] < index;
    }
    support.indices[rank] = index;
    support.weights[rank] = weight;
  }
  __syncthreads();
}

__device__ __noinline__ double distance_from_support(const DevicePool& pool, int64_t b, const char* vector,
                                                     const SupportState support, int support_size) {
#pragma unroll 1
  for (int s = threadIdx.x; s < support_size; s += blockDim.x) {
    support.rows[s] = pool.row_at(b, pool.row(b, support.indices[s]));
  }
  return iterate_distance_squared(pool, vector, support, support_size);
}

// One prompt's run. Candidate k * blockDim.x + threadIdx.x is this thread's k-th, of kPerThread.
template <int kPerThread>
struct Run {
  const DevicePool& pool;
  const int64_t b;
  const FrankWolfeParams params;
  const double* const gram;  // [n + 1, stride]
  const int64_t stride;
  const int n;
  const SupportState support;  // shared, like bases and squares
  double* const bases;         // [n] <x_i, query>
  double* const squares;       // [n] <x_i, x_i>
  Contest contest;

  double base[kPerThread], scores[kPerThread], weights[kPerThread];
  double column[kPerThread];        // of the vertex
  const char* columns[kPerThread];  // in row 0 of the Gram matrix
  uint32_t valid, touched;          // bit k: this thread's k-th candidate
  double query_squared, query_iterate, iterate_squared;
  double doubtful;  // a squared length up to this is recomputed from the vectors themselves
  int max_support, max_iters;
  int support_size, num_iters;
  int vertex;           // the LMO's answer at the current iterate,
  bool vertex_touched;  // whether it was an answer before,
  double vertex_score, vertex_base, vertex_squared;

  __device__ int candidate(int k) const { return k * blockDim.x + threadIdx.x; }
  __device__ double product(int i, int j) const { return gram[i * stride + j]; }

  // False if the entry is broken: no valid candidate, or one that is not finite.
  __device__ bool prepare() {
    valid = touched = 0;
    bool broken = false;
    double largest = 0.0;
    const int64_t length = pool.length(b);
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      base[k] = scores[k] = weights[k] = 0.0;
      const int i = candidate(k);
      columns[k] = reinterpret_cast<const char*>(gram + (i < n ? i : 0));
      if (i >= n) continue;
      const int64_t row = pool.row(b, i, length);
      broken |= row == DevicePool::kBroken;
      if (row < 0) continue;
      valid |= 1u << k;
      bases[i] = base[k] = product(n, i);
      squares[i] = product(i, i);
      largest = fmax(largest, squares[i]);
      broken |= !(fabs(base[k]) <= kLargestProduct) || !(squares[i] <= kLargestProduct);
    }
    query_squared = product(n, n);
    broken |= !(query_squared <= kLargestProduct);
    if (__syncthreads_or(broken) || !__syncthreads_or(valid != 0)) return false;
    largest = -value_of(contest.least({key_of(-largest), threadIdx.x, 0}).key);
    doubtful = (pool.rough() ? 1e-5 : 1e-10) * fmax(query_squared, largest);
    const auto clipped = [](int64_t value) { return static_cast<int>(value < INT_MAX ? value : INT_MAX); };
    max_support = clipped(params.max_support);
    max_iters = clipped(params.max_iters);
    return true;
  }

  // The LMO, and at once all that is read of its answer: the column, far away, comes while the line search goes on.
  __device__ void find_best(const double (&values)[kPerThread]) {
    double value[kPerThread];
    int place[kPerThread];
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      value[k] = valid >> k & 1 ? values[k] : -INFINITY;
      place[k] = k;
    }
#pragma unroll
    for (int apart = 1; apart < kPerThread; apart *= 2) {  // pairwise: the chain of comparisons is short
#pragma unroll
      for (int k = 0; k < kPerThread; k += 2 * apart) {
        if (value[k + apart] > value[k]) {
          value[k] = value[k + apart];
          place[k] = place[k + apart];
        }
      }
    }
    const Best best =
        contest.least({key_of(-value[0]), static_cast<uint32_t>(candidate(place[0])), touched >> place[0] & 1});
    vertex = static_cast<int>(best.index);
    vertex_touched = best.note != 0;
    const uint32_t row = static_cast<uint32_t>(vertex) * static_cast<uint32_t>(stride * sizeof(double));
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) column[k] = *reinterpret_cast<const double*>(columns[k] + row);
    vertex_score = -value_of(best.key);
    vertex_base = bases[vertex];
    vertex_squared = squares[vertex];
  }

  __device__ void advance(double step) {
    const double keep = 1.0 - step;
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) scores[k] = fma(keep, scores[k], step * (base[k] - column[k]));
    find_best(scores);
  }

  // The step's weights; the vertex is touched.
  __device__ void move_weights(double step) {
    const double keep = 1.0 - step;
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      weights[k] *= keep;
      if (candidate(k) != vertex) continue;
      weights[k] += step;
      touched |= 1u << k;
    }
    support_size += !vertex_touched;
  }

  __device__ Status run() {
    support_size = num_iters = 0;
    find_best(base);
    move_weights(1.0);
    query_iterate = vertex_score;
    if (support_size >= max_support) return Status::kMaxSupport;
    if (max_iters == 0) return Status::kMaxIters;
    iterate_squared = vertex_squared;
    advance(1.0);
    // No root, and no second thought, of what is clearly longer than any length that matters.
    const double near = fmax(doubtful, 2.0 * params.tol * params.tol), still = fmax(doubtful, kStalledSquaredNorm);
    while (true) {
      const double residual = query_squared - 2.0 * query_iterate + iterate_squared;
      const double vertex_iterate = vertex_base - vertex_score;
      double length_squared = vertex_squared - 2.0 * vertex_iterate + iterate_squared;
      if (residual <= near || length_squared <= still) {
        if (converged(residual)) return Status::kConverged;
        length_squared = length_to_vertex(length_squared);
        if (length_squared < kStalledSquaredNorm) return Status::kStalled;
      }
      const double slope = vertex_score - (query_iterate - iterate_squared);
      double step = slope / length_squared;
      step = step > 0.0 ? step : 0.0;
      step = step < 1.0 ? step : 1.0;
      const double keep = 1.0 - step;
      move_weights(step);
      query_iterate = keep * query_iterate + step * vertex_base;
      iterate_squared =
          keep * keep * iterate_squared + 2.0 * step * keep * vertex_iterate + step * step * vertex_squared;
      ++num_iters;
      if (support_size >= max_support || num_iters >= max_iters) {
        return support_size >= max_support ? Status::kMaxSupport : Status::kMaxIters;
      }
      advance(step);
    }
  }

  // The two tests that end a run, with lengths from the vectors themselves where the recurrences leave doubts.
  __device__ bool converged(double residual) {
    if (residual <= doubtful) residual = distance_squared(pool.query_at(b));
    return sqrt(fmax(residual, 0.0)) < params.tol;
  }
  __device__ double length_to_vertex(double squared) {
    return squared <= doubtful ? distance_squared(pool.row_at(b, pool.row(b, vertex))) : squared;
  }

  // The touched candidates in shared memory, in order.
  __device__ void gather_support() {
    __shared__ int places_taken;
    __syncthreads();
    if (threadIdx.x == 0) places_taken = 0;
    __syncthreads();
    int place = touched != 0 ? atomicAdd(&places_taken, __popc(touched)) : 0;  // in any order: it is sorted next
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      if (!(touched >> k & 1)) continue;
      support.unsorted_indices[place] = candidate(k);
      support.unsorted_weights[place++] = weights[k];
    }
    sort_support(support, support_size);
  }

  __device__ double distance_squared(const char* vector) {
    gather_support();
    return distance_from_support(pool, b, vector, support, support_size);
  }

  __device__ void write(const FrankWolfeOutput& out, Status status) {
    gather_support();
#pragma unroll 1
    for (int64_t s = threadIdx.x; s < out.width; s += blockDim.x) {
      out.indices[b * out.width + s] = s < support_size ? support.indices[s] : -1;
      out.weights[b * out.width + s] = s < support_size ? support.weights[s] : 0.0;
    }
    if (threadIdx.x != 0) return;
    out.support_size[b] = support_size;
    out.num_iters[b] = num_iters;
    out.status[b] = static_cast<int64_t>(status);
  }
};

template <int kPerThread>
__global__ void __launch_bounds__(max_threads(kPerThread), 1)
    frank_wolfe_kernel(const DevicePool pool, const FrankWolfeParams params, int64_t first, const double* gram,
                       int64_t stride, const FrankWolfeOutput out) {
  extern __shared__ __align__(16) char shared[];
  auto* const places = reinterpret_cast<Contest::Places*>(shared);
  const int n = static_cast<int>(pool.size);
  double* const bases = reinterpret_cast<double*>(places + 1);
  const int64_t b = first + blockIdx.x;
  Run<kPerThread> run{pool,
                      b,
                      params,
                      gram + int64_t{blockIdx.x} * (n + 1) * stride,
                      stride,
                      n,
                      SupportState(bases + 2 * n, out.width),
                      bases,
                      bases + n,
                      Contest(places)};
  if (run.prepare()) {
    run.write(out, run.run());
  } else {
    write_broken(out, b);
  }
}

}  // namespace

void run_on_gram(const PoolSpec& pool, const TensorView& query, const FrankWolfeParams& params,
                 const FrankWolfeResult& result, int64_t first, int64_t count, double* gram, void* stream) {
  const int64_t n = pool.positions();
  const bool few = n <= kMaxWithFew;
  const auto kernel = few ? frank_wolfe_kernel<kFew> : frank_wolfe_kernel<kMany>;
  const size_t shared = sizeof(Contest::Places) + 2 * sizeof(double) * n + SupportState::bytes(result.indices.shape[1]);
  launch(kernel, count, threads_for(n, few ? kFew : kMany), shared, stream, DevicePool(pool, query), params, first,
         gram, gram_stride(n), FrankWolfeOutput(result));
}

}  // namespace hullkit
