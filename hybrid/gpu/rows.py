"""Rows as the kernels of the threads read them: bf16, or int8 with sums and scales, padded with zeros."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from hybrid.formats.rows import SCALE_INPUTS, SUM_INPUTS, int8_row_bytes, row_stride

_LEAST = 1e-36  # below, 127 / x would overflow


def expert_rows(rows: Tensor, integer: bool) -> Tensor:
    """What products of a format read of float32 rows [rows, width]: bf16 [rows, row_stride], or int8 rows as uint8
    [rows, int8_row_bytes].
    """
    return int8_rows(rows) if integer else pad(rows.bfloat16(), (0, row_stride(rows.shape[1]) - rows.shape[1]))


def int8_rows(rows: Tensor) -> Tensor:
    """uint8 [rows, int8_row_bytes(width)] of float32 [rows, width]: values, a sum for each 32, a scale for each 256."""
    count, width = rows.shape
    inputs, nbytes = row_stride(width), int8_row_bytes(width)
    groups = pad(rows, (0, -width % SCALE_INPUTS)).unflatten(1, (-1, SCALE_INPUTS))
    largest = groups.abs().amax(-1)
    factor = torch.where(largest > _LEAST, 127.0 / largest, 0.0)
    values = (groups * factor[..., None]).round().flatten(1)[:, :inputs].to(torch.int8)
    sums = values.unflatten(1, (-1, SUM_INPUTS)).sum(-1, dtype=torch.int32)
    parts = [part.contiguous().view(torch.uint8) for part in (values, sums, largest / 127.0)]
    whole = torch.cat(parts, 1)
    return pad(whole, (0, nbytes - whole.shape[1])).reshape(count, nbytes)
