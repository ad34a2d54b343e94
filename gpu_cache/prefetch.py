"""Copying experts before they are asked for."""

from __future__ import annotations

# none: copies follow misses only. next-gate: the router of the next layer, run early on the hidden state at hand, names the experts
# that `Table.prefetch` is given (as Pre-gated MoE, ISCA 2024, and the systems after it, without a change of the model).
PREFETCHES = ("none", "next-gate")
