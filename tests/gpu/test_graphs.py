"""Steps by CUDA graphs, for which a stand-in notes and repeats: the bits of steps without, whatever comes between."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from cuda_rig import put
from steps import open_engine, step

pytest.importorskip("triton", reason="triton is not installed: pip install '.[live]'")
torch = pytest.importorskip("torch", reason="torch is not installed: pip install '.[live]'")

from gpu.test_step_experts import OnStandIn, one_torch_thread  # noqa: E402, F401  the latter for every test
from graph_standin import StandInCapture  # noqa: E402

from gpu_cache.errors import DeviceFull  # noqa: E402
from hybrid.commands.timeline import Timeline  # noqa: E402
from hybrid.config import CacheConfig  # noqa: E402
from hybrid.engine.engine import Engine  # noqa: E402
from hybrid.gpu import graphs  # noqa: E402
from hybrid.gpu.inputs import StepInputs  # noqa: E402

if torch.cuda.is_available():
    pytest.skip("tests of a stand-in: here is a GPU", allow_module_level=True)

FAMILIES = ["qwen3_moe", "qwen2_moe", "gpt_oss", "llama", "deepseek_v3", "gemma3_text"]
STEP = {"step_on": "torch-cpu"}
CACHE = CacheConfig(2, 6, delay=0, poison=True)


@pytest.fixture
def capture(monkeypatch) -> StandInCapture:
    made = StandInCapture()
    monkeypatch.setattr("hybrid.gpu.opening.capture_on", lambda device: made)
    return made


def work(engine: Engine) -> np.ndarray:
    """Sequences that come and go, in steps of several shapes, with prompts and a rewind in between."""
    tokens = np.random.default_rng(0).integers(0, 131, (4, 100))
    at = [0] * 4

    def some(*slots: int, rows: int = 1) -> np.ndarray:
        parts = [(slot, at[slot], tokens[slot, at[slot] : at[slot] + rows]) for slot in slots]
        for slot in slots:
            at[slot] += rows
        return step(engine, *parts)

    found = [some(0, 1, rows=7)]
    found += [some(0, 1) for _ in range(3)]
    found += [some(3, rows=5)]
    found += [part for _ in range(3) for part in (some(0, 1, 3), some(1, 3))]  # adjacent rings and others
    engine.release(1)
    at[1], at[3] = 0, 5  # anew, and back
    found += [some(1, 3, rows=2)]
    found += [some(0, 1, 3) for _ in range(3)]
    for slot in range(4):
        engine.release(slot)
    return np.concatenate(found)


def short_work(engine: Engine) -> np.ndarray:
    """The same in few steps: the interpreter takes its time."""
    tokens = np.arange(50) * 7 % 131
    found = [step(engine, (0, 0, tokens[:5]), (2, 0, tokens[5:7]))]
    found += [step(engine, (0, i, tokens[i : i + 1])) for i in range(5, 8)]
    found += [step(engine, (1, 0, tokens[:6])), *(step(engine, (0, i, tokens[i : i + 1])) for i in range(8, 10))]
    return np.concatenate(found)


def opened(tmp_path: Path, family: str = "qwen3_moe", **choices: Any) -> Engine:
    path = tmp_path / "hf"
    if not path.exists():
        write_checkpoint(path, family)
    return open_engine(path, tmp_path / "cache", **choices)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_steps_have_the_bits_of_plain_ones(tmp_path, monkeypatch, family) -> None:
    with opened(tmp_path, family, **STEP) as engine:
        wanted = work(engine)
        assert engine.device_step.graphs.replayed == 0
    capture = StandInCapture()
    monkeypatch.setattr("hybrid.gpu.opening.capture_on", lambda device: capture)
    with opened(tmp_path, family, **STEP) as engine:
        assert all(same_bits(work(engine), wanted) for _ in range(2))
        made = engine.device_step.graphs
        assert made.problem is None and made.replayed > 30
        assert 0 < capture.captured < made.replayed / 2


def test_layers_that_cross_in_every_step_are_not_captured(tmp_path, capture) -> None:
    """Nor those between them, whose graphs would read what lies elsewhere in every step."""
    with opened(tmp_path, "lfm2", step_on="threads") as engine:
        wanted = work(engine)
    with opened(tmp_path, "lfm2", **STEP) as engine:
        found = work(engine)
        assert np.linalg.norm(found - wanted) < 0.02 * np.linalg.norm(wanted)
        assert engine.device_step.graphs.replayed == 0 and capture.captured == 0


@pytest.mark.parametrize("cache", [CACHE, CacheConfig(2, 6, delay=3, strict_placement=True)], ids=str)
def test_experts_that_the_device_finds_are_captured_too(tmp_path, monkeypatch, cache) -> None:
    put(monkeypatch, compute=OnStandIn, step_device="cpu")
    with opened(tmp_path, device="cuda", cache=cache) as engine:
        wanted = short_work(engine)
        hits = engine.experts.count()[:, 1].sum()
    put(monkeypatch, compute=OnStandIn, step_device="cpu", seed=5)
    monkeypatch.setattr("hybrid.gpu.opening.capture_on", lambda device: StandInCapture())
    with opened(tmp_path, device="cuda", cache=cache) as engine:
        assert same_bits(short_work(engine), wanted)
        kept = engine.device_step.graphs._kept.values()
        assert any(key[0] == "experts" and found for kept in kept for key, found in kept.works.items())
        assert engine.experts.count()[:, 1].sum() == hits > 10


def test_without_graphs_every_step_is_plain(tmp_path, monkeypatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("hybrid.gpu.opening.capture_on", asked.append)
    with opened(tmp_path, **STEP, cuda_graphs=False) as engine:
        assert not engine.plan.cuda_graphs and not asked


def test_a_run_says_how_a_device_computed_it(tmp_path, capture) -> None:
    with opened(tmp_path, **STEP) as engine:
        work(engine)
        report = engine.device_report()
    assert str(report).startswith("device       attention by torch to decode, by torch for prompts; ")
    assert str(report).endswith(f"; {report.replayed} works by CUDA graphs") and report.replayed > 30
    told = replace(report, decoding_seconds={"split": 3e-5, "torch": 1e-5}, replayed=0, notes=("no graphs",))
    assert "attention by torch (us: torch 10, split 30) to decode" in str(told)
    assert str(told).endswith("; no CUDA graphs\n             no graphs") and told.to_dict()["decoding"] == "torch"


def test_inputs_that_are_not_renewed_are_found_out(tmp_path, capture, monkeypatch) -> None:
    with opened(tmp_path, **STEP) as engine:
        wanted = work(engine)
    monkeypatch.setattr(StepInputs, "copy_from", lambda mine, other: mine)
    with opened(tmp_path, **STEP) as engine:
        assert not same_bits(work(engine), wanted)


def test_what_cannot_be_captured_is_done_plainly_and_said(tmp_path, capture, monkeypatch) -> None:
    from hybrid.gpu.layers import feed_forward

    with opened(tmp_path, **STEP) as engine:
        wanted = work(engine)
    norm = feed_forward.some_norm

    def waiting(x, *rest) -> Any:
        float(x.sum())  # the host waits for it
        return norm(x, *rest)

    monkeypatch.setattr(feed_forward, "some_norm", waiting)
    with opened(tmp_path, **STEP) as engine:
        assert same_bits(work(engine), wanted)
        made = engine.device_step.graphs
        assert made.replayed == 0 and "not captured in CUDA graphs (operation not permitted" in made.problem
        assert made.problem in engine.notes


def test_shapes_that_were_not_seen_for_longest_go(tmp_path, capture, monkeypatch) -> None:
    monkeypatch.setattr(graphs, "SHAPES", 2)
    with opened(tmp_path, **STEP) as engine:
        for _ in range(3):
            for slot in range(3):
                step(engine, (slot, 0, np.array([5])))
        assert len(engine.device_step.graphs._kept) == 2 and capture.captured == 0
        for _ in range(3):
            step(engine, (2, 0, np.array([5])))
        assert capture.captured > 0


def test_slots_that_are_given_back_take_their_graphs_with_them(tmp_path, capture, monkeypatch) -> None:
    class Full(OnStandIn):
        left = 9

        def run_looked_up(self, *arguments) -> None:
            Full.left -= 1
            if Full.left == 0:
                raise DeviceFull("out of memory")
            super().run_looked_up(*arguments)

    put(monkeypatch, compute=OnStandIn, step_device="cpu")
    with opened(tmp_path, device="cuda", cache=CACHE) as engine:
        wanted = short_work(engine)
    put(monkeypatch, compute=Full, step_device="cpu")
    with opened(tmp_path, device="cuda", cache=CACHE) as engine:
        found = short_work(engine)
        assert Full.left < 0 and engine.experts.geometry.slots < 12
        errors = np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
        assert np.median(errors) < 0.02  # near-ties of experts apart
        assert engine.device_step.graphs.replayed > 5


def test_steps_that_are_watched_are_plain(tmp_path, capture) -> None:
    timeline = Timeline()
    with opened(tmp_path, **STEP) as engine:
        engine.watch(timeline)
        for position in range(3):
            step(engine, (0, position, np.array([5])))
        assert capture.captured == 0 and {span.what for span in timeline.spans} >= {"attention", "route", "head"}
        engine.watch(None)
        for position in range(3, 6):
            step(engine, (0, position, np.array([5])))
        assert engine.device_step.graphs.replayed > 0
