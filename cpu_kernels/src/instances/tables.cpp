#include "instances/tables.h"

#include <algorithm>
#include <stdexcept>

#include "cpu/features.h"

namespace hybrid {

// Weak: a build has those that HYBRID_ISAS names (CMakeLists.txt).
[[gnu::weak]] extern const KernelTable kernels_portable;
[[gnu::weak]] extern const KernelTable kernels_avx2;
[[gnu::weak]] extern const KernelTable kernels_avx512;
[[gnu::weak]] extern const KernelTable kernels_avx512_bf16;
[[gnu::weak]] extern const KernelTable kernels_amx;

namespace {

using Names = std::vector<std::string>;

struct Isa {
  const KernelTable* table;
  Names needs;
};

Names operator+(Names names, const Names& more) {
  names.insert(names.end(), more.begin(), more.end());
  return names;
}

// Best first.
std::vector<Isa> known_isas() {
  const Names avx2 = {"avx2", "fma", "f16c"};
  const Names avx512 = avx2 + Names{"avx512f", "avx512bw", "avx512vl", "avx512dq"};
  const Names avx512_bf16 = avx512 + Names{"avx512_bf16", "avx512_vnni", "avx512vbmi"};
  const Names amx = avx512_bf16 + Names{"amx_tile", "amx_bf16", "amx_int8", "amx_permission"};
  std::vector<Isa> known = {{&kernels_amx, amx},
                            {&kernels_avx512_bf16, avx512_bf16},
                            {&kernels_avx512, avx512},
                            {&kernels_avx2, avx2},
                            {&kernels_portable, {}}};
  known.erase(std::remove_if(known.begin(), known.end(), [](const Isa& isa) { return !isa.table; }), known.end());
  return known;
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

std::vector<std::string> missing_features(const std::string& isa) {
  std::vector<std::string> missing;
  for (const std::string& feature : find(isa).needs)
    if (!has_feature(feature)) missing.push_back(feature);
  return missing;
}

const KernelTable& table_of(const std::string& isa) {
  std::string missing;
  for (const std::string& feature : missing_features(isa)) missing += " " + feature;
  if (missing.empty()) return *find(isa).table;
  throw std::invalid_argument("instruction set '" + isa + "' cannot run on this machine, which lacks:" + missing);
}

const ProductSizes& sizes_of(const std::string& isa) { return find(isa).table->sizes; }

}  // namespace hybrid
