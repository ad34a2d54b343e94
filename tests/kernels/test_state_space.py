"""The state space of Mamba-2, the bias of its convolution and its norm: as they are defined, however a text is cut."""

from __future__ import annotations

import numpy as np
import pytest
from rig import BF16, Rig, aligned, placed, row_stride

import cpu_kernels

SEQUENCES = 3
SIZES = [(4, 2, 28, 20), (1, 1, 64, 128), (6, 3, 16, 33), (3, 1, 5, 7), (2, 2, 255, 256)]
UNBOUNDED = (0.0, float(np.finfo(np.float32).max))


class Heads:
    """Random weights and a state for every sequence. limits: of dt."""

    def __init__(self, isa: str, heads: int, groups: int, head_dim: int, state_dim: int, threads: int = 1):
        random = np.random.default_rng(head_dim + state_dim)
        self.isa, self.threads, self.heads, self.groups = isa, threads, heads, groups
        self.head_dim, self.state_dim, self.limits = head_dim, state_dim, UNBOUNDED
        self.rate = placed(random.uniform(-3, 1, heads).astype(np.float32))
        self.bias = placed(random.standard_normal(heads).astype(np.float32))
        self.skip = placed(random.standard_normal(heads).astype(np.float32))
        self.size = cpu_kernels.delta_state_bytes(heads, state_dim, head_dim)
        self.states = aligned((SEQUENCES, self.size), np.uint8)

    @property
    def widths(self) -> list[int]:
        """Of x, B, C and z."""
        inner, shared = self.heads * self.head_dim, self.groups * self.state_dim
        return [inner, shared, shared, inner]

    def rows(self, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """x, B, C and z; steps."""
        random = np.random.default_rng(seed)
        every = random.standard_normal((count, sum(self.widths))).astype(np.float32)
        return every, 2 * random.standard_normal((count, self.heads)).astype(np.float32)

    def run(self, rows: tuple[np.ndarray, np.ndarray], places: list[tuple[int, int]]) -> np.ndarray:
        """What takes the place of x. places: the sequence and position of each row."""
        values = aligned((len(places), row_stride(sum(self.widths))), np.float32)
        values[:, : sum(self.widths)] = rows[0]
        rig = Rig(self.isa, self.threads, sequences=SEQUENCES)
        layout = cpu_kernels.StateLayout(base=self.states.ctypes.data, sequence_stride=self.size)
        rig.add(
            "state_space", values=values, steps=placed(rows[1]), bias=self.bias, rate=self.rate, skip=self.skip,
            state=layout, heads=self.heads, groups=self.groups, head_dim=self.head_dim, state_dim=self.state_dim,
            stride=values.shape[1], step_stride=self.heads, smallest=self.limits[0], largest=self.limits[1],
        )  # fmt: skip
        rig.step(places)
        inner = self.widths[0]
        assert np.array_equal(values[:, inner : sum(self.widths)], rows[0][:, inner:], equal_nan=True)
        assert not values[:, sum(self.widths) :].any()
        return values[:, :inner].copy()

    def expected(self, rows: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """The definition in double precision, of a sequence from its start, a token at a time."""
        every, shared = rows[0].astype(np.float64), self.heads // self.groups
        x, b, c, z = np.split(every, np.cumsum(self.widths)[:-1], axis=1)
        x, z = (one.reshape(len(one), self.heads, -1) for one in (x, z))
        b, c = (one.reshape(len(one), self.groups, -1).repeat(shared, axis=1) for one in (b, c))
        dt = np.clip(np.logaddexp(0, rows[1].astype(np.float64) + self.bias), *self.limits)
        decay = np.exp(-np.exp(self.rate.astype(np.float64)) * dt)
        state, found = np.zeros((self.heads, self.head_dim, self.state_dim)), []
        for t in range(len(every)):
            state = decay[t, :, None, None] * state + (dt[t, :, None] * x[t])[:, :, None] * b[t, :, None]
            found.append(np.einsum("hps,hs->hp", state, c[t]) + self.skip[:, None] * x[t])
        gated = np.stack(found) * z * np.exp(-np.logaddexp(0, -z))
        return gated.reshape(len(gated), -1)


def of_sequence(sequence: int, first: int, count: int) -> list[tuple[int, int]]:
    return [(sequence, first + i) for i in range(count)]


@pytest.mark.parametrize("sizes", SIZES)
def test_a_sequence_is_what_the_definition_says(isa, sizes) -> None:
    heads = Heads(isa, *sizes, threads=2)
    rows = heads.rows(45)
    wanted, found = heads.expected(rows), heads.run(rows, of_sequence(0, 0, 45))
    assert np.abs(found - wanted).max() <= 2.0**-17 * np.abs(wanted).max()


@pytest.mark.parametrize("limits", [(0.5, 0.75), (0.0, 0.25), (2.0, UNBOUNDED[1])])
def test_steps_stay_within_their_limits(isa, limits) -> None:
    heads = Heads(isa, *SIZES[0])
    rows = heads.rows(20)
    unbounded = heads.expected(rows)
    heads.limits = limits
    wanted, found = heads.expected(rows), heads.run(rows, of_sequence(0, 0, 20))
    assert np.abs(found - wanted).max() <= 2.0**-17 * np.abs(wanted).max() < np.abs(wanted - unbounded).max()


@pytest.mark.parametrize("cuts", [[1] * 30, [5, 25], [8, 16, 6], [3, 1, 9, 2, 15]])
def test_chunks_and_company_change_no_bit(isa, cuts) -> None:
    """A prompt in chunks, beside two sequences that decode, on other numbers of threads."""
    heads = Heads(isa, *SIZES[0], threads=3)
    rows = heads.rows(30)
    whole = Heads(isa, *SIZES[0]).run(rows, of_sequence(1, 0, 30))
    found, first = [], 0
    for step, count in enumerate(cuts):
        others = heads.rows(2, step + 1)
        mixed = tuple(
            np.concatenate([other[:1], one[first : first + count], other[1:]])
            for one, other in zip(rows, others, strict=True)
        )
        found.append(heads.run(mixed, [(0, step), *of_sequence(1, first, count), (2, step)])[1:-1])
        first += count
    assert np.concatenate(found).tobytes() == whole.tobytes()


@pytest.mark.parametrize("turn", range(9, 16))
def test_a_sequence_goes_back_within_a_run(isa, turn) -> None:
    """Tokens up to the end of a run, then others from one of its places on."""
    heads = Heads(isa, *SIZES[0])
    rows, wrong = heads.rows(30), heads.rows(30, seed=1)
    whole = Heads(isa, *SIZES[0]).run(rows, of_sequence(1, 0, 30))
    heads.run((rows[0][:turn], rows[1][:turn]), of_sequence(1, 0, turn))
    heads.run((wrong[0][turn:16], wrong[1][turn:16]), of_sequence(1, turn, 16 - turn))
    found = heads.run((rows[0][turn:], rows[1][turn:]), of_sequence(1, turn, 30 - turn))
    assert found.tobytes() == whole[turn:].tobytes()


def test_strong_decays_and_large_numbers_stay_exact(isa) -> None:
    """Of tokens that are forgotten at once, or never, and of large ones."""
    heads = Heads(isa, *SIZES[0])
    rows = heads.rows(40)
    rows[1][::3] *= 50
    rows[0][5] = 0
    rows[0][7] *= 1e6
    wanted, found = heads.expected(rows), heads.run(rows, of_sequence(0, 0, 40))
    assert (np.abs(found - wanted) <= 2.0**-14 * np.abs(wanted).max(axis=1, keepdims=True)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["x", "B", "C", "z", "step"])
def test_damage_stays_in_its_sequence_and_does_not_become_a_number(isa, place, value) -> None:
    heads = Heads(isa, *SIZES[0])
    rows = heads.rows(24)
    places = [*of_sequence(0, 0, 12), *of_sequence(1, 0, 12)]
    clean = heads.run(rows, places)
    heads.states[:] = 0
    starts = dict(zip(("x", "B", "C", "z"), np.cumsum([0, *heads.widths[:-1]]), strict=True))
    if place == "step":
        rows[1][5, 0] = value
    else:
        rows[0][5, starts[place] + 1] = value
    made = heads.run(rows, places)
    hit = slice(1, 2) if place in ("x", "z") else slice(heads.head_dim)
    assert not np.isfinite(made[5, hit]).any()
    if place in ("x", "B", "step"):
        assert not np.isfinite(made[6:12, hit]).any()  # the matrix keeps it
    same = np.r_[0:5, 12:24]
    assert made[same].tobytes() == clean[same].tobytes()


@pytest.mark.parametrize(("width", "taps"), [(16, 4), (1, 2), (50, 3)])
def test_a_convolution_with_a_bias_and_silu(isa, width, taps) -> None:
    random = np.random.default_rng(taps)
    weight, bias = (placed(random.standard_normal(shape).astype(np.float32)) for shape in ((width, taps), (width,)))
    rows = random.standard_normal((11, width)).astype(np.float32)
    values = aligned((11, row_stride(width)), np.float32)
    values[:, :width] = rows
    size = -(-cpu_kernels.conv_state_bytes(width, taps) // 64) * 64
    states = aligned((1, size), np.uint8)
    rig = Rig(isa, 2, sequences=1)
    rig.add(
        "silu_conv", values=values, weight=weight, bias=bias, width=width, taps=taps, stride=values.shape[1],
        state=cpu_kernels.StateLayout(base=states.ctypes.data, sequence_stride=size),
    )  # fmt: skip
    rig.step(of_sequence(0, 0, 11))
    seen = np.concatenate([np.zeros((taps - 1, width)), rows.astype(np.float64)])
    sums = sum(seen[tap : tap + 11] * weight[:, tap].astype(np.float64) for tap in range(taps)) + bias
    wanted = sums / (1 + np.exp(-sums))
    assert np.abs(values[:, :width] - wanted).max() <= 2.0**-20 * np.abs(wanted).max() * taps


@pytest.mark.parametrize(("width", "groups"), [(112, 2), (48, 1), (33, 3), (512, 8)])
def test_each_group_of_a_row_has_a_norm_of_its_own(isa, width, groups) -> None:
    random, rows = np.random.default_rng(groups), 5
    source = aligned((rows, row_stride(width)), np.float32)
    source[:, :width] = random.standard_normal((rows, width)) * 10.0 ** random.integers(-2, 3, (rows, 1))
    weight = placed(random.standard_normal(width).astype(np.float32))
    output = aligned((rows, row_stride(width)), BF16)
    rig = Rig(isa, 2)
    rig.add(
        "group_norm", input=source, weight=weight, output=output, width=width, groups=groups,
        input_stride=source.shape[1], output_stride=output.shape[1], eps=1e-3,
    )  # fmt: skip
    rig.run(rows)
    x = source[:, :width].astype(np.float64).reshape(rows, groups, -1)
    wanted = (x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-3)).reshape(rows, width) * weight
    assert np.abs(output[:, :width].astype(np.float64) - wanted).max() <= 2.0**-8 * np.abs(wanted).max()
    assert not output[:, width:].any()
