#pragma once

#include <cstddef>

namespace hybrid {

// Zeroed address space, reserved at once and committed page by page as it is touched. Pages without access rights lie
// on both sides: the system never merges an arena with its neighbour, so what it reports of one is exact.
class Arena {
 public:
  // `huge` asks for huge pages, which commit 2 MiB at a time; huge_bytes() tells what came of it. Pages are placed on
  // memory node `node`, or when that is full on another; -1 leaves it to who touches them first. Throws std::bad_alloc.
  Arena(size_t bytes, bool huge, int node = -1);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  char* data() const { return data_; }
  size_t size() const { return size_; }
  // Where the pages without access rights begin: `size` rounded up to whole pages behind the start.
  char* end() const { return end_; }
  // Whether the system took the wish for a node; false where none was asked for.
  bool placed() const { return placed_; }
  // Bytes that lie in huge pages now. Reads a file of /proc and takes milliseconds; 0 where the system keeps none.
  size_t huge_bytes() const;
  // Asks for huge pages where [offset, offset + bytes) holds whole ones. False when the system refuses: it has none, or
  // this process has as many separate ranges as it may. Throws std::out_of_range.
  bool use_huge(size_t offset, size_t bytes);
  // Gives the pages of a range back to the system; it reads as zero afterwards. Throws std::out_of_range.
  void clear(size_t offset, size_t bytes);

 private:
  void check(size_t offset, size_t bytes) const;

  char* data_;
  char* end_;
  size_t size_;
  char* reserved_;
  size_t reserved_size_;
  bool placed_;
};

}  // namespace hybrid
