// SPDX-License-Identifier: Apache-2.0
// Inner products of one block of rows with another, on tensor cores: what every selection kernel stands on.
// float64 and float32 elements are multiplied and summed in float64 (a float32 product is exact there), halves in
// float32. The order of a sum depends on d alone, so a product has the same bits in any tile, either way round.
#pragma once

#include "cuda/primitives/device_pool.cuh"
#include "cuda/primitives/ptx.cuh"

namespace hullkit {

// How elements lie in memory (Unit), how a lane holds them (Fragment) and what products sum up to (Sum).
template <typename E>
struct Operand {  // float64, float32
  using Unit = E;
  using Fragment = double;
  using Sum = double;
  __device__ static void multiply_add(Sum (&sum)[4], const Fragment (&a)[4], const Fragment (&b)[2]) {
    ptx::multiply_add(sum, a, b);
  }
};
template <>
struct Operand<Float16> {
  using Unit = uint32_t;
  using Fragment = uint32_t;
  using Sum = float;
  __device__ static void multiply_add(Sum (&sum)[4], const Fragment (&a)[4], const Fragment (&b)[2]) {
    ptx::multiply_add_f16(sum, a, b);
  }
};
template <>
struct Operand<BFloat16> {
  using Unit = uint32_t;
  using Fragment = uint32_t;
  using Sum = float;
  __device__ static void multiply_add(Sum (&sum)[4], const Fragment (&a)[4], const Fragment (&b)[2]) {
    ptx::multiply_add_bf16(sum, a, b);
  }
};

// kWarps warps, each with kRowBlocks x kColBlocks blocks of 16 x 8 products of rows that all of them share; kStages
// chunks of the rows, of kChunk bytes each, are in shared memory or on their way there.
template <typename E, int kWarps, int kRowBlocks, int kColBlocks, int kStages, int kChunk>
struct Tile {
  using Op = Operand<E>;
  using Unit = typename Op::Unit;
  using Fragment = typename Op::Fragment;
  using Sum = typename Op::Sum;

  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 16 * kRowBlocks;  // of a warp
  static constexpr int kCols = 8 * kColBlocks;
  static constexpr int shared_bytes(int rows) { return kStages * rows * kChunk; }

  Sum sums[kRowBlocks][kColBlocks][4] = {};

