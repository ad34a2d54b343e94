"""The sizes of latent attention: what follows from the number of heads and the dimensions of a head and of latents."""

from __future__ import annotations

from dataclasses import dataclass, field

from hybrid.formats.block import BLOCK, round_up
from hybrid.models.layers.grouped_query_shape import KEY_ALIGN, SCALE, STATE_EXTRA
from hybrid.models.layers.products import BF16
from hybrid.models.rope import RopeSpec

MAX_TOGETHER = 32  # heads that pass over a block of keys together; more would leave threads without work


def heads_together(heads: int) -> int:
    """How many of so many heads pass over a block of keys at a time: always as many."""
    return next(size for size in range(min(heads, MAX_TOGETHER), 0, -1) if heads % size == 0)


@dataclass(frozen=True)
class LatentShape:
    """rank: of the latents of keys and values. q_rank: of those of queries, 0 if these are projected at once.
    nope_dim, value_dim: of each head's keys without what turns, and values; as many dimensions turn as `rope` has.
    unturned: without rope, as many dimensions of keys as all heads share beside the latents, where else they turn.
    """

    heads: int
    rank: int
    q_rank: int
    nope_dim: int
    value_dim: int
    rope: RopeSpec | None
    unturned: int = field(default=0, kw_only=True)

    @property
    def shared_dim(self) -> int:
        """Dimensions of keys that turn, or that are in their place."""
        return self.rope.dim if self.rope else self.unturned

    @property
    def row_dim(self) -> int:
        """Dimensions of a token's row."""
        return self.rank + self.shared_dim

    @property
    def key_dim(self) -> int:
        """Of a row as it is stored: behind the latent there is always room, where a row says that it is no number."""
        return round_up(self.rank + (self.shared_dim or 2), KEY_ALIGN)

    @property
    def mixed_dim(self) -> int:
        """Of the rows, as values."""
        return round_up(self.rank, BLOCK)

    @property
    def width(self) -> int:
        """Width of the output of all heads."""
        return self.heads * self.value_dim

    @property
    def query_width(self) -> int:
        return self.heads * (self.nope_dim + self.shared_dim)

    @property
    def low_parts(self) -> tuple[int, int]:
        """Rows of the first projection: queries, or their latents; then those of keys and values."""
        return self.q_rank or self.query_width, self.row_dim

    @property
    def low_width(self) -> int:
        return sum(self.low_parts)

    @property
    def together(self) -> int:
        """How many heads pass over a block of keys at a time: all have the same."""
        return heads_together(self.heads)

    @property
    def state_floats(self) -> int:
        """Floats of a row's partial softmaxes."""
        return self.heads * (self.mixed_dim + STATE_EXTRA)

    def token_bytes(self, kv_format: str) -> int:
        """What one token takes: its row, padded, and its scale if it needs one."""
        return self.key_dim * BF16 if kv_format == "bf16" else self.key_dim + SCALE
