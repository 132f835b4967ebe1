#include "hullkit/round_multiplicities.h"
#include "rounding/round.cuh"

namespace hullkit {
namespace {

template <bool kCopied>
__global__ void __launch_bounds__(kRoundThreads) round_kernel(const Supports supports, int64_t first) {
  extern __shared__ __align__(16) char shared[];
  __shared__ Contest::Places places;
  DeviceRounding<kCopied>(supports, blockIdx.x, shared, &places).run(supports, first + blockIdx.x);
}

}  // namespace

void round_on_gram(const Supports& supports, int64_t first, int64_t count, void* stream) {
  const bool copied = supports.width <= kMaxCopied;
  const auto kernel = copied ? round_kernel<true> : round_kernel<false>;
  const auto bytes = copied ? DeviceRounding<true>::bytes : DeviceRounding<false>::bytes;
  launch(kernel, count, kRoundThreads, bytes(supports.width), stream, supports, first);
}

void round_supports(const PoolSpec& pool, const TensorView& query, const TensorView& indices, const TensorView& weights,
                    const RoundingParams& rounding, const TensorView& counts, const TensorView& residual_norm,
                    void* workspace, void* stream) {
  double* const gram = static_cast<double*>(workspace);
  const int64_t batch = pool.batch(), width = indices.shape[1], step = gram_batch(batch, width);
  const Supports supports(gram, width, false, pool.positions(), indices, weights, rounding, counts, residual_norm);
  for (int64_t first = 0; first < batch; first += step) {
    const int64_t count = step < batch - first ? step : batch - first;
    gram_cuda(pool, query, indices, first, count, gram, stream);
    round_on_gram(supports, first, count, stream);
  }
}

void round_multiplicities_cuda(const PoolSpec& pool, const TensorView& query, const TensorView& indices,
                               const TensorView& weights, const RoundingParams& rounding, const TensorView& counts,
                               void* workspace, void* stream) {
  round_supports(pool, query, indices, weights, rounding, counts, {}, workspace, stream);
}

}  // namespace hullkit
