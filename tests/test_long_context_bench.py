"""bench/long_context.py: the lengths that it measures, the line through them, and the figure."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from hybrid.errors import KernelError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def program(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    spec = importlib.util.spec_from_file_location("long_context", ROOT / "bench/long_context.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "long_context", module)
    spec.loader.exec_module(module)
    return module


def test_lengths_double_up_to_the_longest(program) -> None:
    assert program.lengths_up_to(5000) == [1024, 2048, 4096, 5000]
    assert program.lengths_up_to(4096) == [1024, 2048, 4096]


def test_the_line_is_that_of_least_squares(program) -> None:
    found = program.fitted([1000, 2000, 4000], [2.5, 3.0, 4.0])
    assert found == {"milliseconds_per_1000_tokens": 0.5, "start_milliseconds": 2.0, "r_squared": 1.0}
    assert program.fitted([1000, 2000, 4000], [2.5, 4.0, 4.0])["r_squared"] < 0.9


def test_logits_that_are_not_finite_end_it(program, monkeypatch) -> None:
    monkeypatch.setattr(program, "decode_steps", lambda *which: np.array([[0.5, np.nan]], np.float32))
    with pytest.raises(KernelError, match="behind 4096 tokens are not finite"):
        program._repeat(None, None, program.Length(4096), 1)


def test_the_recorded_million_is_linear_and_drawn_with_units(program) -> None:
    report = json.loads((ROOT / "bench/results/2026-11-29-long-context.json").read_text())
    points = report["lengths"]
    assert points[-1]["tokens"] == 1_000_000 and report["fit"]["r_squared"] > 0.99
    assert report["fit"] == program.fitted(*zip(*((p["tokens"], p["milliseconds"]) for p in points), strict=True))
    (axes,) = program.draw(report).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("tokens in the context", "time of a decoded token, ms")
    assert [len(line.get_xdata()) for line in axes.lines] == [len(points)] * 3
