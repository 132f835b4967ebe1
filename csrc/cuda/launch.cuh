// The way from host code to a kernel.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace hullkit {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// kernel<<<blocks, threads, shared, stream>>>(arguments...), nothing if there are no blocks.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared, void* stream,
            Arguments... arguments) {
  if (blocks == 0) return;
  const char* const name = "CUDA launch";
  // More than 48 KiB must be asked for; what a kernel declares itself counts too, at most 8 KiB here.
  if (shared > 40 * 1024) {
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared)),
               name);
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared, static_cast<cudaStream_t>(stream)>>>(
      static_cast<Parameters>(arguments)...);
  check_cuda(cudaGetLastError(), name);
}

}  // namespace hullkit
