// SPDX-License-Identifier: Apache-2.0
// active_set.h for one query on one thread, with the face of run_cpu.h.
#pragma once

#include <algorithm>
#include <limits>
#include <numeric>
#include <string>
#include <type_traits>
#include <vector>

#include "frank_wolfe/active_set/active_set.h"
#include "frank_wolfe/choose_solver.h"
#include "frank_wolfe/run/run_cpu.h"
#include "frank_wolfe/support.h"
#include "hullkit/interrupt.h"

namespace hullkit {

// The candidates of one query, and the only thread that works on it: see active_set.h.
template <typename T>
class PoolTeam {
 public:
  PoolTeam(const PoolRows<T>& rows, const T* query, int64_t max_support, int num_threads)
      : rows_(rows),
        query_(query),
        max_support_(max_support),
        columns_(rows, num_threads),
        support_(rows, query),
        base_(rows.size()),
        squares_(rows.size(), -1.0),
        order_(rows.size()),
        iterate_(rows.size()) {
    std::vector<T> products(rows.size());
    rows.dots(query, products.data(), num_threads);
    const int64_t broken = first_overflow(products.data(), rows.size());
    if (broken < rows.size()) rows.explain_not_finite(broken, "query");
    std::copy(products.begin(), products.end(), base_.begin());
    rows.check_not_lost(query, *std::max_element(base_.begin(), base_.end()), "query", rows.batch_entry());
    query_squared_ = support_.query_squared();
  }

  template <typename Task>
  void each(int begin, int end, Task&& task) {
    for (int i = begin; i < end; ++i) task(i);
  }
  void sync() {}
  // A run may free few of the many vertices that it is allowed: memory is taken as they come.
  double* grown(double*, int64_t count) {
    if (count > static_cast<int64_t>(factor_.size())) factor_.resize(count);
    return factor_.data();
  }

  bool rough() const { return std::is_same_v<T, float>; }
  int size() const { return static_cast<int>(rows_.size()); }
  double base(int i) const { return base_[i]; }
  double query_squared() const { return query_squared_; }
  double squared(int i) {
    // Not of a column that is known ahead: nobody has looked whether what it holds is finite.
    if (squares_[i] < 0.0) squares_[i] = support_.own_product(i);
    return squares_[i];
  }
  const T* column(int i) const { return columns_.known_column(i); }

  void touch(int i, const double* scores) {
    const T* const column = columns_.column(i, scores, max_support_ - ++num_touched_);
    const int64_t broken = first_overflow(column, rows_.size());
    if (broken < rows_.size()) rows_.explain_not_finite(broken, "candidate " + std::to_string(rows_.position(i)));
  }

  struct Best {
    int index;
    double value;
  };
  template <typename Value>
  Best best(Value&& value) const {
    stop_if_asked();  // every iteration asks for the best or for a ranking
    Best best{-1, -std::numeric_limits<double>::infinity()};
    for (int i = 0; i < size(); ++i) {
      const double here = value(i);
      if (here > best.value) best = {i, here};
    }
    return best;
  }

  void rank(const double* scores, int k, int* out) {
    stop_if_asked();
    std::iota(order_.begin(), order_.end(), 0);
    const auto precedes = [scores](int i, int j) { return scores[i] != scores[j] ? scores[i] > scores[j] : i < j; };
    std::partial_sort(order_.begin(), order_.begin() + k, order_.end(), precedes);
    std::copy(order_.begin(), order_.begin() + k, out);
  }

  void subtract_iterate(const int* touched, const double* weights, int count, double* scores) {
    std::vector<const T*> columns;
    std::vector<double> shares;
    for (int t = 0; t < count; ++t) {
      if (weights[touched[t]] == 0.0) continue;
      columns.push_back(column(touched[t]));
      shares.push_back(weights[touched[t]]);
    }
    std::fill(iterate_.begin(), iterate_.end(), 0.0);
    simd().ops<T>().add_scaled(iterate_.data(), columns.data(), shares.data(), static_cast<int64_t>(columns.size()),
                               rows_.size());
    for (int i = 0; i < size(); ++i) scores[i] = base_[i] - iterate_[i];
  }

