"""Kimi K2.5: the text model, which is Kimi K2, beside a vision tower that is not used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.errors import ConfigError
from hybrid.models.deepseek import read_deepseek_v3
from hybrid.models.reading import Fields
from hybrid.models.spec import ModelSpec

MODULE = "language_model"  # of the checkpoint, which holds the text model


def spec(config: Mapping[str, Any]) -> ModelSpec:
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise ConfigError(
            "config.json: text_config is missing or no object; it must describe the text model: "
            "take the complete config.json of the model"
        )
    fields = Fields(text, "text_config.")
    fields.choice("model_type", default="deepseek_v3", allowed=("deepseek_v3", "kimi_k2"))
    return read_deepseek_v3(fields, "kimi_k25", MODULE)
