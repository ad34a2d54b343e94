"""The formats that hold the matrices of a checkpoint exactly, layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from hybrid.formats import FORMATS
from hybrid.formats.block import BLOCK
from hybrid.formats.mix import MIXES, PARTS, PER_HEAD, FormatMix
from hybrid.formats.packed import matrix_formats
from hybrid.models.layers.latent import per_head_format
from hybrid.models.spec import ModelSpec
from hybrid.models.tensors import Gated, GatedBiases, PerHead, Stacked, StoreTensor


@dataclass(frozen=True)
class Kind:
    """How a tensor of a checkpoint is stored.

    words: for people; empty of plain floats. holds: the packed formats that hold all its values; bf16 is among them
    only if it rounds none. rows: of its matrix. again: whether what shares blocks with other matrices is quantised
    again rather than opened to bf16.
    """

    words: str
    holds: tuple[str, ...]
    rows: int
    again: bool = False


_INPUTS = 4096  # of the matrix by whose bytes formats are compared
Kinds = Callable[[str], Kind | None]  # of a tensor by name, None if there is none
Part = tuple[int, str]  # of a layer, -1 for the head
_SHARED = Kind("", (), 0)  # blocks that are shared with another matrix, as no tensor is stored
_APART = MIXES["bf16"].with_parts({"head": "int8"})  # with a matrix for the head, even if the embedding is one in bf16


def exact_mix(spec: ModelSpec, kinds: Kinds, absent: FormatMix | None = None) -> FormatMix:
    """The formats in which tensors lose nothing; where no format holds all that a matrix is made of, bf16.

    absent: the formats of parts that no layer of the model has; None: that of most projections of attention.
    """
    found: dict[Part, dict[int, set[Kind]]] = {}
    for tensor in spec.store_tensors(_APART):
        if tensor.part in PARTS and tensor.format is not None:
            part = PER_HEAD if isinstance(tensor.origin, PerHead) else tensor.part
            of_part = found.setdefault((layer_of(tensor), part), {})
            for position, own in _by_position(tensor, kinds):
                of_part.setdefault(position, set()).update(own)
    formats = {
        key: {position: exact_format(own) for position, own in of_part.items()}
        for key, of_part in found.items()
        if all(of_part.values())
    }
    if all(name == "bf16" for (_, part), names in formats.items() if part == PER_HEAD for name in names.values()):
        formats = {key: names for key, names in formats.items() if key[1] != PER_HEAD}  # as without a name
    return mix_of_matrices(spec, formats, absent)


def mix_of_matrices(
    spec: ModelSpec, formats: Mapping[Part, Mapping[int, str]], absent: FormatMix | None = None
) -> FormatMix:
    """The mix in which the matrices of parts have these formats, by their positions. absent: see `exact_mix`.

    PER_HEAD is a part here. In layers without it matrices of heads, which are taken apart and turned, are bf16: in
    other formats they would be quantised again.
    """
    origins = ((layer_of(tensor), tensor.part, tensor.origin) for tensor in spec.store_tensors(_APART))
    apart = {(layer, part) for layer, part, origin in origins if isinstance(origin, PerHead)}
    apart = {(layer, part) for layer, part in apart if (layer, PER_HEAD) not in formats}
    named = {}
    for key, by_position in formats.items():
        names = [by_position[position] for position in sorted(by_position)]
        one = len(set(names)) == 1 and (key not in apart or per_head_format(names[0]) == "bf16")
        named[key] = names[0] if one else "/".join(names)
    return _mix_of_parts(spec, named, absent)


def _by_position(tensor: StoreTensor, kinds: Kinds) -> Iterator[tuple[int, set[Kind]]]:
    """The kinds of what a matrix is made of, by the format of its part that each has."""
    own = matrix_kinds(tensor, kinds)
    if len(tensor.positions) == 1:
        yield from enumerate(own, tensor.positions[0])
        return
    assert isinstance(tensor.origin, Stacked)
    shared = own[0] & {_SHARED}
    for position, name in zip(tensor.positions, tensor.origin.names, strict=True):
        yield position, shared | {kind for kind in [kinds(name)] if kind}


def _mix_of_parts(spec: ModelSpec, named: Mapping[Part, str], absent: FormatMix | None) -> FormatMix:
    """The mix in which the parts of layers have these formats."""
    parts = (*PARTS, PER_HEAD)
    usual = {part: _most_common(name for (_, its), name in named.items() if its == part) for part in parts}
    rest = absent or FormatMix.uniform(_most_common(usual["attention"].split("/")) or "bf16")
    plain = rest.with_parts({part: name for part, name in usual.items() if name})
    own = [{part: named[layer, part] for part in parts if (layer, part) in named} for layer in range(len(spec.layers))]
    return FormatMix.of_layers([plain.with_parts({PER_HEAD: plain.per_head} | formats) for formats in own])


def opened(spec: ModelSpec, kinds: Kinds, mix: FormatMix) -> dict[str, list[str]]:
    """What becomes bf16, and is rounded by that, although it is quantised: how it is stored, by part."""
    found: dict[str, set[str]] = {}
    for tensor in spec.store_tensors(mix):
        if tensor.part in PARTS and tensor.format is not None:
            for format, own in zip(matrix_formats(tensor.format), matrix_kinds(tensor, kinds), strict=False):
                rounded = {kind.words for kind in own if kind.words and "bf16" not in kind.holds}
                if format == "bf16" and rounded:
                    found.setdefault(tensor.part, set()).update(rounded)
    return {part: sorted(words) for part, words in found.items()}


def exact_format(kinds: Iterable[Kind]) -> str:
    """The smallest format that holds all values of these kinds, bf16 where there is none."""
    held = [kind.holds for kind in kinds]
    common = [name for name in FORMATS if all(name in names for names in held)]
    return min(common, key=lambda name: FORMATS[name].block_bytes(_INPUTS), default="bf16")


def matrix_kinds(tensor: StoreTensor, kinds: Kinds) -> list[set[Kind]]:
    """The kinds of what a matrix is made of; of experts, those of gate and up, and of down. Blocks of 16 rows that two
    tensors share are floats.
    """
    if isinstance(tensor.origin, PerHead):
        whole = kinds(tensor.origin.whole) if tensor.origin.whole else None
        return [{whole} if whole else set()]
    found = [[kind for name in names if (kind := kinds(name))] for names in _sources(tensor, kinds)]
    if any(rows % BLOCK and not kind.again for kind, rows in _followed(tensor, kinds)):
        found[0].append(_SHARED)
    return [set(each) for each in found]


def _followed(tensor: StoreTensor, kinds: Kinds) -> Iterator[tuple[Kind, int]]:
    """What has the rows of something else behind its own in a matrix, and how many rows it has there."""
    origin = tensor.origin
    if isinstance(origin, Stacked):
        for part in origin.parts[:-1]:
            if kind := kinds(part.name if isinstance(part, PerHead) else part):
                yield kind, part.rows if isinstance(part, PerHead) else kind.rows
    elif isinstance(origin, Gated) and origin.wide > 1 and (kind := kinds(origin.names.fused_gate_up)):
        yield kind, origin.intermediate


def _sources(tensor: StoreTensor, kinds: Kinds) -> Iterator[Sequence[str]]:
    origin = tensor.origin
    assert not isinstance(origin, GatedBiases | PerHead)
    if isinstance(origin, Stacked):
        yield origin.names
    elif origin.names.fused_gate_up and kinds(origin.names.fused_gate_up):
        yield (origin.names.fused_gate_up,)
        yield (origin.names.fused_down,)
    else:
        count = tensor.shape[0] if len(tensor.shape) > 1 else 1
        names = [origin.names.of_expert(expert) for expert in range(count)]
        yield [name for gate, up, _ in names for name in (gate, up) if name]
        yield [down for _, _, down in names]


def layer_of(tensor: StoreTensor) -> int:
    """The layer that it belongs to, -1 outside of the layers."""
    return int(tensor.name.split(".")[1]) if tensor.name.startswith("layers.") else -1


def _most_common(names: Iterable[str]) -> str:
    return next((name for name, _ in Counter(names).most_common(1)), "")
