"""The two systems of arXiv 2512.16473 in our cost model: predicted speed beside what they measured.

An RTX 4090 (PCIe 4.0 x16) beside 24 cores; bf16 experts; 14 x 4 slots for Mixtral 8x7B and 16 x 8 for Phi-3.5-MoE, in
the first layers only. Their traces are not published: routing is made up so that a token shares the stated part of its
experts with the token before it (they report 40 to 60 %), and is even otherwise. The CPU's rate is that of their own
CPU-only mode, so that it holds all that their CPU path costs.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import numpy as np

from gpu_cache.costs import Machine, cpu_only, predict
from gpu_cache.simulator import Setting, replay
from gpu_cache.trace import Calls

PCIE_GBPS, DEVICE_GBPS = 25.0, 1008.0  # PCIe 4.0 x16 as it is reached; GDDR6X of the RTX 4090
LAYERS, TOP_K, BYTES_PER_WEIGHT = 32, 2, 2


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
    """Routing of one sequence in which an expert of a token was one of the token before with probability `reuse`."""
    random = np.random.default_rng(seed)
    sticky = _kept_share(experts, reuse)
    chosen = np.empty((tokens, LAYERS, TOP_K), np.int64)
    chosen[0] = random.random((LAYERS, experts)).argsort(axis=1)[:, :TOP_K]
    for token in range(1, tokens):
        order = random.random((LAYERS, experts))
        kept = random.random((LAYERS, TOP_K)) < sticky
        np.put_along_axis(
            order, chosen[token - 1], np.where(kept, -1.0, np.take_along_axis(order, chosen[token - 1], 1)), 1
        )
        chosen[token] = order.argsort(axis=1)[:, :TOP_K]
    groups = np.arange(tokens * LAYERS)
    score = np.full(chosen.size, 1 / TOP_K, np.float32)
    start = TOP_K * np.arange(len(groups) + 1)
    return Calls(groups // LAYERS, groups % LAYERS, start, chosen.reshape(-1), score, LAYERS, experts)


def _kept_share(experts: int, reuse: float) -> float:
    """How often one of two experts must be kept so that, with what chance draws again, `reuse` of them are the same.

    Solves reuse = s * s + s * (1 - s) * (1 + 1 / (experts - 1)) + (1 - s) * (1 - s) * 2 / experts.
    """
    one, both = 1 / (experts - 1), 2 / experts
    a, b, c = both - one, 1 + one - 2 * both, both - reuse
    return (math.sqrt(b * b - 4 * a * c) - b) / (2 * a)


def table(seed: Seed, reuses: list[float], tokens: int) -> list[str]:
    """Rows of a markdown table: hits and tokens/s for each share of reuse."""
    traces = [made_up_calls(seed.experts, reuse, tokens) for reuse in reuses]
    lines = []
    for name, choice in PLACEMENTS.items():
        setting = Setting(seed.nblocks, seed.nways, delay=seed.delay, **choice)
        results = [replay(calls, setting, seed.machine.costs) for calls in traces]
        cells = [f"{result.hit_rate:.0%}, {predict(result, seed.machine).tokens_per_second:.1f}" for result in results]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    alone = cpu_only(replay(traces[0], Setting(seed.nblocks, seed.nways)), seed.machine).tokens_per_second
    return [*lines, f"| CPU alone | {' | '.join([f'{alone:.1f}'] * len(reuses))} |"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2000, help="length of the made-up traces")
    parser.add_argument("--reuse", type=float, nargs="+", default=[0.4, 0.5, 0.6], help="shares of experts used again")
    options = parser.parse_args()
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
