"""MiniMax-M3, the text alone: norms less 1, clamped SwiGLU everywhere; most layers attend to selected blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cpu_kernels import INDEX_BLOCK
from hybrid.errors import ConfigError
from hybrid.models.decoder import (
    FULL,
    MIXTRAL_NAMES,
    Defaults,
    read_attention,
    read_experts,
    read_head_dim,
    read_layer_count,
    read_model,
)
from hybrid.models.deepseek import DENSE, SPARSE
from hybrid.models.layers.block_indexer import BlockIndexer
from hybrid.models.layers.block_selected import BlockSelectedAttention
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.layers.grouped_query import GroupedQueryAttention
from hybrid.models.layers.latent import MAX_KEY_DIM
from hybrid.models.layers.router import Router
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec
from hybrid.models.tensors import gated_names

DEFAULTS = Defaults(max_position=524_288, theta=5e6, kv_heads=4, head_dim=128, rope_part=1.0)
SELECTING = "minimax_m3_sparse"  # word of `layer_types`
_BLOCK = "model.layers.{layer}.block_sparse_moe"
NAMES = replace(
    MIXTRAL_NAMES,
    correction=f"{_BLOCK}.e_score_correction_bias",
    shared=gated_names(f"{_BLOCK}.shared_experts"),
)
# Fields of `sparse_attention_config`, by those that say the same without it.
_NESTED = {
    "index_n_heads": "sparse_num_index_heads",
    "index_head_dim": "sparse_index_dim",
    "index_block_size": "sparse_block_size",
    "index_topk_blocks": "sparse_topk_blocks",
    "index_local_blocks": "sparse_local_block",
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(_flat(config))
    everything = read_attention(fields, DEFAULTS, qk_norm="head")
    kinds = _kinds(fields, "layer_types", (FULL, SELECTING), FULL)
    mixers = [_selecting(fields, everything) if kind == SELECTING else everything for kind in kinds]
    routed, dense = _experts(fields), _dense(fields)
    halves = [
        routed if kind == SPARSE else dense for kind in _kinds(fields, "mlp_layer_types", (DENSE, SPARSE), SPARSE)
    ]
    model = read_model(
        fields, "minimax_m3_vl_text", [LayerSpec(*pair) for pair in zip(mixers, halves, strict=True)], DEFAULTS
    )
    return replace(model, norm="rms_less_one")


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with its nested fields beside the others, and kinds of layers by name. The activation is not
    that of `hidden_act`.
    """
    fields, found = Fields(config), dict(config)
    nested = fields.group("sparse_attention_config")
    nested.refuse("sparse_init_block", neutral=0)
    nested.refuse("sparse_score_type", neutral="max")
    nested.refuse("use_sparse_attention", neutral=True)
    _refuse_others(fields)
    _refuse_values(nested)
    found |= {flat: config["sparse_attention_config"][name] for flat, name in _NESTED.items() if nested.has(name)}
    if not fields.has("layer_types") and nested.has("sparse_attention_freq"):
        found["layer_types"] = _named(nested.integers("sparse_attention_freq"), (FULL, SELECTING))
    if not fields.has("mlp_layer_types") and fields.has("moe_layer_freq"):
        found["mlp_layer_types"] = _named(fields.integers("moe_layer_freq"), (DENSE, SPARSE))
    if fields.has("rotary_dim") and not (fields.has("partial_rotary_factor") or fields.has("rope_parameters")):
        found["partial_rotary_factor"] = fields.size("rotary_dim") / read_head_dim(fields, DEFAULTS)
    fields.choice("hidden_act", default="silu", allowed=("swigluoai", "silu"))
    return {**found, "hidden_act": "silu"}


def _refuse_others(fields: Fields) -> None:
    """What models of this family could have been, and were not published as."""
    fields.refuse("use_gemma_norm", "use_qk_norm", "use_routing_bias", neutral=True)
    fields.refuse("attention_output_gate", "attention_bias", neutral=False)
    fields.refuse("qk_norm_type", neutral="per_head")


def _refuse_values(nested: Fields) -> None:
    """Of indexers, which add them to what layers find unless they are disabled."""
    name = "sparse_disable_index_value"
    if nested.has(name) and any(
        selects and not disabled
        for selects, disabled in zip(nested.integers("sparse_attention_freq"), nested.integers(name), strict=False)
    ):
        raise ConfigError(
            f"config.json: sparse_attention_config.{name} has a 0 for a layer that selects, whose indexer has values "
            "then; these are not computed: take another model"
        )


def _named(flags: Sequence[int], words: tuple[str, str]) -> list[str]:
    return [words[bool(flag)] for flag in flags]


def _kinds(fields: Fields, name: str, allowed: tuple[str, str], default: str) -> list[str]:
    return fields.choices(name, default=[default] * read_layer_count(fields), allowed=allowed)


def _selecting(fields: Fields, attention: GroupedQueryAttention) -> BlockSelectedAttention:
    for name, only in (("index_block_size", INDEX_BLOCK), ("index_local_blocks", 1)):
        fields.refuse(name, neutral=only)  # of what the kernels compute
    heads = fields.size("index_n_heads", default=4)
    if heads != attention.kv_heads:
        raise ConfigError(
            f"config.json: index_n_heads {heads} is not num_key_value_heads {attention.kv_heads}: correct one of them "
            "so that each KV head has its own blocks"
        )
    assert attention.rope is not None
    dim = fields.size("index_head_dim", default=128, minimum=attention.rope.dim, maximum=MAX_KEY_DIM)
    if dim % 2:
        raise ConfigError(f"config.json: index_head_dim is {dim}; it must be even: correct it")
    blocks = fields.size("index_topk_blocks", default=16, maximum=10**5)
    return BlockSelectedAttention.of(attention, BlockIndexer(heads, dim, blocks, attention.rope.interleaved))


def _experts(fields: Fields) -> FeedForward:
    fields.choice("scoring_func", default="sigmoid", allowed=("sigmoid",))
    fields.refuse("n_shared_experts", neutral=1)
    experts = read_experts(fields, fields.size("intermediate_size"), renormalise=True, names=NAMES)
    assert experts.router is not None
    scale = fields.number("routed_scaling_factor", default=2.0)
    return replace(
        _clamped(fields, experts),
        router=Router(experts.router.top_k, "sigmoid", scale=scale, correction=True),
        shared_intermediate=fields.size("shared_intermediate_size", default=3072),
    )


def _dense(fields: Fields) -> FeedForward:
    return _clamped(fields, FeedForward(fields.size("dense_intermediate_size", default=12_288)))


def _clamped(fields: Fields, half: FeedForward) -> FeedForward:
    """The kernel has the two constants of the published models built in, so others are refused."""
    fields.refuse("swiglu_alpha", neutral=1.702)
    fields.refuse("swiglu_limit", neutral=7.0)
    return replace(half, activation="swiglu_clamped")
