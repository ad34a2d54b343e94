"""Kimi Linear: Kimi Delta Attention in most layers, latent attention without rope in the others; sigmoid router.

Configurations as published have words of their own for what `transformers` calls otherwise; both are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.errors import ConfigError
from hybrid.models.decoder import FULL, MIXTRAL_NAMES, Defaults, read_layer_count, read_model
from hybrid.models.deepseek import read_latent_attention, read_named_layers, read_sigmoid_experts
from hybrid.models.kimi_delta import LINEAR, read_kimi_delta
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.reading import Fields, with_words
from hybrid.models.spec import LayerSpec, ModelSpec
from hybrid.models.tensors import gated_names

DEFAULTS = Defaults(max_position=1_048_576, eps=1e-5)
WORDS = {
    "model_max_length": "max_position_embeddings",
    "moe_renormalize": "norm_topk_prob",
    "moe_router_activation_func": "scoring_func",
    "num_expert_group": "n_group",
    "num_experts_per_token": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
}
# Of `linear_attn_config`, and what they are without it.
LINEAR_WORDS = {
    "head_dim": "linear_head_dim",
    "num_heads": "linear_num_heads",
    "short_conv_kernel_size": "linear_conv_kernel_dim",
}
NAMES = replace(
    MIXTRAL_NAMES,
    correction="model.layers.{layer}.block_sparse_moe.gate.e_score_correction_bias",
    shared=gated_names("model.layers.{layer}.block_sparse_moe.shared_experts"),
    fused_shared=gated_names("model.layers.{layer}.mlp.shared_experts"),
)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = _read_words(config)
    fields.refuse("mla_use_nope", neutral=True)
    if fields.size("n_group", default=1) > 1:
        fields.refuse("use_grouped_topk", neutral=True)
    fields.refuse("mla_use_output_gate", "latent_moe_use_norm", neutral=False)
    fields.refuse("attn_res_block_size", "routed_expert_hidden_size")
    attention = read_latent_attention(fields, DEFAULTS, q_rank=None, nope_dim=128, value_dim=128, turns=False)
    heads = fields.size("linear_num_heads", default=32)
    delta = read_kimi_delta(fields, heads, "linear_head_dim", "linear_conv_kernel_dim")
    delta = replace(delta, rank=delta.head_dim, rates=(1, 1, heads, 1))
    halves = read_named_layers(fields, _experts(fields))
    mixers = [attention if kind == FULL else delta for kind in _kinds(fields)]
    layers = [LayerSpec(mixer, half) for mixer, half in zip(mixers, halves, strict=True)]
    return read_model(fields, "kimi_linear", layers, DEFAULTS)


def _read_words(config: Mapping[str, Any]) -> Fields:
    """The configuration by the words of `transformers`."""
    linear = Fields(config).group("linear_attn_config")
    linear.refuse("use_full_rank_gate", neutral=False)
    linear.refuse("gate_lower_bound")
    found = with_words(config, WORDS)
    if linear.has("head_dim") or linear.has("full_attn_layers"):
        found |= with_words(config["linear_attn_config"], LINEAR_WORDS)
    return Fields(found)


def _experts(fields: Fields) -> FeedForward:
    return replace(read_sigmoid_experts(fields, scale=2.446), names=NAMES)


def _kinds(fields: Fields) -> list[str]:
    """Of every layer: by name, or by the numbers of those that attend, from 1 on; by default every fourth, but the
    first.
    """
    layers = range(1, read_layer_count(fields) + 1)
    if fields.has("layer_types") or not fields.has("full_attn_layers"):
        default = [FULL if layer > 1 and layer % 4 == 1 else LINEAR for layer in layers]
        return fields.choices("layer_types", default=default, allowed=(FULL, LINEAR))
    full = fields.integers("full_attn_layers")
    rest = fields.integers("kda_layers") or [layer for layer in layers if layer not in full]
    if sorted([*full, *rest]) != [*layers]:
        raise ConfigError(
            f"config.json: linear_attn_config.full_attn_layers and kda_layers must have the numbers from 1 to "
            f"num_hidden_layers {len(layers)} between them, each once: correct them"
        )
    return [FULL if layer in full else LINEAR for layer in layers]
