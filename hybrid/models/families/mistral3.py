"""Mistral Small 3.1 to 4 and Ministral 3: the text model, of one of several families, beside a vision tower that is
not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.families import ministral3, mistral, mistral4
from hybrid.models.spec import ModelSpec
from hybrid.models.text_part import read_text_part

FAMILIES = {"mistral": mistral.spec, "ministral3": ministral3.spec, "mistral4": mistral4.spec}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    return read_text_part(config, "mistral3", FAMILIES, tied=True)
