// Up to 32 rows over some blocks of a panel, which is one pass of tiles. Passes overlap: a tile of sums is stored when
// the next pass needs it, and segments are merged between the products of those behind them. While tiles multiply,
// vectors add or multiply one line a cycle, and one line is stored, so that merging is free where a segment is long.
//
// Sums of a segment of int8 are those of the other kernels, exactly, so that it gives the same bits.
#pragma once

#include "ops/tile_strip.h"

namespace hybrid {
namespace HYBRID_ISA {

// Lines of some blocks that are asked for between products: what the next panel reads from memory. Four blocks by
// turns, because four streams are read faster than one.
struct BlocksAhead {
  static constexpr int kStreams = 4;
  const char* at;
  int64_t stride;  // from block to block
  int lines;       // of each block
  int line, left;  // the next of four, and how many are left
  int each;        // after every step of products

  // The lines from the `done`-th on.
  static HYBRID_INLINE BlocksAhead from(const char* at, int64_t stride, int lines, int done, int left, int each) {
    const int whole = max(1, lines), line = done % whole;
    return {at + done / whole * kStreams * stride + int64_t(line) * kLine, stride, lines, line, left, each};
  }
  HYBRID_INLINE void fetch() {
    for (int k = 0; k < each && left > 0; ++k, --left) {
      for (int j = 0; j < kStreams; ++j) __builtin_prefetch(at + j * stride, 0, 2);
      at += kLine;
      if (++line < lines) continue;
      line = 0;
      at += kStreams * stride - int64_t(lines) * kLine;
    }
  }
};

// The same of the next strip.
struct StripAhead {
  const char* at;
  int left, each;

  HYBRID_INLINE void fetch() {
    for (int k = 0; k < each && left > 0; ++k, --left, at += kLine) __builtin_prefetch(at, 0, 2);
  }
};

// Sums of `rows` rows and TN blocks that are added to next, into the first-level cache; some after each of eight steps.
template <int rows, int TN>
struct SumsAhead {
  static constexpr int each = rows / 8;
  const float* at;
  int64_t stride;  // floats from block to block
  int row = 0;

  HYBRID_INLINE void fetch() {
    if (row >= rows) return;
#pragma GCC unroll 4
    for (int r = 0; r < each; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < TN; ++j) __builtin_prefetch(at + (row + r) * kBlock + j * stride, 0, 3);
    row += each;
  }
};

struct Ahead {
  BlocksAhead blocks;
  StripAhead strip;

  HYBRID_INLINE void fetch() {
    blocks.fetch();
    strip.fetch();
  }
};

// Some blocks over stored lines [operands.first, last), and their sums [block][row][16].
template <class Format>
struct TilePanel {
  Blocks<Format> w;
  Lines operands;
  int last;
  float* sums;
  int64_t sums_stride;  // floats from block to block

  HYBRID_INLINE float* sums_of(int row, int block) const { return sums + block * sums_stride + int64_t(row) * kBlock; }
  HYBRID_INLINE bool begins() const { return operands.first == 0; }
  HYBRID_INLINE const char* line(int block, int line) const {
    return operands.data + block * operands.block_stride +
           (line - operands.first) * Format::steps * operands.line_stride;
  }
};

// One tile of every block and 16 rows. before(c) precedes the product that adds to tile c, after(c) follows it.
template <class Format, int TM, int TN, class Before, class After>
static HYBRID_INLINE void multiply_step(const char* left, const char* line, const Lines& w, Before before,
                                        After after) {
  repeat<TM>([&](auto i) __attribute__((always_inline)) {
    Isa::load_tile<kLeft + i.value>(left + i.value * Strip<Format>::distance, kLine);
    repeat<TN>([&](auto j) __attribute__((always_inline)) {
      constexpr int right = kRight + j.value % 2, sum = i.value * TN + j.value;
      if constexpr (i.value == 0) Isa::load_passing_tile<right>(line + j.value * w.block_stride, w.line_stride);
      before(Int<sum>{});
      multiply_tile<Format, sum, kLeft + i.value, right>();
      after(Int<sum>{});
    });
  });
}

// Passes of formats whose sums are one chain over all inputs: tiles of sums are loaded and stored.
template <class Format, int TM, int TN>
class ChainPasses {
 public:
  HYBRID_INLINE ChainPasses(const TilePanel<Format>& panel, const Strip<Format>& strip, int row)
      : panel_(panel), strip_(strip), row_(row) {}

  HYBRID_INLINE void pass(int block, Ahead& ahead) {
    float* const sums = panel_.sums_of(row_, block);
    const char* line = panel_.line(block, panel_.operands.first);
    const int tiles = (panel_.last - panel_.operands.first) * Format::steps / kTileLines;
    SumsAhead<TM * kTileRows, TN> next{sums + TN * panel_.sums_stride, panel_.sums_stride};
    step(0, line, [&](auto c) __attribute__((always_inline)) {
      if (unstored_) store(c);
      begin(c, sums);
    });
    ahead.fetch();
    next.fetch();
    for (int tile = 1; tile < tiles; ++tile) {
      line += kTileLines * panel_.operands.line_stride;
      step(tile, line, [](auto) {});
      ahead.fetch();
      next.fetch();
    }
    unstored_ = sums;
  }
  HYBRID_INLINE void finish() {
    if (unstored_) repeat<TM * TN>([&](auto c) __attribute__((always_inline)) { store(c); });
  }

