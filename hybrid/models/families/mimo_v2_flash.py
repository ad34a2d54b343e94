"""MiMo-V2-Flash: values narrower than keys, windows with sinks and more key heads; corrected sigmoids.

Layers for the prediction of further tokens, which a checkpoint has behind its last one, are not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.errors import ConfigError
from hybrid.models.decoder import (
    FULL,
    SLIDING,
    Defaults,
    of_rope,
    read_attention,
    read_experts,
    read_grouped_sigmoid,
    read_layer_count,
    read_model,
    read_windows,
)
from hybrid.models.deepseek import DENSE, SPARSE, read_named_layers
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.layers.grouped_query import GroupedQueryAttention, GroupedQueryNames
from hybrid.models.reading import Fields, with_words
from hybrid.models.spec import LayerSpec, ModelSpec

DEFAULTS = Defaults(max_position=131_072, eps=1e-5, kv_heads=4, head_dim=192, rope_part=0.334)
WORDS = {"layernorm_epsilon": "rms_norm_eps"}
PATTERNS = {  # of the published configuration: 0 and 1 for each layer, and the words that these are
    "hybrid_layer_pattern": ("layer_types", (FULL, SLIDING)),
    "moe_layer_freq": ("mlp_layer_types", (DENSE, SPARSE)),
}
THETAS = {FULL: ("rope_theta", 5e6), SLIDING: ("swa_rope_theta", 1e4)}
EVERY = 6  # so many layers have one that sees everything
NAMES = GroupedQueryNames(sinks="model.layers.{layer}.self_attn.attention_sink_bias")


def spec(config: Mapping[str, Any]) -> ModelSpec:
    config = _in_words(with_words(config, WORDS))
    fields = Fields(config)
    fields.refuse("n_shared_experts", neutral=0)
    fields.choice("scoring_func", default="sigmoid", allowed=("sigmoid",))
    fields.choice("topk_method", default="noaux_tc", allowed=("noaux_tc",))
    everything, sliding = _read_attention(config, FULL), _read_sliding(config)
    count = read_layer_count(fields)
    in_turn = [FULL if layer == 0 or (layer + 1) % EVERY == 0 else SLIDING for layer in range(count)]
    windows = read_windows(fields, sliding.window, default=in_turn)
    mixers = [sliding if window else everything for window in windows]
    layers = [LayerSpec(*pair) for pair in zip(mixers, read_named_layers(fields, _read_experts(fields)), strict=True)]
    return read_model(fields, "mimo_v2_flash", layers, DEFAULTS)


def _in_words(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with words for the numbers of its patterns, unless it has those too."""
    found = {**config}
    for name, (word, words) in PATTERNS.items():
        numbers = Fields(found).integers(name)
        if any(number not in (0, 1) for number in numbers):
            raise ConfigError(f"config.json: {name} is {numbers}; it must be a list of 0 and 1: correct it")
        if numbers and found.get(word) is None:
            found[word] = [words[number] for number in numbers]
    return found


def _read_attention(config: Mapping[str, Any], kind: str) -> GroupedQueryAttention:
    """Values are multiplied by a number: what heads attended to is instead."""
    fields = Fields(config)
    name, theta = THETAS[kind]
    part = fields.number("partial_rotary_factor", default=DEFAULTS.rope_part)
    default = {"rope_theta": fields.number(name, default=theta, above=1), "partial_rotary_factor": part}
    if config.get("rope_parameters") is None:
        fields.refuse("rope_scaling")
    own = Fields(of_rope({**config, "partial_rotary_factor": None}, kind, default))
    attention = read_attention(own, DEFAULTS, bias=fields.flag("attention_bias"))
    scale = fields.number("attention_value_scale", default=0.707)
    return replace(
        attention,
        out_bias=False,
        out_scale=1.0 if fields.is_null("attention_value_scale") else scale,
        value_head_dim=fields.size("v_head_dim", default=128),
        names=NAMES,
    )


def _read_sliding(config: Mapping[str, Any]) -> GroupedQueryAttention:
    """The window of `sliding_window_size` tokens has the token itself beside them."""
    attention, fields = _read_attention(config, SLIDING), Fields(config)
    fields.refuse("add_full_attention_sink_bias", neutral=False)
    fields.refuse("add_swa_attention_sink_bias", neutral=True)
    fields.refuse("swa_num_attention_heads", neutral=attention.heads)
    fields.refuse("swa_head_dim", neutral=attention.head_dim)
    fields.refuse("swa_v_head_dim", neutral=attention.value_size)
    kv_heads = fields.size("swa_num_key_value_heads", default=2 * attention.kv_heads)
    if attention.heads % kv_heads:
        raise ConfigError(
            f"config.json: num_attention_heads {attention.heads} is not a multiple of swa_num_key_value_heads "
            f"{kv_heads}: correct one of them so that every key head serves the same number of query heads"
        )
    before = fields.optional_size("sliding_window_size")
    window = before + 1 if before else fields.size("sliding_window", default=129, maximum=10**9)
    return replace(attention, kv_heads=kv_heads, window=window, sinks=True)


def _read_experts(fields: Fields) -> FeedForward:
    intermediate, renormalise = fields.size("moe_intermediate_size"), fields.flag("norm_topk_prob", default=True)
    return read_grouped_sigmoid(fields, read_experts(fields, intermediate, renormalise=renormalise), scale=1.0)
