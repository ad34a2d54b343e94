"""Sizes of the pools of tokens that an indexer selects, as configurations say them."""

from __future__ import annotations

from hybrid.errors import ConfigError
from hybrid.models.reading import Fields

MAX_POOL = 64  # tokens, so that every token has whole bytes of a pool's key


def read_pools(fields: Fields, size: str, tokens: str, defaults: tuple[int, int] | None = None) -> tuple[int, int]:
    """Tokens of a pool, and how many pools a row selects. size, tokens: the fields that say the first, and how many
    tokens are selected. defaults: of both; None: both must be there.
    """
    of_pool, of_row = defaults or (None, None)
    pool = fields.size(size, default=of_pool, minimum=2, maximum=MAX_POOL)
    selected = fields.size(tokens, default=of_row, maximum=10**9)
    if pool & (pool - 1) or selected % pool:
        raise ConfigError(
            f"config.json: {size} is {pool}, {tokens} {selected}; the first must be a power of 2, the second a "
            "multiple of it: correct them"
        )
    return pool, selected // pool
