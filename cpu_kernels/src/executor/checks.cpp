#include "executor/checks.h"

#include <algorithm>

#include "executor/require.h"
#include "executor/scratch.h"
#include "executor/sizes.h"

namespace hybrid {
namespace {

#define HYBRID_OP_NAME(op, Args) \
  const char* op_name(const Args&) { return #op; }
HYBRID_OPS(HYBRID_OP_NAME)
#undef HYBRID_OP_NAME
const char* op_name(const MergeArgs&) { return "merge"; }
const char* op_name(const HostArgs&) { return "host"; }

void check_rows(Format format, int64_t stride, int inputs, const std::string& place) {
  require_stride(place, "input_stride", stride, row_bytes(format, inputs));
  require_multiple(place, "input_stride", stride, reads_bf16(format) ? 2 : 4);
}

// Fields that must fit each other. place: as "qkv: ".
template <class Args>
void check_fit(const Args&, const std::string&) {}

void check_fit(const EmbedArgs& a, const std::string& place) {
  require_stride(place, "pairs", a.pairs, (a.hidden + 1) / 2);
  require_stride(place, "output_stride", a.output_stride, a.hidden);
}

void check_fit(const NormArgs& a, const std::string& place) {
  require_stride(place, "input_stride", a.input_stride, a.width);
  if (a.output || a.output_f32 || a.cleared) require_stride(place, "output_stride", a.output_stride, a.width);
  if (a.output8) {
    require_stride(place, "output8_stride", a.output8_stride, int8_row_bytes(up(a.width, kInputs)));
    require_multiple(place, "output8_stride", a.output8_stride, 4);
    require_multiple(place, "output8", int64_t(uintptr_t(a.output8)), 4);
  }
  if (a.output_grouped) {
    require_stride(place, "output_grouped_stride", a.output_grouped_stride, grouped_row_bytes(up(a.width, kInputs)));
    require_multiple(place, "output_grouped_stride", a.output_grouped_stride, 4);
    require_multiple(place, "output_grouped", int64_t(uintptr_t(a.output_grouped)), 4);
  }
  if (a.output_wide) {
    require_stride(place, "output_wide_stride", a.output_wide_stride, wide_row_bytes(up(a.width, kInputs)));
    require_multiple(place, "output_wide_stride", a.output_wide_stride, 4);
    require_multiple(place, "output_wide", int64_t(uintptr_t(a.output_wide)), 4);
  }
}

void check_fit(const QuantiseArgs& a, const std::string& place) {
  require_stride(place, "input_stride", a.input_stride, int64_t(a.width) * 2);
  require_multiple(place, "input_stride", a.input_stride, 2);
  require(!(a.grouped && a.wide), place + "rows are grouped or wide, not both");
  require_stride(place, "output_stride", a.output_stride,
                 a.wide      ? wide_row_bytes(a.width)
                 : a.grouped ? grouped_row_bytes(a.width)
                             : int8_row_bytes(a.width));
  require_multiple(place, "output_stride", a.output_stride, 4);
  require_multiple(place, "output", int64_t(uintptr_t(a.output)), 4);
}

void check_fit(const GemmArgs& a, const std::string& place) {
  check_rows(a.format, a.input_stride, a.inputs, place);
  require_stride(place, "output_stride", a.output_stride, a.columns);
}

void check_fit(const SoftCapArgs& a, const std::string& place) {
  require(a.cap > 0, place + "cap is " + std::to_string(a.cap) + "; it must be above 0");
}

void check_fit(const HeadGemmArgs& a, const std::string& place) {
  check_rows(a.format, a.input_head_stride, a.inputs, place);
  require_stride(place, "input_stride", a.input_stride, (a.heads - 1) * a.input_head_stride);
  require_multiple(place, "input_stride", a.input_stride, reads_bf16(a.format) ? 2 : 4);
  require_stride(place, "weight_head_stride", a.weight_head_stride,
                 (int64_t(a.columns) + kBlock - 1) / kBlock * block_bytes(a.format, a.inputs));
  require_stride(place, "output_head_stride", a.output_head_stride, a.columns);
  require_stride(place, "output_stride", a.output_stride, (a.heads - 1) * int64_t(a.output_head_stride) + a.columns);
}

void check_fit(const JoinArgs& a, const std::string& place) {
  require_stride(place, "output_stride", a.output_stride, a.width);
}

void check_fit(const RopeTableArgs& a, const std::string& place) {
  require(a.dim % 2 == 0, place + "dim is " + text(a.dim) + "; it must be even");
}

void check_layout(const KvLayout& kv, int head_dim, const std::string& place) {
  require(kv.format == Format::bf16 || kv.format == Format::int8 || kv.format == Format::fp8,
          place + "keys and values are stored as bf16, int8 or fp8");
  require(head_dim <= kMaxHeadDim, place + "head_dim " + text(head_dim) + " is above " + text(kMaxHeadDim));
  require(kv.key_dim <= kMaxHeadDim, place + "kv.key_dim " + text(kv.key_dim) + " is above " + text(kMaxHeadDim));
  require(head_dim <= kv.key_dim && head_dim <= kv.value_dim, place + "head_dim " + text(head_dim) +
                                                                  " is above kv.key_dim " + text(kv.key_dim) +
                                                                  " or kv.value_dim " + text(kv.value_dim));
  if (!kv.shared) return;
  require(kv.value_dim <= kv.key_dim, place + "kv.value_dim " + text(kv.value_dim) + " is above kv.key_dim " +
                                          text(kv.key_dim) + ", which it shares");
  require(kv.head_stride == 0, place + "kv.head_stride is " + text(kv.head_stride) + "; heads share their keys");
  require(kv.value_scales == kv.key_scales,
          place + "kv.value_scales_offset is " + text(kv.value_scales) + "; values share the scales of keys");
}

// Of queries, as both ops that make them have it.
template <class Args>
void check_growth(const Args& a, const std::string& place) {
  require(a.growth == 0 || a.growth_length > 0,
          place + "growth_length is " + text(a.growth_length) + "; queries that grow need one above 0");
}

void check_fit(const QkvArgs& a, const std::string& place) {
  check_growth(a, place);
  check_layout(a.kv, a.head_dim, place);
  require(a.rope_dim <= a.head_dim && a.rope_dim % 2 == 0,
          place + "rope_dim is " + text(a.rope_dim) + "; it must be even and at most head_dim " + text(a.head_dim));
  require_stride(place, "qkv_stride", a.qkv_stride,
                 (a.heads * (a.gated ? 2 : 1) + (a.keys_are_values ? 1 : 2) * int64_t(a.kv_heads)) * a.head_dim);
}

void check_fit(const GateArgs& a, const std::string& place) {
  require_stride(place, "stride", a.stride, int64_t(a.heads) * a.head_dim);
  require_stride(place, "gate_head_stride", a.gate_head_stride, a.head_dim);
  require_stride(place, "gate_stride", a.gate_stride, (a.heads - 1) * int64_t(a.gate_head_stride) + a.head_dim);
}

void check_fit(const LatentArgs& a, const std::string& place) {
  check_growth(a, place);
  require(a.kv.shared, place + "kv.shared is false; latents are keys and values of all heads");
  require(a.rope_dim % 2 == 0, place + "rope_dim is " + text(a.rope_dim) + "; it must be even");
  check_layout(a.kv, a.rank, place);
  require(int64_t(a.rank) + a.rope_dim <= a.kv.key_dim, place + "rank " + text(a.rank) + " and rope_dim " +
                                                            text(a.rope_dim) + " are above kv.key_dim " +
                                                            text(a.kv.key_dim));
  const int64_t dim = int64_t(a.nope_dim) + a.rope_dim;
  require_stride(place, "query_stride", a.query_stride, a.heads * dim);
  require_stride(place, "latent_stride", a.latent_stride, int64_t(a.rank) + a.rope_dim);
  require_stride(place, "plain_stride", a.plain_stride, a.nope_dim);
}

void check_fit(const AttentionArgs& a, const std::string& place) {
  check_layout(a.kv, a.head_dim, place);
  const int group = a.heads / a.kv_heads;
  require(a.heads % a.kv_heads == 0,
          place + text(a.heads) + " heads cannot share " + text(a.kv_heads) + " KV heads evenly");
  require(group <= kMaxTileRows,
          place + text(group) + " query heads per KV head; at most " + text(kMaxTileRows) + " are supported");
  if (a.output_head_stride) require_stride(place, "output_head_stride", a.output_head_stride, a.head_dim);
  const int64_t apart = a.output_head_stride ? a.output_head_stride : a.head_dim;
  if (a.output) require_stride(place, "output_stride", a.output_stride, (a.heads - 1) * apart + a.head_dim);
  require(!a.selects || (a.kv.shared && !a.window && !a.ends),
          place + "selects is " + text(a.selects) + "; keys are selected of shared ones, without a window or ends");
}

void check_index_keys(const KvLayout& kv, int head_dim, const std::string& place) {
  const std::string size = "kv.index_dim " + text(kv.index_dim);
  require(kv.index_dim <= kMaxHeadDim, place + size + " is above " + text(kMaxHeadDim));
  require(head_dim <= kv.index_dim, place + "head_dim " + text(head_dim) + " is above " + size);
}

void check_fit(const IndexArgs& a, const std::string& place) {
  check_index_keys(a.kv, a.head_dim, place);
  require(a.head_dim % 2 == 0, place + "head_dim is " + text(a.head_dim) + "; it must be even");
  require(a.rope_dim <= a.head_dim && a.rope_dim % 2 == 0,
          place + "rope_dim is " + text(a.rope_dim) + "; it must be even and at most head_dim " + text(a.head_dim));
  require_stride(place, "query_stride", a.query_stride, int64_t(a.heads) * a.head_dim);
  require_stride(place, "key_stride", a.key_stride, a.head_dim);
}

void check_fit(const IndexScoresArgs& a, const std::string& place) {
  check_index_keys(a.kv, 1, place);
  require(a.heads <= kMaxTileRows, place + "heads " + text(a.heads) + " is above " + text(kMaxTileRows));
}

void check_fit(const TopkArgs& a, const std::string& place) {
  require(a.top_k <= a.experts, place + "top_k " + text(a.top_k) + " is above experts " + text(a.experts));
  if (!a.groups) return;
  require(a.groups <= kMaxGroups && a.experts % a.groups == 0 && a.experts >= 2 * a.groups,
          place + text(a.experts) + " experts in " + text(a.groups) +
              " groups; they must be equal, of at least 2, and " + "at most " + text(kMaxGroups));
  require(a.top_groups >= 1 && a.top_groups <= a.groups && a.top_k <= a.top_groups * (a.experts / a.groups),
          place + "top_groups " + text(a.top_groups) + " must be from 1 to groups " + text(a.groups) +
              " and hold top_k " + text(a.top_k) + " experts");
}

void check_fit(const RouterArgs& a, const std::string& place) {
  require_stride(place, "input_stride", a.input_stride, a.hidden);
}

// matrices: how many of them, of `blocks` blocks each, an expert has from `experts` on.
void check_set(const ExpertSet& set, int matrices, const std::string& place) {
  check_rows(set.format, set.input_stride, set.inputs, place);
  require_stride(place, "expert_stride", set.expert_stride,
                 matrices * set.blocks * block_bytes(set.format, set.inputs));
}

void check_fit(const GateUpArgs& a, const std::string& place) {
  check_set(a.routed, 2, place);
  require_stride(place, "output_stride", a.output_stride, int64_t(a.routed.blocks) * kBlock);
  if (!a.shared.blocks) return;
  check_set(a.shared, 2, place + "shared.");
  if (a.shared_output)
    require_stride(place, "shared_output_stride", a.shared_output_stride, int64_t(a.shared.blocks) * kBlock);
}

void check_fit(const DownArgs& a, const std::string& place) {
  check_set(a.routed, 1, place);
  require_stride(place, "output_stride", a.output_stride, int64_t(a.routed.blocks) * kBlock);
  if (!a.shared.blocks) return;
  check_set(a.shared, 1, place + "shared.");
  require(a.shared.blocks == a.routed.blocks, place + "shared.blocks is " + text(a.shared.blocks) +
                                                  "; both sets have one output, of " + text(a.routed.blocks));
}

void check_fit(const CombineArgs& a, const std::string& place) {
  require_stride(place, "stride", a.stride, up(a.width, kBlock));
  require_stride(place, "output_stride", a.output_stride, up(a.width, kBlock));
}

void check_fit(const ShortConvArgs& a, const std::string& place) {
  require(a.taps <= kMaxTaps, place + "taps " + text(a.taps) + " is above " + text(kMaxTaps));
  require_stride(place, "input_stride", a.input_stride, 3 * int64_t(a.width));
  require_stride(place, "output_stride", a.output_stride, a.width);
  require_stride(place, "state.sequence_stride", a.state.sequence_stride, (a.taps - 1) * int64_t(a.width) * 4);
}

void check_fit(const SiluConvArgs& a, const std::string& place) {
  require(a.taps <= kMaxTaps, place + "taps " + text(a.taps) + " is above " + text(kMaxTaps));
  require_stride(place, "stride", a.stride, a.width);
  require_stride(place, "state.sequence_stride", a.state.sequence_stride, (a.taps - 1) * int64_t(a.width) * 4);
}

void check_fit(const GatedDeltaArgs& a, const std::string& place) {
  require(a.value_heads % a.key_heads == 0,
          place + text(a.value_heads) + " value heads cannot share " + text(a.key_heads) + " key heads evenly");
  for (const auto& [name, dim] : {std::pair{"key_dim ", a.key_dim}, std::pair{"value_dim ", a.value_dim}})
    require(dim <= kMaxDeltaDim, place + name + text(dim) + " is above " + text(kMaxDeltaDim));
  const int64_t keys = int64_t(a.key_heads) * a.key_dim, values = int64_t(a.value_heads) * a.value_dim;
  require_stride(place, "input_stride", a.input_stride, 2 * (keys + values));
  require_stride(place, "decay_stride", a.decay_stride, 2 * int64_t(a.value_heads));
  require_stride(place, "output_stride", a.output_stride, values);
  require_stride(place, "state.sequence_stride", a.state.sequence_stride,
                 delta_state_bytes(a.value_heads, a.key_dim, a.value_dim));
}

// What must be there only if something else is.
template <class Args>
void check_presence(const Args&, const std::string&) {}

void check_presence(const RopeTableArgs& a, const std::string& place) {
  require(a.lengths || !a.long_frequencies, place + "lengths is null, and there are long_frequencies");
}

void check_presence(const QkvArgs& a, const std::string& place) {
  require(a.rope || !a.rope_dim, place + "rope is null, and rope_dim is " + text(a.rope_dim));
  require(a.q || !a.heads, place + "q is null, and there are " + text(a.heads) + " heads");
  require(!a.gated || !a.norm_whole, place + "gated and norm_whole exclude each other");
}

void check_presence(const NormArgs& a, const std::string& place) {
  require(a.output_f32 || !a.factor, place + "output_f32 is null, and there is a factor");
}

void check_presence(const LatentArgs& a, const std::string& place) {
  require(!a.norm == !a.rope, place + (a.norm ? "rope" : "norm") + " is null, and the other is not");
  require(!a.heads || (a.rope && a.queries && a.plain && a.q),
          place + "queries, plain, q, norm or rope is null, and there are " + text(a.heads) + " heads");
}

void check_presence(const AttentionArgs& a, const std::string& place) {
  require(a.output || a.partials, place + "output and partials are null");
  require(!a.selected == !a.selects,
          place + "selected is " + (a.selected ? "not " : "") + "null, and selects is " + text(a.selects));
}

void check_presence(const GateUpArgs& a, const std::string& place) {
  require(a.shared_output || !a.shared.experts, place + "shared_output is null, and there is a shared expert");
}

// Rows of keys and values, and where they have scales, lie behind each other in a head, heads in a sequence.
void check_arena(const KvLayout& kv, int kv_heads, const Limits& limits, const std::string& place) {
  const int64_t tokens = up(limits.positions, kBlock), size = kv.format == Format::bf16 ? 2 : 1;
  if (kv.shared) {
    const int64_t keys = tokens * kv.key_dim * size;
    if (size == 1) require_stride(place, "kv.key_scales_offset", kv.key_scales, keys);
    return require_stride(place, "kv.sequence_stride", kv.sequence_stride,
                          size == 1 ? kv.key_scales + tokens * 4 : keys);
  }
  require_stride(place, "kv.value_offset", kv.value_offset, tokens * kv.key_dim * size);
  int64_t end = kv.value_offset + tokens * kv.value_dim * size;
  if (kv.format != Format::bf16) {
    require_stride(place, "kv.key_scales_offset", kv.key_scales, end);
    require_stride(place, "kv.value_scales_offset", kv.value_scales, kv.key_scales + tokens * 4);
    end = kv.value_scales + tokens * 4;
  }
  require_stride(place, "kv.head_stride", kv.head_stride, end);
  require_stride(place, "kv.sequence_stride", kv.sequence_stride / kv_heads, kv.head_stride);
}

void check_index_arena(const KvLayout& kv, const Limits& limits, const std::string& place) {
  check_arena(kv, 1, limits, place);
  require_stride(place, "kv.sequence_stride", kv.sequence_stride,
                 kv.index_offset + up(limits.positions, kBlock) * kv.index_dim * 2);
}

template <class Args>
void check_extents_of(const Args&, const Limits&, const std::string&) {}

void check_extents_of(const IndexArgs& a, const Limits& limits, const std::string& place) {
  check_index_arena(a.kv, limits, place);
  require_countable(int64_t(limits.rows) * (a.heads + 1), place);
}

void check_extents_of(const IndexScoresArgs& a, const Limits& limits, const std::string& place) {
  check_index_arena(a.kv, limits, place);
  require_countable(int64_t(limits.rows) * (limits.positions / kKeys + 1), place);
}

void check_extents_of(const QkvArgs& a, const Limits& limits, const std::string& place) {
  check_arena(a.kv, a.kv_heads, limits, place);
  require_countable(int64_t(limits.rows) * (a.heads + 2 * int64_t(a.kv_heads)), place);
}

void check_extents_of(const LatentArgs& a, const Limits& limits, const std::string& place) {
  check_arena(a.kv, 1, limits, place);
  require_countable(int64_t(limits.rows) * (a.heads + 1), place);
}

void check_extents_of(const HeadGemmArgs& a, const Limits&, const std::string& place) {
  require_countable(int64_t(a.heads) * (a.columns / kBlock + 1), place);
}

void check_extents_of(const AttentionArgs& a, const Limits& limits, const std::string& place) {
  check_arena(a.kv, a.kv_heads, limits, place);
  const int64_t split = std::min(limits.rows, limits.sequences);
  require_countable((limits.rows + split * (limits.positions / kKeys + 1)) * a.heads, place);
}

void check_extents_of(const GateArgs& a, const Limits& limits, const std::string& place) {
  require_countable(int64_t(limits.rows) * a.heads, place);
}

void check_extents_of(const QuantiseArgs& a, const Limits& limits, const std::string& place) {
  require_countable(int64_t(limits.rows) * a.multiple, place);
}

void check_extents_of(const JoinArgs& a, const Limits& limits, const std::string& place) {
  require_countable(int64_t(limits.rows) * (a.width / kBlock + 1), place);
}

void check_extents_of(const CombineArgs& a, const Limits& limits, const std::string& place) {
  require_countable(int64_t(limits.rows) * (a.width / kBlock + 1), place);
}

void check_extents_of(const RouterArgs& a, const Limits& limits, const std::string& place) {
  require_countable(int64_t(limits.rows) * a.experts, place);
}

void check_extents_of(const GroupArgs& a, const Limits& limits, const std::string& place) {
  require_countable(int64_t(limits.rows) * a.top_k, place);
}

template <class Args>
void check_fields_of(const Args& args, Addresses addresses) {
  check_fields(op_name(args), args, addresses);
}
void check_fields_of(const MergeArgs&, Addresses) {}  // those of an attention that was checked
void check_fields_of(const HostArgs&, Addresses) {}

}  // namespace

const char* name_of(const OpArgs& args) {
  return std::visit([](const auto& a) { return op_name(a); }, args);
}

void check_op(const OpArgs& args, Addresses addresses) {
  const std::string place = std::string(name_of(args)) + ": ";
  std::visit(
      [&](const auto& a) {
        check_fields_of(a, addresses);
        check_fit(a, place);
        if (addresses == Addresses::present) check_presence(a, place);
      },
      args);
}

void check_extents(const OpArgs& args, const Limits& limits) {
  const std::string place = std::string(name_of(args)) + ": ";
  std::visit([&](const auto& a) { check_extents_of(a, limits, place); }, args);
}

int64_t op_scratch_bytes(const OpArgs& args, const ProductSizes& sizes, int rows) {
  return std::visit([&](const auto& a) { return scratch_bytes(a, sizes, rows); }, args);
}

}  // namespace hybrid
