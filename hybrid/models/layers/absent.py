"""The half that a layer lacks, of models whose layers have a mixer or a feed-forward alone: nothing at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from hybrid.formats.mix import FormatMix
from hybrid.models.layers.base import Cost, DeviceNeeds, Extents, Load, Place, StateLayout
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.rope import RopeSpec
from hybrid.models.tensors import ExpertForm, Shapes, Shard, StoreTensor
from hybrid.ops import Op


class _Absent:
    """A half without tensors, ops or buffers."""

    @property
    def rope(self) -> RopeSpec | None:
        return None

    def checkpoint_shapes(self, place: Place, form: ExpertForm) -> Shapes:
        return iter(())

    def store_tensors(self, place: Place, shard: Shard) -> Iterator[StoreTensor]:
        return iter(())

    def formats(self, mix: FormatMix) -> tuple[str, ...]:
        return ()

    def first_ops(self, place: Place) -> Iterator[Op]:
        return iter(())

    def ops(self, place: Place) -> Iterator[Op]:
        return iter(())

    def buffers(self, place: Place, extents: Extents) -> dict[str, int]:
        return {}

    def constants(self, place: Place) -> dict[str, npt.NDArray[np.float32]]:
        return {}

    def cost(self, place: Place, load: Load) -> Cost:
        return Cost()

    def device_needs(self, place: Place) -> DeviceNeeds | None:
        return DeviceNeeds(weights=0, token=0, row_floats=0, scores=0)

    def device_ops(self, ops: Sequence[Op]) -> Iterator[Op]:
        return iter(())

    def device_buffers(self, place: Place, extents: Extents) -> dict[str, int]:
        return {}


@dataclass(frozen=True)
class NoMixer(_Absent):
    """Its state has no bytes."""

    names: Any = None

    def inside(self, module: str) -> Self:
        return self

    def within(self, tokens: int) -> Self:
        return self

    def state(self, tokens: int, kv_format: str) -> StateLayout:
        return StateLayout(0, 0, "StateLayout", {})


@dataclass(frozen=True)
class NoFeedForward(_Absent, FeedForward):
    """It counts as dense."""

    intermediate: int = 0

    def inside(self, module: str) -> Self:
        return self
