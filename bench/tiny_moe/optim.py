"""Muon for the weight matrices and AdamW for everything else.

Orthogonalised updates need fewer tokens than AdamW at this size, and tokens are what a CPU run is short of.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(batch: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration on a batch of matrices, pushing their singular values towards one."""
    wide = batch.shape[-2] <= batch.shape[-1]
    # The result only sets a direction, so bf16 is precise enough, and several times faster than fp32.
    x = (batch if wide else batch.mT).to(torch.bfloat16)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(batch.dtype)


class Muon(torch.optim.Optimizer):
    """Muon over groups of equally shaped matrices, one batched iteration per shape."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update; the scale makes its size comparable to AdamW's."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for param in group["params"]:
                for weight, grad in _matrices(param, self._nesterov(param, group["momentum"])):
                    by_shape[tuple(weight.shape[-2:])].append((weight, grad))
            for shape, pairs in by_shape.items():
                update = orthogonalise(torch.cat([grad for _, grad in pairs]))
                scale = 0.2 * max(shape) ** 0.5 * group["lr"]
                for (weight, _), delta in zip(pairs, update.split([w.shape[0] for w, _ in pairs]), strict=True):
                    weight.mul_(1 - group["lr"] * group["decay"]).add_(delta, alpha=-scale)

    def _nesterov(self, param: nn.Parameter, momentum: float) -> Tensor:
        """Momentum with look-ahead."""
        state = self.state[param]
        if "buffer" not in state:
            state["buffer"] = torch.zeros_like(param)
        state["buffer"].lerp_(param.grad, 1 - momentum)
        return param.grad.lerp(state["buffer"], momentum)


def _matrices(param: Tensor, grad: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Views of a parameter as batches of matrices; gate and up are separate matrices stored together."""
    if param.ndim == 2:
        return [(param.unsqueeze(0), grad.unsqueeze(0))]
    if param.shape[1] > param.shape[2]:
        return list(zip(param.chunk(2, dim=1), grad.chunk(2, dim=1), strict=True))
    return [(param, grad)]


def build(model: nn.Module, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Matrices inside the layers go to Muon; embedding, router and norms to AdamW."""
    matrices, rest = [], []
    for name, param in model.named_parameters():
        inside = param.ndim >= 2 and "embed" not in name and ".gate." not in name
        (matrices if inside else rest).append(param)
    return [Muon(matrices, muon_lr), torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0)]
