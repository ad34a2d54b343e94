"""What the tests of the engine's thread share: an LLM on a gated engine, and threads that call it."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from dummy_engine import WATCHDOG, GatedEngine

from hybrid import LLM, SamplingParams

FOUR = SamplingParams(max_tokens=4)


@pytest.fixture(name="engine")
def engine_fixture() -> GatedEngine:
    return GatedEngine()


@pytest.fixture(name="llm")
def llm_fixture(engine: GatedEngine):
    """Closing it ends whatever still waits for the gate."""
    with LLM.from_engine(engine) as opened:
        yield opened


@pytest.fixture(name="callers")
def callers_fixture():
    """Threads to call the LLM from."""
    with ThreadPoolExecutor(8) as pool:
        yield pool


def tokens(llm: LLM, prompt: list[int], params: SamplingParams = FOUR) -> list[int]:
    return llm.generate(prompt, params)[0].token_ids


def settle(llm: LLM) -> None:
    """Until the thread has done what it was asked for."""
    llm.run(lambda: None)


def in_time(future):
    return future.result(WATCHDOG)


def settle_steps(engine: GatedEngine, steps: int) -> None:
    for _ in range(steps):
        engine.rows()


def run_script(script: str) -> subprocess.CompletedProcess:
    """In a process of its own, on the embedded model."""
    pytest.importorskip("cpu_kernels", exc_type=ImportError)
    head = "import os, sys, threading\nfrom hybrid import LLM, SamplingParams as S\nllm = LLM(threads=2)\n"
    return subprocess.run(
        [sys.executable, "-c", head + script], capture_output=True, text=True, timeout=WATCHDOG, check=False
    )
