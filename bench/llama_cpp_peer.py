"""llama.cpp through its C interface: the same tests with random tokens, without sampling or anything else of Python.

Its best settings for a CPU: mapped weights, repacked where it can, flash attention, F16 keys and values, steps of 512.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as api

from hybrid.commands.measure import Test
from hybrid.errors import CapacityError, WeightsError

STEP_ROWS = 512  # n_ubatch, and the tokens of the block that fills the KV
BATCH_ROWS = 2048  # n_batch: tokens handed over at a time
KV_PADDING = 256  # llama.cpp rounds its cells up to this

MAIN, SPARE = 0, 1  # sequences of the context of one sequence; SPARE takes a block before it is moved


_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_errors: list[str] = []


def _hear(level: int, text: bytes, data: object) -> None:
    """It tells hundreds of lines while loading."""
    if level == _ERROR and text.strip():
        _errors.append(text.decode(errors="replace").strip())


_LISTENER = api.llama_log_callback(_hear)  # a name of the module, because C keeps no reference to it


class LlamaCpp:
    """An opened GGUF file and a context for the longest test of each kind: one sequence, or several together.

    Several have a stream of cells each, which spares every query the others' cells; such tests start at depth 0,
    because llama.cpp restores no saved sequence into a stream.
    """

    def __init__(self, path: Path, threads: int, tests: Sequence[Test]) -> None:
        """Raises WeightsError or CapacityError when llama.cpp refuses the file or the sizes."""
        api.llama_log_set(_LISTENER, None)
        _errors.clear()
        api.llama_backend_init()
        parameters = api.llama_model_default_params()
        parameters.load_mode = api.LLAMA_LOAD_MODE_MMAP
        self._model = api.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            raise WeightsError(f"{path}: llama.cpp cannot load it: {_errors[0] if _errors else 'it does not say why'}")
        self.vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        alone = [test for test in tests if test.batch == 1] or [Test(0, 1, 0, 1)]
        together = [test for test in tests if test.batch > 1]
        deepest = max(test.depth for test in tests)
        longest = max(deepest, *(test.length for test in alone)) + 1
        self._alone = self._context(threads, 2, longest + STEP_ROWS, unified=True)
        self._together = None
        if together:
            count, length = max(test.batch for test in together), max(test.length for test in together) + 1
            self._together = self._context(threads, count, count * _padded(length), unified=False)
        self._batch = api.llama_batch_init(BATCH_ROWS, 0, 1)
        self._states: dict[int, Any] = {}

    def touch(self) -> None:
        """Map the pages of all weights: with random tokens a full step reaches nearly every expert."""
        self.prepare(Test(STEP_ROWS, 0, 0, 1))
        self.run(Test(STEP_ROWS, 0, 0, 1))

    def prepare(self, test: Test) -> None:
        """Fill the KV to the test's depth, and decode one token that is forgotten again."""
        context = self._context_of(test)
        memory = api.llama_get_memory(context)
        state = self._state(test.depth) if test.depth else None
        api.llama_memory_clear(memory, False)
        if state:
            self._restore(MAIN, state)
        self._decode(context, [(sequence, test.depth) for sequence in range(test.batch)], test.batch)
        for sequence in range(test.batch):
            api.llama_memory_seq_rm(memory, sequence, test.depth, -1)

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
        api.llama_memory_clear(api.llama_get_memory(self._alone), False)
        return np.stack([self.decode_one(position, token) for position, token in enumerate(tokens)])

    def decode_one(self, position: int, token: int) -> npt.NDArray[np.float32]:
        """Logits float32 [vocab] after one more token behind what is in the KV."""
        self._decode(self._alone, [(MAIN, position)], 1, [token])
        return np.ctypeslib.as_array(api.llama_get_logits_ith(self._alone, 0), (self.vocab,)).copy()

    def random_tokens(self, position: int, count: int) -> list[int]:
        """What is run from this position on: always the same."""
        tokens: list[int] = np.random.default_rng(position).integers(0, self.vocab, count).tolist()
        return tokens

    def close(self) -> None:
        api.llama_batch_free(self._batch)
        for context in (self._alone, self._together):
            if context:
                api.llama_free(context)
        api.llama_model_free(self._model)

    def _context(self, threads: int, sequences: int, cells: int, unified: bool) -> Any:
        parameters = api.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = _padded(cells), sequences
        parameters.n_batch, parameters.n_ubatch = BATCH_ROWS, STEP_ROWS
        parameters.n_outputs_max = max(sequences, 1)
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        parameters.kv_unified = unified
        context = api.llama_init_from_model(self._model, parameters)
        if not context:
            raise CapacityError(f"llama.cpp cannot make a context of {cells} tokens; lower the depths of --tests")
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
        status = api.llama_decode(context, batch)
        if status:
            raise CapacityError(f"llama.cpp refused a step of {count} tokens at position {places[0][1]} ({status})")
        api.llama_synchronize(context)

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
        memory, block = api.llama_get_memory(self._alone), min(depth, STEP_ROWS)
        api.llama_memory_clear(memory, False)
        self._prompt(self._alone, SPARE, 0, block)
        copied = self._save(SPARE)
        for start in range(0, depth, block):
            self._restore(SPARE, copied)
            api.llama_memory_seq_rm(memory, SPARE, min(block, depth - start), -1)
            api.llama_memory_seq_add(memory, SPARE, 0, -1, start)
            api.llama_memory_seq_cp(memory, SPARE, MAIN, -1, -1)
            api.llama_memory_seq_rm(memory, SPARE, -1, -1)
        self._decode(self._alone, [(MAIN, depth)], 1)  # turns the keys that were moved
        api.llama_memory_seq_rm(memory, MAIN, depth, -1)
        return self._save(MAIN)

    def _save(self, sequence: int) -> Any:
        data = (ctypes.c_uint8 * api.llama_state_seq_get_size(self._alone, sequence))()
        api.llama_state_seq_get_data(self._alone, data, len(data), sequence)
        return data

    def _restore(self, sequence: int, data: Any) -> None:
        if not api.llama_state_seq_set_data(self._alone, data, len(data), sequence):
            raise CapacityError("llama.cpp has no room for the KV of a test; lower the depths of --tests")


def _padded(cells: int) -> int:
    return -(-cells // KV_PADDING) * KV_PADDING


def missing_instructions(isa: str) -> list[str]:
    """What a native build for this machine would use and this one does not, of the instruction set `isa` of ours."""
    wanted = {"avx2": ["AVX2", "FMA"], "avx512": ["AVX512"], "avx512_bf16": ["AVX512", "AVX512_VNNI", "AVX512_BF16"]}
    wanted["amx"] = [*wanted["avx512_bf16"], "AMX_INT8"]
    info = api.llama_print_system_info().decode()
    return [name for name in wanted.get(isa, []) if f"{name} = 1" not in info]
