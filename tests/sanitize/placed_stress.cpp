// Experts in two places under a race detector: threads that compute what the device lacks, a device that computes from
// its slots at the same time, and copies that overwrite slots behind both. The protocol is that of gpu_cache and of
// hybrid/engine/experts/runtime.py. Sums are compared bit for bit with those of one place.
// Ends with 1 at the first wrong result; tests/sanitize/run.py builds and runs it.
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "stress.h"

namespace {

using namespace hybrid;
using namespace stress;

constexpr int kRows = 6, kHidden = 64, kExperts = 7, kSlots = 3, kTopK = 2, kIntermediate = 64, kPairs = kRows * kTopK;
constexpr int64_t kExpertBytes = 3 * int64_t(kIntermediate) * kHidden * 2;

// One thread that does what it is given, in order, as the threads of the simulated device do.
class Worker {
 public:
  Worker() : thread_([this] { work(); }) {}
  ~Worker() {
    give(nullptr);
    thread_.join();
  }
  void give(std::function<void()> task) {
    std::lock_guard<std::mutex> guard(lock_);
    tasks_.push_back(std::move(task));
    wake_.notify_one();
  }

 private:
  void work() {
    for (;;) {
      std::unique_lock<std::mutex> guard(lock_);
      wake_.wait(guard, [this] { return !tasks_.empty(); });
      std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      guard.unlock();
      if (!task) return;
      task();
    }
  }

  std::mutex lock_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> tasks_;
  std::thread thread_;
};

// The experts of one place: group, gate and up, down by pair, on an executor of its own.
class Place {
 public:
  Place(int threads, const char* experts, int count)
      : executor_(kernels_portable, make_pool(threads, 1), limits_of(kRows)) {
    experts_ = experts;
    count_experts_ = count;
  }

  int32_t* ids() { return ids_.data(); }
  void add(const bf16* input, float* contributions) {
    const Routing routing{offsets_.data(), rows_.data(), ones_.data(), active_.data(), count_.data()};
    const Routing by_pair{offsets_.data(), pairs_.data(), ones_.data(), active_.data(), count_.data()};
    executor_.add(Part::place, GroupArgs{ids_.data(), nullptr, routing, pairs_.data(), count_experts_, kTopK});
    GateUpArgs gate_up{};
    gate_up.routed = set(routing, input, kHidden, 0, kIntermediate);
    gate_up.output = activation_.data();
    gate_up.output_stride = kIntermediate;
    gate_up.activation = Activation::silu;
    executor_.add(Part::experts, gate_up);
    DownArgs down{};
    down.routed = set(by_pair, activation_.data(), kIntermediate, 2 * matrix_bytes(kIntermediate, kHidden), kHidden);
    down.output = contributions;
    down.output_stride = kHidden;
    executor_.add(Part::experts, down);
  }
  void add(Part part, const OpArgs& args) { executor_.add(part, args); }

  void step() { run_step(executor_, kRows); }

 private:
  ExpertSet set(const Routing& routing, const bf16* input, int inputs, int64_t first, int columns) {
    ExpertSet set{};
    set.format = Format::bf16;
    set.input = reinterpret_cast<const char*>(input);
    set.input_stride = 2 * inputs;
    set.routing = routing;
    set.experts = experts_ + first;
    set.expert_stride = kExpertBytes;
    set.blocks = columns / kBlock;
    set.inputs = inputs;
    return set;
  }

  Executor executor_;
  const char* experts_;
  int count_experts_;
  Aligned<int32_t> ids_{kPairs}, rows_{kPairs}, pairs_{kPairs}, offsets_{kExperts + 1}, active_{kExperts}, count_{1};
  Aligned<float> ones_{kPairs};
  Aligned<bf16> activation_{kPairs * kIntermediate};
};

// A layer whose experts are computed by threads and, as far as they lie in slots, by a device.
class PlacedLayer {
 public:
  explicit PlacedLayer(int threads)
      : threads_(threads, bytes(experts_), kExperts), device_(1, bytes(slots_), kSlots), held_(kSlots, -1) {
    fill(experts_.data(), int(kExperts * kExpertBytes / 2), 2);
    fill(input_.data(), kRows * kHidden, 3);
    for (int i = 0; i < kPairs * kHidden; ++i) contributions_.data()[i] = -0.0f;
    for (int i = 0; i < kPairs; ++i) weights_.data()[i] = 0.25f + 0.125f * float(i % 5);
    threads_.add(Part::place, HostArgs{[](void* self) { return static_cast<PlacedLayer*>(self)->place(); }, this});
    threads_.add(input_.data(), contributions_.data());
    threads_.add(Part::join, HostArgs{[](void* self) { return static_cast<PlacedLayer*>(self)->join(); }, this});
    CombineArgs combine{ids_.data(), weights_.data(), contributions_.data(), output_.data(), kTopK, kHidden,
                        kHidden,     kHidden};
    threads_.add(Part::join, combine);
    device_.add(input_.data(), contributions_.data());
  }

