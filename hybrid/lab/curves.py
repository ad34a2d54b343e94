"""Hits of every size of a cache, for the report of an experiment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpu_cache.che import che_hit_rate
from gpu_cache.curves import CURVES, curve
from gpu_cache.geometry import Geometry
from gpu_cache.trace import Calls
from hybrid.errors import cache_errors
from hybrid.lab.experiment import Experiment
from hybrid.lab.grid import indexes_of
from hybrid.lab.parts import CHE, Curves, Model
from hybrid.lab.replays import Row, Source

Reals = NDArray[np.float64]
CURVE_POLICIES = (*CURVES, CHE)


@dataclass(frozen=True)
class SizeCurve:
    """hit_rate: [sizes], of all traces of a model, with 1, 2, ... ways in each index."""

    model: str
    policy: str
    nblocks: int
    mapping: str
    hit_rate: Reals


def size_curves(experiment: Experiment, model: Model, sources: Sequence[Source]) -> list[SizeCurve]:
    """Those that the file asks for. sources: of the model. Raises ConfigError for sizes that it cannot have."""
    found = []
    for at, wanted in enumerate(experiment.curves, 1):
        if wanted.models is None or model.name in wanted.models:
            with cache_errors(f"{experiment.path}: [[curves]] {at}, {model.name}:"):
                for nblocks in indexes_of(wanted.nblocks, sources[0].calls):
                    found += _curves(wanted, nblocks, model.name, sources)
    return found


def rows_of(curves: Sequence[SizeCurve]) -> list[Row]:
    """As a table of plain values, a row for each size."""
    return [
        {
            "model": one.model,
            "policy": one.policy,
            "nblocks": one.nblocks,
            "mapping": one.mapping,
            "nways": ways,
            "slots": one.nblocks * ways,
            "hit_rate": round(float(rate), 6),
        }
        for one in curves
        for ways, rate in enumerate(one.hit_rate, 1)
    ]


def _curves(wanted: Curves, nblocks: int, model: str, sources: Sequence[Source]) -> list[SizeCurve]:
    total = sum(source.calls.total for source in sources)
    found = []
    for policy in wanted.policies:
        hits = sum((hits_of_sizes(source.calls, policy, nblocks, wanted.mapping) for source in sources), np.zeros(1))
        found.append(SizeCurve(model, policy, nblocks, wanted.mapping, hits / total))
    return found


def hits_of_sizes(calls: Calls, policy: str, nblocks: int, mapping: str) -> Reals:
    """[sizes], with 1, 2, ... ways in each index. policy: of `CURVE_POLICIES`. Raises CacheError for no cache."""
    if policy != CHE:
        return curve(calls, policy, nblocks, mapping).hits[1:].astype(np.float64)
    Geometry(nblocks, 1, calls.layers, calls.experts, mapping)  # before anything is divided by it
    sizes = range(1, calls.layers * calls.experts // nblocks + 1)
    shapes = [Geometry(nblocks, ways, calls.layers, calls.experts, mapping) for ways in sizes]
    return calls.total * np.array([che_hit_rate(calls, shape) for shape in shapes])
