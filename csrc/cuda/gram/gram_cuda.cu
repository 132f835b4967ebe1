// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "cuda/gram/gram.h"
#include "cuda/primitives/launch.cuh"
#include "cuda/primitives/tile.cuh"
#include "hullkit/frank_wolfe.h"

namespace hullkit {
namespace {

constexpr int kWarps = 8;
// 32 x 32 products a warp, and as many stages as leave room for two blocks on a multiprocessor.
template <typename E, int kOwn>
using GramTile = Tile<E, kWarps, 2, 4, kOwn == 0 ? 4 : 3, 128>;

// The matrix in blocks of 32 x 32, of which one of each pair that mirror each other is computed: for each of R rows of
// blocks the one on the diagonal and the R / 2 to the right of it, round the edge and on from the left. So every row of
// blocks has as many, and a block of threads takes kOffsets of them from each of two neighbours: what these need is
// mostly the same.
constexpr int kBlock = 32;
constexpr int kOffsets = kWarps / 2;
constexpr int kSharedBlocks = 1 + kOffsets;  // rows of blocks that the columns come from

struct GramPlan {
  explicit GramPlan(int64_t n)  // products
      : rows(static_cast<int>((n + kBlock - 1) / kBlock)),
        groups((rows / 2 + kOffsets) / kOffsets),
        tiles((rows + 1) / 2 * groups) {}
  int rows;    // of blocks
  int groups;  // of offsets
  int tiles;   // of an entry
};

// kOwn: rows of blocks beside those of the columns, 0 if all offsets are in one group (the rows are the first columns).
template <typename E, int kOwn>
__global__ void __launch_bounds__(GramTile<E, kOwn>::kThreads, 2)
    gram_kernel(const DevicePool pool, const GramPlan plan, int64_t first, double* gram, int64_t stride) {
  using T = GramTile<E, kOwn>;
  static_assert(T::kRows == kBlock && T::kCols == kBlock, "blocks are mirrored");
  extern __shared__ __align__(16) char shared[];
  constexpr int kCount = (kOwn + kSharedBlocks) * kBlock;
  __shared__ const char* sources[kCount];

  const int64_t entry = blockIdx.x / plan.tiles;
  const int tile_at = static_cast<int>(blockIdx.x % plan.tiles);
  const int row_begin = tile_at / plan.groups * 2, offset_begin = tile_at % plan.groups * kOffsets;
  const int64_t b = first + entry;
  const int candidates = static_cast<int>(pool.size), n = candidates + static_cast<int>(pool.vectors);

  for (int t = threadIdx.x; t < kCount; t += T::kThreads) {
    const int block = t / kBlock < kOwn ? row_begin + t / kBlock : row_begin + offset_begin + t / kBlock - kOwn;
    const int i = block % plan.rows * kBlock + t % kBlock;
    const int64_t row = i < candidates ? pool.row_of_point(b, i) : DevicePool::kNone;
    const bool query = i >= candidates && i < n;
    sources[t] = query ? pool.query_at(b, i - candidates) : row >= 0 ? pool.row_at(b, row) : nullptr;
  }
  __syncthreads();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int down = warp / kOffsets, offset = offset_begin + warp % kOffsets;
  int row = row_begin + down, col = (row + offset) % plan.rows;  // of blocks
  int row_at = down * kBlock, col_at = (kOwn + down + warp % kOffsets) * kBlock;
  // With R even, who is R / 2 apart meets twice.
  const bool mine = row < plan.rows && (2 * offset < plan.rows || (2 * offset == plan.rows && row < col));
  if (col == plan.rows - 1) {  // the last, which may be half empty, is better a row than a column
    const int other = row, other_at = row_at;
    row = col;
    row_at = col_at;
    col = other;
    col_at = other_at;
  }
  const int rows = min(n - row * kBlock, kBlock), cols = min(n - col * kBlock, kBlock);
  T tile;
  tile.template run<kCount>(shared, sources, pool.aligned, pool.dim, row_at, col_at, !mine ? 0 : rows <= 16 ? 1 : 2);
  if (!mine) return;

  // Through shared memory, so that rows are written in one go, and so are their mirror images.
  constexpr int kStride = kBlock + 1;
  double* const products = reinterpret_cast<double*>(shared) + warp * kBlock * kStride;
  tile.for_each([&](int i, int j, double sum) { products[i * kStride + j] = sum; });
  __syncwarp();
  double* const out = gram + entry * n * stride;
  if (lane < cols) {
    for (int i = 0; i < rows; ++i)
      out[(row * kBlock + i) * stride + col * kBlock + lane] = products[i * kStride + lane];
  }
  if (row == col || lane >= rows) return;
  for (int j = 0; j < cols; ++j) out[(col * kBlock + j) * stride + row * kBlock + lane] = products[lane * kStride + j];
}

}  // namespace

void gram_cuda(const PoolSpec& pool, const TensorView& query, const TensorView& support, int64_t first, int64_t count,
               double* gram, void* stream) {
  const int64_t vectors = query.rank == 3 ? query.shape[1] : 1;
  const GramPlan plan((support.defined() ? support.shape[1] : pool.positions()) + vectors);
  const DevicePool device_pool(pool, query, support);
  with_element(pool.rows.dtype, [&](auto element) {
    using E = decltype(element);
    const auto run = [&](auto kernel, int threads, int stages) {
      constexpr int kProductBytes = kWarps * kBlock * (kBlock + 1) * static_cast<int>(sizeof(double));
      launch(kernel, plan.tiles * count, threads, std::max(stages, kProductBytes), stream, device_pool, plan, first,
             gram, gram_stride(device_pool.size + device_pool.vectors - 1));
    };
    if (plan.groups == 1) {
      using T = GramTile<E, 0>;
      run(gram_kernel<E, 0>, T::kThreads, T::shared_bytes(kSharedBlocks * kBlock));
    } else {
      using T = GramTile<E, 2>;
      run(gram_kernel<E, 2>, T::kThreads, T::shared_bytes((2 + kSharedBlocks) * kBlock));
    }
  });
}

}  // namespace hullkit
