// SPDX-License-Identifier: Apache-2.0
// A block computes tiles of kTileColumns columns by kRows rows of one slot's result, one after the other. One thread
// copies both sides of a product to shared memory, a stage of 64 of the sum's elements at a time, as far ahead as there
// is room; two groups of four warps multiply, each half of the tile's columns. The columns take the part of the matrix
// instruction's rows: a slot's rows are met with little waste by several widths. Each tile of a last round that leaves
// half of the blocks idle is split in two. The small tiles of factors' gradients (factor_gradients.cuh) come last.
#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <string>

#include "cuda/primitives/hopper.cuh"
#include "cuda/primitives/launch.cuh"
#include "hullkit/product_sums.h"
#include "products/factor_gradients.cuh"
#include "products/product_boxes.cuh"
#include "products/product_memory.cuh"
#include "products/product_tiles.cuh"

namespace hullkit {
namespace {

// kHeight: rows of this tile, all of kRows or those of one box.
template <int kRows, bool kTransposed, int kHeight>
__device__ void copy(const Problem& problem, const Tile& tile, Stages<kRows>& stages) {
  using Sizes = Memory<kRows>;
  constexpr int kBoxes = kHeight / Sizes::kBoxRows;
  const auto load_factor = [&](unsigned char* to, const CUtensorMap& boxes, ptx::Barrier& arrived, int k, int slot,
                               int bytes) {
    for (int group = 0; group < tile.groups; ++group) {
      const int column = tile.column + group * kGroupColumns;
      ptx::load_box(to + group * bytes, boxes, arrived, kTransposed ? column : k, kTransposed ? k : column, slot);
    }
  };
  const auto load_rows = [&](unsigned char* to, const CUtensorMap& boxes, ptx::Barrier& arrived, int k, int bytes) {
    for (int box = 0; box < kBoxes; ++box) {
      ptx::load_box(to + box * bytes, boxes, arrived, k, tile.row + box * Sizes::kBoxRows, tile.slot);
    }
  };
  for (int i = 0; i < problem.num_terms; ++i) {
    const int term = tile.result * problem.num_terms + i;
    const int slot = problem.terms[term].of_slot ? tile.slot : 0, depth = problem.terms[term].steps * kStep;
    const Side &factor = problem.factors[term], &rows = problem.rows[term];
    for (int k = 0; k < depth; k += kDepth) {
      stages.wait_empty();
      ptx::Barrier& arrived = stages.full[stages.stage];
      unsigned char* const to = stages.now();
      if (depth - k >= kDepth) {
        arrived.arrive_expecting(tile.groups * Sizes::kGroupFactor + kHeight * kBoxRow);
        load_factor(to, factor.boxes, arrived, k, slot, Sizes::kGroupFactor);
        load_rows(to + Sizes::kFactor, rows.boxes, arrived, k, Sizes::kBoxRows * kBoxRow);
      } else {
        const int steps = (depth - k) / kStep;
        arrived.arrive_expecting(steps * (tile.groups * Sizes::kThinGroupFactor + kHeight * kThinRow));
        for (int step = 0; step < steps; ++step) {
          const int at = k + step * kStep;
          if constexpr (kTransposed) {
            load_factor(to + step * (kStep * kBoxRow), factor.thin_boxes, arrived, at, slot, Sizes::kGroupFactor);
          } else {
            load_factor(to + step * Sizes::kThinFactor, factor.thin_boxes, arrived, at, slot, Sizes::kThinGroupFactor);
          }
          load_rows(to + Sizes::kFactor + step * Sizes::kThinRows, rows.thin_boxes, arrived, at,
                    Sizes::kBoxRows * kThinRow);
        }
      }
      stages.advance();
    }
  }
}

__device__ inline float bias_at(const Result& result, int column) {
  if (result.bias == nullptr || column >= result.columns) return 0.0f;
  return __uint_as_float(uint32_t{result.bias[column]} << 16);
}

// A group's sums as [kHeight, kGroupColumns] in shared memory, swizzled as the copy of a box expects it.
template <int kHeight>
__device__ void put(const float (&sums)[kHeight / 2], uint32_t to, const Result& result, int column) {
  const int warp = threadIdx.x % kGroup / 32, lane = threadIdx.x % 32;
  const float low = bias_at(result, column + warp * 16 + lane / 4);
  const float high = bias_at(result, column + warp * 16 + 8 + lane / 4);
  const int within = lane % 8, vector = (warp * 2 + lane / 8 % 2) ^ within;  // of eight columns
  const auto pair = [&](int at, float bias) { return ptx::to_bf16_pair(sums[at] + bias, sums[at + 1] + bias); };
#pragma unroll
  for (int j = 0; j + 1 < kHeight / 8; j += 2) {
    const int row = (j + lane / 16) * 8 + within;
    ptx::store_transposed(to + row * kBoxRow + vector * 16, pair(4 * j, low), pair(4 * j + 2, high),
                          pair(4 * j + 4, low), pair(4 * j + 6, high));
  }
  if constexpr (kHeight / 8 % 2 == 1) {
    constexpr int kLast = kHeight / 8 - 1;
    ptx::store_transposed(to + (8 * kLast + within) * kBoxRow + vector * 16, pair(4 * kLast, low),
                          pair(4 * kLast + 2, high));
  }
}

// A group's half of a tile. A group whose columns lie outside of the result gives its stages back.
template <int kRows, bool kTransposed, int kHeight>
__device__ void multiply(const Problem& problem, const Tile& tile, int group, Stages<kRows>& stages,
                         unsigned char* result) {
  using Sizes = Memory<kRows>;
  // From step to step of a factor, in units of 16 bytes.
  constexpr int kNext = (kTransposed ? kStep * kBoxRow : kStep * 2) >> 4;
  constexpr int kNextThin = (kTransposed ? kStep * kBoxRow : Sizes::kThinFactor) >> 4;
  const int thread = threadIdx.x % kGroup;
  const uint32_t base = ptx::shared_address(stages.memory);
  const uint64_t factor = ptx::product_operand<kBoxRow>(base + group * Sizes::kGroupFactor);
  const uint64_t row = ptx::product_operand<kBoxRow>(base + Sizes::kFactor);
  const uint64_t thin_factor =
      kTransposed ? factor : ptx::product_operand<kThinRow>(base + group * Sizes::kThinGroupFactor);
  const uint64_t thin_row = ptx::product_operand<kThinRow>(base + Sizes::kFactor);
  const auto meet = [&]() { asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(kGroup) : "memory"); };
  if (group >= tile.groups) {
    for (int i = 0; i < problem.num_terms; ++i) {
      stages.pass((problem.terms[tile.result * problem.num_terms + i].steps * kStep + kDepth - 1) / kDepth);
    }
    return;
  }
  float sums[kHeight / 2];
  int add = 0;
  for (int i = 0; i < problem.num_terms; ++i) {
    for (int steps = problem.terms[tile.result * problem.num_terms + i].steps; steps > 0; steps -= kDepth / kStep) {
      stages.wait_full();
      const int at = stages.stage * (Sizes::kStage >> 4);
      if (steps >= kDepth / kStep) {
        ptx::products_begin();
#pragma unroll
        for (int step = 0; step < kDepth / kStep; ++step) {
          ptx::multiply_add<kTransposed>(sums, factor + at + step * kNext, row + at + step * 2, add);
          add = 1;
        }
        ptx::products_commit();
      } else {  // a thin product. Its commits stay beside it, else the compiler adds empty ones that are waited for.
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
          ptx::products_begin();
          ptx::multiply_add<kTransposed>(sums, thin_factor + at + step * kNextThin,
                                         thin_row + at + step * (Sizes::kThinRows >> 4), add);
          ptx::products_commit();
          add = 1;
        }
      }
      ptx::products_wait<1>();
      stages.go_on();
    }
  }
  ptx::products_wait<0>();
  stages.end_products();
  if (thread == 0) ptx::wait_boxes_read();  // the tile before has left
  meet();
  const int column = tile.column + group * kGroupColumns;
  put<kHeight>(sums, ptx::shared_address(result), problem.result[tile.result], column);
  ptx::show_to_copies();
  meet();
  if (thread == 0) {
    for (int box = 0; box < kHeight / Sizes::kBoxRows; ++box) {
      ptx::store_box(problem.results[tile.result], result + box * (Sizes::kBoxRows * kBoxRow), column,
                     tile.row + box * Sizes::kBoxRows, tile.slot);
    }
    ptx::commit_boxes();
  }
}

