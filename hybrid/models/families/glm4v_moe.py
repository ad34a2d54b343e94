"""GLM-4.5V: the text model, which is GLM-4.5 without images, beside a vision tower that is not used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.families import glm4_moe
from hybrid.models.spec import ModelSpec
from hybrid.models.text_part import read_text_part


def spec(config: Mapping[str, Any]) -> ModelSpec:
    return read_text_part(config, "glm4v_moe", {"glm4v_moe_text": _text}, either=True)


def _text(config: Mapping[str, Any]) -> ModelSpec:
    """Queries and keys are never normed, and have biases if nothing is said."""
    return glm4_moe.spec({"attention_bias": True, "max_position_embeddings": 65_536, **config, "use_qk_norm": False})
