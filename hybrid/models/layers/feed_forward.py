"""Gated feed-forward: dense, or experts behind a router, beside them one that all rows share.

A dense one counts as a single expert that takes every row: experts and it are computed by the same ops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from hybrid.formats.block import BLOCK, round_up
from hybrid.formats.mix import FormatMix
from hybrid.formats.packed import down_offset, expert_bytes, matrix_formats
from hybrid.formats.rows import row_stride
from hybrid.models.layers.base import Cost, DeviceNeeds, Extents, Load, Place
from hybrid.models.layers.products import (
    BF16,
    FP32,
    MADE,
    NORMED,
    NORMED_F32,
    RESIDUAL,
    add_normed,
    expert_cost,
    made_buffers,
    norm,
    norm_shapes,
    norm_tensors,
    product_rows,
    quantise,
    rows_buffers,
    rows_name,
)
from hybrid.models.layers.router import FeedForwardNames, Router
from hybrid.models.rope import RopeSpec
from hybrid.models.tensors import (
    ExpertForm,
    Gated,
    GatedBiases,
    Shapes,
    Shard,
    Stacked,
    StoreTensor,
    bias_name,
    dense_shapes,
    fused_shapes,
    gated_shapes,
    in_layer,
    inside,
)
from hybrid.ops import Buffer, Choice, ExpertSet, Op, RoutingTable, Weight

Activation = Literal["silu", "swiglu_clamped", "gelu_tanh"]
ROUTED, DENSE, SHARED = "routing", "dense", "shared"  # tables that say which rows an expert gets
IDS, WEIGHTS = "expert_ids", "expert_weights"  # what a router chose, for each (row, rank)
ACTIVATION = "activation"  # what experts make of their rows between their two products
EXPERT_SUM = "device.sum"  # what the threads make of the experts of a layer: float32 [rows, row_stride(hidden)]
TAKE = "take"  # the kind of the callback that replaces what a router chose


@dataclass(frozen=True)
class _Experts:
    """Experts of one format and size: the routed ones, the only one of a dense layer, or the shared one."""

    name: str  # of their tensor
    format: str  # of their matrices; that of gate and up, and of down, where these differ
    intermediate: int
    routing: str
    rows: int  # that they get for each row of the step
    activation: str  # buffer of what down reads
    bias: bool

    @property
    def gate_up_format(self) -> str:
        return matrix_formats(self.format)[0]

    @property
    def down_format(self) -> str:
        return matrix_formats(self.format)[1]


@dataclass(frozen=True)
class FeedForward:
    """Dense when experts == 0: `intermediate` is the layer's own, without a router. shared_intermediate 0: no shared
    expert. shared_gate: whether a gate weighs it for every row.
    """

    intermediate: int
    experts: int = 0
    router: Router | None = None
    activation: Activation = "silu"
    bias: bool = False
    shared_intermediate: int = 0
    shared_gate: bool = False
    names: FeedForwardNames = field(default_factory=FeedForwardNames)

    @property
    def is_moe(self) -> bool:
        return self.experts > 0

    @property
    def scores(self) -> int:
        """Router scores of a row: one per expert, followed by the gate of a shared expert."""
        return self.experts + self.shared_gate

    @property
    def rope(self) -> RopeSpec | None:
        return None

    def fused(self) -> FeedForward:
        """A copy with the names of the router in checkpoints with fused experts."""
        names = self.names
        return replace(self, names=replace(names, router=names.fused_router, correction=names.fused_correction))

    # Weights.

    def inside(self, module: str) -> Self:
        return replace(self, names=inside(self.names, module))

    def checkpoint_shapes(self, place: Place, form: ExpertForm) -> Shapes:
        names, hidden = in_layer(self.names, place.layer), place.hidden
        yield from norm_shapes(place, names.norm)
        if not self.is_moe:
            yield from dense_shapes(names.dense, hidden, self.intermediate, self.bias)
            if names.post_norm:
                yield from norm_shapes(place, names.post_norm)
            return
        router = names.router if form == "apart" else names.fused_router
        yield router, (self.experts, hidden)
        if self.router and self.router.bias:
            yield bias_name(router), (self.experts,)
        if self.router and self.router.correction:
            correction = names.correction if form == "apart" else names.fused_correction
            yield correction, ((1, self.experts) if names.correction_row else (self.experts,))
        if form == "apart":
            for expert in range(self.experts):
                yield from gated_shapes(names.experts.of_expert(expert), hidden, self.intermediate, self.bias)
        else:
            yield from fused_shapes(self.origin(place), self.experts, form, self.bias)
        if self.shared_intermediate:
            yield from gated_shapes(names.shared.of_expert(0), hidden, self.shared_intermediate, False)
        if self.shared_gate:
            yield names.shared_gate, (1, hidden)

    def origin(self, place: Place) -> Gated:
        """Where a checkpoint has the experts that rows choose among, or the dense matrices."""
        names = self.names.experts if self.is_moe else self.names.dense
        return Gated(in_layer(names, place.layer), place.hidden, self.intermediate)

    def store_tensors(self, place: Place, shard: Shard) -> Iterator[StoreTensor]:
        names, hidden, count = in_layer(self.names, place.layer), place.hidden, max(1, self.experts)
        part, origin = "experts" if self.is_moe else "dense", self.origin(place)
        yield from norm_tensors(place, shard, "ffn.norm", names.norm)
        if names.post_norm:
            yield from norm_tensors(place, shard, "ffn.post_norm", names.post_norm)
        if self.is_moe:
            router = (names.router, names.shared_gate) if self.shared_gate else (names.router,)
            yield shard.floats("ffn.router", "router", Stacked(router), self.scores, hidden)
        if self.router and self.router.bias:
            yield shard.floats("ffn.router_bias", "router", Stacked((names.router,), biases=True), self.scores)
        if self.router and self.router.correction:
            yield shard.floats("ffn.router_correction", "router", Stacked((names.correction,)), self.experts)
        yield shard.experts("ffn.experts", part, origin, self._format(place.mix), count)
        if self.bias:
            up, down = (GatedBiases(origin.names, down=down) for down in (False, True))
            blocks = round_up(self.intermediate, BLOCK) // BLOCK
            yield shard.floats("ffn.gate_up_bias", part, up, count, blocks, 2, BLOCK)
            yield shard.floats("ffn.down_bias", part, down, count, round_up(hidden, BLOCK))
        if self.shared_intermediate:
            shared = Gated(names.shared, hidden, self.shared_intermediate)
            yield shard.experts("ffn.shared", "shared", shared, place.mix.shared)

    def formats(self, mix: FormatMix) -> tuple[str, ...]:
        return tuple(name for experts in self._groups(mix) for name in matrix_formats(experts.format))

    def _format(self, mix: FormatMix) -> str:
        return mix.experts if self.is_moe else mix.dense

    def _groups(self, mix: FormatMix) -> list[_Experts]:
        """The routed experts, then the shared expert if there is one."""
        table = (ROUTED, self.router.top_k) if self.router else (DENSE, 1)
        routed = _Experts("experts", self._format(mix), self.intermediate, *table, ACTIVATION, self.bias)
        if not self.shared_intermediate:
            return [routed]
        table = (SHARED if self.shared_gate else DENSE, 1)
        return [routed, _Experts("shared", mix.shared, self.shared_intermediate, *table, f"shared_{ACTIVATION}", False)]

    # A step.

    def first_ops(self, place: Place) -> Iterator[Op]:
        """Tables that send every row to one expert: with weight 1, or with one that a gate gives it in each layer."""
        for name in self._whole_tables(place.mix):
            yield _group("other", name, 1, 1, routed=False)

    def _whole_tables(self, mix: FormatMix) -> list[str]:
        return [experts.routing for experts in self._groups(mix) if experts.routing != ROUTED]

    def constants(self, place: Place) -> dict[str, npt.NDArray[np.float32]]:
        return {}

    def ops(self, place: Place) -> Iterator[Op]:
        groups, part = self._groups(place.mix), "experts" if self.is_moe else "moe"
        formats = (experts.gate_up_format for experts in groups)
        prefix, post = f"layers.{place.layer}.ffn", bool(self.names.post_norm)
        yield norm(place, "moe", f"{prefix}.norm", *formats, f32=self.is_moe, clears=post)
        if self.router:
            yield from self._route(place, self.router)
        yield self._gate_up(place, part, groups)
        for experts in groups:
            yield from quantise(part, experts.activation, experts.intermediate, experts.down_format, experts.rows)
        yield self._down(place, part, groups)
        if post:
            yield add_normed(place, "moe", f"{prefix}.post_norm")

    def _route(self, place: Place, router: Router) -> Iterator[Op]:
        weight = f"layers.{place.layer}.ffn.router"
        score = {
            "input": Buffer(NORMED_F32),
            "weight": Weight(weight),
            "bias": Weight(f"{weight}_bias") if router.bias else None,
            "logits": Buffer("router_logits"),
            "experts": self.scores,
            "hidden": place.hidden,
            "input_stride": row_stride(place.hidden),
        }
        yield Op("router", "moe", score, (self.scores, "experts a block of rows"))
        choose = {
            "logits": Buffer("router_logits"),
            "ids": Buffer(IDS),
            "weights": Buffer(WEIGHTS),
            "shared_weights": Buffer(f"{SHARED}.weights") if self.shared_gate else None,
            "experts": self.experts,
            "top_k": router.top_k,
            "renormalise": router.renormalise,
            "scoring": Choice("Scoring", router.kind),
            "scale": router.scale,
            "correction": Weight(f"{weight}_correction") if router.correction else None,
            "groups": router.groups if router.groups > 1 else 0,
            "top_groups": router.top_groups,
        }
        if router.kind == "sparsemixer":
            choose["jitter"] = router.jitter
        yield Op("topk", "moe", choose, (0, "rows"))
        yield _group("moe", ROUTED, self.experts, router.top_k)

    def _gate_up(self, place: Place, part: str, groups: list[_Experts]) -> Op:
        sets = [_expert_set(place, experts, "gate_up") for experts in groups]
        arguments = sets[0] | _activations(groups[0])
        arguments["activation"] = Choice("Activation", self.activation)
        if len(groups) > 1:
            arguments["shared"] = ExpertSet(sets[1])
            arguments |= {f"shared_{name}": value for name, value in _activations(groups[1]).items()}
        return Op("gate_up", part, arguments, (sets[0]["blocks"], "column blocks an active expert"))

    def _down(self, place: Place, part: str, groups: list[_Experts]) -> Op:
        sets = [_expert_set(place, experts, "down") for experts in groups]
        output = Buffer(MADE if self.names.post_norm else RESIDUAL)
        arguments = sets[0] | {"output": output, "output_stride": row_stride(place.hidden)}
        if len(groups) > 1:
            arguments["shared"] = ExpertSet(sets[1])
        return Op("down", part, arguments, (sets[0]["blocks"], "column blocks"))

    def buffers(self, place: Place, extents: Extents) -> dict[str, int]:
        rows, sizes = extents.rows, dict[str, int]()
        for experts in self._groups(place.mix):
            sizes |= rows_buffers(NORMED, place.hidden, experts.gate_up_format, rows)
            taken = rows * experts.rows
            sizes |= rows_buffers(experts.activation, experts.intermediate, experts.down_format, taken)
        for name in self._whole_tables(place.mix):
            sizes |= _table_buffers(name, rows, 1)
        if self.names.post_norm:
            sizes |= made_buffers(place, rows)
        if self.router:
            chosen = rows * self.router.top_k
            sizes[NORMED_F32] = rows * row_stride(place.hidden) * FP32
            sizes["router_logits"] = rows * self.scores * FP32
            sizes[IDS] = sizes[WEIGHTS] = chosen * 4
            sizes |= _table_buffers(ROUTED, chosen, self.experts)
        return sizes

    def cost(self, place: Place, load: Load) -> Cost:
        """Which experts are active is not known beforehand: their number is the expectation for even routing."""
        hidden, router = place.hidden, self.scores * place.hidden
        top_k, active = 1, 1.0
        if self.router:
            top_k = self.router.top_k
            active = self.experts * (1 - (1 - top_k / self.experts) ** load.rows)
        total = expert_cost(self._format(place.mix), hidden, self.intermediate, active, load.rows * top_k)
        total += Cost(float(FP32 * router), 2.0 * load.rows * router)
        if self.shared_intermediate:
            total += expert_cost(place.mix.shared, hidden, self.shared_intermediate, 1, load.rows)
        return total

    # A step on a device: it computes all but the routed experts.

    def device_needs(self, place: Place) -> DeviceNeeds | None:
        """Of experts no device knows gelu, nor norms their sum."""
        if self.is_moe and (self.names.post_norm or self.activation == "gelu_tanh"):
            return None
        hidden = place.hidden
        intermediate = self.shared_intermediate if self.is_moe else self.intermediate
        norms = hidden * (1 + (place.norm == "layer") + bool(self.names.post_norm))
        rows = hidden + (self.router.bias + self.router.correction if self.router else 0)
        others = self.scores * rows if self.is_moe else (2 * intermediate + hidden) * self.bias
        return DeviceNeeds(
            weights=3 * intermediate * hidden * BF16 + (norms + others) * FP32,
            token=0,
            row_floats=4 * intermediate + 2 * self.experts,
            scores=0,
        )

    def device_buffers(self, place: Place, extents: Extents) -> dict[str, int]:
        return {EXPERT_SUM: extents.rows * row_stride(place.hidden) * FP32}

    def device_ops(self, ops: Sequence[Op]) -> Iterator[Op]:
        """Routed experts stay; what they add goes to a sum, which the device takes at the start of the next layer."""
        for op in ops:
            if op.kind not in _KINDS:
                raise ValueError(f"a device does not know what becomes of {op.kind!r} of a feed-forward")
            if self.is_moe and _stays(op):
                shared = [name for name in op.arguments if name.startswith("shared")]
                arguments = {name: value for name, value in op.arguments.items() if name not in shared}
                if arguments.get("output") == Buffer(RESIDUAL):
                    arguments["output"] = Buffer(EXPERT_SUM)
                yield replace(op, arguments=arguments)


_KINDS = ("norm", "router", "topk", "group", "gate_up", "quantise", "down", "host", "combine")


def _stays(op: Op) -> bool:
    """Whether the threads still do it. The experts of a trace are not taken here: the device has them already."""
    if op.kind == "host":
        return bool(op.arguments["call"].kind != TAKE)
    return op.kind == "combine" or is_routed(op) or is_activation(op)


def is_routed(op: Op) -> bool:
    """Whether it works on the experts that rows chose."""
    routing = op.arguments.get("routing")
    return isinstance(routing, RoutingTable) and routing.name == ROUTED


def is_activation(op: Op) -> bool:
    """Whether it quantises what experts other than the shared one made."""
    return op.kind == "quantise" and str(op.arguments["input"].name).startswith(f"{ACTIVATION}.")


def _group(part: str, routing: str, experts: int, top_k: int, routed: bool = True) -> Op:
    arguments = {
        "ids": Buffer(IDS) if routed else None,
        "weights": Buffer(WEIGHTS) if routed else None,
        "routing": RoutingTable(routing),
        "experts": experts,
        "top_k": top_k,
    }
    return Op("group", part, arguments, (1, "thread"))


def _activations(experts: _Experts) -> dict[str, Any]:
    width = experts.intermediate
    return {"output": Buffer(rows_name(experts.activation, width)), "output_stride": row_stride(width)}


def _expert_set(place: Place, experts: _Experts, matrix: str) -> dict[str, Any]:
    """What gate_up or down must know of a group of experts."""
    prefix, hidden, first = f"layers.{place.layer}.ffn", place.hidden, matrix == "gate_up"
    wide, narrow = (experts.intermediate, hidden) if first else (hidden, experts.intermediate)
    format = experts.gate_up_format if first else experts.down_format
    rows, stride = product_rows(NORMED if first else experts.activation, narrow, format)
    start = 0 if first else down_offset(experts.format, hidden, experts.intermediate)
    return {
        "format": Choice("Format", format),
        "input": rows,
        "input_stride": stride,
        "routing": RoutingTable(experts.routing),
        "experts": Weight(f"{prefix}.{experts.name}", start),
        "bias": Weight(f"{prefix}.{matrix}_bias") if experts.bias else None,
        "expert_stride": expert_bytes(experts.format, hidden, experts.intermediate),
        "blocks": -(-wide // BLOCK),
        "inputs": row_stride(narrow),
    }


def _table_buffers(name: str, entries: int, experts: int) -> dict[str, int]:
    return {
        f"{name}.offsets": (experts + 1) * 4,
        f"{name}.rows": entries * 4,
        f"{name}.weights": entries * 4,
        f"{name}.active": experts * 4,
        f"{name}.count": 4,
    }
