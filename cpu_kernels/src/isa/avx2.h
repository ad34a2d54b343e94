// AVX2 with FMA: sixteen lanes are two registers.
#pragma once

#include <immintrin.h>

#include "executor/wide.h"
#include "isa/small_sums.h"
#include "isa/turned_lines.h"

namespace hybrid {
namespace HYBRID_ISA {

struct Avx2 {
  struct F32 {
    __m256 lo, hi;
  };
  struct Line {
    F32 even, odd;
  };
  struct Pair {
    __m256 even, odd;
  };
  struct I32 {
    __m256i lo, hi;
  };
  // Four bytes of a column as 16-bit pairs: inputs 0 and 2, inputs 1 and 3.
  struct Half {
    __m256i even, odd;
  };
  struct Bytes {
    Half lo, hi;
  };
  using Quad = Half;
  struct Codes {
    __m256i lo, hi;
  };
  using Inputs = __m256i;
  // Sums of pairs of inputs.
  struct Small {
    __m256i lo, hi;
  };
  // Beside two blocks more sums than registers: they are added to where they lie in L1, which measured twice as fast as
  // fewer rows that fit, since every line is widened once for all of them. Codes are not widened, and one block's fit.
  static constexpr int max_rows = 6;
  static constexpr int max_blocks = 2;
  static constexpr int small_blocks = 1;
  static constexpr int group_rows = 4;
  static constexpr bool streams_codes = false;
  static constexpr bool has_tiles = false;

  static F32 zero() { return set(0.0f); }
  static F32 set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static F32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float* p, F32 x) {
    _mm256_storeu_ps(p, x.lo);
    _mm256_storeu_ps(p + 8, x.hi);
  }
  static F32 add(F32 a, F32 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
  static F32 sub(F32 a, F32 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
  static F32 mul(F32 a, F32 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
  static F32 div(F32 a, F32 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
  static F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
  static F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
  static F32 max_magnitude(F32 top, F32 x) { return {max_magnitude(top.lo, x.lo), max_magnitude(top.hi, x.hi)}; }
  static F32 round(F32 x) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.lo, mode), _mm256_round_ps(x.hi, mode)};
  }
  static F32 times_power_of_two(F32 x, F32 n) {
    return {_mm256_mul_ps(x.lo, power_of_two(n.lo)), _mm256_mul_ps(x.hi, power_of_two(n.hi))};
  }
  static float sum(F32 x) {
    const __m256 a = _mm256_add_ps(x.lo, x.hi);
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
  }
  static float max_lane(F32 x) {
    const __m256 a = _mm256_max_ps(x.lo, x.hi);
    __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
  }
  static float max_magnitude_lane(F32 x) {
    const __m256i a = _mm256_max_epi32(_mm256_castps_si256(x.lo), _mm256_castps_si256(x.hi));
    __m128i b = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    b = _mm_max_epi32(b, _mm_shuffle_epi32(b, 0x4e));
    b = _mm_max_epi32(b, _mm_shuffle_epi32(b, 0xb1));
    return _mm_cvtss_f32(_mm_castsi128_ps(b));
  }
  static F32 keep(F32 x, int first, int last, float other) {
    const __m256i lo = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i hi = _mm256_add_epi32(lo, _mm256_set1_epi32(8));
    return {keep_half(x.lo, lo, first, last, other), keep_half(x.hi, hi, first, last, other)};
  }
  static void store_bf16(bf16* p, F32 x) {
    const __m256i packed = _mm256_packus_epi32(round_bf16(x.lo), round_bf16(x.hi));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
  }

  static Line load_line(const char* p) {
    const __m256i lo = _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i hi = _mm256_load_si256(reinterpret_cast<const __m256i*>(p + 32));
    return {{even(lo), even(hi)}, {odd(lo), odd(hi)}};
  }
  static Pair load_pair(const bf16* p) {
    int bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    const __m256i both = _mm256_set1_epi32(bits);
    return {even(both), odd(both)};
  }
  static F32 dot(F32 acc, Line line, Pair pair) {
    const __m256 lo = _mm256_fmadd_ps(line.even.lo, pair.even, acc.lo);
    const __m256 hi = _mm256_fmadd_ps(line.even.hi, pair.even, acc.hi);
    return {_mm256_fmadd_ps(line.odd.lo, pair.odd, lo), _mm256_fmadd_ps(line.odd.hi, pair.odd, hi)};
  }
  static Line make_line(F32 even, F32 odd) { return {even, odd}; }
  static Line load_fp8(const char* line, int step) {
    const char* pair = line + step * 2 * kBlock;
    return make_line(from_fp8(pair), from_fp8(pair + kBlock));
  }
  static void store_line(char* p, Line line) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(p), pair_bits(line.even.lo, line.odd.lo));
    _mm256_store_si256(reinterpret_cast<__m256i*>(p + 32), pair_bits(line.even.hi, line.odd.hi));
  }

