"""How the weights of a checkpoint are published: quantization_config of config.json, as a mix of formats."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from hybrid.errors import ConfigError
from hybrid.formats.block import BLOCK
from hybrid.formats.mix import MIXES, FormatMix
from hybrid.models import model_spec
from hybrid.models.spec import ModelSpec
from hybrid.models.tensors import Origin, PerHead, Stacked
from hybrid.weights.checkpoints.exact_mix import Kind, Kinds, exact_mix
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
_MXFP4 = Kind("mxfp4", ("mxfp4",), BLOCK, again=True)
_FP8 = Kind("fp8 with a scale for 128 by 128", ("fp8",), BLOCK, again=True)


def native_mix(config: Mapping[str, Any], entries: Mapping[str, Entry] | None = None) -> FormatMix:
    """The formats of a checkpoint with this config.json; fp16 and fp32 count as bf16.

    entries: its tensors. How they are stored decides, however config.json spells what was left out; without them,
    config.json is believed. Raises `ConfigError` for a quantisation that cannot be read.
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
            f"config.json: quantization_config is {_described(quantisation)}; it must be absent, "
            f"{', '.join(KNOWN[:-1])} or {KNOWN[-1]}: take the unquantised checkpoint, or one of these kinds"
        )
    spec = model_spec(config)
    if entries is None:
        return mix.with_parts(dict.fromkeys(_kept_parts(spec, mix, kept), "bf16"))
    return exact_mix(spec, published_kinds(entries), mix)


def published_kinds(entries: Mapping[str, Entry]) -> Kinds:
    """How the tensors of a checkpoint are stored, by the names that they would have unquantised."""

    def kind(name: str) -> Kind | None:
        entry = entries.get(name)
        if f"{name}_blocks" in entries:
            return _MXFP4
        if entry is None:
            return None
        if isinstance(entry, MatrixEntry):
            return Kind(entry.words, entry.holds, entry.shape[0])
        return _FP8 if entry.dtype == FP8_DTYPE else Kind("", (), entry.shape[0] if entry.shape else 1)

    return kind


def _described(quantisation: Any) -> str:
    method = quantisation.get("quant_method") if isinstance(quantisation, Mapping) else None
    return f"of the quant_method {reprlib.repr(method)}" if isinstance(method, str) else reprlib.repr(quantisation)


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


def _sources(origin: Origin) -> Iterator[str]:
    """Names of the checkpoint tensors that it may be made of, of experts those of the first."""
    if isinstance(origin, Stacked):
        yield from origin.names
    elif isinstance(origin, PerHead):
        yield origin.name
    else:
        yield from (origin.names.fused_gate_up, origin.names.fused_down, *origin.names.of_expert(0))
