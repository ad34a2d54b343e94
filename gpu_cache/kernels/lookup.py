"""Slot lookup on the device: hits can be launched before the host knows what the router chose."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_PAIRS = 256  # that a program looks up


def slots_of(ids: torch.Tensor, slot_of: torch.Tensor, first: int, out: torch.Tensor) -> torch.Tensor:
    """out, int32 like ids: the slot of each expert, -1 for none. ids: int32, -1 for no expert.

    slot_of: int32 [keys], `CudaDevice.slot_of`; first: the key of expert 0 of the layer. What the host learns
    from `out` is what the kernels saw: it computes those that are -1.
    """
    pairs = ids.numel()
    _look_up[(-(-pairs // _PAIRS),)](ids, slot_of, first, out, pairs, PAIRS=_PAIRS)
    return out


@triton.jit
def _look_up(ids, slot_of, first, out, pairs, PAIRS: tl.constexpr):
    at = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    expert = tl.load(ids + at, mask=at < pairs, other=-1)
    slot = tl.load(slot_of + first + expert, mask=(at < pairs) & (expert >= 0), other=-1)
    tl.store(out + at, slot, mask=at < pairs)
