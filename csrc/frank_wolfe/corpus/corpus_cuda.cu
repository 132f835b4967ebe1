// SPDX-License-Identifier: Apache-2.0
// Frank-Wolfe without a Gram matrix: an iteration is one pass over the candidates, by which up to 16 prompts find their
// vertices, and a step of each prompt by a block of its own. Nothing waits for a prompt to be finished: as many passes
// are launched as there may be, and those that no prompt of a group needs end at once.
#include <cmath>

#include "cuda/primitives/launch.cuh"
#include "cuda/scan/residual.cuh"
#include "cuda/scan/scan_pass.cuh"
#include "frank_wolfe/frank_wolfe_cuda.h"
#include "frank_wolfe/output.cuh"
#include "hullkit/interrupt.h"

namespace hullkit {
namespace {

constexpr int kStepThreads = 256;

struct alignas(16) PromptState {
  double residual_iterate;  // <residual, iterate> at the end
  int64_t support_size, num_iters;
  int64_t status;
  int shift;  // the direction is the residual times 2^shift
};

// float64 coordinates of a direction, and of halves at most as many bytes: 3 pieces of 2 bytes, 16-byte aligned.
__host__ __device__ int64_t padded(int64_t dim) { return (dim + 7) / 8 * 8; }

struct Workspace {
  PromptState* states;  // [B]
  Best* partial;        // [B, at most scan_blocks]
  double* directions;   // [B, padded(d)]
  double* iterates;     // [B, d]
  double* weights;      // [B, S]
  int64_t* touched;     // [B, S] in order of their first touch
  int* active;          // [B] whether the next pass is for this prompt
  int64_t end;          // bytes

  Workspace(void* memory, int64_t batch, int64_t positions, int64_t dim, int64_t width) : end(0) {
    char* const begin = static_cast<char*>(memory);
    const auto place = [&](auto*& part, int64_t count) {
      part = reinterpret_cast<std::remove_reference_t<decltype(part)>>(begin + end);
      end += count * static_cast<int64_t>(sizeof(*part));
    };
    place(states, batch);
    place(partial, batch * scan_blocks(positions));
    place(directions, batch * padded(dim));
    place(iterates, batch * dim);
    place(weights, batch * width);
    place(touched, batch * width);
    place(active, batch);
  }
};

// The sum over a block of kStepThreads; all threads get it.
__device__ double block_sum(double value) {
  __shared__ double of_warps[kStepThreads / 32];
  for (int apart = 16; apart > 0; apart /= 2) value += __shfl_xor_sync(kAllLanes, value, apart);
  __syncthreads();  // whoever still reads the last sum
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0.0;
  for (int warp = 0; warp < kStepThreads / 32; ++warp) sum += of_warps[warp];
  return sum;
}

// The largest over a block, likewise.
__device__ int block_largest(int value) {
  __shared__ int of_warps[kStepThreads / 32];
  value = __reduce_max_sync(kAllLanes, value);
  __syncthreads();  // whoever still reads the last one
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
  __syncthreads();
  for (int warp = 0; warp < kStepThreads / 32; ++warp) value = max(value, of_warps[warp]);
  return value;
}

// One prompt, by a block of kStepThreads. Sums over coordinates are taken in an order that depends on d alone.
template <typename E>
struct Prompt {
  using R = Residual<E>;
  using Column = typename R::Column;

  const DevicePool& pool;
  const int64_t b, width;
  PromptState& state;
  double* const direction;
  double* const iterate;
  double* const weights;
  int64_t* const touched;
  int& active;

  __device__ Prompt(const DevicePool& pool, const Workspace& workspace, int64_t width, int64_t b)
      : pool(pool),
        b(b),
        width(width),
        state(workspace.states[b]),
        direction(workspace.directions + b * padded(pool.dim)),
        iterate(workspace.iterates + b * pool.dim),
        weights(workspace.weights + b * width),
        touched(workspace.touched + b * width),
        active(workspace.active[b]) {}

  __device__ static double element(const char* row, int64_t j) { return to_double(reinterpret_cast<const E*>(row)[j]); }
  __device__ double query(int64_t j) const { return element(pool.query_at(b), j); }

  __device__ static int exponent_of(double value) { return static_cast<int>(__double2hiint(value) >> 20 & 0x7ff); }

