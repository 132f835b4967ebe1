// SPDX-License-Identifier: Apache-2.0
// One pass over every entry's candidates: their products with directions. Blocks stay and take one tile of rows after
// the other; chunks of the next are on their way while the products of the last are summed, so that memory never waits.
#pragma once

#include <cmath>
#include <type_traits>

#include "cuda/primitives/tile.cuh"
#include "cuda/scan/scan_pass.cuh"

namespace hullkit {

// copy_piece below, for rows that are not aligned to 16 bytes. Not inlined, as it is rare.
__device__ __noinline__ inline void copy_unaligned_piece(char* to, const char* from, int bytes, int alignment) {
  if (alignment >= 4) {
#pragma unroll
    for (int at = 0; at < 16; at += 4) ptx::copy_async_4(to + at, from + at, min(max(bytes - at, 0), 4));
  } else {
#pragma unroll
    for (int at = 0; at < 16; at += 2) {
      *reinterpret_cast<uint16_t*>(to + at) = at < bytes ? *reinterpret_cast<const uint16_t*>(from + at) : 0;
    }
  }
}

// Copies 16 bytes of elements to shared memory, zeros from `bytes` on. `from` is a multiple of `alignment`, one of 2
// (of halves only), 4, 8, 16, and is not read if bytes is 0.
__device__ inline void copy_piece(char* to, const char* from, int bytes, int alignment) {
  if (alignment == 16) {
    ptx::copy_async_16(to, from, bytes);
  } else {
    copy_unaligned_piece(to, from, bytes, alignment);
  }
}

// How much of a piece is among the bytes that are left.
__device__ inline int bytes_of_piece(int64_t left) { return left <= 0 ? 0 : left < 16 ? static_cast<int>(left) : 16; }

// The power of two, at most 16, that divides an address and all distances from it.
__device__ inline int alignment_of(const char* data, int64_t stride, int64_t other_stride) {
  const auto bits = reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(stride | other_stride) | 16;
  return static_cast<int>(bits & (~bits + 1));
}

// sums [kRowBlocks, kColBlocks], of 16 x 8 products each, += those of kUnits units of the rows and columns that begin
// at `rows` and `cols` in shared memory, kStride and kColStride bytes apart; of the first kBlocks blocks of rows.
template <typename E, typename C, int kBlocks, int kUnits, int kStride, int kColStride, typename Sum, int kRowBlocks,
          int kColBlocks>
__device__ void multiply_chunk(const char* rows, const char* cols, Sum (&sums)[kRowBlocks][kColBlocks][4]) {
  using Unit = typename Operand<E>::Unit;
  using ColUnit = typename Operand<C>::Unit;
  using Fragment = typename Operand<E>::Fragment;
  constexpr int kDepth = 8;  // units of a product
  constexpr int kUnitStride = kStride / sizeof(Unit), kColUnitStride = kColStride / sizeof(ColUnit);
  const int lane = threadIdx.x % 32;
  const Unit* const a_at = reinterpret_cast<const Unit*>(rows) + lane / 4 * kUnitStride + lane % 4;
  const ColUnit* const b_at = reinterpret_cast<const ColUnit*>(cols) + lane / 4 * kColUnitStride + lane % 4;
#pragma unroll
  for (int step = 0; step < kUnits; step += kDepth) {
    Fragment a[kBlocks][4], b[kColBlocks][2];
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) a[i][e] = a_at[(i * 16 + e % 2 * 8) * kUnitStride + step + e / 2 * 4];
    }
#pragma unroll
    for (int j = 0; j < kColBlocks; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) b[j][e] = b_at[j * 8 * kColUnitStride + step + e * 4];
    }
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int j = 0; j < kColBlocks; ++j) Operand<E>::multiply_add(sums[i][j], a[i], b[j]);
    }
  }
}

// Rows of E, columns of C; kScanGroup directions of kPieces columns each. Piece k of direction p is column p % 8
// of block p / 8 * kPieces + k: a lane has all pieces of its directions.
template <typename E, typename C, int kPieces>
struct Scan {
  using Unit = typename Operand<E>::Unit;
  using ColUnit = typename Operand<C>::Unit;
  using Sum = typename Operand<E>::Sum;
  static_assert(std::is_same_v<typename Operand<E>::Fragment, typename Operand<C>::Fragment>, "");

