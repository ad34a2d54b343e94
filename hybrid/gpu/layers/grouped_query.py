"""Grouped-query attention on a device, over the tokens that it mirrors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from hybrid.gpu.attention import State, attend, finish, join, read_states
from hybrid.gpu.inputs import Group, StepInputs
from hybrid.gpu.layers.base import Shared
from hybrid.gpu.loader import Loader
from hybrid.gpu.mirror import KvRings
from hybrid.gpu.parts import NormWeights, norm, rms_norm, rotate, scaled
from hybrid.gpu.products import linear
from hybrid.models.layers.base import Place
from hybrid.models.layers.grouped_query import NEW_KV, STATES, GroupedQueryAttention

Made = TypeVar("Made")
Heads = tuple[Tensor, Tensor, Tensor]  # queries, keys and values float32 [rows, heads, head_dim], normed and turned


@dataclass(frozen=True)
class Weights:
    """q_norm, k_norm, biases and sinks are float32, matrices bf16 [outputs, inputs]."""

    norm: NormWeights
    qkv: Tensor
    out: Tensor
    qkv_bias: Tensor | None
    out_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    sinks: Tensor | None


def load(half: GroupedQueryAttention, place: Place, load: Loader) -> Weights:
    at, width, hidden = f"layers.{place.layer}.attention", half.qkv_width, place.hidden
    return Weights(
        norm=load.norm(f"{at}.norm"),
        qkv=load.matrix(f"{at}.qkv", width, hidden),
        out=load.matrix(f"{at}.out", hidden, half.width),
        qkv_bias=load.some_floats(f"{at}.qkv_bias", width),
        out_bias=load.some_floats(f"{at}.out_bias", hidden),
        q_norm=load.some_floats(f"{at}.q_norm"),
        k_norm=load.some_floats(f"{at}.k_norm"),
        sinks=load.some_floats(f"{at}.sinks"),
    )


def whole_shape(half: GroupedQueryAttention) -> tuple[int, int, int] | None:
    """None with sinks, because these are always joined in a separate step."""
    return None if half.sinks else (half.heads, half.kv_heads, half.head_dim)


def open_half(half: GroupedQueryAttention, place: Place, weights: Weights, shared: Shared) -> MirroredAttention:
    return MirroredAttention(half, place, weights, shared)


class MirroredAttention:
    """A `DeviceMixer`. The threads attend to tokens that are not mirrored, and both softmaxes are joined."""

    def __init__(self, half: GroupedQueryAttention, place: Place, weights: Weights, shared: Shared) -> None:
        self._half, self._eps, self._weights, self._shared = half, place.eps, weights, shared
        self._rope = place.ropes.index(half.rope) if half.rope else None
        sizes = (shared.sequences, half.kv_heads, shared.capacity, half.head_dim)
        self._rings = KvRings(*sizes, device=weights.norm.weight.device)

    @property
    def windows(self) -> frozenset[int | None]:
        return frozenset([self._half.window])

    def sees_older(self, inputs: StepInputs) -> bool:
        return inputs.older[self._half.window]

    def project(self, residual: Tensor, inputs: StepInputs) -> Heads:
        """Queries, keys and values. Keys and values are also sent to the threads, which store them."""
        weights, buffers, link = self._weights, self._shared.buffers, self._shared.link
        rows = norm(residual, weights.norm, self._eps).bfloat16()
        q, k, v = self._heads(linear(rows, weights.qkv, weights.qkv_bias), inputs)
        new = torch.cat([k, v], 1).flatten(1)
        link.to_host(buffers.rows(NEW_KV, torch.float32, *new.shape), new)
        if self.sees_older(inputs):
            queries = pad(q, (0, self._half.key_dim - self._half.head_dim)).bfloat16().flatten(1)
            link.to_host(buffers.rows("q", torch.bfloat16, *queries.shape), queries)
        return q, k, v

    def mix(self, projected: Heads, inputs: StepInputs) -> Tensor | State:
        """Mirror k and v, then attend: whole [rows, heads, head_dim] where that is all, else a state, to be joined with
        that of the threads and with sinks.
        """
        q, k, v = projected
        self._rings.write(inputs.sequences, inputs.places, k, v)
        q = q.bfloat16()
        if self._weights.sinks is None and not self.sees_older(inputs):
            return _in_order([self._group(q, group, self._shared.attention) for group in inputs.groups], inputs)
        states = [self._group(q, group, attend) for group in inputs.groups]
        return State(
            *(_in_order([getattr(state, name) for state in states], inputs) for name in ("values", "top", "total"))
        )

    def output(self, mixed: Tensor | State, inputs: StepInputs) -> Tensor:
        half, weights = self._half, self._weights
        if isinstance(mixed, State):
            if self.sees_older(inputs):
                buffer = self._shared.buffers.rows(STATES, torch.float32, inputs.rows, half.state_floats)
                states = self._shared.link.to_device(buffer)
                mixed = join(mixed, read_states(states, half.heads, half.head_dim))
            mixed = finish(mixed, weights.sinks)
        return scaled(linear(mixed.flatten(1).bfloat16(), weights.out, weights.out_bias), half.out_scale)

    def _heads(self, qkv: Tensor, inputs: StepInputs) -> Heads:
        half, weights = self._half, self._weights
        counts = [half.heads, half.kv_heads, half.kv_heads]
        q, k, v = qkv.unflatten(1, (-1, half.head_dim)).split(counts, 1)
        if not half.norm_last:
            q, k = self._normed(q, weights.q_norm), self._normed(k, weights.k_norm)
        if half.rope is not None and self._rope is not None:
            rope, table = half.rope, inputs.tables[self._rope]
            q, k = (rotate(x, table, rope) for x in (q, k))
        if half.norm_last:
            q, k = self._normed(q, weights.q_norm), self._normed(k, weights.k_norm)
        return q, k, v

    def _normed(self, heads: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return heads
        if self._half.qk_norm == "whole":
            return rms_norm(heads.flatten(1), weight, self._eps).view_as(heads)
        return rms_norm(heads, weight, self._eps)

    def _group(
        self, q: Tensor, group: Group, attention: Callable[[Tensor, Tensor, Tensor, Tensor, float], Made]
    ) -> Made:
        k, v = self._rings.read(group.rings, group.keys)
        queries = q[group.rows].unflatten(0, (len(group.sequences), -1))
        return attention(queries, k, v, group.seen[self._half.window], self._half.softmax_scale)


def _in_order(parts: Sequence[Tensor], inputs: StepInputs) -> Tensor:
    """[rows, ...] of parts [runs, rows of a run, ...], one a group."""
    if len(parts) == 1:
        return parts[0].flatten(0, 1)
    flat = torch.cat([part.flatten(0, 1) for part in parts])
    whole = torch.empty_like(flat)
    whole[torch.cat([group.rows for group in inputs.groups])] = flat
    return whole
