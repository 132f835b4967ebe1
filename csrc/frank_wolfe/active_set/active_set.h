// SPDX-License-Identifier: Apache-2.0
// The variants of Frank-Wolfe that keep an active set, and those with a cap: one text for a CPU's thread and for a
// GPU's block of threads. All state is weights and scores of the candidates; sums are over touched vertices, in order.
#pragma once

#include <cstdint>
#include <cstring>

#include "frank_wolfe/active_set/cholesky.h"
#include "frank_wolfe/active_set/memory.h"
#include "frank_wolfe/capped_simplex.h"
#include "frank_wolfe/step.h"

namespace hullkit {

// Problem: a Team (cholesky.h) that knows the candidates.
//   size(), base(i) = <x_i, query>, query_squared(), squared(i), rough(): products are float32 sums
//   touch(i, scores): its column is wanted, those of the best scores may be next; column(i)[j] = <x_i, x_j> of a
//   touched i
//   best(f): the largest f(i) and where (lowest index on a tie); -inf: not a candidate
//   rank(scores, k, out): the k best candidates, best first
//   subtract_iterate(touched, weights, count, scores): scores = base - X iterate
//   residual_squared(touched, weights, count): from the rows themselves
template <typename Problem>
class ActiveSetRun {
 public:
  HULLKIT_DEVICE ActiveSetRun(Problem& problem, const FrankWolfeParams& params, const CappedSimplex& simplex,
                              const ActiveSetMemory& memory)
      : p_(problem),
        params_(params),
        simplex_(simplex),
        m_(memory),
        factor_(problem, memory.factor),
        rough_(problem.rough()) {}

  HULLKIT_DEVICE Status run() {
    start();
    while (!support_full() && num_iters_ < params_.max_iters) {
      measure();
      if (converged()) return Status::kConverged;
      if (params_.gap_tol >= 0.0 || params_.variant == Variant::kVanilla || params_.variant == Variant::kAway) {
        find_vertex();
        if (vertex_score_ - residual_iterate_ <= params_.gap_tol) return Status::kGapTol;
      }
      const Step step = this->step();
      if (step != Step::kContinue) return static_cast<Status>(step);
      ++num_iters_;
    }
    return support_full() ? Status::kMaxSupport : Status::kMaxIters;
  }

  HULLKIT_DEVICE int num_touched() const { return num_touched_; }
  HULLKIT_DEVICE int64_t num_iters() const { return num_iters_; }

 private:
  // What a step that brings in or moves a row of this length must gain by the unit: less is rounding. Scores are
  // float64 sums of products with the query and with the rows that have weight. Rough products are wrong by themselves:
  // by 1e-7 of those that the iterate consists of. A row that enters adds nothing: its own step puts its score right.
  HULLKIT_DEVICE double gain(double length) const {
    const double sums = 1e-14 * larger(length, mean_length_) * larger(root(p_.query_squared()), mean_length_);
    return rough_ ? larger(sums, 1e-7 * larger(mean_base_, mean_length_ * mean_length_)) : sums;
  }
  HULLKIT_DEVICE double length(int i) const { return root(p_.squared(i)); }
  // Whether candidate i gets weight if it is freed: that of a much longer row may be so little that it counts as none.
  HULLKIT_DEVICE bool enters(int i, double rise) const { return rise > 0.0 && rise > kAtBound * p_.squared(i); }
  // What is left of squared norms, once it is below pivot() of them, is rounding.
  HULLKIT_DEVICE double pivot() const { return rough_ ? 1e-6 : kPivot; }
  static constexpr double kPivot = 2e-14;
  static constexpr double kAtBound = 1e-14;

  HULLKIT_DEVICE bool support_full() const { return num_touched_ >= params_.max_support; }

  HULLKIT_DEVICE void touch(int i) {
    if (m_.slot[i] >= 0) return;
    p_.touch(i, m_.scores);
    p_.sync();
    p_.each(0, 1, [&](int) {
      m_.slot[i] = num_touched_;
      m_.touched[num_touched_] = i;
    });
    ++num_touched_;
  }

  HULLKIT_DEVICE static double larger(double a, double b) { return a > b ? a : b; }
  // The square root or up to 7 % more: half the exponent. A threshold needs no more, and a GPU is slow at roots.
  HULLKIT_DEVICE static double root(double squared) {
    uint64_t bits;
    std::memcpy(&bits, &squared, sizeof(bits));
    bits = (bits >> 1) + (uint64_t{1023} << 51);
    std::memcpy(&squared, &bits, sizeof(bits));
    return squared;
  }
  HULLKIT_DEVICE static double smaller(double a, double b) { return a < b ? a : b; }

