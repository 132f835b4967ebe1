#include "cuda/gram.h"
#include "cuda/launch.cuh"
#include "cuda/tile.cuh"
#include "hullkit/frank_wolfe.h"

namespace hullkit {
namespace {

template <typename E>
using GramTile = Tile<E, 2, 2, 2, 4>;  // 64 x 64 products

// One block for one tile on or below the diagonal of one entry. A tile's rows come from the cache after its first use:
// the tiles of an entry are neighbours in the launch.
template <typename E>
__global__ void __launch_bounds__(GramTile<E>::kThreads)
    gram_kernel(const DevicePool<E> pool, int64_t first, int tiles, double* gram) {
  using T = GramTile<E>;
  static_assert(T::kRows == T::kCols, "tiles are mirrored");
  extern __shared__ __align__(16) char shared[];
  __shared__ const E* sources[T::kRows + T::kCols];

  const int64_t entry = blockIdx.x / tiles;
  int tile_col = blockIdx.x % tiles, tile_row = 0;  // row by row: 0, 1 2, 3 4 5
  while (tile_col > tile_row) tile_col -= ++tile_row;
  const int64_t b = first + entry;
  const int n = static_cast<int>(pool.size) + 1;

  for (int t = threadIdx.x; t < T::kRows + T::kCols; t += T::kThreads) {
    const int i = t < T::kRows ? tile_row * T::kRows + t : tile_col * T::kCols + t - T::kRows;
    const int64_t row = i < n - 1 ? pool.row(b, i) : DevicePool<E>::kNone;
    sources[t] = i == n - 1 ? pool.query_at(b) : row >= 0 ? pool.row_at(b, row) : nullptr;
  }
  __syncthreads();

  // Which warp does what turns from tile to tile: the idle ones, above a diagonal or below the last row, would
  // otherwise all wait on the same scheduler.
  const int warp = (threadIdx.x / 32 + blockIdx.x) % 4;
  const int warp_row = warp / 2, warp_col = warp % 2;
  const int row_at = tile_row * T::kRows + warp_row * 32, col_at = tile_col * T::kCols + warp_col * 32;
  uint32_t wanted = 0;
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 4; ++j) {
      const int row = row_at + i * 16, col = col_at + j * 8;
      if (row < n && col < n && col <= row + 15) wanted |= 1u << (i * 4 + j);
    }
  }
  T tile;
  tile.run(shared, sources, tile_row == tile_col, pool.dim, warp_row, warp_col, wanted);

  double* const out = gram + entry * n * n;
  tile.for_each(warp_row, warp_col, [&](int tile_i, int tile_j, double sum) {
    const int64_t i = tile_row * T::kRows + tile_i, j = tile_col * T::kCols + tile_j;
    if (i >= n || j > i) return;
    out[i * n + j] = sum;
    out[j * n + i] = sum;
  });
}

}  // namespace

int64_t gram_workspace_bytes(int64_t batch, int64_t positions) {
  return gram_batch(batch, positions) * gram_bytes_of_one(positions);
}

void gram_cuda(const PoolSpec& pool, const TensorView& query, const TensorView& support, int64_t first, int64_t count,
               double* gram, void* stream) {
  with_element(pool.rows.dtype, [&](auto element) {
    using E = decltype(element);
    using T = GramTile<E>;
    const DevicePool<E> device_pool(pool, query, support);
    const int64_t rows = (device_pool.size + T::kRows) / T::kRows;  // of tiles; one more for the query
    const int64_t tiles = rows * (rows + 1) / 2;
    launch(gram_kernel<E>, tiles * count, T::kThreads, T::kSharedBytes, stream, device_pool, first,
           static_cast<int>(tiles), gram);
  });
}

}  // namespace hullkit
