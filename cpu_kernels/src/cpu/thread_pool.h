#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/patience.h"

namespace hybrid {

// A fixed set of threads that go through the phases of a job together. The caller of `run` is thread 0.
//
// Threads may lose their core to other programs for milliseconds, so a phase waits for nobody who has not begun it. Who
// waits for the next one spins, then sleeps; who sleeps is not counted, and joins the phase that it finds when it
// wakes. So whatever a phase has to do must be there for any of its threads to take.
class ThreadPool {
 public:
  class Job {
   public:
    // One thread's part in the running phase; whether nothing of the phase is left that another would have to begin.
    // The phase ends when one has said so and all who began it have returned.
    virtual bool work(int thread) = 0;
    // Alone, before the first phase and between two: goes to the next one, false if there is none.
    virtual bool next() = 0;

   protected:
    ~Job() = default;
  };

  // The threads are cut into `nodes` runs, as equal as they can be: those of a memory node, which hold one part of the
  // weights. cpus: for each node, the processors that its threads may run on, among which the system places them; none
  // leaves all to it. A refusal by the system is no error. Throws std::invalid_argument when a node would have no
  // thread, or when cpus are of another number of nodes, std::runtime_error when the system refuses a thread.
  ThreadPool(int threads, std::vector<std::vector<int>> cpus, int nodes = 1);
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
  // Returns when the last phase has ended. What a thread wrote in a phase is seen by all in the next. One caller at a
  // time; others wait. Needs the process, too. What a job throws on the thread of the caller is thrown here: after a
  // fork, where no other thread is left to wait for; elsewhere it must not throw.
  void run(Job& job);
  // A job of one phase: calls function(part) for each part from 0 to size() - 1, on whichever thread comes first.
  template <class Function>
  void run_parts(Function& function) {
    Parts<Function> parts(function, threads_);
    run(parts);
  }

 private:
  template <class Function>
  class Parts final : public Job {
   public:
    Parts(Function& function, int count) : function_(function), count_(count) {}
    bool work(int) override {
      for (int part; (part = taken_.fetch_add(1)) < count_;) function_(part);
      return true;
    }
    bool next() override { return !std::exchange(begun_, true); }

   private:
    Function& function_;
    const int count_;
    std::atomic<int> taken_{0};
    bool begun_ = false;
  };

  // What a thread waits for: those who still work in a phase, one that has something to begin there, the next job. Each
  // takes times of its own.
  struct Patiences {
    Patience others, beginner, job;
  };

  void live(int thread);
  void follow(int thread, bool counted, Patiences& patience);
  bool enter(unsigned phase);
  void leave(bool nothing_left);
  void go_on();
  void publish(bool goes_on);
  bool wait(unsigned phase, bool counted, Patience& patience);
  bool stop_counting(unsigned phase);
  void sleep(unsigned phase);
  void wake();
  void end();

  const int threads_, nodes_;
  const std::vector<std::vector<int>> cpus_;
  const int process_;
  std::mutex one_caller_;
  std::atomic<std::thread::id> caller_{};  // of `run`
  Job* job_ = nullptr;
  Patiences callers_patience_;
  std::atomic<bool> stop_{false};

  // The number of the phase, which threads sleep on; how many work in it; how many have left it and spin; flags.
  alignas(64) std::atomic<uint64_t> state_;
  alignas(64) std::atomic<int> sleepers_{0};
  std::vector<std::thread> workers_;
};

}  // namespace hybrid
