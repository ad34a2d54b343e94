"""What llama.cpp and ik_llama.cpp have in common: the same tests with random tokens through the C interface, without
sampling or anything else of Python.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid.commands.measure import Test
from hybrid.errors import CapacityError, WeightsError

STEP_ROWS = 512  # n_ubatch, and the tokens of the block that fills the KV
BATCH_ROWS = 2048  # n_batch: tokens handed over at a time
KV_PADDING = 256  # llama.cpp rounds its cells up to this

_ERROR = 4  # GGML_LOG_LEVEL_ERROR
MAIN, SPARE = 0, 1  # sequences of the context of one sequence; SPARE takes a block before it is moved
ALL = -1  # positions, to either end


class Listener:
    """Keeps the errors of a library, which tells hundreds of lines while loading."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def __call__(self, level: int, text: bytes, data: object) -> None:
        if level == _ERROR and text.strip():
            self.errors.append(text.decode(errors="replace").strip())


class LlamaPeer(ABC):
    """An opened GGUF file and a context for the longest test of each kind: one sequence, or several together."""

    name: str
    package: str  # that brings it
    api: Any  # the module with the C interface
    listener: Listener  # of what the library says
    state_flags: tuple[int, ...] = ()  # further arguments of saving and restoring a sequence
    amx: tuple[str, ...] = ("AMX_INT8",)  # what it says of itself where it has tiles

    def __init__(self, path: Path, threads: int, tests: Sequence[Test]) -> None:
        """Raises WeightsError or CapacityError when the peer refuses the file or the sizes."""
        self.listener.errors.clear()
        self.api.llama_backend_init()
        self._model = self.api.llama_model_load_from_file(str(path).encode(), self.model_parameters())
        if not self._model:
            reason = next(iter(self.listener.errors), "it does not say why")
            raise WeightsError(f"{path}: {self.name} cannot load it: {reason}")
        self.vocab = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self._model))
        alone = [test for test in tests if test.batch == 1] or [Test(0, 1, 0, 1)]
        together = [test for test in tests if test.batch > 1]
        deepest = max(test.depth for test in tests)
        longest = max(deepest, *(test.length for test in alone)) + 1
        self._alone = self._context(threads, 2, longest + STEP_ROWS, unified=True)
        self._together = None
        if together:
            count, length = max(test.batch for test in together), max(test.length for test in together) + 1
            self._together = self._context(threads, count, count * _padded(length), unified=False)
        self._batch = self.api.llama_batch_init(BATCH_ROWS, 0, 1)
        self._states: dict[int, Any] = {}

    @classmethod
    def missing_instructions(cls, isa: str) -> list[str]:
        """What a native build for this machine would use and this one does not; isa: ours here."""
        wanted = {"avx2": ["AVX2", "FMA"], "avx512": ["AVX512"]}
        wanted["avx512_bf16"] = ["AVX512", "AVX512_VNNI", "AVX512_BF16"]
        wanted["amx"] = [*wanted["avx512_bf16"], *cls.amx]
        info = cls.api.llama_print_system_info().decode()
        return [name for name in wanted.get(isa, []) if f"{name} = 1" not in info]

    def touch(self) -> None:
        """Map the pages of all weights: with random tokens a full step reaches nearly every expert."""
        self.prepare(Test(STEP_ROWS, 0, 0, 1))
        self.run(Test(STEP_ROWS, 0, 0, 1))

    def prepare(self, test: Test) -> None:
        """Fill the KV to the test's depth, and decode one token that is forgotten again."""
        context = self._context_of(test)
        state = self._state(test.depth) if test.depth else None
        self.clear(context)
        if state:
            self._restore(MAIN, state)
        self._decode(context, [(sequence, test.depth) for sequence in range(test.batch)], test.batch)
        for sequence in range(test.batch):
            self.remove(context, sequence, test.depth, ALL)

    def run(self, test: Test) -> None:
        """What is timed: the prompt of every sequence, or `generate` steps of all of them."""
        context = self._context_of(test)
        if test.prompt:
            for sequence in range(test.batch):
                self._prompt(context, sequence, test.depth, test.prompt)
            return
        for position in range(test.depth, test.length):
            self._decode(context, [(sequence, position) for sequence in range(test.batch)], test.batch)

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Next-token logits after each of the tokens, decoded one by one: float32 [len(tokens), vocab]."""
        self.clear(self._alone)
        return np.stack([self.decode_one(position, token) for position, token in enumerate(tokens)])

    def decode_one(self, position: int, token: int) -> npt.NDArray[np.float32]:
        """Logits float32 [vocab] after one more token behind what is in the KV."""
        self._decode(self._alone, [(MAIN, position)], 1, [token])
        return np.ctypeslib.as_array(self.api.llama_get_logits_ith(self._alone, 0), (self.vocab,)).copy()

    def random_tokens(self, position: int, count: int) -> list[int]:
        """What is run from this position on: always the same."""
        tokens: list[int] = np.random.default_rng(position).integers(0, self.vocab, count).tolist()
        return tokens

    def close(self) -> None:
        self.api.llama_batch_free(self._batch)
        for context in (self._alone, self._together):
            if context:
                self.api.llama_free(context)
        self.api.llama_model_free(self._model)

    @abstractmethod
    def model_parameters(self) -> Any:
        """Of loading a file, with the best settings for a CPU."""

    @abstractmethod
    def context_parameters(self, sequences: int, unified: bool) -> Any:
        """With the best settings for a CPU, but without sizes and threads.

        unified: whether sequences share one stream of cells, where there is a choice.
        """

    @abstractmethod
    def clear(self, context: Any) -> None:
        """Forget all tokens."""

    @abstractmethod
    def remove(self, context: Any, sequence: int, start: int, end: int) -> None:
        """Forget the positions from start up to end of a sequence."""

    @abstractmethod
    def move(self, context: Any, sequence: int, distance: int) -> None:
        """Move a whole sequence to later positions."""

    @abstractmethod
    def share(self, context: Any, source: int, target: int) -> None:
        """Give the tokens of one sequence to another as well."""

    def _context(self, threads: int, sequences: int, cells: int, unified: bool) -> Any:
        parameters = self.context_parameters(sequences, unified)
        parameters.n_ctx, parameters.n_seq_max = _padded(cells), sequences
        parameters.n_batch, parameters.n_ubatch = BATCH_ROWS, STEP_ROWS
        parameters.n_threads = parameters.n_threads_batch = threads
        context = self.api.llama_init_from_model(self._model, parameters)
        if not context:
            raise CapacityError(f"{self.name} cannot make a context of {cells} tokens; lower the depths of --tests")
        return context

    def _context_of(self, test: Test) -> Any:
        return self._alone if test.batch == 1 else self._together

    def _prompt(self, context: Any, sequence: int, start: int, count: int) -> None:
        """Logits for the last token only."""
        for first in range(start, start + count, BATCH_ROWS):
            last = min(first + BATCH_ROWS, start + count)
            places = [(sequence, position) for position in range(first, last)]
            self._decode(context, places, int(last == start + count))

    def _decode(
        self, context: Any, places: Sequence[tuple[int, int]], logits: int, tokens: Sequence[int] | None = None
    ) -> None:
        """One call with a row at each (sequence, position), and logits for the last `logits` rows."""
        if tokens is None:
            tokens = self.random_tokens(places[0][1], len(places))
        batch, count = self._batch, len(places)
        batch.n_tokens = count
        for i, ((sequence, position), token) in enumerate(zip(places, tokens, strict=True)):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = i >= count - logits
        status = self.api.llama_decode(context, batch)
        if status:
            raise CapacityError(f"{self.name} refused a step of {count} tokens at position {places[0][1]} ({status})")
        self.api.llama_synchronize(context)

    def _state(self, depth: int) -> Any:
        """The saved KV of a sequence of `depth` tokens.

        A real prompt of that length would take llama.cpp minutes. Instead one block of real tokens is copied behind
        itself and each copy turned to its own positions, by llama.cpp's own means. Every cell is then a real key and
        value that attention must read and multiply, in the order and the place that a prompt would have left it in.
        """
        if depth not in self._states:
            self._states[depth] = self._build_state(depth)
        return self._states[depth]

    def _build_state(self, depth: int) -> Any:
        context, block = self._alone, min(depth, STEP_ROWS)
        self.clear(context)
        self._prompt(context, SPARE, 0, block)
        copied = self._save(SPARE)
        for start in range(0, depth, block):
            self._restore(SPARE, copied)
            self.remove(context, SPARE, min(block, depth - start), ALL)
            self.move(context, SPARE, start)
            self.share(context, SPARE, MAIN)
            self.remove(context, SPARE, ALL, ALL)
        self._decode(context, [(MAIN, depth)], 1)  # turns the keys that were moved
        self.remove(context, MAIN, depth, ALL)
        return self._save(MAIN)

    def _save(self, sequence: int) -> Any:
        size = self.api.llama_state_seq_get_size(self._alone, sequence, *self.state_flags)
        data = (ctypes.c_uint8 * size)()
        self.api.llama_state_seq_get_data(self._alone, data, size, sequence, *self.state_flags)
        return data

    def _restore(self, sequence: int, data: Any) -> None:
        if not self.api.llama_state_seq_set_data(self._alone, data, len(data), sequence, *self.state_flags):
            raise CapacityError(f"{self.name} has no room for the KV of a test; lower the depths of --tests")


def _padded(cells: int) -> int:
    return -(-cells // KV_PADDING) * KV_PADDING
