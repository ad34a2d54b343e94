// The matrix products of one kernel table, KERNELS, against sums in double precision: every format, row count and
// shape.
#include "executor/grouped.h"
#include "layer.h"
#include "reference.h"

namespace hybrid {
extern const KernelTable KERNELS;
}

namespace {

using namespace layer;
using reference::Comparison;
using reference::Near;

constexpr Shape kShapes[] = {{1, 1}, {17, 63}, {50, 97}, {96, 320}, {20, 580}};

Near products[kExperts][2][kMaxRows][kMaxColumns];  // of each matrix of an expert
Near expected[kMaxRows][kMaxColumns];
const Kernels kernels{hybrid::KERNELS, 0};
bool tiled() { return hybrid::KERNELS.name[1] == 'm'; }  // amx, not avx...

void fill_and_multiply(const Format& format, const Shape& shape, int expert, int part, int parts) {
  fill_matrix(format, shape, expert, part, parts);
  for (int r = 0; r < kMaxRows; ++r)
    for (int c = 0; c < shape.columns; ++c)
      products[expert][part][r][c] = reference::dot(input_values[r], weights[c], padded(shape.inputs));
  const bool int4 = format.format == hybrid::Format::int4;
  if (!tiled() || !(int4 || hybrid::is_grouped(format.format))) return;
  for (int r = 0; r < kMaxRows; ++r)
    for (int c = 0; c < shape.columns; ++c) {
      double bound = 0;  // of weights of int4; of both operands, rounded to bf16
      for (int i = 0; i < shape.inputs; ++i)
        bound += reference::magnitude(input_values[r][i]) *
                 (int4 ? formats::kInt4Rounding : 2 * reference::kBf16 * reference::magnitude(weights[c][i]));
      products[expert][part][r][c].bound += bound;
    }
}

void fill_experts(const Format& format, const Shape& shape, int parts) {
  for (int expert = 0; expert < kExperts; expert += 2)
    for (int part = 0; part < parts; ++part) fill_and_multiply(format, shape, expert, part, parts);
}

// What `output` holds before a kernel adds to it.
float initial(int row, int column) { return float(row - column) * 0.125f; }

void fill_output(int columns) {
  for (auto& row : output)
    for (int c = 0; c < kMaxColumns; ++c) row[c] = c < columns ? initial(int(&row - output), c) : kUntouched;
}

// Rows [0, rows) and columns [0, columns) are as expected; what lies around them is untouched.
void compare_output(Comparison& comparison, int rows, int columns) {
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < kMaxColumns; ++c)
      comparison.see(c < columns ? expected[r][c] : Near{kUntouched, 0}, output[r][c], r, c);
  for (int c = 0; c < columns; ++c) comparison.see({initial(rows, c), 0}, output[rows][c], rows, c);
}

// Whether a kernel is called with all that is optional: biases, adding to what is there, the other activation. Every
// row count and every shape has both.
bool with_extras(int rows, const Shape& shape) { return (rows + shape.columns) % 2; }

void expect_gemm(int rows, const Shape& shape) {
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < shape.columns; ++c) {
      expected[r][c] = products[0][0][r][c];
      if (with_extras(rows, shape)) expected[r][c].add(bias[c]), expected[r][c].add(initial(r, c));
    }
}

bool check_gemm(const Format& format, const Shape& shape) {
  bool passed = true;
  for (const int rows : kRowCounts) {
    Comparison comparison;
    expect_gemm(rows, shape);
    fill_output(shape.columns);
    passed &= call_gemm(kernels, format, rows, shape, with_extras(rows, shape));
    compare_output(comparison, rows, shape.columns);
    passed &= comparison.passed("gemm ", format.name, " ", rows, " x ", shape.columns, " x ", shape.inputs);
  }
  return passed;
}

