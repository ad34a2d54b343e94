// AMX beside AVX-512: eight registers of 16 lines of 64 bytes, and products of two of them added to a third.
//
// A tile of the left operand is 16 rows of 64 bytes, one of the right operand 16 lines, as they are stored or opened,
// one of sums 16 rows of 16 columns. Few rows take the kernels of AVX-512 on the same packed layout.
#pragma once

#include "isa/avx512_bf16.h"

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
  // Inputs 2 * pair and 2 * pair + 1 of the eight of a line.
  static __m512i open(const char* line, int pair, Scale scale) {
    // Words look up the codes of two bytes, each of which is brought to the low end of its word. The fifth bit that a
    // look-up heeds belongs to the other half of a byte, so the table is there twice.
    const __m512i bytes = _mm512_srli_epi32(_mm512_load_si512(line), unsigned(pair % 2 * 16 + pair / 2 * 4));
    const __m512i index = _mm512_mask_blend_epi16(0xaaaaaaaa, bytes, _mm512_slli_epi32(bytes, 8));
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

// Lines of int4 opened to signed bytes in steps of a common scale, in which the code -8 of the largest scale is -127.
struct ScaledNibbles {
  using Factor = __m512i;

  // The larger magnitude of two scales of each column. As integers, so that NaN is the largest.
  static __m512 larger(__m512 a, __m512 b) {
    const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(b), _mm512_set1_epi32(0x7fffffff));
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), magnitude));
  }
  static __m512 common(__m512 largest) { return _mm512_mul_ps(largest, _mm512_set1_ps(8.0f / 127)); }
  // By which all scales below `largest` are multiplied to give factors.
  static __m512 inverse(__m512 largest) { return _mm512_div_ps(_mm512_set1_ps(127 * 256), largest); }
  // 2048 times a scale, in common ones: in both words of a column.
  static Factor factor(__m512 scale, __m512 inverse) {
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(scale, inverse));
    return _mm512_mask_blend_epi16(0xaaaaaaaa, whole, _mm512_slli_epi32(whole, 16));
  }
  // Two lines: the low halves of bytes, then the high ones. Even bytes are multiplied as the code times 16 and are the
  // rounded upper half of that; odd ones as the code times 4096, which leaves them where they belong.
  static void open(const char* line, Factor factor, char* out) {
    const __m512i codes = _mm512_xor_si512(_mm512_load_si512(line), _mm512_set1_epi8(char(0x88)));
    const __m512i top = _mm512_set1_epi16(short(0xf000));
    const __m512i high_even = _mm512_slli_epi16(_mm512_and_si512(codes, _mm512_set1_epi16(0xf0)), 8);
    store(out, _mm512_slli_epi16(codes, 12), _mm512_and_si512(_mm512_slli_epi16(codes, 4), top), factor);
    store(out + kLine, high_even, _mm512_and_si512(codes, top), factor);
  }

 private:
  static void store(char* out, __m512i even, __m512i odd, Factor factor) {
    const __m512i low = _mm512_mulhrs_epi16(_mm512_srai_epi16(even, 8), factor);
    const __m512i high = _mm512_add_epi16(_mm512_mulhrs_epi16(odd, factor), _mm512_set1_epi16(0x80));
    _mm512_store_si512(out, _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaa, low, high));
  }
};

// A line of codes, four inputs of 16 columns, opened to two lines of bf16 pairs: times a scale, and some start.
struct ScaledCodes {
  // NaN becomes infinity: what rounds below would make a number of some.
  static __m512 factor(__m512 x) { return _mm512_min_ps(x, _mm512_set1_ps(__builtin_inff())); }
  static void open(Avx512Bf16::Bytes bytes, __m512 scale, __m512 start, char* out) {
    const __m512i codes = (__m512i)bytes, low = _mm512_set1_epi32(255);
    const auto value = [&](__m512i code) { return _mm512_fmadd_ps(_mm512_cvtepi32_ps(code), scale, start); };
    const __m512 first = value(_mm512_and_si512(codes, low));
    const __m512 second = value(_mm512_and_si512(_mm512_srli_epi32(codes, 8), low));
    const __m512 third = value(_mm512_and_si512(_mm512_srli_epi32(codes, 16), low));
    const __m512 fourth = value(_mm512_srli_epi32(codes, 24));
    _mm512_store_si512(out, Avx512Bf16::make_line(rounded(first), rounded(second)));
    _mm512_store_si512(out + kLine, Avx512Bf16::make_line(rounded(third), rounded(fourth)));
  }

 private:
  // The upper half is bf16. Integers, since the instruction that converts takes as long as four of these.
  static __m512 rounded(__m512 x) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000)));
  }
};

// Assembly instead of intrinsics: those take no template parameter for the number of a tile, and gcc's do not say which
// memory they read, so that stores before them could come too late.
struct Amx : Avx512Bf16 {
  static constexpr bool has_tiles = true;
  using Fp4 = WordFp4;
  using Nibbles = ScaledNibbles;
  using GroupPairs = ScaledCodes;

  // Tiles [0, 4) hold 16 rows of sums, [4, 6) 16 rows of the left operand, [6, 8) 16 lines of the right one.
  static void load_tiles() {
    struct alignas(64) {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } shape = {};
    shape.palette = 1;
    for (int i = 0; i < 8; ++i) {
      shape.rows[i] = kBlock;
      shape.row_bytes[i] = kLine;
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(shape));
  }
  static void release_tiles() { __asm__ volatile("tilerelease" : : : "memory"); }

  template <int tile>
  static void clear_tile() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(tile));
  }
  template <int tile>
  static void load_tile(const void* p, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(tile) : "memory");
  }
  // Lines that a strip of rows in the first-level cache is to survive: they come from the second and leave it soon.
  template <int tile>
  static void load_passing_tile(const void* p, int64_t stride) {
    __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(tile) : "memory");
  }
  template <int tile>
  static void store_tile(void* p, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(tile) : "memory");
  }

  // Tile `sums` += tile `left` times tile `right`: bf16, or signed bytes times unsigned or signed ones.
  template <int sums, int left, int right>
  static void multiply_bf16() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(left), "i"(right));
  }
  template <int sums, int left, int right>
  static void multiply_unsigned() {
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(left), "i"(right));
  }
  template <int sums, int left, int right>
  static void multiply_signed() {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(left), "i"(right));
  }
};

}  // namespace HYBRID_ISA
}  // namespace hybrid
