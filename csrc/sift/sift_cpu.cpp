// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "hullkit/check.h"
#include "hullkit/interrupt.h"
#include "hullkit/parallel.h"
#include "hullkit/sift.h"
#include "pool/gram_columns.h"
#include "pool/pool_rows.h"
#include "sift/check_params.h"
#include "simd/simd.h"

namespace hullkit {
namespace {

// The posterior kernel is never written down. A stretch of steps that choose one candidate s subtracts a multiple of
// c c' from it, with c the posterior column of s, k_S(x_s, .), when the stretch began: each of its steps leaves that
// column a multiple of itself. So the column of a candidate is that of the Gram matrix minus one term for each stretch.
class SiftRun {
 public:
  SiftRun(const PoolRows<double>& rows, const SiftParams& params, int64_t num_vectors, int num_threads)
      : rows_(rows),
        params_(params),
        num_vectors_(num_vectors),
        num_threads_(num_threads),
        padded_((rows.size() + kGainBlock - 1) / kGainBlock * kGainBlock),
        gram_(rows, num_threads),
        products_(num_vectors * padded_),
        moves_(num_vectors),
        variances_(padded_),
        bars_(padded_, -std::numeric_limits<double>::infinity()),
        gains_(padded_),
        counts_(rows.size()) {}

  // Vector k of prompt b, before run.
  void set_query(int64_t b, int64_t k, const double* query) {
    std::vector<double> products(rows_.size());
    rows_.dots(query, products.data(), num_threads_);
    const int64_t broken = first_not_finite(products.data(), rows_.size());
    if (broken < rows_.size()) rows_.explain_not_finite(broken, "query");
    const double most = *std::max_element(products.begin(), products.end());
    rows_.check_not_lost(query, most, "query", b);
    HULLKIT_CHECK(most <= 0.0 || most * most >= std::numeric_limits<double>::min(),
                  "pool: expected inner products with query, squared, within the range of float64, got an underflow ",
                  "of all in entry ", b, "; scale the embeddings up");
    std::copy(products.begin(), products.end(), products_.begin() + k * padded_);
    double square;
    simd().f64.squares(&query, 1, rows_.dim(), &square);
    HULLKIT_CHECK(std::isfinite(square), "query: expected a squared norm within the range of the arithmetic, got an ",
                  "overflow in entry ", b, "; scale the embeddings down");
    variance_ += square;
  }

  void run(int64_t b, const SiftResult& result) {
    start();
    const int64_t total = params_.total;
    int64_t* const order = result.order.at<int64_t>(b);
    double* const variance = result.variance.at<double>(b);
    int64_t steps = 0;
    for (;;) {
      stop_if_asked();
      const int64_t chosen = best_;
      observe(chosen);
      order[steps] = rows_.position(chosen);
      variance[steps] = variance_;
      ++steps;
      if (params_.alpha > 0.0 && std::sqrt(variance_) > 1.0 / (params_.alpha * static_cast<double>(steps))) break;
      if (steps == total) break;
      condition(chosen, total - steps);
      // Among NaN alone the best is a place behind the candidates.
      HULLKIT_CHECK(best_ < rows_.size() && std::isfinite(gains_[best_]), "noise: expected gains within the range of ",
                    "float64, got an overflow in entry ", b, ", step ", steps, "; raise the noise or scale the ",
                    "embeddings down");
    }
    std::fill(order + steps, order + total, -1);
    std::fill(variance + steps, variance + total, variance_);
    const int64_t width = result.indices.shape[1], distinct = static_cast<int64_t>(chosen_.size());
    for (int64_t s = 0; s < width; ++s) {
      *result.indices.at<int64_t>(b, s) = s < distinct ? rows_.position(chosen_[s]) : -1;
      *result.counts.at<int64_t>(b, s) = s < distinct ? counts_[chosen_[s]] : 0;
    }
    *result.num_steps.at<int64_t>(b) = steps;
  }

 private:
  // Consecutive steps that choose one candidate. Together they subtract weight * column column' from the kernel.
  struct Stretch {
    int64_t candidate;
    double scale;  // its posterior column now is scale * column
    double weight;
  };
  struct alignas(64) Line {
    double values[8];
  };
  static constexpr int64_t kColumnsPerBlock = 8;

  void start() {
    const int64_t n = rows_.size();
    // Division: max_multiplicity * n may be out of range.
    HULLKIT_CHECK((params_.total - 1) / params_.max_multiplicity < n, "max_multiplicity: expected at least total / ", n,
                  " for total = ", params_.total, " and ", n, " candidates, got ", params_.max_multiplicity);
    std::vector<double> squares(n);
    rows_.squares(squares.data(), num_threads_);
    const int64_t broken = first_not_finite(squares.data(), n);
    if (broken < n) rows_.explain_not_finite(broken, "itself");
    std::copy(squares.begin(), squares.end(), variances_.begin());
    std::fill(bars_.begin(), bars_.begin() + n, 0.0);
    score(gains_.data(), 0.0);  // nothing is known yet: any column will do
    if (!std::isfinite(gains_[best_])) rows_.explain_not_finite(best_, "query, squared,");
  }

  double observed_variance(int64_t i) const { return std::max(variances_[i], 0.0) + params_.noise; }

  void observe(int64_t i) {
    double reduction = 0.0;
    for (int64_t k = 0; k < num_vectors_; ++k) {
      moves_[k] = products_[k * padded_ + i];
      reduction += moves_[k] * moves_[k];
    }
    variance_ = std::max(variance_ - reduction / observed_variance(i), 0.0);
    if (counts_[i]++ == 0) chosen_.push_back(i);
  }

