// Small pieces that every op uses. Compiled once per instruction set, inside its namespace.
#pragma once

#include "executor/scratch.h"

#define HYBRID_INLINE inline __attribute__((always_inline))
#define HYBRID_KERNEL __attribute__((noinline))  // compiled once for all ops that call it

namespace hybrid {
namespace HYBRID_ISA {

using F32 = Isa::F32;

template <int N>
struct Int {
  static constexpr int value = N;
};

struct Range {
  int first, last;
};

// std::conditional_t, which is not to be instantiated here.
template <bool condition, class Yes, class No>
struct Either {
  using Type = Yes;
};
template <class Yes, class No>
struct Either<false, Yes, No> {
  using Type = No;
};

static constexpr HYBRID_INLINE int min(int a, int b) { return a < b ? a : b; }
static HYBRID_INLINE int max(int a, int b) { return a > b ? a : b; }

// Makes *at `after` if it still is `before`, else `before` what it is.
static HYBRID_INLINE bool take(uint64_t* at, uint64_t& before, uint64_t after) {
  return __atomic_compare_exchange_n(at, &before, after, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}

// Hands out `count` items in runs that are multiples of `unit`: calls function(run) until none are left. Runs shrink
// towards the end, so that a thread on a slow or shared core takes less and none waits long for the last one.
template <class Function>
static HYBRID_INLINE void for_runs(int count, int unit, const Work& work, Function function) {
  uint64_t taken = __atomic_load_n(work.taken, __ATOMIC_RELAXED);
  while (int(taken) < count) {
    const int first = int(taken), part = (count - first) / (2 * work.threads - 1);
    const int last = min(count, first + max(1, (part + unit - 1) / unit) * unit);
    if (!take(work.taken, taken, uint64_t(last))) continue;
    function(Range{first, last});
    taken = __atomic_load_n(work.taken, __ATOMIC_RELAXED);
  }
}

// The same of items that lie in memory one behind the other: each thread goes through a share of its own from the
// front, and then takes from the back of others' shares. What a processor fetches beyond the end of a run, which on Zen
// 4 is some 16 KiB, is thus what the same thread reads next.
template <class Function>
static HYBRID_INLINE void for_shares(int count, int unit, const Work& work, Function function) {
  const int64_t units = (count + unit - 1) / unit;
  const int parts = 2 * work.threads - 1;  // of which a run has as many as there are threads
  const auto share = [&](int thread) { return int(units * thread / work.threads); };
  for (int i = 0; i < work.threads; ++i) {
    const int owner = (work.thread + i) % work.threads;
    uint64_t* const at = work.taken + owner;
    uint64_t taken = __atomic_load_n(at, __ATOMIC_RELAXED);  // units from the front, and 2^32 times those from the back
    for (;;) {
      const int front = share(owner) + int(uint32_t(taken)), back = share(owner + 1) - int(taken >> 32);
      if (front >= back) break;
      const int some = int((int64_t(back - front) * work.threads + parts - 1) / parts);
      const bool own = i == 0;
      if (!take(at, taken, taken + (own ? uint64_t(some) : uint64_t(some) << 32))) continue;
      const int first = own ? front : back - some;
      function(Range{first * unit, min(count, (first + some) * unit)});
      taken = __atomic_load_n(at, __ATOMIC_RELAXED);
    }
  }
}

// Calls function(i) for each item that the thread takes, `unit` at a time at least: small ones are not worth one by
// one.
template <class Function>
static HYBRID_INLINE void for_each(int count, int unit, const Work& work, Function function) {
  for_runs(count, unit, work, [&](Range run) {
    for (int i = run.first; i < run.last; ++i) function(i);
  });
}

// e^x to about 1 ulp for x up to 88: x = n ln 2 + r, and a polynomial for e^r. Below -87 it stays at e^-87. NaN of NaN.
static HYBRID_INLINE F32 exponential(F32 x) {
  x = Isa::max(Isa::set(-87.0f), x);
  const F32 n = Isa::round(Isa::mul(x, Isa::set(1.44269504f)));
  const F32 r = Isa::fma(n, Isa::set(2.12194440e-4f), Isa::fma(n, Isa::set(-0.693359375f), x));
  F32 p = Isa::set(1.9875691500e-4f);
  p = Isa::fma(p, r, Isa::set(1.3981999507e-3f));
  p = Isa::fma(p, r, Isa::set(8.3334519073e-3f));
  p = Isa::fma(p, r, Isa::set(4.1665795894e-2f));
  p = Isa::fma(p, r, Isa::set(1.6666665459e-1f));
  p = Isa::fma(p, r, Isa::set(5.0000001201e-1f));
  p = Isa::fma(Isa::mul(p, r), r, Isa::add(r, Isa::set(1.0f)));
  return Isa::times_power_of_two(p, n);
}

// 2^x to 3 ulp for x up to 127: 2^n times a polynomial for 2^f. Below -126 it stays at 2^-126. NaN of NaN.
static HYBRID_INLINE F32 power_of_two(F32 x) {
  x = Isa::max(Isa::set(-126.0f), x);
  const F32 n = Isa::round(x), f = Isa::sub(x, n);
  F32 p = Isa::set(1.327647129e-3f);
  p = Isa::fma(p, f, Isa::set(9.675541893e-3f));
  p = Isa::fma(p, f, Isa::set(5.550713092e-2f));
  p = Isa::fma(p, f, Isa::set(2.402212024e-1f));
  p = Isa::fma(p, f, Isa::set(6.931469440e-1f));
  p = Isa::fma(p, f, Isa::set(1.000000119f));
  return Isa::times_power_of_two(p, n);
}

static HYBRID_INLINE float exponential(float x) {
  float lanes[16];
  Isa::store(lanes, exponential(Isa::set(x)));
  return lanes[0];
}

static HYBRID_INLINE F32 min(F32 a, F32 b) {
  return Isa::sub(Isa::zero(), Isa::max(Isa::sub(Isa::zero(), a), Isa::sub(Isa::zero(), b)));
}

// x / (1 + e^-y), with e^-y kept finite.
static HYBRID_INLINE F32 times_sigmoid(F32 x, F32 y) {
  const F32 minus = Isa::sub(Isa::zero(), Isa::max(y, Isa::set(-88.0f)));
  return Isa::div(x, Isa::add(Isa::set(1.0f), exponential(minus)));
}

static HYBRID_INLINE F32 silu(F32 x) { return times_sigmoid(x, x); }

// x (1 + tanh(z)) / 2 is x sigmoid(2 z); 2 z = sqrt(8 / pi) (x + 0.044715 x^3).
static HYBRID_INLINE F32 gelu_tanh(F32 x) {
  const F32 cubic = Isa::fma(Isa::mul(x, x), Isa::set(0.044715f), Isa::set(1.0f));
  return times_sigmoid(x, Isa::mul(Isa::mul(x, Isa::set(1.5957691216f)), cubic));
}

// What a bound made of x, or NaN if x is none or infinite: damage must not become a number on its way to the logits.
static HYBRID_INLINE F32 unless_damaged(F32 bounded, F32 x) { return Isa::fma(x, Isa::zero(), bounded); }

// x between -cap and cap: cap tanh(x / cap), where tanh(z) is 2 sigmoid(2 z) - 1.
static HYBRID_INLINE F32 capped(F32 x, float cap) {
  const F32 doubled = times_sigmoid(Isa::set(2.0f), Isa::mul(x, Isa::set(2.0f / cap)));
  return unless_damaged(Isa::mul(Isa::sub(doubled, Isa::set(1.0f)), Isa::set(cap)), x);
}

// log(1 + e^x): max(x, 0) + log(1 + t) with t = e^-|x|, by the series of 2 atanh(t / (2 + t)).
static HYBRID_INLINE F32 softplus(F32 x) {
  const F32 t = exponential(Isa::sub(Isa::zero(), Isa::max(x, Isa::sub(Isa::zero(), x))));
  const F32 s = Isa::div(t, Isa::add(Isa::set(2.0f), t)), square = Isa::mul(s, s);
  F32 p = Isa::set(1.0f / 15);
  for (float odd = 13; odd >= 1; odd -= 2) p = Isa::fma(p, square, Isa::set(1.0f / odd));
  return Isa::fma(Isa::add(s, s), p, Isa::max(Isa::zero(), x));
}

// Lanes [0, count) of x go to p; count <= 16.
static HYBRID_INLINE void store_some(float* p, F32 x, int count) {
  if (count == kBlock) return Isa::store(p, x);
  float lanes[kBlock];
  Isa::store(lanes, x);
  for (int i = 0; i < count; ++i) p[i] = lanes[i];
}

static HYBRID_INLINE F32 load_some(const float* p, int count) {
  if (count == kBlock) return Isa::load(p);
  float lanes[kBlock] = {};
  for (int i = 0; i < count; ++i) lanes[i] = p[i];
  return Isa::load(lanes);
}

// The largest |x[i]|: NaN if any is NaN, else infinite if any is.
static HYBRID_INLINE float largest_magnitude(const float* x, int count) {
  F32 top = Isa::zero();
  for (int i = 0; i < count; i += kBlock) top = Isa::max_magnitude(top, load_some(x + i, min(kBlock, count - i)));
  return Isa::max_magnitude_lane(top);
}

static HYBRID_INLINE void store_some_bf16(bf16* p, F32 x, int count) {
  if (count == kBlock) return Isa::store_bf16(p, x);
  bf16 lanes[kBlock];
  Isa::store_bf16(lanes, x);
  for (int i = 0; i < count; ++i) p[i] = lanes[i];
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
