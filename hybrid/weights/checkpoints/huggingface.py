"""A Hugging Face checkpoint: config.json and safetensors, single or sharded, in any form that is published."""

from __future__ import annotations

import reprlib
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from hybrid.errors import WeightsError
from hybrid.formats.block import Array
from hybrid.formats.fp8 import SQUARE
from hybrid.formats.mix import FormatMix
from hybrid.models import model_spec
from hybrid.models.spec import ModelSpec
from hybrid.models.tensors import ExpertForm, Gated, GatedNames, bias_name
from hybrid.weights.checkpoints.exact_mix import opened
from hybrid.weights.checkpoints.files import find_tensors, may_read_weights, quantisation_of, read_config
from hybrid.weights.checkpoints.matrices import (
    FLOATS,
    FP8_DTYPE,
    INTEGERS,
    MXFP4_DTYPE,
    TABLES,
    Fp8Source,
    Mxfp4Source,
    Source,
    TransposedSource,
)
from hybrid.weights.checkpoints.published import native_mix, published_kinds
from hybrid.weights.checkpoints.schemes.base import MatrixEntry
from hybrid.weights.checkpoints.schemes.methods import with_matrices
from hybrid.weights.checkpoints.stacked import experts_apart
from hybrid.weights.shard import Entry, same_bytes

