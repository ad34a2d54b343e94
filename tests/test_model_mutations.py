"""Files of a model that are damaged at random: each is read, or refused by an error of the library."""

from __future__ import annotations

import copy
import json
import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import FP8, packed, write_checkpoint
from configs import CONFIGS

from hybrid.config import EngineConfig
from hybrid.errors import HybridError
from hybrid.formats.mix import MIXES
from hybrid.machine.hardware import HardwareSpec, probe
from hybrid.models import model_spec
from hybrid.models.rope import inverse_frequencies
from hybrid.plan.plan import make_plan
from hybrid.weights.checkpoints.huggingface import Checkpoint
from hybrid.weights.pack import describe, pack
from hybrid.weights.shard import read_header
from hybrid.weights.store import Store

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
COUNT = 250  # of each kind
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**63, 2**64, 10**30, 10**4000, 0.5, -0.0, 1e-320, 1e308, float("inf"),
    float("nan"), "", "x", "../x", "/etc/passwd", "\0", "\ud800", "x" * 5000, "F16", "BF16", "U8", "F8_E4M3", "mxfp4",
    [], {}, [0], [None], [[]], {"": 0}, [-1, 5], [5, -1], ["conv"], [1] * 300, {"a": {"b": {}}},
]  # fmt: skip


def mutated(value: Any, chance: random.Random) -> Any:
    """A copy with one or two places changed, removed, added or put for another."""
    value = json.loads(json.dumps(value))
    for _ in range(chance.randint(1, 2)):
        parent, key = chance.choice(list(_places(value)))
        match chance.randrange(5):
            case 0:
                del parent[key]
            case 1:
                _, other = chance.choice(list(_places(value))) if len(value) else (None, None)
                parent[key] = other
            case 2 if type(parent[key]) is int:
                parent[key] += chance.choice([-64, -2, -1, 1, 2, 64])
            case _:
                parent[key] = copy.deepcopy(chance.choice(ODD))
        if not value:
            break
    return value


def _places(value: Any) -> Any:
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def damaged(text: bytes, chance: random.Random) -> bytes:
    """With some bytes changed, cut out, repeated or put in."""
    for _ in range(chance.randint(1, 3)):
        first = chance.randrange(len(text) + 1)
        last = min(len(text), first + chance.choice([0, 1, 1, 5, 100]))
        new = chance.choice([b"", b"\xff", b"[", b"}", b'"', b"9" * 5000, b"null", text[first:last] * 2, b"[" * 3000])
        text = text[:first] + new + text[last:]
    return text


@pytest.fixture(scope="module")
def hardware() -> HardwareSpec:
    return probe()


def plan(path: Path, hardware: HardwareSpec) -> None:
    config, native = describe(path)
    spec = model_spec(config)
    make_plan(spec, hardware, EngineConfig(device="cpu"), native)
    for rope in spec.ropes:
        inverse_frequencies(rope)


def mutate_config(path: Path, chance: random.Random, hardware: HardwareSpec) -> None:
    """With weights beside it, and without."""
    family = chance.choice(list(CONFIGS))
    config = {**CONFIGS[family], "layer_types": None, "quantization_config": chance.choice([None, FP8])}
    config |= {"rope_scaling": chance.choice([None, {"rope_type": "yarn", "factor": 2.0, "beta_fast": 32.0}])}
    config |= CONFIGS[family]
    text = json.dumps(mutated(config, chance)).encode()
    (path / "config.json").write_bytes(text if chance.random() < 0.8 else damaged(text, chance))
    if chance.random() < 0.5:
        Checkpoint.open(path).check()
    else:
        (path / SINGLE).unlink()
    plan(path, hardware)


def mutate_header(path: Path, chance: random.Random, hardware: HardwareSpec) -> None:
    data = (path / SINGLE).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size]
    text = (
        damaged(header, chance) if chance.random() < 0.2 else json.dumps(mutated(json.loads(header), chance)).encode()
    )
    length = len(text) if chance.random() < 0.9 else chance.randrange(2**64)
    (path / SINGLE).write_bytes(length.to_bytes(8, "little") + text + data[8 + size :])
    pack(Checkpoint.open(path), path.with_name("store"), MIXES[chance.choice(["bf16", "int8"])])


def mutate_index(path: Path, chance: random.Random, hardware: HardwareSpec) -> None:
    names = read_header((path / SINGLE).rename(path / "a.safetensors"))
    index = {"metadata": {"total_size": 5}, "weight_map": dict.fromkeys(names, "a.safetensors")}
    text = json.dumps(mutated(index, chance)).encode()
    (path / INDEX).write_bytes(text if chance.random() < 0.8 else damaged(text, chance))
    Checkpoint.open(path).check()
    plan(path, hardware)


def mutate_manifest(path: Path, chance: random.Random, hardware: HardwareSpec) -> None:
    """Half of them with the right checksum again."""
    body = json.loads((path / "manifest.json").read_text())
    if chance.random() < 0.5:
        body = mutated({name: value for name, value in body.items() if name != "checksum"}, chance)
        body["checksum"] = zlib.crc32(json.dumps(body, sort_keys=True).encode())
        text = json.dumps(body).encode()
    else:
        text = damaged(json.dumps(mutated(body, chance)).encode(), chance)
    (path / "manifest.json").write_bytes(text)
    Store.open(path).close()
    plan(path, hardware)


KINDS: dict[str, Callable[[Path, random.Random, HardwareSpec], None]] = {
    "config.json": mutate_config,
    "header": mutate_header,
    "index": mutate_index,
    "manifest": mutate_manifest,
}


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_or_refused(tmp_path: Path, hardware: HardwareSpec, kind: str) -> None:
    source = write_checkpoint(tmp_path / "source", "llama", vocab_size=16, num_hidden_layers=1)
    if kind == "manifest":
        source = packed(source).path
    faults, refused = [], 0
    for seed in range(COUNT):
        path = shutil.copytree(source, tmp_path / "model")
        try:
            KINDS[kind](path, random.Random(seed), hardware)
        except HybridError as error:
            refused += 1
            if "\n" in str(error) or len(str(error)) > 2000:
                faults.append(f"{seed}: {str(error)[:200]}")
        except Exception as error:  # what the test is about
            faults.append(f"{seed}: {type(error).__name__}: {error}")
        shutil.rmtree(path)
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
    assert not faults, f"{len(faults)} faults: {faults[:10]}"
    assert COUNT / 3 < refused < COUNT
