"""Qwen2.5-VL: the text model, which is Qwen2 without images, beside a vision tower that is not used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.families import qwen2
from hybrid.models.spec import ModelSpec
from hybrid.models.text_part import read_text_part

_DEFAULTS = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_window_layers": 80, "rope_theta": 1e6}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    return read_whole(config, "qwen2_5_vl")


def read_whole(config: Mapping[str, Any], model_type: str) -> ModelSpec:
    """Configurations as they are published have the fields of the text among those of the whole."""
    whole = config if "text_config" in config else {**config, "text_config": {**config, "model_type": None}}
    return read_text_part(whole, model_type, {f"{model_type}_text": _text}, either=True)


def _text(config: Mapping[str, Any]) -> ModelSpec:
    """Of text alone, rope with three positions a token, "mrope", turns as the usual one does."""
    given = {**_DEFAULTS, **config}
    for name in ("rope_scaling", "rope_parameters"):
        rope = given.get(name)
        if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) == "mrope":
            given[name] = {**rope, "rope_type": "default"}
    return qwen2.spec(given)
