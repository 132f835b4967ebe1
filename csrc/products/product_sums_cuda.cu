// SPDX-License-Identifier: Apache-2.0
// A block computes tiles of kTileColumns columns by kRows rows of one slot's result, one after the other. One thread
// copies both sides of a product to shared memory, a stage of 64 of the sum's elements at a time, as far ahead as there
// is room; two groups of four warps multiply, each half of the tile's columns. The columns take the part of the matrix
// instruction's rows: a slot's rows are met with little waste by several widths.
#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <string>

#include "cuda/primitives/hopper.cuh"
#include "cuda/primitives/launch.cuh"
#include "hullkit/product_sums.h"
#include "products/product_boxes.cuh"

namespace hullkit {
namespace {

constexpr int kGroup = 128;  // threads that multiply together
constexpr int kGroups = 2;   // of them, beside one that copies
constexpr int kThreads = kGroup * (1 + kGroups);
constexpr int kGroupColumns = kTileColumns / kGroups;
constexpr int kDepth = 64, kStep = 16;            // of the sums: a stage's, and a matrix instruction's
constexpr int kBoxRow = 128;                      // bytes of a row of a box: kDepth or kGroupColumns halves
constexpr int kThinRow = 32;                      // of a thin box: kStep halves
constexpr int kAligned = 1024;                    // bytes: where a box begins
constexpr int kCopying = 40, kMultiplying = 232;  // registers of a thread
constexpr int kPanel = 4;  // tiles side by side along rows: what runs together reads much the same

struct Term {
  int steps;
  bool of_slot;  // whether each slot has its own factor
};

struct Result {
  int first_tile, columns;  // along the columns of all results
  const uint16_t* bias;
};

// A side of a product: in boxes of kDepth of the sum's elements, and what is left of it in boxes of kStep. Elements
// that a box has outside of its matrix cost more time than those that it has inside.
struct Side {
  CUtensorMap boxes, thin_boxes;
};

struct Problem {
  Side factors[kMostTerms], rows[kMostTerms];
  CUtensorMap results[kMostResults];
  Term terms[kMostTerms];
  Result result[kMostResults];
  int num_results, num_terms;   // terms of each result
  int across, down, down_slot;  // tiles along columns, along the rows of all slots, and of one
};
static_assert(sizeof(Problem) <= 4096, "what a kernel's arguments may take before CUDA 12.1");

template <int kRows>
struct Memory {
  static constexpr int kFactor = kTileColumns * kBoxRow, kStage = kFactor + kRows * kBoxRow;
  static constexpr int kThinFactor = kTileColumns * kThinRow, kThinRows = kRows * kThinRow;  // of one step
  static constexpr int kResult = kRows * kTileColumns * 2;
  static constexpr int kMost = 227 * 1024 - kAligned - 256;  // that a block may have, without the barriers
  static constexpr int kStages = (kMost - kResult) / kStage;
  static constexpr int kBytes =
      kAligned + kStages * kStage + kResult + 2 * kStages * static_cast<int>(sizeof(ptx::Barrier));
};

struct Tile {
  int result, column, row, slot;
};

__device__ inline Tile tile_at(const Problem& problem, int place, int rows) {
  const int panel = place / (kPanel * problem.across), first = panel * kPanel;
  const int wide = min(kPanel, problem.down - first), within = place - first * problem.across;
  const int across = within / wide, down = first + within % wide;
  int result = 0;
  while (result + 1 < problem.num_results && across >= problem.result[result + 1].first_tile) ++result;
  return {result, (across - problem.result[result].first_tile) * kTileColumns, down % problem.down_slot * rows,
          down / problem.down_slot};
}

// A place in the ring of stages; `turn` is the parity of how often the ring was gone through.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t turn = 0;

