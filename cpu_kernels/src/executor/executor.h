// Runs a compiled plan: a flat list of ops over fixed addresses, one call a step.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <variant>
#include <vector>

#include "cpu/memory.h"
#include "cpu/thread_pool.h"
#include "executor/ops.h"
#include "executor/schedule.h"

namespace hybrid {

#define HYBRID_ARGS(op, Args) Args,
using OpArgs = std::variant<HYBRID_OPS(HYBRID_ARGS) MergeArgs, HostArgs>;
#undef HYBRID_ARGS

// What the time of an op is booked under.
enum class Part { attention, moe, head, other, experts, place, join };
constexpr int kParts = 7;
using Times = std::array<double, kParts>;  // seconds

constexpr int kAllNodes = -1;

struct Limits {
  int rows, sequences, positions, vocab;
  size_t scratch_bytes;  // per thread
  bool batch_invariant;  // products of any number of rows take the same path, bit for bit
};

enum class Outcome { done, cancelled, interrupted };  // interrupted: or a callback failed

class Executor {
 public:
  // Asked every tenth of a second on the calling thread whether the step should end.
  using Interrupted = bool (*)();

  Executor(const KernelTable& kernels, std::shared_ptr<ThreadPool> pool, Limits limits);

  // An op that all threads share; or, with `node`, what the threads of one node do in an op in which each node has work
  // of its own: such calls come for node 0, 1 and so on, one after the other. Throws std::invalid_argument when the op
  // has wrong fields, does not fit the limits, needs more scratch than there is or comes out of turn.
  void add(Part part, const OpArgs& args, int node = kAllNodes);

  // Throws std::invalid_argument where `step` would, because of these rows.
  void check_rows(const Step& step);

  // Runs every op over the rows of `step`, whose tile fields it fills. Throws std::invalid_argument on more rows or
  // logits than planned for, on tokens, sequences or positions out of range, or when the last op lacks a node. After
  // `cancelled` or `interrupted` what the step wrote must be discarded.
  Outcome step(Step step, Times& times, Interrupted interrupted);

  // From any thread: ends the running step, or the next one if none runs.
  void cancel() { cancelled_.store(true, std::memory_order_relaxed); }

  int vocab() const { return limits_.vocab; }
  size_t op_count() const { return ops_.size(); }

 private:
  class Running;
  struct Op {
    Part part;
    bool per_node;
    std::vector<OpArgs> nodes;  // one, or one for each node
    bool uses_scratch = false;
  };
  void append(Part part, const OpArgs& args, int node);
  void check_limits(const OpArgs& args) const;
  void check_turn(Part part, const OpArgs& args, int node) const;
  bool whole(const Op& op) const { return !op.per_node || int(op.nodes.size()) == pool_->nodes(); }
  void require_no_caller() const;
  void check(const Step& step);
  void check_row(const Step& step, int row);
  bool needed(const Op& op, const Step& step) const;
  bool may_end(size_t op) const;
  size_t taken_stride() const;
  size_t scratch_stride() const { return (limits_.scratch_bytes + kLine - 1) / kLine * kLine; }
  char* scratch_of(int thread) const;
  void run(int op, const Step& step, int thread);

  const KernelTable& kernels_;
  std::shared_ptr<ThreadPool> pool_;
  const Limits limits_;
  std::vector<char> ended_;  // [sequences], those whose rows have passed; of the step being checked
  int heads_ = 1, group_ = 1;
  std::vector<Op> ops_;
  std::mutex one_step_;          // held while a step runs: what it counts and plans is kept here
  std::vector<uint64_t> taken_;  // [ops][nodes][taken_stride()]
  std::unique_ptr<Schedule> schedule_;
  Arena scratch_;
  std::atomic<bool> cancelled_{false};
};

}  // namespace hybrid
