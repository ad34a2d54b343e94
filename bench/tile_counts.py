"""What AMX would issue for a product, on paper: tiles loaded, multiplied and stored, and bytes moved.

It counts what cpu_kernels/src/ops/tile_passes.h does, instruction by instruction, for a matrix of `columns` by
`inputs`. The share of the issue limit compares it with a core that multiplies whole tiles without a pause, at the
published figures of Sapphire Rapids: a product every 16 cycles, whose sums are ready after 52; two lines of 64 bytes a
cycle from the first-level cache, where a strip of rows lies, 48 bytes a cycle from the second, where the weights are;
one line stored a cycle. What AVX-512 does between them, opening stored lines and merging segments, comes on top:
docs/amx.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kernel_cases import Shape

from hybrid.formats import GROUPED
from hybrid.formats.block import BLOCK, K_ALIGN, round_up
from hybrid.formats.packed import packed_bytes

TILE_ROWS = 16  # of the left operand
TILE_LINES = 16  # of the right one
# With fewer rows AVX-512 multiplies, without tiles.
FIRST_ROWS = {"bf16": 7, "int8": 17, "int4": 17, "fp8": 3, "fp8_row": 3, "mxfp4": 7} | dict.fromkeys(GROUPED, 16)
MAX_BLOCKS = 4  # multiplied together, by 16 rows; by 32 rows half as many
PANEL_INPUTS = 256
LINE = 64  # bytes
PRODUCT_CYCLES, LATENCY = 16, 52
NEAR_LINE, FAR_LINE, STORED_LINE = 1 / 2, 64 / 48, 1  # cycles a line: first-level cache, second, stored
# Inputs that share scales, as tiles multiply them; others have one chain of sums.
SEGMENTS = {"int8": 256, "int4": 256, "fp8": 128, "fp8_row": 256}
BYTES = ("int8", "int4")  # multiplied as such, four inputs to a word; others as pairs of bf16
OPENED = ("bf16", "int8")  # whose stored lines are multiplied as they are


@dataclass
class Counts:
    """Tiles loaded, multiplied and stored; the lines that these loads and stores move; cycles that each takes."""

    loads: int = 0
    products: int = 0
    stores: int = 0
    lines: int = 0
    multiplying: float = 0.0
    moving: float = 0.0

    @property
    def cycles(self) -> float:
        """Both at once: the slower of them."""
        return max(self.multiplying, self.moving)

    def load(self, tiles: int, lines: int, line_cycles: float = NEAR_LINE) -> None:
        self.loads += tiles
        self.lines += tiles * lines
        self.moving += tiles * lines * line_cycles

    def store(self, tiles: int) -> None:
        self.stores += tiles
        self.lines += tiles * TILE_ROWS
        self.moving += tiles * TILE_ROWS * STORED_LINE


def count(format: str, rows: int, columns: int, inputs: int) -> Counts:
    """Of one thread with all columns; nothing where the rows are too few for tiles."""
    counts = Counts()
    if format not in FIRST_ROWS or rows < FIRST_ROWS[format]:
        return counts
    padded = round_up(inputs, K_ALIGN)
    blocks = -(-columns // BLOCK)
    for first in range(0, rows, 2 * TILE_ROWS):
        high = 1 if rows - first <= TILE_ROWS else 2
        width = MAX_BLOCKS // high  # as many blocks as there are tiles for their sums, then one by one
        _pass(counts, format, high, width, padded, blocks // width)
        _pass(counts, format, high, 1, padded, blocks % width)
    return counts


def _pass(counts: Counts, format: str, high: int, width: int, inputs: int, times: int) -> None:
    """`high` tiles of rows by `width` blocks over all panels, as often as there are such groups of blocks."""
    chained = format not in SEGMENTS
    steps = -(-inputs // (TILE_LINES * (4 if format in BYTES else 2)))
    counts.load(times * steps * width, TILE_LINES, FAR_LINE)
    counts.load(times * steps * high, TILE_ROWS)
    counts.products += times * steps * high * width
    counts.multiplying += times * steps * max(high * width * PRODUCT_CYCLES, LATENCY)  # every sum waits for its last
    panels = -(-inputs // PANEL_INPUTS)
    segments = panels if chained else -(-inputs // SEGMENTS[format])  # none crosses a panel
    counts.store(times * segments * high * width)
    if chained:
        counts.load(times * (panels - 1) * high * width, TILE_ROWS)


def tile_report(shape: Shape, formats: list[str], rows: list[int]) -> dict[str, Any]:
    """{"results": [...]} for the GEMM of the shape, a row for each format and number of rows."""
    return {"results": [_row(shape, format, n) for format in formats for n in rows]}


def _row(shape: Shape, format: str, rows: int) -> dict[str, Any]:
    counts = count(format, rows, shape.columns, shape.hidden)
    each = 1024 if format in BYTES else 512  # multiplications a cycle of whole tiles
    ideal = rows * shape.columns * shape.hidden / each
    opened = 0 if format in OPENED or not counts.products else _opened_bytes(format, shape)
    return {
        "format": format,
        "rows": rows,
        "tile_loads": counts.loads,
        "tile_products": counts.products,
        "tile_stores": counts.stores,
        "weight_bytes": packed_bytes(format, shape.columns, shape.hidden),
        "opened_bytes": opened,
        "tile_bytes": counts.lines * LINE,
        "cycles": round(counts.cycles),
        "issue_share": round(ideal / counts.cycles, 4) if counts.cycles else None,
    }


def _opened_bytes(format: str, shape: Shape) -> int:
    """Of the lines that stored ones are opened to, once for all rows: int8 or bf16."""
    size = 1 if format in BYTES else 2
    return round_up(shape.columns, BLOCK) * round_up(shape.hidden, K_ALIGN) * size
