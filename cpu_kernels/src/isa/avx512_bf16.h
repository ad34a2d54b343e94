// AVX-512 with BF16 and VNNI dot products: a packed line is one operand as it stands.
#pragma once

#include "isa/avx512.h"

namespace hybrid {
namespace HYBRID_ISA {

struct Avx512Bf16 : Avx512 {
  using Line = __m512i;
  using Pair = __m512i;
  // Types of their own, so that dot products of the two kinds are told apart; vectors, because arrays of structs spill.
  typedef char Bytes __attribute__((vector_size(64)));
  typedef int I32 __attribute__((vector_size(64)));
  using Quad = Bytes;
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
  template <int count>
  static I32 dot_wide(const Codes (&codes)[count], const char* high, const char* low, int start) {
    __m512i upper = _mm512_setzero_si512(), lower = _mm512_set1_epi32(start);
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) {
      upper = _mm512_dpbusd_epi32(upper, codes[i], (__m512i)load_quad(high + 4 * i));
      lower = _mm512_dpbusd_epi32(lower, codes[i], (__m512i)load_quad(low + 4 * i));
    }
    static_assert(kWideBase == 1 << 7);
    return (I32)_mm512_add_epi32(lower, _mm512_slli_epi32(upper, 7));
  }
};

}  // namespace HYBRID_ISA
}  // namespace hybrid
