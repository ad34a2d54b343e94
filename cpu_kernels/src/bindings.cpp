// Python bindings: shapes, lifetimes and exceptions; no arithmetic.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>

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

// Floating-point operations per second of all threads, multiplying and adding in registers.
double peak_flops(ThreadPool& pool, const std::string& isa, int64_t rounds) {
  const KernelTable& kernels = table_of(isa);
  std::vector<double> operations(size_t(pool.size()));
  auto job = [&](int thread) { operations[size_t(thread)] = kernels.multiply(rounds); };
  nb::gil_scoped_release no_gil;
  const auto start = std::chrono::steady_clock::now();
  pool.run(job);
  const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
  double total = 0;
  for (double one : operations) total += one;
  return total / time.count();
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : available_tables()) names.emplace_back(table->name);
  return names;
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
      [](Executor& e, Part part, Address input, Address weight, Address output, Address output_f32, int width,
         int input_stride, int output_stride, float eps, bool logit_rows) {
        e.add(part, NormArgs{at<const float>(input), at<const float>(weight), at<bf16>(output), at<float>(output_f32),
                             width, input_stride, output_stride, eps, logit_rows});
      },
      "part"_a, "input"_a, "weight"_a, "output"_a, "output_f32"_a, "width"_a, "input_stride"_a, "output_stride"_a,
      "eps"_a, "logit_rows"_a);
  c.def(
      "gemm",
      [](Executor& e, Part part, Address input, Address weight, Address bias, Address output, int columns, int pairs,
         int input_stride, int output_stride, bool accumulate) {
        e.add(part, GemmArgs{at<const bf16>(input), at<const char>(weight), at<const float>(bias), at<float>(output),
                             columns, pairs, input_stride, output_stride, accumulate});
      },
      "part"_a, "input"_a, "weight"_a, "bias"_a, "output"_a, "columns"_a, "pairs"_a, "input_stride"_a,
      "output_stride"_a, "accumulate"_a);
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
      [](Executor& e, Part part, Address q, Address output, Address states, const KvLayout& kv, int heads, int kv_heads,
         int head_dim, int output_stride, int window, float scale) {
        const AttentionArgs args{at<const bf16>(q), at<bf16>(output), at<float>(states), kv,     heads,
                                 kv_heads,          head_dim,         output_stride,     window, scale};
        e.add(part, args);
        e.add(part, MergeArgs{args});
      },
      "part"_a, "q"_a, "output"_a, "states"_a, "kv"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "output_stride"_a,
      "window"_a, "scale"_a);
  c.def(
      "router",
      [](Executor& e, Part part, Address input, Address weight, Address logits, int experts, int hidden,
         int input_stride) {
        e.add(part, RouterArgs{at<const float>(input), at<const float>(weight), at<float>(logits), experts, hidden,
                               input_stride});
      },
      "part"_a, "input"_a, "weight"_a, "logits"_a, "experts"_a, "hidden"_a, "input_stride"_a);
  c.def(
      "topk",
      [](Executor& e, Part part, Address logits, Address ids, Address weights, int experts, int top_k, bool renormalise,
         bool softmax_after, float scale) {
        e.add(part, TopkArgs{at<const float>(logits), at<int32_t>(ids), at<float>(weights), experts, top_k, renormalise,
                             softmax_after, scale});
      },
      "part"_a, "logits"_a, "ids"_a, "weights"_a, "experts"_a, "top_k"_a, "renormalise"_a, "softmax_after"_a,
      "scale"_a);
  c.def(
      "group",
      [](Executor& e, Part part, Address ids, Address weights, const Routing& routing, int experts, int top_k) {
        e.add(part, GroupArgs{at<const int32_t>(ids), at<const float>(weights), routing, experts, top_k});
      },
      "part"_a, "ids"_a, "weights"_a, "routing"_a, "experts"_a, "top_k"_a);
  c.def(
      "gate_up",
      [](Executor& e, Part part, Address input, const Routing& routing, Address experts, Address output,
         int64_t expert_stride, int blocks, int pairs, int input_stride, int output_stride) {
        e.add(part, GateUpArgs{at<const bf16>(input), routing, at<const char>(experts), at<bf16>(output), expert_stride,
                               blocks, pairs, input_stride, output_stride});
      },
      "part"_a, "input"_a, "routing"_a, "experts"_a, "output"_a, "expert_stride"_a, "blocks"_a, "pairs"_a,
      "input_stride"_a, "output_stride"_a);
  c.def(
      "down",
      [](Executor& e, Part part, Address input, const Routing& routing, Address experts, Address output,
         int64_t expert_stride, int blocks, int pairs, int input_stride, int output_stride) {
        e.add(part, DownArgs{at<const bf16>(input), routing, at<const char>(experts), at<float>(output), expert_stride,
                             blocks, pairs, input_stride, output_stride});
      },
      "part"_a, "input"_a, "routing"_a, "experts"_a, "output"_a, "expert_stride"_a, "blocks"_a, "pairs"_a,
      "input_stride"_a, "output_stride"_a);
}

}  // namespace
}  // namespace hybrid

