#include "cpu/thread_pool.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

namespace hybrid {
namespace {

// The parts of the state.
constexpr uint64_t kWorking = uint64_t(1) << 32, kWaiting = uint64_t(1) << 46, kMany = (1 << 14) - 1;
constexpr uint64_t kNothingLeft = uint64_t(1) << 60;  // to be begun in this phase
constexpr uint64_t kClosed = uint64_t(1) << 61;       // nobody enters this phase any more
constexpr uint64_t kIdle = uint64_t(1) << 62;         // no job runs

constexpr int kPausesBetweenLooks = 16;

unsigned phase_of(uint64_t state) { return unsigned(state); }
uint64_t working(uint64_t state) { return state / kWorking & kMany; }
uint64_t waiting(uint64_t state) { return state / kWaiting & kMany; }

// What threads sleep on: the half of the state that holds the phase. Processors here put it first.
const void* address_of(const std::atomic<uint64_t>& state) { return &state; }

cpu_set_t set_of(const std::vector<int>& cpus) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (int cpu : cpus)
    if (cpu >= 0 && cpu < CPU_SETSIZE) CPU_SET(size_t(cpu), &set);
  return set;
}

// The calling thread belongs to the user: it is placed for the length of a job only.
class PlacedCaller {
 public:
  explicit PlacedCaller(const std::vector<std::vector<int>>& cpus) {
    if (cpus.empty() || pthread_getaffinity_np(pthread_self(), sizeof before_, &before_) != 0) return;
    const cpu_set_t set = set_of(cpus[0]);
    changed_ = !CPU_EQUAL(&set, &before_) && pthread_setaffinity_np(pthread_self(), sizeof set, &set) == 0;
  }
  ~PlacedCaller() {
    if (changed_) pthread_setaffinity_np(pthread_self(), sizeof before_, &before_);
  }

 private:
  bool changed_ = false;
  cpu_set_t before_;
};

int checked_nodes(int nodes, int threads) {
  if (threads < 1 || uint64_t(threads) > kMany)
    throw std::invalid_argument(std::to_string(threads) + " threads; there must be at least one and at most " +
                                std::to_string(kMany));
  if (nodes >= 1 && nodes <= threads) return nodes;
  throw std::invalid_argument(std::to_string(nodes) + " nodes for " + std::to_string(threads) +
                              " threads; from 1 to as many as there are threads are allowed");
}

std::vector<std::vector<int>> checked_cpus(std::vector<std::vector<int>> cpus, int nodes) {
  if (cpus.empty() || int(cpus.size()) == nodes) return cpus;
  throw std::invalid_argument("processors of " + std::to_string(cpus.size()) + " nodes for " + std::to_string(nodes) +
                              "; give those of each, or none");
}

}  // namespace

ThreadPool::ThreadPool(int threads, std::vector<std::vector<int>> cpus, int nodes)
    : threads_(threads),
      nodes_(checked_nodes(nodes, threads)),
      cpus_(checked_cpus(std::move(cpus), nodes)),
      process_(getpid()),
      state_(kClosed | kIdle) {
  try {
    for (int i = 1; i < threads_; ++i) workers_.emplace_back([this, i] { live(i); });
  } catch (const std::system_error&) {
    end();
    throw std::runtime_error("the system refused thread " + std::to_string(workers_.size() + 2) + " of " +
                             std::to_string(threads_));
  }
}

ThreadPool::~ThreadPool() { end(); }

void ThreadPool::end() {
  if (getpid() != process_) {  // after a fork the workers live in the parent only, and nothing of them may be touched:
    // a handle may by now be that of another thread.
    static_cast<void>(new std::vector<std::thread>(std::move(workers_)));
    return;
  }
  stop_.store(true);
  publish(false);
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::require_process() const {
  if (getpid() != process_)
    throw std::runtime_error("these threads were started before a fork, which they do not survive");
}

void ThreadPool::run(Job& job) {
  require_process();
  if (is_caller()) throw std::invalid_argument("a callback asked for the threads of the step that called it");
  std::lock_guard<std::mutex> lock(one_caller_);
  caller_.store(std::this_thread::get_id(), std::memory_order_relaxed);
  PlacedCaller placed(cpus_);
  if (job.next()) {
    job_ = &job;
    state_.fetch_add(kWaiting);  // as if it had come from a phase before
    publish(true);
    follow(0, true, callers_patience_);
  }
  caller_.store({}, std::memory_order_relaxed);
}

void ThreadPool::live(int thread) {
  if (!cpus_.empty()) {
    const cpu_set_t set = set_of(cpus_[size_t(node_of(thread))]);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);
  }
  Patiences patience;
  follow(thread, false, patience);
}

