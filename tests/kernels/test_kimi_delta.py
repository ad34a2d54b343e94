"""Kimi Delta Attention: what its definition says, however a sequence is cut."""

from __future__ import annotations

import numpy as np
import pytest
from rig import BF16, Rig, aligned, placed, row_stride

import cpu_kernels

SEQUENCES = 3
SIZES = [(3, 20, 28), (1, 128, 128), (2, 16, 33), (3, 5, 7), (1, 255, 256)]
Rows = dict[str, np.ndarray]  # of each input of the op


class Heads:
    """Random weights and a state for every sequence. bound: of the logarithms of decays, 0 for none."""

    def __init__(self, isa: str, heads: int, key_dim: int, value_dim: int, threads: int = 1, bound: float = 0.0):
        random = np.random.default_rng(key_dim + value_dim)
        self.isa, self.threads, self.bound = isa, threads, bound
        self.heads, self.key_dim, self.value_dim = heads, key_dim, value_dim
        self.rate = placed(random.uniform(-3, 1, heads).astype(np.float32))
        self.bias = placed(random.standard_normal(heads * key_dim).astype(np.float32))
        self.norm = placed(random.standard_normal(value_dim).astype(np.float32))
        self.size = cpu_kernels.delta_state_bytes(heads, key_dim, value_dim, by_channel=True)
        self.states = aligned((SEQUENCES, self.size), np.uint8)

    def rows(self, count: int, seed: int = 0) -> Rows:
        random, keys, values = np.random.default_rng(seed), self.heads * self.key_dim, self.heads * self.value_dim
        widths = {"query": keys, "key": keys, "value": values, "decay": keys, "beta": self.heads, "gate": values}
        spread = {"decay": 2, "beta": 2}
        return {
            name: (spread.get(name, 1) * random.standard_normal((count, width))).astype(np.float32)
            for name, width in widths.items()
        }

    def run(self, rows: Rows, places: list[tuple[int, int]]) -> np.ndarray:
        """places: the sequence and position of each row."""
        source = _padded(np.concatenate([rows["query"], rows["key"], rows["value"]], axis=1))
        decays, betas, gates = (_padded(rows[name]) for name in ("decay", "beta", "gate"))
        width = self.heads * self.value_dim
        output = aligned((len(places), row_stride(width)), BF16)
        rig = Rig(self.isa, self.threads, sequences=SEQUENCES)
        layout = cpu_kernels.StateLayout(base=self.states.ctypes.data, sequence_stride=self.size)
        rig.add(
            "kimi_delta", input=source, decays=decays, betas=betas, gates=gates, decay_rate=self.rate,
            decay_bias=self.bias, norm=self.norm, output=output, state=layout, heads=self.heads, key_dim=self.key_dim,
            value_dim=self.value_dim, input_stride=source.shape[1], decay_stride=decays.shape[1],
            beta_stride=betas.shape[1], gate_stride=gates.shape[1], output_stride=output.shape[1], eps=1e-6,
            lower_bound=self.bound,
        )  # fmt: skip
        rig.step(places)
        assert not output[:, width:].any()
        return output[:, :width].copy()

    def expected(self, rows: Rows) -> np.ndarray:
        """The definition in double precision, of a sequence from its start, a token at a time."""
        q, k, v, a, z = (
            rows[name].astype(np.float64).reshape(len(rows[name]), self.heads, -1)
            for name in ("query", "key", "value", "decay", "gate")
        )
        q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
        beta = _sigmoid(rows["beta"].astype(np.float64))
        rate, x = np.exp(self.rate.astype(np.float64))[:, None], a + self.bias.reshape(self.heads, -1)
        decay = np.exp(self.bound * _sigmoid(rate * x) if self.bound else -rate * np.logaddexp(0, x))
        state, found = np.zeros((self.heads, self.key_dim, self.value_dim)), []
        for t in range(len(q)):
            state *= decay[t, :, :, None]
            correction = beta[t, :, None] * (v[t] - np.einsum("hkv,hk->hv", state, k[t]))
            state += k[t, :, :, None] * correction[:, None]
            found.append(np.einsum("hkv,hk->hv", state, q[t]) * self.key_dim**-0.5)
        o = np.stack(found)
        o = o / np.sqrt((o * o).mean(-1, keepdims=True) + 1e-6) * self.norm * _sigmoid(z)
        return o.reshape(len(o), -1)


