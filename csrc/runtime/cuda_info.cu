// SPDX-License-Identifier: Apache-2.0
// Asks the driver what is here and proves, by running it, that a kernel of this build loads on each device.
#include <cuda_runtime.h>

#include "hullkit/build_info.h"

namespace hullkit {
namespace {

// The architecture the loaded code was compiled for, as in __CUDA_ARCH__: 900 for sm_90.
__global__ void compiled_architecture_kernel(int* architecture) {
#ifdef __CUDA_ARCH__
  *architecture = __CUDA_ARCH__;
#endif
}

cudaError_t compiled_architecture(int device, int* architecture) {
  int* on_device = nullptr;
  cudaStream_t stream = nullptr;
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (error == cudaSuccess) error = cudaMalloc(&on_device, sizeof(int));
  if (error == cudaSuccess) {
    compiled_architecture_kernel<<<1, 1, 0, stream>>>(on_device);
    error = cudaGetLastError();
  }
  if (error == cudaSuccess) {
    error = cudaMemcpyAsync(architecture, on_device, sizeof(int), cudaMemcpyDeviceToHost, stream);
  }
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  cudaFree(on_device);
  if (stream != nullptr) cudaStreamDestroy(stream);
  return error;
}

std::string describe(int device) {
  cudaDeviceProp properties;
  const cudaError_t error = cudaGetDeviceProperties(&properties, device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  std::string text = std::string(properties.name) + " (sm_" + std::to_string(properties.major) +
                     std::to_string(properties.minor) + ")";
  int architecture = 0;
  const cudaError_t loaded = compiled_architecture(device, &architecture);
  if (loaded != cudaSuccess) return text + ": kernels do not run: " + cudaGetErrorString(loaded);
  return text + ": runs sm_" + std::to_string(architecture / 10) + " code";
}

}  // namespace

CudaInfo cuda_info() {
  CudaInfo info{true, "", HULLKIT_CUDA_ARCHITECTURES, {}, ""};
  info.runtime = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  int current = 0;
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) error = cudaGetDevice(&current);
  if (error != cudaSuccess) {
    info.problem = cudaGetErrorString(error);
    return info;
  }
  for (int device = 0; device < count; ++device) info.devices.push_back(describe(device));
  cudaSetDevice(current);
  return info;
}

}  // namespace hullkit
