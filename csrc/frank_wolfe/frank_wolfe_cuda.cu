// One launch runs a whole batch: a warp (a block, from 257 candidates on) for each prompt, on its Gram matrix. The
// arithmetic is that of frank_wolfe_run.h, operation for operation.
#include <cmath>

#include "cuda/gram.h"
#include "cuda/group.cuh"
#include "cuda/launch.cuh"
#include "cuda/prompt.cuh"
#include "cuda/tile.cuh"
#include "frank_wolfe/frank_wolfe_cuda.h"

namespace hullkit {
namespace {

constexpr int kNormBuffer = 512;

struct Output {
  explicit Output(const FrankWolfeResult& result)
      : indices(static_cast<int64_t*>(result.indices.data)),
        weights(static_cast<double*>(result.weights.data)),
        support_size(static_cast<int64_t*>(result.support_size.data)),
        residual_norm(static_cast<double*>(result.residual_norm.data)),
        dual_gap(static_cast<double*>(result.dual_gap.data)),
        num_iters(static_cast<int64_t*>(result.num_iters.data)),
        status(static_cast<int64_t*>(result.status.data)),
        width(result.indices.shape[1]) {}
  int64_t* indices;
  double* weights;
  int64_t* support_size;
  double *residual_norm, *dual_gap;
  int64_t *num_iters, *status;
  int64_t width;
};

// ||vector - iterate||^2 from the rows themselves, summed in an order that depends on d alone; all threads get it.
// rows [support_size], weights and buffer [kNormBuffer] in shared memory.
template <typename Threads, typename E>
__device__ double iterate_distance_squared(int64_t dim, const E* vector, const E* const* rows, const double* weights,
                                           int support_size, double* buffer) {
  double sum = 0.0;  // this lane's
  for (int64_t begin = 0; begin < dim; begin += kNormBuffer) {
    Threads::sync();
    for (int j = threadIdx.x; j < kNormBuffer && begin + j < dim; j += blockDim.x) {
      double iterate = 0.0;
#pragma unroll 8
      for (int s = 0; s < support_size; ++s) {
        iterate = fma(weights[s], to_double(rows[s][begin + j]), iterate);
      }
      const double difference = to_double(vector[begin + j]) - iterate;
      buffer[j] = difference * difference;
    }
    Threads::sync();
    for (int j = threadIdx.x % 32; j < kNormBuffer && begin + j < dim; j += 32) sum += buffer[j];
  }
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  return sum;
}

// One prompt's run. Candidate k * blockDim.x + threadIdx.x is this thread's k-th.
template <typename E, bool kOneWarp>
struct Run {
  using Threads = Group<kOneWarp>;
  static constexpr double kTrusted = sizeof(typename Operand<E>::Sum) == 8 ? 1e-10 : 1e-5;

  const DevicePool<E>& pool;
  const int64_t b;
  const FrankWolfeParams params;
  const double* const gram;  // [n + 1, stride]
  const int64_t stride;
  const int n;
  double* const support_weights;  // [S] shared
  const E** const rows;           // [S] shared, of the support
  int* const support;             // [S] shared
  double* const buffer;           // [max(kNormBuffer, n)] shared

  double base[kPerThread], scores[kPerThread], weights[kPerThread];
  double column[kPerThread];  // of the vertex
  uint32_t valid, touched;    // bit k: this thread's k-th candidate
  double query_squared, scale_squared, query_iterate, iterate_squared;
  int support_size;
  int64_t num_iters;
  int vertex;           // the LMO's answer at the current iterate,
  double vertex_score;  // its score,
  double vertex_squared, vertex_base;

  __device__ int candidate(int k) const { return k * blockDim.x + threadIdx.x; }
  __device__ double product(int i, int j) const { return gram[i * stride + j]; }

  // False if the entry is broken: no valid candidate, or one that is not finite.
  __device__ bool prepare() {
    valid = touched = 0;
    bool broken = false;
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      base[k] = scores[k] = weights[k] = 0.0;
      const int i = candidate(k);
      if (i >= n) continue;
      const int64_t row = pool.row(b, i);
      broken |= row == DevicePool<E>::kBroken;
      if (row < 0) continue;
      valid |= 1u << k;
      base[k] = product(n, i);
      broken |= !isfinite(base[k]) || !isfinite(product(i, i));
    }
    query_squared = product(n, n);
    broken |= !isfinite(query_squared);
    return !Threads::any(broken) && Threads::any(valid != 0);
  }

