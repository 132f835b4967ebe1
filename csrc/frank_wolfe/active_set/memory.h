// SPDX-License-Identifier: Apache-2.0
// What a run with an active set keeps.
#pragma once

namespace hullkit {

// Memory that the threads share, for n candidates of which at most `touched` are touched.
struct ActiveSetMemory {
  double* weights;      // [n]
  double* scores;       // [n] <residual, x_i>
  double* free_scores;  // [touched] and so on
  double* direction;    // also [n]: the LMO's answer of a capped step, as products with the candidates
  double* ones;
  double* factor;          // [touched (touched + 1) / 2]
  int* slot;               // [n] place among the touched, -1 if untouched
  int* touched;            // [touched] candidates in order of touching
  int* free;               // [touched] the free ones: weights between the bounds, in the order of the factor
  int* vertex;             // [1 / max_weight] the LMO's answer, best first
  unsigned char* is_free;  // [n]
};

}  // namespace hullkit
