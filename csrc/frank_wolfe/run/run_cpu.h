// SPDX-License-Identifier: Apache-2.0
// One Frank-Wolfe run, on the quantities that make an iteration O(n): base = X q, scores = X residual, and
// three scalars.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <string>
#include <type_traits>
#include <vector>

#include "frank_wolfe/step.h"
#include "frank_wolfe/support.h"
#include "hullkit/frank_wolfe.h"
#include "hullkit/interrupt.h"
#include "pool/gram_columns.h"
#include "pool/pool_rows.h"
#include "simd/simd.h"

namespace hullkit {

template <typename T>
class FrankWolfeRun {
 public:
  FrankWolfeRun(const PoolRows<T>& rows, const T* query, const FrankWolfeParams& params, int num_threads)
      : rows_(rows),
        query_(query),
        params_(params),
        num_threads_(num_threads),
        gram_(rows, num_threads),
        support_(rows, query),
        base_(rows.size()),
        scores_(rows.size()),
        slot_(rows.size(), -1) {}

  Status run() {
    start();
    // Asked before the first step, so that a support of one is the nearest vertex with weight 1.
    if (support_full()) return Status::kMaxSupport;
    while (num_iters_ < params_.max_iters) {
      if (num_iters_ % 16 == 0) stop_if_asked();  // a step that computes a column looks too
      const double residual = refined(query_squared_ - 2.0 * query_iterate_ + iterate_squared_,
                                      [this] { return support_.minus_iterate(query_).squared; });
      if (std::sqrt(residual) < params_.tol) return Status::kConverged;
      const Step step = this->step();
      if (step != Step::kContinue) return static_cast<Status>(step);
      if (support_full()) return Status::kMaxSupport;
    }
    return Status::kMaxIters;
  }

  // See Support.
  void support(std::vector<double>* products, std::vector<double>* gram, std::vector<double>* weights) const {
    support_.products(base_, gram_, products, gram, weights);
  }
  double residual_norm(const std::vector<double>& weights) const { return support_.residual_norm(weights); }
  void write(const FrankWolfeResult& result, int64_t b, Status status) const {
    support_.write(result, b, num_iters_, status, CappedSimplex(1.0), num_threads_);
  }

 private:
  // A touched vertex, so that its Gram column is read once, however often it is chosen.
  struct Vertex {
    double squared;        // its norm
    const double* target;  // [n] X (query - vertex): the scores, were it the iterate
  };
  static constexpr int64_t kTargetsPerBlock = 8;  // memory is taken for so many at a time

  void start() {
    const int64_t n = rows_.size();
    std::vector<T> products(n);
    rows_.dots(query_, products.data(), num_threads_);
    const int64_t broken = first_overflow(products.data(), n);
    if (broken < n) rows_.explain_not_finite(broken, "query");
    std::copy(products.begin(), products.end(), base_.begin());
    best_ = std::max_element(base_.begin(), base_.end()) - base_.begin();
    rows_.check_not_lost(query_, base_[best_], "query", rows_.batch_entry());
    query_squared_ = params_.max_support > 1 ? support_.query_squared() : support_.squared_norm(query_);
    scale_squared_ = query_squared_;
    // A support of one takes no step, so nothing is asked of its vertex.
    const Vertex nearest = params_.max_support > 1 ? examine(best_, base_.data()) : Vertex{0.0, nullptr};
    touch(best_, nearest);
    support_.weights.back() = 1.0;
    query_iterate_ = base_[best_];
    if (support_full()) return;
    iterate_squared_ = nearest.squared;
    scale_squared_ = std::max(scale_squared_, iterate_squared_);
    best_ = simd().advance(scores_.data(), nearest.target, 1.0, n);
  }

