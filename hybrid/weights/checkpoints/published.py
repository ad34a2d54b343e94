"""How the weights of a checkpoint are published: quantization_config of config.json, as a mix of formats."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from hybrid.errors import ConfigError
from hybrid.formats.block import BLOCK
from hybrid.formats.mix import MIXES, FormatMix
from hybrid.models import model_spec
from hybrid.weights.checkpoints.exact_mix import Kind, Kinds, exact_mix
from hybrid.weights.checkpoints.files import quantisation_of
from hybrid.weights.checkpoints.left_out import believed_mix, left_out, left_out_names
from hybrid.weights.checkpoints.matrices import FP8_DTYPE
from hybrid.weights.checkpoints.schemes.base import MatrixEntry
from hybrid.weights.checkpoints.schemes.deepseek import DeepSeekScheme
from hybrid.weights.checkpoints.schemes.methods import WORDS, read_scheme
from hybrid.weights.shard import Entry

SQUARE_SIZE = [128, 128]  # of the fp8 blocks that share a scale
KNOWN = ("mxfp4", f"fp8 with weight_block_size {SQUARE_SIZE}", *WORDS)  # quantisations that are read
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
    if scheme := read_scheme(config):
        mix = FormatMix.uniform(scheme.format)
        mix = mix if fields.get("lm_head") is True else mix.with_parts({"head": "bf16"})
        if isinstance(scheme, DeepSeekScheme):
            mix = mix.with_parts({"experts": scheme.experts})
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
        return believed_mix(spec, mix, left_out(fields, spec.module))
    left_out_names(fields)  # that they are lists; what they mean, the tensors say
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
