"""Qwen3-Next and Qwen3.5: how their tensors are published, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoints import FP8, as_fp8, dequantised, packed, random_tensors, write_tensors
from configs import CONFIGS
from gguf_rig import gguf_metadata, gguf_tensors, write_gguf, write_model
from steps import open_engine, step

from hybrid.errors import ConfigError, WeightsError
from hybrid.formats import FORMATS
from hybrid.models import model_spec


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
