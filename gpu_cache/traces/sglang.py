"""Records of SGLang's recorder of expert distributions (`--expert-distribution-recorder-mode`), files of torch.

per_token has the experts of every token; per_pass, stat and stat_approx only how often each expert was called, in a
pass or in a step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_cache.errors import CacheError
from gpu_cache.trace import MAX_EXPERTS, Ints, Trace
from gpu_cache.traces.base import Sizes, Source, TraceFormat, finish, routed
from gpu_cache.traces.torch_file import TorchFile

_PER_TOKEN, _PER_PASS, _PER_STEP = "topk_ids_of_layer", "global_physical_count", "logical_count"
_MAP = "last_physical_to_logical_map"

Columns = dict[str, NDArray[Any]]


def _fits(source: Source) -> bool:
    return source.head.startswith(b"PK\x03\x04") and b"data.pkl" in source.head[:256]


def _read(source: Source, sizes: Sizes) -> Trace:
    opened = TorchFile(source.whole, source.name)
    record = opened.value
    if not isinstance(record, dict) or not ("records" in record or _PER_STEP in record):
        raise _wrong(source, f"neither records nor {_PER_STEP}")
    if _PER_STEP in record:
        counts = opened.array(record[_PER_STEP])
        if counts.ndim not in (2, 3):
            raise _wrong(source, f"{_PER_STEP} of {counts.ndim} dimensions")
        counts = counts.reshape(-1, *counts.shape[-2:])
        return finish(_of_counts(counts, source), sizes, source.name, counts.shape[2])
    passes = record["records"]
    if not isinstance(passes, list) or not passes or not all(isinstance(one, dict) for one in passes):
        raise _wrong(source, "no list of passes")
    logical = None if record.get(_MAP) is None else opened.array(record[_MAP]).astype(np.int64)
    if logical is not None and (logical.ndim != 2 or not logical.size or not 0 <= logical.max() < MAX_EXPERTS):
        raise _wrong(source, f"a map of slots of the shape {logical.shape}")
    read = _of_tokens if _PER_TOKEN in passes[0] else _of_passes
    columns = read(opened, passes, logical, source)
    return finish(columns, sizes, source.name, None if logical is None else int(logical.max()) + 1)


def _wrong(source: Source, found: str) -> CacheError:
    return CacheError(f"{source.name}: is no record of SGLang's expert distributions: it has {found}; dump it again")


def _of_tokens(opened: TorchFile, passes: list[dict[str, Any]], logical: Ints | None, source: Source) -> Columns:
    """Every pass is a step. Which sequence a token belongs to is not recorded: it goes on where positions go on."""
    blocks = []
    sequences = _Sequences()
    for step, one in enumerate(passes):
        ids = opened.array(one.get(_PER_TOKEN)).astype(np.int64)
        position = one.get("positions")
        if ids.ndim != 3 or not isinstance(position, list) or len(position) != ids.shape[1]:
            raise _wrong(source, f"in pass {step} ids of the shape {ids.shape} and other positions")
        if not all(type(value) is int for value in position):
            raise _wrong(source, f"in pass {step} positions that are no whole numbers")
        layer, token, rank = np.indices(ids.shape).reshape(3, -1)
        expert = ids.reshape(-1)
        if logical is not None:
            expert = np.where(expert < 0, -1, _looked_up(logical, layer, expert, step, source))
        number = np.array(sequences.of(position, one.get("extend_seq_lens")), np.int64)
        top_k = np.maximum((ids >= 0).sum(axis=2), 1)[layer, token]
        blocks.append(
            routed(
                {
                    "step": np.full(expert.shape, step),
                    "sequence": number[token],
                    "position": np.array(position, np.int64)[token],
                    "layer": layer,
                    "rank": rank,
                    "expert": expert,
                    "score": (1 / top_k).astype(np.float32),
                }
            )
        )
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def _looked_up(logical: Ints, layer: Ints, physical: Ints, step: int, source: Source) -> Ints:
    """Experts of slots, of which there are more where popular experts have copies."""
    if layer.max(initial=0) >= logical.shape[0] or physical.max(initial=0) >= logical.shape[1]:
        raise _wrong(source, f"in pass {step} layers or slots beyond its map of {logical.shape}")
    return logical[layer, np.maximum(physical, 0)]


class _Sequences:
    """Numbers sequences by the positions of their tokens, pass by pass."""

    def __init__(self) -> None:
        self._open: dict[int, list[int]] = {}  # by the position that would come next
        self._count = 0

    def of(self, position: list[int], lengths: Any) -> list[int]:
        """The sequence of each token of a pass. lengths: tokens of each of its sequences; None: one each."""
        known = isinstance(lengths, list) and all(type(n) is int for n in lengths) and sum(lengths) == len(position)
        found: list[int] = []
        for length in lengths if known else [1] * len(position):
            if length:
                found += [self._next(position[len(found)], length)] * length
        return found

    def _next(self, position: int, length: int) -> int:
        waiting = self._open.get(position, [])
        if position and waiting:
            sequence = waiting.pop(0)
        else:
            sequence, self._count = self._count, self._count + 1
        self._open.setdefault(position + length, []).append(sequence)
        return sequence


def _of_passes(opened: TorchFile, passes: list[dict[str, Any]], logical: Ints | None, source: Source) -> Columns:
    counts = [opened.array(one.get(_PER_PASS)).astype(np.int64) for one in passes]
    if any(count.ndim != 2 or count.shape != counts[0].shape for count in counts):
        raise _wrong(source, f"passes whose {_PER_PASS} differ in shape")
    table = np.stack(counts)
    if logical is None:
        return _of_counts(table, source)
    steps, layer, physical = np.nonzero(table)
    added = np.zeros((*table.shape[:2], int(logical.max()) + 1), np.int64)
    expert, count = _looked_up(logical, layer, physical, 0, source), table[steps, layer, physical]
    held = expert >= 0  # others are slots without an expert
    np.add.at(added, (steps[held], layer[held], expert[held]), count[held])
    return _of_counts(added, source)


def _of_counts(counts: NDArray[Any], source: Source) -> Columns:
    """counts: [steps, layers, experts]. A step without calls was not recorded; experts rank by their calls."""
    step, layer, expert = np.nonzero(counts > 0)
    if not len(step):
        raise _wrong(source, "no calls of experts")
    count = counts[step, layer, expert].astype(np.int64)
    order = np.lexsort((expert, -count, layer, step))
    step, layer, expert, count = step[order], layer[order], expert[order], count[order]
    _, step = np.unique(step, return_inverse=True)
    begins = np.flatnonzero((np.diff(step, prepend=-1) != 0) | (np.diff(layer, prepend=-1) != 0))
    size = np.diff(np.append(begins, len(step)))
    rank = np.arange(len(step)) - np.repeat(begins, size)
    score = (count / np.repeat(np.add.reduceat(count, begins), size)).astype(np.float32)
    columns = {"step": step, "sequence": np.zeros_like(step), "position": step, "layer": layer}
    return {**columns, "rank": rank, "expert": expert, "score": score}


FORMATS = (
    TraceFormat(
        "sglang",
        "SGLang's record of expert distributions, a .pt of any mode, of which nothing is run",
        "",
        "scores and, but for per_token, tokens: experts of a pass rank by how often they were called",
        _fits,
        _read,
    ),
)
