// SPDX-License-Identifier: Apache-2.0
// active_set.h with a block of threads for each prompt, on its Gram matrix. The block is as large whatever the prompt,
// so sums over threads have one order.
#include <algorithm>
#include <cmath>

#include "common/limits.h"
#include "cuda/gram/gram.h"
#include "cuda/primitives/device_pool.cuh"
#include "cuda/primitives/group.cuh"
#include "cuda/primitives/launch.cuh"
#include "cuda/primitives/threads.h"
#include "frank_wolfe/active_set/active_set.h"
#include "frank_wolfe/frank_wolfe_cuda.h"
#include "frank_wolfe/output.cuh"

namespace hullkit {
namespace {

constexpr int kThreads = 256;
constexpr size_t kFactorInShared = 40 * 1024;  // as many bytes at most

// The candidates of one prompt and the block that works on it: see active_set.h.
class GramTeam {
 public:
  __device__ GramTeam(const DevicePool& pool, int64_t b, const double* gram, int64_t stride, unsigned char* valid,
                      double* partial, Contest::Places* places)
      : pool_(pool), b_(b), gram_(gram), stride_(stride), valid_(valid), partial_(partial), contest_(places) {}

  // How many candidates there are; -1 if one of them, or the query, is not finite or out of range.
  __device__ int prepare() {
    bool broken = !(query_squared() <= kLargestProduct);
    int count = 0;
    const int64_t length = pool_.length(b_);
#pragma unroll 1
    for (int begin = 0; begin < size(); begin += kThreads) {
      const int i = begin + static_cast<int>(threadIdx.x);
      bool valid = false;
      if (i < size()) {
        const int64_t row = pool_.row(b_, i, length);
        broken |= row == DevicePool::kBroken;
        valid = row >= 0;
        valid_[i] = valid;
        broken |= valid && (!(fabs(base(i)) <= kLargestProduct) || !(squared(i) <= kLargestProduct));
      }
      count += __syncthreads_count(valid);
    }
    return __syncthreads_or(broken) ? -1 : count;
  }

  template <typename Task>
  __device__ void each(int begin, int end, Task&& task) {
#pragma unroll 1
    for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += kThreads) task(i);
    __syncthreads();
  }
  __device__ void sync() { __syncthreads(); }
  __device__ double* grown(double* rows, int64_t) { return rows; }  // there is room for all

  __device__ bool rough() const { return pool_.rough(); }
  __device__ int size() const { return static_cast<int>(pool_.size); }
  __device__ double base(int i) const { return gram_[size() * stride_ + i]; }
  __device__ double query_squared() const { return gram_[size() * stride_ + size()]; }
  __device__ const double* column(int i) const { return gram_ + i * stride_; }
  __device__ double squared(int i) const { return column(i)[i]; }
  __device__ void touch(int, const double*) {}

  struct BestValue {
    int index;
    double value;
  };
  template <typename Value>
  __device__ BestValue best(Value&& value) {
    Best best = no_best();
#pragma unroll 1
    for (int i = threadIdx.x; i < size(); i += kThreads) {
      if (!valid_[i]) continue;
      const double here = value(i);
      if (here == -INFINITY) continue;
      const Best candidate{key_of(-here), static_cast<uint32_t>(i), 0};
      if (precedes(candidate, best)) best = candidate;
    }
    best = contest_.least(best);
    if (best.index == kNoIndex) return {-1, -INFINITY};
    return {static_cast<int>(best.index), -value_of(best.key)};
  }

  __device__ void rank(const double* scores, int k, int* out) {
    each(0, size(), [&](int i) {
      if (!valid_[i]) return;
      int rank = 0;
      for (int j = 0; j < size(); ++j) {
        rank += valid_[j] && (scores[j] != scores[i] ? scores[j] > scores[i] : j < i);
      }
      if (rank < k) out[rank] = i;
    });
  }

  __device__ void subtract_iterate(const int* touched, const double* weights, int count, double* scores) {
    each(0, size(), [&](int i) {
      double iterate = 0.0;
#pragma unroll 4
      for (int t = 0; t < count; ++t) iterate = fma(weights[touched[t]], gram_[touched[t] * stride_ + i], iterate);
      scores[i] = base(i) - iterate;
    });
  }

  // Summed in an order that depends on d alone.
  __device__ double residual_squared(const int* touched, const double* weights, int count) {
    double sum = 0.0;
    const int64_t length = pool_.length(b_);
    with_element_on_device(pool_.dtype, [&](auto element) {
      const auto at = [](const char* row, int64_t j) {
        return to_double(reinterpret_cast<const decltype(element)*>(row)[j]);
      };
      for (int64_t j = threadIdx.x; j < pool_.dim; j += kThreads) {
        double iterate = 0.0;
#pragma unroll 1
        for (int t = 0; t < count; ++t) {
          const double weight = weights[touched[t]];
          if (weight != 0.0) iterate = fma(weight, at(pool_.row_at(b_, pool_.row(b_, touched[t], length)), j), iterate);
        }
        const double difference = at(pool_.query_at(b_), j) - iterate;
        sum = fma(difference, difference, sum);
      }
    });
    __syncthreads();
    partial_[threadIdx.x] = sum;
    __syncthreads();
    for (int apart = kThreads / 2; apart > 0; apart /= 2) {
      if (threadIdx.x < apart) partial_[threadIdx.x] += partial_[threadIdx.x + apart];
      __syncthreads();
    }
    return partial_[0];
  }

