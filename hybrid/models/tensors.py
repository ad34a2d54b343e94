"""What a model stores: packed tensors, and the tensors of a checkpoint that each is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Literal, TypeVar

import numpy as np

from hybrid.formats.block import BLOCK, GROUP, round_up
from hybrid.formats.packed import Run, expert_runs, matrix_runs, run_bytes

Shapes = Iterator[tuple[str, tuple[int, ...]]]  # names and shapes of checkpoint tensors
# Experts as tensors of their own; stacked in 3-D tensors; stacked in mxfp4 blocks.
ExpertForm = Literal["apart", "fused", "mxfp4"]
Names = TypeVar("Names")
# What a tensor counts as: in the plan's table of memory, and which format of a mix its matrix has.
PARTS = ("experts", "shared", "dense", "attention", "indexer", "streams", "router", "norms", "embedding", "head")


@dataclass(frozen=True)
class GatedNames:
    """Names of the gate, up and down matrices of experts, `{expert}` to be filled in, or of a dense feed-forward.

    Fused experts, as transformers 5 holds them, are [experts, 2 * intermediate, hidden] (gate rows, then up rows, or
    with fused_alternate gate row 0, up row 0, gate row 1, ...) and [experts, hidden, intermediate]; with
    fused_transposed the last two dimensions of both are the other way round. Fused experts in mxfp4 have `_blocks` and
    `_scales` added to their names, are never transposed, and biases of fused experts have `_bias`. stacked: whether
    gates, ups and downs of all experts may be a tensor each, named as that of one without `.{expert}`. A reader takes
    whichever form the checkpoint has. Empty: the family has no such tensor; without a gate, gate is.
    """

    gate: str
    up: str
    down: str
    fused_gate_up: str = ""
    fused_down: str = ""
    fused_alternate: bool = False
    fused_transposed: bool = False
    stacked: bool = False

    def of_expert(self, expert: int) -> tuple[str, str, str]:
        gate, up, down = (name.replace("{expert}", str(expert)) for name in (self.gate, self.up, self.down))
        return gate, up, down


def gated_names(prefix: str) -> GatedNames:
    """The usual names of the three matrices below a module."""
    return GatedNames(f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight", f"{prefix}.down_proj.weight")


@dataclass(frozen=True)
class PerHead:
    """A matrix of each head: of its `of_head` rows of a tensor those from `start` on, `rows` of them, or with `turned`
    these as columns. whole: a tensor that has these matrices as they are, in some checkpoints.
    """

    name: str
    heads: int
    of_head: int
    start: int
    rows: int
    turned: bool = False
    whole: str = ""


@dataclass(frozen=True)
class Stacked:
    """The rows of these tensors, or of their heads, one under the other. biases: of the biases beside them. Of plain
    floats alone, plus: what is added to each value; times: what it is multiplied by then; below: of whole numbers from
    0, the first that must not be there.
    """

    parts: tuple[str | PerHead, ...]
    biases: bool = False
    plus: float = 0.0
    times: float = 1.0
    below: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tensors, each once."""
        return tuple(dict.fromkeys(part.name if isinstance(part, PerHead) else part for part in self.parts))


@dataclass(frozen=True)
class Gated:
    """Gate, up and down of every expert. wide: how many matrices are before down, 1 without a gate."""

    names: GatedNames
    hidden: int
    intermediate: int
    wide: int = 2


@dataclass(frozen=True)
class GatedBiases:
    """The biases of either matrix of every expert: of gate and up in turn, or of down."""

    names: GatedNames
    down: bool


Origin = Stacked | PerHead | Gated | GatedBiases


