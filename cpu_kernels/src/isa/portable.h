// Plain C++ over sixteen lanes: runs anywhere, and is the reference that the others are tested against.
//
// What every instruction set offers: sixteen lanes of fp32 (F32) and int32 (I32); for the float kind a Line of 16
// columns by a pair of bf16 inputs and the Pair it meets; for the integer kind the Bytes of 16 columns by four unsigned
// weights and the Quad of four signed inputs. from_... widen 16 stored values: fp8 as 2^-8 of its value. Joined are
// nibbles and, above them, further bits: those of `mask` after `bits` was shifted up. Tabled are the bytes of a table
// of 16, four times in a line, that nibbles choose; twos are the step-th two bits of each byte.
//
// Codes are Bytes of six bits at most, Inputs the Quad that they meet, and Small are sums that may have only 16 bits:
// products of codes of some bits may be added to those of small_steps(bits) steps before they are joined to an I32.
// With 0 such codes are to be Bytes. While they are added up, small_blocks blocks and max_rows rows fit the registers.
//
// Codes of fp4 are twice their value and kFp4Offset. dot_wide multiplies them by as many inputs of two bytes each.
//
// turn_lines makes of eight lines, which hold 16 inputs of 16 columns, those with the roles of both exchanged.
//
// max(a, b) is b unless a is larger, so also where one of them is NaN. max_magnitude compares |x| with a `top` that is
// not negative, max_magnitude_lane the lanes of such a one: there infinity is larger than any number, NaN than
// infinity.
#pragma once

#include "executor/wide.h"
#include "isa/turned_lines.h"

namespace hybrid {
namespace HYBRID_ISA {

struct Portable {
  struct F32 {
    float lane[16];
  };
  struct Line {
    F32 even, odd;
  };
  struct Pair {
    float even, odd;
  };
  struct I32 {
    int32_t lane[16];
  };
  struct Bytes {
    uint8_t column[16][4];
  };
  struct Quad {
    int8_t input[4];
  };
  using Codes = Bytes;
  using Inputs = Quad;
  using Small = I32;
  static constexpr int max_rows = 4;
  static constexpr int max_blocks = 2;
  static constexpr int small_blocks = max_blocks;
  static constexpr int group_rows = 0;          // of a tile, for which codes are made operands in registers
  static constexpr bool streams_codes = false;  // whether they are for any number of rows, tile by tile
  static constexpr bool has_tiles = false;      // matrix tiles

