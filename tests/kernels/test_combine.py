"""Experts computed in two places and combined: bit for bit what `down` makes of all of them in one."""

from __future__ import annotations

import numpy as np
import pytest
from expert_rig import Experts, Part, _add_gate_up, run
from rig import Rig, aligned, placed, row_stride

import cpu_kernels
from hybrid.formats import FORMATS

COUNT, HIDDEN, INTERMEDIATE, TOP_K = 7, 80, 48, 3


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint32)


def chosen(random: np.random.Generator, rows: int) -> np.ndarray:
    return placed(np.stack([random.permutation(COUNT)[:TOP_K] for _ in range(rows)]).astype(np.int32))


class Place:
    """One of the places that compute: its experts' contributions at the pairs whose ids are not negative."""

    def __init__(self, rig: Rig, experts: Experts, x: np.ndarray, ids: np.ndarray, contributions: np.ndarray) -> None:
        self.part = Part(experts, x, placed(ids), None)
        self.pairs = aligned(ids.size, np.int32, -7)
        routing = self.part._routing()
        rig.add("group", ids=self.part.ids, weights=None, routing=routing, experts=COUNT, top_k=TOP_K, pairs=self.pairs)
        _add_gate_up(rig, [self.part])
        self.part.quantise(rig)
        down = self.part.down() | {"routing": self._by_pair()}
        rig.add("down", **down, output=contributions, output_stride=contributions.shape[1])

    def _by_pair(self) -> cpu_kernels.Routing:
        addresses = {name: array.ctypes.data for name, array in self.part.integers.items()}
        return cpu_kernels.Routing(weights=self.part.gates.ctypes.data, **{**addresses, "rows": self.pairs.ctypes.data})


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "threads"), [(1, 1), (5, 2), (23, 3)])
@pytest.mark.parametrize("elsewhere", [0, 3, COUNT])
def test_experts_in_two_places_are_what_they_are_in_one(isa: str, format: str, rows: int, threads: int, elsewhere: int):
    random = np.random.default_rng(rows)
    experts = Experts.make(format, COUNT, HIDDEN, INTERMEDIATE, bias=True)
    x, onto = random.standard_normal((rows, HIDDEN)), random.standard_normal((rows, HIDDEN)).astype(np.float32)
    ids, weights = chosen(random, rows), placed(random.random((rows, TOP_K)).astype(np.float32))
    whole = run(isa, experts, x, ids, weights, onto, threads=threads)

    rig, stride = Rig(isa, threads), row_stride(HIDDEN)
    output, contributions = aligned((rows, stride), np.float32), aligned((rows * TOP_K, stride), np.float32, -0.0)
    output[:, :HIDDEN] = onto
    hit = np.isin(ids, random.permutation(COUNT)[:elsewhere])
    places = [Place(rig, experts, x, np.where(here, ids, -1), contributions) for here in (hit, ~hit)]
    sums = {"contributions": contributions, "output": output, "width": HIDDEN, "stride": stride}
    rig.add("combine", ids=ids, weights=weights, top_k=TOP_K, output_stride=stride, **sums)
    for _ in range(2):  # what is left of a step must not be seen in the next
        output[:, :HIDDEN] = onto
        rig.run(rows)
        assert np.array_equal(bits(output[:, :HIDDEN]), bits(whole.output))
        assert np.array_equal(bits(contributions), bits(np.full_like(contributions, -0.0)))
    for place, here in zip(places, (hit, ~hit), strict=True):
        assert sorted(place.pairs[place.pairs >= 0]) == list(np.flatnonzero(here.reshape(-1)))


def test_a_contribution_of_minus_zero_stays_one(isa: str) -> None:
    """-0 onto -0 is -0; onto a +0 that stands for nothing it would be +0."""
    rig, output, contributions = Rig(isa), aligned((1, 64), np.float32, -0.0), aligned((1, 64), np.float32, -0.0)
    ids, weights = aligned((1, 1), np.int32), aligned((1, 1), np.float32, 1)
    sums = {"contributions": contributions, "output": output, "width": 64, "stride": 64, "output_stride": 64}
    rig.add("combine", ids=ids, weights=weights, top_k=1, **sums)
    rig.run(1)
    assert np.signbit(output).all() and np.signbit(contributions).all()
