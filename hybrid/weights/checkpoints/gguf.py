"""A GGUF file, or its splits, as a checkpoint."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from hybrid.errors import ConfigError, WeightsError
from hybrid.formats.block import Array, Bytes, all_finite
from hybrid.formats.fp4 import TOP
from hybrid.formats.fp8 import LARGEST
from hybrid.formats.mix import FormatMix
from hybrid.models import model_spec
from hybrid.models.spec import ModelSpec
from hybrid.weights.checkpoints.exact_mix import opened
from hybrid.weights.checkpoints.gguf_architectures import SELECTING
from hybrid.weights.checkpoints.gguf_blocks import FLOATS, READABLE, TABLES, packed, row_bytes, values
from hybrid.weights.checkpoints.gguf_config import gguf_config
from hybrid.weights.checkpoints.gguf_files import Gguf, read_gguf
from hybrid.weights.checkpoints.gguf_metadata import GgufMetadata
from hybrid.weights.checkpoints.gguf_mix import HOLDS, gguf_kinds, gguf_mix
from hybrid.weights.checkpoints.gguf_names import (
    GROUP_NORM,
    apart,
    as_published,
    joined_kv,
    kv_parts,
    permuted_heads,
    with_gguf_names,
)
from hybrid.weights.checkpoints.gguf_rope import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS
from hybrid.weights.checkpoints.gguf_scales import ScaledTensor, with_scales
from hybrid.weights.checkpoints.huggingface import Checkpoint
from hybrid.weights.checkpoints.matrices import INTEGERS, Source, TurnedSource
from hybrid.weights.shard import Entry, read_bytes


@dataclass(frozen=True)
class GgufSource(Source):
    """Rows of blocks of a GGUF type. heads: how many heads the rows of the whole tensor belong to, if the two halves of
    each lie in turn; they are read in their order then. published: the format that they are packed in without loss.
    """

    heads: int = 0
    published: str | None = None  # type: ignore[misc]

    @property
    def straight(self) -> bool:
        return True

    def packed_as(self, format: str) -> GgufSource:
        return replace(self, published=format if format in HOLDS.get(self.entry.dtype, ()) else None)

    def floats(self, start: int, stop: int) -> Array:
        found = values(self.entry.dtype, self._rows(start, stop), self._factor)
        if self.entry.dtype not in FLOATS and not all_finite(found):
            raise self._bad_scales()
        return found

    def blocks(self, start: int, stop: int) -> Bytes:
        assert self.published is not None
        return packed(self.entry.dtype, self._rows(start, stop), self.published, self._factor)

    @cached_property
    def _factor(self) -> np.float32:
        """What all values are multiplied by. Raises `WeightsError` where that makes infinity of the largest."""
        if not isinstance(self.entry, ScaledTensor):
            return np.float32(1)
        scale = self.entry.scale
        found: np.float32 = read_bytes(scale, 0, scale.end - scale.start).view(np.float32)[0]
        if not abs(found) <= np.finfo(np.float32).max / np.float32(LARGEST * TOP):
            raise self._bad_scales()
        return found

    def _rows(self, start: int, stop: int) -> Bytes:
        size = row_bytes(self.entry.dtype, self.columns)
        if not self.heads:
            return self._read(size, start, stop)
        places = _stored_rows(np.arange(self.start + start, self.start + stop), self.entry.shape[0] // self.heads)
        first = int(places.min())
        everything = replace(self, start=0, count=self.entry.shape[0], heads=0)
        return np.ascontiguousarray(everything._read(size, first, int(places.max()) + 1)[places - first])


def _stored_rows(rows: Array, dim: int) -> Array:
    """Where rows of heads of `dim` lie: row i of the first half of a head at 2i, of the second at 2i + 1."""
    heads, places = np.divmod(rows, dim)
    halves, pairs = np.divmod(places, dim // 2)
    stored: Array = heads * dim + 2 * pairs + halves
    return stored


@dataclass(frozen=True)
class GgufCheckpoint(Checkpoint):
    """An opened GGUF model. Its names are those of GGUF files, with the experts apart. heads: of the tensors whose rows
    are permuted. blocks: the number of layers with those that predict further tokens.
    """

    heads: Mapping[str, int] = field(default_factory=dict)
    blocks: int = 0

    @classmethod
    def open(cls, path: Path) -> GgufCheckpoint:
        """Read the headers of all files of a model. Raises `ConfigError` and `WeightsError`; see also `check`."""
        return cls.of(read_gguf(Path(path)))

    @classmethod
    def of(cls, model: Gguf) -> GgufCheckpoint:
        """The model of headers that have been read."""
        config, plain = _config_and_spec(model)
        architecture = str(model.metadata["general.architecture"])
        spec = with_gguf_names(plain, architecture)
        names = {name for name, _ in spec.checkpoint_shapes("apart")}
        tensors = with_scales(model.tensors, names, whole=not model.missing)
        entries = joined_kv(spec, _shaped(spec, apart(spec, tensors)))
        _check_vocabulary(model, config["vocab_size"])
        heads, blocks = permuted_heads(spec, architecture), GgufMetadata(model).size("block_count")
        mix = gguf_mix(spec, entries)
        return cls(model.path, config, spec, mix, entries, "apart", heads, blocks)

    def rows(self, name: str, start: int, count: int, step: int = 1) -> Source:
        """`count` rows of a tensor seen as [-1, columns], from row `start` on."""
        entry = self._entry(name)
        _require_readable(name, entry)
        if entry.start == entry.end:
            return self._kv_rows(name, start, count)
        return GgufSource(name, entry, start, count, step, heads=self.heads.get(name, 0))

    def _kv_rows(self, name: str, start: int, count: int) -> Source:
        """Rows of one head, of its keys or values, of a tensor that the file has in two."""
        keys, values = (self._entry(part) for part in kv_parts(name))
        head, place = divmod(start, keys.shape[2] + values.shape[1])
        if place < keys.shape[2]:
            assert (place, count) == (0, keys.shape[2])
            return TurnedSource.of(self.rows(kv_parts(name)[0], head * keys.shape[1], keys.shape[1]))
        first = head * values.shape[1] + place - keys.shape[2]
        return self.rows(kv_parts(name)[1], first, count)

    def read(self, name: str) -> Array:
        """The whole tensor, as floats. A row of biases counts as a column, whose rows may be permuted."""
        entry = self._entry(name)
        _require_readable(name, entry)
        if name in self.heads and len(entry.shape) == 1:
            column = replace(entry, shape=(*entry.shape, 1))
            return GgufSource(name, column, 0, entry.shape[0], heads=self.heads[name]).floats(0, entry.shape[0])[:, 0]
        return as_published(self.config["model_type"], name, super().read(name))

    def notes(self, mix: FormatMix) -> list[str]:
        """What is opened to bf16 because no format holds it, where no other was asked for."""
        if mix != self.native:
            return []
        return [
            f"note: {part}: {' and '.join(types)} in the file, opened to bf16 where no packed format holds all of a "
            f"matrix; another --format {part}= takes less memory"
            for part, types in opened(self.spec, gguf_kinds(self.entries), mix).items()
        ]

    def check(self) -> None:
        """Raise `WeightsError` unless every tensor that the spec needs is there, of its shape and a type that can be
        read, and no other that would change what the model says.
        """
        wanted = dict(self.spec.checkpoint_shapes("apart"))
        for name, shape in wanted.items():
            entry = self._entry(name)
            _require_readable(name, entry)
            if entry.shape != shape:
                raise WeightsError(
                    f"{entry.path}: tensor {name} has shape {reprlib.repr(list(entry.shape))}, its metadata asks for "
                    f"{list(shape)}: fetch or make the file again"
                )
        joined = [name for name in wanted if self.entries[name].start == self.entries[name].end]
        parts = [part for name in joined for part in kv_parts(name) if part in self.entries]
        for name in parts:
            _require_readable(name, self.entries[name])
        known = {*wanted, *parts}
        for name, entry in self.entries.items():
            if name not in known and not self._is_unused(name):
                raise WeightsError(
                    f"{entry.path}: tensor {name:.100} has no place in a model of its architecture, as this program "
                    "knows it: take another copy of the model"
                )

    def _is_unused(self, name: str) -> bool:
        """Whether a tensor is read elsewhere, or is of a layer that predicts further tokens, or of an indexer."""
        if self.spec.model_type in SELECTING and ".indexer" in name:
            return True
        layer = name.split(".")[1] if name.startswith("blk.") else ""
        further = range(len(self.spec.layers), self.blocks)
        return name in (ROPE_FACTORS, SHORT_FACTORS, LONG_FACTORS) or (layer.isdecimal() and int(layer) in further)

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise WeightsError(
                f"{self.path}: tensor {name} is missing, its metadata asks for it: fetch all files again"
            )
        return self.entries[name]


def describe_gguf(path: Path) -> tuple[dict[str, Any], FormatMix]:
    """The same as `GgufCheckpoint.config` and `native`, from the headers alone."""
    checkpoint = GgufCheckpoint.open(path)
    return checkpoint.config, checkpoint.native


def _check_vocabulary(model: Gguf, rows: int) -> None:
    tokens = model.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > rows:
        raise WeightsError(
            f"{model.path}: has {len(tokens)} tokens and an embedding of {rows} rows: fetch or make the file again"
        )


def _config_and_spec(model: Gguf) -> tuple[dict[str, Any], ModelSpec]:
    config = gguf_config(model)
    try:
        return config, model_spec(config)
    except ConfigError as error:
        problem = str(error).removeprefix("config.json: ")
        raise WeightsError(f"{model.path}: its metadata, as a config.json, is wrong: {problem}") from None


def _shaped(spec: ModelSpec, entries: dict[str, Entry]) -> dict[str, Entry]:
    """With the dimensions of size 1 that a spec asks for, which GGUF files leave out; weights of groups as one row."""
    for name, shape in spec.checkpoint_shapes("apart"):
        entry = entries.get(name)
        flat = name.endswith(GROUP_NORM) and entry and prod(entry.shape) == prod(shape)
        if entry and entry.shape != shape and (flat or _long(entry.shape) == _long(shape)):
            entries[name] = replace(entry, shape=shape)
    return entries


def _long(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape if size != 1]


def _require_readable(name: str, entry: Entry) -> None:
    allowed = tuple(INTEGERS) if name.endswith(TABLES) else READABLE
    if entry.dtype not in allowed:
        raise WeightsError(
            f"{entry.path}: tensor {name:.100} has type {entry.dtype}, which is not read; read are "
            f"{', '.join(allowed)}: take another quantisation of the model"
        )
