"""What bench/kernels.py times: one MoE layer, one GEMM, one attention, each repeated in one step over cold memory.

Weights, keys and values are valid, but every block of a matrix holds the same random numbers: only where they lie
matters. A step repeats its op on other experts, matrices or sequences, so that a repetition finds nothing in a cache.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

import cpu_kernels
from hybrid.errors import CapacityError
from hybrid.formats import FORMATS
from hybrid.formats.block import BLOCK
from hybrid.formats.packed import down_offset, expert_bytes, packed_bytes
from hybrid.formats.rows import FP4_OFFSET, SCALE_INPUTS, SUM_INPUTS, WIDE_BASE, WIDE_TOP, row_bytes, row_stride
from hybrid.machine.hardware import memory
from hybrid.models.layers.base import Cost
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.layers.grouped_query import GroupedQueryAttention
from hybrid.models.spec import LayerSpec, ModelSpec
from hybrid.plan.kv_layout import lay_out_kv

COLD_BYTES = 512 << 20  # what a step reads at least, while reading is what takes its time: more than caches hold
COLD_ROWS = 32  # more rows than this are bound by arithmetic
STATE_EXTRA = BLOCK  # floats behind the sums of a partial softmax
KV_BYTE = 0x3C  # 0.01 in bf16, 60 in int8, 1.5 in fp8, and a scale of 0.01
SEED = 1

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Shape:
    """One layer, that of Qwen3-30B-A3B unless said otherwise, and a matrix [columns, hidden]."""

    hidden: int = 2048
    experts: int = 128
    top_k: int = 8
    intermediate: int = 768
    columns: int = 5120
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128
    depth: int = 4096

    def spec(self, layers: int = 1) -> ModelSpec:
        """A model of so many such layers, for the sizes that the planner computes."""
        attention = GroupedQueryAttention(self.heads, self.kv_heads, self.head_dim, rope=None)
        layer = LayerSpec(attention, FeedForward(self.intermediate, self.experts))
        return ModelSpec("bench", 1, self.hidden, (layer,) * layers, eps=1e-6, max_position=1 << 30)


class Memory:
    """Arrays in huge pages where the system grants them, freed together."""

    def __init__(self) -> None:
        self._arenas: list[cpu_kernels.Arena] = []

    def bytes(self, count: int) -> npt.NDArray[np.uint8]:
        """Zeroed, on a page of its own. Raises CapacityError if it does not fit."""
        if count > (free := memory()[1]):
            raise CapacityError(
                f"{count / 1e9:.1f} GB are needed at once, {free / 1e9:.1f} GB are free; lower --experts, --depth or "
                "--rows, or free memory"
            )
        self._arenas.append(arena := cpu_kernels.Arena(count, huge=True))
        return np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(arena.address))

    def put(self, values: Array) -> int:
        """The address of a copy."""
        place = self.bytes(values.nbytes)
        place[...] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        return int(place.ctypes.data)

    def space(self, count: int) -> int:
        """The address of so many zeroed bytes."""
        return int(self.bytes(count).ctypes.data)


@dataclass(frozen=True)
class Weights:
    """`copies` packed matrices, or the experts of a layer, one after the other."""

    format: str
    memory: Memory  # keeps them
    address: int
    copies: int


def gemm_weights(shape: Shape, format: str) -> Weights:
    """As many matrices as no cache holds."""
    copies = -(-COLD_BYTES // packed_bytes(format, shape.columns, shape.hidden))
    return _weights(format, [_blocks(format, shape.columns, shape.hidden)], max(2, copies))


def expert_weights(shape: Shape, format: str) -> Weights:
    gate, down = (shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)
    return _weights(format, [_blocks(format, *matrix) for matrix in (gate, gate, down)], shape.experts)


def _blocks(format: str, columns: int, inputs: int) -> Array:
    """A packed matrix, all of whose blocks are alike; gate and up are alike too, so their order does not matter."""
    values = np.random.default_rng(SEED).standard_normal((BLOCK, inputs), np.float32)
    return np.tile(FORMATS[format].pack(values).reshape(-1), -(-columns // BLOCK))


def _weights(format: str, matrices: list[Array], copies: int) -> Weights:
    one, owner = np.concatenate(matrices), Memory()
    place = owner.bytes(copies * one.size)
    place.reshape(copies, -1)[...] = one
    return Weights(format, owner, int(place.ctypes.data), copies)


def activation_rows(rows: int, width: int, format: str) -> Array:
    """What a matrix of this format multiplies: bf16 rows, or activation rows of whole numbers."""
    random, inputs = np.random.default_rng(SEED), row_stride(width)
    kind = FORMATS[format].rows
    if kind == "bf16":
        floats = np.zeros((rows, inputs), ml_dtypes.bfloat16)
        floats[:, :width] = random.standard_normal((rows, width), np.float32)
        return floats
    if kind == "wide":
        return _wide_rows(random, rows, width)
    values = np.zeros((rows, inputs), np.int8)
    values[:, :width] = random.integers(-127, 128, (rows, width), np.int8)
    result = np.zeros((rows, row_bytes(width, kind)), np.uint8)
    result[:, :inputs] = values.view(np.uint8)
    step, sums = np.float32(1 / 127), values.reshape(rows, -1, SUM_INPUTS).sum(-1, dtype=np.int32)
    if kind == "grouped":
        halves = values.reshape(rows, -1, 2, SUM_INPUTS // 2).sum(-1, dtype=np.int32)
        groups = step * np.stack([np.ones_like(sums), sums, *np.moveaxis(halves, -1, 0)], axis=-1).astype(np.float32)
        result[:, inputs : inputs + 16 * sums.shape[1]] = groups.reshape(rows, -1).view(np.uint8)
        return result
    result[:, inputs : inputs + 4 * sums.shape[1]] = sums.view(np.uint8)
    scales = result[:, inputs + 4 * sums.shape[1] :]
    scales[...] = np.tile(step.reshape(1).view(np.uint8), scales.shape[1] // 4)
    return result


def _wide_rows(random: np.random.Generator, rows: int, width: int) -> Array:
    """Values from -85 to 85 in all their upper and lower bytes."""
    inputs = row_stride(width)
    values, result = np.zeros((rows, inputs), np.int8), np.zeros((rows, row_bytes(width, "wide")), np.uint8)
    values[:, :width] = random.integers(-85, 86, (rows, width), np.int8)
    sums = -FP4_OFFSET * (WIDE_BASE + 1) * values.reshape(rows, -1, 2, SUM_INPUTS // 2).sum(-1, dtype=np.int32)
    scales = np.full((rows, -(-inputs // SCALE_INPUTS)), 1 / WIDE_TOP, np.float32)
    whole = values.astype(np.float32) * np.float32((WIDE_BASE + 1) / WIDE_TOP)
    parts = whole.astype(ml_dtypes.bfloat16), values, values, sums.cumsum(-1, dtype=np.int32).reshape(rows, -1), scales
    filled = np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in parts], axis=1)
    result[:, : filled.shape[1]] = filled
    return result


def choose_experts(shape: Shape, routing: str, calls: int, rows: int) -> npt.NDArray[np.int32]:
    """[calls, rows, top_k]. even: every expert as often as any other; random: top_k different ones for each row."""
    if routing == "even":
        ids = np.arange(calls * rows * shape.top_k) % shape.experts
    else:
        ids = np.random.default_rng(SEED).random((calls, rows, shape.experts)).argsort(-1)[..., : shape.top_k]
    return np.ascontiguousarray(ids.reshape(calls, rows, shape.top_k), np.int32)


class Case:
    """An executor whose step does one op `calls` times. cost: of one step, the least that it reads and multiplies."""

    calls: int
    cost: Cost
    output: Array  # what the ops write: [rows, padded width]

    def __init__(self, pool: cpu_kernels.ThreadPool, isa: str, places: list[tuple[int, int]]) -> None:
        """places: sequence and position of each row of the step."""
        self._memory, self._pool, self._isa = Memory(), pool, isa
        self._ops: list[tuple[str, dict[str, Any]]] = []
        self._sequences, self._positions = (np.array(column, np.int32) for column in zip(*places, strict=True))
        self._tokens, self._no_rows = np.zeros(len(places), np.int32), np.zeros(0, np.int32)
        self._no_logits = np.zeros((0, 1), np.float32)

    @cached_property
    def _executor(self) -> cpu_kernels.Executor:
        rows = len(self._tokens)
        scratch = max(cpu_kernels.scratch_bytes(op, self._isa, rows, **arguments) for op, arguments in self._ops)
        executor = cpu_kernels.Executor(
            isa=self._isa, pool=self._pool, rows=rows, sequences=int(self._sequences.max()) + 1,
            positions=int(self._positions.max()) + 1, vocab=1, scratch_bytes=scratch,
        )  # fmt: skip
        for op, arguments in self._ops:
            getattr(executor, op)(part=cpu_kernels.Part.other, **arguments)
        return executor

    def run(self) -> float:
        """Seconds that the ops of a step took."""
        times = self._executor.step(self._tokens, self._sequences, self._positions, self._no_rows, self._no_logits)
        return float(sum(times))

    def _add(self, op: str, **arguments: Any) -> None:
        self._ops.append((op, arguments))


def _operations(format: str, products: float) -> Cost:
    return Cost(int_ops=2.0 * products) if FORMATS[format].integer else Cost(flops=2.0 * products)


def _format(name: str) -> cpu_kernels.Format:
    return getattr(cpu_kernels.Format, name)


class Gemm(Case):
    """rows x hidden times hidden x columns, on one matrix after another."""

    def __init__(self, pool: cpu_kernels.ThreadPool, isa: str, shape: Shape, weights: Weights, rows: int) -> None:
        super().__init__(pool, isa, _one_sequence(rows))
        format, k = weights.format, shape.hidden
        self.calls = weights.copies if rows <= COLD_ROWS else 2
        size, stride = packed_bytes(format, shape.columns, k), row_stride(shape.columns)
        rows_at = self._memory.put(activation_rows(rows, k, format))
        self.output = self._memory.bytes(rows * stride * 4).view(np.float32).reshape(rows, stride)
        for call in range(self.calls):
            self._add(
                "gemm", format=_format(format), input=rows_at, weight=weights.address + call * size, bias=0,
                output=self.output.ctypes.data, columns=shape.columns, inputs=row_stride(k),
                input_stride=row_bytes(k, FORMATS[format].rows), output_stride=stride, accumulate=False,
            )  # fmt: skip
        self.cost = Cost(self.calls * size) + _operations(format, self.calls * rows * k * shape.columns)


class Moe(Case):
    """Sorting by expert, gate and up with activation, down with the weighted sum; other experts at each call."""

    def __init__(
        self, pool: cpu_kernels.ThreadPool, isa: str, shape: Shape, weights: Weights, rows: int, routing: str
    ) -> None:
        super().__init__(pool, isa, _one_sequence(rows))
        self._shape, self._weights, self._pairs = shape, weights, rows * shape.top_k
        self.calls = -(-shape.experts // self._pairs)
        ids = choose_experts(shape, routing, self.calls, rows)
        width = row_stride(shape.hidden)
        self.output = self._memory.bytes(rows * width * 4).view(np.float32).reshape(rows, width)
        buffers = self._buffers(rows)
        for call in range(self.calls):
            self._layer(buffers, ids[call])
        expert = expert_bytes(weights.format, shape.hidden, shape.intermediate)
        active = sum(len(np.unique(chosen)) for chosen in ids)
        products = 3.0 * ids.size * shape.hidden * shape.intermediate
        self.cost = Cost(active * expert) + _operations(weights.format, products)

    def _buffers(self, rows: int) -> dict[str, int]:
        shape, put, space = self._shape, self._memory.put, self._memory.space
        return {
            "rows": put(activation_rows(rows, shape.hidden, self._weights.format)),
            "weights": put(np.full(self._pairs, 1 / shape.top_k, np.float32)),
            "activation": space(self._pairs * row_bytes(shape.intermediate, "bf16")),
            "quantised": space(self._pairs * row_bytes(shape.intermediate, FORMATS[self._weights.format].rows)),
            "routing": space((3 * shape.experts + 2 * self._pairs + 64) * 4),
        }

    def _layer(self, buffers: dict[str, int], ids: npt.NDArray[np.int32]) -> None:
        shape, format = self._shape, self._weights.format
        kind, routing = FORMATS[format].rows, self._routing(buffers["routing"])
        self._add(
            "group", ids=self._memory.put(ids), weights=buffers["weights"], routing=routing, experts=shape.experts,
            top_k=shape.top_k,
        )  # fmt: skip
        common = {
            "format": _format(format), "routing": routing, "bias": 0,
            "expert_stride": expert_bytes(format, shape.hidden, shape.intermediate),
        }  # fmt: skip
        self._add(
            "gate_up", **common, input=buffers["rows"], experts=self._weights.address, output=buffers["activation"],
            blocks=-(-shape.intermediate // BLOCK), inputs=row_stride(shape.hidden),
            input_stride=row_bytes(shape.hidden, kind), output_stride=row_stride(shape.intermediate),
            activation=cpu_kernels.Activation.silu,
        )  # fmt: skip
        if kind != "bf16":
            self._add(
                "quantise", input=buffers["activation"], output=buffers["quantised"],
                width=row_stride(shape.intermediate), input_stride=row_bytes(shape.intermediate, "bf16"),
                output_stride=row_bytes(shape.intermediate, kind), multiple=shape.top_k,
                grouped=kind == "grouped", wide=kind == "wide",
            )  # fmt: skip
        self._add(
            "down", **common, input=buffers["activation" if kind == "bf16" else "quantised"],
            experts=self._weights.address + down_offset(format, shape.hidden, shape.intermediate),
            output=self.output.ctypes.data, blocks=-(-shape.hidden // BLOCK), inputs=row_stride(shape.intermediate),
            input_stride=row_bytes(shape.intermediate, kind), output_stride=row_stride(shape.hidden),
        )  # fmt: skip

    def _routing(self, base: int) -> cpu_kernels.Routing:
        sizes = {"offsets": self._shape.experts + 1, "rows": self._pairs, "weights": self._pairs}
        sizes |= {"active": self._shape.experts, "count": 1}
        starts = np.cumsum([0, *sizes.values()])
        return cpu_kernels.Routing(**{name: base + 4 * int(at) for name, at in zip(sizes, starts, strict=False)})


class Attention(Case):
    """One row of each of `rows` sequences (decode), or `rows` rows of one (prefill), behind `depth` tokens."""

    def __init__(
        self, pool: cpu_kernels.ThreadPool, isa: str, shape: Shape, kv_format: str, rows: int, decode: bool
    ) -> None:
        layer = shape.spec().layers[0]
        sequences, last = (rows, shape.depth) if decode else (1, shape.depth + rows - 1)
        places = [(row, last) for row in range(rows)] if decode else [(0, shape.depth + row) for row in range(rows)]
        super().__init__(pool, isa, places)
        read = sequences * (last + 1) * shape.kv_heads * layer.mixer.token_bytes(kv_format)
        self.calls = max(2, -(-COLD_BYTES // read) if rows <= COLD_ROWS else 2)
        self._attend(shape, kv_format, rows, sequences, last + 1)
        pairs = rows * (shape.depth + 1) if decode else rows * shape.depth + rows * (rows + 1) / 2
        self.cost = Cost(self.calls * read, self.calls * 4.0 * pairs * shape.heads * shape.head_dim)

    def _attend(self, shape: Shape, kv_format: str, rows: int, sequences: int, tokens: int) -> None:
        layer, put, space = shape.spec().layers[0], self._memory.put, self._memory.space
        width, blocks = shape.heads * shape.head_dim, -(-tokens // cpu_kernels.KEY_BLOCK)
        self.output = self._memory.bytes(rows * row_stride(width) * 2).view(ml_dtypes.bfloat16).reshape(rows, -1)
        places = {
            "q": put(activation_rows(rows, shape.heads * layer.mixer.key_dim, "bf16")),
            "output": self.output.ctypes.data,
            "states": space(sequences * blocks * shape.heads * (layer.mixer.value_dim + STATE_EXTRA) * 4),
        }
        for layout in self._layouts(shape, kv_format, sequences, tokens):
            self._add(
                "attention", **places, sinks=0, kv=layout, heads=shape.heads, kv_heads=shape.kv_heads,
                head_dim=shape.head_dim, output_stride=row_stride(width), window=0, scale=shape.head_dim**-0.5,
            )  # fmt: skip

    def _layouts(self, shape: Shape, kv_format: str, sequences: int, tokens: int) -> list[cpu_kernels.KvLayout]:
        """Keys and values of as many layers as there are calls."""
        spec = shape.spec(self.calls)
        kv = lay_out_kv(spec, tokens, kv_format)
        pages = self._memory.bytes(sequences * kv.sequence_stride)
        pages[...] = KV_BYTE
        return [kv.bound(layer, int(pages.ctypes.data)) for layer in range(len(spec.layers))]


def _one_sequence(rows: int) -> list[tuple[int, int]]:
    return [(0, position) for position in range(rows)]
