"""Quantised checkpoints, and parts that only some families have, are packed to what they stand for."""

from __future__ import annotations

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
    mxfp4_tensors,
    mxfp4_values,
    packed,
    random_tensors,
    write_checkpoint,
    write_tensors,
)
from configs import CONFIGS

from hybrid.errors import ConfigError, HybridError, WeightsError
from hybrid.formats import FORMATS
from hybrid.formats.mix import MIXES, FormatMix
from hybrid.formats.packed import down_offset, matrix_formats
from hybrid.models import model_spec
from hybrid.models.spec import ModelSpec
from hybrid.weights.checkpoints.huggingface import Checkpoint
from hybrid.weights.checkpoints.published import native_mix
from hybrid.weights.content import Content
from hybrid.weights.pack import cached_store, model_formats, pack
from hybrid.weights.store import Store

# Partial squares on every edge, in rows and columns; q, k and v of 144, 48 and 48 rows lie on whole blocks.
SIZES = {"hidden_size": 200, "moe_intermediate_size": 152, "intermediate_size": 264}
FP8_CONFIG = {**CONFIGS["qwen3_moe"], **SIZES, "quantization_config": FP8}
MXFP4 = {"quant_method": "mxfp4"}
MXFP4_CONFIGS = {
    "qwen3_moe": {**CONFIGS["qwen3_moe"], "moe_intermediate_size": 32, "mlp_only_layers": []},
    "gpt_oss": {**CONFIGS["gpt_oss"], "intermediate_size": 64},  # the only one that is published so
}
MXFP4_CONFIGS = {family: config | {"quantization_config": MXFP4} for family, config in MXFP4_CONFIGS.items()}


def matrix(store: Store, name: str, n: int, k: int) -> np.ndarray:
    return FORMATS[store.tensors[name].format or ""].unpack(store.array(name), n, k)


def expert(store: Store, layer: int, index: int) -> list[np.ndarray]:
    """Gate, up and down of an expert, as float32."""
    tensor = store.tensors[f"layers.{layer}.ffn.experts"]
    hidden, size = store.spec.hidden, store.spec.layers[layer].feed_forward.intermediate
    wide, narrow = (FORMATS[name] for name in matrix_formats(tensor.format or ""))
    blob = store.array(tensor.name)[index]
    start = down_offset(tensor.format or "", hidden, size)
    blocks = blob[:start].reshape(-1, 2, wide.block_bytes(tensor.runs[0].inputs))
    return [*(wide.unpack(blocks[:, part], size, hidden) for part in (0, 1)), narrow.unpack(blob[start:], hidden, size)]


def names_of(layer: int, index: int, routed: bool = True) -> list[str]:
    place = f"experts.{index}." if routed else ""
    return [f"model.layers.{layer}.mlp.{place}{part}_proj.weight" for part in ("gate", "up", "down")]


@pytest.mark.parametrize("scales", ["f4", "bf16"])
def test_fp8_weights_are_taken_as_they_are(tmp_path: Path, scales: str) -> None:
    tensors = as_fp8(random_tensors(FP8_CONFIG), scales)
    with packed(write_tensors(tmp_path / "hf", FP8_CONFIG, tensors, shards=2)) as store:
        assert store.mix == MIXES["fp8"] == model_formats(tmp_path / "hf") == model_formats(store.path)
        for layer, index in ((0, 0), (0, 9), (1, 0), (2, 4)):
            expected = [dequantised(tensors, name) for name in names_of(layer, index, routed=layer != 1)]
            assert all((a == b).all() for a, b in zip(expert(store, layer, index), expected, strict=True))
        attention = "model.layers.2.self_attn.{}_proj.weight"
        stacked = np.concatenate([dequantised(tensors, attention.format(part)) for part in "qkv"])
        assert (matrix(store, "layers.2.attention.qkv", *stacked.shape) == stacked).all()
        assert (matrix(store, "layers.2.attention.out", 200, 144) == dequantised(tensors, attention.format("o"))).all()
        assert (matrix(store, "head", 131, 200) == tensors["lm_head.weight"].astype("f4")).all()


