"""What the headers of a GGUF model say of it, whether its tensors, or all of its files, are here or not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hybrid.formats.mix import FormatMix
from hybrid.models.spec import ModelSpec
from hybrid.models.tensors import in_layer
from hybrid.weights.checkpoints.gguf import GgufCheckpoint
from hybrid.weights.checkpoints.gguf_architectures import INDEXED_TYPES
from hybrid.weights.checkpoints.gguf_config import EMBEDDING, HEAD
from hybrid.weights.checkpoints.gguf_fields import layer_count
from hybrid.weights.checkpoints.gguf_files import Gguf, headers_of
from hybrid.weights.checkpoints.gguf_metadata import GgufMetadata
from hybrid.weights.checkpoints.gguf_mix import gguf_mix
from hybrid.weights.checkpoints.gguf_names import ATTENTION, DELTA, DELTAS, FINAL_NORMS, INDEXER, LATENT, kv_parts
from hybrid.weights.shard import Entry

_TOKENS, _INTERVAL, _EVERY = "tokenizer.ggml.tokens", "full_attention_interval", 4
_LAYER = re.compile(r"blk\.\d+\.")


@dataclass(frozen=True)
class Outline:
    """config: what its config.json would say. native: its formats, None where the files that are here do not show
    them. notes: lines about what was concluded, and what packing it would change.
    """

    config: dict[str, Any]
    native: FormatMix | None
    notes: tuple[str, ...] = ()


def outline_gguf(path: Path) -> Outline:
    """Read the headers that are here, of one file or of splits with at least the first. Raises WeightsError.

    A tensor of a file that is not here is taken to have the type that one of the same role has in another layer.
    """
    model = headers_of(path)
    if not model.missing:
        checkpoint = GgufCheckpoint.of(model)
        checkpoint.check()
        return Outline(checkpoint.config, checkpoint.native, tuple(checkpoint.notes(checkpoint.native)))
    checkpoint = GgufCheckpoint.of(replace(model, tensors={**model.tensors, **_outer_stand_ins(model)}))
    entries = {**checkpoint.entries, **_layer_stand_ins(checkpoint.spec, checkpoint.entries)}
    known = all(name in entries for name, _ in checkpoint.spec.checkpoint_shapes("apart"))
    note = f"note: {model.missing} of the model's files are not here; "
    if not known:
        note += "those that are show no layer of every kind, so the formats of the file are not known"
        return Outline(checkpoint.config, None, (note,))
    checkpoint = replace(checkpoint, entries=entries, native=gguf_mix(checkpoint.spec, entries))
    checkpoint.check()
    note += "their layers are counted like those that are"
    return Outline(checkpoint.config, checkpoint.native, (note, *checkpoint.notes(checkpoint.native)))


def _outer_stand_ins(model: Gguf) -> dict[str, Entry]:
    """What a config.json is told from beside the metadata, where it is in another file: the vocabulary, a head of its
    own, which layers do not attend, and which have an indexer. A file that has the final norm has the head beside it,
    if there is one.
    """
    metadata, found = GgufMetadata(model), {}
    if EMBEDDING not in model.tensors:
        rows = _vocabulary(model, metadata)
        found[EMBEDDING] = Entry(model.path, _any_type(model), (rows, metadata.size("embedding_length")), 0, 0)
    if HEAD not in model.tensors and FINAL_NORMS.isdisjoint(model.tensors):
        found[HEAD] = model.tensors.get(EMBEDDING) or found[EMBEDDING]
    if metadata.architecture in DELTAS:
        every = max(1, metadata.size(_INTERVAL, _EVERY))
        rate = Entry(model.path, "F32", (metadata.size("ssm.time_step_rank"),), 0, 0)
        layers = [layer for layer in range(layer_count(metadata)) if (layer + 1) % every]
        found |= {
            in_layer(DELTA, layer).decay_rate: rate
            for layer in layers
            if in_layer(ATTENTION, layer).q not in model.tensors
        }
    if metadata.architecture in INDEXED_TYPES:
        found |= _indexer_stand_ins(model, metadata)
    return {name: entry for name, entry in found.items() if name not in model.tensors}


def _indexer_stand_ins(model: Gguf, metadata: GgufMetadata) -> dict[str, Entry]:
    """Of layers that are in other files: each has an indexer, unless all that are here have none."""
    layers = range(layer_count(metadata))
    keys = [in_layer(INDEXER, layer).k for layer in layers]
    away = [in_layer(LATENT, layer).norm not in model.tensors for layer in layers]
    if not all(away) and model.tensors.keys().isdisjoint(keys):
        return {}
    shape = (metadata.size("attention.indexer.key_length"), metadata.size("embedding_length"))
    unseen = Entry(model.path, _any_type(model), shape, 0, 0)
    entry = next((model.tensors[key] for key in keys if key in model.tensors), unseen)
    return {key: entry for key, is_away in zip(keys, away, strict=True) if is_away}


def _any_type(model: Gguf) -> str:
    return next((entry.dtype for entry in model.tensors.values() if len(entry.shape) == 2), "BF16")


def _vocabulary(model: Gguf, metadata: GgufMetadata) -> int:
    tokens = model.metadata.get(_TOKENS)
    return len(tokens) if isinstance(tokens, list) else metadata.size("vocab_size")


def _layer_stand_ins(spec: ModelSpec, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """For every tensor that the spec needs and no file has, one of the same role and shape in another layer; for rows
    like norms and biases, which files have in F32, none is needed.
    """
    roles: dict[tuple[str, tuple[int, ...]], str] = {}
    for name, entry in entries.items():
        roles.setdefault((_role(name), entry.shape), name)
    found = {}
    for name, shape in spec.checkpoint_shapes("apart"):
        other = roles.get((_role(name), shape))
        if name in entries:
            continue
        if len(shape) == 1:
            found[name] = Entry(Path(), "F32", shape, 0, 0)
        elif other:
            pairs = zip((name, *kv_parts(name)), (other, *kv_parts(other)), strict=True)
            found |= {own: entries[like] for own, like in pairs if own not in entries and like in entries}
    return found


def _role(name: str) -> str:
    return _LAYER.sub("", name)
