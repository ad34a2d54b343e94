// Tables of fields as keyword arguments: they are read from what Python gives, and described to it.
#pragma once

#include <nanobind/nanobind.h>

#include <climits>
#include <string>
#include <type_traits>
#include <vector>

#include "executor/executor.h"

namespace hybrid {

// What Python is told the type of a field is.
template <class T>
std::string type_name() {
  using Pointee = std::remove_cv_t<std::remove_pointer_t<T>>;
  if constexpr (std::is_pointer_v<T>)
    return "address of " + (std::is_same_v<Pointee, bf16> ? "bfloat16" : type_name<Pointee>());
  else if constexpr (std::is_same_v<T, NodeBuffers>)
    return "list of addresses of float32";
  else if constexpr (std::is_same_v<T, Format>)
    return "Format";
  else if constexpr (std::is_same_v<T, Activation>)
    return "Activation";
  else if constexpr (std::is_same_v<T, Scoring>)
    return "Scoring";
  else if constexpr (std::is_same_v<T, Part>)
    return "Part";
  else if constexpr (std::is_same_v<T, KvLayout>)
    return "KvLayout";
  else if constexpr (std::is_same_v<T, StateLayout>)
    return "StateLayout";
  else if constexpr (std::is_same_v<T, Routing>)
    return "Routing";
  else if constexpr (std::is_same_v<T, ExpertSet>)
    return "ExpertSet";
  else if constexpr (std::is_same_v<T, bool>)
    return "bool";
  else if constexpr (std::is_same_v<T, float>)
    return "float";
  else if constexpr (std::is_same_v<T, char>)
    return "bytes";
  else {
    static_assert(std::is_integral_v<T>);
    return "int";
  }
}

// Fills fields from keyword arguments. Throws TypeError for what is missing, unknown or of another type, ValueError for
// numbers that no field of its type can hold; both name the owner, the argument and the value.
class FieldReader {
 public:
  FieldReader(std::string owner, const nanobind::kwargs& given) : owner_(std::move(owner)), given_(given) {}

  template <class T>
  void operator()(const char* name, T& value, const Rule& rule = kPlain) {
    names_.emplace_back(name);
    PyObject* given = PyDict_GetItemString(given_.ptr(), name);
    if (!given && !rule.may_be_left_out) missing_ += (missing_.empty() ? "" : ", ") + std::string(name);
    if (!given || (given == Py_None && std::is_class_v<T> && rule.may_be_left_out)) return;
    if (!read(given, value)) wrong_type(name, type_name<T>(), given);
  }

  // To be called behind the last field.
  void finish() const;

 private:
  bool read(PyObject* given, bool& value) const;
  bool read(PyObject* given, int& value) const;
  bool read(PyObject* given, int64_t& value) const;
  bool read(PyObject* given, float& value) const;
  bool read(PyObject* given, uintptr_t& address) const;
  bool read(PyObject* given, NodeBuffers& buffers) const;
  template <class T>
  bool read(PyObject* given, T*& value) const {
    uintptr_t address;
    if (!read(given, address)) return false;
    value = reinterpret_cast<T*>(address);
    return true;
  }
  template <class T>
  bool read(PyObject* given, T& value) const {
    return nanobind::try_cast<T>(nanobind::handle(given), value, false);
  }
  [[noreturn]] void wrong_type(const char* name, const std::string& wanted, PyObject* given) const;
  [[noreturn]] void out_of_range(PyObject* given) const;

  const std::string owner_;
  const nanobind::kwargs& given_;
  std::vector<std::string> names_;
  std::string missing_;
};

// Lists the fields for documentation.
class FieldText {
 public:
  template <class T>
  void operator()(const char* name, T&, const Rule& rule = kPlain) {
    text += std::string("\n    ") + name + ": " + type_name<T>();
    if (rule.may_be_null) text += ", or 0";
    if (rule.may_be_left_out) text += "; may be left out";
    if (rule.multiple > 1) text += "; a multiple of " + std::to_string(rule.multiple);
  }
  std::string text;
};

}  // namespace hybrid