  static constexpr int kPromptBlocks = kScanGroup / 8;
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kRowBlocks = 2, kColBlocks = kPromptBlocks * kPieces;
  static constexpr int kRows = 16 * kRowBlocks * kWarps, kCols = 8 * kColBlocks;
  static constexpr int kStages = 3;  // chunks of the rows in shared memory or on their way there
  static constexpr int kChunk = 128, kColChunk = kChunk / sizeof(E) * sizeof(C);  // bytes of a row, of a column
  static constexpr int kStride = kChunk + 4 * sizeof(Unit);  // padded: the lanes of a fragment hit all banks
  static constexpr int kColStride = kColChunk + 4 * sizeof(ColUnit);
  static constexpr int kRowBytes = kRows * kStride, kColBytes = kCols * kColStride;  // of a chunk
  static constexpr int kRowsOfThread = kRows * (kChunk / 16) / kThreads;

  static __host__ __device__ int chunks(int64_t dim) {
    return static_cast<int>((dim * static_cast<int64_t>(sizeof(E)) + kChunk - 1) / kChunk);
  }
  static size_t shared_bytes(int64_t dim, bool resident) {
    return size_t{kStages} * kRowBytes + static_cast<size_t>(resident ? chunks(dim) : kStages) * kColBytes;
  }

  const DevicePool& pool;
  const Directions& directions;
  const int64_t b0;  // the first entry
  const int members;
  const int alignment, direction_alignment;
  const char* rows[kRowsOfThread];  // of which this thread copies; nullptr: zeros

  __device__ Scan(const DevicePool& pool, const Directions& directions, int64_t b0, int members)
      : pool(pool),
        directions(directions),
        b0(b0),
        members(members),
        alignment(alignment_of(pool.rows, pool.row_stride, pool.batch_stride)),
        direction_alignment(alignment_of(directions.data, directions.stride, directions.piece_stride)) {}

  __device__ static int64_t tile_count(int64_t size) { return (size + kRows - 1) / kRows; }

  __device__ void aim(int64_t tile) {
    const int64_t length = pool.length(b0);
#pragma unroll
    for (int k = 0; k < kRowsOfThread; ++k) {
      const int64_t at = pool.row(b0, tile * kRows + copied_row(k), length);
      rows[k] = at >= 0 ? pool.row_at(b0, at) : nullptr;
    }
  }

  __device__ void load_rows(char* stage, int chunk) const {
    if (alignment == 16) {  // asked once, not for every row
      copy_rows(stage, chunk, 16);
    } else {
      copy_rows(stage, chunk, alignment);
    }
  }

  __device__ void load_columns(char* stage, int chunk) const {
    constexpr int kPiecesOfColumn = kColChunk / 16;
    for (int t = threadIdx.x; t < kCols * kPiecesOfColumn; t += kThreads) {
      const int col = t / kPiecesOfColumn, piece = t % kPiecesOfColumn * 16;
      const int member = col / 8 / kPieces * 8 + col % 8;
      const int64_t at = int64_t{chunk} * kColChunk + piece;
      const int bytes = member < members ? bytes_of_piece(pool.dim * static_cast<int64_t>(sizeof(C)) - at) : 0;
      const char* const column = directions.at(bytes > 0 ? b0 + member : b0, col / 8 % kPieces);
      copy_piece(stage + col * kColStride + piece, column + (bytes > 0 ? at : 0), bytes, direction_alignment);
    }
  }