@pytest.mark.parametrize("format", ["bf16", "int8", "int4", "mxfp4"])
def test_fp8_weights_are_dequantised_for_other_formats(tmp_path: Path, format: str) -> None:
    tensors = as_fp8(random_tensors(FP8_CONFIG))
    with packed(write_tensors(tmp_path / "hf", FP8_CONFIG, tensors), f"fp8,experts={format}") as store:
        for found, name in zip(expert(store, 2, 7), names_of(2, 7), strict=True):
            weight, kind = dequantised(tensors, name), FORMATS[format]
            assert (found == kind.unpack(kind.pack(weight), *weight.shape)).all()


def test_fp8_parts_that_share_a_block_are_quantised_again(tmp_path: Path) -> None:
    config = {**FP8_CONFIG, "head_dim": 12, "num_attention_heads": 5, "num_key_value_heads": 1}
    tensors = as_fp8(random_tensors(config))
    with packed(write_tensors(tmp_path / "hf", config, tensors)) as store:
        parts = [dequantised(tensors, f"model.layers.0.self_attn.{part}_proj.weight") for part in "qkv"]
        expected = np.concatenate(parts)
        found = matrix(store, "layers.0.attention.qkv", *expected.shape)
        assert (found == FORMATS["fp8"].unpack(FORMATS["fp8"].pack(expected), *expected.shape)).all()
        assert 0 < np.linalg.norm(found - expected) < 0.04 * np.linalg.norm(expected)