template <int kRows, bool kTransposed>
__global__ void __launch_bounds__(kThreads, 1) product_sums_kernel(const __grid_constant__ Problem problem) {
  using Sizes = Memory<kRows>;
  extern __shared__ unsigned char shared[];
  const uint32_t skipped = -ptx::shared_address(shared) % kAligned;
  unsigned char* const memory = shared + skipped;
  unsigned char* const result = memory + Sizes::kStages * Sizes::kStage;
  Stages<kRows> stages(memory, reinterpret_cast<ptx::Barrier*>(result + Sizes::kResult));
  if (threadIdx.x == 0) {
    for (int i = 0; i < Sizes::kStages; ++i) {
      stages.full[i].init(1);
      stages.empty[i].init(kGroups * kGroup / 32);
    }
    ptx::show_barriers();
  }
  __syncthreads();
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();
  // By a shuffle the compiler knows that a warp has one group, without which it waits for every product.
  const int group = __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x) / kGroup, 0);
  if (group == 0) {
    ptx::give_registers_back<kCopying>();
    if (threadIdx.x == 0) {
      for_each_tile<kRows, kTransposed>(
          problem, [&](const Tile& tile) { copy<kRows, kTransposed, kRows>(problem, tile, stages); },
          [&](const Tile& tile) { copy<kRows, kTransposed, Memory<kRows>::kBoxRows>(problem, tile, stages); },
          [&](int place) { copy_for_gradients<kRows>(problem.gradients, place, stages); });
    }
  } else {
    ptx::take_registers<kMultiplying>();
    unsigned char* const own = result + (group - 1) * (kRows * kBoxRow);
    for_each_tile<kRows, kTransposed>(
        problem, [&](const Tile& tile) { multiply<kRows, kTransposed, kRows>(problem, tile, group - 1, stages, own); },
        [&](const Tile& tile) {
          multiply<kRows, kTransposed, Memory<kRows>::kBoxRows>(problem, tile, group - 1, stages, own);
        },
        [&](int place) { multiply_for_gradients<kRows>(problem.gradients, place, group - 1, stages); });
    if (threadIdx.x % kGroup == 0) ptx::wait_boxes_read();  // a block's shared memory ends with it
  }
}

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// x, then d_inner and d_a of each factor.
FactorGradients prepare_gradients(const ProductSums& sums, const ProductMatrix* next) {
  const ProductMatrix &x = next[0], &d_a = next[2];
  FactorGradients made = {};
  made.x = encode(x, kGroupColumns, kDepth);
  for (int i = 0; i < sums.num_gradients; ++i) {
    made.d_inner[i] = encode(next[1 + 2 * i], kStep, kDepth);
    made.d_a[i] = reinterpret_cast<void*>(next[2 + 2 * i].address);
  }
  made.slot_stride = d_a.slot_stride, made.row_stride = d_a.row_stride;
  made.columns = static_cast<int>(d_a.columns), made.rank = static_cast<int>(d_a.rows);
  made.rows = static_cast<int>(x.rows);
  made.factor_steps = static_cast<int>(divided_up(made.rank, kStep));
  made.steps = made.factor_steps * static_cast<int>(sums.num_gradients);
  made.across = static_cast<int>(divided_up(made.columns, kTileColumns));
  made.down = static_cast<int>(divided_up(made.steps, kTileSteps));
  made.tiles = made.across * made.down * static_cast<int>(x.slots);
  made.wide = sums.wide_gradients;
  return made;
}

