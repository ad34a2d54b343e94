"""Rows as the kernels of the threads read them: bf16, or int8 with scales and sums, padded with zeros."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from hybrid.formats.block import round_up
from hybrid.formats.rows import (
    GROUP_INPUTS,
    SCALE_INPUTS,
    SUM_INPUTS,
    RowKind,
    grouped_row_bytes,
    int8_row_bytes,
    row_stride,
)

_LEAST = 1e-36  # below, 127 / x would overflow


def expert_rows(rows: Tensor, kind: RowKind) -> Tensor:
    """What products of a format read of float32 rows [rows, width]: bf16 [rows, row_stride(width)], or int8 or grouped
    rows as uint8 [rows, row_bytes(width, kind)].
    """
    if kind == "bf16":
        return pad(rows.bfloat16(), (0, row_stride(rows.shape[1]) - rows.shape[1]))
    return int8_rows(rows) if kind == "int8" else grouped_rows(rows)


def int8_rows(rows: Tensor) -> Tensor:
    """uint8 [rows, int8_row_bytes(width)] of float32 [rows, width]: values, a sum for each 32, a scale for each 256."""
    values, sums, scales = _quantised(rows, SCALE_INPUTS)
    return _as_bytes((values, sums, scales), int8_row_bytes(rows.shape[1]))


def grouped_rows(rows: Tensor) -> Tensor:
    """uint8 [rows, grouped_row_bytes(width)] of float32 [rows, width]: values, and of each 32 a scale and the sum."""
    values, sums, scales = _quantised(rows, GROUP_INPUTS)
    return _as_bytes((values, torch.stack([scales, scales * sums], 2)), grouped_row_bytes(rows.shape[1]))


def _quantised(rows: Tensor, together: int) -> tuple[Tensor, Tensor, Tensor]:
    """int8 values [rows, row_stride(width)], the int32 sum of each 32, and a float32 scale for each `together`."""
    inputs = row_stride(rows.shape[1])
    filled = pad(rows, (0, round_up(inputs, together) - rows.shape[1]))
    groups = filled.unflatten(1, (-1, together))
    largest = groups.abs().amax(-1)
    factor = torch.where(largest > _LEAST, 127.0 / largest, 0.0)
    values = (groups * factor[..., None]).round().flatten(1)[:, :inputs].to(torch.int8)
    return values, values.unflatten(1, (-1, SUM_INPUTS)).sum(-1, dtype=torch.int32), largest / 127.0


def _as_bytes(parts: tuple[Tensor, ...], nbytes: int) -> Tensor:
    count = len(parts[0])
    whole = torch.cat([part.contiguous().view(count, -1).view(torch.uint8) for part in parts], 1)
    return pad(whole, (0, nbytes - whole.shape[1]))
