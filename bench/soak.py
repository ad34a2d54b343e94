"""Hours of mixed load on a server of its own, and whether it grows: memory, threads, descriptors, processes.

usage: python bench/soak.py --minutes 60 [--output results.json] [-- flags of hybrid serve]

The load is that of bench/mixed.py: clients of every API, of whom half leave somewhere. Greedy answers must be the same
at all times. Growth is what the last third of the time has more than the third before it; then the exit code is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
from mixed import WHOLE, go_through, said, status, visits

from hybrid.commands.tables import markdown

PART = 40  # visits between two looks at the clock
LINES = 50  # of what the server writes, the last of which are told where something is wrong
MOST = {"resident_mb": 16.0, "threads": 0.5, "files": 0.5, "processes": 0.5}  # more than this is growth


@dataclass
class Sample:
    """Of the server's process, while connections come and go; processes: with what it has started."""

    seconds: float
    resident_mb: float
    threads: int
    files: int
    processes: int

    @classmethod
    def of(cls, process: int, seconds: float) -> Sample:
        folder = Path(f"/proc/{process}")
        pages = int((folder / "statm").read_text().split()[1])
        children = [one.read_text().split() for one in folder.glob("task/*/children")]
        threads, files = len(list((folder / "task").iterdir())), len(list((folder / "fd").iterdir()))
        return cls(seconds, pages * os.sysconf("SC_PAGE_SIZE") / 1e6, threads, files, 1 + sum(map(len, children)))


@dataclass
class Soak:
    """What became of the load so far. differing: answers that were not those of the first time. ended: why the server
    was there no more before the time was over; else empty.
    """

    samples: list[Sample] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)
    differing: int = 0
    texts: dict[bytes, str] = field(default_factory=dict)
    ended: str = ""

    async def run(self, address: tuple[str, int], process: int, model: str, options: argparse.Namespace) -> None:
        """Until the time is over, or the server has ended."""
        try:
            await self.load(address, process, model, options)
        except OSError as error:  # no connection, or no process
            self.ended = f"the server has ended: {error}"

    async def load(self, address: tuple[str, int], process: int, model: str, options: argparse.Namespace) -> None:
        chosen, begun = visits(options.seed, options.whole, model), time.monotonic()
        pauses = random.Random(options.seed)
        while time.monotonic() - begun < options.minutes * 60:
            some = list(islice(chosen, PART))
            for visit, answer in zip(some, await go_through(address, some, options.at_once), strict=True):
                code = status(answer)
                self.answers[f"{visit.manner} {code or 'no answer'}"] += 1
                if visit.manner == WHOLE and code == 200:
                    self.differing += said(answer) != self.texts.setdefault(visit.data, said(answer))
            await asyncio.sleep(pauses.random() * options.pause)
            self.samples.append(Sample.of(process, time.monotonic() - begun))

    def growth(self) -> dict[str, float]:
        """By which the median of the last third is above that of the third before it."""
        if not self.samples:
            return dict.fromkeys(MOST, 0.0)
        third = max(1, len(self.samples) // 3)
        before, last = self.samples[-2 * third : -third] or self.samples[:1], self.samples[-third:]
        return {name: _median(last, name) - _median(before, name) for name in MOST}

    def wrong(self) -> list[str]:
        """What should not be, each as a line."""
        found = [self.ended] * bool(self.ended)
        found += [f"{name} grew by {more:.1f}" for name, more in self.growth().items() if more > MOST[name]]
        failed = {name: count for name, count in self.answers.items() if name.startswith(WHOLE) and name != "whole 200"}
        found += [f"{count} answers: {name}" for name, count in failed.items()]
        return found + [f"{self.differing} greedy answers differ from the first"] * bool(self.differing)


def _median(samples: Sequence[Sample], name: str) -> float:
    return statistics.median(getattr(sample, name) for sample in samples)


def table(samples: Sequence[Sample]) -> str:
    """Ten moments of the whole time."""
    some = [*samples[:: max(1, len(samples) // 9)][:9], *samples[-1:]]
    rows = [[f"{one.seconds / 60:.1f}", f"{one.resident_mb:.0f}", str(one.threads), str(one.files), str(one.processes)]
            for one in some]  # fmt: skip
    return "\n".join(markdown(("minute", "resident MB", "threads", "files", "processes"), rows, [False] * 5))


def start(flags: Sequence[str]) -> tuple[subprocess.Popen[str], str, deque[str]]:
    """A server at a free port, its address once it is ready, and the last lines that it writes from then on."""
    command = [sys.executable, "-m", "hybrid.serve", "--port", "0", "--log", "none", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    lines = iter(process.stderr or ())
    for line in lines:
        if line.startswith("ready at "):
            last = deque[str](maxlen=LINES)
            Thread(target=last.extend, args=(lines,), daemon=True).start()  # it must not wait for a reader
            return process, line.split()[2].rstrip(";"), last
    raise SystemExit("the server has ended")


def run(options: argparse.Namespace) -> dict[str, Any]:
    process, address, last = start(options.flags)
    try:
        url = httpx.URL(address)
        model = httpx.get(f"{address}/v1/models").json()["data"][0]["id"]
        soak = Soak()
        asyncio.run(soak.run((url.host, url.port or 80), process.pid, model, options))
        ready = "" if soak.ended else httpx.get(f"{address}/ready").json()
    finally:
        process.terminate()
        process.wait(120)
    print(table(soak.samples))
    count, minutes = sum(soak.answers.values()), soak.samples[-1].seconds / 60 if soak.samples else 0.0
    print(f"{count} connections in {minutes:.1f} minutes; at the end {ready or soak.ended}")
    return {
        "minutes": minutes, "answers": dict(soak.answers), "growth": soak.growth(),
        "wrong": soak.wrong(), "said": [*last], "samples": [asdict(sample) for sample in soak.samples],
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=60.0, help="(60)")
    add("--at-once", type=int, default=12, help="connections (12)")
    add("--whole", type=float, default=0.5, help="share of those that wait for their answers (0.5)")
    add("--pause", type=float, default=0.5, help="seconds between bursts at most (0.5)")
    add("--seed", type=int, default=1, help="(1)")
    add("--output", type=Path, help="the samples as JSON, too")
    add("flags", nargs="*", help="of hybrid serve, behind --")
    options = parser.parse_args(arguments)
    found = run(options)
    for line in found["wrong"]:
        print(line)
    if found["wrong"]:
        print("the server wrote last:", *map(str.rstrip, found["said"]), sep="\n")
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")
    if found["wrong"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
