"""The two systems of arXiv 2512.16473 in our cost model: predicted speed beside what they measured.

An RTX 4090 (PCIe 4.0 x16) beside 24 cores; bf16 experts; 14 x 4 slots for Mixtral 8x7B and 16 x 8 for Phi-3.5-MoE, in
the first layers only. Their traces are not published: routing is made up so that a token shares the stated part of its
experts with the token before it (they report 40 to 60 %), and is even otherwise. The CPU's rate is that of their own
CPU-only mode, so that it holds all that their CPU path costs.

    python bench/seed_geometries.py --write-trace routes.csv --model mixtral

writes such routing instead, for `hybrid run --route-trace` with any checkpoint of that shape.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpu_cache.costs import Machine, cpu_only, predict, work_of
from gpu_cache.simulator import Setting, replay
from gpu_cache.trace import Calls, Trace, make_trace
from hybrid.commands.console import exit_codes
from hybrid.errors import ConfigError, cache_errors
from hybrid.files.traces import write_trace

PCIE_GBPS, DEVICE_GBPS = 25.0, 1008.0  # PCIe 4.0 x16 as it is reached; GDDR6X of the RTX 4090
LAYERS, TOP_K, BYTES_PER_WEIGHT = 32, 2, 2
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Shape:
    """MoE layers, routed experts of each, and how many a token takes."""

    layers: int
    experts: int
    top_k: int


SHAPES = {
    "mixtral": Shape(32, 8, 2),
    "phi-3.5-moe": Shape(32, 16, 2),
    "qwen3-30b-a3b": Shape(48, 128, 8),
    "gpt-oss-20b": Shape(24, 32, 4),
    "embedded": Shape(16, 16, 2),
}


@dataclass(frozen=True)
class Seed:
    """What is published: shape, slots, and tokens/s of the CPU-only mode and of the cache."""

    name: str
    experts: int
    expert_weights: int
    other_weights: float
    nblocks: int
    nways: int
    cpu_speed: float
    cache_speed: float

    @property
    def machine(self) -> Machine:
        """The CPU has the rate that makes its predicted speed the measured one; the rest of a token is the device's."""
        expert_bytes = self.expert_weights * BYTES_PER_WEIGHT
        other = self.other_weights * BYTES_PER_WEIGHT / DEVICE_GBPS / 1e9
        cpu = LAYERS * TOP_K * expert_bytes / (1 / self.cpu_speed - other) / 1e9
        return Machine(PCIE_GBPS, DEVICE_GBPS, cpu, expert_bytes, other_ms=1e3 * other)

    @property
    def delay(self) -> int:
        """Lookups that pass while an expert is copied."""
        return math.ceil(self.machine.costs.copy * LAYERS * self.cpu_speed) - 1


SEEDS = (
    Seed("Mixtral 8x7B", 8, 3 * 4096 * 14336, 1.6e9, 14, 4, 4.2, 4.8),
    Seed("Phi-3.5-MoE", 16, 3 * 4096 * 6400, 1.6e9, 16, 8, 6.3, 10.4),
)
PLACEMENTS = {
    "their cache: first layers, LRU, every miss copied": {"mapping": "prefix"},
    "first layers, LRU, 2 copies a token": {"mapping": "prefix", "quota": 2},
    "first layers, LRU, break-even": {"mapping": "prefix", "admission": "break-even"},
    "all layers (modulo), LRU, break-even": {"admission": "break-even"},
    "the best any cache could hit, first layers": {"mapping": "prefix", "policy": "bypass-Belady"},
    "static, whole layers": {"policy": "static-layers"},
    "static, most called experts": {"policy": "static-best"},
}


