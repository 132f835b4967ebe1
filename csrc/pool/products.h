// SPDX-License-Identifier: Apache-2.0
// The products of a batch's vectors with the rows of their pools, for operations that look at each product once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <memory>
#include <vector>

#include "hullkit/parallel.h"
#include "pool/pool_rows.h"

namespace hullkit {

// Products of one round: they stay in the outer caches until they are looked at.
inline constexpr int64_t kRoundBytes = int64_t{4} << 20;
// Vectors that pass by the rows again and again, likewise; and no fewer of them than kMinGroup.
inline constexpr int64_t kGroupBytes = int64_t{512} << 10;
inline constexpr int64_t kMinGroup = 24;
// What the states of the vectors of a group may take.
inline constexpr int64_t kStateBytes = int64_t{256} << 20;

// State: what one vector's products come to.
//   take(first, products, count): <row first, vector>, ..., of `count` rows; calls come in the order of the rows
//   broken(): the first row whose product is not finite, -1 if there is none
//   bytes(): memory that it may take
//
// A pool that the batch shares is read once for a group of vectors: rows are widened once, and the vectors stay in the
// caches. Products have the bits of a vector alone (simd.h), and states see them in the same order.
template <typename T, typename State, typename Finish>
void finish_shared(const PoolSpec& pool, const TensorView& vectors, const char* argument, int num_threads,
                   const State& fresh, Finish&& finish) {
  const PoolRows<T> rows({pool.rows, {}, {}}, 0, /*reuse=*/false);
  const int64_t vector_bytes = pool.dim() * static_cast<int64_t>(sizeof(T));
  const int64_t fits = std::min(std::max(kMinGroup, kGroupBytes / vector_bytes), kStateBytes / fresh.bytes());
  const int64_t most = std::max<int64_t>(fits, kMaxDotVectors) / kMaxDotVectors * kMaxDotVectors;
  const int64_t groups = (pool.batch() + most - 1) / most;
  const int64_t group = (pool.batch() + groups - 1) / groups;
  for (int64_t first = 0; first < pool.batch(); first += group) {
    std::vector<QueryVector<T>> copies;
    std::vector<const T*> addresses;
    std::vector<int64_t> lengths;
    std::exception_ptr refused;  // of an entry: those before it may be broken, which comes first
    try {
      for (int64_t b = first; b < std::min(first + group, pool.batch()); ++b) {
        copies.emplace_back(vectors, b, argument);
        lengths.push_back(valid_length(pool, b));
        addresses.push_back(copies.back().data());
      }
    } catch (...) {
      refused = std::current_exception();
    }
    const auto count = static_cast<int64_t>(addresses.size());
    if (count > 0) {
      const PackedVectors<T> packed(addresses.data(), count, pool.dim());
      std::vector<State> states(count, fresh);
      const int64_t n = *std::max_element(lengths.begin(), lengths.end());
      const int64_t tiles = (n + kRowsPerTile - 1) / kRowsPerTile;
      const int64_t tile = count * kRowsPerTile;  // numbers in one
      const int threads = count * n * pool.dim() < kMinParallelWork ? 1 : num_threads;
      const int64_t fitting = kRoundBytes / (tile * static_cast<int64_t>(sizeof(T)));
      const int64_t round = std::min(std::max<int64_t>(fitting, 4 * threads), tiles);
      const std::unique_ptr<T[]> products(new T[round * tile]);
      for (int64_t begin = 0; begin < tiles; begin += round) {
        const int64_t now = std::min(round, tiles - begin);
        parallel_for(now, threads, [&](int64_t t) {
          const int64_t row = (begin + t) * kRowsPerTile;
          rows.multiply_tile(row, std::min(kRowsPerTile, n - row), packed, products.get() + t * tile);
        });
        parallel_for(count, threads, [&](int64_t v) {
          for (int64_t t = 0; t < now; ++t) {
            const int64_t row = (begin + t) * kRowsPerTile, valid = std::min(kRowsPerTile, lengths[v] - row);
            if (valid <= 0) break;
            states[v].take(row, products.get() + t * tile + v * kRowsPerTile, valid);
          }
        });
      }
      for_each_query(count, n, num_threads, [&](int64_t v, int threads_each) {
        if (states[v].broken() >= 0) {
          PoolRows<T>(pool, first + v, /*reuse=*/false).explain_not_finite(states[v].broken(), argument);
        }
        finish(first + v, states[v], rows, addresses[v], threads_each);
      });
    }
    if (refused) std::rethrow_exception(refused);
  }
}

// Calls finish(b, state, rows, vector, threads) for every entry of a batch: `state`, a copy of `fresh`, has taken the
// products of all candidates of entry b with vector b, and rows.position names them. argument: the vectors' name in
// errors.
template <typename T, typename State, typename Finish>
void finish_products(const PoolSpec& pool, const TensorView& vectors, const char* argument, int num_threads,
                     const State& fresh, Finish&& finish) {
  if (pool.batch() > 1 && pool.rows.stride[0] == 0 && !pool.candidates.defined()) {
    finish_shared<T>(pool, vectors, argument, num_threads, fresh, finish);
    return;
  }
  for_each_query(pool.batch(), pool.positions() * pool.dim(), num_threads, [&](int64_t b, int threads) {
    const QueryVector<T> vector(vectors, b, argument);
    const PoolRows<T> rows(pool, b, /*reuse=*/false);
    const std::unique_ptr<T[]> products(new T[rows.size()]);
    rows.dots(vector.data(), products.get(), threads);
    State state = fresh;
    state.take(0, products.get(), rows.size());
    if (state.broken() >= 0) rows.explain_not_finite(state.broken(), argument);
    finish(b, state, rows, vector.data(), threads);
  });
}

}  // namespace hullkit
