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
#include "executor/args.h"
#include "executor/schedule.h"

namespace hybrid {

struct MergeArgs {
  AttentionArgs attention;
};

using OpArgs = std::variant<EmbedArgs, RopeTableArgs, NormArgs, GemmArgs, QkvArgs, AttentionArgs, MergeArgs, RouterArgs,
                            TopkArgs, GroupArgs, GateUpArgs, DownArgs>;

// What the time of an op is booked under.
enum class Part { attention, moe, head, other };
constexpr int kParts = 4;
using Times = std::array<double, kParts>;  // seconds

struct Limits {
  int rows, slots, positions, vocab;
  size_t scratch_bytes;  // per thread
};

enum class Outcome { done, cancelled, interrupted };

class Executor {
 public:
  // Asked every tenth of a second on the calling thread whether the step should end.
  using Interrupted = bool (*)();

  Executor(const KernelTable& kernels, std::shared_ptr<ThreadPool> pool, Limits limits);

  // Throws std::invalid_argument when the op does not fit the limits.
  void add(Part part, const OpArgs& args);

  // Runs every op over the rows of `step`, whose tile fields it fills. Throws std::invalid_argument on tokens, slots or
  // positions out of range. After `cancelled` or `interrupted` what the step wrote must be discarded.
  Outcome step(Step step, Times& times, Interrupted interrupted);

  // From any thread: ends the running step, or the next one if none runs.
  void cancel() { cancelled_.store(true, std::memory_order_relaxed); }

  int vocab() const { return limits_.vocab; }
  size_t op_count() const { return ops_.size(); }

 private:
  struct Op {
    Part part;
    OpArgs args;
  };
  void check(const Step& step);
  bool needed(const Op& op, const Step& step) const;
  void run(const Op& op, const Step& step, const Work& work) const;
  Outcome asked_to_stop(Interrupted interrupted);

  const KernelTable& kernels_;
  std::shared_ptr<ThreadPool> pool_;
  const Limits limits_;
  std::vector<char> ended_;  // [slots], slots whose rows have passed; of the step being checked
  int group_ = 1;
  std::vector<Op> ops_;
  std::mutex one_step_;  // held while a step runs: what it counts and plans is kept here
  std::vector<int> counters_;
  std::unique_ptr<Schedule> schedule_;
  Arena scratch_;
  std::atomic<bool> cancelled_{false};
  double next_check_ = 0;
};

}  // namespace hybrid
