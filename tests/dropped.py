"""Opens and drops connections to a server of the embedded model, and counts what they leave behind.

usage: python tests/dropped.py [CONNECTIONS [SEED]]
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

from mixed import Visit, go_through, visits  # noqa: E402
from server_rig import Running, running, until  # noqa: E402

from hybrid import LLM  # noqa: E402

AT_ONCE = 12
PART = 250  # connections between two counts
TRIES = 20
WARM = 60  # connections before anything is counted: pools of threads, caches of modules


# Of the collector's objects those that a request may have.
MODULES = {
    "hybrid", "asyncio", "_asyncio", "uvicorn", "starlette", "fastapi", "pydantic", "h11", "httptools", "socket",
    "_socket", "threading", "_thread", "concurrent", "queue", "_queue", "multiprocessing", "subprocess",
}  # fmt: skip
BUILTIN = ("coroutine", "generator", "async_generator", "traceback", "frame")
# asyncio forgets cancelled timers only later; what steps of each size take is learnt, and there are few sizes.
OTHERS = ("asyncio.events.TimerHandle", "hybrid.serving.step_seconds._Mean")


def count(server: Running) -> Counter[str]:
    """What there is by its name, once nothing runs and what is kept of prompts is forgotten."""
    service, state = server.service, server.process.server_state
    until(lambda: not (service.taken or service._runs or service._attempts or state.connections or state.tasks))
    llm = service.llm.llm
    llm.forget()
    scheduler = llm.loop._worker.scheduler
    found = Counter(
        {
            "sequences": llm.run(lambda: len(scheduler.kept_lengths) + scheduler.running_tokens + scheduler.has_work),
            "prompts": scheduler.prefix_report.nodes,
            "threads": threading.active_count(),
            "processes": sum(len(one.read_text().split()) for one in Path("/proc/self/task").glob("*/children")),
            "files": len(os.listdir("/proc/self/fd")),
        }
    )
    for _ in range(2):  # what finalizers let go of
        gc.collect()
    for one in collected_types():
        name = f"{one.__module__}.{one.__qualname__}"
        if name not in OTHERS and (str(one.__module__).partition(".")[0] in MODULES or one.__qualname__ in BUILTIN):
            found[name] += 1
    return found


def collected_types() -> list[type]:
    """The type of each object that the collector knows, listed in one call of C, which no other thread interrupts.

    While a list of the objects lives, it holds also the tuple that another thread has half filled from a generator:
    were that thread to go on meanwhile, it would fail with "SystemError: bad argument to internal function".
    """
    return list(map(type, chain.from_iterable(map(gc.get_objects, [None]))))


def left_behind(server: Running, before: Counter[str]) -> Counter[str]:
    """What there is more of than before, and stays."""
    for _ in range(TRIES):
        if not (left := count(server) - before):
            break
        time.sleep(0.05)
    return left


def resident() -> int:
    """Bytes of memory, without what is free."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def drop(server: Running, connections: int, seed: int) -> list[tuple[Visit, bytes]]:
    """One in ten waits for its answer; the others leave."""
    chosen = list(islice(visits(seed, 0.1, "tiny"), connections))
    answers = asyncio.run(go_through(("127.0.0.1", server.port), chosen, AT_ONCE))
    return list(zip(chosen, answers, strict=True))


def main() -> None:
    connections, seed = map(int, [*sys.argv[1:], "1000", "1"][:2] if len(sys.argv) != 2 else [sys.argv[1], "1"])
    with running(LLM()) as server:
        drop(server, WARM, seed)
        before, memory = count(server), resident()
        for done in range(0, connections, PART):
            drop(server, min(PART, connections - done), seed + 1 + done)
            left, grown = left_behind(server, before), (resident() - memory) / 1e6
            gone = min(done + PART, connections)
            print(f"{gone} connections: {grown:+.1f} MB resident; left behind: {dict(left) or 'nothing'}")


if __name__ == "__main__":
    main()
