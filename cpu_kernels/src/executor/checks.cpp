#include "executor/checks.h"

#include "executor/scratch.h"

namespace hybrid {
namespace {

#define HYBRID_OP_NAME(op, Args) \
  const char* op_name(const Args&) { return #op; }
HYBRID_OPS(HYBRID_OP_NAME)
#undef HYBRID_OP_NAME
const char* op_name(const MergeArgs&) { return "merge"; }
const char* op_name(const HostArgs&) { return "host"; }

std::string text(int64_t number) { return std::to_string(number); }

// Fields that must fit each other. place: as "qkv: ".
template <class Args>
void check_fit(const Args&, const std::string&) {}

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
}

void check_fit(const QkvArgs& a, const std::string& place) {
  check_layout(a.kv, a.head_dim, place);
  require(a.rope_dim <= a.head_dim && a.rope_dim % 2 == 0,
          place + "rope_dim is " + text(a.rope_dim) + "; it must be even and at most head_dim " + text(a.head_dim));
}

void check_fit(const AttentionArgs& a, const std::string& place) {
  check_layout(a.kv, a.head_dim, place);
  const int group = a.heads / a.kv_heads;
  require(a.heads % a.kv_heads == 0,
          place + text(a.heads) + " heads cannot share " + text(a.kv_heads) + " KV heads evenly");
  require(group <= kMaxTileRows,
          place + text(group) + " query heads per KV head; at most " + text(kMaxTileRows) + " are supported");
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

void check_fit(const ShortConvArgs& a, const std::string& place) {
  require(a.taps <= kMaxTaps, place + "taps " + text(a.taps) + " is above " + text(kMaxTaps));
}

// What must be there only if something else is.
template <class Args>
void check_presence(const Args&, const std::string&) {}

void check_presence(const QkvArgs& a, const std::string& place) {
  require(a.rope || !a.rope_dim, place + "rope is null, and rope_dim is " + text(a.rope_dim));
  require(a.q || !a.heads, place + "q is null, and there are " + text(a.heads) + " heads");
}

void check_presence(const AttentionArgs& a, const std::string& place) {
  require(a.output || a.partials, place + "output and partials are null");
}

void check_presence(const GateUpArgs& a, const std::string& place) {
  require(a.shared_output || !a.shared.experts, place + "shared_output is null, and there is a shared expert");
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

int64_t op_scratch_bytes(const OpArgs& args, const ProductSizes& sizes, int rows) {
  return std::visit([&](const auto& a) { return scratch_bytes(a, sizes, rows); }, args);
}

}  // namespace hybrid