 private:
  template <class Before>
  HYBRID_INLINE void step(int tile, const char* line, Before before) {
    multiply_step<Format, TM, TN>(strip_.tile(tile), line, panel_.operands, before, [](auto) {});
  }
  template <class Tile>
  HYBRID_INLINE float* place(float* sums, Tile) const {
    return sums + Tile::value % TN * panel_.sums_stride + Tile::value / TN * kTileRows * kBlock;
  }
  template <class Tile>
  HYBRID_INLINE void store(Tile c) {
    Isa::store_tile<Tile::value>(place(unstored_, c), kLine);
  }
  template <class Tile>
  HYBRID_INLINE void begin(Tile c, float* sums) {
    if (panel_.begins())
      Isa::clear_tile<Tile::value>();
    else
      Isa::load_tile<Tile::value>(place(sums, c), kLine);
  }

  const TilePanel<Format>& panel_;
  const Strip<Format>& strip_;
  const int row_;
  float* unstored_ = nullptr;
};

// Passes of formats whose segments have scales: the sums of each, its part, are stored, and merged while the next are
// multiplied.
template <class Format, int TM, int TN>
class SegmentPasses {
 public:
  HYBRID_INLINE SegmentPasses(const TilePanel<Format>& panel, const Strip<Format>& strip, int row)
      : panel_(panel), strip_(strip), row_(row) {}

  HYBRID_INLINE void pass(int block, Ahead& ahead) {
    for (int line = panel_.operands.first; line < panel_.last;) {
      Part& part = parts_[turn_];
      turn_ ^= 1;
      const int end = min(panel_.last, line + Format::segment);
      if (unstored_ && end - line == Format::segment)
        multiply_and_merge(part, block, line, ahead);
      else
        multiply(part, block, line, end, ahead);
      merge_next(part, block, line, end);
      line = end;
    }
  }
  HYBRID_INLINE void finish() {
    if (!unstored_) return;
    repeat<kTiles>([&](auto c) __attribute__((always_inline)) { store(c); });
    merge();
  }

 private:
  static constexpr int kTiles = TM * TN, kRows = TM * kTileRows;
  static constexpr int kSteps = Format::segment * Format::steps / kTileLines;  // products of a whole segment
  // Products with some rows to be merged behind each: all but the first ones, which store the last tiles of sums.
  static constexpr int kMerging = (kSteps - 1) * kTiles;
  static_assert(!Format::integer || Format::segment * Format::line_inputs == kScaleInputs);

  using Part = int32_t[kRows][TN][kBlock];  // or fp32

  // A segment whose part is to be merged.
  struct Merging {
    const Part* part;
    float* sums;  // of the first row and block
    int64_t sums_stride;
    const char* header;
    int64_t stride;  // from block to block
    int term;
    bool stored, finishes;  // whether there are sums to be added to; whether they are the last
    F32 scale[TN];
  };

  // A whole segment, while the one before it is merged.
  HYBRID_INLINE void multiply_and_merge(Part& part, int block, int line, Ahead& ahead) {
    if (merging_.finishes)
      merging_.stored ? multiply_and_merge<true, true>(part, block, line, ahead)
                      : multiply_and_merge<false, true>(part, block, line, ahead);
    else
      merging_.stored ? multiply_and_merge<true, false>(part, block, line, ahead)
                      : multiply_and_merge<false, false>(part, block, line, ahead);
  }

  template <bool stored, bool finishes>
  HYBRID_INLINE void multiply_and_merge(Part& part, int block, int line, Ahead& ahead) {
    const Merging merging = merging_;
    const char* at = panel_.line(block, line);
    const char* left = strip_.tile(tile(line));
    repeat<kSteps>([&](auto s) __attribute__((always_inline)) {
      constexpr int step = s.value;
      const auto before = [&](auto c) __attribute__((always_inline)) {
        if constexpr (step == 0) begin(c);
      };
      const auto after = [&](auto c) __attribute__((always_inline)) {
        constexpr int done = (step - 1) * kTiles + decltype(c)::value;
        if constexpr (step > 0)
          merge_rows<stored, finishes>(merging, kRows * done / kMerging, kRows * (done + 1) / kMerging);
      };
      multiply_step<Format, TM, TN>(left, at, panel_.operands, before, after);
      if constexpr (step == 0) unstored_ = &part;
      ahead.fetch();
      left += kTileBytes;
      at += kTileLines * panel_.operands.line_stride;
    });
  }

