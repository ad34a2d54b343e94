// Random matrices in each weight format, and random rows to multiply them by: the packed bytes, and the numbers that
// they stand for. Layouts are those of hybrid/formats, written down once more.
#pragma once

#include "executor/step.h"
#include "reference.h"

namespace formats {

using hybrid::kBlock;
using reference::Random;

constexpr int rounded_up(int count, int multiple) { return (count + multiple - 1) / multiple * multiple; }
constexpr int padded(int inputs) { return rounded_up(inputs, 64); }

// One block of 16 columns and `inputs` inputs, padded. Weights of [0, columns) x [0, used) are random, the rest zero.
struct Block {
  int columns, used, inputs;
  double* weights;  // [16][stride]
  int stride;

  bool inside(int column, int input) const { return column < columns && input < used; }
  // Calls put(column, input, inside) for all and stores the number that it returns.
  template <class Put>
  void fill(Put put) const {
    for (int i = 0; i < inputs; ++i)
      for (int c = 0; c < kBlock; ++c) weights[c * stride + i] = put(c, i, inside(c, i));
  }
};

inline float random_scale(Random& random) { return 0.01f + 0.005f * random.uniform(); }

inline void fill_bf16(const Block& block, Random& random, char* to) {
  auto* lines = reinterpret_cast<uint16_t (*)[kBlock][2]>(to);
  block.fill([&](int c, int i, bool inside) {
    lines[i / 2][c][i % 2] = inside ? reference::to_bf16(random.uniform()) : uint16_t(0);
    return reference::from_bf16(lines[i / 2][c][i % 2]);
  });
}

inline void fill_int8(const Block& block, Random& random, char* to) {
  auto* scales = reinterpret_cast<float*>(to);
  auto* lines = reinterpret_cast<uint8_t (*)[kBlock][4]>(to + kBlock * 4);
  for (int c = 0; c < kBlock; ++c) scales[c] = block.inside(c, 0) ? random_scale(random) : 0.0f;
  block.fill([&](int c, int i, bool inside) {
    const int q = inside ? random.below(255) - 127 : 0;
    lines[i / 4][c][i % 4] = uint8_t(q + 128);
    return double(q) * scales[c];
  });
}

inline void fill_int4(const Block& block, Random& random, char* to) {
  struct Part {  // of 64 inputs
    uint16_t scales[2][kBlock];
    uint8_t lines[8][kBlock][4];
  };
  auto* parts = reinterpret_cast<Part*>(to);
  for (int g = 0; g < block.inputs / 32; ++g)
    for (int c = 0; c < kBlock; ++c)
      parts[g / 2].scales[g % 2][c] = block.inside(c, g * 32) ? reference::to_bf16(random_scale(random)) : uint16_t(0);
  block.fill([&](int c, int i, bool inside) {
    const int q = inside ? random.below(16) - 8 : 0, shift = i % 8 / 4 * 4;
    Part& part = parts[i / 64];
    uint8_t& byte = part.lines[i % 64 / 8][c][i % 4];
    byte = uint8_t((byte & ~(15 << shift)) | (q + 8) << shift);
    return double(q) * reference::from_bf16(part.scales[i % 64 / 32][c]);
  });
}

inline int fp8_header(int inputs) { return rounded_up((inputs + 127) / 128 * 4, 64); }

inline double from_e4m3(uint8_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  double value = exponent ? 8 + mantissa : mantissa;
  for (int e = exponent ? exponent : 1; e > 10; --e) value *= 2;
  for (int e = exponent ? exponent : 1; e < 10; ++e) value /= 2;
  return code & 0x80 ? -value : value;
}

inline void fill_fp8(const Block& block, Random& random, char* to) {
  auto* scales = reinterpret_cast<float*>(to);
  auto* lines = reinterpret_cast<uint8_t (*)[4][kBlock]>(to + fp8_header(block.inputs));
  memset(to, 0, size_t(fp8_header(block.inputs)));
  for (int g = 0; g * 128 < block.inputs; ++g) scales[g] = random_scale(random);
  block.fill([&](int c, int i, bool inside) {
    const int code = inside ? random.below(2) * 128 + random.below(127) : 0;  // all but the two that are NaN
    lines[i / 4][i % 4][c] = uint8_t(code);
    return from_e4m3(uint8_t(code)) * scales[i / 128];
  });
}

inline int mxfp4_header(int inputs) { return rounded_up(inputs / 32 * kBlock, 64); }

inline void fill_mxfp4(const Block& block, Random& random, char* to) {
  constexpr double kValues[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  auto* exponents = reinterpret_cast<uint8_t (*)[kBlock]>(to);
  auto* lines = reinterpret_cast<uint8_t (*)[4][kBlock]>(to + mxfp4_header(block.inputs));
  memset(to, 127, size_t(mxfp4_header(block.inputs)));
  for (int g = 0; g < block.inputs / 32; ++g)
    for (int c = 0; c < kBlock; ++c)
      if (block.inside(c, g * 32)) exponents[g][c] = uint8_t(117 + random.below(8));
  block.fill([&](int c, int i, bool inside) {
    const int code = inside ? random.below(16) : 0, shift = i % 2 * 4;
    uint8_t& byte = lines[i / 8][i % 8 / 2][c];
    byte = uint8_t((byte & ~(15 << shift)) | code << shift);
    const double value = kValues[code & 7] / double(1 << (127 - exponents[i / 32][c]));
    return code & 8 ? -value : value;
  });
}

// A row of the float kind: bf16.
inline void fill_float_row(Random& random, int used, int inputs, char* to, double* values) {
  auto* row = reinterpret_cast<uint16_t*>(to);
  for (int i = 0; i < inputs; ++i) {
    row[i] = i < used ? reference::to_bf16(random.uniform()) : uint16_t(0);
    values[i] = reference::from_bf16(row[i]);
  }
}

// A row of the integer kind: bytes, the sum of each 32 of them, a scale for each 256.
inline void fill_integer_row(Random& random, int used, int inputs, char* to, double* values) {
  auto* row = reinterpret_cast<int8_t*>(to);
  auto* sums = reinterpret_cast<int32_t*>(to + inputs);
  auto* scales = reinterpret_cast<float*>(sums + inputs / hybrid::kSumInputs);
  for (int i = 0; i < inputs; ++i) {
    if (i % hybrid::kSumInputs == 0) sums[i / hybrid::kSumInputs] = 0;
    if (i % hybrid::kScaleInputs == 0) scales[i / hybrid::kScaleInputs] = random_scale(random);
    row[i] = int8_t(i < used ? random.below(255) - 127 : 0);
    sums[i / hybrid::kSumInputs] += row[i];
    values[i] = double(row[i]) * scales[i / hybrid::kScaleInputs];
  }
}

struct Format {
  const char* name;
  hybrid::Format format;
  int (*header_bytes)(int inputs);
  int bits;  // of a weight
  void (*fill)(const Block& block, Random& random, char* to);
  void (*fill_row)(Random& random, int used, int inputs, char* to, double* values);

  int64_t block_bytes(int inputs) const { return header_bytes(inputs) + int64_t(inputs) * kBlock * bits / 8; }
};

constexpr Format kFormats[] = {
    {"bf16", hybrid::Format::bf16, [](int) { return 0; }, 16, fill_bf16, fill_float_row},
    {"int8", hybrid::Format::int8, [](int) { return kBlock * 4; }, 8, fill_int8, fill_integer_row},
    {"int4", hybrid::Format::int4, [](int inputs) { return inputs; }, 4, fill_int4, fill_integer_row},
    {"fp8", hybrid::Format::fp8, fp8_header, 8, fill_fp8, fill_float_row},
    {"mxfp4", hybrid::Format::mxfp4, mxfp4_header, 4, fill_mxfp4, fill_float_row},
};

}  // namespace formats
