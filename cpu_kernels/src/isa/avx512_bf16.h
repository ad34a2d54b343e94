// AVX-512 with BF16 and VNNI dot products, for which a packed line is one operand as it stands, and VBMI look-ups.
#pragma once

#include "isa/avx512.h"

namespace hybrid {
namespace HYBRID_ISA {

// For opening fp8: the two bytes of the bf16 that is 2^-8 of each positive e4m3 number; and a line's bytes in the order
// of its pairs, 4 columns of both steps in each quarter.
struct Fp8Tables {
  alignas(kLine) unsigned char low[128] = {}, high[128] = {}, order[kLine] = {};

  constexpr Fp8Tables() {
    for (int code = 1; code < 128; ++code) {
      int exponent = code / 8 + 112, fraction = code % 8 * 16;
      if (code < 8) {  // subnormal: code * 2^-17
        exponent = code < 2 ? 110 : code < 4 ? 111 : 112;
        fraction = (code << (117 - exponent)) % 128;
      }
      low[code] = static_cast<unsigned char>(exponent % 2 * 128 + fraction);
      high[code] = static_cast<unsigned char>(exponent / 2);
    }
    for (int i = 0; i < kLine; ++i)
      order[i] = static_cast<unsigned char>(i / 8 % 2 * 2 * kBlock + i % 2 * kBlock + i / 16 * 4 + i % 8 / 2);
  }
};
constexpr Fp8Tables kFp8Tables;

struct Avx512Bf16 : Avx512 {
  using Line = __m512i;
  using Pair = __m512i;
  // Types of their own, so that dot products of the two kinds are told apart; vectors, because arrays of structs spill.
  typedef char Bytes __attribute__((vector_size(64)));
  typedef int I32 __attribute__((vector_size(64)));
  using Quad = Bytes;
  using Codes = Bytes;
  using Inputs = Quad;
  using Small = I32;
  static constexpr int max_rows = 6;
  static constexpr int max_blocks = 4;
  static constexpr int small_blocks = max_blocks;
  static constexpr int group_rows = 8;
  static constexpr bool streams_codes = true;

  static void store_bf16(bf16* p, F32 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
  }
  static Line load_line(const char* p) { return _mm512_load_si512(p); }
  static Pair load_pair(const bf16* p) {
    int bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    return _mm512_set1_epi32(bits);
  }
  static F32 dot(F32 acc, Line line, Pair pair) { return _mm512_dpbf16_ps(acc, (__m512bh)line, (__m512bh)pair); }
  static Line make_line(F32 even, F32 odd) { return pair_bits(even, odd); }
  static void store_line(char* p, Line line) { _mm512_store_si512(p, line); }

  // Rows 2 * step and 2 * step + 1 of a line of fp8, as from_fp8() and make_line() give them. Everything but the last
  // step is the same for both, and computed once where they are opened beside each other.
  static Line load_fp8(const char* line, int step) {
    const __m512i codes = _mm512_permutexvar_epi8(_mm512_load_si512(kFp8Tables.order), _mm512_loadu_si512(line));
    const __m512i low = look_up(codes, kFp8Tables.low), size = look_up(codes, kFp8Tables.high);
    const __m512i sign = _mm512_set1_epi8(char(0x80));                        // which look-ups ignore
    const __m512i high = _mm512_ternarylogic_epi32(size, codes, sign, 0xf8);  // size | (codes & sign)
    Line pairs = step ? _mm512_unpackhi_epi8(low, high) : _mm512_unpacklo_epi8(low, high);
    __asm__("" : "+v"(pairs));  // gcc 12 would spill it though registers are free
    return pairs;
  }

  static constexpr int small_steps(int) { return kPanelInputs / 4; }
  static I32 set_int(int x) { return (I32)_mm512_set1_epi32(x); }
  static I32 load_int(const int32_t* p) { return (I32)_mm512_loadu_si512(p); }
  static F32 to_f32(I32 x) { return _mm512_cvtepi32_ps((__m512i)x); }
  static Bytes load_bytes(const char* p) { return (Bytes)_mm512_load_si512(p); }
  static Bytes load_nibbles(const char* p, int high) { return (Bytes)nibbles(p, high); }
  static Bytes load_twos(const char* p, int step) { return (Bytes)twos(p, step); }
  static Bytes load_tabled(const char* p, int high, const char* table) { return (Bytes)tabled(p, high, table); }
  static Bytes load_joined(const char* p, int high, const char* bits, int up, int mask) {
    return (Bytes)joined(p, high, bits, up, mask);
  }
  static Quad load_quad(const char* p) {
    int bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    return (Quad)_mm512_set1_epi32(bits);
  }
  static I32 dot(I32 acc, Bytes bytes, Quad quad) {
    return (I32)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)bytes, (__m512i)quad);
  }
  static Codes load_codes(const char* p) { return load_bytes(p); }
  static Inputs load_inputs(const char* p) { return load_quad(p); }
  static Small begin_small(I32 sum) { return sum; }
  static I32 join(I32, Small part) { return part; }

  static Codes load_fp4(const char* p, int high) { return (Codes)Avx512::load_fp4(p, high); }
  template <int count>
  static I32 dot_wide(const Codes (&codes)[count], const char* high, const char* low, int start) {
    __m512i upper = _mm512_setzero_si512(), lower = _mm512_set1_epi32(start);
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) {
      upper = _mm512_dpbusd_epi32(upper, (__m512i)codes[i], (__m512i)load_quad(high + 4 * i));
      lower = _mm512_dpbusd_epi32(lower, (__m512i)codes[i], (__m512i)load_quad(low + 4 * i));
    }
    static_assert(kWideBase == 1 << 7);
    return (I32)_mm512_add_epi32(lower, _mm512_slli_epi32(upper, 7));
  }

 private:
  static __m512i look_up(__m512i codes, const unsigned char (&table)[128]) {
    return _mm512_permutex2var_epi8(_mm512_load_si512(table), codes, _mm512_load_si512(table + kLine));
  }
};

}  // namespace HYBRID_ISA
}  // namespace hybrid
