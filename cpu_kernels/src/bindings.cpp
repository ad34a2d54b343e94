// Python bindings: shapes, lifetimes and exceptions; no arithmetic.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <optional>
#include <utility>

#include "cpu/features.h"
#include "executor/executor.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace hybrid {
namespace {

using Address = uintptr_t;
using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Logits = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

bool python_signal() {
  nb::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

// On an exception the step ends and `run_step` finds it on this very thread.
bool call_python(void* callable) {
  nb::gil_scoped_acquire gil;
  PyObject* result = PyObject_CallNoArgs(static_cast<PyObject*>(callable));
  Py_XDECREF(result);
  return result != nullptr;
}

Times run_step(Executor& executor, Ints tokens, Ints slots, Ints positions, Ints logit_rows, Logits logits) {
  const size_t rows = tokens.shape(0);
  if (slots.shape(0) != rows || positions.shape(0) != rows)
    throw std::invalid_argument("token_ids, slots and positions must have one length");
  if (logits.shape(0) != logit_rows.shape(0) || (logits.shape(0) > 0 && int(logits.shape(1)) != executor.vocab()))
    throw std::invalid_argument("logits must have shape [len(logit_rows), vocab]");
  Step step{};
  step.rows = int(rows);
  step.tokens = tokens.data();
  step.slots = slots.data();
  step.positions = positions.data();
  step.logit_rows = int(logit_rows.shape(0));
  step.logit_index = logit_rows.data();
  step.logits = logits.data();
  Times times;
  Outcome outcome;
  {
    nb::gil_scoped_release no_gil;
    outcome = executor.step(step, times, python_signal);
  }
  if (outcome == Outcome::interrupted) throw nb::python_error();
  if (outcome == Outcome::cancelled) throw std::runtime_error("the step was cancelled");
  return times;
}

// Bytes read per second by all threads of the pool, over `bytes` at `address`, cut in equal runs.
double read_bandwidth(ThreadPool& pool, const std::string& isa, Address address, int64_t bytes) {
  const KernelTable& kernels = table_of(isa);
  const int64_t each = bytes / pool.size() / 4096 * 4096;
  std::vector<float> sums(size_t(pool.size()));
  auto job = [&](int thread) { sums[size_t(thread)] = kernels.read(at<const char>(address) + each * thread, each); };
  nb::gil_scoped_release no_gil;
  const auto start = std::chrono::steady_clock::now();
  pool.run(job);
  const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
  return double(each) * pool.size() / time.count();
}

// Operations per second of all threads, multiplying and adding in registers.
double peak(ThreadPool& pool, double (*multiply)(int64_t), int64_t rounds) {
  std::vector<double> operations(size_t(pool.size()));
  auto job = [&](int thread) { operations[size_t(thread)] = multiply(rounds); };
  nb::gil_scoped_release no_gil;
  const auto start = std::chrono::steady_clock::now();
  pool.run(job);
  const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
  double total = 0;
  for (double one : operations) total += one;
  return total / time.count();
}

double peak_flops(ThreadPool& pool, const std::string& isa, int64_t rounds) {
  return peak(pool, table_of(isa).multiply, rounds);
}

double peak_int_ops(ThreadPool& pool, const std::string& isa, int64_t rounds) {
  return peak(pool, table_of(isa).multiply_int, rounds);
}

// Seconds that one barrier of the pool takes, when all threads come to it at once.
double barrier_seconds(ThreadPool& pool, int rounds) {
  double seconds = 0;
  auto job = [&](int thread) {
    pool.barrier();
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < rounds; ++i) pool.barrier();
    if (thread == 0) seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  nb::gil_scoped_release no_gil;
  pool.run(job);
  return seconds / rounds;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : available_tables()) names.emplace_back(table->name);
  return names;
}

ExpertSet expert_set(Format format, Address input, int64_t input_stride, const Routing& routing, Address experts,
                     Address bias, int64_t expert_stride, int blocks, int inputs) {
  return {format,
          at<const char>(input),
          input_stride,
          routing,
          at<const char>(experts),
          at<const float>(bias),
          expert_stride,
          blocks,
          inputs};
}

void bind_ops(nb::class_<Executor>& c) {
  c.def(
      "embed",
      [](Executor& e, Part part, Address table, Address output, int hidden, int pairs, int output_stride) {
        e.add(part, EmbedArgs{at<const char>(table), at<float>(output), hidden, pairs, output_stride});
      },
      "part"_a, "table"_a, "output"_a, "hidden"_a, "pairs"_a, "output_stride"_a);
  c.def(
      "rope_table",
      [](Executor& e, Part part, Address inverse_frequencies, Address table, int dim, float factor) {
        e.add(part, RopeTableArgs{at<const float>(inverse_frequencies), at<float>(table), dim, factor});
      },
      "part"_a, "inverse_frequencies"_a, "table"_a, "dim"_a, "factor"_a);
  c.def(
      "norm",
      [](Executor& e, Part part, Address input, Address weight, Address output, Address output_f32, Address output8,
         int width, int input_stride, int output_stride, int64_t output8_stride, float eps, bool logit_rows) {
        e.add(part, NormArgs{at<const float>(input), at<const float>(weight), at<bf16>(output), at<float>(output_f32),
                             at<char>(output8), width, input_stride, output_stride, output8_stride, eps, logit_rows});
      },
      "part"_a, "input"_a, "weight"_a, "output"_a, "output_f32"_a, "output8"_a, "width"_a, "input_stride"_a,
      "output_stride"_a, "output8_stride"_a, "eps"_a, "logit_rows"_a);
  c.def(
      "quantise",
      [](Executor& e, Part part, Address input, Address output, int width, int64_t input_stride, int64_t output_stride,
         int multiple, int node) {
        e.add(part, QuantiseArgs{at<const bf16>(input), at<char>(output), width, input_stride, output_stride, multiple},
              node);
      },
      "part"_a, "input"_a, "output"_a, "width"_a, "input_stride"_a, "output_stride"_a, "multiple"_a,
      "node"_a = kAllNodes);
  c.def(
      "gemm",
      [](Executor& e, Part part, Format format, Address input, Address weight, Address bias, Address output,
         int columns, int inputs, int64_t input_stride, int output_stride, bool accumulate, int first_column,
         int node) {
        e.add(part,
              GemmArgs{format, at<const char>(input), at<const char>(weight), at<const float>(bias), at<float>(output),
                       columns, inputs, input_stride, output_stride, accumulate, first_column},
              node);
      },
      "part"_a, "format"_a, "input"_a, "weight"_a, "bias"_a, "output"_a, "columns"_a, "inputs"_a, "input_stride"_a,
      "output_stride"_a, "accumulate"_a, "first_column"_a = 0, "node"_a = kAllNodes);
  c.def(
      "qkv",
      [](Executor& e, Part part, Address qkv, Address rope, Address q_norm, Address k_norm, Address q,
         const KvLayout& kv, int heads, int kv_heads, int head_dim, int rope_dim, bool interleaved, int qkv_stride,
         float eps) {
        e.add(part,
              QkvArgs{at<const float>(qkv), at<const float>(rope), at<const float>(q_norm), at<const float>(k_norm),
                      at<bf16>(q), kv, heads, kv_heads, head_dim, rope_dim, interleaved, qkv_stride, eps});
      },
      "part"_a, "qkv"_a, "rope"_a, "q_norm"_a, "k_norm"_a, "q"_a, "kv"_a, "heads"_a, "kv_heads"_a, "head_dim"_a,
      "rope_dim"_a, "interleaved"_a, "qkv_stride"_a, "eps"_a);
  c.def(
      "attention",
      [](Executor& e, Part part, Address q, Address output, Address states, Address sinks, const KvLayout& kv,
         int heads, int kv_heads, int head_dim, int output_stride, int window, float scale, Address ends,
         Address partials) {
        const AttentionArgs args{at<const bf16>(q),
                                 at<bf16>(output),
                                 at<float>(states),
                                 at<const float>(sinks),
                                 kv,
                                 heads,
                                 kv_heads,
                                 head_dim,
                                 output_stride,
                                 window,
                                 scale,
                                 at<const int32_t>(ends),
                                 at<float>(partials)};
        e.add(part, args);
        e.add(part, MergeArgs{args});
      },
      "part"_a, "q"_a, "output"_a, "states"_a, "sinks"_a, "kv"_a, "heads"_a, "kv_heads"_a, "head_dim"_a,
      "output_stride"_a, "window"_a, "scale"_a, "ends"_a = 0, "partials"_a = 0);
  c.def(
      "router",
      [](Executor& e, Part part, Address input, Address weight, Address bias, Address logits, int experts, int hidden,
         int input_stride) {
        e.add(part, RouterArgs{at<const float>(input), at<const float>(weight), at<const float>(bias),
                               at<float>(logits), experts, hidden, input_stride});
      },
      "part"_a, "input"_a, "weight"_a, "bias"_a, "logits"_a, "experts"_a, "hidden"_a, "input_stride"_a);
  c.def(
      "topk",
      [](Executor& e, Part part, Address logits, Address ids, Address weights, int experts, int top_k, bool renormalise,
         bool softmax_after, float scale, Address shared_weights) {
        e.add(part, TopkArgs{at<const float>(logits), at<int32_t>(ids), at<float>(weights), at<float>(shared_weights),
                             experts, top_k, renormalise, softmax_after, scale});
      },
      "part"_a, "logits"_a, "ids"_a, "weights"_a, "experts"_a, "top_k"_a, "renormalise"_a, "softmax_after"_a, "scale"_a,
      "shared_weights"_a = 0);
  c.def(
      "group",
      [](Executor& e, Part part, Address ids, Address weights, const Routing& routing, int experts, int top_k,
         Address pairs) {
        e.add(part,
              GroupArgs{at<const int32_t>(ids), at<const float>(weights), routing, at<int32_t>(pairs), experts, top_k});
      },
      "part"_a, "ids"_a, "weights"_a, "routing"_a, "experts"_a, "top_k"_a, "pairs"_a = 0);
  c.def(
      "gate_up",
      [](Executor& e, Part part, Format format, Address input, const Routing& routing, Address experts, Address bias,
         Address output, int64_t expert_stride, int blocks, int inputs, int64_t input_stride, int output_stride,
         Activation activation, const ExpertSet* shared, Address shared_output, int shared_output_stride, int node) {
        const ExpertSet routed =
            expert_set(format, input, input_stride, routing, experts, bias, expert_stride, blocks, inputs);
        e.add(part,
              GateUpArgs{routed, shared ? *shared : ExpertSet{}, at<bf16>(output), at<bf16>(shared_output),
                         output_stride, shared_output_stride, activation},
              node);
      },
      "part"_a, "format"_a, "input"_a, "routing"_a, "experts"_a, "bias"_a, "output"_a, "expert_stride"_a, "blocks"_a,
      "inputs"_a, "input_stride"_a, "output_stride"_a, "activation"_a, "shared"_a.none() = nb::none(),
      "shared_output"_a = 0, "shared_output_stride"_a = 0, "node"_a = kAllNodes);
  c.def(
      "down",
      [](Executor& e, Part part, Format format, Address input, const Routing& routing, Address experts, Address bias,
         Address output, int64_t expert_stride, int blocks, int inputs, int64_t input_stride, int output_stride,
         const ExpertSet* shared, int node) {
        const ExpertSet routed =
            expert_set(format, input, input_stride, routing, experts, bias, expert_stride, blocks, inputs);
        e.add(part, DownArgs{routed, shared ? *shared : ExpertSet{}, at<float>(output), output_stride}, node);
      },
      "part"_a, "format"_a, "input"_a, "routing"_a, "experts"_a, "bias"_a, "output"_a, "expert_stride"_a, "blocks"_a,
      "inputs"_a, "input_stride"_a, "output_stride"_a, "shared"_a.none() = nb::none(), "node"_a = kAllNodes);
  c.def(
      "join",
      [](Executor& e, Part part, const std::vector<Address>& partials, Address output, int width, int output_stride) {
        if (partials.empty() || partials.size() > size_t(kMaxNodes))
          throw std::invalid_argument(std::to_string(partials.size()) + " nodes to join; from 1 to " +
                                      std::to_string(kMaxNodes) + " are allowed");
        JoinArgs args{{}, at<float>(output), int(partials.size()), width, output_stride};
        for (size_t i = 0; i < partials.size(); ++i) args.partials[i] = at<float>(partials[i]);
        e.add(part, args);
      },
      "part"_a, "partials"_a, "output"_a, "width"_a, "output_stride"_a);
  c.def(
      "combine",
      [](Executor& e, Part part, Address ids, Address weights, Address contributions, Address output, int top_k,
         int width, int stride, int output_stride) {
        e.add(part, CombineArgs{at<const int32_t>(ids), at<const float>(weights), at<float>(contributions),
                                at<float>(output), top_k, width, stride, output_stride});
      },
      "part"_a, "ids"_a, "weights"_a, "contributions"_a, "output"_a, "top_k"_a, "width"_a, "stride"_a,
      "output_stride"_a);
  c.def(
      "host", [](Executor& e, Part part, nb::callable call) { e.add(part, HostArgs{call_python, call.ptr()}); },
      "part"_a, "call"_a, nb::keep_alive<1, 3>(),
      "Calls `call()` on the thread that runs the step; what it raises ends the step and is raised by it.");
}

}  // namespace
}  // namespace hybrid