  // Sums this warp's products: of kRows rows from `row` on with kCols from `col` on, among those that `sources`
  // [kCount] points to (nullptr: zeros; aligned: to 16 bytes). row_blocks: how many of its rows of blocks, 0, 1 or all.
  // All threads of the block call this; shared memory is free again when it returns.
  template <int kCount>
  __device__ void run(char* shared, const char* const* sources, bool aligned, int64_t dim, int row, int col,
                      int row_blocks) {
    const int64_t bytes = dim * static_cast<int64_t>(sizeof(E));
    const int64_t chunks = (bytes + kChunk - 1) / kChunk;
    constexpr int kStageBytes = kCount * kChunk;
    __shared__ ptx::Barrier full[kStages], empty[kStages];
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        full[stage].init(kThreads);
        empty[stage].init(aligned ? kWarps : kThreads);
      }
    }
    __syncthreads();
    // No barrier holds all warps in step: one may be two chunks behind another.
    constexpr int kAhead = kStages - 2;
    const auto load_chunk = [&](int64_t chunk) {
      if (chunk >= chunks) return;
      const int stage = static_cast<int>(chunk % kStages);
      const auto turn = static_cast<uint32_t>(chunk / kStages);
      if (turn > 0) empty[stage].wait((turn - 1) % 2);
      load<kCount>(shared + stage * kStageBytes, full[stage], sources, aligned, bytes, chunk);
    };
    for (int chunk = 0; chunk < kAhead; ++chunk) load_chunk(chunk);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      load_chunk(chunk + kAhead);
      const int stage = static_cast<int>(chunk % kStages);
      full[stage].wait(static_cast<uint32_t>(chunk / kStages) % 2);
      const char* const at = shared + stage * kStageBytes;
      if (row_blocks == kRowBlocks) {
        multiply<kRowBlocks>(at + row * kChunk, at + col * kChunk);
      } else if (row_blocks == 1) {
        multiply<1>(at + row * kChunk, at + col * kChunk);
      }
      // A lane may speak for its warp; where threads store rows themselves, compute-sanitizer needs to hear from each.
      __syncwarp();
      if (!aligned || threadIdx.x % 32 == 0) empty[stage].arrive();
    }
    __syncthreads();
  }

  // Calls visit(row, column, sum) for this lane's sums, counted from the warp's first row and column.
  template <typename Visit>
  __device__ void for_each(Visit&& visit) const {
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < kRowBlocks; ++i) {
      for (int j = 0; j < kColBlocks; ++j) {
        for (int e = 0; e < 4; ++e) {
          visit(i * 16 + lane / 4 + 8 * (e / 2), j * 8 + lane % 4 * 2 + e % 2, static_cast<double>(sums[i][j][e]));
        }
      }
    }
  }

 private:
  // Pieces of 16 bytes lie in a row in their order, or with the halves of the row exchanged in every other row: of what
  // eight lanes of a warp read at once, no two then share a bank.
  __device__ static int place(int row, int piece) { return row * kChunk + (piece ^ (row % 2 * 4)) * 16; }

  template <int kCount>
  __device__ static void load(char* stage, ptx::Barrier& full, const char* const* sources, bool aligned, int64_t bytes,
                              int64_t chunk) {
    constexpr int kPieces = kChunk / 16;
    constexpr int kRowsAtOnce = kThreads / kPieces;
    static_assert(kRowsAtOnce % 2 == 0, "a thread's rows are all even or all odd");
    const int first = threadIdx.x / kPieces, piece = threadIdx.x % kPieces;
    const int64_t at = chunk * kChunk + piece * 16;
    const int64_t left = bytes - at;
    char* const to = stage + place(first, piece);
    sources += first;
    if (aligned) {
      const int size = left < 0 ? 0 : left < 16 ? static_cast<int>(left) : 16;
#pragma unroll
      for (int row = 0; row < kCount; row += kRowsAtOnce) {
        if (kCount % kRowsAtOnce != 0 && first + row >= kCount) break;
        const char* const from = sources[row];
        ptx::copy_async_16(to + row * kChunk, from + at, from == nullptr ? 0 : size);
      }
      full.arrive_with_copies();
      return;
    }
#pragma unroll 1
    for (int row = 0; first + row < kCount; row += kRowsAtOnce) {
      const E* const from = reinterpret_cast<const E*>(sources[row]);
      for (int e = 0; e < static_cast<int>(16 / sizeof(E)); ++e) {
        const bool inside = from != nullptr && e * static_cast<int64_t>(sizeof(E)) < left;
        reinterpret_cast<E*>(to + row * kChunk)[e] = inside ? from[at / static_cast<int64_t>(sizeof(E)) + e] : E{};
      }
    }
    full.arrive();
  }

  // The units of one row that a lane reads at once.
  struct alignas(16) Piece {
    Unit units[16 / sizeof(Unit)];
  };
  struct alignas(2 * sizeof(Unit)) Two {
    Unit units[2];
  };

  // The units that a product takes from lane t of four are neighbours in memory, not four apart: any order of the
  // coordinates will do, so long as rows and columns have the same. Rows are read two units at a time, which takes the
  // banks twice but leaves registers for a second block of threads on the multiprocessor.
  template <int kBlocks>
  __device__ void multiply(const char* rows, const char* cols) {
    constexpr int kUnits = 16 / sizeof(Unit);
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < kChunk / 64; ++step) {
      const int at = place(lane / 4, step * 4 + lane % 4);
      Piece b[kColBlocks];
#pragma unroll
      for (int j = 0; j < kColBlocks; ++j) b[j] = *reinterpret_cast<const Piece*>(cols + at + j * 8 * kChunk);
#pragma unroll
      for (int u = 0; u < kUnits; u += 2) {
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
          const char* const from = rows + at + i * 16 * kChunk + u * sizeof(Unit);
          const Two upper = *reinterpret_cast<const Two*>(from),
                    lower = *reinterpret_cast<const Two*>(from + 8 * kChunk);
          const Fragment a_units[4] = {upper.units[0], lower.units[0], upper.units[1], lower.units[1]};
#pragma unroll
          for (int j = 0; j < kColBlocks; ++j) {
            const Fragment b_units[2] = {b[j].units[u], b[j].units[u + 1]};
            Op::multiply_add(sums[i][j], a_units, b_units);
          }
        }
      }
    }
  }
};

}  // namespace hullkit
