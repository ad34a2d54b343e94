// AVX-512 without BF16 instructions: bf16 pairs are widened to two fp32 vectors.
#pragma once

#include <immintrin.h>

#include "executor/args.h"

namespace hybrid {
namespace HYBRID_ISA {

struct Avx512 {
  using F32 = __m512;
  struct Line {
    __m512 even, odd;
  };
  using Pair = Line;
  static constexpr int max_rows = 8;
  static constexpr int max_blocks = 2;

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
  static F32 round(F32 x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F32 times_power_of_two(F32 x, F32 n) { return _mm512_scalef_ps(x, n); }
  static float sum(F32 x) { return _mm512_reduce_add_ps(x); }
  static float largest(F32 x) { return _mm512_reduce_max_ps(x); }
  static F32 keep(F32 x, int first, int last, float other) {
    const __mmask16 lanes = __mmask16(((1u << last) - 1) & ~((1u << first) - 1));
    return _mm512_mask_blend_ps(lanes, set(other), x);
  }
  static void store_bf16(bf16* p, F32 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(lsb, _mm512_set1_epi32(0x7fff)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }

  static Line load_line(const char* p) { return widen(_mm512_load_si512(p)); }
  static Pair load_pair(const bf16* p) {
    int bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    return widen(_mm512_set1_epi32(bits));
  }
  static F32 dot(F32 acc, Line line, Pair pair) { return fma(line.odd, pair.odd, fma(line.even, pair.even, acc)); }

 private:
  static Line widen(__m512i pairs) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000))))};
  }
};

}  // namespace HYBRID_ISA
}  // namespace hybrid