  // The vertex of the capped simplex with the largest product with the query.
  HULLKIT_DEVICE void start() {
    const int n = p_.size(), k = static_cast<int>(simplex_.size);
    p_.each(0, n, [&](int i) {
      m_.weights[i] = 0.0;
      m_.scores[i] = p_.base(i);
      m_.slot[i] = -1;
      m_.is_free[i] = 0;
    });
    find_vertex();
    for (int r = 0; r < k; ++r) touch(m_.vertex[r]);
    p_.each(0, k, [&](int r) { m_.weights[m_.vertex[r]] = vertex_weight(r); });
    if (support_full()) return;
    p_.subtract_iterate(m_.touched, m_.weights, num_touched_, m_.scores);
    if (params_.variant != Variant::kFullyCorrective) return;
    lift_ = p_.squared(m_.vertex[0]) > 0.0 ? p_.squared(m_.vertex[0]) : 1.0;
    if (simplex_.last < simplex_.cap) join(m_.vertex[k - 1]);
  }

  HULLKIT_DEVICE double vertex_weight(int rank) const {
    return rank + 1 < simplex_.size ? simplex_.cap : simplex_.last;
  }

  // The LMO over the capped simplex at the current scores.
  HULLKIT_DEVICE void find_vertex() {
    if (simplex_.size == 1) {
      const auto best = p_.best([&](int i) { return m_.scores[i]; });
      p_.each(0, 1, [&](int) { m_.vertex[0] = best.index; });
      vertex_score_ = best.value;
      return;
    }
    p_.rank(m_.scores, static_cast<int>(simplex_.size), m_.vertex);
    vertex_score_ = 0.0;
    for (int r = 0; r < simplex_.size; ++r) vertex_score_ += vertex_weight(r) * m_.scores[m_.vertex[r]];
  }

  HULLKIT_DEVICE void measure() {
    query_iterate_ = residual_iterate_ = mean_base_ = mean_length_ = 0.0;
    for (int t = 0; t < num_touched_; ++t) {
      const int i = m_.touched[t];
      const double product = m_.weights[i] * p_.base(i);
      query_iterate_ += product;
      residual_iterate_ += m_.weights[i] * m_.scores[i];
      mean_base_ += larger(product, -product);
      mean_length_ += m_.weights[i] * length(i);
    }
  }

  HULLKIT_DEVICE bool converged() {
    double squared = p_.query_squared() - query_iterate_ - residual_iterate_;
    if (squared <= (rough_ ? 1e-5 : 1e-10) * larger(p_.query_squared(), mean_length_ * mean_length_))
      squared = p_.residual_squared(m_.touched, m_.weights, num_touched_);
    return std::sqrt(larger(squared, 0.0)) < params_.tol;
  }

  // One iteration.
  HULLKIT_DEVICE Step step() {
    switch (params_.variant) {
      case Variant::kVanilla:
        return capped_step();
      case Variant::kAway:
        return away_step();
      case Variant::kPairwise:
        return pairwise_step();
      default:
        return corrective_step();
    }
  }

  // Towards the LMO's answer, a mean of k candidates.
  HULLKIT_DEVICE Step capped_step() {
    const int n = p_.size(), k = static_cast<int>(simplex_.size);
    int fresh = 0;
    for (int r = 0; r < k; ++r) fresh += m_.slot[m_.vertex[r]] < 0;
    if (num_touched_ + fresh > params_.max_support) return Step::kMaxSupport;
    for (int r = 0; r < k; ++r) touch(m_.vertex[r]);
    double* const products = m_.direction;
    p_.each(0, n, [&](int j) { products[j] = 0.0; });
    for (int r = 0; r < k; ++r) {
      const auto* const column = p_.column(m_.vertex[r]);
      const double weight = vertex_weight(r);
      p_.each(0, n, [&](int j) { products[j] += weight * static_cast<double>(column[j]); });
    }
    double vertex_squared = 0.0, vertex_iterate = 0.0, vertex_length = 0.0;
    for (int r = 0; r < k; ++r) {
      const int i = m_.vertex[r];
      vertex_squared += vertex_weight(r) * products[i];
      vertex_iterate += vertex_weight(r) * (p_.base(i) - m_.scores[i]);
      vertex_length += vertex_weight(r) * length(i);
    }
    const double iterate_squared = query_iterate_ - residual_iterate_;
    const double length_squared = vertex_squared - 2.0 * vertex_iterate + iterate_squared;
    const double slope = vertex_score_ - residual_iterate_;
    if (length_squared < kStalledSquaredNorm || slope <= gain(vertex_length)) return Step::kStalled;
    const double step = smaller(slope / length_squared, 1.0);
    p_.sync();
    p_.each(0, n, [&](int j) {
      m_.weights[j] *= 1.0 - step;
      m_.scores[j] = (1.0 - step) * m_.scores[j] + step * (p_.base(j) - products[j]);
    });
    p_.each(0, k, [&](int r) {
      double& weight = m_.weights[m_.vertex[r]];
      weight = smaller(weight + step * vertex_weight(r), simplex_.cap);
    });
    return Step::kContinue;
  }

