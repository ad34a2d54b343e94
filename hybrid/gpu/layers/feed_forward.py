"""The feed-forward of a layer on a device: all but the experts that rows choose among."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hybrid.gpu.layers.base import Shared
from hybrid.gpu.loader import Loader
from hybrid.gpu.parts import GatedWeights, NormWeights, Routed, RouterWeights, gated, route, some_norm
from hybrid.models.layers.base import Place
from hybrid.models.layers.feed_forward import FeedForward


@dataclass(frozen=True)
class Weights:
    """norm: of what is read, if that is normed. dense: the whole feed-forward of a layer without a router, post_norm:
    of its result, if that is normed. shared: the expert that all rows share.
    """

    norm: NormWeights | None
    post_norm: NormWeights | None
    dense: GatedWeights | None
    shared: GatedWeights | None
    router: RouterWeights | None


def load(half: FeedForward, place: Place, load: Loader) -> Weights:
    at, size = f"layers.{place.layer}.ffn", half.intermediate
    return Weights(
        norm=load.norm(f"{at}.norm") if half.names.norm else None,
        post_norm=load.norm(f"{at}.post_norm") if half.names.post_norm else None,
        dense=None if half.is_moe else load.biased(load.gated(f"{at}.experts", size), at, size),
        shared=load.gated(f"{at}.shared", half.shared_intermediate) if half.shared_intermediate else None,
        router=_load_router(load, f"{at}.router") if half.is_moe else None,
    )


def _load_router(load: Loader, at: str) -> RouterWeights:
    return RouterWeights(load.floats(at), load.some_floats(f"{at}_bias"), load.some_floats(f"{at}_correction"))


def whole_shape(half: FeedForward) -> None:
    """None: a feed-forward has no attention."""


def open_half(half: FeedForward, place: Place, weights: Weights, shared: Shared) -> GatedFeedForward:
    return GatedFeedForward(half, place, weights, shared)


class GatedFeedForward:
    """A `DeviceFeedForward`."""

    def __init__(self, half: FeedForward, place: Place, weights: Weights, shared: Shared) -> None:
        self._half, self._eps, self._weights, self._choose = half, place.eps, weights, shared.choose

    def normed(self, residual: Tensor) -> Tensor:
        return some_norm(residual, self._weights.norm, self._eps)

    def dense(self, normed: Tensor) -> Tensor | None:
        dense, post_norm = self._weights.dense, self._weights.post_norm
        if dense is None:
            return None
        made = gated(normed.bfloat16(), dense, self._half.activation)
        return some_norm(made, post_norm, self._eps)

    def route(self, normed: Tensor) -> Routed:
        half, weights = self._half, self._weights
        assert half.router is not None and weights.router is not None
        return route(normed, weights.router, half.router, half.shared_gate, self._choose)

    @property
    def has_shared(self) -> bool:
        return self._weights.shared is not None

    def shared(self, normed: Tensor, routed: Routed) -> Tensor:
        assert self._weights.shared is not None
        made, weight = gated(normed.bfloat16(), self._weights.shared, self._half.activation), routed.shared
        return made if weight is None else made * weight[:, None]
