#include "executor/executor.h"

#include <algorithm>
#include <chrono>
#include <string>

#include "executor/checks.h"
#include "executor/common_ops.h"
#include "executor/field_check.h"

namespace hybrid {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Runs an op; of what the host does, nothing.
struct Runner {
  const KernelTable& kernels;
  const Step& step;
  const Work& work;

#define HYBRID_RUN_KERNEL(op, Args) \
  void operator()(const Args& args) const { kernels.op(args, step, work); }
#define HYBRID_RUN_COMMON(op, Args) \
  void operator()(const Args& args) const { op(args, step, work); }
  HYBRID_KERNEL_OPS(HYBRID_RUN_KERNEL)
  HYBRID_COMMON_OPS(HYBRID_RUN_COMMON)
#undef HYBRID_RUN_KERNEL
#undef HYBRID_RUN_COMMON
  void operator()(const MergeArgs& args) const { kernels.merge(args, step, work); }
  void operator()(const HostArgs&) const {}
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
      scratch_(scratch_stride() * size_t(pool_->size()), true) {
  require(pool_->nodes() <= kMaxNodes, std::to_string(pool_->nodes()) + " nodes of threads; at most " +
                                           std::to_string(kMaxNodes) + " can share a step");
}

void Executor::add(Part part, const OpArgs& args, int node) {
  require_no_caller();
  const std::unique_lock<std::mutex> lock(one_step_, std::try_to_lock);
  require(lock.owns_lock(), std::string(name_of(args)) + ": a step runs; ops are added between steps");
  check_op(args, Addresses::present);
  check_turn(part, args, node);
  check_limits(args);
  append(part, args, node);
  if (const auto* attention = std::get_if<AttentionArgs>(&args)) {
    heads_ = std::max(heads_, attention->heads);
    group_ = std::max(group_, attention->heads / attention->kv_heads);
    append(part, MergeArgs{*attention}, node);
  }
  schedule_ = std::make_unique<Schedule>(limits_.rows, heads_, group_);
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
  const std::string vocab = std::to_string(limits_.vocab);
  if (const auto* cap = std::get_if<SoftCapArgs>(&args))
    require(cap->columns == limits_.vocab,
            place + "columns is " + std::to_string(cap->columns) + "; logits have rows of " + vocab);
  const auto* gemm = std::get_if<GemmArgs>(&args);
  if (!gemm || gemm->output) return;
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

// Scratch ends where the arena does: what the last thread writes behind its own meets no other memory.
char* Executor::scratch_of(int thread) const {
  return scratch_.end() - scratch_stride() * size_t(pool_->size() - thread);
}

// What the threads of a node take in an op; nodes share no cache line.
size_t Executor::taken_stride() const {
  const int threads = (pool_->size() + pool_->nodes() - 1) / pool_->nodes();
  return size_t(pool_->nodes() > 1 ? (threads + 3) / 4 * 8 : 2 * threads);
}

// One thread's part in an op, which it shares with all threads or with those of its node.
void Executor::run(int index, const Step& step, int thread) {
  const Op& op = ops_[size_t(index)];
  const int node = op.per_node ? pool_->node_of(thread) : 0;
  const int first = op.per_node ? pool_->first_thread(node) : 0;
  const int last = op.per_node ? pool_->first_thread(node + 1) : pool_->size();
  uint64_t* taken = &taken_[(size_t(index) * size_t(pool_->nodes()) + size_t(node)) * taken_stride()];
  const Work work{last - first, thread - first, taken, op.uses_scratch ? scratch_of(thread) : nullptr};
  std::visit(Runner{kernels_, step, work}, op.nodes[size_t(node)]);
}

void Executor::check_rows(const Step& step) {
  require_no_caller();
  std::lock_guard<std::mutex> lock(one_step_);
  check(step);
}

// A step on the threads of the pool: each op that it needs is a phase.
class Executor::Running final : public ThreadPool::Job {
 public:
  Running(Executor& executor, const Step& step, Times& times, Interrupted interrupted)
      : executor_(executor),
        step_(step),
        times_(times),
        interrupted_(interrupted),
        next_look_(before_ + kLookSeconds) {}

  Outcome outcome() const { return outcome_; }

  bool work(int thread) override {
    const Op& op = executor_.ops_[size_t(op_)];
    if (thread == 0 && interrupted_ && now() >= next_look_) look_for_signals();
    if (const auto* host = std::get_if<HostArgs>(&op.nodes[0])) return thread == 0 && call(*host);
    executor_.run(op_, step_, thread);
    if (!op.per_node) return true;
    const unsigned node = 1u << executor_.pool_->node_of(thread);
    return (served_.fetch_or(node) | node) == (2u << (executor_.pool_->nodes() - 1)) - 1;
  }

  bool next() override {
    const double after = now();
    if (op_ >= 0) {
      times_[size_t(executor_.ops_[size_t(op_)].part)] += after - before_;
      if (ends()) return false;
    }
    before_ = after;
    served_.store(0, std::memory_order_relaxed);
    do ++op_;
    while (op_ < int(executor_.ops_.size()) && !executor_.needed(executor_.ops_[size_t(op_)], step_));
    return op_ < int(executor_.ops_.size());
  }

 private:
  static constexpr double kLookSeconds = 0.1;

  // On the thread of the caller, as the host expects. What fails there ends the step.
  bool call(const HostArgs& host) {
    if (!host.call(host.context)) stop_ = true;
    executor_.pool_->require_process();  // Python may have forked
    return true;
  }
  void look_for_signals() {
    next_look_ = now() + kLookSeconds;
    if (!stop_ && interrupted_()) stop_ = true;
    executor_.pool_->require_process();  // a signal's handler may have forked
  }
  bool ends() {
    if (!executor_.may_end(size_t(op_))) return false;
    if (stop_)
      outcome_ = Outcome::interrupted;
    else if (executor_.cancelled_.exchange(false, std::memory_order_relaxed))
      outcome_ = Outcome::cancelled;
    return outcome_ != Outcome::done;
  }

  Executor& executor_;
  const Step& step_;
  Times& times_;
  const Interrupted interrupted_;
  Outcome outcome_ = Outcome::done;
  int op_ = -1;
  double before_ = now();  // when the op began
  double next_look_;
  bool stop_ = false;                // written by the thread of the caller while it works
  std::atomic<unsigned> served_{0};  // nodes that have no more work in the op, a bit each
};

Outcome Executor::step(Step step, Times& times, Interrupted interrupted) {
  pool_->require_process();
  require_no_caller();
  std::lock_guard<std::mutex> lock(one_step_);
  check(step);
  step.tile_rows = limits_.batch_invariant ? 1 : 0;
  schedule_->build(step);
  taken_.assign(ops_.size() * size_t(pool_->nodes()) * taken_stride(), 0);
  times.fill(0);
  Running running(*this, step, times, interrupted);
  pool_->run(running);
  return running.outcome();
}

}  // namespace hybrid
