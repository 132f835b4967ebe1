#include <algorithm>

#include "cuda/prompt.cuh"
#include "frank_wolfe/certify.cuh"
#include "frank_wolfe/frank_wolfe_cuda.h"
#include "hullkit/round_multiplicities.h"
#include "hullkit/select.h"
#include "rounding/round.cuh"

namespace hullkit {
namespace {

static_assert(kCertifyThreads == kRoundThreads, "one launch does both");

// Two blocks for each prompt: one rounds, which waits for itself, one certifies, which waits for memory; side by side,
// since they read the same rows.
template <typename E>
__global__ void __launch_bounds__(kRoundThreads)
    finish_kernel(const DevicePool<E> pool, const Supports supports, int64_t first, const CappedSimplex simplex,
                  const FrankWolfeOutput out) {
  extern __shared__ __align__(16) char shared[];
  __shared__ Contest::Places places;
  const int64_t entry = blockIdx.x / 2;
  if (blockIdx.x % 2 == 0) {
    DeviceRounding<true>(supports, entry, shared, &places).run(supports, first + entry);
  } else {
    certify(pool, first, entry, supports.gram, supports.stride, simplex, out, shared, &places);
  }
}

}  // namespace

void select_cuda(const PoolSpec& pool, const TensorView& query, const FrankWolfeParams& params,
                 const RoundingParams& rounding, const FrankWolfeResult& result, const TensorView& counts,
                 const TensorView& residual_norm, void* workspace, void* stream) {
  if (pool.positions() > kMaxOnDevice) {
    frank_wolfe_corpus_cuda(pool, query, params, result, workspace, stream);
    round_supports(pool, query, result.indices, result.weights, rounding, counts, residual_norm, workspace, stream);
    return;
  }
  double* const gram = static_cast<double*>(workspace);
  const int64_t batch = pool.batch(), n = pool.positions(), step = gram_batch(batch, n);
  const Supports supports(gram, n, true, n, result.indices, result.weights, rounding, counts, residual_norm);
  for (int64_t first = 0; first < batch; first += step) {
    const int64_t count = step < batch - first ? step : batch - first;
    gram_cuda(pool, query, {}, first, count, gram, stream);
    frank_wolfe_on_gram(pool, query, params, result, first, count, gram, stream);
    if (supports.width > kMaxCopied) {
      round_on_gram(supports, first, count, stream);
      certify_on_gram(pool, query, params, result, first, count, gram, stream);
      continue;
    }
    with_element(pool.rows.dtype, [&](auto element) {
      using E = decltype(element);
      const size_t shared = std::max(DeviceRounding<true>::bytes(supports.width), certify_bytes<E>(n, supports.width));
      launch(finish_kernel<E>, 2 * count, kRoundThreads, shared, stream, DevicePool<E>(pool, query), supports, first,
             CappedSimplex(params.max_weight), FrankWolfeOutput(result));
    });
  }
}

}  // namespace hullkit
