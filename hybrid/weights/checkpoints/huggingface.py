"""A Hugging Face checkpoint: config.json and safetensors, single or sharded, in any form that is published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hybrid.errors import WeightsError
from hybrid.files import read_json_object
from hybrid.formats.block import Array
from hybrid.formats.fp8 import SQUARE
from hybrid.formats.mix import FormatMix
from hybrid.models import model_spec
from hybrid.models.spec import ModelSpec
from hybrid.models.tensors import ExpertForm, Gated, GatedNames, bias_name, in_layer
from hybrid.weights.checkpoints.matrices import (
    FLOATS,
    FP8_DTYPE,
    MXFP4_DTYPE,
    Fp8Source,
    Mxfp4Source,
    Source,
    TransposedSource,
)
from hybrid.weights.checkpoints.published import native_mix
from hybrid.weights.shard import Entry, read_header

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Nothing is held open or in memory: a read opens its file, reads what it needs."""

    path: Path
    config: dict[str, Any]
    spec: ModelSpec
    native: FormatMix
    entries: Mapping[str, Entry]
    form: ExpertForm

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read config.json and the headers. Raises `ConfigError` and `WeightsError`; see also `check`."""
        path = Path(path)
        config = read_config(path)
        spec, native, entries = model_spec(config), native_mix(config), _find_tensors(path)
        form = _expert_form(spec, entries)
        if form != "apart":
            spec = spec.with_fused_experts()
        return cls(path, config, spec, native, entries, form)

    def names(self) -> list[str]:
        return sorted(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def read(self, name: str) -> Array:
        """The whole tensor, in the dtype of the checkpoint, or dequantised as float32."""
        shape = self.shape(name)
        source = self.rows(name, 0, int(np.prod(shape[:-1])))
        return source.floats(0, source.count).reshape(shape)

    def matrix(self, name: str) -> Source:
        """All rows of a 2-D tensor."""
        return self.rows(name, 0, self.shape(name)[0])

    def rows(self, name: str, start: int, count: int, step: int = 1) -> Source:
        """`count` rows of a tensor seen as [-1, columns], from row `start` on."""
        entry = self._entry(name)
        if entry.dtype == FP8_DTYPE and len(entry.shape) > 1:
            return Fp8Source(name, entry, start, count, step, scales=self._entry(f"{name}_scale_inv"))
        _require_dtype(name, entry, tuple(FLOATS))
        return Source(name, entry, start, count, step)

    def gated(self, origin: Gated, expert: int) -> tuple[Source, Source, Source]:
        """Gate, up and down of one expert, or of a dense feed-forward, which counts as one expert."""
        names = origin.names
        if not self._stacks(names):
            gate_name, up_name, down_name = names.of_expert(expert)
            return self.matrix(gate_name), self.matrix(up_name), self.matrix(down_name)
        first, size = 2 * origin.intermediate * expert, origin.intermediate
        (gate, up), step = ((first, first + 1), 2) if names.fused_alternate else ((first, first + size), 1)
        return (
            self._fused(names, names.fused_gate_up, gate, size, step),
            self._fused(names, names.fused_gate_up, up, size, step),
            self._fused(names, names.fused_down, origin.hidden * expert, origin.hidden, 1),
        )

    def gated_biases(self, names: GatedNames, expert: int) -> tuple[Array, Array, Array]:
        """Biases of gate, up [intermediate] and down [hidden] of one expert or of a dense feed-forward."""
        if not self._stacks(names):
            gate, up, down = (self.read(bias_name(name)) for name in names.of_expert(expert))
            return gate, up, down
        fused = (names.fused_gate_up, names.fused_down)
        both, down = (self.rows(bias_name(name), expert, 1).floats(0, 1)[0] for name in fused)
        gate, up = (both[0::2], both[1::2]) if names.fused_alternate else np.split(both, 2)
        return gate, up, down

    def _stacks(self, names: GatedNames) -> bool:
        """Whether these are stacked here, all experts of a layer in one tensor."""
        return self.form != "apart" and bool(names.fused_gate_up)

    def check(self) -> None:
        """Raise `WeightsError` unless every tensor that the spec needs is there with its shape and dtype."""
        for name, shape in self.spec.checkpoint_shapes(self.form):
            entry = self._entry(name)
            quantised = entry.dtype == FP8_DTYPE and len(shape) > 1
            blocks = self.form == "mxfp4" and name.endswith(("_blocks", "_scales"))
            _require_dtype(name, entry, (MXFP4_DTYPE,) if blocks else (*FLOATS, *[FP8_DTYPE] * quantised))
            _require_shape(name, entry, shape)
            if quantised:
                scales = f"{name}_scale_inv"
                _require_dtype(scales, self._entry(scales), tuple(FLOATS))
                squares = (*shape[:-2], -(-shape[-2] // SQUARE), -(-shape[-1] // SQUARE))
                _require_shape(scales, self._entry(scales), squares)

    def _fused(self, names: GatedNames, name: str, start: int, count: int, step: int) -> Source:
        if self.form == "fused" and names.fused_transposed:
            _require_dtype(name, self._entry(name), tuple(FLOATS))
            return TransposedSource(name, self._entry(name), start, count, step)
        if self.form == "fused":
            return self.rows(name, start, count, step)
        blocks, scales = self._entry(f"{name}_blocks"), self._entry(f"{name}_scales")
        return Mxfp4Source(name, blocks, start, count, step, scales=scales)

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise WeightsError(f"{self.path}: tensor {name} is missing, config.json asks for it: fetch all files again")
        return self.entries[name]


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


def _expert_form(spec: ModelSpec, entries: Mapping[str, Entry]) -> ExpertForm:
    experts = [in_layer(spec.layers[index].feed_forward.names.experts, index) for index in spec.moe_layers]
    if any(f"{names.fused_gate_up}_blocks" in entries for names in experts):
        return "mxfp4"
    return "fused" if any(names.fused_gate_up in entries or not names.gate for names in experts) else "apart"


def _require_dtype(name: str, entry: Entry, allowed: tuple[str, ...]) -> None:
    if entry.dtype not in allowed:
        raise WeightsError(
            f"{entry.path}: tensor {name} has dtype {entry.dtype}, allowed are {', '.join(allowed)}: "
            "take the unquantised checkpoint"
        )


def _require_shape(name: str, entry: Entry, shape: tuple[int, ...]) -> None:
    if entry.shape != shape:
        raise WeightsError(
            f"{entry.path}: tensor {name} has shape {list(entry.shape)}, "
            f"config.json asks for {list(shape)}: one of them belongs to another model"
        )


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
