// SPDX-License-Identifier: Apache-2.0
// A block computes tiles of 128 x 128 of the product, one after the other. Its first warps multiply; the others update
// the parameters of the tile before meanwhile, so that neither tensor cores nor memory wait for the other. A gradient
// passes from these to those through shared memory.
#include <stdexcept>

#include "cuda/primitives/launch.cuh"
#include "cuda/primitives/ptx.cuh"
#include "hullkit/adam_product.h"
#include "optim/adam_pieces.cuh"

namespace hullkit {
namespace {

constexpr int kTile = kProductTile;
constexpr int kDepth = 32;                          // tokens of a stage
constexpr int kStages = 4;                          // on their way from memory, or multiplied
constexpr int kBuffers = 2;                         // of gradients
constexpr int kAhead = 2;                           // pieces of parameters that a thread has on their way
constexpr int kMultiplying = 256, kUpdating = 256;  // threads
constexpr int kVector = 8;                          // halves of 16 bytes
constexpr int kVectors = kTile / kVector;           // of a row of a tile
constexpr int kPitch = kTile + kVector;             // halves from row to row of a gradient: no two banks meet
constexpr int kWarpRows = 64, kWarpColumns = 32;    // of a tile, for each multiplying warp
constexpr int kWarpsDown = kTile / kWarpRows;

struct alignas(16) Shared {
  uint4 a[kStages][kDepth * kVectors], b[kStages][kDepth * kVectors];
  uint16_t gradients[kBuffers][kTile * kPitch];
  ptx::Barrier full[kBuffers], empty[kBuffers];
};

// Where a vector of a stage lies, so that eight rows of a matrix instruction lie in different banks.
__device__ inline int swizzled(int token, int vector) { return token * kVectors + (vector ^ (token % 8)); }

__device__ inline void multiplying_threads_meet() { asm volatile("bar.sync 1, %0;" ::"n"(kMultiplying) : "memory"); }

// The tiles of a block, of a matrix [rows, columns].
struct Tiles {
  int first, count, stride, across;
  int64_t rows, columns;

