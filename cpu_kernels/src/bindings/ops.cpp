#include "bindings/ops.h"

#include <nanobind/stl/string.h>

#include <list>

#include "bindings/fields.h"
#include "executor/checks.h"
#include "instances/tables.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace hybrid {
namespace {

// Texts that nanobind refers to for as long as the module lives.
const char* kept(std::string text) {
  static std::list<std::string> texts;
  return texts.emplace_back(std::move(text)).c_str();
}

template <class Fields>
std::string describe(FieldText text) {
  Fields fields{};
  fields.fields(text);
  return text.text;
}

// The struct that keyword arguments stand for.
template <class Fields>
Fields read(FieldReader& reader) {
  Fields fields{};
  fields.fields(reader);
  reader.finish();
  return fields;
}

// KvLayout, Routing or ExpertSet. Addresses are checked with the op that they come to.
template <class Fields>
void bind_struct(nb::module_& m, const char* name) {
  nb::class_<Fields>(m, name).def(
      "__init__",
      [name](Fields* self, nb::kwargs given) {
        FieldReader reader(name, given);
        const Fields fields = read<Fields>(reader);
        check_fields(name, fields, Addresses::absent);
        new (self) Fields(fields);
      },
      kept("All by keyword:" + describe<Fields>({})));
}

template <class Args>
void bind_op(nb::class_<Executor>& executor, const char* name) {
  FieldText text;
  Part part{};
  int node = kAllNodes;
  text("part", part);
  std::string fields = describe<Args>(text);
  FieldText last;
  last("node", node, kOptional);
  executor.def(
      name,
      [name](Executor& e, nb::kwargs given) {
        FieldReader reader(name, given);
        Part part{};
        int node = kAllNodes;
        reader("part", part);
        reader("node", node, kOptional);
        e.add(part, read<Args>(reader), node);
      },
      kept("Adds this op. All by keyword:" + fields + last.text));
}

// Any op from keyword arguments, without a part; a node makes no difference.
OpArgs read_op(const std::string& kind, const nb::kwargs& given) {
  FieldReader reader(kind, given);
  int node = kAllNodes;
  reader("node", node, kOptional);
#define HYBRID_READ_OP(op, Args) \
  if (kind == #op) return read<Args>(reader);
  HYBRID_OPS(HYBRID_READ_OP)
#undef HYBRID_READ_OP
  std::string known;
#define HYBRID_OP_NAME(op, Args) known += known.empty() ? #op : ", " #op;
  HYBRID_OPS(HYBRID_OP_NAME)
#undef HYBRID_OP_NAME
  throw std::invalid_argument("op '" + kind + "' is unknown; known: " + known);
}

int64_t scratch_of(const std::string& kind, const std::string& isa, int rows, nb::kwargs given) {
  require(rows >= 1, "rows is " + std::to_string(rows) + "; it must be at least 1");
  const OpArgs args = read_op(kind, given);
  check_op(args, Addresses::absent);
  return op_scratch_bytes(args, sizes_of(isa), rows);
}

// On an exception the step ends and `run_step` finds it on this very thread.
bool call_python(void* callable) {
  nb::gil_scoped_acquire gil;
  PyObject* result = PyObject_CallNoArgs(static_cast<PyObject*>(callable));
  Py_XDECREF(result);
  return result != nullptr;
}

}  // namespace

void bind_ops(nb::module_& m, nb::class_<Executor>& executor) {
  bind_struct<KvLayout>(m, "KvLayout");
  bind_struct<Routing>(m, "Routing");
  bind_struct<ExpertSet>(m, "ExpertSet");
#define HYBRID_BIND_OP(op, Args) bind_op<Args>(executor, #op);
  HYBRID_OPS(HYBRID_BIND_OP)
#undef HYBRID_BIND_OP
  executor.def(
      "host", [](Executor& e, Part part, nb::callable call) { e.add(part, HostArgs{call_python, call.ptr()}); },
      nb::kw_only(), "part"_a, "call"_a, nb::keep_alive<1, 3>(),
      "Calls `call()` on the thread that runs the step; what it raises ends the step and is raised by it.");
  m.def(
      "scratch_bytes", &scratch_of, "kind"_a, "isa"_a, "rows"_a, "fields"_a,
      "Bytes of scratch that each thread needs for the op `kind` in steps of at most `rows` rows, with an instruction\n"
      "set that need not be one of this machine. fields: as `Executor.<kind>` takes them but `part`; addresses may\n"
      "all be 0.");
}

}  // namespace hybrid
