// Every struct of arguments has a table of its fields: `fields` calls field(name, member, rule) for each. From this one
// table come the keyword arguments in Python and their documentation (bindings/fields.h), and the checks of their
// values (executor/checks.h).
#pragma once

#include "executor/step.h"

namespace hybrid {

// What a value must be beyond its type. Of addresses and numbers alike it must be a multiple of `multiple`; addresses
// are also aligned as what they point to.
struct Rule {
  bool may_be_null;  // an address; else it must not be 0
  bool may_be_left_out;
  int min;
  int multiple;
};
constexpr Rule kPlain{false, false, 0, 1};
constexpr Rule kNullable{true, false, 0, 1};
constexpr Rule kOptional{true, true, 0, 1};  // if it is left out it is null, absent, or the member's default
constexpr Rule kPositive{false, false, 1, 1};
constexpr Rule kLines{false, false, 0, kLine};     // instruction sets read whole lines there
constexpr Rule kPadded{false, false, 0, kInputs};  // inputs of a matrix

}  // namespace hybrid
