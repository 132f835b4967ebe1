// SPDX-License-Identifier: Apache-2.0
// Beside the gradient of an input x, those of the low-rank factors that read it: d_a[k] = d_inner[k]^T x[k]. The sum is
// over a slot's rows, and a tile is kTileColumns columns of x by up to 64 of all factors' ranks together. Such a tile
// takes a few stages. A launch has them last: they keep blocks busy that would wait for the launch's last large tiles.
#pragma once

#include <cuda_bf16.h>

#include "products/product_boxes.cuh"
#include "products/product_memory.cuh"

namespace hullkit {

constexpr int kTileSteps = 4;                 // of kStep ranks, in a tile
constexpr int kInnerBox = kDepth * kThinRow;  // bytes of a box of d_inner; in a stage they follow those of x

struct FactorGradients {
  CUtensorMap x, d_inner[kMostFactors];
  void* d_a[kMostFactors];
  int64_t slot_stride, row_stride;  // of d_a: elements
  int columns, rank, rows;          // of d_a; of a slot
  int across, down, tiles;          // tiles along the columns, along all factors' ranks, and of all slots
  int factor_steps, steps;          // of kStep ranks: one factor's, and all factors'
  bool wide;                        // whether d_a is float32, else it is bfloat16
};

struct GradientTile {
  int column, step, slot;
  int steps, groups;  // from `step` on; that have columns inside of x

  __device__ GradientTile(const FactorGradients& of, int place)
      : column(place % of.across * kTileColumns),
        step(place / of.across % of.down * kTileSteps),
        slot(place / of.across / of.down),
        steps(min(kTileSteps, of.steps - step)),
        groups(groups_of(of.columns - column)) {}
};

template <int kRows>
__device__ void copy_for_gradients(const FactorGradients& of, int place, Stages<kRows>& stages) {
  using Sizes = Memory<kRows>;
  static_assert(kTileSteps * kInnerBox <= Sizes::kStage - Sizes::kFactor);
  const GradientTile tile(of, place);
  for (int row = 0; row < of.rows; row += kDepth) {
    stages.wait_empty();
    ptx::Barrier& arrived = stages.full[stages.stage];
    unsigned char* const to = stages.now();
    arrived.arrive_expecting(tile.groups * Sizes::kGroupFactor + tile.steps * kInnerBox);
    for (int group = 0; group < tile.groups; ++group) {
      ptx::load_box(to + group * Sizes::kGroupFactor, of.x, arrived, tile.column + group * kGroupColumns, row,
                    tile.slot);
    }
    for (int i = 0; i < tile.steps; ++i) {
      const int step = tile.step + i;
      ptx::load_box(to + Sizes::kFactor + i * kInnerBox, of.d_inner[step / of.factor_steps], arrived,
                    step % of.factor_steps * kStep, row, tile.slot);
    }
    stages.advance();
  }
}

// A group's half of a tile. Boxes that a tile does not fill have what was there before: nobody reads their sums.
template <int kRows>
__device__ void multiply_for_gradients(const FactorGradients& of, int place, int group, Stages<kRows>& stages) {
  using Sizes = Memory<kRows>;
  const int warp = threadIdx.x % kGroup / 32, lane = threadIdx.x % 32;
  const uint32_t base = ptx::shared_address(stages.memory);
  const uint64_t x = ptx::product_operand<kBoxRow>(base + group * Sizes::kGroupFactor);
  const uint64_t d_inner = ptx::product_operand<kThinRow, kInnerBox>(base + Sizes::kFactor);
  const GradientTile tile(of, place);
  if (group >= tile.groups) return stages.pass((of.rows + kDepth - 1) / kDepth);
  float sums[kTileSteps * kStep / 2];
  int add = 0;
  for (int row = 0; row < of.rows; row += kDepth) {
    stages.wait_full();
    const int at = stages.stage * (Sizes::kStage >> 4);
    ptx::products_begin();
#pragma unroll
    for (int step = 0; step < kDepth / kStep; ++step) {
      ptx::multiply_add<true>(sums, x + at + step * (kStep * kBoxRow >> 4),
                              d_inner + at + step * (kStep * kThinRow >> 4), add);
      add = 1;
    }
    ptx::products_commit();
    ptx::products_wait<1>();
    stages.go_on();
  }
  ptx::products_wait<0>();
  stages.end_products();
  const int column = tile.column + group * kGroupColumns + warp * 16 + lane / 4;
  const auto store = [&](int factor, int rank, int at, float value) {
    if (rank >= of.rank || at >= of.columns) return;
    const int64_t place = tile.slot * of.slot_stride + rank * of.row_stride + at;
    if (of.wide) {
      static_cast<float*>(of.d_a[factor])[place] = value;
    } else {
      static_cast<__nv_bfloat16*>(of.d_a[factor])[place] = __float2bfloat16_rn(value);
    }
  };
#pragma unroll
  for (int j = 0; j < 2 * kTileSteps; ++j) {
    if (j / 2 >= tile.steps) break;
    const int step = tile.step + j / 2, factor = step / of.factor_steps;
    const int rank = step % of.factor_steps * kStep + j % 2 * 8 + lane % 4 * 2;
    store(factor, rank, column, sums[4 * j]);
    store(factor, rank + 1, column, sums[4 * j + 1]);
    store(factor, rank, column + 8, sums[4 * j + 2]);
    store(factor, rank + 1, column + 8, sums[4 * j + 3]);
  }
}

}  // namespace hullkit
