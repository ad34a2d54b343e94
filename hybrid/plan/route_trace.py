"""Experts that a recorded trace names, for rows of a run that take those instead of what the routers choose.

A checkpoint made of random numbers routes evenly and without memory, which no cache can use. With the routes of another
model it computes as much as before, and what its caches meet is what that model would ask of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hybrid.errors import ConfigError, cache_errors
from hybrid.models.spec import ModelSpec

if TYPE_CHECKING:
    from gpu_cache.trace import Trace

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class RouteTrace:
    """experts: int32 [MoE layers, positions, top_k] by rank; the positions of a sequence ascend, one sequence follows
    the other. start: int64 [sequences + 1], where among them each begins.
    """

    experts: Ints
    start: npt.NDArray[np.int64]

    @property
    def sequences(self) -> int:
        return len(self.start) - 1

    def routes(self, sequence: Ints, position: Ints) -> Ints:
        """int32 [MoE layers, rows, top_k] for rows of these sequences and positions, [rows] each. What goes beyond the
        sequences, or beyond the positions of one, begins anew with the first.
        """
        which = sequence % self.sequences
        first, end = self.start[which], self.start[which + 1]
        return self.experts.take(first + position % (end - first), axis=1)


def read_route_trace(path: Path, spec: ModelSpec) -> RouteTrace:
    """Of the trace's layers the model's number is taken. Its last reading is kept, for engines that are opened in turn.

    Raises ConfigError for a file that is no trace, or whose layers, ranks or experts are not what the model has.
    """
    moe = [spec.layers[index].feed_forward for index in spec.moe_layers]
    if not moe:
        raise ConfigError(f"--route-trace has nothing to route: model_type {spec.model_type!r} has no experts; drop it")
    top_k = max(ffn.router.top_k for ffn in moe if ffn.router)
    mark = (path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else None
    return _read(path, mark, len(moe), top_k, min(ffn.experts for ffn in moe))


@lru_cache(maxsize=1)
def _read(path: Path, mark: Any, layers: int, top_k: int, experts: int) -> RouteTrace:
    """mark: part of the key of the kept reading, which changes when the file does."""
    from hybrid.files.traces import read_trace

    with cache_errors("--route-trace"):
        trace = read_trace(path, flag="--route-trace")
    _check(f"--route-trace {path}", trace, layers, top_k, experts)
    return _arranged(f"--route-trace {path}", trace, layers, top_k)


def _check(name: str, trace: Trace, layers: int, top_k: int, experts: int) -> None:
    if trace.layers < layers:
        raise ConfigError(f"{name} has {trace.layers} MoE layers, the model {layers}; give a trace of as many or more")
    lowest, highest = int(trace.rank.min()), int(trace.rank.max())
    if (lowest, highest) != (0, top_k - 1):
        raise ConfigError(
            f"{name} has experts of ranks {lowest} to {highest} for a token, the model needs 0 to {top_k - 1}; "
            f"give a trace of a model that takes {top_k}"
        )
    largest = int(trace.expert[trace.layer < layers].max(initial=0))
    if largest >= experts:
        raise ConfigError(
            f"{name} names expert {largest}, the model has {experts} a layer; give a trace of at most so many"
        )


def _arranged(name: str, trace: Trace, layers: int, top_k: int) -> RouteTrace:
    """Of a token that was recorded twice the last is taken; one without all its layers and ranks, as the last ones of a
    run that was ended are, is left out.
    """
    used = trace.layer < layers
    sequences, sequence = np.unique(trace.sequence[used], return_inverse=True)
    positions, position = np.unique(trace.position[used], return_inverse=True)
    tokens, token = np.unique(sequence * len(positions) + position, return_inverse=True)
    experts = np.full((layers, len(tokens), top_k), -1, np.int32)
    experts[trace.layer[used], token, trace.rank[used]] = trace.expert[used]
    whole = (experts >= 0).all(axis=(0, 2))
    if not whole.any():
        raise ConfigError(f"{name} has no token with all of {layers} layers and {top_k} experts; record it again")
    experts = np.ascontiguousarray(experts[:, whole])
    _refuse_twins(name, experts)
    _, start = np.unique(tokens[whole] // len(positions), return_index=True)
    return RouteTrace(experts, np.append(start, experts.shape[1]))


def _refuse_twins(name: str, experts: Ints) -> None:
    """An expert computes a row once."""
    ordered = np.sort(experts, axis=2)
    twins = np.argwhere(ordered[..., 1:] == ordered[..., :-1])
    if len(twins):
        layer, token, rank = twins[0]
        raise ConfigError(
            f"{name} names expert {ordered[layer, token, rank]} twice for a token in layer {layer}; "
            "the experts of a token must differ: record it again"
        )