def test_fused_fp8_experts_start_within_a_square(tmp_path: Path) -> None:
    """Up begins at row 176 of a fused matrix, in the middle of the second square of its rows."""
    config = {**FP8_CONFIG, "moe_intermediate_size": 176, "mlp_only_layers": []}
    tensors, random = random_tensors(config, fused=True), np.random.default_rng(0)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, rows, columns = tensors[name].shape
        tensors[name] = (tensors[name] * 500).astype(ml_dtypes.float8_e4m3fn)
        grid = (experts, -(-rows // 128), -(-columns // 128))
        tensors[f"{name}_scale_inv"] = random.uniform(1e-4, 1e-3, grid).astype("f4")
    with packed(write_tensors(tmp_path / "hf", config, tensors)) as store:
        for index in (0, 7):
            gate, up, down = expert(store, 1, index)
            for found, part in ((np.concatenate([gate, up]), "gate_up_proj"), (down, "down_proj")):
                name = f"model.layers.1.mlp.experts.{part}"
                one = {"x": tensors[name][index], "x_scale_inv": tensors[f"{name}_scale_inv"][index]}
                assert (found == dequantised(one, "x")).all()


@pytest.mark.parametrize("stray", ["_weight_scale", "_scale_inv", "_weight_scale_2", "_blocks.scales", ".weight_scale"])
@pytest.mark.parametrize("part", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "granitemoe"])
def test_scales_beside_fused_experts_that_would_be_left_out_are_refused(
    tmp_path: Path, family: str, part: str, stray: str
) -> None:
    """Tensors that look like floats may be codes of another kind."""
    tensors = random_tensors(CONFIGS[family], fused=True)
    part = {"gate_up_proj": "input_linear", "down_proj": "output_linear"}[part] if family == "granitemoe" else part
    name = next(name for name in tensors if part in name and not name.endswith("bias"))
    tensors[f"{name}{stray}"] = np.ones((6, 1), "f4")
    checkpoint = Checkpoint.open(write_tensors(tmp_path, CONFIGS[family], tensors))
    with pytest.raises(WeightsError, match=rf"tensor {name}{stray} says .* one tensor, .* not read; read are") as error:
        checkpoint.check()
    assert "\n" not in str(error.value)


def test_fused_experts_in_fp8_that_are_not_read_say_so(tmp_path: Path) -> None:
    """Not that scales are missing, which another method writes under another name, nor only when they are packed."""
    for family, scales in (("qwen3_moe", "_weight_scale"), ("qwen3_vl_moe", "_scale_inv")):
        text = CONFIGS["qwen3_moe"]
        config = (
            {"model_type": family, "text_config": {**text, "model_type": "qwen3_vl_moe_text"}}
            if family == "qwen3_vl_moe"
            else text
        )
        shapes = dict(model_spec(config).with_fused_experts().checkpoint_shapes("fused"))
        tensors = {name: np.ones(shape, ml_dtypes.bfloat16) for name, shape in shapes.items()}
        for name in [name for name in tensors if name.endswith("experts.gate_up_proj")]:
            tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
            tensors[f"{name}{scales}"] = np.ones((10, 1, 1), "f4")
        checkpoint = Checkpoint.open(write_tensors(tmp_path / family, config, tensors))
        with pytest.raises(WeightsError, match=f"gate_up_proj{scales} says that the experts of a layer"):
            checkpoint.check()


def test_modules_that_were_not_converted_are_bf16(tmp_path: Path) -> None:
    kept = {**FP8, "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.self_attn.o_proj"]}
    config = {**FP8_CONFIG, "quantization_config": kept}
    assert native_mix(config).layers[1] == replace(MIXES["fp8"], attention="fp8/fp8/fp8/bf16")
    tensors = as_fp8(random_tensors(config), keep=("layers.1.self_attn.o_proj",))
    with packed(write_tensors(tmp_path / "hf", config, tensors)) as store:
        assert store.format == "head bf16, rest fp8; layers 1: attention fp8/fp8/fp8/bf16, head bf16, rest fp8"
        for layer in (0, 1):
            weight = dequantised(tensors, f"model.layers.{layer}.self_attn.o_proj.weight")
            assert (matrix(store, f"layers.{layer}.attention.out", 200, 144) == weight).all()
    for names, part in ((["model.layers.*.mlp.experts"], "experts"), (["model.layers.1.mlp"], "dense")):
        mix = native_mix({**config, "quantization_config": {**FP8, "modules_to_not_convert": names}})
        assert getattr(mix.of_layer(1), part) == "bf16" and mix.attention == "fp8"


@pytest.mark.parametrize("format", ["auto", "bf16", "int8", "fp8"])
@pytest.mark.parametrize("family", MXFP4_CONFIGS)
def test_mxfp4_experts_are_read(tmp_path: Path, format: str, family: str) -> None:
    spec = model_spec(MXFP4_CONFIGS[family])
    tensors = mxfp4_tensors(spec)
    with packed(write_tensors(tmp_path / "hf", MXFP4_CONFIGS[family], tensors), format) as store:
        assert store.mix == (MIXES["mxfp4"] if format == "auto" else MIXES[format])
        for index in (0, 5):
            both = mxfp4_values(tensors, "model.layers.1.mlp.experts.gate_up_proj")[index]
            gate, up = (
                (both[0::2], both[1::2])
                if spec.layers[0].feed_forward.names.experts.fused_alternate
                else np.split(both, 2)
            )
            down = mxfp4_values(tensors, "model.layers.1.mlp.experts.down_proj")[index]
            for found, weight in zip(expert(store, 1, index), (gate, up, down), strict=True):
                kind = FORMATS["mxfp4" if format == "auto" else format]
                expected = weight if format == "auto" else kind.unpack(kind.pack(weight), *weight.shape)
                assert (found == expected).all()


NAN = {
    "fp8 scale": ("model.layers.2.mlp.experts.3.up_proj.weight", "_scale_inv", np.nan),
    "fp8 scale infinite": ("model.layers.2.mlp.experts.3.up_proj.weight", "_scale_inv", np.inf),
}


