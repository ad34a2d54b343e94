"""NVFP4 in GGUF files, with the scales that lie beside its tensors: the same store as from the checkpoint of NVFP4."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import packed as packed_checkpoint
from checkpoints import random_tensors, write_tensors
from configs import CONFIGS
from gguf_rig import Blocks, gguf_metadata, gguf_tensors, split_gguf, write_gguf
from test_gguf_models import packed, same_stores

from hybrid.errors import WeightsError
from hybrid.weights.checkpoints.gguf import GgufCheckpoint
from hybrid.weights.checkpoints.gguf_outline import outline_gguf

CONFIG: dict[str, Any] = CONFIGS["qwen3_moe"] | {
    "hidden_size": 128, "intermediate_size": 64, "moe_intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "num_experts": 4, "num_hidden_layers": 2, "mlp_only_layers": [],
    "quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "tie_word_embeddings": False,
}  # fmt: skip
Tensors = dict[str, np.ndarray]
EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.(gate|up|down)_proj\.weight")


def published() -> tuple[Tensors, dict[str, tuple[np.ndarray, np.ndarray, np.float32]]]:
    """Tensors of modelopt, and codes [rows, inputs], scales [rows, inputs / 16] and a factor for each matrix."""
    chance, tensors, matrices = np.random.default_rng(5), random_tensors(CONFIG), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, inputs = tensors.pop(name).shape
        codes = chance.integers(0, 16, (rows, inputs), np.uint8)
        scales = chance.uniform(1, 400, (rows, inputs // 16)).astype(ml_dtypes.float8_e4m3fn)
        factor = np.float32(chance.uniform(1e-5, 1e-4))
        matrices[name] = codes, scales, factor
        tensors[name] = codes[:, ::2] | codes[:, 1::2] << 4
        tensors[name.replace(".weight", ".weight_scale")] = scales
        tensors[name.replace(".weight", ".weight_scale_2")] = np.array(factor)
        tensors[name.replace(".weight", ".input_scale")] = np.array(0.5, np.float32)
    return tensors, matrices


def superblocks(codes: np.ndarray, scales: np.ndarray) -> bytes:
    """Of 64 values each, by explicit loops: four scales, then of each sixteen the second half above the first."""
    found = bytearray()
    for row, own in zip(codes, scales.view(np.uint8), strict=True):
        for at in range(0, len(row), 64):
            found += own[at // 16 : at // 16 + 4].tobytes()
            for group in range(at, at + 64, 16):
                found += bytes(int(row[group + i]) | int(row[group + 8 + i]) << 4 for i in range(8))
    return bytes(found)


def laid_out(ending: str = ".scale") -> tuple[Tensors, dict[str, Any]]:
    """A checkpoint of modelopt, and the same as a GGUF file has it. ending: of scales."""
    tensors, matrices = published()
    plain = gguf_tensors(CONFIG, {name: tensors[name] for name in tensors if not re.search("_proj|scale", name)})
    found: dict[str, Any] = dict(plain)
    stacks: dict[str, list[str]] = {}
    for name in matrices:
        match = EXPERT.fullmatch(name)
        place = re.sub(r"model\.layers\.(\d+)\..*", r"blk.\1", name)
        which = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
        module = f"ffn_{match[3]}_exps" if match else which[name.split(".")[-2]]
        stacks.setdefault(f"{place}.{module}", []).append(name)
    for module, members in stacks.items():
        parts = [matrices[name] for name in members]
        shape = parts[0][0].shape if len(parts) == 1 else (len(parts), *parts[0][0].shape)
        data = b"".join(superblocks(codes, scales) for codes, scales, _ in parts)
        found[f"{module}.weight"] = Blocks("NVFP4", shape, data)
        found[f"{module}{ending}"] = np.array([factor for *_, factor in parts])
        found[f"{module}.input_scale"] = np.full(len(parts), 0.5, np.float32)
    return tensors, found


@pytest.mark.parametrize("ending", [".scale", ".weight.scale"])
def test_a_store_is_that_of_the_checkpoint(tmp_path: Path, ending: str) -> None:
    tensors, in_file = laid_out(ending)
    path = write_gguf(tmp_path / "model.gguf", gguf_metadata(CONFIG), in_file)
    checkpoint = GgufCheckpoint.open(path)
    checkpoint.check()
    assert {*checkpoint.native.parts().values()} == {"nvfp4", "bf16"} and not checkpoint.notes(checkpoint.native)
    assert outline_gguf(path).native == checkpoint.native
    for mix in ("auto", "int8"):
        path = path.rename(tmp_path / f"{mix}.gguf")
        ours, theirs = packed(path, mix), packed_checkpoint(write_tensors(tmp_path / mix, CONFIG, tensors), mix)
        with ours, theirs:
            assert same_stores(ours, theirs)


def test_fused_tensors_have_one_scale_for_all(tmp_path: Path) -> None:
    _, apart = laid_out()
    fused = dict(apart)
    for layer in range(CONFIG["num_hidden_layers"]):
        for parts, whole, experts in (("qkv", "attn_qkv", 1), (("gate", "up"), "ffn_gate_up_exps", 4)):
            modules = [f"blk.{layer}.{'attn_' + part if experts == 1 else f'ffn_{part}_exps'}" for part in parts]
            matrices = [apart[f"{module}.weight"] for module in modules]
            rows = sum(matrix.shape[-2] for matrix in matrices)
            pieces = [np.frombuffer(matrix.data, np.uint8).reshape(experts, -1) for matrix in matrices]
            shape = (*matrices[0].shape[:-2], rows, matrices[0].shape[-1])
            for module in modules:
                apart[f"{module}.scale"] = apart[f"{modules[0]}.scale"]
                for ending in ("weight", "scale", "input_scale"):
                    del fused[f"{module}.{ending}"]
            fused[f"blk.{layer}.{whole}.weight"] = Blocks("NVFP4", shape, np.concatenate(pieces, axis=1).tobytes())
            fused[f"blk.{layer}.{whole}.scale"] = apart[f"{modules[0]}.scale"]
    one, other = (
        packed(write_gguf(tmp_path / f"{name}.gguf", gguf_metadata(CONFIG), tensors))
        for name, tensors in (("apart", apart), ("fused", fused))
    )
    with one, other:
        assert same_stores(one, other)


def test_a_scale_may_be_left_out_or_in_another_file(tmp_path: Path) -> None:
    _, in_file = laid_out()
    ones = {name: np.ones_like(array) if name.endswith(".scale") else array for name, array in in_file.items()}
    bare = {name: array for name, array in in_file.items() if not name.endswith("scale")}
    one, other = (
        packed(write_gguf(tmp_path / f"{name}.gguf", gguf_metadata(CONFIG), tensors))
        for name, tensors in (("ones", ones), ("bare", bare))
    )
    with one, other:
        assert same_stores(one, other)
    order = sorted(in_file, key=lambda name: (name.startswith("blk.1"), not name.endswith("scale")))
    files = split_gguf(tmp_path / "split.gguf", gguf_metadata(CONFIG), {name: in_file[name] for name in order}, 3)
    whole = GgufCheckpoint.open(files[0])
    files[2].unlink()  # it has matrices of scales that are in the second
    found = outline_gguf(files[0])
    assert found.native == whole.native and "1 of the model's files" in found.notes[0]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "infinite": ({"blk.0.attn_q.scale": np.float32([np.inf])}, "the scales of tensor blk.0.attn_q.weight hold NaN"),
    "too many": ({"blk.0.attn_q.scale": np.ones(2, np.float32)}, r"attn_q.scale is F32 \[2\]; it must be one F32: f"),
    "too few": ({"blk.0.ffn_up_exps.scale": np.ones(3, np.float32)}, "must be one F32 or one for each expert"),
    "halves": ({"blk.0.attn_q.scale": np.ones(1, np.float16)}, r"attn_q.scale is F16 \[1\]"),
    "twice": ({"blk.0.attn_q.weight.scale": np.ones(1, np.float32)}, "attn_q.weight has two scales"),
    "of another type": ({"output.scale": np.ones(1, np.float32)}, "output.weight of BF16 has a scale, output.scale; "),
    "of nothing": ({"blk.0.attn_x.scale": np.ones(1, np.float32)}, "tensor blk.0.attn_x.scale has no place"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("mix", ["auto", "bf16"])
def test_scales_that_cannot_be(tmp_path: Path, case: str, mix: str) -> None:
    changes, message = BAD[case]
    path = write_gguf(tmp_path / "model.gguf", gguf_metadata(CONFIG), laid_out()[1] | changes)
    with pytest.raises(WeightsError, match=message):
        packed(path, mix)


def test_scales_of_other_types_that_are_not_finite_are_refused_when_opened(tmp_path: Path) -> None:
    changed = laid_out()[1]
    shape = changed["blk.0.attn_q.weight"].shape
    block = np.array([np.nan], np.float16).tobytes() + bytes(32)
    changed |= {"blk.0.attn_q.weight": Blocks("Q8_0", shape, block * (shape[0] * shape[1] // 32))}
    del changed["blk.0.attn_q.scale"], changed["blk.0.attn_q.input_scale"]
    path = write_gguf(tmp_path / "model.gguf", gguf_metadata(CONFIG), changed)
    with pytest.raises(WeightsError, match="the scales of tensor blk.0.attn_q.weight hold NaN"):
        packed(path, "bf16")
