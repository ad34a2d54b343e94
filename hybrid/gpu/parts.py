"""What the layers of every family are made of, on a device: norm, rope, gated feed-forward, router.

The arithmetic is that of the CPU kernels: the residual stream, norms, rope and router in fp32, products of bf16 rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from hybrid.gpu.products import linear
from hybrid.models.layers.feed_forward import Activation
from hybrid.models.layers.router import Router
from hybrid.models.rope import Growth, RopeSpec, inverse_frequencies


@dataclass(frozen=True)
class GatedWeights:
    """A feed-forward without a router: gate, up bf16 [intermediate, hidden], down bf16 [hidden, intermediate].

    Biases are float32 or None.
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


# From logits float32 [rows, experts], which may be part of wider rows, and corrections float32 [experts] or None: ids
# int32 and weights float32 [rows, top_k].
Choose = Callable[[Tensor, Router, Tensor | None], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Routed:
    """What a router chose for rows: ids int32 and weights float32 [rows, top_k], in order of falling score.

    shared: float32 [rows], the weight of the shared expert, or None where it has none.
    """

    ids: Tensor
    weights: Tensor
    shared: Tensor | None


def scaled(x: Tensor, scale: float) -> Tensor:
    """Without a kernel where the scale is 1."""
    return x if scale == 1 else x * scale


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """float32, over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@dataclass(frozen=True)
class NormWeights:
    """Of the residual stream, float32. bias: None of an RMSNorm; a LayerNorm has one."""

    weight: Tensor
    bias: Tensor | None


def norm(x: Tensor, weights: NormWeights, eps: float) -> Tensor:
    """float32, over the last dimension."""
    if weights.bias is None:
        return rms_norm(x, weights.weight, eps)
    return rms_norm(x - x.mean(-1, keepdim=True), weights.weight, eps) + weights.bias


def some_norm(x: Tensor, weights: NormWeights | None, eps: float) -> Tensor:
    """The same, or what it is given where there are no weights."""
    return x if weights is None else norm(x, weights, eps)


@dataclass(frozen=True)
class RopeFrequencies:
    """frequencies: float32 [dim / 2], with the factor of cosines and sines. long, long_factor: those of sequences of
    more than `long_above` tokens; None where these have no others. growth: of queries.
    """

    frequencies: Tensor
    factor: float
    long: Tensor | None
    long_factor: float
    long_above: int
    growth: Growth | None


def rope_frequencies(rope: RopeSpec, device: torch.device) -> RopeFrequencies:
    frequencies, factor = inverse_frequencies(rope)
    long, long_factor = inverse_frequencies(rope, long=True) if rope.long_above else (None, 1.0)
    return RopeFrequencies(
        torch.from_numpy(frequencies).to(device),
        factor,
        None if long is None else torch.from_numpy(long).to(device),
        long_factor,
        rope.long_above,
        rope.growth,
    )


def rope_table(positions: Tensor, lengths: Tensor, rope: RopeFrequencies) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [rows, 1, dim / 2], of int positions [rows] in sequences of these lengths [rows].

    Angles are rounded to fp32, as the kernels and reference implementations do.
    """
    if rope.long is None:
        return _table(positions, rope.frequencies, rope.factor)
    both = (_table(positions, rope.long, rope.long_factor), _table(positions, rope.frequencies, rope.factor))
    is_long = (lengths > rope.long_above)[:, None, None]
    cos, sin = (torch.where(is_long, *some) for some in zip(*both, strict=True))
    return cos, sin


def _table(positions: Tensor, frequencies: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    angles = (positions[:, None].float() * frequencies).double()[:, None]
    return angles.cos().float() * factor, angles.sin().float() * factor


def growth(positions: Tensor, rope: RopeFrequencies) -> Tensor | None:
    """What queries at int positions [rows] are multiplied by, float32 [rows, 1, 1]; None where all are by 1."""
    if rope.growth is None:
        return None
    steps = (1 + positions // rope.growth.length).double().log()
    return (1 + rope.growth.beta * steps).float()[:, None, None]


def grown(queries: Tensor, growth: Tensor | None) -> Tensor:
    return queries if growth is None else queries * growth


def rotate(x: Tensor, table: tuple[Tensor, Tensor], rope: RopeSpec) -> Tensor:
    """Heads float32 [rows, heads, head_dim] with their first `rope.dim` dimensions turned."""
    cos, sin = table
    turned, rest = x[..., : rope.dim], x[..., rope.dim :]
    pairs = turned.unflatten(-1, (-1, 2) if rope.interleaved else (2, -1))
    a, b = pairs.unbind(-1 if rope.interleaved else -2)
    both = torch.stack([a * cos - b * sin, b * cos + a * sin], -1 if rope.interleaved else -2)
    return torch.cat([both.flatten(-2), rest], -1)


def gated(rows: Tensor, weights: GatedWeights, activation: Activation) -> Tensor:
    """float32 [rows, hidden] of bf16 rows."""
    gate = linear(rows, weights.gate, weights.gate_bias)
    up = linear(rows, weights.up, weights.up_bias)
    return linear(_activate(gate, up, activation).bfloat16(), weights.down, weights.down_bias)


def _activate(gate: Tensor, up: Tensor, kind: Activation) -> Tensor:
    if kind == "silu":
        return silu(gate) * up
    if kind == "gelu_tanh":
        return gelu(gate, approximate="tanh") * up
    assert kind == "swiglu_clamped", f"activation {kind} is refused by the plan"
    gate, up = gate.clamp(max=7.0) + gate * 0, up.clamp(-7.0, 7.0) + up * 0  # infinity becomes NaN, no number
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


@dataclass(frozen=True)
class RouterWeights:
    """float32: weight [experts, hidden], behind them the gate of a shared expert if any; bias and correction [experts]
    or None.
    """

    weight: Tensor
    bias: Tensor | None
    correction: Tensor | None


def route(rows: Tensor, weights: RouterWeights, router: Router, shared_gate: bool, choose: Choose) -> Routed:
    """rows float32 [rows, hidden]."""
    scores = torch.nn.functional.linear(rows, weights.weight, weights.bias)
    shared = torch.sigmoid(scores[:, -1]) if shared_gate else None
    logits = capped(scores[:, :-1] if shared_gate else scores, router.logit_cap)
    return Routed(*choose(logits, router, weights.correction), shared)


def capped(logits: Tensor, cap: float) -> Tensor:
    """Between -cap and cap; as they are where it is 0. What is infinite becomes NaN, no number."""
    return torch.tanh(logits / cap) * cap + logits * 0 if cap else logits


def chooser(device: torch.device) -> Choose:
    return choose_by_kernel if device.type == "cuda" else choose_by_torch


def choose_by_kernel(logits: Tensor, router: Router, correction: Tensor | None) -> tuple[Tensor, Tensor]:
    """Top-k choice in one kernel instead of up to seven of torch's."""
    from gpu_cache.kernels.router import TopK, choose

    groups = (router.groups, router.top_groups)
    top = TopK(router.kind, logits.shape[1], router.top_k, router.renormalise, router.scale, *groups, router.jitter)
    return choose(logits, top, correction)


def choose_by_torch(logits: Tensor, router: Router, correction: Tensor | None) -> tuple[Tensor, Tensor]:
    logits = logits + logits.sum(-1, keepdim=True) * 0  # NaN and infinity are those of the row
    if correction is not None:
        logits = logits + correction.sum() * 0
    if router.kind == "sparsemixer":
        return _sparsemixer(logits, router)
    after = router.kind == "topk_softmax"
    scores = logits if after else logits.sigmoid() if router.kind == "sigmoid" else logits.softmax(-1)
    keys = scores if correction is None else scores + correction
    if router.groups > 1:
        keys = _within_best_groups(keys, router)
    ids = torch.topk(keys, router.top_k).indices
    weights = scores.gather(1, ids)
    if after:
        weights = weights.softmax(-1)
    elif router.renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return ids.int(), weights * router.scale


def _sparsemixer(logits: Tensor, router: Router) -> tuple[Tensor, Tensor]:
    left, ids, weights = logits, [], []
    for _ in range(router.top_k):
        top, best = left.max(-1, keepdim=True)
        far = (top - logits) / torch.maximum(logits.abs(), top) > 2 * router.jitter
        weights.append(left.masked_fill(far, -torch.inf).softmax(-1).gather(1, best))
        ids.append(best)
        left = left.scatter(1, best, -torch.inf)
    return torch.cat(ids, 1).int(), torch.cat(weights, 1) * router.scale


def _within_best_groups(keys: Tensor, router: Router) -> Tensor:
    """Keys of experts outside the best groups become -inf. A group is worth its largest key; of sigmoids its two."""
    grouped = keys.unflatten(1, (router.groups, -1))
    best = grouped.topk(2 if router.kind == "sigmoid" else 1).values.sum(-1).topk(router.top_groups).indices
    kept = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=keys.device).scatter(1, best, True)
    return torch.where(kept[..., None], grouped, -torch.inf).flatten(1)