NB_MODULE(_ext, m) {
  using namespace hybrid;
  m.def("available_isas", &available_isas, "Instruction sets that run on this machine, best first.");
  m.def("missing_features", &missing_features, "isa"_a, "CPU features that `isa` needs and this machine lacks.");
  m.def("read_bandwidth", &read_bandwidth, "pool"_a, "isa"_a, "address"_a, "bytes"_a);
  m.def("peak_flops", &peak_flops, "pool"_a, "isa"_a, "rounds"_a);

  // What a planner must know to size buffers.
  m.attr("KEY_BLOCK") = kKeys;
  m.attr("TILE_ROWS") = kAttentionRows;

  nb::enum_<Part>(m, "Part")
      .value("attention", Part::attention)
      .value("moe", Part::moe)
      .value("head", Part::head)
      .value("other", Part::other);

  nb::class_<ThreadPool>(m, "ThreadPool")
      .def(nb::init<int, std::vector<int>>(), "threads"_a, "cpus"_a)
      .def_prop_ro("size", &ThreadPool::size);

  nb::class_<Arena>(m, "Arena")
      .def(nb::init<size_t, bool>(), "bytes"_a, "huge"_a = false)
      .def_prop_ro("address", [](const Arena& a) { return Address(a.data()); })
      .def_prop_ro("size", &Arena::size)
      .def("clear", &Arena::clear, "offset"_a, "bytes"_a, nb::call_guard<nb::gil_scoped_release>());

  nb::class_<KvLayout>(m, "KvLayout")
      .def(
          "__init__",
          [](KvLayout* self, Address base, int64_t slot_stride, int64_t head_stride, int64_t value_offset, int key_dim,
             int value_dim) {
            new (self) KvLayout{at<char>(base), slot_stride, head_stride, value_offset, key_dim, value_dim};
          },
          "base"_a, "slot_stride"_a, "head_stride"_a, "value_offset"_a, "key_dim"_a, "value_dim"_a);

  nb::class_<Routing>(m, "Routing")
      .def(
          "__init__",
          [](Routing* self, Address offsets, Address rows, Address weights, Address active, Address count) {
            new (self) Routing{at<int32_t>(offsets), at<int32_t>(rows), at<float>(weights), at<int32_t>(active),
                               at<int32_t>(count)};
          },
          "offsets"_a, "rows"_a, "weights"_a, "active"_a, "count"_a);

  nb::class_<Executor> executor(m, "Executor");
  executor
      .def(
          "__init__",
          [](Executor* self, const std::string& isa, std::shared_ptr<ThreadPool> pool, int rows, int slots,
             int positions, int vocab, size_t scratch_bytes) {
            new (self) Executor(table_of(isa), std::move(pool), {rows, slots, positions, vocab, scratch_bytes});
          },
          "isa"_a, "pool"_a, "rows"_a, "slots"_a, "positions"_a, "vocab"_a, "scratch_bytes"_a)
      .def("step", &run_step, "token_ids"_a.noconvert(), "slots"_a.noconvert(), "positions"_a.noconvert(),
           "logit_rows"_a.noconvert(), "logits"_a.noconvert(),
           "Run one step; returns seconds spent in (attention, moe, head, other).")
      .def("cancel", &Executor::cancel)
      .def_prop_ro("op_count", &Executor::op_count);
  bind_ops(executor);
}
