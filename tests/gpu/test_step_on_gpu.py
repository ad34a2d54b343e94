"""A step on a real GPU: the logits of the threads, a mirror that leaves tokens behind, costs that can be."""

from __future__ import annotations

import numpy as np
import pytest
from steps import agreement, greedy, in_chunks, step

torch = pytest.importorskip("torch", reason="torch is not installed: pip install '.[live]'")

from hybrid.commands.timeline import Timeline, busy_seconds  # noqa: E402
from hybrid.commands.tolerance import measure_logit_error  # noqa: E402
from hybrid.config import CacheConfig, EngineConfig  # noqa: E402
from hybrid.engine.engine import Engine  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use"),
]
TOKENS = np.random.default_rng(0).integers(0, 1000, 300)
SIZES = {"threads": 2, "max_batch": 2, "chunk_size": 64, "max_seq_len": 512}


def on_gpu(**choices) -> Engine:
    return Engine.open(EngineConfig(**SIZES, device="cuda", **choices))


@pytest.mark.parametrize("kv_tokens", [None, 64], ids=["all mirrored", "64 mirrored"])
@pytest.mark.parametrize("mode", ["on", "off"])
def test_logits_are_near_those_of_the_threads(kv_tokens, mode) -> None:
    with Engine.open(EngineConfig(**SIZES)) as engine:
        wanted = in_chunks(engine, TOKENS, 64)
    with on_gpu(gpu_kv_tokens=kv_tokens, cache=CacheConfig(14, 4, mode=mode)) as engine:
        found = in_chunks(engine, TOKENS, 64)
    assert measure_logit_error(found, wanted).problem is None


def test_text_is_that_of_the_threads() -> None:
    prompt = np.arange(3, 40)
    with Engine.open(EngineConfig(**SIZES)) as engine:
        text = np.concatenate([prompt, greedy(engine, prompt, 16, count=60)])
    with on_gpu(cache=CacheConfig(14, 4)) as engine:
        assert agreement(engine, text, len(prompt)) > 0.9
        assert engine.device_step.graphs.replayed > 0 and not engine.notes


def test_spans_of_a_step_are_those_of_the_device() -> None:
    timeline = Timeline()
    with on_gpu(cache=CacheConfig(14, 4)) as engine:
        step(engine, (0, 0, TOKENS[:20]))
        engine.watch(timeline)
        step(engine, (0, 20, TOKENS[20:21]))
        engine.watch(None)
    spans = timeline.between(min(s.start for s in timeline.spans), max(s.end for s in timeline.spans))
    assert {span.what for span in spans} >= {"attention", "route", "join", "head"}
    assert busy_seconds(spans, "device") > 0 and busy_seconds(spans, "threads") > 0


def test_costs_are_measured(tmp_path) -> None:
    with on_gpu(cache=CacheConfig(14, 4), cache_dir=tmp_path) as engine:
        link, costs = engine.profile.link, engine.experts.costs
    assert 1e7 < link.to_device < 1e12 and 1e7 < link.to_host < 1e12
    assert costs.copy > link.latency > 0 and costs.device >= 0 and costs.cpu > 0