 private:
  const DevicePool& pool_;
  const int64_t b_;
  const double* const gram_;  // [n + 1, stride]
  const int64_t stride_;
  unsigned char* const valid_;  // [n]
  double* const partial_;       // [kThreads]
  Contest contest_;
};

// Where things lie in shared memory; the factor may be too large for it.
struct ActiveSetLayout {
  ActiveSetLayout(int64_t n, int64_t width, const FrankWolfeParams& params, const CappedSimplex& simplex)
      : n(static_cast<int>(n)),
        touched(static_cast<int>(width)),
        vertex(static_cast<int>(simplex.size)),
        solved(params.variant == Variant::kFullyCorrective ? touched : 0),
        direction(params.variant == Variant::kVanilla ? this->n : solved),
        factor(solved * (int64_t{1} + solved) / 2),
        factor_in_shared(factor * sizeof(double) <= kFactorInShared) {}

  size_t bytes() const {
    return sizeof(Contest::Places) +
           sizeof(double) * (kThreads + 2 * n + 2 * solved + direction + (factor_in_shared ? factor : 0)) +
           sizeof(int) * (n + touched + solved + vertex) + 2 * n;
  }

  __device__ ActiveSetMemory memory(double* numbers, double* factor_outside) const {
    ActiveSetMemory memory;
    memory.weights = numbers;
    memory.scores = memory.weights + n;
    memory.free_scores = memory.scores + n;
    memory.ones = memory.free_scores + solved;
    memory.direction = memory.ones + solved;
    double* const end = memory.direction + direction;
    memory.factor = factor_in_shared ? end : factor_outside;
    memory.slot = reinterpret_cast<int*>(end + (factor_in_shared ? factor : 0));
    memory.touched = memory.slot + n;
    memory.free = memory.touched + touched;
    memory.vertex = memory.free + solved;
    memory.is_free = reinterpret_cast<unsigned char*>(memory.vertex + vertex);
    return memory;
  }

  int n, touched, vertex, solved, direction;
  int64_t factor;
  bool factor_in_shared;
};

__global__ void __launch_bounds__(kThreads)
    active_set_kernel(const DevicePool pool, const FrankWolfeParams params, const CappedSimplex simplex,
                      const ActiveSetLayout layout, int64_t first, const double* gram, int64_t stride, double* factors,
                      const FrankWolfeOutput out) {
  extern __shared__ __align__(16) char shared[];
  auto* const places = reinterpret_cast<Contest::Places*>(shared);
  double* const partial = reinterpret_cast<double*>(places + 1);
  const int64_t b = first + blockIdx.x;
  const ActiveSetMemory memory = layout.memory(partial + kThreads, factors + int64_t{blockIdx.x} * layout.factor);
  GramTeam team(pool, b, gram + int64_t{blockIdx.x} * (layout.n + 1) * stride, stride, memory.is_free + layout.n,
                partial, places);
  const int count = team.prepare();
  if (count < simplex.size) {  // -1: broken
    write_broken(out, b);
    return;
  }
  ActiveSetRun<GramTeam> run(team, params, simplex, memory);
  const Status status = run.run();
  const int size = run.num_touched();
  team.sync();
  team.each(0, size, [&](int s) {  // by falling weight, lowest index on a tie
    const int index = memory.touched[s];
    const double weight = memory.weights[index];
    int rank = 0;
    for (int t = 0; t < size; ++t) {
      const double other = memory.weights[memory.touched[t]];
      rank += other != weight ? other > weight : memory.touched[t] < index;
    }
    out.indices[b * out.width + rank] = index;
    out.weights[b * out.width + rank] = weight;
  });
#pragma unroll 1
  for (int64_t s = size + threadIdx.x; s < out.width; s += kThreads) {
    out.indices[b * out.width + s] = -1;
    out.weights[b * out.width + s] = 0.0;
  }
  if (threadIdx.x != 0) return;
  out.support_size[b] = size;
  out.num_iters[b] = run.num_iters();
  out.status[b] = static_cast<int64_t>(status);
}

}  // namespace

int64_t active_set_workspace_bytes(const PoolSpec& pool, const FrankWolfeParams& params,
                                   const FrankWolfeResult& result) {
  const int64_t n = pool.positions();
  const ActiveSetLayout layout(n, result.indices.shape[1], params, CappedSimplex(params.max_weight));
  const size_t most = most_shared(active_set_kernel);
  HULLKIT_SUPPORTED(most == 0 || layout.bytes() <= most,
                    "pool: expected candidates whose weights and scores fit into the ", most,
                    " bytes of shared memory that a block has on this device, got ", n, " candidates, of which ",
                    layout.touched, " may be in use: ", layout.bytes(),
                    " bytes. Lower max_support or max_iters, pass fewer candidates, or move the inputs with .cpu()");
  return gram_batch(pool.batch(), n) * (gram_bytes_of_one(n) + layout.factor * static_cast<int64_t>(sizeof(double)));
}

void active_set_on_gram(const PoolSpec& pool, const TensorView& query, const FrankWolfeParams& params,
                        const FrankWolfeResult& result, int64_t first, int64_t count, double* gram, void* stream) {
  const int64_t n = pool.positions();
  const CappedSimplex simplex(params.max_weight);
  const ActiveSetLayout layout(n, result.indices.shape[1], params, simplex);
  double* const factors = gram + gram_batch(pool.batch(), n) * (n + 1) * gram_stride(n);
  launch(active_set_kernel, count, kThreads, layout.bytes(), stream, DevicePool(pool, query), params, simplex, layout,
         first, gram, gram_stride(n), factors, FrankWolfeOutput(result));
}

}  // namespace hullkit
