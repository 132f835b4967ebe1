// SPDX-License-Identifier: Apache-2.0
// The shared memory of a block of `product_sums`: a ring of stages that one thread fills and groups of warps empty.
#pragma once

#include <cstdint>

#include "cuda/primitives/hopper.cuh"
#include "hullkit/product_sums.h"

namespace hullkit {

constexpr int kGroup = 128;  // threads that multiply together
constexpr int kGroups = 2;   // of them, beside one that copies
constexpr int kThreads = kGroup * (1 + kGroups);
constexpr int kGroupColumns = kTileColumns / kGroups;
constexpr int kDepth = 64, kStep = 16;            // of the sums: a stage's, and a matrix instruction's
constexpr int kBoxRow = 128;                      // bytes of a row of a box: kDepth or kGroupColumns halves
constexpr int kThinRow = 32;                      // of a thin box: kStep halves
constexpr int kAligned = 1024;                    // bytes: where a box begins
constexpr int kCopying = 40, kMultiplying = 232;  // registers of a thread

// Rows of a box. The largest tiles have two, so that the last ones can be split.
constexpr int box_rows_of(int rows) { return rows == 208 ? 104 : rows; }

// Groups that have columns inside of a matrix that goes on for so many.
__device__ inline int groups_of(int columns) { return columns > kGroupColumns ? kGroups : 1; }

template <int kRows>
struct Memory {
  static constexpr int kBoxRows = box_rows_of(kRows);
  static constexpr int kGroupFactor = kGroupColumns * kBoxRow, kFactor = kGroups * kGroupFactor;
  static constexpr int kThinGroupFactor = kGroupColumns * kThinRow, kThinFactor = kGroups * kThinGroupFactor;
  static constexpr int kStage = kFactor + kRows * kBoxRow;
  static constexpr int kThinRows = kRows * kThinRow;  // of one step
  static constexpr int kResult = kRows * kTileColumns * 2;
  static constexpr int kMost = 227 * 1024 - kAligned - 256;  // that a block may have, without the barriers
  static constexpr int kStages = (kMost - kResult) / kStage;
  static constexpr int kBytes =
      kAligned + kStages * kStage + kResult + 2 * kStages * static_cast<int>(sizeof(ptx::Barrier));
};

// A ring of stages as one of its users sees it; `turn` is the parity of how often it went through the ring.
template <int kRows>
class Stages {
 public:
  unsigned char* memory;
  ptx::Barrier *full, *empty;
  int stage = 0;

  __device__ Stages(unsigned char* memory, ptx::Barrier* barriers)
      : memory(memory), full(barriers), empty(barriers + Memory<kRows>::kStages) {}

  __device__ unsigned char* now() const { return memory + stage * Memory<kRows>::kStage; }

  __device__ void wait_empty() { empty[stage].wait(turn ^ 1); }  // the first time nobody has used it
  __device__ void wait_full() { full[stage].wait(turn); }

  __device__ void advance() {
    if (++stage == Memory<kRows>::kStages) stage = 0, turn ^= 1;
  }

  // Gives back so many stages that this user does not read.
  __device__ void pass(int stages) {
    for (int i = 0; i < stages; ++i) {
      wait_full();
      __syncwarp();  // a lane that still waits would miss the stage's next turn
      release(stage);
      advance();
    }
  }

  // With products of this stage under way, those of the one before have ended.
  __device__ void go_on() {
    if (before >= 0) release(before);
    before = stage;
    advance();
  }

  __device__ void end_products() {
    release(before);
    before = -1;
  }

 private:
  __device__ void release(int which) {
    if (threadIdx.x % 32 == 0) empty[which].arrive();
  }

  uint32_t turn = 0;
  int before = -1;  // the stage that is read while the next one is waited for
};

}  // namespace hullkit
