"""Qwen3.8-Flash-Next, the text alone: Gated DeltaNet and attention to selected tokens, beside a residual of four
streams, to which a table of n-grams adds in some layers; experts and a gated shared one. Layers that predict further
tokens (`mtp.`) are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import cpu_kernels
from hybrid.errors import ConfigError
from hybrid.models.decoder import FULL, read_layer_count, read_model
from hybrid.models.gated_streams import GatedStreamNames, GatedStreams
from hybrid.models.layers.base import Mixer, as_kind
from hybrid.models.layers.block_selected import BlockSelectedAttention
from hybrid.models.layers.compressor import Compressor, CompressorNames
from hybrid.models.layers.entry_indexer import EntryIndexer, EntryIndexerNames
from hybrid.models.layers.gated_delta import GatedDeltaNet
from hybrid.models.layers.grouped_query import GroupedQueryAttention
from hybrid.models.layers.latent import MAX_KEY_DIM
from hybrid.models.layers.ngram import NgramDeltaNet, NgramTable
from hybrid.models.layers.pool_indexer import PoolIndexer
from hybrid.models.ngram_hash import factors_of, primes_from
from hybrid.models.pools import read_pools
from hybrid.models.qwen_next import APART, LINEAR, NEXT, read_mixers, read_shared_experts
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec, OuterNames
from hybrid.models.streams import MAX_STREAMS

INDEXED = "indexed_attention"  # a word of `layer_types`; the published configuration says FULL for it
DEFAULTS = replace(NEXT, rope_part=1.0)
MAX_TABLE = 1 << 31  # rows, of what the kernels count
_LAYER, _END = "model.layers.{layer}", "eos_token_id"
_INDEXER = f"{_LAYER}.self_attn.indexer"


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(_with_words(config))
    mixers = read_mixers(fields, DEFAULTS, replace(APART, norm=""))
    experts = read_shared_experts(fields, renormalise=fields.flag("norm_topk_prob", default=True))
    experts = replace(experts, names=replace(experts.names, norm=""))
    streams = _read_streams(fields)
    tables = _read_tables(fields, streams, [isinstance(mixer, GatedDeltaNet) for mixer in mixers])
    layers = [LayerSpec(_own(fields, mixer, tables.get(layer)), experts) for layer, mixer in enumerate(mixers)]
    model = read_model(fields, "qwen4_exp_text", layers, DEFAULTS, names=OuterNames(final_norm=""))
    return replace(model, norm="rms_less_one", streams=streams)


def _with_words(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with one word for layers that attend, and one token that ends a text: the first, of several."""
    found = {**config}
    kinds, ends = config.get("layer_types"), config.get(_END)
    if isinstance(kinds, list):
        found["layer_types"] = [FULL if kind == INDEXED else kind for kind in kinds]
    if isinstance(ends, list) and ends:
        found[_END] = ends[0]
    return found


def _own(fields: Fields, mixer: Mixer, table: NgramTable | None) -> Mixer:
    """What these layers have beside those of Qwen3.5."""
    if isinstance(mixer, GroupedQueryAttention):
        plain = replace(mixer, names=replace(mixer.names, norm=""))
        return BlockSelectedAttention.of(plain, _read_indexer(fields, plain))
    assert isinstance(mixer, GatedDeltaNet)
    gate = fields.choice("output_gate_type", default="silu", allowed=("silu", "sigmoid"))
    delta = replace(mixer, gate="sigmoid" if gate == "sigmoid" else "silu")
    return as_kind(NgramDeltaNet, delta, ngrams=table) if table else delta


