"""Engines of small checkpoints, and the ways to run a prompt through one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import oracle
from oracle import Oracle

from hybrid.config import EngineConfig
from hybrid.core import Batch
from hybrid.engine.engine import Engine


def open_engine(path: Path, packed: Path, **choices: Any) -> Engine:
    # Bits are compared: where that has a price, which is on AMX, it is paid.
    choices = {"threads": 2, "max_batch": 4, "chunk_size": 128, "batch_invariant": True, **choices}
    return Engine.open(EngineConfig(model_path=path, cache_dir=packed, **choices))


def step(engine: Engine, *parts: tuple[int, int, np.ndarray]) -> np.ndarray:
    """Logits of every row of a step, one part (slot, first position, tokens) a sequence."""
    slots = np.concatenate([np.full(len(tokens), slot) for slot, _, tokens in parts])
    positions = np.concatenate([first + np.arange(len(tokens)) for _, first, tokens in parts])
    tokens = np.concatenate([tokens for *_, tokens in parts])
    batch = (tokens, slots, positions, np.arange(len(tokens)))
    return engine.forward(Batch(*(array.astype(np.int32) for array in batch))).logits.copy()


def in_chunks(engine: Engine, tokens: np.ndarray, size: int, slot: int = 0) -> np.ndarray:
    chunks = range(0, len(tokens), size)
    return np.concatenate([step(engine, (slot, first, tokens[first : first + size])) for first in chunks])


def agreement(engine: Engine, tokens: np.ndarray, first: int, slot: int = 0) -> float:
    """How many of `tokens` from the first on are the most likely ones, each in a step of its own: of a text that others
    wrote, because one near-tie of two experts would be enough to write another.
    """
    logits = [in_chunks(engine, tokens[:first], first, slot)[-1:]]
    logits += [step(engine, (slot, i, tokens[i : i + 1])) for i in range(first, len(tokens) - 1)]
    return float(np.mean(np.concatenate(logits).argmax(1) == tokens[first:]))


def greedy(engine: Engine, prompt: np.ndarray, chunk: int, slot: int = 0, count: int = 24) -> list[int]:
    logits = in_chunks(engine, prompt, chunk, slot)[-1]
    tokens: list[int] = []
    for position in range(len(prompt), len(prompt) + count):
        tokens.append(int(logits.argmax()))
        logits = step(engine, (slot, position, np.array(tokens[-1:])))[0]
    return tokens


def errors_together(saved: Iterable[Oracle], cache: Path, **choices: Any) -> tuple[float, float]:
    """To fp32, of several checkpoints together: that of an engine, and that of transformers in bf16."""
    ours, theirs = [], []
    for one in saved:
        with open_engine(one.path, cache, **choices) as engine:
            ours.append(one.error(step(engine, (0, 0, one.tokens))))
            theirs.append(one.bf16_error)
    return oracle.together(ours), oracle.together(theirs)


def error_of_changed(saved: Oracle, folder: Path, changes: dict[str, Any], **choices: Any) -> float:
    """To what was saved, of an engine with the same tensors and a config.json with these changes, made in `folder`."""
    folder.mkdir()
    config = json.loads((saved.path / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    (folder / "model.safetensors").hardlink_to(saved.path / "model.safetensors")
    with open_engine(folder, folder / "cache", **choices) as engine:
        return saved.error(step(engine, (0, 0, saved.tokens)))
