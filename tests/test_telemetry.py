"""Spans of requests, as an exporter of OpenTelemetry gets them."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")

from server_rig import QUESTION, running, until  # noqa: E402

from hybrid import LLM  # noqa: E402
from hybrid.errors import ConfigError  # noqa: E402
from hybrid.server import telemetry as telemetry_module  # noqa: E402
from hybrid.server.telemetry import Telemetry  # noqa: E402

CHAT = "/v1/chat/completions"


def _requests(spans: Any) -> list[Any]:
    """Those that are no phases of others, as they began."""
    found = [span for span in spans if span.name not in ("queue", "prompt", "decode")]
    return sorted(found, key=lambda span: span.start_time)


def test_a_request_is_a_span_with_its_phases() -> None:
    trace = pytest.importorskip("opentelemetry.sdk.trace")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), trace.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    parent = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    with running(LLM(), telemetry=Telemetry(provider)) as server:
        body = {"messages": QUESTION, "max_tokens": 4, "ignore_eos": True}
        server.http.post(CHAT, json={**body, "n": 2}, headers=parent)
        server.events(CHAT, **body)
        server.http.post("/no/such/secret", headers={"traceparent": "00-zz-01"})
        server.post(CHAT, messages="wrong")
        until(lambda: len(_requests(exporter.get_finished_spans())) == 4)  # made once the reply was sent
        spans = exporter.get_finished_spans()
    requests = _requests(spans)
    assert [span.name for span in requests] == [f"POST {CHAT}", f"POST {CHAT}", "HTTP", f"POST {CHAT}"]
    assert [span.attributes["http.response.status_code"] for span in requests] == [200, 200, 404, 400]
    whole, stream, *_ = requests
    assert f"{whole.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert f"{whole.parent.span_id:016x}" == "b7ad6b7169203331" and requests[2].parent is None
    assert (whole.attributes["gen_ai.usage.output_tokens"], stream.attributes["gen_ai.usage.output_tokens"]) == (8, 4)
    assert "fox" not in str([span.to_json() for span in spans])
    for span in (whole, stream):
        phases = [one for one in spans if one.parent and one.parent.span_id == span.context.span_id]
        assert [phase.name for phase in phases] == ["queue", "prompt", "decode"]
        edges = [span.start_time, *(one.start_time for one in phases), phases[-1].end_time, span.end_time]
        assert edges == sorted(edges) and edges[2] < edges[3] < edges[4]
        assert all(one.end_time == other.start_time for one, other in zip(phases, phases[1:], strict=False))


def test_it_needs_its_packages_and_says_so(monkeypatch) -> None:
    for name in ("no_such_package", "no_such_package.inner"):
        monkeypatch.setattr(telemetry_module, "_NEEDED", name)
        with pytest.raises(ConfigError, match=r"--telemetry needs .*\[telemetry\]"):
            Telemetry.open()


def test_its_sdk_is_not_imported_without_being_asked_for() -> None:
    """FastAPI may import the API alone."""
    code = "import sys, hybrid.server.app, hybrid.server.process, hybrid.commands.serve; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "hybrid.server.telemetry" in modules
    assert not [name for name in modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))]


def test_it_is_sent_to_where_the_environment_says(monkeypatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    got = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        Thread(target=collector.handle_request, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        monkeypatch.setenv("OTEL_SERVICE_NAME", "the-team")
        with running(None, telemetry=Telemetry.open()) as server:
            server.http.get("/health")
    ((path, body),) = got
    assert path == "/v1/traces" and b"the-team" in body and b"GET /health" in body
