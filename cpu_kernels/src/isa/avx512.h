// AVX-512 without BF16 instructions: bf16 pairs are widened to two fp32 vectors.
#pragma once

#include <immintrin.h>

#include "executor/wide.h"
#include "isa/small_sums.h"

namespace hybrid {
namespace HYBRID_ISA {

struct Avx512 {
  using F32 = __m512;
  struct Line {
    __m512 even, odd;
  };
  using Pair = Line;
  using I32 = __m512i;
  // Four bytes of a column as 16-bit pairs: inputs 0 and 2, inputs 1 and 3.
  struct Bytes {
    __m512i even, odd;
  };
  using Quad = Bytes;
  using Codes = __m512i;
  using Inputs = __m512i;
  typedef short Small __attribute__((vector_size(64)));  // a type of its own; sums of pairs of inputs
  static constexpr int max_rows = 8;
  static constexpr int max_blocks = 2;
  static constexpr int small_blocks = 2;
  static constexpr int group_rows = 4;
  static constexpr bool streams_codes = false;
  static constexpr bool has_tiles = false;

  static F32 zero() { return _mm512_setzero_ps(); }
  static F32 set(float x) { return _mm512_set1_ps(x); }
  static F32 load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F32 x) { _mm512_storeu_ps(p, x); }
  static F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
  static F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
  static F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
  static F32 div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
  static F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
  static F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
  static F32 max_magnitude(F32 top, F32 x) {
    const __m512i size = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(top), size));
  }
  static F32 round(F32 x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F32 times_power_of_two(F32 x, F32 n) { return _mm512_scalef_ps(x, n); }
  static float sum(F32 x) { return _mm512_reduce_add_ps(x); }
  static float max_lane(F32 x) { return _mm512_reduce_max_ps(x); }
  static float max_magnitude_lane(F32 x) {
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(_mm512_castps_si512(x)))));
  }
  static F32 keep(F32 x, int first, int last, float other) {
    const __mmask16 lanes = __mmask16(((1u << last) - 1) & ~((1u << first) - 1));
    return _mm512_mask_blend_ps(lanes, set(other), x);
  }
  static void store_bf16(bf16* p, F32 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(lsb, _mm512_set1_epi32(0x7fff));
    // Adding to a NaN could make a number of it.
    const __mmask16 number = _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q);
    const __m512i rounded = _mm512_mask_add_epi32(_mm512_set1_epi32(-1), number, bits, half);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }

  static Line load_line(const char* p) { return widen(_mm512_load_si512(p)); }
  static Pair load_pair(const bf16* p) {
    int bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    return widen(_mm512_set1_epi32(bits));
  }
  static F32 dot(F32 acc, Line line, Pair pair) { return fma(line.odd, pair.odd, fma(line.even, pair.even, acc)); }
  static Line make_line(F32 even, F32 odd) { return {even, odd}; }
  static Line load_fp8(const char* line, int step) {
    const char* pair = line + step * 2 * kBlock;
    return make_line(from_fp8(pair), from_fp8(pair + kBlock));
  }
  static void store_line(char* p, Line line) { _mm512_store_si512(p, pair_bits(line.even, line.odd)); }

  static void turn_lines(const char* lines, char* out) {
    // Two inputs of two columns are a word, whose middle parts change places; then the words are turned, 8 by 8: four
    // lines are a half of all that come out, so that few registers are taken from whatever runs beside this.
    const __m512i middle = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
    const auto store = [&](int line, __m512i words) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + line * kLine), _mm512_castsi512_si256(words));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (line + 4) * kLine), _mm512_extracti64x4_epi64(words, 1));
    };
    for (int half = 0; half < 2; ++half, lines += 4 * kLine, out += kLine / 2) {
      __m512i a[4];
      for (int i = 0; i < 4; ++i) a[i] = _mm512_shuffle_epi8(_mm512_loadu_si512(lines + i * kLine), middle);
      const __m512i b[] = {_mm512_unpacklo_epi64(a[0], a[1]), _mm512_unpackhi_epi64(a[0], a[1]),
                           _mm512_unpacklo_epi64(a[2], a[3]), _mm512_unpackhi_epi64(a[2], a[3])};
      for (int i = 0; i < 2; ++i) {
        store(i, _mm512_mask_permutex_epi64(b[i], 0xcc, b[i + 2], 0x44));
        store(i + 2, _mm512_mask_permutex_epi64(b[i + 2], 0x33, b[i], 0xee));
      }
    }
  }

  static constexpr int small_steps(int bits) { return small_sum_steps(bits); }
  static I32 set_int(int x) { return _mm512_set1_epi32(x); }
  static F32 to_f32(I32 x) { return _mm512_cvtepi32_ps(x); }
  static Bytes load_bytes(const char* p) { return widen_bytes(_mm512_load_si512(p)); }
  static Codes load_nibbles(const char* p, int high) { return nibbles(p, high); }
  static void store_nibbles(char* p, const char* from, int high) { _mm512_store_si512(p, nibbles(from, high)); }
  static Codes load_twos(const char* p, int step) { return twos(p, step); }
  static void store_twos(char* p, const char* from, int step) { _mm512_store_si512(p, twos(from, step)); }
  static Bytes load_tabled(const char* p, int high, const char* table) { return widen_bytes(tabled(p, high, table)); }
  static void store_tabled(char* p, const char* from, int high, const char* table) {
    _mm512_store_si512(p, tabled(from, high, table));
  }
  static Codes load_joined(const char* p, int high, const char* bits, int up, int mask) {
    return joined(p, high, bits, up, mask);
  }
  static void store_joined(char* p, const char* from, int high, const char* bits, int up, int mask) {
    _mm512_store_si512(p, joined(from, high, bits, up, mask));
  }
  static Quad load_quad(const char* p) {
    const __m512i all = all_of(p);
    return {_mm512_srai_epi16(_mm512_slli_epi16(all, 8), 8), _mm512_srai_epi16(all, 8)};
  }
  static I32 dot(I32 acc, Bytes bytes, Quad quad) {
    acc = _mm512_add_epi32(acc, _mm512_madd_epi16(bytes.even, quad.even));
    return settled(_mm512_add_epi32(acc, _mm512_madd_epi16(bytes.odd, quad.odd)));
  }
  static Codes load_codes(const char* p) { return _mm512_load_si512(p); }
  static Inputs load_inputs(const char* p) { return all_of(p); }
  static Small begin_small(I32) { return Small{}; }
  static Small dot(Small acc, Codes codes, Inputs inputs) {
    return settled(acc + (Small)_mm512_maddubs_epi16(codes, inputs));
  }
  static I32 join(I32 sum, Small part) {
    return _mm512_add_epi32(sum, _mm512_madd_epi16((__m512i)part, _mm512_set1_epi16(1)));
  }

  static Codes load_fp4(const char* p, int high) {
    const __m512i doubled = _mm512_broadcast_i32x4(_mm_setr_epi8(HYBRID_FP4_CODES));
    return _mm512_shuffle_epi8(doubled, nibbles(p, high));
  }
  template <int count>
  static I32 dot_wide(const Codes (&codes)[count], const char* high, const char* low, int start) {
    __m512i upper = _mm512_setzero_si512(), lower = upper;  // pairs of inputs, in 16 bits
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) {
      upper = _mm512_add_epi16(upper, _mm512_maddubs_epi16(codes[i], all_of(high + 4 * i)));
      lower = _mm512_add_epi16(lower, _mm512_maddubs_epi16(codes[i], all_of(low + 4 * i)));
    }
    upper = _mm512_madd_epi16(upper, _mm512_set1_epi16(kWideBase));
    lower = _mm512_madd_epi16(lower, _mm512_set1_epi16(1));
    return _mm512_add_epi32(_mm512_add_epi32(upper, lower), _mm512_set1_epi32(start));
  }

  static F32 from_bf16(const char* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_256(p)), 16));
  }
  static F32 from_fp16(const char* p) { return _mm512_cvtph_ps(load_256(p)); }
  static F32 from_int8(const char* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_128(p))); }
  static F32 from_nibbles(const char* p, int high) {
    const __m128i bytes = _mm_srli_epi16(load_128(p), high ? 4 : 0);
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_and_si128(bytes, _mm_set1_epi8(15))));
  }
  static F32 from_fp8(const char* p) {
    // As fp16 the same bits are 2^-8 of the value, subnormals included; the sign is shifted into place twice.
    const __m256i shifted = _mm256_slli_epi16(_mm256_cvtepi8_epi16(load_128(p)), 7);
    return _mm512_cvtph_ps(_mm256_and_si256(shifted, _mm256_set1_epi16(short(0xbfff))));
  }
  static F32 from_e8m0(const char* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu8_epi32(load_128(p)), 23));
  }
  static void store_int8(char* p, F32 x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
  }

 protected:
  static __m128i load_128(const char* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static __m256i load_256(const char* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static __m512i all_of(const char* p) {
    int bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    return _mm512_set1_epi32(bits);
  }
  static __m512i nibbles(const char* p, int high) {
    const __m512i bytes = _mm512_load_si512(p);
    return _mm512_and_si512(high ? _mm512_srli_epi16(bytes, 4) : bytes, _mm512_set1_epi8(15));
  }
  static __m512i twos(const char* p, int step) {
    return _mm512_and_si512(_mm512_srli_epi16(_mm512_load_si512(p), unsigned(2 * step)), _mm512_set1_epi8(3));
  }
  static __m512i tabled(const char* p, int high, const char* table) {
    return _mm512_shuffle_epi8(_mm512_load_si512(table), nibbles(p, high));
  }
  static __m512i joined(const char* p, int high, const char* bits, int up, int mask) {
    const __m512i line = _mm512_load_si512(bits);
    const __m512i moved = up < 0 ? _mm512_srli_epi16(line, -up) : _mm512_slli_epi16(line, up);
    return _mm512_ternarylogic_epi32(nibbles(p, high), moved, _mm512_set1_epi8(char(mask)),
                                     0xf8);  // low | moved & mask
  }
  // Values that bf16 holds exactly: cutting off the lower half loses nothing.
  static __m512i pair_bits(F32 even, F32 odd) {
    const __m512i high = _mm512_set1_epi32(int(0xffff0000)), low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
    return _mm512_ternarylogic_epi32(low, _mm512_castps_si512(odd), high, 0xf8);  // low | (odd & high)
  }

 private:
  // Added before what follows: GCC adds whole numbers in any order, and products that wait take the registers of sums.
  template <class Vector>
  static Vector settled(Vector sum) {
    __asm__("" : "+v"(sum));
    return sum;
  }
  static Bytes widen_bytes(__m512i bytes) {
    return {_mm512_and_si512(bytes, _mm512_set1_epi16(255)), _mm512_srli_epi16(bytes, 8)};
  }
  static Line widen(__m512i pairs) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000))))};
  }
};

}  // namespace HYBRID_ISA
}  // namespace hybrid
