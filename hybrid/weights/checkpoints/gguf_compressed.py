"""What compressed attention, indexers of entries and pools, and several streams are called in GGUF files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hybrid.models.layers.compressed import CompressedAttention
from hybrid.models.layers.compressed_names import CompressedNames
from hybrid.models.layers.compressor import CompressorNames
from hybrid.models.layers.entry_indexer import EntryIndexer, EntryIndexerNames
from hybrid.models.layers.pool_indexer import PoolIndexer
from hybrid.models.streams import StreamNames, Streams

_LAYER = "blk.{layer}"
COMPRESSED = CompressedNames(
    norm=f"{_LAYER}.attn_norm.weight",
    q_down=f"{_LAYER}.attn_q_a.weight",
    q_norm=f"{_LAYER}.attn_q_a_norm.weight",
    q_up=f"{_LAYER}.attn_q_b.weight",
    kv=f"{_LAYER}.attn_kv.weight",
    kv_norm=f"{_LAYER}.attn_kv_a_norm.weight",
    sinks=f"{_LAYER}.attn_sinks.weight",
    out_down=f"{_LAYER}.attn_output_a.weight",
    out_up=f"{_LAYER}.attn_output_b.weight",
)
_POOLS = CompressorNames(
    values=f"{_LAYER}.indexer.attn_k.weight",
    gates=f"{_LAYER}.indexer_compressor_gate.weight",
    bias=f"{_LAYER}.indexer_compressor_ape.weight",
    token_norm=f"{_LAYER}.indexer.k_norm.weight",
)
_QUERIES = EntryIndexerNames(f"{_LAYER}.indexer.attn_q_b.weight", f"{_LAYER}.indexer.proj.weight")


def with_compressed_names(mixer: CompressedAttention) -> CompressedAttention:
    compressor, indexer = mixer.compressor, mixer.indexer
    return replace(
        mixer,
        names=COMPRESSED,
        compressor=compressor and replace(compressor, names=_compressor("attn_compressor")),
        indexer=indexer and _entries(indexer, _compressor("indexer_compressor")),
    )


def with_pool_names(indexer: PoolIndexer) -> PoolIndexer:
    return replace(indexer, entries=_entries(indexer.entries, _POOLS))


def _entries(indexer: EntryIndexer, compressor: CompressorNames) -> EntryIndexer:
    return replace(indexer, names=_QUERIES, compressor=replace(indexer.compressor, names=compressor))


def _compressor(part: str) -> CompressorNames:
    return CompressorNames(*(f"{_LAYER}.{part}_{which}.weight" for which in ("kv", "gate", "ape", "norm")))


def with_stream_names(streams: Streams[Any]) -> Streams[Any]:
    mixer, feed_forward = _stream(f"{_LAYER}.hc_attn"), _stream(f"{_LAYER}.hc_ffn")
    return replace(streams, mixer=mixer, feed_forward=feed_forward, head=streams.head and _stream("output_hc"))


def _stream(prefix: str) -> StreamNames:
    return StreamNames(*(f"{prefix}_{which}.weight" for which in ("fn", "base", "scale")))