  // The LMO, and at once all that is read of its answer, so that those reads run beside the line search.
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
    const Best best = Threads::least({key_of(-value[0]), static_cast<uint32_t>(candidate(place[0]))});
    vertex = static_cast<int>(best.index);
    vertex_score = -value_of(best.key);
    const double* const row = gram + vertex * stride;
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) column[k] = candidate(k) < n ? row[candidate(k)] : 0.0;
    vertex_base = row[n];
    vertex_squared = row[vertex];
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
    bool first = false;
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      weights[k] *= keep;
      if (candidate(k) != vertex) continue;
      weights[k] += step;
      first = !(touched >> k & 1);
      touched |= 1u << k;
    }
    if (Threads::any(first)) ++support_size;
  }

  __device__ bool support_full() const { return support_size >= params.max_support; }

  __device__ Status run() {
    support_size = 0;
    num_iters = 0;
    find_best(base);
    move_weights(1.0);
    query_iterate = vertex_score;
    scale_squared = query_squared;
    if (support_full()) return Status::kMaxSupport;
    iterate_squared = vertex_squared;
    scale_squared = fmax(scale_squared, iterate_squared);
    advance(1.0);
    const double surely_above = 2.0 * params.tol * params.tol;  // no root of what is clearly more than tol^2
    while (num_iters < params.max_iters) {
      double residual = query_squared - 2.0 * query_iterate + iterate_squared;
      if (residual <= kTrusted * scale_squared) residual = distance_squared(pool.query_at(b));
      if (residual <= surely_above && sqrt(fmax(residual, 0.0)) < params.tol) return Status::kConverged;
      if (!move()) return Status::kStalled;
      if (support_full()) return Status::kMaxSupport;
    }
    return Status::kMaxIters;
  }

  // Line search and move towards the vertex. False if the iterate is that vertex already.
  __device__ bool move() {
    scale_squared = fmax(scale_squared, vertex_squared);
    const double vertex_iterate = vertex_base - vertex_score;
    double length_squared = vertex_squared - 2.0 * vertex_iterate + iterate_squared;
    if (length_squared <= kTrusted * scale_squared) {
      length_squared = distance_squared(pool.row_at(b, pool.row(b, vertex)));
    }
    if (length_squared < kStalledSquaredNorm) return false;
    const double slope = vertex_score - (query_iterate - iterate_squared);
    const double step = fmin(fmax(slope / length_squared, 0.0), 1.0);
    const double keep = 1.0 - step;
    move_weights(step);
    query_iterate = keep * query_iterate + step * vertex_base;
    iterate_squared = keep * keep * iterate_squared + 2.0 * step * keep * vertex_iterate + step * step * vertex_squared;
    ++num_iters;
    if (!support_full()) advance(step);
    return true;
  }

  // The touched candidates in shared memory, by falling weight, lowest index on a tie.
  __device__ void sort_support() {
    int place = __popc(touched);
    int* const counts = reinterpret_cast<int*>(buffer);
    Threads::sync();
    counts[threadIdx.x] = place;
    Threads::sync();
    place = 0;
    for (int t = 0; t < static_cast<int>(threadIdx.x); ++t) place += counts[t];
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      if (!(touched >> k & 1)) continue;
      support[place] = candidate(k);
      support_weights[place++] = weights[k];
    }
    Threads::sync();
    int ranks[kPerThread];
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      ranks[k] = 0;
      if (!(touched >> k & 1)) continue;
      const int i = candidate(k);
      for (int s = 0; s < support_size; ++s) {
        const double other = support_weights[s];
        ranks[k] += other != weights[k] ? other > weights[k] : support[s] < i;
      }
    }
    Threads::sync();
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      if (!(touched >> k & 1)) continue;
      support[ranks[k]] = candidate(k);
      support_weights[ranks[k]] = weights[k];
    }
    Threads::sync();
  }

  __device__ double distance_squared(const E* vector) {
    sort_support();
    for (int s = threadIdx.x; s < support_size; s += blockDim.x) rows[s] = pool.row_at(b, pool.row(b, support[s]));
    return iterate_distance_squared<Threads>(pool.dim, vector, rows, support_weights, support_size, buffer);
  }

  __device__ void write(const Output& out, Status status) {
    sort_support();
    for (int64_t s = threadIdx.x; s < out.width; s += blockDim.x) {
      out.indices[b * out.width + s] = s < support_size ? support[s] : -1;
      out.weights[b * out.width + s] = s < support_size ? support_weights[s] : 0.0;
    }
    if (threadIdx.x != 0) return;
    out.support_size[b] = support_size;
    out.num_iters[b] = num_iters;
    out.status[b] = static_cast<int64_t>(status);
  }
};

__device__ void write_broken(const Output& out, int64_t b) {
  for (int64_t s = threadIdx.x; s < out.width; s += blockDim.x) {
    out.indices[b * out.width + s] = -1;
    out.weights[b * out.width + s] = 0.0;
  }
  if (threadIdx.x != 0) return;
  out.support_size[b] = out.num_iters[b] = 0;
  out.status[b] = static_cast<int64_t>(Status::kBroken);
}

