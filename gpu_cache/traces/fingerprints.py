"""The JSON of GPT-OSS-MoE-ExpertFingerprinting: a prompt a file, and `router_data` with its tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from typing import Any, BinaryIO

from gpu_cache.errors import CacheError
from gpu_cache.trace import Trace
from gpu_cache.traces.base import Choice, Progress, Rows, Sizes, Source, TraceFormat, by_sequence, choices

_TOKENS, _EXPERTS, _SCORES = "router_data", "selected_experts", "selected_probs"
_MEANS = "think_expert_analytics"


def _fits(source: Source) -> bool:
    if source.is_json and f'"{_TOKENS}"'.encode() in source.head:
        return True
    first = source.documents[0] if source.documents else None
    if not isinstance(first, dict):
        return False
    return _TOKENS in first or _MEANS in first or any(isinstance(v, dict) and _MEANS in v for v in first.values())


def _read(source: Source, sizes: Sizes) -> Trace:
    """{"router_data": [{"token_N": {"layer_I": {"selected_experts": [...], "selected_probs": [...]}}}, ...]}; of
    several objects, each is a sequence. Every token is a step: what they hold was produced, prompts are left out.
    """
    rows, step = Rows(source.name, sizes, "token"), 0
    for sequence, document in enumerate(source.documents):
        if not isinstance(document, dict) or not isinstance(document.get(_TOKENS), list):
            raise CacheError(f"{source.name}: has no {_TOKENS}, only means; give a file of examples, with every token")
        for entry in document[_TOKENS]:
            for name, layers in _items(entry, rows, step):
                position = _number(name, "token_", rows, step)
                for layer, choice in _items(layers, rows, step):
                    choice = dict(_items(choice, rows, step))
                    experts, scores = choice.get(_EXPERTS), choice.get(_SCORES)
                    if not isinstance(experts, list) or not isinstance(scores, list | None):
                        raise rows.refuse(step, f"has no list {_EXPERTS} in {layer[:40]}")
                    rows.add(step, step, sequence, position, _number(layer, "layer_", rows, step), experts, scores)
            step += 1
    return rows.trace()


def _items(value: Any, rows: Rows, at: int) -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        raise rows.refuse(at, f"has {str(value)[:40]!r} where an object belongs")
    return list(value.items())


def _number(name: str, prefix: str, rows: Rows, at: int) -> int:
    digits = name.removeprefix(prefix)
    if digits == name or not digits.isascii() or not digits.isdecimal() or len(digits) > 12:
        raise rows.refuse(at, f"has {name[:40]!r} where {prefix}N belongs")
    return int(digits)


def _write(file: BinaryIO, trace: Trace, progress: Progress) -> None:
    """An object a line, of each sequence."""
    every = choices(by_sequence(trace), progress)
    for _, chosen in groupby(every, key=lambda choice: choice.sequence):
        file.write(b'{"router_data": [')
        for number, token in enumerate(_tokens(chosen)):
            file.write((", " * (number > 0) + json.dumps(token)).encode())
        file.write(b"]}\n")


def _tokens(chosen: Iterator[Choice]) -> Iterator[dict[str, Any]]:
    """Those of a step are together in memory, because its rows come layer by layer."""
    for _, step in groupby(chosen, key=lambda choice: choice.step):
        tokens: dict[int, dict[str, Any]] = {}
        for choice in step:
            said = {_EXPERTS: choice.experts, _SCORES: choice.scores}
            tokens.setdefault(choice.position, {})[f"layer_{choice.layer}"] = said
        yield from ({f"token_{position}": layers} for position, layers in tokens.items())


FORMATS = (
    TraceFormat(
        "fingerprints",
        "JSON of GPT-OSS-MoE-ExpertFingerprinting, with every token (*_examples.json)",
        "",
        "which tokens were computed together",
        _fits,
        _read,
        _write,
    ),
)
