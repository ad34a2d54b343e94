"""Copying experts before they are called."""

from __future__ import annotations

# none: copies follow misses only. next-gate: the router of the next layer, run early on the hidden state at hand, names
# the experts that `Table.prefetch` is given (Eliseev and Mazur, Fast inference of MoE language models with offloading,
# 2023).
PREFETCHES = ("none", "next-gate")
