"""Where a recurrent state is saved while a prompt is read, because another prompt may go on from there."""

from __future__ import annotations

import numpy as np

from hybrid.formats.block import BLOCK, round_up
from hybrid.plan.kv_layout import KvPlan
from hybrid.serving.kept import Tokens
from hybrid.text.openings import Openings

MIN_SPACING = 256  # tokens


def marks_of(prompt: Tokens, openings: Openings) -> tuple[int, ...]:
    """Numbers of tokens after which a step ends, ascending: before the last two messages, so that a question that is
    put anew costs only itself; and behind the first, which strangers may share. Without messages: the last block.
    """
    found = np.flatnonzero(prompt == openings.message) if openings.message is not None else prompt[:0]
    places = [*found[1:2].tolist(), *found[-2:].tolist()] or [(len(prompt) - 1) // BLOCK * BLOCK]
    return tuple(sorted({place for place in places if place}))


def state_spacing(kv: KvPlan) -> int:
    """After how many tokens of a prompt its state is saved in any case: whose keys and values take as much as it."""
    return round_up(max(MIN_SPACING, kv.fixed_bytes // max(1, kv.token_bytes)), BLOCK)