  // A segment before any was multiplied, or a short one. What is to be merged is, behind it.
  HYBRID_INLINE void multiply(Part& part, int block, int line, int end, Ahead& ahead) {
    const bool merges = unstored_;
    const auto first = [&](auto c) __attribute__((always_inline)) { begin(c); };
    const auto nothing = [](auto) {};
    const char* at = panel_.line(block, line);
    multiply_step<Format, TM, TN>(strip_.tile(tile(line)), at, panel_.operands, first, nothing);
    ahead.fetch();
    for (int i = tile(line) + 1; i < tile(end); ++i) {
      at += kTileLines * panel_.operands.line_stride;
      multiply_step<Format, TM, TN>(strip_.tile(i), at, panel_.operands, nothing, nothing);
      ahead.fetch();
    }
    unstored_ = &part;
    if (merges) merge();
  }

  HYBRID_INLINE int tile(int line) const { return (line - panel_.operands.first) * Format::steps / kTileLines; }
  template <class Tile>
  HYBRID_INLINE void begin(Tile c) {
    if (unstored_) store(c);
    Isa::clear_tile<Tile::value>();
  }
  template <class Tile>
  HYBRID_INLINE void store(Tile) {
    Isa::store_tile<Tile::value>((*unstored_)[Tile::value / TN * kTileRows][Tile::value % TN], TN * kLine);
  }

  // The segment of stored lines [line, end) is the next to be merged.
  HYBRID_INLINE void merge_next(const Part& part, int block, int line, int end) {
    Merging& m = merging_;
    m.part = &part;
    m.sums = panel_.sums_of(row_, block);
    m.sums_stride = panel_.sums_stride;
    m.header = panel_.w.header + block * panel_.w.stride;
    m.stride = panel_.w.stride;
    m.term = (line - panel_.operands.first) / Format::segment;
    m.stored = line > 0;
    m.finishes = end == panel_.w.lines;
    for (int j = 0; j < TN; ++j) m.scale[j] = Format::group_scale(m.header + j * m.stride, line);
  }

  HYBRID_INLINE void merge() { merge_all(merging_, strip_); }

  static HYBRID_KERNEL void merge_all(const Merging& m, const Strip<Format>& strip) {
    for (int row = 0; row < kRows; ++row) {
      if (m.finishes)
        m.stored ? merge_rows<true, true>(m, strip, row, row + 1) : merge_rows<false, true>(m, strip, row, row + 1);
      else
        m.stored ? merge_rows<true, false>(m, strip, row, row + 1) : merge_rows<false, false>(m, strip, row, row + 1);
    }
  }
  template <bool stored, bool finishes>
  HYBRID_INLINE void merge_rows(const Merging& m, int row, int last) const {
    merge_rows<stored, finishes>(m, strip_, row, last);
  }

  // Rows [row, last): the operations of accumulate() in ops/product.h in their order. Rows that are none have sums,
  // too.
  template <bool stored, bool finishes>
  static HYBRID_INLINE void merge_rows(const Merging& m, const Strip<Format>& strip, int row, int last) {
#pragma GCC unroll 16
    for (; row < last; ++row) {
      float* const sums = m.sums + row * kBlock;
      F32 sum[TN];
#pragma GCC unroll 4
      for (int j = 0; j < TN; ++j) {
        sum[j] = stored ? Isa::load(sums + j * m.sums_stride) : Isa::zero();
        sum[j] = merged(sum[j], widened((*m.part)[row][j], strip, m.term, row), m.scale[j], strip, m.term, row);
        if constexpr (finishes) sum[j] = Format::finish(sum[j], m.header + j * m.stride);
      }
#pragma GCC unroll 4
      for (int j = 0; j < TN; ++j) Isa::store(sums + j * m.sums_stride, sum[j]);
    }
  }

  static HYBRID_INLINE F32 merged(F32 sum, F32 part, F32 scale, const Strip<Format>& strip, int term, int row) {
    if constexpr (Format::integer) {
      const F32 scaled = kUnitScales<Format> ? part : Isa::mul(part, scale);
      return Isa::fma(scaled, Isa::set(strip.terms.scales[term][row]), sum);
    } else {
      return Isa::fma(part, scale, sum);
    }
  }

  static HYBRID_INLINE F32 widened(const int32_t* part, const Strip<Format>& strip, int term, int row) {
    if constexpr (kStarts<Format>)
      return Isa::to_f32(Isa::load_int(part) + Isa::set_int(strip.terms.starts[term][row]));
    else if constexpr (Format::integer)
      return Isa::to_f32(Isa::load_int(part));
    else
      return Isa::load(reinterpret_cast<const float*>(part));
  }

  const TilePanel<Format>& panel_;
  const Strip<Format>& strip_;
  const int row_;
  int turn_ = 0;
  Part* unstored_ = nullptr;
  Merging merging_;
  alignas(kLine) Part parts_[2];
};

template <class Format, int TM, int TN>
using Passes = typename Either<Format::chained, ChainPasses<Format, TM, TN>, SegmentPasses<Format, TM, TN>>::Type;

}  // namespace HYBRID_ISA
}  // namespace hybrid
