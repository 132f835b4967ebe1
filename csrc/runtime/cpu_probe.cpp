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
  const Simd* available[3] = {&kSimdPortable};
  int count = 1;
#ifdef HULLKIT_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && supports_f16c();
  if (avx2) available[count++] = &kSimdAvx2;
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    available[count++] = &kSimdAvx512;
  }
#endif
  const char* wanted = std::getenv("HULLKIT_SIMD");
  if (wanted == nullptr || *wanted == '\0') return *available[count - 1];
  for (int i = 0; i < count; ++i) {
    if (std::strcmp(available[i]->name, wanted) == 0) return *available[i];
  }
  throw_value_error("HULLKIT_SIMD: expected one of portable, avx2, avx512 that this processor has (up to ",
                    available[count - 1]->name, "), got ", wanted);
}

}  // namespace

const Simd& simd() {
  static const Simd& chosen = choose();
  return chosen;
}

}  // namespace hullkit
