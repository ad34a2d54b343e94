// What can be known of the tiles from outside.
#pragma once

#include <stdint.h>

extern long integer_tile_products;  // executed since the start

// Whether a tile configuration is loaded: false once tiles are released.
inline bool tiles_configured() {
  uint32_t in_use, high;
  asm volatile("xgetbv" : "=a"(in_use), "=d"(high) : "c"(1));
  return in_use >> 17 & 1;  // bit 18, tile data, is always set here: the emulator does not track it
}
