"""The state of a sequence of attention to compressed tokens.

[keys of the last tokens | what the last tokens brought | entries | keys of an indexer]. The first two do not grow: a
token has its place at its position modulo how many are kept. Keys of tokens lie as entries do, each with its scale
behind it; these, and keys of an indexer, lie behind each other, so that what 16 tokens have of them is contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cpu_kernels import RUN_TOKENS
from hybrid.formats.block import round_up
from hybrid.models.layers.base import StateLayout
from hybrid.models.layers.grouped_query_shape import SCALE
from hybrid.models.layers.products import BF16
from hybrid.ops import Choice

LINE = 64  # bytes


@dataclass(frozen=True)
class KeyState:
    """Keys of one head, whose first dimensions are the values, padded. rate: tokens of an entry; 1: there are none."""

    key_dim: int
    value_dim: int
    rate: int

    def token_bytes(self, kv_format: str) -> int:
        """What the key of a token takes, and its scale if it needs one."""
        return self.key_dim * BF16 if kv_format == "bf16" else self.key_dim + SCALE

    def entry_bytes(self, kv_format: str) -> int:
        """The same as it lies, of which every token of an entry has whole bytes."""
        return round_up(self.token_bytes(kv_format), max(LINE, self.rate))

    def layout(self, kv_format: str, kept: int) -> StateLayout:
        """Of the keys of the last `kept` tokens. A sequence goes back within a run alone, so a step that failed cannot
        be run again.
        """
        entry_bytes = self.entry_bytes(kv_format)
        fields = {
            "head_stride": 0,
            "value_offset": 0,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "format": Choice("Format", kv_format),
            "key_scales_offset": 0,
            "value_scales_offset": 0,
            "shared": True,
            "entry_bytes": entry_bytes,
        }
        nbytes = kept * entry_bytes
        return StateLayout(nbytes, 0, "KvLayout", fields, run=RUN_TOKENS, fixed=((0, nbytes),))

    def with_entries(self, keys: StateLayout, tokens: int, index_dim: int, brought: int) -> StateLayout:
        """Keys, `brought` bytes of the last tokens, the entries of `tokens` tokens, and beside each entry a key
        [index_dim] of an indexer, 0 if there is none.
        """
        entries = keys.nbytes + round_up(brought, LINE)
        of_entries, of_index = (tokens // self.rate * size for size in (keys.fields["entry_bytes"], index_dim * BF16))
        index, end = entries + of_entries, entries + of_entries + of_index
        places = {"tail_offset": keys.nbytes, "entry_offset": entries}
        runs: tuple[tuple[int, int], ...] = ((entries, of_entries),)
        if index_dim:
            places |= {"index_offset": index, "index_dim": index_dim}
            runs = (*runs, (index, of_index))
        return replace(
            keys,
            nbytes=end,
            token_bytes=(of_entries + of_index) // tokens,
            fields={**keys.fields, **places},
            runs=runs,
            fixed=((0, entries),),
        )
