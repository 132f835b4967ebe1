// SPDX-License-Identifier: Apache-2.0
// The answer of a solver's step to its loop: go on, or end with a status.
#pragma once

#include "hullkit/frank_wolfe.h"

namespace hullkit {

// kContinue: the step was taken, and the loop goes on. Any other step ends the run with the status of its name.
enum class Step : int64_t {
  kContinue = -1,
  kMaxSupport = static_cast<int64_t>(Status::kMaxSupport),
  kStalled = static_cast<int64_t>(Status::kStalled),
  kGapTol = static_cast<int64_t>(Status::kGapTol),
};

}  // namespace hullkit
