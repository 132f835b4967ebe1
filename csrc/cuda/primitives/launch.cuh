// SPDX-License-Identifier: Apache-2.0
// The way from host code to a kernel.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "hullkit/check.h"

namespace hullkit {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the next launch, whoever's it is, would report it
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Bytes of dynamic shared memory that a block of the kernel may have on the current device; 0 if this build does not
// have the kernel for it.
template <typename... Parameters>
size_t most_shared(void (*kernel)(Parameters...)) {
  int device = 0, most = 0;
  cudaFuncAttributes attributes;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess &&
                     cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)) == cudaSuccess;
  cudaGetLastError();
  return known && static_cast<size_t>(most) > attributes.sharedSizeBytes ? most - attributes.sharedSizeBytes : 0;
}

// Whether this build has the kernel for the current device, and a block there may have so much shared memory.
template <typename... Parameters>
bool runs_here(void (*kernel)(Parameters...), size_t shared) {
  const size_t most = most_shared(kernel);
  return most > 0 && most >= shared;
}

// Asks for dynamic shared memory beyond the 48 KiB that every kernel may have. Static shared memory counts, too:
// kernels here declare at most 8 KiB of it.
template <typename... Parameters>
void allow_shared(void (*kernel)(Parameters...), size_t shared) {
  if (shared <= 40 * 1024) return;
  const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error == cudaSuccess) return;
  const size_t most = most_shared(kernel);
  HULLKIT_SUPPORTED(most == 0 || shared <= most, "CUDA: expected sizes whose numbers fit into the ", most,
                    " bytes of shared memory that a block has on this device, got ", shared,
                    " bytes. Pass fewer candidates, or move the inputs with .cpu()");
  check_cuda(error, "CUDA shared memory");
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
