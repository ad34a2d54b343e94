#include "cpu/features.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <stdexcept>

namespace hybrid {

extern const KernelTable kernels_portable;
extern const KernelTable kernels_avx2;
extern const KernelTable kernels_avx512;
extern const KernelTable kernels_avx512_bf16;
extern const KernelTable kernels_amx;

namespace {

struct Feature {
  const char* name;
  bool present;
};

struct Isa {
  const KernelTable* table;
  std::vector<Feature> needs;
};

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

// What AMX needs beyond AVX-512. A kernel that refuses is "amx_permission", which no processor lists.
std::vector<Feature> amx_features(unsigned edx7, uint64_t state) {
  const bool saved = (state & 0x60000) == 0x60000;
  const bool tile = saved && (edx7 & (1u << 24)), bf16 = saved && (edx7 & (1u << 22)),
             int8 = saved && (edx7 & (1u << 25));
  const bool all = tile && bf16 && int8;
  std::vector<Feature> features = {{"amx_tile", tile}, {"amx_bf16", bf16}, {"amx_int8", int8}};
  if (all) features.push_back({"amx_permission", tiles_granted()});
  return features;
}

std::vector<Isa> known_isas() {
  unsigned eax = 0, ebx1 = 0, ecx1 = 0, edx1 = 0, ebx7 = 0, ecx7 = 0, edx7 = 0, eax71 = 0, unused = 0;
  __get_cpuid(1, &eax, &ebx1, &ecx1, &edx1);
  __get_cpuid_count(7, 0, &eax, &ebx7, &ecx7, &edx7);
  if (eax >= 1) __get_cpuid_count(7, 1, &eax71, &unused, &unused, &unused);
  const uint64_t state = saved_state();
  const bool ymm = (state & 0x06) == 0x06, zmm = (state & 0xe6) == 0xe6;

  std::vector<Feature> avx2 = {
      {"avx2", ymm && (ebx7 & bit_AVX2)}, {"fma", ymm && (ecx1 & bit_FMA)}, {"f16c", ymm && (ecx1 & bit_F16C)}};
  std::vector<Feature> avx512 = avx2;
  for (const Feature& f : {Feature{"avx512f", zmm && (ebx7 & bit_AVX512F)},
                           {"avx512bw", zmm && (ebx7 & bit_AVX512BW)},
                           {"avx512vl", zmm && (ebx7 & bit_AVX512VL)},
                           {"avx512dq", zmm && (ebx7 & bit_AVX512DQ)}})
    avx512.push_back(f);
  std::vector<Feature> avx512_bf16 = avx512;
  avx512_bf16.push_back({"avx512_bf16", zmm && (eax71 & (1u << 5))});
  avx512_bf16.push_back({"avx512_vnni", zmm && (ecx7 & (1u << 11))});
  std::vector<Feature> amx = avx512_bf16;
  for (const Feature& f : amx_features(edx7, state)) amx.push_back(f);
  return {{&kernels_amx, amx},
          {&kernels_avx512_bf16, avx512_bf16},
          {&kernels_avx512, avx512},
          {&kernels_avx2, avx2},
          {&kernels_portable, {}}};
}

const std::vector<Isa>& isas() {
  static const std::vector<Isa> known = known_isas();
  return known;
}

const Isa& find(const std::string& name) {
  std::string names;
  for (const Isa& isa : isas()) {
    if (name == isa.table->name) return isa;
    names += (names.empty() ? "" : ", ") + std::string(isa.table->name);
  }
  throw std::invalid_argument("instruction set '" + name + "' is unknown; known: " + names);
}

}  // namespace

std::vector<const KernelTable*> available_tables() {
  std::vector<const KernelTable*> tables;
  for (const Isa& isa : isas())
    if (missing_features(isa.table->name).empty()) tables.push_back(isa.table);
  return tables;
}

std::vector<std::string> missing_features(const std::string& name) {
  std::vector<std::string> missing;
  for (const Feature& feature : find(name).needs)
    if (!feature.present) missing.push_back(feature.name);
  return missing;
}

// Zen 5, whose first-level cache waits for enough lines. Zen 4 is slower so, Intel's were not tried: docs/kernels.md.
bool should_fetch_near() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid(0, &eax, &ebx, &ecx, &edx) || ebx != signature_AMD_ebx) return false;
  __get_cpuid(1, &eax, &ebx, &ecx, &edx);
  const unsigned family = (eax >> 8 & 15) + (eax >> 20 & 255);
  return family >= 0x1a;
}

const KernelTable& table_of(const std::string& name) {
  std::string missing;
  for (const std::string& feature : missing_features(name)) missing += " " + feature;
  if (missing.empty()) return *find(name).table;
  throw std::invalid_argument("instruction set '" + name + "' cannot run on this machine, which lacks:" + missing);
}

}  // namespace hybrid
