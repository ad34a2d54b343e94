"""A Hugging Face checkpoint: config.json and safetensors, single or sharded, experts apart or fused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from hybrid.errors import WeightsError
from hybrid.models import model_spec
from hybrid.models.spec import LayerSpec, ModelSpec
from hybrid.weights.files import read_json_object
from hybrid.weights.shard import Entry, read_bytes, read_header

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES: dict[str, npt.DTypeLike] = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}


@dataclass(frozen=True)
class Rows:
    """A matrix in the checkpoint: `count` rows from row `start` of a tensor seen as [-1, columns]."""

    name: str
    start: int
    count: int


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Nothing is held open or in memory: a read opens its file, reads what it needs."""

    path: Path
    config: dict[str, Any]
    spec: ModelSpec
    entries: Mapping[str, Entry]
    fused: bool  # the experts of a layer are stacked in 3-D tensors

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read config.json and the headers. Raises `ConfigError` and `WeightsError`; see also `check`."""
        path = Path(path)
        config = read_config(path)
        spec, entries = model_spec(config), _find_tensors(path)
        moe = [index for index, layer in enumerate(spec.layers) if layer.feed_forward.is_moe]
        fused = any(spec.names.fused_gate_up.format(layer=index) in entries for index in moe)
        if fused:
            spec = replace(spec, names=replace(spec.names, router=spec.names.fused_router))
        return cls(path, config, spec, entries, fused)

    def names(self) -> list[str]:
        return sorted(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def read(self, name: str) -> npt.NDArray[Any]:
        """The whole tensor, in the dtype of the checkpoint."""
        return self.read_rows(name, 0, int(np.prod(self.shape(name)[:-1]))).reshape(self.shape(name))

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows [stop - start, columns] of a tensor seen as [-1, columns], without reading the rest."""
        entry = self._entry(name)
        dtype = np.dtype(self._dtype(name))
        columns = entry.shape[-1] if entry.shape else 1
        row_bytes = columns * dtype.itemsize
        return read_bytes(entry, start * row_bytes, stop * row_bytes).view(dtype).reshape(-1, columns)

    def matrix(self, name: str) -> Rows:
        """All rows of a 2-D tensor."""
        return Rows(name, 0, self.shape(name)[0])

    def feed_forward(self, layer: int, expert: int) -> tuple[Rows, Rows, Rows]:
        """Gate, up and down of one expert, or of a dense layer, which counts as one expert."""
        names, size, hidden = (
            self.spec.names,
            self.spec.layers[layer].feed_forward.intermediate,
            self.spec.hidden,
        )
        if not self.spec.layers[layer].feed_forward.is_moe:
            apart = (names.gate, names.up, names.down)
        elif not self.fused:
            apart = (names.expert_gate, names.expert_up, names.expert_down)
        else:
            gate_up, first = names.fused_gate_up.format(layer=layer), 2 * size * expert
            down = Rows(names.fused_down.format(layer=layer), hidden * expert, hidden)
            return Rows(gate_up, first, size), Rows(gate_up, first + size, size), down
        gate, up, down = (self.matrix(name.format(layer=layer, expert=expert)) for name in apart)
        return gate, up, down

    def check(self) -> None:
        """Raise `WeightsError` unless every tensor that the spec needs is there with its shape and dtype."""
        for name, shape in tensor_shapes(self.spec, self.fused):
            self._dtype(name)
            if self.shape(name) != shape:
                raise WeightsError(
                    f"{self._entry(name).path}: tensor {name} has shape {list(self.shape(name))}, "
                    f"config.json asks for {list(shape)}: one of them belongs to another model"
                )

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise WeightsError(f"{self.path}: tensor {name} is missing, config.json asks for it: fetch all files again")
        return self.entries[name]

    def _dtype(self, name: str) -> npt.DTypeLike:
        entry = self._entry(name)
        if entry.dtype not in DTYPES:
            raise WeightsError(
                f"{entry.path}: tensor {name} has dtype {entry.dtype}, allowed are {', '.join(DTYPES)}: "
                "take the unquantised checkpoint"
            )
        return DTYPES[entry.dtype]


