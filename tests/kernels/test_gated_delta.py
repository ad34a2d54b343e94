"""The gated delta rule and the convolution before it: what their definitions say, however a sequence is cut."""

from __future__ import annotations

import numpy as np
import pytest
from rig import BF16, Rig, aligned, placed, row_stride

import cpu_kernels

SEQUENCES, TOKENS = 3, 8  # tokens that are written into a matrix together
SIZES = [(2, 4, 20, 28), (1, 1, 128, 128), (3, 3, 16, 33), (1, 3, 5, 7), (1, 2, 255, 256)]


class Heads:
    """Random weights and a state for every sequence."""

    def __init__(self, isa: str, key_heads: int, value_heads: int, key_dim: int, value_dim: int, threads: int = 1):
        random = np.random.default_rng(key_dim + value_dim)
        self.isa, self.threads, self.key_heads, self.value_heads = isa, threads, key_heads, value_heads
        self.key_dim, self.value_dim = key_dim, value_dim
        self.rate = placed(random.uniform(-3, 1, value_heads).astype(np.float32))
        self.bias = placed(random.standard_normal(value_heads).astype(np.float32))
        self.norm = placed(random.standard_normal(value_dim).astype(np.float32))
        self.in_turn, self.beta_scale = False, 1.0
        self.size = cpu_kernels.delta_state_bytes(value_heads, key_dim, value_dim)
        self.states = aligned((SEQUENCES, self.size), np.uint8)

    @property
    def widths(self) -> list[int]:
        keys, values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        return [keys, keys, values, values]

    def rows(self, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Queries, keys, values and gates; what betas and decays are made of."""
        random = np.random.default_rng(seed)
        both = (
            random.standard_normal((count, sum(self.widths))),
            2 * random.standard_normal((count, 2 * self.value_heads)),
        )
        return both[0].astype(np.float32), both[1].astype(np.float32)

    def run(self, rows: tuple[np.ndarray, np.ndarray], places: list[tuple[int, int]]) -> np.ndarray:
        """places: the sequence and position of each row."""
        source = aligned((len(places), row_stride(sum(self.widths))), np.float32)
        source[:, : sum(self.widths)] = rows[0]
        width = self.widths[3]
        output = aligned((len(places), row_stride(width)), BF16)
        rig = Rig(self.isa, self.threads, sequences=SEQUENCES)
        layout = cpu_kernels.StateLayout(base=self.states.ctypes.data, sequence_stride=self.size)
        rig.add(
            "gated_delta", input=source, decays=placed(rows[1]), decay_rate=self.rate, decay_bias=self.bias,
            norm=self.norm, output=output, state=layout, key_heads=self.key_heads, value_heads=self.value_heads,
            key_dim=self.key_dim, value_dim=self.value_dim, input_stride=source.shape[1],
            decay_stride=rows[1].shape[1], output_stride=output.shape[1], eps=1e-6,
            in_turn=self.in_turn, beta_scale=self.beta_scale,
        )  # fmt: skip
        rig.step(places)
        assert not output[:, width:].any()
        return output[:, :width].copy()

    def expected(self, rows: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """The definition in double precision, of a sequence from its start, a token at a time."""
        every, group = rows[0].astype(np.float64), self.value_heads // self.key_heads
        q, k, v, z = np.split(every, np.cumsum(self.widths)[:-1], axis=1)
        q, k = (x.reshape(len(x), self.key_heads, -1).repeat(group, axis=1) for x in (q, k))
        q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
        v, z = (x.reshape(len(x), self.value_heads, -1) for x in (v, z))
        b, a = np.split(rows[1].astype(np.float64), 2, axis=1)
        beta = self.beta_scale / (1 + np.exp(-b))
        decay = np.exp(-np.exp(self.rate.astype(np.float64)) * np.logaddexp(0, a + self.bias))
        state = np.zeros((self.value_heads, self.key_dim, self.value_dim))
        found = []
        for t in range(len(every)):
            state *= decay[t, :, None, None]
            correction = beta[t, :, None] * (v[t] - np.einsum("hkv,hk->hv", state, k[t]))
            state += k[t, :, :, None] * correction[:, None]
            found.append(np.einsum("hkv,hk->hv", state, q[t]) * self.key_dim**-0.5)
        o = np.stack(found)
        o = o / np.sqrt((o * o).mean(-1, keepdims=True) + 1e-6) * self.norm * z * np.exp(-np.logaddexp(0, -z))
        return o.reshape(len(o), -1)


def of_sequence(sequence: int, first: int, count: int) -> list[tuple[int, int]]:
    return [(sequence, first + i) for i in range(count)]


@pytest.mark.parametrize("sizes", SIZES)
def test_a_sequence_is_what_the_definition_says(isa, sizes) -> None:
    heads = Heads(isa, *sizes, threads=2)
    rows = heads.rows(45)
    wanted = heads.expected(rows)
    found = heads.run(rows, of_sequence(0, 0, 45)).astype(np.float64)
    assert np.abs(found - wanted).max() <= 2.0**-8 * np.abs(wanted).max()


def test_betas_may_be_larger_than_one(isa) -> None:
    """A token then turns what its key finds the other way round."""
    heads = Heads(isa, *SIZES[0], threads=2)
    heads.beta_scale = 2.0
    rows = heads.rows(45)
    wanted = heads.expected(rows)
    found = heads.run(rows, of_sequence(0, 0, 45)).astype(np.float64)
    assert np.abs(found - wanted).max() <= 2.0**-8 * np.abs(wanted).max()


def test_value_heads_in_turn_are_others_of_the_same_keys(isa) -> None:
    """The second and the third of four heads change places: with them their values, gates and decays."""
    heads, other = Heads(isa, *SIZES[0]), Heads(isa, *SIZES[0])
    rows, order = heads.rows(20), [0, 2, 1, 3]

    def turned(values: np.ndarray, width: int) -> np.ndarray:
        return values.reshape(len(values), -1, 4, width)[:, :, order].reshape(len(values), -1)

    keys = 2 * heads.widths[0]
    moved = np.concatenate([rows[0][:, :keys], turned(rows[0][:, keys:], 28)], axis=1), turned(rows[1], 1)
    other.in_turn, other.rate, other.bias = True, placed(heads.rate[order]), placed(heads.bias[order])
    found, wanted = other.run(moved, of_sequence(0, 0, 20)), heads.run(rows, of_sequence(0, 0, 20))
    assert found.tobytes() == turned(wanted, 28).tobytes()


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
    assert (np.concatenate(found).view(np.uint16) == whole.view(np.uint16)).all()


@pytest.mark.parametrize("turn", range(9, 16))
def test_a_sequence_goes_back_within_a_run(isa, turn) -> None:
    """Tokens up to the end of a run, then others from one of its places on."""
    heads = Heads(isa, *SIZES[0])
    rows, wrong = heads.rows(30), heads.rows(30, seed=1)
    whole = Heads(isa, *SIZES[0]).run(rows, of_sequence(1, 0, 30))
    heads.run(tuple(x[:turn] for x in rows), of_sequence(1, 0, turn))
    heads.run(tuple(x[turn:16] for x in wrong), of_sequence(1, turn, 16 - turn))
    found = heads.run(tuple(x[turn:] for x in rows), of_sequence(1, turn, 30 - turn))
    assert found.tobytes() == whole[turn:].tobytes()


def test_strong_decays_and_large_numbers_stay_exact(isa) -> None:
    """Of betas and decays that are 0 or 1, of tokens that are forgotten at once, of keys of zeros."""
    heads = Heads(isa, *SIZES[0])
    rows = heads.rows(40)
    rows[1][::3] *= 50
    rows[0][5] = 0
    rows[0][7] *= 1e6
    wanted = heads.expected(rows)
    found = heads.run(rows, of_sequence(0, 0, 40)).astype(np.float64)
    usual = [row for row in range(40) if row != 7]
    assert np.abs(found - wanted)[usual].max() <= 2.0**-8 * np.abs(wanted[usual]).max()
    assert np.isfinite(found).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["query", "key", "value", "gate", "beta", "decay"])
def test_damage_stays_in_its_sequence_and_does_not_become_a_number(isa, place, value) -> None:
    heads = Heads(isa, *SIZES[0])
    rows = heads.rows(24)
    places = [*of_sequence(0, 0, 12), *of_sequence(1, 0, 12)]
    clean = heads.run(rows, places)
    heads.states[:] = 0
    starts = dict(zip(("query", "key", "value", "gate"), np.cumsum([0, *heads.widths[:-1]]), strict=True))
    if place in starts:
        rows[0][5, starts[place] + 1] = value
    else:
        rows[1][5, 0 if place == "beta" else heads.value_heads] = value
    made = heads.run(rows, places).astype(np.float32)
    assert not np.isfinite(made[5, 1 if place == "gate" else slice(heads.value_dim)]).any()
    if place in ("key", "value", "beta", "decay"):
        later = made[6:12, : heads.value_dim]
        assert not np.isfinite(later).all(axis=1).any()  # the matrix keeps it
    same = np.r_[0:5, 12:24]
    assert made[same].tobytes() == clean[same].astype(np.float32).tobytes()


@pytest.mark.parametrize(("width", "taps"), [(16, 4), (1, 2), (50, 3), (33, 8)])
def test_a_convolution_with_silu(isa, width, taps) -> None:
    random = np.random.default_rng(taps)
    weight = placed(random.standard_normal((width, taps)).astype(np.float32))
    rows = random.standard_normal((11, width)).astype(np.float32)
    size = -(-cpu_kernels.conv_state_bytes(width, taps) // 64) * 64

    def run(cuts: list[int]) -> np.ndarray:
        states, found, first = aligned((SEQUENCES, size), np.uint8), [], 0
        for count in cuts:
            values = aligned((count, row_stride(width)), np.float32)
            values[:, :width] = rows[first : first + count]
            rig = Rig(isa, 2, sequences=SEQUENCES)
            rig.add(
                "silu_conv", values=values, weight=weight, width=width, taps=taps, stride=values.shape[1],
                state=cpu_kernels.StateLayout(base=states.ctypes.data, sequence_stride=size),
            )  # fmt: skip
            rig.step(of_sequence(1, first, count))
            assert not values[:, width:].any()
            found.append(values[:, :width].copy())
            first += count
        return np.concatenate(found)

    seen = np.concatenate([np.zeros((taps - 1, width)), rows.astype(np.float64)])
    sums = sum(seen[tap : tap + 11] * weight[:, tap].astype(np.float64) for tap in range(taps))
    wanted = sums / (1 + np.exp(-sums))
    found = run([11])
    assert np.abs(found - wanted).max() <= 2.0**-20 * np.abs(wanted).max() * taps
    assert run([1, 4, 6]).tobytes() == found.tobytes()


@pytest.mark.parametrize("function", ["sigmoid", "softplus"])
@pytest.mark.parametrize(("heads", "dim"), [(3, 24), (1, 1), (4, 64)])
def test_a_gate_weighs_what_attention_made(isa, heads, dim, function) -> None:
    random, rows = np.random.default_rng(dim), 5
    values = aligned((rows, row_stride(heads * dim)), BF16)
    values[:, : heads * dim] = random.standard_normal((rows, heads * dim))
    gates = placed(3 * random.standard_normal((rows, heads * 2 * dim)).astype(np.float32))
    before = values[:, : heads * dim].astype(np.float64).reshape(rows, heads, dim)
    weights = gates.reshape(rows, heads, 2, dim)[:, :, 1].astype(np.float64)
    rig = Rig(isa, 2)
    rig.add(
        "gate", values=values, gates=gates.ctypes.data + dim * 4, heads=heads, head_dim=dim, stride=values.shape[1],
        gate_stride=gates.shape[1], gate_head_stride=2 * dim, softplus=function == "softplus",
    )  # fmt: skip
    rig.run(rows)
    wanted = (before * GATES[function](weights)).reshape(rows, -1)
    found = values[:, : heads * dim].astype(np.float64)
    assert np.abs(found - wanted).max() <= 2.0**-8 * np.abs(wanted).max()
    assert not values[:, heads * dim :].any()


GATES = {"sigmoid": lambda x: 1 / (1 + np.exp(-x)), "softplus": lambda x: np.log1p(np.exp(x))}


@pytest.mark.parametrize("function", GATES)
def test_a_gate_of_a_head_weighs_all_its_values(isa, function) -> None:
    random, rows, heads, dim = np.random.default_rng(3), 5, 3, 24
    values = aligned((rows, row_stride(heads * dim)), BF16)
    values[:, : heads * dim] = random.standard_normal((rows, heads * dim))
    before = values[:, : heads * dim].astype(np.float64).reshape(rows, heads, dim)
    gates = placed(3 * random.standard_normal((rows, 7)).astype(np.float32))
    gates[2, 4] = np.inf
    rig = Rig(isa, 2)
    rig.add(
        "gate", values=values, gates=gates.ctypes.data + 3 * 4, heads=heads, head_dim=dim, stride=values.shape[1],
        gate_stride=7, gate_head_stride=1, per_head=True, softplus=function == "softplus",
    )  # fmt: skip
    rig.run(rows)
    found = values[:, : heads * dim].astype(np.float64).reshape(rows, heads, dim)
    assert np.isnan(found[2, 1]).all()
    gates[2, 4] = before[2, 1] = found[2, 1] = 0
    wanted = before * GATES[function](gates[:, 3:6, None].astype(np.float64))
    assert np.abs(found - wanted).max() <= 2.0**-8 * np.abs(wanted).max()