NB_MODULE(_ext, m) {
  using namespace hybrid;
  fetch_near = should_fetch_near();
  m.def("available_isas", &available_isas, "Instruction sets that run on this machine, best first.");
  m.def(
      "fetches_near", [](std::optional<bool> wanted) { return std::exchange(fetch_near, wanted.value_or(fetch_near)); },
      "wanted"_a = nb::none(),
      "Whether weights are fetched into the first-level cache, a little ahead, or far ahead into the second, as suits\n"
      "this processor. wanted: what to do from now on, for measurements and tests; results are the same.");
  m.def("missing_features", &missing_features, "isa"_a, "CPU features that `isa` needs and this machine lacks.");
  m.def("read_bandwidth", &read_bandwidth, "pool"_a, "isa"_a, "address"_a, "bytes"_a);
  m.def("peak_flops", &peak_flops, "pool"_a, "isa"_a, "rounds"_a, "Multiplications and additions a second, of bf16.");
  m.def("peak_int_ops", &peak_int_ops, "pool"_a, "isa"_a, "rounds"_a, "The same of int8.");

  m.def("barrier_seconds", &barrier_seconds, "pool"_a, "rounds"_a,
        "Mean time of a barrier that all threads reach at once.");

  // What a planner must know to size buffers.
  m.attr("KEY_BLOCK") = kKeys;
  m.attr("TILE_ROWS") = kAttentionRows;
  m.attr("MAX_NODES") = kMaxNodes;

  nb::enum_<Part>(m, "Part")
      .value("attention", Part::attention)
      .value("moe", Part::moe)
      .value("head", Part::head)
      .value("other", Part::other)
      .value("experts", Part::experts)
      .value("place", Part::place)
      .value("join", Part::join);

  nb::enum_<Format>(m, "Format")
      .value("bf16", Format::bf16)
      .value("int8", Format::int8)
      .value("int4", Format::int4)
      .value("fp8", Format::fp8)
      .value("mxfp4", Format::mxfp4);
  nb::enum_<Activation>(m, "Activation")
      .value("silu", Activation::silu)
      .value("swiglu_clamped", Activation::swiglu_clamped);

  nb::class_<ThreadPool>(m, "ThreadPool")
      .def(nb::init<int, std::vector<int>, int>(), "threads"_a, "cpus"_a, "nodes"_a = 1)
      .def_prop_ro("size", &ThreadPool::size)
      .def_prop_ro("nodes", &ThreadPool::nodes)
      .def("node_of", &ThreadPool::node_of, "thread"_a);

  nb::class_<Arena>(m, "Arena")
      .def(nb::init<size_t, bool, int>(), "bytes"_a, "huge"_a = false, "node"_a = -1)
      .def_prop_ro("address", [](const Arena& a) { return Address(a.data()); })
      .def_prop_ro("size", &Arena::size)
      .def_prop_ro("placed", &Arena::placed)
      .def("huge_bytes", &Arena::huge_bytes, nb::call_guard<nb::gil_scoped_release>())
      .def("use_huge", &Arena::use_huge, "offset"_a, "bytes"_a)
      .def("clear", &Arena::clear, "offset"_a, "bytes"_a, nb::call_guard<nb::gil_scoped_release>());

  nb::class_<KvLayout>(m, "KvLayout")
      .def(
          "__init__",
          [](KvLayout* self, Address base, int64_t slot_stride, int64_t head_stride, int64_t value_offset, int key_dim,
             int value_dim, Format format, int64_t key_scales_offset, int64_t value_scales_offset) {
            if (format != Format::bf16 && format != Format::int8 && format != Format::fp8)
              throw std::invalid_argument("keys and values are stored as bf16, int8 or fp8");
            new (self) KvLayout{at<char>(base), slot_stride, head_stride,       value_offset,       key_dim,
                                value_dim,      format,      key_scales_offset, value_scales_offset};
          },
          "base"_a, "slot_stride"_a, "head_stride"_a, "value_offset"_a, "key_dim"_a, "value_dim"_a, "format"_a,
          "key_scales_offset"_a, "value_scales_offset"_a);

  nb::class_<Routing>(m, "Routing")
      .def(
          "__init__",
          [](Routing* self, Address offsets, Address rows, Address weights, Address active, Address count) {
            new (self) Routing{at<int32_t>(offsets), at<int32_t>(rows), at<float>(weights), at<int32_t>(active),
                               at<int32_t>(count)};
          },
          "offsets"_a, "rows"_a, "weights"_a, "active"_a, "count"_a);

  nb::class_<ExpertSet>(m, "ExpertSet")
      .def(
          "__init__",
          [](ExpertSet* self, Format format, Address input, int64_t input_stride, const Routing& routing,
             Address experts, Address bias, int64_t expert_stride, int blocks, int inputs) {
            new (self) ExpertSet{
                expert_set(format, input, input_stride, routing, experts, bias, expert_stride, blocks, inputs)};
          },
          "format"_a, "input"_a, "input_stride"_a, "routing"_a, "experts"_a, "bias"_a, "expert_stride"_a, "blocks"_a,
          "inputs"_a);

  nb::class_<Executor> executor(m, "Executor");
  executor
      .def(
          "__init__",
          [](Executor* self, const std::string& isa, std::shared_ptr<ThreadPool> pool, int rows, int slots,
             int positions, int vocab, size_t scratch_bytes, bool batch_invariant) {
            new (self) Executor(table_of(isa), std::move(pool),
                                {rows, slots, positions, vocab, scratch_bytes, batch_invariant});
          },
          "isa"_a, "pool"_a, "rows"_a, "slots"_a, "positions"_a, "vocab"_a, "scratch_bytes"_a,
          "batch_invariant"_a = false)
      .def("step", &run_step, "token_ids"_a.noconvert(), "slots"_a.noconvert(), "positions"_a.noconvert(),
           "logit_rows"_a.noconvert(), "logits"_a.noconvert(),
           "Run one step; returns the seconds spent in each `Part`, in their order.")
      .def("cancel", &Executor::cancel)
      .def_prop_ro("op_count", &Executor::op_count);
  bind_ops(executor);
}