// Tiles of the last round, if they are so few that each can be two.
int64_t split_tiles(int64_t tiles, int processors) {
  const int64_t left = tiles % processors;
  return 2 * left <= processors ? left : 0;
}

struct Launch {
  Problem problem;
  int blocks;
};

Launch prepare(const ProductSums& sums, int rows, int processors) {
  Launch launch = {};
  Problem& problem = launch.problem;
  const int box_rows = box_rows_of(rows);
  problem.num_results = static_cast<int>(sums.num_results);
  problem.num_terms = static_cast<int>(sums.num_terms);
  const ProductMatrix* next = sums.matrices;
  for (int r = 0; r < problem.num_results; ++r) {
    const ProductMatrix& result = *next++;
    problem.results[r] = encode(result, kGroupColumns, box_rows);
    problem.result[r] = {problem.across, static_cast<int>(result.columns),
                         reinterpret_cast<const uint16_t*>(result.bias)};
    problem.across += static_cast<int>(divided_up(result.columns, kTileColumns));
    problem.down_slot = static_cast<int>(divided_up(result.rows, rows));
    problem.down = problem.down_slot * static_cast<int>(result.slots);
    problem.most_row = static_cast<int>(std::max<int64_t>(result.rows - rows, 0));
    for (int i = 0; i < problem.num_terms; ++i, next += 2) {
      const int term = r * problem.num_terms + i;
      problem.terms[term] = {static_cast<int>(divided_up(next[1].columns, kStep)), next[0].slots > 1};
      const int steps = problem.terms[term].steps;
      const auto side = [steps](const auto& boxes) {
        Side made = {};
        if (steps >= kDepth / kStep) made.boxes = boxes(kDepth);
        if (steps % (kDepth / kStep) != 0) made.thin_boxes = boxes(kStep);
        return made;
      };
      problem.factors[term] = side([&](int depth) {
        return sums.transposed ? encode(next[0], kGroupColumns, depth) : encode(next[0], depth, kGroupColumns);
      });
      problem.rows[term] = side([&](int depth) { return encode(next[1], depth, box_rows); });
    }
  }
  const int tiles = problem.across * problem.down;
  problem.split = box_rows < rows ? static_cast<int>(split_tiles(tiles, processors)) : 0;
  if (sums.num_gradients > 0) problem.gradients = prepare_gradients(sums, next);
  launch.blocks = std::min(processors, tiles + problem.split + problem.gradients.tiles);
  return launch;
}

