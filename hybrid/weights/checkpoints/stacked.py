"""Experts that a checkpoint stacks by matrix: gates, ups and downs of a layer are one tensor each, and so are scales.

Step-3.5-Flash is published so, in bf16, fp8 and NVFP4. Each expert gets tensors of its own, which are parts of these
and are named as it would be alone: `experts.17.gate_proj.weight` of `experts.gate_proj.weight`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from hybrid.errors import WeightsError
from hybrid.models.spec import ModelSpec
from hybrid.weights.shard import Entry

_EXPERT = ".{expert}"


def experts_apart(spec: ModelSpec, entries: Mapping[str, Entry]) -> Mapping[str, Entry]:
    """The tensors of a checkpoint with stacked experts apart. Raises `WeightsError` for a stack of another number of
    experts than config.json has, and for an expert that is both in a stack and apart.
    """
    stacks = dict(_stacks(spec))
    if not stacks:
        return entries
    found: dict[str, Entry] = {}
    for name, entry in entries.items():
        stack = stacks.get(name.rpartition(".")[0])
        for part, own in ({name: entry} if stack is None else _apart(name, entry, *stack)).items():
            if part in found:
                raise WeightsError(
                    f"{entry.path}: has tensor {part:.200} twice, alone and in a stack; fetch all files again"
                )
            found[part] = own
    return found


def _stacks(spec: ModelSpec) -> Iterator[tuple[str, tuple[str, int]]]:
    """Modules that may be stacks, and what they stack: the name of one expert's module, and how many there are."""
    for layer, names in spec.expert_names().items():
        for name in (names.gate, names.up, names.down) if names.stacked else ():
            module = name.removesuffix(".weight")
            yield module.replace(_EXPERT, ""), (module, spec.layers[layer].feed_forward.experts)


def _apart(name: str, entry: Entry, module: str, experts: int) -> dict[str, Entry]:
    """The parts of one tensor: what is one number is so for every expert, as scales of all may be."""
    kind = name.rpartition(".")[2]
    names = [f"{module.replace('{expert}', str(expert))}.{kind}" for expert in range(experts)]
    if math.prod(entry.shape) == 1:
        return dict.fromkeys(names, replace(entry, shape=()))
    count = entry.shape[0]
    if count != experts:
        raise WeightsError(
            f"{entry.path}: tensor {name:.200} stacks {count} experts, config.json says {experts}: one of them belongs "
            "to another model"
        )
    size = (entry.end - entry.start) // count
    starts = (entry.start + expert * size for expert in range(count))
    parts = [replace(entry, shape=entry.shape[1:], start=start, end=start + size) for start in starts]
    return dict(zip(names, parts, strict=True))
