// Kernels on tiles against themselves and against those of AVX-512: bits do not depend on how many rows are multiplied
// together if all take tiles, and those of int8 and of nvfp4 not on whether tiles are taken.
#include "layer.h"
#include "reference.h"

namespace hybrid {
extern const KernelTable kernels_amx, kernels_avx512_bf16;
}

namespace {

using namespace layer;

constexpr Shape kShapes[] = {{17, 63}, {40, 320}, {20, 580}};  // of gate and of up; both are one matrix to the others
constexpr int kRows[] = {1, 2, 6, 7, 15, 16, 17, 32, 33, 100};
const Kernels always{hybrid::kernels_amx, 1}, many{hybrid::kernels_amx, 0}, never{hybrid::kernels_avx512_bf16, 0};

struct Results {
  float gemm[kMaxRows][kMaxColumns], down[kMaxRows][kMaxColumns];
  hybrid::bf16 gate_up[kExperts][kMaxRows][kMaxColumns];  // by row of the input
};
Results on_tiles, others;

void clear_output() { memset(output, 0, sizeof output); }

// The work of all kernels on `rows` rows. False, and a line, if one writes behind its scratch or leaves tiles behind.
bool work(const Kernels& kernels, const Format& format, const Shape& shape, int rows, Results& results) {
  const int blocks = 2 * formats::rounded_up(shape.columns, kBlock) / kBlock;
  const Shape both{blocks * kBlock, shape.inputs}, ragged{blocks * kBlock - 5, shape.inputs};
  clear_output();
  bool passed = call_gemm(kernels, format, rows, ragged, true);
  memcpy(results.gemm, output, sizeof results.gemm);
  clear_output();
  passed &= call_down(kernels, format, rows, both, true);
  memcpy(results.down, output, sizeof results.down);
  passed &= call_gate_up(kernels, format, rows, shape, true);
  for (int expert = 0; expert < kExperts; ++expert)
    for (int i = offsets[expert]; i < offsets[expert + 1]; ++i)
      memcpy(results.gate_up[expert][routed_rows[i]], hidden[i],
             size_t(blocks) * kBlock);  // half as many columns of two bytes
  return passed;
}

// Whether the rows that both have are the same, bit for bit.
bool same(const Results& a, const Results& b, int rows, const Shape& shape) {
  bool equal = !memcmp(a.gemm, b.gemm, size_t(rows) * sizeof a.gemm[0]);
  equal &= !memcmp(a.down, b.down, size_t(rows) * sizeof a.down[0]);
  for (int expert = 0; expert < kExperts; ++expert)
    for (int row = 0; row < rows; ++row)
      equal &= !goes_to(expert, row) ||
               !memcmp(a.gate_up[expert][row], b.gate_up[expert][row], size_t(shape.columns) * sizeof(hybrid::bf16));
  return equal;
}

template <class... Parts>
bool require(bool holds, const Parts&... parts) {
  if (!holds) console::line(parts...);
  return holds;
}

constexpr int kIntegerTileRows = 17;  // as in formats/int8.h

// One whose sums are exact: with the kernels of `with`, as on tiles.
bool check_exact(const char* name, const Kernels& with, const Format& format, const Shape& shape, int rows) {
  const long before = integer_tile_products;
  bool passed = work(with, format, shape, rows, others);
  const bool tiled = format.format != hybrid::Format::nvfp4;
  const bool takes_tiles = tiled && (with.tile_rows == 1 || (&with == &many && rows >= kIntegerTileRows));
  passed &= require((integer_tile_products > before) == takes_tiles, name, " ", format.name, " ", rows,
                    takes_tiles ? ": no tiles" : ": tiles");
  return passed & require(same(on_tiles, others, rows, shape), name, " ", format.name, " ", rows, " x ", shape.inputs,
                          ": other bits than on tiles");
}

bool check_shape(const Format& format, const Shape& shape) {
  const bool exact = format.format == hybrid::Format::int8 || format.format == hybrid::Format::nvfp4;
  fill_input(format, shape.inputs);
  for (int expert = 0; expert < kExperts; expert += 2)
    for (int part = 0; part < 2; ++part) fill_matrix(format, shape, expert, part, 2);
  route(kMaxRows);
  bool passed = work(always, format, shape, kMaxRows, on_tiles);
  for (const int rows : kRows) {
    route(rows);
    passed &= work(always, format, shape, rows, others);
    passed &= require(same(on_tiles, others, rows, shape), format.name, " ", rows, " x ", shape.inputs,
                      ": other bits than among 100 rows");
    if (!exact) continue;
    passed &= check_exact("threshold", many, format, shape, rows);
    passed &= check_exact("avx512_bf16", never, format, shape, rows);
  }
  if (exact || shape.inputs < 320) return passed;
  passed &= work(never, format, shape, kMaxRows, others);
  return passed & require(!same(on_tiles, others, kMaxRows, shape), format.name, ": the bits of AVX-512, not of tiles");
}

}  // namespace

bool check() {
  bool passed = true;
  for (int i = 0; i < kExperts * 2 * kMaxColumns; ++i) bias[i] = float(i % 5) - 2;
  for (const Format& format : formats::kFormats)
    for (const Shape& shape : kShapes) passed &= check_shape(format, shape);
  return passed;
}