  // The touched vertex with the least score among those with weight.
  HULLKIT_DEVICE int worst() const {
    int worst = -1;
    for (int t = 0; t < num_touched_; ++t) {
      const int i = m_.touched[t];
      if (!(m_.weights[i] > 0.0)) continue;
      if (worst < 0 || m_.scores[i] < m_.scores[worst] || (m_.scores[i] == m_.scores[worst] && i < worst)) worst = i;
    }
    return worst;
  }

  HULLKIT_DEVICE Step away_step() {
    const int best = m_.vertex[0], worst = this->worst();
    const double toward = vertex_score_ - residual_iterate_, away = residual_iterate_ - m_.scores[worst];
    if (toward <= gain(length(best))) return Step::kStalled;
    const bool forward = toward >= away;
    const int i = forward ? best : worst;
    touch(i);
    const double own = m_.weights[i], iterate_squared = query_iterate_ - residual_iterate_;
    const double length_squared = larger(p_.squared(i) - 2.0 * (p_.base(i) - m_.scores[i]) + iterate_squared,
                                         pivot() * larger(p_.squared(i), mean_length_ * mean_length_));
    const double longest = forward ? 1.0 : own / (1.0 - own);
    const double step = smaller((forward ? toward : away) / length_squared, longest);
    const double share = forward ? step : -step;  // of the vertex in the new iterate
    const bool dropped = !forward && step == longest;
    const auto* const column = p_.column(i);
    p_.sync();
    p_.each(0, p_.size(), [&](int j) {
      const double moved = (1.0 - share) * m_.weights[j];
      m_.weights[j] = j != i ? moved : dropped ? 0.0 : larger(moved + share, 0.0);
      m_.scores[j] = (1.0 - share) * m_.scores[j] + share * (p_.base(j) - static_cast<double>(column[j]));
    });
    return Step::kContinue;
  }

  HULLKIT_DEVICE Step pairwise_step() {
    const auto best = p_.best([&](int i) { return m_.weights[i] < simplex_.cap ? m_.scores[i] : -INFINITY; });
    const int to = best.index, from = worst();
    const double slope = best.value - m_.scores[from];
    if (to < 0 || slope <= gain(larger(length(to), length(from)))) return Step::kStalled;
    touch(to);
    const auto* const gained = p_.column(to);
    const auto* const lost = p_.column(from);
    const double length_squared = larger(p_.squared(to) + p_.squared(from) - 2.0 * static_cast<double>(gained[from]),
                                         pivot() * larger(p_.squared(to), p_.squared(from)));
    const double room = simplex_.cap - m_.weights[to], own = m_.weights[from];
    const double step = smaller(slope / length_squared, smaller(room, own));
    p_.sync();
    p_.each(0, p_.size(),
            [&](int j) { m_.scores[j] -= step * (static_cast<double>(gained[j]) - static_cast<double>(lost[j])); });
    p_.each(0, 1, [&](int) {
      m_.weights[to] = step == room ? simplex_.cap : m_.weights[to] + step;
      m_.weights[from] = step == own ? 0.0 : own - step;
    });
    return Step::kContinue;
  }

  // Frees the candidate that gains most, from 0 or from the cap, then minimises over all free ones.
  HULLKIT_DEVICE Step corrective_step() {
    if (factor_.size() == 0) {  // all weights are at a bound: the cheapest of them is what another may take from
      join(worst());
    }
    double level = 0.0, least = INFINITY, most = -INFINITY;  // scores of the free ones, all alike at their optimum
    double longest_squared = 0.0;
    for (int r = 0; r < factor_.size(); ++r) {
      const double score = m_.scores[m_.free[r]];
      level += score / factor_.size();
      least = smaller(least, score);
      most = larger(most, score);
      longest_squared = larger(longest_squared, p_.squared(m_.free[r]));
    }
    const double longest = root(longest_squared);
    const auto waits = [&](int i) { return m_.weights[i] == 0.0 && !m_.is_free[i]; };
    auto up = p_.best([&](int i) { return waits(i) ? m_.scores[i] : -INFINITY; });
    if (up.index >= 0 && !enters(up.index, up.value - level))  // mostly the first one does
      up = p_.best([&](int i) { return waits(i) && enters(i, m_.scores[i] - level) ? m_.scores[i] : -INFINITY; });
    const auto down = p_.best([&](int i) { return at_cap(i) ? -m_.scores[i] : -INFINITY; });
    const double rise = up.value - level, fall = down.value + level;
    int entering = rise >= fall ? up.index : down.index;
    if (entering >= 0 && larger(rise, fall) > gain(larger(longest, length(entering)))) {
      join(entering);
    } else if (most - least > gain(longest)) {
      entering = -1;
    } else {
      return Step::kStalled;
    }
    const bool moved = correct();
    p_.subtract_iterate(m_.touched, m_.weights, num_touched_, m_.scores);
    // Another's bound may have kept it from moving, but that one has left.
    return moved || (entering >= 0 && m_.is_free[entering]) ? Step::kContinue : Step::kStalled;
  }

