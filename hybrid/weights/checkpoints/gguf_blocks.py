"""The blocks of quantised GGUF rows: codes and scales as the packed formats take them, and what they stand for."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import numpy.typing as npt

from hybrid.files.gguf_types import TYPES_BY_NAME
from hybrid.formats import MXFP4, NVFP4, Q2_K, Q4_0, Q4_1, Q4_K, Q4_T, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0
from hybrid.formats.block import BLOCK, Array, Bytes
from hybrid.formats.grouped import Grouped
from hybrid.formats.mxfp4 import decode as decode_mxfp4
from hybrid.formats.nvfp4 import decode as decode_nvfp4
from hybrid.formats.tabled import looked_up
from hybrid.weights.checkpoints.gguf_bits import flat, halves, nibbles
from hybrid.weights.checkpoints.gguf_tabled import IQ4_VALUES, TABLED
from hybrid.weights.checkpoints.matrices import INTEGERS

FLOATS: dict[str, npt.DTypeLike] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
Parts = tuple[Array, ...]  # codes [rows, columns], then scales
_ONE = np.float32(1)


def row_bytes(type: str, columns: int) -> int:
    found = TYPES_BY_NAME[type]
    return columns // found.block * found.bytes


def values(type: str, rows: Bytes, factor: np.float32 = _ONE) -> Array:
    """What rows of bytes [n, bytes] stand for: floats of the file's type, or float32. factor: see `packed`."""
    if type in FLOATS:
        return rows.view(FLOATS[type])
    if type in INTEGERS:
        return rows.view(INTEGERS[type]).astype(np.float32)
    blocks = _blocks(type, rows)
    if type == "NVFP4":
        codes, fractions = SPLIT[type](blocks)
        return decode_nvfp4(codes, fractions, np.full(len(rows), factor))
    if type == "MXFP4":
        return decode_mxfp4(*SPLIT[type](blocks))
    with np.errstate(invalid="ignore", over="ignore"):  # of factors that are not finite
        return Q4_T.decode(*_tabled(type, blocks)) if type in TABLED else FORMAT_OF[type].decode(*SPLIT[type](blocks))


def packed(type: str, rows: Bytes, format: str, factor: np.float32 = _ONE) -> Bytes:
    """Rows of bytes [n, bytes] in a packed format that holds their values exactly, without arithmetic on these.

    factor: what all values of NVFP4 are multiplied by, which their file has elsewhere.
    """
    if type in TABLED:
        return _packed_tabled(_tabled(type, _blocks(type, rows)), format)
    codes, *scales = SPLIT[type](_blocks(type, rows))
    if type == "MXFP4":
        return MXFP4.pack_blocks(codes, *scales)
    if type == "NVFP4":
        return NVFP4.pack_blocks(codes, scales[0], np.full(len(rows), factor))
    own, target = FORMAT_OF[type], FORMAT_OF[format.upper()]
    if own.offset != target.offset:
        codes = codes.view(np.int8) + np.int8(target.offset - own.offset)
    return target.pack_blocks(codes.view(np.int8 if target.bits == 8 else np.uint8), *scales)


def _blocks(type: str, rows: Bytes) -> Bytes:
    return rows.reshape(len(rows), -1, TYPES_BY_NAME[type].bytes)