def _padded(rows: np.ndarray) -> np.ndarray:
    found = aligned((len(rows), row_stride(rows.shape[1])), np.float32)
    found[:, : rows.shape[1]] = rows
    return found


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


def of_sequence(sequence: int, first: int, count: int) -> list[tuple[int, int]]:
    return [(sequence, first + i) for i in range(count)]


@pytest.mark.parametrize("bound", [0.0, -5.0])
@pytest.mark.parametrize("sizes", SIZES)
def test_a_sequence_is_what_the_definition_says(isa, sizes, bound) -> None:
    heads = Heads(isa, *sizes, threads=2, bound=bound)
    rows = heads.rows(45)
    wanted = heads.expected(rows)
    found = heads.run(rows, of_sequence(0, 0, 45)).astype(np.float64)
    assert np.abs(found - wanted).max() <= 2.0**-8 * np.abs(wanted).max()


@pytest.mark.parametrize("turn", range(9, 16))
def test_a_sequence_goes_back_within_a_run(isa, turn) -> None:
    """Tokens up to the end of a run, then others from one of its places on."""
    heads = Heads(isa, *SIZES[0])
    rows, wrong = heads.rows(30), heads.rows(30, seed=1)
    whole = Heads(isa, *SIZES[0]).run(rows, of_sequence(1, 0, 30))
    heads.run({name: x[:turn] for name, x in rows.items()}, of_sequence(1, 0, turn))
    heads.run({name: x[turn:16] for name, x in wrong.items()}, of_sequence(1, turn, 16 - turn))
    found = heads.run({name: x[turn:] for name, x in rows.items()}, of_sequence(1, turn, 30 - turn))
    assert found.tobytes() == whole[turn:].tobytes()


@pytest.mark.parametrize("cuts", [[1] * 30, [5, 25], [8, 16, 6], [3, 1, 9, 2, 15]])
def test_chunks_and_company_change_no_bit(isa, cuts) -> None:
    """A prompt in chunks, beside two sequences that decode, on other numbers of threads."""
    heads = Heads(isa, *SIZES[0], threads=3, bound=-5.0)
    rows = heads.rows(30)
    whole = Heads(isa, *SIZES[0], bound=-5.0).run(rows, of_sequence(1, 0, 30))
    found, first = [], 0
    for step, count in enumerate(cuts):
        others = heads.rows(2, step + 1)
        mixed = {
            name: np.concatenate([others[name][:1], own[first : first + count], others[name][1:]])
            for name, own in rows.items()
        }
        found.append(heads.run(mixed, [(0, step), *of_sequence(1, first, count), (2, step)])[1:-1])
        first += count
    assert (np.concatenate(found).view(np.uint16) == whole.view(np.uint16)).all()


@pytest.mark.parametrize("bound", [0.0, -5.0])
def test_strong_decays_and_large_numbers_stay_exact(isa, bound) -> None:
    """Of betas and decays that are 0 or 1, of channels that are forgotten at once, of keys of zeros."""
    heads = Heads(isa, *SIZES[0], bound=bound)
    rows = heads.rows(40)
    rows["beta"][::3] *= 50
    rows["decay"][::3] *= 50
    for name in ("query", "key", "value"):
        rows[name][5] = 0
    rows["value"][7] *= 1e6
    wanted = heads.expected(rows)
    found = heads.run(rows, of_sequence(0, 0, 40)).astype(np.float64)
    assert np.abs(found - wanted).max() <= 2.0**-8 * np.abs(wanted).max()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["query", "key", "value", "decay", "beta", "gate"])
def test_damage_stays_in_its_sequence_and_does_not_become_a_number(isa, place, value) -> None:
    heads = Heads(isa, *SIZES[0])
    rows = heads.rows(24)
    places = [*of_sequence(0, 0, 12), *of_sequence(1, 0, 12)]
    clean = heads.run(rows, places)
    heads.states[:] = 0
    rows[place][5, 0 if place == "beta" else 1] = value
    made = heads.run(rows, places).astype(np.float32)
    assert not np.isfinite(made[5, 1 if place == "gate" else slice(heads.value_dim)]).any()
    if place in ("key", "value", "beta", "decay"):
        later = made[6:12, : heads.value_dim]
        assert not np.isfinite(later).all(axis=1).any()  # the matrix keeps it
    same = np.r_[0:5, 12:24]
    assert made[same].tobytes() == clean[same].astype(np.float32).tobytes()
