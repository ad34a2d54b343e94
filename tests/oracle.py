"""What transformers makes of the models of the tests, in fp32 and in bf16.

Its numbers are recorded in `tests/recorded/transformers/`, so that tests need neither it nor torch; each is found by
the contents of what it was made of. `HYBRID_TEST_ORACLE=live` computes them instead, and compares them with the record;
`tests/recorded/transformers.py` writes it, and "add" adds what tests of one new family ask for. What is not recorded is
computed where that can be.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import auto_model, is_around_one, rounded, table_of_experts, write_tensors
from configs import CONFIGS, STACKED

from hybrid.models import model_spec

RECORD = Path(__file__).parent / "recorded/transformers"
MODE = os.environ.get("HYBRID_TEST_ORACLE", "")
LIVE, WRITE, ADD = "live", "record", "add"
NEAR = 1e-3  # of a live result to the recorded one, in the Frobenius norm: both are fp32, of another machine perhaps
DTYPES = {"fp32": np.float32, "bf16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class Oracle:
    """A checkpoint directory, a prompt, and the logits [len, vocab] of transformers for it."""

    path: Path
    tokens: np.ndarray

    @functools.cached_property
    def exact(self) -> np.ndarray:
        return logits(self.path, self.tokens)

    @functools.cached_property
    def bf16_error(self) -> float:
        """That of transformers in bf16. On another machine it is a little different."""
        error = recorded(
            "errors_in_bf16",
            [contents(self.path), self.tokens.tolist()],
            lambda: np.float64(self.error(computed_logits(self.path, self.tokens, "bf16"))),
            near=0.5,
        )
        return float(error)

    def error(self, logits: np.ndarray) -> float:
        """Relative to the fp32 logits, in the Frobenius norm."""
        return float(np.linalg.norm(logits - self.exact) / np.linalg.norm(self.exact))


def together(errors: Iterable[float]) -> float:
    """The error of several prompts: one alone may have the luck that its near-ties of experts fall the right way."""
    return float(np.sqrt(np.mean(np.square(list(errors)))))


def save(path: Path, family: str, *, dtype: str = "fp32", seed: int = 0, length: int = 70, **changes: Any) -> Oracle:
    """A checkpoint with weights as transformers starts them, in the sizes of `configs.CONFIGS`."""
    config = {**CONFIGS[family], **changes, "torch_dtype": {"fp32": "float32", "bf16": "bfloat16"}[dtype]}
    scaling, theta = config.pop("rope_scaling", None), config.pop("rope_theta", None)
    config.setdefault("rope_parameters", {**(scaling or {"rope_type": "default"}), "rope_theta": theta})
    random, spread = np.random.default_rng(seed), config.get("initializer_range", 0.02)
    form = "fused" if family in STACKED else "apart"
    tensors = {
        name: table_of_experts(random, shape, config["n_routed_experts"])
        if name.endswith("tid2eid")
        else rounded(_initial(random, name, shape, spread), DTYPES[dtype])
        for name, shape in model_spec(config).checkpoint_shapes(form)
    }
    write_tensors(path, config, tensors)
    return Oracle(path, random.integers(0, config["vocab_size"], length).astype(np.int32))


def _initial(random: np.random.Generator, name: str, shape: tuple[int, ...], spread: float) -> np.ndarray:
    """transformers starts norms at 1, biases and sinks near 0: that would hide one left out or taken for another. It
    has matrices of the delta rule forget all but a few tokens, and keys as often near to a query as opposite, where
    trained models have neither: what a query finds would cancel, and a norm makes rounding as large as the rest.
    """
    values = random.standard_normal(shape)
    if is_around_one(name):
        return 1 + 0.1 * values
    if name.endswith("bias"):
        return 0.1 * values
    if name.endswith(("sinks", "attn_sink")):
        return 2 * values
    if name.endswith(("_base", "ape")):
        return 0.5 * values
    if name.endswith("A_log"):
        return values - 2
    if name.endswith("conv1d.weight"):
        return values
    return (0.3 if name.endswith("conv.conv.weight") else spread) * values


def logits(path: Path, tokens: np.ndarray) -> np.ndarray:
    """The fp32 logits [len, vocab] of transformers for a checkpoint directory."""
    group = json.loads((path / "config.json").read_text())["model_type"]
    return recorded(group, [contents(path), tokens.tolist()], lambda: computed_logits(path, tokens, "fp32"))


def computed_logits(path: Path, tokens: np.ndarray, dtype: str) -> np.ndarray:
    import torch

    torch_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    model_class = auto_model(json.loads((path / "config.json").read_text())["model_type"])
    model = model_class.from_pretrained(path, dtype=torch_dtype, attn_implementation="eager").eval()
    choose_by_length(model)
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)[None]).logits[0].float().numpy()


def choose_by_length(model: Any) -> None:
    """Have phimoe take its frequencies by the length of a sequence: versions before 5.24 did."""
    if model.config.model_type != "phimoe" or model.config.rope_parameters["rope_type"] != "longrope":
        return
    rotary = model.model.rotary_emb
    of_length, length = rotary.rope_init_fn, [0]

    def note(module: Any, arguments: Any, named: Any) -> None:
        length[0] = int(named["position_ids"].max()) + 1

    rotary.register_forward_pre_hook(note, with_kwargs=True)
    rotary.rope_init_fn = lambda config: of_length(config, seq_len=length[0])


def contents(path: Path) -> str:
    """A digest of what a checkpoint directory of one file says."""
    digest = hashlib.sha256(json.dumps(json.loads((path / "config.json").read_text()), sort_keys=True).encode())
    data = (path / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    for name in sorted(header.keys() - {"__metadata__"}):
        begin, end = header[name]["data_offsets"]
        digest.update(f"{name} {header[name]['dtype']} {header[name]['shape']}".encode())
        digest.update(data[start + begin : start + end])
    return digest.hexdigest()


def recorded(group: str, made_of: Any, compute: Callable[[], Any], near: float = NEAR) -> np.ndarray:
    """An array that transformers makes. group: the file of the record. made_of: all that it depends on, as for JSON."""
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    known = _read(group)
    if key in known and MODE not in (LIVE, WRITE, ADD):
        return known[key]
    if not (find_spec("torch") and find_spec("transformers")):
        pytest.fail(f"{group}/{key} is not recorded: run tests/recorded/transformers.py where torch is installed")
    found = np.asarray(compute())
    if MODE in (WRITE, ADD):
        _written.setdefault(group, {})[key] = found
    elif key in known:
        assert _distance(found, known[key]) <= near, f"{group}/{key} is not what was recorded"
    return found


def recorded_json(group: str, made_of: Any, compute: Callable[[], Any]) -> Any:
    """The same for what JSON can hold."""
    return json.loads(str(recorded(group, made_of, lambda: np.asarray(json.dumps(compute(), sort_keys=True)))))


def _distance(found: np.ndarray, known: np.ndarray) -> float:
    if found.dtype.kind != "f":
        return _json_distance(json.loads(str(found)), json.loads(str(known)))
    return float(np.linalg.norm(found - known) / np.linalg.norm(known))


def _json_distance(found: Any, known: Any) -> float:
    """Of the two floats that are furthest apart, whose last digits depend on the processor; 1 where anything else is
    not the same.
    """
    if isinstance(found, float) and isinstance(known, float):
        return abs(found - known) / max(1.0, abs(known))
    if isinstance(found, dict) and isinstance(known, dict) and found.keys() == known.keys():
        return max((_json_distance(found[name], known[name]) for name in known), default=0.0)
    if isinstance(found, list) and isinstance(known, list) and len(found) == len(known):
        return max(map(_json_distance, found, known), default=0.0)
    return float(found != known)


_written: dict[str, dict[str, np.ndarray]] = {}


def _stored(group: str) -> dict[str, np.ndarray]:
    file = RECORD / f"{group}.npz"
    if not file.is_file():
        return {}
    with np.load(file) as arrays:
        return dict(arrays)


@functools.cache
def _read(group: str) -> dict[str, np.ndarray]:
    """Logits are stored as int16 with a scale, which costs 5e-5 of their norm."""
    found = _stored(group)
    scales = {name: found.pop(name) for name in list(found) if name.endswith("scale")}
    return {
        name: (array * scales[f"{name}scale"]).astype(np.float32) if array.dtype == np.int16 else array
        for name, array in found.items()
    }


@atexit.register
def _write() -> None:
    """Replace the files of the groups that this process computed, or add to them."""
    for group, arrays in _written.items():
        packed = _stored(group) if MODE == ADD else {}
        for name, array in sorted(arrays.items()):
            if array.dtype == np.float32 and array.ndim == 2:
                scale = np.abs(array).max() / 32767
                packed[name], packed[f"{name}scale"] = np.round(array / scale).astype(np.int16), scale
            else:
                packed[name] = array
        RECORD.mkdir(exist_ok=True)
        np.savez_compressed(RECORD / f"{group}.npz", **packed)
