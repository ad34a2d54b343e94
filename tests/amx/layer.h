// One layer's input and experts, and calls of kernels on them as the only thread makes them.
#pragma once

#include "formats.h"
#include "guard.h"
#include "tile_state.h"

namespace layer {

using formats::Format;
using formats::padded;
using hybrid::kBlock;
using reference::Random;

struct Shape {
  int columns, inputs;
};

constexpr int kRowCounts[] = {1, 2, 15, 16, 17, 32, 33, 100};

constexpr int kMaxRows = 100, kMaxColumns = 96, kMaxInputs = 640;
constexpr int kExperts = 3, kRoutes = 2 * kMaxRows;
constexpr int kRowBytes = 5 * kMaxInputs, kExpertBytes = 2 * kMaxColumns * 320 * 2;
constexpr int kUntouched = 12345;

alignas(64) inline char experts[kExperts][kExpertBytes];
alignas(64) inline char rows_of_input[kMaxRows][kRowBytes];
alignas(64) inline char routed_input[kRoutes][kRowBytes];
alignas(64) inline hybrid::bf16 hidden[kRoutes + 1][kMaxColumns];
alignas(64) inline float output[kMaxRows + 1][kMaxColumns];
alignas(64) inline float bias[kExperts * 2 * kMaxColumns];
alignas(64) inline double input_values[kMaxRows][kMaxInputs];
alignas(64) inline double weights[kMaxColumns][kMaxInputs];
inline int32_t offsets[kExperts + 1], routed_rows[kRoutes], active[kExperts], active_count;
inline float route_weights[kRoutes];

struct Kernels {
  const hybrid::KernelTable& table;
  int tile_rows;  // as in Step
};

// Calls one kernel. False, and a line, if it writes behind its scratch or leaves a tile configuration behind.
template <class Args>
inline bool call(const char* name, const Kernels& kernels, hybrid::Kernel<Args> kernel, const Args& args, int rows) {
  hybrid::Step step{};
  step.rows = rows, step.tile_rows = kernels.tile_rows;
  const bool guarded = guard::call(name, kernels.table, kernel, args, step, rows);
  if (tiles_configured()) console::line(name, ": a tile configuration is left behind");
  return guarded && !tiles_configured();
}

inline bool call_gemm(const Kernels& kernels, const Format& format, int rows, const Shape& shape, bool extras) {
  hybrid::GemmArgs args{};
  args.format = format.format;
  args.input = rows_of_input[0], args.input_stride = kRowBytes;
  args.weight = experts[0];
  args.bias = extras ? bias : nullptr;
  args.output = output[0], args.output_stride = kMaxColumns;
  args.columns = shape.columns, args.inputs = padded(shape.inputs);
  args.accumulate = extras;
  return call("gemm", kernels, kernels.table.gemm, args, rows);
}

// The experts of gate_up and of down.
inline hybrid::ExpertSet routed_set(const Format& format, const Shape& shape, const char* input, bool extras) {
  hybrid::ExpertSet set{};
  set.format = format.format;
  set.input = input, set.input_stride = kRowBytes;
  set.routing = {offsets, routed_rows, route_weights, active, &active_count};
  set.experts = experts[0], set.expert_stride = kExpertBytes;
  set.bias = extras ? bias : nullptr;
  set.blocks = (shape.columns + kBlock - 1) / kBlock, set.inputs = padded(shape.inputs);
  return set;
}

inline bool call_gate_up(const Kernels& kernels, const Format& format, int rows, const Shape& shape, bool extras) {
  hybrid::GateUpArgs args{};
  args.routed = routed_set(format, shape, rows_of_input[0], extras);
  args.output = hidden[0], args.output_stride = kMaxColumns;
  args.activation = extras ? hybrid::Activation::swiglu_clamped : hybrid::Activation::silu;
  return call("gate_up", kernels, kernels.table.gate_up, args, rows);
}

inline bool call_down(const Kernels& kernels, const Format& format, int rows, const Shape& shape, bool extras) {
  hybrid::DownArgs args{};
  args.routed = routed_set(format, shape, routed_input[0], extras);
  args.output = output[0], args.output_stride = kMaxColumns;
  return call("down", kernels, kernels.table.down, args, rows);
}

inline void fill_input(const Format& format, int inputs) {
  Random random(7);
  for (int r = 0; r < kMaxRows; ++r) format.fill_row(random, inputs, padded(inputs), rows_of_input[r], input_values[r]);
}

// Matrix `part` of `parts` of an expert, their blocks interleaved.
inline void fill_matrix(const Format& format, const Shape& shape, int expert, int part, int parts) {
  Random random(uint32_t(expert * 10 + part));
  const int inputs = padded(shape.inputs);
  for (int c = 0; c < shape.columns; c += kBlock) {
    const formats::Block block{shape.columns - c, shape.inputs, inputs, weights[c], kMaxInputs};
    format.fill(block, random, experts[expert] + (c / kBlock * parts + part) * format.block_bytes(inputs));
  }
}

// The first expert gets every row, the second none, the third some at unequal distances.
inline bool goes_to(int expert, int row) { return expert == 0 || (expert == 2 && (row % 3 == 0 || row % 7 == 1)); }

inline void route(int rows) {
  offsets[0] = active_count = 0;
  for (int expert = 0; expert < kExperts; ++expert) {
    int end = offsets[expert];
    for (int row = 0; row < rows; ++row) {
      if (!goes_to(expert, row)) continue;
      memcpy(routed_input[end], rows_of_input[row], kRowBytes);
      route_weights[end] = 0.25f + 0.01f * float(row);
      routed_rows[end++] = row;
    }
    offsets[expert + 1] = end;
    if (end > offsets[expert]) active[active_count++] = expert;
  }
}

}  // namespace layer
