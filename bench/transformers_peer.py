"""Times `transformers` in bf16 on a checkpoint, in a process of its own; compare.py runs it and reads its line of JSON.

Every test is tried with each way that transformers has to compute experts, and measured with the fastest.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import transformers
from comparison import parse_tests

import cpu_kernels
from hybrid.commands.measure import Test
from hybrid.machine.hardware import probe
from hybrid.machine.rates import PROBE_BYTES

GATHERING = "batched_mm"  # copies the experts of every row: gigabytes for a prompt
TRIES = 2  # the first one also maps pages
TRIAL_TOKENS = 4
WAYS = ("grouped_mm", "eager", GATHERING)


def main(arguments: list[str]) -> None:
    """Arguments: checkpoint, threads, repetitions, and names of tests."""
    path, threads, repetitions, *tests = arguments
    torch.set_num_threads(int(threads))
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    read = _reader(int(threads))
    seconds: dict[str, list[float]] = {}
    experts: dict[str, str] = {}
    bandwidths: list[float] = []
    with torch.inference_mode():
        parsed = {test.name: test for name in tests for test in parse_tests(name)}
        for name, test in parsed.items():
            ways = [way for way in WAYS if not (test.prompt and way == GATHERING)]
            trial = replace(test, generate=min(test.generate, TRIAL_TOKENS))
            tried = {way: min(_run(model, trial, way) for _ in range(TRIES)) for way in ways}
            experts[name], seconds[name] = min(tried, key=lambda way: tried[way]), []
        for _ in range(int(repetitions)):
            for name, test in parsed.items():
                bandwidths.append(read())
                seconds[name].append(_run(model, test, experts[name]))
    said = {
        "version": f"transformers {transformers.__version__} with torch {torch.__version__}",
        "seconds": seconds,
        "experts": experts,
        "read_gbps": round(statistics.median(bandwidths) / 1e9, 2),
    }
    print(json.dumps(said))


def _run(model: Any, test: Test, way: str) -> float:
    """Seconds of a prompt, or of decoding behind one token; a short run before it wakes threads and caches."""
    model.set_experts_implementation(way)
    cache = model(input_ids=_tokens(model, 1), use_cache=True).past_key_values
    start = time.perf_counter()
    if test.prompt:
        model(input_ids=_tokens(model, test.prompt), use_cache=True, logits_to_keep=1)
    for _ in range(test.generate):
        cache = model(input_ids=_tokens(model, 1), past_key_values=cache, use_cache=True).past_key_values
    return time.perf_counter() - start


def _tokens(model: Any, count: int) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (1, count))


def _reader(threads: int) -> Callable[[], float]:
    """Measures bytes a second as `hybrid.machine.rates.MachineProbe` does, without an engine."""
    hardware, memory = probe(), cpu_kernels.Arena(PROBE_BYTES, huge=True)
    cpus = [hardware.cpus] if threads <= len(hardware.cpus) else []
    pool = cpu_kernels.ThreadPool(threads, cpus)
    cpu_kernels.read_bandwidth(pool, hardware.isa, memory.address, PROBE_BYTES)  # maps the pages
    return lambda: float(cpu_kernels.read_bandwidth(pool, hardware.isa, memory.address, PROBE_BYTES))


if __name__ == "__main__":
    main(sys.argv[1:])
