// Two threads of the pool, of which one falls asleep just while the other looks for sleepers: both moments are made
// long, so that they meet in every job. Whoever sleeps must be woken by the phase after. Ends with 1 if a job does not
// end; tests/test_thread_pool.py builds and runs it.
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

namespace slow {

using std::chrono::milliseconds;

inline void wait(int time) { std::this_thread::sleep_for(milliseconds(time)); }

// What the pool calls in the place of `syscall`.
template <class... Rest>
long futex(long number, const void* address, int operation, Rest... rest) {
  if (operation == FUTEX_WAIT_PRIVATE) wait(4);
  return syscall(number, address, operation, rest...);
}

// What the pool has in the place of std::atomic: who looks at the number of sleepers, an int, may be late.
template <class T>
struct Atomic : std::atomic<T> {
  using std::atomic<T>::atomic;
  T load(std::memory_order order = std::memory_order_seq_cst) const {
    if (std::is_same<T, int>::value) wait(4);
    return std::atomic<T>::load(order);
  }
};

}  // namespace slow

namespace std {
template <class T>
using SlowAtomic = slow::Atomic<T>;
}
#define syscall slow::futex
#define atomic SlowAtomic
#include "cpu/thread_pool.cpp"
#undef atomic
#undef syscall

namespace {

std::atomic<int> jobs{0};

class Phases final : public hybrid::ThreadPool::Job {
 public:
  bool work(int thread) override {
    slow::wait(thread == 0 ? 1 : 4);
    return true;
  }
  bool next() override { return phase_++ < 12; }

 private:
  int phase_ = 0;
};

// A job takes a tenth of a second.
void watch() {
  for (int before = -1; before != jobs;) {
    before = jobs;
    for (int i = 0; i < 600 && jobs == before; ++i) slow::wait(100);
  }
  std::fputs("a job of the pool does not end: a thread that sleeps was not woken\n", stderr);
  std::_Exit(1);
}

}  // namespace

int main() {
  std::thread(watch).detach();
  hybrid::ThreadPool pool(2, {});
  for (; jobs < 20; ++jobs) {
    Phases job;
    pool.run(job);
  }
  std::_Exit(0);  // with the watcher
}
