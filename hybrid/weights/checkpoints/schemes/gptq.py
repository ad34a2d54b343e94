"""GPTQ: codes of a word lie along the inputs; zeros are stored one less than they are, but in its second version."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from hybrid.errors import ConfigError
from hybrid.models.reading import Fields
from hybrid.weights.checkpoints.schemes.codes import Layout
from hybrid.weights.checkpoints.schemes.codes_scheme import CodesScheme, Option, read_option

WORDS = "gptq of 2, 3, 4 or 8 bits"
_LEFT_OUT, _OTHERWISE = "-:", "+:"  # before the expressions of `dynamic`


def read_scheme(quantisation: Mapping[str, Any]) -> CodesScheme:
    fields = Fields(quantisation, "quantization_config.")
    version = fields.choice("checkpoint_format", "format", default="gptq", allowed=("gptq", "gptq_v2"))
    options, symmetric, ordered = read_options(fields, read_dynamic(quantisation))
    return CodesScheme("gptq", layout(version == "gptq"), options, symmetric, ordered)


def layout(zeros_less: bool) -> Layout:
    """Where the tensors of GPTQ lie. zeros_less: whether zeros are stored one less than they are."""
    return Layout(
        "qweight", "scales", "qzeros", "g_idx", transposed=True, zeros_less=zeros_less, always_zeros=True
    )  # fmt: skip


def read_options(fields: Fields, others: Mapping[str, Mapping[str, Any]]) -> tuple[tuple[Option, ...], bool, bool]:
    """What matrices may be, whether all are symmetric, and whether groups may be in the order of activations.

    others: what config.json says of some modules, by their names or expressions.
    """
    usual = read_option(fields)
    found, symmetric = [usual], fields.flag("sym", default=True)
    ordered = fields.flag("desc_act") and not fields.flag("static_groups")
    for name, changes in others.items():
        own = Fields(changes, f"quantization_config of {reprlib.repr(name)}.")
        found.append(read_option(own, default=usual))
        symmetric &= own.flag("sym", default=symmetric)
        ordered |= own.flag("desc_act") and not own.flag("static_groups", default=fields.flag("static_groups"))
    return tuple(dict.fromkeys(found)), symmetric, ordered


def read_dynamic(quantisation: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What `dynamic` says of modules that are quantised otherwise than most. Raises `ConfigError`."""
    dynamic = quantisation.get("dynamic") or {}
    if not isinstance(dynamic, Mapping) or not all(isinstance(changes, Mapping) for changes in dynamic.values()):
        raise ConfigError(
            f"config.json: quantization_config.dynamic is {reprlib.repr(dynamic)}; it must be an object of objects, by "
            "expressions for modules: take the complete config.json of the model"
        )
    return {name: changes for name, changes in dynamic.items() if not name.startswith(_LEFT_OUT)}


def left_out(quantisation: Mapping[str, Any]) -> list[str]:
    """Expressions for the modules that `dynamic` leaves out."""
    dynamic = quantisation.get("dynamic")
    names = dynamic if isinstance(dynamic, Mapping) else ()
    return [name.removeprefix(_LEFT_OUT) for name in names if name.startswith(_LEFT_OUT)]
