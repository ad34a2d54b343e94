"""How long 10 million expert calls take to replay: every policy, on geometries of known models, routing made up.

usage: python bench/replays.py [--calls 1000000] [--policy LRU,MRS] [--only 14x4] [--repeat 3]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace as changed

import numpy as np

from gpu_cache.policies import POLICIES
from gpu_cache.simulator import Setting, policy_names, replay
from gpu_cache.trace import Calls

REPORTED = 10_000_000
SHAPES = {  # MoE layers, experts, top-k
    "Qwen3-30B-A3B": (48, 128, 8),
    "Mixtral-8x7B": (32, 8, 2),
    "Phi-3.5-MoE": (32, 16, 2),
    "gpt-oss-20b": (24, 32, 4),
    "DeepSeek-V3": (58, 256, 8),
}
CASES = [
    ("Qwen3-30B-A3B", 48, 32, "modulo"),
    ("Qwen3-30B-A3B", 12, 128, "modulo"),
    ("Qwen3-30B-A3B", 1, 1500, "modulo"),
    ("Qwen3-30B-A3B", 48, 32, "hash"),
    ("Mixtral-8x7B", 14, 4, "modulo"),
    ("Mixtral-8x7B", 14, 4, "prefix"),
    ("Mixtral-8x7B", 1, 56, "modulo"),
    ("Phi-3.5-MoE", 16, 8, "modulo"),
    ("Phi-3.5-MoE", 32, 8, "modulo"),
    ("gpt-oss-20b", 24, 8, "modulo"),
    ("DeepSeek-V3", 58, 32, "modulo"),
]


def made_up_calls(layers: int, experts: int, top_k: int, total: int, reuse: float = 0.5, seed: int = 1) -> Calls:
    """One sequence that decodes: an expert is one of the token before with the chance `reuse`, else a skewed draw."""
    random = np.random.default_rng(seed)
    steps = total // (layers * top_k)
    liking = [random.permutation(experts) for _ in range(layers)]
    expert = np.empty((steps, layers, top_k), np.int64)
    for layer in range(layers):
        chance = 1 / (1 + np.arange(experts)) ** 0.8
        draws = np.log(chance)[None] - np.log(-np.log(random.random((steps, experts))))  # Gumbel: draws of a set
        kept: list[int] = []
        order = np.argsort(-draws, axis=1)[:, : 2 * top_k]
        stay = random.random((steps, top_k)) < reuse
        for step in range(steps):
            kept = [e for e, s in zip(kept, stay[step], strict=False) if s]
            for drawn in order[step].tolist():
                if len(kept) == top_k:
                    break
                if drawn not in kept:
                    kept.append(drawn)
            expert[step, layer] = liking[layer][kept]
    groups = steps * layers
    score = -np.sort(-random.random((groups, top_k)), axis=1).astype(np.float32)
    step, layer = np.divmod(np.arange(groups), layers)
    start = np.arange(groups + 1) * top_k
    return Calls(step, np.zeros_like(step), layer, start, expert.reshape(-1), score.reshape(-1), layers, experts)


def timed(calls: Calls, setting: Setting) -> tuple[float, float]:
    """Processor seconds of a replay, and its hit rate."""
    fresh = changed(calls)  # so that schedules work out the future each time: it is kept with the calls
    begin = time.process_time()
    result = replay(fresh, setting)
    return time.process_time() - begin, result.hit_rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--policy", default=",".join(POLICIES), help=f"some of {', '.join(policy_names())}")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each, of which the fastest is shown")
    parser.add_argument("--only", default="", help="part of a case, such as Mixtral or 14x4")
    options = parser.parse_args()
    policies = options.policy.split(",")
    print(f"| {'case':34} | hits |" + "".join(f" {policy} |" for policy in policies))
    print("|---|---:|" + "---:|" * len(policies))
    made: dict[str, Calls] = {}
    for model, nblocks, nways, mapping in CASES:
        name = f"{model} {nblocks}x{nways} {mapping}"
        if options.only not in name:
            continue
        calls = made.setdefault(model, made_up_calls(*SHAPES[model], options.calls))
        cells, rate = [], 0.0
        for policy in policies:
            runs = [timed(calls, Setting(nblocks, nways, policy, mapping=mapping)) for _ in range(options.repeat)]
            cells.append(min(seconds for seconds, _ in runs) * REPORTED / calls.total)
            rate = runs[0][1] if policy == "LRU" else rate
        print(f"| {name:34} | {rate:.0%} |" + "".join(f" {seconds:.1f} |" for seconds in cells), flush=True)


if __name__ == "__main__":
    main()
