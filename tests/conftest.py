"""Tests see the machine as it is, whatever the shell says, and never touch the user's files. They run on its CPU if
they do not name a device.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy is imported: a worker has one core to itself
from rig import ISAS  # noqa: E402

for name in list(os.environ):
    if name == "OMP_NUM_THREADS" or (
        name.startswith("HYBRID_") and not name.startswith(("HYBRID_TEST_", "HYBRID_EMULATOR"))
    ):
        del os.environ[name]
os.environ["HYBRID_DEVICE"] = "cpu"  # that of processes which tests start, too
os.environ["HYBRID_SPECULATE"], os.environ["HYBRID_MAX_ITL_MS"] = "0", "0"  # steps that no clock decides
os.environ["HYBRID_BATCH_INVARIANT"] = "1"  # with AMX too: who shares a step depends on when requests come
_cache = tempfile.TemporaryDirectory(prefix="hybrid-tests-")
os.environ["XDG_CACHE_HOME"] = _cache.name
# Overrides what the shell asks for, or every process that tests start compiles all that it imports. It harms nobody:
# what is written lies in __pycache__, which git ignores, is made anew when a file changes, and is not missed where no
# one may write.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
    sys.dont_write_bytecode = False
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as that of what a shell starts in the background is
    signal.signal(signal.SIGINT, signal.default_int_handler)
if not os.path.exists("/dev/nvidiactl"):
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
settings.register_profile("any", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a machine may be busy
settings.load_profile("any")


def checked_descriptor(descriptor: int) -> None:
    """In place of os.fsync: tests write thousands of small stores, and no power fails between them."""
    os.fstat(descriptor)


os.fsync = checked_descriptor  # type: ignore[assignment]


# Files that take long for how few cases they have: they begin first, or one worker would have them alone at the end.
LONG = (
    *("test_older_cpus", "test_amx", "test_recorded", "test_dropped", "test_hybrid_steps", "test_damage"),
    *("test_engine", "test_formats_engine", "test_loop", "test_relief", "test_verify", "test_table", "test_fit"),
    *("test_cuda_steps", "test_preprocessor", "test_main", "test_server_life", "test_tokenizer_files", "test_cluster"),
    *("test_printable", "test_forks", "test_hub", "test_agent_tools", "test_plot", "test_telemetry", "test_pack"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`LONG` files first, then those of most cases: with --no-loadscope-reorder they begin in this order."""
    cases = Counter(item.path for item in items)
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: (places.get(item.path.stem, len(LONG)), -cases[item.path], str(item.path)))


@pytest.fixture(autouse=True)
def steps_without_clock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether guessed tokens pay, and how long steps may take, is measured: rows of steps must not depend on that."""
    if not request.node.get_closest_marker("by_clock"):
        monkeypatch.setattr("hybrid.serving.speculation.COUNTS", (0,))
        monkeypatch.setattr(
            "hybrid.serving.pace.Pace.prompt_rows", lambda self, decoding, room, pairs=0.0, depth=0: room
        )


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    """Every instruction set of this machine in turn."""
    return str(request.param)


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    """A server of the embedded model, `server_rig.Running`."""
    from server_rig import running

    from hybrid import LLM

    with running(LLM()) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[Any]:
    """OpenAI's client of a server."""
    from openai import OpenAI

    with OpenAI(base_url=f"{server.address}/v1", api_key="any", max_retries=0) as client:
        yield client
