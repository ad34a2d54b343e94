// AVX-512 with BF16 and VNNI dot products: a packed line is one operand as it stands.
#pragma once

#include "isa/avx512.h"

namespace hybrid {
namespace HYBRID_ISA {

// A line of mxfp4 opened as bf16 pairs by integer instructions. A code's number stands in a table with the largest
// exponents there are; what a scale is below that is taken off, and zero stays zero because the difference saturates.
// For scales of 2^-126 to 2^125, with which bf16 holds all codes; below, weights are zero.
struct WordFp4 {
  using Scale = __m512i;

  static Scale scale(const char* exponents) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(exponents)));
    const __m512i words = _mm512_or_si512(_mm512_slli_epi32(bytes, 7), _mm512_slli_epi32(bytes, 23));
    const __m512i below = _mm512_sub_epi16(_mm512_set1_epi16(kOne), words);
    return _mm512_mask_set1_epi32(below, _mm512_testn_epi32_mask(bytes, bytes), -1);
  }
  static __m512i open(const char* codes, Scale scale) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    // Word 0 of a column looks up the low half of its byte, word 1 the high half. The fifth bit that a look-up heeds
    // belongs to the other half, so the table is there twice.
    const __m512i index = _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12));
    return _mm512_subs_epu16(_mm512_permutexvar_epi16(index, numbers()), scale);
  }

 private:
  static constexpr short kOne = 252 << 7;  // 1 as bf16 if its exponent is so large that 6 has the largest

  static __m512i numbers() {
    constexpr short half = kOne - 128, one = kOne, two = one + 128, four = two + 128, more = 64;
    const __m256i sizes = _mm256_setr_epi16(0, half, one, one + more, two, two + more, four, four + more, 0, half, one,
                                            one + more, two, two + more, four, four + more);
    constexpr short minus = short(0x8000);
    const __m256i signs = _mm256_setr_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, minus, minus, minus, minus, minus, minus, minus);
    return _mm512_broadcast_i64x4(_mm256_or_si256(sizes, signs));
  }
};

struct Avx512Bf16 : Avx512 {
  using Line = __m512i;
  using Pair = __m512i;
  // Types of their own, so that dot products of the two kinds are told apart; vectors, because arrays of structs spill.
  typedef char Bytes __attribute__((vector_size(64)));
  typedef int I32 __attribute__((vector_size(64)));
  using Quad = Bytes;
  using Fp4 = WordFp4;
  static constexpr int max_rows = 6;
  static constexpr int max_blocks = 4;

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

  static I32 set_int(int x) { return (I32)_mm512_set1_epi32(x); }
  static I32 load_int(const int32_t* p) { return (I32)_mm512_loadu_si512(p); }
  static F32 to_f32(I32 x) { return _mm512_cvtepi32_ps((__m512i)x); }
  static Bytes load_bytes(const char* p) { return (Bytes)_mm512_load_si512(p); }
  static Bytes load_nibbles(const char* p, int high) { return (Bytes)nibbles(p, high); }
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
};

}  // namespace HYBRID_ISA
}  // namespace hybrid
