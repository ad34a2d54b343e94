"""Checkpoints whose matrices are codes in words: which tensors make a matrix, and what holds it exactly."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hybrid.errors import ConfigError, WeightsError
from hybrid.formats.block import GROUP
from hybrid.models.reading import Fields
from hybrid.weights.checkpoints.schemes.base import MatrixEntry
from hybrid.weights.checkpoints.schemes.codes import CodesEntry, Layout, Parts, integers
from hybrid.weights.checkpoints.schemes.words import BITS, WORD_BITS, words_of
from hybrid.weights.shard import Entry

_WORDS, _SCALES, _INTEGERS = ("I32",), ("BF16", "F16", "F32"), ("I32", "I64")


@dataclass(frozen=True)
class Option:
    """bits: of a code. group: inputs that share a scale, None: all."""

    bits: int
    group: int | None


@dataclass(frozen=True)
class CodesScheme:
    """How the matrices of a checkpoint are published.

    method: the word of config.json. options: what a matrix may be, that of most first; the shapes of its tensors say
    which. symmetric: whether all zeros are in the middle, None: those of some matrices are. ordered: whether groups
    may be of inputs in any order.
    """

    method: str
    layout: Layout
    options: tuple[Option, ...]
    symmetric: bool | None
    ordered: bool = False

    @property
    def format(self) -> str:
        """See `Scheme`."""
        usual = self.options[0]
        scales = "F16" if self.layout.transposed else "BF16"
        ordered = self.ordered and usual.group is not None
        return next(
            iter(() if ordered else exact_formats(usual, self.symmetric is True, scales, usual.group is None)), "bf16"
        )

    def matrices(self, entries: Mapping[str, Entry]) -> Iterator[tuple[str, MatrixEntry]]:
        """See `Scheme`."""
        ending = f".{self.layout.codes}"
        for name, codes in entries.items():
            if name.endswith(ending) and codes.dtype != "U8":  # which are numbers, not words
                module = name.removesuffix(ending)
                yield f"{module}.weight", self._matrix(module, entries)

    def _matrix(self, module: str, entries: Mapping[str, Entry]) -> CodesEntry:
        """Raises `WeightsError` for parts that are missing or do not fit each other."""
        parts = self._parts(module, entries)
        option, shape = self._option(module, parts)
        symmetric = self.symmetric is True if self.layout.always_zeros else parts.zeros is None
        ordered = self.ordered and parts.order is not None and (option.group or shape[1]) < shape[1]
        whole = option.group is None or option.group >= shape[1]
        holds = () if ordered else exact_formats(option, symmetric, parts.scales.dtype, whole)
        words = f"{self.method} of {option.bits} bits"
        words += "" if symmetric else " with zero points"
        words += " with groups in the order of activations" if ordered else ""
        words += " with F32 scales" if parts.scales.dtype == "F32" else ""
        codes = parts.codes
        return CodesEntry(
            codes.path, codes.dtype, shape, codes.start, codes.end, words, holds, parts=parts, layout=self.layout,
            bits=option.bits, group=min(option.group or shape[1], shape[1]), symmetric=symmetric,
        )  # fmt: skip

    def _parts(self, module: str, entries: Mapping[str, Entry]) -> Parts:
        layout = self.layout
        zeros_needed = layout.always_zeros or self.symmetric is False
        wanted = (
            (layout.codes, _WORDS, 2, True),
            (layout.scales, _SCALES, 2, True),
            (layout.zeros, _WORDS, 2, zeros_needed),
            (layout.order, _INTEGERS, 1, False),
            (layout.shape, _INTEGERS, 1, False),
        )
        found = [entries.get(f"{module}.{part}") if part else None for part, *_ in wanted]
        codes = entries[f"{module}.{layout.codes}"]
        for (part, dtypes, rank, needed), entry in zip(wanted, found, strict=True):
            if entry is None and needed:
                raise WeightsError(f"{codes.path}: tensor {module}.{part} is missing: fetch all files again")
            if entry and (entry.dtype not in dtypes or len(entry.shape) != rank):
                raise WeightsError(
                    f"{entry.path}: tensor {module}.{part} is {entry.dtype:.40} of {len(entry.shape)} dimensions; it "
                    f"must be {' or '.join(dtypes)} of {rank}: take another checkpoint"
                )
        _, scales, zeros, order, shape = found
        assert scales is not None
        return Parts(codes, scales, zeros, order, shape)

    def _option(self, module: str, parts: Parts) -> tuple[Option, tuple[int, int]]:
        """What the shapes of the tensors say, and the shape of the matrix."""
        shapes = [(option, self._shape(parts, option)) for option in self.options]
        fitting = [each for each in shapes if not self._misfits(parts, *each)]
        if len({shape for _, shape in fitting}) > 1 and parts.shape is not None:
            stored = integers(parts.shape).tolist()
            fitting = [each for each in fitting if [*each[1]] == stored]
        if fitting:
            return fitting[0]
        part, entry, wanted = self._misfits(parts, *shapes[0])[0]
        raise WeightsError(
            f"{entry.path}: tensor {module}.{part} has shape {reprlib.repr(list(entry.shape))}; codes and config.json "
            f"ask for {list(wanted)}: one of them belongs to another model"
        )

    def _shape(self, parts: Parts, option: Option) -> tuple[int, int]:
        rows, inputs = parts.codes.shape[:: -1 if self.layout.transposed else 1]
        per_word = WORD_BITS / option.bits
        if self.layout.along_rows:
            return int(rows * per_word), inputs
        return rows, int(inputs * per_word)

    def _misfits(
        self, parts: Parts, option: Option, shape: tuple[int, int]
    ) -> list[tuple[str, Entry, tuple[int, ...]]]:
        """Tensors of other shapes than such a matrix has, and these shapes."""
        rows, inputs = shape
        groups = -(-inputs // option.group) if option.group else 1
        turn = -1 if self.layout.transposed else 1
        wanted: list[tuple[str, Entry | None, tuple[int, ...]]] = [
            (self.layout.scales, parts.scales, (rows, groups)[::turn]),
            (self.layout.zeros, parts.zeros, (words_of(rows, option.bits), groups)[::turn]),
            (self.layout.order, parts.order, (inputs,)),
            (self.layout.shape, parts.shape, (2,)),
        ]
        return [(part, entry, sizes) for part, entry, sizes in wanted if entry and entry.shape != sizes]


def exact_formats(option: Option, symmetric: bool, scales: str, whole: bool) -> tuple[str, ...]:
    """The packed formats that hold such codes. whole: whether a row has one scale."""
    reach = 1 << (option.bits - 1 if symmetric else option.bits)  # codes less zeros are from -reach to reach - 1
    found = ["int4"] if reach <= 8 and scales == "BF16" else []
    if scales != "F32":
        # Of scales in bf16 nearly all are numbers of fp16, too; packing refuses others.
        found += [name for name, most in (("q4_0", 8), ("q5_0", 16)) if reach <= most]
    found += ["int8"] if reach <= 128 and whole else []
    found += ["q8_0"] if reach <= 128 and scales != "F32" else []
    return tuple(found)


def read_option(fields: Fields, bits: tuple[int, ...] = BITS, default: Option | None = None) -> Option:
    """bits and group_size of what is described; -1 stands for all inputs. Raises `ConfigError`."""
    known = default or Option(0, None)
    count = fields.size("bits", "w_bit", "num_bits", default=known.bits or None, minimum=1, maximum=32)
    if count not in bits:
        raise ConfigError(
            f"config.json: quantization_config has codes of {count} bits; those of {', '.join(map(str, bits))} bits "
            "are read: take another checkpoint"
        )
    size = fields.size("group_size", "q_group_size", default=known.group or -1, minimum=-1)
    if size != -1 and (size < GROUP or size % GROUP):
        raise ConfigError(
            f"config.json: group_size is {size}; it must be a multiple of {GROUP}, or -1: take another checkpoint"
        )
    return Option(count, None if size == -1 else size)
