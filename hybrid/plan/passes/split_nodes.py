"""A step split over memory nodes: every node's threads read that node's part of the weights and nothing else of them.

Products are split by output columns, feed-forwards along their intermediate dimension; what each node makes of its part
of down is a partial sum, and a join adds the sums to the residual stream, in the order of the nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hybrid.formats import FORMATS
from hybrid.formats.block import BLOCK
from hybrid.formats.packed import matrix_formats
from hybrid.formats.rows import RowKind, row_bytes, row_stride
from hybrid.models.tensors import StoreTensor
from hybrid.ops import KINDS, Buffer, Op, Weight, require_known
from hybrid.weights.split import Parts, column_parts, down_part_offset, expert_part_bytes, intermediate_parts

PARTIAL = "partial"  # the buffer of a node's sums, laid out as the residual stream; zero between two steps
# Of gate_up and down. An op that does more, such as a second set of experts in the same pass, stays whole.
_EXPERT_ARGUMENTS = {
    *("format", "routing", "experts", "expert_stride", "bias", "blocks", "activation", "bound"),
    *("input", "inputs", "input_stride", "output", "output_stride"),
}


@dataclass(frozen=True)
class SplitStep:
    """ops: of the step. parts: which blocks of each split tensor a node holds. sizes: bytes of the shared buffers.
    node_sizes: bytes of each node's own buffers, empty with one node.
    """

    ops: list[Op]
    parts: Parts
    sizes: dict[str, int]
    node_sizes: tuple[dict[str, int], ...]


def split_over_nodes(
    ops: list[Op], tensors: Mapping[str, StoreTensor], sizes: Mapping[str, int], nodes: int
) -> SplitStep:
    """Split the ops of a step. sizes: bytes of its buffers.

    A tensor with fewer blocks than there are nodes stays whole and is shared by all threads. So does an embedding that
    is also the head: rows are looked up in it, and a second copy would waste memory. Raises ValueError for an unknown
    op.
    """
    if nodes == 1:
        return SplitStep(ops, {}, dict(sizes), ())
    splitter = _Splitter(tensors, sizes, nodes, {op.arguments["table"].name for op in ops if op.kind == "embed"})
    split = [part for op in require_known(ops) for part in splitter.split(op)]
    unused = splitter.replaced - {name for op in split for name in _common_buffers(op)}
    common = {name: size for name, size in sizes.items() if name not in unused}
    return SplitStep(split, splitter.parts, common, tuple(splitter.node_sizes))


def _common_buffers(op: Op) -> Iterable[str]:
    return (value.name for value in op.arguments.values() if isinstance(value, Buffer) and value.node < 0)


@dataclass
class _Splitter:
    """Goes through the ops in order. activation: blocks of each node in the feed-forward at hand, if it is split."""

    tensors: Mapping[str, StoreTensor]
    sizes: Mapping[str, int]
    nodes: int
    kept: set[str]
    parts: dict[str, tuple[range, ...]] = field(default_factory=dict)
    activation: dict[str, tuple[range, ...]] = field(default_factory=dict)
    replaced: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.node_sizes: list[dict[str, int]] = [{} for _ in range(self.nodes)]
        self._ways: dict[str, Callable[[Op], list[Op]]] = {
            "gemm": self._gemm,
            "gate_up": self._gate_up,
            "quantise": self._quantise,
            "down": self._down,
        }

    def split(self, op: Op) -> list[Op]:
        """The op of every node, one after the other; or the op as it is."""
        return [op] if KINDS[op.kind] == "whole" else self._ways[op.kind](op)

    def _gemm(self, op: Op) -> list[Op]:
        a = op.arguments
        weight = a["weight"].name
        parts = () if weight in self.kept else column_parts(self.tensors[weight].runs[0].count, self.nodes)
        if not parts:
            return [op]
        self.parts[weight] = parts
        return [self._columns(op, node, blocks) for node, blocks in enumerate(parts)]

    def _columns(self, op: Op, node: int, blocks: range) -> Op:
        """The head writes where the step says, so it is told the column; others are given the place."""
        a, first = op.arguments, blocks.start * BLOCK
        place = {"output": _moved(a["output"], first * 4)} if a["output"] else {"first_column": first}
        columns = min(len(blocks) * BLOCK, a["columns"] - first)
        bias = _moved(a["bias"], first * 4)
        weight = Weight(a["weight"].name, node=node)
        return _on(op, node, len(blocks), weight=weight, bias=bias, columns=columns, **place)

    def _gate_up(self, op: Op) -> list[Op]:
        a, tensor = op.arguments, self.tensors[op.arguments["experts"].name]
        parts = intermediate_parts(tensor.format or "", a["blocks"], self.nodes) if _plain(op) else ()
        self.activation = dict.fromkeys([a["output"].name], parts) if parts else {}
        if not parts:
            return [op]
        self.parts[tensor.name] = parts
        if a["bias"]:
            self.parts[a["bias"].name] = parts
        return [self._gate_up_part(op, tensor, node, blocks) for node, blocks in enumerate(parts)]

    def _gate_up_part(self, op: Op, tensor: StoreTensor, node: int, blocks: range) -> Op:
        a, width = op.arguments, len(blocks) * BLOCK
        return _on(
            op,
            node,
            len(blocks),
            experts=Weight(tensor.name, node=node),
            bias=Weight(a["bias"].name, node=node) if a["bias"] else None,
            output=self._own(a["output"], node, width, a["output_stride"] * 2, "bf16"),
            expert_stride=expert_part_bytes(tensor, blocks),
            blocks=len(blocks),
            output_stride=row_stride(width),
        )

    def _quantise(self, op: Op) -> list[Op]:
        a = op.arguments
        parts = self.activation.get(a["input"].name, ())
        if not parts:
            return [op]
        self.activation[a["output"].name] = parts
        return [self._quantise_part(op, node, len(blocks) * BLOCK) for node, blocks in enumerate(parts)]

    def _quantise_part(self, op: Op, node: int, width: int) -> Op:
        a = op.arguments
        kind: RowKind = "grouped" if a.get("grouped") else "wide" if a.get("wide") else "int8"
        return _on(
            op,
            node,
            op.split[0],
            input=self._own(a["input"], node, width, a["input_stride"], "bf16"),
            output=self._own(a["output"], node, width, a["output_stride"], kind),
            width=row_stride(width),
            input_stride=row_bytes(width, "bf16"),
            output_stride=row_bytes(width, kind),
        )

    def _down(self, op: Op) -> list[Op]:
        a = op.arguments
        parts = self.activation.get(a["input"].name, ())
        if not parts:
            return [op]
        downs = [self._down_part(op, node, blocks) for node, blocks in enumerate(parts)]
        join = {
            "partials": tuple(Buffer(PARTIAL, node=node) for node in range(self.nodes)),
            "output": a["output"],
            "width": a["blocks"] * BLOCK,
            "output_stride": a["output_stride"],
        }
        return [*downs, replace(op, kind="join", arguments=join, split=(a["blocks"], "column blocks a row"))]

    def _down_part(self, op: Op, node: int, blocks: range) -> Op:
        """The bias, which all would add, is the first node's."""
        a, width, tensor = op.arguments, len(blocks) * BLOCK, self.tensors[op.arguments["experts"].name]
        sizes = self.node_sizes[node]
        sizes[PARTIAL] = max(sizes.get(PARTIAL, 0), self.sizes[a["output"].name])
        kind = FORMATS[matrix_formats(tensor.format or "")[1]].rows
        return _on(
            op,
            node,
            op.split[0],
            input=self._own(a["input"], node, width, a["input_stride"], kind),
            experts=Weight(tensor.name, down_part_offset(tensor, blocks), node),
            bias=a["bias"] if node == 0 else None,
            output=Buffer(PARTIAL, node=node),
            expert_stride=expert_part_bytes(tensor, blocks),
            inputs=row_stride(width),
            input_stride=row_bytes(width, kind),
        )

    def _own(self, whole: Buffer, node: int, width: int, whole_bytes: int, kind: RowKind) -> Buffer:
        """A node's buffer for rows of `width` in place of a shared one with rows of `whole_bytes`."""
        self.replaced.add(whole.name)
        name = f"{whole.name}.{width}"
        self.node_sizes[node][name] = self.sizes[whole.name] // whole_bytes * row_bytes(width, kind)
        return Buffer(name, node=node)


def _plain(op: Op) -> bool:
    """Whether an op on experts does nothing but what is split here."""
    return not any(value for name, value in op.arguments.items() if name not in _EXPERT_ARGUMENTS)


def _moved(place: Any, offset: int) -> Any:
    """A reference to a buffer or weight, some bytes further; None stays None."""
    return place and replace(place, offset=place.offset + offset)


def _on(op: Op, node: int, units: int, **changes: Any) -> Op:
    """The op for one node, with other arguments and this many units for its threads to share."""
    return replace(op, arguments={**op.arguments, **changes, "node": node}, split=(units, op.split[1]))
