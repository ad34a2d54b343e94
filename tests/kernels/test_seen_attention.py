"""Attention to what a row sees, wherever its keys lie: in the step, among those that are kept, among entries."""

from __future__ import annotations

import numpy as np
import pytest
from kv_pages import quantised
from rig import BF16, Rig, aligned, placed, random_bf16
from test_entries import as_floats

import cpu_kernels
from cpu_kernels import KEY_BLOCK
from hybrid.config import KV_FORMATS
from hybrid.models.layers.grouped_query_shape import STATE_EXTRA

DIM, PADDED, KEPT, WINDOW, ENTRIES, TOKENS = 20, 32, 27, 20, 300, 1200
# Rows alone, of which key blocks are computed apart, with more than one; together, at the start of a sequence and
# behind tokens of earlier steps; and as many as are kept and more.
PLACES = [(0, TOKENS - 1), *((1, position) for position in range(33)), *((2, 600 + i) for i in range(3)), (3, 301)]
SEQUENCES = 4


@pytest.fixture(params=KV_FORMATS)
def kv_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def entries_of(random: np.random.Generator, count: int, format: str) -> np.ndarray:
    """Random ones as they lie, [count, 64] bytes."""
    values, found = random.normal(0, 1, (count, PADDED)).astype(np.float32), np.zeros((count, 64), np.uint8)
    values[:, DIM:] = 0
    if format == "bf16":
        found[:] = values.astype(BF16).view(np.uint8)
        return found
    codes, scales = quantised(values, format)
    found[:, :PADDED] = codes.view(np.uint8)
    found[:, PADDED : PADDED + 4] = np.asarray(scales, np.float32).reshape(-1, 1).view(np.uint8)
    return found


class Model:
    """Keys of all tokens and entries of some sequences, queries of every token, and what each sees."""

    def __init__(self, format: str, heads: int) -> None:
        random = np.random.default_rng(heads)
        self.format, self.heads = format, heads
        self.keys = entries_of(random, SEQUENCES * TOKENS, format).reshape(SEQUENCES, TOKENS, 64)
        self.entries = entries_of(random, SEQUENCES * ENTRIES, format).reshape(SEQUENCES, ENTRIES, 64)
        self.queries = random_bf16(random, SEQUENCES * TOKENS, heads, DIM).reshape(SEQUENCES, TOKENS, heads, DIM)
        self.sinks = placed(random.normal(0, 1, heads).astype(np.float32))

    @staticmethod
    def seen(position: int) -> list[int]:
        """Its window, and of the finished entries every other one."""
        return [*range(max(0, position - WINDOW + 1), position + 1)] + [~i for i in range(1, (position + 1) // 4, 2)]

    def run(self, isa: str, places: list[tuple[int, int]], groups: int, threads: int = 2) -> np.ndarray:
        """Outputs [rows, heads, DIM] of one step. Keys that cannot be seen are NaN, or have such a scale."""
        pages = aligned((SEQUENCES, (KEPT + ENTRIES) * 64), np.uint8, fill=255)
        for sequence, first in dict(reversed(places)).items():
            for position in range(max(0, first - WINDOW + 1), first):
                pages[sequence, position % KEPT * 64 :][:64] = self.keys[sequence, position]
            pages[sequence, KEPT * 64 :] = self.entries[sequence].ravel()
        rows, most = len(places), WINDOW + ENTRIES
        at = tuple(np.array(places).T)
        q, output = aligned((rows, self.heads, PADDED), BF16), aligned((rows, self.heads, DIM), BF16)
        q[..., :DIM] = self.queries[at]
        selected, counts = aligned((rows, most), np.int32, fill=1 << 20), aligned((rows,), np.int32)
        for row, (_, position) in enumerate(places):
            seen = self.seen(position)
            selected[row, : len(seen)], counts[row] = seen, len(seen)
        layout = cpu_kernels.KvLayout(
            base=pages.ctypes.data, sequence_stride=pages.strides[0], head_stride=0, value_offset=0, key_dim=PADDED,
            value_dim=PADDED, format=getattr(cpu_kernels.Format, self.format), key_scales_offset=0,
            value_scales_offset=0, shared=True, entry_offset=KEPT * 64, entry_bytes=64,
        )  # fmt: skip
        states = aligned(SEQUENCES * (TOKENS // KEY_BLOCK + 1) * self.heads * (PADDED + STATE_EXTRA), np.float32)
        rig = Rig(isa, threads, rows=rows, sequences=SEQUENCES, positions=TOKENS, batch_invariant=True)
        rig.add(
            "attention", q=q, output=output, states=states, sinks=self.sinks, kv=layout, heads=self.heads,
            kv_heads=groups, head_dim=DIM, output_stride=self.heads * DIM, window=0, scale=0.2, selected=selected,
            selects=most, counts=counts, fresh=placed(self.keys[at]), kept=KEPT,
        )  # fmt: skip
        rig.step(places)
        return output

    def exact(self, sequence: int, position: int) -> np.ndarray:
        """[heads, DIM], in double precision."""
        keys, entries = (as_floats(x[sequence], self.format).astype(np.float64) for x in (self.keys, self.entries))
        seen = np.stack([keys[i] if i >= 0 else entries[~i] for i in self.seen(position)])[:, :DIM]
        scores = 0.2 * self.queries[sequence, position].astype(np.float64) @ seen.T
        scores = np.concatenate([scores, np.asarray(self.sinks, np.float64)[:, None]], axis=1)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        return (weights / weights.sum(1, keepdims=True))[:, :-1] @ seen


@pytest.mark.parametrize(("heads", "groups"), [(6, 1), (6, 3), (60, 2)])
def test_a_row_attends_to_what_it_sees_wherever_that_lies(isa, kv_format, heads, groups) -> None:
    """And to the same bits alone, and on any number of threads."""
    model = Model(kv_format, heads)
    found = model.run(isa, PLACES, groups)
    for row, place in enumerate(PLACES):
        wanted = model.exact(*place)
        assert np.abs(found[row].astype(np.float64) - wanted).max() <= 0.02 * np.abs(wanted).max(), place
    assert found.tobytes() == model.run(isa, PLACES, groups, threads=3).tobytes()
    for row in (0, 1, 17, 33, 36):
        assert np.array_equal(found[row], model.run(isa, [PLACES[row]], groups)[0])
