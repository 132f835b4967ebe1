// SPDX-License-Identifier: Apache-2.0
// Chooses the instruction set once per process.
#ifdef HULLKIT_X86
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>

#include "hullkit/check.h"
#include "simd/simd.h"

namespace hullkit {
namespace {

#ifdef HULLKIT_X86
// clang before 17 does not know the name in __builtin_cpu_supports.
bool supports_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

const Simd& choose() {
  const AvailableSimds available = available_simds();
  const Simd& best = *available.sets[available.count - 1];
  const char* wanted = std::getenv("HULLKIT_SIMD");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (int i = 0; i < available.count; ++i) {
    if (std::strcmp(available.sets[i]->name, wanted) == 0) return *available.sets[i];
  }
  throw_value_error("HULLKIT_SIMD: expected one of portable, avx2, avx512, neon that this processor has (up to ",
                    best.name, "), got ", wanted);
}

}  // namespace

AvailableSimds available_simds() {
  AvailableSimds available{{&kSimdPortable}, 1};
#if defined(HULLKIT_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && supports_f16c();
  if (avx2) available.sets[available.count++] = &kSimdAvx2;
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    available.sets[available.count++] = &kSimdAvx512;
  }
#elif defined(HULLKIT_ARM64)
  available.sets[available.count++] = &kSimdNeon;  // every 64-bit ARM processor has it
#endif
  return available;
}

const Simd& simd() {
  static const Simd& chosen = choose();
  return chosen;
}

}  // namespace hullkit
