// Steps of the product: stored lines times rows, segment by segment of inputs that share scales, in ascending order.
#pragma once

#include "ops/reading.h"

namespace hybrid {
namespace HYBRID_ISA {

// acc[r][j] += rows a[r] times block j, over `count` stored lines. Beside every line, `fetch` lines laid out as the
// blocks are, from `next` on, are asked for: what comes next is read from memory while this is multiplied.
template <class Format, int fetch, int level = Far::level, int MR, int NB>
static HYBRID_INLINE void multiply(typename Format::Part (&acc)[MR][NB], const char* const (&a)[MR], const Lines& w,
                                   int count, const char* next) {
  const char* line = w.data;
  for (int i = 0; i < count;) {
    typename Format::Scale scale[NB];
#pragma GCC unroll 8
    for (int j = 0; j < NB; ++j) scale[j] = Format::scale(w.header + j * w.block_stride, w.first + i);
    for (const int end = i + Format::scale_lines; i < end; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < fetch; ++j) __builtin_prefetch(next + j * w.block_stride, 0, level);
#pragma GCC unroll 4
      for (int step = 0; step < Format::steps; ++step) {
        typename Format::Line operand[NB];
#pragma GCC unroll 8
        for (int j = 0; j < NB; ++j) operand[j] = Format::operand(line + j * w.block_stride, step, scale[j]);
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r) {
          const auto value = Format::value(a[r] + 4 * (Format::steps * i + step));
#pragma GCC unroll 8
          for (int j = 0; j < NB; ++j) acc[r][j] = Isa::dot(acc[r][j], operand[j], value);
        }
      }
      line += w.line_stride;
      next += w.line_stride;
    }
  }
}

// Of the `blocks` that come next as many are fetched by each of `tiles`, until all are.
static HYBRID_INLINE constexpr int fetched_blocks(int tiles, int blocks) {
  if (tiles == 1) return blocks;
  return tiles < blocks ? 2 : 1;
}

// The same for tile `tile` of `tiles` that pass over the same lines one after another: they share the fetching of the
// group of blocks at `next`, so that memory is asked at an even pace.
template <class Format, int MR, int NB>
static HYBRID_INLINE void multiply_shared(typename Format::Part (&acc)[MR][NB], const char* const (&a)[MR],
                                          const Lines& w, int count, int tile, int tiles, const char* next) {
  if (tiles == 1) return multiply<Format, NB>(acc, a, w, count, next);
  constexpr int two = NB < 2 ? NB : 2;
  const int each = fetched_blocks(tiles, NB);
  next += each * tile * w.block_stride;
  if (each * tile >= NB) return multiply<Format, 0>(acc, a, w, count, next);
  if (each == 1) return multiply<Format, 1>(acc, a, w, count, next);
  multiply<Format, two>(acc, a, w, count, next);
}

template <int MR, int NB>
static HYBRID_INLINE void load_sums(F32 (&sums)[MR][NB], const float* from) {
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < NB; ++j) sums[r][j] = from ? Isa::load(from + (r * NB + j) * kBlock) : Isa::zero();
}

// stride: floats from a row to the next.
template <int MR, int NB>
static HYBRID_INLINE void store_sums(float* to, const F32 (&sums)[MR][NB], int stride = NB * kBlock) {
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < NB; ++j) Isa::store(to + r * stride + j * kBlock, sums[r][j]);
}

// The part of a group of codes, scaled as its weights and as the rows are, and its minimum, added to the sums.
// scales_of(j): those of block j.
template <class Format, int MR, int NB, class ScalesOf>
static HYBRID_INLINE void merge_group(F32 (&sums)[MR][NB], const typename Format::Sum (&part)[MR][NB],
                                      const char* const* rows, int inputs, int line, ScalesOf scales_of) {
#pragma GCC unroll 8
  for (int j = 0; j < NB; ++j) {
    const OpenedScales w = scales_of(j);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const RowPart row = Format::row_part(rows[r], inputs, line);
      sums[r][j] = Format::merge(sums[r][j], Format::widen(part[r][j]), w, Isa::set(row.scale), Isa::set(row.sum));
    }
  }
}

template <class Format>
static HYBRID_INLINE int segment_end(int line, int last) {
  return Format::segment ? min(last, (line / Format::segment + 1) * Format::segment) : last;
}

