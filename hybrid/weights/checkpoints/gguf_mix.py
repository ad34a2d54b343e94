"""Which packed formats hold the tensors of a GGUF file exactly, layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from hybrid.formats import FORMATS
from hybrid.formats.block import BLOCK
from hybrid.formats.mix import MIXES, PARTS, FormatMix
from hybrid.formats.packed import matrix_formats
from hybrid.models.spec import ModelSpec
from hybrid.models.tensors import Gated, GatedBiases, PerHead, Stacked, StoreTensor
from hybrid.weights.shard import Entry

# What holds every value of a type, the one that takes least memory first.
HOLDS = {
    "Q4_0": ("q4_0", "q5_0", "q8_0"), "Q5_0": ("q5_0", "q8_0"), "Q8_0": ("q8_0",), "Q4_1": ("q4_1", "q5_1"),
    "Q5_1": ("q5_1",), "Q4_K": ("q4_k", "q5_k"), "Q5_K": ("q5_k",), "Q6_K": ("q6_k",), "MXFP4": ("mxfp4",),
    "Q3_K": ("q6_k",), "IQ4_NL": ("q8_0",),
}  # fmt: skip
_FLOATS = ("F32", "F16", "BF16")
_APART = MIXES["bf16"].with_parts({"head": "int8"})  # with a matrix for the head, even if the embedding is one in bf16


def gguf_mix(spec: ModelSpec, entries: Mapping[str, Entry]) -> FormatMix:
    """The formats in which a file's tensors lose nothing; where one format cannot hold all of a matrix, bf16."""
    types: dict[tuple[int, str], list[set[str]]] = {}
    for tensor in spec.store_tensors(_APART):
        if tensor.part in PARTS and tensor.format is not None:
            found = matrix_types(tensor, entries)
            before = types.setdefault((_layer(tensor), tensor.part), [set() for _ in found])
            for all_types, own in zip(before, found, strict=False):
                all_types.update(own)
    named = {key: "/".join(dict.fromkeys(map(exact_format, found))) for key, found in types.items()}
    usual = {part: _most_common(name for (_, its), name in named.items() if its == part) for part in PARTS}
    plain = FormatMix.uniform(usual["attention"] or "bf16").with_parts({part: n for part, n in usual.items() if n})
    layers = range(len(spec.layers))
    return FormatMix.of_layers(
        [plain.with_parts({part: named[layer, part] for part in PARTS if (layer, part) in named}) for layer in layers]
    )


def opened_types(spec: ModelSpec, entries: Mapping[str, Entry], mix: FormatMix) -> dict[str, list[str]]:
    """What becomes bf16 although it is quantised in the file: types of its tensors by part."""
    found: dict[str, set[str]] = {}
    for tensor in spec.store_tensors(mix):
        if tensor.part in PARTS and tensor.format is not None:
            formats = matrix_formats(tensor.format)
            for format, types in zip(formats, matrix_types(tensor, entries), strict=False):
                if format == "bf16" and (quantised := types - {*_FLOATS}):
                    found.setdefault(tensor.part, set()).update(quantised)
    return {part: sorted(types) for part, types in found.items()}


def exact_format(types: Iterable[str]) -> str:
    """The smallest format that holds all values of these types, bf16 where there is none."""
    held = [HOLDS.get(type, ()) for type in sorted(types)]
    common = [name for name in held[0] if all(name in names for names in held)] if held else []
    return next((name for name in common if name in FORMATS), "bf16")


def matrix_types(tensor: StoreTensor, entries: Mapping[str, Entry]) -> list[set[str]]:
    """The types of what a matrix is made of; of experts, those of gate and up, and of down. Blocks of 16 rows that two
    tensors share are floats.
    """
    found = [{entries[name].dtype for name in names if name in entries} for names in _sources(tensor)]
    if isinstance(tensor.origin, Stacked):
        rows = [
            part.rows if isinstance(part, PerHead) else entries[part].shape[0]
            for part in tensor.origin.parts
            if isinstance(part, PerHead) or part in entries
        ]
        if any(count % BLOCK for count in rows[:-1]):
            found[0].add("F32")
    return found


def _sources(tensor: StoreTensor) -> Iterator[list[str]]:
    origin = tensor.origin
    assert not isinstance(origin, GatedBiases)
    if isinstance(origin, Stacked):
        yield list(origin.names)
    elif isinstance(origin, Gated):
        count = tensor.shape[0] if len(tensor.shape) > 1 else 1
        names = [origin.names.of_expert(expert) for expert in range(count)]
        yield [name for gate, up, _ in names for name in (gate, up)]
        yield [down for _, _, down in names]


def _layer(tensor: StoreTensor) -> int:
    """-1 outside of the layers."""
    return int(tensor.name.split(".")[1]) if tensor.name.startswith("layers.") else -1


def _most_common(names: Iterable[str]) -> str:
    return next((name for name, _ in Counter(names).most_common(1)), "")
