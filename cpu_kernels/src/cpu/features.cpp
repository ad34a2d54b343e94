#include "cpu/features.h"

#include <cpuid.h>

#include <stdexcept>

namespace hybrid {

extern const KernelTable kernels_portable;
extern const KernelTable kernels_avx2;
extern const KernelTable kernels_avx512;
extern const KernelTable kernels_avx512_bf16;

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
  return {
      {&kernels_avx512_bf16, avx512_bf16}, {&kernels_avx512, avx512}, {&kernels_avx2, avx2}, {&kernels_portable, {}}};
}

const Isa& find(const std::string& name) {
  static const std::vector<Isa> isas = known_isas();
  std::string names;
  for (const Isa& isa : isas) {
    if (name == isa.table->name) return isa;
    names += (names.empty() ? "" : ", ") + std::string(isa.table->name);
  }
  throw std::invalid_argument("instruction set '" + name + "' is unknown; known: " + names);
}

}  // namespace

std::vector<const KernelTable*> available_tables() {
  std::vector<const KernelTable*> tables;
  for (const Isa& isa : known_isas())
    if (missing_features(isa.table->name).empty()) tables.push_back(isa.table);
  return tables;
}

std::vector<std::string> missing_features(const std::string& name) {
  std::vector<std::string> missing;
  for (const Feature& feature : find(name).needs)
    if (!feature.present) missing.push_back(feature.name);
  return missing;
}

const KernelTable& table_of(const std::string& name) {
  std::string missing;
  for (const std::string& feature : missing_features(name)) missing += " " + feature;
  if (missing.empty()) return *find(name).table;
  throw std::invalid_argument("instruction set '" + name + "' cannot run on this machine, which lacks:" + missing);
}

}  // namespace hybrid
