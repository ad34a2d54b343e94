"""Gemma 4: the text model, beside towers of vision and audio that are not used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.families import gemma4_text
from hybrid.models.spec import ModelSpec
from hybrid.models.text_part import read_text_part

FAMILIES = {"gemma4_text": gemma4_text.spec}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    return read_text_part(config, "gemma4", FAMILIES, tied=True)
