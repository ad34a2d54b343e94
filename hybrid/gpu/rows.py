"""Rows as the kernels of the threads read them: bf16, or whole numbers with scales and sums, padded with zeros."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from hybrid.formats.block import round_up
from hybrid.formats.rows import (
    FP4_OFFSET,
    GROUP_INPUTS,
    SCALE_INPUTS,
    SUM_INPUTS,
    WIDE_BASE,
    WIDE_TOP,
    RowKind,
    grouped_row_bytes,
    int8_row_bytes,
    row_stride,
    wide_row_bytes,
)

_LEAST = 1e-36  # below, 127 / x would overflow
_LEAST_WIDE = 2e-34  # and 1 / (x / WIDE_TOP)


def expert_rows(rows: Tensor, kind: RowKind) -> Tensor:
    """What products of a format read of float32 rows [rows, width]: bf16 [rows, row_stride(width)], or another kind
    of rows as uint8 [rows, row_bytes(width, kind)].
    """
    if kind == "bf16":
        return pad(rows.bfloat16(), (0, row_stride(rows.shape[1]) - rows.shape[1]))
    return {"int8": int8_rows, "grouped": grouped_rows, "wide": wide_rows}[kind](rows)


def int8_rows(rows: Tensor) -> Tensor:
    """uint8 [rows, int8_row_bytes(width)] of float32 [rows, width]: values, a sum for each 32, a scale for each 256."""
    values, sums, scales = _quantised(rows, SCALE_INPUTS)
    return _as_bytes((values, sums, scales), int8_row_bytes(rows.shape[1]))


def grouped_rows(rows: Tensor) -> Tensor:
    """uint8 [rows, grouped_row_bytes(width)] of float32 [rows, width]: values, and of each 32 a scale and the sums of
    all, of the first 16 and of the others.
    """
    values, sums, scales = _quantised(rows, GROUP_INPUTS)
    halves = values.unflatten(1, (-1, 2, GROUP_INPUTS // 2)).sum(-1, dtype=torch.int32)
    groups = torch.cat([scales[..., None], scales[..., None] * torch.cat([sums[..., None], halves], 2)], 2)
    return _as_bytes((values, groups), grouped_row_bytes(rows.shape[1]))


def wide_rows(rows: Tensor) -> Tensor:
    """uint8 [rows, wide_row_bytes(width)] of float32 [rows, width]: bf16, whole numbers as upper and lower bytes, sums
    of 16 and of 32 times the offset of codes, and a scale for each 256, a power of two.
    """
    groups, largest = _in_groups(rows, SCALE_INPUTS)
    powers = ((largest / float(WIDE_TOP)).view(torch.int32) + 0x7FFFFF & -0x800000).view(torch.float32)  # rounded up
    scales = torch.where(largest.isfinite(), powers, largest)
    whole = _whole(groups, torch.where(largest > _LEAST_WIDE, 1.0 / scales, 0.0), row_stride(rows.shape[1]))
    high = (whole / WIDE_BASE).round()
    bytes_of_whole = [part.to(torch.int8) for part in (high, whole - high * WIDE_BASE)]
    halves = whole.unflatten(1, (-1, 2, SUM_INPUTS // 2)).sum(-1)
    starts = -FP4_OFFSET * halves.cumsum(-1).to(torch.int32)
    return _as_bytes((expert_rows(rows, "bf16"), *bytes_of_whole, starts, scales), wide_row_bytes(rows.shape[1]))


def _quantised(rows: Tensor, together: int) -> tuple[Tensor, Tensor, Tensor]:
    """int8 values [rows, row_stride(width)], the int32 sum of each 32, and a float32 scale for each `together`."""
    groups, largest = _in_groups(rows, together)
    factor = torch.where(largest > _LEAST, 127.0 / largest, 0.0)
    values = _whole(groups, factor, row_stride(rows.shape[1])).to(torch.int8)
    return values, values.unflatten(1, (-1, SUM_INPUTS)).sum(-1, dtype=torch.int32), largest / 127.0


def _in_groups(rows: Tensor, together: int) -> tuple[Tensor, Tensor]:
    """Rows padded with zeros [rows, groups, together], and the largest magnitude of each group [rows, groups]."""
    missing = round_up(row_stride(rows.shape[1]), together) - rows.shape[1]
    groups = pad(rows, (0, missing)).unflatten(1, (-1, together))
    return groups, groups.abs().amax(-1)


def _whole(groups: Tensor, factor: Tensor, inputs: int) -> Tensor:
    """Whole numbers [rows, inputs], still float32."""
    return (groups * factor[..., None]).round().flatten(1)[:, :inputs]


def _as_bytes(parts: tuple[Tensor, ...], nbytes: int) -> Tensor:
    count = len(parts[0])
    whole = torch.cat([part.contiguous().view(count, -1).view(torch.uint8) for part in parts], 1)
    return pad(whole, (0, nbytes - whole.shape[1]))
