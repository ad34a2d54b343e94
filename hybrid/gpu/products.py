"""Products of bf16 matrices with fp32 sums, which are not rounded here."""

from __future__ import annotations

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor) -> Tensor:
    """float32 [n, m] of bf16 [n, k] and [k, m], or the same with a batch in front of each."""
    if a.is_cuda:
        multiply = torch.mm if a.dim() == 2 else torch.bmm
        return multiply(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()  # the CPU has no such product; the values are the same


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """float32 [rows, outputs] of bf16 rows, weight bf16 [outputs, inputs] and bias float32 [outputs]."""
    made = product(rows, weight.t())
    return made if bias is None else made + bias
