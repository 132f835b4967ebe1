// SPDX-License-Identifier: Apache-2.0
// What a launch of `product_sums` computes, and the order in which its blocks do.
#pragma once

#include "products/factor_gradients.cuh"
#include "products/product_memory.cuh"

namespace hullkit {

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
  int most_row;                 // where a slot's last tile begins
  int split;                    // so many of the last tiles are computed box by box of their rows
  FactorGradients gradients;    // none has no tiles
};
// More than 4096 bytes need a driver of CUDA 12.1 or later.
static_assert(sizeof(Problem) <= 32764, "what a kernel's arguments may take");

struct Tile {
  int result, column, row, slot;
  int groups;  // that have columns inside of the result
};

// A slot's last tile begins early enough to lie inside of it, for boxes that reach beyond a matrix take more time. Rows
// of two tiles get the same bits from both.
__device__ inline Tile tile_at(const Problem& problem, int place, int rows) {
  const int panel = place / (kPanel * problem.across), first = panel * kPanel;
  const int wide = min(kPanel, problem.down - first), within = place - first * problem.across;
  const int across = within / wide, down = first + within % wide;
  int result = 0;
  while (result + 1 < problem.num_results && across >= problem.result[result + 1].first_tile) ++result;
  const int column = (across - problem.result[result].first_tile) * kTileColumns;
  const int row = min(down % problem.down_slot * rows, problem.most_row);
  return {result, column, row, down / problem.down_slot, groups_of(problem.result[result].columns - column)};
}

// A block's tiles: every gridDim.x-th of all. Tiles of gradients are last: they need little time, and so fill the last
// round, which large tiles leave uneven.
template <int kRows, bool kTransposed, class Whole, class Part, class Gradient>
__device__ void for_each_tile(const Problem& problem, const Whole& whole, const Part& part, const Gradient& gradient) {
  constexpr int kBoxRows = Memory<kRows>::kBoxRows;
  const int blocks = static_cast<int>(gridDim.x), tiles = problem.across * problem.down;
  const int parts = 2 * problem.split, wholes = tiles - problem.split;
  int place = static_cast<int>(blockIdx.x);
  for (; place < wholes; place += blocks) whole(tile_at(problem, place, kRows));
  if constexpr (kBoxRows < kRows) {
    for (; place < wholes + parts; place += blocks) {
      Tile tile = tile_at(problem, wholes + (place - wholes) / 2, kRows);
      tile.row += (place - wholes) % 2 * kBoxRows;
      part(tile);
    }
  }
  if constexpr (kTransposed) {
    for (; place < wholes + parts + problem.gradients.tiles; place += blocks) gradient(place - wholes - parts);
  }
}

}  // namespace hullkit
