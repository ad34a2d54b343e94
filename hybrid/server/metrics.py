"""What /metrics tells, in the form of Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from hybrid.core import Completion
from hybrid.serving.pool import PoolReport
from hybrid.serving.scheduler import StepRecord

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """Counters of one server. The engine's thread counts steps, the event loop counts requests."""

    def __init__(
        self,
        running: Callable[[], int],
        waiting: Callable[[], int],
        ready: Callable[[], bool],
        prefixes: Callable[[], PoolReport | None],
    ) -> None:
        self.registry = registry = CollectorRegistry()
        _gauge(registry, "hybrid_requests_running", "Completions that have a sequence.", running)
        _gauge(registry, "hybrid_requests_waiting", "Completions that wait for one.", waiting)
        _gauge(registry, "hybrid_ready", "1 when requests are taken.", ready)
        _of_pool(registry, "hybrid_prefix_bytes", "Of prompts kept beyond the sequences.", "bytes", prefixes)
        _of_pool(registry, "hybrid_prefix_tokens", "Tokens of these prompts.", "tokens", prefixes)
        self._hits = Counter("hybrid_prefix_hits", "Completions whose prompt was begun already.", registry=registry)
        self._finished = Counter("hybrid_requests", "Completions that ended.", ["reason"], registry=registry)
        self.refused = Counter("hybrid_requests_refused", "Requests that found the queue full.", registry=registry)
        self.limited = Counter("hybrid_requests_limited", "Requests over the limits of their key.", registry=registry)
        self.failed = Counter("hybrid_failed_steps", "Requests that a failed step ended.", registry=registry)
        self.reopened = Counter("hybrid_engine_reopened", "Times that the engine was opened anew.", registry=registry)
        self._prompt = Counter("hybrid_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._cached = Counter("hybrid_cached_prompt_tokens", "Those computed before.", registry=registry)
        self._generated = Counter("hybrid_generation_tokens", "Tokens produced.", registry=registry)
        self._queue = _histogram(registry, "hybrid_request_queue_time_seconds", "Before the prompt is begun.")
        self._first = _histogram(registry, "hybrid_time_to_first_token_seconds", "To the first token.")
        self._whole = _histogram(registry, "hybrid_e2e_request_latency_seconds", "To the last token.")
        self._each = Histogram(
            "hybrid_time_per_output_token_seconds",
            "Between tokens, the mean of a completion.",
            buckets=_PER_TOKEN,
            registry=registry,
        )
        self._between = Histogram(
            "hybrid_inter_token_latency_seconds",
            "Steps, for each token of a stream.",
            buckets=_PER_TOKEN,
            registry=registry,
        )
        self._steps = Counter("hybrid_steps", "Steps of the engine.", registry=registry)
        self._step_seconds = Counter("hybrid_step_seconds", "Seconds in steps.", registry=registry)
        self._engine_seconds = Counter("hybrid_engine_seconds", "Of these, those in kernels.", registry=registry)
        self._rows = Counter("hybrid_step_rows", "Rows that steps computed.", ["kind"], registry=registry)
        self._guesses = Counter("hybrid_guessed_tokens", "Guessed tokens computed.", ["came_true"], registry=registry)
        self._preempted = Counter("hybrid_num_preemptions", "Sequences given up for want of memory.", registry=registry)
        self._experts = {
            name: Counter(f"hybrid_expert_cache_{name}", f"Experts: {name}.", ["layer"], registry=registry)
            for name in ("hits", "misses", "evictions")
        }
        self.steps = self.expert_hits = self.expert_misses = self.prompt_rows = self.decode_rows = 0

    def on_step(self, record: StepRecord) -> None:
        """An observer of steps, on the engine's thread."""
        self._steps.inc()
        self.steps += 1
        self._step_seconds.inc(record.seconds)
        self._engine_seconds.inc(record.times.total - record.times.sampling)
        for _ in range(record.decode_rows):
            self._between.observe(record.seconds)
        self._rows.labels("prompt").inc(record.prompt_rows)
        self._rows.labels("decode").inc(record.decode_rows)
        self._guesses.labels("yes").inc(record.right)
        self._guesses.labels("no").inc(record.guessed - record.right)
        self.prompt_rows += record.prompt_rows
        self.decode_rows += record.decode_rows
        self._preempted.inc(record.preempted)
        if record.cache is None:
            return
        _, hits, _, misses, evictions = record.cache.T.tolist()
        self.expert_hits += sum(hits)
        self.expert_misses += sum(misses)
        for name, counts in (("hits", hits), ("misses", misses), ("evictions", evictions)):
            for layer, count in enumerate(counts):
                self._experts[name].labels(layer).inc(count)

    def on_end(self, completions: Sequence[Completion]) -> None:
        """Whatever way they ended."""
        for completion in completions:
            usage, times = completion.usage, completion.times
            self._finished.labels(completion.finish_reason or "cancelled").inc()
            self._prompt.inc(usage.prompt_tokens)
            self._cached.inc(usage.cached_tokens)
            self._hits.inc(usage.cached_tokens > 0)
            self._generated.inc(usage.completion_tokens)
            if times.started is not None:
                self._queue.observe(times.started)
            if times.first_token is None:
                continue
            self._first.observe(times.first_token)
            if times.finished is not None:
                self._whole.observe(times.finished)
                if usage.completion_tokens > 1:
                    self._each.observe((times.finished - times.first_token) / (usage.completion_tokens - 1))

    def text(self) -> bytes:
        return generate_latest(self.registry)


def _gauge(registry: CollectorRegistry, name: str, help: str, value: Callable[[], int]) -> None:
    Gauge(name, help, registry=registry).set_function(lambda: float(value()))


def _of_pool(
    registry: CollectorRegistry, name: str, help: str, field: str, prefixes: Callable[[], PoolReport | None]
) -> None:
    """A field of the report of the pool; 0 while there is none."""
    _gauge(registry, name, help, lambda: getattr(prefixes(), field, 0))


def _histogram(registry: CollectorRegistry, name: str, help: str) -> Histogram:
    return Histogram(name, help, buckets=_SECONDS, registry=registry)
