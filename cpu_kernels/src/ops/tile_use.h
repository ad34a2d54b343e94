// Whether an op's products multiply matrix tiles. Instruction sets without tiles compile none of it.
#pragma once

#include "ops/common.h"

namespace hybrid {
namespace HYBRID_ISA {

struct Rows;
struct Lines;

// Which rows a thread's scratch holds copies of, as tiles multiply them.
struct Copied {
  const char* base = nullptr;
  const int32_t* index = nullptr;
  int count = 0;

  template <class Rows>
  HYBRID_INLINE bool are(const Rows& rows, int some) const {
    return base == rows.base && index == rows.index && count == some;
  }
};

// Defined in ops/tiles.h, strip_size in ops/tile_strip.h, tile_product in ops/tile_product.h, and small_tile_product in
// ops/small_tiles.h.
template <class Format>
static void load_tiles();
template <class Format>
static void release_tiles();
template <class Format>
static constexpr StripSize strip_size();
template <class Format, class Epilogue>
static void tile_product(const Format& format, Copied& copied, const Rows& left, int rows, const char* matrix,
                         int inputs, Range blocks, char* scratch, Epilogue epilogue);
template <class RowAt, class Epilogue>
static void small_tile_product(RowAt row_at, int rows, const Lines& w, int count, int blocks, const char* next,
                               Epilogue epilogue);
template <class Format>
static double multiply_in_tiles(int64_t rounds);

// This thread's tiles while an op runs whose products have up to `rows` rows: configured once if any of them takes
// tiles, and released when the op ends. Code that runs after finds none in use.
template <class Format>
class Tiles {
 public:
  HYBRID_INLINE Tiles(Format format, const Step& step, int rows)
      : format(format), from_(step.tile_rows ? step.tile_rows : Format::tile_rows), ready_(tiled && rows >= from_) {
    if constexpr (tiled) {
      if (ready_) load_tiles<Format>();
    }
  }
  HYBRID_INLINE ~Tiles() {
    if constexpr (tiled) {
      if (ready_) release_tiles<Format>();
    }
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  // Whether a product of so many rows multiplies tiles.
  HYBRID_INLINE bool multiply(int rows) const { return ready_ && rows >= from_; }

  const Format format;
  mutable Copied copied;  // products of an op by turns share them: its rows do not change meanwhile

 private:
  static constexpr bool tiled = Isa::has_tiles && Format::tiled;
  const int from_;
  const bool ready_;
};

}  // namespace HYBRID_ISA
}  // namespace hybrid
