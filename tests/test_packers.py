"""Matrices that other programs' own packing code made (compressed-tensors 0.20, AutoRound 0.16, AutoAWQ 0.2.9 and
GPTQModel 7) stand for the values that these programs make of them, bit for bit, and are packed without a change.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybrid.formats import FORMATS
from hybrid.weights.checkpoints.schemes.base import MatrixEntry
from hybrid.weights.checkpoints.schemes.methods import with_matrices
from hybrid.weights.shard import make_header, read_header

RECORD = Path(__file__).parent / "recorded" / "quantised.npz"
HOLDS = {
    "compressed-tensors int4": ("int4", "q4_0", "q5_0", "q8_0"),
    "compressed-tensors int4 with zeros": ("q5_0", "q8_0"),
    "compressed-tensors int4 with zeros in fp16": ("q5_0", "q8_0"),
    "compressed-tensors int8 in groups": ("q8_0",),
    "compressed-tensors int8 in rows": ("int8", "q8_0"),
    "compressed-tensors int8 with zeros": (),
    "compressed-tensors int2 with zeros": ("q4_0", "q5_0", "q8_0"),
    "auto-round of 4 bits": ("q4_0", "q5_0", "q8_0"),
    "auto-round of 2 bits": ("q4_0", "q5_0", "q8_0"),
    "auto-round of 3 bits": ("q4_0", "q5_0", "q8_0"),
    "auto-round of 8 bits": ("q8_0",),
    "auto-round of 4 bits with zeros": ("q5_0", "q8_0"),
    "auto-round of 3 bits with zeros": ("q4_0", "q5_0", "q8_0"),
    "awq": ("q5_0", "q8_0"),
    "awq in groups of 64": ("q5_0", "q8_0"),
    "gptq of 4 bits": ("q4_0", "q5_0", "q8_0"),
    "gptq of 8 bits": ("q8_0",),
    "gptq of 8 bits, a scale a row": ("int8", "q8_0"),
    "gptq of 4 bits with zeros": ("q5_0", "q8_0"),
    "gptq of 4 bits with zeros, second version": ("q5_0", "q8_0"),
    "gptq of 8 bits with zeros": (),
    "gptq of 2 bits with zeros": ("q4_0", "q5_0", "q8_0"),
    "gptq of 3 bits": ("q4_0", "q5_0", "q8_0"),
    "gptq of 3 bits with zeros": ("q4_0", "q5_0", "q8_0"),
    "gptq in the order of activations": (),
    "gptq in the order of activations, a scale a row": ("q4_0", "q5_0", "int8", "q8_0"),
}


@cache
def record() -> dict[str, dict[str, np.ndarray]]:
    """What was made, by case: tensors under "name|dtype", the config and the digest of the values."""
    found: dict[str, dict[str, np.ndarray]] = {}
    with np.load(RECORD) as arrays:
        for key in arrays.files:
            case, _, name = key.partition("|")
            found.setdefault(case, {})[name] = arrays[key]
    return found


def matrix_of(path: Path, case: str, **changes: Any) -> MatrixEntry:
    """The matrix, as a checkpoint of this one alone has it."""
    made = record()[case]
    config = json.loads(str(made["config"])) | changes
    tensors = {name: array for name, array in made.items() if name not in ("config", "values")}
    sizes = {name: array.nbytes for name, array in tensors.items()}
    header = make_header(
        (f"m.{name.split('|')[0]}", name.split("|")[1], array.shape, sizes[name]) for name, array in tensors.items()
    )
    data = b"".join(array.tobytes() + bytes(-array.nbytes % 64) for array in tensors.values())
    (path / "model.safetensors").write_bytes(header + data)
    entry = with_matrices({"quantization_config": config}, read_header(path / "model.safetensors"))["m.weight"]
    assert isinstance(entry, MatrixEntry)
    return entry


def digest(values: np.ndarray) -> str:
    return hashlib.sha256((values + np.float32(0)).tobytes()).hexdigest()  # one zero


def test_all_that_was_made_is_tested() -> None:
    assert {*record()} == {*HOLDS}


@pytest.mark.parametrize("case", HOLDS)
def test_values_are_those_of_the_program_that_made_them(tmp_path: Path, case: str) -> None:
    entry = matrix_of(tmp_path, case)
    assert entry.holds == HOLDS[case]
    source = entry.source("m.weight", 0, *entry.shape[:1], 1)
    values = source.floats(0, source.count)
    assert digest(values) == str(record()[case]["values"])
    assert (source.floats(5, 9) == values[5:9]).all()
    for name in entry.holds:
        blocks = source.packed_as(name).blocks(0, source.count)
        assert (FORMATS[name].unpack(blocks, *entry.shape) == values).all()
    assert all(source.packed_as(name).published is None for name in {*FORMATS} - {*entry.holds})
