"""Qwen3-Next and Qwen3.5: as transformers computes them, the same bits however cut, states that are saved, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import oracle
import pytest
from checkpoints import CONFIGS, FP8, as_fp8, dequantised, packed, random_tensors, write_tensors
from gguf_rig import gguf_metadata, gguf_tensors, write_gguf, write_model
from steps import in_chunks, open_engine, step

from hybrid.errors import ConfigError, WeightsError
from hybrid.formats import FORMATS
from hybrid.models import model_spec

ALL_ROUTED = {"num_experts_per_tok": 8}  # of 8: no near-tie decides


@pytest.fixture(scope="module", params=["qwen3_next", "qwen3_5_moe_text", "qwen3_5_text"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> oracle.Oracle:
    """A prompt of many chunks of the rule, and of the 64 tokens that transformers takes together."""
    changes = {} if request.param == "qwen3_5_text" else ALL_ROUTED
    path = tmp_path_factory.mktemp(request.param) / "hf"
    return oracle.save(path, request.param, length=201, **changes)


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


def test_projections_by_key_head_are_taken_apart_as_published(tmp_path: Path) -> None:
    """In fp8, squares end where parts of heads do; betas and decays are floats."""
    sizes = {"hidden_size": 192, "linear_key_head_dim": 128, "linear_value_head_dim": 64}
    config = {**CONFIGS["qwen3_next"], **sizes, "quantization_config": FP8}
    tensors = random_tensors(config)
    names = ("in_proj_qkvz.weight", "in_proj_ba.weight")
    qkvz, ba = (f"model.layers.0.linear_attn.{name}" for name in names)
    tensors = as_fp8({name.replace("in_proj_qkvz", "qkvz_proj"): tensor for name, tensor in tensors.items()})
    tensors = {name.replace("qkvz_proj", "in_proj_qkvz"): tensor for name, tensor in tensors.items()}
    store = packed(write_tensors(tmp_path / "fp8", config, tensors))
    assert store.mix.attention == "fp8"
    grouped = dequantised(tensors, qkvz).reshape(2, 2 * 128 + 2 * 2 * 64, 192)
    parts = np.split(grouped, [128, 256, 384], axis=1)
    wanted = np.concatenate([part.reshape(-1, 192) for part in parts])
    assert np.array_equal(FORMATS["fp8"].unpack(store.array("layers.0.delta.in"), 1024, 192), wanted)
    both = tensors[ba].astype(np.float32).reshape(2, 2, 2, 192).transpose(1, 0, 2, 3)
    assert np.array_equal(store.array("layers.0.delta.decays").reshape(2, 2, 2, 192), both)


@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3_5_moe_text"])
def test_value_heads_of_gguf_files_lie_in_turn(tmp_path: Path, family) -> None:
    """What they add to the residual stream is summed in another order."""
    config = {**CONFIGS[family], "linear_num_key_heads": 2, "linear_num_value_heads": 6}
    tensors = random_tensors(config)
    paths = [write_tensors(tmp_path / "hf", config, tensors), write_model(tmp_path / "model.gguf", config, tensors)]
    logits = []
    for path in paths:
        with open_engine(path, tmp_path / "cache") as engine:
            assert engine.spec.layers[1].mixer.in_turn == path.name.endswith("gguf")
            logits.append(step(engine, (0, 0, np.arange(40))))
    assert np.linalg.norm(logits[1] - logits[0]) < 0.01 * np.linalg.norm(logits[0])


@pytest.mark.parametrize("rate", [0.0, 0.5, -np.inf])
def test_decays_of_gguf_files_that_do_not_decay_are_refused(tmp_path: Path, rate) -> None:
    config = CONFIGS["qwen3_5_text"]
    tensors = gguf_tensors(config, random_tensors(config))
    tensors["blk.0.ssm_a"] = np.full_like(tensors["blk.0.ssm_a"], rate)
    path = write_gguf(tmp_path / "model.gguf", gguf_metadata(config), tensors)
    with pytest.raises(WeightsError, match=r"tensor blk\.0\.ssm_a holds NaN or infinity"):
        open_engine(path, tmp_path / "cache")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen3_next", {"linear_num_value_heads": 3}, "linear_num_value_heads 3 is not a multiple of"),
        ("qwen3_next", {"linear_key_head_dim": 257}, "linear_key_head_dim is 257; it must be an integer from 1 to 256"),
        ("qwen3_next", {"linear_conv_kernel_dim": 9}, "linear_conv_kernel_dim is 9; it must be an integer from 2 to 8"),
        ("qwen3_next", {"attn_output_gate": False}, "attn_output_gate is False; it must be absent or True"),
        ("qwen3_next", {"layer_types": ["conv"] * 4}, "a list of 4 of full_attention, linear_attention"),
        ("qwen3_next", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("qwen3_5_moe_text", {"partial_rotary_factor": 0.3}, "turns 7; it must be an even number of them"),
    ],
)
def test_what_the_families_do_not_compute_is_refused(family, changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        model_spec({**CONFIGS[family], **changes})
