"""What an expert cache did in a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from hybrid.engine.experts.history import COUNTS
from hybrid.engine.experts.runtime import DeviceExperts
from hybrid.engine.experts.verdict import Verdict
from hybrid.machine.memory import size_text


@dataclass(frozen=True)
class CacheReport:
    """Hit rates are over all expert calls: every distinct expert that a layer calls in a step, including layers without
    slots.

    late_copies: experts called while their copy was in flight. repeatable: whether copies end by the count of
    layers, so that the hits do not depend on how fast they are. streamed: experts brought to the device for one
    layer of a prompt, which count as misses, in streamed_layers layers. miss_seconds: what the threads took for
    experts in steps with the device. modelled_seconds: what the figures of the device make of its hits. following:
    what `--cache auto` chose, None without.
    """

    geometry: str
    policy: str
    admission: str
    calls: int
    hits: int
    loading: int
    misses: int
    fills: int
    evictions: int
    hit_rate: float
    layer_hit_rates: tuple[float, ...]
    copied_bytes: int
    late_copies: int
    failed_copies: int
    streamed_layers: int
    streamed: int
    streamed_bytes: int
    miss_seconds: float
    lookup_seconds: float
    wait_seconds: float
    modelled_seconds: float
    repeatable: bool
    verdict: Verdict | None
    following: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def _load_note(self) -> str:
        if not self.late_copies or self.repeatable:
            return ""
        return "; copies came late, so it depends on the load of this machine: --cache-delay 0 repeats it"

    def __str__(self) -> str:
        layers = " ".join(f"{rate:.0%}"[:-1] for rate in self.layer_hit_rates)
        lines = [
            f"cache        {self.hit_rate:.1%} of {self.calls} expert calls hit ({self.geometry}, {self.policy}, "
            f"admission {self.admission})" + self._load_note,
            f"by layer     {layers} %",
            f"copies       {self.fills}, {size_text(self.copied_bytes)}, {self.late_copies} late"
            + (f", {self.failed_copies} failed" if self.failed_copies else ""),
            f"misses       {self.miss_seconds:.3f} s of the threads; lookups {self.lookup_seconds:.3f} s",
            f"verdict      {self.verdict or 'none: no step decoded'}",
        ]
        if self.streamed_layers:
            lines.insert(
                3,
                f"streamed     {self.streamed} experts of {self.streamed_layers} layers of prompts, "
                f"{size_text(self.streamed_bytes)}",
            )
        if self.following:
            lines.append(f"followed     {self.following}, from the end of the warm-up")
        return "\n".join(lines)


def report(experts: DeviceExperts) -> CacheReport:
    """What the cache did since the engine was opened."""
    counts, plan, times, device = experts.count(), experts.plan, experts.times, experts.device.times
    totals = dict(zip((*COUNTS, "fills"), map(int, counts.sum(axis=0)), strict=True))
    rates = counts[:, 1] / counts[:, 0].clip(1)
    geometry, settings = experts.geometry, plan.settings
    return CacheReport(
        geometry=f"{geometry.nblocks} x {geometry.nways} slots, {geometry.mapping}",
        policy=settings.policy,
        admission=settings.admission,
        hit_rate=totals["hits"] / max(1, totals["calls"]),
        layer_hit_rates=tuple(round(float(rate), 4) for rate in rates),
        copied_bytes=device.copied_bytes,
        late_copies=times.late_copies,
        failed_copies=device.failed_copies,
        streamed_layers=times.streamed_layers,
        streamed=device.streamed,
        streamed_bytes=device.streamed_bytes,
        miss_seconds=times.misses,
        lookup_seconds=times.lookup,
        wait_seconds=times.wait,
        modelled_seconds=totals["hits"] * experts.costs.device,
        repeatable=settings.delay is not None,
        verdict=experts.verdict(),
        following=experts.following,
        **totals,
    )