def tensor_shapes(spec: ModelSpec, fused: bool = False) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor that a checkpoint of `spec` has, with its experts fused or apart."""
    names = spec.names
    yield names.embedding, (spec.vocab, spec.hidden)
    for index, layer in enumerate(spec.layers):
        shapes = [*_attention_shapes(spec, layer), *_feed_forward_shapes(spec, layer, fused)]
        yield from ((name.format(layer=index), shape) for name, shape in shapes)
    yield names.final_norm, (spec.hidden,)
    if not spec.tied:
        yield names.head, (spec.vocab, spec.hidden)


def bias_name(weight: str) -> str:
    return weight.removesuffix(".weight") + ".bias"


def read_config(path: Path) -> dict[str, Any]:
    """The contents of config.json in a model directory; raises `WeightsError` when there is none."""
    if not path.exists():
        raise WeightsError(f"{path}: no such directory; give the directory of a model, with its config.json")
    if not path.is_dir():
        raise WeightsError(f"{path}: is not a directory; give the directory of a model, with its config.json")
    try:
        empty = not any(path.iterdir())
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror}); allow reading it") from None
    if empty:
        raise WeightsError(f"{path}: the directory is empty; it must hold config.json and safetensors files")
    if not (path / "config.json").is_file():
        raise WeightsError(f"{path}: has no config.json; give the directory of a Hugging Face model")
    return read_json_object(path / "config.json")


def _attention_shapes(spec: ModelSpec, layer: LayerSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    names, attention, hidden = spec.names, layer.attention, spec.hidden
    width, kv_width = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    yield names.attention_norm, (hidden,)
    for name, rows in ((names.q, width), (names.k, kv_width), (names.v, kv_width)):
        yield name, (rows, hidden)
        if attention.qkv_bias:
            yield bias_name(name), (rows,)
    yield names.out, (hidden, width)
    if attention.out_bias:
        yield bias_name(names.out), (hidden,)
    if attention.qk_norm == "head":
        yield names.q_norm, (attention.head_dim,)
        yield names.k_norm, (attention.head_dim,)


def _feed_forward_shapes(spec: ModelSpec, layer: LayerSpec, fused: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    names, ffn, hidden = spec.names, layer.feed_forward, spec.hidden
    wide, narrow = (ffn.intermediate, hidden), (hidden, ffn.intermediate)
    yield names.feed_forward_norm, (hidden,)
    if not ffn.is_moe:
        yield from ((names.gate, wide), (names.up, wide), (names.down, narrow))
        return
    yield names.fused_router if fused else names.router, (ffn.experts, hidden)
    if fused:
        yield names.fused_gate_up, (ffn.experts, 2 * ffn.intermediate, hidden)
        yield names.fused_down, (ffn.experts, hidden, ffn.intermediate)
        return
    for expert in range(ffn.experts):
        for name, shape in ((names.expert_gate, wide), (names.expert_up, wide), (names.expert_down, narrow)):
            yield name.replace("{expert}", str(expert)), shape


def _find_tensors(path: Path) -> dict[str, Entry]:
    if (path / SINGLE).is_file():
        return read_header(path / SINGLE)
    if (path / INDEX).is_file():
        return _read_shards(path, _read_index(path / INDEX))
    found = (
        "pytorch .bin files are not read: convert them to safetensors"
        if any(path.glob("*.bin"))
        else ("fetch all files of the model again")
    )
    raise WeightsError(f"{path}: has neither {SINGLE} nor {INDEX}; {found}")


def _read_index(index: Path) -> dict[str, str]:
    """Shard file by tensor name; the files must lie in the directory of the index."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index}: has no weight_map from tensor names to files; fetch the file again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or file in ("", ".", "..") or Path(file).name != file:
            raise WeightsError(
                f"{index}: places tensor {name} in {file!r}; it must be a file name without a directory: "
                "fetch the file again"
            )
    return weight_map


def _read_shards(path: Path, weight_map: Mapping[str, str]) -> dict[str, Entry]:
    for file in sorted(set(weight_map.values())):
        if not (path / file).is_file():
            raise WeightsError(f"{path / file}: named in {INDEX} but missing; fetch all files of the model again")
    headers = {file: read_header(path / file) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise WeightsError(
                f"{path / file}: has no tensor {name}, which {INDEX} places there; fetch both files again"
            )
    return {name: headers[file][name] for name, file in weight_map.items()}