  // The output of a step. copies: whether slots are filled meanwhile; without them all is computed by the threads.
  std::vector<float> run(int seed, bool copies) {
    copying_ = copies;
    for (int row = 0; row < kRows; ++row) {
      ids_.data()[row * kTopK] = (row * 3 + seed) % kExperts;
      ids_.data()[row * kTopK + 1] = (row * 3 + seed + 1 + seed % 5) % kExperts;
    }
    for (int i = 0; i < kRows * kHidden; ++i) output_.data()[i] = float(i % 7);
    threads_.step();
    return {output_.data(), output_.data() + kRows * kHidden};
  }
  int hits() const { return hits_; }

 private:
  static char* bytes(const Aligned<bf16>& memory) { return reinterpret_cast<char*>(memory.data()); }

  bool place() {
    publish();
    std::vector<bool> pinned(kSlots, false);
    for (int pair = 0; pair < kPairs; ++pair) {
      const int expert = ids_.data()[pair], slot = slot_of(expert);
      device_.ids()[pair] = slot;
      threads_.ids()[pair] = slot < 0 ? expert : -1;
      if (slot < 0) continue;
      pinned[size_t(slot)] = true;
      ++hits_;
    }
    if (copying_) start_copy(pinned);
    runner_.give([this] {
      device_.step();
      std::lock_guard<std::mutex> guard(lock_);
      joined_ = true;
      wake_.notify_one();
    });
    return true;
  }
  bool join() {
    std::unique_lock<std::mutex> guard(lock_);
    wake_.wait(guard, [this] { return joined_; });
    joined_ = false;
    return true;
  }

  int slot_of(int expert) const {
    for (int slot = 0; slot < kSlots; ++slot)
      if (held_[size_t(slot)] == expert) return slot;
    return -1;
  }
  // Overwrites a slot that nobody uses, while threads and device compute.
  void start_copy(const std::vector<bool>& pinned) {
    const int expert = turn_++ % kExperts;
    if (slot_of(expert) >= 0 || on_the_way_ >= 0) return;
    for (int slot = 0; slot < kSlots; ++slot) {
      if (pinned[size_t(slot)]) continue;
      held_[size_t(slot)] = -1;
      on_the_way_ = slot;
      copier_.give([this, slot, expert] {
        std::memcpy(bytes(slots_) + slot * kExpertBytes, bytes(experts_) + expert * kExpertBytes, size_t(kExpertBytes));
        std::lock_guard<std::mutex> guard(lock_);
        ended_.emplace_back(slot, expert);
      });
      return;
    }
  }
  void publish() {
    std::lock_guard<std::mutex> guard(lock_);
    for (const auto& [slot, expert] : ended_) held_[size_t(slot)] = expert;
    if (!ended_.empty()) on_the_way_ = -1;
    ended_.clear();
  }

  Aligned<bf16> experts_{size_t(kExperts * kExpertBytes / 2)}, slots_{size_t(kSlots * kExpertBytes / 2)};
  Aligned<bf16> input_{kRows * kHidden};
  Aligned<float> contributions_{kPairs * kHidden}, output_{kRows * kHidden}, weights_{kPairs};
  Aligned<int32_t> ids_{kPairs};
  Place threads_, device_;
  std::vector<int> held_;  // expert of each slot that is ready
  bool copying_ = false;
  int turn_ = 0, hits_ = 0, on_the_way_ = -1;
  std::mutex lock_;
  std::condition_variable wake_;
  bool joined_ = false;
  std::vector<std::pair<int, int>> ended_;
  Worker runner_, copier_;  // last: they end before what they use
};

}  // namespace

int main() {
  PlacedLayer placed(3), alone(1);
  for (int step = 0; step < 300 || (placed.hits() <= 300 && step < 100000); ++step)
    check(placed.run(step, true) == alone.run(step, false), "a step with experts in two places");
  check(placed.hits() > 300 && alone.hits() == 0, "the device had too little to do");
  std::puts("places agree");
}
