"""What /metrics tells of several servers: what the front counts, and what each replica does, labelled by its name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector


class Figures:
    """Counters of a front."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._running = Gauge("hybrid_replicas", "Replicas that run.", registry=registry)
        self.refused = Counter("hybrid_front_refused", "Requests that no replica had room for.", registry=registry)
        self.limited = Counter("hybrid_front_limited", "Requests over the limits of their key.", registry=registry)
        self.lost = Counter("hybrid_front_lost", "Requests whose replica died.", registry=registry)
        self.moved = Counter("hybrid_front_moved", "Those that another replica was asked.", registry=registry)

    def text(self, replicas: Mapping[str, str]) -> bytes:
        """replicas: what each of them tells, by its name."""
        self._running.set(len(replicas))
        return generate_latest(self.registry) + generate_latest(_Labelled(replicas))


class _Labelled(Collector):
    """The metrics of several servers as those of one, each sample with the name of its server."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for name, text in sorted(self._texts.items()):
            for family in text_string_to_metric_families(text):
                merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                merged.samples += [
                    sample._replace(labels={"replica": name, **sample.labels}) for sample in family.samples
                ]
        yield from families.values()
