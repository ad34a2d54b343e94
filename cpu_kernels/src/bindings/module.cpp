// Python bindings: shapes, lifetimes and exceptions; no arithmetic. Those of ops are in ops.cpp.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <chrono>
#include <optional>
#include <utility>

#include "bindings/ops.h"
#include "cpu/features.h"
#include "cpu/mapped_range.h"
#include "executor/executor.h"
#include "executor/field_check.h"
#include "instances/tables.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace hybrid {
namespace {

using Address = uintptr_t;
using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Logits = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

bool python_signal() {
  nb::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

std::string text(size_t number) { return std::to_string(number); }

std::vector<int32_t> copied(const Ints& array) {
  require(array.shape(0) <= size_t(kLargest), text(array.shape(0)) + " rows in a step");
  return {array.data(), array.data() + array.shape(0)};
}

// The rows of a step, copied: what was checked must stay so, though callbacks and other threads may write to the
// arrays.
struct Rows {
  std::vector<int32_t> tokens, sequences, positions, logit_rows;

  Rows(const Ints& tokens, const Ints& sequences, const Ints& positions, const Ints& logit_rows)
      : tokens(copied(tokens)),
        sequences(copied(sequences)),
        positions(copied(positions)),
        logit_rows(copied(logit_rows)) {
    require(sequences.shape(0) == tokens.shape(0) && positions.shape(0) == tokens.shape(0),
            "token_ids, sequences and positions must have one length, not " + text(tokens.shape(0)) + ", " +
                text(sequences.shape(0)) + " and " + text(positions.shape(0)));
  }

  Step step() const {
    Step step{};
    step.rows = int(tokens.size());
    step.tokens = tokens.data();
    step.sequences = sequences.data();
    step.positions = positions.data();
    step.logit_rows = int(logit_rows.size());
    step.logit_index = logit_rows.data();
    return step;
  }
};

Times run_step(Executor& executor, Ints tokens, Ints sequences, Ints positions, Ints logit_rows, Logits logits) {
  const Rows rows(tokens, sequences, positions, logit_rows);
  const size_t wanted = rows.logit_rows.size(), vocab = size_t(executor.vocab());
  require(logits.shape(0) == wanted && (wanted == 0 || logits.shape(1) == vocab),
          "logits must have shape [" + text(wanted) + ", " + text(vocab) + "], [len(logit_rows), vocab], not [" +
              text(logits.shape(0)) + ", " + text(logits.shape(1)) + "]");
  Step step = rows.step();
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

void check_rows(Executor& executor, Ints tokens, Ints sequences, Ints positions, Ints logit_rows) {
  const Rows rows(tokens, sequences, positions, logit_rows);
  nb::gil_scoped_release no_gil;
  executor.check_rows(rows.step());
}

// Bytes read per second by all threads of the pool, over `bytes` at `address`, cut in equal runs.
double read_bandwidth(ThreadPool& pool, const std::string& isa, Address address, int64_t bytes) {
  const KernelTable& kernels = table_of(isa);
  require(address != 0 && bytes >= 0 && bytes <= kLargestBytes && address <= UINTPTR_MAX - uintptr_t(bytes),
          std::to_string(bytes) + " bytes at address " + std::to_string(address) + " cannot be read");
  const int64_t each = bytes / pool.size() / 4096 * 4096;
  std::vector<float> sums(size_t(pool.size()));
  auto job = [&](int part) {
    sums[size_t(part)] = kernels.read(reinterpret_cast<const char*>(address) + each * part, each);
  };
  nb::gil_scoped_release no_gil;
  const auto start = std::chrono::steady_clock::now();
  pool.run_parts(job);
  const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
  return double(each) * pool.size() / time.count();
}

// Operations per second of all threads, multiplying and adding in registers.
double peak(ThreadPool& pool, double (*multiply)(int64_t), int64_t rounds) {
  require(rounds >= 1, "rounds is " + std::to_string(rounds) + "; it must be at least 1");
  std::vector<double> operations(size_t(pool.size()));
  auto job = [&](int part) { operations[size_t(part)] = multiply(rounds); };
  nb::gil_scoped_release no_gil;
  const auto start = std::chrono::steady_clock::now();
  pool.run_parts(job);
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

// A phase for which all threads come, then some in which there is nothing to do.
class EmptyPhases final : public ThreadPool::Job {
 public:
  EmptyPhases(int threads, int count) : left_(count + 1), missing_(threads) {}
  bool work(int) override { return missing_.load() <= 0 || missing_.fetch_sub(1) == 1; }
  bool next() override {
    if (missing_.load() <= 0 && !std::exchange(all_came_, true)) start_ = std::chrono::steady_clock::now();
    return left_-- > 0;
  }
  double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }

 private:
  int left_;
  std::atomic<int> missing_;
  bool all_came_ = false;
  std::chrono::steady_clock::time_point start_;
};

// Seconds from a phase of the pool to the next, when all threads are there.
double phase_seconds(ThreadPool& pool, int rounds) {
  require(rounds >= 1 && rounds <= kLargest,
          "rounds is " + std::to_string(rounds) + "; it must be at least 1 and at most " + std::to_string(kLargest));
  EmptyPhases phases(pool.size(), rounds);
  nb::gil_scoped_release no_gil;
  pool.run(phases);
  return phases.seconds() / rounds;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : available_tables()) names.emplace_back(table->name);
  return names;
}

}  // namespace
}  // namespace hybrid