// A segment's part, scaled as its group of weights is, added to the sums.
template <class Format, int MR, int NB>
static HYBRID_INLINE void merge(F32 (&sums)[MR][NB], const typename Format::Sum (&part)[MR][NB],
                                const char* const* rows, const Blocks<Format>& w, int line) {
  if constexpr (Format::opened_groups) {
    return merge_group<Format>(sums, part, rows, w.inputs, line, [&](int j) __attribute__((always_inline)) {
      const char* const header = w.header + j * w.stride;
      return OpenedScales{Format::group_scale(header, line), Format::group_minimum(header, line)};
    });
  }
#pragma GCC unroll 8
  for (int j = 0; j < NB; ++j) {
    const F32 scale = Format::group_scale(w.header + j * w.stride, line);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) sums[r][j] = Isa::fma(Format::widen(part[r][j]), scale, sums[r][j]);
  }
}

// Calls run(part, first, last) for stored lines [first, last) of a segment, as many at a time as `part` holds the sums
// of, and adds it to the exact sums. Segments of several parts are whole.
template <class Format, int MR, int NB, class Run>
static HYBRID_INLINE void add_parts(typename Format::Sum (&sums)[MR][NB], int first, int last, Run run) {
  if constexpr (Format::joined_steps == 0) {
    run(sums, first, last);
  } else {
    constexpr int lines = Format::joined_steps / Format::steps;
    constexpr int parts = Format::segment > lines ? Format::segment / lines : 1;
    static_assert(parts == 1 || parts * lines == Format::segment);
#pragma GCC unroll 8
    for (int i = 0; i < parts; ++i, first += lines) {
      typename Format::Part part[MR][NB];
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
        for (int j = 0; j < NB; ++j) part[r][j] = Isa::begin_small(sums[r][j]);
      run(part, first, parts == 1 ? last : first + lines);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
        for (int j = 0; j < NB; ++j) sums[r][j] = Isa::join(sums[r][j], part[r][j]);
    }
  }
}

// Stored lines [first, last), multiplied segment by segment by run(acc, first, last), each part added to the sums.
template <class Format, int MR, int NB, class Run>
static HYBRID_INLINE void add_segments(F32 (&sums)[MR][NB], const char* const* rows, const Blocks<Format>& w, int first,
                                       int last, Run run) {
  for (int line = first; line < last;) {
    const int end = segment_end<Format>(line, last);
    typename Format::Sum part[MR][NB];
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const auto start = Format::start(rows[r], w.inputs, line * Format::line_inputs);
#pragma GCC unroll 8
      for (int j = 0; j < NB; ++j) part[r][j] = start;
    }
    add_parts<Format>(part, line, end, run);
    merge<Format>(sums, part, rows, w, line);
    line = end;
  }
}

// The same of one panel, whatever the format. Rows of int8 have a scale a panel: it is applied once, behind the scales
// of the weights, because a multiplication more in every segment of int4 would halve its speed. Grouped rows have one a
// segment.
template <class Format, int MR, int NB, class Run>
static HYBRID_INLINE void accumulate(F32 (&sums)[MR][NB], const char* const* rows, const Blocks<Format>& w, int first,
                                     int last, Run run) {
  if constexpr (Format::chained) {
    run(sums, first, last);
  } else if constexpr (!Format::integer || Format::opened_groups) {
    add_segments<Format>(sums, rows, w, first, last, run);
  } else {
    F32 scaled[MR][NB];
    load_sums(scaled, nullptr);
    add_segments<Format>(scaled, rows, w, first, last, run);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const F32 scale = Isa::set(Format::row_scale(rows[r], w.inputs, first * Format::line_inputs));
#pragma GCC unroll 8
      for (int j = 0; j < NB; ++j) sums[r][j] = Isa::fma(scaled[r][j], scale, sums[r][j]);
    }
  }
}

template <class Format, int MR, int NB>
static HYBRID_INLINE void finish(F32 (&sums)[MR][NB], const Blocks<Format>& w) {
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < NB; ++j) sums[r][j] = Format::finish(sums[r][j], w.header + j * w.stride);
}

template <class Format, int MR>
static HYBRID_INLINE void advance(const char* (&a)[MR], const char* const* rows, int line) {
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) a[r] = rows[r] + 4 * Format::steps * line;
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
