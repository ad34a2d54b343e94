"""Grouped-query attention on a device, over the tokens that it mirrors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from hybrid.gpu.attention import State
from hybrid.gpu.home import Home
from hybrid.gpu.inputs import StepInputs
from hybrid.gpu.layers.base import Shared
from hybrid.gpu.layers.mirrored import MirroredMixer, StateShape
from hybrid.gpu.loader import Loader
from hybrid.gpu.mirror import KvRings
from hybrid.gpu.parts import NormWeights, grown, rms_norm, rotate, scaled, some_norm
from hybrid.gpu.products import linear
from hybrid.models.layers.base import Place
from hybrid.models.layers.grouped_query import GroupedQueryAttention
from hybrid.models.layers.older_tokens import NEW_KV


@dataclass(frozen=True)
class Heads:
    """float32 [rows, heads, head_dim]: queries, keys and values, normed and turned; gates of the result, if it has
    them, or one for all values of a head.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Tensor | None


@dataclass(frozen=True)
class Attended:
    """What was made over mirrored tokens: all, [rows, heads, head_dim], or a state. gates: of `Heads`."""

    made: Tensor | State
    gates: Tensor | None


@dataclass(frozen=True)
class Weights:
    """q_norm, k_norm, biases and sinks are float32, matrices bf16 [outputs, inputs]. norm: of what is read, post_norm:
    of the result, if these are normed.
    """

    norm: NormWeights | None
    post_norm: NormWeights | None
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
        norm=load.norm(f"{at}.norm") if half.names.norm else None,
        post_norm=load.norm(f"{at}.post_norm") if half.names.post_norm else None,
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


class MirroredAttention(MirroredMixer):
    """A `DeviceMixer`."""

    def __init__(self, half: GroupedQueryAttention, place: Place, weights: Weights, shared: Shared) -> None:
        self._half, self._eps, self._weights = half, place.eps, weights
        self._rope = place.ropes.index(half.rope) if half.rope else None
        sizes = (shared.sequences, half.kv_heads, shared.capacity, half.head_dim)
        self._rings = KvRings(*sizes, device=weights.qkv.device)
        states = StateShape(half.heads, half.head_dim, half.state_floats)
        super().__init__(shared, self._rings, states, half.window, half.softmax_scale, weights.sinks)

    def project(self, residual: Tensor, inputs: StepInputs) -> Heads:
        """Queries, keys and values. Keys and values are also sent to the threads, which store them."""
        weights, buffers, link = self._weights, self._shared.buffers, self._shared.link
        rows = some_norm(residual, weights.norm, self._eps).bfloat16()
        heads = self._heads(linear(rows, weights.qkv, weights.qkv_bias), inputs)
        new = torch.cat([heads.k, heads.v], 1).flatten(1)
        link.to_host(buffers.rows(NEW_KV, torch.float32, *new.shape), new)
        if self.sees_older(inputs):
            queries = pad(heads.q, (0, self._half.key_dim - self._half.head_dim)).bfloat16().flatten(1)
            link.to_host(buffers.rows("q", torch.bfloat16, *queries.shape), queries)
        return heads

    def mix(self, projected: Heads, inputs: StepInputs) -> Attended:
        """Mirror k and v, then attend: whole where that is all, else a state, to be joined with that of the threads and
        with sinks.
        """
        self._rings.write(inputs.sequences, inputs.places, projected.k, projected.v)
        whole = self._weights.sinks is None and not self.sees_older(inputs)
        attend = self._attend_whole if whole else self._attend
        return Attended(attend(projected.q.bfloat16(), inputs), projected.gates)

    def _mirror_home(self, home: Home, sequence: int, start: int, end: int, places: Tensor) -> None:
        dim, sequences = self._half.head_dim, torch.full_like(places, sequence)
        keys, values = home.keys(sequence, start, end), home.values(sequence, start, end)
        self._rings.write(sequences, places, keys[..., :dim], values[..., :dim])

    def output(self, mixed: Attended, inputs: StepInputs) -> Tensor:
        half, weights, rows = self._half, self._weights, self._finished(mixed.made, inputs)
        if mixed.gates is not None:
            rows = rows * self._multipliers(mixed.gates)
        made = scaled(linear(rows.flatten(1).bfloat16(), weights.out, weights.out_bias), half.out_scale)
        return some_norm(made, weights.post_norm, self._eps)

    def _multipliers(self, gates: Tensor) -> Tensor:
        softplus = self._half.gate is not None and self._half.gate.function == "softplus"
        return torch.nn.functional.softplus(gates) if softplus else torch.sigmoid(gates)

    def _heads(self, qkv: Tensor, inputs: StepInputs) -> Heads:
        half, weights, gates = self._half, self._weights, None
        q, k, v, apart = qkv.split([half.query_width, half.kv_width, half.kv_width, half.gate_width], 1)
        q, k, v = (
            x.unflatten(1, (heads, -1)) for x, heads in ((q, half.heads), (k, half.kv_heads), (v, half.kv_heads))
        )
        if half.gate is not None:
            q, gates = (q, apart.unflatten(1, (half.heads, -1))) if half.gate.apart else q.chunk(2, 2)
        if not half.norm_last:
            q, k = self._normed(q, weights.q_norm), self._normed(k, weights.k_norm)
        if half.rope is not None and self._rope is not None:
            rope, table = half.rope, inputs.tables[self._rope]
            q, k = (rotate(x, table, rope) for x in (q, k))
        if half.norm_last:
            q, k = self._normed(q, weights.q_norm), self._normed(k, weights.k_norm)
        if self._rope is not None:
            q = grown(q, inputs.growths[self._rope])
        return Heads(q, k, v, gates)

    def _normed(self, heads: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return heads
        if self._half.qk_norm == "whole":
            return rms_norm(heads.flatten(1), weight, self._eps).view_as(heads)
        return rms_norm(heads, weight, self._eps)
