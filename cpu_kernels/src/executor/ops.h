// The list of all ops, and the kernels of one instruction set. Whatever goes through all ops is made from this list:
// the table of kernels, the variant of arguments, the loop that runs them and the bindings.
#pragma once

#include "executor/args.h"
#include "executor/attention_args.h"
#include "executor/block_index_args.h"
#include "executor/entry_args.h"
#include "executor/expert_args.h"
#include "executor/index_args.h"
#include "executor/ngram_args.h"
#include "executor/state_args.h"
#include "executor/streams_args.h"

namespace hybrid {

// Every instruction set has a kernel of these, called as the op is.
#define HYBRID_KERNEL_OPS(OP) \
  HYBRID_ROW_OPS(OP)          \
  HYBRID_ATTENTION_OPS(OP)    \
  HYBRID_INDEX_OPS(OP)        \
  HYBRID_BLOCK_INDEX_OPS(OP)  \
  HYBRID_ENTRY_OPS(OP)        \
  HYBRID_STATE_OPS(OP)        \
  HYBRID_STREAM_OPS(OP)       \
  HYBRID_NGRAM_OPS(OP)        \
  HYBRID_EXPERT_OPS(OP)

// These are compiled once: executor/common_ops.h.
#define HYBRID_COMMON_OPS(OP)   \
  OP(rope_table, RopeTableArgs) \
  OP(group, GroupArgs)

#define HYBRID_OPS(OP) HYBRID_KERNEL_OPS(OP) HYBRID_COMMON_OPS(OP)

template <class Args>
using Kernel = void (*)(const Args&, const Step&, const Work&);

// 32 rows over some inputs in the order of tiles: ops/tile_strip.h.
struct StripSize {
  int64_t bytes;
  int inputs;
};

// What the scratch of products depends on.
struct ProductSizes {
  int max_blocks;              // that are multiplied together
  bool opened[kFormats];       // whether stored lines are operands as they are
  StripSize strips[kFormats];  // of those that tiles multiply
};

// The kernels of one instruction set.
struct KernelTable {
  const char* name;
  ProductSizes sizes;
#define HYBRID_KERNEL_MEMBER(op, Args) Kernel<Args> op;
  HYBRID_KERNEL_OPS(HYBRID_KERNEL_MEMBER)
#undef HYBRID_KERNEL_MEMBER
  Kernel<MergeArgs> merge;
  float (*read)(const char* data, int64_t bytes);  // streams through memory: the bandwidth probe
  double (*multiply)(int64_t rounds);              // dot products of bf16 in registers, returns operations done
  double (*multiply_int)(int64_t rounds);          // the same of int8
};

}  // namespace hybrid
