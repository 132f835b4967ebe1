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

}  // namespace hullkit
