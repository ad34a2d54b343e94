"""Which of the published quantisations a checkpoint has, by the word of `quant_method`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.weights.checkpoints.files import quantisation_of
from hybrid.weights.checkpoints.schemes import (
    auto_round,
    awq,
    compressed_tensors,
    deepseek,
    float8,
    gptq,
    modelopt,
    mxfp8,
    quark,
)
from hybrid.weights.checkpoints.schemes.base import Scheme
from hybrid.weights.shard import Entry

_METHODS = {
    "compressed-tensors": compressed_tensors,
    "modelopt": modelopt,
    "mxfp8": mxfp8,
    "fp8": float8,
    "fbgemm_fp8": float8,
    "gptq": gptq,
    "awq": awq,
    "quark": quark,
    "auto-round": auto_round,
    "intel/auto-round": auto_round,
}
WORDS = tuple(dict.fromkeys(method.WORDS for method in _METHODS.values()))


def read_scheme(config: Mapping[str, Any]) -> Scheme | None:
    """The scheme of a config.json, None if its `quant_method` is another. Raises `ConfigError` for what is not read."""
    quantisation = quantisation_of(config)
    if not isinstance(quantisation, Mapping):
        return None
    if scheme := deepseek.read_scheme(config, quantisation):
        return scheme
    method = _METHODS.get(str(quantisation.get("quant_method")))
    return method.read_scheme(quantisation) if method else None


def with_matrices(config: Mapping[str, Any], entries: Mapping[str, Entry]) -> Mapping[str, Entry]:
    """The tensors of a checkpoint and, under the names that they would have unquantised, the matrices that several of
    them make. Raises `ConfigError` and `WeightsError`.
    """
    scheme = read_scheme(config)
    if scheme is None:
        return entries
    return {**entries, **dict(scheme.matrices(entries))}
