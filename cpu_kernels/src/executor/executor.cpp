#include "executor/executor.h"

#include <algorithm>
#include <chrono>
#include <climits>
#include <string>

#include "executor/checks.h"
#include "executor/common_ops.h"
#include "executor/field_check.h"

namespace hybrid {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Runs an op; returns whether the step may go on.
struct Runner {
  const KernelTable& kernels;
  const Step& step;
  const Work& work;

#define HYBRID_RUN_KERNEL(op, Args) \
  bool operator()(const Args& args) const { return kernels.op(args, step, work), true; }
#define HYBRID_RUN_COMMON(op, Args) \
  bool operator()(const Args& args) const { return op(args, step, work), true; }
  HYBRID_KERNEL_OPS(HYBRID_RUN_KERNEL)
  HYBRID_COMMON_OPS(HYBRID_RUN_COMMON)
#undef HYBRID_RUN_KERNEL
#undef HYBRID_RUN_COMMON
  bool operator()(const MergeArgs& args) const { return kernels.merge(args, step, work), true; }
  bool operator()(const HostArgs& args) const { return work.thread != 0 || args.call(args.context); }
};

Limits checked(const Limits& limits) {
  const auto positive = [](int value, const char* name) {
    require(value >= 1 && value <= kLargest, std::string(name) + " is " + std::to_string(value) +
                                                 "; it must be at least 1 and at most " + std::to_string(kLargest));
  };
  positive(limits.rows, "rows");
  positive(limits.sequences, "sequences");
  positive(limits.positions, "positions");
  positive(limits.vocab, "vocab");
  require(limits.scratch_bytes <= size_t(kLargestBytes), "scratch_bytes is " + std::to_string(limits.scratch_bytes) +
                                                             "; it must be at most " + std::to_string(kLargestBytes));
  return limits;
}

}  // namespace

Executor::Executor(const KernelTable& kernels, std::shared_ptr<ThreadPool> pool, Limits limits)
    : kernels_(kernels),
      pool_(std::move(pool)),
      limits_(checked(limits)),
      ended_(size_t(limits.sequences)),
      scratch_(scratch_stride() * size_t(pool_->size()), true) {}

void Executor::add(Part part, const OpArgs& args, int node) {
  require_no_caller();
  const std::unique_lock<std::mutex> lock(one_step_, std::try_to_lock);
  require(lock.owns_lock(), std::string(name_of(args)) + ": a step runs; ops are added between steps");
  check_op(args, Addresses::present);
  check_turn(part, args, node);
  check_limits(args);
  append(part, args, node);
  if (const auto* attention = std::get_if<AttentionArgs>(&args)) {
    group_ = std::max(group_, attention->heads / attention->kv_heads);
    append(part, MergeArgs{*attention}, node);
  }
  schedule_ = std::make_unique<Schedule>(limits_.rows, group_);
}

void Executor::append(Part part, const OpArgs& args, int node) {
  if (node > 0)
    ops_.back().nodes.push_back(args);
  else
    ops_.push_back({part, node != kAllNodes, {args}});
  ops_.back().uses_scratch |= op_scratch_bytes(args, kernels_.sizes, limits_.rows) > 0;
}

// The calls for the nodes of one op follow each other: a gap would leave a node without its part.
void Executor::check_turn(Part part, const OpArgs& args, int node) const {
  const std::string nodes = std::to_string(pool_->nodes());
  require(node == kAllNodes || !std::holds_alternative<AttentionArgs>(args), "attention is shared by all nodes");
  require(node >= kAllNodes && node < pool_->nodes(), "node " + std::to_string(node) + " of " + nodes);
  if (ops_.empty() || whole(ops_.back())) {
    require(node <= 0, "node " + std::to_string(node) + " comes before node 0");
    return;
  }
  const Op& open = ops_.back();
  const std::string next = std::to_string(open.nodes.size());
  require(node == int(open.nodes.size()),
          "the op before has work for " + next + " of " + nodes + " nodes: that of node " + next + " must follow");
  require(open.part == part && open.nodes[0].index() == args.index(), "all nodes of an op do the same kind of work");
}

// A callback must not use what it is called by: it would wait for itself.
void Executor::require_no_caller() const {
  require(!pool_->is_caller(), "this was called by a callback of a step that the same threads run");
}

void Executor::check_limits(const OpArgs& args) const {
  check_extents(args, limits_);
  const std::string place = std::string(name_of(args)) + ": ";
  const int64_t needed = op_scratch_bytes(args, kernels_.sizes, limits_.rows);
  require(size_t(needed) <= limits_.scratch_bytes, place + std::to_string(needed) + " bytes of scratch are needed, " +
                                                       std::to_string(limits_.scratch_bytes) + " are given");
  const auto* gemm = std::get_if<GemmArgs>(&args);
  if (!gemm || gemm->output) return;
  const std::string vocab = std::to_string(limits_.vocab);
  require(gemm->output_stride == limits_.vocab,
          place + "output_stride is " + std::to_string(gemm->output_stride) + "; logits have rows of " + vocab);
  require(gemm->columns <= limits_.vocab - gemm->first_column,
          place + std::to_string(gemm->columns) + " columns from column " + std::to_string(gemm->first_column) +
              " on are more than the " + vocab + " of the logits");
}