def _read_indexer(fields: Fields, attention: GroupedQueryAttention) -> PoolIndexer:
    """Queries and keys are made by one matrix, the keys by its last rows."""
    fields.size("indexer_kv_heads", minimum=1, maximum=1)
    assert attention.rope is not None
    dim = fields.size("indexer_head_dim", minimum=attention.rope.dim, maximum=MAX_KEY_DIM)
    pool, selects = read_pools(fields, "indexer_compress_ratio", "indexer_budget")
    if dim % 2:
        raise ConfigError(f"config.json: indexer_head_dim is {dim}; it must be even: correct it")
    heads = fields.size("indexer_n_heads", maximum=256, maximum_of="what the kernels hold")
    names = CompressorNames(f"{_INDEXER}.index_qk_proj.weight", norm=f"{_INDEXER}.k_layernorm.weight")
    compressor = Compressor(
        pool, dim, overlaps=False, names=names, stored="index_compressor", others=heads * dim, turns_first=True
    )
    queries = EntryIndexerNames(norm=f"{_INDEXER}.q_layernorm.weight")
    entries = EntryIndexer(heads, fields.size("hidden_size"), selects, compressor, queries)
    return PoolIndexer(entries, attention.rope)


def _read_streams(fields: Fields) -> GatedStreams:
    return GatedStreams(
        fields.size("hc_count", default=4, minimum=2, maximum=MAX_STREAMS),
        _stream_names(f"{_LAYER}.attn_hyper_connection", weighted=True),
        _stream_names(f"{_LAYER}.mlp_hyper_connection", weighted=True),
        head=_stream_names("model.hyper_connection_mixer", weighted=False),
        rank=fields.size("hc_lowrank", default=320),
    )


def _stream_names(module: str, weighted: bool) -> GatedStreamNames:
    return GatedStreamNames(
        f"{module}.hc_norm.weight",
        f"{module}.input_mix_weight_down.weight",
        f"{module}.input_mix_weight_up.weight",
        f"{module}.block_inject_weight.weight" if weighted else "",
    )


def _read_tables(fields: Fields, streams: GatedStreams, linear: list[bool]) -> dict[int, NgramTable]:
    """By layer, of those that have one: what follows from its number among them too."""
    layers = [number - 1 for number in sorted(set(fields.integers("ple_layer_ids")))]
    if any(not 0 <= layer < len(linear) or not linear[layer] for layer in layers):
        raise ConfigError(
            f"config.json: ple_layer_ids is {[layer + 1 for layer in layers]}; it must name layers from 1 to "
            f"num_hidden_layers {read_layer_count(fields)} that are of {LINEAR}: correct it"
        )
    if not layers:
        return {}
    size = fields.size("ngram_size", default=3, minimum=2, maximum=cpu_kernels.MAX_NGRAM)
    heads = fields.size("heads_per_ngram", default=8, maximum=1024)
    parts, hidden = (size - 1) * heads, fields.size("hidden_size")
    width = fields.size("ple_embed_dim", default=hidden)
    if width % parts:
        raise ConfigError(
            f"config.json: ple_embed_dim {width} is not a multiple of the {parts} parts that ngram_size and "
            "heads_per_ngram make: correct one of them"
        )
    primes = primes_from(_read_base(fields, parts), parts * len(layers))
    vocab, seed = fields.size("vocab_size", maximum=10**8), fields.size("seed", default=1234, minimum=0, maximum=10**12)
    found = {}
    for number, layer in enumerate(layers):
        own = primes[number * parts : (number + 1) * parts]
        unit = fields.size("make_ngram_vocab_size_divisible_by", default=128)
        found[layer] = NgramTable(
            streams.count, hidden, size, heads, width // parts, own,
            rows=-(-sum(own) // unit) * unit,
            shards=fields.size("split_ngram_parts", default=512),
            factors=factors_of(vocab, size, number, seed),
            end=fields.size(_END, minimum=0, maximum=vocab - 1, maximum_of="vocab_size - 1"),
            taps=fields.size("ple_conv_kernel_size", default=4, minimum=2, maximum=8),
        )  # fmt: skip
    return found


def _read_base(fields: Fields, parts: int) -> int:
    """The least number of rows of a part, of which those of a table together are counted."""
    most = (MAX_TABLE - 10**6) // parts
    return fields.size("ngram_vocab_size_base", default=20_000_000, maximum=most, maximum_of="what the kernels count")
