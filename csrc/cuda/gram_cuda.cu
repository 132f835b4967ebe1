#include "cuda/gram.h"
#include "cuda/launch.cuh"
#include "cuda/tile.cuh"
#include "hullkit/frank_wolfe.h"

namespace hullkit {
namespace {

template <typename E>
using GramTile = Tile<E, 2, 2, 2, 4, 2>;  // 64 x 64 products

// One block for one tile on or below the diagonal of one entry. A tile's rows come from the cache after its first use:
// the tiles of an entry are neighbours in the launch.
template <typename E>
__global__ void __launch_bounds__(GramTile<E>::kThreads, 4)
    gram_kernel(const DevicePool<E> pool, int64_t first, int tiles, double* gram, int64_t stride) {
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
  const bool above = col_at > row_at || row_at >= n || col_at >= n;  // the diagonal, or outside
  const int row_blocks = above ? 0 : row_at + 16 >= n ? 1 : 2;
  T tile;
  tile.run(shared, sources, tile_row == tile_col, pool.dim, warp_row, warp_col, row_blocks);

  // Through shared memory, so that rows are written in one go, and so are their mirror images.
  constexpr int kStride = T::kCols + 1;
  static_assert(T::kRows * kStride * sizeof(double) <= T::kSharedBytes, "products reuse the stages' memory");
  double* const products = reinterpret_cast<double*>(shared);
  tile.for_each(warp_row, warp_col, [&](int i, int j, double sum) { products[i * kStride + j] = sum; });
  __syncthreads();
  const int row_begin = tile_row * T::kRows, col_begin = tile_col * T::kCols;
  const int rows = min(n - row_begin, T::kRows), cols = min(n - col_begin, T::kCols);
  double* const out = gram + entry * n * stride;
  const bool diagonal = tile_row == tile_col;
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < rows; i += T::kThreads / 32) {
    for (int j = lane; j < cols; j += 32) {
      const bool below = !diagonal || j <= i;
      out[(row_begin + i) * stride + col_begin + j] = products[below ? i * kStride + j : j * kStride + i];
    }
  }
  if (diagonal) return;
  for (int j = threadIdx.x / 32; j < cols; j += T::kThreads / 32) {
    for (int i = lane; i < rows; i += 32) {
      out[(col_begin + j) * stride + row_begin + i] = products[i * kStride + j];
    }
  }
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
           static_cast<int>(tiles), gram, gram_stride(device_pool.size));
  });
}

}  // namespace hullkit
