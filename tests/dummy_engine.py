"""An engine without a model: logits are a function of the tokens in a sequence; asserts the batch contract."""

from __future__ import annotations

from dataclasses import dataclass
from queue import SimpleQueue
from types import SimpleNamespace

import numpy as np

from hybrid.core import Batch, StepResult, StepTimes
from hybrid.errors import StepCancelled
from hybrid.formats.block import BLOCK
from hybrid.machine.memory import MemoryGrant

RUN = 8  # tokens of a run, where a state is recurrent


@dataclass(frozen=True)
class DummyPlan:
    max_seq_len: int = 64
    sequences: int = 4
    max_rows: int = 8
    kv_token_budget: int = 256
    threads: int = 1
    isa: str = "dummy"
    format_text: str = "all of it dummy"
    repeatable: bool = True
    speculate: bool = True
    max_itl: float | None = 0.0  # no limit
    cache: None = None
    prefix_bytes: int = 0
    kv_idle_release: float | None = None
    prefix_dir: None = None
    min_free_bytes: int = 0

    @property
    def kv(self):
        run, fixed = (None, 0) if self.repeatable else (RUN, 16)
        return SimpleNamespace(repeatable=self.repeatable, run=run, token_bytes=1, fixed_bytes=fixed)

    @property
    def state_bytes(self) -> int:
        return self.kv_token_budget

    def to_dict(self):
        return {"max_seq_len": self.max_seq_len}


@dataclass(frozen=True)
class DummySaved:
    """As `hybrid.engine.saved.Saved`: the tokens themselves, a byte each."""

    values: list[int]

    @property
    def nbytes(self) -> int:
        return len(self.values)

    def part(self, start: int, stop: int) -> DummySaved:
        return DummySaved(self.values[start:stop])