  // One LMO answer (already in best_), line search and move.
  Step step() {
    const int64_t vertex = best_;
    const double slope = scores_[vertex] - (query_iterate_ - iterate_squared_);  // the dual gap
    if (slope <= params_.gap_tol) return Step::kGapTol;
    const bool fresh = slot_[vertex] < 0;
    const Vertex known = fresh ? examine(vertex, scores_.data()) : vertices_[slot_[vertex]];
    scale_squared_ = std::max(scale_squared_, known.squared);
    const double vertex_iterate = base_[vertex] - scores_[vertex];
    const double length_squared = refined(known.squared - 2.0 * vertex_iterate + iterate_squared_, [&] {
      std::vector<T> buffer(rows_.dim());
      return support_.minus_iterate(rows_.row(vertex, buffer.data())).squared;
    });
    if (length_squared < kStalledSquaredNorm) return Step::kStalled;
    const double step = std::min(std::max(slope / length_squared, 0.0), 1.0);

    const double keep = 1.0 - step;
    if (fresh) touch(vertex, known);
    simd().scale(support_.weights.data(), keep, static_cast<int64_t>(support_.weights.size()));
    support_.weights[slot_[vertex]] += step;
    query_iterate_ = keep * query_iterate_ + step * base_[vertex];
    iterate_squared_ =
        keep * keep * iterate_squared_ + 2.0 * step * keep * vertex_iterate + step * step * known.squared;
    if (!support_full()) best_ = simd().advance(scores_.data(), known.target, step, rows_.size());
    ++num_iters_;
    return Step::kContinue;
  }

  // A squared length from the recurrences carries an error of about eps times the largest squared norm that
  // went into them. Where that could matter to a stopping test, it is recomputed from the vectors themselves.
  template <typename Exact>
  double refined(double squared, Exact&& exact) const {
    constexpr double kTrusted = std::is_same_v<T, double> ? 1e-10 : 1e-5;
    return squared <= kTrusted * scale_squared_ ? exact() : squared;
  }

  // A vertex that was not touched before. scores [n] rank the others by how soon they may be touched.
  Vertex examine(int64_t i, const double* scores) {
    const int64_t n = rows_.size(), untouched = params_.max_support - static_cast<int64_t>(support_.touched.size());
    // The last vertex needs no column: nothing is scored after it.
    if (untouched == 1 && !gram_.known(i)) return {support_.own_product(i), nullptr};
    const T* const column = gram_.column(i, scores, untouched - 2);
    const int64_t broken = first_overflow(column, n);
    if (broken < n) rows_.explain_not_finite(broken, "candidate " + std::to_string(rows_.position(i)));
    const int64_t place = static_cast<int64_t>(support_.touched.size()) % kTargetsPerBlock;
    if (place == 0) targets_.emplace_back(new double[kTargetsPerBlock * n]);
    double* const target = targets_.back().get() + place * n;
    for (int64_t j = 0; j < n; ++j) target[j] = base_[j] - static_cast<double>(column[j]);
    return {static_cast<double>(column[i]), target};
  }

  void touch(int64_t i, const Vertex& vertex) {
    slot_[i] = static_cast<int64_t>(support_.touched.size());
    support_.touched.push_back(i);
    support_.weights.push_back(0.0);
    vertices_.push_back(vertex);
  }

  bool support_full() const { return static_cast<int64_t>(support_.touched.size()) >= params_.max_support; }

  const PoolRows<T>& rows_;
  const T* query_;
  const FrankWolfeParams params_;
  const int num_threads_;
  GramColumns<T> gram_;
  Support<T> support_;          // vertices_ is aligned with it
  std::vector<double> base_;    // [n] X query
  std::vector<double> scores_;  // [n] X residual
  std::vector<int64_t> slot_;   // [n] place in support_.touched, -1 if untouched
  std::vector<Vertex> vertices_;
  std::vector<std::unique_ptr<double[]>> targets_;  // [kTargetsPerBlock, n] each
  int64_t best_ = 0;                                // the LMO's answer at the current iterate
  double query_squared_ = 0.0;
  double scale_squared_ = 0.0;  // largest squared norm among the query and the touched vertices
  double query_iterate_ = 0.0;
  double iterate_squared_ = 0.0;
  int64_t num_iters_ = 0;
};

}  // namespace hullkit
