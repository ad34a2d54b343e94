"""Clients of every API that leave at any byte: what they leave behind, counted."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")

from dropped import WARM, count, drop, left_behind  # noqa: E402
from mixed import WHOLE, said, status  # noqa: E402
from server_rig import running  # noqa: E402

from hybrid import LLM  # noqa: E402


def test_connections_that_are_dropped_anywhere_leave_nothing() -> None:
    with running(LLM()) as server:
        drop(server, WARM, seed=1)
        before = count(server)
        pairs = drop(server, 120, seed=2)
        assert not left_behind(server, before)
        texts: dict[bytes, str] = {}
        for visit, answer in pairs:
            if visit.manner == WHOLE:
                assert status(answer) == 200 and said(answer) == texts.setdefault(visit.data, said(answer))
        assert len({visit.manner for visit, _ in pairs}) == 5 and any(texts.values())