@dataclass(frozen=True)
class StoreTensor:
    """One tensor of a store. `shape` is that of the stored (packed, padded) array.

    part: one of PARTS. origin: what of a checkpoint it is made of. format: that of a packed matrix, whose bytes are U8,
    or None for plain values: F32, or U8 that are rows of bf16. runs: the blocks of a packed tensor, or of each expert.
    positions: where a part has several formats, which of them those sources have that the tensor is made of: one for
    all, or one each.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Literal["U8", "F32"]
    shard: str
    part: str
    origin: Origin
    format: str | None = None
    runs: tuple[Run, ...] = ()
    positions: tuple[int, ...] = (0,)

    @property
    def nbytes(self) -> int:
        size = {"U8": 1, "F32": 4}[self.dtype]
        return int(np.prod(self.shape, dtype=np.int64)) * size


@dataclass(frozen=True)
class Shard:
    """Makes the store tensors of one shard, in the order in which a step reads them."""

    name: str
    prefix: str = ""

    def below(self, module: str) -> Shard:
        """The same for tensors whose names begin with that of a module."""
        return replace(self, prefix=f"{self.prefix}{module}.")

    def floats(self, name: str, part: str, origin: Stacked | GatedBiases, *shape: int) -> StoreTensor:
        return StoreTensor(self.prefix + name, shape, "F32", self.name, part, origin)

    def bias(self, name: str, part: str, names: tuple[str, ...], width: int) -> StoreTensor:
        """The biases beside `names`, padded to whole blocks of their matrix."""
        return self.floats(name, part, Stacked(names, biases=True), round_up(width, BLOCK))

    def matrix(
        self, name: str, part: str, origin: Stacked, format: str, n: int, k: int, positions: tuple[int, ...] = (0,)
    ) -> StoreTensor:
        runs = matrix_runs(n, k)
        shape = (run_bytes(format, runs),)
        return StoreTensor(self.prefix + name, shape, "U8", self.name, part, origin, format, runs, positions)

    def table(self, name: str, part: str, origin: Stacked, n: int, k: int) -> StoreTensor:
        """Rows of k bf16 one behind the other, to be looked up one by one."""
        return StoreTensor(self.prefix + name, (n, 2 * k), "U8", self.name, part, origin)

    def per_head(
        self, name: str, part: str, origin: PerHead, format: str, n: int, k: int, position: int
    ) -> StoreTensor:
        """A matrix [n, k] of each head, one behind the other. position: among the formats of such matrices."""
        (run,) = matrix_runs(n, k)
        runs = (Run(run.inputs, origin.heads * run.count),)
        shape = (run_bytes(format, runs),)
        return StoreTensor(self.prefix + name, shape, "U8", self.name, part, origin, format, runs, (position,))

    def experts(self, name: str, part: str, origin: Gated, format: str, *count: int) -> StoreTensor:
        runs = expert_runs(origin.hidden, origin.intermediate, origin.wide)
        shape = (*count, run_bytes(format, runs))
        return StoreTensor(self.prefix + name, shape, "U8", self.name, part, origin, format, runs)


def bias_name(weight: str) -> str:
    """The name of the bias beside a weight; fused experts have no `.weight` to replace."""
    return weight.removesuffix(".weight") + (".bias" if weight.endswith(".weight") else "_bias")


def in_layer(names: Names, layer: int) -> Names:
    """A dataclass of names with `{layer}` filled in, in those of its fields that are dataclasses of names too."""
    return _renamed(names, lambda name: name.replace("{layer}", str(layer)))


def inside(names: Names, module: str) -> Names:
    """The same names as they are where the layers are a module of the model: `model.x` is `model.module.x`."""
    return _renamed(names, lambda name: name.replace("model.", f"model.{module}.", 1))


def _renamed(names: Names, change: Callable[[str], str]) -> Names:
    found = {field.name: getattr(names, field.name) for field in fields(names)}  # type: ignore[arg-type]
    changed = {name: _changed(value, change) for name, value in found.items()}
    return replace(names, **changed)  # type: ignore[type-var]


def _changed(value: object, change: Callable[[str], str]) -> object:
    if isinstance(value, str):
        return change(value)
    return _renamed(value, change) if isinstance(value, GatedNames) else value


def gated_shapes(names: tuple[str, str, str], hidden: int, intermediate: int, bias: bool) -> Shapes:
    """Gate, if it has one, up and down of one expert."""
    wide, narrow = (intermediate, hidden), (hidden, intermediate)
    for name, shape in zip(names, (wide, wide, narrow), strict=True):
        if name:
            yield name, shape
        if name and bias:
            yield bias_name(name), shape[:1]


def dense_shapes(names: GatedNames, hidden: int, intermediate: int, bias: bool) -> Shapes:
    """Those of a dense feed-forward: two or three matrices, or gate and up in one where the family names that."""
    if names.gate or not names.fused_gate_up:
        yield from gated_shapes(names.of_expert(0), hidden, intermediate, bias)
    else:
        yield names.fused_gate_up, (2 * intermediate, hidden)
        yield names.fused_down, (hidden, intermediate)


def fused_shapes(origin: Gated, experts: int, form: ExpertForm, bias: bool) -> Shapes:
    """All experts of a layer, stacked: gate and up together, or up alone."""
    names, hidden, intermediate = origin.names, origin.hidden, origin.intermediate
    for name, rows, columns in (
        (names.fused_gate_up, origin.wide * intermediate, hidden),
        (names.fused_down, hidden, intermediate),
    ):
        if form == "fused":
            yield name, (experts, *((columns, rows) if names.fused_transposed else (rows, columns)))
        else:
            groups = -(-columns // GROUP)
            yield f"{name}_blocks", (experts, rows, groups, 16)
            yield f"{name}_scales", (experts, rows, groups)
        if bias:
            yield bias_name(name), (experts, rows)
