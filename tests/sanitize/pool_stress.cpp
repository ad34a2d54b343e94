// Threads of the pool and the executor under a race detector: short jobs of many phases, threads that sleep through
// some, two callers, steps that are cancelled while they run, nodes with work of their own. Results are compared bit
// for bit with those of one thread. Ends with 1 at the first wrong result; tests/sanitize/run.py builds and runs it.
#include <atomic>
#include <chrono>
#include <thread>
#include <utility>
#include <vector>

#include "stress.h"

namespace {

using namespace hybrid;
using namespace stress;

constexpr int kRows = 24, kHidden = 128, kExperts = 5, kTopK = 2, kIntermediate = 64;

// A norm, a projection, routed experts split between the nodes, and the join: the ops in which threads share most.
class Layer {
 public:
  explicit Layer(std::shared_ptr<ThreadPool> pool)
      : pool_(std::move(pool)), executor_(kernels_portable, pool_, limits_of(kRows)) {
    fill(weights_.data(), int(matrix_bytes(kHidden, kHidden) / 2), 1);
    fill(experts_.data(), int(kExperts * expert_bytes() / 2), 2);
    for (int i = 0; i < kHidden; ++i) norm_weight_.data()[i] = 1.0f;
    for (int i = 0; i < kRows * kTopK; ++i) {
      ids_.data()[i] = (i * 7 + i / 3) % kExperts;
      gates_.data()[i] = 0.5f;
    }
    add_projection();
    add_experts();
  }

  // The residual after a step of `rows` rows.
  std::vector<float> run(int rows) {
    for (int i = 0; i < kRows * kHidden; ++i) residual_.data()[i] = float((i * 13) % 29 - 14) / 14.0f;
    step(rows);
    return {residual_.data(), residual_.data() + size_t(rows) * kHidden};
  }

  Outcome step(int rows) { return run_step(executor_, rows); }

  void cancel() { executor_.cancel(); }

 private:
  static int64_t expert_bytes() { return 3 * matrix_bytes(kIntermediate, kHidden); }

  void add_projection() {
    NormArgs norm{};
    norm.input = residual_.data();
    norm.weight = norm_weight_.data();
    norm.output = normed_.data();
    norm.width = norm.input_stride = norm.output_stride = kHidden;
    norm.eps = 1e-6f;
    executor_.add(Part::other, norm);
    GemmArgs gemm{};
    gemm.format = Format::bf16;
    gemm.input = reinterpret_cast<const char*>(normed_.data());
    gemm.weight = reinterpret_cast<const char*>(weights_.data());
    gemm.output = residual_.data();
    gemm.columns = gemm.inputs = gemm.output_stride = kHidden;
    gemm.input_stride = 2 * kHidden;
    gemm.accumulate = 1;
    executor_.add(Part::attention, gemm);
    executor_.add(Part::other, norm);
  }

  // Every node takes all experts with the same weights, and counts for its share of the sum.
  void add_experts() {
    const Routing routing{offsets_.data(), rows_.data(), weights_of_rows_.data(), active_.data(), count_.data()};
    executor_.add(Part::moe, GroupArgs{ids_.data(), gates_.data(), routing, nullptr, kExperts, kTopK});
    for (int node = 0; node < pool_->nodes(); ++node) executor_.add(Part::moe, gate_up(routing, node), node);
    for (int node = 0; node < pool_->nodes(); ++node) executor_.add(Part::moe, down(routing, node), node);
    JoinArgs join{};
    join.partials.count = pool_->nodes();
    for (int node = 0; node < join.partials.count; ++node) join.partials.of[node] = partial(node);
    join.output = residual_.data();
    join.width = join.output_stride = kHidden;
    executor_.add(Part::moe, join);
  }

  static ExpertSet experts(const Routing& routing, const bf16* input, int inputs, const char* first, int columns) {
    ExpertSet set{};
    set.format = Format::bf16;
    set.input = reinterpret_cast<const char*>(input);
    set.input_stride = 2 * inputs;
    set.routing = routing;
    set.experts = first;
    set.expert_stride = expert_bytes();
    set.blocks = columns / kBlock;
    set.inputs = inputs;
    return set;
  }

  GateUpArgs gate_up(const Routing& routing, int node) {
    GateUpArgs args{};
    const char* first = reinterpret_cast<const char*>(experts_.data());
    args.routed = experts(routing, normed_.data(), kHidden, first, kIntermediate);
    args.output = activation(node);
    args.output_stride = kIntermediate;
    args.activation = Activation::silu;
    return args;
  }

  DownArgs down(const Routing& routing, int node) {
    DownArgs args{};
    const char* first = reinterpret_cast<const char*>(experts_.data()) + 2 * matrix_bytes(kIntermediate, kHidden);
    args.routed = experts(routing, activation(node), kIntermediate, first, kHidden);
    args.output = partial(node);
    args.output_stride = kHidden;
    return args;
  }

