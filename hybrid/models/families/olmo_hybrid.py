"""OLMo Hybrid: Gated DeltaNet with large betas in three of four layers, the attention of OLMo 2 in the fourth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.models.decoder import FULL, Defaults, read_layer_count, read_model
from hybrid.models.families.olmo2 import read_feed_forward, read_normed_attention
from hybrid.models.layers.gated_delta import GatedDeltaNames, GatedDeltaNet
from hybrid.models.layers.grouped_query import GroupedQueryAttention
from hybrid.models.layers.router import FeedForwardNames
from hybrid.models.qwen_next import LINEAR, read_delta
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec

DEFAULTS = Defaults(max_position=65_536)
EVERY = 4  # so many layers have one that attends
_LAYER = "model.layers.{layer}"
_DELTA = f"{_LAYER}.linear_attn"
NAMES = GatedDeltaNames(
    norm=f"{_LAYER}.attention_layer_norm.weight",
    grouped="",
    grouped_decays="",
    q=f"{_DELTA}.q_proj.weight",
    k=f"{_DELTA}.k_proj.weight",
    v=f"{_DELTA}.v_proj.weight",
    gates=f"{_DELTA}.g_proj.weight",
    betas=f"{_DELTA}.b_proj.weight",
    decays=f"{_DELTA}.a_proj.weight",
    q_taps=f"{_DELTA}.q_conv1d.weight",
    k_taps=f"{_DELTA}.k_conv1d.weight",
    v_taps=f"{_DELTA}.v_conv1d.weight",
    head_norm=f"{_DELTA}.o_norm.weight",
    out=f"{_DELTA}.o_proj.weight",
)
NORM_BEFORE = FeedForwardNames(norm=f"{_LAYER}.feedforward_layer_norm.weight")


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """Layers of the delta rule have norms before their halves, those that attend behind them."""
    fields, count = Fields(config), read_layer_count(Fields(config))
    default = [LINEAR if (layer + 1) % EVERY else FULL for layer in range(count)]
    if FULL not in default:
        default[-1] = FULL
    kinds = fields.choices("layer_types", default=default, allowed=(FULL, LINEAR))
    behind = read_feed_forward(fields)
    attending = LayerSpec(_read_attention(config), behind)
    delta = LayerSpec(_read_delta(fields), replace(behind, names=NORM_BEFORE))
    layers = [attending if kind == FULL else delta for kind in kinds]
    return read_model(fields, "olmo_hybrid", layers, DEFAULTS)


def _read_attention(config: Mapping[str, Any]) -> GroupedQueryAttention:
    """Without rope where its theta is null, as in the published configuration."""
    own = config.get("rope_parameters")
    if not Fields(own if isinstance(own, Mapping) else config).is_null("rope_theta"):
        return read_normed_attention(Fields(config), DEFAULTS)
    plain = Fields({**config, "rope_parameters": None, "rope_theta": None})
    return replace(read_normed_attention(plain, DEFAULTS), rope=None)


def _read_delta(fields: Fields) -> GatedDeltaNet:
    heads = fields.size("num_attention_heads")
    key_heads = fields.size("linear_num_key_heads", default=heads)
    key_dim = fields.size("linear_key_head_dim", default=max(1, fields.size("hidden_size") * 3 // (4 * key_heads)))
    delta = read_delta(fields, NAMES, key_heads=key_heads, value_heads=heads, key_dim=key_dim, value_dim=2 * key_dim)
    return replace(delta, eps=1e-5, beta_scale=2.0 if fields.flag("linear_allow_neg_eigval", default=True) else 1.0)
