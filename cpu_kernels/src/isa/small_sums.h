// Sums of 16 bits, which AVX2 and AVX-512 add pairs of products to, of unsigned bytes and signed ones.
#pragma once

namespace hybrid {
namespace HYBRID_ISA {

// How many such pairs a sum holds, whatever the inputs are, if codes have so many bits.
static constexpr int small_sum_steps(int bits) { return 32767 / (2 * 128 * ((1 << bits) - 1)); }

}  // namespace HYBRID_ISA
}  // namespace hybrid
