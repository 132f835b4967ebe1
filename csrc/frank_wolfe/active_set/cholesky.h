// SPDX-License-Identifier: Apache-2.0
// The Cholesky factor of a matrix that gains and loses rows one at a time.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define HULLKIT_DEVICE __device__  // shared by a CPU's thread and a GPU's block of threads
#else
#define HULLKIT_DEVICE
#endif

namespace hullkit {

// Lower triangular L with A = L L^T, rows one behind the other: size (size + 1) / 2 numbers. Team: one thread, or many
// that all call the same functions with the same arguments; team.each(begin, end, f) calls f(i) for each i once, by any
// of them, and returns when all calls have. team.grown(rows, count) is `rows`, or where they were moved to, with room
// for `count` numbers.
template <typename Team>
class Cholesky {
 public:
  HULLKIT_DEVICE Cholesky(Team& team, double* rows) : team_(team), rows_(rows) {}

  HULLKIT_DEVICE int size() const { return size_; }

  // Adds a row and column to A: entries [size], overwritten, and its own diagonal. A pivot below least_pivot (what is
  // left of the diagonal, that is) is taken to be that: the row nearly depends on the others.
  HULLKIT_DEVICE void append(double* entries, double diagonal, double least_pivot) {
    rows_ = team_.grown(rows_, (size_ + int64_t{1}) * (size_ + 2) / 2);
    forward(entries, entries);
    double* const out = row(size_);
    double pivot = diagonal;
    for (int c = 0; c < size_; ++c) {
      const double entry = entries[c] / row(c)[c];
      pivot -= entry * entry;
    }
    team_.each(0, size_ + 1, [&](int c) {
      out[c] = c < size_ ? entries[c] / row(c)[c] : std::sqrt(pivot > least_pivot ? pivot : least_pivot);
    });
    ++size_;
  }

  // Takes row and column `place` out of A; those behind it move up.
  HULLKIT_DEVICE void remove(int place) {
    for (int c = place; c + 1 < size_; ++c) {  // rotates the entry right of the diagonal-to-be into it
      const double a = row(c + 1)[c], b = row(c + 1)[c + 1];
      const double length = std::sqrt(a * a + b * b), cosine = a / length, sine = b / length;
      team_.sync();
      team_.each(c + 1, size_, [&](int r) {
        double* const entries = row(r);
        const double left = entries[c], right = entries[c + 1];
        entries[c] = cosine * left + sine * right;
        entries[c + 1] = cosine * right - sine * left;
      });
    }
    for (int r = place + 1; r < size_; ++r) {
      team_.each(0, r, [&](int c) { row(r - 1)[c] = row(r)[c]; });
    }
    --size_;
  }

  // Solves A x = b for two right-hand sides [size], in place.
  HULLKIT_DEVICE void solve(double* first, double* second) {
    forward(first, second);
    team_.each(0, size_, [&](int r) {
      first[r] /= row(r)[r];
      second[r] /= row(r)[r];
    });
    for (int c = size_ - 1; c >= 0; --c) {
      const double* const entries = row(c);
      const double x = first[c] / entries[c], y = second[c] / entries[c];
      team_.each(0, c, [&](int r) {
        first[r] -= entries[r] * x;
        second[r] -= entries[r] * y;
      });
    }
    team_.each(0, size_, [&](int r) {
      first[r] /= row(r)[r];
      second[r] /= row(r)[r];
    });
  }

 private:
  HULLKIT_DEVICE double* row(int r) const { return rows_ + static_cast<int64_t>(r) * (r + 1) / 2; }

  // L y = b, but for the division of every y_c by L_cc, which nobody waits for. `second` may be `first`.
  HULLKIT_DEVICE void forward(double* first, double* second) {
    for (int c = 0; c < size_; ++c) {
      const double x = first[c] / row(c)[c], y = second[c] / row(c)[c];
      team_.each(c + 1, size_, [&](int r) {
        const double entry = row(r)[c];
        first[r] -= entry * x;
        if (second != first) second[r] -= entry * y;
      });
    }
  }

  Team& team_;
  double* rows_;
  int size_ = 0;
};

}  // namespace hullkit
