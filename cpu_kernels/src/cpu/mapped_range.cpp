#include "mapped_range.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <mutex>
#include <stdexcept>

namespace hybrid {
namespace {

// Slots that a signal handler can look through at any time: `end` is 0 in one that is free.
struct Slot {
  std::atomic<uintptr_t> begin{0};
  std::atomic<uintptr_t> end{0};
  std::atomic<bool> damaged{false};
};

std::array<Slot, 8192> slots;
std::mutex slots_mutex;  // of adding and removing
struct sigaction before;
uintptr_t page_bytes;

Slot* slot_of(uintptr_t address) {
  for (Slot& slot : slots) {
    uintptr_t end = slot.end.load(std::memory_order_acquire);
    if (address < end && address >= slot.begin.load(std::memory_order_relaxed)) return &slot;
  }
  return nullptr;
}

// Only system calls that are allowed in a handler.
void on_bus_error(int number, siginfo_t* info, void* context) {
  int saved = errno;
  uintptr_t address = reinterpret_cast<uintptr_t>(info->si_addr);
  Slot* slot = info->si_code == BUS_ADRERR ? slot_of(address) : nullptr;
  if (slot) {
    void* page = reinterpret_cast<void*>(address / page_bytes * page_bytes);
    void* zeros = mmap(page, page_bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    slot->damaged.store(true, std::memory_order_release);
    errno = saved;
    if (zeros != MAP_FAILED) return;
  }
  if ((before.sa_flags & SA_SIGINFO) && before.sa_sigaction) return before.sa_sigaction(number, info, context);
  if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) return before.sa_handler(number);
  signal(SIGBUS, SIG_DFL);
  if (info->si_code <= 0)
    raise(number);  // sent by a process; an access comes again, and ends this one as it would have
}

void install() {
  page_bytes = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  struct sigaction action = {};
  action.sa_sigaction = on_bus_error;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigemptyset(&action.sa_mask);
  if (sigaction(SIGBUS, &action, &before)) throw std::runtime_error("no handler for SIGBUS can be installed");
}

}  // namespace

MappedRange::MappedRange(void* address, size_t bytes) {
  static std::once_flag installed;
  std::call_once(installed, install);
  std::lock_guard<std::mutex> lock(slots_mutex);
  for (slot_ = 0; slot_ < slots.size() && slots[slot_].end.load(); ++slot_) continue;
  if (slot_ == slots.size()) throw std::runtime_error("too many files are mapped");
  Slot& slot = slots[slot_];
  slot.damaged.store(false);
  slot.begin.store(reinterpret_cast<uintptr_t>(address));
  slot.end.store(reinterpret_cast<uintptr_t>(address) + bytes, std::memory_order_release);
}

MappedRange::~MappedRange() { slots[slot_].end.store(0); }

bool MappedRange::damaged() const { return slots[slot_].damaged.load(std::memory_order_acquire); }

}  // namespace hybrid
