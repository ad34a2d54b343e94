"""Step-3.5-Flash and Step-3.7-Flash: what is published, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import FP8, gated, packed, random_tensors, write_tensors
from configs import CONFIGS
from configs.common import LLAMA3
from gguf_rig import gguf_metadata, gguf_tensors, write_gguf
from steps import in_chunks, open_engine, step

from hybrid.errors import ConfigError, WeightsError
from hybrid.formats.mix import MIXES
from hybrid.models import model_spec
from hybrid.models.rope import inverse_frequencies
from hybrid.weights.checkpoints.huggingface import Checkpoint
from hybrid.weights.checkpoints.opening import open_checkpoint

OURS = CONFIGS["step3p5"]
# The same model by the words of the published configuration, whose lists tell of a further layer.
PUBLISHED: dict[str, Any] = {
    "model_type": "step3p5", "vocab_size": 131, "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_attention_groups": 2, "head_dim": 24, "intermediate_size": 72, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6, "num_nextn_predict_layers": 1, "query_pre_attn_scalar": 16 * 24, "sliding_window": 20,
    "layer_types": [*OURS["layer_types"], "sliding_attention"], "use_head_wise_attn_gate": True,
    "attention_other_setting": {
        "attention_type": "sliding_attention", "num_attention_heads": 8, "num_attention_groups": 2, "head_dim": 24,
        "true_head_dim": 24,
    },
    "rope_theta": [5e5, 1e3, 1e3, 5e5, 1e3], "partial_rotary_factors": [0.5, 1.0, 1.0, 0.5, 1.0],
    "rope_scaling": LLAMA3, "yarn_only_types": ["full_attention"], "use_rope_layers": [True] * 5, "sink": False,
    "moe_layers_enum": "1,2, 3", "moe_num_experts": 8, "moe_top_k": 3, "moe_intermediate_size": 40,
    "share_expert_dim": 56, "moe_router_scaling_factor": 1.5, "moe_router_activation": "sigmoid",
    "swiglu_limits": [0.0, 0.3, None, 0.2, 0], "swiglu_limits_shared": [0.3, 0.0, 0.2, 0.0, 0],
}  # fmt: skip
WORDS = {
    ".mlp.experts.": ".moe.",
    ".mlp.gate.weight": ".moe.gate.weight",
    ".mlp.gate.e_score_correction_bias": ".moe.router_bias",
    ".mlp.shared_experts.": ".share_expert.",
}


def as_published(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By other names, with gates apart from ups, and a layer that predicts further tokens."""
    found: dict[str, np.ndarray] = {"model.layers.4.eh_proj.weight": np.zeros((96, 192), np.float32)}
    for name, array in tensors.items():
        for theirs, word in WORDS.items():
            name = name.replace(theirs, word)
        if name.endswith("gate_up_proj"):
            for part, half in zip(("gate", "up"), np.split(array, 2, axis=1), strict=True):
                found[name.replace("gate_up_proj", f"{part}_proj.weight")] = np.ascontiguousarray(half)
        else:
            found[f"{name}.weight" if name.endswith("moe.down_proj") else name] = array
    return found


