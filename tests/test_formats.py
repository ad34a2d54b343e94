"""Weight formats: packed bytes mean what the layout says, read here by plain loops, and quantising loses little."""

from __future__ import annotations

from functools import partial

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid.errors import ConfigError
from hybrid.formats import FORMATS, FP8, FP8_ROW, GROUPED, INT4, INT8, MXFP4, NVFP4, fp4, fp8, int4, mxfp4, nvfp4
from hybrid.formats import packed as layout
from hybrid.formats.grouped import exact_halves
from hybrid.formats.mix import MIXES, FormatMix, parse_mix

FROM_MINIMUM = ("q4_1", "q5_1", "q4_k", "q5_k", "q2_k")
SHAPES = [(1, 1), (16, 64), (17, 65), (40, 200), (130, 300), (144, 129), (3, 512)]
HEADER_AND_BLOCK = {  # bytes for 64 inputs, and for 2880
    "bf16": (0, 2048, 0, 92160),
    "int8": (64, 1088, 64, 46144),
    "int4": (0, 576, 0, 25920),
    "fp8": (64, 1088, 128, 46208),
    "fp8_row": (64, 1088, 64, 46144),
    "mxfp4": (64, 576, 1472, 24512),
    "nvfp4": (128, 640, 2944, 25984),
    "q8_0": (0, 1088, 0, 48960),
    "q4_0": (0, 576, 0, 25920),
    "q5_0": (0, 704, 0, 31680),
    "q4_1": (0, 640, 0, 28800),
    "q5_1": (0, 768, 0, 34560),
    "q4_k": (64, 640, 768, 26688),
    "q5_k": (64, 768, 768, 32448),
    "q6_k": (64, 896, 768, 38208),
    "q4_t": (128, 704, 832, 26752),
    "q2_k": (64, 384, 768, 15168),
}
BF16, E4M3, E2M1 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn


