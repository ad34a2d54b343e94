"""The short convolution: what its definition says, whole or in chunks, alone or beside other sequences."""

from __future__ import annotations

import numpy as np
import pytest
from rig import BF16, Rig, aligned, placed, row_stride

import cpu_kernels

SEQUENCES = 3


class Layer:
    """Random weights [width, taps] and a state for every sequence."""

    def __init__(self, isa: str, width: int, taps: int, bias: bool = True, threads: int = 1) -> None:
        random = np.random.default_rng(width * taps)
        self.isa, self.width, self.taps, self.threads = isa, width, taps, threads
        self.weight = placed(random.standard_normal((width, taps)).astype(np.float32))
        self.bias = placed(random.standard_normal(width).astype(np.float32)) if bias else None
        self.size = -(-cpu_kernels.conv_state_bytes(width, min(taps, 8)) // 64) * 64
        self.states = aligned((SEQUENCES, self.size), np.uint8)

    def run(self, rows: np.ndarray, places: list[tuple[int, int]]) -> np.ndarray:
        """rows: gates and inputs [rows, 3 * width]. places: the sequence and position of each."""
        source = aligned((len(rows), row_stride(3 * self.width)), np.float32)
        source[:, : 3 * self.width] = rows
        output = aligned((len(rows), row_stride(self.width)), BF16)
        rig = Rig(self.isa, self.threads, sequences=SEQUENCES)
        layout = cpu_kernels.StateLayout(base=self.states.ctypes.data, sequence_stride=self.size)
        rig.add(
            "short_conv", input=source, weight=self.weight, bias=self.bias, output=output, state=layout,
            width=self.width, taps=self.taps, input_stride=source.shape[1], output_stride=output.shape[1],
        )  # fmt: skip
        rig.step(places)
        assert not output[:, self.width :].any()
        return output[:, : self.width].copy()

    def expected(self, rows: np.ndarray) -> np.ndarray:
        """The definition in double precision, of a sequence from its start."""
        b, c, x = np.split(rows.astype(np.float64), 3, axis=1)
        seen = np.concatenate([np.zeros((self.taps - 1, self.width)), b * x])
        taps = self.weight.astype(np.float64)
        sums = sum(seen[tap : tap + len(rows)] * taps[:, tap] for tap in range(self.taps))
        return c * (sums + (0 if self.bias is None else self.bias))


def random_rows(count: int, width: int) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, 3 * width)).astype(np.float32)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("width", "taps"), [(16, 3), (1, 2), (50, 4), (96, 8), (33, 2)])
def test_a_sequence_is_what_the_definition_says(isa, width, taps, bias) -> None:
    layer, rows = Layer(isa, width, taps, bias, threads=2), random_rows(11, width)
    found = layer.run(rows, [(0, position) for position in range(11)])
    wanted = layer.expected(rows)
    assert np.abs(found.astype(np.float64) - wanted).max() <= 2.0**-8 * np.abs(wanted).max()


@pytest.mark.parametrize("cuts", [[1] * 12, [5, 7], [2, 1, 9]])
def test_chunks_and_company_change_no_bit(isa, cuts) -> None:
    """A prompt in chunks, beside two sequences that decode, on other numbers of threads."""
    rows = random_rows(12, 40)
    whole = Layer(isa, 40, 4).run(rows, [(1, position) for position in range(12)])
    layer, found, first = Layer(isa, 40, 4, threads=3), [], 0
    for step, count in enumerate(cuts):
        others = random_rows(2, 40) * (step + 1)
        mixed = np.concatenate([others[:1], rows[first : first + count], others[1:]])
        places = [(0, step), *((1, first + i) for i in range(count)), (2, step)]
        found.append(layer.run(mixed, places)[1:-1])
        first += count
    assert (np.concatenate(found).view(np.uint16) == whole.view(np.uint16)).all()


@pytest.mark.parametrize("taps", [2, 3, 8])
@pytest.mark.parametrize("turn", range(9, 16))
def test_a_sequence_goes_back_within_a_run(isa, taps, turn) -> None:
    """Tokens up to the end of a run, then others from one of its places on."""
    rows, layer = random_rows(24, 20), Layer(isa, 20, taps)
    whole = Layer(isa, 20, taps).run(rows, [(2, position) for position in range(24)])
    layer.run(np.concatenate([rows[:turn], rows[: 16 - turn]]), [(2, position) for position in range(16)])
    found = layer.run(rows[turn:], [(2, position) for position in range(turn, 24)])
    assert found.tobytes() == whole[turn:].tobytes()
    assert not layer.states[:2].any()


def test_sizes_of_a_state_that_cannot_be_are_refused() -> None:
    assert cpu_kernels.conv_state_bytes(5, 3) == 4 * 5 * (3 - 1 + cpu_kernels.RUN_TOKENS - 1)
    for width, taps in [(0, 1), (1, 0), (1, 9), (1 << 31 - 1, 1)]:
        with pytest.raises(ValueError, match="conv_state_bytes: width must be from 1 to .*, taps from 1 to 8"):
            cpu_kernels.conv_state_bytes(width, taps)


def test_more_taps_than_the_kernel_holds_are_refused() -> None:
    layer = Layer(cpu_kernels.available_isas()[0], 16, 9)
    with pytest.raises(ValueError, match="short_conv: taps 9 is above 8"):
        layer.run(random_rows(1, 16), [(0, 0)])
