"""Attention over mirrored keys and values, as a softmax state that can be joined with that of other tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hybrid.gpu.products import product
from hybrid.plan.gpu_memory import SCORES

MIN_KEYS = 256  # of one part
_ALIGNED = 8  # elements of bf16: kernels read the rows of a mask 16 bytes at a time

# of folded queries: (q, k, v, bias, scale) to bf16 as q
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class State:
    """A softmax over some keys: values float32 [.., dim], weighted and not yet divided; top [..], the largest score;
    total [..], the sum of exp(score - top). Where no key was seen top is -inf, total 0, and values are 0.
    """

    values: Tensor
    top: Tensor
    total: Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> State:
    """q bf16 [batch, rows, heads, dim]; k bf16 [batch, kv_heads, keys, dim], v as k or narrower; seen bool [batch,
    rows, keys].

    Returns states [batch, rows, heads].
    """
    step = max(MIN_KEYS, SCORES // q[..., 0].numel())
    parts = [slice(first, first + step) for first in range(0, k.shape[2], step)]
    states = [_attend(q, k[:, :, part], v[:, :, part], seen[..., part], scale) for part in parts]
    whole = states[0]
    for state in states[1:]:
        whole = join(whole, state)
    return whole


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> State:
    kv_heads, keys, dim = k.shape[1:]
    group = q.shape[2] // kv_heads
    by_head = _fold(q, kv_heads).flatten(0, 1)
    scores = product(by_head, k.reshape(-1, keys, dim).transpose(1, 2)) * scale
    scores = scores.view(len(q), kv_heads, -1, group, keys).masked_fill(~seen[:, None, :, None], -torch.inf)
    top = scores.amax(-1)
    weights = torch.exp(scores - top.clamp(min=torch.finfo(torch.float32).min)[..., None])
    values = product(weights.bfloat16().view(len(by_head), -1, keys), v.reshape(-1, keys, v.shape[-1]))
    return State(_by_row(values.view(*top.shape, -1)), _by_row(top), _by_row(weights.sum(-1)))


def _fold(q: Tensor, kv_heads: int) -> Tensor:
    """[batch, kv_heads, rows * group, dim] of [batch, rows, heads, dim]: the heads that share keys become rows."""
    by_head: Tensor = q.unflatten(2, (kv_heads, -1)).transpose(1, 2)
    return by_head.flatten(2, 3)


def _by_row(x: Tensor) -> Tensor:
    """[batch, rows, heads, ..] of [batch, kv_heads, rows, group, ..]."""
    return x.transpose(1, 2).flatten(2, 3)


def join(a: State, b: State) -> State:
    """The state over the keys of both."""
    top = torch.maximum(a.top, b.top)
    finite = top.clamp(min=torch.finfo(torch.float32).min)
    keep, more = torch.exp(a.top - finite), torch.exp(b.top - finite)
    values = a.values * keep[..., None] + b.values * more[..., None]
    return State(values, top, a.total * keep + b.total * more)


def finish(state: State, sinks: Tensor | None) -> Tensor:
    """float32 [.., heads, dim]. sinks: float32 [heads], logits without a value that share in the softmax."""
    if sinks is None:
        return state.values / state.total[..., None]
    top = torch.maximum(state.top, sinks)
    keep = torch.exp(state.top - top)
    return state.values * (keep / (state.total * keep + torch.exp(sinks - top)))[..., None]


def read_states(rows: Tensor, heads: int, dim: int) -> State:
    """States [rows, heads] as the kernels of the threads leave them, float32 [rows, heads * (value_dim + 16)].

    Values of a state that saw no key are not written there, and may be anything.
    """
    states = rows.unflatten(1, (heads, -1))
    padded = states.shape[-1] - 16
    top, total = states[..., padded], states[..., padded + 1]
    values = torch.where(total[..., None] > 0, states[..., :dim], 0.0)
    return State(values, top, total)


def attend_whole(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """The same as `finish(attend(...), None)` by torch's own attention, where nothing is to be joined: float32
    [batch, rows, heads, dim], rounded to bf16. Every row must see a key.
    """
    return attend_folded(_torch, q, k, v, seen, scale)


def _torch(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def attend_folded(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """`attend_whole` by a kernel that needs as many heads of queries as of keys, and so reads every key but once.

    It gets q bf16 [batch, kv_heads, rows * group, dim], k and v as they are, and a bias to add to the scores, bf16
    [batch, 1, rows * group, keys]; as many rows at a time as leave the bias within the workspace.
    """
    kv_heads, keys = k.shape[1:3]
    group = q.shape[2] // kv_heads
    step = max(1, SCORES // (len(q) * group * keys))
    made = [
        kernel(_fold(rows, kv_heads), k, v, _bias(seen_by, group), scale).unflatten(2, (-1, group))
        for rows, seen_by in zip(q.split(step, 1), seen.split(step, 1), strict=True)
    ]
    return _by_row(made[0] if len(made) == 1 else torch.cat(made, 2)).float()


def _bias(seen: Tensor, group: int) -> Tensor:
    """bf16 [batch, 1, rows * group, keys] of bool [batch, rows, keys]: 0 where a key is seen, else -inf."""
    batch, rows, keys = seen.shape
    padded = -(-keys // _ALIGNED) * _ALIGNED
    bias = torch.full((batch, rows, group, padded), -torch.inf, dtype=torch.bfloat16, device=seen.device)
    bias[..., :keys].masked_fill_(seen[:, :, None], 0.0)
    return bias.view(batch, 1, rows * group, padded)[..., :keys]
