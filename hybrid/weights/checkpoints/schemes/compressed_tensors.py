"""compressed-tensors: codes packed in words, and numbers of 4 and 8 bits; each group of modules may have its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hybrid.errors import ConfigError
from hybrid.models.reading import Fields
from hybrid.weights.checkpoints.schemes.base import MatrixEntry, Scheme
from hybrid.weights.checkpoints.schemes.codes import Layout
from hybrid.weights.checkpoints.schemes.codes_scheme import CodesScheme, read_option
from hybrid.weights.checkpoints.schemes.scaled import ScaledScheme
from hybrid.weights.shard import Entry

_PACKED, _MIXED = "pack-quantized", "mixed-precision"
_SCALED = {
    "float-quantized": "fp8",
    "int-quantized": "int8",
    "naive-quantized": "bf16",
    "mxfp8-quantized": "bf16",
    "mxfp4-pack-quantized": "mxfp4",
    "nvfp4-pack-quantized": "nvfp4",
}
WORDS = f"compressed-tensors {_PACKED} of 2, 4 or 8 bits, {', '.join(_SCALED)}"
_LAYOUT = Layout("weight_packed", "weight_scale", "weight_zero_point", order="weight_g_idx", shape="weight_shape")
_BY_ACTIVATIONS = (True, "group", "dynamic")  # of `actorder`; the others leave groups in order


@dataclass(frozen=True)
class Several:
    """Matrices of two kinds in a checkpoint, of which the first is that of most."""

    schemes: tuple[Scheme, ...]

    @property
    def format(self) -> str:
        return self.schemes[0].format

    def matrices(self, entries: Mapping[str, Entry]) -> Iterator[tuple[str, MatrixEntry]]:
        for scheme in self.schemes:
            yield from scheme.matrices(entries)


def read_scheme(quantisation: Mapping[str, Any]) -> Scheme:
    fields = Fields(quantisation, "quantization_config.")
    usual = fields.choice("format", default=_PACKED, allowed=(_PACKED, *_SCALED, _MIXED))
    fields.refuse("transform_config", neutral={})
    sparsity = quantisation.get("sparsity_config")
    if isinstance(sparsity, Mapping):
        Fields(sparsity, "quantization_config.sparsity_config.").refuse("format", neutral="dense")
    formats, codes, numbers = list[str](), list[Mapping[str, Any]](), list[Mapping[str, Any]]()
    for group, weights in _groups(quantisation):
        own = Fields(group, "quantization_config.config_groups.")
        formats.append(own.choice("format", default=usual, allowed=(_PACKED, *_SCALED)))
        (codes if formats[-1] == _PACKED else numbers).append(weights)
    schemes = [_codes(codes)] if codes else []
    if numbers:
        scaled = _scaled(next(format for format in formats if format != _PACKED), numbers)
        schemes.insert(0 if formats[0] != _PACKED else 1, scaled)
    return schemes[0] if len(schemes) == 1 else Several(tuple(schemes))


def _codes(groups: list[Mapping[str, Any]]) -> Scheme:
    weights = [Fields(each, "quantization_config.config_groups.weights.") for each in groups]
    for each in weights:
        each.choice("type", default="int", allowed=("int",))
        each.choice("strategy", default="group", allowed=("group", "channel"))
    options = tuple(dict.fromkeys(read_option(each, bits=(2, 4, 8)) for each in weights))
    symmetric = {each.flag("symmetric", default=True) for each in weights}
    return CodesScheme(
        "compressed-tensors", _LAYOUT, options, symmetric.pop() if len(symmetric) == 1 else None,
        ordered=any(each.get("actorder") in _BY_ACTIVATIONS for each in groups),
    )  # fmt: skip


def _scaled(format: str, groups: list[Mapping[str, Any]]) -> Scheme:
    weights = [Fields(each, "quantization_config.config_groups.weights.") for each in groups]
    strategies = [
        each.choice("strategy", default="tensor", allowed=("tensor", "channel", "block", "group", "tensor_group"))
        for each in weights
    ]
    if format == "naive-quantized":  # of which the type says what it is
        kinds = {"float": "float-quantized", "int": "int-quantized"}
        format = kinds[weights[0].choice("type", default="int", allowed=tuple(kinds))]
    rows = format == "float-quantized" and strategies[0] not in ("tensor", "block")
    return ScaledScheme(
        "fp8_row" if rows else _SCALED[format], all(each.flag("symmetric", default=True) for each in weights)
    )


def _groups(quantisation: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Each group of modules, and what it says of their weights; groups that quantise others alone are none."""
    groups = quantisation.get("config_groups")
    values = list(groups.values()) if isinstance(groups, Mapping) else []
    found = [group for group in values if isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping)]
    odd = [group for group in values if group not in found and (not isinstance(group, Mapping) or group.get("weights"))]
    if not found or odd:
        raise ConfigError(
            "config.json: config_groups of quantization_config must be groups of modules that say how their weights "
            "are quantised: take another checkpoint"
        )
    return ((group, group["weights"]) for group in found)
