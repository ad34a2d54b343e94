"""Layers that a published quantisation leaves out are packed as they are stored, however config.json names them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import (
    FP8,
    as_fp8,
    dequantised,
    gated,
    mxfp4_tensors,
    mxfp4_values,
    packed,
    random_tensors,
    write_tensors,
)
from configs import CONFIGS
from test_published import FP8_CONFIG, MXFP4, MXFP4_CONFIGS, expert, matrix, names_of

from hybrid import LLM
from hybrid.errors import ConfigError, WeightsError
from hybrid.formats.mix import MIXES, FormatMix
from hybrid.formats.packed import matrix_formats
from hybrid.models import model_spec
from hybrid.weights.checkpoints.exact_mix import Kind, exact_mix
from hybrid.weights.checkpoints.huggingface import Checkpoint
from hybrid.weights.checkpoints.published import native_mix
from hybrid.weights.pack import model_formats, pack

O_PROJ = "model.layers.1.self_attn.o_proj"
SPELLINGS: dict[str, dict[str, Any]] = {
    "module": {"modules_to_not_convert": [O_PROJ]},
    "tensor": {"modules_to_not_convert": [f"{O_PROJ}.weight"]},
    "beginning": {"modules_to_not_convert": ["model.layers.1.self_attn"]},
    "short": {"modules_to_not_convert": ["o_proj"]},
    "end": {"modules_to_not_convert": ["self_attn.o_proj"]},
    "wildcard": {"modules_to_not_convert": ["model.layers.*.o_proj"]},
    "expression": {"modules_to_not_convert": ["re:.*1.*o_proj$"]},
    "transformers' expression": {"modules_to_not_convert": ["model.layers.\\d+.self_attn"]},
    "other field": {"ignored_layers": [O_PROJ]},
    "another field": {"ignore": ["re:.*o_proj"]},
    "without model.": {"modules_to_not_convert": ["layers.1.self_attn.o_proj"]},
    "null": {"modules_to_not_convert": None},
    "not at all": {},
}


def bf16_in(parts: dict[int, list[str]], usual: FormatMix = MIXES["fp8"], layers: int = 3) -> FormatMix:
    """The usual formats, but for these parts of some layers."""
    return FormatMix.of_layers([usual.with_parts(dict.fromkeys(parts.get(i, ()), "bf16")) for i in range(layers)])


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_what_is_stored_decides_what_is_quantised(tmp_path: Path, spelling: str) -> None:
    config = {**FP8_CONFIG, "quantization_config": {**FP8, **SPELLINGS[spelling]}}
    tensors = as_fp8(random_tensors(config), keep=("layers.1.self_attn.o_proj",))
    source = write_tensors(tmp_path / "hf", config, tensors, shards=2)
    expected = FormatMix.of_layers(
        [replace(MIXES["fp8"], attention=name) for name in ("fp8", "fp8/fp8/fp8/bf16", "fp8")]
    )
    assert Checkpoint.open(source).native == model_formats(source) == expected
    with packed(source) as store:
        assert store.mix == expected
        stored = tensors[f"{O_PROJ}.weight"].astype(np.float32)
        assert (matrix(store, "layers.1.attention.out", *stored.shape) == stored).all()
        name = names_of(2, 7)[2]
        assert (expert(store, 2, 7)[2] == dequantised(tensors, name)).all()


@pytest.mark.parametrize(
    ("keep", "changed"),  # formats of attention and feed-forward
    [
        (("layers.0.mlp.experts.7.up_proj",), {0: ("fp8", "bf16/fp8")}),  # one matrix of one expert
        (("layers.2.mlp.experts",), {2: ("fp8", "bf16")}),
        (("layers.1.mlp",), {1: ("fp8", "bf16")}),
        (("layers.2.self_attn.k_proj",), {2: ("fp8/bf16/fp8/fp8", "fp8")}),  # between q and v
        (("layers.0.",), {0: ("bf16", "bf16")}),
        ((), {}),
    ],
)
def test_what_was_left_out_is_bf16_and_the_experts_beside_it(
    tmp_path: Path, keep: tuple[str, ...], changed: dict[int, tuple[str, str]]
) -> None:
    config = {**FP8_CONFIG, "quantization_config": FP8}
    tensors = as_fp8(random_tensors(config), keep=keep)
    with packed(write_tensors(tmp_path / "hf", config, tensors)) as store:
        mixes = [store.mix.of_layer(layer) for layer in range(3)]
        own = [(mix.attention, mix.dense if layer == 1 else mix.experts) for layer, mix in enumerate(mixes)]
        assert own == [changed.get(layer, ("fp8", "fp8")) for layer in range(3)] and store.mix.head == "bf16"
        for layer, index in ((0, 7), (1, 0), (2, 3)):
            for found, name in zip(expert(store, layer, index), names_of(layer, index, layer != 1), strict=True):
                exact = dequantised(tensors, name)
                kept = matrix_formats(own[layer][1])["down_proj" in name] == "bf16"
                assert (found == (exact.astype("bfloat16") if kept else exact)).all()
        exact = [dequantised(tensors, f"model.layers.2.self_attn.{which}_proj.weight") for which in "qkv"]
        formats = matrix_formats(own[2][0], 4)
        exact = [x.astype("bfloat16").astype("f4") if f == "bf16" else x for x, f in zip(exact, formats, strict=False)]
        wanted = {"qkv": np.concatenate(exact)}
        if len(set(formats)) > 1:
            wanted = {f"qkv_{which}": values for which, values in zip("qkv", exact, strict=True)}
        for name, values in wanted.items():
            assert (matrix(store, f"layers.2.attention.{name}", *values.shape) == values).all()


def test_a_head_in_fp8_stays_so(tmp_path: Path) -> None:
    """And so does what no list of modules could say: embeddings in fp8 become bf16, as the store has them."""
    tensors = as_fp8({name.replace("lm_head", "lm_head_proj"): t for name, t in random_tensors(FP8_CONFIG).items()})
    tensors = {name.replace("lm_head_proj", "lm_head"): tensor for name, tensor in tensors.items()}
    with packed(write_tensors(tmp_path / "hf", FP8_CONFIG, tensors)) as store:
        assert store.mix == replace(MIXES["fp8"], head="fp8")
        head = dequantised(tensors, "lm_head.weight")
        assert (matrix(store, "head", *head.shape) == head).all()


@pytest.mark.parametrize("family", MXFP4_CONFIGS)
@pytest.mark.parametrize("kept", [0, 1])
def test_experts_of_a_layer_may_be_left_out_of_mxfp4(tmp_path: Path, family: str, kept: int) -> None:
    prefix = f"model.layers.{kept}.mlp.experts"
    spec = model_spec(MXFP4_CONFIGS[family])
    config = MXFP4_CONFIGS[family] | {"quantization_config": {**MXFP4, "modules_to_not_convert": [prefix]}}
    tensors = mxfp4_tensors(spec)
    plain = {name: shape for name, shape in spec.checkpoint_shapes("fused") if name.startswith(prefix)}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    random = np.random.default_rng(3)
    tensors |= {name: random.standard_normal(shape).astype(ml_dtypes.bfloat16) for name, shape in plain.items()}
    source = write_tensors(tmp_path / "hf", config, tensors)
    checkpoint = Checkpoint.open(source)
    assert checkpoint.form == "mxfp4" and checkpoint.native == bf16_in(
        {kept: ["experts"]}, MIXES["mxfp4"], len(spec.layers)
    )
    with packed(source) as store:
        names = spec.layers[0].feed_forward.names.experts
        for layer in (0, 1):
            both, down = (
                tensors[f"{prefix}.{part}"][4].astype("f4")
                if layer == kept
                else mxfp4_values(tensors, f"model.layers.{layer}.mlp.experts.{part}")[4]
                for part in ("gate_up_proj", "down_proj")
            )
            if layer == kept and names.fused_transposed:
                both, down = both.T, down.T
            gate, up = (both[0::2], both[1::2]) if names.fused_alternate else np.split(both, 2)
            for found, exact in zip(expert(store, layer, 4), (gate, up, down), strict=True):
                assert (found == exact).all()


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("self_attn", []),
        ("model.layers.0.self_attn.q_proj", [0]),
        ("*q_proj", [0, 1, 2]),
        ("layers.2.self_attn.q_proj", [2]),
    ],
)
def test_without_weights_the_list_is_believed(tmp_path: Path, name: str, layers: list[int]) -> None:
    config = {**FP8_CONFIG, "quantization_config": {**FP8, "ignored_layers": [name, "lm_head"]}}
    source = write_tensors(tmp_path / "hf", config, {})
    (source / "model.safetensors").unlink()
    named = ["bf16/fp8/fp8/fp8" if layer in layers else "fp8" for layer in range(3)]
    expected = FormatMix.of_layers([replace(MIXES["fp8"], attention=name) for name in named])
    assert model_formats(source) == native_mix(config) == expected


def test_lists_name_modules_where_checkpoints_have_them() -> None:
    """As those of Nemotron-H, whose decoder is called a backbone, and of models of more than text."""
    nemotron, method = CONFIGS["nemotron_h"], {"quant_method": "modelopt", "quant_algo": "FP8"}
    whole = {"model_type": "minimax_m3_vl", "text_config": CONFIGS["minimax_m3_vl_text"]}
    for config, theirs, ours in (
        (nemotron, "backbone.layers.2.mixer*", "model.layers.2.mixer*"),
        (whole, "language_model.model.layers.1.self_attn", "model.language_model.layers.1.self_attn"),
    ):
        found, wanted, all_of_it = (
            native_mix({**config, "quantization_config": {**method, "ignore": names}})
            for names in ([theirs], [ours], [])
        )
        assert found == wanted != all_of_it


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("*share_expert*", "*shared_experts*"),
        ("model.layers.*.share_expert*", "*shared_experts*"),
        ("re:.*share_expert.*", "*shared_experts*"),
        (r"re:.*\.share_expert\..*", "*shared_experts*"),
        ("share_expert.up_proj", "shared_experts.up_proj"),
        ("model.layers.2.share_expert.up_proj", "model.layers.2.mlp.shared_experts.up_proj"),
        ("*.1.moe.*", "model.layers.1.mlp.experts"),
        ("re:.*moe.(gate|up)_proj.*", r"re:.*\.experts\..*(gate|up)_proj"),
    ],
)
def test_lists_name_modules_by_the_words_of_step(theirs: str, ours: str) -> None:
    config, method = CONFIGS["step3p5"], {"quant_method": "modelopt", "quant_algo": "FP8"}
    found, wanted, all_of_it = (
        native_mix({**config, "quantization_config": {**method, "ignore": names}}) for names in ([theirs], [ours], [])
    )
    assert found == wanted != all_of_it


@pytest.mark.parametrize("value", ["lm_head", [1], {"a": 1}, ["x"] * 10_001, 7])
@pytest.mark.parametrize("field", ["modules_to_not_convert", "ignored_layers"])
@pytest.mark.parametrize("method", [FP8, MXFP4], ids=["fp8", "mxfp4"])
def test_a_list_that_is_none_is_refused(field: str, value: Any, method: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{field} is .*; it must be a list") as error:
        native_mix({**FP8_CONFIG, "quantization_config": {**method, field: value}})
    assert len(str(error.value)) < 300


MIXED = {"q": "fp16", "k": "bf16", "v": "fp32", "o": "bf16"}


def test_one_matrix_may_be_made_of_several_types(tmp_path: Path) -> None:
    """And norms, biases and experts: such a checkpoint is sound."""
    config = CONFIGS["llama"]
    tensors = random_tensors(config, "fp32")
    types = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16, "fp32": np.float32}
    for part, kind in MIXED.items():
        for layer in (0, 1):
            for what in ("weight", "bias"):
                name = f"model.layers.{layer}.self_attn.{part}_proj.{what}"
                tensors[name] = tensors[name].astype(types[kind])
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].astype(np.float16)
    source = write_tensors(tmp_path / "hf", config, tensors)
    for mix in ("bf16", "int8"):
        with packed(source, mix) as store:
            names = [f"model.layers.1.self_attn.{part}_proj" for part in "qkv"]
            exact = np.concatenate([tensors[f"{name}.weight"].astype("f4") for name in names])
            error = matrix(store, "layers.1.attention.qkv", *exact.shape) - exact
            assert np.abs(error).max() <= np.abs(exact).max() / (256 if mix == "bf16" else 127)
            biases = np.concatenate([tensors[f"{name}.bias"].astype("f4") for name in names])
            assert (store.array("layers.1.attention.qkv_bias")[: len(biases)] == biases).all()
        shutil.rmtree(store.path)
    with LLM(source, threads=1, cache_dir=tmp_path / "cache") as llm:
        assert np.isfinite(llm.logits([1, 2, 3])).all()


PLAIN = {
    "norm": ("qwen3_moe", "model.norm.weight"),
    "norm of a head": ("qwen3_moe", "model.layers.2.self_attn.q_norm.weight"),
    "router": ("qwen3_moe", "model.layers.2.mlp.gate.weight"),
    "shared gate": ("qwen2_moe", "model.layers.2.mlp.shared_expert_gate.weight"),
    "router bias": ("gpt_oss", "model.layers.1.mlp.router.bias"),
    "bias": ("llama", "model.layers.1.self_attn.k_proj.bias"),
    "sinks": ("gpt_oss", "model.layers.1.self_attn.sinks"),
    "bias of gate and up": ("gpt_oss", "model.layers.1.mlp.experts.gate_up_proj_bias"),
    "bias of down": ("gpt_oss", "model.layers.1.mlp.experts.down_proj_bias"),
    "taps": ("lfm2", "model.layers.0.conv.conv.weight"),
    "bias of taps": ("lfm2", "model.layers.0.conv.conv.bias"),
    "decays": ("qwen3_next", "model.layers.0.linear_attn.in_proj_ba.weight"),
    "decays of channels": ("kimi_linear", "model.layers.0.self_attn.dt_bias"),
    "gates of heads": ("bailing_hybrid", "model.layers.1.attention.g_proj.weight"),
    "rate of decays": ("qwen3_5_moe_text", "model.layers.1.linear_attn.A_log"),
}


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", PLAIN)
def test_plain_floats_are_always_checked(tmp_path: Path, kind: str, dtype: str, value: float) -> None:
    family, name = PLAIN[kind]
    tensors = random_tensors(CONFIGS[family], dtype)
    tensors[name].reshape(-1)[-1] = value
    checkpoint = Checkpoint.open(write_tensors(tmp_path / "hf", CONFIGS[family], tensors))
    with pytest.raises(WeightsError, match=f"tensor {name} holds NaN or infinity, weights must be finite"):
        pack(checkpoint, tmp_path / "store")
    assert not (tmp_path / "store/manifest.json").exists()


def test_values_that_bf16_cannot_hold_are_refused(tmp_path: Path) -> None:
    """3.4e38 is finite in fp32 and rounds to infinity in bf16."""
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    tensors = random_tensors(CONFIGS["qwen3_moe"], "fp32")
    tensors[name][0, 0] = 3.4e38
    source = write_tensors(tmp_path / "hf", CONFIGS["qwen3_moe"], tensors)
    with pytest.raises(WeightsError, match=f"tensor {name} holds a value too large for bf16"):
        packed(source)


def test_scales_that_make_fp8_infinite_are_refused(tmp_path: Path) -> None:
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    tensors = as_fp8(random_tensors(FP8_CONFIG))
    tensors[f"{name}_scale_inv"][1, 1] = 1e37
    source = write_tensors(tmp_path / "hf", FP8_CONFIG, tensors)
    for mix in ("auto", "bf16", "int8"):
        with pytest.raises(WeightsError, match=f"the scales of tensor {name} hold NaN or infinity, or make"):
            packed(source, mix)


def test_gate_and_up_are_found_by_the_form_of_their_layer(tmp_path: Path) -> None:
    """Layer 0 in tensors of its own, layer 2 stacked, as merges of two tools' files have them."""
    config = CONFIGS["qwen3_moe"]
    apart, fused = (random_tensors(config, fused=form) for form in (False, True))
    tensors = {name: t for name, t in apart.items() if "layers.2.mlp.experts" not in name}
    tensors |= {name: t for name, t in fused.items() if "layers.2.mlp.experts" in name}
    checkpoint = Checkpoint.open(write_tensors(tmp_path / "hf", config, tensors))
    checkpoint.check()
    gate, up, down = gated(checkpoint, 2, 3)
    both = np.concatenate([gate.floats(0, 40), up.floats(0, 40)])
    assert (both == fused["model.layers.2.mlp.experts.gate_up_proj"][3]).all()
    assert (gated(checkpoint, 0, 3)[2].floats(0, 96) == apart[names_of(0, 3)[2]]).all()


