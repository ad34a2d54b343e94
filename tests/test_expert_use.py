"""How often each expert was used, as an engine counts it in every kind of step."""

from __future__ import annotations

import numpy as np
import pytest

from hybrid import EngineConfig, SamplingParams
from hybrid.config import CacheConfig
from hybrid.serving.llm import LLM

PROMPT = list(range(5, 45))
CONFIGS = {
    "cpu": EngineConfig(max_seq_len=256, threads=2, routes=True, speculate=False),
    "nodes": EngineConfig(max_seq_len=256, threads=2, routes=True, speculate=False, numa="2"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_what_the_routers_chose(name: str) -> None:
    with LLM.from_config(CONFIGS[name]) as llm:
        engine = llm.engine
        layers, experts = engine.expert_use().shape
        chosen = np.zeros((layers, experts), np.int64)
        engine.routes.observer = lambda step, layer, sequence, position, ids, weights, named: np.add.at(
            chosen[layer], ids.reshape(-1), 1
        )
        assert not engine.expert_use().any()
        llm.generate([PROMPT, PROMPT[:7]], SamplingParams(max_tokens=5, ignore_eos=True))
        assert (engine.expert_use() == chosen).all() and chosen.sum() == (47 + 8) * layers * engine.spec.top_k


def test_with_a_cache_it_is_the_steps_that_called_it() -> None:
    config = EngineConfig(
        device="simulated", cache=CacheConfig(2, 4, delay=0), max_seq_len=256, threads=1, speculate=False
    )
    with LLM.from_config(config) as llm:
        llm.generate(PROMPT, SamplingParams(max_tokens=6, ignore_eos=True))
        use = llm.engine.expert_use()
        layers = len(llm.engine.spec.moe_layers)
        assert use.shape[0] == layers and use.sum() == 5 * layers * llm.engine.spec.top_k
        llm.engine.experts.placing = False
        llm.generate(PROMPT[:9], SamplingParams(max_tokens=1))
        assert (llm.engine.expert_use() - use).sum() == 9 * layers * llm.engine.spec.top_k
