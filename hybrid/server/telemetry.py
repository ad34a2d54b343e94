"""Spans of requests for OpenTelemetry: one for each, and within it the wait in the queue, the prompt, and decoding.

They are made when a request has ended, from what was measured anyway; the SDK is imported with `--telemetry` alone.
"""

from __future__ import annotations

from importlib.util import find_spec
from time import perf_counter, time_ns
from typing import TYPE_CHECKING, Any

import hybrid
from hybrid.errors import ConfigError
from hybrid.printable import printable
from hybrid.server.exchange import Exchange

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_NEEDED = "opentelemetry.exporter.otlp.proto.http"
_PHASES = ("queue", "prompt", "decode")  # between the moments of an exchange
_CONTEXT = ("traceparent", "tracestate")  # headers by which a client says whose child the span is


class Telemetry:
    """Gives spans to a provider, which it owns."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("hybrid", hybrid.__version__)
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def open(cls) -> Telemetry:
        """Sends spans by OTLP, as the variables OTEL_... of the environment say. Raises ConfigError where a package is
        missing.
        """
        try:
            missing = find_spec(_NEEDED) is None
        except ModuleNotFoundError:  # what holds it is missing
            missing = True
        if missing:
            raise ConfigError("--telemetry needs OpenTelemetry, install it: pip install 'hybrid-moe[telemetry]'")
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        resource = Resource.create({"service.name": "hybrid"}).merge(OTELResourceDetector().detect())
        provider = TracerProvider(resource=resource)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return cls(provider)

    def note(self, exchange: Exchange) -> None:
        """A request has ended."""
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context

        now, zero = perf_counter(), time_ns()

        def at(moment: float) -> int:
            return zero - round(1e9 * (now - moment))

        carried = {name: exchange.headers.get(name.encode(), b"").decode("latin-1") for name in _CONTEXT}
        span = self._tracer.start_span(
            _name(exchange),
            self._propagator.extract(carried),
            SpanKind.SERVER,
            _attributes(exchange),
            start_time=at(exchange.begun),
        )
        inside = set_span_in_context(span)
        for phase, begin, end in zip(_PHASES, exchange.moments, exchange.moments[1:], strict=False):
            self._tracer.start_span(phase, inside, start_time=at(begin)).end(at(end))
        if exchange.status is None or exchange.status >= 500:
            span.set_status(StatusCode.ERROR)
        span.end(zero)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def _name(exchange: Exchange) -> str:
    """The endpoint; what a client invents is no name."""
    route = exchange.scope.get("route")
    method = exchange.scope["method"] if route else "HTTP"
    return f"{method} {route.path}" if route else method


def _attributes(exchange: Exchange) -> dict[str, Any]:
    known: dict[str, Any] = {
        "http.request.method": exchange.scope["method"],
        "url.path": printable(exchange.path)[:200],
        "hybrid.request_id": exchange.id,
    }
    if exchange.status is not None:
        known["http.response.status_code"] = exchange.status
    if exchange.tokens is not None:
        known["gen_ai.usage.input_tokens"], known["gen_ai.usage.output_tokens"] = exchange.tokens
    return known
