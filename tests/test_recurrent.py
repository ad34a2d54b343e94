"""Models with recurrent layers: as transformers computes them, the same bits however cut, states that are saved."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
from configs import CONFIGS
from steps import in_chunks, open_engine, step

ALL_ROUTED = {"num_experts_per_tok": 8}  # of 8: no near-tie decides
LINEAR = CONFIGS["kimi_linear"]["linear_attn_config"]
# By family, what is changed. As of published models: with few dimensions a key is at right angles to a query by chance,
# see test_formats_engine.py.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_next": ALL_ROUTED,
    "qwen3_5_moe_text": ALL_ROUTED,
    "qwen3_5_text": {},
    "olmo_hybrid": {},
    "kimi_linear": {**ALL_ROUTED, "linear_attn_config": {**LINEAR, "head_dim": 124}},
    "bailing_hybrid": {**ALL_ROUTED, "head_dim": 124, "topk_group": 2},
    "glm5_next_text": {**ALL_ROUTED, "linear_head_dim": 124, "index_topk": 64, "index_kpool": 16, "index_n_heads": 32},
    "qwen4_exp_text": {**ALL_ROUTED, "indexer_budget": 256},  # no near-tie of blocks decides
}


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> oracle.Oracle:
    """A prompt of many chunks of the rule, and of the 64 tokens that transformers takes together."""
    path = tmp_path_factory.mktemp(request.param) / "hf"
    return oracle.save(path, request.param, length=201, **FAMILIES[request.param])


def test_a_long_sequence_is_what_transformers_makes_of_it(saved) -> None:
    with open_engine(saved.path, saved.path.parent / "cache", chunk_size=256) as engine:
        whole = step(engine, (0, 0, saved.tokens))
        assert saved.error(whole) <= saved.bf16_error
        assert whole.tobytes() == in_chunks(engine, saved.tokens, 1, slot=1).tobytes()
        engine.release(1)
        assert whole.tobytes() == in_chunks(engine, saved.tokens, 13, slot=1).tobytes()
        step(engine, (2, 0, saved.tokens[::-1][:21]))
        beside = step(engine, (2, 21, saved.tokens[:1]), (3, 0, saved.tokens), (1, 201, saved.tokens[:7]))
        assert whole.tobytes() == beside[1:202].tobytes()
        engine.release(0)
        assert whole.tobytes() == step(engine, (0, 0, saved.tokens)).tobytes()


def test_every_instruction_set_agrees(isa, saved) -> None:
    with open_engine(saved.path, saved.path.parent / "cache", isa=isa, threads=3) as engine:
        logits = in_chunks(engine, saved.tokens, 100)
    assert saved.error(logits) <= saved.bf16_error


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_formats_of_integers_keep_the_bits_of_chunks(saved, format) -> None:
    with open_engine(saved.path, saved.path.parent / "cache", weight_format=format, chunk_size=256) as engine:
        whole = step(engine, (0, 0, saved.tokens))
        assert whole.tobytes() == in_chunks(engine, saved.tokens, 30, slot=1).tobytes()


def test_a_state_that_was_saved_goes_on_where_it_was(saved) -> None:
    """What a sequence did in between is undone; another sequence with the same keys and values may go on with it."""
    with open_engine(saved.path, saved.path.parent / "cache", chunk_size=256) as engine:
        kv = engine.addresses
        whole = step(engine, (0, 0, saved.tokens[:100]))
        for done in (3, 16):
            engine.release(0)
            step(engine, (0, 0, saved.tokens[:done]), (1, 0, saved.tokens[:done]))
            state = kv.snapshot(0)
            assert state.nbytes == engine.plan.kv.fixed_bytes and state.any()
            step(engine, (0, done, saved.tokens[::-1][:50]))
            kv.restore(0, state)
            assert whole[done:].tobytes() == step(engine, (0, done, saved.tokens[done:100])).tobytes()
            step(engine, (1, done, saved.tokens[::-1][:50]))
            kv.restore(1, state)
            assert whole[done:].tobytes() == step(engine, (1, done, saved.tokens[done:100])).tobytes()
            engine.release(1)
        for wrong in (state[:-1], state.astype(np.int8), state[None]):
            with pytest.raises(ValueError, match="is no snapshot; it must be uint8"):
                kv.restore(0, wrong)
        with pytest.raises(ValueError, match="sequence 9; it must be from 0 to "):
            kv.snapshot(9)


def test_memory_nodes_share_the_layers(saved) -> None:
    """Experts are summed in another order, and everything else is as it was."""
    with open_engine(saved.path, saved.path.parent / "cache", numa="2", chunk_size=256) as engine:
        whole = step(engine, (0, 0, saved.tokens))
        assert saved.error(whole) <= saved.bf16_error
        assert whole.tobytes() == in_chunks(engine, saved.tokens, 13, slot=1).tobytes()
