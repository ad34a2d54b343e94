"""Feed-forward, gated or not: dense, or experts behind a router, beside them one that all rows share.

A dense one counts as a single expert that takes every row: experts and it are computed by the same ops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from hybrid.formats.block import BLOCK, round_up
from hybrid.formats.mix import FormatMix
from hybrid.formats.packed import matrix_formats
from hybrid.formats.rows import row_stride
from hybrid.models.layers.base import Cost, DeviceNeeds, Extents, Load, Place
from hybrid.models.layers.expert_sets import (
    ACTIVATION,
    DENSE,
    IDS,
    ROUTED,
    SHARED,
    WEIGHTS,
    Experts,
    activation_rows,
    expert_set,
    group_rows,
    table_buffers,
    weighed_table,
)
from hybrid.models.layers.products import (
    BF16,
    FP32,
    MADE,
    NORMED_F32,
    RESIDUAL,
    add_normed,
    expert_cost,
    made_buffers,
    norm,
    norm_shapes,
    norm_tensors,
    quantise,
    rows_buffers,
    unnormed_buffers,
    unnormed_constants,
)
from hybrid.models.layers.router import LOGITS, FeedForwardNames, Router, route
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
from hybrid.ops import Buffer, Choice, ExpertSet, Op, RoutingTable

Activation = Literal["silu", "swiglu_clamped", "silu_clamped", "gelu_tanh", "relu_squared"]  # the last without a gate
EXPERT_SUM = "device.sum"  # what the threads make of the experts of a layer: float32 [rows, row_stride(hidden)]
TAKE = "take"  # the kind of the callback that replaces what a router chose
STORED = "ffn"  # how the names of its tensors begin, where a layer has one feed-forward


@dataclass(frozen=True)
class FeedForward:
    """Dense when experts == 0: `intermediate` is the layer's own, without a router. shared_intermediate 0: no shared
    expert. shared_gate: whether a gate weighs it for every row; shared_weight: by which it is multiplied without one.
    stored: how the names of its tensors in a store begin.
    bound, shared_bound: of experts, and of the shared one, with silu: what it makes of a gate is at most that, and up
    within it; 0: none.
    """

    intermediate: int
    experts: int = 0
    router: Router | None = None
    activation: Activation = "silu"
    bias: bool = False
    shared_intermediate: int = 0
    shared_gate: bool = False
    shared_weight: float = 1.0
    names: FeedForwardNames = field(default_factory=FeedForwardNames)
    stored: str = STORED
    bound: float = 0.0
    shared_bound: float = 0.0

    @property
    def is_moe(self) -> bool:
        return self.experts > 0

    @property
    def wide(self) -> int:
        """Matrices before down: gate and up, or up alone."""
        return 1 if self.activation == "relu_squared" else 2

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
        shared = names.fused_shared or names.shared
        return replace(
            self,
            names=replace(names, router=names.fused_router, correction=names.fused_correction, shared=shared),
        )

    # Weights.

    def inside(self, module: str) -> Self:
        return replace(self, names=inside(self.names, module))

    def checkpoint_shapes(self, place: Place, form: ExpertForm) -> Shapes:
        names, hidden = in_layer(self.names, place.layer), place.hidden
        yield from norm_shapes(place, names.norm)
        if names.post_norm:
            yield from norm_shapes(place, names.post_norm)
        if names.factor:
            yield names.factor, (1,)
        if not self.is_moe:
            yield from dense_shapes(names.dense, hidden, self.intermediate, self.bias)
            return
        if names.router_norm:
            yield names.router_norm, (hidden,)
        if self.router and self.router.expert_scales:
            yield names.expert_scales, (self.experts,)
        router = names.router if form == "apart" else names.fused_router
        yield router, (self.experts, hidden)
        if self.router and self.router.bias:
            yield bias_name(router), (self.experts,)
        if self.router and self.router.correction:
            correction = names.correction if form == "apart" else names.fused_correction
            yield correction, ((1, self.experts) if names.correction_row else (self.experts,))
        if self.router and self.router.by_token:
            yield names.by_token, (self.router.by_token, self.router.top_k)
        if form == "apart":
            for expert in range(self.experts):
                yield from gated_shapes(
                    names.experts.of_expert(expert), self.width(place), self.intermediate, self.bias
                )
        else:
            yield from fused_shapes(self.origin(place), self.experts, form, self.bias)
        if self.shared_intermediate:
            shared = names.shared if form == "apart" else names.fused_shared or names.shared
            yield from dense_shapes(shared, hidden, self.shared_intermediate, False)
        if self.shared_gate:
            yield names.shared_gate, (1, hidden)

    def width(self, place: Place) -> int:
        """Of the rows that experts read, the shared one apart, and of what they make."""
        return place.hidden

    def origin(self, place: Place) -> Gated:
        """Where a checkpoint has the experts that rows choose among, or the dense matrices."""
        names = self.names.experts if self.is_moe else self.names.dense
        return Gated(in_layer(names, place.layer), self.width(place), self.intermediate, self.wide)

    def store_tensors(self, place: Place, shard: Shard) -> Iterator[StoreTensor]:
        names, hidden, count = in_layer(self.names, place.layer), place.hidden, max(1, self.experts)
        part, origin, shard = "experts" if self.is_moe else "dense", self.origin(place), shard.below(self.stored)
        yield from norm_tensors(place, shard, "norm", names.norm)
        if names.post_norm:
            yield from norm_tensors(place, shard, "post_norm", names.post_norm)
        if names.factor:
            yield shard.floats("factor", "norms", Stacked((names.factor,)), 1)
        if self.router:
            yield from self._router_tensors(self.router, place, shard)
        yield shard.experts("experts", part, origin, self._format(place.mix), count)
        if self.bias:
            up, down = (GatedBiases(origin.names, down=down) for down in (False, True))
            blocks = round_up(self.intermediate, BLOCK) // BLOCK
            yield shard.floats("gate_up_bias", part, up, count, blocks, 2, BLOCK)
            yield shard.floats("down_bias", part, down, count, round_up(hidden, BLOCK))
        if self.shared_intermediate:
            shared = Gated(names.shared, hidden, self.shared_intermediate, self.wide)
            yield shard.experts("shared", "shared", shared, place.mix.shared)

    def _router_tensors(self, router: Router, place: Place, shard: Shard) -> Iterator[StoreTensor]:
        """A norm of the router's own is as transformers has it: divided by the root of the width."""
        names, hidden = in_layer(self.names, place.layer), place.hidden
        if names.router_norm:
            yield shard.floats("router_norm", "norms", Stacked((names.router_norm,), times=hidden**-0.5), hidden)
        scored = (names.router, names.shared_gate) if self.shared_gate else (names.router,)
        yield shard.floats("router", "router", Stacked(scored), self.scores, hidden)
        if router.bias:
            yield shard.floats("router_bias", "router", Stacked((names.router,), biases=True), self.scores)
        if router.correction:
            yield shard.floats("router_correction", "router", Stacked((names.correction,)), self.experts)
        if router.by_token:
            table = Stacked((names.by_token,), below=self.experts)
            yield shard.floats("router_by_token", "router", table, router.by_token, router.top_k)
        if router.expert_scales:
            yield shard.floats("expert_scales", "router", Stacked((names.expert_scales,)), self.experts)

    def formats(self, mix: FormatMix) -> tuple[str, ...]:
        return tuple(name for experts in self.groups(mix) for name in matrix_formats(experts.format))

    def _format(self, mix: FormatMix) -> str:
        return mix.experts if self.is_moe else mix.dense

    def groups(self, mix: FormatMix) -> list[Experts]:
        """The routed experts, then the shared expert if there is one."""
        table = (ROUTED, self.router.top_k) if self.router else (DENSE, 1)
        rows = ACTIVATION if self.stored == STORED else f"{self.stored}_{ACTIVATION}"
        routed = Experts(
            self.stored, "experts", self._format(mix), self.intermediate, *table, rows, self.bias, self.wide
        )
        if not self.shared_intermediate:
            return [routed]
        table = (SHARED if self.shared_gate else weighed_table(self.shared_weight), 1)
        rows = f"shared_{ACTIVATION}"
        return [
            routed,
            Experts(self.stored, "shared", mix.shared, self.shared_intermediate, *table, rows, False, self.wide),
        ]

    # A step.

    def first_ops(self, place: Place) -> Iterator[Op]:
        """Tables that send every row to one expert: with one weight, or with those that a gate gives in each layer."""
        weighed = weighed_table(self.shared_weight)
        for name in self._whole_tables(place.mix):
            weight = self.shared_weight if name == weighed else 1.0
            yield group_rows("other", name, 1, 1, routed=False, weight=weight)

    def _whole_tables(self, mix: FormatMix) -> list[str]:
        return [experts.routing for experts in self.groups(mix) if experts.routing != ROUTED]

    def constants(self, place: Place) -> dict[str, npt.NDArray[np.float32]]:
        return {} if self.names.norm else unnormed_constants(place)

    def ops(self, place: Place) -> Iterator[Op]:
        yield from self.own_ops(place)
        if self.names.post_norm:
            prefix = self.prefix(place)
            yield add_normed(place, "moe", f"{prefix}.post_norm", factor=f"{prefix}.factor" * bool(self.names.factor))

    def prefix(self, place: Place) -> str:
        """How the names of its tensors in the whole store begin."""
        return f"layers.{place.layer}.{self.stored}"

    def own_ops(self, place: Place) -> Iterator[Op]:
        """All up to what it makes of the rows, which is added to the residual stream, or left in MADE to be normed."""
        groups = self.groups(place.mix)
        formats = (experts.gate_up_format for experts in groups)
        prefix, apart = self.prefix(place), bool(self.names.router_norm)
        f32, clears = self.is_moe and not apart, bool(self.names.post_norm)
        yield norm(place, "moe", f"{prefix}.norm" * bool(self.names.norm), *formats, f32=f32, clears=clears)
        if apart:
            yield norm(place, "moe", f"{prefix}.router_norm", f32=True)
        if self.router:
            yield from route(self.router, self.prefix(place), place.hidden, self.experts, self.shared_gate)
        yield from self.products(place, groups, MADE if self.names.post_norm else RESIDUAL)

    def products(self, place: Place, groups: list[Experts], target: str) -> Iterator[Op]:
        """What experts make of their rows, those of one op. target: the buffer to which they add it."""
        part = "experts" if self.is_moe else "moe"
        yield self._gate_up(place, part, groups)
        for experts in groups:
            yield from quantise(part, experts.activation, experts.intermediate, experts.down_format, experts.rows)
        yield self._down(place, part, groups, target)

    def _gate_up(self, place: Place, part: str, groups: list[Experts]) -> Op:
        sets = [expert_set(place, experts, "gate_up") for experts in groups]
        arguments = sets[0] | activation_rows(groups[0])
        arguments["activation"] = Choice("Activation", self.activation)
        if len(groups) > 1:
            arguments["shared"] = ExpertSet(sets[1])
            arguments |= {f"shared_{name}": value for name, value in activation_rows(groups[1]).items()}
        bounds = {"bound": self.bound, "shared_bound": self.shared_bound}
        arguments |= {name: bound for name, bound in bounds.items() if bound}
        return Op("gate_up", part, arguments, (sets[0]["blocks"], "column blocks an active expert"))

    def _down(self, place: Place, part: str, groups: list[Experts], target: str) -> Op:
        sets = [expert_set(place, experts, "down") for experts in groups]
        arguments = sets[0] | {"output": Buffer(target), "output_stride": row_stride(groups[0].width(place))}
        if len(groups) > 1:
            arguments["shared"] = ExpertSet(sets[1])
        return Op("down", part, arguments, (sets[0]["blocks"], "column blocks"))

    def buffers(self, place: Place, extents: Extents) -> dict[str, int]:
        rows, sizes = extents.rows, dict[str, int]()
        for experts in self.groups(place.mix):
            sizes |= rows_buffers(experts.source, experts.width(place), experts.gate_up_format, rows)
            taken = rows * experts.rows
            sizes |= rows_buffers(experts.activation, experts.intermediate, experts.down_format, taken)
        for name in self._whole_tables(place.mix):
            sizes |= table_buffers(name, rows, 1)
        if self.names.post_norm:
            sizes |= made_buffers(place, rows)
        if not self.names.norm:
            sizes |= unnormed_buffers(place)
        if self.router:
            chosen = rows * self.router.top_k
            sizes[NORMED_F32] = rows * row_stride(place.hidden) * FP32
            sizes[LOGITS] = rows * self.scores * FP32
            sizes[IDS] = sizes[WEIGHTS] = chosen * 4
            sizes |= table_buffers(ROUTED, chosen, self.experts)
        return sizes

    def cost(self, place: Place, load: Load) -> Cost:
        """Which experts are active is not known beforehand: their number is the expectation for even routing."""
        hidden, router = place.hidden, self.scores * place.hidden
        top_k, active = 1, 1.0
        if self.router:
            top_k = self.router.top_k
            active = self.experts * (1 - (1 - top_k / self.experts) ** load.rows)
        width, routed = self.width(place), load.rows * top_k
        total = expert_cost(self._format(place.mix), width, self.intermediate, active, routed, self.wide)
        total += Cost(float(FP32 * router), 2.0 * load.rows * router)
        if self.shared_intermediate:
            total += expert_cost(place.mix.shared, hidden, self.shared_intermediate, 1, load.rows, self.wide)
        return total

    # A step on a device: it computes all but the routed experts.

    def device_needs(self, place: Place) -> DeviceNeeds | None:
        """No device knows gelu of experts, their bounds or a norm of their sum, a weight of a shared one, a router's
        own norm, a factor, or matrices without a gate.
        """
        own_norms = self.names.post_norm or self.names.router_norm
        bounded = self.bound or self.shared_bound or self.shared_weight != 1
        if (
            self.wide == 1
            or self.names.factor
            or bounded
            or self.is_moe
            and (own_norms or self.activation == "gelu_tanh")
        ):
            return None
        hidden = place.hidden
        intermediate = self.shared_intermediate if self.is_moe else self.intermediate
        norms = hidden * (bool(self.names.norm) + (place.norm == "layer") + bool(self.names.post_norm))
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