template <int kRows, bool kTransposed>
void start(const ProductSums& sums, int processors, void* stream) {
  const Launch ready = prepare(sums, kRows, processors);
  const auto kernel = product_sums_kernel<kRows, kTransposed>;
  allow_shared(kernel, Memory<kRows>::kBytes);
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(ready.blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = Memory<kRows>::kBytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &early;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, ready.problem), "CUDA launch");
}

template <int kRows>
void start(const ProductSums& sums, int processors, void* stream) {
  return sums.transposed ? start<kRows, true>(sums, processors, stream) : start<kRows, false>(sums, processors, stream);
}

// The time that tiles of so many rows take, in units of its own: for each round of tiles its rows, and 42 for what does
// not grow with them (H100). A last round of tiles that are split has a box of rows. Gradients of factors take the same
// whatever the rows are.
int64_t cost(const ProductSums& sums, int rows, int processors) {
  int64_t across = 0;
  for (int r = 0; r < sums.num_results; ++r) {
    across += divided_up(sums.matrices[r * (1 + 2 * sums.num_terms)].columns, kTileColumns);
  }
  const int64_t tiles = across * divided_up(sums.matrices->rows, rows) * sums.matrices->slots;
  if (box_rows_of(rows) < rows && split_tiles(tiles, processors) > 0) {
    return tiles / processors * (rows + 42) + box_rows_of(rows) + 42;
  }
  return divided_up(tiles, processors) * (rows + 42);
}

}  // namespace

bool product_sums_usable() {
  return runs_here(product_sums_kernel<208, false>, Memory<208>::kBytes) && encode_function() != nullptr;
}

void product_sums_cuda(const ProductSums& sums, void* stream) {
  if (sums.num_results < 1 || sums.num_results > kMostResults || sums.num_terms < 1 ||
      sums.num_results * sums.num_terms > kMostTerms) {
    throw std::invalid_argument("product_sums: expected 1 to " + std::to_string(kMostResults) + " results and 1 to " +
                                std::to_string(kMostTerms) + " terms, got " + std::to_string(sums.num_results) +
                                " results of " + std::to_string(sums.num_terms) + " terms");
  }
  if (sums.num_gradients < 0 || sums.num_gradients > kMostFactors || (sums.num_gradients > 0 && !sums.transposed)) {
    throw std::invalid_argument("product_sums: expected gradients of 0 to " + std::to_string(kMostFactors) +
                                " factors, and of some with `transposed` alone, got " +
                                std::to_string(sums.num_gradients));
  }
  int device = 0, processors = 0;
  check_cuda(cudaGetDevice(&device), "CUDA device");
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "CUDA device");
  const auto cheaper = [&](int a, int b) { return cost(sums, a, processors) < cost(sums, b, processors); };
  const int rows = *std::min_element(std::begin(kTileRows), std::end(kTileRows), cheaper);
  switch (rows) {
    case 96:
      return start<96>(sums, processors, stream);
    case 104:
      return start<104>(sums, processors, stream);
    case 112:
      return start<112>(sums, processors, stream);
    case 128:
      return start<128>(sums, processors, stream);
    case 160:
      return start<160>(sums, processors, stream);
    case 200:
      return start<200>(sums, processors, stream);
    default:
      return start<208>(sums, processors, stream);
  }
}

}  // namespace hullkit