  double residual_squared(const int* touched, const double* weights, int count) {
    take_support(touched, weights, count);
    return support_.minus_iterate(query_).squared;
  }

  void take_support(const int* touched, const double* weights, int count) {
    support_.touched.assign(touched, touched + count);
    support_.weights.clear();
    for (int t = 0; t < count; ++t) support_.weights.push_back(weights[touched[t]]);
  }

  const Support<T>& support() const { return support_; }
  const std::vector<double>& bases() const { return base_; }
  const GramColumns<T>& columns() const { return columns_; }

 private:
  const PoolRows<T>& rows_;
  const T* query_;
  const int64_t max_support_;
  GramColumns<T> columns_;
  Support<T> support_;
  std::vector<double> base_;
  std::vector<double> squares_;  // -1: not asked for yet. Every step asks for those of all touched rows
  std::vector<int> order_;
  std::vector<double> iterate_;  // [n] its products with the rows
  std::vector<double> factor_;   // see cholesky.h
  double query_squared_;
  int64_t num_touched_ = 0;
};

template <typename T>
class ActiveSetCpu {
 public:
  ActiveSetCpu(const PoolRows<T>& rows, const T* query, const FrankWolfeParams& params, int64_t b, int num_threads)
      : params_(params),
        simplex_(params.max_weight),
        num_threads_(num_threads),
        team_(rows, query, params.max_support, num_threads) {
    HULLKIT_CHECK(simplex_.size <= rows.size(), "max_weight: expected at least 1 / ", rows.size(), " for the ",
                  rows.size(), " candidates of entry ", b, ", got ", params.max_weight);
  }

  Status run() {
    const int64_t n = team_.size();
    // Vertices touched by each iteration; simplex_.size are touched at the start.
    const int64_t step = params_.variant == Variant::kVanilla ? simplex_.size : 1;
    const int64_t fit = (n - simplex_.size) / step;
    const int64_t touched =
        std::min({n, params_.max_support, simplex_.size + std::min(params_.max_iters, fit + 1) * step});
    std::vector<double> numbers(2 * n + 2 * touched + std::max(n, touched));
    std::vector<int> places(n + 2 * touched + simplex_.size);
    std::vector<unsigned char> is_free(n);
    ActiveSetMemory memory;
    memory.weights = numbers.data();
    memory.scores = memory.weights + n;
    memory.free_scores = memory.scores + n;
    memory.ones = memory.free_scores + touched;
    memory.direction = memory.ones + touched;
    memory.factor = nullptr;  // it grows
    memory.slot = places.data();
    memory.touched = memory.slot + n;
    memory.free = memory.touched + touched;
    memory.vertex = memory.free + touched;
    memory.is_free = is_free.data();
    ActiveSetRun<PoolTeam<T>> run(team_, params_, simplex_, memory);
    const Status status = run.run();
    num_iters_ = run.num_iters();
    team_.take_support(memory.touched, memory.weights, run.num_touched());
    return status;
  }

  void support(std::vector<double>* products, std::vector<double>* gram, std::vector<double>* weights) const {
    team_.support().products(team_.bases(), team_.columns(), products, gram, weights);
  }
  double residual_norm(const std::vector<double>& weights) const { return team_.support().residual_norm(weights); }
  void write(const FrankWolfeResult& result, int64_t b, Status status) const {
    team_.support().write(result, b, num_iters_, status, simplex_, num_threads_);
  }

 private:
  const FrankWolfeParams params_;
  const CappedSimplex simplex_;
  const int num_threads_;
  PoolTeam<T> team_;
  int64_t num_iters_ = 0;
};

// Calls solved(run, status) with the run of one query, whatever does it.
template <typename T, typename Solved>
void run_frank_wolfe(const PoolRows<T>& rows, const T* query, const FrankWolfeParams& params, int64_t b,
                     int num_threads, Solved&& solved) {
  if (choose_solver_cpu(params) == Solver::kRun) {
    FrankWolfeRun<T> run(rows, query, params, num_threads);
    const Status status = run.run();
    solved(run, status);
  } else {
    ActiveSetCpu<T> run(rows, query, params, b, num_threads);
    const Status status = run.run();
    solved(run, status);
  }
}

}  // namespace hullkit
