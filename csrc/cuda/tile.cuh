// Inner products of one block of rows with another, on tensor cores: what every selection kernel stands on.
// float64 and float32 elements are multiplied and summed in float64 (a float32 product is exact there), halves in
// float32. The order of a sum depends on d alone, so a product has the same bits in any tile, either way round.
#pragma once

#include "cuda/device_pool.cuh"
#include "cuda/ptx.cuh"

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

// kWarpRows x kWarpCols warps, each with kRowBlocks x kColBlocks blocks of 16 x 8 products; kStages chunks of the rows
// are in shared memory or on their way there.
template <typename E, int kWarpRows, int kWarpCols, int kRowBlocks, int kColBlocks, int kStages>
struct Tile {
  using Op = Operand<E>;
  using Unit = typename Op::Unit;
  using Fragment = typename Op::Fragment;
  using Sum = typename Op::Sum;

  static constexpr int kThreads = 32 * kWarpRows * kWarpCols;
  static constexpr int kRows = 16 * kRowBlocks * kWarpRows;
  static constexpr int kCols = 8 * kColBlocks * kWarpCols;
  static constexpr int kChunk = 128;                         // bytes of every row in one stage
  static constexpr int kStride = kChunk + 4 * sizeof(Unit);  // padded: the lanes of a fragment hit all banks
  static constexpr int kStageBytes = (kRows + kCols) * kStride;
  static constexpr int kSharedBytes = kStages * kStageBytes;

  Sum sums[kRowBlocks][kColBlocks][4] = {};

  // Sums products of the rows `sources` [kRows + kCols] points to (nullptr: zeros), first with last ones; `same`: with
  // themselves. warp_row and warp_col: this warp's place; row_blocks: how many of its rows of blocks to sum, 0, 1 or
  // all. All threads of the block call this; shared memory is free again when it returns.
  __device__ void run(char* shared, const E* const* sources, bool same, int64_t dim, int warp_row, int warp_col,
                      int row_blocks) {
    const int64_t bytes = dim * static_cast<int64_t>(sizeof(E));
    const int64_t chunks = (bytes + kChunk - 1) / kChunk;
    const int rows = same ? kRows : kRows + kCols;
    for (int stage = 0; stage < kStages - 1; ++stage) {
      if (stage < chunks) load(shared + stage * kStageBytes, sources, rows, bytes, stage);
      ptx::commit_copies();
    }
    const int row_at = warp_row * kRowBlocks * 16 * kStride;
    const int col_at = ((same ? 0 : kRows) + warp_col * kColBlocks * 8) * kStride;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      ptx::wait_copies<kStages - 2>();
      __syncthreads();
      const int64_t next = chunk + kStages - 1;
      if (next < chunks) load(shared + next % kStages * kStageBytes, sources, rows, bytes, next);
      ptx::commit_copies();
      const char* const stage = shared + chunk % kStages * kStageBytes;
      if (row_blocks == kRowBlocks) {
        multiply<kRowBlocks>(stage + row_at, stage + col_at);
      } else if (row_blocks == 1) {
        multiply<1>(stage + row_at, stage + col_at);
      }
    }
    ptx::wait_copies<0>();
    __syncthreads();
  }

  // Calls visit(row, column, sum) for this lane's sums, rows and columns counted from those of the tile.
  template <typename Visit>
  __device__ void for_each(int warp_row, int warp_col, Visit&& visit) const {
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < kRowBlocks; ++i) {
      for (int j = 0; j < kColBlocks; ++j) {
        for (int e = 0; e < 4; ++e) {
          const int row = (warp_row * kRowBlocks + i) * 16 + lane / 4 + 8 * (e / 2);
          const int col = (warp_col * kColBlocks + j) * 8 + lane % 4 * 2 + e % 2;
          visit(row, col, static_cast<double>(sums[i][j][e]));
        }
      }
    }
  }

 private:
  __device__ static void load(char* stage, const E* const* sources, int rows, int64_t bytes, int64_t chunk) {
    constexpr int kPieces = kChunk / 16;
    for (int t = threadIdx.x; t < rows * kPieces; t += kThreads) {
      const int row = t / kPieces, piece = t % kPieces;
      char* const to = stage + row * kStride + piece * 16;
      const int64_t at = chunk * kChunk + piece * 16;
      const char* const from = reinterpret_cast<const char*>(sources[row]);
      const int64_t left = from == nullptr ? 0 : bytes - at;
      if (left <= 0) {
        *reinterpret_cast<uint4*>(to) = uint4{0, 0, 0, 0};
      } else if (reinterpret_cast<uintptr_t>(from) % 16 == 0) {
        ptx::copy_async_16(to, from + at, left < 16 ? static_cast<int>(left) : 16);
      } else {
        for (int e = 0; e < static_cast<int>(16 / sizeof(E)); ++e) {
          const bool inside = e * static_cast<int64_t>(sizeof(E)) < left;
          reinterpret_cast<E*>(to)[e] = inside ? reinterpret_cast<const E*>(from + at)[e] : E{};
        }
      }
    }
  }

  template <int kBlocks>
  __device__ void multiply(const char* rows, const char* cols) {
    multiply_chunk<E, E, kBlocks, kChunk / static_cast<int>(sizeof(Unit)), kStride, kStride>(rows, cols, sums);
  }
};

}  // namespace hullkit
