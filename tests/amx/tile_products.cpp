// The four integer tile products, done by the invalid-opcode exception.
//
// Bochs (3.1 and before) multiplies bytes as unsigned ones whatever the instruction says. So the emulated processor is
// configured without these four instructions, and what the manual says they do is done here, on the tiles of the
// interrupted program. All else about tiles is the emulator's own.
#pragma GCC target("amx-tile")
#include <immintrin.h>

#include "bare.h"
#include "tile_state.h"

namespace {

union Tile {
  int8_t s8[16][64];
  uint8_t u8[16][64];
  int32_t s32[16][16];
};

// VEX.128.pp.0F38.W0 5E /r with three registers: the destination in ModRM.reg, the first source in ModRM.rm, the second
// in VEX.vvvv, and in pp which of the sources are signed.
struct Product {
  int to, left, right;
  bool left_signed, right_signed;
};
constexpr int kBytes = 5;

bool decode(const uint8_t* code, Product& product) {
  if (code[0] != 0xc4 || code[1] != 0xe2 || (code[2] & 0x84) || code[3] != 0x5e || code[4] < 0xc0) return false;
  const int kind = code[2] & 3;  // none: uu, 66: us, f3: su, f2: ss
  product = {code[4] >> 3 & 7, code[4] & 7, ~code[2] >> 3 & 15, kind >= 2, (kind & 1) != 0};
  return product.right < 8;
}

// Calls function(i) for the tile's number as a constant, which is what the instructions take.
#define WITH_TILE(number, instruction) \
  switch (number) {                    \
    case 0:                            \
      instruction(0);                  \
      break;                           \
    case 1:                            \
      instruction(1);                  \
      break;                           \
    case 2:                            \
      instruction(2);                  \
      break;                           \
    case 3:                            \
      instruction(3);                  \
      break;                           \
    case 4:                            \
      instruction(4);                  \
      break;                           \
    case 5:                            \
      instruction(5);                  \
      break;                           \
    case 6:                            \
      instruction(6);                  \
      break;                           \
    case 7:                            \
      instruction(7);                  \
      break;                           \
  }

void store(int number, Tile& tile) {
#define STORE(i) _tile_stored(i, &tile, 64)
  WITH_TILE(number, STORE)
}

void load(int number, const Tile& tile) {
  asm volatile("" : : "r"(&tile) : "memory");  // gcc's intrinsic does not say that it reads memory
#define LOAD(i) _tile_loadd(i, &tile, 64)
  WITH_TILE(number, LOAD)
}

// A tile's content and, as the bytes that a store writes whatever was there before, its shape.
struct Operand {
  Tile data;
  int rows, bytes;

  explicit Operand(int number) : rows(0), bytes(0) {
    Tile other;
    memset(&data, 0, sizeof data);
    memset(&other, 0xff, sizeof other);
    store(number, data);
    store(number, other);
    while (rows < 16 && data.u8[rows][0] == other.u8[rows][0]) ++rows;
    while (bytes < 64 && data.u8[0][bytes] == other.u8[0][bytes]) ++bytes;
  }
};

template <class Left, class Right>
void multiply(Operand& to, const Left (&left)[16][64], const Right (&right)[16][64], int inputs) {
  for (int m = 0; m < to.rows; ++m)
    for (int k = 0; k < inputs; ++k)
      for (int n = 0; n < to.bytes / 4; ++n) to.data.s32[m][n] += int32_t(left[m][k]) * right[k / 4][4 * n + k % 4];
}

}  // namespace

long integer_tile_products = 0;

// Executes `code` if it is an integer tile product of tiles that fit. Returns how long it is, 0 if it is none.
extern "C" long execute_tile_product(const uint8_t* code) {
  Product p;
  if (!decode(code, p) || p.to == p.left || p.to == p.right || p.left == p.right) return 0;
  Operand to(p.to);
  const Operand left(p.left), right(p.right);
  if (to.rows != left.rows || to.bytes != right.bytes || left.bytes != 4 * right.rows) return 0;
  if (p.left_signed && p.right_signed) multiply(to, left.data.s8, right.data.s8, left.bytes);
  if (p.left_signed && !p.right_signed) multiply(to, left.data.s8, right.data.u8, left.bytes);
  if (!p.left_signed && p.right_signed) multiply(to, left.data.u8, right.data.s8, left.bytes);
  if (!p.left_signed && !p.right_signed) multiply(to, left.data.u8, right.data.u8, left.bytes);
  load(p.to, to.data);
  ++integer_tile_products;
  return kBytes;
}
