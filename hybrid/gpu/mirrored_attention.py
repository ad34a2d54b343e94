"""Attention of a layer over what the device mirrors: from projected rows to what each row attended to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from hybrid.gpu.attention import State, attend
from hybrid.gpu.attention_choice import Whole
from hybrid.gpu.inputs import Group, StepInputs
from hybrid.gpu.mirror import KvMirror
from hybrid.gpu.parts import rms_norm, rotate, softmax_scale
from hybrid.gpu.weights import AttentionWeights
from hybrid.models.spec import LayerSpec, ModelSpec
from hybrid.plan.program import ropes

Made = TypeVar("Made")


class MirroredAttention:
    def __init__(self, spec: ModelSpec, weights: Sequence[AttentionWeights], mirror: KvMirror, whole: Whole) -> None:
        """whole: attends where nothing is to be joined."""
        known = ropes(spec)
        self._rope_of = [known.index(layer.attention.rope) if layer.attention.rope else None for layer in spec.layers]
        self._spec, self._weights, self._mirror, self._whole = spec, weights, mirror, whole

    def heads(self, layer: int, qkv: Tensor, inputs: StepInputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values float32 [rows, heads, head_dim], normed and turned."""
        attention, weights = self._spec.layers[layer].attention, self._weights[layer]
        counts = [attention.heads, attention.kv_heads, attention.kv_heads]
        q, k, v = qkv.unflatten(1, (-1, attention.head_dim)).split(counts, 1)
        if weights.q_norm is not None and weights.k_norm is not None:
            q, k = (rms_norm(x, w, self._spec.norm.eps) for x, w in ((q, weights.q_norm), (k, weights.k_norm)))
        index = self._rope_of[layer]
        if attention.rope is not None and index is not None:
            q, k = (rotate(x, inputs.tables[index], attention.rope) for x in (q, k))
        return q, k, v

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, inputs: StepInputs) -> Tensor | State:
        """Mirror k and v, then attend: whole [rows, heads, head_dim] where that is all, else a state, to be joined with
        that of the threads and with sinks.
        """
        self._mirror.write(layer, inputs.sequences, inputs.places, k, v)
        spec, q = self._spec.layers[layer], q.bfloat16()
        if self._weights[layer].sinks is None and not inputs.older[spec.attention.window]:
            return _in_order([self._group(layer, spec, q, group, self._whole) for group in inputs.groups], inputs)
        states = [self._group(layer, spec, q, group, attend) for group in inputs.groups]
        return State(
            *(_in_order([getattr(state, name) for state in states], inputs) for name in ("values", "top", "total"))
        )

    def _group(
        self,
        layer: int,
        spec: LayerSpec,
        q: Tensor,
        group: Group,
        attention: Callable[[Tensor, Tensor, Tensor, Tensor, float], Made],
    ) -> Made:
        k, v = self._mirror.read(layer, group.rings, group.keys)
        queries = q[group.rows].unflatten(0, (len(group.sequences), -1))
        return attention(queries, k, v, group.seen[spec.attention.window], softmax_scale(spec.attention))


def _in_order(parts: Sequence[Tensor], inputs: StepInputs) -> Tensor:
    """[rows, ...] of parts [runs, rows of a run, ...], one a group."""
    if len(parts) == 1:
        return parts[0].flatten(0, 1)
    flat = torch.cat([part.flatten(0, 1) for part in parts])
    whole = torch.empty_like(flat)
    whole[torch.cat([group.rows for group in inputs.groups])] = flat
    return whole
