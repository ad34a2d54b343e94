#include "cpu/memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <stdexcept>

namespace hybrid {

Arena::Arena(size_t bytes, bool huge) : size_(bytes ? bytes : 1) {
  void* p = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<char*>(p);
  madvise(p, size_, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
}

Arena::~Arena() { munmap(data_, size_); }

void Arena::clear(size_t offset, size_t bytes) {
  if (offset > size_ || bytes > size_ - offset) throw std::out_of_range("range outside the arena");
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  const size_t first = (offset + page - 1) / page * page, last = (offset + bytes) / page * page;
  if (first >= last) {
    memset(data_ + offset, 0, bytes);
    return;
  }
  memset(data_ + offset, 0, first - offset);
  memset(data_ + last, 0, offset + bytes - last);
  madvise(data_ + first, last - first, MADV_DONTNEED);
}

}  // namespace hybrid