def _tabled(type: str, blocks: Bytes) -> Parts:
    """With the table of the type for each block of rows."""
    *parts, table = TABLED[type](blocks)
    return *parts, np.broadcast_to(table, (-(-len(blocks) // BLOCK), len(table)))


def _packed_tabled(parts: Parts, format: str) -> Bytes:
    codes, d, scales, tables = parts
    if format == Q4_T.name:
        return Q4_T.pack_blocks(codes, d, scales, tables)
    numbers = looked_up(codes, tables) + np.int8(Q6_K.offset)
    return Q6_K.pack_blocks(numbers.view(np.uint8), d.astype(np.float16), scales)  # of types that have d so


def _fifth_bits(packed: Bytes) -> Array:
    """Bit i of the 32 in four bytes [..., 4], as 16 in place i."""
    return np.unpackbits(packed, axis=-1, bitorder="little") << 4


def _q8_0(blocks: Bytes) -> Parts:
    return flat(blocks[..., 2:].view(np.int8)), halves(blocks, 0)


def _q4_0(blocks: Bytes) -> Parts:
    return flat(nibbles(blocks[..., 2:])), halves(blocks, 0)


def _q4_1(blocks: Bytes) -> Parts:
    return flat(nibbles(blocks[..., 4:])), halves(blocks, 0), halves(blocks, 2)


def _q5_0(blocks: Bytes) -> Parts:
    return flat(nibbles(blocks[..., 6:]) | _fifth_bits(blocks[..., 2:6])), halves(blocks, 0)


def _q5_1(blocks: Bytes) -> Parts:
    codes = nibbles(blocks[..., 8:]) | _fifth_bits(blocks[..., 4:8])
    return flat(codes), halves(blocks, 0), halves(blocks, 2)


def _k_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Eight 6-bit scales and minima out of twelve bytes: of the last four, the high bits are in the first eight."""
    first, second, last = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([first & 63, last & 15 | first >> 6 << 4], axis=-1)
    minima = np.concatenate([second & 63, last >> 4 | second >> 6 << 4], axis=-1)
    return flat(scales), flat(minima)


def _k_nibbles(packed: Bytes) -> Bytes:
    """[..., 128] bytes hold 64 values in each 32."""
    return nibbles(packed.reshape(*packed.shape[:-1], 4, 32)).reshape(*packed.shape[:-1], 256)


def _q4_k(blocks: Bytes) -> Parts:
    return flat(_k_nibbles(blocks[..., 16:])), halves(blocks, 0), halves(blocks, 2), *_k_scales(blocks[..., 4:16])


def _q5_k(blocks: Bytes) -> Parts:
    """Bit g of the high byte i is that of value i of group g."""
    high = blocks[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    codes = _k_nibbles(blocks[..., 48:]) | high.reshape(*blocks.shape[:-1], 256) << 4
    return flat(codes), halves(blocks, 0), halves(blocks, 2), *_k_scales(blocks[..., 4:16])


def _q6_k(blocks: Bytes) -> Parts:
    """Each half of 128 values has 64 bytes of low bits and 32 of high ones."""
    shape = blocks.shape[:-1]
    low = nibbles(blocks[..., :128].reshape(*shape, 2, 64))
    high = blocks[..., 128:192].reshape(*shape, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    codes = low.reshape(*shape, 256) | high.reshape(*shape, 256) << 4
    scales = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8)
    return flat(codes), halves(blocks, 208), flat(scales)


def _mxfp4(blocks: Bytes) -> Parts:
    """As published: two neighbours in a byte, blocks [n, groups, 16] and exponents [n, groups]."""
    codes = nibbles(blocks[..., 1:])
    return codes[..., 0::2] | codes[..., 1::2] << 4, np.ascontiguousarray(blocks[..., 0])


def _nvfp4(blocks: Bytes) -> Parts:
    """As published: two neighbours in a byte, [n, columns / 2], and e4m3 scales [n, groups], which have no sign here.

    What would be NaN in e4m3 is 0, as llama.cpp has it.
    """
    codes = nibbles(blocks[..., 4:].reshape(*blocks.shape[:-1], 4, 8))
    scales = blocks[..., :4] & 0x7F
    return flat(codes[..., 0::2] | codes[..., 1::2] << 4), flat(np.where(scales == 0x7F, 0, scales).astype(np.uint8))


def _iq4_nl(blocks: Bytes) -> Parts:
    """As Q8_0, whose codes hold the sixteen values."""
    return flat(IQ4_VALUES[nibbles(blocks[..., 2:])]), halves(blocks, 0)


def _q2_k(blocks: Bytes) -> Parts:
    """Each 32 bytes hold 128 values."""
    codes = blocks[..., 16:80].reshape(*blocks.shape[:-1], 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    scales = blocks[..., :16]
    return flat(codes), halves(blocks, 80), halves(blocks, 82), flat(scales & 15), flat(scales >> 4)


SPLIT: dict[str, Callable[[Bytes], Parts]] = {
    "Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "MXFP4": _mxfp4, "NVFP4": _nvfp4, "Q2_K": _q2_k,
    "IQ4_NL": _iq4_nl,
}  # fmt: skip
# The format whose codes and scales these are.
FORMAT_OF: dict[str, Grouped] = {
    "Q8_0": Q8_0, "Q4_0": Q4_0, "Q4_1": Q4_1, "Q5_0": Q5_0, "Q5_1": Q5_1, "Q4_K": Q4_K, "Q5_K": Q5_K, "Q6_K": Q6_K,
    "Q2_K": Q2_K, "IQ4_NL": Q8_0,
}  # fmt: skip
TABLES = (".ffn_gate_tid2eid.weight",)  # of small numbers: what the names of tensors of INTEGERS end with
READABLE = (*FLOATS, *SPLIT, *TABLED)
