"""FlexOlmo: OLMo 2 with experts, whose weights need not sum to 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.decoder import Defaults, read_experts, read_layer_count, read_model
from hybrid.models.families.olmo2 import read_normed_attention
from hybrid.models.norm_after import FEED_FORWARD
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec

DEFAULTS = Defaults(max_position=4096, theta=500_000.0)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    intermediate, renormalise = fields.size("intermediate_size"), fields.flag("norm_topk_prob")
    experts = read_experts(fields, intermediate, renormalise=renormalise, names=FEED_FORWARD)
    layer = LayerSpec(read_normed_attention(fields, DEFAULTS), experts)
    return read_model(fields, "flex_olmo", [layer] * read_layer_count(fields), DEFAULTS)
