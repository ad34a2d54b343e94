"""The models of the record, written once into a temporary folder, and what their packed stores hold."""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from recorded.names import (
    CONFIGS,
    FP8,
    MANIFEST,
    as_fp8,
    model_spec,
    mxfp4_tensors,
    random_tensors,
    write_tensors,
)

EMBEDDED = "embedded"
FORMATS = {
    **{name: name for name in ("auto", "bf16", "int8", "int4", "fp8", "mxfp4")},
    "mix": "int4,attention=fp8,head=int8,dense=mxfp4",
    "other-mix": "mxfp4,attention=int8,dense=int4,shared=fp8",
}


@dataclass(frozen=True)
class Model:
    """A random checkpoint: a family, and what its config has besides. kind: how its tensors are published."""

    family: str
    changes: dict[str, Any] = field(default_factory=dict)
    kind: str = "apart"
    dtype: str = "bf16"
    shards: int = 1
    length: int = 90  # of the longest prompt

    def write(self, path: Path) -> Path:
        config = {**CONFIGS[self.family], **self.changes}
        if self.kind == "mxfp4":
            tensors = mxfp4_tensors(model_spec(config), exponents=(118, 123))
        else:
            tensors = random_tensors(config, self.dtype, fused=self.kind == "fused")
        return write_tensors(path, config, as_fp8(tensors) if self.kind == "fp8" else tensors, self.shards)


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_scaling": {"rope_type": kind, **more}}


_WINDOW = {"use_sliding_window": True, "sliding_window": 20}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
_LONG = {"max_position_embeddings": 512}  # two key blocks
_SIZES = {"hidden_size": 200, "moe_intermediate_size": 152, "intermediate_size": 264}  # partial squares of scales
FAMILIES = {
    **{family: Model(family) for family in CONFIGS},
    "gpt_oss-mxfp4": Model(
        "gpt_oss", {"intermediate_size": 64, "quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"
    ),
    "qwen3_moe-fp8": Model("qwen3_moe", {**_SIZES, "quantization_config": FP8}, "fp8", shards=2),
}
VARIANTS = {
    "llama-untied": Model("llama", {"tie_word_embeddings": False, "attention_bias": False}),
    "llama-linear": Model("llama", _rope("linear", factor=3.0)),
    "llama-llama3": Model("llama", _rope("llama3", factor=8.0, **_LLAMA3)),
    "llama-many-heads": Model(
        "llama", {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 40, **_LONG}, length=290
    ),
    "qwen3-window": Model("qwen3", {**_WINDOW, "max_window_layers": 1, "attention_bias": True}),
    "qwen3-yarn": Model("qwen3", _rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "mixtral-window": Model("mixtral", {"tie_word_embeddings": True, "sliding_window": 9}),
    "qwen3_moe-half-dense": Model(
        "qwen3_moe",
        {"tie_word_embeddings": True, "num_hidden_layers": 4, "mlp_only_layers": [], "decoder_sparse_step": 2},
    ),
    "qwen3_moe-routed": Model("qwen3_moe", {"mlp_only_layers": [], "norm_topk_prob": False}),
    "qwen3_moe-fused": Model("qwen3_moe", kind="fused"),
    "qwen3_moe-fp32": Model("qwen3_moe", dtype="fp32", shards=3),
    "qwen3_moe-fp16": Model("qwen3_moe", dtype="fp16"),
    "qwen3_moe-long": Model("qwen3_moe", _LONG, length=290),
    "qwen2_moe-window": Model(
        "qwen2_moe",
        {"tie_word_embeddings": True, "mlp_only_layers": [], "norm_topk_prob": True, **_WINDOW, "max_window_layers": 1},
    ),
    "gpt_oss-full-first": Model(
        "gpt_oss", {"layer_types": ["full_attention", "sliding_attention"], "attention_bias": False}
    ),
    "gpt_oss-long": Model("gpt_oss", {**_LONG, "sliding_window": 150}, length=290),
}
MODELS = {**FAMILIES, **VARIANTS}
BOUNDED = ("step3p5",)  # families whose experts have bounds, which no cache knows of
WITH_EXPERTS = [
    name
    for name in [*FAMILIES, EMBEDDED]
    if name == EMBEDDED or (name not in BOUNDED and model_spec(CONFIGS[FAMILIES[name].family]).moe_layers)
]


class Workshop:
    """Checkpoints and stores under one folder, made when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = cache(self._write)

    def _write(self, name: str) -> Path | None:
        """None is the embedded model."""
        return None if name == EMBEDDED else MODELS[name].write(self.folder / "checkpoints" / name)

    def stores(self, name: str, format: str) -> Path:
        """The folder in which the stores of a model in a format are kept."""
        return self.folder / "stores" / f"{name}-{format}"

    def new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder))


@contextmanager
def workshop() -> Iterator[Workshop]:
    with tempfile.TemporaryDirectory(prefix="hybrid-record-") as folder:
        yield Workshop(Path(folder).resolve())


def prompts_of(name: str) -> list[list[int]]:
    """Two short prompts and one that takes several chunks."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    length = MODELS[name].length if name in MODELS else 50
    return [random.integers(3, 128, size).tolist() for size in (5, 9, length)]


def store_record(folder: Path) -> dict[str, Any]:
    """The one store in a folder: a checksum of its tensors' places, and one of the bytes of each kind of tensor."""
    (manifest_file,) = folder.glob(f"*/{MANIFEST}")
    manifest = json.loads(manifest_file.read_text())
    places, bytes_of = [], {}
    for file in sorted(manifest_file.parent.glob("*.safetensors")):
        for name, entry, data in _tensors(file):
            places.append((file.name, name, entry["dtype"], entry["shape"], entry["data_offsets"]))
            kind = name.split(".")[-1]
            bytes_of[kind] = zlib.crc32(data, bytes_of.get(kind, 0))
    mix = " ".join(f"{part}={format}" for part, format in manifest["mix"].items())
    return {
        "layout": manifest["layout_version"],
        "mix": mix,
        "tensors": len(places),
        "places": f"{zlib.crc32(json.dumps(places).encode()):08x}",
        "bytes": {kind: f"{crc:08x}" for kind, crc in sorted(bytes_of.items())},
    }


def _tensors(path: Path) -> Iterator[tuple[str, dict[str, Any], bytes]]:
    """Name, entry and bytes of every tensor of a safetensors file, in the order of the file."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:start])
    entries.pop("__metadata__", None)
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        first, end = entry["data_offsets"]
        yield name, entry, data[start + first : start + end]
