"""Attention on a device, which mirrors recent tokens, while the threads attend to older ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from hybrid.models.layers.products import between_calls
from hybrid.ops import Buffer, Op

# Buffers of a step.
NEW_KV = "device.kv"  # keys, then values of a layer for the rows of a step: float32 [rows, 2 * kv_heads * head_dim]
ENDS = "device.ends"  # int32 [rows]: tokens from there on are mirrored by the device
STATES = "device.states"  # softmax states of older tokens: float32 [rows, heads, value_dim + 16]


def ops_for_older(attention: Op) -> Iterator[Op]:
    """What becomes of attention: the device begins in one callback; the threads make states of older tokens; it joins
    both in another. Sinks share once: on the device.
    """
    changes = {"output": None, "sinks": None, "ends": Buffer(ENDS), "partials": Buffer(STATES)}
    yield from between_calls(replace(attention, arguments=attention.arguments | changes))