@pytest.mark.parametrize("kind", NAN)
@pytest.mark.parametrize("format", ["auto", "bf16", "int4"])
def test_scales_that_are_not_finite_are_always_refused(tmp_path: Path, kind: str, format: str) -> None:
    name, suffix, value = NAN[kind]
    tensors = as_fp8(random_tensors(FP8_CONFIG))
    tensors[name + suffix][1, 1] = value
    with pytest.raises(WeightsError, match=f"the scales of tensor {name} hold NaN or infinity"):
        packed(write_tensors(tmp_path / "hf", FP8_CONFIG, tensors), format)
    assert not (tmp_path / "hf-store/manifest.json").exists()


@pytest.mark.parametrize("exponent", [253, 255])  # 6 * 2^126, and what stands for no number
def test_mxfp4_scales_that_are_not_finite_are_refused(tmp_path: Path, exponent: int) -> None:
    tensors = mxfp4_tensors(model_spec(MXFP4_CONFIGS["gpt_oss"]))
    name = "model.layers.0.mlp.experts.down_proj"
    tensors[f"{name}_scales"][3, 1, 0] = exponent
    with pytest.raises(WeightsError, match=f"the scales of tensor {name} hold NaN"):
        packed(write_tensors(tmp_path / "hf", MXFP4_CONFIGS["gpt_oss"], tensors))


def test_values_that_are_not_finite_are_never_quantised(tmp_path: Path) -> None:
    """Nor taken as published in fp8, which the kernels could not tell from numbers."""
    name = "model.layers.2.mlp.experts.9.down_proj.weight"
    tensors = random_tensors(CONFIGS["qwen3_moe"])
    tensors[name][5, 7] = np.inf
    source = write_tensors(tmp_path / "hf", CONFIGS["qwen3_moe"], tensors)
    for format in ("int8", "int4", "fp8", "mxfp4"):
        with pytest.raises(WeightsError, match=f"tensor {name} holds NaN or infinity"):
            packed(source, format)
    tensors = as_fp8(random_tensors(FP8_CONFIG))
    tensors[name].view(np.uint8)[5, 7] = 0xFF
    source = write_tensors(tmp_path / "fp8", FP8_CONFIG, tensors)
    with pytest.raises(WeightsError, match=f"tensor {name} holds NaN"):
        packed(source, "int8")
    with pytest.raises(WeightsError, match=f"tensor {name} holds NaN"):
        pack(Checkpoint.open(source), tmp_path / "published")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"quant_method": "hqq"}, "quantization_config is .*hqq.*must be absent, mxfp4, fp8"),
        ({"quant_method": "hqq"}, r"weight_block_size \[128, 128\], compressed.*: take the unquantised"),
        ({**FP8, "weight_block_size": [64, 64]}, "must be absent"),
        ("fp8", "quantization_config is 'fp8'"),
        ({**FP8, "modules_to_not_convert": "lm_head"}, "modules_to_not_convert is 'lm_head'; it must be a list"),
    ],
)
def test_quantisations_that_cannot_be_read_are_refused(tmp_path: Path, value: Any, message: str) -> None:
    write_checkpoint(tmp_path, "qwen3_moe", quantization_config=value)
    for read in (Checkpoint.open, model_formats):
        with pytest.raises(ConfigError, match=message) as error:
            read(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, n: t.pop(f"{n}_scale_inv"), "up_proj.weight_scale_inv is missing"),
        (lambda t, n: t.update({f"{n}_scale_inv": np.ones((1, 2), "f4")}), r"scale_inv has shape \[1, 2\].*\[2, 2\]"),
        (lambda t, n: t.update({f"{n}_scale_inv": np.ones((2, 2), "i4")}), "scale_inv has dtype I32, allowed are BF16"),
        (lambda t, n: t.update({"model.norm.weight": np.ones(200, "float8_e4m3fn")}), "norm.weight has dtype F8_E4M3"),
    ],
)
def test_a_quantised_checkpoint_that_is_not_whole_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    tensors = as_fp8(random_tensors(FP8_CONFIG))
    change(tensors, "model.layers.0.mlp.experts.1.up_proj.weight")
    checkpoint = Checkpoint.open(write_tensors(tmp_path, FP8_CONFIG, tensors))
    with pytest.raises(WeightsError, match=message):
        checkpoint.check()


