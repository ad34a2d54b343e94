"""Headers of GGUF files: what is sound is read, what is not is refused in one line."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf_rig import Blocks, Raw, text, value, write_gguf
from test_mutations import mutate

from hybrid.errors import HybridError, WeightsError
from hybrid.files.gguf import read_gguf_header

METADATA = {
    "general.architecture": "llama", "llama.block_count": 2, "llama.rope.freq_base": 1e4, "a.flag": True,
    "tokenizer.ggml.tokens": ["a", "é", "", "b" * 99], "a.list": [1.5, 2.5], "split.no": -1,
}  # fmt: skip
TENSORS = {
    "token_embd.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "blk.0.ffn_up.weight": Blocks("Q8_0", (2, 64), bytes(range(136))),
    "output_norm.weight": np.ones(3, np.float16),
}


@pytest.mark.parametrize("version", [1, 2, 3])
def test_every_version_is_read(tmp_path: Path, version: int) -> None:
    path = write_gguf(tmp_path / "model.gguf", METADATA, TENSORS, version)
    header = read_gguf_header(path)
    assert header.metadata == METADATA
    assert {name: tensor.shape for name, tensor in header.tensors.items()} == {
        "token_embd.weight": (3, 4), "blk.0.ffn_up.weight": (2, 64), "output_norm.weight": (3,)
    }  # fmt: skip
    place, data = header.tensors["blk.0.ffn_up.weight"], path.read_bytes()
    assert data[place.start : place.end] == bytes(range(136)) and place.start % 32 == 0


def test_the_alignment_is_that_of_the_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", {"general.alignment": 8}, {})
    assert read_gguf_header(path).tensors == {}
    for wrong in (0, 24, 1 << 20, "x", -8):
        with pytest.raises(WeightsError, match=r"has general.alignment .*, it must be a power of two"):
            read_gguf_header(write_gguf(tmp_path / "b.gguf", {"general.alignment": wrong}, {}))


def header(tensors: int = 0, entries: int = 0, body: bytes = b"", version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, entries) + body


def tensor(name: str = "t", sizes: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes) + struct.pack("<IQ", kind, offset)


FILES = {
    "empty": (b"", "is no GGUF file: it has 0 bytes"),
    "magic": (header(magic=b"GGML"), "is no GGUF file: it begins with b'GGML'"),
    "version": (header(version=4), "has GGUF version 4, this program reads 1, 2, 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is a big-endian GGUF file, only little-endian ones"),
    "tensors": (header(tensors=1 << 60), "gives 1152921504606846976 as the number of tensors"),
    "entries": (header(entries=1 << 40), "gives 1099511627776 as the number of metadata entries"),
    "cut counts": (header()[:15], "is truncated"),
    "long text": (header(entries=1, body=struct.pack("<Q", 1 << 50) + bytes(40)), "number of bytes of the name of a"),
    "no utf-8": (header(entries=1, body=struct.pack("<Q", 2) + b"\xff\xfe" + bytes(40)), "that is not UTF-8"),
    "empty name": (header(entries=1, body=text("") + value(1)), "has '' as the name of a metadata entry"),
    "twice": (header(entries=2, body=2 * (text("a") + value(1))), "has metadata a twice"),
    "type": (header(entries=1, body=text("a") + struct.pack("<II", 77, 1)), "has metadata a of type 77"),
    "inner type": (header(entries=1, body=text("a") + struct.pack("<IIQI", 9, 9, 1, 1)), "has metadata a of type 9"),
    "list": (header(entries=1, body=text("a") + struct.pack("<IIQ", 9, 4, 1 << 40)), "number of values of a, more"),
    "texts": (header(entries=1, body=text("a") + struct.pack("<IIQ", 9, 8, 1 << 40)), "number of texts of a, more"),
    "nan": (header(entries=1, body=text("a") + value(float("nan"))), "has metadata a that is NaN or infinite"),
    "name": (header(1, 0, tensor("x" * 300) + bytes(99)), "as the name of a tensor"),
    "rank": (header(1, 0, tensor(sizes=(1,) * 5) + bytes(99)), "gives tensor t 5 dimensions, at most 4"),
    "huge rank": (header(1, 0, text("t") + b"\xff" * 4 + bytes(99)), "gives tensor t 4294967295 dimensions"),
    "unknown": (header(1, 0, tensor(kind=99) + bytes(99)), "tensor t has type 99, which this program does not know"),
    "size 0": (header(1, 0, tensor(sizes=(0, 4)) + bytes(99)), r"gives tensor t the sizes \[0, 4\]"),
    "product": (header(1, 0, tensor(sizes=(1 << 40,) * 4) + bytes(99)), "gives tensor t the sizes"),
    "block": (header(1, 0, tensor(sizes=(33,), kind=8) + bytes(99)), "gives Q8_0 tensor t rows of 33 values"),
    "offset": (header(1, 0, tensor(offset=8) + bytes(99)), "places tensor t at 8, which is no multiple of 32"),
    "far": (header(1, 0, tensor(offset=1 << 62) + bytes(99)), "is truncated: tensor t ends at byte"),
    "long": (header(1, 0, tensor(sizes=(4096,)) + bytes(99)), "is truncated: tensor t ends at byte"),
    "same": (header(2, 0, 2 * tensor() + bytes(99)), "has tensor t twice"),
    "overlap": (header(2, 0, tensor("a") + tensor("b") + bytes(99)), "has overlapping tensors a and b"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_cannot_be(tmp_path: Path, case: str) -> None:
    data, message = FILES[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=message) as raised:
        read_gguf_header(path)
    assert "\n" not in str(raised.value) and str(raised.value).startswith(str(path))


def test_mutants_are_read_or_refused(tmp_path: Path) -> None:
    sound = write_gguf(tmp_path / "sound.gguf", METADATA, TENSORS).read_bytes()
    chance, path, refused = random.Random(13), tmp_path / "mutant.gguf", 0
    for _ in range(1500):
        data = bytearray(mutate(sound, chance))
        for _ in range(chance.randint(0, 2)):
            at = chance.randrange(max(1, min(len(data), 500)))
            data[at : at + 1] = bytes([chance.choice((0, 1, 127, 128, 255))])
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        try:
            read_gguf_header(path)
        except HybridError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 500


def test_other_types_of_numbers(tmp_path: Path) -> None:
    kinds = {0: "B", 1: "b", 2: "H", 3: "h", 10: "Q", 11: "q", 12: "d"}
    metadata = {code: Raw(kind, struct.pack(f"<{code}", 7)) for kind, code in kinds.items()}
    found = read_gguf_header(write_gguf(tmp_path / "a.gguf", metadata, {})).metadata
    assert found == dict.fromkeys(kinds.values(), 7)
