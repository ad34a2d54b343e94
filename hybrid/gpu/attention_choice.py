"""Whole attention over mirrored keys by ours, by torch or by xformers: whichever is installed and faster here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from hybrid.gpu.attention import MIN_KEYS, attend, attend_folded, attend_whole, finish
from hybrid.gpu.graphs import Capture
from hybrid.plan.gpu_memory import SCORES

UNMEASURED = "torch"
WARM_UP, ROUNDS = 2, 9
FAR = 2**-5  # from the first that works, beside its norm; bf16 accounts for about 2^-8

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, float]  # q, k, v, seen and scale, as `attend` has them
# of Inputs, to float32 [batch, rows, heads, dim]; every row must see a key
Whole = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class AttentionShape:
    """Of a step: rows of each of `batch` sequences, over `keys` places of their rings. Some versions of xformers need
    multiples of 8 keys: measure with one only if all steps have one.
    """

    batch: int
    rows: int
    heads: int
    kv_heads: int
    dim: int
    keys: int


@dataclass(frozen=True)
class AttentionChoice:
    """seconds: of one call, by name, of all that work here; empty where nothing was measured."""

    name: str
    run: Whole
    seconds: dict[str, float]


@dataclass(frozen=True)
class WholeAttention:
    """A `Whole`: one choice for rows that decode, one for those of prompts."""

    decoding: AttentionChoice
    prompts: AttentionChoice

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
        return (self.decoding if q.shape[1] == 1 else self.prompts).run(q, k, v, seen, scale)


def attend_split(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Ours: products over parts of the keys, joined."""
    return finish(attend(q, k, v, seen, scale), None)


def installed() -> dict[str, Whole]:
    """By name; ours first, which the others are compared with."""
    found: dict[str, Whole] = {"split": attend_split, "torch": attend_whole}
    xformers = _xformers()
    return found if xformers is None else {**found, "xformers": xformers}


def _xformers() -> Whole | None:
    if find_spec("xformers") is None:
        return None
    try:
        function = import_module("xformers.ops").memory_efficient_attention
    except Exception:  # built for another torch, it may fail with anything
        return None
    return partial(attend_folded, partial(_by_xformers, function))


def _by_xformers(function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """It has heads behind rows, and broadcasts no bias."""
    whole_bias = bias.expand(-1, q.shape[1], -1, -1)
    made: Tensor = function(*(x.transpose(1, 2) for x in (q, k, v)), attn_bias=whole_bias, scale=scale)
    return made.transpose(1, 2)


def choose_for_steps(
    heads: tuple[int, int, int] | None,
    sequences: int,
    rows: int,
    keys: int,
    device: torch.device,
    capture: Capture | None,
) -> WholeAttention:
    """For steps of up to `sequences` sequences that decode, or `rows` of a prompt, over rings of `keys` places.

    heads: query heads, KV heads and their dimension; None where no layer attends so. capture: of graphs, by which steps
    that decode run. On a GPU the stream at hand must not be the usual one.
    """
    if heads is None:
        unmeasured = AttentionChoice(UNMEASURED, installed()[UNMEASURED], {})
        return WholeAttention(unmeasured, unmeasured)
    decoding = choose_attention(AttentionShape(sequences, 1, *heads, keys), device, capture)
    return WholeAttention(decoding, choose_attention(AttentionShape(1, rows, *heads, keys), device))


def choose_attention(
    shape: AttentionShape,
    device: torch.device,
    capture: Capture | None = None,
    clock: Callable[[], float] | None = None,
) -> AttentionChoice:
    """The fastest for `shape` on the device. What fails there, or makes something else, is left out.

    capture: of a graph, on the stream at hand, if steps of the shape run by one; then a graph is timed, and what cannot
    be captured is left out too. clock: seconds; None: the time, but on a CPU, which only stands in for a device,
    nothing is measured. Memory is given back; at most that of the scores of a step and 2 * SCORES numbers in bf16.
    """
    candidates = installed()
    if clock is None and device.type == "cpu":
        return AttentionChoice(UNMEASURED, candidates[UNMEASURED], {})
    try:
        with torch.inference_mode():
            seconds = _measure(candidates, _random_inputs(shape, device), capture, clock or perf_counter)
    except torch.OutOfMemoryError:  # for the inputs
        seconds = {}
    _give_back(device)
    name = min(seconds, key=seconds.__getitem__, default=UNMEASURED)
    return AttentionChoice(name, candidates[name], seconds)


def _measure(
    candidates: dict[str, Whole], inputs: Inputs, capture: Capture | None, clock: Callable[[], float]
) -> dict[str, float]:
    device, wanted, seconds = inputs[0].device, None, {}
    for name, run in candidates.items():
        try:
            made = run(*inputs)
            wanted = made if wanted is None else wanted
            if (made - wanted).norm() <= FAR * wanted.norm():  # false of NaN
                seconds[name] = _seconds(_as_in_steps(partial(run, *inputs), device, capture), device, clock)
        except Exception:  # a shape or device it does not know, or an install that only fails when called
            continue
    return seconds


def _as_in_steps(run: Callable[[], Tensor], device: torch.device, capture: Capture | None) -> Callable[[], object]:
    if capture is None:
        return run
    _give_back(device)  # a graph has memory of its own
    replay, _ = capture(run)
    return replay


def _random_inputs(shape: AttentionShape, device: torch.device) -> Inputs:
    """The first keys are hidden, as by a window: kernels that know nothing of parts without a key make NaN of them."""
    random = torch.Generator(device).manual_seed(0)
    max_keys = SCORES // (shape.batch * shape.kv_heads * shape.dim) // MIN_KEYS * MIN_KEYS
    keys = min(shape.keys, max(MIN_KEYS, max_keys))

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=random, dtype=torch.bfloat16, device=device)

    q = normal(shape.batch, shape.rows, shape.heads, shape.dim)
    k, v = (normal(shape.batch, shape.kv_heads, keys, shape.dim) for _ in range(2))
    seen = (torch.arange(keys, device=device) >= keys // 2).expand(shape.batch, shape.rows, keys)
    return q, k, v, seen, shape.dim**-0.5


def _seconds(run: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    """Of one call and the wait for it: a layer waits for the device, so time to launch counts too."""
    for _ in range(WARM_UP):
        run()
    rounds = []
    for _ in range(ROUNDS):
        _wait(device)
        start = clock()
        run()
        _wait(device)
        rounds.append(clock() - start)
    return median(rounds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _give_back(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