NB_MODULE(_ext, m) {
  nb::set_leak_warnings(false);  // a forked process ends with objects that its parent's threads held
  using namespace hybrid;
  reading = suited_reading();
  m.def("available_isas", &available_isas, "Instruction sets that run on this machine, best first.");
  nb::enum_<Reading>(m, "Reading")
      .value("far", Reading::far)
      .value("near", Reading::near)
      .value("ordered", Reading::ordered);
  m.def(
      "reading", [](std::optional<Reading> wanted) { return std::exchange(reading, wanted.value_or(reading)); },
      "wanted"_a = nb::none(),
      "How few rows read weights, as suits this processor: blocks by turns, asked for far ahead in the\n"
      "second-level cache or near in the first, or blocks one after the other. wanted: what to do from now on,\n"
      "for measurements and tests; results are the same.");
  m.def("missing_features", &missing_features, "isa"_a, "CPU features that `isa` needs and this machine lacks.");
  m.def("read_bandwidth", &read_bandwidth, "pool"_a, "isa"_a, "address"_a, "bytes"_a);
  m.def("peak_flops", &peak_flops, "pool"_a, "isa"_a, "rounds"_a, "Multiplications and additions a second, of bf16.");
  m.def("peak_int_ops", &peak_int_ops, "pool"_a, "isa"_a, "rounds"_a, "The same of int8.");

  m.def("phase_seconds", &phase_seconds, "pool"_a, "rounds"_a,
        "Mean time from an op to the next, when there is nothing to do in them.");

  // What a planner must know to size buffers.
  m.attr("KEY_BLOCK") = kKeys;
  m.attr("INDEX_BLOCK") = kIndexBlock;
  m.attr("TILE_ROWS") = kAttentionRows;
  m.attr("MAX_NODES") = kMaxNodes;
  m.attr("MAX_DELTA_DIM") = kMaxDeltaDim;
  m.attr("RUN_TOKENS") = kRunTokens;
  m.attr("MAX_NGRAM") = kMaxNgram;
  m.def(
      "conv_state_bytes",
      [](int width, int taps, int dilation) {
        require(
            width >= 1 && width <= kLargest && taps >= 1 && taps <= kMaxTaps && dilation >= 1 && dilation <= kMaxNgram,
            "conv_state_bytes: width must be from 1 to " + std::to_string(kLargest) + ", taps from 1 to " +
                std::to_string(kMaxTaps) + ", dilation from 1 to " + std::to_string(kMaxNgram));
        return conv_state_bytes(width, taps, dilation);
      },
      "width"_a, "taps"_a, "dilation"_a = 1,
      "Bytes of the state of a sequence in a short convolution, whose taps are `dilation` tokens apart.");
  m.def(
      "ngram_state_bytes",
      [](int size) {
        require(size >= 2 && size <= kMaxNgram,
                "ngram_state_bytes: size must be from 2 to " + std::to_string(kMaxNgram));
        return ngram_state_bytes(size);
      },
      "size"_a, "Bytes of the state of a sequence whose n-grams of up to `size` tokens are looked up.");
  m.def(
      "delta_state_bytes",
      [](int value_heads, int key_dim, int value_dim, bool by_channel) {
        require(value_heads >= 1 && key_dim >= 1 && value_dim >= 1 && value_heads <= kLargest && key_dim <= kLargest &&
                    value_dim <= kLargest,
                "delta_state_bytes: sizes must be at least 1 and at most " + std::to_string(kLargest));
        return delta_state_bytes(value_heads, key_dim, value_dim, by_channel);
      },
      "value_heads"_a, "key_dim"_a, "value_dim"_a, "by_channel"_a = false,
      "Bytes of the state of a sequence in the delta rule. by_channel: whether channels of keys decay by themselves.");

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
      .value("fp8_row", Format::fp8_row)
      .value("mxfp4", Format::mxfp4)
      .value("nvfp4", Format::nvfp4)
      .value("q8_0", Format::q8_0)
      .value("q4_0", Format::q4_0)
      .value("q5_0", Format::q5_0)
      .value("q4_1", Format::q4_1)
      .value("q5_1", Format::q5_1)
      .value("q4_k", Format::q4_k)
      .value("q5_k", Format::q5_k)
      .value("q6_k", Format::q6_k)
      .value("q4_t", Format::q4_t)
      .value("q2_k", Format::q2_k);
  nb::enum_<Activation>(m, "Activation")
      .value("silu", Activation::silu)
      .value("swiglu_clamped", Activation::swiglu_clamped)
      .value("silu_clamped", Activation::silu_clamped)
      .value("gelu_tanh", Activation::gelu_tanh)
      .value("relu_squared", Activation::relu_squared);
  nb::enum_<Scoring>(m, "Scoring")
      .value("softmax", Scoring::softmax)
      .value("topk_softmax", Scoring::topk_softmax)
      .value("sigmoid", Scoring::sigmoid)
      .value("sparsemixer", Scoring::sparsemixer)
      .value("root_softplus", Scoring::root_softplus);

  nb::class_<ThreadPool>(m, "ThreadPool")
      .def(nb::init<int, std::vector<std::vector<int>>, int>(), "threads"_a, "cpus"_a, "nodes"_a = 1)
      .def_prop_ro("size", &ThreadPool::size)
      .def_prop_ro("nodes", &ThreadPool::nodes)
      .def(
          "node_of",
          [](const ThreadPool& pool, int thread) {
            require(thread >= 0 && thread < pool.size(),
                    "thread " + std::to_string(thread) + " of " + std::to_string(pool.size()));
            return pool.node_of(thread);
          },
          "thread"_a);

  nb::class_<Arena>(m, "Arena")
      .def(nb::init<size_t, bool, int>(), "bytes"_a, "huge"_a = false, "node"_a = -1)
      .def_prop_ro("address", [](const Arena& a) { return Address(a.data()); })
      .def_prop_ro("size", &Arena::size)
      .def_prop_ro("placed", &Arena::placed)
      .def("huge_bytes", &Arena::huge_bytes, nb::call_guard<nb::gil_scoped_release>())
      .def("use_huge", &Arena::use_huge, "offset"_a, "bytes"_a)
      .def("clear", &Arena::clear, "offset"_a, "bytes"_a, nb::call_guard<nb::gil_scoped_release>());

  nb::class_<MappedRange>(m, "MappedRange")
      .def(
          "__init__",
          [](MappedRange* self, Address address, size_t bytes) {
            new (self) MappedRange(reinterpret_cast<void*>(address), bytes);
          },
          "address"_a, "bytes"_a, "Until it is gone, pages of a mapped file that was cut read as zeros.")
      .def_prop_ro("damaged", &MappedRange::damaged, "Whether a page was missing when it was read.");

  nb::class_<Executor> executor(m, "Executor");
  executor
      .def(
          "__init__",
          [](Executor* self, const std::string& isa, std::shared_ptr<ThreadPool> pool, int rows, int sequences,
             int positions, int vocab, size_t scratch_bytes, bool batch_invariant) {
            new (self) Executor(table_of(isa), std::move(pool),
                                {rows, sequences, positions, vocab, scratch_bytes, batch_invariant});
          },
          "isa"_a, "pool"_a, "rows"_a, "sequences"_a, "positions"_a, "vocab"_a, "scratch_bytes"_a,
          "batch_invariant"_a = false)
      .def("step", &run_step, "token_ids"_a.noconvert(), "sequences"_a.noconvert(), "positions"_a.noconvert(),
           "logit_rows"_a.noconvert(), "logits"_a.noconvert(),
           "Run one step; returns the seconds spent in each `Part`, in their order.")
      .def("check_rows", &check_rows, "token_ids"_a.noconvert(), "sequences"_a.noconvert(), "positions"_a.noconvert(),
           "logit_rows"_a.noconvert(), "Refuse what `step` would refuse, and run nothing.")
      .def("cancel", &Executor::cancel)
      .def_prop_ro("op_count", &Executor::op_count);
  bind_ops(m, executor);
}
