"""A GGUF file's rotary embedding, as config.json has it."""

from __future__ import annotations

from typing import Any

import numpy as np

from hybrid.errors import WeightsError
from hybrid.weights.checkpoints.gguf_files import Gguf
from hybrid.weights.checkpoints.gguf_metadata import GgufMetadata
from hybrid.weights.shard import read_bytes

Config = dict[str, Any]

ROPE_FACTORS, SHORT_FACTORS, LONG_FACTORS = (
    f"rope_{name}.weight" for name in ("freqs", "factors_short", "factors_long")
)
TEMPERATURE = "attention.temperature_scale"
_TOO_LARGE = 1 << 20  # bytes of factors of a rope


def rope_part(metadata: GgufMetadata, dim: int) -> float | None:
    turning = metadata.size("rope.dimension_count", dim)
    return None if turning == dim or not dim else turning / dim


def rope_scaling(model: Gguf, metadata: GgufMetadata) -> Config | None:
    if factors := rope_factors(model, ROPE_FACTORS):
        return {"rope_type": "factors", "factors": factors}
    if SHORT_FACTORS in model.tensors or LONG_FACTORS in model.tensors:
        return _by_length(model, metadata)
    linear = metadata.number("rope.scale_linear", 1.0)  # of old files
    factor = metadata.number("rope.scaling.factor", linear)
    kind = metadata.text("rope.scaling.type", "linear" if factor not in (0.0, 1.0) else "none")
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return _yarn(metadata, factor)
    raise metadata.refuse("rope.scaling.type", kind, "none, linear or yarn")


def _by_length(model: Gguf, metadata: GgufMetadata) -> Config:
    """Two sets of factors, of short sequences and of long ones; the file has one magnitude for both."""
    magnitude = metadata.number("rope.scaling.attn_factor", 1.0)
    return {
        "rope_type": "longrope",
        "short_factor": rope_factors(model, SHORT_FACTORS),
        "long_factor": rope_factors(model, LONG_FACTORS),
        "short_mscale": magnitude,
        "long_mscale": magnitude,
        "original_max_position_embeddings": metadata.size("rope.scaling.original_context_length"),
    }


def _yarn(metadata: GgufMetadata, factor: float) -> Config:
    names = {"yarn_attn_factor": "attention_factor", "yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
    found = {ours: metadata.number(f"rope.scaling.{name}") for name, ours in names.items() if _set(metadata, name)}
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": metadata.size("rope.scaling.original_context_length"),
        **found,
    }


def _set(metadata: GgufMetadata, name: str) -> bool:
    return metadata.has(f"rope.scaling.{name}") and metadata.number(f"rope.scaling.{name}") > 0


def rope_factors(model: Gguf, name: str) -> list[float]:
    """The values of a small tensor of floats, [] where there is none; ones of a header without its tensors."""
    entry = model.tensors.get(name)
    if entry is None:
        return []
    if entry.dtype != "F32" or len(entry.shape) != 1 or entry.end - entry.start > _TOO_LARGE:
        raise WeightsError(f"{model.path}: tensor {name} is {entry.dtype} {list(entry.shape)}; it must be a row of F32")
    if not model.whole:
        return [1.0] * entry.shape[0]
    return [float(value) for value in read_bytes(entry, 0, entry.end - entry.start).view(np.float32)]


def latent_scaling(metadata: GgufMetadata, scaling: Config | None) -> Config | None:
    """What YaRN multiplies scores by, apart from the turned dimensions."""
    if scaling is None or scaling["rope_type"] != "yarn":
        return scaling
    magnitude = metadata.number("rope.scaling.yarn_log_multiplier", 0.0) / 0.1
    return {**scaling, "mscale": magnitude, "mscale_all_dim": magnitude} if magnitude else scaling


def growing(metadata: GgufMetadata, scaling: Config | None, length: int | None = None) -> Config:
    """A rope with what makes late queries larger, if the file says so. length: after how many tokens they begin to
    grow where it does not say that; None: after the original context.
    """
    scaling, beta = scaling or {"rope_type": "default"}, metadata.number(TEMPERATURE, 0.0)
    if not beta:
        return scaling
    name, context = "attention.temperature_length", metadata.size("context_length")
    original = metadata.size("rope.scaling.original_context_length", context)
    found = metadata.size(name, length or original)
    if found != original:
        raise metadata.refuse(name, found, f"{original}, the original context length")
    return {**scaling, "llama_4_scaling_beta": beta, "original_max_position_embeddings": original}
