// SPDX-License-Identifier: Apache-2.0
// The selections of the core on calls that a fuzzer makes up. Whatever fits together gives what the headers promise, or
// an error of the core's, and gives the same bits whatever the number of threads.
#include <set>

#include "fuzz/problem.h"
#include "hullkit/apportion.h"
#include "hullkit/duplicates.h"
#include "hullkit/knn.h"
#include "hullkit/lmo.h"
#include "hullkit/select.h"
#include "hullkit/sift.h"
#include "sift/check_params.h"

namespace hullkit::fuzz {
namespace {

// Runs a call with one thread and with three; false if it was refused, both times.
template <typename Outputs, typename Run>
bool agree(Outputs& once, Outputs& again, Run&& run) {
  const auto runs = [&](Outputs& outputs, int num_threads) {
    try {
      run(outputs, num_threads);
      return true;
    } catch (const ValueError&) {
      return false;
    } catch (const NotImplementedError&) {
      return false;
    }
  };
  const bool ran = runs(once, 1);
  require(runs(again, 3) == ran);
  if (ran) require(once.same(again));
  return ran;
}

void fuzz_lmo(Input& input) {
  struct Outputs {
    Buffer index, value;
    bool same(const Outputs& other) const { return index.same(other.index) && value.same(other.value); }
  };
  const Problem problem(input, false);
  const int64_t batch = problem.batch();
  const auto make = [&] { return Outputs{{DType::kInt64, {batch}}, {DType::kFloat64, {batch}}}; };
  Outputs once = make(), again = make();
  const bool ran = agree(once, again, [&](Outputs& out, int num_threads) {
    lmo_cpu(problem.pool(), problem.query(), out.index.view(), out.value.view(), num_threads);
  });
  for (int64_t b = 0; ran && b < batch; ++b) require(problem.valid(b, once.index.get<int64_t>(b)));
}

void fuzz_knn(Input& input) {
  struct Outputs {
    Buffer indices, values;
    bool same(const Outputs& other) const { return indices.same(other.indices) && values.same(other.values); }
  };
  const Problem problem(input, false);
  const int64_t batch = problem.batch(), k = input.between(1, problem.positions());
  const auto make = [&] { return Outputs{{DType::kInt64, {batch, k}}, {DType::kFloat64, {batch, k}}}; };
  Outputs once = make(), again = make();
  const bool ran = agree(once, again, [&](Outputs& out, int num_threads) {
    knn_cpu(problem.pool(), problem.query(), out.indices.view(), out.values.view(), num_threads);
  });
  for (int64_t b = 0; ran && b < batch; ++b) {
    std::set<int64_t> seen;
    for (int64_t i = 0; i < k; ++i) {
      const int64_t index = once.indices.get<int64_t>(b, i);
      if (index == -1) continue;  // fewer candidates than k
      require(problem.valid(b, index) && seen.insert(index).second);
      if (i > 0) require(once.values.get<double>(b, i) <= once.values.get<double>(b, i - 1));
    }
  }
}

void fuzz_duplicates(Input& input) {
  const Problem problem(input, false);
  const int64_t batch = problem.batch();
  const double eps = input.one_of({1e-12, 0.01, 0.5, 1.0, 2.0, 1e-300});
  struct Outputs {
    Buffer representatives;
    bool same(const Outputs& other) const { return representatives.same(other.representatives); }
  };
  const auto make = [&] { return Outputs{{DType::kInt64, {batch, problem.positions()}}}; };
  Outputs once = make(), again = make();
  const bool ran = agree(once, again, [&](Outputs& out, int num_threads) {
    duplicates_cpu(problem.pool(), eps, out.representatives.view(), num_threads);
  });
  for (int64_t b = 0; ran && b < batch; ++b) {
    for (int64_t i = 0; i < problem.positions(); ++i) {
      const int64_t first = once.representatives.get<int64_t>(b, i);
      if (!problem.valid(b, i)) {
        require(first == -1);
      } else {
        require(first >= 0 && first <= i && once.representatives.get<int64_t>(b, first) == first);
      }
    }
  }
}

struct Selected {
  Selected(int64_t batch, int64_t places)
      : indices(DType::kInt64, {batch, places}),
        weights(DType::kFloat64, {batch, places}),
        support_size(DType::kInt64, {batch}),
        residual_norm(DType::kFloat64, {batch}),
        dual_gap(DType::kFloat64, {batch}),
        num_iters(DType::kInt64, {batch}),
        status(DType::kInt64, {batch}),
        counts(DType::kInt64, {batch, places}),
        counts_residual_norm(DType::kFloat64, {batch}) {}
  FrankWolfeResult result() const {
    return {indices.view(),  weights.view(),   support_size.view(), residual_norm.view(),
            dual_gap.view(), num_iters.view(), status.view()};
  }
  bool same(const Selected& other) const {
    return indices.same(other.indices) && weights.same(other.weights) && support_size.same(other.support_size) &&
           residual_norm.same(other.residual_norm) && dual_gap.same(other.dual_gap) &&
           num_iters.same(other.num_iters) && status.same(other.status) && counts.same(other.counts) &&
           counts_residual_norm.same(other.counts_residual_norm);
  }
  Buffer indices, weights, support_size, residual_norm, dual_gap, num_iters, status, counts, counts_residual_norm;
};

void fuzz_select(Input& input) {
  const Problem problem(input, false);
  const int64_t batch = problem.batch();
  FrankWolfeParams params;
  params.max_support = input.one_of<int64_t>({1, 2, 3, 10, 50, int64_t{1} << 40});
  params.max_iters = input.one_of<int64_t>({0, 1, 7, 100});
  params.tol = input.one_of({0.0, 1e-5, 0.1, 1e300});
  params.gap_tol = input.one_of({-1.0, 0.0, 1e-3});
  params.variant = static_cast<Variant>(input.between(-1, 4));
  params.max_weight = input.one_of({1.0, 2.0, 0.5, 0.1, 1e-3, -1.0, std::nan("")});
  RoundingParams rounding;
  rounding.total = input.one_of<int64_t>({1, 2, 7, 50, 1000, kMaxTotal});
  rounding.exchange_passes = input.between(0, 3);
  rounding.max_multiplicity = input.one_of<int64_t>({kMaxTotal, 1, 2, 50, kMaxTotal / 2});
  const bool round = input.flip();
  int64_t places;
  try {
    check_pool(problem.pool(), batch);
    check_options(params, problem.positions());
    check_options(rounding);
    if (round) check_options(params, rounding);
    places = most_touched(params, problem.positions());
  } catch (const ValueError&) {
    return;
  }
  Selected once(batch, places), again(batch, places);
  const bool ran = agree(once, again, [&](Selected& out, int num_threads) {
    if (round) {
      select_cpu(problem.pool(), problem.query(), params, rounding, out.result(), out.counts.view(),
                 out.counts_residual_norm.view(), num_threads);
    } else {
      frank_wolfe_cpu(problem.pool(), problem.query(), params, out.result(), num_threads);
    }
  });
  for (int64_t b = 0; ran && b < batch; ++b) {
    double sum = 0.0;
    int64_t counts = 0;
    std::set<int64_t> seen;
    for (int64_t s = 0; s < places; ++s) {
      const int64_t index = once.indices.get<int64_t>(b, s);
      const double weight = once.weights.get<double>(b, s);
      require(weight >= 0.0);
      sum += weight;
      if (index == -1) {
        require(weight == 0.0);
      } else {
        require(problem.valid(b, index) && seen.insert(index).second);
      }
      if (!round) continue;
      const int64_t count = once.counts.get<int64_t>(b, s);
      require(count >= 0 && count <= rounding.max_multiplicity && (index >= 0 || count == 0));
      counts += count;
    }
    require(std::abs(sum - 1.0) < 1e-9);
    require(static_cast<int64_t>(seen.size()) == once.support_size.get<int64_t>(b));
    const int64_t status = once.status.get<int64_t>(b);
    require(status >= 0 && status <= 5 && status != static_cast<int64_t>(Status::kBroken));
    if (round) require(counts == rounding.total);
  }
}

void fuzz_sift(Input& input) {
  struct Outputs {
    Buffer order, variance, indices, counts, num_steps;
    bool same(const Outputs& other) const {
      return order.same(other.order) && variance.same(other.variance) && indices.same(other.indices) &&
             counts.same(other.counts) && num_steps.same(other.num_steps);
    }
  };
  const Problem problem(input, true);
  const int64_t batch = problem.batch();
  const SiftParams params{input.between(1, 60), input.one_of({0.01, 1e-6, 1e-300, 1e6, 0.0}),
                          input.one_of({0.0, 0.05, 10.0}), input.one_of<int64_t>({1000, 1, 2, 7})};
  const int64_t total = params.total, places = std::min(total, problem.positions());
  const auto make = [&] {
    return Outputs{{DType::kInt64, {batch, total}},
                   {DType::kFloat64, {batch, total}},
                   {DType::kInt64, {batch, places}},
                   {DType::kInt64, {batch, places}},
                   {DType::kInt64, {batch}}};
  };
  Outputs once = make(), again = make();
  const bool ran = agree(once, again, [&](Outputs& out, int num_threads) {
    sift_cpu(problem.pool(), problem.query(), params,
             {out.order.view(), out.variance.view(), out.indices.view(), out.counts.view(), out.num_steps.view()},
             num_threads);
  });
  for (int64_t b = 0; ran && b < batch; ++b) {
    const int64_t steps = once.num_steps.get<int64_t>(b);
    int64_t counts = 0;
    for (int64_t s = 0; s < places; ++s) counts += once.counts.get<int64_t>(b, s);
    require(steps >= 1 && steps <= total && counts == steps);
    for (int64_t t = 0; t < total; ++t) {
      require(t < steps ? problem.valid(b, once.order.get<int64_t>(b, t)) : once.order.get<int64_t>(b, t) == -1);
      require(once.variance.get<double>(b, t) >= 0.0);
      if (t > 0) require(once.variance.get<double>(b, t) <= once.variance.get<double>(b, t - 1));
    }
  }
}

void fuzz_apportion(Input& input) {
  const int64_t batch = input.between(0, 3), size = input.between(1, 9);
  const int64_t total = input.one_of<int64_t>({1, 2, 50, 1000, kMaxTotal});
  Buffer weights(DType::kFloat64, {batch, size});
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t s = 0; s < size; ++s) *weights.view().at<double>(b, s) = value_of(input.byte());
  }
  struct Outputs {
    Buffer counts;
    bool same(const Outputs& other) const { return counts.same(other.counts); }
  };
  Outputs once{{DType::kInt64, {batch, size}}}, again{{DType::kInt64, {batch, size}}};
  const bool ran = agree(once, again, [&](Outputs& out, int num_threads) {
    apportion_cpu(weights.view(), total, out.counts.view(), num_threads);
  });
  for (int64_t b = 0; ran && b < batch; ++b) {
    int64_t counts = 0;
    for (int64_t s = 0; s < size; ++s) {
      require(once.counts.get<int64_t>(b, s) >= 0);
      counts += once.counts.get<int64_t>(b, s);
    }
    require(counts == total);
  }
}

}  // namespace
}  // namespace hullkit::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace hullkit::fuzz;
  Input input(data, size);
  switch (input.byte() % 6) {
    case 0:
      fuzz_lmo(input);
      break;
    case 1:
      fuzz_knn(input);
      break;
    case 2:
      fuzz_duplicates(input);
      break;
    case 3:
      fuzz_select(input);
      break;
    case 4:
      fuzz_sift(input);
      break;
    default:
      fuzz_apportion(input);
  }
  return 0;
}
