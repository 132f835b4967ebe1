// SPDX-License-Identifier: Apache-2.0
// The contents of this build, and the devices of this machine.
#pragma once

#include <string>
#include <vector>

namespace hullkit {

struct CudaInfo {
  bool compiled;                     // built with CUDA
  std::string runtime;               // version of the linked runtime, "" without
  std::string architectures;         // as given to the compiler, "" without
  std::vector<std::string> devices;  // "name (sm_90): runs sm_90 code", one per device the driver shows
  std::string problem;               // why there are none, "" otherwise
};

// Runs a one-thread kernel on each device, so it initialises them: call it to report, not at import.
CudaInfo cuda_info();

}  // namespace hullkit
