"""Attention over mirrored keys and values, as a softmax state that can be joined with that of other tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hybrid.device_memory import SCORES
from hybrid.gpu.products import product

LEAST_KEYS = 256  # of one part


@dataclass(frozen=True)
class State:
    """A softmax over some keys: values float32 [.., dim], weighted and not yet divided; top [..], the largest score;
    total [..], the sum of exp(score - top). Where no key was seen top is -inf, total 0, and values are 0.
    """

    values: Tensor
    top: Tensor
    total: Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> State:
    """q bf16 [batch, rows, heads, dim]; k, v bf16 [batch, kv_heads, keys, dim]; seen bool [batch, rows, keys].

    Returns states [batch, rows, heads].
    """
    step = max(LEAST_KEYS, SCORES // q[..., 0].numel())
    parts = [slice(first, first + step) for first in range(0, k.shape[2], step)]
    states = [_attend(q, k[:, :, part], v[:, :, part], seen[..., part], scale) for part in parts]
    whole = states[0]
    for state in states[1:]:
        whole = join(whole, state)
    return whole


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> State:
    batch, rows, heads, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    group = heads // kv_heads
    by_head = q.reshape(batch, rows, kv_heads, group, dim).permute(0, 2, 1, 3, 4).reshape(-1, rows * group, dim)
    scores = product(by_head, k.reshape(-1, keys, dim).transpose(1, 2)) * scale
    scores = scores.view(batch, kv_heads, rows, group, keys).masked_fill(~seen[:, None, :, None], -torch.inf)
    top = scores.amax(-1)
    weights = torch.exp(scores - top.clamp(min=torch.finfo(torch.float32).min)[..., None])
    values = product(weights.bfloat16().view(-1, rows * group, keys), v.reshape(-1, keys, dim))
    values = values.view(batch, kv_heads, rows, group, dim)

    def by_row(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2, 3)

    return State(by_row(values), by_row(top), by_row(weights.sum(-1)))


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
    [batch, rows, heads, dim], rounded to bf16.
    """
    grouped = q.shape[2] != k.shape[1]
    made = scaled_dot_product_attention(
        q.transpose(1, 2), k, v, attn_mask=seen[:, None], scale=scale, enable_gqa=grouped
    )
    return made.transpose(1, 2).float()