  // Hands what residual(j) gives to the pass; `exponent`: this thread's largest exponent_of them. False if one of them
  // is not finite.
  template <typename Vector>
  __device__ bool aim(Vector&& residual, int exponent) {
    const int largest = block_largest(exponent);
    if (largest == 0x7ff) return false;
    // Numbers that small (below 2^-985) are as good as 0, and 2^shift is finite.
    const int shift = R::kScaled && largest > 0 ? min(R::kExponent - (largest - 1023), 1000) : 0;
    const double scale = ldexp(1.0, shift);
    Column* const pieces = reinterpret_cast<Column*>(direction);
    const int64_t stride = padded(pool.dim);
    for (int64_t j = threadIdx.x; j < stride; j += kStepThreads) {  // the padding too: zeros, for whole 16-byte copies
      double rest = j < pool.dim ? residual(j) * scale : 0.0;
#pragma unroll
      for (int k = 0; k < R::kPieces; ++k) {
        const Column piece = R::round(rest);
        pieces[k * stride + j] = piece;
        rest -= to_double(piece);
      }
    }
    if (threadIdx.x == 0) {
      state.shift = shift;
      active = 1;
    }
    return true;
  }

  __device__ void stop(Status status) {
    if (threadIdx.x != 0) return;
    state.status = static_cast<int64_t>(status);
    active = 0;
  }

  // Before the first pass, whose direction is the query.
  __device__ void start() {
    if (threadIdx.x == 0) state.support_size = state.num_iters = 0;
    int exponent = 0;
    for (int64_t j = threadIdx.x; j < pool.dim; j += kStepThreads) exponent = max(exponent, exponent_of(query(j)));
    if (!aim([this](int64_t j) { return query(j); }, exponent)) stop(Status::kBroken);
  }

  // After a pass, which found `best`: line search, move, and the tests of the next iteration.
  __device__ void step(const Best& best, const FrankWolfeParams& params) {
    if (best.key == kSmallestKey || best.key == kLargestKey) return stop(Status::kBroken);
    const char* const row = pool.row_at(b, pool.row(b, best.index));
    const int64_t size = state.support_size, num_iters = state.num_iters;
    const bool first = size == 0;
    double step = 1.0;
    if (!first) {
      double slope = 0.0, length = 0.0;
      for (int64_t j = threadIdx.x; j < pool.dim; j += kStepThreads) {
        const double at = iterate[j], difference = element(row, j) - at;
        slope = fma(query(j) - at, difference, slope);
        length = fma(difference, difference, length);
      }
      slope = block_sum(slope);
      length = block_sum(length);
      if (!isfinite(slope) || !isfinite(length)) return stop(Status::kBroken);
      if (length < kStalledSquaredNorm) return stop(Status::kStalled);
      step = fmin(fmax(slope / length, 0.0), 1.0);
    }
    const double keep = 1.0 - step;

    bool known = false;
    for (int64_t s = threadIdx.x; s < size; s += kStepThreads) {
      double weight = weights[s] * keep;
      if (touched[s] == static_cast<int64_t>(best.index)) {
        weight += step;
        known = true;
      }
      weights[s] = weight;
    }
    known = __syncthreads_or(known);  // and everyone has read the state
    const int64_t new_size = known ? size : size + 1, new_iters = first ? 0 : num_iters + 1;
    if (threadIdx.x == 0) {
      if (!known) {
        touched[size] = static_cast<int64_t>(best.index);
        weights[size] = step;
      }
      state.support_size = new_size;
      state.num_iters = new_iters;
    }

    double squared = 0.0;
    int exponent = 0;
    for (int64_t j = threadIdx.x; j < pool.dim; j += kStepThreads) {
      const double at = element(row, j);
      iterate[j] = first ? at : fma(keep, iterate[j], step * at);
      const double residual = query(j) - iterate[j];
      squared = fma(residual, residual, squared);
      exponent = max(exponent, exponent_of(residual));
    }
    squared = block_sum(squared);
    if (new_size >= params.max_support) return stop(Status::kMaxSupport);
    if (new_iters >= params.max_iters) return stop(Status::kMaxIters);
    if (sqrt(squared) < params.tol) return stop(Status::kConverged);
    if (!aim([this](int64_t j) { return query(j) - iterate[j]; }, exponent)) stop(Status::kBroken);
  }

