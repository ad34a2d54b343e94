// Keys and values as they lie in the arena: bf16, or bytes with a scale for every token and head.
//
// They are operands of the one product: 16 tokens are the columns of a block of keys, whose lines run over dimensions;
// 16 dimensions are the columns of a block of values, whose lines run over tokens.
#pragma once

#include "ops/product.h"
#include "ops/quantise.h"

namespace hybrid {
namespace HYBRID_ISA {

constexpr float kMinScaled = 2e-36f;  // below, 448 / x would overflow

struct KvBf16 : Bf16 {
  static constexpr bool scaled = false;
  static constexpr int key_step = 4;  // bytes from token to token in a line of keys
  static constexpr int value_step = 2;
};

// Bytes: a line of keys is [4 dimensions][16 tokens], one of values [4 tokens][16 dimensions].
struct KvInt8 : FloatKind {
  static constexpr bool scaled = true;
  static constexpr int key_step = 1;
  static constexpr int value_step = kBlock;
  static constexpr int line_inputs = 4;
  static constexpr int steps = 2;
  static constexpr bool opened = false;
  static constexpr float max_code = 127;
  static constexpr float unit = 1;  // of what an operand holds
  struct Scale {};

  static HYBRID_INLINE Scale scale(const char*, int) { return {}; }
  static HYBRID_INLINE Line operand(const char* line, int step, Scale) {
    const char* pair = line + step * 2 * kBlock;
    return Isa::make_line(Isa::from_int8(pair), Isa::from_int8(pair + kBlock));
  }
  static HYBRID_INLINE void open(const char* line, Scale scale, char* out) {
    for (int step = 0; step < steps; ++step) Isa::store_line(out + step * kLine, operand(line, step, scale));
  }
  static HYBRID_INLINE void encode(char* out, F32 x) { Isa::store_int8(out, x); }
  static HYBRID_INLINE F32 widen(const char* codes) { return Isa::from_int8(codes); }
};

// The e4m3 code nearest to x, ties to even; what is too large becomes the largest.
static HYBRID_INLINE char to_fp8(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = bits >> 24 & 0x80, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return char(sign | 0x7f);   // NaN
  if (size >= 0x43e00000) return char(sign | 0x7e);  // 448
  if (size >= 0x3c800000) return char(sign | ((size + 0x7ffff + (size >> 20 & 1) - (120u << 23)) >> 20));
  // Below 2^-6 codes are multiples of 2^-9, which is what fp32 is rounded to beside 2^14.
  constexpr float beside = 16384.0f;
  const float sum = __builtin_fabsf(x) + beside;
  return char(sign | uint32_t((sum - beside) * 512.0f));
}

struct KvFp8 : Fp8 {
  static constexpr bool scaled = true;
  static constexpr int key_step = 1;
  static constexpr int value_step = kBlock;
  static constexpr float max_code = 448;
  static constexpr float unit = 256;  // from_fp8 gives 2^-8

  static HYBRID_INLINE void encode(char* out, F32 x) {
    float lanes[kBlock];
    Isa::store(lanes, x);
    for (int i = 0; i < kBlock; ++i) out[i] = to_fp8(lanes[i]);
  }
  static HYBRID_INLINE F32 widen(const char* codes) { return Isa::from_fp8(codes); }
};

static HYBRID_INLINE char* kv_head(const KvLayout& kv, int sequence, int head) {
  return kv.base + sequence * kv.sequence_stride + head * kv.head_stride;
}

// Bytes of one token's key or value of `dim` dimensions.
template <class Kv>
static constexpr int64_t token_bytes(int dim) {
  return int64_t(dim) * (Kv::scaled ? 1 : 2);
}

template <class Kv>
static HYBRID_INLINE char* key_at(const KvLayout& kv, int sequence, int head, int position) {
  return kv_head(kv, sequence, head) + position / kBlock * kBlock * token_bytes<Kv>(kv.key_dim) +
         position % kBlock * Kv::key_step;
}

template <class Kv>
static HYBRID_INLINE char* value_at(const KvLayout& kv, int sequence, int head, int position) {
  constexpr int line = Kv::line_inputs;
  return kv_head(kv, sequence, head) + kv.value_offset + position / line * line * token_bytes<Kv>(kv.value_dim) +
         position % line * Kv::value_step;
}

static HYBRID_INLINE float* key_scale(const KvLayout& kv, int sequence, int head, int position) {
  return reinterpret_cast<float*>(kv_head(kv, sequence, head) + kv.key_scales) + position;
}
static HYBRID_INLINE float* value_scale(const KvLayout& kv, int sequence, int head, int position) {
  return reinterpret_cast<float*>(kv_head(kv, sequence, head) + kv.value_scales) + position;
}

// Codes of x [dim], rounded up to whole vectors; returns their scale. The largest magnitude gets the largest code.
// Where one is NaN or infinite, codes are zero and the scale is that one.
template <class Kv>
static HYBRID_INLINE float encode(char* codes, const float* x, int dim) {
  const float maximum = largest_magnitude(x, dim);
  if (!__builtin_isfinite(maximum)) {
    __builtin_memset(codes, 0, size_t(dim));
    return maximum;
  }
  const F32 factor = Isa::set(maximum > kMinScaled ? Kv::max_code / maximum : 0.0f);
  for (int i = 0; i < dim; i += kBlock) Kv::encode(codes + i, Isa::mul(load_some(x + i, min(kBlock, dim - i)), factor));
  return maximum / Kv::max_code;
}

static HYBRID_INLINE void to_bf16(bf16* out, const float* x, int width) {
  for (int i = 0; i < width; i += kBlock) {
    const int count = min(kBlock, width - i);
    store_some_bf16(out + i, load_some(x + i, count), count);
  }
}

// A token's key and value of one head, into the arena.
template <class Kv>
static HYBRID_INLINE void store_key(const KvLayout& kv, int sequence, int head, int position, const float* x, int dim) {
  char* const out = key_at<Kv>(kv, sequence, head, position);
  if constexpr (Kv::scaled) {
    char codes[kMaxHeadDim];
    *key_scale(kv, sequence, head, position) = encode<Kv>(codes, x, dim);
    for (int i = 0; i < dim; ++i) out[i * kBlock] = codes[i];
  } else {
    bf16 bits[kMaxHeadDim];
    to_bf16(bits, x, dim);
    for (int i = 0; i < dim; i += 2) __builtin_memcpy(out + int64_t(i / 2) * kLine, bits + i, 4);
  }
}

template <class Kv>
static HYBRID_INLINE void store_value(const KvLayout& kv, int sequence, int head, int position, const float* x,
                                      int dim) {
  char* const out = value_at<Kv>(kv, sequence, head, position);
  if constexpr (Kv::scaled) {
    char codes[kMaxHeadDim];
    *value_scale(kv, sequence, head, position) = encode<Kv>(codes, x, dim);
    for (int i = 0; i < dim; ++i) out[i / kBlock * kLine + i % kBlock] = codes[i];
  } else {
    bf16 bits[kMaxHeadDim];
    to_bf16(bits, x, dim);
    for (int i = 0; i < dim; ++i) __builtin_memcpy(out + i * 4, bits + i, 2);
  }
}

// Calls function with the traits of the layout's format.
template <class Function>
static HYBRID_INLINE void with_kv_format(Format format, Function function) {
  if (format == Format::int8) return function(KvInt8{});
  if (format == Format::fp8) return function(KvFp8{});
  function(KvBf16{});
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