// blocks: how many each expert has; 0: no biases, and the other activation.
Near activated(int expert, int row, int column, int blocks) {
  Near gate = products[expert][0][row][column], up = products[expert][1][row][column];
  if (blocks) {
    const float* pair = bias + (expert * blocks + column / kBlock) * 2 * kBlock + column % kBlock;
    gate.add(pair[0]), up.add(pair[kBlock]);
  }
  Near value = blocks ? reference::swiglu_clamped(gate, up) : reference::silu_times(gate, up);
  value.round_to_bf16();
  return value;
}

bool check_gate_up(const Format& format, const Shape& shape) {
  bool passed = true;
  for (const int rows : kRowCounts) {
    Comparison comparison;
    const bool extras = with_extras(rows, shape);
    const int blocks = extras ? (shape.columns + kBlock - 1) / kBlock : 0;
    route(rows);
    memset(hidden, 0x7b, sizeof hidden);
    const int end = offsets[kExperts], untouched = hidden[end][0];
    passed &= call_gate_up(kernels, format, rows, shape, extras);
    for (int expert = 0; expert < kExperts; ++expert)
      for (int i = offsets[expert]; i < offsets[expert + 1]; ++i)
        for (int c = 0; c < shape.columns; ++c)
          comparison.see(activated(expert, routed_rows[i], c, blocks), reference::from_bf16(hidden[i][c]), i, c);
    comparison.see({double(untouched), 0}, hidden[end][0], end, 0);
    passed &= comparison.passed("gate_up ", format.name, " ", rows, " x ", shape.columns, " x ", shape.inputs);
  }
  return passed;
}

// Every expert's product, weighted, on top of what was there.
void expect_down(int rows, int columns, int stored, bool extras) {
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < stored; ++c) expected[r][c] = {initial(r, c), 0};
  for (int expert = 0; expert < kExperts; ++expert)
    for (int i = offsets[expert]; i < offsets[expert + 1]; ++i)
      for (int c = 0; c < (extras ? stored : columns); ++c) {
        Near part = c < columns ? products[expert][0][routed_rows[i]][c] : Near{};
        if (extras) part.add(bias[expert * stored + c]);
        Near& sum = expected[routed_rows[i]][c];
        sum.bound += route_weights[i] * part.bound;
        sum.add(route_weights[i] * part.value);
      }
}

bool check_down(const Format& format, const Shape& shape) {
  bool passed = true;
  const int stored = formats::rounded_up(shape.columns, kBlock);
  for (const int rows : kRowCounts) {
    Comparison comparison;
    const bool extras = with_extras(rows, shape);
    route(rows);
    expect_down(rows, shape.columns, stored, extras);
    fill_output(stored);
    passed &= call_down(kernels, format, rows, shape, extras);
    compare_output(comparison, rows, stored);
    passed &= comparison.passed("down ", format.name, " ", rows, " x ", shape.columns, " x ", shape.inputs);
  }
  return passed;
}

bool check_shape(const Format& format, const Shape& shape) {
  bool passed = true;
  fill_input(format, shape.inputs);
  for (int i = 0; i < kExperts * 2 * kMaxColumns; ++i) bias[i] = float(i % 5) - 2;
  fill_experts(format, shape, 1);
  passed &= check_gemm(format, shape);
  passed &= check_down(format, shape);
  fill_experts(format, shape, 2);
  return check_gate_up(format, shape) && passed;
}

// The probes multiply with what the kernels use, so they must leave as little behind.
bool check_probes() {
  const bool counted = hybrid::KERNELS.multiply(3) > 0 && hybrid::KERNELS.multiply_int(3) > 0;
  if (!counted || tiles_configured()) console::line("a probe counts nothing or leaves a tile configuration behind");
  return counted && !tiles_configured();
}

}  // namespace

bool check() {
  bool passed = check_probes();
  for (const Format& format : formats::kFormats)
    for (const Shape& shape : kShapes) passed &= check_shape(format, shape);
  return passed;
}
