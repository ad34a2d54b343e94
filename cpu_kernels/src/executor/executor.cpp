#include "executor/executor.h"

#include <algorithm>
#include <chrono>
#include <climits>
#include <cmath>
#include <stdexcept>
#include <string>

namespace hybrid {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void require(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

// Cosines and sines of every row's position, once a step for all layers. The angle is rounded to fp32, as the
// reference implementations do: at position 100000 that moves it by more than any kernel's own error.
void rope_table(const RopeTableArgs& args, const Step& step, const Work& work) {
  const int half = args.dim / 2;
  for (int row = work.thread; row < step.rows; row += work.threads) {
    float* out = args.table + int64_t(row) * args.dim;
    for (int i = 0; i < half; ++i) {
      const float angle = float(step.positions[row]) * args.inverse_frequencies[i];
      out[i] = float(std::cos(double(angle))) * args.factor;
      out[half + i] = float(std::sin(double(angle))) * args.factor;
    }
  }
}

// Counting sort of (row, expert) pairs by expert. Serial: a few microseconds beside the milliseconds of the experts.
void group(const GroupArgs& args, const Step& step, const Work& work) {
  if (work.thread != 0) return;
  const Routing& r = args.routing;
  const int pairs = step.rows * args.top_k;
  const auto expert = [&](int pair) { return args.ids ? args.ids[pair] : 0; };
  std::fill(r.offsets, r.offsets + args.experts + 1, 0);
  for (int pair = 0; pair < pairs; ++pair)
    if (expert(pair) >= 0) ++r.offsets[expert(pair) + 1];
  *r.count = 0;
  for (int e = 0; e < args.experts; ++e) {
    if (r.offsets[e + 1] > 0) r.active[(*r.count)++] = e;
    r.offsets[e + 1] += r.offsets[e];
  }
  for (int pair = 0; pair < pairs; ++pair) {
    if (expert(pair) < 0) continue;
    const int at = r.offsets[expert(pair)]++;
    r.rows[at] = pair / args.top_k;
    r.weights[at] = args.weights ? args.weights[pair] : 1.0f;
    if (args.pairs) args.pairs[at] = pair;
  }
  for (int e = args.experts; e > 0; --e) r.offsets[e] = r.offsets[e - 1];
  r.offsets[0] = 0;
}

struct Runner {
  const KernelTable& kernels;
  const Step& step;
  const Work& work;

  // Whether the step may go on.
  template <class Args>
  bool operator()(const Args& args) const {
    run(args);
    return true;
  }
  bool operator()(const HostArgs& a) const { return work.thread != 0 || a.call(a.context); }

 private:
  void run(const EmbedArgs& a) const { kernels.embed(a, step, work); }
  void run(const RopeTableArgs& a) const { rope_table(a, step, work); }
  void run(const NormArgs& a) const { kernels.norm(a, step, work); }
  void run(const GemmArgs& a) const { kernels.gemm[int(a.format)](a, step, work); }
  void run(const QuantiseArgs& a) const { kernels.quantise(a, step, work); }
  void run(const QkvArgs& a) const { kernels.qkv(a, step, work); }
  void run(const AttentionArgs& a) const { kernels.attention(a, step, work); }
  void run(const MergeArgs& a) const { kernels.merge(a.attention, step, work); }
  void run(const RouterArgs& a) const { kernels.router(a, step, work); }
  void run(const TopkArgs& a) const { kernels.topk(a, step, work); }
  void run(const GroupArgs& a) const { group(a, step, work); }
  void run(const GateUpArgs& a) const { kernels.gate_up(a, step, work); }
  void run(const DownArgs& a) const { kernels.down(a, step, work); }
  void run(const JoinArgs& a) const { kernels.join(a, step, work); }
  void run(const CombineArgs& a) const { kernels.combine(a, step, work); }
};

}  // namespace

Executor::Executor(const KernelTable& kernels, std::shared_ptr<ThreadPool> pool, Limits limits)
    : kernels_(kernels),
      pool_(std::move(pool)),
      limits_(limits),
      ended_(size_t(limits.slots)),
      scratch_(limits.scratch_bytes * size_t(pool_->size()), true) {}

void Executor::add(Part part, const OpArgs& args, int node) {
  check_turn(part, args, node);
  check_args(args);
  if (node > 0)
    ops_.back().nodes.push_back(args);
  else
    ops_.push_back({part, node != kAllNodes, {args}});
  schedule_ = std::make_unique<Schedule>(limits_.rows, group_);
}

// The calls for the nodes of one op follow each other: a gap would leave a node without its part.
void Executor::check_turn(Part part, const OpArgs& args, int node) const {
  const std::string nodes = std::to_string(pool_->nodes());
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

void Executor::check_args(const OpArgs& args) {
  if (const auto* attention = std::get_if<AttentionArgs>(&args)) {
    const int group = attention->heads / attention->kv_heads;
    require(group <= kMaxTileRows, "attention with " + std::to_string(group) + " query heads per KV head; at most " +
                                       std::to_string(kMaxTileRows) + " are supported");
    const size_t rows = size_t(std::max(kAttentionRows, group));
    const size_t opened =
        attention->kv.format == Format::bf16 ? 0 : size_t(std::max(kKeys, attention->kv.key_dim)) * 128;
    const size_t needed = rows * (kKeys * 6 + size_t(attention->kv.value_dim + kBlock) * 8) + opened;
    require(needed <= limits_.scratch_bytes, "attention needs " + std::to_string(needed) + " bytes of scratch");
    group_ = std::max(group_, group);
  }
  if (const auto* qkv = std::get_if<QkvArgs>(&args))
    require(qkv->head_dim <= kMaxHeadDim,
            "head_dim " + std::to_string(qkv->head_dim) + " is above " + std::to_string(kMaxHeadDim));
}

void Executor::check(const Step& step) {
  require(ops_.empty() || whole(ops_.back()), "the last op lacks the work of a node");
  require(step.rows >= 1 && step.rows <= limits_.rows,
          "a step of " + std::to_string(step.rows) + " rows; planned for 1 to " + std::to_string(limits_.rows));
  std::fill(ended_.begin(), ended_.end(), false);
  for (int i = 0; i < step.rows; ++i) {
    const auto in = [](int x, int end) { return x >= 0 && x < end; };
    require(in(step.tokens[i], limits_.vocab), "token id " + std::to_string(step.tokens[i]) +
                                                   " is outside the vocabulary of " + std::to_string(limits_.vocab));
    require(in(step.slots[i], limits_.slots),
            "slot " + std::to_string(step.slots[i]) + " of " + std::to_string(limits_.slots));
    require(in(step.positions[i], limits_.positions),
            "position " + std::to_string(step.positions[i]) + " of " + std::to_string(limits_.positions));
    if (i == 0) continue;
    if (step.slots[i] == step.slots[i - 1]) {
      require(step.positions[i] == step.positions[i - 1] + 1, "positions of a slot must ascend by one");
    } else {
      ended_[size_t(step.slots[i - 1])] = true;
      require(!ended_[size_t(step.slots[i])], "rows of a slot must be adjacent");
    }
  }
  for (int i = 0; i < step.logit_rows; ++i)
    require(step.logit_index[i] >= 0 && step.logit_index[i] < step.rows, "logit row outside the step");
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
  return interrupted && interrupted() ? Outcome::interrupted : Outcome::done;
}

// One thread's part in an op, which it shares with all threads or with those of its node. false: the step must end.
bool Executor::run(int index, const Step& step, int thread) {
  const Op& op = ops_[size_t(index)];
  const int node = op.per_node ? pool_->node_of(thread) : 0;
  const int first = op.per_node ? pool_->first_thread(node) : 0;
  const int last = op.per_node ? pool_->first_thread(node + 1) : pool_->size();
  int* counter = &counters_[size_t(node) * counter_stride() + size_t(index)];
  char* scratch = scratch_.data() + limits_.scratch_bytes * size_t(thread);
  const Work work{thread - first, last - first, counter, scratch};
  return std::visit(Runner{kernels_, step, work}, op.nodes[size_t(node)]);
}

Outcome Executor::step(Step step, Times& times, Interrupted interrupted) {
  std::lock_guard<std::mutex> lock(one_step_);
  check(step);
  step.tile_rows = limits_.batch_invariant ? 1 : 0;
  schedule_->build(step);
  counters_.assign(counter_stride() * size_t(pool_->nodes()), 0);
  times.fill(0);
  next_check_ = now() + 0.1;
  Outcome outcome = Outcome::done;
  std::atomic<int> last{INT_MAX};  // the op after which all threads leave; set before the barrier that ends it

  auto job = [&](int thread) {
    double before = thread == 0 ? now() : 0;
    for (int i = 0; i < int(ops_.size()); ++i) {
      const Op& op = ops_[size_t(i)];
      if (!needed(op, step)) continue;
      const bool goes_on = run(i, step, thread);
      if (thread == 0 && may_end(size_t(i))) {
        outcome = goes_on ? asked_to_stop(interrupted) : Outcome::interrupted;
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