  bf16* activation(int node) { return activations_.data() + int64_t(node) * kRows * kTopK * kIntermediate; }
  float* partial(int node) { return partials_.data() + int64_t(node) * kRows * kHidden; }

  std::shared_ptr<ThreadPool> pool_;
  Executor executor_;
  Aligned<bf16> weights_{size_t(kHidden * kHidden)}, experts_{size_t(kExperts) * 3 * kIntermediate * kHidden};
  Aligned<bf16> normed_{size_t(kRows * kHidden)}, activations_{size_t(kMaxNodes) * kRows * kTopK * kIntermediate};
  Aligned<float> norm_weight_{kHidden}, residual_{size_t(kRows * kHidden)};
  Aligned<float> partials_{size_t(kMaxNodes) * kRows * kHidden}, gates_{kRows * kTopK}, weights_of_rows_{kRows * kTopK};
  Aligned<int32_t> ids_{kRows * kTopK}, rows_{kRows * kTopK}, offsets_{kExperts + 1}, active_{kExperts}, count_{1};
};

// Each phase makes the numbers of the next from those of the one before, by whoever takes them. Some parts are slow, so
// that threads fall asleep in the middle of a job, and come back into another phase.
class Numbers final : public ThreadPool::Job {
 public:
  explicit Numbers(int phases) : phases_(phases) {}

  bool work(int) override {
    for (int i; (i = taken_.fetch_add(1)) < kCount;) {
      if (i == phase_ % kCount && phase_ % 7 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      to_[i] = from_[(i + 1) % kCount] + 1;
    }
    return true;
  }
  bool next() override {
    for (int i = 0; i < kCount; ++i) check(to_[i] == phase_ + 1, "a number of the phase before");
    std::swap(from_, to_);
    taken_.store(0);
    return ++phase_ < phases_;
  }

 private:
  static constexpr int kCount = 9;
  const int phases_;
  int phase_ = -1;
  std::atomic<int> taken_{0};
  int numbers_[2][kCount] = {};
  int *from_ = numbers_[0], *to_ = numbers_[1];
};

void phases(ThreadPool& pool, int jobs) {
  for (int i = 0; i < jobs; ++i) {
    Numbers numbers(20);
    pool.run(numbers);
  }
}

// Only one thread may end each phase, and the others have slept by then.
class Waited final : public ThreadPool::Job {
 public:
  explicit Waited(int who) : who_(who) {}
  bool work(int thread) override {
    if (thread != who_) return false;
    if (done_ % 2) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    ++done_;
    return true;
  }
  bool next() override { return done_ < 6; }

 private:
  const int who_;
  int done_ = 0;
};

void waits(ThreadPool& pool) {
  for (int who = 0; who < pool.size(); ++who) {
    Waited job(who);
    pool.run(job);
  }
}

void two_callers(ThreadPool& pool) {
  std::thread other([&] { phases(pool, 30); });
  phases(pool, 30);
  other.join();
}

// The first job of a pool, the last, and one after its threads have gone to sleep.
void lives() {
  for (int i = 0; i < 20; ++i) {
    ThreadPool pool(3, {});
    if (i % 2) phases(pool, 1);
    if (i % 3 == 0) {
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
      phases(pool, 1);
    }
  }
}

void steps(int threads, int nodes) {
  Layer alone(make_pool(nodes, nodes)), together(make_pool(threads, nodes));
  for (int i = 0; i < 12; ++i) {
    const int rows = 1 + i * 5 % kRows;
    check(alone.run(rows) == together.run(rows), "a step of several threads");
  }
}

void cancelled_steps(int threads) {
  Layer layer(make_pool(threads, 2)), undisturbed(make_pool(2, 2));
  std::atomic<bool> done{false};
  std::thread other([&] {
    while (!done.load()) {
      layer.cancel();
      std::this_thread::sleep_for(std::chrono::microseconds(300));
    }
  });
  int cancelled = 0;
  for (int i = 0; i < 60 || (cancelled == 0 && i < 100000); ++i) cancelled += layer.step(kRows) == Outcome::cancelled;
  done.store(true);
  other.join();
  layer.step(1);  // takes the last wish to cancel, if there is one
  check(cancelled > 0, "no step was cancelled");
  check(layer.run(kRows) == undisturbed.run(kRows), "a step after cancelled ones");
}

void two_steps_at_once() {
  Layer layer(make_pool(3, 1)), alone(make_pool(1, 1));
  auto run = [&] {
    for (int i = 0; i < 10; ++i) layer.step(3);
  };
  std::thread other(run);
  run();
  other.join();
  check(layer.run(kRows) == alone.run(kRows), "a step after two callers");
}

}  // namespace

int main() {
  auto pool = make_pool(4, 1);
  phases(*pool, 50);
  waits(*pool);
  two_callers(*pool);
  lives();
  for (int nodes = 1; nodes <= 3; ++nodes) steps(4, nodes);
  cancelled_steps(4);
  two_steps_at_once();
  std::puts("threads agree");
}