void Executor::check(const Step& step) {
  const std::string planned = std::to_string(limits_.rows);
  require(!ops_.empty(), "this executor has no op yet");
  require(whole(ops_.back()), "the last op lacks the work of a node");
  require(step.rows >= 1 && step.rows <= limits_.rows,
          "a step of " + std::to_string(step.rows) + " rows; planned for 1 to " + planned);
  require(step.logit_rows >= 0 && step.logit_rows <= limits_.rows,
          "logits of " + std::to_string(step.logit_rows) + " rows; planned for at most " + planned);
  std::fill(ended_.begin(), ended_.end(), false);
  for (int row = 0; row < step.rows; ++row) check_row(step, row);
  for (int i = 0; i < step.logit_rows; ++i)
    require(step.logit_index[i] >= 0 && step.logit_index[i] < step.rows,
            "logit row " + std::to_string(step.logit_index[i]) + " of a step of " + std::to_string(step.rows));
}

// Rows before it have been checked.
void Executor::check_row(const Step& step, int row) {
  const auto in = [](int x, int end) { return x >= 0 && x < end; };
  const int token = step.tokens[row], sequence = step.sequences[row], position = step.positions[row];
  require(in(token, limits_.vocab),
          "token id " + std::to_string(token) + " is outside the vocabulary of " + std::to_string(limits_.vocab));
  require(in(sequence, limits_.sequences),
          "sequence " + std::to_string(sequence) + " of " + std::to_string(limits_.sequences));
  require(in(position, limits_.positions),
          "position " + std::to_string(position) + " of " + std::to_string(limits_.positions));
  if (row == 0) return;
  if (sequence == step.sequences[row - 1]) {
    require(position == step.positions[row - 1] + 1, "positions of a sequence must ascend by one");
  } else {
    ended_[size_t(step.sequences[row - 1])] = true;
    require(!ended_[size_t(sequence)], "rows of a sequence must be adjacent");
  }
}

bool Executor::needed(const Op& op, const Step& step) const {
  if (std::holds_alternative<MergeArgs>(op.nodes[0])) return step.split_tiles > 0;
  return op.part != Part::head || step.logit_rows > 0;
}

// Partial sums must be joined, which also clears them: a step that ended before would leave them to the next one.
bool Executor::may_end(size_t op) const {
  return op + 1 == ops_.size() || !std::holds_alternative<JoinArgs>(ops_[op + 1].nodes[0]);
}

Outcome Executor::asked_to_stop(Interrupted interrupted) {
  if (cancelled_.exchange(false, std::memory_order_relaxed)) return Outcome::cancelled;
  const double time = now();
  if (time < next_check_) return Outcome::done;
  next_check_ = time + 0.1;
  const bool end = interrupted && interrupted();
  pool_->require_process();  // a signal's handler may have forked
  return end ? Outcome::interrupted : Outcome::done;
}

// Scratch ends where the arena does: what the last thread writes behind its own meets no other memory.
char* Executor::scratch_of(int thread) const {
  return scratch_.end() - scratch_stride() * size_t(pool_->size() - thread);
}

// One thread's part in an op, which it shares with all threads or with those of its node. false: the step must end.
bool Executor::run(int index, const Step& step, int thread) {
  const Op& op = ops_[size_t(index)];
  const int node = op.per_node ? pool_->node_of(thread) : 0;
  const int first = op.per_node ? pool_->first_thread(node) : 0;
  const int last = op.per_node ? pool_->first_thread(node + 1) : pool_->size();
  int* counter = &counters_[size_t(node) * counter_stride() + size_t(index)];
  const Work work{thread - first, last - first, counter, op.uses_scratch ? scratch_of(thread) : nullptr};
  return std::visit(Runner{kernels_, step, work}, op.nodes[size_t(node)]);
}

void Executor::check_rows(const Step& step) {
  require_no_caller();
  std::lock_guard<std::mutex> lock(one_step_);
  check(step);
}

Outcome Executor::step(Step step, Times& times, Interrupted interrupted) {
  pool_->require_process();
  require_no_caller();
  std::lock_guard<std::mutex> lock(one_step_);
  check(step);
  step.tile_rows = limits_.batch_invariant ? 1 : 0;
  schedule_->build(step);
  counters_.assign(counter_stride() * size_t(pool_->nodes()), 0);
  times.fill(0);
  next_check_ = now() + 0.1;
  Outcome outcome = Outcome::done;
  std::atomic<int> last{INT_MAX};  // the op after which all threads leave; set before the barrier that ends it

  bool failed = false;  // a callback has; known to thread 0

  auto job = [&](int thread) {
    double before = thread == 0 ? now() : 0;
    for (int i = 0; i < int(ops_.size()); ++i) {
      const Op& op = ops_[size_t(i)];
      if (!needed(op, step)) continue;
      const bool goes_on = run(i, step, thread);
      if (std::holds_alternative<HostArgs>(op.nodes[0])) pool_->require_process();  // Python may have forked
      if (thread == 0) failed |= !goes_on;
      if (thread == 0 && may_end(size_t(i))) {
        outcome = failed ? Outcome::interrupted : asked_to_stop(interrupted);
        if (outcome != Outcome::done) last.store(i, std::memory_order_relaxed);
      }
      pool_->barrier();
      if (last.load(std::memory_order_relaxed) <= i) return;
      if (thread == 0) {
        const double after = now();
        times[size_t(op.part)] += after - before;
        before = after;
      }
    }
  };
  pool_->run(job);
  return outcome;
}

}  // namespace hybrid
