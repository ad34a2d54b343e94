#include "bindings/fields.h"

#include <algorithm>
#include <stdexcept>

namespace nb = nanobind;

namespace hybrid {
namespace {

std::string text_of(PyObject* value) { return nb::cast<std::string>(nb::repr(nb::handle(value))); }

// An integer as Python counts them: numpy's too, but no bool and nothing that would have to be rounded.
nb::object integer(PyObject* given) {
  if (PyBool_Check(given) || !PyIndex_Check(given)) return {};
  PyObject* const number = PyNumber_Index(given);
  if (!number) PyErr_Clear();  // an array of several
  return nb::steal(number);
}

}  // namespace

void FieldReader::finish() const {
  if (!missing_.empty()) throw nb::type_error((owner_ + " lacks " + missing_).c_str());
  for (auto [key, value] : given_) {
    const std::string name = nb::cast<std::string>(key);
    if (std::find(names_.begin(), names_.end(), name) != names_.end()) continue;
    std::string known;
    for (const std::string& one : names_) known += (known.empty() ? "" : ", ") + one;
    throw nb::type_error((owner_ + " has no " + name + "; it has " + known).c_str());
  }
}

bool FieldReader::read(PyObject* given, bool& value) const {
  value = given == Py_True;
  return PyBool_Check(given);
}

bool FieldReader::read(PyObject* given, int64_t& value) const {
  const nb::object number = integer(given);
  if (!number.is_valid()) return false;
  int overflow = 0;
  value = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
  if (overflow) out_of_range(given);
  return true;
}

bool FieldReader::read(PyObject* given, int& value) const {
  int64_t wide;
  if (!read(given, wide)) return false;
  if (wide < INT_MIN || wide > INT_MAX) out_of_range(given);
  value = int(wide);
  return true;
}

bool FieldReader::read(PyObject* given, float& value) const {
  if (PyBool_Check(given)) return false;
  value = float(PyFloat_AsDouble(given));
  const bool converted = !PyErr_Occurred();
  PyErr_Clear();
  return converted;
}

bool FieldReader::read(PyObject* given, uintptr_t& address) const {
  const nb::object number = integer(given);
  if (!number.is_valid()) return false;
  address = PyLong_AsSize_t(number.ptr());
  if (PyErr_Occurred()) {
    PyErr_Clear();
    out_of_range(given);
  }
  return true;
}

bool FieldReader::read(PyObject* given, NodeBuffers& buffers) const {
  if (!PyList_Check(given) && !PyTuple_Check(given)) return false;
  const nb::object all = nb::borrow(given);
  buffers.count = int(std::min<size_t>(nb::len(all), INT_MAX));
  for (int i = 0; i < std::min(buffers.count, kMaxNodes); ++i)
    if (!read(nb::object(all[i]).ptr(), buffers.of[i])) return false;
  return true;
}

void FieldReader::wrong_type(const char* name, const std::string& wanted, PyObject* given) const {
  const std::string type = nb::cast<std::string>(nb::type_name(nb::handle(given).type()));
  throw nb::type_error((owner_ + ": " + name + " must be " + wanted + ", not " + type + " " + text_of(given)).c_str());
}

void FieldReader::out_of_range(PyObject* given) const {
  throw std::invalid_argument(owner_ + ": " + names_.back() + " is " + text_of(given) + ", which is out of range");
}

}  // namespace hybrid
