#include "cpu/memory.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <new>
#include <stdexcept>
#include <string>

namespace hybrid {
namespace {

constexpr size_t kHugePage = 2 << 20;
constexpr int kMaxNodes = 1024;  // what the system itself can count

size_t page_size() { return size_t(sysconf(_SC_PAGESIZE)); }
size_t up(size_t x, size_t unit) { return (x + unit - 1) / unit * unit; }

// Preferred, not bound: a full node then costs speed, not the process. A system call, so that no library is needed.
bool prefer_node(void* data, size_t bytes, int node) {
  if (node < 0 || node >= kMaxNodes) return false;
  constexpr int kPreferred = 1, kBits = 8 * sizeof(unsigned long);
  unsigned long mask[kMaxNodes / kBits] = {};
  mask[node / kBits] = 1ul << node % kBits;
  return syscall(SYS_mbind, data, bytes, kPreferred, mask, kMaxNodes + 1, 0) == 0;
}

}  // namespace

Arena::Arena(size_t bytes, bool huge, int node) : size_(bytes ? bytes : 1) {
  const size_t page = page_size(), used = up(size_, page);
  if (used < size_ || used > SIZE_MAX / 2) throw std::bad_alloc();
  reserved_size_ = used + kHugePage + page;
  void* p = mmap(nullptr, reserved_size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  reserved_ = static_cast<char*>(p);
  // On a boundary of huge pages, so that they cover it from its first byte; at least a page stays in front and behind.
  data_ = reinterpret_cast<char*>(up(uintptr_t(reserved_) + page, kHugePage));
  end_ = data_ + used;
  if (mprotect(data_, used, PROT_READ | PROT_WRITE) != 0) {
    munmap(reserved_, reserved_size_);
    throw std::bad_alloc();
  }
  madvise(data_, used, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  placed_ = prefer_node(data_, used, node);
}

Arena::~Arena() { munmap(reserved_, reserved_size_); }

void Arena::check(size_t offset, size_t bytes) const {
  if (offset > size_ || bytes > size_ - offset)
    throw std::out_of_range(std::to_string(bytes) + " bytes at " + std::to_string(offset) +
                            " are outside the arena of " + std::to_string(size_));
}

size_t Arena::huge_bytes() const {
  std::ifstream smaps("/proc/self/smaps");
  size_t total = 0, kib;
  uintptr_t first, last;
  bool ours = false;
  for (std::string line; std::getline(smaps, line);) {
    if (sscanf(line.c_str(), "%" SCNxPTR "-%" SCNxPTR " ", &first, &last) == 2)
      ours = first >= uintptr_t(data_) && first < uintptr_t(data_) + size_;
    else if (ours && sscanf(line.c_str(), "AnonHugePages: %zu", &kib) == 1)
      total += kib * 1024;
  }
  return total;
}

bool Arena::use_huge(size_t offset, size_t bytes) {
  check(offset, bytes);
  const size_t first = up(offset, kHugePage), last = (offset + bytes) / kHugePage * kHugePage;
  return first >= last || madvise(data_ + first, last - first, MADV_HUGEPAGE) == 0;
}

void Arena::clear(size_t offset, size_t bytes) {
  check(offset, bytes);
  const size_t page = page_size();
  const size_t first = up(offset, page), last = (offset + bytes) / page * page;
  if (first >= last) {
    memset(data_ + offset, 0, bytes);
    return;
  }
  memset(data_ + offset, 0, first - offset);
  memset(data_ + last, 0, offset + bytes - last);
  madvise(data_ + first, last - first, MADV_DONTNEED);
}

}  // namespace hybrid