  // The kernel after candidate i was observed, and the next best; `later` more steps at most.
  void condition(int64_t i, int64_t later) {
    if (stretches_.empty() || stretches_.back().candidate != i) begin_stretch(i, later);
    Stretch& stretch = stretches_.back();
    const double observed = observed_variance(i);
    const double shrink = stretch.scale * stretch.scale / observed;
    for (double& move : moves_) move *= stretch.scale / observed;
    stretch.weight += shrink;
    stretch.scale *= params_.noise / observed;
    if (counts_[i] == params_.max_multiplicity) bars_[i] = -std::numeric_limits<double>::infinity();
    score(column(stretches_.size() - 1), shrink);
  }

  void score(const double* column, double shrink) {
    best_ = simd().condition(products_.data(), num_vectors_, variances_.data(), column, moves_.data(), shrink,
                             params_.noise, bars_.data(), gains_.data(), padded_);
  }

  void begin_stretch(int64_t i, int64_t later) {
    const int64_t n = rows_.size();
    // More terms than the kernel has rows: from then on it is cheaper written down.
    if (static_cast<int64_t>(stretches_.size()) >= std::max<int64_t>(n, kColumnsPerBlock)) fold();
    const size_t place = stretches_.size();
    if (place / kColumnsPerBlock == blocks_.size()) blocks_.push_back(allocate(kColumnsPerBlock));
    double* const now = column(place);
    if (folded_ != nullptr) {
      std::copy_n(folded_row(i), padded_, now);
    } else {
      // Every stretch but the last needs a column: the last step is observed only.
      const double* const gram = gram_.column(i, gains_.data(), later - 1);
      const int64_t broken = first_not_finite(gram, n);
      if (broken < n) rows_.explain_not_finite(broken, "candidate " + std::to_string(rows_.position(i)));
      std::copy_n(gram, n, now);
      std::fill(now + n, now + padded_, 0.0);
    }
    subtract_stretches(i, now);
    stretches_.push_back({i, 1.0, 0.0});
  }

  // row [padded], of candidate i: the kernel's before the stretches, then after them.
  void subtract_stretches(int64_t i, double* row) {
    terms_.clear();
    term_weights_.clear();
    for (size_t s = 0; s < stretches_.size(); ++s) {
      terms_.push_back(column(s));
      term_weights_.push_back(-stretches_[s].weight * terms_.back()[i]);
    }
    simd().f64.add_scaled(row, terms_.data(), term_weights_.data(), static_cast<int64_t>(terms_.size()), padded_);
  }

  void fold() {
    const int64_t n = rows_.size();
    const bool first = folded_ == nullptr;
    if (first) folded_ = allocate(n);
    for (int64_t i = 0; i < n; ++i) {
      stop_if_asked();
      double* const row = folded_row(i);
      if (first) {
        const double* const gram = gram_.column(i, gains_.data(), n - 1 - i);
        const int64_t broken = first_not_finite(gram, n);
        if (broken < n) rows_.explain_not_finite(broken, "candidate " + std::to_string(rows_.position(i)));
        std::copy_n(gram, n, row);
        std::fill(row + n, row + padded_, 0.0);
      }
      subtract_stretches(i, row);
    }
    stretches_.clear();
  }

  std::unique_ptr<Line[]> allocate(int64_t columns) const {
    return std::unique_ptr<Line[]>(new Line[columns * padded_ / 8]);
  }
  double* folded_row(int64_t i) { return folded_[i * padded_ / 8].values; }
  double* column(size_t place) {
    return blocks_[place / kColumnsPerBlock][place % kColumnsPerBlock * padded_ / 8].values;
  }

  const PoolRows<double>& rows_;
  const SiftParams params_;
  const int64_t num_vectors_;
  const int num_threads_;
  const int64_t padded_;
  GramColumns<double> gram_;
  std::vector<double> products_;   // [num_vectors, padded] k_S(query, candidate)
  std::vector<double> moves_;      // [num_vectors] products with the chosen candidate, then their change by a step
  std::vector<double> variances_;  // [padded] k_S(candidate, candidate)
  std::vector<double> bars_;       // [padded] 0, or -inf for what may not be chosen
  std::vector<double> gains_;      // [padded]
  std::vector<int64_t> counts_;
  std::vector<int64_t> chosen_;  // distinct, in order of the first choice
  std::vector<Stretch> stretches_;
  std::vector<std::unique_ptr<Line[]>> blocks_;  // [kColumnsPerBlock, padded] each: columns of the stretches
  std::unique_ptr<Line[]> folded_;               // [n, padded] the kernel, once it is written down
  std::vector<const double*> terms_;
  std::vector<double> term_weights_;
  double variance_ = 0.0;  // of the prompt
  int64_t best_ = 0;
};

}  // namespace

void sift_cpu(const PoolSpec& pool, const TensorView& query, const SiftParams& params, const SiftResult& result,
              int num_threads) {
  check_params(params);
  const bool several = query.rank == 3;
  const int64_t num_vectors = several ? query.shape[1] : 1;
  for_each_query(pool.batch(), pool.positions() * pool.dim(), num_threads, [&](int64_t b, int threads) {
    const PoolRows<double> rows(pool, b, /*reuse=*/true);
    SiftRun run(rows, params, num_vectors, threads);
    for (int64_t k = 0; k < num_vectors; ++k) {
      run.set_query(b, k, QueryVector<double>(several ? query.entry(b) : query, several ? k : b, "query").data());
    }
    run.run(b, result);
  });
}

}  // namespace hullkit
