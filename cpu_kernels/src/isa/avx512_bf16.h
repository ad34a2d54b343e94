// AVX-512 with BF16 dot products: a packed line is one operand as it stands.
#pragma once

#include "isa/avx512.h"

namespace hybrid {
namespace HYBRID_ISA {

struct Avx512Bf16 : Avx512 {
  using Line = __m512i;
  using Pair = __m512i;
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
};

}  // namespace HYBRID_ISA
}  // namespace hybrid
