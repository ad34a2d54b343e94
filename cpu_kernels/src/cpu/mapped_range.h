// A range of mapped pages that may vanish: reading past the end of a file that was cut raises SIGBUS. A handler puts
// zeros in place of the page, so that whatever reads it comes to an end, and marks the range, so that its results are
// not used.
#pragma once

#include <cstddef>

namespace hybrid {

class MappedRange {
 public:
  // Throws std::runtime_error when there are too many.
  MappedRange(void* address, size_t bytes);
  ~MappedRange();
  MappedRange(const MappedRange&) = delete;
  MappedRange& operator=(const MappedRange&) = delete;

  bool damaged() const;

 private:
  size_t slot_;
};

}  // namespace hybrid