  template <class Function>
  static F32 each(Function function) {
    F32 out;
    for (int i = 0; i < 16; ++i) out.lane[i] = function(i);
    return out;
  }
  static F32 zero() { return set(0.0f); }
  static F32 set(float x) {
    return each([=](int) { return x; });
  }
  static F32 load(const float* p) {
    return each([=](int i) { return p[i]; });
  }
  static void store(float* p, F32 x) {
    for (int i = 0; i < 16; ++i) p[i] = x.lane[i];
  }
  static F32 add(F32 a, F32 b) {
    return each([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static F32 sub(F32 a, F32 b) {
    return each([&](int i) { return a.lane[i] - b.lane[i]; });
  }
  static F32 mul(F32 a, F32 b) {
    return each([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static F32 div(F32 a, F32 b) {
    return each([&](int i) { return a.lane[i] / b.lane[i]; });
  }
  static F32 fma(F32 a, F32 b, F32 c) {
    return each([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
  }
  static F32 max(F32 a, F32 b) {
    return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static F32 max_magnitude(F32 top, F32 x) {
    return each([&](int i) {
      const uint32_t size = float_to_bits(x.lane[i]) & 0x7fffffffu, before = float_to_bits(top.lane[i]);
      return bits_to_float(size > before ? size : before);
    });
  }
  static F32 round(F32 x) {
    // Adding and taking away 1.5 * 2^23 rounds to nearest even for |x| < 2^22, which is all that exp asks for.
    return each([&](int i) { return (x.lane[i] + 12582912.0f) - 12582912.0f; });
  }
  static F32 times_power_of_two(F32 x, F32 n) {
    // Beside 1.5 * 2^23 the low bits of the sum are those of the whole number n, and of NaN they are some.
    return each([&](int i) { return x.lane[i] * bits_to_float((float_to_bits(n.lane[i] + 12582912.0f) + 127) << 23); });
  }
  static float sum(F32 x) {
    for (int width = 8; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) x.lane[i] += x.lane[i + width];
    return x.lane[0];
  }
  static float max_lane(F32 x) {
    for (int width = 8; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) x.lane[i] = x.lane[i] > x.lane[i + width] ? x.lane[i] : x.lane[i + width];
    return x.lane[0];
  }
  static float max_magnitude_lane(F32 x) {
    uint32_t top = 0;
    for (float lane : x.lane) top = float_to_bits(lane) > top ? float_to_bits(lane) : top;
    return bits_to_float(top);
  }
  static F32 keep(F32 x, int first, int last, float other) {
    return each([&](int i) { return i >= first && i < last ? x.lane[i] : other; });
  }
  static void store_bf16(bf16* p, F32 x) {
    for (int i = 0; i < 16; ++i) {
      uint32_t bits;
      __builtin_memcpy(&bits, &x.lane[i], sizeof bits);
      p[i] = x.lane[i] == x.lane[i] ? bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : bf16(0xffff);
    }
  }

  static Line load_line(const char* p) {
    uint32_t pairs[16];
    __builtin_memcpy(pairs, p, sizeof pairs);
    return {each([&](int i) { return bits_to_float(pairs[i] << 16); }),
            each([&](int i) { return bits_to_float(pairs[i] & 0xffff0000u); })};
  }
  static Pair load_pair(const bf16* p) {
    return {bits_to_float(uint32_t(p[0]) << 16), bits_to_float(uint32_t(p[1]) << 16)};
  }
  static F32 dot(F32 acc, const Line& line, Pair pair) {
    return each([&](int i) { return acc.lane[i] + line.even.lane[i] * pair.even + line.odd.lane[i] * pair.odd; });
  }
  static Line make_line(F32 even, F32 odd) { return {even, odd}; }
  static Line load_fp8(const char* line, int step) {  // rows 2 * step and the next of four
    const char* pair = line + step * 2 * kBlock;
    return make_line(from_fp8(pair), from_fp8(pair + kBlock));
  }
  static void store_line(char* p, const Line& line) {
    uint32_t pairs[16];
    for (int i = 0; i < 16; ++i) pairs[i] = float_to_bits(line.even.lane[i]) >> 16 | float_to_bits(line.odd.lane[i]);
    __builtin_memcpy(p, pairs, sizeof pairs);
  }

  static void turn_lines(const char* lines, char* out) { turn_words(lines, out); }

  static constexpr int small_steps(int) { return kPanelInputs / 4; }
  static I32 set_int(int x) {
    I32 out;
    for (int i = 0; i < 16; ++i) out.lane[i] = x;
    return out;
  }
  static F32 to_f32(const I32& x) {
    return each([&](int i) { return float(x.lane[i]); });
  }
  static Bytes load_bytes(const char* p) {
    Bytes out;
    __builtin_memcpy(&out, p, sizeof out);
    return out;
  }
  static Bytes load_nibbles(const char* p, int high) {
    Bytes out = load_bytes(p);
    for (auto& column : out.column)
      for (uint8_t& byte : column) byte = high ? byte >> 4 : byte & 15;
    return out;
  }
  static void store_nibbles(char* p, const char* from, int high) {
    const Bytes nibbles = load_nibbles(from, high);
    __builtin_memcpy(p, &nibbles, sizeof nibbles);
  }
  static Bytes load_twos(const char* p, int step) {
    Bytes out = load_bytes(p);
    for (auto& column : out.column)
      for (uint8_t& byte : column) byte = byte >> 2 * step & 3;
    return out;
  }
  static void store_twos(char* p, const char* from, int step) {
    const Bytes twos = load_twos(from, step);
    __builtin_memcpy(p, &twos, sizeof twos);
  }
  static Bytes load_tabled(const char* p, int high, const char* table) {
    Bytes out = load_nibbles(p, high);
    for (auto& column : out.column)
      for (uint8_t& byte : column) byte = uint8_t(table[byte]);
    return out;
  }
  static void store_tabled(char* p, const char* from, int high, const char* table) {
    const Bytes tabled = load_tabled(from, high, table);
    __builtin_memcpy(p, &tabled, sizeof tabled);
  }
  static Bytes load_joined(const char* p, int high, const char* bits, int up, int mask) {
    Bytes out = load_nibbles(p, high);
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < 4; ++k, ++bits)
        out.column[i][k] |= uint8_t((up < 0 ? uint8_t(*bits) >> -up : uint8_t(*bits) << up) & mask);
    return out;
  }
  static void store_joined(char* p, const char* from, int high, const char* bits, int up, int mask) {
    const Bytes joined = load_joined(from, high, bits, up, mask);
    __builtin_memcpy(p, &joined, sizeof joined);
  }
  static Quad load_quad(const char* p) {
    Quad out;
    __builtin_memcpy(&out, p, sizeof out);
    return out;
  }
  static I32 dot(I32 acc, const Bytes& bytes, Quad quad) {
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < 4; ++k) acc.lane[i] += int(bytes.column[i][k]) * quad.input[k];
    return acc;
  }
  static Codes load_codes(const char* p) { return load_bytes(p); }
  static Inputs load_inputs(const char* p) { return load_quad(p); }
  static Small begin_small(const I32& sum) { return sum; }
  static I32 join(const I32&, const Small& part) { return part; }

  static Codes load_fp4(const char* p, int high) {
    static constexpr uint8_t doubled[16] = {HYBRID_FP4_CODES};
    Codes codes = load_nibbles(p, high);
    for (auto& column : codes.column)
      for (uint8_t& byte : column) byte = doubled[byte];
    return codes;
  }
  template <int count>
  static I32 dot_wide(const Codes (&codes)[count], const char* high, const char* low, int start) {
    I32 upper = set_int(0), lower = set_int(start);
    for (int i = 0; i < count; ++i) {
      upper = dot(upper, codes[i], load_quad(high + 4 * i));
      lower = dot(lower, codes[i], load_quad(low + 4 * i));
    }
    for (int i = 0; i < 16; ++i) lower.lane[i] += kWideBase * upper.lane[i];
    return lower;
  }

  static F32 from_bf16(const char* p) {
    uint16_t bits[16];
    __builtin_memcpy(bits, p, sizeof bits);
    return each([&](int i) { return bits_to_float(uint32_t(bits[i]) << 16); });
  }
  static F32 from_fp16(const char* p) {
    uint16_t bits[16];
    __builtin_memcpy(bits, p, sizeof bits);
    return each([&](int i) {
      const uint32_t exponent = bits[i] >> 10 & 31, mantissa = bits[i] & 1023;
      const float size = exponent == 31 ? bits_to_float(0x7f800000u | mantissa << 13)
                         : exponent     ? bits_to_float((exponent + 127 - 15) << 23 | mantissa << 13)
                                        : float(mantissa) * 0x1p-24f;
      return bits[i] & 0x8000 ? -size : size;
    });
  }
  static F32 from_int8(const char* p) {
    return each([=](int i) { return float(int8_t(p[i])); });
  }
  static F32 from_nibbles(const char* p, int high) {
    return each([=](int i) { return float(uint8_t(p[i]) >> (high ? 4 : 0) & 15); });
  }
  static F32 from_fp8(const char* p) {
    return each([=](int i) {
      const uint32_t bits = uint8_t(p[i]), exponent = bits >> 3 & 15, mantissa = bits & 7;
      const float size = exponent ? bits_to_float((exponent + 127 - 15) << 23 | mantissa << 20)  // 2^-8 of 2^(e-7)
                                  : float(mantissa) * 0x1p-17f;
      return bits & 0x80 ? -size : size;
    });
  }
  static F32 from_e8m0(const char* p) {
    return each([=](int i) { return bits_to_float(uint32_t(uint8_t(p[i])) << 23); });
  }
  static void store_int8(char* p, F32 x) {
    const F32 rounded = round(x);
    for (int i = 0; i < 16; ++i) p[i] = char(int(rounded.lane[i]));
  }

 private:
  static float bits_to_float(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
  }
  static uint32_t float_to_bits(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits;
  }
};

}  // namespace HYBRID_ISA
}  // namespace hybrid
