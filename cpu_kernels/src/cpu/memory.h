#pragma once

#include <cstddef>

namespace hybrid {

// Zeroed address space, reserved at once and committed page by page as it is touched.
class Arena {
 public:
  // `huge` asks for huge pages, which commit 2 MiB at a time. Throws std::bad_alloc.
  Arena(size_t bytes, bool huge);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  char* data() const { return data_; }
  size_t size() const { return size_; }
  // Gives the pages of a range back to the system; it reads as zero afterwards. Throws std::out_of_range.
  void clear(size_t offset, size_t bytes);

 private:
  char* data_;
  size_t size_;
};

}  // namespace hybrid