def in_fp8(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Experts as numbers of 8 bits with a scale for each 128 by 128."""
    found, random = dict(tensors), np.random.default_rng(1)
    for name, array in tensors.items():
        if ".moe." in name and name.endswith("_proj.weight"):
            found[name] = (array * 300).astype(ml_dtypes.float8_e4m3fn)
            found[f"{name}_scale_inv"] = random.uniform(1e-3, 2e-3, (len(array), 1, 1)).astype(np.float32)
    return found


def same(one: Path, other: Path) -> bool:
    with packed(one) as ours, packed(other) as theirs:
        return list(ours.tensors) == list(theirs.tensors) and all(
            np.array_equal(ours.array(name), theirs.array(name)) for name in ours.tensors
        )


def test_published_words_and_tensors_are_those_of_transformers(tmp_path: Path) -> None:
    """Also as the text of Step-3.7-Flash, beside whose layers are those of a vision tower."""
    tensors, published = random_tensors(OURS), as_published(random_tensors(OURS))
    assert model_spec(PUBLISHED) == model_spec(OURS)
    assert not {name for name in published if ".mlp." in name and ".layers.0." not in name}
    ours = write_tensors(tmp_path / "ours", OURS, tensors)
    assert same(write_tensors(tmp_path / "theirs", PUBLISHED, published), ours)
    whole = {"model_type": "step3p7", "text_config": PUBLISHED, "vision_config": {"width": 1536}}
    towers = {"vision_model.conv1.weight": np.zeros(2, np.float32)}
    path = write_tensors(tmp_path / "whole", whole, published | towers)
    assert (
        same(path, ours) and "1 tensors of vision_model are not read" in open_checkpoint(path).notes(MIXES["bf16"])[0]
    )


def test_stacked_experts_in_fp8_are_taken_as_they_are(tmp_path: Path) -> None:
    tensors = in_fp8(as_published(random_tensors(OURS)))
    path = write_tensors(tmp_path / "hf", {**PUBLISHED, "quantization_config": FP8}, tensors)
    checkpoint = Checkpoint.open(path)
    assert (checkpoint.native.experts, checkpoint.native.attention) == ("fp8", "bf16")
    own = "model.layers.2.moe.{}_proj.weight"
    for source, part in zip(gated(checkpoint, 2, 5), ("gate", "up", "down"), strict=True):
        values = tensors[own.format(part)][5].astype(np.float32) * tensors[f"{own.format(part)}_scale_inv"][5]
        assert (source.floats(0, source.count) == values).all()
    packed(path).close()


def test_stacked_experts_in_nvfp4_are_taken_as_they_are(tmp_path: Path) -> None:
    """With a scale of all for each expert, or one for all of them, and scales of activations, which nothing reads."""
    config, random = {**OURS, "moe_intermediate_size": 48}, np.random.default_rng(2)
    tensors = as_published(random_tensors(config))
    for name in [name for name in tensors if ".moe." in name and name.endswith("_proj.weight")]:
        experts, rows, columns = tensors[name].shape
        tensors[name] = random.integers(0, 256, (experts, rows, columns // 2), np.uint8)
        scales = random.uniform(0.5, 2, (experts, rows, columns // 16)).astype(ml_dtypes.float8_e4m3fn)
        tensors |= {f"{name}_scale": scales, f"{name}_scale_2": random.uniform(0.01, 0.02, experts).astype(np.float32)}
        tensors[f"{name.removesuffix('weight')}input_scale"] = np.ones(1, np.float32)
    of_all = np.float32(0.0125)
    tensors["model.layers.2.moe.down_proj.weight_scale_2"] = np.array(of_all)
    words = {"moe_intermediate_size": 48, "quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}
    checkpoint = Checkpoint.open(write_tensors(tmp_path / "hf", {**PUBLISHED, **words}, tensors))
    assert checkpoint.native.experts == "nvfp4"
    name = "model.layers.1.moe.up_proj.weight"
    codes = np.stack([tensors[name][6] & 15, tensors[name][6] >> 4], axis=-1).reshape(48, 6, 16)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32) * tensors[f"{name}_scale"][6, :, :, None]
    up = gated(checkpoint, 1, 6)[1]
    assert np.allclose(up.floats(0, 48), values.reshape(48, 96) * tensors[f"{name}_scale_2"][6], rtol=1e-6)
    name = "model.layers.2.moe.down_proj.weight"
    codes = np.stack([tensors[name][5] & 15, tensors[name][5] >> 4], axis=-1).reshape(96, 3, 16)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32) * tensors[f"{name}_scale"][5, :, :, None]
    assert np.allclose(gated(checkpoint, 2, 5)[2].floats(0, 96), values.reshape(96, 48) * of_all, rtol=1e-6)
    packed(tmp_path / "hf").close()


@pytest.mark.parametrize("part", ["gate_proj.weight", "down_proj.weight", "up_proj.weight_scale_inv"])
def test_stacks_of_another_number_of_experts_are_refused(tmp_path: Path, part: str) -> None:
    tensors = in_fp8(as_published(random_tensors(OURS)))
    name = f"model.layers.3.moe.{part}"
    path = write_tensors(
        tmp_path / "hf", {**PUBLISHED, "quantization_config": FP8}, tensors | {name: tensors[name][:7]}
    )
    with pytest.raises(
        WeightsError, match="stacks 7 experts, config.json says 8: one of them belongs to another model"
    ):
        Checkpoint.open(path)


def test_an_expert_alone_beside_its_stack_is_refused(tmp_path: Path) -> None:
    alone = {"model.layers.1.mlp.experts.3.gate_proj.weight": np.zeros((40, 96), np.float32)}
    path = write_tensors(tmp_path / "hf", PUBLISHED, as_published(random_tensors(OURS)) | alone)
    with pytest.raises(
        WeightsError, match="has tensor .*experts.3.gate_proj.weight twice, alone and in a stack"
    ) as error:
        Checkpoint.open(path)
    assert "\n" not in str(error.value)


def test_a_prompt_makes_the_same_bits_in_chunks_and_among_others(tmp_path: Path, isa: str) -> None:
    tokens, others = np.random.default_rng(3).integers(0, 131, (2, 60))
    with open_engine(write_tensors(tmp_path / "hf", OURS, random_tensors(OURS)), tmp_path, isa=isa) as engine:
        whole = step(engine, (0, 0, tokens))
        assert in_chunks(engine, tokens, 7, slot=1).tobytes() == whole.tobytes()
        assert step(engine, (2, 0, others), (3, 0, tokens))[60:].tobytes() == whole.tobytes()


def test_factors_of_a_file_are_those_of_what_turns_where_nothing_slides(tmp_path: Path) -> None:
    """A file has as many as all of a head would need."""
    spec = model_spec(OURS)
    ropes = [layer.mixer.rope for layer in spec.layers]
    wanted = [inverse_frequencies(rope)[0] for rope in ropes]  # type: ignore[arg-type]
    factors = 1 / wanted[0] / np.float32(5e5) ** (np.arange(0, 12, 2) / 12)
    more = {"rope_freqs.weight": np.concatenate([factors, np.ones(6)]).astype(np.float32)}
    path = write_gguf(tmp_path / "model.gguf", gguf_metadata(OURS), gguf_tensors(OURS, random_tensors(OURS)) | more)
    found = [inverse_frequencies(layer.mixer.rope)[0] for layer in open_checkpoint(path).spec.layers]  # type: ignore[attr-defined]
    assert max(factors) > 1.5
    assert all(np.allclose(one, other, rtol=1e-6) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_head_wise_attn_gate": False}, "use_head_wise_attn_gate is False; it must be absent or True"),
        ({"gating": "per-element"}, "gating is 'per-element'; .* per-head"),
        ({"moe_router_activation": "softmax"}, "moe_router_activation is 'softmax'; .* sigmoid"),
        ({"use_moe_router_bias": False}, "use_moe_router_bias is False; it must be absent or True"),
        ({"yarn_only_types": []}, r"yarn_only_types is \[\]; it must be absent or \['full_attention'\]"),
        ({"use_rope_layers": [True, False]}, r"use_rope_layers is \[True, False\]; .* a list of true"),
        ({"moe_layers_enum": "1,x"}, "moe_layers_enum is '1,x'; it must be numbers of layers"),
        ({"moe_layers_enum": 3}, "moe_layers_enum is 3; it must be numbers of layers"),
        ({"swiglu_limits": [7.0]}, r"swiglu_limits is \[7.0\]; .* for each of 4 layers"),
        ({"rope_theta": [1e4]}, r"rope_theta is \[10000.0\], which has no number for layer 1"),
        ({"partial_rotary_factors": [0.5, 2.0, 1.0, 0.5]}, "partial_rotary_factor 2 of heads of 24 dimensions"),
        ({"num_sliding_attention_heads": 5}, "layer 1 has 5 query heads, which is no multiple of .* 2"),
        ({"attention_other_setting": {"num_attention_groups": 4}}, "num_attention_groups is 4; .* absent or 2"),
        ({"per_layer_config": {"1": {"head_dim": 8}}}, "per_layer_config is .* its num_attention_heads, and nothing"),
        ({"per_layer_config": {"1": {"num_attention_heads": 7}}}, "layer 1 has 7 query heads"),
        ({"layer_types": ["linear_attention"] * 4}, "layer_types is .* full_attention, sliding_attention"),
        ({"mlp_bias": True}, "mlp_bias is True; it must be absent or False"),
    ],
    ids=str,
)
def test_what_no_published_model_has_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        model_spec({**PUBLISHED, **changes})
    assert "\n" not in str(error.value)


def test_query_heads_may_be_told_by_layer() -> None:
    saved = {"per_layer_config": {"2": {"num_attention_heads": 4}}}
    assert [layer.mixer.heads for layer in model_spec({**OURS, **saved}).layers] == [6, 6, 4, 6]  # type: ignore[attr-defined]


@pytest.mark.parametrize("ropes", [{}, {"sliding_attention": {"rope_type": "default", "rope_theta": 7.0}}])
def test_lists_tell_the_ropes_if_one_kind_of_layer_has_none(ropes: dict[str, Any]) -> None:
    assert model_spec({**PUBLISHED, "rope_parameters": ropes}) == model_spec(PUBLISHED)


def test_experts_with_bounds_are_not_cached(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "hf", OURS, random_tensors(OURS))
    with pytest.raises(ConfigError, match="bound what experts make, which no cache knows of; use --device cpu"):
        open_engine(path, tmp_path, device="simulated")
