"""How the weights of a checkpoint are published: quantization_config of config.json, as a mix of formats."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from hybrid.errors import ConfigError
from hybrid.formats.block import BLOCK
from hybrid.formats.mix import MIXES, PARTS, FormatMix
from hybrid.models import model_spec
from hybrid.models.spec import ModelSpec
from hybrid.models.tensors import Origin, PerHead, Stacked, StoreTensor
from hybrid.weights.checkpoints.files import quantisation_of
from hybrid.weights.checkpoints.matrices import FP8_DTYPE
from hybrid.weights.checkpoints.patterns import wildcards
from hybrid.weights.checkpoints.schemes import WORDS, read_scheme
from hybrid.weights.checkpoints.schemes.base import MatrixEntry
from hybrid.weights.shard import Entry

SQUARE_SIZE = [128, 128]  # of the fp8 blocks that share a scale
KNOWN = ("mxfp4", f"fp8 with weight_block_size {SQUARE_SIZE}", *WORDS)  # quantisations that are read
KEPT_FIELDS = ("modules_to_not_convert", "ignored_layers", "ignore")
MAX_KEPT = 10_000
_EXPRESSION = "re:"


def native_mix(config: Mapping[str, Any], entries: Mapping[str, Entry] | None = None) -> FormatMix:
    """The formats of a checkpoint with this config.json; fp16 and fp32 count as bf16.

    entries: its tensors. How they are stored decides, however config.json spells what was left out; without them,
    config.json is believed. A part that is only quantised here and there counts as bf16, which loses nothing that
    matters. Raises `ConfigError` for a quantisation that cannot be read.
    """
    quantisation = quantisation_of(config)
    if quantisation is None:
        return MIXES["bf16"]
    fields: Mapping[str, Any] = quantisation if isinstance(quantisation, Mapping) else {}
    kept = _kept_names(fields)
    if scheme := read_scheme(config):
        mix = FormatMix.uniform(scheme.format).with_parts({"head": "bf16"})
    elif fields.get("quant_method") == "mxfp4":
        mix = MIXES["mxfp4"]
    elif fields.get("quant_method") == "fp8" and fields.get("weight_block_size") == SQUARE_SIZE:
        mix = MIXES["fp8"]
    else:
        raise ConfigError(
            f"config.json: quantization_config is {reprlib.repr(quantisation)}; it must be absent, "
            f"{', '.join(KNOWN[:-1])} or {KNOWN[-1]}: take the unquantised checkpoint, or one of these kinds"
        )
    spec = model_spec(config)
    if entries is None:
        return mix.with_parts(dict.fromkeys(_kept_parts(spec, mix, kept), "bf16"))
    return mix.with_parts(_stored_formats(spec, entries))


def _stored_formats(spec: ModelSpec, entries: Mapping[str, Entry]) -> dict[str, str]:
    """The format of each part whose matrices are stored here."""
    found: dict[str, set[str]] = {}
    for tensor in spec.store_tensors(MIXES["bf16"]):
        if tensor.part in PARTS and tensor.format is not None:
            found.setdefault(tensor.part, set()).update(_formats(tensor, entries))
    return {part: formats.pop() if len(formats) == 1 else "bf16" for part, formats in found.items() if formats}


def _formats(tensor: StoreTensor, entries: Mapping[str, Entry]) -> Iterator[str]:
    """Of all checkpoint tensors that it is made of; those that are missing are not this function's concern."""
    for name in _sources(tensor.origin, tensor.shape[0] if tensor.part == "experts" else 1, entries):
        if f"{name}_blocks" in entries:
            yield "mxfp4"
        elif isinstance(found := entries.get(name), MatrixEntry):
            yield found.dtype if found.shape[0] % BLOCK == 0 else "bf16"  # else blocks of rows may have two tensors
        elif name in entries:
            yield "fp8" if entries[name].dtype == FP8_DTYPE else "bf16"


def _kept_names(quantisation: Mapping[str, Any]) -> list[str]:
    """What config.json says was left out, under all names that programs read it by."""
    found: list[str] = []
    for field in KEPT_FIELDS:
        names = quantisation.get(field) or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) > MAX_KEPT:
            raise ConfigError(
                f"config.json: {field} is {reprlib.repr(names)}; it must be a list of at most {MAX_KEPT} names: "
                "take the complete config.json of the model"
            )
        found += names
    return found


def _kept_parts(spec: ModelSpec, mix: FormatMix, names: list[str]) -> set[str]:
    """Quantised parts with a matrix in a module of these names: whole, the beginning or the end, with wildcards, or as
    a regular expression behind "re:". Raises `ConfigError` for one that is not understood.
    """
    wild = {pattern for name in names if "*" in name for pattern in (name, f"{name}.*")}
    for name in names:
        if name.startswith(_EXPRESSION):
            wild.update(_wildcards(name))
    plain, found = set(names), set[str]()
    for tensor in spec.store_tensors(MIXES["bf16"]):
        if tensor.part in found or tensor.format is None or getattr(mix, tensor.part, "bf16") == "bf16":
            continue
        modules = [name.removesuffix(".weight") for name in _sources(tensor.origin)]
        if any(
            not plain.isdisjoint(_edges(module)) or any(fnmatchcase(module, pattern) for pattern in wild)
            for module in modules
        ):
            found.add(tensor.part)
    return found


def _wildcards(name: str) -> list[str]:
    found = wildcards(name.removeprefix(_EXPRESSION))
    if found is None:
        raise ConfigError(
            f"config.json: quantization_config leaves out {reprlib.repr(name)}, which is not understood; give the "
            "directory with the weights, whose tensors say it"
        )
    return found


def _edges(module: str) -> set[str]:
    """Its name cut at every dot: what comes before and what comes after."""
    words = module.split(".")
    cuts = range(len(words) + 1)
    return {".".join(words[:cut]) for cut in cuts} | {".".join(words[cut:]) for cut in cuts}


def _sources(origin: Origin, experts: int = 1, entries: Mapping[str, Entry] | None = None) -> Iterator[str]:
    """Names of the checkpoint tensors that it may be made of, up to the first expert that has no entry."""
    if isinstance(origin, Stacked):
        yield from origin.names
        return
    if isinstance(origin, PerHead):
        yield origin.name
        return
    names = origin.names
    yield from (names.fused_gate_up, names.fused_down)
    for expert in range(experts):
        of_expert = names.of_expert(expert)
        if entries is not None and of_expert[0] not in entries:
            return
        yield from of_expert