  __device__ void advance() {
    if (++stage == kStages) stage = 0, turn ^= 1;
  }
};

template <int kRows, bool kTransposed>
__device__ void copy(const Problem& problem, unsigned char* stages, ptx::Barrier* full, ptx::Barrier* empty) {
  using Sizes = Memory<kRows>;
  Ring<Sizes::kStages> ring;
  for (int place = blockIdx.x; place < problem.across * problem.down; place += gridDim.x) {
    const Tile tile = tile_at(problem, place, kRows);
    for (int i = 0; i < problem.num_terms; ++i) {
      const int term = tile.result * problem.num_terms + i;
      const int slot = problem.terms[term].of_slot ? tile.slot : 0, depth = problem.terms[term].steps * kStep;
      const Side &factor = problem.factors[term], &rows = problem.rows[term];
      const auto load_factor = [&](unsigned char* to, const CUtensorMap& boxes, ptx::Barrier& arrived, int k) {
        if constexpr (kTransposed) {
          for (int group = 0; group < kGroups; ++group) {
            ptx::load_box(to + group * (kDepth * kBoxRow), boxes, arrived, tile.column + group * kGroupColumns, k,
                          slot);
          }
        } else {
          ptx::load_box(to, boxes, arrived, k, tile.column, slot);
        }
      };
      for (int k = 0; k < depth; k += kDepth) {
        empty[ring.stage].wait(ring.turn ^ 1);  // the first time nobody has used it
        ptx::Barrier& arrived = full[ring.stage];
        unsigned char* const to = stages + ring.stage * Sizes::kStage;
        if (depth - k >= kDepth) {
          arrived.arrive_expecting(Sizes::kStage);
          load_factor(to, factor.boxes, arrived, k);
          ptx::load_box(to + Sizes::kFactor, rows.boxes, arrived, k, tile.row, tile.slot);
        } else {
          const int steps = (depth - k) / kStep;
          arrived.arrive_expecting(steps * (Sizes::kThinFactor + Sizes::kThinRows));
          for (int step = 0; step < steps; ++step) {
            const int at = k + step * kStep;
            load_factor(to + step * (kTransposed ? kStep * kBoxRow : Sizes::kThinFactor), factor.thin_boxes, arrived,
                        at);
            ptx::load_box(to + Sizes::kFactor + step * Sizes::kThinRows, rows.thin_boxes, arrived, at, tile.row,
                          tile.slot);
          }
        }
        ring.advance();
      }
    }
  }
}

__device__ inline float bias_at(const Result& result, int column) {
  if (result.bias == nullptr || column >= result.columns) return 0.0f;
  return __uint_as_float(uint32_t{result.bias[column]} << 16);
}

// A group's sums as [kRows, kGroupColumns] in shared memory, swizzled as the copy of a box expects it.
template <int kRows>
__device__ void put(const float (&sums)[kRows / 2], uint32_t to, const Result& result, int column) {
  const int warp = threadIdx.x % kGroup / 32, lane = threadIdx.x % 32;
  const float low = bias_at(result, column + warp * 16 + lane / 4);
  const float high = bias_at(result, column + warp * 16 + 8 + lane / 4);
  const int within = lane % 8, vector = (warp * 2 + lane / 8 % 2) ^ within;  // of eight columns
  const auto pair = [&](int at, float bias) { return ptx::to_bf16_pair(sums[at] + bias, sums[at + 1] + bias); };
#pragma unroll
  for (int j = 0; j + 1 < kRows / 8; j += 2) {
    const int row = (j + lane / 16) * 8 + within;
    ptx::store_transposed(to + row * kBoxRow + vector * 16, pair(4 * j, low), pair(4 * j + 2, high),
                          pair(4 * j + 4, low), pair(4 * j + 6, high));
  }
  if constexpr (kRows / 8 % 2 == 1) {
    constexpr int kLast = kRows / 8 - 1;
    ptx::store_transposed(to + (8 * kLast + within) * kBoxRow + vector * 16, pair(4 * kLast, low),
                          pair(4 * kLast + 2, high));
  }
}

template <int kRows, bool kTransposed>
__device__ void multiply(const Problem& problem, int group, unsigned char* stages, unsigned char* result,
                         ptx::Barrier* full, ptx::Barrier* empty) {
  using Sizes = Memory<kRows>;
  // From step to step of a factor, in units of 16 bytes.
  constexpr int kNext = (kTransposed ? kStep * kBoxRow : kStep * 2) >> 4;
  constexpr int kNextThin = (kTransposed ? kStep * kBoxRow : Sizes::kThinFactor) >> 4;
  const int thread = threadIdx.x % kGroup;
  const bool first_lane = thread % 32 == 0;
  const uint32_t base = ptx::shared_address(stages);
  const uint64_t factor = ptx::product_operand<kBoxRow>(base + group * (kGroupColumns * kBoxRow));
  const uint64_t row = ptx::product_operand<kBoxRow>(base + Sizes::kFactor);
  const uint64_t thin_factor =
      kTransposed ? factor : ptx::product_operand<kThinRow>(base + group * (kGroupColumns * kThinRow));
  const uint64_t thin_row = ptx::product_operand<kThinRow>(base + Sizes::kFactor);
  unsigned char* const own = result + group * (kRows * kBoxRow);
  const auto meet = [&]() { asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(kGroup) : "memory"); };
  Ring<Sizes::kStages> ring;
  for (int place = blockIdx.x; place < problem.across * problem.down; place += gridDim.x) {
    const Tile tile = tile_at(problem, place, kRows);
    float sums[kRows / 2];
    int add = 0, before = -1;
    for (int i = 0; i < problem.num_terms; ++i) {
      for (int steps = problem.terms[tile.result * problem.num_terms + i].steps; steps > 0; steps -= kDepth / kStep) {
        full[ring.stage].wait(ring.turn);
        const int at = ring.stage * (Sizes::kStage >> 4);
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
        if (before >= 0 && first_lane) empty[before].arrive();
        before = ring.stage;
        ring.advance();
      }
    }
    ptx::products_wait<0>();
    if (first_lane) empty[before].arrive();
    if (thread == 0) ptx::wait_boxes_read();  // the tile before has left
    meet();
    put<kRows>(sums, ptx::shared_address(own), problem.result[tile.result], tile.column + group * kGroupColumns);
    ptx::show_to_copies();
    meet();
    if (thread == 0) {
      const int column = tile.column + group * kGroupColumns;
      ptx::store_box(problem.results[tile.result], own, column, tile.row, tile.slot);
      ptx::commit_boxes();
    }
  }
  if (thread == 0) ptx::wait_boxes_read();  // a block's shared memory ends with it
}

