// SPDX-License-Identifier: Apache-2.0
// Large batches are done in pieces, so that their workspace stays bounded.
#pragma once

#include <cstdint>

namespace hullkit {

// Bytes of a piece at most, or of `fewest` entries, where that is more.
inline constexpr int64_t kPieceBytes = int64_t{512} << 20;

// How many entries of a batch are done at a time: a multiple of `fewest`, or all.
inline int64_t entries_of_piece(int64_t batch, int64_t bytes_of_one, int64_t fewest = 1) {
  const int64_t fit = kPieceBytes / (bytes_of_one * fewest) * fewest;
  const int64_t entries = fit < fewest ? fewest : fit;
  return entries < batch ? entries : batch;
}

}  // namespace hullkit
