"""Numbers of 4 or 8 bits with scales: exact where a packed format holds them, else rounded to bf16 and said so."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import packed, random_tensors, write_tensors
from test_model_mutations import mutated
from test_published import expert
from test_schemes import CONFIG, matrix

from hybrid import LLM
from hybrid.errors import HybridError, WeightsError
from hybrid.formats.mix import FormatMix
from hybrid.weights import content
from hybrid.weights.checkpoints.huggingface import Checkpoint
from hybrid.weights.checkpoints.published import native_mix
from hybrid.weights.checkpoints.schemes import scaled
from hybrid.weights.shard import Entry, read_bytes

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
E4M3 = ml_dtypes.float8_e4m3fn
Tensors = dict[str, np.ndarray]


def compressed(format: str, strategy: str) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"FP8": {"weights": weights}}}


def quark(dtype: str, scheme: str) -> dict[str, Any]:
    weight = {"dtype": dtype, "qscheme": scheme, "symmetric": True}
    return {"quant_method": "quark", "global_quant_config": {"weight": weight}, "layer_quant_config": {}}


def modelopt(algorithm: str) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm}


MXFP8 = {"quant_method": "mxfp8", "fmt": "e4m3", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}
# What config.json says, numbers, what shares a scale, type of scales, the format, whether bf16 rounds.
CASES: dict[str, tuple[dict[str, Any], str, str, Any, str, bool]] = {
    "fp8, a scale a matrix": ({"quant_method": "fp8"}, "fp8", "tensor", np.float32, "fp8", False),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, "fp8", "row", np.float32, "fp8_row", False),
    "compressed, GLM-4.5-FP8": (compressed("float-quantized", "channel"), "fp8", "row", "bfloat16", "fp8_row", False),
    "compressed, scales in a row": (
        compressed("float-quantized", "channel"),
        "fp8",
        "flat",
        "bfloat16",
        "fp8_row",
        False,
    ),
    "compressed, fp8 in blocks": (compressed("float-quantized", "block"), "fp8", "square", "bfloat16", "fp8", False),
    "compressed, int8": (compressed("int-quantized", "channel"), "int8", "row", np.float32, "int8", False),
    "compressed, int8 of a matrix": (
        compressed("int-quantized", "tensor"),
        "int8",
        "tensor",
        "bfloat16",
        "int8",
        False,
    ),
    "compressed, mxfp4": (compressed("mxfp4-pack-quantized", "group"), "packed", "32", np.uint8, "mxfp4", False),
    "compressed, nvfp4": (compressed("nvfp4-pack-quantized", "tensor_group"), "packed", "16", E4M3, "nvfp4", False),
    "compressed, mxfp8": (compressed("mxfp8-quantized", "group"), "fp8", "32", np.uint8, "bf16", False),
    "quark, fp8": (quark("fp8_e4m3", "per_tensor"), "fp8", "tensor", np.float32, "fp8", False),
    "quark, fp8 in rows": (quark("fp8_e4m3", "per_channel"), "fp8", "flat", np.float32, "fp8_row", False),
    "quark, mxfp4": (quark("fp4", "per_group"), "fp4", "32", np.uint8, "mxfp4", False),
    "modelopt, fp8": (modelopt("FP8"), "fp8", "tensor", np.float32, "fp8", False),
    "modelopt, nvfp4": (modelopt("NVFP4"), "fp4", "16", E4M3, "nvfp4", False),
    "mxfp8, as MiniMax-M3": (MXFP8, "fp8", "32", np.uint8, "bf16", False),
    "modelopt, mxfp8": (modelopt("MXFP8"), "fp8", "32", np.uint8, "bf16", False),
}


def published(tensors: Tensors, case: str) -> tuple[Tensors, Tensors]:
    """A checkpoint's tensors with projections as the case says, and what these stand for, in float32."""
    _, numbers, shared, kind, _, _ = CASES[case]
    chance, found, values = np.random.default_rng(4), dict(tensors), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, inputs = found.pop(name).shape
        if numbers in ("fp4", "packed"):
            codes = chance.integers(0, 16, (rows, inputs), np.uint8)
            stored, exact = codes[:, ::2] | codes[:, 1::2] << 4, E2M1[codes]
        else:
            stored = chance.integers(-128, 128, (rows, inputs), np.int8)
            if numbers == "fp8":
                stored = (stored / np.float32(8)).astype(E4M3)
            exact = stored.astype(np.float32)
        shapes = {"tensor": (), "row": (rows, 1), "flat": (rows,), "square": (-(-rows // 128), -(-inputs // 128))}
        shape = shapes[shared] if shared in shapes else (rows, inputs // int(shared))
        if kind is np.uint8:
            scales: Any = chance.integers(110, 125, shape, np.uint8)
            multiply = 2.0 ** (scales.astype(np.float32) - 127)
        else:
            scales = np.asarray(chance.uniform(0.001, 0.01, shape) * (1000 if kind is E4M3 else 1)).astype(kind)
            multiply = np.asarray(scales).astype(np.float32)
        module = name.removesuffix(".weight")
        if kind is E4M3:
            divides, whole = numbers == "packed", np.float32(chance.uniform(800, 900))
            found[f"{module}.weight_{'global_scale' if divides else 'scale_2'}"] = np.array(
                [whole if divides else 1 / whole]
            )
            multiply = multiply / whole if divides else multiply * (1 / whole)
        grid = {"flat": multiply.reshape(-1, 1)}.get(shared, np.atleast_2d(multiply))
        if shared == "square":
            grid = grid.repeat(128, 0).repeat(128, 1)[:rows, :inputs]
        elif grid.shape[1] > 1:
            grid = grid.repeat(int(shared), 1)
        found[f"{module}.weight{'_packed' * (numbers == 'packed')}"] = stored
        found[f"{module}.weight_scale{'_inv' * case.startswith('mxfp8')}"] = np.asarray(scales)
        values[name] = (exact * grid.astype(np.float32)).astype(np.float32)
    return found, values


def written(path: Path, case: str) -> tuple[Path, Tensors, Tensors]:
    tensors, values = published(random_tensors(CONFIG), case)
    return write_tensors(path, {**CONFIG, "quantization_config": CASES[case][0]}, tensors, shards=2), tensors, values


@pytest.mark.parametrize("case", CASES)
def test_numbers_and_scales_are_taken_as_they_are(tmp_path: Path, case: str) -> None:
    config, *_, format, rounds = CASES[case]
    source, _, values = written(tmp_path / "hf", case)
    if format == "bf16":
        values = {name: value.astype("bfloat16").astype(np.float32) for name, value in values.items()}
    assert native_mix({**CONFIG, "quantization_config": config}).experts == format
    checkpoint = Checkpoint.open(source)
    assert [line.startswith("note: ") for line in checkpoint.notes(checkpoint.native)] == [True] * rounds
    assert checkpoint.notes(FormatMix.uniform("int8")) == []
    # a reciprocal of what scales are divided by is rounded
    same = partial(np.allclose, rtol=2.0**-22 if case == "compressed, nvfp4" else 0, atol=0)
    with packed(source) as store:
        assert {store.mix.experts, store.mix.attention, store.mix.dense} == {format} and store.mix.head == "bf16"
        out = values["model.layers.0.self_attn.o_proj.weight"]
        assert same(matrix(store, "layers.0.attention.out", out.shape), out)
        qkv = np.concatenate([values[f"model.layers.2.self_attn.{part}_proj.weight"] for part in "qkv"])
        assert same(matrix(store, "layers.2.attention.qkv", qkv.shape), qkv)
        names = [f"model.layers.2.mlp.experts.7.{part}_proj.weight" for part in ("gate", "up", "down")]
        assert all(same(a, values[name]) for a, name in zip(expert(store, 2, 7), names, strict=True))


@pytest.mark.parametrize("case", ["compressed, GLM-4.5-FP8", "compressed, int8", "modelopt, nvfp4"])
def test_logits_are_those_of_the_values(tmp_path: Path, case: str) -> None:
    """Of a checkpoint in fp32 that holds them, bit for bit."""
    source, tensors, values = written(tmp_path / "hf", case)
    plain = {name: values.get(name, array) for name, array in random_tensors(CONFIG).items()}
    exact = write_tensors(tmp_path / "plain", CONFIG, plain)
    with LLM(source, threads=1, cache_dir=tmp_path / "cache", weight_format="bf16") as one:
        found = one.logits([1, 2, 3, 4])
    with LLM(exact, threads=1, cache_dir=tmp_path / "cache", weight_format="bf16") as other:
        assert (found == other.logits([1, 2, 3, 4])).all()


@pytest.mark.parametrize("case", ["modelopt, nvfp4", "compressed, mxfp4", "compressed, fp8 in blocks"])
def test_scales_are_read_once_however_many_pieces_a_matrix_is_packed_in(tmp_path: Path, monkeypatch, case) -> None:
    monkeypatch.setattr(content, "CHUNK_BYTES", 1 << 10)
    monkeypatch.setattr(content, "SMALL_BYTES", 1 << 12)  # others by threads
    reads = Counter[tuple[str, int]]()

    def counted(entry: Entry, start: int, stop: int) -> np.ndarray:
        reads[str(entry.path), entry.start] += 1
        return read_bytes(entry, start, stop)

    monkeypatch.setattr(scaled, "read_bytes", counted)
    with packed(written(tmp_path / "hf", case)[0]):
        assert reads and set(reads.values()) == {1}


MODULE = "model.layers.0.mlp.experts.1.up_proj"


@pytest.mark.parametrize(
    ("case", "part", "change", "message"),
    [
        ("modelopt, fp8", "weight_scale", None, f"{MODULE}.weight_scale is missing"),
        ("modelopt, nvfp4", "weight_scale_2", None, f"{MODULE}.weight_scale_2 is missing"),
        ("modelopt, nvfp4", "weight_scale_2", lambda a: a.astype("f8"), "the scale of all of .* is F64"),
        ("modelopt, nvfp4", "pre_quant_scale", lambda a: np.ones(8, "f4"), "changes what its weights mean"),
        (
            "compressed, int8",
            "weight_zero_point",
            lambda a: np.ones(8, "i1"),
            r"weight_zero_point is I8 \[8\]; it must",
        ),
        ("modelopt, nvfp4", "weight_scale", lambda a: a[:, :3].copy(), r"weight_scale is F8_E4M3 \[64, 3\] beside U8"),
        ("modelopt, nvfp4", "weight_scale", lambda a: np.full_like(a, np.nan), "hold NaN or infinity"),
        ("fbgemm", "weight_scale", lambda a: np.full_like(a, np.inf), "hold NaN or infinity"),
        ("fbgemm", "weight", lambda a: np.full_like(a, np.nan), "holds NaN or infinity, weights must be"),
        ("modelopt, mxfp8", "weight", lambda a: np.full_like(a, np.nan), "holds NaN, weights must be"),
        ("modelopt, fp8", "weight", lambda a: np.full_like(a, np.nan), "holds NaN or infinity"),
        ("compressed, mxfp4", "weight_scale", lambda a: np.full_like(a, 255), "hold NaN or infinity"),
        ("compressed, mxfp8", "weight_scale", lambda a: np.full_like(a, 255), "hold NaN or infinity"),
        ("compressed, nvfp4", "weight_global_scale", lambda a: a * 0, "hold NaN or infinity"),
        ("fbgemm", "weight", lambda a: np.zeros((3, 4), E4M3), r"beside F8_E4M3 \[3, 4\]"),
    ],
)
def test_parts_that_do_not_fit_are_refused(tmp_path: Path, case: str, part: str, change: Any, message: str) -> None:
    tensors, _ = published(random_tensors(CONFIG), case)
    name = f"{MODULE}.{part}"
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors.get(name))
    source = write_tensors(tmp_path / "hf", {**CONFIG, "quantization_config": CASES[case][0]}, tensors)
    with pytest.raises(WeightsError, match=message) as error:
        packed(source)
    assert "\n" not in str(error.value)


def test_what_was_left_unquantised_stays_so(tmp_path: Path) -> None:
    """And a head that is quantised, whatever a list says."""
    plain = random_tensors(CONFIG)
    tensors, _ = published({name: plain[name] for name in plain if "self_attn" not in name}, "modelopt, fp8")
    tensors |= {name: plain[name] for name in plain if "self_attn" in name}
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(E4M3)
    tensors["lm_head.weight_scale"] = np.array(0.5, np.float32)
    config = {**CONFIG, "quantization_config": {**modelopt("FP8"), "ignore": ["lm_head"]}}
    with packed(write_tensors(tmp_path / "hf", config, tensors)) as store:
        assert (store.mix.attention, store.mix.experts) == ("bf16", "fp8")
        head = tensors["lm_head.weight"].astype(np.float32) * np.float32(0.5)
        kind = store.tensors["head"].format
        assert (matrix(store, "head", head.shape) == head).all() and kind == store.mix.head


@pytest.mark.parametrize("case", ["modelopt, nvfp4", "compressed, fp8 in blocks", "compressed, mxfp4"])
def test_damaged_headers_are_read_or_refused(tmp_path: Path, case: str) -> None:
    small = {**CONFIG, "num_hidden_layers": 1, "mlp_only_layers": [0], "quantization_config": CASES[case][0]}
    source = write_tensors(tmp_path / "hf", small, published(random_tensors(small), case)[0])
    file, faults, refused = source / "model.safetensors", list[str](), 0
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    for seed in range(80):
        text = json.dumps(mutated(json.loads(data[8:end]), random.Random(seed))).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
        try:
            packed(source).close()
        except HybridError as error:
            refused += 1
            if "\n" in str(error) or len(str(error)) > 2000:
                faults.append(f"{seed}: {str(error)[:200]}")
        except Exception as error:  # what the test is about
            faults.append(f"{seed}: {type(error).__name__}: {error}")
        shutil.rmtree(tmp_path / "hf-store", ignore_errors=True)
    assert not faults, f"{len(faults)} faults: {faults[:10]}"
    assert refused > 20