template <int kRows, bool kTransposed>
__global__ void __launch_bounds__(kThreads, 1) product_sums_kernel(const __grid_constant__ Problem problem) {
  using Sizes = Memory<kRows>;
  extern __shared__ unsigned char shared[];
  const uint32_t skipped = -ptx::shared_address(shared) % kAligned;
  unsigned char* const stages = shared + skipped;
  unsigned char* const result = stages + Sizes::kStages * Sizes::kStage;
  ptx::Barrier* const full = reinterpret_cast<ptx::Barrier*>(result + Sizes::kResult);
  ptx::Barrier* const empty = full + Sizes::kStages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Sizes::kStages; ++i) {
      full[i].init(1);
      empty[i].init(kGroups * kGroup / 32);
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
    if (threadIdx.x == 0) copy<kRows, kTransposed>(problem, stages, full, empty);
  } else {
    ptx::take_registers<kMultiplying>();
    multiply<kRows, kTransposed>(problem, group - 1, stages, result, full, empty);
  }
}

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Launch {
  Problem problem;
  int blocks;
};

Launch prepare(const ProductSums& sums, int rows, int processors) {
  Launch launch = {};
  Problem& problem = launch.problem;
  problem.num_results = static_cast<int>(sums.num_results);
  problem.num_terms = static_cast<int>(sums.num_terms);
  const ProductMatrix* next = sums.matrices;
  for (int r = 0; r < problem.num_results; ++r) {
    const ProductMatrix& result = *next++;
    problem.results[r] = encode(result, kGroupColumns, rows);
    problem.result[r] = {problem.across, static_cast<int>(result.columns),
                         reinterpret_cast<const uint16_t*>(result.bias)};
    problem.across += static_cast<int>(divided_up(result.columns, kTileColumns));
    problem.down_slot = static_cast<int>(divided_up(result.rows, rows));
    problem.down = problem.down_slot * static_cast<int>(result.slots);
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
        return sums.transposed ? encode(next[0], kGroupColumns, depth) : encode(next[0], depth, kTileColumns);
      });
      problem.rows[term] = side([&](int depth) { return encode(next[1], depth, rows); });
    }
  }
  launch.blocks = std::min(processors, problem.across * problem.down);
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
// not grow with them (H100).
int64_t cost(const ProductSums& sums, int rows, int processors) {
  int64_t across = 0;
  for (int r = 0; r < sums.num_results; ++r) {
    across += divided_up(sums.matrices[r * (1 + 2 * sums.num_terms)].columns, kTileColumns);
  }
  const int64_t tiles = across * divided_up(sums.matrices->rows, rows) * sums.matrices->slots;
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
    default:
      return start<208>(sums, processors, stream);
  }
}

}  // namespace hullkit
