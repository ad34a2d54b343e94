"""Decoding on cores that other programs use: alone, beside one of them, beside one a core, beside a second model.

    python bench/shared_cores.py [--against TREE] [--threads 1,2] [--model-path DIR] [--rounds 7] [--seconds 2]
                                 [--output FILE]

TREE: another checkout of this project with its extension built, measured in turn with this one. Every round measures
each scene with each tree and number of threads, so that all meet the same minutes. A share is that of the tokens in
the round's idle scene with the same tree and threads; two models count together. `busy` is how much of the cores the
programs took that belong neither to the scene nor to us: rounds in which it is high say little about an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
SPIN = "while True: pass"
PROMPT, TOKENS = [1, 2, 3, 4], 64  # of a request; a model of random weights has no tokenizer
CORES = len(os.sched_getaffinity(0))
SCENES = {
    "idle": (0, 1),
    "one competitor": (1, 1),
    "one a core": (CORES, 1),
    "two models": (0, 2),
}  # competitors, models


@dataclass(frozen=True)
class Contender:
    tree: Path
    threads: int


class Model:
    """A process of its own with a model open, that decodes when it is told."""

    def __init__(self, contender: Contender, model_path: str) -> None:
        command = [sys.executable, __file__, "--serve", "--threads", str(contender.threads), "--model-path", model_path]
        paths = {**os.environ, "PYTHONPATH": str(contender.tree)}
        self._process = subprocess.Popen(
            command, cwd=contender.tree, env=paths, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def start(self, seconds: float) -> None:
        assert self._process.stdin
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()

    def result(self) -> dict[str, float]:
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> Any:
        assert self._process.stdout
        return json.loads(self._process.stdout.readline())


def serve(threads: int, model_path: str) -> None:
    """The other side of `Model`."""
    from hybrid import LLM, SamplingParams

    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    with LLM(model_path or None, threads=threads) as llm:
        llm.generate([PROMPT], params)
        print("{}", flush=True)
        for line in sys.stdin:
            used, start, tokens = _cpu_seconds(), time.perf_counter(), 0
            while time.perf_counter() - start < float(line):
                llm.generate([PROMPT], params)
                tokens += TOKENS
            wall = time.perf_counter() - start
            answer = {"tokens_per_second": tokens / wall, "cpu": (_cpu_seconds() - used) / wall}
            print(json.dumps(answer), flush=True)


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@contextmanager
def competitors(count: int) -> Iterator[None]:
    """Programs that compute all the time."""
    running = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(count)]
    try:
        time.sleep(0.2 * bool(count))
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def measure(models: list[Model], count: int, seconds: float) -> dict[str, float]:
    with competitors(count):
        busy, start = _machine_seconds(), time.perf_counter()
        for model in models:
            model.start(seconds)
        results = [model.result() for model in models]
        wall = time.perf_counter() - start
        cpu = sum(result["cpu"] for result in results)
        all_busy = (_machine_seconds() - busy) / wall
    speeds = [result["tokens_per_second"] for result in results]
    # What we and the competitors leave of a full machine is idle, or taken by others: a guess where cores are full.
    others = max(0.0, all_busy - cpu - count) if count < CORES else float("nan")
    return {"tokens_per_second": sum(speeds), "least": min(speeds), "cpu": cpu, "busy": others}


def _machine_seconds() -> float:
    """Of all processors, in which something ran."""
    numbers = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(numbers) - numbers[3] - numbers[4]) / os.sysconf("SC_CLK_TCK")


def run(contenders: list[Contender], model_path: str, rounds: int, seconds: float) -> list[dict[str, Any]]:
    models = {contender: [Model(contender, model_path) for _ in range(2)] for contender in contenders}
    found: dict[tuple[Contender, str], list[dict[str, float]]] = {}
    for round_ in range(rounds):
        for scene, (count, together) in SCENES.items():
            for contender in contenders if round_ % 2 else contenders[::-1]:
                used = models[contender][:together]
                found.setdefault((contender, scene), []).append(measure(used, count, seconds))
        print(f"round {round_ + 1} of {rounds}", file=sys.stderr, flush=True)
    for pair in models.values():
        for model in pair:
            model.close()
    return [_row(contender, scene, samples, found[contender, "idle"]) for (contender, scene), samples in found.items()]


def _row(contender: Contender, scene: str, samples: list[dict[str, float]], idle: list[dict[str, float]]) -> Any:
    shares = [s["tokens_per_second"] / i["tokens_per_second"] for s, i in zip(samples, idle, strict=True)]
    medians = {name: round(statistics.median(s[name] for s in samples), 3) for name in samples[0]}
    speeds = [round(s["tokens_per_second"], 1) for s in samples]
    which = {"tree": str(contender.tree), "threads": contender.threads, "scene": scene}
    return {**which, **medians, "share": round(statistics.median(shares), 3), "samples": speeds}


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), "unknown")
    return {"cpu": cpu, "cores": CORES, "kernel": platform.release(), "load": os.getloadavg()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, action="append", default=[])
    parser.add_argument("--threads", default=str(CORES))
    parser.add_argument("--model-path", default="")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    threads = [int(word) for word in given.threads.split(",")]
    if given.serve:
        return serve(threads[0], given.model_path)
    contenders = [Contender(tree.resolve(), count) for tree in (HERE, *given.against) for count in threads]
    about = machine()
    rows = run(contenders, given.model_path, given.rounds, given.seconds)
    print(f"{'tree':<28}{'threads':>8}  {'scene':<16}{'tokens/s':>10}{'least':>9}{'share':>8}{'cpu':>7}{'busy':>7}")
    for row in rows:
        print(
            f"{row['tree'][-26:]:<28}{row['threads']:>8}  {row['scene']:<16}{row['tokens_per_second']:>10.1f}"
            f"{row['least']:>9.1f}{row['share']:>8.3f}{row['cpu']:>7.2f}{row['busy']:>7.2f}"
        )
    if given.output:
        about |= {"rounds": given.rounds, "seconds": given.seconds, "model": given.model_path or "embedded"}
        given.output.write_text(json.dumps({"machine": about, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
