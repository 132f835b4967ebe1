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

#include "frank_wolfe/gram_columns.h"
#include "hullkit/frank_wolfe.h"
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
        base_(rows.size()),
        scores_(rows.size()),
        slot_(rows.size(), -1) {}

  Status run() {
    start();
    // Asked before the first step, so that a support of one is the nearest vertex with weight 1.
    if (support_full()) return Status::kMaxSupport;
    while (num_iters_ < params_.max_iters) {
      const double residual = refined(query_squared_ - 2.0 * query_iterate_ + iterate_squared_,
                                      [this] { return minus_iterate(query_).squared; });
      if (std::sqrt(std::max(residual, 0.0)) < params_.tol) return Status::kConverged;
      if (!step()) return Status::kStalled;
      if (support_full()) return Status::kMaxSupport;
    }
    return Status::kMaxIters;
  }

  // What rounding needs, for the support in the order of the result: products with the query, the Gram matrix
  // row by row, and weights. All known by now, with the bits they would have if computed anew.
  void support(std::vector<double>* products, std::vector<double>* gram, std::vector<double>* weights) {
    const std::vector<int64_t> order = by_weight();
    const size_t m = order.size();
    products->resize(m);
    gram->resize(m * m);
    weights->resize(m);
    for (size_t s = 0; s < m; ++s) {
      const int64_t i = touched_[order[s]];
      (*products)[s] = base_[i];
      (*weights)[s] = weights_[order[s]];
      for (size_t t = 0; t <= s; ++t) {
        const int64_t j = touched_[order[t]];
        (*gram)[s * m + t] = (*gram)[t * m + s] = product(i, j);
      }
    }
  }

  // Fills entry b of the result; the certificates are recomputed from the input.
  void write(const FrankWolfeResult& result, int64_t b, Status status) {
    const std::vector<int64_t> order = by_weight();
    for (int64_t t = 0; t < result.indices.shape[1]; ++t) {
      const bool used = t < static_cast<int64_t>(order.size());
      *result.indices.at<int64_t>(b, t) = used ? rows_.position(touched_[order[t]]) : -1;
      *result.weights.at<double>(b, t) = used ? weights_[order[t]] : 0.0;
    }
    *result.support_size.at<int64_t>(b) = static_cast<int64_t>(touched_.size());
    const Difference residual = minus_iterate(query_);
    std::vector<T> scores(rows_.size());
    rows_.dots(residual.vector.data(), scores.data(), num_threads_);
    *result.residual_norm.at<double>(b) = std::sqrt(residual.squared);
    *result.dual_gap.at<double>(b) =
        static_cast<double>(*std::max_element(scores.begin(), scores.end())) - residual.iterate;
    *result.num_iters.at<int64_t>(b) = num_iters_;
    *result.status.at<int64_t>(b) = static_cast<int64_t>(status);
  }

 private:
  // What an iteration needs of a vertex: a Gram column is read once, however often the vertex is chosen.
  struct Vertex {
    double squared;        // its norm
    const double* target;  // [n] X (query - vertex): the scores, were it the iterate
  };
  static constexpr int64_t kTargetsPerBlock = 8;  // memory is taken for so many at a time

  // Places in touched_ by falling weight, lowest index on a tie.
  std::vector<int64_t> by_weight() const {
    std::vector<int64_t> order(touched_.size());
    std::iota(order.begin(), order.end(), int64_t{0});
    std::sort(order.begin(), order.end(), [this](int64_t i, int64_t j) {
      return weights_[i] != weights_[j] ? weights_[i] > weights_[j] : touched_[i] < touched_[j];
    });
    return order;
  }

  // <x_i, x_j> of two touched vertices; the last one touched may be without a column.
  double product(int64_t i, int64_t j) const {
    if (gram_.known(i)) return gram_.known_column(i)[j];
    return i == j ? own_product(i) : gram_.known_column(j)[i];
  }

  void start() {
    const int64_t n = rows_.size();
    std::vector<T> products(n);
    rows_.dots(query_, products.data(), num_threads_);
    const int64_t broken = first_not_finite(products.data(), n);
    if (broken < n) rows_.explain_not_finite(broken, "query");
    std::copy(products.begin(), products.end(), base_.begin());
    best_ = std::max_element(base_.begin(), base_.end()) - base_.begin();
    query_squared_ = squared_norm(query_);
    scale_squared_ = query_squared_;
    // A support of one takes no step, so nothing is asked of its vertex.
    const Vertex nearest = params_.max_support > 1 ? examine(best_, base_.data()) : Vertex{0.0, nullptr};
    touch(best_, nearest);
    weights_.back() = 1.0;
    query_iterate_ = base_[best_];
    if (support_full()) return;
    iterate_squared_ = nearest.squared;
    scale_squared_ = std::max(scale_squared_, iterate_squared_);
    best_ = simd().advance(scores_.data(), nearest.target, 1.0, n);
  }

  // One LMO answer (already in best_), line search and move. False if the iterate is that vertex already.
  bool step() {
    const int64_t vertex = best_;
    const bool fresh = slot_[vertex] < 0;
    const Vertex known = fresh ? examine(vertex, scores_.data()) : vertices_[slot_[vertex]];
    scale_squared_ = std::max(scale_squared_, known.squared);
    const double vertex_iterate = base_[vertex] - scores_[vertex];
    const double length_squared = refined(known.squared - 2.0 * vertex_iterate + iterate_squared_, [&] {
      std::vector<T> buffer(rows_.dim());
      return minus_iterate(rows_.row(vertex, buffer.data())).squared;
    });
    if (length_squared < kStalledSquaredNorm) return false;
    const double slope = scores_[vertex] - (query_iterate_ - iterate_squared_);
    const double step = std::min(std::max(slope / length_squared, 0.0), 1.0);

    const double keep = 1.0 - step;
    if (fresh) touch(vertex, known);
    simd().scale(weights_.data(), keep, static_cast<int64_t>(weights_.size()));
    weights_[slot_[vertex]] += step;
    query_iterate_ = keep * query_iterate_ + step * base_[vertex];
    iterate_squared_ =
        keep * keep * iterate_squared_ + 2.0 * step * keep * vertex_iterate + step * step * known.squared;
    if (!support_full()) best_ = simd().advance(scores_.data(), known.target, step, rows_.size());
    ++num_iters_;
    return true;
  }

  // A squared length from the recurrences carries an error of about eps times the largest squared norm that
  // went into them. Where that could matter to a stopping test, it is recomputed from the vectors themselves.
  template <typename Exact>
  double refined(double squared, Exact&& exact) const {
    constexpr double kTrusted = std::is_same_v<T, double> ? 1e-10 : 1e-5;
    return squared <= kTrusted * scale_squared_ ? exact() : squared;
  }

  // iterate [d] in float64.
  std::vector<double> iterate() const {
    const SimdOps<T>& ops = simd().ops<T>();
    std::vector<double> sum(rows_.dim());
    if (rows_.in_place()) {
      std::vector<const T*> vertices;
      for (const int64_t i : touched_) vertices.push_back(rows_.row(i, nullptr));
      ops.add_scaled(sum.data(), vertices.data(), weights_.data(), static_cast<int64_t>(vertices.size()), rows_.dim());
    } else {
      std::vector<T> buffer(rows_.dim());
      for (size_t t = 0; t < touched_.size(); ++t) {
        const T* const vertex = rows_.row(touched_[t], buffer.data());
        ops.add_scaled(sum.data(), &vertex, &weights_[t], 1, rows_.dim());
      }
    }
    return sum;
  }

  // A vector minus the iterate, from the vectors themselves.
  struct Difference {
    std::vector<T> vector;
    double squared;  // its norm
    double iterate;  // its product with the iterate
  };

  Difference minus_iterate(const T* vector) const {
    Difference difference{std::vector<T>(rows_.dim()), 0.0, 0.0};
    difference.squared =
        simd().ops<T>().subtract(vector, iterate().data(), rows_.dim(), difference.vector.data(), &difference.iterate);
    return difference;
  }

  double squared_norm(const T* vector) const {
    T product;
    T* const out = &product;
    simd().ops<T>().dots(&vector, 1, vector, 1, rows_.dim(), &out);
    return product;
  }

  double own_product(int64_t i) const {
    std::vector<T> buffer(rows_.dim());
    const double product = squared_norm(rows_.row(i, buffer.data()));
    if (!std::isfinite(product)) rows_.explain_not_finite(i, "itself");
    return product;
  }

  // What the loop needs of a vertex that was not touched before. scores [n] rank the others by how soon they may be.
  Vertex examine(int64_t i, const double* scores) {
    const int64_t n = rows_.size(), untouched = params_.max_support - static_cast<int64_t>(touched_.size());
    // The last vertex needs no column: nothing is scored after it.
    if (untouched == 1 && !gram_.known(i)) return {own_product(i), nullptr};
    const T* const column = gram_.column(i, scores, untouched - 2);
    const int64_t broken = first_not_finite(column, n);
    if (broken < n) rows_.explain_not_finite(broken, "candidate " + std::to_string(rows_.position(i)));
    const int64_t place = static_cast<int64_t>(touched_.size()) % kTargetsPerBlock;
    if (place == 0) targets_.emplace_back(new double[kTargetsPerBlock * n]);
    double* const target = targets_.back().get() + place * n;
    for (int64_t j = 0; j < n; ++j) target[j] = base_[j] - static_cast<double>(column[j]);
    return {static_cast<double>(column[i]), target};
  }

  void touch(int64_t i, const Vertex& vertex) {
    slot_[i] = static_cast<int64_t>(touched_.size());
    touched_.push_back(i);
    weights_.push_back(0.0);
    vertices_.push_back(vertex);
  }

  bool support_full() const { return static_cast<int64_t>(touched_.size()) >= params_.max_support; }

  const PoolRows<T>& rows_;
  const T* query_;
  const FrankWolfeParams params_;
  const int num_threads_;
  GramColumns<T> gram_;
  std::vector<double> base_;    // [n] X query
  std::vector<double> scores_;  // [n] X residual
  std::vector<int64_t> slot_;   // [n] place in touched_, -1 if untouched
  std::vector<int64_t> touched_;
  std::vector<double> weights_;  // aligned with touched_, as vertices_ is
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