  __device__ int64_t row_of(int tile) const { return int64_t{(first + tile * stride) / across} * kTile; }
  __device__ int64_t column_of(int tile) const { return int64_t{(first + tile * stride) % across} * kTile; }
};

// What one multiplying thread copies next: two vectors of each factor, half a stage apart.
struct Ahead {
  const uint16_t *a, *b;
  bool in_a, in_b;  // the matrix
  int tile, token;  // of the first vector
};

__device__ inline void begin_tile(Ahead& ahead, const ProductFactors& factors, const Tiles& tiles) {
  const int column = static_cast<int>(threadIdx.x) % kVectors * kVector;
  const int64_t of_a = tiles.row_of(ahead.tile) + column, of_b = tiles.column_of(ahead.tile) + column;
  ahead.token = static_cast<int>(threadIdx.x) / kVectors;
  ahead.in_a = of_a < tiles.rows;
  ahead.in_b = of_b < tiles.columns;
  ahead.a = reinterpret_cast<const uint16_t*>(factors.a) + (ahead.token * factors.a_stride + of_a);
  ahead.b = reinterpret_cast<const uint16_t*>(factors.b) + (ahead.token * factors.b_stride + of_b);
}

// Copies the tokens of one stage; zeros beyond the last token and beyond the matrix, where nothing is read.
__device__ inline void fetch_stage(Shared& shared, int stage, int at, Ahead& ahead, int tokens, int64_t a_half,
                                   int64_t b_half) {
  constexpr int kHalf = kDepth / 2 * kVectors;
  const bool first = ahead.token < tokens, second = ahead.token + kDepth / 2 < tokens;
  ptx::copy_async_16(&shared.a[stage][at], ahead.a, first && ahead.in_a ? 16 : 0);
  ptx::copy_async_16(&shared.b[stage][at], ahead.b, first && ahead.in_b ? 16 : 0);
  ahead.a += a_half, ahead.b += b_half;
  ptx::copy_async_16(&shared.a[stage][at + kHalf], ahead.a, second && ahead.in_a ? 16 : 0);
  ptx::copy_async_16(&shared.b[stage][at + kHalf], ahead.b, second && ahead.in_b ? 16 : 0);
  ahead.a += a_half, ahead.b += b_half;
  ahead.token += kDepth;
}

__device__ inline void multiply_stage(float (&sums)[4][4][4], const uint4* a, const uint4* b, int lane, int down,
                                      int across) {
  const int matrix = lane / 8, within = lane % 8;
#pragma unroll
  for (int depth = 0; depth < kDepth; depth += 16) {
    uint32_t left[4][4], right[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // 16 rows each; matrices 1 and 3 have the lower eight, 2 and 3 the later tokens
      const int token = depth + matrix / 2 * 8 + within;
      ptx::load_transposed(left[i], a + swizzled(token, (down * kWarpRows + i * 16) / kVector + matrix % 2));
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {  // 16 columns each; matrices 1 and 3 have the later tokens
      const int token = depth + matrix % 2 * 8 + within;
      ptx::load_transposed(right[j], b + swizzled(token, (across * kWarpColumns + j * 16) / kVector + matrix / 2));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t(&pair)[2] = reinterpret_cast<const uint32_t(&)[2]>(right[j / 2][j % 2 * 2]);
        ptx::multiply_add_bf16(sums[i][j], left[i], pair);
      }
    }
  }
}

__device__ void multiply(Shared& shared, const ProductFactors& factors, const Tiles& tiles) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int down = warp % kWarpsDown, across = warp / kWarpsDown;
  static_assert(kMultiplying == kDepth / 2 * kVectors);
  const int tokens = static_cast<int>(factors.tokens), blocks = (tokens + kDepth - 1) / kDepth;
  const int at = swizzled(static_cast<int>(threadIdx.x) / kVectors, static_cast<int>(threadIdx.x) % kVectors);
  const int64_t a_half = kDepth / 2 * factors.a_stride, b_half = kDepth / 2 * factors.b_stride;
  Ahead ahead = {};
  begin_tile(ahead, factors, tiles);
  int left = blocks;  // to copy of the tile ahead
  const auto fetch = [&](int stage) {
    if (ahead.tile < tiles.count) {
      fetch_stage(shared, stage, at, ahead, tokens, a_half, b_half);
      if (--left == 0) {
        left = blocks;
        if (++ahead.tile < tiles.count) begin_tile(ahead, factors, tiles);
      }
    }
    ptx::commit_copies();
  };
  for (int stage = 0; stage < kStages - 1; ++stage) fetch(stage);
  int stage = 0;
  for (int tile = 0; tile < tiles.count; ++tile) {
    float sums[4][4][4] = {};
    for (int block = 0; block < blocks; ++block) {
      ptx::wait_copies<kStages - 2>();
      multiplying_threads_meet();  // copies of all threads are there, and the stage before is free
      fetch((stage + kStages - 1) % kStages);
      multiply_stage(sums, shared.a[stage], shared.b[stage], lane, down, across);
      stage = (stage + 1) % kStages;
    }
    const int buffer = tile % kBuffers, use = tile / kBuffers;
    if (use > 0) shared.empty[buffer].wait((use - 1) % 2);
    uint16_t* const gradient = shared.gradients[buffer];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int row = down * kWarpRows + i * 16 + lane / 4;
        const int column = across * kWarpColumns + j * 8 + lane % 4 * 2;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint16_t* const at = gradient + (row + half * 8) * kPitch + column;
          *reinterpret_cast<uint32_t*>(at) = ptx::to_bf16_pair(sums[i][j][2 * half], sums[i][j][2 * half + 1]);
        }
      }
    }
    shared.full[buffer].arrive();
  }
}

struct Addresses {
  char *param, *exp_avg, *exp_avg_sq, *copy;
};

