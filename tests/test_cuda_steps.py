"""Steps with the CUDA device on the stand-in: the bits of steps without one, whatever the order of completions.

The stand-in's memory is computed on by the kernels of the CPU, so every difference is a fault of the protocol.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from checkpoints import write_checkpoint
from cuda_rig import SlotCompute, put
from steps import open_engine
from stream_standin import StandIn
from test_hybrid_steps import (
    EMBEDDED,
    FAMILIES,
    all_work,
    assert_a_failure_in_a_lookup_is_forgotten,
    bits,
    work,
)

from gpu_cache.errors import DeviceFull
from gpu_cache.policies import POLICIES
from hybrid.commands.verify import PROMPTS, verify_model
from hybrid.config import CacheConfig, EngineConfig
from hybrid.engine.engine import Engine
from hybrid.errors import CapacityError, ConfigError, KernelError
from hybrid.machine import gpu as usable
from hybrid.plan.resolve import plan_model
from hybrid.plan.text import plan_text

CACHE = CacheConfig(14, 4, poison=True)


def on_cuda(cache: CacheConfig = CACHE, notice=None, **choices) -> Engine:
    return Engine.open(EngineConfig(**EMBEDDED, device="cuda", cache=cache, **choices), notice=notice)


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    with Engine.open(EngineConfig(**EMBEDDED)) as engine:
        return all_work(engine)


@pytest.mark.parametrize("seed", range(6))
def test_no_order_of_completions_changes_a_bit(expected, monkeypatch, seed) -> None:
    put(monkeypatch, seed=seed)
    with on_cuda() as engine:
        assert np.array_equal(all_work(engine), expected)
        engine.experts.table.check_integrity()
        assert engine.experts.count()[:, 1].sum() > 0


@pytest.mark.parametrize(
    "cache",
    [
        CacheConfig(1, 2, poison=True, delay=0),
        CacheConfig(14, 4, quota=0),
        CacheConfig(16, 8, prefetch="next-gate", poison=True),
        CacheConfig(14, 4, poison=True, pin_weights=True),
        CacheConfig("auto", poison=True, delay=3, strict_placement=True),
        CacheConfig(14, 4, stream="off", poison=True),
        CacheConfig(14, 4, stream="on", poison=True),
        CacheConfig(1, 2, stream="on", poison=True, delay=0, pin_weights=True),
        CacheConfig(16, 8, stream="on", prefetch="next-gate", poison=True, delay=2, quota=9),
    ],
    ids=str,
)
def test_every_scenario_gives_the_same_bits(expected, monkeypatch, cache) -> None:
    put(monkeypatch, seed=7)
    with on_cuda(cache) as engine:
        assert np.array_equal(all_work(engine), expected)
        engine.experts.table.check_integrity()


class Hasty(StandIn):
    """Says of everything that it has happened, and is slow."""

    at_once = 1

    def done(self, event) -> bool:
        super().done(event)
        return True

    def seconds(self, first, last) -> float:
        return 0.0


class Impatient(StandIn):
    """Does not wait for what the device computes."""

    def synchronise(self, event) -> None:
        if self._working:
            super().synchronise(event)

    def seconds(self, first, last) -> float:
        return 0.0


@pytest.mark.parametrize("broken", [Hasty, Impatient])
def test_a_broken_rule_changes_bits(expected, monkeypatch, broken) -> None:
    put(monkeypatch, broken)
    with on_cuda() as engine:
        assert not np.array_equal(all_work(engine), expected)


def test_slots_hold_the_bytes_of_their_experts(monkeypatch) -> None:
    put(monkeypatch)
    with on_cuda() as engine:
        list(work(engine, 3))
        experts = engine.experts
        experts.drain()
        where = [(slot, key) for key, slot in enumerate(experts.table._where) if slot >= 0]
        assert len(where) > 40
        for slot, key in where:
            for memory, piece in zip(experts.device.memory, experts._source(key), strict=True):
                assert np.array_equal(memory[slot], piece)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_with_biases_and_shared_experts(tmp_path, monkeypatch, family) -> None:
    path = write_checkpoint(tmp_path / "hf", family)
    with open_engine(path, tmp_path / "cache") as engine:
        wanted = bits(np.concatenate(list(work(engine, 3))))
    put(monkeypatch, seed=11)
    with open_engine(path, tmp_path / "cache", device="cuda", cache=CacheConfig("auto", poison=True)) as engine:
        for _ in range(2):
            assert np.array_equal(bits(np.concatenate(list(work(engine, 3)))), wanted)
        assert engine.experts.count()[:, 1].sum() > 0


def test_verify_passes(monkeypatch) -> None:
    put(monkeypatch)
    config = EngineConfig(**EMBEDDED, batch_invariant=True)  # a text is compared whole and token by token
    outcomes = verify_model(config, PROMPTS[:1], 6, device="cuda")
    assert len(outcomes) >= len(POLICIES) + 8
    same = {"median_error": 0.0, "far_tokens": 0.0, "agreeing_tokens": 1.0}
    assert all(outcome.difference is None and outcome.more == same for outcome in outcomes)
    assert sum(outcome.hit_rate > 0 for outcome in outcomes) > len(POLICIES)


def test_a_gpu_is_used_without_asking_for_it(expected, monkeypatch) -> None:
    put(monkeypatch)
    monkeypatch.delenv("HYBRID_DEVICE")
    monkeypatch.setattr(usable, "gpu_is_here", lambda: True)
    with Engine.open(EngineConfig(**EMBEDDED, cache=CACHE)) as engine:
        assert engine.plan.device_name == "cuda"
        assert np.array_equal(all_work(engine), expected)


def test_memory_that_others_took_since_the_plan_lowers_the_slots_with_a_line(expected, monkeypatch) -> None:
    plan = plan_model(EngineConfig(**EMBEDDED, device="simulated", cache=CACHE)).cache
    notes: list[str] = []
    put(monkeypatch, capacity=plan.slot_bytes * 30)
    with on_cuda(notice=notes.append) as engine:
        assert np.array_equal(all_work(engine), expected)
        slots = engine.experts.geometry.slots
        assert 14 <= slots <= 30
        assert f"note: the device has room for {slots} of the 56 slots that were planned" in notes


def test_a_device_without_room_for_one_slot_is_refused(monkeypatch) -> None:
    put(monkeypatch, capacity=100)
    with pytest.raises(CapacityError, match="not even one slot of .* fits the device"):
        on_cuda()


def test_a_device_that_is_lost_before_it_is_open_says_so(monkeypatch) -> None:
    put(monkeypatch, lost_after=1)
    with pytest.raises(KernelError, match="the device is lost: an illegal memory access"):
        on_cuda()


def test_auto_goes_on_with_the_cpu_where_the_gpu_cannot_be_opened(monkeypatch) -> None:
    notes: list[str] = []
    put(monkeypatch, capacity=100)
    monkeypatch.setattr(usable, "gpu_is_here", lambda: True)
    monkeypatch.delenv("HYBRID_DEVICE")
    with Engine.open(EngineConfig(**EMBEDDED, cache=CACHE), notice=notes.append) as engine:
        assert engine.plan.device_name == "cpu" and engine.experts is None
    (note,) = notes
    assert note.startswith("note: a GPU is here but not even one slot of") and note.endswith("going on with the CPU")


def test_more_slots_than_fit_are_refused_with_what_is_free(monkeypatch) -> None:
    put(monkeypatch, room=10**6)
    with pytest.raises(
        ConfigError, match=r"56 slots of .*; \d+ fit the [0-9.]+ .B that others have left free on the GPU"
    ):
        on_cuda()


def test_slots_cost_no_memory_of_the_host(monkeypatch) -> None:
    put(monkeypatch)
    cuda, simulated = (
        plan_model(EngineConfig(**EMBEDDED, device=device, cache=CACHE)) for device in ("cuda", "simulated")
    )
    assert simulated.fixed_bytes - cuda.fixed_bytes == simulated.cache.nbytes
    assert "simulated" not in plan_text(cuda)


class Greedy(SlotCompute):
    """A compute that needs more memory, twice."""

    asked = itertools.count(1)

    def begin(self, slot_ids) -> None:
        if next(self.asked) in (5, 100):
            raise DeviceFull("out of memory")
        super().begin(slot_ids)


def test_slots_are_given_back_when_the_device_runs_out_of_memory(expected, monkeypatch) -> None:
    Greedy.asked = itertools.count(1)
    made = put(monkeypatch, compute=Greedy)
    with on_cuda() as engine:
        assert np.array_equal(all_work(engine), expected)
        assert engine.experts.geometry.nways == 2 and len(made) == 3
        assert [streams.closed for streams in made] == [True, True, False]
        engine.experts.table.check_integrity()
        assert engine.experts.count()[:, 1].sum() > 0


def test_without_a_slot_left_to_give_back_the_cpu_goes_on_alone(expected, monkeypatch) -> None:
    Greedy.asked = itertools.count(1)
    put(monkeypatch, compute=Greedy)
    with on_cuda(CacheConfig(1, 1, mapping="prefix", poison=True)) as engine:
        assert np.array_equal(all_work(engine), expected)
        assert not engine.experts.placing


@pytest.mark.parametrize("calls", [300, 1000, 5000])
def test_a_lost_device_fails_the_step_and_the_cpu_takes_over(expected, monkeypatch, calls) -> None:
    made = put(monkeypatch)
    with on_cuda() as engine:
        made[0].lost_after = calls
        with pytest.raises(KernelError, match="device is lost: an illegal memory access .* on the CPU alone"):
            for _ in range(50):
                all_work(engine)
        for slot in range(8):
            engine.release(slot)
        assert not engine.experts.placing
        assert np.array_equal(all_work(engine), expected)


def test_a_failure_in_the_middle_of_a_lookup_is_raised_and_forgotten(expected, monkeypatch) -> None:
    put(monkeypatch, seed=3)
    with on_cuda() as engine:
        assert_a_failure_in_a_lookup_is_forgotten(engine, expected, monkeypatch)


def test_pinning_that_is_refused_is_said(monkeypatch) -> None:
    notes: list[str] = []
    put(monkeypatch, pinnable=1 << 20)
    with on_cuda(replace(CACHE, pin_weights=True), notice=notes.append):
        pass
    assert any("copies go through staging buffers instead" in note for note in notes)