_KV_FIELDS = ("kv_cache_scheme", "kv_cache_quant_algo")  # of quantization_config
_CODES = ("qweight", "weight_packed")  # what names of tensors of quantised matrices end with
_FORMS: tuple[ExpertForm, ...] = ("mxfp4", "fused", "apart")  # in the order in which one layer decides for all


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
        entries = _entries(path, config)
        config = _corrected(config, entries)
        spec = model_spec(config)
        form = _expert_form(spec, entries)
        if form != "apart":
            spec = spec.with_fused_experts()
        spec = _as_they_lie(spec, entries)
        if spec.tied and spec.names.embedding not in entries and spec.names.head in entries:
            spec = replace(spec, names=replace(spec.names, embedding=spec.names.head))
        return cls(path, config, spec, native_mix(config, entries), entries, form)

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
        if isinstance(entry, MatrixEntry):
            return entry.source(name, start, count, step)
        if entry.dtype == FP8_DTYPE and len(entry.shape) > 1:
            return Fp8Source(name, entry, start, count, step, scales=self._scales(name))
        _require_dtype(name, entry, _dtypes(name))
        return Source(name, entry, start, count, step)

    def gated(self, origin: Gated, expert: int) -> tuple[Source, ...]:
        """Gate, if there is one, up and down of one expert, or of a dense feed-forward, which counts as one expert."""
        names = origin.names
        if self._form(names) == "apart":
            return tuple(self.matrix(name) for name in names.of_expert(expert) if name)
        first, size = origin.wide * origin.intermediate * expert, origin.intermediate
        if origin.wide == 1:
            only = self._fused(names, names.fused_gate_up, first, size, 1)
            return only, self._fused(names, names.fused_down, origin.hidden * expert, origin.hidden, 1)
        (gate, up), step = ((first, first + 1), 2) if names.fused_alternate else ((first, first + size), 1)
        return (
            self._fused(names, names.fused_gate_up, gate, size, step),
            self._fused(names, names.fused_gate_up, up, size, step),
            self._fused(names, names.fused_down, origin.hidden * expert, origin.hidden, 1),
        )

    def gated_biases(self, names: GatedNames, expert: int) -> list[tuple[str, Array]]:
        """Biases of gate, up [intermediate] and down [hidden] of one expert or of a dense feed-forward, each with the
        name of its tensor.
        """
        if self._form(names) == "apart":
            return [(bias_name(name), self.read(bias_name(name))) for name in names.of_expert(expert)]
        of_both, of_down = (bias_name(name) for name in (names.fused_gate_up, names.fused_down))
        both, down = (self.rows(name, expert, 1).floats(0, 1)[0] for name in (of_both, of_down))
        gate, up = (both[0::2], both[1::2]) if names.fused_alternate else np.split(both, 2)
        return [(of_both, gate), (of_both, up), (of_down, down)]

    def _form(self, names: GatedNames) -> ExpertForm:
        """That of the experts of one layer: a few layers of a quantised checkpoint may not be quantised."""
        return _layer_form(names, self.entries) or (self.form if names.fused_gate_up else "apart")

    def notes(self, mix: FormatMix) -> list[str]:
        """Lines about what packing in these formats leaves out or changes, beyond what was asked for."""
        return [*self._left_out(), *self._changed(mix)]

    def _left_out(self) -> list[str]:
        """What a model of more than text has beside its text model."""
        if not self.spec.module:
            return []
        known = (f"model.{self.spec.module}.", "lm_head.", "mtp.")  # the last: layers that predict further tokens
        found = [name for name in self.entries if not name.startswith(known)]
        if not found:
            return []
        towers = sorted({name.removeprefix("model.").partition(".")[0] for name in found})
        return [f"note: {len(found)} tensors of {', '.join(towers)} are not read: the model is served for text alone"]

    def _changed(self, mix: FormatMix) -> list[str]:
        lines = [
            f"note: config.json quantises keys and values ({field}), which is not done; --kv-format says how they are "
            "kept"
            for field in _KV_FIELDS
            if (quantisation_of(self.config) or {}).get(field)
        ]
        if mix != self.native:
            return lines
        parts: dict[str, list[str]] = {}
        for part, kinds in opened(self.spec, published_kinds(self.entries), mix).items():
            parts.setdefault(" and ".join(kinds), []).append(part)
        return lines + [
            f"note: {' and '.join(names)}: {kinds} in the checkpoint, opened to bf16 where no packed format holds all "
            "of a matrix, which rounds a weight by at most 1/256 of itself; another --format takes less memory"
            for kinds, names in parts.items()
        ]

    def check(self) -> None:
        """Raise `WeightsError` unless every tensor that the spec needs is there with its shape and dtype."""
        experts = self.spec.expert_names()
        forms = {layer: self._form(names) for layer, names in experts.items()}
        blocked = "mxfp4" in forms.values()
        for layer, names in experts.items():
            self._check_fused(names, forms[layer])
        for name, shape in self.spec.checkpoint_shapes(forms):
            entry = self._entry(name)
            if isinstance(entry, MatrixEntry):
                _require_shape(name, entry, shape)
                continue
            quantised = entry.dtype == FP8_DTYPE and len(shape) > 1
            blocks = blocked and name.endswith(("_blocks", "_scales"))
            _require_dtype(name, entry, (MXFP4_DTYPE,) if blocks else (*_dtypes(name), *[FP8_DTYPE] * quantised))
            _require_shape(name, entry, shape)
            if quantised:
                scales, squares = self._scales(name), (*shape[:-2], *(-(-size // SQUARE) for size in shape[-2:]))
                _require_dtype(f"{name}_scale_inv", scales, tuple(FLOATS))
                _require_shape(f"{name}_scale_inv", scales, squares)

    def _check_fused(self, names: GatedNames, form: ExpertForm) -> None:
        """Raise `WeightsError` for fused experts beside which there is what the way they are read would leave out."""
        in_fp8 = "" if names.fused_transposed else f"fp8 with a scale for {SQUARE} x {SQUARE} values (_scale_inv), "
        for name in filter(None, (names.fused_gate_up, names.fused_down)):
            if isinstance(self.entries.get(name), MatrixEntry):
                continue
            known = {bias_name(name), *(name + ending for ending in self._endings(names, name, form))}
            stray = next((other for other in self._beside(name) if other not in known), None)
            if stray:
                raise WeightsError(
                    f"{self.path}: tensor {stray:.200} says that the experts of a layer, which are one tensor, are "
                    f"quantised in a way that is not read; read are {in_fp8}mxfp4 (_blocks, _scales) and floats: take "
                    "the unquantised checkpoint, or one whose experts are tensors of their own"
                )

    def _endings(self, names: GatedNames, name: str, form: ExpertForm) -> tuple[str, ...]:
        """Of the names of the tensors that fused experts of this form are made of."""
        if form == "mxfp4":
            return ("_blocks", "_scales")
        in_fp8 = form == "fused" and name in self.entries and self.entries[name].dtype == FP8_DTYPE
        return ("", "_scale_inv") if in_fp8 and not names.fused_transposed else ("",)

    def _beside(self, name: str) -> list[str]:
        """Names of this tensor and of all that begin with it, as those of its scales do."""
        start = bisect_left(self._sorted, name)
        return list(takewhile(lambda other: other.startswith(name), self._sorted[start:]))

    @cached_property
    def _sorted(self) -> list[str]:
        return self.names()

    def _fused(self, names: GatedNames, name: str, start: int, count: int, step: int) -> Source:
        fused = self._form(names) == "fused"
        if fused and names.fused_transposed:
            _require_dtype(name, self._entry(name), tuple(FLOATS))
            return TransposedSource(name, self._entry(name), start, count, step)
        if fused:
            return self.rows(name, start, count, step)
        blocks, scales = self._entry(f"{name}_blocks"), self._entry(f"{name}_scales")
        return Mxfp4Source(name, blocks, start, count, step, scales=scales)

    def _scales(self, name: str) -> Entry:
        """Of a matrix in fp8."""
        scales = f"{name}_scale_inv"
        if scales not in self.entries:
            raise WeightsError(
                f"{self.path}: tensor {scales} is missing, with the scales of {name}, which is in fp8: "
                "fetch all files again, or take the unquantised checkpoint"
            )
        return self.entries[scales]

    def _entry(self, name: str) -> Entry:
        module = name.removesuffix(".weight")
        for part in _CODES:
            if name not in self.entries and f"{module}.{part}" in self.entries:
                raise WeightsError(
                    f"{self.path}: tensor {name} is stored as codes ({part}), and quantization_config of config.json "
                    "does not say how to read them: fetch config.json again"
                )
        if name not in self.entries:
            raise WeightsError(f"{self.path}: tensor {name} is missing, config.json asks for it: fetch all files again")
        return self.entries[name]


def describe_huggingface(path: Path) -> tuple[dict[str, Any], FormatMix]:
    """Contents of config.json as `Checkpoint.config` has them, and `Checkpoint.native`; of config.json alone where no
    weights are, or none that may be read. Headers are read only if something depends on them.
    """
    config = read_config(path)
    spec = model_spec(config)
    depends = quantisation_of(config) is not None or spec.tied
    if not depends or not may_read_weights(path):
        return config, native_mix(config)
    entries = _entries(path, config)
    config = _corrected(config, entries)
    return config, native_mix(config, entries)


def _entries(path: Path, config: Mapping[str, Any]) -> Mapping[str, Entry]:
    """Where each tensor lies, and each matrix that several of them make, with experts apart that are stacked."""
    spec = model_spec(config)
    return with_matrices(config, experts_apart(spec, find_tensors(path, spec.module)))


def _corrected(config: dict[str, Any], entries: Mapping[str, Entry]) -> dict[str, Any]:
    """A head beside embeddings that config.json calls tied is used if it differs, as `transformers` does."""
    spec = model_spec(config)
    embedding, head = (entries.get(name) for name in (spec.names.embedding, spec.names.head))
    if not spec.tied or not embedding or not head or same_bytes(embedding, head):
        return config
    own: dict[str, Any] = {"tie_word_embeddings": False}
    return {**config, **own, **({"text_config": {**config["text_config"], **own}} if "text_config" in config else {})}


def _as_they_lie(spec: ModelSpec, entries: Mapping[str, Entry]) -> ModelSpec:
    """The same without transposed experts where their shapes say that they are not, as `transformers` looks at them."""
    layers = list(spec.layers)
    for index, names in spec.expert_names().items():
        half = layers[index].feed_forward
        entry, rows = entries.get(names.fused_gate_up), 2 * half.intermediate
        if names.fused_transposed and entry and rows != spec.hidden and entry.shape[1:] == (rows, spec.hidden):
            experts = replace(half.names.experts, fused_transposed=False)
            half = replace(half, names=replace(half.names, experts=experts))
            layers[index] = replace(layers[index], feed_forward=half)
    return replace(spec, layers=tuple(layers))


def _expert_form(spec: ModelSpec, entries: Mapping[str, Entry]) -> ExpertForm:
    """That of the whole model: of mxfp4 if any layer is."""
    experts = spec.expert_names().values()
    forms = {_layer_form(names, entries) or ("apart" if names.up else "fused") for names in experts}
    return next((form for form in _FORMS if form in forms), "apart")


def _layer_form(names: GatedNames, entries: Mapping[str, Entry]) -> ExpertForm | None:
    """The form in which experts of these names are found, None if they are not."""
    if f"{names.fused_gate_up}_blocks" in entries:
        return "mxfp4"
    if names.fused_gate_up in entries:
        return "fused"
    return "apart" if names.of_expert(0)[1] in entries else None


def _dtypes(name: str) -> tuple[str, ...]:
    """Those that the values of a tensor may have which is not quantised."""
    return tuple(INTEGERS if name.endswith(TABLES) else FLOATS)


def _require_dtype(name: str, entry: Entry, allowed: tuple[str, ...]) -> None:
    if entry.dtype not in allowed:
        raise WeightsError(
            f"{entry.path}: tensor {name} has dtype {entry.dtype:.40}, allowed are {', '.join(allowed)}: "
            "take the unquantised checkpoint"
        )


def _require_shape(name: str, entry: Entry, shape: tuple[int, ...]) -> None:
    if entry.shape != shape:
        raise WeightsError(
            f"{entry.path}: tensor {name} has shape {reprlib.repr(list(entry.shape))}, "
            f"config.json asks for {list(shape)}: one of them belongs to another model"
        )
