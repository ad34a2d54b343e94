"""Times between the tokens of running streams, with and without a prompt that is read beside them.

    python bench/pace.py MODEL_DIR --format int8 --streams 16 --prompt 2048 --limits 0,none --json FILE

For every limit (`--max-itl-ms`; none is the default of the engine) streams decode alone for a while, then a prompt is
read beside them. The limits take turns in every round. What counts is the time of steps: a stream gets a token in each.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from hybrid.config import EngineConfig
from hybrid.core import SamplingParams
from hybrid.engine.engine import Engine
from hybrid.serving.request import Request
from hybrid.serving.scheduler import Scheduler


def request(engine: Engine, tokens: int, produced: int, seed: int) -> Request:
    prompt = np.random.default_rng(seed).integers(0, engine.spec.vocab, tokens).astype(np.int32)
    return Request(prompt, SamplingParams(max_tokens=produced, ignore_eos=True))


def timed(scheduler: Scheduler, done: Any, most: int) -> list[float]:
    """Seconds of each step until something is done, of `most` at most."""
    seconds: list[float] = []
    while len(seconds) < most and not done():
        start = perf_counter()
        scheduler.step()
        seconds.append(perf_counter() - start)
    return seconds


def one_round(engine: Engine, options: argparse.Namespace, limit: str, seed: int) -> dict[str, list[float]]:
    engine.plan = replace(engine.plan, max_itl=None if limit == "none" else float(limit) / 1000)
    scheduler = Scheduler(engine)
    streams = [request(engine, 16, 4000, seed + number) for number in range(options.streams)]
    scheduler.add(*streams)
    timed(scheduler, lambda: all(stream.pending == 1 for stream in streams), 100)
    timed(scheduler, lambda: False, 5)
    alone = timed(scheduler, lambda: False, options.alone)
    scheduler.add(prompt := request(engine, options.prompt, 2, seed - 1))
    beside = timed(scheduler, lambda: prompt.length > options.prompt, options.prompt + 1)
    for job in [*streams, prompt]:
        scheduler.cancel(job)
    return {"alone": alone, "beside": beside}


def summary(rounds: Sequence[dict[str, list[float]]], prompt: int) -> dict[str, Any]:
    alone, beside = (np.array([s for one in rounds for s in one[kind]]) * 1000 for kind in ("alone", "beside"))
    found: dict[str, Any] = {"steps_beside": len(beside)}
    for percent in (50, 90, 99):
        times = [float(np.percentile(steps, percent)) for steps in (alone, beside)]
        found[f"p{percent}_ms"] = [round(time, 1) for time in times]
        found[f"p{percent}_rises"] = round(times[1] / times[0] - 1, 3)
    found["prompt_seconds"] = round(float(np.median([sum(one["beside"]) for one in rounds])), 2)
    found["prompt_tokens_per_second"] = round(prompt / found["prompt_seconds"], 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--format", default="auto")
    parser.add_argument("--cache-dir", type=Path)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--alone", type=int, default=50, help="steps without the prompt")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--limits", default="0,none")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = EngineConfig(
        model_path=options.model, weight_format=options.format, cache_dir=options.cache_dir, speculate=False,
        max_batch=options.streams + 1, max_seq_len=8192,
    )  # fmt: skip
    rounds: dict[str, list[dict[str, list[float]]]] = {limit: [] for limit in options.limits.split(",")}
    with Engine.open(config) as engine:
        for number in range(options.rounds):
            for limit, found in rounds.items():
                found.append(one_round(engine, options, limit, 100 * number + 1))
                print(number, limit, summary(found, options.prompt), flush=True)
        told = {"model": options.model.name, "format": engine.plan.format_text, "threads": engine.plan.threads}
    told |= {"isa": engine.plan.isa, "streams": options.streams, "prompt": options.prompt, "rounds": options.rounds}
    told["limits"] = {limit: summary(found, options.prompt) for limit, found in rounds.items()}
    if options.json:
        options.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
