"""Gemma 3: the text model, beside a vision tower that is not used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.families import gemma3_text
from hybrid.models.spec import ModelSpec
from hybrid.models.text_part import read_text_part

FAMILIES = {"gemma3_text": gemma3_text.spec}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    return read_text_part(config, "gemma3", FAMILIES, tied=True)
