"""The blocks of quantised GGUF rows: codes and scales as the packed formats take them, and what they stand for."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import numpy.typing as npt

from hybrid.files.gguf_types import TYPES_BY_NAME
from hybrid.formats.block import Array, Bytes, Floats
from hybrid.formats.mxfp4 import decode as decode_mxfp4

FLOATS: dict[str, npt.DTypeLike] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
Parts = tuple[Array, ...]  # codes [rows, columns], then scales


def row_bytes(type: str, columns: int) -> int:
    found = TYPES_BY_NAME[type]
    return columns // found.block * found.bytes


def values(type: str, rows: Bytes) -> Array:
    """What rows of bytes [n, bytes] stand for: floats of the file's type, or float32."""
    if type in FLOATS:
        return rows.view(FLOATS[type])
    return DECODE[type](*split(type, rows))


def split(type: str, rows: Bytes) -> Parts:
    """The codes and scales of rows of bytes [n, bytes]."""
    blocks = rows.reshape(len(rows), -1, TYPES_BY_NAME[type].bytes)
    return SPLIT[type](blocks)


def _halves(blocks: Bytes, at: int) -> Array:
    """The float16 that lies `at` so many bytes in each block [n, blocks]."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16)[..., 0]


def _nibbles(packed: Bytes) -> Bytes:
    """Low halves, then high halves of each group of bytes [..., bytes]."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _fifth_bits(packed: Bytes) -> Array:
    """Bit i of the 32 in four bytes [..., 4], as 16 in place i."""
    return np.unpackbits(packed, axis=-1, bitorder="little") << 4


def _flat(codes: Array) -> Array:
    return codes.reshape(len(codes), -1)


def _q8_0(blocks: Bytes) -> Parts:
    return _flat(blocks[..., 2:].view(np.int8)), _halves(blocks, 0)


def _q4_0(blocks: Bytes) -> Parts:
    return _flat(_nibbles(blocks[..., 2:])), _halves(blocks, 0)


def _q4_1(blocks: Bytes) -> Parts:
    return _flat(_nibbles(blocks[..., 4:])), _halves(blocks, 0), _halves(blocks, 2)


def _q5_0(blocks: Bytes) -> Parts:
    return _flat(_nibbles(blocks[..., 6:]) | _fifth_bits(blocks[..., 2:6])), _halves(blocks, 0)


def _q5_1(blocks: Bytes) -> Parts:
    codes = _nibbles(blocks[..., 8:]) | _fifth_bits(blocks[..., 4:8])
    return _flat(codes), _halves(blocks, 0), _halves(blocks, 2)


def _k_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Eight 6-bit scales and minima out of twelve bytes: of the last four, the high bits are in the first eight."""
    first, second, last = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([first & 63, last & 15 | first >> 6 << 4], axis=-1)
    minima = np.concatenate([second & 63, last >> 4 | second >> 6 << 4], axis=-1)
    return _flat(scales), _flat(minima)


def _k_nibbles(packed: Bytes) -> Bytes:
    """[..., 128] bytes hold 64 values in each 32."""
    return _nibbles(packed.reshape(*packed.shape[:-1], 4, 32)).reshape(*packed.shape[:-1], 256)


def _q4_k(blocks: Bytes) -> Parts:
    return _flat(_k_nibbles(blocks[..., 16:])), _halves(blocks, 0), _halves(blocks, 2), *_k_scales(blocks[..., 4:16])


def _q5_k(blocks: Bytes) -> Parts:
    """Bit g of the high byte i is that of value i of group g."""
    high = blocks[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    codes = _k_nibbles(blocks[..., 48:]) | high.reshape(*blocks.shape[:-1], 256) << 4
    return _flat(codes), _halves(blocks, 0), _halves(blocks, 2), *_k_scales(blocks[..., 4:16])


def _q6_k(blocks: Bytes) -> Parts:
    """Each half of 128 values has 64 bytes of low bits and 32 of high ones."""
    shape = blocks.shape[:-1]
    low = _nibbles(blocks[..., :128].reshape(*shape, 2, 64))
    high = blocks[..., 128:192].reshape(*shape, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    codes = low.reshape(*shape, 256) | high.reshape(*shape, 256) << 4
    scales = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8)
    return _flat(codes), _halves(blocks, 208), _flat(scales)


def _mxfp4(blocks: Bytes) -> Parts:
    """As published: two neighbours in a byte, blocks [n, groups, 16] and exponents [n, groups]."""
    codes = _nibbles(blocks[..., 1:])
    return codes[..., 0::2] | codes[..., 1::2] << 4, np.ascontiguousarray(blocks[..., 0])


def _scaled(codes: Array, scales: Array, offset: int = 0) -> Floats:
    """Codes times the scale of each group."""
    grouped = codes.reshape(*scales.shape, -1).astype(np.float32) - np.float32(offset)
    return _flat(grouped * scales.astype(np.float32)[..., None])


def _shifted(codes: Array, scales: Array, minima: Array) -> Floats:
    """The same and a minimum."""
    grouped = codes.reshape(*scales.shape, -1).astype(np.float32)
    return _flat(grouped * scales.astype(np.float32)[..., None] + minima.astype(np.float32)[..., None])


def _k_shifted(codes: Array, d: Array, dmin: Array, scales: Array, minima: Array) -> Floats:
    return _shifted(codes, _inner(d, scales), -_inner(dmin, minima))


def _k_scaled(codes: Array, d: Array, scales: Array) -> Floats:
    return _scaled(codes, _inner(d, scales), 32)


def _inner(outer: Array, inner: Array) -> Floats:
    """The scales of groups: those of blocks times their own small integers."""
    repeated = np.repeat(outer.astype(np.float32), inner.shape[1] // outer.shape[1], axis=1)
    product: Floats = repeated * inner.astype(np.float32)
    return product


SPLIT: dict[str, Callable[[Bytes], Parts]] = {
    "Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "MXFP4": _mxfp4,
}  # fmt: skip
DECODE: dict[str, Callable[..., Floats]] = {
    "Q8_0": _scaled, "Q4_0": lambda codes, s: _scaled(codes, s, 8), "Q4_1": _shifted,
    "Q5_0": lambda codes, s: _scaled(codes, s, 16), "Q5_1": _shifted,
    "Q4_K": _k_shifted, "Q5_K": _k_shifted, "Q6_K": _k_scaled, "MXFP4": decode_mxfp4,
}  # fmt: skip
READABLE = (*FLOATS, *SPLIT)
