"""Steps with a device give the bits of steps without one, count what the simulator counts, and survive what fails."""

from __future__ import annotations

import ctypes
import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_checkpoint
from steps import open_engine, step

from gpu_cache import template_policy, template_prefetch
from gpu_cache.admission import ADMISSIONS, Costs
from gpu_cache.geometry import MAPPINGS
from gpu_cache.policies import POLICIES
from gpu_cache.prefetch import LEARNT, NEXT_GATE
from gpu_cache.simulator import Setting, replay
from gpu_cache.trace import calls
from hybrid.config import CacheConfig, DeviceConfig, EngineConfig
from hybrid.engine.engine import Engine
from hybrid.errors import ConfigError, HybridError, StepCancelled
from hybrid.files.traces import open_trace, read_trace

EMBEDDED = {"max_batch": 8, "chunk_size": 128, "threads": 2, "max_seq_len": 256}
FAMILIES = ("qwen3_moe", "qwen2_moe", "gpt_oss", "mixtral", "deepseek_v2", "deepseek_v3")
FORMATS = ("bf16", "int8", "int4", "fp8", "mxfp4")


def embedded(cache: CacheConfig | None = None, **choices) -> Engine:
    device = {} if cache is None else {"device": "simulated", "cache": cache}
    return Engine.open(EngineConfig(**EMBEDDED, **device, **choices))


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint32)


