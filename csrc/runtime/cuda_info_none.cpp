// SPDX-License-Identifier: Apache-2.0
// The answer of a build without CUDA.
#include "hullkit/build_info.h"

namespace hullkit {

CudaInfo cuda_info() {
  return CudaInfo{false, "", "", {}, "built without CUDA: rebuild with nvcc on the PATH, or with HULLKIT_CUDA=ON"};
}

}  // namespace hullkit
