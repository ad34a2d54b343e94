"""GLM-5.3-Flash, the text alone: Kimi Delta Attention, and latent attention to selected pools of tokens without rope.

The residual stream is several streams, of which the head reads the mean. Layers that predict further tokens, which a
checkpoint has behind its last one, are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.errors import ConfigError
from hybrid.models.decoder import FULL, Defaults, read_layer_count, read_model
from hybrid.models.deepseek import (
    MAX_INDEX_HEADS,
    SHARED,
    read_indexer_kinds,
    read_latent_attention,
    read_named_layers,
    read_sigmoid_experts,
    require_query_latents,
)
from hybrid.models.kimi_delta import LINEAR, read_kimi_delta, read_lower_bound
from hybrid.models.layers.base import Mixer
from hybrid.models.layers.compressor import Compressor, CompressorNames
from hybrid.models.layers.entry_indexer import EntryIndexer, EntryIndexerNames
from hybrid.models.layers.indexed import IndexedAttention
from hybrid.models.layers.kimi_delta import KimiDeltaAttention
from hybrid.models.layers.latent import MAX_KEY_DIM
from hybrid.models.layers.pool_indexer import PoolIndexer
from hybrid.models.pools import read_pools
from hybrid.models.reading import Fields, with_words
from hybrid.models.spec import LayerSpec, ModelSpec
from hybrid.models.streams import read_streams

DEFAULTS = Defaults(max_position=1_048_576, eps=1e-5)
INDEXED = "indexed_attention"  # word of `layer_types`; published configurations may say full_attention instead
Q_RANK = 1536
LIMIT = 10.0  # of what experts multiply, as the kernels have it
LINEAR_WORDS = {  # of `linear_attn_config`, and what they are without it
    "head_dim": "linear_head_dim",
    "num_heads": "linear_num_heads",
    "short_conv_kernel_size": "linear_conv_kernel_dim",
    "gate_lower_bound": "linear_lower_bound",
}
_INDEXER = "model.layers.{layer}.self_attn.indexer"


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields, kinds = _read_words(config), _read_kinds(Fields(config))
    mixers: dict[str, Mixer] = {LINEAR: _read_delta(fields), INDEXED: _read_attention(fields)}
    fields.refuse("swiglu_limit", neutral=LIMIT)
    halves = read_named_layers(fields, read_sigmoid_experts(fields, scale=2.5), dense=3)
    layers = [
        LayerSpec(mixers[kind], replace(half, activation="silu_clamped"))
        for kind, half in zip(kinds, halves, strict=True)
    ]
    model = replace(read_model(fields, "glm5_next_text", layers, DEFAULTS), streams=read_streams(fields))
    return model.within(model.max_position)


def _read_words(config: Mapping[str, Any]) -> Fields:
    """The configuration by the words of `transformers`: those of a nested object count where there is one."""
    linear = Fields(config).group("linear_attn_config")
    own = with_words(config.get("linear_attn_config") or {}, LINEAR_WORDS)
    found = {**config, **{name: own[name] for name in LINEAR_WORDS.values() if name in own}}
    if config.get("linear_attn_config") and linear.flag("safe_gate", default=True):
        found = {name: value for name, value in found.items() if name != "linear_lower_bound" or value is not None}
    return Fields(found)


def _read_kinds(fields: Fields) -> list[str]:
    """Of every layer: by name, or every fourth attends. Those that do have an indexer of their own."""
    layers = range(read_layer_count(fields))
    default = [INDEXED if layer % 4 == 3 else LINEAR for layer in layers]
    words = fields.choices("layer_types", default=default, allowed=(LINEAR, INDEXED, FULL))
    kinds = [INDEXED if word == FULL else word for word in words]
    name, indexers = read_indexer_kinds(fields, len(layers))
    shared = [layer for layer in layers if kinds[layer] == INDEXED and indexers[layer] == SHARED]
    if shared:
        raise ConfigError(
            f"config.json: {name} says {SHARED} of layer {shared[0]}, which attends; it must be full there, since what "
            "one layer selects is not kept for another: correct it"
        )
    return kinds


def _read_delta(fields: Fields) -> KimiDeltaAttention:
    heads = fields.size("linear_num_heads", default=64)
    delta = read_kimi_delta(fields, heads, "linear_head_dim", "linear_conv_kernel_dim")
    bound = 0.0 if fields.is_null("linear_lower_bound") else read_lower_bound(fields, "linear_lower_bound")
    return replace(delta, rank=delta.head_dim, lower_bound=bound)


def _read_attention(fields: Fields) -> IndexedAttention:
    fields.refuse("qk_rope_head_dim", neutral=0)
    require_query_latents(fields, Q_RANK)
    plain = read_latent_attention(fields, DEFAULTS, q_rank=Q_RANK, nope_dim=256, value_dim=256, shared=0, turns=False)
    attention = replace(plain, latent_eps=fields.number("rms_norm_eps", default=DEFAULTS.eps))
    indexer = _read_indexer(fields, attention.q_rank)
    return IndexedAttention.of(attention, indexer.tokens, indexer)


def _read_indexer(fields: Fields, q_rank: int) -> PoolIndexer:
    fields.refuse("index_kpool_always_select_tail", neutral=True)
    pool, selects = read_pools(fields, "index_kpool", "index_topk", (16, 2048))
    heads = fields.size("index_n_heads", default=32, maximum=MAX_INDEX_HEADS)
    dim = fields.size("index_head_dim", default=128, maximum=MAX_KEY_DIM)
    if dim % 2:
        raise ConfigError(f"config.json: index_head_dim is {dim}; it must be even: correct it")
    names = CompressorNames(
        values=f"{_INDEXER}.wk.weight",
        gates=f"{_INDEXER}.index_kpool_compress_gate",
        bias=f"{_INDEXER}.index_kpool_compress_ape",
        token_norm=f"{_INDEXER}.k_norm.weight",
    )
    compressor = Compressor(pool, dim, overlaps=False, names=names, stored="index_compressor")
    queries = EntryIndexerNames(f"{_INDEXER}.wq_b.weight", f"{_INDEXER}.weights_proj.weight")
    return PoolIndexer(EntryIndexer(heads, q_rank, selects, compressor, queries))
