"""Pairs sorted by slot and cut into tiles, on the device: nothing waits for the host to know how many there are."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tiles(NamedTuple):
    """int32 [tiles] each but `order` [pairs]: a tile has the pairs order[first:last] and one slot; -1: no tile."""

    slot: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor
    order: torch.Tensor


def tiles_of(slot_ids: torch.Tensor, slots: int, rows: int) -> Tiles:
    """Tiles of at most `rows` pairs of slot_ids, int32 [rows, top_k] with -1 for none.

    There are as many as the worst case needs: each slot that is used may leave one that is not full.
    """
    flat = slot_ids.reshape(-1).long()
    pairs = len(flat)
    keys = torch.where(flat < 0, slots, flat)
    order = torch.argsort(keys, stable=True)
    counts = torch.zeros(slots + 1, dtype=torch.long, device=flat.device)
    counts.scatter_add_(0, keys, torch.ones_like(keys))
    starts, tiles = counts.cumsum(0) - counts, (counts[:slots] + rows - 1) // rows
    ends = tiles.cumsum(0)
    number = torch.arange(pairs // rows + min(slots, pairs), device=flat.device)
    slot = torch.searchsorted(ends, number, right=True)
    there = slot < slots
    slot = slot.clamp(max=slots - 1)
    first = starts[slot] + (number - (ends[slot] - tiles[slot])) * rows
    last = torch.minimum(first + rows, starts[slot] + counts[slot])
    found = (torch.where(there, slot, -1), torch.where(there, first, 0), torch.where(there, last, 0), order)
    return Tiles(*(part.int() for part in found))
