// Checks the fields of an op by their rules.
#pragma once

#include <cmath>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "executor/ops.h"

namespace hybrid {

inline void require(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

// Whether the things are there that addresses point to. They are not yet where a plan asks for sizes.
enum class Addresses { present, absent };

// So that sums of a few numbers, and rounding up, stay in the type; bytes also where they are multiplied by an index.
constexpr int64_t kLargest = 1 << 28, kLargestBytes = int64_t(1) << 42;

// Throws std::invalid_argument that names the op, the field and the value.
class FieldCheck {
 public:
  // place: what stands before the name of a field, as "gemm: ".
  FieldCheck(std::string place, Addresses addresses) : place_(std::move(place)), addresses_(addresses) {}

  template <class T>
  void operator()(const char* name, T& value, const Rule& rule = kPlain) {
    if constexpr (std::is_pointer_v<T>)
      check_address(name, uintptr_t(value), alignof(std::remove_pointer_t<T>), rule);
    else if constexpr (std::is_floating_point_v<T>)
      require(std::isfinite(value), place_ + name + " is " + std::to_string(value));
    else if constexpr (std::is_same_v<T, NodeBuffers>)
      check_buffers(name, value, rule);
    else if constexpr (std::is_class_v<T>)
      check_struct(name, value, rule);
    else if constexpr (std::is_integral_v<T> && !std::is_same_v<T, bool>)
      check_number(name, value, rule, std::is_same_v<T, int> ? kLargest : kLargestBytes);
  }

 private:
  void check_address(const std::string& name, uintptr_t address, size_t alignment, const Rule& rule) {
    if (addresses_ == Addresses::absent && !address) return;
    require(address || rule.may_be_null, place_ + name + " is null");
    if (alignment < size_t(rule.multiple)) alignment = size_t(rule.multiple);
    require(address % alignment == 0, place_ + name + " is the address " + std::to_string(address) +
                                          "; it must be a multiple of " + std::to_string(alignment));
  }
  void check_number(const std::string& name, int64_t value, const Rule& rule, int64_t largest) {
    const std::string given = place_ + name + " is " + std::to_string(value);
    require(value >= rule.min, given + "; it must be at least " + std::to_string(rule.min));
    require(value <= largest, given + "; it must be at most " + std::to_string(largest));
    require(value % rule.multiple == 0, given + "; it must be a multiple of " + std::to_string(rule.multiple));
  }
  void check_buffers(const std::string& name, NodeBuffers& buffers, const Rule& rule) {
    require(buffers.count >= 1 && buffers.count <= kMaxNodes, place_ + name + " has " + std::to_string(buffers.count) +
                                                                  " addresses; from 1 to " + std::to_string(kMaxNodes) +
                                                                  " are allowed");
    for (int i = 0; i < buffers.count; ++i)
      (*this)((name + "[" + std::to_string(i) + "]").c_str(), buffers.of[i], rule);
  }
  template <class T>
  void check_struct(const std::string& name, T& fields, const Rule& rule) {
    if (rule.may_be_left_out && is_absent(fields)) return;
    FieldCheck inner(place_ + name + ".", addresses_);
    fields.fields(inner);
  }
  template <class T>
  static bool is_absent(const T&) {
    return false;
  }
  static bool is_absent(const ExpertSet& set) { return !set.experts && !set.blocks; }

  const std::string place_;
  const Addresses addresses_;
};

// owner: the op, or the struct that is part of ops.
template <class Fields>
void check_fields(const std::string& owner, Fields fields, Addresses addresses) {
  FieldCheck check(owner + ": ", addresses);
  fields.fields(check);
}

}  // namespace hybrid
