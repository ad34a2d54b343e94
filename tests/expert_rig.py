"""Experts on numpy arrays: their matrices in any format, and a step of the ops that a MoE layer is made of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from rig import BF16, Rig, aligned, empty_rows, format_of, placed, quantise_kind, random_bf16, row_stride, rows_of

import cpu_kernels
from hybrid.formats import FORMATS
from hybrid.formats.block import BLOCK, round_up
from hybrid.formats.packed import down_offset, pack_expert


@dataclass
class Experts:
    """Random experts: gate and up [experts, intermediate, hidden], down [experts, hidden, intermediate]. With an
    activation that takes no gate they are packed without.

    Biases, if any, are [experts, intermediate] twice and [experts, hidden].
    """

    format: str
    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray
    biases: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    activation: str = "silu"
    bound: float = 0.0

    @classmethod
    def make(
        cls, format: str, count: int, hidden: int, intermediate: int, *, bias=False, activation="silu", seed=0
    ) -> Experts:
        random = np.random.default_rng(seed)
        shapes = [(count, intermediate, hidden)] * 2 + [(count, hidden, intermediate)]
        matrices = [random_bf16(random, *shape) for shape in shapes]
        biases = tuple(random.standard_normal(shape[:2]).astype(np.float32) for shape in shapes) if bias else None
        return cls(format, *matrices, biases, activation)

    @property
    def hidden(self) -> int:
        return self.down.shape[1]

    @property
    def intermediate(self) -> int:
        return self.down.shape[2]

    @property
    def wide(self) -> int:
        """Matrices before down."""
        return 1 if self.activation == "relu_squared" else 2

    @cached_property
    def packed(self) -> np.ndarray:
        if self.wide == 1:
            pack, experts = FORMATS[self.format].pack, zip(self.up, self.down, strict=True)
            return placed(np.stack([np.concatenate([pack(one).reshape(-1) for one in pair]) for pair in experts]))
        experts = zip(self.gate, self.up, self.down, strict=True)
        return placed(np.stack([pack_expert(self.format, *matrices) for matrices in experts]))

    @cached_property
    def values(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gate, up and down as their packed bytes stand for them."""
        return tuple(np.stack([self._value(w) for w in matrices]) for matrices in (self.gate, self.up, self.down))

    @property
    def packed_biases(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """[experts][blocks][gate, up][16], and [experts][blocks * 16]."""
        if self.biases is None:
            return None, None
        gate, up, down = (_to_blocks(bias) for bias in self.biases)
        return placed(np.stack([gate, up][-self.wide :], axis=2)), placed(down)

    def _value(self, weight: np.ndarray) -> np.ndarray:
        format = FORMATS[self.format]
        return format.unpack(format.pack(weight), *weight.shape)


def _to_blocks(bias: np.ndarray) -> np.ndarray:
    """[experts, n] as [experts, blocks, 16], padded with zeros."""
    missing = round_up(bias.shape[1], BLOCK) - bias.shape[1]
    return np.pad(bias, ((0, 0), (0, missing))).reshape(len(bias), -1, BLOCK)


@dataclass
class Rows:
    """The rows of a set of experts in a step: who gets them, and what the ops made of them."""

    offsets: np.ndarray
    rows: np.ndarray
    weights: np.ndarray
    active: np.ndarray
    activation: np.ndarray  # [rows * top_k, intermediate], in routing order
    operand: np.ndarray  # the same as `down` reads it


@dataclass
class Routed(Rows):
    output: np.ndarray  # [rows, hidden]
    shared: Rows | None = None


def assert_padded(rows: np.ndarray, width: int) -> None:
    """What lies behind `width` is zero, but in rows of NaN or infinity."""
    sound = np.isfinite(rows[:, :width].astype(np.float32)).all(axis=1)
    assert not rows[sound, width:].any()


class Part:
    """A set of experts in a step: its buffers, and its arguments of the ops."""

    def __init__(self, experts: Experts, x: np.ndarray, ids: np.ndarray | None, weights: np.ndarray | None) -> None:
        """ids and weights [rows, top_k]. ids None: one expert takes every row, with weight 1 or `weights` [rows]."""
        self.experts, self.ids, self.weights = experts, ids, weights
        self.top_k = 1 if ids is None else ids.shape[1]
        entries = len(x) * self.top_k
        sizes = {"offsets": len(experts.gate) + 1, "rows": entries, "active": len(experts.gate), "count": 1}
        self.integers = {name: aligned(size, np.int32, -7) for name, size in sizes.items()}
        self.gates = aligned(entries, np.float32)
        self.activation = aligned((entries, row_stride(experts.intermediate)), BF16)
        self.operand, self.input = self.activation, rows_of(experts.format, x)

    def group(self, rig: Rig, **more: float) -> None:
        """more: arguments of the op."""
        weights = self.weights if self.ids is not None else None
        sizes = {"experts": len(self.experts.gate), "top_k": self.top_k}
        rig.add("group", ids=self.ids, weights=weights, routing=self._routing(), **sizes, **more)

    def gate_up(self) -> dict[str, Any]:
        experts = self.experts
        blocks = -(-experts.intermediate // BLOCK)
        return self._set(self.input, experts.packed, experts.packed_biases[0], blocks, experts.hidden)

    def quantise(self, rig: Rig) -> None:
        if FORMATS[self.experts.format].rows == "bf16":
            return
        rows = empty_rows(self.experts.format, len(self.activation), self.experts.intermediate)
        strides = {"input_stride": self.activation.strides[0], "output_stride": rows.strides[0]}
        width = self.activation.shape[1]
        kind = quantise_kind(FORMATS[self.experts.format].rows)
        rig.add("quantise", input=self.activation, output=rows, width=width, multiple=self.top_k, **strides, **kind)
        self.operand = rows

    def down(self) -> dict[str, Any]:
        experts = self.experts
        first = down_offset(experts.format, experts.hidden, experts.intermediate, experts.wide)
        start = experts.packed.reshape(-1)[first:]
        blocks = -(-experts.hidden // BLOCK)
        return self._set(self.operand, start, experts.packed_biases[1], blocks, experts.intermediate)

    def left(self) -> dict[str, np.ndarray]:
        """The fields of `Rows`."""
        assert_padded(self.activation, self.experts.intermediate)
        active = self.integers["active"][: self.integers["count"][0]]
        lists = {"offsets": self.integers["offsets"], "rows": self.integers["rows"], "active": active}
        activation = self.activation[:, : self.experts.intermediate]
        return lists | {"weights": self.gates, "activation": activation, "operand": self.operand}

    def _set(self, rows: np.ndarray, matrices: np.ndarray, bias, blocks: int, inputs: int) -> dict[str, Any]:
        return {
            "format": format_of(self.experts.format),
            "input": rows,
            "input_stride": rows.strides[0],
            "routing": self._routing(),
            "experts": matrices,
            "bias": bias,
            "expert_stride": self.experts.packed[0].nbytes,
            "blocks": blocks,
            "inputs": row_stride(inputs),
        }

    def _routing(self) -> cpu_kernels.Routing:
        addresses = {name: array.ctypes.data for name, array in self.integers.items()}
        return cpu_kernels.Routing(weights=self.gates.ctypes.data, **addresses)


def run(isa, experts: Experts, x, ids, weights, onto, *, shared=None, gate=None, threads=1, invariant=False) -> Routed:
    """ids and weights [rows, top_k], or None: one expert takes every row.

    shared: an expert that takes every row too, with weight 1 or `gate` [rows]. invariant: by kernels whose bits do not
    depend on the number of rows.
    """
    hidden = experts.hidden
    output = aligned((len(x), row_stride(hidden)), np.float32)
    output[:, :hidden] = onto
    rig, parts = Rig(isa, threads, rows=len(x), batch_invariant=invariant), [Part(experts, x, ids, weights)]
    if shared is not None:
        parts.append(Part(shared, x, None, gate))
    for part in parts:
        part.group(rig)
    if gate is not None:
        _add_gate(rig, gate, parts[1].gates)
    _add_gate_up(rig, parts)
    for part in parts:
        part.quantise(rig)
    rig.add("down", **_sets(rig, [part.down() for part in parts]), output=output, output_stride=output.shape[1])
    rig.run(len(x))
    assert_padded(output, hidden)
    left = [part.left() for part in parts]
    return Routed(**left[0], output=output[:, :hidden], shared=Rows(**left[1]) if shared is not None else None)


def _add_gate(rig: Rig, gate: np.ndarray, weights: np.ndarray) -> None:
    """Weights of the shared expert whose sigmoids are `gate`: a router of one expert and the gate behind it."""
    logits = np.stack([np.zeros(len(gate)), np.log(gate / (1 - gate))], axis=1).astype(np.float32)
    ids, ones = aligned((len(gate), 1), np.int32), aligned((len(gate), 1), np.float32)
    rig.add(
        "topk",
        logits=placed(logits),
        ids=ids,
        weights=ones,
        shared_weights=weights,
        experts=1,
        top_k=1,
        renormalise=False,
        scoring=cpu_kernels.Scoring.softmax,
        scale=1.0,
    )


def _add_gate_up(rig: Rig, parts: list[Part]) -> None:
    arguments = _sets(rig, [part.gate_up() for part in parts])
    for prefix, part in zip(("", "shared_"), parts, strict=False):
        arguments |= {f"{prefix}output": part.activation, f"{prefix}output_stride": part.activation.shape[1]}
        arguments[f"{prefix}bound"] = part.experts.bound
    activation = getattr(cpu_kernels.Activation, parts[0].experts.activation)
    rig.add("gate_up", **arguments, activation=activation)


def _sets(rig: Rig, sets: list[dict[str, Any]]) -> dict[str, Any]:
    """The arguments of one set, or of two."""
    if len(sets) == 1:
        return sets[0]
    return sets[0] | {"shared": cpu_kernels.ExpertSet(**rig.addresses(sets[1]))}
