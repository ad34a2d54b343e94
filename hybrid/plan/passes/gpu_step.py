"""A step whose residual stream is on a device: the threads keep experts, all keys and values, and older tokens.

The op list of a step without such a device is turned into one in which `hybrid.gpu.step` is called back: to start,
twice a layer, and to finish. It does what is left out here: embedding, norms, projections, rope, attention over the
tokens that it mirrors, dense and shared experts, the router and the head. In each layer:

    attend       callback: residual, norm, projections, rope; attention over mirrored tokens begins
    attention    of older tokens, if any: states, which the device joins with its own
    route        callback: joined attention, output projection, norm, router; rows, ids and weights come to the host
    qkv          writes the keys and values of the step's rows to their home
    experts      as in the step that this one is made of, summed in a buffer that `attend` of the next layer takes

The halves of a layer say which of its ops the threads keep (`device_ops`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

from hybrid.formats.mix import FormatMix
from hybrid.models.layers.base import Extents
from hybrid.models.spec import ModelSpec
from hybrid.ops import Callback, Op, require_known
from hybrid.plan.program import largest

CALLS = ("start", "attend", "route", "finish")  # kinds of callbacks
_OUTER = {"embed", "rope_table", "group", "norm", "gemm", "soft_cap"}  # outside the layers, where the device does all


def device_step_ops(spec: ModelSpec, ops: Iterable[Op]) -> list[Op]:
    """The ops of a step with the device. ops: of a step on the threads alone, or of one whose experts are placed.

    Raises ValueError for an unknown op.
    """
    start, finish = (
        Op("host", part, {"call": Callback(kind, 0)}, (1, "thread"))
        for kind, part in (("start", "other"), ("finish", "head"))
    )
    return [start, *_layers(spec, require_known(ops)), finish]


def device_step_buffers(spec: ModelSpec, mix: FormatMix, extents: Extents) -> dict[str, int]:
    """Bytes of the additional buffers of such a step."""
    return largest(half.device_buffers(place, extents) for place, half in spec.halves(mix))


def _layers(spec: ModelSpec, ops: list[Op]) -> Iterator[Op]:
    for (layer, half), group in groupby(ops, key=lambda op: (op.layer, op.half)):
        if layer is not None:
            yield from getattr(spec.layers[layer], half).device_ops(list(group))
        elif unknown := {op.kind for op in group} - _OUTER:
            raise ValueError(f"a device does not know what becomes of {sorted(unknown)} outside the layers")