def made_up_calls(experts: int, reuse: float, tokens: int, seed: int = 0) -> Calls:
    """Routing of one sequence of a seed's model."""
    chosen = made_up_routes(Shape(LAYERS, experts, TOP_K), reuse, tokens, seed)
    groups = np.arange(tokens * LAYERS)
    alone = np.zeros_like(groups)
    score = np.full(chosen.size, 1 / TOP_K, np.float32)
    start = TOP_K * np.arange(len(groups) + 1)
    return Calls(groups // LAYERS, alone, groups % LAYERS, start, chosen.reshape(-1), score, LAYERS, experts)


def made_up_routes(shape: Shape, reuse: float, tokens: int, seed: int = 0) -> Ints:
    """int64 [tokens, layers, top_k]: an expert of a token was one of the token before with probability `reuse`."""
    random = np.random.default_rng(seed)
    sticky, places = _kept_share(shape, reuse), (shape.layers, shape.top_k)
    chosen = np.empty((tokens, *places), np.int64)
    chosen[0] = random.random((shape.layers, shape.experts)).argsort(axis=1)[:, : shape.top_k]
    for token in range(1, tokens):
        order = random.random((shape.layers, shape.experts))
        kept = random.random(places) < sticky
        np.put_along_axis(
            order, chosen[token - 1], np.where(kept, -1.0, np.take_along_axis(order, chosen[token - 1], 1)), 1
        )
        chosen[token] = order.argsort(axis=1)[:, : shape.top_k]
    return chosen


def _kept_share(shape: Shape, reuse: float) -> float:
    """How often an expert must be kept so that, with what chance draws again, `reuse` of them are the same: found by
    halving. Raises ConfigError for less than chance alone makes.
    """
    low, high = 0.0, 1.0
    if not _shared(shape, low) <= reuse <= high:
        raise ConfigError(f"--reuse {reuse} is out of range; with these experts it is {_shared(shape, low):.3f} to 1")
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if _shared(shape, middle) < reuse else (low, middle)
    return high


def _shared(shape: Shape, kept: float) -> float:
    """The share of experts that are the same if each is kept so often: those, and of the rest, which are drawn among
    all that were not kept, those that were there before.
    """
    n, total = shape.top_k, 0.0
    for count in range(n + 1):
        chance = math.comb(n, count) * kept**count * (1 - kept) ** (n - count)
        total += chance * (count + (n - count) ** 2 / max(1, shape.experts - count))
    return total / n


def made_up_trace(shape: Shape, reuse: float, sequences: int, tokens: int) -> Trace:
    """Sequences of so many tokens, one after the other, each token a step; scores are equal."""
    chosen = np.stack([made_up_routes(shape, reuse, tokens, seed) for seed in range(sequences)])
    sequence, position, layer, rank = (axis.reshape(-1) for axis in np.indices(chosen.shape))
    columns = {"step": sequence * tokens + position, "sequence": sequence, "position": position, "layer": layer}
    columns |= {"rank": rank, "expert": chosen.reshape(-1), "score": np.full(chosen.size, 1 / shape.top_k)}
    return make_trace(columns, shape.layers, shape.experts)


def table(seed: Seed, reuses: list[float], tokens: int) -> list[str]:
    """Rows of a markdown table: hits and tokens/s for each share of reuse."""
    traces = [made_up_calls(seed.experts, reuse, tokens) for reuse in reuses]
    lines = []
    for name, choice in PLACEMENTS.items():
        setting = Setting(seed.nblocks, seed.nways, delay=seed.delay, **choice)
        results = [replay(calls, setting, seed.machine.costs) for calls in traces]
        cells = [
            f"{result.hit_rate:.0%}, {predict(work_of(result), seed.machine).tokens_per_second:.1f}"
            for result in results
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    alone = cpu_only(work_of(replay(traces[0], Setting(seed.nblocks, seed.nways))), seed.machine).tokens_per_second
    return [*lines, f"| CPU alone | {' | '.join([f'{alone:.1f}'] * len(reuses))} |"]


def shape_of(text: str) -> Shape:
    """A name of SHAPES, or LAYERSxEXPERTSxTOPK."""
    words = text.split("x")
    if len(words) == 3 and all(word.isdecimal() for word in words):
        shape = Shape(*map(int, words))
        if 0 < shape.top_k <= shape.experts and shape.layers:
            return shape
    if text not in SHAPES:
        raise ConfigError(f"--model {text!r} is unknown; allowed: {', '.join(SHAPES)}, or LAYERSxEXPERTSxTOPK")
    return SHAPES[text]


def _write(options: argparse.Namespace) -> None:
    trace = made_up_trace(shape_of(options.model), options.reuse[0], options.sequences, options.tokens)
    with cache_errors("--write-trace"):
        write_trace(options.write_trace, trace)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2000, help="length of the made-up traces")
    parser.add_argument("--reuse", type=float, nargs="+", default=[0.4, 0.5, 0.6], help="shares of experts used again")
    parser.add_argument("--write-trace", type=Path, help="write made-up routing, of the first --reuse, to this file")
    parser.add_argument("--model", default="mixtral", help="its shape: a name, or LAYERSxEXPERTSxTOPK")
    parser.add_argument("--sequences", type=int, default=16, help="of the file, of --tokens each")
    options = parser.parse_args(arguments)
    with exit_codes():
        if options.write_trace:
            return _write(options)
        _print_tables(options)


def _print_tables(options: argparse.Namespace) -> None:
    for seed in SEEDS:
        machine = seed.machine
        print(
            f"{seed.name}, {seed.nblocks}x{seed.nways} slots: measured {seed.cache_speed} tokens/s with their cache, "
            f"{seed.cpu_speed} on the CPU alone ({machine.cpu_gbps:.0f} GB/s of experts); an expert is "
            f"{machine.expert_bytes / 1e6:.0f} MB, {machine.costs.copy * 1e3:.1f} ms to copy\n"
        )
        print("| placement | " + " | ".join(f"reuse {reuse:.0%}" for reuse in options.reuse) + " |")
        print("|---|" + "---:|" * len(options.reuse))
        print("\n".join(table(seed, options.reuse, options.tokens)), end="\n\n")


if __name__ == "__main__":
    main()
