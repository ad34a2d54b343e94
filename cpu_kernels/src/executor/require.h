// Requirements of several fields, with the texts by which they are refused. place: as "qkv: ".
#pragma once

#include <climits>
#include <string>

#include "executor/field_check.h"

namespace hybrid {

inline std::string text(int64_t number) { return std::to_string(number); }

inline void require_stride(const std::string& place, const char* name, int64_t stride, int64_t needed) {
  require(stride >= needed, place + name + " is " + text(stride) + "; what it steps over has " + text(needed));
}

inline void require_multiple(const std::string& place, const char* name, int64_t value, int64_t unit) {
  require(value % unit == 0, place + name + " is " + text(value) + "; it must be a multiple of " + text(unit));
}

// Kernels count what threads share in an int.
inline void require_countable(int64_t tasks, const std::string& place) {
  require(tasks <= INT_MAX, place + text(tasks) + " tasks in a step are more than can be counted");
}

}  // namespace hybrid