template <Kind kKind, bool kStochastic>
__device__ void update(Shared& shared, const Tiles& tiles, const Addresses& addresses, const AdamSteps& steps,
                       uint32_t key, int64_t* broken) {
  constexpr Kind kMoments = kKind == Kind::kFloat32 ? Kind::kFloat32 : Kind::kBfloat16;
  constexpr int kN = kKind == Kind::kFloat32 ? 4 : 8;  // elements of 16 bytes
  constexpr int kAcross = kTile / kN;                  // pieces of a row
  constexpr int kDown = kUpdating / kAcross;           // rows that all threads take at a time
  constexpr int kPieces = kTile / kDown;               // of a tile, for each thread
  constexpr int kSize = 16 / kN;                       // bytes of an element
  const int thread = static_cast<int>(threadIdx.x) - kMultiplying;
  const int within_row = thread / kAcross, within_column = thread % kAcross * kN;
  const int64_t step = kDown * tiles.columns;  // elements from piece to piece
  // This thread's first element in a tile, and how many of its pieces there lie in the matrix.
  const auto begin = [&](int tile, int64_t& element_at) {
    const int64_t row = tiles.row_of(tile) + within_row, column = tiles.column_of(tile) + within_column;
    element_at = row * tiles.columns + column;
    if (column >= tiles.columns || row >= tiles.rows) return 0;
    const int64_t left = (tiles.rows - row + kDown - 1) / kDown;
    return left < kPieces ? static_cast<int>(left) : kPieces;
  };
  int ahead_tile = 0, ahead = 0;
  int64_t ahead_at = 0;
  int ahead_inside = begin(0, ahead_at);
  const auto fetch = [&](Piece& piece) {
    if (ahead < ahead_inside) {
      const int64_t at = ahead_at * kSize;
      piece.param = __ldcg(reinterpret_cast<const uint4*>(addresses.param + at));
      piece.exp_avg = __ldcg(reinterpret_cast<const uint4*>(addresses.exp_avg + at));
      piece.exp_avg_sq = __ldcg(reinterpret_cast<const uint4*>(addresses.exp_avg_sq + at));
    }
    ahead_at += step;
    if (++ahead == kPieces) {
      ahead = 0;
      ahead_inside = ++ahead_tile < tiles.count ? begin(ahead_tile, ahead_at) : 0;
    }
  };
  bool lost = false;
  const auto move = [&](const Piece& piece, const uint16_t* gradient, int64_t element_at) {
    uint16_t grads[kN];
    if constexpr (kN == 8) {
      *reinterpret_cast<uint4*>(grads) = *reinterpret_cast<const uint4*>(gradient);
    } else {
      *reinterpret_cast<uint2*>(grads) = *reinterpret_cast<const uint2*>(gradient);
    }
    Moving<kN> x;
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      x.param[i] = element<kKind>(piece.param, i);
      x.exp_avg[i] = element<kMoments>(piece.exp_avg, i);
      x.exp_avg_sq[i] = element<kMoments>(piece.exp_avg_sq, i);
      x.grad[i] = from_bf16(grads[i]);
      lost |= !(fabsf(x.grad[i]) < __int_as_float(0x7f800000));
    }
    if constexpr (kKind == Kind::kFloat32) {
      move_floats(x, steps);
    } else {
      move_halves(x, steps);
    }
    const int64_t at = element_at * kSize;
    const Rounded<kKind, kStochastic> rounded(x, element_at, key);
    *reinterpret_cast<uint4*>(addresses.param + at) = rounded.param;
    *reinterpret_cast<uint4*>(addresses.exp_avg + at) = rounded.exp_avg;
    *reinterpret_cast<uint4*>(addresses.exp_avg_sq + at) = rounded.exp_avg_sq;
    if constexpr (kKind != Kind::kBfloat16) {
      uint32_t words[kN / 2];
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) {  // of the parameter as it was rounded
        words[i] = ptx::to_bf16_pair(element<kKind>(rounded.param, 2 * i), element<kKind>(rounded.param, 2 * i + 1));
      }
      char* const copy = addresses.copy + element_at * 2;
      if constexpr (kN == 8) {
        *reinterpret_cast<uint4*>(copy) = make_uint4(words[0], words[1], words[2], words[3]);
      } else {
        *reinterpret_cast<uint2*>(copy) = make_uint2(words[0], words[1]);
      }
    }
  };
  Piece pieces[kAhead] = {};