@pytest.mark.parametrize(
    ("left", "formats"),
    [
        ("kv_b_proj", ["fp8", "fp8", "fp8"]),  # whose matrices of heads are bf16 anyway
        ("model.layers.1.self_attn.q_b_proj", ["fp8", "fp8/fp8/bf16/fp8", "fp8"]),
        ("model.layers.2.self_attn.kv_a_proj_with_mqa", ["fp8", "fp8", "fp8/bf16/fp8/fp8"]),
    ],
)
def test_what_latent_attention_leaves_out_is_told_alike(tmp_path: Path, left: str, formats: list[str]) -> None:
    quantisation = {**FP8, "modules_to_not_convert": [left, "lm_head"]}
    config = {**CONFIGS["deepseek_v3"], "quantization_config": quantisation}
    tensors = as_fp8(random_tensors(config), keep=(left, "lm_head"))
    source = write_tensors(tmp_path / "hf", config, tensors)
    for mix in (native_mix(config), Checkpoint.open(source).native):
        assert [mix.of_layer(layer).attention for layer in range(3)] == formats
    with packed(source) as store:
        heads = {tensor.format for name, tensor in store.tensors.items() if name.endswith((".keys", ".values"))}
        assert heads == {"bf16"}


def test_latent_attention_in_int8_keeps_all_but_its_heads() -> None:
    spec = model_spec(CONFIGS["deepseek_v3"])
    mix = exact_mix(spec, lambda name: Kind("int8", ("int8",), 160) if "proj" in name else Kind("", (), 8))
    assert {layer.attention for layer in mix.layers or (mix,)} == {"int8/int8/int8/int8"}
    assert {tensor.format for tensor in spec.store_tensors(mix) if tensor.name.endswith(".keys")} == {"bf16"}


@pytest.mark.parametrize("rows", [16, 32])
def test_a_small_matrix_that_was_left_out_spoils_no_other(rows: int) -> None:
    spec = model_spec(CONFIGS["llama"])
    kept = Kind("", (), rows)
    mix = exact_mix(spec, lambda name: kept if "k_proj" in name else Kind("fp8", ("fp8",), 160))
    assert mix.attention == "fp8/bf16/fp8/fp8"