  // Calls visit(slot, member, position, value) for this lane's part of tiles first, first + blocks, ..., by rising
  // position: the product of the direction of entry b0 + member < b0 + members with a candidate, times sign. -infinity:
  // broken, or the product is not finite; infinity: no candidate. slot < 2 kPromptBlocks counts the lane's directions.
  template <typename Visit>
  __device__ void run(char* shared, const ScanPlan& plan, int64_t first, double sign, Visit&& visit) {
    char* const columns = shared + kStages * kRowBytes;
    const int chunk_count = chunks(pool.dim), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t tiles = tile_count(pool.size);
    int64_t next_tile = first;
    int next_chunk = 0;
    const auto load_next = [&](int slot) {
      if (next_tile < tiles) {
        if (next_chunk == 0) aim(next_tile);
        load_rows(shared + slot * kRowBytes, next_chunk);
        if (!plan.resident) load_columns(columns + slot * kColBytes, next_chunk);
        if (++next_chunk == chunk_count) {
          next_chunk = 0;
          next_tile += plan.blocks;
        }
      }
      ptx::commit_copies();
    };

    if (plan.resident) {
      for (int chunk = 0; chunk < chunk_count; ++chunk) load_columns(columns + chunk * kColBytes, chunk);
    }
#pragma unroll 1
    for (int slot = 0; slot < kStages - 1; ++slot) load_next(slot);
    const int64_t length = pool.length(b0);
    int slot = 0;
    for (int64_t tile = first; tile < tiles; tile += plan.blocks) {
      uint32_t valid = 0, broken = 0;  // of this lane's rows
#pragma unroll
      for (int r = 0; r < 2 * kRowBlocks; ++r) {
        const int64_t at = pool.row(b0, tile * kRows + summed_row(warp, lane, r), length);
        valid |= static_cast<uint32_t>(at >= 0) << r;
        broken |= static_cast<uint32_t>(at == DevicePool::kBroken) << r;
      }
      Sum sums[kRowBlocks][kColBlocks][4] = {};
      for (int chunk = 0; chunk < chunk_count; ++chunk) {
        ptx::wait_copies<kStages - 2>();
        __syncthreads();  // the chunk is there, and nobody reads the slot that is loaded next
        load_next(slot == 0 ? kStages - 1 : slot - 1);
        multiply_chunk<E, C, kRowBlocks, kChunk / static_cast<int>(sizeof(Unit)), kStride, kColStride>(
            shared + slot * kRowBytes + warp * 16 * kRowBlocks * kStride,
            columns + (plan.resident ? chunk : slot) * kColBytes, sums);
        slot = slot == kStages - 1 ? 0 : slot + 1;
      }
#pragma unroll
      for (int r = 0; r < 2 * kRowBlocks; ++r) {
        const int64_t position = tile * kRows + summed_row(warp, lane, r);
#pragma unroll
        for (int s = 0; s < 2 * kPromptBlocks; ++s) {
          const int member = s / 2 * 8 + lane % 4 * 2 + s % 2;
          double sum = sums[r / 2][s / 2 * kPieces][r % 2 * 2 + s % 2];
#pragma unroll
          for (int k = 1; k < kPieces; ++k)
            sum += static_cast<double>(sums[r / 2][s / 2 * kPieces + k][r % 2 * 2 + s % 2]);
          const double product = isfinite(sum) ? sign * sum : -INFINITY;
          const double value = valid >> r & 1 ? product : broken >> r & 1 ? -INFINITY : INFINITY;
          if (member < members) visit(s, member, position, value);
        }
      }
    }
    ptx::wait_copies<0>();
  }

 private:
  // Piece threadIdx.x % 8 of the rows aimed at.
  __device__ void copy_rows(char* stage, int chunk, int alignment_of_rows) const {
    const int piece = threadIdx.x % (kChunk / 16) * 16;
    const int64_t at = int64_t{chunk} * kChunk + piece;
    const int bytes = bytes_of_piece(pool.dim * static_cast<int64_t>(sizeof(E)) - at);
#pragma unroll
    for (int k = 0; k < kRowsOfThread; ++k) {
      const bool inside = rows[k] != nullptr && bytes > 0;
      copy_piece(stage + copied_row(k) * kStride + piece, inside ? rows[k] + at : pool.rows, inside ? bytes : 0,
                 alignment_of_rows);
    }
  }

  // Rows of a tile: the kth that this thread copies, and the rth that this lane sums.
  __device__ static int copied_row(int k) { return threadIdx.x / (kChunk / 16) + k * (kThreads / (kChunk / 16)); }
  __device__ static int summed_row(int warp, int lane, int r) { return (warp * 2 * kRowBlocks + r) * 8 + lane / 4; }
};

}  // namespace hullkit