def work(engine: Engine, sequences: int, seed: int = 0, decode: int = 12) -> Iterator[np.ndarray]:
    """Logits of prompts of several lengths together, then of tokens of all sequences together."""
    random = np.random.default_rng(seed)
    vocab, lengths = engine.spec.vocab, random.integers(1, 128 // sequences, sequences)
    yield step(engine, *((slot, 0, random.integers(0, vocab, length)) for slot, length in enumerate(lengths)))
    for i in range(decode):
        tokens = random.integers(0, vocab, sequences)
        yield step(engine, *((slot, length + i, tokens[slot : slot + 1]) for slot, length in enumerate(lengths)))
    for slot in range(sequences):
        engine.release(slot)


def all_work(engine: Engine, batches=(1, 2, 5, 8)) -> np.ndarray:
    return bits(np.concatenate([np.concatenate(list(work(engine, n, seed=n))) for n in batches]))


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    with embedded() as engine:
        return all_work(engine)


@pytest.mark.parametrize(
    "cache",
    [
        CacheConfig(14, 4, poison=True),
        CacheConfig(16, 16, poison=True),
        CacheConfig(1, 2, poison=True, delay=0),
        CacheConfig(14, 4, quota=0),
        CacheConfig(14, 4, quota=3, delay=0, poison=True),
        *(CacheConfig(14, 4, delay=delay, poison=True) for delay in (1, 7, 16, 60)),
        CacheConfig(16, 8, prefetch="next-gate", poison=True),
        CacheConfig(16, 8, prefetch="next-gate", poison=True, delay=2, quota=9),
        CacheConfig("auto", poison=True, delay=0),
        CacheConfig(14, 4, stream="on", poison=True),
        CacheConfig(1, 2, stream="on", poison=True, delay=0),
        CacheConfig(16, 8, stream="on", prefetch="next-gate", poison=True, delay=2, quota=9),
    ],
    ids=str,
)
def test_batches_of_1_to_8_and_long_prompts_give_the_same_bits(expected, cache) -> None:
    with embedded(cache) as engine:
        assert np.array_equal(all_work(engine), expected)
        engine.experts.table.check_integrity()


# Every policy with every mapping and every admission rule, each of these with each other.
TRIPLES = [
    (policy, mapping, list(ADMISSIONS)[(number + at) % len(ADMISSIONS)])
    for number, policy in enumerate(POLICIES)
    for at, mapping in enumerate(MAPPINGS)
]


@pytest.mark.parametrize(("policy", "mapping", "admission"), TRIPLES)
def test_every_policy_mapping_and_admission_gives_the_same_bits(expected, policy, mapping, admission) -> None:
    """A mapping has one admission rule for each policy: they share nothing that bits could depend on."""
    cache = CacheConfig(14, 3, None, policy, admission, mapping=mapping, delay=1, poison=True)
    with embedded(cache) as engine:
        assert np.array_equal(all_work(engine), expected)
        engine.experts.table.check_integrity()


@pytest.mark.parametrize("jitter", [0, 3000])
def test_copies_of_a_real_thread_may_take_as_long_as_they_like(expected, jitter) -> None:
    device = DeviceConfig(copy_gbps=0.1, latency_us=0.0, jitter_us=jitter)
    for stream in ("off", "on"):
        with embedded(CacheConfig(14, 4, stream=stream, poison=True), simulated=device) as engine:
            assert np.array_equal(all_work(engine), expected)


@pytest.mark.parametrize("text", [*FORMATS, "int8,shared=bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_experts_biases_and_dense_layers_work(tmp_path, family, text) -> None:
    path = write_checkpoint(tmp_path / "hf", family)
    cache = CacheConfig("auto", stream="on", poison=True, delay=0)
    with open_engine(path, tmp_path / "cache", weight_format=text) as engine:
        wanted = bits(np.concatenate(list(work(engine, 3))))
    with open_engine(path, tmp_path / "cache", weight_format=text, device="simulated", cache=cache) as engine:
        for _ in range(2):  # the second time with a full cache
            assert np.array_equal(bits(np.concatenate(list(work(engine, 3)))), wanted)
        hits = engine.experts.count()[:, 1]
        assert (hits > 0).all() and engine.experts.device.times.streamed > 0


def traced(engine: Engine, path: Path) -> np.ndarray:
    """Runs all work; returns what was counted, [layers, 6], and leaves a trace."""
    with open_trace(path, pytest.fail, engine.plan.cache.next_gate) as writer:
        engine.routes.observer = writer.write
        all_work(engine)
    return engine.experts.count()


@pytest.mark.parametrize(("policy", "mapping", "admission"), TRIPLES)
def test_the_simulator_counts_what_the_engine_did(tmp_path, policy, mapping, admission, prefetch="none") -> None:
    cache = CacheConfig(13, 4, 20, policy, admission, prefetch, mapping, stream="on", delay=3, seed=5)
    with embedded(cache, routes=True) as engine:
        counts = traced(engine, tmp_path / "trace.csv")
        costs = engine.experts.costs
    setting = Setting(13, 4, policy, admission, mapping, quota=20, delay=3, seed=5, prefetch=prefetch)
    routes = calls(read_trace(tmp_path / "trace.csv", layers=16, experts=16))
    result = replay(routes, setting, Costs(costs.copy, costs.cpu, costs.device))
    names = ("calls", "hits", "loading", "misses", "evictions", "fills")
    for name, found in zip(names, counts.T, strict=True):
        assert np.array_equal(found, getattr(result, name)), name
    assert counts[:, 1].sum() > 0 and counts[:, 5].sum() > 0


@pytest.mark.parametrize("prefetch", [*LEARNT, "transition:4", NEXT_GATE, f"{template_prefetch.__file__}:MyRule:2"])
def test_the_simulator_counts_what_the_engine_copied_ahead(tmp_path, prefetch) -> None:
    test_the_simulator_counts_what_the_engine_did(tmp_path, "ClassLRU", "modulo", "always", prefetch)


def test_the_simulator_counts_what_the_engine_did_with_rules_of_a_users_files(tmp_path) -> None:
    rule = "from gpu_cache.admission import Admission\nclass R(Admission):\n    def wants(self, index, key):\n"
    (tmp_path / "odd.py").write_text(rule + "        return key % 3 > 0\n")
    test_the_simulator_counts_what_the_engine_did(
        tmp_path, template_policy.__file__, "modulo", f"{tmp_path / 'odd.py'}:R"
    )


def test_a_users_policy_that_evicts_what_is_pinned_ends_the_step(tmp_path) -> None:
    begin = (
        "from gpu_cache.policies.base import Policy\nclass P(Policy):\n    def replace(self, index, key, blocked):\n"
    )
    (tmp_path / "bad.py").write_text(begin + "        return next(iter(blocked), index * self.nways)\n")
    rule = "bad.py line 3: replace returned the (foreign|blocked) slot"
    cache = CacheConfig(13, 4, policy=str(tmp_path / "bad.py"), delay=0)
    with embedded(cache) as engine, pytest.raises(HybridError, match=rule):
        all_work(engine)


def test_a_trace_needs_no_cache_and_changes_nothing(tmp_path, expected) -> None:
    with embedded(routes=True) as engine, open_trace(tmp_path / "trace.csv", pytest.fail) as writer:
        engine.routes.observer = writer.write
        assert np.array_equal(all_work(engine), expected)
    trace = read_trace(tmp_path / "trace.csv")
    assert (trace.layers, len(set(trace.sequence.tolist()))) == (16, 1 + 2 + 5 + 8)
    assert trace.step[-1] == 4 * 13 - 1


def test_a_copy_thread_that_is_killed_costs_nothing_but_speed(expected, monkeypatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    device = DeviceConfig(copy_gbps=0.02, latency_us=0.0)
    with embedded(CacheConfig(14, 4, stream="off", poison=True), simulated=device) as engine:
        killed = 0
        for sequences in (1, 2, 5, 8):
            for _ in work(engine, sequences, seed=sequences):
                killed += kill(engine.experts.device.copy_thread)
            engine.experts.table.check_integrity()
        assert np.array_equal(all_work(engine), expected)
        assert killed > 3 and engine.experts.device.times.failed_copies > 0
        engine.experts.drain()
        engine.experts.table.check_integrity()


@pytest.mark.parametrize("whole", [False, True], ids=["before its copy", "after its copy"])
def test_a_copy_thread_that_dies_in_the_middle_of_a_stream_costs_nothing_but_speed(
    expected, monkeypatch, whole
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    monkeypatch.setattr("gpu_cache.devices.simulated.LOOK", 0.001)  # or each of many copies would take longer
    with embedded(CacheConfig(14, 4, quota=0, stream="on", poison=True)) as engine:
        device = engine.experts.device
        thread, copy, copies = device.copy_thread, device.copy_thread.copy, itertools.count()

        def dies(slot: int, key: int, stop: threading.Event) -> bool:
            dying = threading.current_thread() is thread and next(copies) == 5
            if dying and not whole:
                raise SystemExit
            copied = copy(slot, key, stop)
            if dying:
                raise SystemExit  # nobody is told
            return copied

        thread.copy = dies
        assert np.array_equal(all_work(engine), expected)
        assert not thread.is_alive() and device.times.streamed > 100


def test_what_is_streamed_leaves_no_trace_in_the_table() -> None:
    """Hits, fills and what the device holds are those of a run without; only the threads have less to do."""
    counts, streamed = [], []
    for stream in ("off", "on"):
        with embedded(CacheConfig(14, 4, stream=stream, delay=1)) as engine:
            list(work(engine, 3))
            counts.append((engine.experts.count().tolist(), engine.experts.table.resident()))
            streamed.append((engine.experts.times.streamed_layers, engine.experts.device.times.streamed))
    assert counts[0] == counts[1] and streamed[0] == (0, 0)
    missed = np.array(counts[1][0])
    assert streamed[1][0] == 16 and 0 < streamed[1][1] <= missed[:, 2:4].sum(), "one step of the prompt, every layer"


@pytest.mark.parametrize(("cpu_row", "streams"), [(1.0, True), (0.0, False)])
def test_auto_streams_where_the_threads_would_take_longer(expected, cpu_row, streams) -> None:
    with embedded(CacheConfig(14, 4, stream="auto", poison=True)) as engine:
        engine.experts.costs = replace(engine.experts.costs, cpu=0.0, cpu_row=cpu_row)
        assert np.array_equal(all_work(engine), expected)
        assert (engine.experts.times.streamed_layers > 0) == streams


def kill(thread: threading.Thread) -> int:
    """Ends a thread at its next instruction, in the middle of whatever it does."""
    return ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))


def test_a_cancelled_step_leaves_no_trace_in_the_next(expected) -> None:
    with embedded(CacheConfig(14, 4, poison=True)) as engine:
        for last in range(2 * 15):  # each layer but the last has a lookup and a wait, or more
            spans = itertools.count()
            engine.experts.observer = lambda *_, spans=spans, last=last: next(spans) == last and engine.cancel()
            with pytest.raises(StepCancelled):
                step(engine, (0, 0, np.arange(100)))
        engine.experts.observer = None
        engine.experts.table.check_integrity()
        assert np.array_equal(all_work(engine), expected)


def assert_a_failure_in_a_lookup_is_forgotten(engine: Engine, expected: np.ndarray, monkeypatch) -> None:
    """One in the middle of it is raised, and leaves no trace in the steps that follow."""
    list(work(engine, 2))
    with monkeypatch.context() as patch:
        patch.setattr(engine.experts.device, "copy_in", lambda slot, key: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            list(work(engine, 3))
    assert np.array_equal(all_work(engine), expected)
    engine.experts.table.check_integrity()


def test_a_failure_in_the_middle_of_a_lookup_is_raised_and_forgotten(expected, monkeypatch) -> None:
    with embedded(CacheConfig(14, 4, delay=0, poison=True)) as engine:
        assert_a_failure_in_a_lookup_is_forgotten(engine, expected, monkeypatch)


def test_what_the_device_raises_ends_the_step(expected, monkeypatch) -> None:
    with embedded(CacheConfig(16, 16, delay=0)) as engine:
        list(work(engine, 2))
        with monkeypatch.context() as patch:
            patch.setattr(engine.experts.device, "_compute", lambda slots: 1 // 0)
            with pytest.raises(ZeroDivisionError):
                list(work(engine, 2))
        assert np.array_equal(all_work(engine), expected)


def test_experts_that_were_saved_are_there_from_the_start(tmp_path) -> None:
    file = tmp_path / "warm.json"
    with embedded(CacheConfig(14, 4, delay=0)) as engine:
        list(work(engine, 2))
        engine.save_experts(file)
        kept = set(engine.experts.table.resident())
    with embedded(CacheConfig(14, 4, delay=0, warm=file)) as engine:
        assert set(engine.experts.table.resident()) == kept and len(kept) > 40
        list(work(engine, 2))
        assert engine.experts.count()[0, 1] > 0
    with embedded(CacheConfig(16, 16, delay=0, warm=file), weight_format="int8") as engine:  # of another format too
        assert set(engine.experts.table.resident()) == kept


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "valid JSON"),
        ("{}", "is no list of experts"),
        ('{"kind": "hybrid-experts", "model": "x", "experts": []}', "another model"),
        ('{"kind": "hybrid-experts", "model": "MARK", "experts": [[16, 0]]}', r"lists \[16, 0\]"),
        ('{"kind": "hybrid-experts", "model": "MARK", "experts": [["a", 0]]}', "lists"),
        (None, "there is no such file"),
    ],
)
def test_a_warm_file_that_is_none_is_refused(tmp_path, text, words) -> None:
    file = tmp_path / "warm.json"
    with embedded(CacheConfig(14, 4)) as engine:
        engine.save_experts(file)
    mark = json.loads(file.read_text())["model"]
    file.unlink() if text is None else file.write_text(text.replace("MARK", mark))
    with pytest.raises(ConfigError, match=words):
        embedded(CacheConfig(14, 4, warm=file))


def test_auto_leaves_a_device_that_does_not_pay(expected) -> None:
    """The embedded model takes microseconds an expert: no device is worth its bookkeeping."""
    slow = DeviceConfig(read_gbps=0.001)
    with embedded(CacheConfig(14, 4, mode="auto", delay=1), simulated=slow) as engine:
        assert np.array_equal(all_work(engine), expected)
        assert engine.experts.following == "cpu" and not engine.experts.placing
        calls = engine.experts.count()[:, 0].sum()
        list(work(engine, 1))
        assert engine.experts.count()[:, 0].sum() == calls


@pytest.mark.parametrize("best", ["static", "cache"])
def test_auto_follows_its_verdict(expected, monkeypatch, best) -> None:
    with embedded(CacheConfig(14, 4, mode="auto", delay=1)) as engine:
        verdict = engine.experts.verdict
        monkeypatch.setattr(engine.experts, "verdict", lambda: replace(verdict(), best=best))
        assert np.array_equal(all_work(engine), expected)
        assert engine.experts.following == best
        before = engine.experts.count()[:, 5].sum()
        assert np.array_equal(all_work(engine), expected)
        assert (engine.experts.count()[:, 5].sum() == before) == (best == "static")


def test_a_run_without_a_device_imports_no_cache() -> None:
    code = (
        "import sys; from hybrid import LLM; LLM().generate('x'); print([m for m in sys.modules if 'gpu_cache' in m])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
