// The machine itself: tiles of any shape multiply as documented, and it shows when a configuration is left behind.
#pragma GCC target("amx-tile,amx-int8,amx-bf16")
#include <immintrin.h>

#include "bare.h"
#include "tile_state.h"

namespace {

struct alignas(64) Configuration {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

struct Shape {
  int rows, columns, inputs;
};

alignas(64) uint8_t left[16][64], right[16][64];
alignas(64) uint32_t before[16][16], after[16][16];

void fill() {
  uint32_t state = 1;
  const auto next = [&] { return (state = state * 1664525 + 1013904223) >> 16; };
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 64; ++j) left[i][j] = uint8_t(next()), right[i][j] = uint8_t(next());
  left[0][0] = right[0][0] = 0x80;
}

// bf16 numbers of either sign between a half and two.
void fill_bf16() {
  fill();
  for (int i = 0; i < 16; ++i)
    for (int j = 1; j < 64; j += 2) left[i][j] |= 0x3f, left[i][j] &= 0xbf, right[i][j] |= 0x3f, right[i][j] &= 0xbf;
}

float bf16_at(const uint8_t* bytes) {
  const uint32_t bits = uint32_t(bytes[1]) << 24 | uint32_t(bytes[0]) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// after = before + left times right; the operation is one of the tile products.
#define RUN(operation)                \
  {                                   \
    configure(rows, columns, inputs); \
    _tile_loadd(0, before, 64);       \
    _tile_loadd(1, left, 64);         \
    _tile_loadd(2, right, 64);        \
    operation(0, 1, 2);               \
    _tile_stored(0, after, 64);       \
    _tile_release();                  \
  }

// Tiles of rows x columns sums, rows x inputs and inputs x columns; an input is four bytes.
void configure(int rows, int columns, int inputs) {
  Configuration shape{};
  shape.palette = 1;
  shape.rows[0] = uint8_t(rows), shape.row_bytes[0] = uint16_t(4 * columns);
  shape.rows[1] = uint8_t(rows), shape.row_bytes[1] = uint16_t(4 * inputs);
  shape.rows[2] = uint8_t(inputs), shape.row_bytes[2] = uint16_t(4 * columns);
  asm volatile("" : : "r"(&shape) : "memory");  // gcc's intrinsics do not say that they read what was written
  _tile_loadconfig(&shape);
}

template <class Left, class Right>
int wrong_integers(int rows, int columns, int inputs) {
  int wrong = 0;
  for (int m = 0; m < rows; ++m)
    for (int n = 0; n < columns; ++n) {
      int32_t expected = int32_t(before[m][n]);
      for (int k = 0; k < 4 * inputs; ++k) expected += Left(left[m][k]) * Right(right[k / 4][4 * n + k % 4]);
      wrong += int32_t(after[m][n]) != expected;
    }
  return wrong;
}

int wrong_floats(int rows, int columns, int inputs) {
  int wrong = 0;
  for (int m = 0; m < rows; ++m)
    for (int n = 0; n < columns; ++n) {
      double expected = 0, size = 0;
      for (int k = 0; k < 2 * inputs; ++k) {
        const double term = double(bf16_at(&left[m][2 * k])) * bf16_at(&right[k / 2][4 * n + k % 2 * 2]);
        expected += term;
        size += term < 0 ? -term : term;
      }
      float actual;
      memcpy(&actual, &after[m][n], sizeof actual);
      const double error = actual - expected;
      wrong += !(error * error <= size * size * 0x1p-38);
    }
  return wrong;
}

int wrong_products(int rows, int columns, int inputs) {
  int wrong = 0;
  fill();
  for (int i = 0; i < 256; ++i) before[i / 16][i % 16] = uint32_t(i * 1000 - 100000);
  RUN(_tile_dpbssd) wrong += wrong_integers<int8_t, int8_t>(rows, columns, inputs);
  RUN(_tile_dpbsud) wrong += wrong_integers<int8_t, uint8_t>(rows, columns, inputs);
  RUN(_tile_dpbusd) wrong += wrong_integers<uint8_t, int8_t>(rows, columns, inputs);
  RUN(_tile_dpbuud) wrong += wrong_integers<uint8_t, uint8_t>(rows, columns, inputs);
  fill_bf16();
  memset(before, 0, sizeof before);
  RUN(_tile_dpbf16ps) wrong += wrong_floats(rows, columns, inputs);
  return wrong;
}

bool configuration_shows() {
  if (tiles_configured()) return false;
  configure(1, 1, 1);
  if (!tiles_configured()) return false;
  _tile_release();
  return !tiles_configured();
}

}  // namespace

bool check() {
  int wrong = 0;
  constexpr Shape kShapes[] = {{16, 16, 16}, {1, 16, 16}, {5, 16, 3}, {16, 7, 1}, {3, 1, 16}};
  for (const auto& [rows, columns, inputs] : kShapes) {
    const int count = wrong_products(rows, columns, inputs);
    if (count) console::line("tiles of ", rows, " x ", columns, " x ", inputs, ": ", count, " wrong sums");
    wrong += count;
  }
  if (!configuration_shows()) console::line("a loaded configuration does not show");
  return !wrong && configuration_shows();
}
