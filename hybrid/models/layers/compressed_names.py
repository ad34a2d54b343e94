"""What the tensors of attention to compressed tokens are called in a checkpoint, and the formats of its matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class CompressedNames:
    """Names in a checkpoint."""

    norm: str
    q_down: str
    q_norm: str
    q_up: str
    kv: str
    kv_norm: str
    sinks: str
    out_down: str
    out_up: str


class CompressedFormats(NamedTuple):
    """Of the projections, in the order of a step."""

    q_down: str
    kv: str
    q_up: str
    out_down: str
    out_up: str
