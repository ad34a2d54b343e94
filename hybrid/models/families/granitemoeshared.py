"""Granite 3 MoE with a shared expert: Granite 4 whose layers all attend, with rope."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.models.decoder import read_layer_count
from hybrid.models.families import granitemoe, granitemoehybrid
from hybrid.models.mamba import ATTENDS
from hybrid.models.reading import Fields
from hybrid.models.spec import ModelSpec


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """Without a shared expert it is Granite 3 MoE."""
    fields = Fields(config)
    fields.size("num_local_experts", default=8)  # there are always some
    if not fields.size("shared_intermediate_size", default=0, minimum=0):
        return replace(granitemoe.spec(config), model_type="granitemoeshared")
    layers = {"layer_types": [ATTENDS[-1]] * read_layer_count(fields), "position_embedding_type": "rope"}
    return replace(granitemoehybrid.spec({**config, **layers}), model_type="granitemoeshared")