  // Writes the support by falling weight, and the certificates from the input, but for the dual gap: that takes one
  // more pass, with the residual of the weights as they are.
  __device__ void finish(const FrankWolfeOutput& out) {
    const bool broken = state.status == static_cast<int64_t>(Status::kBroken);
    const int64_t size = broken ? 0 : state.support_size;
    int64_t* const indices = out.indices + b * width;
    double* const sorted = out.weights + b * width;
#pragma unroll 1
    for (int64_t s = threadIdx.x; s < width; s += kStepThreads) {
      if (s >= size) {
        indices[s] = -1;
        sorted[s] = 0.0;
        continue;
      }
      int64_t rank = 0;
      for (int64_t other = 0; other < size; ++other) {
        rank += weights[other] != weights[s] ? weights[other] > weights[s] : touched[other] < touched[s];
      }
      indices[rank] = touched[s];
      sorted[rank] = weights[s];
    }
    if (threadIdx.x == 0) {
      out.support_size[b] = size;
      out.num_iters[b] = broken ? 0 : state.num_iters;
      out.status[b] = state.status;
      if (broken) out.residual_norm[b] = __longlong_as_double(0x7ff8000000000000ll);
    }
    if (broken) return;
    __syncthreads();
#pragma unroll 1
    for (int64_t s = threadIdx.x; s < size; s += kStepThreads) touched[s] = pool.row(b, indices[s]);
    __syncthreads();
    double squared = 0.0, residual_iterate = 0.0;
    int exponent = 0;
    for (int64_t j = threadIdx.x; j < pool.dim; j += kStepThreads) {
      double at = 0.0;
#pragma unroll 8
      for (int64_t s = 0; s < size; ++s) at = fma(sorted[s], element(pool.row_at(b, touched[s]), j), at);
      iterate[j] = at;
      const double residual = query(j) - at;
      squared = fma(residual, residual, squared);
      residual_iterate = fma(residual, at, residual_iterate);
      exponent = max(exponent, exponent_of(residual));
    }
    squared = block_sum(squared);
    residual_iterate = block_sum(residual_iterate);
    if (threadIdx.x == 0) {
      out.residual_norm[b] = sqrt(squared);
      state.residual_iterate = residual_iterate;
    }
    aim([this](int64_t j) { return query(j) - iterate[j]; }, exponent);
  }
};

template <typename E>
__global__ void __launch_bounds__(kStepThreads)
    start_kernel(const DevicePool pool, const Workspace workspace, int64_t width) {
  Prompt<E>(pool, workspace, width, blockIdx.x).start();
}

template <typename E>
__global__ void __launch_bounds__(kStepThreads)
    step_kernel(const DevicePool pool, const Workspace workspace, int64_t width, int64_t partials,
                const FrankWolfeParams params) {
  if (workspace.active[blockIdx.x] == 0) return;
  const Best best = best_of(workspace.partial + blockIdx.x * partials, partials);  // and everyone has read `active`
  Prompt<E>(pool, workspace, width, blockIdx.x).step(best, params);
}

template <typename E>
__global__ void __launch_bounds__(kStepThreads)
    finish_kernel(const DevicePool pool, const Workspace workspace, int64_t width, const FrankWolfeOutput out) {
  Prompt<E>(pool, workspace, width, blockIdx.x).finish(out);
}

// After the last pass.
__global__ void __launch_bounds__(kStepThreads)
    certify_kernel(const Workspace workspace, int64_t partials, const FrankWolfeOutput out) {
  const int64_t b = blockIdx.x;
  const Best best = best_of(workspace.partial + b * partials, partials);
  if (threadIdx.x != 0) return;
  const PromptState& state = workspace.states[b];
  const bool broken = workspace.active[b] == 0 || best.key == kSmallestKey || best.key == kLargestKey;
  const double product = broken ? 0.0 : ldexp(-value_of(best.key), -state.shift);
  out.dual_gap[b] = broken ? __longlong_as_double(0x7ff8000000000000ll) : product - state.residual_iterate;
}

}  // namespace

int64_t corpus_workspace_bytes(const PoolSpec& pool, const FrankWolfeResult& result) {
  return Workspace(nullptr, pool.batch(), pool.positions(), pool.dim(), result.indices.shape[1]).end;
}

void corpus_cuda(const PoolSpec& pool, const TensorView& query, const FrankWolfeParams& params,
                 const FrankWolfeResult& result, void* memory, void* stream) {
  const int64_t batch = pool.batch(), dim = pool.dim(), width = result.indices.shape[1];
  const Workspace workspace(memory, batch, pool.positions(), dim, width);
  const FrankWolfeOutput out(result);
  const DevicePool device_pool(pool, query);
  with_element(pool.rows.dtype, [&](auto element) {
    using E = decltype(element);
    const int64_t stride = padded(dim);
    const Directions directions{reinterpret_cast<const char*>(workspace.directions),
                                stride * static_cast<int64_t>(sizeof(double)),
                                stride * static_cast<int64_t>(sizeof(typename Residual<E>::Column)), true};
    const ScanPass pass(pool, device_pool, directions, -1.0, workspace.partial, Keep::kBest);
    const auto run = [&](auto kernel, auto... arguments) {
      launch(kernel, batch, kStepThreads, 0, stream, device_pool, workspace, width, arguments...);
    };
    run(start_kernel<E>);
    const int64_t steps = params.max_support > 1 ? params.max_iters : 0;
    for (int64_t step = 0; step <= steps; ++step) {
      stop_if_asked();  // whether all entries have ended is not known here, and max_iters may be "no limit"
      pass(workspace.active, stream);
      run(step_kernel<E>, pass.partials(), params);
    }
    run(finish_kernel<E>, out);
    pass(workspace.active, stream);
    launch(certify_kernel, batch, kStepThreads, 0, stream, workspace, pass.partials(), out);
  });
}

}  // namespace hullkit
