"""How the weights of a checkpoint are published: quantization_config of config.json, as a mix of formats."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from hybrid.errors import ConfigError
from hybrid.formats.mix import MIXES, FormatMix
from hybrid.models import model_spec
from hybrid.models.tensors import Gated, GatedBiases, Stacked

SQUARE_SIZE = [128, 128]  # of the fp8 blocks that share a scale


def native_mix(config: Mapping[str, Any]) -> FormatMix:
    """The formats of a checkpoint with this config.json; fp16 and fp32 count as bf16.

    A part that is only quantised here and there counts as bf16, which loses nothing that matters. Raises
    `ConfigError` for a quantisation that cannot be read.
    """
    quantisation = config.get("quantization_config")
    if quantisation is None:
        return MIXES["bf16"]
    fields: Mapping[str, Any] = quantisation if isinstance(quantisation, Mapping) else {}
    if fields.get("quant_method") == "mxfp4":
        return MIXES["mxfp4"]
    if fields.get("quant_method") != "fp8" or fields.get("weight_block_size") != SQUARE_SIZE:
        raise ConfigError(
            f"config.json: quantization_config is {reprlib.repr(quantisation)}; it must be absent, mxfp4, or fp8 with "
            f"weight_block_size {SQUARE_SIZE}: take the unquantised checkpoint, or one in these formats"
        )
    return replace(MIXES["fp8"], **dict.fromkeys(_kept(config, fields), "bf16"))


def _kept(config: Mapping[str, Any], quantisation: Mapping[str, Any]) -> Iterator[str]:
    """Parts with a matrix that `modules_to_not_convert` leaves as it was."""
    names = quantisation.get("modules_to_not_convert") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"config.json: modules_to_not_convert is {reprlib.repr(names)}; it must be a list of names: "
            "take the complete config.json of the model"
        )
    patterns = {pattern for name in names for pattern in (name, f"{name}.*")}
    exact, wild = {p for p in patterns if "*" not in p}, [p for p in patterns if "*" in p]
    quantised = {"experts", "shared", "dense", "attention"}
    for tensor in model_spec(config).store_tensors(MIXES["bf16"]):
        if tensor.part in quantised and tensor.format is not None:
            modules = (name.removesuffix(".weight") for name in _sources(tensor.origin))
            if any(module in exact or any(fnmatchcase(module, pattern) for pattern in wild) for module in modules):
                quantised.remove(tensor.part)
                yield tensor.part


def _sources(origin: Stacked | Gated | GatedBiases) -> Iterator[str]:
    """Names of the checkpoint tensors that it may be made of; expert 0 stands for all."""
    if isinstance(origin, Stacked):
        yield from origin.names
    else:
        names = origin.names
        yield from (*names.of_expert(0), names.fused_gate_up, names.fused_down)
