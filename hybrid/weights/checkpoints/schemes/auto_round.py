"""AutoRound: the tensors of GPTQ or AWQ, or numbers of 4 and 8 bits, as `packing_format` says."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from hybrid.errors import ConfigError
from hybrid.models.reading import Fields
from hybrid.weights.checkpoints.schemes import awq, gptq
from hybrid.weights.checkpoints.schemes.base import Scheme
from hybrid.weights.checkpoints.schemes.codes_scheme import CodesScheme
from hybrid.weights.checkpoints.schemes.scaled import ScaledScheme

WORDS = "auto-round of 2, 3, 4 or 8 bits, mx_fp, nv_fp or fp8"
_LAYOUTS = {
    "auto_round:auto_gptq": gptq.layout(zeros_less=True),
    "auto_round:gptq": gptq.layout(zeros_less=True),
    "auto_round": gptq.layout(zeros_less=False),
    "auto_round:gptqmodel": gptq.layout(zeros_less=False),
    "auto_round:auto_awq": awq.LAYOUT,
    "auto_round:awq": awq.LAYOUT,
}
_NUMBERS = ("fp", "fp8", "fp8_e4m3", "mx_fp", "mx_fp4", "mx_fp8", "nv_fp", "nv_fp4")
_ROTATIONS = ("rotation_config", "spinquant_config")


def read_scheme(quantisation: Mapping[str, Any]) -> Scheme:
    fields = Fields(quantisation, "quantization_config.")
    fields.refuse(*_ROTATIONS)
    kind = str(quantisation.get("data_type") or "int")
    if kind.startswith(("mx_fp", "nv_fp", "fp")):
        fields.choice("data_type", default="int", allowed=_NUMBERS)
        four = fields.size("bits", minimum=4, maximum=8) == 4
        return ScaledScheme(
            "mxfp4" if four and kind.startswith("mx_fp") else "fp8" if kind.startswith("fp") else "bf16"
        )
    fields.choice("data_type", default="int", allowed=("int", "int_sym", "int_asym", *_NUMBERS))
    layout = _LAYOUTS[fields.choice("packing_format", default="auto_round:auto_gptq", allowed=tuple(_LAYOUTS))]
    options, symmetric, _ = gptq.read_options(fields, _others(quantisation))
    return CodesScheme("auto-round", layout, options, symmetric)


def left_out(quantisation: Mapping[str, Any]) -> list[str]:
    """Names of modules, or expressions for them, that `extra_config` says are not quantised."""
    extra = quantisation.get("extra_config")
    return [name for name, changes in extra.items() if _is_plain(changes)] if isinstance(extra, Mapping) else []


def _others(quantisation: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What `extra_config` says of modules that are quantised otherwise than most."""
    extra = quantisation.get("extra_config") or {}
    if not isinstance(extra, Mapping) or not all(isinstance(changes, Mapping) for changes in extra.values()):
        raise ConfigError(
            f"config.json: quantization_config.extra_config is {reprlib.repr(extra)}; it must be an object of objects, "
            "by names of modules: take the complete config.json of the model"
        )
    return {name: changes for name, changes in extra.items() if not _is_plain(changes)}


def _is_plain(changes: Any) -> bool:
    """Whether a module that this is said of is not quantised: it has 16 bits or more."""
    bits = changes.get("bits") if isinstance(changes, Mapping) else None
    return isinstance(bits, int) and bits >= 16
