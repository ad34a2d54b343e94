"""Ranges for profilers: there with nvtx, and nothing without."""

from __future__ import annotations

from contextlib import contextmanager

from hybrid.machine import phases


class Nvtx:
    def __init__(self) -> None:
        self.inside: list[str] = []

    @contextmanager
    def annotate(self, name: str, domain: str):
        assert domain == "hybrid"
        self.inside.append(name)
        yield
        self.inside.append(f"end of {name}")


def method(number: int) -> int:
    return number + 1


def test_without_nvtx_a_method_stays_what_it_is(monkeypatch) -> None:
    monkeypatch.setattr(phases, "_NVTX", None)
    assert phases.phased("a")(method) is method
    with phases.phase("b"):
        pass


def test_with_nvtx_ranges_have_names(monkeypatch) -> None:
    nvtx = Nvtx()
    monkeypatch.setattr(phases, "_NVTX", nvtx)
    with phases.phase("outer"):
        assert phases.phased("inner")(method)(1) == 2
    assert nvtx.inside == ["outer", "inner", "end of inner", "end of outer"]