// From phase to phase with the others, until the job ends for the caller, the pool for another thread. counted: among
// those who work in the phase, or wait for the next one.
void ThreadPool::follow(int thread, bool counted, Patiences& patience) {
  for (;;) {
    const uint64_t state = state_.load(std::memory_order_acquire);
    const unsigned phase = phase_of(state);
    Patience* waits = &patience.others;
    if (state & kIdle) {
      if (thread == 0 && counted) state_.fetch_sub(kWaiting);
      if (thread == 0 || stop_.load()) return;
      waits = &patience.job;
    } else if (counted || enter(phase)) {
      const bool nothing_left = job_->work(thread);
      leave(nothing_left);
      counted = true;
      if (!nothing_left) waits = &patience.beginner;
    }
    counted = wait(phase, counted, *waits);
  }
}

// Whether the thread is one of those who work in a phase; not if that is over or about to be.
bool ThreadPool::enter(unsigned phase) {
  uint64_t state = state_.load(std::memory_order_relaxed);
  do {
    if (state & kClosed || phase_of(state) != phase) return false;
  } while (!state_.compare_exchange_weak(state, state + kWorking, std::memory_order_acq_rel));
  return true;
}

// The last one goes on to the next phase. One who enters just before will be the last instead.
void ThreadPool::leave(bool nothing_left) {
  if (nothing_left && !(state_.load(std::memory_order_relaxed) & kNothingLeft)) state_.fetch_or(kNothingLeft);
  uint64_t state = state_.fetch_add(kWaiting - kWorking, std::memory_order_acq_rel) + kWaiting - kWorking;
  if (working(state) > 0 || !(state & kNothingLeft)) return;
  while (!state_.compare_exchange_weak(state, state | kClosed, std::memory_order_acq_rel))
    if (working(state) > 0 || state & kClosed) return;
  go_on();
}

void ThreadPool::go_on() { publish(job_->next()); }

// All who wait are counted as working in the new phase, if there is one.
void ThreadPool::publish(bool goes_on) {
  uint64_t state = state_.load(std::memory_order_relaxed), after;
  do {
    const uint64_t spinning = waiting(state);
    after = uint64_t(phase_of(state) + 1) | (goes_on ? spinning * kWorking : spinning * kWaiting | kClosed | kIdle);
  } while (!state_.compare_exchange_weak(state, after));
  wake();
}

// Until the phase is over. Returns whether the thread is still counted.
bool ThreadPool::wait(unsigned phase, bool counted, Patience& patience) {
  const auto over = [&] { return phase_of(state_.load(std::memory_order_acquire)) != phase; };
  const auto look = [&] {
    for (int i = 0; i < kPausesBetweenLooks && !over(); ++i) _mm_pause();
    return over();
  };
  if (look()) return counted;
  const auto begin = Patience::Clock::now();
  while (Patience::Clock::now() - begin < patience.limit())
    if (look()) return patience.learn(Patience::Clock::now() - begin), counted;
  if (counted && !stop_counting(phase)) return true;
  sleep(phase);
  patience.learn(Patience::Clock::now() - begin);
  return false;
}

// false: the phase is over, so the thread may be counted in the next one already.
bool ThreadPool::stop_counting(unsigned phase) {
  uint64_t state = state_.load(std::memory_order_relaxed);
  do {
    if (phase_of(state) != phase) return false;
  } while (!state_.compare_exchange_weak(state, state - kWaiting, std::memory_order_acq_rel));
  return true;
}

// Who ends a phase changes its number and then looks for sleepers, who are counted before the system compares the
// number: one of the two sees the other. A sleeper is counted until it is awake. Nobody else may count it out: who has
// ended a phase may be so late that it meets a sleeper of the next one, which it does not wake.
void ThreadPool::sleep(unsigned phase) {
  sleepers_.fetch_add(1);
  while (phase_of(state_.load(std::memory_order_acquire)) == phase)
    syscall(SYS_futex, address_of(state_), FUTEX_WAIT_PRIVATE, phase, nullptr, nullptr, 0);
  sleepers_.fetch_sub(1);
}

void ThreadPool::wake() {
  if (sleepers_.load() > 0) syscall(SYS_futex, address_of(state_), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace hybrid
