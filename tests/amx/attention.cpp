// Attention of one kernel table, KERNELS, against sums in double precision; and that a query's result is the same, bit
// for bit, whichever queries are computed with it if all products multiply tiles.
#include "guard.h"
#include "reference.h"
#include "tile_state.h"

namespace hybrid {
extern const KernelTable KERNELS;
}

namespace {

using hybrid::AttentionArgs;
using hybrid::AttentionTile;
using hybrid::kBlock;
using reference::Comparison;
using reference::Near;

// A dimension that is no multiple of 32, and of blocks an odd number. Keys and values are stored padded.
constexpr int kHeads = 8, kKvHeads = 2, kGroup = kHeads / kKvHeads, kHeadDim = 80, kKeyDim = 96;
constexpr int kTokens = 512, kQueries = 12;  // one attention tile of 48 rows
constexpr int kStride = kHeads * kHeadDim;
constexpr int kStateBytes = (kHeadDim + kBlock) * 4;

struct Case {
  int position, rows, window;
};
// Keys behind the last query's end within the first tile product, between two, in a second key block.
constexpr Case kCases[] = {{0, 1, 0}, {3, 5, 0}, {30, 12, 0}, {52, 12, 20}, {244, 12, 0}, {250, 12, 0}, {300, 8, 100}};

alignas(64) uint16_t keys[kKvHeads][kTokens / kBlock][kKeyDim / 2][kBlock][2];
alignas(64) uint16_t values[kKvHeads][kTokens / 2][kHeadDim][2];
alignas(64) char arena[sizeof keys + sizeof values];
alignas(64) uint16_t queries[kQueries][kHeads][kKeyDim];
alignas(64) uint16_t output[kQueries][kHeads][kHeadDim], together[kQueries][kHeads][kHeadDim];
bool shared;  // whether values are read from the keys of the first head, which all have then
alignas(64) char states[kHeads * 2 * kStateBytes];

uint16_t& key(int head, int token, int i) { return keys[head][token / kBlock][i / 2][token % kBlock][i % 2]; }
uint16_t& value(int head, int token, int i) { return values[head][token / 2][i][token % 2]; }

void lay_out() {
  for (int head = 0; head < kKvHeads; ++head) {
    memcpy(arena + head * (sizeof arena / kKvHeads), keys[head], sizeof keys[head]);
    memcpy(arena + head * (sizeof arena / kKvHeads) + sizeof keys[head], values[head], sizeof values[head]);
  }
}

// Random numbers for `tokens` tokens; behind the block of the last one no number at all, which must not be read.
void fill(int tokens) {
  reference::Random random(3);
  const auto next = [&] { return reference::to_bf16(random.uniform()); };
  memset(queries, 0, sizeof queries);
  memset(keys, 0xff, sizeof keys);
  memset(values, 0xff, sizeof values);
  for (auto& row : queries)
    for (auto& head : row)
      for (int i = 0; i < kHeadDim; ++i) head[i] = next();
  for (int head = 0; head < kKvHeads; ++head)
    for (int t = 0; t < (tokens + kBlock - 1) / kBlock * kBlock; ++t) {
      for (int i = 0; i < kKeyDim; ++i) key(head, t, i) = i < kHeadDim ? next() : uint16_t(0);
      for (int i = 0; i < kHeadDim; ++i) value(head, t, i) = next();
    }
  lay_out();
}

AttentionArgs attention_args(int window) {
  AttentionArgs args{};
  args.q = queries[0][0];
  args.output = output[0][0];
  args.states = reinterpret_cast<float*>(states);
  args.kv.base = arena;
  args.kv.sequence_stride = sizeof arena, args.kv.head_stride = sizeof arena / kKvHeads;
  args.kv.value_offset = sizeof keys[0];
  args.kv.key_dim = kKeyDim, args.kv.value_dim = kHeadDim;
  args.kv.shared = shared;
  if (shared) args.kv.head_stride = args.kv.value_offset = 0;
  args.heads = kHeads, args.kv_heads = kKvHeads, args.head_dim = kHeadDim, args.output_stride = kStride;
  args.window = window;
  args.scale = 0.5f;
  return args;
}

// Queries [row, row + rows) as one attention tile. split: key blocks on their own, merged afterwards.
bool attend(const Case& c, int row, int rows, bool split, int tile_rows) {
  const AttentionArgs args = attention_args(c.window);
  const AttentionTile tile{row, rows, 0, c.position + row, split, 0, 0};
  hybrid::Step step{};
  step.rows = kQueries, step.tile_rows = tile_rows;
  step.tiles = &tile, step.tile_count = 1;
  step.attention_tasks = split ? (c.position + row) / hybrid::kKeys + 1 : 1, step.split_tiles = split;
  const bool guarded = guard::call("attention", hybrid::KERNELS, hybrid::KERNELS.attention, args, step, rows);
  uint64_t taken[2] = {};
  if (split) hybrid::KERNELS.merge(hybrid::MergeArgs{args}, step, {1, 0, taken, nullptr});
  if (tiles_configured()) console::line("attention: a tile configuration is left behind");
  return guarded && !tiles_configured();
}

double score(int row, int head, int token) {
  double sum = 0;
  for (int i = 0; i < kHeadDim; ++i)
    sum += double(reference::from_bf16(queries[row][head][i])) * reference::from_bf16(key(head / kGroup, token, i));
  return 0.5 * sum;
}

// Of one query and head. The kernels round weights and results to bf16.
void expect(const Case& c, int row, int head, Near (&expected)[kHeadDim]) {
  const int last = c.position + row, first = c.window && last + 1 > c.window ? last + 1 - c.window : 0;
  double total = 0, sums[kHeadDim] = {}, sizes[kHeadDim] = {};
  for (int t = first; t <= last; ++t) {
    const double weight = reference::exponential(score(row, head, t));
    total += weight;
    for (int i = 0; i < kHeadDim; ++i) {
      const double term = weight * reference::from_bf16(value(head / kGroup, t, i));
      sums[i] += term, sizes[i] += reference::magnitude(term);
    }
  }
  for (int i = 0; i < kHeadDim; ++i) {
    expected[i] = {sums[i] / total, 1.1 * reference::kBf16 * sizes[i] / total};
    expected[i].round_to_bf16();
  }
}

bool check_values(const Case& c) {
  Comparison comparison;
  Near expected[kHeadDim];
  for (int row = 0; row < c.rows; ++row)
    for (int head = row % 3; head < kHeads; head += 3) {
      expect(c, row, head, expected);
      for (int i = 0; i < kHeadDim; ++i)
        comparison.see(expected[i], reference::from_bf16(output[row][head][i]), row, head * kHeadDim + i);
    }
  return comparison.passed("attention at ", c.position, " of ", c.rows, " queries");
}

// Every query alone, its key blocks in turn or split, as among the others.
bool check_alone(const Case& c) {
  bool passed = true;
  memcpy(together, output, sizeof together);
  for (int split = 0; split < 2; ++split) {
    memset(output, 0, sizeof output);
    for (int row = 0; row < c.rows; ++row) passed &= attend(c, row, 1, split, 1);
    const bool same = !memcmp(output, together, size_t(c.rows) * sizeof output[0]);
    if (!same) console::line("attention at ", c.position, split ? ", split" : "", ": other bits than among queries");
    passed &= same;
  }
  return passed;
}

// Keys of all heads that are values too give the same bits stored once, and stored apart.
bool check_shared(const Case& c) {
  for (int head = 0; head < kKvHeads; ++head) {
    memcpy(keys[head], keys[0], sizeof keys[0]);
    for (int t = 0; t < kTokens; ++t)
      for (int i = 0; i < kHeadDim; ++i) value(head, t, i) = key(0, t, i);
  }
  lay_out();
  bool passed = attend(c, 0, c.rows, false, 0);
  memcpy(together, output, sizeof together);
  memset(output, 0, sizeof output);
  shared = true;
  passed &= attend(c, 0, c.rows, false, 0);
  shared = false;
  const bool same = !memcmp(output, together, size_t(c.rows) * sizeof output[0]);
  if (!same) console::line("attention at ", c.position, ": other bits where values are shared with keys");
  return passed && same;
}

bool check_case(const Case& c) {
  fill(c.position + c.rows);
  bool passed = true;
  for (int tile_rows = 0; tile_rows < 2; ++tile_rows) {
    memset(output, 0, sizeof output);
    passed &= attend(c, 0, c.rows, false, tile_rows);
    passed &= check_values(c);
  }
  return check_alone(c) && check_shared(c) && passed;
}

}  // namespace

bool check() {
  bool passed = true;
  for (const Case& c : kCases) passed &= check_case(c);
  return passed;
}
