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

// Tiles multiply int4 rounded to 127ths of 8 times the largest of some scales, none of which is above this.
constexpr double kLargestScale = 0.0151, kInt4Rounding = 8 * kLargestScale / 127 / 2;

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

inline void fill_fp8_row(const Block& block, Random& random, char* to) {
  auto* scales = reinterpret_cast<float*>(to);
  auto* lines = reinterpret_cast<uint8_t (*)[4][kBlock]>(to + kBlock * 4);
  for (int c = 0; c < kBlock; ++c) scales[c] = block.inside(c, 0) ? random_scale(random) : 0.0f;
  block.fill([&](int c, int i, bool inside) {
    const int code = inside ? random.below(2) * 128 + random.below(127) : 0;
    lines[i / 4][i % 4][c] = uint8_t(code);
    return from_e4m3(uint8_t(code)) * scales[c];
  });
}

// Codes of four bits: by turns a line of scales of four groups, and their codes.
template <int group>
constexpr int fp4_scales(int inputs) {
  return rounded_up(inputs, 4 * group) / (4 * group) * 64;
}

template <int group, class RandomScale, class ScaleOf>
void fill_fp4(const Block& block, Random& random, char* to, RandomScale random_code, ScaleOf scale_of) {
  constexpr double kValues[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  constexpr int part_inputs = 4 * group, part_bytes = 64 + part_inputs * 8;
  const auto scale_at = [&](int c, int i) {
    char* const part = to + i / part_inputs * part_bytes;
    return reinterpret_cast<uint8_t*>(part) + i % part_inputs / group * kBlock + c;
  };
  memset(to, 0, size_t(fp4_scales<group>(block.inputs) + block.inputs * 8));
  for (int i = 0; i < block.inputs; i += group)
    for (int c = 0; c < kBlock; ++c) *scale_at(c, i) = random_code(random, block.inside(c, i));
  block.fill([&](int c, int i, bool inside) {
    const int code = inside ? random.below(16) : 0, within = i % part_inputs;
    auto* lines = reinterpret_cast<uint8_t (*)[kBlock][4]>(to + i / part_inputs * part_bytes + 64);
    lines[within / 8][c][within % 4] |= uint8_t(code << within % 8 / 4 * 4);
    const double value = kValues[code & 7] * scale_of(*scale_at(c, i), c);
    return code & 8 ? -value : value;
  });
}

inline int mxfp4_header(int inputs) { return fp4_scales<32>(inputs); }

inline void fill_mxfp4(const Block& block, Random& random, char* to) {
  fill_fp4<32>(
      block, random, to, [](Random& some, bool inside) { return uint8_t(inside ? 117 + some.below(8) : 127); },
      [](uint8_t exponent, int) { return 1 / double(1 << (127 - exponent)); });
}

inline int nvfp4_header(int inputs) { return 64 + fp4_scales<16>(inputs); }

inline void fill_nvfp4(const Block& block, Random& random, char* to) {
  auto* factors = reinterpret_cast<float*>(to);
  for (int c = 0; c < kBlock; ++c) factors[c] = random_scale(random);
  fill_fp4<16>(
      block, random, to + 64, [](Random& some, bool inside) { return uint8_t(inside ? 32 + some.below(64) : 0); },
      [&](uint8_t code, int c) { return from_e4m3(code) * factors[c]; });
}

inline uint16_t random_half(Random& random) { return uint16_t(8 << 10 | random.below(1024)); }  // 2^-7 and above
inline double from_half(uint16_t bits) { return bits ? (1024 + (bits & 1023)) / double(1 << 17) : 0; }

enum class Scales { halves, minima, superblocks, small_groups };

// Codes of 4, 5, 6 or 8 bits in groups.
template <int bits, int offset, Scales scales>
struct Codes {
  static constexpr bool has_factors = scales == Scales::superblocks || scales == Scales::small_groups;
  static constexpr int heads = scales == Scales::minima ? 128 : 64, part_bytes = heads + 128 * bits;

  static constexpr int factor_bytes = has_factors ? 64 : 0, span_bytes = factor_bytes + 4 * part_bytes;

  static int header_bytes(int inputs) { return rounded_up(inputs, 256) / 256 * factor_bytes + inputs / 64 * heads; }

  static void fill(const Block& block, Random& random, char* to) {
    memset(to, 0, size_t(rounded_up(block.inputs, 256) / 256 * factor_bytes + block.inputs / 64 * part_bytes));
    for (int c = 0; c < block.columns && c < kBlock; ++c) {
      for (int i = 0; has_factors && i < block.inputs; i += 256) {
        factors_of(to, i)[0][c] = random_half(random);
        factors_of(to, i)[1][c] = scales == Scales::superblocks ? random_half(random) : uint16_t(0);
      }
      for (int i = 0; i < block.inputs; i += 16) fill_scales(part_of(to, i), c, i % 64, random);
    }
    block.fill([&](int c, int i, bool inside) {
      char* const part = part_of(to, i);
      const int q = inside ? random.below(1 << bits) : offset;
      put(reinterpret_cast<uint8_t*>(part + heads), c, i % 64, q);
      double minimum = 0;
      const double scale = scale_of(factors_of(to, i), part, c, i % 64, minimum);
      return (q - offset) * scale + minimum;
    });
  }

 private:
  static uint16_t (*factors_of(char* to, int i)) [kBlock] {
    return reinterpret_cast<uint16_t (*)[kBlock]>(to + i / 256 * span_bytes);
  } static char* part_of(char* to, int i) {
    return to + i / 256 * span_bytes + factor_bytes + i % 256 / 64 * part_bytes;
  }

  static void fill_scales(char* part, int c, int i, Random& random) {
    if (scales == Scales::small_groups) {
      part[i / 16 * kBlock + c] = char(random.below(255) - 127);
    } else if (i % 32 == 0 && scales == Scales::superblocks) {
      part[i / 32 * 32 + c] = char(random.below(64));
      part[i / 32 * 32 + kBlock + c] = char(random.below(64));
    } else if (i % 32 == 0) {
      auto* halves = reinterpret_cast<uint16_t*>(part) + i / 32 * (heads / 4);
      halves[c] = random_half(random);
      if (scales == Scales::minima) halves[kBlock + c] = random_half(random);
    }
  }

  static double scale_of(const uint16_t (*factors)[kBlock], const char* part, int c, int i, double& minimum) {
    if (scales == Scales::small_groups) return from_half(factors[0][c]) * int8_t(part[i / 16 * kBlock + c]);
    if (scales == Scales::superblocks) {
      minimum = -from_half(factors[1][c]) * part[i / 32 * 32 + kBlock + c];
      return from_half(factors[0][c]) * part[i / 32 * 32 + c];
    }
    const auto* halves = reinterpret_cast<const uint16_t*>(part) + i / 32 * (heads / 4);
    if (scales == Scales::minima) minimum = from_half(halves[kBlock + c]);
    return from_half(halves[c]);
  }

  static void put(uint8_t* codes, int c, int i, int q) {
    const int column = c * 4 + i % 4;
    if (bits == 8) {
      codes[i / 4 * 64 + column] = uint8_t(q);
      return;
    }
    constexpr int extra = bits == 8 ? 1 : bits - 4,
                  steps = bits == 4 ? 1 : 8 / (extra ? extra : 1);  // inputs that share a high byte
    if (bits > 4) codes[i / (4 * steps) * 64 + column] |= uint8_t(q >> 4 << extra * (i / 4 % steps));
    codes[128 * extra + i / 8 * 64 + column] |= uint8_t((q & 15) << i % 8 / 4 * 4);
  }
};

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

// A row for codes in groups: bytes, and of each 32 a scale and the scaled sums of all, the first 16 and the others.
inline void fill_grouped_row(Random& random, int used, int inputs, char* to, double* values) {
  auto* row = reinterpret_cast<int8_t*>(to);
  auto* groups = reinterpret_cast<float (*)[4]>(to + inputs);
  for (int g = 0; g < inputs / 32; ++g) {
    groups[g][0] = random_scale(random);
    int sums[2] = {};
    for (int i = g * 32; i < g * 32 + 32; ++i) {
      row[i] = int8_t(i < used ? random.below(255) - 127 : 0);
      sums[i % 32 / 16] += row[i];
      values[i] = double(row[i]) * groups[g][0];
    }
    groups[g][1] = groups[g][0] * float(sums[0] + sums[1]);
    for (int half = 0; half < 2; ++half) groups[g][2 + half] = groups[g][0] * float(sums[half]);
  }
}

// A wide row: bf16, the same as whole numbers in two bytes, sums for each 32 of them, a scale for each 256. Values have
// seven bits, so that both are exact.
inline void fill_wide_row(Random& random, int used, int inputs, char* to, double* values) {
  auto* floats = reinterpret_cast<uint16_t*>(to);
  auto *high = reinterpret_cast<int8_t*>(to + 2 * inputs), *low = reinterpret_cast<int8_t*>(to + 3 * inputs);
  auto* sums = reinterpret_cast<int32_t (*)[2]>(to + 4 * inputs);
  auto* scales = reinterpret_cast<float*>(to + 4 * inputs + inputs / 32 * 8);
  for (int i = 0; i < inputs; ++i) {
    const int whole = i < used ? (random.below(255) - 127) * (1 << random.below(7)) : 0;
    if (i % 256 == 0) scales[i / 256] = 1.0f / float(1 << (8 + random.below(5)));
    values[i] = double(whole) * scales[i / 256];
    floats[i] = reference::to_bf16(float(values[i]));
    high[i] = int8_t((whole + 64 + 128 * 128) / 128 - 128);  // rounded
    low[i] = int8_t(whole - 128 * high[i]);
    if (i % 32 == 0) sums[i / 32][0] = sums[i / 32][1] = 0;
    if (i % 32 < 16) sums[i / 32][0] -= 12 * whole;
    sums[i / 32][1] -= 12 * whole;
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

template <int bits, int offset, Scales scales>
constexpr Format grouped(const char* name, hybrid::Format format) {
  using Kind = Codes<bits, offset, scales>;
  return {name, format, Kind::header_bytes, bits, Kind::fill, fill_grouped_row};
}

constexpr Format kFormats[] = {
    {"bf16", hybrid::Format::bf16, [](int) { return 0; }, 16, fill_bf16, fill_float_row},
    {"int8", hybrid::Format::int8, [](int) { return kBlock * 4; }, 8, fill_int8, fill_integer_row},
    {"int4", hybrid::Format::int4, [](int inputs) { return inputs; }, 4, fill_int4, fill_integer_row},
    {"fp8", hybrid::Format::fp8, fp8_header, 8, fill_fp8, fill_float_row},
    {"fp8_row", hybrid::Format::fp8_row, [](int) { return kBlock * 4; }, 8, fill_fp8_row, fill_float_row},
    {"mxfp4", hybrid::Format::mxfp4, mxfp4_header, 4, fill_mxfp4, fill_wide_row},
    {"nvfp4", hybrid::Format::nvfp4, nvfp4_header, 4, fill_nvfp4, fill_wide_row},
    grouped<5, 0, Scales::minima>("q5_1", hybrid::Format::q5_1),
    grouped<6, 32, Scales::small_groups>("q6_k", hybrid::Format::q6_k),
};

}  // namespace formats
