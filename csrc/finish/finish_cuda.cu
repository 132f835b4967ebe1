// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "finish/finish.h"
#include "frank_wolfe/certify.cuh"
#include "rounding/round.cuh"

namespace hullkit {
namespace {

static_assert(kCertifyThreads == kRoundThreads, "one launch does both");

// A block for each thing to do with a prompt: one rounds, which waits for itself, one certifies, which waits for
// memory; side by side, since they read the same rows. Six blocks are to fit on a multiprocessor.
__global__ void __launch_bounds__(kRoundThreads, 6)
    finish_kernel(const DevicePool pool, const Supports supports, Finish what, int64_t first,
                  const CappedSimplex simplex, const FrankWolfeOutput out) {
  extern __shared__ __align__(16) char shared[];
  __shared__ Contest::Places places;
  const int64_t entry = what == Finish::kBoth ? blockIdx.x / 2 : blockIdx.x;
  if (what == Finish::kRound || (what == Finish::kBoth && blockIdx.x % 2 == 0)) {
    DeviceRounding<true>(supports, entry, shared, &places).run(supports, first + entry);
  } else {
    certify(pool, first, entry, supports.gram, supports.stride, simplex, out, shared, &places);
  }
}

__global__ void __launch_bounds__(kRoundThreads) round_large_kernel(const Supports supports, int64_t first) {
  extern __shared__ __align__(16) char shared[];
  __shared__ Contest::Places places;
  DeviceRounding<false>(supports, blockIdx.x, shared, &places).run(supports, first + blockIdx.x);
}

}  // namespace

void finish_on_gram(const PoolSpec& pool, const TensorView& query, double max_weight, const FrankWolfeResult& result,
                    const Supports& supports, Finish what, int64_t first, int64_t count, void* stream) {
  if (what != Finish::kCertify && supports.width > kMaxCopied) {
    launch(round_large_kernel, count, kRoundThreads, DeviceRounding<false>::bytes(supports.width), stream, supports,
           first);
    if (what == Finish::kRound) return;
    what = Finish::kCertify;
  }
  const size_t certify = what == Finish::kRound ? 0 : certify_bytes(supports.n, supports.width);
  const size_t round = what == Finish::kCertify ? 0 : DeviceRounding<true>::bytes(supports.width);
  launch(finish_kernel, what == Finish::kBoth ? 2 * count : count, kRoundThreads, std::max(certify, round), stream,
         DevicePool(pool, query), supports, what, first, CappedSimplex(max_weight), FrankWolfeOutput(result));
}

}  // namespace hullkit
