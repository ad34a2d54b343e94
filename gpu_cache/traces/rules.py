"""What a trace of a model that ran should be, whoever recorded it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpu_cache.trace import Ints, Trace
from gpu_cache.traces.base import begin_of_choices, is_prompt

Wrong = NDArray[np.bool_]


@dataclass(frozen=True)
class Verdict:
    """A rule, and how many rows break it; where: the first one, in words."""

    rule: str
    broken: int
    where: str


def check(trace: Trace) -> list[Verdict]:
    """Every rule, in order."""
    return [_verdict(trace, rule, find(trace)) for rule, find in _RULES.items()]


def _verdict(trace: Trace, rule: str, wrong: Wrong) -> Verdict:
    broken = int(np.count_nonzero(wrong))
    if not broken:
        return Verdict(rule, 0, "")
    row = int(np.argmax(wrong))
    names = ("step", "sequence", "position", "layer", "rank", "expert")
    return Verdict(rule, broken, ", ".join(f"{name} {getattr(trace, name)[row]}" for name in names))


def _repeated(trace: Trace) -> Wrong:
    choice = _choice_of_row(trace)
    order = np.lexsort((trace.expert, choice))
    wrong = np.zeros(len(trace), bool)
    same = (choice[order][1:] == choice[order][:-1]) & (trace.expert[order][1:] == trace.expert[order][:-1])
    wrong[order[1:][same]] = True
    return wrong


def _ranks(trace: Trace) -> Wrong:
    begins = begin_of_choices(trace)
    return np.asarray(trace.rank != np.arange(len(trace)) - begins[_choice_of_row(trace)], bool)


def _rising(trace: Trace) -> Wrong:
    rising = np.diff(trace.score, prepend=trace.score[:1]) > 0
    rising[begin_of_choices(trace)] = False
    return rising


def _width(trace: Trace) -> Wrong:
    begins = begin_of_choices(trace)
    counts = np.diff(np.append(begins, len(trace)))
    usual = int(np.bincount(counts).argmax())
    return np.asarray((counts != usual)[_choice_of_row(trace)], bool)


def _layers(trace: Trace) -> Wrong:
    """By the first row of a token at a layer. Programs may leave out the last layer of prompts, which only their last
    token needs.
    """
    begins = begin_of_choices(trace)
    _, token = np.unique(np.stack([trace.step, trace.sequence, trace.position])[:, begins], axis=1, return_inverse=True)
    token = token.reshape(-1)
    layers = np.bincount(token)
    last = np.zeros(len(layers), np.int64)
    np.maximum.at(last, token, trace.layer[begins])
    early = is_prompt(trace)[begins] & (layers == trace.layers - 1)[token] & (last == trace.layers - 2)[token]
    wrong = np.zeros(len(trace), bool)
    wrong[begins] = (layers != trace.layers)[token] & ~early
    return wrong


def _ascending(trace: Trace) -> Wrong:
    return np.asarray(
        (np.diff(trace.layer, prepend=trace.layer[:1]) < 0) & (np.diff(trace.step, prepend=trace.step[:1]) == 0), bool
    )


def _positions(trace: Trace) -> Wrong:
    """Of the first layer: a token of a sequence that is not the next one."""
    rows = begin_of_choices(trace)
    rows = rows[trace.layer[rows] == trace.layer.min()]
    order = rows[np.argsort(trace.sequence[rows], kind="stable")]
    gap = (np.diff(trace.position[order]) != 1) & (np.diff(trace.sequence[order]) == 0)
    wrong = np.zeros(len(trace), bool)
    wrong[order[1:][gap]] = True
    return wrong


def _steps(trace: Trace) -> Wrong:
    return np.diff(trace.step, prepend=trace.step[:1]) > 1


def _choice_of_row(trace: Trace) -> Ints:
    starts = np.zeros(len(trace), np.int64)
    starts[begin_of_choices(trace)[1:]] = 1
    return np.cumsum(starts)


_RULES: dict[str, Callable[[Trace], Wrong]] = {
    "the experts of a token at a layer differ": _repeated,
    "ranks count from 0": _ranks,
    "scores do not rise with the rank": _rising,
    "every token has as many experts": _width,
    "every token has all layers, those of prompts maybe without the last": _layers,
    "layers of a step ascend": _ascending,
    "positions of a sequence go on by one": _positions,
    "no step is left out": _steps,
}
