"""Blocks of every type of GGUF files: what they stand for, by explicit loops, and the packed formats that hold them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np
import pytest

from hybrid.files.gguf_types import TYPES_BY_NAME
from hybrid.formats import FORMATS
from hybrid.weights.checkpoints.exact_mix import exact_format
from hybrid.weights.checkpoints.gguf_blocks import READABLE, packed, row_bytes, values
from hybrid.weights.checkpoints.gguf_mix import HOLDS, type_kind
from hybrid.weights.checkpoints.gguf_tabled import GRIDS

LISTS = dict(np.load(GRIDS))
ROWS, COLUMNS = 32, 512
Block = bytes
F = np.float32


def half(block: Block, at: int) -> np.float32:
    return F(np.frombuffer(block[at : at + 2], np.float16)[0])


def signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def bits(block: Block, at: int, count: int, place: int) -> int:
    """`count` bits of the number that begins at a byte, from `place` on."""
    return int.from_bytes(block[at:], "little") >> place & ((1 << count) - 1)


def q8_0(b: Block) -> Iterator[np.float32]:
    yield from (half(b, 0) * F(signed(b[2 + i])) for i in range(32))


def nibble(b: Block, at: int, i: int) -> int:
    """Of 32 values in 16 bytes."""
    return b[at + i % 16] >> (4 if i >= 16 else 0) & 15


def q4_0(b: Block) -> Iterator[np.float32]:
    yield from (half(b, 0) * F(nibble(b, 2, i) - 8) for i in range(32))


def q4_1(b: Block) -> Iterator[np.float32]:
    yield from (half(b, 0) * F(nibble(b, 4, i)) + half(b, 2) for i in range(32))


def q5_0(b: Block) -> Iterator[np.float32]:
    yield from (half(b, 0) * F((nibble(b, 6, i) | bits(b, 2, 1, i) << 4) - 16) for i in range(32))


def q5_1(b: Block) -> Iterator[np.float32]:
    yield from (half(b, 0) * F(nibble(b, 8, i) | bits(b, 4, 1, i) << 4) + half(b, 2) for i in range(32))


def iq4_nl(b: Block) -> Iterator[np.float32]:
    table = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
    yield from (half(b, 0) * F(table[nibble(b, 2, i)]) for i in range(32))


def iq4_xs(b: Block) -> Iterator[np.float32]:
    table = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
    for group in range(8):
        scale = (b[4 + group // 2] >> 4 * (group % 2) & 15) | bits(b, 2, 2, 2 * group) << 4
        for i in range(32):
            yield half(b, 0) * F(scale - 32) * F(table[nibble(b, 8 + 16 * group, i)])


def k_scale(b: Block, group: int) -> tuple[int, int]:
    """6 bits of a scale and of a minimum, of the twelve bytes from the fifth on."""
    if group < 4:
        return b[4 + group] & 63, b[8 + group] & 63
    last = b[8 + group]
    return last & 15 | b[group] >> 6 << 4, last >> 4 | b[4 + group] >> 6 << 4


def k_values(b: Block, code: Callable[[int], int]) -> Iterator[np.float32]:
    for i in range(256):
        scale, lowest = k_scale(b, i // 32)
        yield half(b, 0) * F(scale) * F(code(i)) - half(b, 2) * F(lowest)


def k_nibble(b: Block, at: int, i: int) -> int:
    """Each 32 bytes hold 64 values: the low halves come first."""
    return b[at + i // 64 * 32 + i % 32] >> (4 if i % 64 >= 32 else 0) & 15


def q4_k(b: Block) -> Iterator[np.float32]:
    yield from k_values(b, lambda i: k_nibble(b, 16, i))


def q5_k(b: Block) -> Iterator[np.float32]:
    yield from k_values(b, lambda i: k_nibble(b, 48, i) | (b[16 + i % 32] >> i // 32 & 1) << 4)


def q6_k(b: Block) -> Iterator[np.float32]:
    for i in range(256):
        half_block, inner = divmod(i, 128)
        low = b[64 * half_block + inner % 64] >> (4 if inner >= 64 else 0) & 15
        high = b[128 + 32 * half_block + inner % 32] >> 2 * (inner // 32) & 3
        yield half(b, 208) * F(signed(b[192 + i // 16])) * F((low | high << 4) - 32)


def q2_k(b: Block) -> Iterator[np.float32]:
    for i in range(256):
        code = b[16 + i // 128 * 32 + i % 32] >> 2 * (i % 128 // 32) & 3
        scale = b[i // 16]
        yield half(b, 80) * F(scale & 15) * F(code) - half(b, 82) * F(scale >> 4)


def q3_k(b: Block) -> Iterator[np.float32]:
    for i in range(256):
        code = (b[32 + i // 128 * 32 + i % 32] >> 2 * (i % 128 // 32) & 3) - (0 if b[i % 32] >> i // 32 & 1 else 4)
        group = i // 16
        low = b[96 + group % 8] >> (4 if group >= 8 else 0) & 15
        scale = low | (b[104 + group % 4] >> 2 * (group // 4) & 3) << 4
        yield half(b, 108) * F(scale - 32) * F(code)


def sign(signs: int, i: int) -> int:
    """Of eight, one bit each."""
    return -1 if signs >> i & 1 else 1


def even(seven: int) -> int:
    """Seven bits, and an eighth that makes their number even."""
    return seven | seven.bit_count() % 2 << 7


def iq1_s(b: Block) -> Iterator[np.float32]:
    for i in range(256):
        word = bits(b, 34 + i // 32 * 2, 16, 0)
        entry = b[2 + i // 8] | (word >> 3 * (i % 32 // 8) & 7) << 8
        value = int(LISTS["iq1_s"][entry, i % 8]) - 1 + (-0.125 if word >> 15 else 0.125)
        yield half(b, 0) * F(2 * (word >> 12 & 7) + 1) * F(value)


def iq1_m(b: Block) -> Iterator[np.float32]:
    d = half(sum(bits(b, 48 + 2 * i, 4, 12) << 4 * i for i in range(4)).to_bytes(2, "little"), 0)
    for i in range(256):
        high = b[32 + i // 16] >> 4 * (i % 16 // 8) & 15
        scale = bits(b, 48 + i // 64 * 2, 3, i % 64 // 16 * 3)
        value = int(LISTS["iq1_s"][b[i // 8] | (high & 7) << 8, i % 8]) - 1 + (-0.125 if high & 8 else 0.125)
        yield d * F(2 * scale + 1) * F(value)


def iq2_xxs(b: Block) -> Iterator[np.float32]:
    for i in range(256):
        at = 2 + i // 32 * 8
        value = (8, 25, 43)[LISTS["iq2_xxs"][b[at + i % 32 // 8], i % 8]]
        signs = even(bits(b, at + 4, 7, i % 32 // 8 * 7))
        yield half(b, 0) * F(bits(b, at + 4, 4, 28) + 0.5) / 4 * F(value * sign(signs, i % 8))


def iq2_xs(b: Block) -> Iterator[np.float32]:
    for i in range(256):
        word = bits(b, 2 + i // 8 * 2, 16, 0)
        value = (8, 25, 43)[LISTS["iq2_xs"][word & 511, i % 8]]
        scale = b[66 + i // 32] >> 4 * (i % 32 // 16) & 15
        yield half(b, 0) * F(scale + 0.5) / 4 * F(value * sign(even(word >> 9), i % 8))


def iq2_s(b: Block) -> Iterator[np.float32]:
    for i in range(256):
        entry = b[2 + i // 8] | (b[66 + i // 32] >> 2 * (i % 32 // 8) & 3) << 8
        value = (8, 25, 43)[LISTS["iq2_s"][entry, i % 8]]
        scale = b[74 + i // 32] >> 4 * (i % 32 // 16) & 15
        yield half(b, 0) * F(scale + 0.5) / 4 * F(value * sign(b[34 + i // 8], i % 8))


def iq3_xxs(b: Block) -> Iterator[np.float32]:
    for i in range(256):
        value = (4, 12, 20, 28, 36, 44, 52, 62)[LISTS["iq3_xxs"][b[2 + i // 4], i % 4]]
        at = 66 + i // 32 * 4
        signs = even(bits(b, at, 7, i % 32 // 8 * 7))
        yield half(b, 0) * F(bits(b, at, 4, 28) + 0.5) / 2 * F(value * sign(signs, i % 8))


def iq3_s(b: Block) -> Iterator[np.float32]:
    for i in range(256):
        entry = b[2 + i // 4] | (b[66 + i // 32] >> i % 32 // 4 & 1) << 8
        value = 1 + 2 * int(LISTS["iq3_s"][entry, i % 4])
        scale = b[106 + i // 64] >> 4 * (i % 64 // 32) & 15
        yield half(b, 0) * F(2 * scale + 1) * F(value * sign(b[74 + i // 8], i % 8))


def tq1_0(b: Block) -> Iterator[np.float32]:
    """Digits to the base of three, of which each byte is the fraction of 256."""
    for first, last, digits in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        for digit in range(digits):
            for byte in b[first:last]:
                yield half(b, 52) * F((byte * 3**digit % 256 * 3 >> 8) - 1)


def tq2_0(b: Block) -> Iterator[np.float32]:
    yield from (half(b, 64) * F((b[i // 128 * 32 + i % 32] >> 2 * (i % 128 // 32) & 3) - 1) for i in range(256))


def mxfp4(b: Block) -> Iterator[np.float32]:
    codes = np.array([nibble(b, 1, i) for i in range(32)], np.uint8).view(ml_dtypes.float4_e2m1fn).astype(F)
    yield from codes * F(2.0) ** F(b[0] - 127)


def nvfp4(b: Block) -> Iterator[np.float32]:
    for group in range(4):
        scale = F(np.uint8(b[group] & 127).view(ml_dtypes.float8_e4m3fn)) if b[group] & 127 != 127 else F(0)
        for i in range(16):
            code = np.uint8(b[4 + 8 * group + i % 8] >> (4 if i >= 8 else 0) & 15)
            yield F(code.view(ml_dtypes.float4_e2m1fn)) * scale


READ: dict[str, Callable[[Block], Iterator[np.float32]]] = {
    "Q8_0": q8_0, "Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0, "Q5_1": q5_1, "IQ4_NL": iq4_nl, "IQ4_XS": iq4_xs,
    "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k, "Q2_K": q2_k, "Q3_K": q3_k, "MXFP4": mxfp4,
    "NVFP4": nvfp4, "IQ1_S": iq1_s, "IQ1_M": iq1_m, "IQ2_XXS": iq2_xxs, "IQ2_XS": iq2_xs, "IQ2_S": iq2_s,
    "IQ3_XXS": iq3_xxs, "IQ3_S": iq3_s, "TQ1_0": tq1_0, "TQ2_0": tq2_0,
}  # fmt: skip
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q2_K": (80, 82),
          "Q3_K": (108,), "MXFP4": (), "NVFP4": (), "IQ1_M": (54,), "TQ1_0": (52,), "TQ2_0": (64,)}  # fmt: skip


def random_rows(type: str) -> np.ndarray:
    random, size = np.random.default_rng(len(type)), TYPES_BY_NAME[type].bytes
    rows = random.integers(0, 256, (ROWS, row_bytes(type, COLUMNS)), np.uint8)
    blocks = rows.reshape(ROWS, -1, size)
    for at in HALVES.get(type, (0,)):
        blocks[..., at + 1] &= 0xBB  # no NaN, no infinity
    if type == "MXFP4":
        blocks[..., 0] = random.integers(90, 160, blocks.shape[:2])
    if type == "NVFP4":
        blocks[..., :4] &= 127  # as they are written
        blocks[0, 0, 0] = 127
    return rows


@pytest.mark.parametrize("type", READ)
def test_values_are_those_of_the_blocks(type: str) -> None:
    rows = random_rows(type)
    found = values(type, rows)
    size = TYPES_BY_NAME[type].bytes
    for row in (0, ROWS - 1):
        data = rows[row].tobytes()
        expected = [value for at in range(0, len(data), size) for value in READ[type](data[at : at + size])]
        np.testing.assert_array_equal(found[row], np.array(expected, F))


@pytest.mark.parametrize("type", READ)
def test_values_are_those_of_llama_cpp(type: str) -> None:
    gguf = pytest.importorskip("gguf", reason="make test-compare installs it")
    rows = random_rows(type)
    expected = gguf.dequantize(rows, gguf.GGMLQuantizationType[type])
    np.testing.assert_allclose(values(type, rows), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("type", "format"), [(type, name) for type, names in HOLDS.items() for name in names])
def test_packed_formats_hold_them_exactly(type: str, format: str) -> None:
    rows = random_rows(type)
    blocks = packed(type, rows, format)
    np.testing.assert_array_equal(FORMATS[format].unpack(blocks, ROWS, COLUMNS), values(type, rows))


def test_lists_are_those_of_llama_cpp() -> None:
    """Checksums of the grids of gguf.quants 0.19, as places in its grid_map."""
    assert {name: zlib.crc32(found.tobytes()) for name, found in LISTS.items()} == {
        "iq1_s": 3755842399, "iq2_xxs": 128848154, "iq2_xs": 710144840, "iq2_s": 4272876715, "iq3_xxs": 1666419980,
        "iq3_s": 1885211182,
    }  # fmt: skip


def test_every_type_is_tested() -> None:
    assert {*READABLE} == {*READ, "F32", "F16", "BF16"} and {*HOLDS} <= {*READ}


@pytest.mark.parametrize(
    ("types", "format"),
    [
        (["Q4_K", "Q6_K"], "bf16"),
        (["Q8_0", "F16"], "bf16"),
        (["Q2_K"], "q2_k"),
        (["IQ2_XXS", "Q3_K"], "q4_t"),
        (["Q3_K", "Q6_K"], "q6_k"),
        (["MXFP4"], "mxfp4"),
        (["Q8_0", "Q4_0"], "q8_0"),
        (["Q4_1"], "q4_1"),
    ],
)
def test_the_smallest_format_holds_all_of_a_matrix(types: list[str], format: str) -> None:
    assert exact_format(type_kind(type, 16) for type in types) == format
