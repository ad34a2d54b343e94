"""Experts that a checkpoint stacks by matrix: gates, ups and downs of a layer are one tensor each, and so are scales.

Step-3.5-Flash is published so, in bf16, fp8 and NVFP4. Each expert gets tensors of its own, which are parts of these
and are named as it would be alone: `experts.17.gate_proj.weight` of `experts.gate_proj.weight`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from hybrid.errors import WeightsError
from hybrid.models.spec import ModelSpec
from hybrid.weights.shard import Entry

_EXPERT = ".{expert}"


def experts_apart(spec: ModelSpec, entries: Mapping[str, Entry]) -> Mapping[str, Entry]:
    """The tensors of a checkpoint with stacked experts apart. Raises `WeightsError` for a stack of another number of
    experts than config.json has.
    """
    stacks = dict(_stacks(spec))
    if not stacks:
        return entries
    found: dict[str, Entry] = {}
    for name, entry in entries.items():
        stack = stacks.get(name.rpartition(".")[0])
        found |= {name: entry} if stack is None else _apart(name, entry, *stack)
    return found


def _stacks(spec: ModelSpec) -> Iterator[tuple[str, tuple[str, int]]]:
    """Modules that may be stacks, and what they stack: the name of one expert's module, and how many there are."""
    for layer, names in spec.expert_names().items():
        for name in (names.gate, names.up, names.down) if names.stacked else ():
            module = name.removesuffix(".weight")
            yield module.replace(_EXPERT, ""), (module, spec.layers[layer].feed_forward.experts)


def _apart(name: str, entry: Entry, module: str, experts: int) -> dict[str, Entry]:
    """The parts of one tensor."""
    count = entry.shape[0] if entry.shape else 0
    if count != experts:
        raise WeightsError(
            f"{entry.path}: tensor {name:.200} stacks {count} experts, config.json says {experts}: one of them belongs "
            "to another model"
        )
    size, kind = (entry.end - entry.start) // count, name.rpartition(".")[2]
    return {
        f"{module.replace('{expert}', str(expert))}.{kind}": replace(
            entry, shape=entry.shape[1:], start=entry.start + expert * size, end=entry.start + (expert + 1) * size
        )
        for expert in range(count)
    }
