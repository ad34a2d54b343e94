"""The compressor: of every `rate` tokens of a sequence it makes one entry, which attention sees as it does a token.

An entry is in each dimension a mean of what its tokens bring, weighted by a softmax of their gates where there are any;
normed, or made of what is normed, and turned as the first token of its window. With `overlaps` a token brings two sets
of dimensions, for the entry of the next window and for that of its own. Which entries there are, and what they are,
depends on positions alone: what the tokens of unfinished windows bring is kept with the sequence, in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

from cpu_kernels import RUN_TOKENS
from hybrid.formats import FORMATS
from hybrid.formats.mix import FormatMix
from hybrid.formats.packed import matrix_formats
from hybrid.models.layers.base import Place
from hybrid.models.layers.grouped_query import PART
from hybrid.models.layers.products import FP32
from hybrid.models.rope import RopeSpec
from hybrid.models.tensors import PerHead, Shapes, Shard, Stacked, StoreTensor, bias_name, in_layer, inside
from hybrid.ops import Buffer, Op, State, Weight

BROUGHT = "brought"  # buffer: what the tokens of a step bring to entries, fp32
STORED = "indexer"  # what its tensors count as


@dataclass(frozen=True)
class CompressorNames:
    """Names in a checkpoint. gates: empty: there are none. bias: what is added to them, by the place of a token in its
    window. norm: of entries; empty: there is none. token_norm: of the values that tokens bring, with a mean and a bias;
    empty: none.
    """

    values: str
    gates: str = ""
    bias: str = ""
    norm: str = ""
    token_norm: str = ""


@dataclass(frozen=True)
class Compressor:
    """rate: tokens of a window. dim: of an entry. stored: the name of its tensors in a store. others: rows of the
    tensor of values before its own, which make something else. turns_first: the first dimensions turn, not the last.
    """

    rate: int
    dim: int
    overlaps: bool
    names: CompressorNames
    stored: str = "compressor"
    others: int = 0
    turns_first: bool = False

    @property
    def sets(self) -> int:
        """Of dimensions that a token brings."""
        return 2 if self.overlaps else 1

    @property
    def width(self) -> int:
        """What a token brings of values; as much of gates."""
        return self.sets * self.dim

    @property
    def columns(self) -> int:
        """What a token brings, values and gates."""
        return 2 * self.width if self.names.gates else self.width

    @property
    def tokens(self) -> int:
        """How many are kept with a sequence: those that the first token of a run sees, and the run."""
        return self.sets * self.rate + RUN_TOKENS - 1

    def inside(self, module: str) -> Self:
        return replace(self, names=inside(self.names, module))

    def checkpoint_shapes(self, place: Place) -> Shapes:
        names = in_layer(self.names, place.layer)
        yield names.values, (self.others + self.width, place.hidden)
        if names.gates:
            yield names.gates, (self.width, place.hidden)
            yield names.bias, (self.rate, self.width)
        if names.norm:
            yield names.norm, (self.dim,)
        if names.token_norm:
            yield names.token_norm, (self.width,)
            yield bias_name(names.token_norm), (self.width,)

    def sources(self, layer: int) -> tuple[str | PerHead, ...]:
        """The matrices that make values and gates."""
        names, rows = in_layer(self.names, layer), self.others + self.width
        values = PerHead(names.values, 1, rows, self.others, self.width) if self.others else names.values
        return (values, names.gates) if names.gates else (values,)

    def store_tensors(self, place: Place, shard: Shard) -> Iterator[StoreTensor]:
        """All but these matrices."""
        names = in_layer(self.names, place.layer)
        if names.gates:
            yield shard.floats(f"{self.stored}.bias", STORED, Stacked((names.bias,)), self.rate, self.width)
        if names.norm:
            norm = Stacked((names.norm,), plus=place.norm_plus)
            yield shard.floats(f"{self.stored}.norm", "norms", norm, self.dim)
        if names.token_norm:
            weight, bias = Stacked((names.token_norm,)), Stacked((names.token_norm,), biases=True)
            yield shard.floats(f"{self.stored}.token_norm", STORED, weight, self.width)
            yield shard.floats(f"{self.stored}.token_norm_bias", STORED, bias, self.width)

    def norm_tokens(self, place: Place, first: int, width: int, eps: float) -> Op:
        """The op that norms the values in BROUGHT, see `compress`."""
        prefix, values = f"layers.{place.layer}.{self.stored}.token_norm", Buffer(BROUGHT, first * FP32)
        arguments = {
            "input": values,
            "weight": Weight(prefix),
            "bias": Weight(f"{prefix}_bias"),
            "output": None,
            "output_f32": values,
            "output8": None,
            "width": self.width,
            "input_stride": width,
            "output_stride": width,
            "output8_stride": 0,
            "eps": eps,
            "logit_rows": False,
            "centred": True,
        }
        return Op("norm", PART, arguments, (0, "rows"))

    def compress(
        self, place: Place, rope: Buffer | None, turned: RopeSpec | None, first: int, width: int, indexes: bool
    ) -> Op:
        """The op that makes entries. rope: the table of the angles of windows. turned: of some dimensions. first:
        where in BROUGHT, whose rows have `width` floats, its values begin. indexes: whether entries are keys of an
        indexer.
        """
        prefix = f"layers.{place.layer}.{self.stored}"
        arguments = {
            "made": Buffer(BROUGHT),
            "bias": Weight(f"{prefix}.bias") if self.names.gates else None,
            "norm": Weight(f"{prefix}.norm") if self.names.norm else None,
            "rope": rope,
            "kv": State(place.layer),
            "indexes": indexes,
            "dim": self.dim,
            "rope_dim": turned.dim if turned else 0,
            "rate": self.rate,
            "overlaps": self.overlaps,
            "interleaved": bool(turned and turned.interleaved),
            "first_value": first,
            "first_gate": first + self.width,
            "tokens": self.tokens,
            "width": width,
            "eps": place.eps,
        }
        if self.turns_first:
            arguments["turns_first"] = True
        return Op("compress", PART, arguments, (0, "rows"))


def keep(place: Place, made: str, tokens: int, width: int = 0) -> Op:
    """The last rows of a buffer, for the next step. width: floats of a row; 0: rows are keys."""
    arguments = {"made": Buffer(made), "kv": State(place.layer), "tokens": tokens, "width": width}
    return Op("keep", PART, arguments, (0, "rows"))


def compressor_format(mix: FormatMix) -> str:
    """Of the matrices of compressors and of an indexer's queries: with 8 bits where attention has fewer. bf16 where
    that is in floats, as it is published, and beside several formats.
    """
    names = set(matrix_formats(mix.attention, 1 + mix.attention.count("/")))
    name = names.pop()
    if names or name in ("bf16", "fp8", "fp8_row") or FORMATS[name].rows == "wide":
        return "bf16"
    return "q8_0" if FORMATS[name].rows == "grouped" else "int8"
