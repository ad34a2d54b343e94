"""What a trace says of a model and of how often its tokens choose the same experts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gpu_cache.errors import CacheError
from gpu_cache.reuse import Reuse, measure_reuse
from gpu_cache.trace import Trace, calls
from gpu_cache.traces.base import begin_of_choices, is_prompt


@dataclass(frozen=True)
class Facts:
    """Counts of a trace.

    top_k: smallest and largest number of experts of a token at a layer. tokens: each as often as it was computed.
    prompt_tokens: those computed in one step with others of their sequence. largest_step: tokens. calls: different
    experts of each step and layer. called: experts, of all layers, that are called at least once. scored: whether
    scores differ. early: share of the groups before the last layer where the trace says what the next layer's router
    names; 0 without the column. reuse: None where no sequence has two tokens.
    """

    layers: int
    experts: int
    top_k: tuple[int, int]
    tokens: int
    prompt_tokens: int
    sequences: int
    steps: int
    largest_step: int
    rows: int
    calls: int
    called: int
    scored: bool
    early: float
    reuse: Reuse | None


def facts_of(trace: Trace) -> Facts:
    begins = begin_of_choices(trace)
    counts = np.diff(np.append(begins, len(trace)))
    first = begins[trace.layer[begins] == trace.layer.min()]
    grouped = calls(trace)
    try:
        reuse = measure_reuse(trace)
    except CacheError:
        reuse = None
    return Facts(
        layers=trace.layers,
        experts=trace.experts,
        top_k=(int(counts.min()), int(counts.max())),
        tokens=len(first),
        prompt_tokens=int(np.count_nonzero(is_prompt(trace)[first])),
        sequences=len(np.unique(trace.sequence)),
        steps=grouped.steps,
        largest_step=int(np.unique(trace.step[first], return_counts=True)[1].max()),
        rows=len(trace),
        calls=grouped.total,
        called=len(np.unique(grouped.key)),
        scored=bool(np.ptp(trace.score) > 0),
        early=grouped.named_share,
        reuse=reuse,
    )