template <typename E, bool kOneWarp>
__global__ void frank_wolfe_kernel(const DevicePool<E> pool, const FrankWolfeParams params, int64_t first,
                                   const double* gram, int64_t stride, const Output out) {
  extern __shared__ __align__(16) char shared[];
  const int n = static_cast<int>(pool.size);
  double* const support_weights = reinterpret_cast<double*>(shared);
  double* const buffer = support_weights + out.width;
  const E** const rows = reinterpret_cast<const E**>(buffer + (n > kNormBuffer ? n : kNormBuffer));
  int* const support = reinterpret_cast<int*>(rows + out.width);
  const int64_t b = first + blockIdx.x;
  Run<E, kOneWarp> run{pool, b,       params, gram + int64_t{blockIdx.x} * (n + 1) * stride, stride, n, support_weights,
                       rows, support, buffer};
  if (run.prepare()) {
    run.write(out, run.run());
  } else {
    write_broken(out, b);
  }
}

// ||query - iterate|| from the input, and max_i <residual, x_i> - <residual, iterate> anew from the Gram matrix.
// One block for each prompt, of more threads than its run had: what was a chain of steps there is independent here.
template <typename E>
__global__ void __launch_bounds__(kNormBuffer)
    certify_kernel(const DevicePool<E> pool, int64_t first, const double* grams, int64_t stride, const Output out) {
  using Threads = Group<false>;
  extern __shared__ __align__(16) char shared[];
  const int64_t b = first + blockIdx.x;
  const int n = static_cast<int>(pool.size), support_size = static_cast<int>(out.support_size[b]);
  if (support_size == 0) {
    if (threadIdx.x == 0) out.residual_norm[b] = out.dual_gap[b] = __longlong_as_double(0x7ff8000000000000ll);  // NaN
    return;
  }
  const double* const gram = grams + int64_t{blockIdx.x} * (n + 1) * stride;
  double* const weights = reinterpret_cast<double*>(shared);
  double* const buffer = weights + out.width;
  const E** const rows = reinterpret_cast<const E**>(buffer + (n > kNormBuffer ? n : kNormBuffer));
  int* const support = reinterpret_cast<int*>(rows + out.width);
  for (int s = threadIdx.x; s < support_size; s += blockDim.x) {
    weights[s] = out.weights[b * out.width + s];
    support[s] = static_cast<int>(out.indices[b * out.width + s]);
    rows[s] = pool.row_at(b, pool.row(b, support[s]));
  }
  const double squared =
      iterate_distance_squared<Threads>(pool.dim, pool.query_at(b), rows, weights, support_size, buffer);
  __syncthreads();
  Best best{kLargestKey, 0xffffffffu};
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    if (pool.row(b, i) < 0) continue;
    double product_iterate = 0.0;
#pragma unroll 8
    for (int s = 0; s < support_size; ++s) {
      product_iterate = fma(weights[s], gram[support[s] * stride + i], product_iterate);
    }
    buffer[i] = gram[n * stride + i] - product_iterate;
    const Best here{key_of(-buffer[i]), static_cast<uint32_t>(i)};
    if (precedes(here, best)) best = here;
  }
  best = Threads::least(best);  // and every score is written
  if (threadIdx.x != 0) return;
  double residual_iterate = 0.0;
  for (int s = 0; s < support_size; ++s) residual_iterate = fma(weights[s], buffer[support[s]], residual_iterate);
  out.residual_norm[b] = sqrt(squared);
  out.dual_gap[b] = -value_of(best.key) - residual_iterate;
}

}  // namespace

void frank_wolfe_on_gram(const PoolSpec& pool, const TensorView& query, const FrankWolfeParams& params,
                         const FrankWolfeResult& result, int64_t first, int64_t count, const double* gram,
                         void* stream) {
  with_element(pool.rows.dtype, [&](auto element) {
    using E = decltype(element);
    const DevicePool<E> device_pool(pool, query);
    const int64_t n = device_pool.size, width = result.indices.shape[1];
    const size_t shared =
        width * (sizeof(double) + sizeof(void*) + sizeof(int)) + sizeof(double) * (n > kNormBuffer ? n : kNormBuffer);
    const int64_t stride = gram_stride(n);
    const int threads = prompt_threads(n);
    const auto kernel = threads == 32 ? frank_wolfe_kernel<E, true> : frank_wolfe_kernel<E, false>;
    launch(kernel, count, threads, shared, stream, device_pool, params, first, gram, stride, Output(result));
    launch(certify_kernel<E>, count, kNormBuffer, shared, stream, device_pool, first, gram, stride, Output(result));
  });
}

void frank_wolfe_cuda(const PoolSpec& pool, const TensorView& query, const FrankWolfeParams& params,
                      const FrankWolfeResult& result, void* workspace, void* stream) {
  double* const gram = static_cast<double*>(workspace);
  const int64_t batch = pool.batch(), step = gram_batch(batch, pool.positions());
  for (int64_t first = 0; first < batch; first += step) {
    const int64_t count = step < batch - first ? step : batch - first;
    gram_cuda(pool, query, {}, first, count, gram, stream);
    frank_wolfe_on_gram(pool, query, params, result, first, count, gram, stream);
  }
}

}  // namespace hullkit
