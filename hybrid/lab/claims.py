"""What others have published, held against what the traces here say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpu_cache.coverage import coverage
from gpu_cache.reuse import Reuse, measure_reuse
from hybrid.errors import cache_errors
from hybrid.lab.experiment import Experiment
from hybrid.lab.grid import ways_of
from hybrid.lab.outcomes import Outcome, Range, outcomes_of
from hybrid.lab.parts import LAYERS, Claim
from hybrid.lab.replays import Row, Source, kept_replays, read_sources


@dataclass(frozen=True)
class Finding:
    """A claim beside our figure for one model and one cache. place: the cache; range: of 95 %, None: none is known."""

    claim: Claim
    model: str
    place: str
    low: float
    high: float
    ours: float
    range: Range | None = None

    @property
    def holds(self) -> str:
        """yes, no, or unsure where it is a difference whose interval says neither."""
        low, high = self.low - self.claim.tolerance, self.high + self.claim.tolerance
        if self.claim.figure == "points" and self.range is not None:
            within = low <= self.range[0] and self.range[1] <= high
            return "yes" if within else "no" if self.range[1] < low or self.range[0] > high else "unsure"
        return "yes" if low <= self.ours <= high else "no"

    @property
    def published(self) -> str:
        return f"{self.low:g}" if self.low == self.high else f"{self.low:g} to {self.high:g}"


def findings(experiment: Experiment, sources: Sequence[Source], outcomes: Sequence[Outcome]) -> list[Finding]:
    """Every claim for every model that it is of. Raises ConfigError for traces that a figure cannot be had of."""
    found: list[Finding] = []
    for at, claim in enumerate(experiment.claims, 1):
        for model in experiment.models:
            if claim.is_of(model.name):
                of_model = [source for source in sources if source.model is model]
                with cache_errors(f"{experiment.path}: [[claims]] {at}, {model.name}:"):
                    if claim.nways:
                        found += _of_caches(claim, of_model[0], [one for one in outcomes if one.model == model.name])
                    else:
                        ours = float(np.mean([100 * OF_TRACES[claim.figure](claim, one) for one in of_model]))
                        found.append(_finding(claim, model.name, "", 0, ours))
    return found


def claims(experiment: Experiment, folder: Path | None = None) -> list[Finding]:
    """The same of what a run has kept in a folder, None: the experiment's. Raises ConfigError if some are missing."""
    sources = read_sources(experiment)
    return findings(experiment, sources, outcomes_of(kept_replays(experiment, sources, folder)))


def rows_of(found: Sequence[Finding]) -> list[Row]:
    """As a table of plain values."""
    return [
        {
            "model": one.model,
            "says": one.claim.says,
            "figure": one.claim.figure,
            "cache": one.place,
            "published_low": one.low,
            "published_high": one.high,
            "ours": round(one.ours, 3),
            "ours_low": None if one.range is None else round(one.range[0], 3),
            "ours_high": None if one.range is None else round(one.range[1], 3),
            "holds": one.holds,
            "source": one.claim.source,
            "explained": one.claim.explained,
        }
        for one in found
    ]


def _finding(claim: Claim, model: str, place: str, at: int, ours: float, range: Range | None = None) -> Finding:
    low = claim.published[at if len(claim.published) > 1 else 0]
    return Finding(claim, model, place, low, low if claim.to is None else claim.to, ours, range)


def _of_caches(claim: Claim, source: Source, outcomes: Sequence[Outcome]) -> Iterator[Finding]:
    nblocks = source.calls.layers if claim.nblocks == LAYERS else int(claim.nblocks)
    for at, ways in enumerate(claim.nways):
        shape = (nblocks, ways_of(ways, nblocks, source.calls), claim.mapping, None, 0)
        named = {one.policy: one for one in outcomes if one.place == shape and one.name == one.policy}
        one = named[str(claim.policy)]
        ours, range = OF_CACHES[claim.figure](one, named.get(str(claim.beside), one))
        yield _finding(claim, one.model, str(one.place), at, ours, range)


def _hits(one: Outcome, beside: Outcome) -> tuple[float, Range | None]:
    ends = one.hit_interval
    return 100 * one.hit_rate, None if ends is None else (100 * ends[0], 100 * ends[1])


def _points(one: Outcome, beside: Outcome) -> tuple[float, Range | None]:
    return one.points_beside(beside)


def _ratio(one: Outcome, beside: Outcome) -> tuple[float, Range | None]:
    return 100 * one.hit_rate / beside.hit_rate if beside.hit_rate else float("nan"), None


def _reuse(read: Callable[[Reuse], float]) -> Callable[[Claim, Source], float]:
    return lambda claim, source: read(measure_reuse(source.trace, 1))


OF_CACHES: Mapping[str, Callable[[Outcome, Outcome], tuple[float, Range | None]]] = {
    "hits": _hits,  # of all calls, in %
    "points": _points,  # hits of policy less those of beside
    "ratio": _ratio,  # hits of policy in % of those of beside
}
OF_TRACES: Mapping[str, Callable[[Claim, Source], float]] = {
    "same experts": _reuse(lambda reuse: float(reuse.tokens[0].mean())),  # that the token before chose
    "same sets": _reuse(
        lambda reuse: float(reuse.same_sets.mean())
    ),  # tokens whose experts are those of the one before
    "layer before": _reuse(lambda reuse: float(reuse.layers.mean())),  # numbers that the layer before chose
    "covered": lambda claim, source: coverage(source.calls, claim.share or 0.0),
    "covered later": lambda claim, source: coverage(source.calls, claim.share or 0.0, held_out=True),
}
