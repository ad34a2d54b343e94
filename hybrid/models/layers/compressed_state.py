"""The state of a sequence of attention to compressed tokens.

[keys | their scales | entries | keys of an indexer | what the last tokens brought]. Entries, and keys of an indexer,
lie behind each other, so that what 16 tokens have of them is contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cpu_kernels import RUN_TOKENS
from hybrid.formats.block import round_up
from hybrid.models.layers.base import StateLayout
from hybrid.models.layers.grouped_query import SCALE
from hybrid.models.layers.products import BF16
from hybrid.ops import Choice

LINE = 64  # bytes


@dataclass(frozen=True)
class KeyState:
    """Keys of one head, whose first dimensions are the values, padded."""

    key_dim: int
    value_dim: int

    def token_bytes(self, kv_format: str) -> int:
        """What the key of a token takes, and its scale if it needs one."""
        return self.key_dim * BF16 if kv_format == "bf16" else self.key_dim + SCALE

    def layout(self, tokens: int, kv_format: str) -> StateLayout:
        """Of keys alone."""
        scaled, keys = kv_format != "bf16", tokens * self.token_bytes(kv_format)
        rows = keys - SCALE * tokens * scaled
        fields = {
            "head_stride": 0,
            "value_offset": 0,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "format": Choice("Format", kv_format),
            "key_scales_offset": rows * scaled,
            "value_scales_offset": rows * scaled,
            "shared": True,
        }
        runs = ((0, rows), (rows, SCALE * tokens)) if scaled else ((0, rows),)
        return StateLayout(keys, keys // tokens, "KvLayout", fields, runs)

    def with_entries(self, tokens: int, kv_format: str, rate: int, index_dim: int, kept: int) -> StateLayout:
        """And of an entry for every `rate` tokens, keys [index_dim] of an indexer, 0 if there is none, and `kept` bytes
        of the last tokens, which make a sequence go back within a run alone, so that a step that failed cannot be run
        again.
        """
        keys = self.layout(tokens, kv_format)
        entry_bytes = round_up(self.token_bytes(kv_format), max(LINE, rate))  # of which every token has whole bytes
        of_entries, of_index = (tokens // rate * size for size in (entry_bytes, index_dim * BF16))
        index, tail = keys.nbytes + of_entries, keys.nbytes + of_entries + of_index
        places = {"entry_offset": keys.nbytes, "entry_bytes": entry_bytes, "tail_offset": tail}
        runs = (*keys.runs, (keys.nbytes, of_entries))
        if index_dim:
            places |= {"index_offset": index, "index_dim": index_dim}
            runs = (*runs, (index, of_index))
        return replace(
            keys,
            nbytes=tail + round_up(kept, LINE),
            token_bytes=tail // tokens,
            fields={**keys.fields, **places},
            runs=runs,
            run=RUN_TOKENS,
            fixed=((tail, kept),),
        )
