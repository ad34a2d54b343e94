"""What GET /cache tells of the expert cache and of kept conversations."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")

from server_rig import QUESTION, running  # noqa: E402

from hybrid import EngineConfig  # noqa: E402
from hybrid.config import CacheConfig  # noqa: E402
from hybrid.serving.llm import LLM  # noqa: E402


def test_the_expert_cache_by_layer() -> None:
    config = EngineConfig(device="simulated", cache=CacheConfig(2, 4, delay=0), max_seq_len=256, threads=1)
    with running(LLM.from_config(config)) as server:
        before = server.http.get("/cache").json()["experts"]
        assert before["total"]["calls"] == 0 and before["geometry"]["slots"] == 8
        server.post("/v1/chat/completions", messages=QUESTION, max_tokens=12, temperature=0)
        told = server.http.get("/cache").json()
        experts = told["experts"]
        assert told["reason"] is None and experts["active"] and experts["policy"] and 0 < experts["slots_in_use"] <= 8
        assert [layer["layer"] for layer in experts["layers"]] == list(server.service.llm.llm.engine.spec.moe_layers)
        for name, total in experts["total"].items():
            assert total == sum(layer[name] for layer in experts["layers"])
        total = experts["total"]
        assert total["calls"] == total["hits"] + total["loading"] + total["misses"] > 0
        assert experts["hit_rate"] == total["hits"] / total["calls"]


def test_kept_conversations_and_why_there_is_no_expert_cache() -> None:
    with running(LLM()) as server:
        assert server.http.get("/cache").json()["kept"]["lengths"] == []
        reply = server.post("/v1/chat/completions", messages=QUESTION, max_tokens=3).json()
        told = server.http.get("/cache").json()
        assert told["experts"] is None and "--device" in told["reason"]
        (length,) = told["kept"]["lengths"]
        assert told["kept"]["sequences"] == 1 and told["kept"]["tokens"] == length
        assert 0 < reply["usage"]["total_tokens"] - length <= 1
    with running(None) as server:
        assert server.http.get("/cache").status_code == 503


def test_prompts_that_are_kept_beyond_the_sequences() -> None:
    question = [{"role": "user", "content": "Tell me a story of a king, a horse and the sea. " * 3}]
    with running(LLM()) as server:
        used = server.post("/v1/chat/completions", messages=question, max_tokens=3).json()["usage"]
        kept = server.http.get("/cache").json()["prefixes"]
        assert 0 < kept["bytes"] < kept["limit"] and kept["hits"] == kept["evicted"] == 0
        assert (used["total_tokens"] - 1) // 16 * 16 == kept["tokens"] > 32
        llm = server.service.llm.llm
        llm.run(llm.loop._worker.scheduler._admission._give_up_oldest)
        again = server.post("/v1/chat/completions", messages=question, max_tokens=3).json()["usage"]
        assert again["prompt_tokens_details"]["cached_tokens"] == (used["prompt_tokens"] - 1) // 16 * 16
        assert server.http.get("/cache").json()["prefixes"]["hits"] == 1
        metrics = server.http.get("/metrics").text
        assert f"hybrid_prefix_bytes {float(kept['bytes'])}" in metrics and "hybrid_prefix_hits_total 1.0" in metrics