  HULLKIT_DEVICE bool at_cap(int i) const { return m_.weights[i] >= simplex_.cap && !m_.is_free[i]; }

  // Makes candidate i free. The factor is that of the products of the free candidates plus one constant, as if all had
  // one more, equal coordinate. So it exists wherever they are affinely independent, and a direction whose sum is 0
  // does not see the constant.
  HULLKIT_DEVICE void join(int i) {
    touch(i);
    const int size = factor_.size();
    const auto* const column = p_.column(i);
    p_.each(0, size, [&](int r) { m_.direction[r] = static_cast<double>(column[m_.free[r]]) + lift_; });
    const double own = p_.squared(i) + lift_;
    // What is left of the constant is float64 rounding.
    factor_.append(m_.direction, own, larger(pivot() * p_.squared(i), kPivot * own));
    p_.each(0, 1, [&](int) {
      m_.free[size] = i;
      m_.is_free[i] = 1;
    });
  }

  HULLKIT_DEVICE void leave(int place) {
    factor_.remove(place);
    p_.each(0, 1, [&](int) {
      m_.is_free[m_.free[place]] = 0;
      for (int r = place; r < factor_.size(); ++r) {
        m_.free[r] = m_.free[r + 1];
        m_.free_scores[r] = m_.free_scores[r + 1];
      }
    });
  }

  // Moves the free weights to the minimum over their affine hull. Weights that meet a bound on the way stay there and
  // are no longer free (Wolfe). False if nothing moved.
  HULLKIT_DEVICE bool correct() {
    p_.each(0, factor_.size(), [&](int r) { m_.free_scores[r] = m_.scores[m_.free[r]]; });
    bool moved = false;
    while (factor_.size() > 1) {
      const int size = factor_.size();
      p_.each(0, size, [&](int r) {
        m_.direction[r] = m_.free_scores[r];
        m_.ones[r] = 1.0;
      });
      factor_.solve(m_.direction, m_.ones);
      double sum = 0.0, of_ones = 0.0;
      for (int r = 0; r < size; ++r) {
        sum += m_.direction[r];
        of_ones += m_.ones[r];
      }
      const double level = sum / of_ones;  // all scores, once there
      double step = 1.0;
      int blocking = -1;
      bool to_cap = false, changes = false;
      for (int r = 0; r < size; ++r) {
        const double change = m_.direction[r] - level * m_.ones[r], weight = m_.weights[m_.free[r]];
        changes |= change != 0.0;
        const double room = change < 0.0 ? weight : simplex_.cap - weight;
        const double speed = change < 0.0 ? -change : change;
        if (room < step * speed) {
          step = room / speed;
          blocking = r;
          to_cap = change > 0.0;
        }
      }
      moved |= changes && step > 0.0;
      p_.sync();
      p_.each(0, size, [&](int r) {
        double& weight = m_.weights[m_.free[r]];
        double there = weight + step * (m_.direction[r] - level * m_.ones[r]);
        if (there < kAtBound) there = 0.0;  // one that is left of weights at their bounds may have met its own
        if (simplex_.cap - there < kAtBound) there = simplex_.cap;
        weight = r == blocking ? (to_cap ? simplex_.cap : 0.0) : there;
        m_.free_scores[r] = (1.0 - step) * m_.free_scores[r] + step * level;
      });
      if (blocking < 0) break;
      // As one falls from the cap to 0, another may rise from 0 to the cap. Which of them blocked is rounding: both
      // leave.
      for (int r = size; r-- > 0;) {
        const double weight = m_.weights[m_.free[r]];
        if (r == blocking || (step > 0.0 && (weight == 0.0 || weight == simplex_.cap))) leave(r);
      }
    }
    return moved;
  }

  Problem& p_;
  const FrankWolfeParams params_;
  const CappedSimplex simplex_;
  const ActiveSetMemory m_;
  Cholesky<Problem> factor_;
  const bool rough_;
  double lift_ = 0.0;
  double query_iterate_ = 0.0, residual_iterate_ = 0.0;
  double mean_base_ = 0.0, mean_length_ = 0.0;  // by weight, of |<x_i, query>| and of ||x_i||
  double vertex_score_ = 0.0;
  int num_touched_ = 0;
  int64_t num_iters_ = 0;
};

}  // namespace hullkit
