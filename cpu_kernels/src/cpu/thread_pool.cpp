#include "cpu/thread_pool.h"

#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <chrono>
#include <stdexcept>
#include <string>
#include <system_error>

namespace hybrid {
namespace {

constexpr auto kSpinAfterJob = std::chrono::microseconds(500);
constexpr int kSpinsOnOwnCore = 20000;  // about the time of a short op: longer means somebody else has our core
constexpr int kSpinsOnSharedCore = 50;  // more threads than cores: the one waited for may need this very core

void pin(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}

// The calling thread belongs to the user: it is pinned for the length of a job only.
class PinnedCaller {
 public:
  explicit PinnedCaller(const std::vector<int>& cpus) : active_(!cpus.empty()) {
    if (!active_) return;
    active_ = pthread_getaffinity_np(pthread_self(), sizeof before_, &before_) == 0;
    if (active_) pin(cpus[0]);
  }
  ~PinnedCaller() {
    if (active_) pthread_setaffinity_np(pthread_self(), sizeof before_, &before_);
  }

 private:
  bool active_;
  cpu_set_t before_;
};

int checked_nodes(int nodes, int threads) {
  if (threads < 1) throw std::invalid_argument(std::to_string(threads) + " threads; there must be at least one");
  if (nodes >= 1 && nodes <= threads) return nodes;
  throw std::invalid_argument(std::to_string(nodes) + " nodes for " + std::to_string(threads) +
                              " threads; from 1 to as many as there are threads are allowed");
}

std::vector<int> checked_cpus(std::vector<int> cpus, int threads) {
  if (cpus.empty() || int(cpus.size()) == threads) return cpus;
  throw std::invalid_argument(std::to_string(cpus.size()) + " processors for " + std::to_string(threads) +
                              " threads; give one for each, or none");
}

}  // namespace

ThreadPool::ThreadPool(int threads, std::vector<int> cpus, int nodes)
    : threads_(threads),
      cpus_(checked_cpus(std::move(cpus), threads)),
      nodes_(checked_nodes(nodes, threads)),
      spins_(cpus_.empty() ? kSpinsOnSharedCore : kSpinsOnOwnCore),
      process_(getpid()) {
  try {
    for (int i = 1; i < threads_; ++i) workers_.emplace_back([this, i] { work(i); });
  } catch (const std::system_error&) {
    end();
    throw std::runtime_error("the system refused thread " + std::to_string(workers_.size() + 2) + " of " +
                             std::to_string(threads_));
  }
}

ThreadPool::~ThreadPool() { end(); }

void ThreadPool::end() {
  if (getpid() != process_) {  // after a fork the workers live in the parent only, and nothing of them may be touched:
    // a condition waits in its destructor for those who wait, and a handle may by now be that of another thread.
    static_cast<void>(wake_.release());
    static_cast<void>(new std::vector<std::thread>(std::move(workers_)));
    return;
  }
  {
    std::lock_guard<std::mutex> lock(sleep_);
    stop_ = true;
    epoch_.fetch_add(1);
  }
  wake_->notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::require_process() const {
  if (getpid() != process_)
    throw std::runtime_error("these threads were started before a fork, which they do not survive");
}

void ThreadPool::run(Job job, void* context) {
  require_process();
  if (is_caller()) throw std::invalid_argument("a callback asked for the threads of the step that called it");
  std::lock_guard<std::mutex> lock(one_caller_);
  caller_.store(std::this_thread::get_id(), std::memory_order_relaxed);
  PinnedCaller pinned(cpus_);
  job_ = job;
  context_ = context;
  {
    std::lock_guard<std::mutex> guard(sleep_);
    epoch_.fetch_add(1, std::memory_order_release);
  }
  wake_->notify_all();
  job(context, 0);
  barrier();
  caller_.store({}, std::memory_order_relaxed);
}

void ThreadPool::barrier() {
  if (threads_ == 1) return;
  const unsigned generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
    if (spins < spins_)
      _mm_pause();
    else
      sched_yield();
  }
}

void ThreadPool::wait_for_job(unsigned seen) {
  const auto until = std::chrono::steady_clock::now() + kSpinAfterJob;
  while (epoch_.load(std::memory_order_acquire) == seen) {
    for (int i = 0; i < 64; ++i) _mm_pause();
    if (std::chrono::steady_clock::now() < until) continue;
    std::unique_lock<std::mutex> lock(sleep_);
    wake_->wait(lock, [&] { return epoch_.load(std::memory_order_acquire) != seen; });
  }
}

void ThreadPool::work(int thread) {
  if (!cpus_.empty()) pin(cpus_[size_t(thread)]);
  for (unsigned seen = 0;; ++seen) {
    wait_for_job(seen);
    if (stop_) return;
    job_(context_, thread);
    barrier();
  }
}

}  // namespace hybrid