@pytest.mark.parametrize("head", FORMATS)
def test_a_tied_model_shares_its_embedding_only_with_a_head_of_bf16(tmp_path: Path, head: str) -> None:
    source = write_checkpoint(tmp_path / "hf", "qwen3", dtype="fp32")
    exact = random_tensors(CONFIGS["qwen3"], "fp32")["model.embed_tokens.weight"]
    with packed(source, f"bf16,head={head}") as store:
        assert store.spec.shares_head(store.mix) == ("head" not in store.tensors) == (head == "bf16")
        assert (matrix(store, "embedding", *exact.shape) == exact.astype("bfloat16").astype("f4")).all()
        if head != "bf16":
            expected = FORMATS[head].unpack(FORMATS[head].pack(exact), *exact.shape)
            assert (matrix(store, "head", *exact.shape) == expected).all()


@pytest.mark.parametrize("mix", ["int8", "int4", "fp8", "mxfp4", "int8,dense=int4,head=fp8"])
def test_every_part_of_a_model_has_its_format(tmp_path: Path, mix: str) -> None:
    """From fp32, which is never rounded to bf16 on the way."""
    tensors = random_tensors(CONFIGS["qwen3_moe"], "fp32")
    with packed(write_checkpoint(tmp_path / "hf", "qwen3_moe", dtype="fp32"), mix) as store:
        found = {"head": matrix(store, "head", 131, 96), "attention": matrix(store, "layers.0.attention.out", 96, 144)}
        found |= {"experts": expert(store, 0, 3)[2], "dense": expert(store, 1, 0)[2]}
        exact = {"head": "lm_head.weight", "attention": "model.layers.0.self_attn.o_proj.weight"}
        exact |= {"experts": names_of(0, 3)[2], "dense": names_of(1, 0, routed=False)[2]}
        for part, name in exact.items():
            kind, weight = FORMATS[getattr(store.mix, part)], tensors[name]
            assert (found[part] == kind.unpack(kind.pack(weight), *weight.shape)).all()


def test_a_store_of_other_formats_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "hf", "qwen3_moe")
    packed(source, "int4,head=int8").close()
    store = tmp_path / "hf-store"
    for text in ("auto", "int4,head=int8", "head=int8"):
        cached_store(store, mix_text=text).close()
    with pytest.raises(ConfigError, match="holds head int8, rest int4, --format int4 asks for int4: leave out"):
        cached_store(store, mix_text="int4")
    with pytest.raises(ConfigError, match="format 'int5' is unknown"):
        cached_store(source, tmp_path / "cache", "int5")
    with pytest.raises(HybridError, match="already holds another store"):
        packed(source, "int4")
    assert not (tmp_path / "cache").exists()


def test_the_cache_keeps_one_store_for_each_mix(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "hf", "qwen3_moe")
    texts = ("auto", "bf16", "int8", "int4", "int8,head=int8")
    paths = [cached_store(source, tmp_path / "cache", text).path for text in texts]
    assert paths[0] == paths[1] and paths[2] == paths[4] and len(set(paths)) == 3
    with cached_store(source, tmp_path / "cache", "int4") as store:
        assert (store.mix, store.format) == (FormatMix.uniform("int4"), "int4")