#pragma unroll
  for (Piece& piece : pieces) fetch(piece);
  for (int tile = 0; tile < tiles.count; ++tile) {
    int64_t element_at = 0;
    const int inside = begin(tile, element_at);
    const int buffer = tile % kBuffers;
    shared.full[buffer].wait(tile / kBuffers % 2);
    const uint16_t* gradient = shared.gradients[buffer] + within_row * kPitch + within_column;
#pragma unroll 1
    for (int i = 0; i < kPieces; i += kAhead) {
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const Piece piece = pieces[j];
        fetch(pieces[j]);
        if (i + j < inside) move(piece, gradient, element_at);
        gradient += kDown * kPitch;
        element_at += step;
      }
    }
    shared.empty[buffer].arrive();
  }
  if (lost) *broken = 1;
}

template <Kind kKind, bool kStochastic>
__global__ void __launch_bounds__(kMultiplying + kUpdating, 1) adam_product_kernel(const AdamProducts products) {
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const ProductChunk chunk = products.chunks[blockIdx.x];
  const TensorRow& row = products.rows[chunk.row];
  const ProductFactors factors = products.factors[chunk.row];
  const int across = static_cast<int>((factors.columns + kTile - 1) / kTile);
  const Tiles tiles = {chunk.first, chunk.count, chunk.stride, across, row.numel / factors.columns, factors.columns};
  if (threadIdx.x == 0) {
    for (int i = 0; i < kBuffers; ++i) {
      shared.full[i].init(kMultiplying);
      shared.empty[i].init(kUpdating);
    }
  }
  __syncthreads();
  if (threadIdx.x < kMultiplying) {
    multiply(shared, factors, tiles);
    return;
  }
  const AdamOptions& options = products.record->options;
  const float2* const all = reinterpret_cast<const float2*>(products.coefficients) + chunk.row * products.capacity;
  const int64_t limit = products.record->control.limit;
  const int num_steps = static_cast<int>(limit < products.capacity ? limit : products.capacity);
  const float2 first = all[0];
  const AdamSteps steps = {static_cast<float>(options.beta1),
                           static_cast<float>(1.0 - options.beta1),
                           static_cast<float>(options.beta2),
                           static_cast<float>(1.0 - options.beta2),
                           num_steps,
                           first,
                           products.capacity > 1 ? all[1] : first,
                           all,
                           first.y > 1e-18f};
  const Addresses addresses = {
      reinterpret_cast<char*>(row.param), reinterpret_cast<char*>(row.state1), reinterpret_cast<char*>(row.state2),
      kKind == Kind::kBfloat16 ? nullptr : reinterpret_cast<char*>(products.copies[chunk.row])};
  RecordControl& control = products.record->control;
  const float step = kStochastic ? *reinterpret_cast<const float*>(row.step) : 0.0f;
  const uint32_t key = kStochastic ? noise_key(control.seed, static_cast<uint32_t>(row.flags >> 1), step) : 0;
  update<kKind, kStochastic>(shared, tiles, addresses, steps, key, &control.broken);
}

template <Kind kKind>
void start(const AdamProducts& products, void* stream) {
  const bool stochastic = kKind != Kind::kFloat32 && products.stochastic_rounding;
  const auto kernel =
      stochastic ? adam_product_kernel<kKind, kKind != Kind::kFloat32> : adam_product_kernel<kKind, false>;
  launch(kernel, products.programs, kMultiplying + kUpdating, sizeof(Shared), stream, products);
}

}  // namespace

bool adam_product_usable() { return runs_here(adam_product_kernel<Kind::kFloat32, false>, sizeof(Shared)); }

void adam_product_cuda(const AdamProducts& products, void* stream) {
  switch (products.param_dtype) {
    case DType::kBFloat16:
      return start<Kind::kBfloat16>(products, stream);
    case DType::kFloat16:
      return start<Kind::kFloat16>(products, stream);
    case DType::kFloat32:
      return start<Kind::kFloat32>(products, stream);
    default:
      throw std::invalid_argument("adam_product: expected float32 parameters or halves");
  }
}

}  // namespace hullkit
