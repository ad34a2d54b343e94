#include "cpu/features.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <map>

namespace hybrid {
namespace {

using Features = std::map<std::string, bool>;

uint64_t saved_state() {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_OSXSAVE)) return 0;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
}

// Linux hands out tiles only to processes that asked. Asking is for the whole process, its later threads included, and
// may be done again; a refusal (an old kernel, a seccomp filter) leaves AMX out, as on a processor without it.
bool tiles_granted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

Features read_features() {
  unsigned eax = 0, ebx1 = 0, ecx1 = 0, edx1 = 0, ebx7 = 0, ecx7 = 0, edx7 = 0, eax71 = 0, unused = 0;
  __get_cpuid(1, &eax, &ebx1, &ecx1, &edx1);
  __get_cpuid_count(7, 0, &eax, &ebx7, &ecx7, &edx7);
  if (eax >= 1) __get_cpuid_count(7, 1, &eax71, &unused, &unused, &unused);
  const uint64_t state = saved_state();
  const bool ymm = (state & 0x06) == 0x06, zmm = (state & 0xe6) == 0xe6, tiles = (state & 0x60000) == 0x60000;
  const bool amx_tile = tiles && (edx7 & (1u << 24)), amx_bf16 = tiles && (edx7 & (1u << 22)),
             amx_int8 = tiles && (edx7 & (1u << 25));
  return {{"avx2", ymm && (ebx7 & bit_AVX2)},
          {"fma", ymm && (ecx1 & bit_FMA)},
          {"f16c", ymm && (ecx1 & bit_F16C)},
          {"avx512f", zmm && (ebx7 & bit_AVX512F)},
          {"avx512bw", zmm && (ebx7 & bit_AVX512BW)},
          {"avx512vl", zmm && (ebx7 & bit_AVX512VL)},
          {"avx512dq", zmm && (ebx7 & bit_AVX512DQ)},
          {"avx512_bf16", zmm && (eax71 & (1u << 5))},
          {"avx512_vnni", zmm && (ecx7 & (1u << 11))},
          {"avx512vbmi", zmm && (ecx7 & (1u << 1))},
          {"amx_tile", amx_tile},
          {"amx_bf16", amx_bf16},
          {"amx_int8", amx_int8},
          {"amx_permission", !(amx_tile && amx_bf16 && amx_int8) || tiles_granted()}};
}

}  // namespace

bool has_feature(const std::string& name) {
  static const Features features = read_features();
  return features.at(name);
}

// Measured on Zen 4, Zen 5 and an Intel Xeon (docs/kernels.md); Zen 3, of the family of Zen 4, was not tried.
Reading suited_reading() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid(0, &eax, &ebx, &ecx, &edx) || ebx != signature_AMD_ebx) return Reading::far;
  __get_cpuid(1, &eax, &ebx, &ecx, &edx);
  const unsigned family = (eax >> 8 & 15) + (eax >> 20 & 255);
  if (family == 0x19) return Reading::ordered;
  return family > 0x19 ? Reading::near : Reading::far;
}

}  // namespace hybrid