class DummyEngine:
    """Greedy token: `next_token(tokens so far)`, whose logit is `peak` where all others are from -1 to 1. `fail` may
    raise before a step; `steps` keeps batches.
    """

    load_seconds = 0.5
    memory = MemoryGrant("map", "madvise", (), 0, 0)
    experts = routes = device_step = None

    def __init__(self, vocab: int = 300, fail=None, next_token=None, peak: float = 4.0, **plan) -> None:
        self.spec = SimpleNamespace(vocab=vocab, length_phase=lambda length: 0, max_position=1 << 20)
        self._peak = peak
        self.plan = DummyPlan(**plan)
        self.steps: list[Batch] = []
        self.closed = False
        self._fail = fail or (lambda batch: None)
        self._next = next_token or (lambda tokens: reference_token(tokens, vocab))
        self.sequences: dict[int, list[int]] = {}

    def forward(self, batch: Batch) -> StepResult:
        assert not self.closed
        self._check(batch)
        self.steps.append(batch)
        self._fail(batch)
        rows = [self._write(*row) for row in zip(batch.token_ids, batch.sequences, batch.positions, strict=True)]
        logits = np.stack([rows[i] for i in batch.logit_rows]) if len(batch.logit_rows) else self._none()
        return StepResult(logits, StepTimes(0.001, 0.002, 0.003, 0.004, 0.0, 0.010))

    def release(self, sequence: int) -> None:
        assert not self.closed
        self.sequences.pop(sequence, None)

    def copy(self, source: int, target: int, tokens: int) -> None:
        assert self.plan.repeatable and tokens % BLOCK == 0 and not self.sequences.get(target)
        assert 0 < tokens <= len(self.sequences[source])
        self.sequences[target] = self.sequences[source][:tokens]

    def step_bytes(self, rows: int) -> float:
        return 10.0 + rows

    @property
    def kv(self) -> DummyEngine:
        """As `KvArena`, too."""
        return self

    def save(self, sequence: int, start: int, stop: int) -> DummySaved:
        assert start % BLOCK == 0 and stop % BLOCK == 0 and start < len(self.sequences[sequence])
        return DummySaved(self.sequences[sequence][start:stop])

    def load(self, saved: DummySaved, sequence: int, start: int, tokens: int) -> None:
        held = self.sequences.setdefault(sequence, [])
        assert len(held) == start and tokens % BLOCK == 0
        held += saved.values[:tokens]

    def snapshot(self, sequence: int) -> np.ndarray:
        """Of a state that is its tokens, told as their number and their sum."""
        tokens = self.sequences[sequence]
        return np.array([len(tokens), sum(tokens)], np.int64).view(np.uint8)

    def restore(self, sequence: int, state: np.ndarray) -> None:
        length, total = state.view(np.int64)
        assert len(self.sequences[sequence]) == length and sum(self.sequences[sequence]) == total

    def cancel(self) -> None:
        """Its steps have no two operations to end between."""
        assert not self.closed

    def close(self) -> None:
        self.closed = True

    def _none(self) -> np.ndarray:
        return np.empty((0, self.spec.vocab), np.float32)

    def _write(self, token: int, sequence: int, position: int) -> np.ndarray:
        tokens = self.sequences.setdefault(int(sequence), [])
        assert position <= len(tokens), "a row must follow the tokens that its sequence holds"
        first = (len(tokens) - 1) // RUN * RUN  # of the run of the newest token
        assert self.plan.repeatable or first < position, "a recurrent state goes back within a run"
        del tokens[position:]
        tokens.append(int(token))
        logits = np.sin(np.arange(self.spec.vocab, dtype=np.float32) * (1 + sum(tokens) % 17))
        logits[self._next(tokens)] = self._peak
        return logits

    def device_report(self) -> None:
        """There is no device."""

    def _check(self, batch: Batch) -> None:
        arrays = (batch.token_ids, batch.sequences, batch.positions, batch.logit_rows)
        assert all(array.dtype == np.int32 and array.ndim == 1 for array in arrays)
        rows = len(batch.token_ids)
        assert 0 < rows == len(batch.sequences) == len(batch.positions) <= self.plan.max_rows
        assert np.all(np.diff(batch.logit_rows) > 0)
        assert all(0 <= row < rows for row in batch.logit_rows)
        assert batch.sequences.min() >= 0 and batch.sequences.max() < self.plan.sequences
        assert batch.positions.min() >= 0 and batch.positions.max() < self.plan.max_seq_len
        same = np.diff(batch.sequences) == 0
        assert np.all(np.diff(batch.positions)[same] == 1)
        assert 1 + np.count_nonzero(~same) == len(set(batch.sequences.tolist())), "rows of a sequence must be adjacent"
        assert sum(map(len, self.sequences.values())) <= self.plan.kv_token_budget


WATCHDOG = 60  # seconds after which a test that waits for a thread fails


class GatedEngine(DummyEngine):
    """Every step tells that it `began` and waits for a permit; `cancel` ends the one that waits, or else the next."""

    def __init__(self, **parts) -> None:
        super().__init__(**parts)
        self.began: SimpleQueue[Batch] = SimpleQueue()
        self.cancels = 0
        self._permits: SimpleQueue[bool | BaseException] = SimpleQueue()

    def permit(self, steps: int = 1) -> None:
        for _ in range(steps):
            self._permits.put(True)

    def let_fail(self, error: BaseException) -> None:
        """Have the step that waits fail."""
        self._permits.put(error)

    def cancel(self) -> None:
        super().cancel()
        self.cancels += 1
        self._permits.put(False)

    def forward(self, batch: Batch) -> StepResult:
        self.began.put(batch)
        permit = self._permits.get(timeout=WATCHDOG)
        if isinstance(permit, BaseException):
            raise permit
        if not permit:
            raise StepCancelled("the step was cancelled")
        return super().forward(batch)

    def rows(self) -> int:
        """Waits for a step to begin; how many rows it computes."""
        return len(self.began.get(timeout=WATCHDOG).token_ids)


def reference_token(tokens: list[int], vocab: int) -> int:
    return (sum(tokens) * 31 + len(tokens) * 7 + 3) % vocab


def reference_tokens(prompt: list[int], count: int, vocab: int = 300) -> list[int]:
    """What greedy generation on a DummyEngine must produce."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(reference_token(tokens, vocab))
    return tokens[len(prompt) :]
