// Scratch of exactly as many bytes as an op is said to need, with a guard behind it.
#pragma once

#include "bare.h"
#include "executor/scratch.h"

namespace guard {

constexpr int kGuardBytes = 4096;
constexpr char kUnwritten = 0x5a;

alignas(64) inline char scratch[1 << 20];

// Calls one kernel as the only thread does, in a step of `rows` rows. False, and a line, if it writes behind its
// scratch.
template <class Args>
inline bool call(const char* name, const hybrid::KernelTable& table, hybrid::Kernel<Args> kernel, const Args& args,
                 const hybrid::Step& step, int rows) {
  char* const end = scratch + hybrid::scratch_bytes(args, table.sizes, rows);
  memset(end, kUnwritten, kGuardBytes);
  uint64_t taken[2] = {};
  kernel(args, step, {1, 0, taken, scratch});
  for (int i = 0; i < kGuardBytes; ++i) {
    if (end[i] == kUnwritten) continue;
    console::line(name, " of ", rows, " rows writes behind its ", long(end - scratch), " bytes of scratch");
    return false;
  }
  return true;
}

}  // namespace guard
