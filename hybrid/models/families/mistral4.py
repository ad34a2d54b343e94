"""Mistral Small 4: latent attention in which late queries are larger, experts chosen by a softmax, a shared expert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.models.decoder import Defaults, read_first_dense, read_model, with_rope
from hybrid.models.deepseek import read_latent_attention, read_shared
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec

DEFAULTS = Defaults(max_position=1_048_576, rope_grows=True)
ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 128.0,
    "original_max_position_embeddings": 8192,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
NOPE, TURNED = 64, 64  # dimensions of a head that do not turn, and that do, where config.json says nothing


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(_without_part(with_rope(config, ROPE)))
    attention = read_latent_attention(fields, DEFAULTS, q_rank=1024, nope_dim=NOPE, value_dim=128, rank=256)
    layers = [LayerSpec(attention, half) for half in read_first_dense(fields, _experts(fields), default=0)]
    return read_model(fields, "mistral4", layers, DEFAULTS)


def _without_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without the part of a head that turns, where its sizes say the same."""
    fields, name = Fields(config), "partial_rotary_factor"
    turned, nope = fields.size("qk_rope_head_dim", default=TURNED), fields.size("qk_nope_head_dim", default=NOPE)
    found = dict(config)
    for group in ("rope_parameters", "rope_scaling"):
        if config.get(group) is not None:
            fields.group(group).refuse(name, neutral=turned / (nope + turned))
            found[group] = {key: value for key, value in config[group].items() if key != name}
    return found


def _experts(fields: Fields) -> FeedForward:
    fields.refuse("n_group", "topk_group", neutral=1)
    experts = read_shared(fields, renormalise=fields.flag("norm_topk_prob", default=True))
    assert experts.router is not None
    return replace(experts, router=replace(experts.router, scale=fields.number("routed_scaling_factor", default=1.0)))
