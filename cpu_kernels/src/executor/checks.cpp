#include "executor/checks.h"

#include "executor/attention_checks.h"
#include "executor/entry_checks.h"
#include "executor/ngram_checks.h"
#include "executor/require.h"
#include "executor/scratch.h"
#include "executor/sizes.h"
#include "executor/state_checks.h"

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
  for (const auto& [name, bound] : {std::pair{"bound", a.bound}, std::pair{"shared_bound", a.shared_bound}})
    require(bound == 0 || (bound > 0 && a.activation == Activation::silu),
            place + name + " is " + std::to_string(bound) + "; it must be 0, or above it with silu");
  const int matrices = is_gated(a.activation) ? 2 : 1;
  check_set(a.routed, matrices, place);
  require_stride(place, "output_stride", a.output_stride, int64_t(a.routed.blocks) * kBlock);
  if (!a.shared.blocks) return;
  check_set(a.shared, matrices, place + "shared.");
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

// What must be there only if something else is.
template <class Args>
void check_presence(const Args&, const std::string&) {}

void check_presence(const NormArgs& a, const std::string& place) {
  require(a.output_f32 || !a.factor, place + "output_f32 is null, and there is a factor");
}

void check_presence(const GateUpArgs& a, const std::string& place) {
  require(a.shared_output || !a.shared.experts, place + "shared_output is null, and there is a shared expert");
}

template <class Args>
void check_extents_of(const Args&, const Limits&, const std::string&) {}

void check_extents_of(const HeadGemmArgs& a, const Limits&, const std::string& place) {
  require_countable(int64_t(a.heads) * (a.columns / kBlock + 1), place);
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