def special(spec: ModelSpec) -> ModelSpec:
    """The same model with every part that only some families have."""
    layers = []
    for layer in spec.layers:
        names = layer.feed_forward.names
        names = replace(names, experts=replace(names.experts, fused_alternate=True))
        ffn = replace(layer.feed_forward, bias=True, names=names)
        if ffn.router:
            router = replace(ffn.router, bias=True)
            ffn = replace(ffn, router=router, shared_intermediate=56, shared_gate=True)
        layers.append(replace(layer, mixer=replace(layer.mixer, sinks=True), feed_forward=ffn))
    return replace(spec, layers=tuple(layers))


@pytest.mark.parametrize("form", ["apart", "fused"])
def test_biases_sinks_and_shared_experts_are_stored(tmp_path: Path, form: Any) -> None:
    config, random = CONFIGS["qwen3_moe"], np.random.default_rng(0)
    spec = special(Checkpoint.open(write_checkpoint(tmp_path / "x", "qwen3_moe")).spec)
    shapes = spec.checkpoint_shapes(form)
    tensors = {name: (random.standard_normal(shape) * 0.1).astype(ml_dtypes.bfloat16) for name, shape in shapes}
    opened = Checkpoint.open(write_tensors(tmp_path / "hf", config, tensors))
    checkpoint = replace(opened, spec=spec)
    checkpoint.check()
    content, mix = Content(checkpoint, check=True), replace(FormatMix.uniform("int8"), shared="int4")
    stored = {t.name: t for t in spec.store_tensors(mix) if t.name.startswith(("layers.0", "layers.1"))}
    found = {
        name: np.concatenate([chunk.reshape(-1) for chunk in content.chunks(t)]).reshape(t.shape)
        for name, t in stored.items()
    }
    exact = {name: tensor.astype("f4") for name, tensor in tensors.items()}
    assert (found["layers.0.attention.sinks"] == exact["model.layers.0.self_attn.sinks"]).all()
    router, bias = found["layers.0.ffn.router"], found["layers.0.ffn.router_bias"]
    assert (router[:10] == exact["model.layers.0.mlp.gate.weight"]).all() and router.shape == (11, 96)
    assert (router[10] == exact["model.layers.0.mlp.shared_expert_gate.weight"][0]).all()
    assert (bias == [*exact["model.layers.0.mlp.gate.bias"], 0]).all()
    _compare_biases(found["layers.0.ffn.gate_up_bias"][4], found["layers.0.ffn.down_bias"][4], exact, form)
    assert (found["layers.1.ffn.down_bias"][0, :96] == exact["model.layers.1.mlp.down_proj.bias"]).all()
    shared = "model.layers.0.mlp.shared_expert.{}_proj.weight"
    kind, start = FORMATS["int4"], down_offset("int4", 96, 56)
    assert found["layers.0.ffn.shared"].shape == (stored["layers.0.ffn.shared"].nbytes,)
    down = kind.unpack(found["layers.0.ffn.shared"][start:], 96, 56)
    assert (down == kind.unpack(kind.pack(exact[shared.format("down")]), 96, 56)).all()


def _compare_biases(gate_up: np.ndarray, down: np.ndarray, exact: dict[str, np.ndarray], form: str) -> None:
    """Of expert 4 of layer 0, with 40 inner and 96 outer columns."""
    prefix = "model.layers.0.mlp.experts."
    if form == "fused":
        both = exact[f"{prefix}gate_up_proj_bias"][4]
        gate, up, last = both[0::2], both[1::2], exact[f"{prefix}down_proj_bias"][4]
    else:
        gate, up, last = (exact[f"{prefix}4.{part}_proj.bias"] for part in ("gate", "up", "down"))
    assert gate_up.shape == (3, 2, 16) and down.shape == (96,)
    assert (gate_up[:, 0].reshape(-1)[:40] == gate).all() and (gate_up[:, 1].reshape(-1)[:40] == up).all()
    assert not gate_up.transpose(1, 0, 2).reshape(2, -1)[:, 40:].any() and (down == last).all()
