#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace hybrid {

// A fixed set of threads that run one function together. They spin between the barriers of a step, and for a moment
// after it (the next token is on its way), then sleep. The caller of `run` is thread 0.
class ThreadPool {
 public:
  // Thread i is pinned to cpus[i]; an empty list pins nothing and means that threads may have to share a core. Refused
  // pinning is no error. The threads are cut into `nodes` runs, as equal as they can be: those of a memory node, which
  // hold one part of the weights. Throws std::invalid_argument when a node would have no thread, or when cpus has
  // another length than threads, std::runtime_error when the system refuses a thread.
  ThreadPool(int threads, std::vector<int> cpus, int nodes = 1);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return threads_; }
  int nodes() const { return nodes_; }
  // The threads of a node are [first_thread(node), first_thread(node + 1)).
  int first_thread(int node) const { return int(int64_t(threads_) * node / nodes_); }
  int node_of(int thread) const { return int((int64_t(nodes_) * (thread + 1) - 1) / threads_); }
  // Whether the calling thread is within `run`: it could only wait for itself.
  bool is_caller() const { return caller_.load(std::memory_order_relaxed) == std::this_thread::get_id(); }
  // Throws std::runtime_error in a process that was forked: its parent alone has the threads.
  void require_process() const;
  // Calls function(thread) on every thread and returns when all have; one caller at a time. Needs the process, too.
  template <class Function>
  void run(Function& function) {
    run([](void* f, int thread) { (*static_cast<Function*>(f))(thread); }, &function);
  }
  // All threads of the running function meet; what each wrote before is seen by all after.
  void barrier();

 private:
  using Job = void (*)(void*, int);
  void run(Job job, void* context);
  void work(int thread);
  void wait_for_job(unsigned seen);
  void end();

  const int threads_;
  const std::vector<int> cpus_;
  const int nodes_;
  const int spins_;  // at a barrier, before the core is offered to others
  const int process_;
  std::mutex one_caller_;
  std::atomic<std::thread::id> caller_{};  // of `run`
  Job job_ = nullptr;
  void* context_ = nullptr;
  bool stop_ = false;

  alignas(64) std::atomic<unsigned> epoch_{0};  // counts jobs
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> generation_{0};  // counts barriers
  std::mutex sleep_;
  std::unique_ptr<std::condition_variable> wake_ = std::make_unique<std::condition_variable>();
  std::vector<std::thread> workers_;
};

}  // namespace hybrid