  static void turn_lines(const char* lines, char* out) { turn_words(lines, out); }

  static constexpr int small_steps(int bits) { return small_sum_steps(bits); }
  static I32 set_int(int x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
  static F32 to_f32(I32 x) { return {_mm256_cvtepi32_ps(x.lo), _mm256_cvtepi32_ps(x.hi)}; }
  static Bytes load_bytes(const char* p) { return {widen_bytes(load_256(p)), widen_bytes(load_256(p + 32))}; }
  static Codes load_nibbles(const char* p, int high) { return {nibbles(p, high), nibbles(p + 32, high)}; }
  static void store_nibbles(char* p, const char* from, int high) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(p), nibbles(from, high));
    _mm256_store_si256(reinterpret_cast<__m256i*>(p + 32), nibbles(from + 32, high));
  }
  static Codes load_twos(const char* p, int step) { return {twos(p, step), twos(p + 32, step)}; }
  static void store_twos(char* p, const char* from, int step) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(p), twos(from, step));
    _mm256_store_si256(reinterpret_cast<__m256i*>(p + 32), twos(from + 32, step));
  }
  static Bytes load_tabled(const char* p, int high, const char* table) {
    return {widen_bytes(tabled(p, high, table)), widen_bytes(tabled(p + 32, high, table))};
  }
  static void store_tabled(char* p, const char* from, int high, const char* table) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(p), tabled(from, high, table));
    _mm256_store_si256(reinterpret_cast<__m256i*>(p + 32), tabled(from + 32, high, table));
  }
  static Codes load_joined(const char* p, int high, const char* bits, int up, int mask) {
    return {joined(p, high, bits, up, mask), joined(p + 32, high, bits + 32, up, mask)};
  }
  static void store_joined(char* p, const char* from, int high, const char* bits, int up, int mask) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(p), joined(from, high, bits, up, mask));
    _mm256_store_si256(reinterpret_cast<__m256i*>(p + 32), joined(from + 32, high, bits + 32, up, mask));
  }
  static Quad load_quad(const char* p) {
    const __m256i all = all_of(p);
    return {_mm256_srai_epi16(_mm256_slli_epi16(all, 8), 8), _mm256_srai_epi16(all, 8)};
  }
  static I32 dot(I32 acc, Bytes bytes, Quad quad) {
    return {dot_half(acc.lo, bytes.lo, quad), dot_half(acc.hi, bytes.hi, quad)};
  }
  static Codes load_codes(const char* p) { return {load_256(p), load_256(p + 32)}; }
  static Inputs load_inputs(const char* p) { return all_of(p); }
  static Small begin_small(I32) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static Small dot(Small acc, Codes codes, Inputs inputs) {
    return {settled(_mm256_add_epi16(acc.lo, _mm256_maddubs_epi16(codes.lo, inputs))),
            settled(_mm256_add_epi16(acc.hi, _mm256_maddubs_epi16(codes.hi, inputs)))};
  }
  static I32 join(I32 sum, Small part) {
    const __m256i ones = _mm256_set1_epi16(1);
    return {_mm256_add_epi32(sum.lo, _mm256_madd_epi16(part.lo, ones)),
            _mm256_add_epi32(sum.hi, _mm256_madd_epi16(part.hi, ones))};
  }

  static Codes load_fp4(const char* p, int high) {
    const __m256i doubled = _mm256_broadcastsi128_si256(_mm_setr_epi8(HYBRID_FP4_CODES));
    return {_mm256_shuffle_epi8(doubled, nibbles(p, high)), _mm256_shuffle_epi8(doubled, nibbles(p + 32, high))};
  }
  template <int count>
  static I32 dot_wide(const Codes (&codes)[count], const char* high, const char* low, int start) {
    const __m256i zero = _mm256_setzero_si256();
    I32 upper{zero, zero}, lower{zero, zero};  // pairs of inputs, in 16 bits
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) {
      const __m256i above = all_of(high + 4 * i), below = all_of(low + 4 * i);
      upper.lo = settled(_mm256_add_epi16(upper.lo, _mm256_maddubs_epi16(codes[i].lo, above)));
      upper.hi = settled(_mm256_add_epi16(upper.hi, _mm256_maddubs_epi16(codes[i].hi, above)));
      lower.lo = settled(_mm256_add_epi16(lower.lo, _mm256_maddubs_epi16(codes[i].lo, below)));
      lower.hi = settled(_mm256_add_epi16(lower.hi, _mm256_maddubs_epi16(codes[i].hi, below)));
    }
    return {join_wide(upper.lo, lower.lo, start), join_wide(upper.hi, lower.hi, start)};
  }

  static F32 from_bf16(const char* p) { return {widen_bf16(load_128(p)), widen_bf16(load_128(p + 16))}; }
  static F32 from_fp16(const char* p) { return {_mm256_cvtph_ps(load_128(p)), _mm256_cvtph_ps(load_128(p + 16))}; }
  static F32 from_int8(const char* p) { return from_int8(load_128(p)); }
  static F32 from_nibbles(const char* p, int high) {
    return from_int8(_mm_and_si128(_mm_srli_epi16(load_128(p), high ? 4 : 0), _mm_set1_epi8(15)));
  }
  static F32 from_fp8(const char* p) {
    // As fp16 the same bits are 2^-8 of the value, subnormals included; the sign is shifted into place twice.
    const __m256i shifted = _mm256_slli_epi16(_mm256_cvtepi8_epi16(load_128(p)), 7);
    const __m256i half = _mm256_and_si256(shifted, _mm256_set1_epi16(short(0xbfff)));
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(half)), _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1))};
  }
  static F32 from_e8m0(const char* p) {
    const __m128i bytes = load_128(p);
    return {from_exponent(bytes), from_exponent(_mm_srli_si128(bytes, 8))};
  }
  static void store_int8(char* p, F32 x) {
    const __m256i words =
        _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(x.lo), _mm256_cvtps_epi32(x.hi)), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
  }

 private:
  static __m128i load_128(const char* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static __m256i load_256(const char* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static __m256i all_of(const char* p) {
    int bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    return _mm256_set1_epi32(bits);
  }
  static __m256i join_wide(__m256i upper, __m256i lower, int start) {
    upper = _mm256_madd_epi16(upper, _mm256_set1_epi16(kWideBase));
    lower = _mm256_madd_epi16(lower, _mm256_set1_epi16(1));
    return _mm256_add_epi32(_mm256_add_epi32(upper, lower), _mm256_set1_epi32(start));
  }
  static __m256i nibbles(const char* p, int high) {
    const __m256i bytes = load_256(p);
    return _mm256_and_si256(high ? _mm256_srli_epi16(bytes, 4) : bytes, _mm256_set1_epi8(15));
  }
  static __m256i twos(const char* p, int step) {
    return _mm256_and_si256(_mm256_srli_epi16(load_256(p), 2 * step), _mm256_set1_epi8(3));
  }
  static __m256i tabled(const char* p, int high, const char* table) {
    return _mm256_shuffle_epi8(load_256(table), nibbles(p, high));
  }
  static __m256i joined(const char* p, int high, const char* bits, int up, int mask) {
    const __m256i line = load_256(bits);
    const __m256i moved = up < 0 ? _mm256_srli_epi16(line, -up) : _mm256_slli_epi16(line, up);
    return _mm256_or_si256(nibbles(p, high), _mm256_and_si256(moved, _mm256_set1_epi8(char(mask))));
  }
  static Half widen_bytes(__m256i bytes) {
    return {_mm256_and_si256(bytes, _mm256_set1_epi16(255)), _mm256_srli_epi16(bytes, 8)};
  }
  // Added before what follows: GCC adds whole numbers in any order, and products that wait take the registers of sums.
  static __m256i settled(__m256i sum) {
    __asm__("" : "+x"(sum));
    return sum;
  }
  static __m256i dot_half(__m256i acc, Half bytes, Quad quad) {
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(bytes.even, quad.even));
    return settled(_mm256_add_epi32(acc, _mm256_madd_epi16(bytes.odd, quad.odd)));
  }
  static __m256 widen_bf16(__m128i bits) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static F32 from_int8(__m128i bytes) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
  }
  static __m256 from_exponent(__m128i bytes) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu8_epi32(bytes), 23));
  }
  // Values that bf16 holds exactly: cutting off the lower half loses nothing.
  static __m256i pair_bits(__m256 even, __m256 odd) {
    const __m256i low = _mm256_srli_epi32(_mm256_castps_si256(even), 16);
    return _mm256_blend_epi16(low, _mm256_castps_si256(odd), 0xaa);
  }
  static __m256 even(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
  static __m256 odd(__m256i pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000))));
  }
  static __m256 max_magnitude(__m256 top, __m256 x) {
    const __m256i size = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(top), size));
  }
  static __m256 power_of_two(__m256 n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
  }
  static __m256 keep_half(__m256 x, __m256i lane, int first, int last, float other) {
    const __m256i in = _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(first), lane),
                                           _mm256_cmpgt_epi32(_mm256_set1_epi32(last), lane));
    return _mm256_blendv_ps(_mm256_set1_ps(other), x, _mm256_castsi256_ps(in));
  }
  static __m256i round_bf16(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i lsb = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(lsb, _mm256_set1_epi32(0x7fff));
    // Adding to a NaN could make a number of it.
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_or_si256(_mm256_add_epi32(bits, half), nan), 16);
  }
};

}  // namespace HYBRID_ISA
}  // namespace hybrid
