"""Whatever batch `Engine.forward` is given: KernelError, or a step as any, and the next one is as always."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_checkpoint
from steps import open_engine, step
from test_hostile import arrays

from hybrid.config import CacheConfig
from hybrid.core import Batch
from hybrid.engine.engine import Engine
from hybrid.errors import KernelError

GOOD = np.array([3, 1, 4, 1, 5])


@pytest.fixture(params=["plain", "cache"])
def engine(request: pytest.FixtureRequest, tmp_path: Path):
    cached = {"device": "simulated", "cache": CacheConfig(3, 4)} if request.param == "cache" else {}
    source = write_checkpoint(tmp_path / "hf", "qwen3_moe")
    with open_engine(source, tmp_path / "packed", max_batch=3, chunk_size=4, max_seq_len=256, **cached) as engine:
        yield engine


def test_hostile_batches(engine: Engine) -> None:
    chance, ran = random.Random(5), 0
    clean = step(engine, (0, 0, GOOD[:3]))
    for _ in range(300):
        *rows, _ = arrays(chance)
        try:
            result = engine.forward(Batch(*rows))
        except KernelError as error:
            assert "step refused: " in str(error) and "\n" not in str(error)  # noqa: PT017
        else:
            assert len(result.logits) == len(rows[3])
            ran += 1
    assert ran > 3
    for sequence in range(3):
        engine.release(sequence)
    assert step(engine, (0, 0, GOOD[:3])).tobytes() == clean.tobytes()


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (Batch(ints(-1), ints(0), ints(0), ints(0)), "token id -1 is outside the vocabulary of 131"),
        (Batch(ints(131), ints(0), ints(0), ints(0)), "token id 131"),
        (Batch(ints(1), ints(9), ints(0), ints(0)), "sequence 9 of 3"),
        (Batch(ints(1), ints(-1), ints(0), ints(0)), "sequence -1 of 3"),
        (Batch(ints(1), ints(0), ints(256), ints(0)), "position 256 of 256"),
        (Batch(ints(1, 1), ints(0, 0), ints(3, 3), ints()), "positions of a sequence must ascend by one"),
        (Batch(ints(1, 1, 1), ints(0, 1, 0), ints(0, 0, 1), ints()), "rows of a sequence must be adjacent"),
        (Batch(ints(1), ints(0), ints(0), ints(1)), "logit row 1 of a step of 1"),
        (Batch(ints(1), ints(0), ints(0), np.zeros(100000, np.int32)), "logits of 100000 rows; planned for at most"),
        (Batch(ints(1, 2), ints(0), ints(0), ints(0)), "must have one length, not 2, 1 and 1"),
        (Batch(ints(), ints(), ints(), ints()), "a step of 0 rows"),
        (Batch(np.zeros(1), ints(0), ints(0), ints(0)), r"token_ids is float64 \[1\]"),
        (Batch([1], ints(0), ints(0), ints(0)), "token_ids is a list"),
        (Batch(ints(1), ints(0), ints(0), None), "logit_rows is a NoneType"),
    ],
)
def test_messages_have_the_values(batch: Batch, message: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "hf", "llama")
    opened = open_engine(source, tmp_path / "packed", max_batch=3, chunk_size=4, max_seq_len=256)
    with opened as engine, pytest.raises(KernelError, match=message):
        engine.forward(batch)
