// SPDX-License-Identifier: Apache-2.0
// The way from host code to a kernel.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace hullkit {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Asks for dynamic shared memory beyond the 48 KiB that every kernel may have. Static shared memory counts, too:
// kernels here declare at most 8 KiB of it.
template <typename... Parameters>
void allow_shared(void (*kernel)(Parameters...), size_t shared) {
  if (shared <= 40 * 1024) return;
  check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(shared)),
             "CUDA shared memory");
}

// Whether this build has the kernel for the current device, and a block there may have so much shared memory.
template <typename... Parameters>
bool runs_here(void (*kernel)(Parameters...), size_t shared) {
  int device = 0, most = 0;
  cudaFuncAttributes attributes;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess &&
                     cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)) == cudaSuccess;
  cudaGetLastError();  // the next launch would report it
  return known && static_cast<size_t>(most) >= shared;
}

// kernel<<<blocks, threads, shared, stream>>>(arguments...), nothing if there are no blocks.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared, void* stream,
            Arguments... arguments) {
  if (blocks == 0) return;
  allow_shared(kernel, shared);
  kernel<<<static_cast<unsigned>(blocks), threads, shared, static_cast<cudaStream_t>(stream)>>>(
      static_cast<Parameters>(arguments)...);
  check_cuda(cudaGetLastError(), "CUDA launch");
}

}  // namespace hullkit