def reference(format: str, packed: np.ndarray, n: int, k: int) -> np.ndarray:
    """All packed values, padding included, float32 [padded n, padded k], each found by the table of the layout."""
    inputs = -(-k // 64) * 64
    blocks = packed.reshape(-(-n // 16), -1)
    values = np.zeros((len(blocks) * 16, inputs), np.float32)
    for row in range(len(values)):
        for i in range(inputs):
            values[row, i] = _VALUE[format](blocks[row // 16], row % 16, i, inputs)
    return values


def _bf16_value(block: np.ndarray, column: int, i: int, inputs: int) -> np.float32:
    return np.float32(block.view(BF16)[i // 2 * 32 + column * 2 + i % 2])


def _int8_value(block: np.ndarray, column: int, i: int, inputs: int) -> np.float32:
    code = int(block[64 + i // 4 * 64 + column * 4 + i % 4]) - 128
    return np.float32(code) * block[:64].view(np.float32)[column]


def _int4_value(block: np.ndarray, column: int, i: int, inputs: int) -> np.float32:
    part = block[i // 64 * 576 :][:576]
    byte = int(part[64 + i % 64 // 8 * 64 + column * 4 + i % 4])
    code = (byte >> 4 if i % 8 >= 4 else byte & 15) - 8
    return np.float32(code) * np.float32(part[:64].view(BF16)[i % 64 // 32 * 16 + column])


def _fp8_value(block: np.ndarray, column: int, i: int, inputs: int) -> np.float32:
    header = -(-(-(-inputs // 128) * 4) // 64) * 64
    value = block[header + i * 16 + column : header + i * 16 + column + 1].view(E4M3)[0]
    return np.float32(value) * block[:header].view(np.float32)[i // 128]


def _mxfp4_value(block: np.ndarray, column: int, i: int, inputs: int) -> np.float32:
    part = block[i // 128 * 1088 :]
    scale = int(part[i % 128 // 32 * 16 + column])
    return np.float32(_e2m1(_low_bits(part[64:], column, i % 128)) * 2.0 ** (scale - 127))


def _fp8_row_value(block: np.ndarray, column: int, i: int, inputs: int) -> np.float32:
    value = block[64 + i * 16 + column : 65 + i * 16 + column].view(E4M3)[0]
    return np.float32(value) * block[:64].view(np.float32)[column]


def _nvfp4_value(block: np.ndarray, column: int, i: int, inputs: int) -> np.float32:
    part = block[64 + i // 64 * 576 :]
    scale = np.float32(part[i % 64 // 16 * 16 + column : i % 64 // 16 * 16 + column + 1].view(E4M3)[0])
    return np.float32(_e2m1(_low_bits(part[64:], column, i % 64))) * (scale * block[:64].view(np.float32)[column])


def _e2m1(code: int) -> float:
    magnitude = [0, 0.5, 1, 1.5, 2, 3, 4, 6][code & 7]
    return -magnitude if code & 8 else magnitude


def _low_bits(codes: np.ndarray, column: int, i: int) -> int:
    byte = int(codes[i // 8 * 64 + column * 4 + i % 4])
    return byte >> 4 if i % 8 >= 4 else byte & 15


def _two_bits(codes: np.ndarray, column: int, i: int) -> int:
    return int(codes[i // 16 * 64 + column * 4 + i % 4]) >> 2 * (i % 16 // 4) & 3


def _five_bits(codes: np.ndarray, column: int, i: int) -> int:
    """Of 64 inputs: two lines of fifth bits, eight of the lower four."""
    high = int(codes[i // 32 * 64 + column * 4 + i % 4]) >> i % 32 // 4 & 1
    return _low_bits(codes[128:], column, i) | high << 4


def _six_bits(codes: np.ndarray, column: int, i: int) -> int:
    """Of 64 inputs: four lines of upper two bits, eight of the lower four."""
    high = int(codes[i // 16 * 64 + column * 4 + i % 4]) >> 2 * (i % 16 // 4) & 3
    return _low_bits(codes[256:], column, i) | high << 4


def _eight_bits(codes: np.ndarray, column: int, i: int) -> int:
    return int(codes[i // 4 * 64 + column * 4 + i % 4])


_GROUPED = {  # how codes are found, lines of scales before them, lines of both; what is taken off a code
    "q8_0": (_eight_bits, 1, 17, 128), "q4_0": (_low_bits, 1, 9, 8), "q5_0": (_five_bits, 1, 11, 16),
    "q4_1": (_low_bits, 2, 10, 0), "q5_1": (_five_bits, 2, 12, 0),
    "q4_k": (_low_bits, 1, 9, 0), "q5_k": (_five_bits, 1, 11, 0), "q6_k": (_six_bits, 1, 13, 32),
    "q2_k": (_two_bits, 1, 5, 0),
}  # fmt: skip


def _grouped_value(format: str, block: np.ndarray, column: int, i: int, inputs: int) -> np.float32:
    find, heads, lines, offset = _GROUPED[format]
    superblocks, superblock = format.endswith("k"), i // 256
    factors = block[superblock * (64 + 4 * lines * 64) :][:64]
    part, i = block[(superblock + 1) * 64 * superblocks + i // 64 * lines * 64 :][: lines * 64], i % 64
    q = np.float32(find(part[heads * 64 :], column, i) - offset)
    if format in ("q4_1", "q5_1"):
        scale, minimum = part[i // 32 * 64 :][:64].view(np.float16).reshape(2, 16)[:, column].astype(np.float32)
        return np.float32(q * scale + minimum)
    if not superblocks:
        return np.float32(q * np.float32(part[:64].view(np.float16).reshape(2, 16)[i // 32, column]))
    d, dmin = factors.view(np.float16).reshape(2, 16)[:, column].astype(np.float32)
    if format == "q2_k":
        byte = int(part[:64].reshape(4, 16)[i // 16, column])
        return np.float32(d * np.float32(byte & 15) * q - dmin * np.float32(byte >> 4))
    if format == "q6_k":
        return np.float32(d * np.float32(part[:64].view(np.int8).reshape(4, 16)[i // 16, column]) * q)
    scale, minimum = part[:64].reshape(2, 2, 16)[i // 32, :, column].astype(np.float32)
    return np.float32(d * scale * q - dmin * minimum)


def _tabled_value(block: np.ndarray, column: int, i: int, inputs: int) -> np.float32:
    superblock = block[64 + i // 256 * (64 + 4 * 576) :]
    part = superblock[64 + i % 256 // 64 * 576 :]
    number = int(block[_low_bits(part[64:], column, i % 64)]) - 128
    d = superblock[:64].view(np.float32)[column]
    return np.float32(d * np.float32(part[:64].view(np.int8).reshape(4, 16)[i % 64 // 16, column]) * np.float32(number))


_VALUE = {
    "bf16": _bf16_value, "int8": _int8_value, "int4": _int4_value, "fp8": _fp8_value, "mxfp4": _mxfp4_value,
    "fp8_row": _fp8_row_value, "nvfp4": _nvfp4_value, "q4_t": _tabled_value,
    **{name: partial(_grouped_value, name) for name in _GROUPED},
}  # fmt: skip


def weights(n: int, k: int, dtype: str = "f4", seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((n, k)) * 0.05).astype(dtype)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_bytes_mean_what_the_layout_says(format: str, shape: tuple[int, int]) -> None:
    weight = weights(*shape)
    kind, inputs = FORMATS[format], -(-shape[1] // 64) * 64
    packed = kind.pack(weight)
    assert packed.dtype == np.uint8 and packed.shape == (-(-shape[0] // 16), kind.block_bytes(inputs))
    expected = reference(format, packed, *shape)
    found = kind.unpack(packed, *shape)
    assert found.dtype == np.float32 and (found == expected[: shape[0], : shape[1]]).all()
    assert not expected[shape[0] :].any()
    assert format in FROM_MINIMUM or not expected[:, shape[1] :].any()  # inputs that are not there are zeros
    assert np.linalg.norm(found - weight) <= (0.35 if format == "q2_k" else 0.15) * np.linalg.norm(weight)


@pytest.mark.parametrize("format", FORMATS)
def test_sizes_are_those_of_the_layout(format: str) -> None:
    kind = FORMATS[format]
    sizes = [size(k) for k in (64, 2880) for size in (kind.header_bytes, kind.block_bytes)]
    assert tuple(sizes) == HEADER_AND_BLOCK[format]
    assert kind.name == format and kind.integer == (format not in ("bf16", "fp8", "fp8_row", "mxfp4", "nvfp4"))


@pytest.mark.parametrize("format", FORMATS)
def test_an_expert_has_three_matrices(format: str) -> None:
    expert = layout.expert_bytes(format, 96, 40)
    assert expert == 2 * layout.packed_bytes(format, 40, 96) + layout.packed_bytes(format, 96, 40)
    assert layout.down_offset(format, 96, 40) == expert - layout.packed_bytes(format, 96, 40)


PADDING = {  # of one column with one input: the byte of a line, and the bytes of its header
    "int8": (128, {0}), "int4": (0x88, {0}), "fp8": (0, {0}), "mxfp4": (0, {127}),
}  # fmt: skip


@pytest.mark.parametrize("format", PADDING)
def test_padding_has_the_bytes_of_the_layout(format: str) -> None:
    kind, (line, header) = FORMATS[format], PADDING[format]
    packed = kind.pack(np.ones((17, 65), "f4")).reshape(2, -1)
    scales, lines = np.split(packed[1], [kind.header_bytes(128)])
    if format == "int4":  # they lie among each other
        scales, lines = np.split(packed[1].reshape(2, -1), [64], axis=1)
    columns = {"int8": scales[4:], "int4": scales.reshape(-1, 16, 2)[:, 1:], "fp8": scales[4:]}
    assert set(columns.get(format, scales.reshape(-1, 16)[:, 1:]).ravel().tolist()) == header
    assert int((lines != line).sum()) == {"int4": 33, "mxfp4": 33}.get(format, 65)


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_stay_zeros_and_nothing_overflows(format: str) -> None:
    kind = FORMATS[format]
    assert not kind.unpack(kind.pack(np.zeros((20, 100), "f4")), 20, 100).any()
    halves = format in GROUPED
    for size in (1e-6, 1e-3, 3e4, -1e4) if halves else (1e-44, 1e-38, 1e-30, 1e30, 1e38, -1e38):
        weight = np.full((20, 100), size, np.float32)
        weight[3, 5] = 0
        packed = kind.pack(weight)
        assert kind.all_finite(packed, 128)
        found = kind.unpack(packed, 20, 100)
        assert np.isfinite(found).all() and (format in FROM_MINIMUM or found[3, 5] == 0)
        if abs(size) > (1e-4 if halves else 1e-36):
            assert np.allclose(found, weight, rtol=0.26, atol=0.1 * abs(size) if format in FROM_MINIMUM else 0)


@pytest.mark.parametrize("format", [name for name in GROUPED if name != "q4_t"])
def test_weights_beyond_what_scales_of_fp16_hold_are_refused(format: str) -> None:
    weight = np.ones((16, 64), np.float32)
    weight[3, 5] = -1e10
    with pytest.raises(ValueError, match="fp16 holds 65504 at most"):
        GROUPED[format].pack(weight)


@pytest.mark.parametrize("dtype", ["f4", "f2", BF16])
@pytest.mark.parametrize("format", FORMATS)
def test_every_dtype_is_quantised_from_its_own_values(format: str, dtype: np.dtype) -> None:
    weight = weights(48, 192, dtype)
    assert (FORMATS[format].pack(weight) == FORMATS[format].pack(weight.astype("f4"))).all()


def test_int8_is_within_half_a_step_of_every_column() -> None:
    weight = weights(50, 300)
    found = FORMATS["int8"].unpack(FORMATS["int8"].pack(weight), 50, 300)
    steps = np.abs(weight).max(axis=1, keepdims=True) / 127
    assert (np.abs(found - weight) <= steps * 0.5001).all()
    assert np.allclose(np.abs(found).max(axis=1, keepdims=True), steps * 127)


def test_int4_codes_are_the_nearest_for_the_stored_scales_and_better_than_the_plain_rule() -> None:
    groups = np.random.default_rng(3).standard_normal((32, 5000)).astype("f4")
    scales, codes = int4.quantise(groups)
    codes = codes - 8
    assert (scales == scales.astype(BF16).astype("f4")).all()
    assert (codes == np.clip(np.rint(groups / scales), -8, 7)).all() and codes.min() == -8 and codes.max() == 7
    largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=0)[None], axis=0)[0]
    plain = (largest / -8).astype(BF16).astype("f4")
    errors = ((codes * scales - groups) ** 2).sum(axis=0)
    plain_errors = ((np.clip(np.rint(groups / plain), -8, 7) * plain - groups) ** 2).sum(axis=0)
    assert (errors <= plain_errors * 1.00001).all() and errors.sum() < 0.92 * plain_errors.sum()
    assert np.sqrt(errors.sum() / (groups**2).sum()) < 0.083


@given(st.lists(st.floats(-500, 500, width=32), min_size=1, max_size=50))
def test_fp8_codes_are_those_of_a_cast(values: list[float]) -> None:
    exact = np.array(values, np.float32)
    assert (fp8.encode(exact).view(E4M3).astype("f4") == np.clip(exact, -448, 448).astype(E4M3).astype("f4")).all()


def test_fp8_rounds_every_tie_as_a_cast_does_and_never_to_nan() -> None:
    finite = np.sort(fp8.VALUES[np.isfinite(fp8.VALUES)])
    between = (finite[1:] + finite[:-1]) / 2
    near = np.concatenate([finite, between, np.nextafter(between, np.inf), np.nextafter(between, -np.inf)])
    assert (fp8.encode(near) == near.astype(E4M3).view(np.uint8)).all()
    beyond = np.array([448, 449, 1e30, 3.4e38, -464, -1e38], np.float32)
    assert (fp8.encode(beyond).view(E4M3).astype("f4") == np.copysign(448, beyond)).all()


def test_fp8_has_the_scales_of_its_squares() -> None:
    weight = weights(200, 300)
    codes, scales = fp8.quantise(weight)
    assert scales.shape == (2, 3)
    for row in range(2):
        for column in range(3):
            square = (slice(row * 128, row * 128 + 128), slice(column * 128, column * 128 + 128))
            assert scales[row, column] == np.abs(weight[square]).max() / np.float32(448)
            assert (codes[square] == (weight[square] / scales[row, column]).astype(E4M3).view(np.uint8)).all()
    found = FP8.unpack(FP8.pack(weight), 200, 300)
    assert (np.abs(found - weight) <= np.maximum(np.abs(weight) / 16, scales.max() / 1000)).all()


@pytest.mark.parametrize("first_row", [0, 16, 112, 144])
def test_published_fp8_is_packed_as_it_is(first_row: int) -> None:
    """Partial squares at both edges, from any whole block on."""
    random = np.random.default_rng(0)
    codes = random.integers(0, 127, (300, 200), np.uint8) | random.choice([0, 128], (300, 200)).astype(np.uint8)
    scales = random.uniform(0.01, 3, (3, 2)).astype("f4")
    expected = codes.view(E4M3).astype("f4") * scales.repeat(128, 0).repeat(128, 1)[:300, :200]
    packed = FP8.pack_blocks(codes[first_row:], scales, first_row)
    assert (FP8.unpack(packed, 300 - first_row, 200) == expected[first_row:]).all()
    assert (reference("fp8", packed, 300 - first_row, 200)[: 300 - first_row, :200] == expected[first_row:]).all()
    rows = np.arange(first_row, 300) // 128
    assert (fp8.decode(codes[first_row:], scales[rows]) == expected[first_row:]).all()


def test_published_mxfp4_is_packed_as_it_is() -> None:
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (50, 3, 16), np.uint8)
    scales = random.integers(100, 140, (50, 3), np.uint8)
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(50, 3, 32)
    values = codes.view(E2M1).astype("f4") * scales.view(ml_dtypes.float8_e8m0fnu).astype("f4")[..., None]
    packed = MXFP4.pack_blocks(blocks, scales)
    assert (MXFP4.unpack(packed, 50, 96) == values.reshape(50, 96)).all()
    padded = reference("mxfp4", packed, 50, 96)
    assert (padded[:50, :96] == values.reshape(50, 96)).all() and not padded[50:].any() and not padded[:, 96:].any()
    assert (mxfp4.decode(blocks, scales) == values.reshape(50, 96)).all()


def test_published_nvfp4_and_fp8_by_row_are_packed_as_they_are() -> None:
    random = np.random.default_rng(0)
    pairs, scales = random.integers(0, 256, (50, 48), np.uint8), random.integers(1, 127, (50, 6), np.uint8)
    factors = random.uniform(0.001, 3, 50).astype("f4")
    codes = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(50, 6, 16)
    steps = scales.view(E4M3).astype("f4") * factors[:, None]
    values = (codes.view(E2M1).astype("f4") * steps[..., None]).reshape(50, 96)
    packed = NVFP4.pack_blocks(pairs, scales, factors)
    assert (NVFP4.unpack(packed, 50, 96) == values).all() and (nvfp4.decode(pairs, scales, factors) == values).all()
    padded = reference("nvfp4", packed, 50, 96)
    assert (padded[:50, :96] == values).all() and not padded[50:].any() and not padded[:, 96:].any()
    assert NVFP4.all_finite(packed, 128) and not NVFP4.all_finite(NVFP4.pack_blocks(pairs, scales | 127, factors), 128)

    codes = random.integers(0, 127, (50, 96), np.uint8)
    values = codes.view(E4M3).astype("f4") * factors[:, None]
    packed = FP8_ROW.pack_blocks(codes, factors)
    assert (FP8_ROW.unpack(packed, 50, 96) == values).all()
    assert (reference("fp8_row", packed, 50, 96)[:50, :96] == values).all()
    assert FP8_ROW.all_finite(packed, 128) and not FP8_ROW.all_finite(FP8_ROW.pack_blocks(codes, factors * np.inf), 128)


def _published_groups(format: str, n: int, k: int) -> tuple[np.ndarray, ...]:
    """Codes and scales of every kind, from the whole of what they may be."""
    random, bits = np.random.default_rng(1), GROUPED[format].bits
    codes = random.integers(0, 1 << bits, (n, k), np.uint8)

    def halves(group: int) -> np.ndarray:
        return random.uniform(-2, 2, (n, -(-k // group))).astype(np.float16)

    if format == "q4_t":
        scales = random.integers(-128, 128, (n, -(-k // 16)), np.int8)
        return codes, halves(256).astype("f4"), scales, random.integers(-128, 128, (-(-n // 16), 16), np.int8)
    if format.endswith("k"):
        if bits == 6:
            return codes, halves(256), random.integers(-128, 128, (n, -(-k // 16)), np.int8)
        highest, group = (16, 16) if bits == 2 else (64, 32)
        small = (random.integers(0, highest, (n, -(-k // group)), np.uint8) for _ in range(2))
        return codes, halves(256), halves(256), *small
    return codes.view(np.int8) if bits == 8 else codes, *(halves(32) for _ in range(1 + (format in FROM_MINIMUM)))


@pytest.mark.parametrize("format", GROUPED)
@pytest.mark.parametrize("shape", [(17, 96), (5, 288)], ids=str)
def test_published_groups_are_packed_as_they_are(format: str, shape: tuple[int, int]) -> None:
    kind, (n, k) = GROUPED[format], shape
    published = _published_groups(format, n, k)
    values = kind.decode(*published)
    packed = kind.pack_blocks(*published)
    assert values.shape == shape and (kind.unpack(packed, n, k) == values).all()
    padded = reference(format, packed, n, k)
    assert (padded[:n, :k] == values).all() and not padded[n:].any() and not padded[:, -(-k // 256) * 256 :].any()


def test_groups_are_decoded_as_the_gguf_package_does() -> None:
    """Values of gguf.quants.dequantize 0.19 of one superblock with these codes and scales, at five inputs."""
    codes = (np.arange(256, dtype=np.uint8) * 7).reshape(1, 256)
    half, small = np.float16(0.0371), np.arange(8, dtype=np.uint8).reshape(1, 8) * 9
    d, m = np.full((1, 1), half), np.full((1, 1), np.float16(-0.217))
    s32, m32 = np.repeat(d, 8, axis=1), np.repeat(m, 8, axis=1)
    signed = (np.arange(16, dtype=np.int8).reshape(1, 16) - 8) * 16
    published = {
        "q8_0": (codes.view(np.int8), s32), "q4_0": (codes & 15, s32), "q5_0": (codes & 31, s32),
        "q4_1": (codes & 15, s32, m32), "q5_1": (codes & 31, s32, m32),
        "q4_k": (codes & 15, d, m, small, 63 - small), "q5_k": (codes & 31, d, m, small, 63 - small),
        "q6_k": (codes & 63, d, signed),
    }  # fmt: skip
    for format, arrays in published.items():
        found = GROUPED[format].decode(*arrays)[0, [1, 40, 100, 200, 255]]
        assert found.view(np.uint32).tolist() == GGUF_VALUES[format], format


GGUF_VALUES = {
    "q8_0": [1048903680, 1063518208, 3223420928, 1083080704, 3196387328],
    "q4_0": [3172466688, 0, 1041760256, 0, 1024983040],
    "q5_0": [3198877696, 1050148864, 1055129600, 1050148864, 1051394048],
    "q4_1": [1026490368, 1034125312, 1047117824, 1034125312, 1039106048],
    "q5_1": [1026490368, 1059876864, 1062367232, 1059876864, 1060499456],
    "q4_k": [1096468224, 1097221632, 1100919296, 1099948160, 1101550592],
    "q5_k": [1096468224, 1100866304, 1108310272, 1112027200, 1114229248],
    "q6_k": [1122861056, 1105461248, 3255107584, 1113849856, 1120915456],
}


def test_published_int4_and_int8_are_packed_as_they_are() -> None:
    random = np.random.default_rng(0)
    codes, scales = random.integers(0, 16, (50, 96), np.uint8), random.uniform(-1, 1, (50, 3)).astype(BF16)
    values = (codes.astype("f4") - 8) * scales.astype("f4").repeat(32, axis=1)
    assert (INT4.unpack(INT4.pack_blocks(codes, scales), 50, 96) == values).all()
    assert (reference("int4", INT4.pack_blocks(codes, scales), 50, 96)[:50, :96] == values).all()
    signed, one = random.integers(-128, 128, (50, 96), np.int8), random.uniform(0, 1, 50).astype("f4")
    assert (INT8.unpack(INT8.pack_blocks(signed, one), 50, 96) == signed * one[:, None]).all()
    assert (reference("int8", INT8.pack_blocks(signed, one), 50, 96)[:50, :96] == signed * one[:, None]).all()


def test_scales_are_taken_into_fp16_only_if_it_holds_them() -> None:
    scales = np.array([[0.5, 2**-17, -3.0]], BF16)
    assert exact_halves(scales).astype("f4").tolist() == scales.astype("f4").tolist()
    for wrong in (1e-9, 1e9, np.inf * 0):
        with pytest.raises(ValueError, match="which fp16 does not hold exactly"):
            exact_halves(np.array([[1, wrong]], BF16))


def test_mxfp4_takes_the_better_of_two_exponents() -> None:
    groups = (np.random.default_rng(1).standard_normal((32, 4000)) * 3).astype("f4")
    exponents, codes = mxfp4.quantise(groups)
    floor = np.floor(np.log2(np.abs(groups).max(axis=0))).astype(int) - 2 + 127
    results = [_ocp(groups, floor), _ocp(groups, floor + 1)]
    errors = [((values - groups) ** 2).sum(axis=0) for values in results]
    assert ((exponents == floor) | (exponents == floor + 1)).all() and len(set((exponents - floor).tolist())) == 2
    expected = np.where(exponents == floor, *results)
    assert (fp4.VALUES[codes] * mxfp4.powers(exponents) == expected).all()
    chosen = np.where(exponents == floor, *errors)
    assert (chosen <= np.minimum(*errors) * 1.00001).all()


def _ocp(groups: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """Values that a cast to e2m1, ties to even and saturated, keeps of groups [32, ...]."""
    scaled = np.clip(groups * 2.0 ** (127.0 - exponents), -6, 6).astype(np.float32)
    return (scaled.astype(E2M1).astype("f4") * 2.0 ** (exponents - 127.0)).astype(np.float32)


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_finite_is_found_in_packed_bytes(format: str) -> None:
    kind = FORMATS[format]
    packed = kind.pack(weights(32, 128))
    assert kind.all_finite(packed, 128)
    nan = dict.fromkeys(GROUPED, [0, 0x7E]) | {
        "bf16": [0x80, 0x7F],
        "int8": [0, 0, 0x80, 0x7F],
        "int4": [0x80, 0x7F],
        "fp8": [0, 0, 0xC0, 0x7F],
        "fp8_row": [0, 0, 0xC0, 0x7F],
        "nvfp4": [0, 0, 0xC0, 0x7F],
        "q4_t": [0, 0, 0xC0, 0x7F],
    }
    bad = nan.get(format, [255])
    first = 64 if format == "q4_t" else 0  # behind the table
    packed[1, first : first + len(bad)] = bad
    assert not kind.all_finite(packed, 128)
    if format in ("fp8", "fp8_row"):
        packed = kind.pack(weights(32, 128))
        packed[1, -1] = 0xFF
        assert not kind.all_finite(packed, 128)


def test_an_expert_interleaves_gate_and_up() -> None:
    gate, up, down = weights(40, 96, seed=1), weights(40, 96, seed=2), weights(96, 40, seed=3)
    for name, kind in FORMATS.items():
        blob = layout.pack_expert(name, gate, up, down)
        assert blob.size == layout.expert_bytes(name, 96, 40)
        start = layout.down_offset(name, 96, 40)
        blocks = blob[:start].reshape(3, 2, -1)
        for index, matrix in enumerate((gate, up)):
            assert (blocks[:, index].reshape(-1) == kind.pack(matrix).reshape(-1)).all()
        assert (blob[start:] == kind.pack(down).reshape(-1)).all()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auto", FormatMix("int8", "int8", "bf16", "bf16", "bf16")),
        ("head=int4", FormatMix("int8", "int8", "bf16", "bf16", "int4")),
        ("bf16", FormatMix.uniform("bf16")),
        ("int8", FormatMix.uniform("int8")),
        ("int4", FormatMix.uniform("int4")),
        ("fp8", FormatMix("fp8", "fp8", "fp8", "fp8", "bf16")),
        ("mxfp4", FormatMix("mxfp4", "mxfp4", "bf16", "bf16", "bf16")),
        ("int4, head=int8, attention = bf16", FormatMix("int4", "int4", "int4", "bf16", "int8")),
    ],
)
def test_a_mix_is_read(text: str, expected: FormatMix) -> None:
    assert parse_mix(text, FormatMix("int8", "int8", "bf16", "bf16", "bf16")) == expected


def test_a_mix_says_what_is_apart() -> None:
    texts = [str(mix) for mix in MIXES.values()]
    assert texts == ["bf16", "int8", "int4", "head bf16, rest fp8", "head bf16, rest fp8_row",
        "head bf16, rest nvfp4", "experts mxfp4, shared mxfp4, rest bf16",
        "q8_0", "q6_k", "q5_k", "q4_k"]  # fmt: skip
    assert str(parse_mix("int4,head=int8", MIXES["bf16"])) == "head int8, rest int4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "int3",
            "'int3' is unknown; allowed: auto, bf16, int8, int4, fp8, fp8_row, nvfp4, mxfp4, q8_0, q6_k, q5_k, q4_k",
        ),
        ("", "'' is unknown"),
        ("int4,int8", "'int8' is not understood.*experts, shared, dense, attention, head.*bf16, int8"),
        ("int4,body=int8", "'body=int8' is not understood"),
        ("int4,head=int2", "'head=int2' is not understood"),
        ("int4,head=int8,head=bf16", "may be set once"),
        ("int4,", "'' is not understood"),
    ],
)
def test_a_mix_that_is_wrong_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        parse_mix(text, MIXES["bf16"])
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="format 'int3' of experts is unknown"):
        FormatMix.uniform("int3")
