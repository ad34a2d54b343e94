"""Mistral Small 3.1 and 3.2: the text model, which is Mistral, beside a vision tower that is not used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.families import mistral
from hybrid.models.spec import ModelSpec
from hybrid.models.text_part import read_text_part

FAMILIES = {"mistral": mistral.spec}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    return read_text_part(config, "mistral3", FAMILIES, tied=True)
