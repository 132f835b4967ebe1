// SPDX-License-Identifier: Apache-2.0
// Where kernels write the results of Frank-Wolfe.
#pragma once

#include "hullkit/frank_wolfe.h"

namespace hullkit {

struct FrankWolfeOutput {
  explicit FrankWolfeOutput(const FrankWolfeResult& result)
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

// The result of an entry that cannot be solved. Its certificates are left to certify.cuh.
__device__ inline void write_broken(const FrankWolfeOutput& out, int64_t b) {
#pragma unroll 1
  for (int64_t s = threadIdx.x; s < out.width; s += blockDim.x) {
    out.indices[b * out.width + s] = -1;
    out.weights[b * out.width + s] = 0.0;
  }
  if (threadIdx.x != 0) return;
  out.support_size[b] = out.num_iters[b] = 0;
  out.status[b] = static_cast<int64_t>(Status::kBroken);
}

}  // namespace hullkit
